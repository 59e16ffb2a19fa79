"""A recarga (SIGHUP): o mesmo processo, o programa e as configurações que estão em disco, e nenhum cliente que o note."""

import contextlib
import json
import os
import re
import signal
import threading
import time

import pytest

import harness
import support

reloading = "recarregando: streams vivos"


@pytest.fixture
def start_relayed(start_redis, start_proxy):
    """Fábrica de proxies ligados ao Redis por um support.relay, que fecha ao fim.

    Retorno:
        Função que, dados os argumentos do proxy, devolve (server, relay, proxy).
    """
    with contextlib.ExitStack() as stack:

        def start(*flags):
            """Inicia um. Argumentos: flags, os do proxy. Retorno: a tupla acima."""
            server = start_redis()
            relay = stack.enter_context(contextlib.closing(support.relay(server.port)))
            proxy = start_proxy(*flags, env={"REDIS_SERVER": relay.address}, redis=server)
            stack.callback(proxy.stop)
            return server, relay, proxy

        yield start


def wait_going(proxy, seen):
    """Espera o instante em que o programa velho dá lugar ao novo.

    Argumentos:
        proxy: o proxy.
        seen: quantas letras do log vieram antes.
    """
    harness.eventually(lambda: reloading in proxy.log()[seen:], 15, "recarga a caminho")


@pytest.mark.parametrize("pause", [0, 20])
def test_every_line_once(start_proxy, host, connect, worker, redis_main, pause):
    """Três recargas em meio às linhas: cada uma chega uma vez e em ordem, o fim é um só, e o log conta o todo."""
    proxy = start_proxy("-P", pause)
    opened = [support.open_stream(connect, proxy, worker, version=f"HTTP/1.{minor}") for minor in (1, 0, 1, 0)]
    assert {response.header("Transfer-Encoding") for response, _ in opened} == {"chunked", None}
    with contextlib.ExitStack() as stack:
        pushers = [support.pusher(redis_main, task, 10**6, 0.02) for _, task in opened]
        for each in pushers:
            stack.callback(each.close)
            each.start()
        first = [response.line() for response, _ in opened]
        for _ in range(3):
            proxy.reload()
        assert support.finished_rows(proxy) == []
        for each in pushers:
            each.total = each.number + 20
        rest = harness.read_all([response for response, _ in opened])
    for (response, task), pusher, begin, lines in zip(opened, pushers, first, rest, strict=True):
        assert [json.loads(line)["n"] for line in (begin, *lines)] == list(range(pusher.total))
        assert response.conn.at_end()
        row = support.finished_row(proxy, task)
        assert (row["fim"], row["linhas"], row["bytes"]) == ("concluida", str(pusher.total), str(len(response.body())))
        assert (row["caminho"], row["metodo"], row["cliente"]) == ("/", "POST", "127.0.0.1")
        lasted = (lines[-1].when - begin.when) * 1000
        assert lasted - 500 <= int(row["duracao_ms"]) < lasted + 5000
        assert 0 <= int(row["primeira_ms"]) < 3000
        task.gone()
    assert proxy.log().count(reloading) == 3 and proxy.alive()


@pytest.mark.parametrize("pause", [0, 20])
def test_take_in_flight(start_relayed, connect, start_worker, pause):
    """A resposta de uma retirada se perde na recarga: o programa que vem a repete, e a linha chega uma só vez."""
    server, relay, proxy = start_relayed("-P", pause)
    response, task = support.open_stream(connect, proxy, start_worker(server.client()))
    task.push("zero")
    assert response.line() == b"zero"
    relay.mute(f"{task.list}:taken".encode())
    seen = proxy.ask_reload()
    task.push(*[f"linha-{number}" for number in range(5)])
    harness.eventually(lambda: task.client.llen(task.list) < 5, 5, "linha tirada")
    wait_going(proxy, seen)
    relay.mute(b"")
    proxy.wait_ready(since=seen)
    task.finish("fim")
    assert response.lines() == [*[f"linha-{number}".encode() for number in range(5)], b"fim"]
    assert support.finished_row(proxy, task)["linhas"] == "7"


def test_end_during_the_reload(start_proxy, host, connect, worker):
    """Um streaming que acaba em qualquer momento da recarga acaba uma vez, inteiro."""
    proxy = start_proxy("-P", 0)
    opened = support.open_streams(connect, proxy, worker, 30)
    seen = len(proxy.log())
    finishing = threading.Thread(target=lambda: [(task.finish("fim"), time.sleep(0.03)) for _, task in opened])
    finishing.start()
    proxy.ask_reload()
    proxy.wait_ready(since=seen)
    finishing.join()
    for response, task in opened:
        assert response.lines() == [b"fim"]
        assert response.conn.at_end()
        task.gone()
    rows = support.finished_rows(proxy)
    assert len(rows) < 31 and {row["fim"] for row in rows} == {"concluida"}
    for _, task in opened:
        assert support.finished_row(proxy, task)["linhas"] == "1"


def test_maxtime_and_heartbeat_go_on(start_proxy, connect, worker):
    """MAXTIME conta da última linha, ainda que dois programas a tenham visto; e os sinais de vida continuam."""
    proxy = start_proxy("-t", 4000, "--heartbeat", 500)
    (response, task), (other, _) = support.open_streams(connect, proxy, worker, 2)
    task.push("linha")
    begin = response.line()
    assert begin == b"linha"

    def reload_for_a_while():
        """Recarrega sem parar por dois segundos."""
        while time.monotonic() < begin.when + 2:
            proxy.reload()

    reloads = threading.Thread(target=reload_for_a_while)
    reloads.start()
    lines = response.lines()
    reloads.join()
    assert proxy.log().count(reloading) >= 1
    assert json.loads(lines[-1]) == {"error": "timeout"}
    assert 4 <= lines[-1].when - begin.when < 5.5
    times = [begin.when, *[line.when for line in lines]]
    assert set(lines[:-1]) == {b'{"type": "ping"}'} and len(lines) > 4
    assert max(after - before for before, after in zip(times, times[1:], strict=False)) < 1.8
    assert json.loads(other.lines()[-1]) == {"error": "timeout"}


@pytest.mark.parametrize("leave", ["close", "reset", "half_close"])
def test_client_leaves_around_the_reload(start_proxy, host, connect, worker, leave):
    """Quem sai logo antes, durante ou logo depois da recarga é notado, e suas chaves somem."""
    proxy = start_proxy()
    opened = support.open_streams(connect, proxy, worker, 4)
    (stays, kept), *leavers = opened
    seen = len(proxy.log())
    getattr(leavers[0][0].conn, leave)()
    proxy.ask_reload()
    wait_going(proxy, seen)
    getattr(leavers[1][0].conn, leave)()
    proxy.wait_ready(since=seen)
    getattr(leavers[2][0].conn, leave)()
    for response, task in leavers:
        task.gone(5)
        assert support.finished_row(proxy, task)["fim"] == "cliente"
        response.conn.close()
    kept.finish("fim")
    assert stays.lines() == [b"fim"]


def test_removals_under_way(start_relayed, connect, start_worker):
    """O que faltava apagar quando a recarga veio é apagado depois dela."""
    server, relay, proxy = start_relayed()
    response, task = support.open_stream(connect, proxy, start_worker(server.client()))
    task.push("linha")
    assert response.line() == b"linha"
    harness.eventually(lambda: not task.client.llen(task.list), 5, "lista vazia")
    relay.cut(b"UNLINK\r\n$%d\r\n%b" % (len(task.key), task.key.encode()), times=1000, ran=False)
    task.finish("fim")
    assert response.lines() == [b"fim"]
    seen = proxy.ask_reload()
    wait_going(proxy, seen)
    assert relay.cuts and task.traces()
    relay.left = 0
    proxy.wait_ready(since=seen)
    task.gone()


def test_unheard_task_is_still_announced(start_proxy, connect, start_worker):
    """Uma tarefa que ninguém ouviu continua a ser anunciada, e quem chega depois da recarga a responde."""
    proxy = start_proxy()
    response = connect(proxy).request("POST", "/").response()
    proxy.wait_log("ninguém ouve o canal")
    proxy.reload()
    task = start_worker().next()
    assert task.name == response.header("X-Task-Name")
    task.finish("ouvida")
    assert response.lines() == [b"ouvida"]
    proxy.wait_log(f"tarefa={task.name} ouvida")


def test_reader_that_does_not_read(start_proxy, host, connect, worker):
    """Quem não lê é derrubado em cerca de um segundo, e os outros nada notam."""
    proxy = start_proxy("-P", 0)
    stuck, heavy = support.open_stream(lambda where: connect(where, narrow=True), proxy, worker)
    fine, task = support.open_stream(connect, proxy, worker)
    for _ in range(40):
        heavy.push(*["x" * 100_000] * 10)
    last = []

    def full():
        """Diz se o proxy já não tira linhas da lista."""
        last.append(heavy.client.llen(heavy.list))
        return last[-1] > 0 and last[-5:] == [last[-1]] * 5

    harness.eventually(full, 10, "lista parada")
    began = time.monotonic()
    proxy.reload()
    assert time.monotonic() - began < 6
    assert support.finished_row(proxy, heavy)["fim"] == "cliente"
    heavy.gone()
    task.finish("fim")
    assert fine.lines() == [b"fim"]
    with contextlib.suppress(ConnectionResetError, harness.broken):
        assert not stuck.lines(), "um corpo cortado não pode parecer inteiro"


@pytest.mark.parametrize("rest", ["nunca", "na recarga", "no fim"])
def test_request_that_arrives_slowly(start_proxy, host, connect, worker, rest):
    """Uma requisição que ainda chega é servida, se o resto vem logo, ou recebe um 503 só, e nenhuma tarefa nasce dela."""
    proxy = start_proxy()
    slow = connect(proxy)
    slow.send(b"POST /lenta HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab")
    idle = connect(proxy)
    other, own = support.open_stream(connect, proxy, worker)
    seen = proxy.ask_reload()
    if rest == "na recarga":
        # O programa em disco ainda é tentado.
        slow.send(b"cd")
    began = time.monotonic()
    response = slow.response()
    assert time.monotonic() - began < 5
    if rest == "na recarga":
        task = worker.next()
        assert (response.status, task.info["body"]) == (200, "abcd")
        proxy.wait_ready(since=seen)
        task.finish("fim")
        assert response.lines() == [b"fim"]
    else:
        assert (response.status, response.json()["error"]) == (503, "shutdown")
        if rest == "no fim":
            slow.send(b"cd")
        assert slow.at_end(20)
        proxy.wait_ready(since=seen)
        worker.idle()
    with contextlib.suppress(ConnectionResetError):
        assert idle.response().status == 503
    own.finish("fim")
    assert other.lines() == [b"fim"]


def test_whole_request_waits_for_redis(start_relayed, host, connect, start_worker):
    """Uma requisição inteira, cuja tarefa ainda vai ao Redis, é servida, e o streaming passa ao programa que vem."""
    server, relay, proxy = start_relayed("-P", 0)
    worker = start_worker(server.client())
    relay.pace = 400
    seen = proxy.ask_reload()
    opened = [connect(proxy).request("POST", f"/{number}") for number in range(5)]
    tasks = [worker.next(10) for _ in opened]
    answers = [conn.response() for conn in opened]
    relay.pace = 0
    proxy.wait_ready(since=seen)
    assert {answer.status for answer in answers} == {200}
    for each in tasks:
        each.finish("fim")
    assert harness.read_all(answers) == [[b"fim"]] * 5


def test_connections_made_meanwhile(start_proxy, host, connect, worker):
    """Três recargas sob pedidos sem parar: nenhum recusado nem cortado."""
    proxy = start_proxy("-P", 0)
    stop, is_over, longest, faults = threading.Event(), threading.Event(), [0.0], []

    def ask(method, target):
        """Pede sem parar. Argumentos: method, target."""
        while not stop.is_set():
            began = time.monotonic()
            try:
                with contextlib.closing(harness.connection(proxy.port)) as conn:
                    response = conn.request(method, target, body="x" if method == "POST" else None).response()
                    if method == "GET":
                        assert (response.status, response.body()) == (200, b"pong")
                    else:
                        assert response.status == 200
                        assert response.lines() == [b"fim"]
            except (OSError, AssertionError) as error:
                faults.append((method, repr(error)))
            longest[0] = max(longest[0], time.monotonic() - began)

    def answer():
        """Encerra toda tarefa que aparece, até a última de quem pede."""
        while not is_over.is_set():
            with contextlib.suppress(AssertionError):
                worker.next(0.2).finish("fim")

    threads = [threading.Thread(target=ask, args=("GET", "/ping")), threading.Thread(target=ask, args=("POST", "/"))]
    answering = threading.Thread(target=answer)
    for each in (*threads, answering):
        each.start()
    try:
        for _ in range(3):
            proxy.reload()
    finally:
        stop.set()
        for each in threads:
            each.join()
        is_over.set()
        answering.join()
    print(f"contado: a maior espera em três recargas: {longest[0]:.2f} s ({host})")
    assert (faults, longest[0] < 5) == ([], True)
    worker.client.flushall()


def test_two_signals(start_proxy, connect, worker):
    """Dois SIGHUP seguidos valem um ou dois, e nada se perde."""
    proxy = start_proxy()
    response, task = support.open_stream(connect, proxy, worker)
    seen = len(proxy.log())
    proxy.ask_reload()
    proxy.ask_reload()
    proxy.wait_ready(since=seen)
    proxy.reload()
    task.finish("fim")
    assert response.lines() == [b"fim"]


def test_reload_while_stopping(start_proxy, connect, worker):
    """SIGHUP durante DRAIN não muda nada: os streams acabam em paz, e o processo para com 0."""
    proxy = start_proxy("--drain", 30000)
    response, task = support.open_stream(connect, proxy, worker)
    proxy.signal(signal.SIGTERM)
    proxy.wait_log("parando")
    proxy.signal(signal.SIGHUP)
    for number in range(5):
        task.push(f"linha {number}")
        assert response.line() == f"linha {number}".encode()
    task.finish("fim")
    assert response.lines() == [b"fim"]
    assert proxy.wait() == 0
    assert reloading not in proxy.log()


@pytest.mark.parametrize("delay", [0, 0.2, 0.35, 0.5, 0.65])
def test_stop_right_after(start_proxy, host, connect, worker, delay):
    """SIGTERM em qualquer momento de uma recarga: o processo para logo, e os clientes ouvem a linha de shutdown inteira."""
    proxy = start_proxy("--drain", 100)
    response, task = support.open_stream(connect, proxy, worker)
    proxy.ask_reload()
    # O prazo é o que varia o momento em que o sinal chega.
    time.sleep(delay)
    proxy.signal(signal.SIGTERM)
    assert [json.loads(line) for line in response.lines()] == [{"error": "shutdown"}]
    assert proxy.wait(8) == 0
    task.gone()


def test_drain_after_a_reload_that_was_late(start_proxy, connect, worker):
    """SIGTERM enquanto a recarga espera por quem não lê: até o fim de DRAIN, os outros recebem suas linhas."""
    proxy = start_proxy("-P", 0, "--drain", 20000, "-t", 60000)
    stuck, heavy = support.open_stream(lambda where: connect(where, narrow=True), proxy, worker)
    fine, task = support.open_stream(connect, proxy, worker)
    slow = connect(proxy)
    slow.send(b"POST / HTTP/1.1\r\n")
    for _ in range(40):
        heavy.push(*["x" * 100_000] * 10)
    harness.eventually(lambda: proxy.memory() and heavy.client.llen(heavy.list) < 399, 10, "tirada")
    proxy.ask_reload()
    # A requisição lenta recebe 503: daqui a um segundo, ou dois, nada mais se tira do Redis.
    assert slow.response().status == 503
    slow.close()
    time.sleep(0.3)
    proxy.signal(signal.SIGTERM)
    proxy.wait_log("parando")
    task.finish("depois")
    assert fine.lines(5) == [b"depois"]
    stuck.conn.reset()
    assert proxy.wait() == 0
    worker.client.flushall()


def test_ignored_signal_stays_ignored(start_proxy, connect, worker):
    """Sob nohup, SIGHUP nada faz; e o sinal continua ignorado."""
    proxy = start_proxy(wrapper=("sh", "-c", 'trap "" HUP; exec "$@"', "sh"))
    response, task = support.open_stream(connect, proxy, worker)
    proxy.signal(signal.SIGHUP)
    task.finish("fim")
    assert response.lines() == [b"fim"]
    assert proxy.alive() and proxy.log().count("pronto:") == 1 and reloading not in proxy.log()


def descriptors(proxy):
    """Lista o que o processo em repouso tem aberto. Argumentos: proxy. Retorno: lista ordenada de str, sem os números."""
    seen = []

    def is_still():
        """Diz se as últimas dez leituras são iguais."""
        names = []
        for each in os.scandir(f"/proc/{proxy.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                names.append(re.sub(r"\d+", "N", os.readlink(each.path)))
        seen.append(sorted(names))
        return seen[-10:] == [seen[-1]] * 10

    harness.eventually(is_still, 10, "descritores em repouso")
    return seen[-1]


def test_nothing_leaks(start_proxy, host, connect, fetch, worker):
    """Vinte recargas com dez streams vivos: os mesmos descritores, linhas de execução e memória, e nenhum filho."""
    proxy = start_proxy("-t", 600000)
    opened = support.open_streams(connect, proxy, worker, 10)
    proxy.reload()
    # Quem responde a um já abriu tudo o que é seu.
    assert fetch(proxy, "GET", "/ping").body() == b"pong"
    before, threads, memory = descriptors(proxy), proxy.threads(), proxy.memory()
    for _ in range(20):
        proxy.reload()
    assert fetch(proxy, "GET", "/ping").body() == b"pong"
    assert descriptors(proxy) == before
    harness.eventually(lambda: proxy.threads() <= threads + 1, 5, f"as mesmas {threads} linhas de execução")
    assert proxy.memory() < memory * 1.1 + 2000
    with open(f"/proc/{proxy.pid}/task/{proxy.pid}/children", encoding="ascii") as file:
        assert file.read() == ""
    for response, task in opened:
        task.finish("fim")
        assert response.lines() == [b"fim"]
