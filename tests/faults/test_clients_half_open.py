"""Pedidos que nunca terminam de chegar: derrubados no prazo de REQUEST_TIMEOUT, sem pesar em ninguém."""

import contextlib
import itertools
import json
import selectors
import statistics
import threading
import time

import harness
import peers
import support

# O prazo das provas, em segundos, e a folga para uma máquina ocupada derrubar todos.
deadline = 2.0
slack = 4.0

head = b"POST /lento HTTP/1.1\r\nHost: proxy.test\r\n"
# Espécie: (o que já vai de início, o que segue aos poucos, sem fim).
kinds = {
    "calado": (b"", b""),
    "em branco": (b"\r\n", b"\r\n"),
    "linha": (b"POST /", b"a"),
    "cabeçalho": (head, b"X-Lento: a\r\n"),
    "corpo": (head + b"Content-Length: 100000\r\n\r\n", b"a"),
    "pedaços": (head + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    "tamanho": (head + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a"),
    "trailer": (head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: a\r\n"),
    "parado": (head + b"Content-Length: 10\r\n\r\nabc", b""),
}
# O que um hospedeiro pode recusar na hora, se não o atende.
refused_at_sight = ("em branco", "trailer")


class dribble(threading.Thread):
    """Muitos pedidos que pingam um byte a cada meio segundo, até que o proxy feche cada um."""

    def __init__(self, port, count, names, pace=0.5):
        """Abre todas as conexões; começa com start.

        Argumentos:
            port: porta do proxy.
            count: quantas conexões.
            names: espécies, de kinds, em rodízio.
            pace: intervalo entre dois bytes de uma conexão, em segundos.
        """
        super().__init__(name="dribble", daemon=True)
        self.pace = pace
        self.halt = threading.Event()
        self.ready = threading.Event()
        self.open, self.done = [], []
        self.port, self.count, self.names = port, count, names

    def run(self):
        """Abre, pinga e escuta, até que todas fechem ou até close."""
        with selectors.DefaultSelector() as selector:
            for _, name in zip(range(self.count), itertools.cycle(self.names), strict=False):
                each = peers.talk(kinds[name][0], name)
                each.open(self.port)
                each.sock.send(each.payload)
                each.left, each.drops = b"", itertools.cycle(kinds[name][1] or b"\0")
                self.open.append(each)
                selector.register(each.sock, selectors.EVENT_READ, each)
            self.ready.set()
            while selector.get_map() and not self.halt.is_set():
                began = time.monotonic()
                self.drip(selector)
                while (left := began + self.pace - time.monotonic()) > 0 and selector.get_map():
                    self.listen(selector, left)
        for each in self.open:
            each.sock.close()

    def drip(self, selector):
        """Envia um byte em cada conexão. Argumentos: selector, com as vivas."""
        for key in list(selector.get_map().values()):
            each = key.data
            if kinds[each.label][1]:
                with contextlib.suppress(OSError):
                    each.sock.send(bytes([next(each.drops)]))

    def listen(self, selector, timeout):
        """Recebe o que chegou e retira as que o proxy fechou.

        Argumentos:
            selector: o seletor.
            timeout: espera máxima, em segundos.
        """
        for key, _ in selector.select(timeout):
            key.data.receive()
            if key.data.closed:
                selector.unregister(key.data.sock)
                key.data.close()
                self.done.append(key.data)

    def close(self):
        """Para, fecha tudo e espera a linha de execução."""
        self.halt.set()
        self.join(30)
        assert not self.is_alive()


@contextlib.contextmanager
def dribbling(*args, **options):
    """Mantém um dribble durante um bloco, já com todas as conexões abertas.

    Argumentos:
        args, options: os de dribble.

    Retorno:
        Gera o dribble.
    """
    made = dribble(*args, **options)
    made.start()
    try:
        assert made.ready.wait(60), "as conexões não se abriram"
        yield made
    finally:
        made.close()


def assert_dropped(made, limit):
    """Confere que cada conexão foi fechada no prazo, com um 408 em JSON ou sem nada.

    Argumentos:
        made: o dribble.
        limit: prazo, em segundos, contado da conexão.
    """
    with contextlib.suppress(AssertionError):
        harness.eventually(lambda: len(made.done) == made.count, limit + slack + 2)
    alive = {each.label for each in made.open} - {each.label for each in made.done}
    late = {each.label: round(each.took, 1) for each in made.done if each.took > limit + slack}
    early = {each.label: round(each.took, 1) for each in made.done if each.took < limit - 0.2}
    for name in refused_at_sight:
        early.pop(name, None)
    assert len(made.done) == made.count, (
        f"{made.count - len(made.done)} nunca foram fechados, de {alive or 'todas as espécies'}"
    )
    assert not late, late
    assert not early, early
    for each in made.done:
        assert each.fault is None, (each.label, each.fault)
        for answer in each.answers[:1]:
            error = json.loads(b"".join(answer.chunks))["error"]
            allowed = {(408, "request_timeout"), (400, "bad_request") if each.label in refused_at_sight else None}
            assert (answer.status, error) in allowed, (each.label, answer.head)
            assert answer.header("Connection") == "close"
        # Quem nem começou a pedir pode só ver a conexão fechar.
        assert len(each.answers) == 1 or not each.answers and each.label in ("calado", "em branco"), each.label


@peers.counted(160, 1000, "pedidos_pela_metade")
def test_half_open(count, start_proxy, host, connect, worker):
    """Muitos pedidos pela metade ao mesmo tempo, de nove espécies: /ping responde como sempre, os streams têm todos os
    seus lugares, e no prazo todos são derrubados, sem tarefa nem linha de log."""
    peers.allow_descriptors(count + 500)
    proxy = start_proxy("--request-timeout", round(deadline * 1000), "--max-streams", 2)
    rest = peers.warm(proxy)
    calm = peers.ping_times(proxy.port, 0.5)
    before = proxy.memory()
    with dribbling(proxy.port, count, list(kinds)) as made:
        began = time.monotonic()
        pairs = support.open_streams(connect, proxy, worker, 2)
        busy = peers.ping_times(proxy.port, deadline * 0.6, pace=0.02)
        used = proxy.memory() - before
        peers.say(
            f"{count} pedidos pela metade ({host}): /ping antes, {peers.spread(calm)}; durante, {peers.spread(busy)}; "
            f"{used} KiB a mais"
        )
        assert_dropped(made, deadline)
        took = [each.took for each in made.done]
        peers.say(f"derrubados entre {min(took):.2f} e {max(took):.2f} s depois de conectar; prazo de {deadline} s")
        assert time.monotonic() - began < 60
    assert statistics.median(busy) < 0.1, peers.spread(busy)
    assert max(busy) < 2, peers.spread(busy)
    for response, task in pairs:
        task.finish("ok")
        assert response.lines() == [b"ok"]
    worker.idle()
    harness.eventually(lambda: len(support.finished_rows(proxy)) == 2, 5, "uma linha por tarefa")
    assert len(proxy.log().splitlines()) == 3, proxy.log()
    back = peers.settle(proxy, rest)
    peers.say(f"linhas de execução e descritores de volta ao repouso em {back:.1f} s")


def test_slow_but_in_time(start_proxy, host, connect, worker):
    """1 pedido lento que chega inteiro dentro do prazo é atendido, e o prazo não corta o seu streaming: o relógio é só
    do pedido."""
    proxy = start_proxy("--request-timeout", 1500, "-P", 0)
    conn = connect(proxy)
    payload = head + b"Connection: close\r\nContent-Length: 5\r\n\r\nabcde"
    began = time.monotonic()
    for place, byte in enumerate(payload):
        conn.send(bytes([byte]))
        time.sleep(max(0.0, began + 0.9 * (place + 1) / len(payload) - time.monotonic()))
    task = worker.next()
    assert task.info["body"] == "abcde"
    response = conn.response()
    assert response.status == 200
    for number in range(4):
        conn.silent(0.5)
        task.push(str(number))
        assert response.line() == str(number).encode()
    task.finish()
    assert response.lines() == []


def test_endless_sender_after_the_answer(start_proxy, host, connect, worker):
    """1 cliente recusado com 413 que continua a enviar, byte a byte, não prende a sua linha de execução para sempre."""
    proxy = start_proxy("--request-timeout", 1000, "--max-body", 10)
    rest = peers.warm(proxy)
    conn = connect(proxy).request("POST", "/", {"Content-Length": "1000000"})
    assert conn.response().status == 413
    limit = time.monotonic() + 1 + slack
    with contextlib.suppress(OSError):
        while time.monotonic() < limit:
            conn.send(b"a")
            time.sleep(0.005)
        raise AssertionError("o proxy ainda recebe")
    peers.settle(proxy, rest)
    worker.idle()
