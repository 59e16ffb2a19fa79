"""O que usuários de programas parecidos relataram, provado neste: uma prova por linha da tabela da questão, com outras
entradas do mesmo tipo. As linhas que outras provas cobrem: o prazo julgado antes da última consulta,
test_stream.test_frozen_process_delivers_before_the_timeout; as linhas puladas nas métricas, test_metrics.test_no_first_line."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time

import pytest

import harness
import support


def settings(server, **more):
    """Compõe o ambiente de uma execução que termina por si. Argumentos: server, o Redis; more, o mais. Retorno: dict."""
    return {"ENV_FILE": "/dev/null", "HTTP_PORT": "0", "HTTP_HOST": "127.0.0.1", "REDIS_SERVER": server.address, **more}


def sentence(done, status, *words):
    """Confere que o programa acabou com uma frase só, e o que ela diz.

    Argumentos:
        done: o harness.finished.
        status: o código de saída.
        words: trechos que a frase tem.
    """
    assert (done.status, done.out, len(done.err.splitlines())) == (status, "", 1), done
    assert done.err.startswith("erro: ") and not [word for word in words if str(word) not in done.err], (words, done)


def warnings(text):
    """Acha os avisos. Argumentos: text, o log ou a saída de --check. Retorno: lista de linhas."""
    return [line for line in text.splitlines() if line.startswith("aviso: ")]


def pinged(proxy, timeout=5.0, host="127.0.0.1"):
    """Faz um /ping. Argumentos: proxy; timeout, em segundos; host, o endereço. Retorno: par (status, segundos)."""
    began = time.monotonic()
    with contextlib.closing(harness.connection(proxy.port, host)) as conn:
        status = conn.request("GET", "/ping").response(timeout).status
    return status, time.monotonic() - began


# -- linha 2: nada que demore prende o laço -----------------------------------------------------------------


def test_long_task_on_a_slow_link(stack, supervisor, start_redis, start_proxy, connect, start_worker):
    """4 MB que sobem ao Redis a 400 kB/s: as linhas dos outros, /ping e o vigia não esperam, e a tarefa chega inteira."""
    server = start_redis()
    link = support.slow_link(server.port, 400_000)
    stack.callback(link.close)
    env = {"REDIS_SERVER": link.address, "WATCHDOG_USEC": "3000000", **supervisor.env}
    proxy, worker = start_proxy(redis=server, env=env), start_worker(server.client())
    response, task = support.open_stream(connect, proxy, worker)
    body = "x" * 4_000_000
    began = time.monotonic()
    long = connect(proxy).request("POST", "/", body=body)
    number = 0
    while time.monotonic() < began + 7:
        task.push(str(number))
        pushed = time.monotonic()
        line = response.line(5)
        assert (line, line.when - pushed < 1) == (str(number).encode(), True)
        status, took = pinged(proxy)
        assert status == 200 and took < 1, (status, took)
        number += 1
    assert max(supervisor.gaps(began)) < 3
    assert worker.client.keys("ndjson_task_*") == [task.key.encode()], "a tarefa subiu depressa demais para a prova"
    assert long.response(30).status == 200
    longer = worker.next()
    assert longer.info["body"] == body
    for answer, each in ((response, task), (long.current, longer)):
        each.finish("fim")
        assert answer.lines() == [b"fim"]
    assert "fora do ar" not in proxy.log()


def test_silent_resolver(stack, supervisor, start_redis, start_proxy, tmp_path):
    """O DNS que não responde, ao reabrir a conexão: /ping diz 500 e o vigia segue; de volta o nome, volta o serviço."""
    names, resolver = tmp_path / "hosts", tmp_path / "resolv.conf"
    names.write_text("127.0.0.1 redis.prova\n")
    mute = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    mute.bind(("127.0.53.1", 53))
    resolver.write_text("nameserver 127.0.53.1\noptions timeout:5 attempts:2\n")
    server = start_redis()
    proxy = start_proxy(
        redis=server,
        wrapper=support.with_files({"/etc/hosts": names, "/etc/resolv.conf": resolver}),
        env={"REDIS_SERVER": f"redis.prova:{server.port}/1", "WATCHDOG_USEC": "2000000", **supervisor.env},
    )
    assert pinged(proxy)[0] == 200
    names.write_text("")
    began = time.monotonic()
    (row,) = server.clients_named("py-ndjson-proxy")
    server.client().execute_command("CLIENT", "KILL", "ID", row["id"])
    # Quem chega antes de a queda ser dita espera por ela, talvez duas vezes; os outros, não.
    assert pinged(proxy)[0] == 500
    proxy.wait_log("Redis fora do ar: sem resposta", 1)
    while time.monotonic() < began + 7:
        status, took = pinged(proxy)
        assert status == 500 and took < 1, (status, took)
    assert max(supervisor.gaps(began)) < 2
    names.write_text("127.0.0.1 redis.prova\n")
    harness.eventually(lambda: pinged(proxy)[0] == 200, 30, "Redis de volta")


def test_supervisor_that_does_not_read(start_proxy, stack):
    """O systemd que não lê o que lhe é notificado também não prende o laço."""
    deaf = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    deaf.bind("")
    env = {"NOTIFY_SOCKET": "@" + deaf.getsockname()[1:].decode(), "WATCHDOG_USEC": "30000"}
    proxy = start_proxy(env=env)
    began = time.monotonic()
    while time.monotonic() < began + 4:
        assert pinged(proxy)[0] == 200


# -- linha 4: sinais ignorados no início, e o segundo sinal ---------------------------------------------------


@pytest.mark.parametrize("name", ["HUP", "INT", "TERM"])
def test_signal_ignored_at_the_start(start_proxy, name):
    """O sinal que já vinha ignorado (nohup) continua a sê-lo; os outros param o programa como sempre."""
    proxy = start_proxy(wrapper=["sh", "-c", f"trap '' {name}; exec \"$@\"", "sh"])
    proxy.signal(signal.Signals[f"SIG{name}"])
    assert [pinged(proxy)[0] for _ in range(3)] == [200] * 3
    assert "parando" not in proxy.log()
    proxy.signal(signal.SIGINT if name == "TERM" else signal.SIGTERM)
    assert proxy.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_to_process_1(start_proxy, connect, worker, number):
    """O processo 1 de um contêiner, a quem a ação padrão dos sinais não atinge, também acaba no segundo, com 128 + n."""
    proxy = start_proxy("--drain", 60000, wrapper=support.apart("pid", "fork", "kill-child"))
    response, task = support.open_stream(connect, proxy, worker)
    (inside,) = pathlib.Path(f"/proc/{proxy.pid}/task/{proxy.pid}/children").read_text().split()
    os.kill(int(inside), number)
    proxy.wait_log("parando")
    os.kill(int(inside), number)
    assert proxy.wait(5) == 128 + number
    with pytest.raises((harness.broken, ConnectionResetError)):
        response.lines(2)
    worker.client.delete(task.key)


# -- linha 6: a recusa que dura não é uma queda ---------------------------------------------------------------


@pytest.mark.parametrize("limit", ["proto-max-bulk-len", "client-query-buffer-limit"])
def test_task_beyond_a_limit_of_redis(start_redis, start_proxy, connect, fetch, start_worker, limit):
    """Um corpo de 2 MB, e um limite de 1 MB no Redis: 500 que o nomeia, quantas vezes for; ninguém mais o nota."""
    server = start_redis(f"{limit} 1mb")
    proxy = start_proxy(redis=server)
    (warning,) = warnings(proxy.log())
    assert warning.startswith("aviso: MAX_BODY") and limit in warning and "16777216" in warning
    response, task = support.open_stream(connect, proxy, start_worker(server.client()))
    (before,) = server.clients_named("py-ndjson-proxy")
    for number in range(3):
        refused = fetch(proxy, "POST", "/", body="x" * 2_000_000)
        assert refused.status == 500, refused.head
        body = refused.json()
        assert body["error"] == "redis_error" and limit in body["message"], body
        assert re.search(r"\b2000\d{3}\b", body["message"]), body
        if limit == "proto-max-bulk-len":
            assert "invalid bulk length" in body["message"], body
        task.push(str(number))
        assert response.line(1) == str(number).encode()
    (after,) = server.clients_named("py-ndjson-proxy")
    assert after["id"] == before["id"]
    task.finish()
    assert response.lines() == []
    assert "fora do ar" not in proxy.log()


def test_long_task_and_a_passing_refusal(start_redis, start_proxy, fetch):
    """Já uma recusa que passa vale o mesmo para uma tarefa longa e para uma curta: 504, e 200 quando passa."""
    server = start_redis()
    proxy = start_proxy(redis=server)
    server.client().config_set("min-replicas-to-write", 1)
    for size in (300_000, 3):
        refused = fetch(proxy, "POST", "/", body="x" * size)
        assert (refused.status, refused.json()["error"]) == (504, "redis_unavailable"), size
    server.client().config_set("min-replicas-to-write", 0)
    harness.eventually(lambda: fetch(proxy, "POST", "/", body="x" * 300_000).status == 200, 5, "tarefa aceita")
    proxy.stop()
    server.client().flushall()


@pytest.mark.parametrize("granted", ["+config|get", "-config", "-config -info -@dangerous"])
def test_limit_that_cannot_be_read(start_redis, start_proxy, fetch, granted):
    """Sem o direito de perguntar os limites, parte-se sem aviso; a recusa, na hora dela, é a mesma."""
    server = start_redis("proto-max-bulk-len 1mb")
    proxy = start_proxy(redis=server, env=support.limited_user(server, *granted.split()))
    assert len(warnings(proxy.log())) == granted.startswith("+"), proxy.log()
    assert fetch(proxy, "POST", "/", body="x" * 2_000_000).status == 500


# -- linha 7: o que nenhuma espera conserta sai com 2, e diz o quê --------------------------------------------


modules = {
    "outro_vazio": ("redis.py", "", "redis"),
    "outro_flask": ("flask.py", "", "flask"),
    "outro_que_falha": ("waitress.py", "raise RuntimeError('quebrado')", "waitress"),
    "pacote_antigo": ("redis/__init__.py", "__version__ = '3.5.3'\n\n\nclass Redis:\n    pass\n", "redis"),
    "pacote_novo": ("werkzeug/__init__.py", "raise ImportError('cannot import name url_quote')", "werkzeug"),
    "pacote_sem_nome": ("dotenv/__init__.py", "", "dotenv"),
    "sintaxe": ("waitress.py", "def (", "waitress"),
}


@pytest.mark.parametrize("name", modules)
def test_unusable_module(tmp_path, redis_main, name):
    """O módulo que não serve, ou o que tomou o lugar dele: uma frase os nomeia, e não se insiste."""
    file, text, module = modules[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    done = harness.run_proxy(env=settings(redis_main) | {"PYTHONPATH": str(tmp_path)})
    sentence(done, 2, module, path, "é preciso")


def test_neighbours(tmp_path, redis_main):
    """Um arquivo ao lado do programa, tenha o nome que tiver, não toma o lugar de um módulo."""
    for name in ("redis.py", "flask.py", "email.py", "ssl.py", "secrets.py"):
        (tmp_path / name).write_text("raise RuntimeError('vizinho')\n")
    shutil.copy(harness.program, tmp_path)
    path = tmp_path / harness.program.name
    assert harness.run_proxy("--check", "-p", "0", env=settings(redis_main), path=path).status == 0


def test_metrics_module_that_does_not_serve(tmp_path, redis_main):
    """Com METRICS_PORT, o prometheus_client que falha ao ser importado é dito na hora, também por --check."""
    (tmp_path / "prometheus_client.py").write_text("raise RuntimeError('quebrado')\n")
    env = settings(redis_main) | {"PYTHONPATH": str(tmp_path)}
    for words in ([], ["--check"]):
        sentence(harness.run_proxy("--metrics-port", "1", *words, env=env), 2, "METRICS_PORT", "prometheus_client", "quebrado")


@pytest.mark.parametrize("host", ["fe80::1", "::ffff:127.0.0.1"])
def test_address_that_cannot_be_bound(redis_main, host):
    """O endereço que o sistema não sabe abrir: é ele o nomeado, e não a porta."""
    sentence(harness.run_proxy("--host", host, "-p", "0", env=settings(redis_main)), 2, "HTTP_HOST", host)


def test_missing_module(redis_main):
    """O módulo que falta: o nome dele, e o que instalar."""
    # Sem o módulo site, o Python só acha os módulos que são dele.
    done = harness.run_proxy(env=settings(redis_main), wrapper=["sh", "-c", 'exec "$0" -S "$@"'])
    sentence(done, 2, "falta o módulo dotenv", "apt install python3-flask")


def clustered():
    """Monta as linhas do redis.conf de um nó de cluster. Retorno: lista de str."""
    return ["cluster-enabled yes", f"cluster-port {harness.free_port()}"]


def test_database_in_a_cluster(start_redis):
    """SELECT que um Redis em modo cluster recusa: 2, no início e em --check."""
    server = start_redis(*clustered())
    sentence(harness.run_proxy(env=settings(server)), 2, "REDIS_SERVER", "cluster")
    done = harness.run_proxy("--check", env=settings(server))
    assert done.status == 2 and "SELECT is not allowed in cluster mode" in done.err, done


def test_low_port(start_redis, tmp_path):
    """HTTP_PORT=80 sem privilégio: a frase traz o remédio; 2, no início e em --check."""
    path = tmp_path / "redis.sock"
    server = start_redis(f"unixsocket {path}")
    wrapper = [*support.apart("net"), "setpriv", "--bounding-set=-net_bind_service", "--"]
    env = settings(server, REDIS_SERVER=f"unix://{path}?db=1", HTTP_PORT="80", HTTP_HOST="0.0.0.0")
    sentence(harness.run_proxy(env=env, wrapper=wrapper), 2, "HTTP_PORT", "low-port.conf", "Permission denied")
    done = harness.run_proxy("--check", env=env, wrapper=wrapper)
    assert done.status == 2 and "low-port.conf" in done.err, done


# -- linha 8: um nome que só tem IPv6 -------------------------------------------------------------------------


def test_names_of_ipv6_only(start_redis, start_proxy, connect, start_worker, tmp_path, host):
    """HTTP_HOST, METRICS_HOST, REDIS_SERVER e a sentinela, por um nome que só tem AAAA."""
    names, port = tmp_path / "hosts", harness.free_port()
    names.write_text("::1 seis.prova\n")
    server = start_redis("bind 127.0.0.1 ::1")
    sentinel = harness.redis_server(tmp_path / "sentinela")
    (sentinel.folder / "s.conf").write_text(
        f"bind ::1\nport {sentinel.port}\ndir {sentinel.folder}\nsentinel monitor mestre 127.0.0.1 {server.port} 1\n"
    )
    sentinel.spawn([harness.redis_binary(), str(sentinel.folder / "s.conf"), "--sentinel"], harness.base_environment())
    try:
        for address in (f"seis.prova:{server.port}/1", f"sentinel://seis.prova:{sentinel.port}/mestre/1"):
            env = {"HTTP_HOST": "seis.prova", "METRICS_HOST": "seis.prova", "METRICS_PORT": port, "REDIS_SERVER": address}
            if address.startswith("sentinel"):
                harness.eventually(lambda: harness.accepts(sentinel.port, "::1"), 10, "sentinela")
            proxy = start_proxy(redis=server, env=env, wrapper=support.with_files({"/etc/hosts": names}))
            assert pinged(proxy, host="::1")[0] == 200
            with contextlib.closing(harness.connection(port, "::1")) as conn:
                assert b"ndjson_proxy_streams 0" in conn.request("GET", "/metrics").response().body()
            proxy.stop()
    finally:
        sentinel.kill()


# -- linha 9: a razão que veio junto com o corte --------------------------------------------------------------


def test_protected_mode(stack, tmp_path):
    """O Redis em protected-mode, de um endereço que não é local: as palavras dele, no início e em --check."""
    server = harness.redis_server(tmp_path / "redis")
    config = ["bind 10.77.0.1", f"port {server.port}", "protected-mode yes", "save ''", f"dir {server.folder}"]
    (server.folder / "redis.conf").write_text("\n".join(config).replace("''", '""'))
    script = 'ip link set lo up; ip address add 10.77.0.1/32 dev lo; exec "$@"'
    command = [*support.apart("net"), "sh", "-ec", script, "sh", harness.redis_binary(), str(server.folder / "redis.conf")]
    server.spawn(command, harness.base_environment())
    stack.callback(server.kill)
    harness.eventually(lambda: "eady to accept" in server.output(), 10, "redis-server")
    spaces = ["--net", "--user", "--preserve-credentials"] if os.geteuid() else ["--net"]
    wrapper = ["nsenter", f"--target={server.pid}", *spaces, "--"]
    env = settings(server, REDIS_SERVER=f"10.77.0.1:{server.port}/1")
    for _ in range(3):
        sentence(harness.run_proxy(env=env, wrapper=wrapper), 1, "REDIS_SERVER", "Redis is running in protected mode")
        done = harness.run_proxy("--check", env=env, wrapper=wrapper)
        assert done.status == 1 and "Redis is running in protected mode" in done.err, done


# -- linha 10: o Redis que apagaria tarefas -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "memory", "rules", "told"),
    [
        ("allkeys-lru", "100mb", [], True),
        ("volatile-ttl", "100mb", [], True),
        ("noeviction", "100mb", [], False),
        ("allkeys-lru", "0", [], False),
        ("allkeys-lru", "100mb", ["-info"], False),
        ("allkeys-lru", "100mb", ["-config"], True),
    ],
)
def test_eviction_policy(start_redis, start_proxy, policy, memory, rules, told):
    """Com memória limitada e política de descarte, um aviso no início e em --check diz a que há e a que serve."""
    server = start_redis(f"maxmemory {memory}", f"maxmemory-policy {policy}")
    env = support.limited_user(server, *rules)
    seen = start_proxy(redis=server, env=env).log()
    done = harness.run_proxy("--check", env=settings(server, **env))
    assert done.status == 0, done
    for text in (seen, done.out + done.err):
        found = warnings(text)
        assert len(found) == told, text
        assert not told or all(word in found[0] for word in ("maxmemory-policy", policy, "noeviction")), found


# -- linha 11: o prazo do vigia -------------------------------------------------------------------------------


def test_watchdog(supervisor, start_proxy):
    """WATCHDOG_USEC=300000: três sinais e mais, sempre a tempo; e o estado diz um stream novo em menos de 1 s."""
    start_proxy(env={"WATCHDOG_USEC": "300000", **supervisor.env})
    ready = harness.eventually(lambda: [when for when, text in supervisor.rows if "READY=1" in text], 10, "READY=1")[0]
    harness.eventually(lambda: time.monotonic() > ready + 2, 5)
    gaps = supervisor.gaps(ready)
    assert len(gaps) > 7 and gaps[len(gaps) // 2] <= 0.3, gaps


def test_status_follows_a_change(supervisor, start_proxy, connect, worker):
    """O estado diz que um stream começou, e que acabou, em menos de 1 s, seja qual for o prazo do vigia."""
    proxy = start_proxy(env={"WATCHDOG_USEC": "60000000", **supervisor.env})
    response, task = support.open_stream(connect, proxy, worker)

    def told(count):
        """Espera o estado com um número de streams. Argumentos: count, o número."""
        harness.eventually(lambda: f"streams vivos: {count}" in supervisor.rows[-1][1], 1.5, f"{count} streams no estado")

    told(1)
    task.finish()
    assert response.lines() == []
    told(0)


# -- linha 12: as aspas que um leitor de arquivos não tirou ---------------------------------------------------


def test_quotes_in_a_value(redis_main, tmp_path):
    """Aspas em volta do valor, em cada camada, e linhas que não são JSON: um aviso as nomeia, e nunca o segredo."""
    file = tmp_path / "p.env"
    file.write_text("SERVERNAME='\"do arquivo\"'\nHEARTBEAT_LINE=ping\n")
    env = {"ENV_FILE": str(file), "AUTH_TOKEN": '"s3gr3d0"', "MAXTIME_ERROR": "'{\"error\": \"timeout\"}'"}
    done = harness.run_proxy("--check", "-C", "'canal'", env={**settings(redis_main), **env})
    assert done.status == 0 and "s3gr3d0" not in done.out + done.err, done
    told = {re.match(r"aviso: (\w+)", line)[1]: line for line in warnings(done.err)}
    assert set(told) == {"SERVERNAME", "HEARTBEAT_LINE", "AUTH_TOKEN", "MAXTIME_ERROR", "REDIS_CHANNEL"}, done
    assert {name for name in told if "aspas" in told[name]} >= {"SERVERNAME", "AUTH_TOKEN", "REDIS_CHANNEL"}, told
    assert {name for name in told if "não é JSON" in told[name]} == {"HEARTBEAT_LINE", "MAXTIME_ERROR"}, told
    assert f"arquivo {file}" in told["SERVERNAME"] and "ambiente" in told["AUTH_TOKEN"]


def test_good_values_are_silent(redis_main):
    """Um texto JSON, um objeto e um nome com uma aspa só não são suspeitos."""
    good = {"HEARTBEAT_LINE": '"ping"', "MAXTIME_ERROR": " {\"e\":\n1} ", "SERVERNAME": "o'nome", "REDIS_CHANNEL": '"'}
    done = harness.run_proxy("--check", env=settings(redis_main, **good))
    assert (done.status, done.err) == (0, ""), done


# -- linha 13: quem fala outra língua com a porta do HTTP -----------------------------------------------------


def client_hello():
    """Monta o começo de uma conexão TLS. Retorno: bytes."""
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="proxy.test").do_handshake()
    return outgoing.read()


def test_strangers_to_http(start_proxy, connect, host):
    """PROXY v1 e v2, TLS e HTTP/2: um aviso por tipo, com o endereço e a causa provável; o HTTP segue calado."""
    request = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    version_1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + request
    version_2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\1\x7f\0\0\1\x10\0\x20\0" + request
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
    for kinds in ({"PROXY": version_1, "TLS": client_hello(), "HTTP/2": preface}, {"PROXY": version_2}):
        proxy = start_proxy()
        for word, data in kinds.items():
            for _ in range(3):
                conn = connect(proxy, source="127.0.0.9")
                conn.send(data)
                conn.half_close()
            proxy.wait_log(rf"aviso: .*\b{word}\b")
            assert pinged(proxy)[0] == 200
        told = warnings(proxy.log())
        assert len(told) == len(kinds) and all("127.0.0.9" in line for line in told), told


# -- linha 14: cada opção da URL do Redis tem a sua frase -----------------------------------------------------


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("ssl_cert_reqs=CERT_NONE", ("ssl_cert_reqs", "none, optional ou required")),
        ("foo=1", ("foo",)),
        ("protocol=3", ("protocol",)),
        ("socket_timeout=90", ("socket_timeout",)),
        ("socket_read_size=x", ("socket_read_size",)),
        ("credential_provider=x", ("credential_provider",)),
        ("redis_connect_func=x", ("redis_connect_func",)),
        ("socket_keepalive_options=x", ("socket_keepalive_options",)),
        ("ssl_cert_reqs=2", ("ssl_cert_reqs", "none, optional ou required")),
        ("ssl_ca_certs=/nao/existe.pem&bar=2", ("ssl_ca_certs",)),
        ("db=um", ("db",)),
    ],
)
def test_wrong_option_in_the_address(option, words):
    """A opção errada é nomeada, e o segredo que está entre as outras, ou antes do @, não é mostrado."""
    for query in (option, f"password=s3gr3d0&{option}", f"{option}&ssl_password=s3gr3d0"):
        address = f"rediss://eu:s3gr3d0@redis.prova:6379/1?{query}"
        told = harness.refusal(env={"ENV_FILE": "/dev/null", "REDIS_SERVER": address})
        assert told.startswith("erro: REDIS_SERVER: ") and "s3gr3d0" not in told, told
        assert not [word for word in words if word not in told], told


# -- linha 15: a tarefa que ninguém ouviu ---------------------------------------------------------------------


def test_worker_that_comes_later(start_redis, start_proxy, connect, start_worker):
    """Sem worker, a tarefa é anunciada de novo até que ele venha, e ele a recebe uma vez só."""
    server = start_redis()
    proxy = start_proxy(redis=server)
    response = connect(proxy).request("POST", "/", body="x").response()
    name = response.header("X-Task-Name")
    assert f"tarefa={name}" in proxy.wait_log(r"aviso: .*ninguém ouve o canal.*")[0]
    assert "não será anunciada" not in proxy.log() and "anunciada de novo" in proxy.log()
    harness.eventually(lambda: server.calls("publish") >= 3, 5, "anúncios")
    worker = start_worker(server.client())
    task = worker.next()
    assert task.name == name
    proxy.wait_log(rf"(?m)^tarefa={name} ouvida")
    calls = server.calls("publish")
    response.conn.silent(2.2)
    assert server.calls("publish") == calls
    worker.idle()
    task.finish("fim")
    assert response.lines() == [b"fim"]
    assert proxy.log().count("ninguém ouve") == 1


def test_no_announcement_of_what_was_found(start_redis, start_proxy, connect):
    """A tarefa que já tem linhas, e a que acabou, não são mais anunciadas."""
    server = start_redis()
    proxy, client = start_proxy(redis=server), server.client()
    found, left = [connect(proxy).request().response() for _ in range(2)]
    harness.eventually(lambda: server.calls("publish") >= 4, 5, "anúncios das duas")
    client.rpush(harness.default_list_prefix + found.header("X-Task-Name"), "achada")
    assert found.line() == b"achada"
    left.conn.close()
    proxy.wait_log("fim=cliente")
    calls = server.calls("publish")
    found.conn.silent(2.2)
    # Um anúncio podia estar a caminho.
    assert server.calls("publish") <= calls + 1
    client.delete(harness.default_prefix + found.header("X-Task-Name"))
    assert found.lines() == []


same_slot = ("-X", "{p}task_", "-L", "{p}list_", "-R")


@pytest.mark.parametrize("why", ["desligado", "réplica", "cluster", "sem INFO"])
def test_no_announcement_in_doubt(start_redis, start_proxy, connect, start_worker, why):
    """Quando PUBLISH não conta todos os ouvintes, ou não se sabe se conta, não há novo anúncio, e o aviso diz isso."""
    server = start_redis(*(clustered() if why == "cluster" else []))
    client, flags, env = server.client(0 if why == "cluster" else 1), (), {}
    if why == "desligado":
        flags = ("--reannounce", "off")
    elif why == "réplica":
        start_redis(f"replicaof 127.0.0.1 {server.port}", "repl-diskless-sync-delay 0")
        harness.eventually(lambda: client.info("replication")["connected_slaves"] == 1, 10, "réplica ligada")
    elif why == "cluster":
        client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        harness.eventually(lambda: client.cluster("info")["cluster_state"] == "ok", 10, "cluster de um nó")
        flags = (*same_slot, f"127.0.0.1:{server.port}/0")
    else:
        env = support.limited_user(server, "-info")
    proxy = start_proxy(*flags, redis=server, env=env)
    response = connect(proxy).request().response()
    if why == "cluster":
        # Lá, PUBLISH só conta os ouvintes de um nó: não há o que avisar.
        assert "ninguém ouve" not in proxy.log()
    else:
        assert "não será anunciada de novo" in proxy.wait_log("aviso: .*ninguém ouve.*")[0]
    worker = start_worker(client)
    calls = server.calls("publish")
    response.conn.silent(2.2)
    assert server.calls("publish") == calls
    worker.idle()
    response.conn.close()
    proxy.wait_log("fim=cliente")


# -- linha 17: --check tenta o que o início tenta -------------------------------------------------------------


def test_check_opens_the_ports(redis_main, share_proxy):
    """Um endereço que não é desta máquina e uma porta ocupada: 1, como no início; ocupada por um proxy destes: 0."""
    port = harness.free_port()
    served = share_proxy("--metrics-port", port)
    with socket.create_server(("127.0.0.1", 0)) as other:
        busy = str(other.getsockname()[1])
        for name, value in (("HTTP_HOST", "10.9.9.9"), ("HTTP_PORT", busy), ("METRICS_PORT", busy)):
            done = harness.run_proxy("--check", env=settings(redis_main, **{name: value}))
            assert done.status == 1 and f"erro: {name}" in done.err and value in done.err, done
    for name, value in (("HTTP_PORT", served.port), ("METRICS_PORT", port)):
        done = harness.run_proxy("--check", env=settings(redis_main, **{name: str(value)}))
        assert (done.status, done.err) == (0, ""), done
        assert re.search(rf"(?m)^{name}.*\b{value}\b.* py-ndjson-proxy", done.out), done
    assert pinged(served)[0] == 200


# -- linha 19: o que as bibliotecas leem do ambiente por conta própria ----------------------------------------


def test_environment_of_the_libraries(start_proxy, connect, worker, host, tmp_path):
    """Variáveis do Flask, do werkzeug, do prometheus_client e do Python: o serviço é o mesmo, e o log só tem o que é nosso."""
    keys, port = tmp_path / "chaves", harness.free_port()
    env = {"FLASK_RUN_FROM_CLI": "true", "FLASK_DEBUG": "1", "FLASK_ENV": "development", "FLASK_SKIP_DOTENV": "1"}
    env |= {"FLASK_APP": "nada", "WERKZEUG_RUN_MAIN": "true", "WERKZEUG_SERVER_FD": "99", "WERKZEUG_DEBUG_PIN": "off"}
    env |= {"PROMETHEUS_MULTIPROC_DIR": "/nonexistent", "prometheus_multiproc_dir": "/nonexistent"}
    env |= {"PYTHONASYNCIODEBUG": "1", "PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2"}
    proxy = start_proxy("--metrics-port", port, env={**env, "SSLKEYLOGFILE": str(keys)})
    response, task = support.open_stream(connect, proxy, worker, "POST", "/", body="x")
    assert task.info["body"] == "x"
    task.push("uma")
    assert response.line() == b"uma"
    task.finish("fim")
    assert response.lines() == [b"fim"]
    assert connect(proxy).request("GET", "/caminho/?x", {"Connection": "close"}).response().status == 200
    worker.next().delete()
    assert pinged(proxy)[0] == 200
    assert connect(port).request("GET", "/metrics").response().body().count(b"ndjson_proxy_lines_total 2.0") == 1
    proxy.stop()
    odd = [row for row in proxy.log().splitlines() if not re.match("pronto: |métricas: |tarefa=|parando: |parado$", row)]
    assert (odd, proxy.output(), keys.exists()) == ([], "", False)


# -- linha 20: o arquivo que alguém importa -------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import importlib; importlib.import_module('json-proxy')",
        "import runpy; runpy.run_path('json-proxy.py')",
        "import waitress.runner; waitress.runner.run(['w', '--listen=127.0.0.1:0', 'json_proxy:app'])",
    ],
    ids=["import", "runpy", "waitress-serve"],
)
def test_imported(tmp_path, code):
    """Importado, ou dado a um servidor WSGI, o programa diz numa frase como se roda, e não parte."""
    for name in ("json-proxy.py", "json_proxy.py"):
        shutil.copy(harness.program, tmp_path / name)
    words = [sys.executable, "-c", code]
    env = harness.base_environment()
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False)
    seen = done.stdout + done.stderr
    assert re.search(r"py-ndjson-proxy é um programa, .*json.proxy\.py$", seen, re.MULTILINE), done
    assert "erving on" not in seen and "pronto" not in seen, done


# -- linha 21: o Redis que fecha o que está ocioso ------------------------------------------------------------


def test_idle_connection_closed_by_redis(start_redis, start_proxy, connect, start_worker):
    """`timeout 1` no Redis: reabrir é calado e não conta como queda, e o stream que espera recebe as suas linhas."""
    server, port = start_redis("timeout 1"), harness.free_port()
    proxy = start_proxy("-i", 60000, "--metrics-port", port, redis=server)
    seen = set()

    def renewed(count):
        """Espera que a conexão tenha sido trocada. Argumentos: count, quantas conexões diferentes já se viram."""
        harness.eventually(lambda: seen.add(support.proxy_connection(server)) or len(seen - {None}) >= count, 15, "outra conexão")

    renewed(3)
    response, task = support.open_stream(connect, proxy, start_worker(server.client(socket_timeout=None)))
    renewed(len(seen - {None}) + 2)
    server.client().rpush(task.list, "esperada")
    assert response.line(1) == b"esperada"
    with contextlib.closing(server.new_client()) as client:
        client.delete(task.key)
    assert response.lines(1) == []
    metrics = connect(port).request("GET", "/metrics").response().body()
    assert b"redis_cuts_total 0.0" in metrics and b"redis_reconnects_total 0.0" in metrics
    assert re.findall("(?m)^(?!pronto|métricas|tarefa=).+", proxy.log()) == []


# -- no log, o fim de quem já tinha tudo ----------------------------------------------------------------------


def test_client_that_leaves_after_its_last_line(start_proxy, connect, worker):
    """Quem sai com tudo entregue e a tarefa já apagada concluiu; com a tarefa viva, ou linhas por entregar, não."""
    proxy = start_proxy("-P", 30000)
    pairs = support.open_streams(connect, proxy, worker, 3)
    for response, task in pairs:
        task.push("última")
        assert response.line() == "última".encode()
    done_task, alive_task, more_task = [task for _, task in pairs]
    done_task.delete()
    more_task.finish("por entregar")
    for response, _ in pairs:
        response.conn.close()
    ends = [support.finished_row(proxy, task)["fim"] for task in (done_task, alive_task, more_task)]
    assert ends == ["concluida", "cliente", "cliente"]
