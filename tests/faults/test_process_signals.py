"""O processo que para ou morre com muitos streams vivos, e o que parte enquanto o velho ainda termina."""

import contextlib
import json
import signal
import time

import pytest

import harness
import peers
import support

signals = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize(
    ("host", "number"), [("flask", signal.SIGINT), ("waitress", signal.SIGTERM)]
)
@peers.counted(40, 200, "streams")
def test_signal_with_live_streams(count, number, start_proxy, host, connect, worker):
    """Metade acaba dentro de DRAIN e recebe tudo; a outra metade recebe uma linha de shutdown; todo corpo chega inteiro,
    nenhuma chave fica, cada tarefa tem a sua linha de log, e o status é 0."""
    peers.allow_descriptors(count + 500)
    proxy = start_proxy("--drain", 700, "-P", 0)
    pairs = support.open_streams(connect, proxy, worker, count)
    for response, task in pairs:
        task.push("antes")
        assert response.line() == b"antes"
    began = time.monotonic()
    proxy.signal(number)
    proxy.wait_log("parando", 5)
    for _, task in pairs[::2]:
        task.finish("fim")
    everyone = harness.read_all([response for response, _ in pairs])
    assert everyone[::2] == [[b"fim"]] * len(pairs[::2])
    assert [[json.loads(line) for line in lines] for lines in everyone[1::2]] == [[{"error": "shutdown"}]] * len(
        pairs[1::2]
    )
    assert proxy.wait(15) == 0
    took = time.monotonic() - began
    peers.say(f"{count} streams e {number.name} ({host}): parado em {took:.2f} s, com DRAIN de 0.7 s")
    assert took < 10
    assert worker.client.keys("*") == []
    ends = [row["fim"] for row in support.finished_rows(proxy)]
    assert (ends.count("concluida"), ends.count("shutdown")) == (len(pairs[::2]), len(pairs[1::2]))


@peers.counted(40, 200, "streams")
def test_kill_9_with_live_streams(count, start_proxy, connect, worker):
    """Morto, o proxy corta os clientes (um corpo incompleto, nunca um fim falso) e deixa chaves com validade; outro
    parte na mesma porta na hora e atende, e as chaves do primeiro somem sozinhas."""
    peers.allow_descriptors(count + 500)
    port = harness.free_port()
    proxy = start_proxy("-p", port, "--ttl", 3, "-P", 0)
    pairs = support.open_streams(connect, proxy, worker, count)
    for response, task in pairs:
        task.push("antes")
        assert response.line() == b"antes"
    proxy.kill()
    for response, _ in pairs:
        with pytest.raises((harness.broken, ConnectionResetError)):
            response.lines(5)
    left = worker.client.keys("*")
    assert 0 < len(left) <= 2 * count
    assert all(0 < worker.client.ttl(key) <= 3 for key in left), [key for key in left if worker.client.ttl(key) < 0]
    began = time.monotonic()
    fresh = start_proxy("-p", port, "--ttl", 3, "-P", 0)
    assert fresh.port == port
    response, task = support.open_stream(connect, fresh, worker)
    peers.say(
        f"{count} streams e SIGKILL: {len(left)} chaves ficaram; outro atende {time.monotonic() - began:.2f} s depois"
    )
    task.finish("ok")
    assert response.lines() == [b"ok"]
    support.wait_empty(worker.client, 6)


@peers.counted(3, 25, "tentativas")
def test_signal_amid_leaving_clients(count, start_proxy, host, connect, worker):
    """O sinal que chega no instante em que trezentos clientes saem nunca se perde: o processo para, com status 0."""
    peers.allow_descriptors(800)
    for number in range(count):
        proxy = start_proxy("--drain", 200)
        opened = [connect(proxy).request("POST", "/") for _ in range(300)]
        for conn in opened[:150]:
            assert conn.response().status == 200
        for conn in opened:
            conn.close()
        proxy.signal(signals[number % 2])
        began = time.monotonic()
        assert proxy.wait(8) == 0
        assert time.monotonic() - began < 8
        support.wait_empty(worker.client)
    peers.say(f"{count} sinais em meio à saída de 300 clientes ({host}): nenhum se perdeu")


def test_start_while_the_old_one_drains(start_proxy, host, connect, worker):
    """1 atualização: com o velho ainda a terminar seus streams, o novo parte na mesma porta e atende; o velho termina em
    paz, e um não mexe nas chaves do outro."""
    port = harness.free_port()
    old = start_proxy("-p", port, "--drain", 30000, "-P", 0)
    response, task = support.open_stream(connect, old, worker)
    task.push("antes")
    assert response.line() == b"antes"
    old.signal(signal.SIGTERM)
    old.wait_log("parando", 5)
    # O velho deixa de escutar antes de esperar: quem parte depois de "parando" acha a porta livre.
    fresh = start_proxy("-p", port, "-P", 0)
    assert old.alive() and fresh.port == port
    other, own = support.open_stream(connect, fresh, worker)
    for number in range(10):
        task.push(f"velho {number}")
        own.push(f"novo {number}")
        assert response.line() == f"velho {number}".encode()
        assert other.line() == f"novo {number}".encode()
    task.finish("fim do velho")
    assert response.lines() == [b"fim do velho"]
    assert old.wait(10) == 0
    assert own.exists()
    own.finish("fim do novo")
    assert other.lines() == [b"fim do novo"]


def test_start_while_the_old_one_serves(start_proxy, host, connect, worker):
    """1 engano: partir com a porta ocupada dá status 1 e uma frase, e não perturba quem a ocupa."""
    port = harness.free_port()
    old = start_proxy("-p", port, "-P", 0)
    response, task = support.open_stream(connect, old, worker)
    fresh = start_proxy("-p", port, ready=False)
    fresh.expected_status = 1
    assert fresh.wait(10) == 1
    assert fresh.log().startswith("erro: ") and str(port) in fresh.log()
    task.finish("ok")
    assert response.lines() == [b"ok"]
    with contextlib.closing(harness.connection(port)) as conn:
        assert conn.request("GET", "/ping").response().body() == b"pong"
