"""A enxurrada: mais clientes que MAX_STREAMS, e mais conexões que descritores. Recusa-se o excesso, e tudo volta."""

import collections
import contextlib
import pathlib
import re
import resource
import time

import harness
import peers
import support


def limited(limit, name="nofile"):
    """Monta o comando que dá ao proxy um limite do sistema, como o LimitNOFILE do systemd.

    Argumentos:
        limit: o limite.
        name: o nome dele para o prlimit; sem ele, o de descritores.

    Retorno:
        O wrapper de start_proxy (lista).
    """
    return ["prlimit", f"--{name}={limit}:{limit}", "--"]


def flood(connect, proxy, count, timeout=10.0):
    """Faz muitos pedidos ao mesmo tempo e espera a resposta de cada um.

    Argumentos:
        connect: o acessório de mesmo nome.
        proxy: o proxy.
        count: quantos.
        timeout: prazo para todas as respostas, em segundos.

    Retorno:
        Par (respostas 200, contagem dos status), com os recusados já fechados.
    """
    opened = [connect(proxy) for _ in range(count)]
    for number, conn in enumerate(opened):
        conn.request("POST", f"/{number}")
    limit, accepted, statuses = time.monotonic() + peers.scale(timeout, 4 * timeout), [], collections.Counter()
    for conn in opened:
        answer = conn.response(max(0.01, limit - time.monotonic()))
        statuses[answer.status] += 1
        if answer.status == 200:
            accepted.append(answer)
        else:
            assert answer.status == 503, answer.head
            assert answer.json()["error"] == "too_many_streams"
            assert int(answer.header("Retry-After")) > 0
            assert answer.header("Connection") == "close"
            conn.close()
    return accepted, statuses


def finish_all(worker, accepted):
    """Encerra todos os streams abertos e confere que cada um recebe a sua linha.

    Argumentos:
        worker: o harness.worker.
        accepted: as respostas 200.
    """
    for _ in accepted:
        task = worker.next()
        task.finish(task.name)
    for answer, lines in zip(accepted, harness.read_all(accepted), strict=True):
        assert lines == [answer.header("X-Task-Name").encode()]
        answer.conn.close()
    worker.idle()


def other_lines(proxy):
    """Lê do log o que não é o fim de uma tarefa. Argumentos: o proxy. Retorno: lista de linhas."""
    return [line for line in proxy.log().splitlines() if not line.startswith("tarefa=")]


@peers.counted(400, 3000, "pedidos")
def test_flood_past_max_streams(count, start_proxy, host, connect, worker):
    """Três enxurradas seguidas: de cada vez MAX_STREAMS são atendidos e todos os outros recebem 503; /ping responde; o
    log não cresce com as recusas; as linhas de execução voltam."""
    peers.allow_descriptors(count + 500)
    places = count // 10
    proxy = start_proxy("--max-streams", places, "-P", 0)
    rest = peers.warm(proxy)
    for _ in range(3):
        accepted, statuses = flood(connect, proxy, count)
        assert statuses == {200: places, 503: count - places}
        pings = peers.ping_times(proxy.port, 0.2)
        peers.say(f"{count} pedidos ({host}): {dict(statuses)}; /ping no limite: {peers.spread(pings)}")
        finish_all(worker, accepted)
    assert len(other_lines(proxy)) <= 2, other_lines(proxy)[:5]
    back = peers.settle(proxy, rest)
    peers.say(f"linhas de execução e descritores de volta ao repouso em {back:.1f} s")


@peers.counted(300, 2000, "clientes")
def test_flood_past_the_descriptor_limit(count, start_proxy, host, connect, worker):
    """O processo pode abrir menos descritores do que MAX_STREAMS pede: cada cliente é atendido ou recebe 503, ninguém
    fica sem resposta, /ping responde, o processador não gira à toa, e depois tudo volta."""
    peers.allow_descriptors(count + 500)
    limit = count // 2
    proxy = start_proxy("-P", 0, wrapper=limited(limit))
    rest = peers.warm(proxy)
    for _ in range(2):
        accepted, statuses = flood(connect, proxy, count)
        before = peers.processor(proxy.pid)
        pings = peers.ping_times(proxy.port, 1.0)
        busy = peers.processor(proxy.pid) - before
        peers.say(
            f"{count} conexões, {limit} descritores ({host}): {dict(statuses)}; /ping no limite: {peers.spread(pings)}; "
            f"{busy:.2f} s de processador em 1 s"
        )
        assert statuses[200] >= limit // 3 and statuses[503] > 0, statuses
        assert busy < 0.25
        finish_all(worker, accepted)
    assert len(other_lines(proxy)) <= 5, other_lines(proxy)[:8]
    back = peers.settle(proxy, rest)
    peers.say(f"linhas de execução e descritores de volta ao repouso em {back:.1f} s")


@contextlib.contextmanager
def starved(proxy, spare):
    """Deixa um proxy vivo com poucos descritores livres durante um bloco (EMFILE de verdade).

    Argumentos:
        proxy: o proxy.
        spare: quantos ele ainda pode abrir.
    """
    old = resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (proxy.descriptors() + spare, old[1]))
    try:
        yield
    finally:
        resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, old)


@peers.counted(60, 1000, "clientes")
def test_out_of_descriptors(count, start_redis, start_proxy, host, connect, start_worker):
    """Sem nenhum descritor livre, o streaming em curso segue, o processador não gira à toa e o log diz em uma linha; a
    conexão com o Redis, perdida nessa hora, volta depois; e cada conexão que esperava é atendida."""
    peers.allow_descriptors(count + 500)
    server = start_redis()
    proxy = start_proxy("-P", 0, redis=server)
    worker = start_worker(server.client())
    response, task = support.open_stream(connect, proxy, worker)
    with starved(proxy, 10):
        # Quem conecta e não pede nada ocupa os que restam; os outros esperam na fila do sistema.
        holders = [connect(proxy) for _ in range(20)]
        waiting = [connect(proxy) for _ in range(count)]
        for conn in waiting:
            conn.request("GET", "/ping", {"Connection": "close"})
            conn.expect()
        # Quem não dissesse nada no log reprovaria no fim da prova.
        with contextlib.suppress(AssertionError):
            proxy.wait_log("faltam descritores", 2)
        before = peers.processor(proxy.pid)
        response.conn.silent(1)
        busy = peers.processor(proxy.pid) - before
        task.push("durante")
        assert response.line() == b"durante"
        rows = harness.eventually(lambda: server.clients_named("py-ndjson-proxy"), 5, "conexão com o Redis")
        worker.client.execute_command("CLIENT", "KILL", "ID", rows[0]["id"])
    for conn in holders:
        conn.close()
    for conn in waiting:
        conn.read_until(lambda conn=conn: conn.current.ended, 20, "a resposta de quem esperava")
        assert conn.current.status in (200, 500), conn.current.head
        conn.close()
    harness.eventually(lambda: server.clients_named("py-ndjson-proxy"), 10, "conexão com o Redis de volta")
    task.finish("depois")
    assert response.lines() == [b"depois"]
    lines = [
        line
        for line in other_lines(proxy)
        if not line.startswith(("pronto:", "Redis de volta", "aviso: Redis", "erro: Redis"))
    ]
    peers.say(
        f"{count} conexões sem descritor ({host}): {busy:.2f} s de processador em 1 s; {len(lines)} linhas de log"
    )
    assert busy < 0.25, f"{busy:.2f} s de processador em 1 s sem nada a fazer"
    assert len(lines) <= 2 and any("descritores" in line for line in lines), lines[:5]
    again = support.open_streams(connect, proxy, worker, 20)
    for each, own in again:
        own.finish("ok")
        assert each.lines() == [b"ok"]


# Pilha de cada linha de execução do proxy, e a memória que lhe resta: cabe tudo, menos uma pilha.
stack = 64 * 2**20
spare = 40 * 2**20


@contextlib.contextmanager
def without_threads(proxy):
    """Faz o sistema recusar linhas de execução novas a um proxy vivo durante um bloco: falta memória para a pilha delas.

    Argumentos:
        proxy: o proxy, nascido com pilhas de stack bytes.
    """
    old = resource.prlimit(proxy.pid, resource.RLIMIT_AS)
    size = re.search(r"^VmSize:\s+(\d+)", pathlib.Path(f"/proc/{proxy.pid}/status").read_text(), re.MULTILINE)
    resource.prlimit(proxy.pid, resource.RLIMIT_AS, (int(size[1]) * 1024 + spare, old[1]))
    try:
        yield
    finally:
        resource.prlimit(proxy.pid, resource.RLIMIT_AS, old)


@peers.counted(25, 400, "clientes")
def test_out_of_threads(count, start_proxy, host, connect, worker):
    """O sistema não dá mais linhas de execução: o streaming em curso segue, cada cliente espera a vez ou recebe 503, o log
    diz em uma linha o que aumentar, e depois todos são atendidos."""
    peers.allow_descriptors(count + 500)
    proxy = start_proxy("-P", 0, "-t", 600000, wrapper=limited(stack, "stack"))
    rest = peers.warm(proxy)
    response, task = support.open_stream(connect, proxy, worker)
    began = time.monotonic()
    with without_threads(proxy):
        for _ in range(2):
            accepted, statuses = flood(connect, proxy, count, 30)
            peers.say(f"{count} pedidos sem linhas de execução ({host}): {dict(statuses)}")
            finish_all(worker, accepted)
        task.push("durante")
        assert response.line() == b"durante"
    took = time.monotonic() - began
    task.finish("depois")
    assert response.lines() == [b"depois"]
    response.conn.close()
    lines = [line for line in other_lines(proxy) if not line.startswith("pronto:")]
    # O waitress já tem todas as suas.
    assert (host == "flask") <= len(lines) <= 1 + took / 60, lines[:5]
    assert all(line.startswith("aviso: ") and "TasksMax" in line for line in lines), lines[:5]
    back = peers.settle(proxy, rest)
    peers.say(f"linhas de execução e descritores de volta ao repouso em {back:.1f} s")
    accepted, statuses = flood(connect, proxy, count, 30)
    assert statuses == {200: count}
    finish_all(worker, accepted)


@peers.counted(200, 1000, "clientes")
def test_refused_clients_that_stay(count, start_proxy, host, connect, worker):
    """Quem recebe 401 ou 503 e não fecha a conexão não ocupa os descritores, que são menos que os clientes: todos têm
    resposta, e /ping segue respondendo."""
    peers.allow_descriptors(2 * count + 500)
    proxy = start_proxy("-t", 600000, env={"AUTH_TOKEN": "segredo"}, wrapper=limited(140))
    token = {"Authorization": "Bearer segredo"}
    streams, tasks = [], []
    while (answer := connect(proxy).request("POST", "/", token).response()).status == 200:
        streams.append(answer)
        tasks.append(worker.next())
    assert streams
    for number in range(count):
        answer = connect(proxy).request("POST", "/", {} if number % 2 else token).response(20)
        assert answer.status == (401 if number % 2 else 503), answer.head
        assert answer.header("Connection") == "close"
    pings = peers.ping_times(proxy.port, 0.5)
    peers.say(f"{count} recusados que ficam ({host}), {len(tasks)} streams; /ping: {peers.spread(pings)}")
    assert max(pings) < 10, peers.spread(pings)
    for task in tasks:
        task.finish("ok")
    for answer in streams:
        assert answer.lines() == [b"ok"]
