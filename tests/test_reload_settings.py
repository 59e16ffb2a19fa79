"""O que muda com a recarga, o que a recusa, o programa de outra versão, o que o systemd vê, e os streams à vista."""

import json
import os
import re
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request

import prometheus_client.parser
import pytest

import harness
import support

# O que as provas dão no ambiente, e que aqui vem do arquivo.
from_file = ("env", "-u", "HTTP_PORT", "-u", "REDIS_SERVER")
shutdown_line = {"error": "shutdown"}


@pytest.fixture
def own_program(tmp_path, monkeypatch):
    """Faz dos proxies desta prova cópias que se podem mudar. Retorno: o caminho da cópia (pathlib.Path)."""
    copy = tmp_path / harness.program.name
    shutil.copy(harness.program, copy)
    monkeypatch.setattr(harness, "program", copy)
    return copy


def fetched(port, path="/metrics"):
    """Lê um caminho da porta das métricas. Argumentos: port, path. Retorno: o corpo (str)."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return response.read().decode()


def measures(port):
    """Lê as métricas. Argumentos: port. Retorno: dicionário de (nome, rótulos) para o valor."""
    families = prometheus_client.parser.text_string_to_metric_families(fetched(port))
    return {(each.name, tuple(sorted(each.labels.items()))): each.value for family in families for each in family.samples}


def lives_on(pairs, line="ainda"):
    """Confere que streams vivem. Argumentos: pairs, de (response, task); line, a linha que passa por eles."""
    for response, task in pairs:
        task.push(line)
        assert response.line() == line.encode()


def end(pairs):
    """Encerra streams, que devem acabar inteiros. Argumentos: pairs, de (response, task)."""
    for response, task in pairs:
        task.finish("fim")
        assert response.lines() == [b"fim"]
        task.gone()


def test_new_settings_apply(start_proxy, host, connect, fetch, worker):
    """Os valores novos valem para todos: os streams vivos seguem com eles, além de um limite menor que a conta deles."""
    proxy = start_proxy(env_file="PAUSE=0\nMAXTIME=60000\n")
    pairs = support.open_streams(connect, proxy, worker, 3)
    lives_on(pairs)
    proxy.reload('PAUSE=300\nMAX_STREAMS=2\nAUTH_TOKEN=segredo\nSERVERNAME=outro\nMAXTIME=6000\nMAXTIME_ERROR={"fim": 1}\n')
    lives_on(pairs)
    assert fetch(proxy, "POST", "/").status == 401
    allowed = {"Authorization": "Bearer segredo"}
    full = fetch(proxy, "POST", "/", headers=allowed)
    assert (full.status, full.header("Server"), full.json()["error"]) == (503, "outro", "too_many_streams")
    (first, task), (late, _), (other, own) = pairs
    task.finish(*"abc")
    own.finish()
    times = [first.line().when for _ in range(3)]
    assert times[2] - times[0] >= 0.58
    assert (first.lines(), other.lines()) == ([], [])
    assert [json.loads(line) for line in late.lines()] == [{"fim": 1}]
    again = connect(proxy).request("POST", "/", headers=allowed).response()
    assert again.status == 200
    worker.next().finish("fim")
    assert again.lines() == [b"fim"]


def test_log_level(start_proxy, fetch, connect, worker):
    """LOG_LEVEL muda nos dois sentidos."""
    proxy = start_proxy()
    proxy.ask_reload("LOG_LEVEL=warning\nSERVERNAME=calado\n")
    harness.eventually(lambda: fetch(proxy, "GET", "/ping").header("Server") == "calado", 10, "valores novos")
    end([support.open_stream(connect, proxy, worker)])
    proxy.reload("LOG_LEVEL=info\n")
    end([support.open_stream(connect, proxy, worker)])
    harness.eventually(lambda: len(support.finished_rows(proxy)) == 1, 5, "um fim no log")


def test_port_changes(start_proxy, host, connect, worker, redis_main):
    """HTTP_PORT: a nova porta atende, a velha recusa, e os streams não notam."""
    old, new = harness.free_port(), harness.free_port()
    settings = f"HTTP_PORT={{}}\nREDIS_SERVER={redis_main.address}\n"
    proxy = start_proxy(env_file=settings.format(old), wrapper=from_file)
    pairs = support.open_streams(connect, proxy, worker, 2)
    proxy.reload(settings.format(new))
    assert proxy.port == new and not harness.accepts(old)
    lives_on(pairs)
    end([*pairs, support.open_stream(connect, proxy, worker)])


def test_ports_change_places(start_proxy, connect, worker, redis_main):
    """HTTP_PORT e METRICS_PORT trocadas uma pela outra."""
    one, two = harness.free_port(), harness.free_port()
    settings = f"HTTP_PORT={{}}\nMETRICS_PORT={{}}\nREDIS_SERVER={redis_main.address}\n"
    proxy = start_proxy(env_file=settings.format(one, two), wrapper=from_file)
    pairs = [support.open_stream(connect, proxy, worker)]
    proxy.reload(settings.format(two, one))
    assert proxy.port == two and measures(one)["ndjson_proxy_streams", ()] == 1
    end([*pairs, support.open_stream(connect, proxy, worker)])


@pytest.mark.parametrize(("before", "after"), [("flask", "waitress"), ("waitress", "flask")])
def test_server_changes(start_proxy, connect, worker, before, after):
    """HTTP_SERVER: os streams que um aceitou seguem com o outro, que atende os novos na mesma porta."""
    proxy = start_proxy(env_file=f"HTTP_SERVER={before}\n", host=None)
    port, pairs = proxy.port, support.open_streams(connect, proxy, worker, 3)
    proxy.reload(f"HTTP_SERVER={after}\n")
    assert (proxy.server, proxy.port) == (after, port)
    lives_on(pairs)
    end([*pairs, support.open_stream(connect, proxy, worker)])


def test_metrics_port_comes_changes_and_goes(start_proxy, connect, worker):
    """METRICS_PORT: posta, mudada e tirada, com um stream vivo."""
    one, two = harness.free_port(), harness.free_port()
    proxy = start_proxy()
    pairs = [support.open_stream(connect, proxy, worker)]
    proxy.reload(f"METRICS_PORT={one}\n")
    assert measures(one)["ndjson_proxy_streams", ()] == 1
    proxy.reload(f"METRICS_PORT={two}\n")
    assert measures(two)["ndjson_proxy_streams", ()] == 1 and not harness.accepts(one)
    proxy.reload("")
    assert not harness.accepts(two)
    end(pairs)


@pytest.mark.parametrize("name", ["REDIS_SERVER", "REDIS_PREFIX", "REDIS_LIST_PREFIX"])
def test_other_keys(start_proxy, host, connect, start_worker, redis_main, name):
    """Outro Redis ou outros prefixos: os streams vivos acabam com a linha de shutdown, e os novos usam o que é novo."""
    change = {"REDIS_SERVER": f"127.0.0.1:{redis_main.port}/2"}.get(name, "outro_prefixo_")
    server = "" if name == "REDIS_SERVER" else f"REDIS_SERVER={redis_main.address}\n"
    proxy = start_proxy(env_file=f"HTTP_PORT=0\nREDIS_SERVER={redis_main.address}\n", wrapper=from_file)
    worker = start_worker()
    pairs = [support.open_stream(connect, proxy, worker, version=f"HTTP/1.{minor}") for minor in (0, 1)]
    proxy.reload(f"HTTP_PORT=0\n{server}{name}={change}\n")
    for response, task in pairs:
        assert [json.loads(line) for line in response.lines()] == [shutdown_line]
        assert support.finished_row(proxy, task)["fim"] == "shutdown"
    fresh = start_worker(redis_main.client(2)) if name == "REDIS_SERVER" else worker
    end([support.open_stream(connect, proxy, fresh)])
    worker.client.flushall()


def take_port(stack):
    """Ocupa uma porta. Argumentos: stack, o que a fecha. Retorno: o número."""
    return stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]


@pytest.mark.parametrize("wrong", ["value", "file", "port", "metrics", "neighbour", "syntax", "older", "mute", "redis"])
def test_refusal(start_proxy, host, connect, start_worker, start_redis, own_program, stack, wrong):
    """O que não serve é dito em uma frase, e nada muda: os streams e as configurações de antes; e a próxima, boa, serve."""
    server = start_redis("appendonly yes")
    good = f"HTTP_PORT=0\nREDIS_SERVER={server.address}\nPAUSE=0\n"
    proxy = start_proxy(env_file=good, wrapper=from_file, redis=server)
    neighbour = start_proxy(redis=server).port if wrong == "neighbour" else 0
    pairs = support.open_streams(connect, proxy, start_worker(server.client()), 2)
    text, bad, words = own_program.read_text(encoding="utf-8"), good, ""
    if wrong == "value":
        bad, words = f"{good}PAUSE=muito\n", "^PAUSE: o valor 'muito' .* não é válido"
    elif wrong == "port":
        busy = take_port(stack)
        bad, words = good.replace("PORT=0", f"PORT={busy}"), f"^HTTP_PORT: a porta {busy} .* não pode ser aberta"
    elif wrong == "metrics":
        busy = take_port(stack)
        bad, words = f"{good}METRICS_PORT={busy}\n", f"^METRICS_PORT: a porta {busy} .* não pode ser aberta"
    elif wrong == "neighbour":
        bad, words = good.replace("PORT=0", f"PORT={neighbour}"), "^HTTP_PORT: "
    elif wrong == "file":
        os.rename(proxy.env["ENV_FILE"], proxy.env["ENV_FILE"] + ".longe")
        bad, words = None, "^ENV_FILE: o arquivo .* não existe"
    elif wrong == "syntax":
        own_program.write_text(f"{text}\ndef (\n", encoding="utf-8")
        words = "SyntaxError"
    elif wrong == "mute":
        own_program.write_text("# NDJSON_PROXY_STATE\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", encoding="utf-8")
        words = "."
    elif wrong == "older":
        own_program.write_text(text.replace("NDJSON_PROXY_STATE", "NADA"), encoding="utf-8")
        words = "reinicie o serviço"
    else:
        server.kill()
        words = "^REDIS_SERVER: o Redis em .* não atende"
    for _ in range(2):
        assert re.search(words, proxy.refuse_reload(bad))
    if wrong == "redis":
        server.start()
        proxy.wait_log("Redis de volta")
    lives_on(pairs)
    own_program.write_text(text, encoding="utf-8")
    proxy.reload(good)
    lives_on(pairs, "depois")
    for response, task in pairs:
        task.finish("fim")
        assert response.lines() == [b"fim"]
        task.gone()
    stack.callback(proxy.stop)


def test_edited_again_meanwhile(start_proxy, connect, worker):
    """O arquivo que deixa de servir depois de tentado, com a recarga a caminho, não derruba o serviço."""
    proxy = start_proxy(env_file="PAUSE=0\n")
    pairs = support.open_streams(connect, proxy, worker, 2)
    late = connect(proxy)
    late.send(b"POST / HTTP/1.1\r\n")
    proxy.ask_reload("PAUSE=10\n")
    # O 503 diz que a tentativa já passou; o programa ainda não foi trocado.
    assert late.response().status == 503
    seen = proxy.ask_reload("PAUSE=muito\n")
    late.close()
    harness.eventually(lambda: re.search("pronto:|recusada", proxy.log()[seen:]), 10, "recarga feita ou recusada")
    lives_on(pairs)
    end(pairs)


def test_other_state_version(start_proxy, host, connect, own_program, start_worker, db):
    """Um programa que não entende o estado encerra os streams com a linha de shutdown inteira; e de volta, também."""
    proxy, worker = start_proxy(), start_worker()
    text = own_program.read_text(encoding="utf-8")
    other, count = re.subn(r"^state_version = 1$", "state_version = 77", text, flags=re.MULTILINE)
    assert count == 1
    for program in (other, text):
        pairs = [support.open_stream(connect, proxy, worker, version=f"HTTP/1.{minor}") for minor in (0, 1, 1)]
        lives_on(pairs)
        own_program.write_text(program, encoding="utf-8")
        proxy.reload()
        for response, _ in pairs:
            assert [json.loads(line) for line in response.lines()] == [shutdown_line]
            assert response.conn.at_end()
        fresh = support.open_stream(connect, proxy, worker)
        proxy.reload()
        lives_on([fresh])
        end([fresh])
    db.flushall()


def test_supervisor_sees_it(supervisor, start_proxy, connect, worker):
    """O systemd vê RELOADING=1 com o instante, READY=1 depois, recusada ou não; e guarda o socket que escuta."""
    proxy = start_proxy(env=supervisor.env)
    harness.eventually(lambda: supervisor.kept, 5, "socket guardado")
    port = proxy.port
    pairs = [support.open_stream(connect, proxy, worker)]
    for settings, number in (("PAUSE=10\n", 1), ("PAUSE=muito\n", 2), ("", 3)):
        began, seen = time.monotonic_ns() // 1000, len(supervisor.rows)
        proxy.refuse_reload(settings) if "muito" in settings else proxy.reload(settings)
        harness.eventually(lambda seen=seen: supervisor.states(seen) == ["RELOADING=1", "READY=1"], 5, f"estados {number}")
        text = next(text for _, text in supervisor.rows[seen:] if "RELOADING=1" in text)
        assert began <= int(re.search(r"^MONOTONIC_USEC=(\d+)$", text, re.MULTILINE)[1]) <= time.monotonic_ns() // 1000
    harness.eventually(lambda: len(supervisor.kept) == 1, 5, "um socket guardado")
    assert supervisor.kept[0].getsockname() == ("127.0.0.1", port)
    assert any("FDNAME=http" in text and "FDSTORE=1" in text for _, text in supervisor.rows)
    end(pairs)


@pytest.mark.parametrize("same", [True, False])
def test_kept_listener_is_taken_back(start_proxy, host, connect, worker, redis_main, stack, monkeypatch, same):
    """O socket guardado volta pelo LISTEN_FDS e serve quem já esperava nele; se o endereço mudou, é fechado."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = listener.getsockname()[1]
    early = connect(port).request("GET", "/ping")
    wanted = port if same else harness.free_port()
    settings = f"HTTP_PORT={wanted}\nREDIS_SERVER={redis_main.address}\n"
    proxy = start_proxy(env_file=settings, wrapper=(*from_file, *support.given_listener(monkeypatch, listener)))
    listener.close()
    assert proxy.port == wanted
    if same:
        assert early.response().body() == b"pong"
    else:
        harness.eventually(lambda: not harness.accepts(port), 5, "socket que não serve fechado")
    pairs = [support.open_stream(connect, proxy, worker)]
    proxy.reload()
    end([*pairs, support.open_stream(connect, proxy, worker)])


def test_metrics_go_on(start_proxy, host, connect, worker):
    """Contadores e histogramas somam os dois programas e nunca caem; os do processo não dobram."""
    port = harness.free_port()
    proxy = start_proxy("--metrics-port", port)
    end([support.open_stream(connect, proxy, worker) for _ in range(3)])
    pairs = [support.open_stream(connect, proxy, worker)]
    lives_on(pairs)
    before = measures(port)
    for _ in range(2):
        proxy.reload()
        after = measures(port)
        grows = [key for key in before if re.search("_(total|count|sum|bucket)$", key[0])]
        assert [key for key in grows if after[key] < before[key]] == []
        assert set(before) <= set(after) and after["ndjson_proxy_streams", ()] == 1
        before = after
    end(pairs)
    after = measures(port)
    assert after["ndjson_proxy_lines_total", ()] == 5
    assert after["ndjson_proxy_tasks_total", (("reason", "concluida"),)] == 4
    assert after["ndjson_proxy_stream_seconds_count", ()] == after["ndjson_proxy_stream_seconds_bucket", (("le", "+Inf"),)] == 4
    for name in ("stream_seconds", "first_line_seconds", "collector_round_seconds"):
        rows = {float(dict(key[1])["le"]): value for key, value in after.items() if key[0] == f"ndjson_proxy_{name}_bucket"}
        counts = [rows[limit] for limit in sorted(rows)]
        assert counts == sorted(counts) and counts[-1] == after[f"ndjson_proxy_{name}_count", ()]
    with open(f"/proc/{proxy.pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    spent = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    assert after["ndjson_proxy_process_cpu_seconds_total", ()] == pytest.approx(spent, abs=0.3)


def test_live_streams_are_seen(start_proxy, host, connect, worker):
    """/streams lista os vivos, um objeto por linha; SIGUSR1 escreve o mesmo no log; e a recarga não os muda."""
    port = harness.free_port()
    proxy = start_proxy("--metrics-port", port, "-P", 0)
    assert fetched(port, "/streams") == ""
    fine, task = support.open_stream(connect, proxy, worker, "PUT", "/um/caminho?com=consulta")
    task.push("linha")
    assert fine.line() == b"linha"
    stuck, heavy = support.open_stream(lambda where: connect(where, narrow=True), proxy, worker)
    for _ in range(30):
        heavy.push(*["x" * 100_000] * 10)

    def seen():
        """Lê /streams. Retorno: dicionário de nome da tarefa para o objeto."""
        return {row["task"]: row for row in map(json.loads, fetched(port, "/streams").splitlines())}

    harness.eventually(lambda: seen()[heavy.name]["state"] == "blocked", 5, "um stream parado")
    row = seen()[task.name]
    assert list(row) == ["task", "client", "method", "path", "age_ms", "lines", "bytes", "idle_ms", "state"]
    assert (row["client"], row["method"], row["path"], row["state"]) == ("127.0.0.1", "PUT", "/um/caminho", "waiting")
    assert (row["lines"], row["bytes"]) == (1, 6) and 0 <= row["idle_ms"] <= row["age_ms"] < 20000
    stuck.conn.reset()
    harness.eventually(lambda: heavy.name not in seen(), 5, "o outro se foi")
    proxy.reload()
    again = seen()[task.name]
    assert again["age_ms"] > row["age_ms"] and again["idle_ms"] > row["idle_ms"] and again["lines"] == 1
    proxy.signal(signal.SIGUSR1)
    written = json.loads(proxy.wait_log(r"(?m)^stream: (.*)$")[1])
    assert {**written, "age_ms": 0, "idle_ms": 0} == {**again, "age_ms": 0, "idle_ms": 0}
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/streams", timeout=5) as response:
        assert response.headers["Content-Type"] == "application/x-ndjson; charset=utf-8"
    end([(fine, task)])
    heavy.gone()
