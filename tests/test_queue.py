"""REDIS_QUEUE: nenhuma tarefa se perde por falta de quem ouça, cada uma vai a um só worker, e a fila não cresce."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import uuid

import pytest

import harness
import support

queue = "ndjson_fila"
on = {"REDIS_QUEUE": queue}
examples = harness.root / "packaging" / "examples"
# O último argumento de cada um são os segundos entre as palavras.
workers = {
    "py": [sys.executable, str(examples / "worker.py"), "--delay"],
    "sh": [str(examples / "worker.sh")],
}
# Quantas tarefas da fila cada um atende ao mesmo tempo.
parallel = 16


def taken(db, timeout=5):
    """Tira uma tarefa da fila, como um worker.

    Argumentos:
        db: cliente do Redis.
        timeout: espera máxima, em segundos.

    Retorno:
        A harness.task, ou None se nenhuma chegou.
    """
    popped = db.blpop(queue, timeout=timeout)
    return popped and harness.task(db, popped[1].decode(), db.get(popped[1]))


def waiting(db):
    """Lista as tarefas da fila. Argumentos: db, cliente do Redis. Retorno: lista de bytes."""
    return db.lrange(queue, 0, -1)


def empty(db, what):
    """Espera a fila se esvaziar. Argumentos: db, cliente do Redis; what, o que a esvazia."""
    harness.eventually(lambda: not waiting(db), 5, f"fila vazia: {what}")


def test_waits_for_a_worker(share_proxy, connect, db):
    """Sem ninguém no canal, a tarefa espera na fila, sem aviso no log, e quem chega depois a responde."""
    proxy = share_proxy(env=on)
    opened = [connect(proxy).request("POST", f"/{number}").response() for number in range(5)]
    names = [response.header("X-Task-Name") for response in opened]
    assert waiting(db) == [f"ndjson_task_{name}".encode() for name in names]
    for number, response in enumerate(opened):
        task = taken(db)
        assert (task.name, task.info["path"]) == (names[number], f"/{number}")
        task.finish(f"linha {number}")
        assert response.lines() == [f"linha {number}".encode()]
        task.gone()
    assert "ninguém ouve" not in proxy.log()
    assert not waiting(db)


def test_channel_still_works(start_proxy, connect, worker, db):
    """O PUBLISH continua, e a tarefa que um worker do canal responde sai da fila."""
    proxy = start_proxy("--queue", queue)
    response, task = support.open_stream(connect, proxy, worker, "POST", "/")
    assert waiting(db) == [task.key.encode()]
    task.finish("ok")
    assert response.lines() == [b"ok"]
    empty(db, "a tarefa acabou")


def test_every_end_leaves_the_queue(start_proxy, connect, db):
    """Cliente que sai, tempo esgotado e parada tiram a tarefa da fila, mesmo sem worker algum."""
    proxy = start_proxy("--maxtime", "300", "--drain", "0", env=on)
    lines = connect(proxy).request("POST", "/").response().lines()
    assert lines == [b'{"error": "timeout"}']
    empty(db, "o tempo se esgotou")
    proxy.stop()
    proxy = start_proxy("--drain", "0", env=on)
    conn = connect(proxy).request("POST", "/")
    conn.response()
    assert len(waiting(db)) == 1
    conn.reset()
    empty(db, "o cliente saiu")
    last = connect(proxy).request("POST", "/").response()
    assert len(waiting(db)) == 1
    proxy.signal(signal.SIGTERM)
    assert last.lines() == [b'{"error": "shutdown"}']
    assert proxy.wait(10) == 0
    assert not waiting(db)


def test_dead_proxy(start_redis, start_proxy, connect):
    """As tarefas de um proxy morto saem da fila quando vencem; as vivas, e o que não é tarefa, ficam."""
    server = start_redis()
    db = server.client()
    dead = start_proxy(env=on, redis=server)
    for _ in range(3):
        connect(dead).request("POST", "/").response()
    keys = waiting(db)
    assert len(keys) == 3
    dead.expected_status = -signal.SIGKILL
    dead.kill()
    # Outro proxy, com as suas próprias tarefas, cujas chaves este não conhece.
    other = start_proxy(env=on, redis=server)
    alive = connect(other).request("POST", "/").response()
    db.rpush(queue, "de-outro-programa")
    # Mais do que cabe em um passo, e tudo o que é morto vem antes e depois do que é vivo.
    ghosts = [f"ndjson_task_{uuid.uuid4()}" for _ in range(1000)]
    db.rpush(queue, *ghosts)
    db.delete(*keys)
    kept = [f"ndjson_task_{alive.header('X-Task-Name')}".encode(), b"de-outro-programa"]
    start_proxy(env=on, redis=server)
    harness.eventually(lambda: waiting(db) == kept, 10, "só o que é vivo na fila")
    db.lrem(queue, 0, "de-outro-programa")
    taken(db).finish("ok")
    assert alive.lines() == [b"ok"]


def test_dead_tasks_that_may_not_leave(start_redis, start_proxy, fetch):
    """LREM negado com tarefas mortas na fila: um aviso só, e a procura acaba, em vez de girar."""
    server = start_redis()
    db = server.client()
    db.rpush(queue, *[f"ndjson_task_{uuid.uuid4()}" for _ in range(500)])
    proxy = start_proxy(env={**support.limited_user(server, "-lrem"), **on}, redis=server)
    proxy.wait_log("as tarefas mortas não saem da fila", 10)
    asked = server.calls("lrange")
    # Cada volta da procura dura 20 ms.
    for _ in range(20):
        assert fetch(proxy, "GET", "/ping").status == 200
    harness.eventually(lambda: server.calls("ping") >= 20, 5, "o laço segue")
    assert server.calls("lrange") == asked == 1
    assert proxy.log().count("não saem da fila") == 1
    db.delete(queue)


def test_refused_task_is_not_queued(start_redis, start_proxy, fetch):
    """SET recusado (memória cheia): nem PUBLISH nem fila."""
    server = start_redis("maxmemory-policy noeviction")
    db = server.client()
    proxy = start_proxy(env=on, redis=server)
    db.config_set("maxmemory", 1)
    response = fetch(proxy, "POST", "/", body=b"x")
    assert (response.status, response.json()["error"]) == (500, "redis_error")
    assert (server.calls("rpush"), server.calls("publish")) == (0, 0)
    db.config_set("maxmemory", 0)
    assert not waiting(db)


def test_queue_of_another_type(start_redis, start_proxy, fetch, connect):
    """A fila é uma chave de outro tipo: 500 com as palavras do Redis, um aviso já no início, e recuperação."""
    server = start_redis()
    db = server.client()
    db.set(queue, "texto")
    proxy = start_proxy(env=on, redis=server)
    proxy.wait_log(r"aviso: REDIS_QUEUE: .*WRONGTYPE")
    response = fetch(proxy, "POST", "/", body=b"x")
    assert (response.status, response.json()["error"]) == (500, "redis_error")
    assert "WRONGTYPE" in response.json()["message"]
    harness.eventually(lambda: db.keys("*") == [queue.encode()], 5, "chaves da tarefa recusada apagadas")
    # As chaves saíram; só a fila não pôde ser limpa, e isso não se repete sem fim.
    proxy.wait_log(r"aviso: REDIS_QUEUE: as tarefas mortas não saem da fila: WRONGTYPE")
    assert "não apagou" not in proxy.log()
    db.delete(queue)
    conn = connect(proxy).request("POST", "/")
    taken(db).finish("ok")
    assert conn.response().lines() == [b"ok"]


@pytest.mark.parametrize("prefix", ["REDIS_PREFIX", "REDIS_LIST_PREFIX"])
def test_name_in_conflict(prefix):
    """Um nome que começa como as chaves das tarefas é recusado no início, com a frase de sempre."""
    env = {"ENV_FILE": "/dev/null", prefix: "abc:"}
    for name in ("abc:", "abc:fila"):
        text = harness.refusal("--queue", name, env=env)
        for word in ("REDIS_QUEUE", repr(name), "argumento --queue", prefix, "'abc:'"):
            assert word in text


def test_documented_acl(start_redis, start_proxy, connect):
    """As duas linhas de ACL da documentação são as mesmas e bastam: tarefa, fila, fim e procura das mortas, sem uma queixa no
    log."""
    folder = harness.root / "packaging" / "doc"
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("redis.md", "en/redis.md")]
    (first, second), english = (re.findall(r"ACL (SETUSER proxy .*)", text) for text in texts)
    name, other = (re.search(r"~(\S+) \+rpush", line)[1] for line in (second, english[1]))
    assert [first, second.replace(name, other)] == english
    server = start_redis("user " + first.removeprefix("SETUSER ") + " " + second.removeprefix("SETUSER proxy "))
    db = server.client()
    db.rpush(name, f"ndjson_task_{uuid.uuid4()}")
    proxy = start_proxy(
        env={"REDIS_QUEUE": name, "REDIS_SERVER": f"redis://proxy:segredo@{server.address}"}, redis=server
    )
    conn = connect(proxy).request("POST", "/")
    response = conn.response()
    assert response.status == 200
    harness.eventually(lambda: db.llen(name) == 1, 5, "a tarefa morta saiu")
    key = db.lindex(name, 0).decode()
    harness.task(db, key, db.get(key)).finish("ok")
    assert response.lines() == [b"ok"]
    harness.eventually(lambda: not db.exists(name), 5, "a tarefa saiu da fila")
    assert "NOPERM" not in proxy.log() and "REDIS_QUEUE" not in proxy.log()


@pytest.fixture
def run_workers(redis_main, db):
    """Fábrica de workers de exemplo: run_workers(forma, quantos, pausa=0), com a fila no ambiente.

    Retorno:
        Função que devolve a lista de subprocess.Popen; ao fim, todos devem sair com 0.
    """
    running = []

    def run(form, count, delay=0):
        """Inicia workers. Argumentos: form, py ou sh; count, quantos; delay, a pausa. Retorno: lista de Popen."""
        env = {**harness.base_environment(), "REDIS_SERVER": redis_main.address, "REDIS_QUEUE": queue}
        command = [*workers[form], str(delay)]
        started = [subprocess.Popen(command, env=env, start_new_session=True) for _ in range(count)]
        running.extend(started)
        return started

    yield run
    for process in running:
        process.send_signal(signal.SIGTERM)
    statuses = [process.wait(15) for process in running]
    claims = db.keys("worker:claim:*")
    if claims:
        db.delete(*claims)
    assert statuses == [0] * len(running)


@pytest.mark.parametrize("form", workers)
def test_example_workers(form, share_proxy, connect, run_workers, db):
    """Dez tarefas enfileiradas antes de haver worker: três workers as repartem, cada uma respondida uma só vez."""
    proxy = share_proxy(env=on)
    # Uma tarefa que venceu enquanto esperava, no começo da fila, não atrapalha as outras.
    db.lpush(queue, f"ndjson_task_{uuid.uuid4()}")
    opened = [connect(proxy).request("POST", "/", body=f"oi {number}".encode()).response() for number in range(10)]
    run_workers(form, 3)
    for number, lines in enumerate(harness.read_all(opened, 40)):
        assert lines == [
            b'{"type": "begin"}',
            b'{"type": "item", "content": "oi "}',
            f'{{"type": "item", "content": "{number} "}}'.encode(),
            b'{"type": "end"}',
        ]
    empty(db, "todas respondidas")
    # E uma que chega com os workers já à espera; antes disso, um deles nem saberia como parar.
    harness.eventually(lambda: db.info("clients")["blocked_clients"] == 3, 20, "três workers à espera")
    assert len(connect(proxy).request("POST", "/", body=b"a").response().lines()) == 3


@pytest.mark.parametrize("form", workers)
def test_example_workers_take_no_more_than_they_serve(form, share_proxy, connect, run_workers, db):
    """Com mais tarefas do que atende ao mesmo tempo, um worker deixa as outras na fila, para quem estiver livre."""
    proxy = share_proxy(env=on)
    opened = [connect(proxy).request("POST", "/", body=b"a").response() for _ in range(24)]
    run_workers(form, 1, delay=2)
    most = 0

    def drained():
        """Conta as tarefas já tiradas e ainda vivas; diz se todas acabaram (bool)."""
        nonlocal most
        with db.pipeline(transaction=True) as pipe:
            alive, queued = pipe.keys("ndjson_task_*").llen(queue).execute()
        most = max(most, len(alive) - queued)
        return not alive

    harness.eventually(drained, 40, "todas respondidas")
    assert 1 < most <= parallel
    assert [len(lines) for lines in harness.read_all(opened)] == [3] * 24


def count_sleeps(group):
    """Conta os sleep que já rodam em um grupo de processos.

    Argumentos:
        group: número do grupo.

    Retorno:
        Quantos (int).
    """
    count = 0
    for entry in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = entry.read_text().partition("(")[2].rpartition(")")
            count += name == "sleep" and int(rest.split()[2]) == group
    return count


def test_full_worker_stops(share_proxy, connect, run_workers, db):
    """O worker.sh cheio, à espera de uma vaga, para na hora quando se pede a ele e aos filhos, e avisa cada cliente."""
    proxy = share_proxy(env=on)
    opened = [connect(proxy).request("POST", "/", body=b"a").response() for _ in range(parallel + 1)]
    [process] = run_workers("sh", 1, delay=30)
    assert {bytes(response.line(30)) for response in opened[:parallel]} == {b'{"type": "begin"}'}
    harness.eventually(lambda: len(waiting(db)) == 1 and not db.info("clients")["blocked_clients"], 10, "cheio")
    # Um sinal que chega entre o fork e o exec de um sleep perde-se, e o bash espera por ele até o fim.
    harness.eventually(lambda: count_sleeps(process.pid) == parallel, 10, "um sleep por tarefa")
    # Ao grupo, como um Ctrl-C ou o systemd: o bash só trata um sinal quando o sleep acaba.
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(15) == 0
    for response in opened[:parallel]:
        assert response.lines() == [b'{"error": "worker_stopped"}']
    taken(db).finish("ok")
    assert opened[-1].lines() == [b"ok"]
