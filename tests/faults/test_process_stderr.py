"""O log que não pode ser escrito: o cano cheio que ninguém lê, o disco cheio, a saída fechada. Nenhum stream espera por ele."""

import contextlib
import fcntl
import os
import signal
import statistics
import subprocess
import time

import pytest

import harness
import peers
import support

# Tamanho de um cano pequeno, em bytes: poucas dezenas de linhas de log o enchem.
pipe_size = 4096


@pytest.fixture
def start_with_stderr(start_proxy, monkeypatch):
    """Fábrica de proxies com a saída de erros dada: start_with_stderr(descritor, *flags). None a entrega fechada.

    Retorno:
        Função que devolve um harness.proxy_process que já atende, com a porta em port.
    """

    def spawn(self, command, env, target):
        """Inicia o processo. Argumentos: os de background.spawn, e target, o descritor ou None."""
        if target is None:
            command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
        self.process = subprocess.Popen(
            command, env=env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=target
        )

    def start(target, *flags, **options):
        """Inicia um. Argumentos: target, o descritor; os demais, de start_proxy. Retorno: o proxy."""
        port = harness.free_port()
        with monkeypatch.context() as patch:
            patch.setattr(harness.background, "spawn", lambda self, command, env: spawn(self, command, env, target))
            proxy = start_proxy("-p", port, *flags, ready=False, **options)
        proxy.port = port
        harness.eventually(lambda: answers(port), 15, "proxy que responde a /ping")
        return proxy

    return start


def answers(port):
    """Diz se o proxy já responde a /ping. Argumentos: port, a porta. Retorno: bool."""
    with contextlib.suppress(OSError), contextlib.closing(harness.connection(port)) as conn:
        return conn.request("GET", "/ping").response().body() == b"pong"
    return False


def fill(writer):
    """Enche um cano até a última posição, por uma abertura própria, que não muda a de ninguém.

    Argumentos:
        writer: descritor do lado de escrita.
    """
    own = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY | os.O_NONBLOCK)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(own, b"." * 512)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(own, b".")
    finally:
        os.close(own)


def drain(reader, word, timeout=10.0):
    """Lê um cano até ver uma palavra.

    Argumentos:
        reader: descritor do lado de leitura, sem bloqueio.
        word: bytes esperados.
        timeout: prazo em segundos.

    Retorno:
        Tudo o que foi lido (bytes).
    """
    seen = bytearray()

    def look():
        """Lê o que houver e diz se a palavra já veio."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(reader, 65536):
                seen.extend(data)
        return word in seen

    harness.eventually(look, timeout, f"{word!r} na saída de erros")
    return bytes(seen)


def assert_serves(proxy, connect, worker, count):
    """Confere que streams em série andam como se o log não existisse.

    Argumentos:
        proxy: o proxy.
        connect: o acessório de mesmo nome.
        worker: o harness.worker.
        count: quantos.
    """
    times = []
    for _ in range(count):
        began = time.monotonic()
        response, task = support.open_stream(connect, proxy, worker)
        task.finish("ok")
        assert response.lines() == [b"ok"]
        times.append(time.monotonic() - began)
        response.conn.close()
    pings = peers.ping_times(proxy.port, 0.3)
    peers.say(f"{count} streams sem log: {peers.spread(times)}; /ping: {peers.spread(pings)}")
    assert statistics.median(times) < 0.5 and max(times) < 3
    assert max(pings) < 2


@pytest.fixture
def pipe():
    """Um cano pequeno, com a leitura sem bloqueio.

    Retorno:
        Gera o par (leitura, escrita); quem fecha antes a leitura a troca por -1 na lista.
    """
    ends = list(os.pipe())
    os.set_blocking(ends[0], False)
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, pipe_size)
    yield ends
    for end in ends:
        if end >= 0:
            os.close(end)


@peers.counted(60, 2000, "streams")
def test_stderr_that_nobody_reads(count, pipe, start_with_stderr, connect, worker):
    """Com o cano do log cheio, os streams e /ping andam, a memória não cresce sem fim; lido o cano, o log volta; cheio
    de novo, a parada não espera por ele."""
    reader, writer = pipe
    proxy = start_with_stderr(writer, "--drain", 300, "-P", 0)
    drain(reader, b"pronto: ")
    fill(writer)
    before = proxy.memory()
    assert_serves(proxy, connect, worker, count)
    used = proxy.memory() - before
    peers.say(f"memória do proxy com o log preso: {used} KiB a mais")
    assert used < 32768
    response, task = support.open_stream(connect, proxy, worker)
    task.finish("ok")
    assert response.lines() == [b"ok"]
    # O que foi guardado sai, ou o que se perdeu é contado; o de agora tem de sair inteiro.
    seen = drain(reader, b"tarefa=")
    response, task = support.open_stream(connect, proxy, worker)
    task.finish("ok")
    assert response.lines() == [b"ok"]
    seen += drain(reader, f"tarefa={task.name} ".encode())
    assert b"Traceback" not in seen
    fill(writer)
    response, task = support.open_stream(connect, proxy, worker)
    began = time.monotonic()
    proxy.signal(signal.SIGTERM)
    assert response.lines() == [b'{"error": "shutdown"}']
    assert proxy.wait(10) == 0
    assert time.monotonic() - began < 8
    assert not task.traces()


@pytest.mark.parametrize("kind", ["cheia_desde_o_início", "disco_cheio", "fechada", "leitor_que_saiu"])
@peers.counted(30, 500, "streams")
def test_stderr_that_cannot_be_written(count, kind, pipe, start_with_stderr, connect, worker):
    """A saída de erros não serve para nada desde o início: o proxy parte, atende e para com status 0."""
    reader, writer = pipe
    with contextlib.ExitStack() as stack:
        target = writer
        if kind == "cheia_desde_o_início":
            fill(writer)
        elif kind == "disco_cheio":
            target = stack.enter_context(open("/dev/full", "wb")).fileno()
        elif kind == "fechada":
            target = None
        else:
            os.close(reader)
            pipe[0] = -1
        proxy = start_with_stderr(target, "--drain", 300, "-P", 0)
        assert_serves(proxy, connect, worker, count)
        before = peers.processor(proxy.pid)
        response, task = support.open_stream(connect, proxy, worker)
        response.conn.silent(0.5)
        assert peers.processor(proxy.pid) - before < 0.35, "o processador gira à toa"
        proxy.signal(signal.SIGTERM)
        assert response.lines() == [b'{"error": "shutdown"}']
        assert proxy.wait(10) == 0
        assert not task.traces()
