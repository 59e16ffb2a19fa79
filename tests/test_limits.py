"""Muitos clientes ao mesmo tempo, e o limite MAX_STREAMS."""

import json
import time

import harness
import support

crowd = 200


def assert_too_many(fetch, proxy):
    """Confere que um cliente a mais é recusado e que /ping responde. Argumentos: fetch e o proxy."""
    response = fetch(proxy, "POST", "/demais", body="x")
    assert response.status == 503
    assert int(response.header("Retry-After")) > 0
    assert response.header("Server") == "py-ndjson-proxy" and response.header("X-Author")
    assert response.header("Content-Type") == "application/json; charset=utf-8"
    assert response.json()["error"] == "too_many_streams"
    # Guardada, a conexão de quem foi recusado ocuparia um descritor.
    assert response.header("Connection") == "close" and response.conn.at_end()
    ping = fetch(proxy, "GET", "/ping")
    assert (ping.status, ping.body()) == (200, b"pong")


def test_two_hundred_clients_and_one_more(start_proxy, host, connect, fetch, worker):
    """200 clientes ao mesmo tempo, cada um só com as suas linhas; o 201º recebe 503; um lugar devolvido volta a valer."""
    proxy = start_proxy("--max-streams", crowd, "-P", 0)
    pairs = support.open_streams(connect, proxy, worker, crowd)
    for _ in range(3):
        assert_too_many(fetch, proxy)
    worker.idle()
    for number in range(5):
        with worker.client.pipeline(transaction=False) as pipe:
            for _, task in pairs:
                pipe.rpush(task.list, f'{{"path": "{task.info["path"]}", "n": {number}}}')
            pipe.execute()
    for number, (response, task) in enumerate(pairs):
        assert task.info["path"] == f"/{number}"
        seen = [response.json_line() for _ in range(5)]
        assert seen == [{"path": f"/{number}", "n": count} for count in range(5)]
    assert_too_many(fetch, proxy)
    # Três modos de devolver um lugar: fim da tarefa, palavra de fim, saída do cliente.
    pairs[0][1].finish()
    assert pairs[0][0].lines() == []
    pairs[1][1].push("EOF")
    assert pairs[1][0].lines() == []
    pairs[2][0].conn.close()
    harness.eventually(lambda: len(support.finished_rows(proxy)) == 3, 3, "três lugares devolvidos")
    fresh = support.open_streams(connect, proxy, worker, 3)
    assert_too_many(fetch, proxy)
    everyone = pairs[3:] + fresh
    for _, task in everyone:
        task.finish(json.dumps(task.name))
    for (_, task), lines in zip(everyone, harness.read_all([response for response, _ in everyone]), strict=True):
        assert [json.loads(line) for line in lines] == [task.name]
    support.wait_empty(worker.client)
    harness.eventually(lambda: len(support.finished_rows(proxy)) == crowd + 3, 5, "uma linha de log por tarefa")
    assert len({row["tarefa"] for row in support.finished_rows(proxy)}) == crowd + 3


def test_refusals_do_not_use_up_places(start_redis, start_proxy, host, connect, fetch, start_worker):
    """MAX_STREAMS=1: nem recusas, nem pedidos sem Redis, nem tarefas que ele negou gastam o único lugar."""
    server = start_redis()
    proxy = start_proxy("--max-streams", 1, "--max-body", 10, redis=server)
    worker = start_worker(server.client())
    response, task = support.open_stream(connect, proxy, worker)
    for _ in range(3):
        assert_too_many(fetch, proxy)
    task.finish()
    assert response.lines() == []
    worker.client.config_set("maxmemory", 1)
    for _ in range(3):
        assert fetch(proxy, "POST", "/").status == 500
    worker.client.config_set("maxmemory", 0)
    for _ in range(3):
        assert fetch(proxy, "POST", "/", body="x" * 11).status == 413
        assert fetch(proxy, "HEAD", "/").status == 200
    server.kill()
    for _ in range(3):
        assert fetch(proxy, "POST", "/").status == 504
    server.start()
    response, task = support.open_stream(connect, proxy, start_worker(server.client()))
    assert_too_many(fetch, proxy)
    task.finish("fim")
    assert response.lines() == [b"fim"]


def test_full_comes_before_redis(start_redis, start_proxy, connect, fetch, start_worker):
    """Com os lugares tomados, quem chega recebe 503 na hora, mesmo que o Redis não responda."""
    server = start_redis()
    proxy = start_proxy("--max-streams", 1, redis=server)
    response, task = support.open_stream(connect, proxy, start_worker(server.client()))
    server.freeze()
    try:
        began = time.monotonic()
        assert fetch(proxy, "POST", "/").status == 503
        assert time.monotonic() - began < 1.5
    finally:
        server.thaw()
    task.finish("fim")
    assert response.lines() == [b"fim"]
