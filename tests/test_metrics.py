"""Métricas: o que o Prometheus lê é o que houve; desligadas não existem; e o painel e os alertas só citam o que existe."""

import contextlib
import gzip
import json
import pathlib
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request

import prometheus_client.openmetrics.parser
import prometheus_client.parser
import pytest
import yaml

import harness
import support

prefix = "ndjson_proxy_"
examples = harness.root / "packaging" / "examples"
documents = harness.root / "packaging" / "doc"
# Um nome de métrica dentro de uma expressão.
metric_name = re.compile(rf"\b{prefix}\w+")


class metered(contextlib.AbstractContextManager):
    """Um proxy com métricas."""

    def __init__(self, proxy, port):
        """Guarda os dois. Argumentos: proxy, o harness.proxy_process; port, a porta das métricas."""
        self.proxy, self.port = proxy, port

    def __exit__(self, *details):
        """Não faz nada: quem encerra o proxy é start_proxy. Argumentos: details, os do protocolo."""

    def raw(self, host="127.0.0.1", headers=()):
        """Consulta as métricas.

        Argumentos:
            host: o endereço, como numa URL.
            headers: pares de cabeçalhos.

        Retorno:
            Par (cabeçalhos, corpo em bytes).
        """
        request = urllib.request.Request(f"http://{host}:{self.port}/metrics", headers=dict(headers))
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.headers, response.read()

    def read(self):
        """Consulta e interpreta. Retorno: dicionário de (nome, rótulos em ordem) para o valor."""
        found = {}
        for family in prometheus_client.parser.text_string_to_metric_families(self.raw()[1].decode()):
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                assert key not in found, key
                found[key] = sample.value
        return found

    def get(self, name, **labels):
        """Lê um valor. Argumentos: name, sem o prefixo; labels, os rótulos. Retorno: float."""
        return self.read()[prefix + name, tuple(sorted(labels.items()))]

    def reaches(self, value, name, **labels):
        """Espera um valor. Argumentos: value, ele; name, sem o prefixo; labels, os rótulos."""
        harness.eventually(lambda: self.get(name, **labels) == value, 10, f"{name} {labels} = {value}")


@pytest.fixture
def start_metered(start_proxy):
    """Fábrica de proxies com métricas: os argumentos são os de start_proxy.

    Retorno:
        Função que devolve um metered.
    """

    def start(*flags, **options):
        """Inicia um. Argumentos: flags e options, os de start_proxy. Retorno: o metered."""
        port = harness.free_port()
        return metered(start_proxy("--metrics-port", port, *flags, **options), port)

    return start


def test_every_end(start_metered, connect, worker):
    """Fins, linhas, bytes e durações são os do log; a primeira linha só conta se veio do worker; e há vivos ao vivo."""
    meter = start_metered("--maxtime", "4000")
    start = meter.read()
    assert start[prefix + "streams", ()] == 0
    assert {key: value for key, value in start.items() if key[0] == prefix + "tasks_total" and value} == {}
    done = support.open_stream(connect, meter.proxy, worker, "POST", "/")
    done[1].push("uma", "duas")
    assert [done[0].line(), done[0].line()] == [b"uma", b"duas"]
    # Com o stream ainda vivo.
    meter.reaches(2, "lines_total")
    meter.reaches(9, "sent_bytes_total")
    assert (meter.get("streams"), meter.get("first_line_seconds_count")) == (1, 1)
    assert meter.get("stream_seconds_count") == 0
    done[1].finish("três")
    word = support.open_stream(connect, meter.proxy, worker, "POST", "/")
    word[1].push("EOF")
    late = support.open_stream(connect, meter.proxy, worker, "POST", "/")
    gone = connect(meter.proxy).request("POST", "/")
    gone.response()
    worker.next()
    gone.reset()
    wrong = support.open_stream(connect, meter.proxy, worker, "POST", "/")
    wrong[1].client.delete(wrong[1].list)
    wrong[1].client.hset(wrong[1].list, "a", "b")
    for response in (done[0], word[0], late[0], wrong[0]):
        response.lines()
    counts = dict.fromkeys(("concluida", "eof", "timeout", "cliente", "erro"), 1) | {"shutdown": 0}
    for reason, count in counts.items():
        meter.reaches(count, "tasks_total", reason=reason)
    rows = support.finished_rows(meter.proxy)
    end = meter.read()
    assert end[prefix + "lines_total", ()] == sum(int(row["linhas"]) for row in rows) == 5
    assert end[prefix + "sent_bytes_total", ()] == sum(int(row["bytes"]) for row in rows)
    assert end[prefix + "stream_seconds_count", ()] == len(rows) == 5
    total = sum(int(row["duracao_ms"]) for row in rows) / 1000
    assert end[prefix + "stream_seconds_sum", ()] == pytest.approx(total, abs=0.01)
    assert end[prefix + "first_line_seconds_count", ()] == 1
    assert end[prefix + "streams", ()] == 0
    assert end[prefix + "tasks_unheard_total", ()] == 0
    assert end[prefix + "info", (("server", "flask"), ("version", harness.load_program().version))] == 1
    assert end[prefix + "streams_limit", ()] == 4096


def test_no_first_line(start_metered, connect, worker):
    """Um elemento vazio, que não é uma linha, e depois MAXTIME: a linha do erro não conta como a primeira do worker."""
    meter = start_metered("--maxtime", "1000", "-P", 0)
    response, task = support.open_stream(connect, meter.proxy, worker)
    task.push("")
    harness.eventually(lambda: not task.client.exists(task.list), 5, "elemento vazio retirado")
    assert len(response.lines()) == 1
    meter.reaches(1, "tasks_total", reason="timeout")
    assert (meter.get("lines_total"), meter.get("lines_skipped_total")) == (1, 1)
    assert meter.get("first_line_seconds_count") == 0


def test_refusals(host, start_metered, start_redis, connect, fetch):
    """Cada recusa conta uma vez, com o status e o código do corpo: as da aplicação e as do servidor HTTP."""
    server = start_redis()
    meter = start_metered("--max-streams", "1", "--max-body", "10", env={"AUTH_TOKEN": "abc"}, redis=server)
    proxy, token = meter.proxy, {"Authorization": "Bearer abc"}
    alive = connect(proxy).request("GET", "/", token)
    assert alive.response().status == 200
    expected = {}

    def refused(response, status):
        """Confere e conta uma recusa. Argumentos: response, a harness.response; status, o esperado."""
        assert response.status == status, response.head
        key = (status, response.json()["error"])
        expected[key] = expected.get(key, 0) + 1

    refused(fetch(proxy, "GET", "/", {}), 401)
    refused(fetch(proxy, "POST", "/", token, body=b"x" * 11), 413)
    refused(fetch(proxy, "GET", "/", token), 503)
    refused(fetch(proxy, "GET", "/", token), 503)
    refused(fetch(proxy, "TRACE", "/", token), 405)
    conn = connect(proxy)
    # Recusado antes do fim, o envio pode falhar.
    with contextlib.suppress(ConnectionError):
        conn.request("GET", "/", {**token, "X-Enorme": "a" * 1000000})
    refused(conn.response(), 431)
    alive.reset()
    meter.reaches(0, "streams")
    # Com memória cheia o Redis recusa a tarefa; fora do ar, não responde.
    client = server.client()
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    refused(fetch(proxy, "GET", "/", token), 500)
    # Uma tarefa recusada não é também uma tarefa que acabou em erro.
    meter.reaches(0, "tasks_total", reason="erro")
    client.config_set("maxmemory", 0)
    server.kill()
    refused(fetch(proxy, "GET", "/", token), 504)
    server.start()
    found = {
        (int(dict(labels)["status"]), dict(labels)["reason"]): value
        for (name, labels), value in meter.read().items()
        if name == prefix + "requests_refused_total" and value
    }
    assert found == expected
    assert fetch(proxy, "GET", "/ping").body() == b"pong"


def same_as_log(meter):
    """Espera que as quedas e voltas contadas sejam as do log, uma linha por mudança: uma máquina ocupada pode causar
    mais uma. Argumentos: meter, o metered. Retorno: quantas quedas."""

    def counted():
        """Compara os dois. Retorno: par (quedas, voltas), ou None se diferem."""
        log = meter.proxy.log()
        lines = (log.count("Redis fora do ar"), log.count("Redis de volta"))
        return lines if lines == (meter.get("redis_cuts_total"), meter.get("redis_reconnects_total")) else None

    return harness.eventually(counted, 10, "quedas e voltas como no log")[0]


def test_redis_and_collector(start_metered, start_redis, start_worker, connect, fetch):
    """Queda e volta do Redis, avisos, tarefa sem ouvinte, idas ao Redis e atraso."""
    server = start_redis(appendonly=True)
    meter = start_metered(redis=server)
    response = connect(meter.proxy).request("POST", "/").response()
    meter.reaches(1, "tasks_unheard_total")
    assert (meter.get("redis_up"), meter.get("redis_wake_up")) == (1, 1)
    first = same_as_log(meter)
    # A consulta periódica, a cada 200 ms, sempre atrasa algo.
    harness.eventually(lambda: meter.get("collector_lag_seconds_count") >= 3, 10, "atrasos contados")
    values = meter.read()
    count = values[prefix + "collector_round_seconds_count", ()]
    assert count == values[prefix + "collector_round_commands_count", ()] >= 3
    assert values[prefix + "collector_round_commands_sum", ()] >= count
    assert 0 < values[prefix + "collector_round_seconds_sum", ()] < count
    assert 0 < values[prefix + "collector_lag_seconds_sum", ()] < values[prefix + "collector_lag_seconds_count", ()]
    server.kill()
    meter.reaches(0, "redis_up")
    assert same_as_log(meter) == first + 1
    server.start()
    meter.reaches(1, "redis_up")
    same_as_log(meter)
    meter.reaches(1, "redis_wake_up")
    worker = start_worker(server.client())
    key = next(iter(server.client().scan_iter("ndjson_task_*"))).decode()
    harness.task(worker.client, key, worker.client.get(key)).finish("fim")
    assert response.lines() == [b"fim"]


def test_unheard_is_not_for_queues(start_metered, connect, db):
    """Com REDIS_QUEUE a tarefa espera na fila: não é uma tarefa perdida."""
    meter = start_metered(env={"REDIS_QUEUE": "fila"})
    conn = connect(meter.proxy).request("POST", "/")
    assert conn.response().status == 200
    assert meter.get("tasks_unheard_total") == 0
    conn.reset()
    meter.reaches(0, "streams")


def test_counters_never_fall(start_metered, connect, worker):
    """Lidos a todo momento, enquanto streams nascem e acabam, linhas e bytes nunca diminuem: o Prometheus tomaria a
    queda por um reinício."""
    meter = start_metered("--pause", "0")
    seen = [(0, 0)]
    deadline = time.monotonic() + 3
    finished = 0
    while time.monotonic() < deadline:
        streams = support.open_streams(connect, meter.proxy, worker, 10)
        for _, task in streams:
            task.finish(*["x" * 50] * 20)
        for _ in range(5):
            values = meter.read()
            seen.append((values[prefix + "lines_total", ()], values[prefix + "sent_bytes_total", ()]))
        for response, _ in streams:
            assert len(response.lines()) == 20
        finished += len(streams)
    assert seen == sorted(seen)
    meter.reaches(20 * finished, "lines_total")
    assert meter.get("sent_bytes_total") == 20 * 51 * finished


def test_forms(start_metered):
    """Texto simples, OpenMetrics e gzip, com o nosso Server; e qualquer amostra tem o nosso prefixo e nada do cliente."""
    meter = start_metered("-s", "nome da casa")
    headers, body = meter.raw()
    assert headers["Server"] == "nome da casa"
    assert headers["Content-Type"].startswith("text/plain")
    names = {name for name, _ in meter.read()}
    assert {name for name in names if not name.startswith(prefix)} == set()
    accept = {"Accept": "application/openmetrics-text; version=1.0.0", "Accept-Encoding": "gzip"}
    headers, body = meter.raw(headers=accept.items())
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    if headers["Content-Encoding"] == "gzip":
        body = gzip.decompress(body)
    families = list(prometheus_client.openmetrics.parser.text_string_to_metric_families(body.decode()))
    assert {family.name for family in families if not family.documentation} == set()
    assert re.search(rf"métricas: http://127\.0\.0\.1:{meter.port}/metrics", meter.proxy.log())


def test_ipv6(start_metered):
    """METRICS_HOST em IPv6."""
    meter = start_metered("--metrics-host", "::1")
    assert b"ndjson_proxy_streams 0.0" in meter.raw("[::1]")[1]
    assert f"métricas: http://[::1]:{meter.port}/metrics" in meter.proxy.log()


def test_hostile_clients(start_metered):
    """Lixo, quem não fala e quem sai no meio não derrubam as métricas, nem enchem o log, nem prendem a parada."""
    meter = start_metered()
    with contextlib.ExitStack() as stack:
        for text in (b"\x00\xff\r\n\r\n", b"GET /metrics", b"", b"TRACE / HTTP/1.1\r\n\r\n", b"A" * 70000):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", meter.port)))
            with contextlib.suppress(OSError):
                peer.sendall(text)
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", meter.port)) as peer:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                peer.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert meter.get("streams") == 0
        meter.proxy.signal(signal.SIGTERM)
        assert meter.proxy.wait(10) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", meter.port))
    assert "Traceback" not in meter.proxy.log()
    assert len(meter.proxy.log().splitlines()) == 4, meter.proxy.log()


def test_read_while_draining(start_metered, connect, worker):
    """Durante a parada as métricas ainda respondem: é quando se quer ver quantos streams restam."""
    meter = start_metered("--drain", "20000")
    response, task = support.open_stream(connect, meter.proxy, worker, "POST", "/")
    meter.proxy.signal(signal.SIGTERM)
    meter.proxy.wait_log("parando")
    assert meter.get("streams") == 1
    task.finish("ok")
    assert response.lines() == [b"ok"]
    assert meter.proxy.wait(10) == 0


def failure(tmp_path, redis_main, status, **env):
    """Inicia um proxy que não deve conseguir.

    Argumentos:
        tmp_path: a pasta da prova.
        redis_main: o Redis da sessão.
        status: o código de saída esperado.
        env: configurações.

    Retorno:
        A frase de erro.
    """
    (tmp_path / "vazio.env").touch()
    base = {"ENV_FILE": str(tmp_path / "vazio.env"), "REDIS_SERVER": redis_main.address, "HTTP_PORT": "0"}
    done = harness.run_proxy(env={**base, "HTTP_HOST": "127.0.0.1", **env})
    assert (done.status, done.out, len(done.err.splitlines())) == (status, "", 1), done
    return done.err


def test_port_taken(tmp_path, redis_main):
    """Porta das métricas ocupada: código 1 e uma frase com o nome e a camada. Igual à do proxy: código 2, e diz isso."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        sentence = failure(tmp_path, redis_main, 1, METRICS_PORT=port)
    for word in ("erro: METRICS_PORT", port, "ambiente", "Address already in use"):
        assert word in sentence
    port = str(harness.free_port())
    for address in ("127.0.0.1", "0.0.0.0"):
        names = {"METRICS_PORT": port, "HTTP_PORT": port, "HTTP_HOST": address}
        sentence = failure(tmp_path, redis_main, 2, **names)
        for word in ("erro: METRICS_PORT", port, "ambiente", "diferente de HTTP_PORT"):
            assert word in sentence


def test_wrong_host(tmp_path, redis_main):
    """METRICS_HOST que não é desta máquina: código 1; que não existe: código 2."""
    port = str(harness.free_port())
    assert "erro: METRICS_HOST" in failure(tmp_path, redis_main, 1, METRICS_PORT=port, METRICS_HOST="192.0.2.1")
    assert "erro: METRICS_HOST" in failure(tmp_path, redis_main, 2, METRICS_PORT=port, METRICS_HOST="x.invalid")


def without_library(tmp_path, redis_main, port):
    """Roda --check onde o módulo prometheus_client não existe.

    Argumentos:
        tmp_path: a pasta da prova.
        redis_main: o Redis da sessão.
        port: METRICS_PORT.

    Retorno:
        O subprocess.CompletedProcess.
    """
    (tmp_path / "vazio.env").touch()
    code = (
        "import runpy, sys; sys.modules['prometheus_client'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [sys.executable, "-c", code, str(harness.program), "--check", "-p", "0", "-R", redis_main.address]
    env = {**harness.base_environment(), "ENV_FILE": str(tmp_path / "vazio.env")}
    return subprocess.run(
        [*words, "--metrics-port", port], env=env, capture_output=True, text=True, timeout=30, check=False
    )


def test_missing_library(tmp_path, redis_main):
    """Sem o prometheus_client: ligadas, código 2 e a frase diz o que instalar; desligadas, nada muda."""
    done = without_library(tmp_path, redis_main, "9771")
    assert (done.returncode, done.stdout) == (2, "")
    for word in ("erro: METRICS_PORT", "9771", "argumento --metrics-port", "apt install python3-prometheus-client"):
        assert word in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = without_library(tmp_path, redis_main, "0")
    assert (done.returncode, done.stderr) == (0, ""), done


def listening(proxy):
    """Conta as portas em que um proxy escuta. Argumentos: proxy, o harness.proxy_process. Retorno: int."""
    folder = pathlib.Path(f"/proc/{proxy.pid}")
    inodes = set()
    for each in (folder / "fd").iterdir():
        with contextlib.suppress(OSError):
            inodes |= set(re.findall(r"socket:\[(\d+)\]", str(each.readlink())))
    rows = [line.split() for name in ("tcp", "tcp6") for line in (folder / "net" / name).read_text().splitlines()[1:]]
    return sum(1 for row in rows if row[3] == "0A" and row[9] in inodes)


def test_off(start_proxy, start_metered):
    """Desligadas, como vêm, o proxy só escuta na sua porta, e o log não fala delas."""
    proxy = start_proxy()
    assert listening(proxy) == 1
    assert "métricas" not in proxy.log()
    assert listening(start_metered().proxy) == 2


def test_loaded_only_when_used():
    """Carregar o programa não carrega o módulo das métricas."""
    code = (
        "import sys, harness; harness.load_program(); "
        "print([name for name in sys.modules if name.startswith('prometheus')])"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=harness.loading_environment(), capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.fixture(scope="module")
def metrics_port():
    """A porta das métricas do proxy partilhado (int)."""
    return harness.free_port()


@pytest.fixture
def exported(share_proxy, metrics_port):
    """Os nomes de tudo o que um proxy exporta.

    Retorno:
        Conjunto de nomes, com os sufixos _total, _bucket, _sum e _count.
    """
    return {name for name, _ in metered(share_proxy("--metrics-port", metrics_port), metrics_port).read()}


def test_dashboard(exported):
    """O painel é um que o Grafana importa, e cada expressão só cita métricas que existem."""
    board = json.loads((examples / "grafana.json").read_text(encoding="utf-8"))
    assert board["__inputs"][0]["pluginId"] == "prometheus"
    source = "${" + board["__inputs"][0]["name"] + "}"
    assert (board["id"], board["title"]) == (None, "py-ndjson-proxy")
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) > 10
    required = {item["id"] for item in board["__requires"] if item["type"] == "panel"}
    assert {panel["type"] for panel in board["panels"]} == required
    places = set()
    cited = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & places, f"o painel {panel['title']} cobre outro"
        places |= cells
        assert panel["datasource"]["uid"] == source
        for target in panel["targets"]:
            found = set(metric_name.findall(target["expr"]))
            assert found and found <= exported, (panel["title"], found - exported)
            assert target["expr"].count("(") == target["expr"].count(")")
            cited |= found
    variable = board["templating"]["list"][0]
    assert set(metric_name.findall(variable["definition"])) <= exported
    # O que é contado aparece em algum lugar do painel, a menos do que descreve o processo.
    own = {re.sub("_(bucket|sum|count)$", "", name) for name in exported if "_process_" not in name}
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in cited}
    assert own - shown == {prefix + "info"}


def test_alerts(exported):
    """Cada alerta tem o que o Prometheus pede, cita só métricas e rótulos que existem, e explica-se."""
    groups = yaml.safe_load((examples / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) >= 10
    assert len({rule["alert"] for rule in rules}) == len(rules)
    text = (documents / "contrato.md").read_text(encoding="utf-8")
    refused = set(re.findall(r"(?m)^\| \d{3} \| `(\w+)` \|", text))
    ends = set(re.findall(r"(?m)^\|.*\|.*\| `([a-z]+)` \|$", text))
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        found = set(metric_name.findall(rule["expr"]))
        assert found <= exported, (rule["alert"], found - exported)
        assert found or rule["expr"].startswith("up{")
        assert re.fullmatch(r"\d+[sm]", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"].endswith(".")
        for name, reason in re.findall(r'(\w+)\{reason="(\w+)"', rule["expr"]):
            known = refused if "refused" in name else ends
            assert reason in known, rule["alert"]


@pytest.mark.parametrize("name", ["operacao.md", "en/operation.md"])
def test_document(name, exported):
    """A tabela da documentação tem todas as métricas, e nenhuma que não exista."""
    text = (documents / name).read_text(encoding="utf-8")
    told = set(metric_name.findall(text))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in exported}
    assert told <= families, told - families
    assert {name for name in families if "_process_" not in name} - told == set()
