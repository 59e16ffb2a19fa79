"""nginx, HAProxy, Apache e Caddy de verdade entre o cliente e o proxy, com os arquivos que packaging/examples entrega."""

import contextlib
import json
import signal
import ssl
import statistics
import time

import pytest

import balancers
import harness
import support

# Prazo de silêncio das provas que o esgotam, em segundos: o de um minuto dos arquivos entregues, encurtado.
patience = 2

# Os que notam na hora um cliente que saiu. Os outros só o notam quando têm algo a enviar: precisam de HEARTBEAT.
watchful = {"nginx", "caddy"}

# A linha de HEARTBEAT que o proxy manda se nada mais lhe disserem.
ping = {"type": "ping"}


@pytest.fixture(params=list(balancers.kinds))
def name(request):
    """Nome de um intermediário: a prova que o usa roda com cada um.

    Retorno:
        Uma chave de balancers.kinds.
    """
    return request.param


def body_so_far(answer):
    """Junta os bytes do corpo que já chegaram, os de um pedaço ainda aberto inclusive.

    O HAProxy 3.0 manda o fim de um pedaço grande, o CRLF, só com o pedaço seguinte: os dados estão todos aqui, e é o
    que um leitor de verdade entrega.

    Argumentos:
        answer: a response.

    Retorno:
        Os bytes.
    """
    opened = answer.buffer[: answer.left] if answer.state == "chunk" else b""
    return b"".join(answer.chunks) + opened


def test_lines_one_at_a_time(name, host, start_proxy, start_balancer, connect, worker):
    """Os cabeçalhos chegam antes da primeira linha, e cada linha antes que a seguinte seja empurrada, grande ou pequena."""
    front = start_balancer(name, start_proxy())
    asked = ("POST", "/a%2Fb//%C3%A7?x=%201", {"Content-Type": "text/plain"}, "Olá")
    answer, task = support.open_stream(connect, front, worker, *asked)
    assert (task.info["path"], task.info["query"], task.info["body"]) == ("/a%2Fb//%C3%A7", "x=%201", "Olá")
    assert answer.header("Content-Type") == "application/x-ndjson; charset=utf-8"
    assert answer.header("Cache-Control") == "no-cache, no-transform"
    assert len(answer.header_all("Server")) == 1
    assert answer.header("Content-Encoding") is None
    expected = b""
    for text in ("{}", '{"n": 1}', json.dumps("ç" * 100000), '"depois da grande"', *map(str, range(20))):
        task.push(text)
        expected += text.encode() + b"\n"
        answer.conn.read_until(lambda: len(body_so_far(answer)) >= len(expected), 10, "a linha empurrada")  # noqa: B023
        assert body_so_far(answer) == expected
    task.finish("5", "6")
    assert answer.body() == expected + b"5\n6\n"
    task.gone()


# Caminhos que um intermediário zeloso arrumaria, e os que alguns recusam com um 400.
paths = (
    "//a",
    "///",
    "/a//",
    "/a/../b",
    "/a/./b",
    "/a/%2e%2e/b",
    "/a%2e%2e",
    "/%2e/x",
    "/%41",
    "/a;x=1",
    "/@b:1/",
    "//a?x=//",
)
refused = {"nginx": ("/../a", "/%2e%2e/x"), "apache": ("/../a", "/%2e%2e/x")}


def test_paths_arrive_as_sent(name, start_proxy, start_balancer, connect, worker):
    """O caminho vai ao worker como saiu, sem juntar barras nem resolver pontos; nginx e Apache recusam o que sobe da raiz."""
    front = start_balancer(name, start_proxy())
    for path in (*paths, "/../a", "/%2e%2e/x"):
        conn = connect(front.port).request("GET", path)
        if path in refused.get(name, ()):
            assert conn.response().status == 400
            worker.idle()
            continue
        task = worker.next()
        assert task.info["path"] + ("?" + task.info["query"]) * ("?" in path) == path
        task.finish()
        assert conn.response().lines() == []


def test_caddy_encodes(start_proxy, start_balancer, connect, worker):
    """Armadilha: o Caddy codifica o que uma URL não devia ter, e um navegador manda; os outros deixam como veio."""
    proxy = start_proxy()
    for kind in balancers.kinds:
        conn = connect(start_balancer(kind, proxy).port).request("GET", "/a|b")
        task = worker.next()
        assert task.info["path"] == ("/a%7Cb" if kind == "caddy" else "/a|b")
        task.finish()
        assert conn.response().lines() == []


def test_killed_proxy(name, start_proxy, start_balancer, connect, worker):
    """O proxy que morre no meio é uma conexão perdida para o cliente; atrás do Caddy, um fim como os outros."""
    proxy = start_proxy()
    answer, task = support.open_stream(connect, start_balancer(name, proxy), worker)
    task.push("1")
    assert answer.line() == b"1"
    proxy.expected_status = -signal.SIGKILL
    proxy.kill()
    if name == "caddy":
        assert answer.lines(20) == []
    else:
        with pytest.raises((harness.broken, ConnectionResetError)):
            answer.lines(20)
    task.client.delete(*task.traces())


def test_compressed_answers_are_refused(name, start_proxy, start_balancer, connect, worker):
    """Um navegador aceita resposta comprimida: ela não vem, e as linhas chegam uma a uma."""
    front = start_balancer(name, start_proxy())
    answer, task = support.open_stream(connect, front, worker, headers={"Accept-Encoding": "gzip, deflate, br, zstd"})
    assert answer.header("Content-Encoding") is None
    for number in range(3):
        task.push(str(number))
        assert answer.line() == str(number).encode()
    task.finish()
    assert answer.lines() == []


def open_through_all(proxy, start_balancer, connect, worker):
    """Abre um streaming por cada intermediário, com o prazo encurtado, e passa por ele uma primeira linha.

    Argumentos:
        proxy: o proxy.
        start_balancer, connect, worker: os acessórios de mesmo nome.

    Retorno:
        Lista de trios (nome do intermediário, a response, a tarefa).
    """
    opened = []
    for name in balancers.kinds:
        answer, task = support.open_stream(connect, start_balancer(name, proxy, timeout=patience), worker)
        task.push("1")
        # Um batimento pode ter chegado antes.
        while (line := answer.line()) != b"1":
            assert json.loads(line) == ping
        opened.append((name, answer, task))
    return opened


def test_silence_is_cut_without_heartbeat(start_proxy, start_balancer, connect, worker):
    """Sem HEARTBEAT, um silêncio maior que o prazo do intermediário corta o streaming, e o proxy nota."""
    proxy = start_proxy()
    for _, answer, task in open_through_all(proxy, start_balancer, connect, worker):
        # O Caddy 2.6 termina bem um corpo que cortou; os outros fecham a conexão sem o último pedaço.
        with contextlib.suppress(harness.broken, ConnectionResetError):
            assert answer.lines(20) == []
        task.gone(5)
    every = ["cliente"] * len(balancers.kinds)
    harness.eventually(lambda: [row["fim"] for row in proxy.tasks() if "fim" in row] == every, 5, "as linhas de fim")


def test_silence_survives_with_heartbeat(start_proxy, start_balancer, connect, worker):
    """Com HEARTBEAT, o mesmo silêncio passa, e a linha seguinte chega."""
    proxy = start_proxy("--heartbeat", "400")
    for name, answer, task in open_through_all(proxy, start_balancer, connect, worker):
        while (line := answer.line()).when - answer.head_when < 2.5 * patience:
            assert json.loads(line) == ping, name
        task.push('"enfim"')
        rest = [answer.json_line()]
        # Um batimento pode já estar a caminho.
        while rest[-1] == ping:
            rest.append(answer.json_line())
        assert rest[-1] == "enfim", name
        task.finish()
        answer.lines()


@pytest.mark.parametrize("way", ["close", "reset"])
def test_client_leaves(name, way, start_proxy, start_balancer, connect, worker):
    """O cliente sai no meio de um silêncio e o proxy nota: sozinho, ou no HEARTBEAT seguinte."""
    proxy = start_proxy(*(() if name in watchful else ("--heartbeat", "200")))
    answer, task = support.open_stream(connect, start_balancer(name, proxy), worker)
    task.push("1")
    # Um batimento pode ter chegado antes.
    while (line := answer.line()) != b"1":
        assert json.loads(line) == ping
    getattr(answer.conn, way)()
    task.gone(10)
    row = support.finished_row(proxy, task)
    assert (row["fim"], row["linhas"]) == ("cliente", "1")


def test_client_leaves_without_heartbeat(start_proxy, start_balancer, connect, worker):
    """Atrás do Apache e do HAProxy, sem HEARTBEAT, quem saiu é notado nas linhas seguintes do worker."""
    proxy = start_proxy("--pause", "0")
    for name in sorted(set(balancers.kinds) - watchful):
        answer, task = support.open_stream(connect, start_balancer(name, proxy), worker)
        task.push("1")
        assert answer.line() == b"1"
        answer.conn.close()

        def push_until_gone(task=task):
            """Empurra mais uma linha, se a tarefa vive; diz se ela acabou (bool)."""
            if not task.exists():
                return True
            task.push("2")
            return False

        harness.eventually(push_until_gone, 20, f"{name} notar que o cliente saiu")
        task.client.delete(task.list)


def forwarded(front, connect, worker):
    """Faz um pedido que parte de 127.0.0.9 e mente em X-Forwarded-For.

    Argumentos:
        front: o intermediário.
        connect, worker: os acessórios de mesmo nome.

    Retorno:
        Par (o remote_addr da tarefa, o X-Forwarded-For que o worker recebe).
    """
    conn = connect(front.port, source="127.0.0.9").request("POST", "/", {"X-Forwarded-For": "6.6.6.6"})
    task = worker.next()
    task.finish()
    assert conn.response().lines() == []
    return task.info["remote_addr"], task.info["headers"]["X-Forwarded-For"]


def test_forwarded_for_is_ignored_by_default(name, start_proxy, start_balancer, connect, worker):
    """Sem TRUST_PROXY, o endereço do cliente é o de quem se conectou ao proxy, diga X-Forwarded-For o que disser."""
    address, told = forwarded(start_balancer(name, start_proxy()), connect, worker)
    assert address == "127.0.0.1"
    assert told.split(",")[-1].strip() == "127.0.0.9"


def test_forwarded_for_is_trusted(name, start_proxy, start_balancer, connect, worker):
    """Com TRUST_PROXY=1, é o que o intermediário viu: o que o cliente escreveu antes disso não conta."""
    proxy = start_proxy(env={"TRUST_PROXY": "1"})
    address, _ = forwarded(start_balancer(name, proxy), connect, worker)
    assert address == "127.0.0.9"
    proxy.wait_log(r"cliente=127\.0\.0\.9 .*fim=")


def test_forwarded_for_through_two(start_proxy, start_balancer, connect, worker):
    """Com dois intermediários e TRUST_PROXY=2, é o que o primeiro deles viu."""
    proxy = start_proxy(env={"TRUST_PROXY": "2"})
    inner = start_balancer("nginx", proxy)
    outer = start_balancer("haproxy", inner)
    assert forwarded(outer, connect, worker)[0] == "127.0.0.9"


def test_forwarded_for_through_caddy_inside(start_proxy, start_balancer, connect, worker):
    """Atrás de outro, o Caddy apaga o X-Forwarded-For que recebe, se a linha trusted_proxies do arquivo não valer."""
    proxy = start_proxy(env={"TRUST_PROXY": "2"})
    believing = [("# trusted_proxies 127.0.0.1", "trusted_proxies 127.0.0.1")]
    for edits, address in (([], "127.0.0.1"), (believing, "127.0.0.9")):
        outer = start_balancer("haproxy", start_balancer("caddy", proxy, edits=edits))
        assert forwarded(outer, connect, worker)[0] == address


# O arquivo entregue como parte de um site com TLS que já existe: o TLS do site, e o que o arquivo manda pôr no lugar.
site = {
    "nginx": [
        ("listen 8080;", "listen 8080 ssl; ssl_certificate PEM; ssl_certificate_key PEM;"),
        ("location / {", "location /chat/ {"),
    ],
    "haproxy": [
        ("bind :8080", "bind :8080 ssl crt PEM"),
        ("default_backend ndjson_proxy", "use_backend ndjson_proxy if { path_beg /chat/ }"),
    ],
    "apache": [
        (
            "<VirtualHost *:8080>",
            "LoadModule ssl_module /usr/lib/apache2/modules/mod_ssl.so\n<VirtualHost *:8080>\n"
            "SSLEngine on\nSSLCertificateFile PEM",
        ),
        ('"^/"', '"^/chat/"'),
    ],
    "caddy": [
        (":8080 {", ":8080 {\ntls PEM PEM"),
        ("reverse_proxy 127.0.0.1:8771 {", "reverse_proxy /chat/* 127.0.0.1:8771 {"),
    ],
}


def test_path_of_a_site_with_tls(name, certificate, start_proxy, start_balancer, connect, worker):
    """Num caminho de um site com TLS, cada linha chega na hora e o endereço do cliente é o dele; o resto é do site."""
    proxy = start_proxy(env={"TRUST_PROXY": "1"})
    front = start_balancer(name, proxy, edits=[(old, new.replace("PEM", str(certificate))) for old, new in site[name]])
    # O que se trocou, fora o TLS, é o que o próprio arquivo diz.
    assert site[name][1][1] in (balancers.examples / front.shipped).read_text(encoding="utf-8")
    context = ssl.create_default_context(cafile=certificate)

    def secure(*args, **options):
        """Faz um pedido por TLS, de 127.0.0.9. Argumentos: os de connection.request. Retorno: a connection."""
        conn = connect(front.port, source="127.0.0.9")
        conn.sock = context.wrap_socket(conn.sock, server_hostname="site.test")
        return conn.request(*args, **options)

    for path in ("/", "/outro/chat/x"):
        assert secure("GET", path).response().header("X-Author") is None
    worker.idle()
    conn = secure("POST", "/chat/a%2Fb?x=1", {"X-Forwarded-For": "6.6.6.6"}, "Olá")
    task = worker.next()
    assert (task.info["path"], task.info["query"], task.info["body"]) == ("/chat/a%2Fb", "x=1", "Olá")
    assert task.info["remote_addr"] == "127.0.0.9"
    answer = conn.response()
    for number in range(5):
        task.push(str(number))
        assert answer.line() == str(number).encode()
    task.finish("fim")
    assert answer.lines() == [b"fim"]
    assert support.finished_row(proxy, task)["cliente"] == "127.0.0.9"


def test_errors_pass_through(name, host, start_proxy, start_balancer, connect, worker):
    """O 503 e o 413 do proxy chegam ao cliente como saíram, com CORS e Retry-After."""
    proxy = start_proxy("--max-streams", "1", "--cors-origin", "https://a.test")
    front = start_balancer(name, proxy)
    origin = {"Origin": "https://a.test"}
    busy, task = support.open_stream(connect, front, worker)
    full = connect(front.port).request("POST", "/", origin).response()
    assert (full.status, full.header("Retry-After")) == (503, "5")
    assert full.header("Access-Control-Allow-Origin") == "https://a.test"
    assert full.json()["error"] == "too_many_streams"
    task.finish()
    busy.lines()
    # Maior que MAX_BODY e menor que o limite do nginx.conf entregue.
    large = connect(front.port)
    # Quem recusa pelo tamanho anunciado não lê o resto, e fecha; a resposta já está aqui.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        large.request("POST", "/", origin, b"x" * (17 << 20))
    large = large.response(30)
    assert large.status == 413
    assert large.header("Access-Control-Allow-Origin") == "https://a.test"
    assert large.json()["error"] == "body_too_large"


def test_preflight_passes_through(name, start_proxy, start_balancer, connect, worker):
    """A consulta prévia do CORS é respondida pelo proxy, sem criar tarefa."""
    front = start_balancer(name, start_proxy("--cors-origin", "*"))
    asked = {"Origin": "https://a.test", "Access-Control-Request-Method": "POST"}
    answer = connect(front.port).request("OPTIONS", "/chat", asked).response()
    assert answer.status == 204
    assert answer.header("Access-Control-Allow-Origin") == "*"
    worker.idle()


def stream_through(front, connect, worker, headers):
    """Empurra vinte linhas pequenas e vê quanto chega antes e depois do fim da tarefa.

    Argumentos:
        front: o intermediário.
        connect, worker: os acessórios de mesmo nome.
        headers: cabeçalhos do pedido.

    Retorno:
        Trio (bytes do corpo que chegaram com a tarefa viva, bytes ao todo, a response).
    """
    conn = connect(front.port).request("POST", "/", headers)
    task = worker.next()
    for number in range(20):
        task.push(f'{{"n": {number}}}')
    harness.eventually(lambda: not task.client.exists(task.list), 5, "o proxy tirar as linhas")
    answer = conn.expect()
    # Tudo já saiu do proxy: o que não chega em um segundo está com o intermediário.
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        conn.pump(deadline - time.monotonic())
    early = sum(map(len, answer.chunks))
    task.finish()
    return early, len(answer.body()), answer


# Do arquivo entregue, o que muda em cada caso, e o pedido de resposta comprimida de um navegador.
old_http = ("proxy_http_version 1.1;", "proxy_http_version 1.0;")
buffering = ("proxy_buffering off;", "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;")
compressing = ("gzip off;", "gzip on; gzip_types application/x-ndjson;")
encode = """encode {
    gzip
    minimum_length 1
    match {
        header Content-Type application/x-ndjson*
    }
}
reverse_proxy 127"""
gzip = {"Accept-Encoding": "gzip"}
held_back = {
    "nginx-buffering": ("nginx", [old_http, buffering], {}),
    "nginx-gzip": ("nginx", [buffering, compressing], gzip),
    "caddy-encode": ("caddy", [("reverse_proxy 127", encode)], gzip),
}
delivered = {
    # Basta um proxy_pass: o X-Accel-Buffering do proxy faz o resto.
    "nginx-bare": ("nginx", [("proxy_http_version 1.1;", ""), ("proxy_buffering off;", ""), ("gzip off;", "")], {}),
    "nginx-gzip": ("nginx", [compressing], gzip),
    # O HAProxy obedece ao no-transform do proxy, e não comprime.
    "haproxy-compression": (
        "haproxy",
        [("default_backend", "compression algo gzip\n    compression type application/x-ndjson\n    default_backend")],
        gzip,
    ),
    "apache-deflate": ("apache", [("ProxyRequests Off", "SetOutputFilter DEFLATE")], gzip),
}


@pytest.mark.parametrize("case", list(held_back))
def test_trap_lines_held_back(case, start_proxy, start_balancer, connect, worker):
    """Armadilha: com retenção ou compressão, as linhas só chegam quando a resposta acaba."""
    kind, edits, headers = held_back[case]
    early, late, answer = stream_through(start_balancer(kind, start_proxy(), edits=edits), connect, worker, headers)
    # Do gzip pode ter chegado o cabeçalho dele, de dez bytes.
    assert early <= (10 if headers else 0)
    assert late > 50
    assert answer.header("Content-Encoding") == (headers and "gzip" or None)


@pytest.mark.parametrize("case", list(delivered))
def test_lines_not_held_back(case, start_proxy, start_balancer, connect, worker):
    """Não são armadilhas: aqui todas as linhas chegam com a tarefa ainda viva."""
    kind, edits, headers = delivered[case]
    early, late, answer = stream_through(start_balancer(kind, start_proxy(), edits=edits), connect, worker, headers)
    if answer.header("Content-Encoding") == "gzip":
        # Ao fim faltam só o último bloco e a soma de verificação.
        assert late - early < 20 < early
    else:
        assert early == late


def line_times(front, connect, worker):
    """Mede, de dez linhas empurradas uma a uma, o tempo até cada uma chegar.

    Argumentos:
        front: o intermediário.
        connect, worker: os acessórios de mesmo nome.

    Retorno:
        A mediana, em segundos.
    """
    answer, task = support.open_stream(connect, front, worker)
    times = []
    for _ in range(10):
        began = time.monotonic()
        task.push("1")
        times.append(answer.line().when - began)
    task.finish()
    assert answer.lines() == []
    return statistics.median(times)


def test_trap_haproxy_delays(start_proxy, start_balancer, connect, worker):
    """Armadilha: sem http-no-delay, o HAProxy segura cada linha por 200 ms."""
    proxy = start_proxy("--pause", "0")
    slow = start_balancer("haproxy", proxy, edits=[("option http-no-delay", "")])
    fast = start_balancer("haproxy", proxy)
    assert line_times(slow, connect, worker) > 0.15
    assert line_times(fast, connect, worker) < 0.1


def test_trap_nginx_refuses_the_body(start_proxy, start_balancer, connect):
    """Armadilha: com o limite padrão de 1m, quem recusa um corpo grande é o nginx, sem CORS e sem JSON."""
    proxy = start_proxy("--cors-origin", "*")
    front = start_balancer("nginx", proxy, edits=[("client_max_body_size 20m;", "")])
    answer = connect(front.port).request("POST", "/", {"Origin": "https://a.test"}, b"x" * (2 << 20)).response()
    assert answer.status == 413
    assert answer.header("Access-Control-Allow-Origin") is None
    assert answer.body().startswith(b"<html>")
