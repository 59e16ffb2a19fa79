"""Linha 3 da tabela: um Redis congelado (SIGSTOP) que aceita conexões e não responde a ninguém."""

import concurrent.futures
import json
import signal
import time

import pytest

import harness
import peers
import redis_faults
import support

pytestmark = pytest.mark.timeout(redis_faults.limit)

frozen, streams = peers.scale((4, 10), (10, 100))

# Prazo prometido a quem pede com o Redis congelado, e a folga de uma máquina ocupada, em segundos.
promised, slack = 3.0, 0.7


def timed(connect, proxy, method, target):
    """Faz um pedido e mede até o fim da resposta.

    Argumentos:
        connect: o acessório de mesmo nome.
        proxy: o proxy.
        method: o método.
        target: o alvo.

    Retorno:
        Tripla (status, corpo, segundos).
    """
    began = time.monotonic()
    response = connect(proxy).request(method, target).response(15)
    return response.status, response.body(15), time.monotonic() - began


def ask_all_along(connect, proxy, seconds):
    """Faz um pedido e um /ping a cada quarto de segundo, ao mesmo tempo que os anteriores.

    Argumentos:
        connect: o acessório de mesmo nome.
        proxy: o proxy.
        seconds: por quanto tempo.

    Retorno:
        Par de listas do que timed devolve: a dos pedidos e a dos pings.
    """
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        posts, pings = [], []
        began = time.monotonic()
        for step in range(int(seconds * 4)):
            time.sleep(max(0.0, began + step / 4 - time.monotonic()))
            posts.append(pool.submit(timed, connect, proxy, "POST", f"/{step}"))
            pings.append(pool.submit(timed, connect, proxy, "GET", "/ping"))
        return [item.result() for item in posts], [item.result() for item in pings]


def assert_hurried(received, began):
    """Confere streams que o Redis congelado não segura: sinais de vida, e o fim por MAXTIME na hora.

    Argumentos:
        received: as linhas de cada um, de um proxy com HEARTBEAT=400 e MAXTIME=1500.
        began: instante em que o Redis parou.
    """
    for *beats, last in received:
        assert len(beats) >= 2 and {json.loads(beat)["type"] for beat in beats} == {"ping"}, beats
        assert json.loads(last) == {"error": "timeout"}
        assert last.when - began < 1.5 + slack


@pytest.mark.parametrize("seconds", [frozen], ids=[f"{frozen}_s-{streams}_streams"])
def test_frozen(start_redis, start_proxy, host, connect, start_worker, seconds):
    """Quem pede recebe 504, e /ping 500, em 3 s; ninguém fica preso; os streams vivos seguem, ou acabam por MAXTIME, com
    seus sinais de vida até lá; e um SIGTERM não espera pelo Redis."""
    server = start_redis()
    worker = start_worker(server.client())
    proxy, hasty = start_proxy(redis=server), start_proxy("-t", 1500, "--heartbeat", 400, redis=server)
    parting = start_proxy("--drain", 300, redis=server)
    pairs = redis_faults.open_many(connect, proxy, worker, streams)
    last, last_task = support.open_stream(connect, parting, worker)
    hurried = redis_faults.open_many(connect, hasty, worker, streams)
    for place, (_, task) in enumerate(pairs):
        task.push(redis_faults.numbered_line(place, 0))
    for response, _ in pairs:
        assert response.json_line()["n"] == 0
    server.freeze()
    began = time.monotonic()
    parting.signal(signal.SIGTERM)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(harness.read_all, [last, *[response for response, _ in hurried]], 6)
        # Metade do tempo antes do primeiro prazo do proxy, metade depois de ele saber que o Redis não responde.
        posts, pings = ask_all_along(connect, proxy, seconds - 0.5)
        (farewell,), *received = reading.result()
    assert not parting.alive(), "o Redis congelado segura a parada"
    assert json.loads(farewell) == {"error": "shutdown"} and farewell.when - began < 0.3 + slack
    assert_hurried(received, began)
    assert not [response for response, _ in pairs if response.ended]
    server.thaw()
    assert {status for status, _, _ in posts} == {504}
    assert {json.loads(body)["error"] for _, body, _ in posts} == {"redis_unavailable"}
    assert {status for status, _, _ in pings} == {500}
    longest = [max(took for _, _, took in rows) for rows in (posts, pings)]
    peers.say(
        f"{seconds} s congelado ({host}): {len(posts)} pedidos com 504 em até {longest[0]:.2f} s e {len(pings)} pings com "
        f"500 em até {longest[1]:.2f} s; {len(hurried)} streams acabados por MAXTIME, {len(pairs)} que seguiram"
    )
    assert max(longest) < promised + slack, longest
    for place, (_, task) in enumerate(pairs):
        task.push(*[redis_faults.numbered_line(place, number) for number in range(1, 5)])
        task.delete()
    redis_faults.deliver_all(proxy, pairs, 5, 20)
    assert timed(connect, proxy, "GET", "/ping")[0] == 200
    # As tarefas recusadas podem ter sido gravadas quando o Redis acordou: o proxy apaga as chaves delas. As de quem saiu
    # sem poder apagá-las vencem sozinhas.
    server.client().delete(last_task.key)
    support.wait_empty(server.client(), 5)
    for each in (proxy, hasty):
        log = each.log()
        assert (log.count("Redis fora do ar"), log.count("Redis de volta")) == (1, 1), log
        rows = support.finished_rows(each)
        assert len([row for row in rows if row["fim"] == "timeout"]) == (streams if each is hasty else 0)
