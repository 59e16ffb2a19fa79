"""Workers de exemplo em Python, Node.js e PHP, com o proxy e Redis de verdade: as linhas, as quedas, o que dizem."""

import contextlib
import json
import re
import shutil
import subprocess
import sys

import pytest

import cluster
import harness

queue = "ndjson_fila"
body = '{"chatInput": "Olá, mundo"}'
objects = [
    {"type": "begin"},
    {"type": "item", "content": "Olá, "},
    {"type": "item", "content": "mundo "},
    {"type": "end"},
]


@pytest.fixture
def commands(examples, node_folder, tmp_path):
    """Como se roda cada worker. O de Node.js, ao lado da pasta em que o npm instalou os pacotes, que é onde ele procura.

    Retorno:
        Dicionário de nome para o comando (lista).
    """
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "node_modules").symlink_to(node_folder / "node_modules")
    script = shutil.copy(examples / "worker.mjs", tmp_path / "node")
    return {
        "py": [sys.executable, examples / "worker.py", "--delay", "0"],
        "mjs": ["node", script],
        "php": ["php", examples / "worker.php"],
    }


forms = pytest.mark.parametrize("form", ["py", "mjs", "php"])


def answers(response):
    """Lê a resposta até o fim. Argumentos: response, a resposta. Retorno: lista dos objetos das linhas."""
    return [json.loads(line) for line in response.lines(20)]


@forms
def test_answers(form, share_proxy, commands, start_example, fetch, db):
    """Três tarefas que esperavam na fila, entre elas uma vencida, são respondidas uma vez cada, e não sobra chave."""
    proxy = share_proxy(env={"REDIS_QUEUE": queue})
    opened = [fetch(proxy, "POST", "/", body=body.encode()), fetch(proxy, "POST", "/", body="Olá, mundo".encode())]
    db.rpush(queue, "ndjson_task_vencida")
    opened.append(fetch(proxy, "POST", "/", body=body.encode()))
    worker = start_example(*commands[form], REDIS_QUEUE=queue)
    assert [answers(response) for response in opened] == [objects] * 3
    for response in opened:
        worker.wait_log(f"tarefa {response.header('X-Task-Name')}")


@forms
def test_client_leaves(form, share_proxy, commands, start_example, connect, fetch, db):
    """O cliente que sai no meio: o worker para, não deixa lista sem leitor (as chaves, a prova confere) e segue vivo."""
    proxy = share_proxy(env={"REDIS_QUEUE": queue})
    start_example(*commands[form], REDIS_QUEUE=queue)
    leaving = connect(proxy).request("POST", "/", body="palavra " * 100000)
    assert leaving.response().json_line(20)["type"] == "begin"
    leaving.reset()
    assert answers(fetch(proxy, "POST", "/", body=body.encode())) == objects


@forms
def test_redis_returns(form, start_redis, start_proxy, commands, start_example, fetch):
    """O Redis morre e volta: a tarefa seguinte é respondida."""
    server = start_redis()
    proxy = start_proxy(redis=server, env={"REDIS_QUEUE": queue})
    start_example(*commands[form], REDIS_SERVER=server.address, REDIS_QUEUE=queue)
    assert answers(fetch(proxy, "POST", "/", body=body.encode())) == objects
    server.kill()
    server.start()
    harness.eventually(lambda: fetch(proxy, "GET", "/ping").status == 200, 10, "o proxy de volta")
    assert answers(fetch(proxy, "POST", "/", body=body.encode())) == objects
    server.client().flushall()


def test_replica_for_a_while(start_redis, start_proxy, start_example, examples, connect):
    """Um Redis que vira réplica no meio (READONLY) e volta: o worker.py espera, e o cliente recebe cada linha uma vez."""
    server = start_redis()
    db = server.client()
    proxy = start_proxy(redis=server)
    worker = start_example(sys.executable, examples / "worker.py", "--delay", "0.3", REDIS_SERVER=server.address)
    worker.wait_log("inscrito no canal", 15)
    response = connect(proxy).request("POST", "/", body="a b c d e f").response()
    assert response.json_line()["type"] == "begin"
    db.replicaof("127.0.0.1", "1")
    harness.eventually(lambda: db.info("commandstats")["cmdstat_rpush"]["rejected_calls"], 10, "um RPUSH recusado")
    db.replicaof("NO", "ONE")
    assert [item.get("content") for item in answers(response)] == ["a ", "b ", "c ", "d ", "e ", "f ", None]
    db.flushall()


def test_no_hello(start_redis, start_proxy, start_example, examples, fetch):
    """Um Redis sem HELLO, como os anteriores ao 6: o worker.py fala o protocolo que todos falam."""
    server = start_redis('rename-command HELLO ""')
    proxy = start_proxy(redis=server, env={"REDIS_QUEUE": queue})
    start_example(
        sys.executable, examples / "worker.py", "--delay", "0", REDIS_SERVER=server.address, REDIS_QUEUE=queue
    )
    assert answers(fetch(proxy, "POST", "/", body=body.encode())) == objects
    server.client().flushall()


@pytest.fixture
def group(tmp_path):
    """Um Redis Cluster. Retorno: um cluster.cluster."""
    with contextlib.ExitStack() as stack:
        yield cluster.cluster(tmp_path / "cluster", stack)


def test_cluster(group, start_proxy, start_example, examples, connect, fetch):
    """Três tags, cada uma num nó, e dois worker.py que as servem por um só canal: cada tarefa tem um só dono. No meio, o
    lugar de uma tag muda de nó e o nó de outra morre, e nenhum cliente perde ou recebe em dobro uma linha."""
    tags = [cluster.tag_on(number) for number in range(cluster.masters)]
    # As mesmas sementes para todos, uma delas morta.
    address = group.address(harness.free_port(), *group.nodes[1:])
    proxies = [start_proxy(env={"REDIS_SERVER": address, **cluster.prefixes(tag)}) for tag in tags]
    command = [sys.executable, examples / "worker.py", "--delay", "0.05"]
    workers = [start_example(*command, REDIS_SERVER=address) for _ in range(2)]
    for worker in workers:
        worker.wait_log("inscrito no canal", 15)
    words = [f"{number} " for number in range(60)]
    opened = [
        connect(proxy).request("POST", "/", body="".join(words)).response() for proxy in proxies for _ in range(4)
    ]
    for response in opened:
        assert response.json_line(20)["type"] == "begin"
    finish = group.begin_move(tags[0], group.owner(tags[1]))
    finish()
    group.wait_copied(tags[2])
    dead = group.owner(tags[2])
    dead.kill()
    group.wait_failover(tags[2], dead)
    for lines in harness.read_all(opened, 60):
        found = [json.loads(line).get("content") for line in lines]
        assert [text for text in found if text] == words, found
    for response in opened:
        name = response.header("X-Task-Name")
        harness.eventually(lambda name=name: any(name in each.log() for each in workers), 5, "fim dito pelo worker")
        assert sum(each.log().count(f"tarefa {name}: {len(words) + 2} linhas") for each in workers) == 1
    harness.eventually(lambda: {row["fim"] for proxy in proxies for row in proxy.tasks()} == {"concluida"}, 5, "fins")


def test_cluster_queue(group, start_proxy, start_example, examples, fetch):
    """Num cluster, a fila de uma tag; o nó dela morre, e o worker.py volta a tirar dela."""
    tag = cluster.tag_on(0)
    env = {"REDIS_SERVER": group.address(), **cluster.prefixes(tag, queue=True)}
    proxy = start_proxy(env=env)
    start_example(sys.executable, examples / "worker.py", "--delay", "0", **env)
    assert answers(fetch(proxy, "POST", "/", body=body.encode())) == objects
    group.wait_copied(tag)
    dead = group.owner(tag)
    dead.kill()
    group.wait_failover(tag, dead)
    harness.eventually(lambda: fetch(proxy, "GET", "/ping").status == 200, 10, "o proxy de volta")
    assert answers(fetch(proxy, "POST", "/", body=body.encode())) == objects


def test_settings_and_log(start_redis, start_proxy, start_example, examples, tmp_path, fetch):
    """worker.py lê os arquivos de ENV_FILE como o proxy, e o ambiente vale mais; diz o Redis e cada tarefa, e não a senha."""
    server = start_redis(password="sen${HOME}ha")
    proxy = start_proxy(redis=server, env={"REDIS_QUEUE": queue})
    weak, strong = tmp_path / "weak.env", tmp_path / "strong.env"
    weak.write_text("\ufeffREDIS_PASSWORD='sen${HOME}ha'   # como está\nREDIS_QUEUE=fraca\n", encoding="utf-8")
    strong.write_text(f"REDIS_SERVER=redis://:outra@{server.address}\nREDIS_QUEUE=forte\n", encoding="utf-8")
    command = [sys.executable, examples / "worker.py", "--delay", "0"]
    files = f"{tmp_path}/nenhum:{weak}:{strong}"
    named = start_example(*command, REDIS_QUEUE=queue, ENV_FILE=files, REDIS_SERVER=f"redis://:outra@{server.address}")
    named.wait_log(f"à espera na fila {queue}", 15)
    response = fetch(proxy, "POST", "/", body=body.encode())
    assert answers(response) == objects
    named.wait_log(rf"(?m)^worker: tarefa {response.header('X-Task-Name')}: 4 linhas$")
    assert f"worker: Redis em 127.0.0.1:{server.port}/{harness.default_db}\n" in named.log()
    assert not [word for word in ("senha", "HOME", "outra", "ha@") if word in named.log()]
    server.client().flushall()


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"ENV_FILE": "/dev/null:/nenhum/arquivo"}, "/nenhum/arquivo"),
        ({"ENV_FILE": "/proc/self/mem"}, "/proc/self/mem"),
        ({"ENV_FILE": "/dev/null", "REDIS_SERVER": "http://:segredo@maquina"}, "REDIS_SERVER: este worker entende"),
    ],
)
def test_wrong_settings(env, sentence, examples):
    """O que esperar não conserta é uma frase só e a saída 2, sem a senha."""
    done = subprocess.run(
        [sys.executable, str(examples / "worker.py")],
        env={**harness.base_environment(), **env},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert sentence in done.stderr and "segredo" not in done.stderr


def test_unit(examples, tmp_path):
    """A unit do worker é válida para o systemd, tão fechada quanto a do proxy, e o seu início diz como instalá-la."""
    text = (examples / "worker.service").read_text(encoding="utf-8")
    program = re.search(r"ExecStart=\S+ (\S+)", text)[1]
    assert f"cp worker.py {program}\n" in text
    unit = tmp_path / "worker.service"
    unit.write_text(text.replace("/usr/bin/python3", sys.executable), encoding="utf-8")
    for command in (["verify"], ["security", "--offline=true", "--threshold=20"]):
        done = subprocess.run(["systemd-analyze", *command, str(unit)], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "worker.service:" not in done.stderr, done.stderr
