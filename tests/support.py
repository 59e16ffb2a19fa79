"""Ferramentas das provas de streaming que vão além de harness.py: tarefas abertas aos pares, um worker que sobrevive à
queda do Redis, um intermediário que perde pedidos e respostas, e a hora de chegada dada pelo núcleo."""

import asyncio
import contextlib
import os
import re
import selectors
import socket
import struct
import sys
import threading
import time
import uuid

import redis
import redis.backoff
import redis.retry

import harness

# SO_TIMESTAMPNS: o núcleo anota a hora em que o dado chegou, que não depende de quando esta prova o leu.
timestamp_option = 35

# Trecho que só aparece quando o proxy passa a depender da consulta periódica.
polling_only = "só a consulta periódica"


def open_stream(connect, proxy, worker, *args, **options):
    """Abre um streaming e recebe sua tarefa.

    Argumentos:
        connect: o acessório de mesmo nome.
        proxy: o proxy.
        worker: o harness.worker que recebe a tarefa.
        args, options: os de connection.request.

    Retorno:
        Par (response com o cabeçalho lido, task).
    """
    response = connect(proxy).request(*args, **options).response()
    assert response.status == 200, response.head
    task = worker.next()
    assert response.header("X-Task-Name") == task.name
    return response, task


def open_streams(connect, proxy, worker, count, **options):
    """Abre muitos streamings ao mesmo tempo.

    Argumentos:
        connect: o acessório de mesmo nome.
        proxy: o proxy.
        worker: o harness.worker que recebe as tarefas.
        count: quantos.
        options: os de harness.connection.

    Retorno:
        Lista de pares (response, task), na ordem das conexões.
    """
    connections = [connect(proxy, **options).request("POST", f"/{number}") for number in range(count)]
    tasks = [worker.next(10) for _ in connections]
    named = {task.name: task for task in tasks}
    responses = [item.response() for item in connections]
    assert [response.status for response in responses] == [200] * count
    return [(response, named[response.header("X-Task-Name")]) for response in responses]


def row_words(row):
    """Lê as palavras que uma configuração aceita. Argumentos: row, a linha da tabela. Retorno: lista, ou vazia."""
    words = re.fullmatch(r"[\w/-]+(, [\w/-]+)* ou [\w/-]+", row.kind.allowed)
    return re.split(", | ou ", row.kind.allowed) if words else []


def finished_rows(proxy):
    """Lê as linhas de fim de tarefa do log (um aviso também pode nomear uma tarefa).

    Argumentos:
        proxy: o proxy.

    Retorno:
        Lista de dicionários dos campos.
    """
    return [row for row in proxy.tasks() if "fim" in row]


def finished_row(proxy, task):
    """Espera a linha de log do fim de uma tarefa, que deve ser uma só.

    Argumentos:
        proxy: o proxy.
        task: a tarefa.

    Retorno:
        Dicionário dos campos da linha.
    """

    def look():
        """Devolve as linhas de fim desta tarefa."""
        return [row for row in finished_rows(proxy) if row["tarefa"] == task.name]

    rows = harness.eventually(look, 5, f"linha de log da tarefa {task.name}")
    assert len(rows) == 1, rows
    return rows[0]


def proxy_connection(server):
    """Diz qual é a conexão do proxy, pelo nome. Argumentos: server, o harness.redis_server. Retorno: o id, ou None."""
    return next((row["id"] for row in server.clients_named("py-ndjson-proxy")), None)


def wait_reopened(server, before):
    """Espera que o proxy tenha outra conexão. Argumentos: server, o harness.redis_server; before, o id da que caiu."""
    harness.eventually(lambda: proxy_connection(server) not in (None, before), 5, "conexão reaberta")


def wait_empty(client, timeout=2.0):
    """Espera que não reste chave alguma no banco.

    Argumentos:
        client: um redis.Redis.
        timeout: prazo em segundos.
    """
    harness.eventually(lambda: not client.keys("*"), timeout, "banco sem chaves")


def limited_user(server, *rules):
    """Cria no Redis um usuário que pode tudo, menos o que as regras tiram.

    Argumentos:
        server: o harness.redis_server.
        rules: regras de ACL aplicadas depois de +@all.

    Retorno:
        Ambiente do proxy (dict) com o REDIS_SERVER desse usuário.
    """
    with contextlib.closing(server.new_client()) as client:
        client.execute_command("ACL", "SETUSER", "limitado", "on", ">senha", "~*", "&*", "+@all", *rules)
    return {"REDIS_SERVER": f"redis://limitado:senha@{server.address}"}


def apart(*kinds):
    """Monta o comando que roda outro em espaços de nomes próprios.

    Argumentos:
        kinds: os espaços ("mount", "net", "pid") e as demais opções de unshare, sem os hífens.

    Retorno:
        O wrapper de start_proxy (lista).
    """
    return ["unshare", *(["--map-root-user"] if os.geteuid() else []), *[f"--{kind}" for kind in kinds]]


def with_files(files):
    """Monta o comando que roda outro com arquivos do sistema trocados, que só ele vê.

    Argumentos:
        files: dicionário de caminho do sistema (str) para o arquivo que o substitui.

    Retorno:
        O wrapper de start_proxy (lista).
    """
    pairs = [str(path) for target, source in files.items() for path in (source, target)]
    # A raiz de um chroot não é um ponto de montagem: quem o fez já a isolou.
    script = (
        "mount --make-rprivate / 2>/dev/null || :; "
        'while [ "$1" != -- ]; do mount --bind "$1" "$2"; shift 2; done; shift; exec "$@"'
    )
    return [*apart("mount", "propagation=unchanged"), "sh", "-ec", script, "sh", *pairs, "--"]


def given_listener(monkeypatch, listener):
    """Faz dos próximos processos herdeiros de um socket que escuta, e monta o comando que o dá como o systemd o dá.

    Argumentos:
        monkeypatch: o acessório de mesmo nome.
        listener: o socket (socket.socket), que fica aberto aqui.

    Retorno:
        O wrapper de start_proxy (tupla).
    """
    number = listener.fileno()
    monkeypatch.setattr(harness.background, "inherited", (number,))
    script = f"""
import os, sys
if {number} != 3:
    os.dup2({number}, 3)
    os.close({number})
os.environ |= {{"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "http"}}
os.execvp(sys.argv[1], sys.argv[1:])
"""
    return (sys.executable, "-c", script)


def stamped_lines(response, timeout=20.0):
    """Lê o resto de uma resposta com a hora de chegada dada pelo núcleo, imune à demora desta prova em ler.

    Argumentos:
        response: a response, com o cabeçalho lido.
        timeout: prazo em segundos.

    Retorno:
        Lista de linhas (arrived), com `when` no relógio de parede.
    """
    sock = response.conn.sock
    sock.setsockopt(socket.SOL_SOCKET, timestamp_option, 1)
    deadline = time.monotonic() + timeout
    while not response.ended:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        data, extra, _, _ = sock.recvmsg(65536, 256)
        when = time.time()
        for _, kind, value in extra:
            if kind == timestamp_option:
                seconds, nanoseconds = struct.unpack("qq", value[:16])
                when = seconds + nanoseconds / 1e9
        response.feed(data, when)
    return response.lines()


# Um aviso inteiro do Redis (RESP3), com os nomes das chaves que mudaram.
invalidation = rb">2\r\n\$10\r\ninvalidate\r\n\*\d+\r\n(?:\$\d+\r\n[^\r]*\r\n)+"


def plain_client(server):
    """Abre um cliente do Redis que não repete comando por conta própria; quem chama o fecha.

    Argumentos:
        server: o harness.redis_server.

    Retorno:
        Um redis.Redis.
    """
    return server.new_client(retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))


class pusher(threading.Thread):
    """Worker que empurra linhas numeradas e atravessa a queda do Redis sem perder nem repetir nenhuma.

    Cada linha vai numa transação com a marca do que já foi empurrado: depois de uma queda, é a marca que diz por onde
    continuar. Ao fim apaga a chave da tarefa e a marca.
    """

    # Segundos, no máximo, até que pare.
    patience = 10

    def __init__(self, server, task, total, pace):
        """Prepara o worker.

        Argumentos:
            server: o harness.redis_server.
            task: a tarefa.
            total: quantas linhas.
            pace: intervalo entre linhas, em segundos.
        """
        super().__init__(name="pusher", daemon=True)
        self.server, self.task, self.total, self.pace = server, task, total, pace
        self.mark = f"marca-{task.name}"
        self.number, self.halt = 0, threading.Event()

    def run(self):
        """Empurra tudo, refazendo a conexão quantas vezes for preciso."""
        while not self.halt.wait(0.01):
            with contextlib.suppress(redis.RedisError), contextlib.closing(plain_client(self.server)) as client:
                if self.number < self.total:
                    self.number = int(client.get(self.mark) or 0)
                    self.push(client)
                client.delete(self.task.key, self.mark)
                return

    def push(self, client):
        """Empurra o que falta.

        Argumentos:
            client: um redis.Redis.
        """
        while self.number < self.total:
            with client.pipeline(transaction=True) as pipe:
                pipe.rpush(self.task.list, f'{{"n": {self.number}}}')
                pipe.set(self.mark, self.number + 1)
                pipe.execute()
            self.number += 1
            if self.halt.wait(self.pace):
                raise redis.ConnectionError("prova encerrada")

    def close(self):
        """Para e espera a linha de execução."""
        self.halt.set()
        self.join(self.patience)
        assert not self.is_alive()


class relay(threading.Thread):
    """Intermediário de TCP entre o proxy e o Redis que sabe perder o que passa por ele.

    cut derruba a conexão num pedido dado, antes de ele chegar ao Redis ou depois de rodar, com a resposta perdida: o
    pior momento para uma queda. drop engole as respostas que contêm um trecho, sem derrubar nada. mute emudece a conexão
    que fizer um pedido dado. spoil troca uma resposta por outra coisa. pace, em bytes por segundo, atrasa as respostas.
    """

    pace = 0
    # Segundos, no máximo, entre duas chamadas a look; None, só depois de repassar algo.
    tick = None

    def __init__(self, port):
        """Começa a escutar e a repassar.

        Argumentos:
            port: porta do Redis.
        """
        super().__init__(name="relay", daemon=True)
        self.target = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.bell, self.hand = socket.socketpair()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.bell, selectors.EVENT_READ)
        self.needle, self.left, self.ran, self.cuts = b"", 0, True, 0
        self.junk, self.swapped, self.quiet = b"", None, b""
        self.doomed, self.muted = set(), set()
        self.start()

    @property
    def address(self):
        """Endereço na forma de REDIS_SERVER (str)."""
        return f"127.0.0.1:{self.port}/{harness.default_db}"

    def cut(self, needle, times=1, ran=True):
        """Derruba a conexão nos próximos pedidos que contenham um trecho.

        Argumentos:
            needle: bytes procurados no pedido.
            times: quantas vezes.
            ran: verdadeiro para que o pedido rode e só a resposta se perca.
        """
        self.needle, self.left, self.ran = needle, times, ran

    def swap(self, pattern, new):
        """Troca daqui em diante um trecho das respostas, em cada pedaço que chega.

        Argumentos:
            pattern: bytes da expressão regular do trecho.
            new: bytes do que fica no lugar.
        """
        self.swapped = (re.compile(pattern), new)

    def mute(self, needle):
        """Emudece daqui em diante cada conexão que fizer um pedido. Argumentos: needle, bytes dele; vazio, nenhuma mais."""
        self.quiet = needle

    def inject(self, junk):
        """Manda agora ao proxy, por todas as conexões, o que o Redis não mandou.

        Argumentos:
            junk: bytes.
        """
        for key in list(self.selector.get_map().values()):
            if key.data and key.data[1]:
                key.fileobj.sendall(junk)

    def spoil(self, junk):
        """Troca a próxima resposta.

        Argumentos:
            junk: bytes que o proxy recebe no lugar dela.
        """
        self.junk = junk

    def run(self):
        """Repassa até close."""
        while True:
            for key, _ in self.selector.select(self.tick):
                if key.fileobj is self.bell:
                    return
                if key.fileobj is self.listener:
                    self.accept()
                elif key.fileobj.fileno() >= 0:
                    self.forward(key.fileobj, *key.data)
            self.look()

    def look(self):
        """Faz o que os que derivam deste fazem a cada volta; aqui, nada."""

    def accept(self):
        """Aceita uma conexão e abre a correspondente com o Redis."""
        near = self.listener.accept()[0]
        try:
            far = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            near.close()
            return
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(near, selectors.EVENT_READ, (far, True))
        self.selector.register(far, selectors.EVENT_READ, (near, False))

    def forward(self, sock, other, is_request):
        """Repassa um trecho, ou corta a conexão no lugar da resposta.

        Argumentos:
            sock: de onde vem.
            other: para onde vai.
            is_request: verdadeiro do proxy para o Redis.
        """
        data = b""
        with contextlib.suppress(OSError):
            data = sock.recv(1 << 20)
        if self.junk and data and not is_request:
            data, self.junk = self.junk, b""
        if self.swapped and data and not is_request:
            pattern, new = self.swapped
            data = pattern.sub(new, data)
            if not data:
                return
        if is_request and self.quiet and self.quiet in data:
            self.muted.add(other)
        if data and not is_request and sock in self.muted:
            return
        if is_request and self.left and self.needle in data:
            self.left -= 1
            self.cuts += 1
            self.doomed.add(other)
            data = data if self.ran else b""
        elif not is_request and sock in self.doomed:
            data = b""
        step = self.pace // 20 if self.pace and not is_request else len(data) or 1
        with contextlib.suppress(OSError):
            for start in range(0, len(data), step):
                other.sendall(data[start : start + step])
                time.sleep(0.05 if step < len(data) else 0)
        if not data:
            self.doomed -= {sock, other}
            self.muted -= {sock, other}
            for each in (sock, other):
                self.selector.unregister(each)
                each.close()

    def close(self):
        """Fecha tudo e espera a linha de execução."""
        self.hand.send(b"x")
        self.join(10)
        assert not self.is_alive()
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()
        self.selector.close()
        self.hand.close()


class slow_link(threading.Thread):
    """Enlace lento com o Redis: cada conexão do proxy sobe com um limite, e uma não atrasa a outra."""

    def __init__(self, port, pace):
        """Começa a escutar e a repassar.

        Argumentos:
            port: porta do Redis.
            pace: bytes por segundo.
        """
        super().__init__(name="slow_link", daemon=True)
        self.target, self.pace = port, pace
        self.listener = socket.socket()
        # Só vale se posto antes de conectar: o sistema guardaria os megabytes da tarefa inteira.
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        self.listener.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}/{harness.default_db}"
        self.loop = asyncio.new_event_loop()
        self.start()

    async def carry(self, reader, writer, pace):
        """Repassa um sentido. Argumentos: reader, writer, de onde e para onde; pace, bytes por segundo ou None."""
        with contextlib.suppress(OSError):
            while data := await reader.read(pace // 20 if pace else 65536):
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(len(data) / pace if pace else 0)
        writer.close()

    async def accept(self, reader, writer):
        """Repassa uma conexão. Argumentos: reader, writer, os dois sentidos dela."""
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        await asyncio.gather(self.carry(reader, far_writer, self.pace), self.carry(far_reader, writer, None))

    def run(self):
        """Repassa até close."""
        making = asyncio.start_server(self.accept, sock=self.listener, limit=self.pace // 20)
        server = self.loop.run_until_complete(making)
        self.loop.run_forever()
        server.close()
        for each in asyncio.all_tasks(self.loop):
            each.cancel()
        self.loop.run_until_complete(asyncio.sleep(0.01))
        self.loop.close()

    def close(self):
        """Fecha tudo e espera a linha de execução."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.join(10)
        assert not self.is_alive()


class supervisor(threading.Thread):
    """O systemd: recebe o que o proxy lhe notifica e guarda os descritores.

    rows é a lista de (instante, texto); kept, a dos sockets guardados.
    """

    def __init__(self):
        """Começa a ouvir; env é o ambiente que aponta para cá."""
        super().__init__(name="supervisor", daemon=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = f"prova-{uuid.uuid4().hex}"
        self.socket.bind(f"\0{name}")
        self.env = {"NOTIFY_SOCKET": f"@{name}"}
        self.rows, self.kept = [], []
        self.start()

    def run(self):
        """Guarda as notificações e os descritores até close."""
        while True:
            text, descriptors, _, _ = socket.recv_fds(self.socket, 65536, 4)
            if not text:
                return
            if b"FDSTOREREMOVE=1" in text:
                self.drop()
            self.kept += [socket.socket(fileno=each) for each in descriptors]
            self.rows.append((time.monotonic(), text.decode()))

    def drop(self):
        """Fecha os sockets guardados."""
        while self.kept:
            self.kept.pop().close()

    def states(self, since=0):
        """Lista os estados notificados. Argumentos: since, quantas notificações não contam. Retorno: lista de str."""
        words = ("READY=1", "RELOADING=1", "STOPPING=1")
        return [word for _, text in self.rows[since:] for word in words if word in text.split("\n")]

    def gaps(self, since):
        """Lista os intervalos, em segundos, entre os WATCHDOG=1 vindos desde um instante, o primeiro e o de agora inclusive.

        Argumentos:
            since: o instante monotônico.

        Retorno:
            Lista de segundos, em ordem crescente.
        """
        times = [since, *[when for when, text in self.rows if when > since and "WATCHDOG=1" in text], time.monotonic()]
        return sorted(after - before for before, after in zip(times, times[1:], strict=False))

    def close(self):
        """Para de ouvir e espera a linha de execução."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(b"", self.socket.getsockname())
        self.join(10)
        assert not self.is_alive()
        self.socket.close()
        self.drop()
