"""A parada: SIGTERM e SIGINT, o prazo DRAIN, o segundo sinal, e o que cada cliente vê."""

import contextlib
import json
import re
import signal
import socket
import threading
import time

import pytest

import harness
import support

signals = [signal.SIGTERM, signal.SIGINT]
shutdown_line = {"error": "shutdown"}


@pytest.fixture
def number(host):
    """O sinal da parada: os dois valem o mesmo, e cada hospedeiro prova um. Retorno: o sinal."""
    return {"flask": signal.SIGTERM, "waitress": signal.SIGINT}[host]


def refused(proxy):
    """Diz se a porta do proxy já recusa conexões. Argumentos: o proxy. Retorno: bool."""
    try:
        socket.create_connection(("127.0.0.1", proxy.port), 5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        return False
    return False


def wait_refused(proxy):
    """Espera a porta recusar conexões, logo e com o processo ainda vivo. Argumentos: o proxy."""
    harness.eventually(lambda: refused(proxy), 1, "porta fechada")
    assert proxy.alive()


def test_signal_without_streams(start_proxy, host, connect, fetch, worker, number):
    """Sem streams, um sinal encerra em menos de 2 s com status 0, ainda que um cliente ocioso esteja conectado."""
    proxy = start_proxy("--drain", 30000)
    response, task = support.open_stream(connect, proxy, worker)
    task.finish("uma")
    assert response.lines() == [b"uma"]
    assert fetch(proxy, "GET", "/ping").status == 200
    connect(proxy)
    began = time.monotonic()
    proxy.signal(number)
    assert proxy.wait() == 0
    assert time.monotonic() - began < 2
    assert refused(proxy)


def test_signal_with_live_streams(start_proxy, host, connect, worker, number):
    """A porta fecha já; quem acaba dentro de DRAIN acaba normalmente; os outros recebem uma linha de shutdown e o fim
    inteiro do corpo; as chaves somem; o status é 0."""
    proxy = start_proxy("--drain", 1500)
    (quick, quick_task), (slow, slow_task) = support.open_streams(connect, proxy, worker, 2)
    for response, task in ((quick, quick_task), (slow, slow_task)):
        task.push("antes")
        assert response.line() == b"antes"
    began = time.monotonic()
    proxy.signal(number)
    wait_refused(proxy)
    slow_task.push("durante")
    assert slow.line() == b"durante"
    quick_task.finish("fim")
    assert quick.lines() == [b"fim"]
    assert proxy.alive() and slow_task.exists()
    line = slow.line()
    assert json.loads(line) == shutdown_line
    assert 1.5 <= line.when - began < 3
    assert slow.lines() == []
    assert proxy.wait() == 0
    assert time.monotonic() - began < 4
    assert worker.client.keys("*") == []
    assert support.finished_row(proxy, quick_task)["fim"] == "concluida"
    row = support.finished_row(proxy, slow_task)
    assert (row["fim"], row["linhas"], row["bytes"]) == ("shutdown", "3", str(len(slow.body())))


def test_stops_as_soon_as_the_streams_end(start_proxy, connect, worker):
    """DRAIN é um limite, não uma espera: o processo sai assim que o último stream termina."""
    proxy = start_proxy("--drain", 60000)
    pairs = support.open_streams(connect, proxy, worker, 3)
    proxy.signal(signal.SIGTERM)
    wait_refused(proxy)
    for response, task in pairs:
        task.finish("fim")
        assert response.lines() == [b"fim"]
    began = time.monotonic()
    assert proxy.wait() == 0
    assert time.monotonic() - began < 2
    assert worker.client.keys("*") == []


@pytest.mark.parametrize("first", signals)
@pytest.mark.parametrize("second", signals)
def test_second_signal_ends_at_once(start_proxy, connect, worker, first, second):
    """Um segundo sinal, durante DRAIN, encerra na hora: o processo morre dele e o corpo do cliente é cortado."""
    proxy = start_proxy("--drain", 60000)
    response, task = support.open_stream(connect, proxy, worker)
    task.push("antes")
    assert response.line() == b"antes"
    proxy.signal(first)
    wait_refused(proxy)
    began = time.monotonic()
    proxy.signal(second)
    assert proxy.wait() == -second
    assert time.monotonic() - began < 1
    with pytest.raises((harness.broken, ConnectionResetError)):
        response.lines(2)
    # O fim brusco não apaga as chaves: é a validade delas que o faz.
    assert 0 < worker.client.ttl(task.key) <= 600
    worker.client.flushall()


def test_signal_amid_new_connections(start_proxy, host, connect, number):
    """Conexões que chegam no instante do sinal são atendidas ou recusadas; o log não traz nada de estranho."""
    for _ in range(2):
        proxy = start_proxy()
        opened = []

        def storm(proxy=proxy, opened=opened):
            """Conecta sem parar até ser recusado. Argumentos: o proxy e a lista das conexões."""
            with contextlib.suppress(ConnectionError):
                for _ in range(300):
                    opened.append(connect(proxy))

        thread = threading.Thread(target=storm)
        thread.start()
        harness.eventually(lambda opened=opened: len(opened) > 50, 5, "conexões abertas")
        proxy.signal(number)
        thread.join()
        assert proxy.wait() == 0
        assert [line for line in proxy.log().splitlines() if not re.match("pronto:|parando:|parado", line)] == []
        for conn in opened:
            conn.close()


def test_request_on_an_open_connection_during_drain(start_proxy, host, connect, worker):
    """Uma conexão aberta antes da parada que só então faz o pedido: 503 em JSON, sem criar tarefa."""
    proxy = start_proxy("--drain", 60000)
    idle = connect(proxy)
    response, task = support.open_stream(connect, proxy, worker)
    proxy.signal(signal.SIGTERM)
    wait_refused(proxy)
    late = idle.request("POST", "/tarde", body="x").response()
    assert late.status == 503
    assert late.json()["error"] == "shutdown"
    worker.idle()
    task.finish("fim")
    assert response.lines() == [b"fim"]
    assert proxy.wait() == 0


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_shutdown_while_redis_is_away(start_redis, start_proxy, connect, start_worker, how):
    """Parada com o Redis fora do ar ou mudo: a linha de shutdown chega, o status é 0, e não se espera para sempre."""
    server = start_redis()
    proxy = start_proxy("--drain", 300, redis=server)
    response, task = support.open_stream(connect, proxy, start_worker(server.client()))
    getattr(server, how)()
    began = time.monotonic()
    proxy.signal(signal.SIGTERM)
    assert [json.loads(line) for line in response.lines()] == [shutdown_line]
    assert proxy.wait() == 0
    assert time.monotonic() - began < 8
    if how == "freeze":
        server.thaw()
        with contextlib.closing(server.new_client()) as client:
            client.delete(task.key)


def test_shutdown_with_a_client_that_does_not_read(start_proxy, connect, worker):
    """Um cliente que não lê não segura a parada nem deixa chaves para trás."""
    proxy = start_proxy("--drain", 300, "-P", 0)
    response, task = support.open_stream(connect, proxy, worker)
    fine, fine_task = support.open_stream(connect, proxy, worker)
    chunk = b"x" * 1_000_000
    for _ in range(40):
        task.push(chunk)
    # Cheios os buffers, o proxy para de tirar linhas da lista.
    last = []

    def stuck():
        """Diz se o tamanho da lista não muda mais."""
        last.append(task.client.llen(task.list))
        return last[-1] > 0 and last[-5:] == [last[-1]] * 5

    harness.eventually(stuck, 10, "lista parada")
    began = time.monotonic()
    proxy.signal(signal.SIGTERM)
    assert [json.loads(line) for line in fine.lines()] == [shutdown_line]
    assert proxy.wait() == 0
    assert time.monotonic() - began < 6
    assert not fine_task.traces()
    left = task.traces()
    worker.client.flushall()
    assert not left
    response.conn.close()
