"""O cliente que some em qualquer byte da conversa, do primeiro do pedido ao último da resposta, e a qualquer momento do
streaming."""

import contextlib
import queue
import socket
import struct
import threading
import time

import harness
import peers
import support

body = b'{"prompt": "oi"}'
extra = b"Content-Type: application/json\r\nConnection: close\r\n"
plain = b"POST /corte HTTP/1.1\r\nHost: proxy.test\r\n%sContent-Length: %d\r\n\r\n%s" % (extra, len(body), body)
chunked = b"POST /corte HTTP/1.1\r\nHost: proxy.test\r\n%sTransfer-Encoding: chunked\r\n\r\n" % extra
chunked += b"5\r\nabcde\r\n0003\r\nfgh\r\n0\r\n\r\n"
old = b"GET /corte HTTP/1.0\r\n\r\n"
requests = [plain, chunked, old]

# O que o worker entrega a cada tarefa antes de encerrá-la.
lines = ['{"n": 1}', "a" * 300, '{"n": 3}']

# Modos de sumir: o fim comum, a queda, e só o lado de envio (que para nós também é sair).
ways = ["fim", "queda", "meio"]


def whole_answer(port, request):
    """Faz o pedido e lê a resposta inteira.

    Argumentos:
        port: porta do proxy.
        request: os bytes do pedido.

    Retorno:
        Número de bytes da resposta (int).
    """
    with contextlib.closing(harness.connection(port)) as conn:
        conn.send(request)
        conn.sock.settimeout(10)
        size = 0
        while data := conn.sock.recv(65536):
            size += len(data)
        return size


def points(sizes, count):
    """Reparte os pontos de corte: todo byte de todo pedido e de toda resposta, ou uma amostra igualmente espaçada.

    Argumentos:
        sizes: tamanho da resposta a cada pedido, na ordem de requests.
        count: quantos pontos.

    Retorno:
        Lista de (pedido, bytes enviados, bytes lidos, modo, espera antes de sair).
    """
    every = []
    for request, size in zip(requests, sizes, strict=True):
        every += [(request, sent, 0) for sent in range(len(request) + 1)]
        every += [(request, len(request), read) for read in range(1, size + 1)]
    chosen = [every[number * len(every) // count % len(every)] for number in range(count)]
    return [(*point, ways[number % len(ways)], 0) for number, point in enumerate(chosen)]


def leave(sock, way):
    """Some.

    Argumentos:
        sock: o soquete, que fica fechado.
        way: um de ways.
    """
    if way == "queda":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif way == "meio":
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        sock.settimeout(20)
        with contextlib.suppress(ConnectionError):
            while sock.recv(65536):
                pass
    sock.close()


def cut(port, request, sent, read, way, delay):
    """Envia uma parte do pedido, lê uma parte da resposta e some.

    Argumentos:
        port: porta do proxy.
        request: os bytes do pedido.
        sent: quantos enviar.
        read: quantos ler.
        way: modo de sumir.
        delay: espera antes de sair, em segundos.
    """
    sock = socket.socket()
    sock.settimeout(20)
    sock.connect(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Em dois envios: o corte também cai entre dois recebimentos do proxy.
    for part in (request[: sent // 2], request[sent // 2 : sent]):
        if part:
            sock.sendall(part)
    left = read
    while left:
        data = sock.recv(left)
        if not data:
            break
        left -= len(data)
    time.sleep(delay)
    leave(sock, way)
    assert not left, f"a resposta acabou {left} bytes antes do esperado"


def run_cuts(port, jobs, width=12):
    """Faz todos os cortes, alguns ao mesmo tempo.

    Argumentos:
        port: porta do proxy.
        jobs: lista de points.
        width: quantos ao mesmo tempo.

    Retorno:
        Lista de (ponto, falha).
    """
    todo, failures = queue.SimpleQueue(), []
    for job in jobs:
        todo.put(job)

    def work():
        """Faz cortes até que acabem."""
        with contextlib.suppress(queue.Empty):
            while True:
                job = todo.get_nowait()
                try:
                    cut(port, *job)
                except (OSError, AssertionError) as error:
                    failures.append((job, repr(error)))

    threads = [threading.Thread(target=work) for _ in range(width)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@peers.counted(240, 2000, "pontos")
def test_disconnect_at_every_byte(count, start_proxy, host, redis_main, db):
    """Some-se em cada byte de três formas de pedido e de resposta, e outras tantas vezes logo depois de pedir: as chaves
    somem, as linhas de execução e os soquetes voltam, cada tarefa tem a sua linha de log, e quem não terminou de pedir não
    pediu nada."""
    # Com a pausa, quem some entre duas linhas some com o streaming em curso.
    proxy = start_proxy("-P", 20)
    rest = peers.warm(proxy)
    with peers.finishing(redis_main, *lines) as finisher:
        sizes = [whole_answer(proxy.port, request) for request in requests]
        jobs = points(sizes, count)
        # Quem sai logo depois de pedir: antes, durante ou depois de o seu soquete trocar de dono.
        jobs += [(plain, len(plain), 0, ways[number % 3], number % 40 / 4000) for number in range(count)]
        began = time.monotonic()
        failures = run_cuts(proxy.port, jobs)
        support.wait_empty(db, 3)
        took = time.monotonic() - began
        whole = sum(1 for request, sent, *_ in jobs if sent == len(request))
        # Entre o pedido inteiro e o SET o proxy já pode saber que o cliente saiu: menos tarefas que pedidos é permitido.
        published = len(finisher.seen) - len(requests)
        peers.say(f"{len(jobs)} cortes em {took:.1f} s ({host}): {whole} pedidos inteiros, {published} tarefas")
        assert not failures, failures[:3]
        assert published <= whole
        rows = []

        def told():
            """Relê o log, e diz se há nele uma linha por tarefa (bool); o aviso da última pode ainda estar a caminho."""
            rows[:] = support.finished_rows(proxy)
            return sorted(row["tarefa"] for row in rows) == sorted(finisher.seen)

        harness.eventually(told, 10, "uma linha por tarefa")
        assert {row["fim"] for row in rows} == {"concluida", "cliente"}
    assert [line for line in proxy.log().splitlines() if not line.startswith(("pronto:", "tarefa="))] == []
    assert max(peers.ping_times(proxy.port, 0.3)) < 2
    back = peers.settle(proxy, rest)
    peers.say(f"linhas de execução e descritores de volta ao repouso ({rest}) em {back:.1f} s")


def test_leaving_is_noticed(start_proxy, host, connect, worker, db):
    """9 clientes que saem, de três modos (o meio fechamento inclusive) em três momentos: antes da primeira linha, depois de
    uma, e depois de enviar o que não foi pedido: em 2 s não há chave, e o log diz por quê."""
    proxy = start_proxy("-t", 600000)
    rest = peers.warm(proxy)
    pairs = support.open_streams(connect, proxy, worker, 9)
    for response, task in pairs[3:]:
        task.push("uma")
        assert response.line() == b"uma"
    for response, _ in pairs[6:]:
        response.conn.send(b"x" * 100000)
    for number, (response, _) in enumerate(pairs):
        began = time.monotonic()
        leave(response.conn.sock, ways[number % 3])
        assert time.monotonic() - began < 2
    support.wait_empty(db, 2)
    assert {support.finished_row(proxy, task)["fim"] for _, task in pairs} == {"cliente"}
    peers.settle(proxy, rest)


class freezer(support.relay):
    """Intermediário que congela o Redis no instante em que a gravação de uma tarefa vai chegar a ele."""

    def __init__(self, server):
        """Começa a repassar. Argumentos: server, o harness.redis_server."""
        self.server, self.armed, self.struck = server, False, threading.Event()
        super().__init__(server.port)

    def forward(self, sock, other, is_request):
        """Repassa um trecho; a primeira tarefa, depois de armed, encontra o Redis congelado. Argumentos: os de relay.forward."""
        if is_request and self.armed and not self.struck.is_set():
            with contextlib.suppress(OSError):
                if harness.default_prefix.encode() in sock.recv(1 << 20, socket.MSG_PEEK):
                    self.server.freeze()
                    self.struck.set()
        super().forward(sock, other, is_request)


def test_leaving_while_the_task_is_written(start_redis, start_proxy, host, connect):
    """6 clientes saem com a tarefa a caminho de um Redis congelado: quando ele acorda, em 2 s não há chave nenhuma, e as
    linhas de execução e os soquetes voltaram."""
    server = start_redis()
    relay = freezer(server)
    with contextlib.closing(relay):
        proxy = start_proxy(redis=server, env={"REDIS_SERVER": relay.address})
        rest = peers.warm(proxy)
        before = server.calls("set")
        relay.armed = True
        talks = [connect(proxy).request("POST", "/", body="x") for _ in range(6)]
        assert relay.struck.wait(5)
        # O que o proxy ainda tinha a fazer até ficar à espera do Redis.
        time.sleep(0.1)
        for conn, how in zip(talks, ("close", "reset", "half_close") * 2, strict=True):
            getattr(conn, how)()
        # Menos que a paciência do proxy: as tarefas são gravadas.
        time.sleep(0.5)
        server.thaw()
        harness.eventually(lambda: server.calls("set") > before, 5, "tarefa gravada")
        support.wait_empty(server.client(), 2)
        peers.settle(proxy, rest, 5)
        assert {row["fim"] for row in support.finished_rows(proxy)} <= {"cliente"}
        with contextlib.closing(harness.worker(server.client())) as worker:
            response, task = support.open_stream(connect, proxy, worker)
            task.finish("ok")
            assert response.lines() == [b"ok"]
        proxy.stop()
