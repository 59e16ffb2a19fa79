"""Acessórios (fixtures) comuns das provas. O resumo de cada um está no seu texto; as ferramentas, em harness.py."""

import contextlib
import gc
import os
import pathlib
import signal
import sys
import tempfile
import threading
import types

import hypothesis
import pytest

pytest.register_assert_rewrite("harness", "support")

import harness
import support

# O nohup e o & de um shell entregam ignorados os sinais que o programa, então, manteria assim.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

# O json-proxy.py é carregado por algumas provas: nada de __pycache__ ao lado dele.
sys.dont_write_bytecode = True

# A árvore pode ser só de leitura: o que o hypothesis guarda vai para a pasta temporária.
scratch = pathlib.Path(tempfile.gettempdir()) / f"py-ndjson-proxy-hypothesis-{os.getuid()}"
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(scratch))

hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    database=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")

# O que vive mais que uma prova: o Redis da sessão e os proxies partilhados por um módulo.
resident = types.SimpleNamespace(redis=None, proxies=[])


def forbid_skip(report):
    """Transforma em falha uma prova ignorada: a bateria nunca passa por pular.

    Argumentos:
        report: relatório do pytest, alterado no lugar.
    """
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"ignorar ou esperar a falha de uma prova não é permitido: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport():
    """Proíbe pular durante a prova. Retorno: gera uma vez, como pede o pytest."""
    outcome = yield
    forbid_skip(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report():
    """Proíbe pular um módulo inteiro. Retorno: gera uma vez, como pede o pytest."""
    outcome = yield
    forbid_skip(outcome.get_result())


def leaks(threads, sockets):
    """Procura o que sobrou de uma prova neste processo e nos que ele iniciou.

    Argumentos:
        threads: linhas de execução que existiam antes.
        sockets: soquetes que existiam antes.

    Retorno:
        Dicionário do que sobrou, vazio se nada.
    """
    known = {process.pid for process in (resident.redis, *resident.proxies) if process is not None}
    known |= harness.resident_pids
    found = {
        "processos": {pid: name for pid, name in harness.marked_processes().items() if pid not in known},
        "linhas de execução": [item.name for item in threading.enumerate() if item not in threads],
        "soquetes": sorted(harness.socket_inodes() - sockets),
        "chaves": resident.redis.leftovers() if resident.redis is not None else [],
    }
    for proxy in resident.proxies:
        now = proxy.sockets()
        if now > proxy.rest:
            found[f"proxy {proxy.server}"] = f"{now} soquetes; em repouso, {proxy.rest}"
    return {name: value for name, value in found.items() if value}


@pytest.fixture(autouse=True)
def leak_check():
    """Verificação de vazamentos, automática: depois de cada prova não sobra processo, linha de execução, soquete
    nem chave no Redis da sessão; e os proxies partilhados voltam a ter os soquetes do repouso."""
    threads = set(threading.enumerate())
    sockets = harness.socket_inodes()
    yield
    if resident.redis is not None:
        resident.redis.close_clients()
    last = {}

    def clean():
        """Guarda em last o que sobrou e diz se nada sobrou (bool)."""
        if last:
            # O soquete de um ciclo só se fecha quando este é recolhido.
            gc.collect()
        last.clear()
        last.update(leaks(threads, sockets))
        return not last

    try:
        harness.eventually(clean, 5, "prova sem vazamentos")
    except AssertionError:
        if resident.redis is not None:
            with contextlib.closing(resident.redis.new_client()) as client:
                client.flushall()
        raise AssertionError(f"sobrou da prova: {last}") from None


@pytest.fixture(params=["flask", "waitress"], scope="module")
def host(request):
    """Hospedeiro HTTP (valor de HTTP_SERVER): a prova que o usa roda uma vez em cada.

    Retorno:
        "flask" ou "waitress".
    """
    return request.param


@pytest.fixture(scope="session")
def redis_main(tmp_path_factory):
    """Redis da sessão (um por processo do xdist). Não o derrube nem o reconfigure: para isso há start_redis.

    Retorno:
        Um harness.redis_server.
    """
    server = harness.redis_server(tmp_path_factory.mktemp("redis")).start()
    resident.redis = server
    yield server
    resident.redis = None
    server.stop()


@pytest.fixture
def db(redis_main):
    """Banco 1 do Redis da sessão, vazio no começo da prova.

    Retorno:
        Um redis.Redis que devolve bytes.
    """
    client = redis_main.client()
    client.flushall()
    return client


@pytest.fixture
def start_redis(tmp_path):
    """Fábrica de servidores Redis extras: start_redis(*linhas_de_config, password="", appendonly=False, port=None).

    Ao fim, cada um que ainda vive deve estar sem chaves, e é encerrado. Depois de kill(), start() o traz de volta
    na mesma porta e com os mesmos dados.

    Retorno:
        Função que devolve um harness.redis_server já iniciado.
    """
    servers = []

    def start(*config, **options):
        """Inicia um servidor. Argumentos como em harness.redis_server. Retorno: o servidor."""
        server = harness.redis_server(tmp_path / f"redis-{len(servers)}", *config, **options)
        servers.append(server)
        return server.start()

    yield start
    rest = []
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
        for server in servers:
            if server.alive():
                server.thaw()
                rest += server.leftovers()
    assert not rest, f"chaves que sobraram: {rest}"


def make_proxy(folder, flags, env, env_file, server, host, wrapper=()):
    """Compõe um proxy com as configurações de toda prova: porta livre, endereço local, o Redis dado.

    Argumentos:
        folder: pasta da prova.
        flags: argumentos de linha de comando.
        env: variáveis de ambiente da prova, que prevalecem sobre as daqui.
        env_file: conteúdo do arquivo de ambiente (str ou bytes).
        server: o harness.redis_server.
        host: HTTP_SERVER, ou None para o padrão.
        wrapper: comando que o executa, como lista.

    Retorno:
        Um harness.proxy_process ainda não iniciado.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "proxy.env"
    path.write_bytes(env_file if isinstance(env_file, bytes) else env_file.encode())
    base = {"HTTP_PORT": "0", "HTTP_HOST": "127.0.0.1", "REDIS_SERVER": server.address, "ENV_FILE": str(path)}
    if host is not None:
        base["HTTP_SERVER"] = host
    if server.password:
        base["REDIS_PASSWORD"] = server.password
    return harness.proxy_process(folder, flags, {**base, **env}, wrapper)


@pytest.fixture
def start_proxy(request, tmp_path, redis_main, db, start_redis):
    """Fábrica de proxies: start_proxy(*flags, env={}, env_file="", redis=None, host=None, wrapper=(), ready=True).

    Vale-se do Redis da sessão se redis não vier; do hospedeiro parametrizado se a prova usa `host`. Ao fim, cada um
    ainda vivo é encerrado com SIGTERM e deve sair com 0 (ou proxy.expected_status), sem Traceback no log.

    Retorno:
        Função que devolve um harness.proxy_process.
    """
    proxies = []
    default_host = request.getfixturevalue("host") if "host" in request.fixturenames else None

    def start(*flags, env=None, env_file="", redis=None, host=default_host, wrapper=(), ready=True):
        """Inicia um proxy.

        Argumentos:
            flags: argumentos de linha de comando.
            env: variáveis de ambiente.
            env_file: conteúdo do arquivo de ambiente.
            redis: o harness.redis_server.
            host: HTTP_SERVER.
            wrapper: comando que o executa, como lista.
            ready: verdadeiro para esperar a linha `pronto:`.

        Retorno:
            O harness.proxy_process.
        """
        folder = tmp_path / f"proxy-{len(proxies)}"
        proxy = make_proxy(folder, flags, env or {}, env_file, redis or redis_main, host, wrapper)
        proxies.append(proxy)
        return proxy.start(ready)

    yield start
    with contextlib.ExitStack() as stack:
        for proxy in proxies:
            stack.callback(proxy.stop)


@pytest.fixture(scope="module")
def share_proxy(redis_main, tmp_path_factory):
    """Fábrica de proxies partilhados pelas provas do módulo: share_proxy(*flags, host="flask", env={}).

    O primeiro pedido de cada conjunto de configurações inicia o proxy; os outros recebem o mesmo. Mais barato, para as
    provas que não mexem no processo nem no Redis dele, e que só leem do log o que é da sua tarefa.

    Retorno:
        Função que devolve um harness.proxy_process.
    """
    made = {}

    def share(*flags, host="flask", env=None):
        """Dá o proxy de umas configurações.

        Argumentos:
            flags: argumentos de linha de comando.
            host: HTTP_SERVER.
            env: variáveis de ambiente.

        Retorno:
            O harness.proxy_process.
        """
        key = (host, *map(str, flags), *sorted((env or {}).items()))
        if key not in made:
            proxy = make_proxy(tmp_path_factory.mktemp("proxy"), flags, env or {}, "", redis_main, host)
            made[key] = proxy.start()
            warm_up(proxy)
            resident.proxies.append(proxy)
        return made[key]

    yield share
    with contextlib.ExitStack() as stack:
        for proxy in made.values():
            stack.callback(proxy.stop)
            if proxy in resident.proxies:
                resident.proxies.remove(proxy)


@pytest.fixture
def shared_proxy(host, share_proxy):
    """O proxy partilhado com os padrões, no hospedeiro parametrizado.

    Retorno:
        Um harness.proxy_process.
    """
    return share_proxy(host=host)


def warm_up(proxy):
    """Faz um ping, e anota em proxy.rest quantos soquetes o proxy tem em repouso.

    Argumentos:
        proxy: o harness.proxy_process.
    """
    start = proxy.sockets()
    with contextlib.closing(harness.connection(proxy.port)) as conn:
        assert conn.request("GET", "/ping").response().body() == b"pong"
    harness.eventually(lambda: proxy.sockets() <= start, 5, "soquetes em repouso")
    proxy.rest = proxy.sockets()


@pytest.fixture
def stack():
    """O que fecha ao fim da prova; para durar mais que os proxies, peça-o antes deles.

    Retorno:
        Um contextlib.ExitStack.
    """
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def supervisor(stack):
    """O systemd de um proxy.

    Retorno:
        Um support.supervisor.
    """
    return stack.enter_context(contextlib.closing(support.supervisor()))


@pytest.fixture
def start_worker(db):
    """Fábrica de trabalhadores: start_worker(client=db, channel="ndjson_jobs").

    Retorno:
        Função que devolve um harness.worker com a assinatura confirmada.
    """
    workers = []

    def start(client=None, channel=harness.default_channel):
        """Assina um canal. Argumentos: client, um redis.Redis; channel, o canal. Retorno: o harness.worker."""
        made = harness.worker(client if client is not None else db, channel)
        workers.append(made)
        return made

    yield start
    for made in workers:
        made.close()


@pytest.fixture
def worker(start_worker):
    """Um trabalhador que já assina o canal padrão no Redis da sessão: peça o pedido depois dele.

    Retorno:
        Um harness.worker.
    """
    return start_worker()


@pytest.fixture
def connect(start_proxy):
    """Fábrica de conexões cruas: connect(proxy_ou_porta, **opções). Fechadas ao fim, antes de parar os proxies.

    Retorno:
        Função que devolve uma harness.connection.
    """
    opened = []

    def start(where, **options):
        """Conecta. Argumentos: where, um proxy ou uma porta; options, as de connection. Retorno: a connection."""
        port = where if isinstance(where, int) else where.port
        made = harness.connection(port, **options)
        opened.append(made)
        return made

    yield start
    for made in opened:
        made.close()


@pytest.fixture
def fetch(connect):
    """Atalho: fetch(proxy, method, target, headers=(), body=None) conecta, pede e espera o cabeçalho da resposta.

    Retorno:
        Função que devolve uma harness.response.
    """

    def run(where, *args, **options):
        """Faz o pedido. Argumentos: where, o proxy; o resto como em connection.request. Retorno: a response."""
        return connect(where).request(*args, **options).response()

    return run
