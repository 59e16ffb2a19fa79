"""Linha 4 da tabela: o Redis que responde, mas recusa. Em cada estado, um status que convém ou uma linha de erro dentro do
streaming; no log, as palavras do próprio Redis, sem enxurrada; e tudo volta sozinho quando o estado passa."""

import contextlib
import json
import re
import time

import pytest
import redis

import harness
import peers
import redis_faults
import support

pytestmark = pytest.mark.timeout(redis_faults.limit)

# Pedidos feitos em cada estado, e o que se espera, em segundos, de cada resposta e da volta ao normal.
requests = peers.scale(3, 30)
answer_time, recovery_time = 6, 6

kills = peers.scale(40, 400)


class situation:
    """O que uma prova desta página tem à mão: o servidor, uma conexão de administração, o proxy e seus streams vivos."""

    def __init__(self, server, admin, proxy, connect, worker, pairs):
        """Guarda tudo.

        Argumentos:
            server: o harness.redis_server.
            admin: um redis.Redis que o estado não atinge.
            proxy: o proxy.
            connect: o acessório de mesmo nome.
            worker: o harness.worker.
            pairs: pares (response, task) dos streams vivos.
        """
        self.server, self.admin, self.proxy, self.connect = server, admin, proxy, connect
        self.worker, self.pairs = worker, pairs

    def drop_proxy(self):
        """Derruba a conexão do proxy."""
        for row in self.admin.client_list():
            if row["name"] == "py-ndjson-proxy":
                self.admin.execute_command("CLIENT", "KILL", "ID", row["id"])

    def acl(self, *rules):
        """Muda os direitos do usuário do proxy. Argumentos: rules, as regras de ACL SETUSER."""
        self.admin.execute_command("ACL", "SETUSER", "limitado", *rules)


@pytest.fixture
def arrange(start_redis, start_proxy, connect, start_worker):
    """Fábrica de situation, com dois streams vivos: um que já recebeu uma linha e um calado.

    Retorno:
        Função que recebe linhas de redis.conf e argumentos do proxy.
    """

    def make(*config, flags=(), anonymous=False, **options):
        """Monta tudo. Argumentos: config, linhas de redis.conf; flags, argumentos do proxy; anonymous, verdadeiro para que
        o proxy não se autentique; options, as de start_redis. Retorno: a situation."""
        server = start_redis(*config, **options)
        env = {} if anonymous else support.limited_user(server)
        proxy = start_proxy("-i", 50, "-t", 20000, *flags, redis=server, env=env)
        admin = server.client()
        worker = start_worker(admin)
        pairs = support.open_streams(connect, proxy, worker, 2)
        pairs[0][1].push("antes")
        assert pairs[0][0].line() == b"antes"
        return situation(server, admin, proxy, connect, worker, pairs)

    return make


class state(tuple):
    """Um estado do Redis: as palavras dele, os status que convêm a um pedido novo, como se entra e como se sai."""

    def __new__(cls, words, statuses, enter, leave, config=(), **options):
        """Guarda o estado.

        Argumentos:
            words: expressão regular das palavras do Redis.
            statuses: os status permitidos de um pedido novo.
            enter: função que recebe a situation e põe o Redis no estado.
            leave: função que recebe a situation e o tira dele.
            config: linhas de redis.conf.
            options: as de arrange.
        """
        return super().__new__(cls, (words, set(statuses), enter, leave, config, options))


def denied(*rules, statuses=(500,), undo=("+@all", "~*", "&*"), drop=False, words="(?i)no permissions", flags=()):
    """Monta o estado em que a ACL tira um direito do proxy.

    Argumentos:
        rules: regras de ACL SETUSER.
        statuses: os status permitidos.
        undo: regras que devolvem o direito.
        drop: verdadeiro para derrubar a conexão, para que o direito falte na volta.
        words: palavras do Redis.
        flags: argumentos do proxy.

    Retorno:
        O state.
    """

    def enter(here):
        """Tira o direito. Argumentos: here, a situation."""
        here.acl(*rules)
        if drop:
            here.drop_proxy()

    return state(words, statuses, enter, lambda here: here.acl(*undo), flags=flags)


def close_door(here):
    """Passa a exigir uma senha que o proxy não tem, e derruba a conexão dele. Argumentos: here, a situation."""
    here.acl("resetpass", ">outra")
    here.drop_proxy()


def demand_password(here):
    """Passa a exigir senha de quem não dá nenhuma, e derruba a conexão do proxy. Argumentos: here, a situation."""
    here.admin.config_set("requirepass", "outra")
    here.drop_proxy()


def be_busy(here):
    """Ocupa o Redis com um script de quatro segundos, sem esperar por ele. Argumentos: here, a situation."""
    script = """
    local function now() local t = redis.call('TIME'); return t[1] * 1000 + t[2] / 1000 end
    local limit = now() + 4000
    while now() < limit do end
    """
    client = here.server.client()
    here.busy = client.connection_pool.get_connection()
    here.busy.send_command("EVAL", script, 0)
    # O Redis passa a responder BUSY depois de lua-time-limit.
    harness.eventually(lambda: not answers(here), 5, "Redis ocupado")


def answers(here):
    """Diz se o Redis responde ao PING. Argumentos: here, a situation. Retorno: bool."""
    with contextlib.suppress(redis.ResponseError):
        return here.admin.ping()
    return False


def stop_being_busy(here):
    """Mata o script de be_busy e espera o Redis. Argumentos: here, a situation."""
    with contextlib.suppress(redis.ResponseError):
        here.admin.script_kill()
    harness.eventually(lambda: answers(here), 10, "Redis desocupado")
    here.busy.disconnect()


def become_replica(here):
    """Faz do servidor réplica de um mestre que não existe. Argumentos: here, a situation."""
    here.admin.execute_command("REPLICAOF", "127.0.0.1", str(harness.free_port()))


states = {
    "OOM": state(
        "command not allowed when used memory",
        (500, 503),
        lambda here: here.admin.config_set("maxmemory", 1),
        lambda here: here.admin.config_set("maxmemory", 0),
        ("maxmemory-policy noeviction",),
    ),
    "READONLY": state(
        "write against a read only replica",
        (500, 503, 504),
        become_replica,
        lambda here: here.admin.execute_command("REPLICAOF", "NO", "ONE"),
    ),
    "MASTERDOWN": state(
        "Link with MASTER is down",
        (500, 503, 504),
        become_replica,
        lambda here: here.admin.execute_command("REPLICAOF", "NO", "ONE"),
        ("replica-serve-stale-data no",),
    ),
    "WRONGPASS": state(
        "invalid username-password pair",
        (500, 503, 504),
        close_door,
        lambda here: here.acl("resetpass", ">senha"),
    ),
    "NOAUTH": state(
        "Authentication required",
        (500, 503, 504),
        demand_password,
        lambda here: here.admin.config_set("requirepass", ""),
        anonymous=True,
    ),
    "BUSY": state("busy running a script", (500, 503, 504), be_busy, stop_being_busy, ("lua-time-limit 50",)),
    "NOPERM_set": denied("-set"),
    "NOPERM_publish": denied("-publish"),
    "NOPERM_canal": denied("resetchannels"),
    "NOPERM_chaves": denied("resetkeys", "~outra*"),
    "NOPERM_multi": denied("-multi"),
    "NOPERM_ping": denied("-ping", statuses=(500, 504)),
    "NOPERM_select": denied("-select", statuses=(500, 504), drop=True),
    "NOPERM_tudo": denied("-@all", statuses=(500, 504)),
    "NOPERM_evalsha": denied("-evalsha", statuses=(200,)),
    "NOPERM_lpop": denied("-lpop", statuses=(200,), words="(?i)no permissions|can't run this command|ACL failure"),
    "NOPERM_type": denied("-type", statuses=(200,), words="(?i)no permissions|can't run this command|ACL failure"),
    "NOPERM_expire": denied("-expire", statuses=(200,), flags=("--ttl", 6)),
    "NOPERM_unlink": denied("-unlink", statuses=(200,)),
}


def find_task(worker, response):
    """Acha a tarefa de um pedido entre as publicadas: as recusadas podem ter sido publicadas, e já não existem.

    Argumentos:
        worker: o harness.worker.
        response: a response do pedido.

    Retorno:
        A task.
    """
    name = response.header("X-Task-Name")
    key = harness.default_prefix + name
    while worker.next_key() != key:
        pass
    return harness.task(worker.client, key, worker.client.get(key))


def serve_in_state(here, response):
    """Segue até o fim um pedido que o Redis aceitou apesar do estado: linha e fim, ou erro dentro do streaming.

    Argumentos:
        here: a situation.
        response: a response, com status 200.

    Retorno:
        Verdadeiro se acabou em erro.
    """
    task = find_task(here.worker, response)
    task.finish("no estado")
    received = response.lines(answer_time)
    if received == [b"no estado"]:
        return False
    assert json.loads(received[-1])["error"] == "redis_error", received
    return True


def ask_in_state(here, statuses, words):
    """Faz os pedidos da prova e confere as respostas.

    Argumentos:
        here: a situation.
        statuses: os status permitidos.
        words: as palavras do Redis.

    Retorno:
        Quantos pedidos foram recusados ou acabaram em erro.
    """
    refused = 0
    for number in range(requests):
        began = time.monotonic()
        response = here.connect(here.proxy).request("POST", f"/{number}", body="x").response()
        assert response.status in statuses, (response.head, here.proxy.log())
        assert response.header("X-Author") and response.header("Server") == "py-ndjson-proxy"
        if response.status == 200:
            refused += serve_in_state(here, response)
        else:
            refused += 1
            assert response.header("Content-Type").startswith("application/json")
            body = response.json()
            assert body["error"] == ("redis_unavailable" if response.status == 504 else "redis_error")
            assert response.status == 504 or re.search(words, body["message"]), body
        ping = here.connect(here.proxy).request("GET", "/ping").response()
        assert (ping.status, ping.body() == b"pong") in ((200, True), (500, False))
        assert time.monotonic() - began < answer_time
    return refused


def recover(here):
    """Espera que um pedido novo seja atendido por inteiro e que os streams vivos tenham acabado bem ou em erro.

    Argumentos:
        here: a situation.

    Retorno:
        Quantos streams vivos acabaram em erro.
    """

    def served():
        """Faz um pedido; diz se foi aceito. Retorno: a response, ou None."""
        response = here.connect(here.proxy).request("POST", "/depois").response()
        return response if response.status == 200 else None

    response = harness.eventually(served, recovery_time, "pedido atendido")
    find_task(here.worker, response).finish("depois")
    assert response.lines() == [b"depois"]
    assert here.connect(here.proxy).request("GET", "/ping").response().body() == b"pong"
    failed = 0
    for live, task in here.pairs:
        if task.exists():
            task.finish("seguiu")
        received = [bytes(line) for line in live.lines(recovery_time)]
        if received and json.loads(received[-1] if received[-1].startswith(b"{") else "null"):
            assert json.loads(received[-1])["error"] == "redis_error", received
            failed += 1
        else:
            assert received in ([b"seguiu"], [b"durante", b"seguiu"]), (received, here.proxy.log())
    return failed


@pytest.mark.parametrize("name", states, ids=[f"{name}-{requests}_pedidos" for name in states])
def test_state(arrange, name):
    """O estado aparece no status ou na linha de erro, e no log, sem enxurrada; acaba o estado, e tudo volta sozinho."""
    words, statuses, enter, leave, config, options = states[name]
    here = arrange(*config, **options)
    before = len(here.proxy.log().splitlines())
    enter(here)
    try:
        with contextlib.suppress(redis.ResponseError):
            here.pairs[0][1].push("durante")
        refused = ask_in_state(here, statuses, words)
        here.proxy.wait_log(words, 10)
        # Dez vezes INTERVAL: uma consulta periódica que falhasse a cada uma encheria o log.
        time.sleep(0.5)
        seen = here.proxy.log().splitlines()[before:]
    finally:
        leave(here)
    told = [line for line in seen if re.search(words, line)]
    # Uma por pedido recusado ou stream encerrado, e uma pelo que o proxy faz por conta própria.
    assert 1 <= len(told) <= refused + len(here.pairs) + 1, seen
    unexplained = [line for line in seen if line not in told and not re.search("tarefa=|REDIS_WAKE", line)]
    assert len(unexplained) <= 2, unexplained
    failed = recover(here)
    peers.say(
        f"{name}: {refused} de {requests} pedidos em erro, {failed} de {len(here.pairs)} streams vivos acabados em erro, "
        f"{len(told)} linhas de log"
    )
    support.wait_empty(here.admin, 10)


def push_text(task):
    """Põe um texto no lugar da lista. Argumentos: task, a tarefa."""
    task.client.set(task.list, "texto")


def push_hash(task):
    """Põe um hash no lugar da lista. Argumentos: task, a tarefa."""
    task.client.hset(task.list, "campo", "valor")


def turn_key_into_hash(task):
    """Troca a chave da tarefa por um hash. Argumentos: task, a tarefa."""
    with task.client.pipeline(transaction=True) as pipe:
        pipe.delete(task.key).hset(task.key, "campo", "valor").execute()


def turn_key_into_stream(task):
    """Troca a chave da tarefa por um stream do Redis. Argumentos: task, a tarefa."""
    with task.client.pipeline(transaction=True) as pipe:
        pipe.delete(task.key).xadd(task.key, {"campo": "valor"}).execute()


wrong_types = {
    "lista_texto": push_text,
    "lista_hash": push_hash,
    "tarefa_hash": turn_key_into_hash,
    "tarefa_stream": turn_key_into_stream,
}


@pytest.mark.parametrize("wake", ["on", "off"])
def test_wrong_type(start_proxy, connect, worker, wake):
    """4 de nossas chaves com outro tipo: depressa, uma linha de erro dentro do streaming, uma no log, e nenhuma chave fica."""
    proxy = start_proxy("-i", 100, "-t", 8000, "--wake", wake)
    *pairs, (other, other_task) = support.open_streams(connect, proxy, worker, len(wrong_types) + 1)
    for (name, spoil), (response, task) in zip(wrong_types.items(), pairs, strict=True):
        task.push("antes")
        assert response.line() == b"antes"
        spoil(task)
        (line,) = response.lines(5)
        error = json.loads(line)
        assert error["error"] == "redis_error", (name, error)
        # Só a frase do Redis: o endereço interno do script não diz nada a quem lê.
        assert "script" not in error["message"] and "@user" not in error["message"], (name, error)
        assert name.startswith("tarefa") or "WRONGTYPE" in error["message"], (name, error)
        assert support.finished_row(proxy, task)["fim"] == "erro"
        told = redis_faults.log_lines(proxy, f"^aviso: .*{task.name}")
        assert len(told) == 1 and "@user" not in told[0], told
        task.gone()
    other_task.finish("segue")
    assert other.lines() == [b"segue"]


def test_wrong_type_of_the_kept_lines(start_proxy, connect, worker):
    """A chave em que ficam as últimas linhas retiradas, com outro tipo: as linhas seguem, ou uma linha de erro o diz."""
    proxy = start_proxy("-t", 8000)
    response, task = support.open_stream(connect, proxy, worker)
    task.push("antes")
    assert response.line() == b"antes"
    with task.client.pipeline(transaction=True) as pipe:
        pipe.delete(f"{task.list}:taken").rpush(f"{task.list}:taken", "x").execute()
    task.finish("depois")
    (line,) = response.lines(5)
    assert line == b"depois" or "WRONGTYPE" in json.loads(line)["message"]
    task.gone()


@pytest.mark.parametrize("times", [kills], ids=[f"{kills}_vezes"])
def test_client_kill(start_redis, start_proxy, connect, start_worker, times):
    """CLIENT KILL da conexão do proxy, sob carga: nada se perde, se repete ou troca de lugar."""
    server = start_redis()
    proxy = start_proxy("-P", 1, redis=server)
    worker = start_worker(server.client())
    pairs = redis_faults.open_many(connect, proxy, worker, 10)
    here = situation(server, worker.client, proxy, connect, worker, pairs)
    made = []

    def hold(fraction):
        """Derruba conexões no ritmo das linhas. Argumentos: fraction, a fração das linhas já empurrada."""
        while len(made) < fraction * times:
            here.drop_proxy()
            made.append(1)
            time.sleep(0.01)

    total = times * 10
    source = redis_faults.feeder(lambda: support.plain_client(server), [task for _, task in pairs], total, hold)
    with redis_faults.closing_thread(source):
        text = redis_faults.deliver_all(proxy, pairs, total, peers.scale(60, 600))
        harness.eventually(lambda: source.done, 10, "worker encerrado")
    down, back = len(redis_faults.log_lines(proxy, "fora do ar")), len(redis_faults.log_lines(proxy, "de volta"))
    assert down == back <= len(made), (down, back)
    peers.say(f"{len(made)} vezes CLIENT KILL; {text}")
    support.wait_empty(worker.client, 5)


def test_full_buffer_of_the_connection(start_redis, start_proxy, connect, start_worker):
    """O Redis derruba a conexão, cheia de avisos: no máximo uma queda no log, as linhas seguem, e os avisos também."""
    server = start_redis("client-output-buffer-limit normal 64kb 64kb 0")
    proxy = start_proxy("-i", 60000, "-t", 90000, redis=server)
    worker = start_worker(server.client())
    pairs = support.open_streams(connect, proxy, worker, 5)
    killed = support.proxy_connection(server)
    proxy.freeze()
    # Cada aviso leva o nome da chave: alguns megabytes deles passam do que cabe nos soquetes.
    name = "ndjson_list_" + "x" * 100000
    for number in range(1000):
        worker.client.set(f"{name}{number % 10}", number)
        if not server.clients_named("py-ndjson-proxy"):
            break
    else:
        raise AssertionError("o Redis não derrubou a conexão")
    worker.client.delete(*[f"{name}{number}" for number in range(10)])
    for _, task in pairs:
        task.push(task.name)
    proxy.thaw()
    for response, task in pairs:
        assert response.line() == task.name.encode()
    support.wait_reopened(server, killed)
    for response, task in pairs:
        task.finish("fim")
        assert response.lines() == [b"fim"]
    # Uma só, se algum comando esperava por resposta.
    assert len(redis_faults.log_lines(proxy, "fora do ar")) <= 1, proxy.log()
    assert not redis_faults.log_lines(proxy, support.polling_only)


def fill(client, count):
    """Grava chaves num outro banco, para que o Redis demore a carregar. Argumentos: client, um redis.Redis; count."""
    with client.pipeline(transaction=False) as pipe:
        for number in range(count):
            pipe.set(f"peso{number}", number)
        pipe.execute()


def check_loading(proxy, connect, pairs, before):
    """Confere as respostas enquanto o Redis carrega, e o log, e que os streams vivos continuam vivos.

    Argumentos:
        proxy: o proxy.
        connect: o acessório de mesmo nome.
        pairs: pares (response, task).
        before: quantas linhas o log tinha.
    """
    for _ in range(requests):
        response = connect(proxy).request("POST", "/").response()
        assert (response.status, response.json()["error"]) == (504, "redis_unavailable")
        assert connect(proxy).request("GET", "/ping").response().status == 500
    proxy.wait_log("loading the dataset in memory")
    seen = proxy.log().splitlines()[before:]
    assert len([line for line in seen if "loading the dataset" in line]) == 1, seen
    assert len([line for line in seen if "tarefa=" not in line]) <= 3, seen
    assert not [response for response, _ in pairs if response.ended]


def finish_all(proxy, pairs):
    """Entrega uma linha e o fim a cada stream, depois da volta do Redis.

    Argumentos:
        proxy: o proxy.
        pairs: pares (response, task).
    """
    proxy.wait_log("Redis de volta", 20)
    for response, task in pairs:
        task.finish("seguiu")
        assert response.lines() == [b"seguiu"]


@pytest.mark.parametrize("count", [peers.scale(3, 20)], ids=lambda count: f"{count}_streams")
def test_loading_after_a_restart(start_redis, start_proxy, connect, start_worker, count):
    """O Redis que reinicia e demora a carregar: 504 e /ping 500 em meio a isso, o motivo no log; os streams seguem."""
    server = start_redis("loading-process-events-interval-bytes 1024")
    with contextlib.closing(server.new_client(5)) as client:
        fill(client, peers.scale(12000, 60000))
    proxy = start_proxy(redis=server)
    pairs = redis_faults.open_many(connect, proxy, start_worker(server.client()), count)
    server.client().save()
    server.kill()
    proxy.wait_log("Redis fora do ar")
    before = len(proxy.log().splitlines())
    server.config = (*server.config, "key-load-delay 200")
    server.start(ready=False)
    with contextlib.closing(support.plain_client(server)) as client:
        harness.eventually(lambda: is_loading(client), 10, "Redis carregando")
        check_loading(proxy, connect, pairs, before)
        assert is_loading(client), "o Redis acabou de carregar antes do fim da conferência"
    harness.eventually(server.answers, 30, "Redis carregado")
    finish_all(proxy, pairs)
    with contextlib.closing(server.new_client(5)) as client:
        client.flushdb()
    support.wait_empty(server.client(), 5)


def is_loading(client):
    """Diz se o Redis está carregando os dados. Argumentos: client, um redis.Redis. Retorno: bool."""
    try:
        client.ping()
    except redis.BusyLoadingError:
        return True
    except redis.RedisError:
        pass
    return False


@pytest.mark.parametrize("count", [peers.scale(3, 20)], ids=lambda count: f"{count}_streams")
def test_loading_with_the_connection_alive(start_redis, start_proxy, connect, start_worker, count):
    """O Redis que recarrega os dados sem cair (como uma réplica que se sincroniza): o mesmo, e com uma linha de log."""
    server = start_redis("enable-debug-command yes", "loading-process-events-interval-bytes 1024")
    with contextlib.closing(server.new_client(5)) as client:
        fill(client, peers.scale(12000, 60000))
    proxy = start_proxy("-i", 50, redis=server)
    pairs = redis_faults.open_many(connect, proxy, start_worker(server.client()), count)
    before = len(proxy.log().splitlines())
    server.client().config_set("key-load-delay", 200)
    with contextlib.closing(support.plain_client(server)) as admin:
        reloading = admin.connection_pool.get_connection()
        reloading.send_command("DEBUG", "RELOAD")
        harness.eventually(lambda: is_loading(admin), 10, "Redis carregando")
        check_loading(proxy, connect, pairs, before)
        assert is_loading(admin), "o Redis acabou de carregar antes do fim da conferência"
        harness.eventually(lambda: not is_loading(admin), 30, "Redis carregado")
        assert reloading.read_response() == b"OK"
        reloading.disconnect()
    finish_all(proxy, pairs)
    with contextlib.closing(server.new_client(5)) as client:
        client.flushdb()
    support.wait_empty(server.client(), 5)
