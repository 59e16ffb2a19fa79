"""HTTP como vai no fio: caminhos, métodos, cabeçalhos, corpos, erros, Accept, Expect e CORS, nos dois hospedeiros."""

import base64
import contextlib
import json
import re
import socket
import time
import uuid

import pytest

import harness
import support

author = "Patrick Brandao <patrickbrandao@gmail.com>"
methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
chunk = "Transfer-Encoding", "chunked"


def common(response, server="py-ndjson-proxy"):
    """Confere o que toda resposta leva: um Server só, X-Author, Connection: close, e nada que o hospedeiro acrescente por
    conta própria.

    Argumentos:
        response: a harness.response com o cabeçalho lido.
        server: o valor esperado de Server.

    Retorno:
        A mesma response.
    """
    assert response.header_all("Server") == [server], response.head
    assert response.header_all("X-Author") == [author], response.head
    assert response.header_all("Connection") == ["close"], response.head
    assert response.header_all("Via") == [], response.head
    for name in ("Date", "Content-Type", "Content-Length", "Transfer-Encoding", "Cache-Control"):
        assert len(response.header_all(name)) <= 1, response.head
    return response


def error(response, status, code):
    """Confere uma resposta de erro.

    Argumentos:
        response: a harness.response.
        status: status esperado.
        code: o campo "error" esperado.

    Retorno:
        O objeto JSON do corpo.
    """
    common(response)
    assert response.status == status, (response.head, response.body())
    assert response.header("Content-Type") == "application/json; charset=utf-8"
    content = response.json()
    assert content["error"] == code
    assert isinstance(content["message"], str)
    assert content["message"]
    assert set(content) == {"error", "message"}
    return content


def may_refuse(conn):
    """Espera a resposta a um pedido que cada hospedeiro julga a seu modo: 200, ou um erro em JSON e o fechamento.

    Argumentos:
        conn: a harness.connection.

    Retorno:
        Verdadeiro se o pedido é atendido; a resposta está em conn.current.
    """
    response = common(conn.response())
    if response.status == 200:
        return True
    assert 400 <= response.status < 600, response.head
    assert response.header("Content-Type") == "application/json; charset=utf-8"
    content = response.json()
    assert set(content) == {"error", "message"}
    assert content["error"] == "bad_request" or response.status != 400
    assert conn.at_end()
    return False


@pytest.fixture
def serve(shared_proxy, connect, worker):
    """Atalho: serve(method, target, headers=(), body=None) faz um pedido e atende a tarefa com a linha "ok".

    Retorno:
        Função que devolve (response, task), com a resposta já lida até o fim e conferida.
    """

    def run(*args, **options):
        """Faz o pedido. Argumentos: os de connection.request. Retorno: (response, task)."""
        conn = connect(shared_proxy).request(*args, **options)
        task = worker.next()
        task.finish("ok")
        response = common(conn.response())
        assert response.status == 200
        assert response.lines() == [b"ok"]
        assert conn.at_end()
        task.gone()
        return response, task

    return run


targets = [
    ("/", "/", ""),
    ("/favicon.ico", "/favicon.ico", ""),
    ("/robots.txt", "/robots.txt", ""),
    ("/static/x.js", "/static/x.js", ""),
    ("/static/", "/static/", ""),
    ("/ping/", "/ping/", ""),
    ("/ping/x", "/ping/x", ""),
    ("/PING", "/PING", ""),
    ("/pin%67", "/pin%67", ""),
    ("//", "//", ""),
    ("//a//b/", "//a//b/", ""),
    ("///", "///", ""),
    ("//ping", "//ping", ""),
    ("/a/../b/./c", "/a/../b/./c", ""),
    ("/a%2Fb", "/a%2Fb", ""),
    ("/a%2fb%5Cc", "/a%2fb%5Cc", ""),
    ("/a%20b+c", "/a%20b+c", ""),
    ("/a%00b%0d%0a", "/a%00b%0d%0a", ""),
    ("/100%", "/100%", ""),
    ("/%zz", "/%zz", ""),
    ("/a;v=1,2:3@x!$&'()*", "/a;v=1,2:3@x!$&'()*", ""),
    ("/a%C3%A7%C3%A3o", "/a%C3%A7%C3%A3o", ""),
    ("/%E9", "/%E9", ""),
    ("/x?", "/x", ""),
    ("/x?a=1&b=2&a=3", "/x", "a=1&b=2&a=3"),
    ("/x?q=a%20b+c&r=%2F", "/x", "q=a%20b+c&r=%2F"),
    ("/x?a?b?c", "/x", "a?b?c"),
    ("/?http://outro.test/y", "/", "http://outro.test/y"),
    ("http://proxy.test/abs/x?y=1", "/abs/x", "y=1"),
    ("http://h", "/", ""),
    ("http://h?x=1", "/", "x=1"),
    ("http://h?u=/a/b", "/", "u=/a/b"),
    ("http://h?next=/ping", "/", "next=/ping"),
    ("http://h//a//b?c", "//a//b", "c"),
    ("/q?" + "x" * 4096, "/q", "x" * 4096),
    ("/" + "p" * 4096, "/" + "p" * 4096, ""),
]


def test_target_as_sent(serve):
    """O caminho e a consulta chegam ao worker como foram enviados, sem decodificar nem arrumar nada."""
    for target, path, query in targets:
        _, task = serve("GET", target)
        assert (task.info["path"], task.info["query"]) == (path, query), target


# Bytes soltos fora do ASCII, que nenhuma URL tem, e como chegam; fora do UTF-8, só em percentual cabem em JSON.
loose_targets = [
    ("/ação/日本/😀".encode(), "/ação/日本/😀", ""),
    ("/x?q=ação&r=a%C3%A7%C3%A3o".encode(), "/x", "q=ação&r=a%C3%A7%C3%A3o"),
    (b"/caf\xe9?q=\xff", "/caf%E9", "q=%FF"),
    # Em latin-1 estes dois são espaços, mas não na linha de requisição.
    (b"/a\xa0b?q=\x85c", "/a%A0b", "q=%85c"),
]


def test_target_not_ascii(shared_proxy, connect, worker):
    """Um alvo com bytes fora do ASCII chega como foi enviado, se o hospedeiro não o recusa."""
    for target, path, query in loose_targets:
        conn = connect(shared_proxy).request("GET", target)
        if may_refuse(conn):
            task = worker.next()
            assert (task.info["path"], task.info["query"]) == (path, query)
            task.finish("ok")
            assert conn.current.lines() == [b"ok"]
        worker.idle()


def test_methods(serve):
    """Os cinco métodos são atendidos, com corpo ou sem ele."""
    for method in methods:
        for body in ("", '{"a": 1}'):
            _, task = serve(method, "/m", body=body or None)
            assert (task.info["method"], task.info["body"]) == (method, body)


def test_task_json(shared_proxy, connect, worker, db):
    """O JSON da tarefa tem todos os campos do contrato; X-Task-Name é o task_name; a chave expira."""
    before = time.time()
    conn = connect(shared_proxy).request("POST", "/a/b?c=d", {"X-Meu": "valor", "Authorization": "Bearer abc"}, "{}")
    task = worker.next()
    info = task.info
    name = uuid.UUID(info["task_name"])
    assert (name.version, str(name)) == (4, info["task_name"])
    assert isinstance(info["request_time"], float)
    assert before - 1 <= info["request_time"] <= time.time() + 1
    assert info["task_key"] == task.key == f"ndjson_task_{name}"
    assert info["task_list"] == f"ndjson_list_{name}"
    assert (info["method"], info["path"], info["query"]) == ("POST", "/a/b", "c=d")
    assert (info["body"], info["remote_addr"]) == ("{}", "127.0.0.1")
    assert set(info) == {
        *("task_name", "request_time", "headers", "body", "task_key", "task_list"),
        *("method", "path", "query", "remote_addr"),
    }
    headers = {key.lower(): value for key, value in info["headers"].items()}
    expected = {"host": "proxy.test", "x-meu": "valor", "authorization": "Bearer abc", "content-length": "2"}
    assert headers == expected
    assert db.type(task.key) == b"string"
    assert 590 <= db.ttl(task.key) <= 600
    response = conn.response()
    assert response.header("X-Task-Name") == task.name
    task.finish()
    assert response.lines() == []


def test_request_headers(serve):
    """Os cabeçalhos do cliente chegam ao worker: em UTF-8, repetidos, vazios, com qualquer nome."""
    sent = [("X-Acentos", "ação 😀"), ("X-Dois", "a"), ("X-Dois", "b"), ("X-Vazio", ""), ("x-minusculo", "c")]
    sent += [("X-Brancos", " \t a  b\t ")]
    sent += [("Cookie", "a=1; b=2"), ("X-Longo", "v" * 6000), ("cookie", 'c="x"'), ("COOKIE", " e=4 ")]
    # O WSGI não distinguiria este do outro, que o proxy reverso da frente talvez tenha conferido: não chega ao worker.
    sent += [("X-Conta", "certa"), ("X_Conta", "forjada"), ("X_Sublinhado", "a")]
    _, task = serve("GET", "/", sent)
    headers = {key.lower(): value for key, value in task.info["headers"].items()}
    assert headers["x-acentos"] == "ação 😀"
    assert re.split(r",\s*", headers["x-dois"]) == ["a", "b"]
    assert headers["x-vazio"] == ""
    assert headers["x-brancos"].strip() == "a  b"
    assert headers["x-minusculo"] == "c"
    assert headers["cookie"].strip() == 'a=1; b=2; c="x"; e=4'
    assert headers["x-longo"] == "v" * 6000
    assert headers["x-conta"] == "certa"
    assert not [name for name in headers if "_" in name or "sublinhado" in name]


def test_headers_before_the_first_line(shared_proxy, connect, worker):
    """O cabeçalho inteiro chega antes de qualquer linha, com tudo o que o streaming pede."""
    conn = connect(shared_proxy).request("POST", "/")
    response = common(conn.response())
    assert response.chunks == []
    assert (response.version, response.status, response.chunked) == ("HTTP/1.1", 200, True)
    assert response.header("Content-Type") == "application/x-ndjson; charset=utf-8"
    assert response.header("Cache-Control") == "no-cache, no-transform"
    assert response.header("X-Accel-Buffering") == "no"
    assert response.header("X-Content-Type-Options") == "nosniff"
    assert response.header("Content-Length") is None
    assert response.header("Content-Encoding") is None
    assert uuid.UUID(response.header("X-Task-Name"))
    task = worker.next()
    for number in range(3):
        task.push(f"linha {number}")
        assert response.line() == f"linha {number}".encode()
    task.finish()
    assert response.lines() == []


def test_http10_is_plain(shared_proxy, connect, worker):
    """Um cliente HTTP/1.0 recebe as linhas puras, sem pedaços, e o fechamento como fim."""
    conn = connect(shared_proxy).request("POST", "/", body="{}", version="HTTP/1.0")
    response = common(conn.response())
    assert response.header("Transfer-Encoding") is None
    assert response.header("Content-Length") is None
    task = worker.next()
    task.push("um")
    assert response.line() == b"um"
    task.finish("dois")
    assert response.lines() == [b"dois"]
    assert response.body() == b"um\ndois\n"
    assert conn.at_end()


def test_later_minor_version(shared_proxy, connect, worker):
    """HTTP/1.2, que ninguém fala, é atendido ou recusado com um erro em JSON, e o corpo acaba por inteiro."""
    conn = connect(shared_proxy).request("POST", "/", version="HTTP/1.2")
    if may_refuse(conn):
        worker.next().finish("a", "b")
        assert conn.current.lines() == [b"a", b"b"]
        assert conn.at_end()


def test_http10_errors_and_ping(shared_proxy, connect):
    """Em HTTP/1.0, /ping e os erros também vão sem pedaços e fecham a conexão."""
    conn = connect(shared_proxy).request("GET", "/ping", version="HTTP/1.0")
    assert common(conn.response()).body() == b"pong"
    assert conn.at_end()
    conn = connect(shared_proxy).request("TRACE", "/", version="HTTP/1.0")
    error(conn.response(), 405, "method_not_allowed")
    assert conn.at_end()


def test_one_request_per_connection(shared_proxy, connect, worker):
    """Toda resposta diz Connection: close e fecha; o que vier depois do pedido não é lido como outro, nem atrapalha."""
    for version in ("HTTP/1.1", "HTTP/1.0"):
        for method, target in (("POST", "/"), ("GET", "/ping"), ("HEAD", "/"), ("OPTIONS", "/"), ("TRACE", "/")):
            conn = connect(shared_proxy).request(method, target, {"Connection": "keep-alive"}, version=version)
            if method == "POST":
                task = worker.next()
                response = common(conn.response())
                conn.send(b"GET /outro HTTP/1.1\r\nHost: x\r\n\r\n")
                task.push("1")
                assert response.line() == b"1"
                conn.send(b"x" * 100000)
                worker.idle()
                task.finish("2")
                assert response.lines() == [b"2"]
            else:
                common(conn.response()).body()
            assert conn.at_end()
    # O segundo pedido já vem junto com o primeiro.
    conn = connect(shared_proxy)
    conn.send(b"POST /um HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}POST /dois HTTP/1.1\r\nHost: x\r\n\r\n")
    task = worker.next()
    assert (task.info["path"], task.info["body"]) == ("/um", "{}")
    task.finish("ok")
    assert conn.response().lines() == [b"ok"]
    assert conn.at_end()
    worker.idle()


bodies = [
    ("json", "application/json", b'{ "b":1.10,\n\t"a":1e400, "n":12345678901234567890 }'),
    ("form", "application/x-www-form-urlencoded", b"a=1&b=a%20b+c&a=2"),
    ("sem-tipo", None, b'{"a": 1}'),
    ("texto", "text/plain; charset=latin-1", "é UTF-8 mesmo assim".encode()),
    ("multipart-vazio", "multipart/form-data; boundary=x", b"isto nao e multipart"),
    ("tipo-estranho", ";;;", b"abc"),
    ("bom", "application/json", b"\xef\xbb\xbf{}"),
    ("nul", "application/octet-stream", b"a\x00b"),
    ("unicode", "application/json", '"\u0085\u2028\u2029😀"'.encode()),
    ("espaços", "application/json", b" \r\n {} \r\n "),
]


def test_bodies_as_sent(serve):
    """O corpo chega como foi enviado, qualquer que seja o tipo declarado, e nunca reescrito."""
    for kind, content_type, body in bodies:
        headers = {"Content-Type": content_type} if content_type else {}
        _, task = serve("POST", "/", headers, body)
        assert task.info["body"] == body.decode(), kind
        assert "body_encoding" not in task.info, kind


def multipart(binary):
    """Compõe um corpo multipart com um campo e um arquivo.

    Argumentos:
        binary: os bytes do arquivo.

    Retorno:
        Os bytes do corpo, com o limite "limite".
    """
    head = b'--limite\r\nContent-Disposition: form-data; name="a"\r\n\r\nvalor\r\n'
    file = b'--limite\r\nContent-Disposition: form-data; name="f"; filename="x.bin"\r\n\r\n' + binary
    return head + file + b"\r\n--limite--\r\n"


def test_multipart(serve):
    """Um corpo multipart chega inteiro: em texto se é texto, em base64 se traz um arquivo binário."""
    headers = {"Content-Type": "multipart/form-data; boundary=limite"}
    body = multipart("conteúdo".encode())
    _, task = serve("POST", "/", headers, body)
    assert task.info["body"] == body.decode()
    body = multipart(bytes(range(256)))
    _, task = serve("POST", "/", headers, body)
    assert task.info["body_encoding"] == "base64"
    assert base64.b64decode(task.info["body"], validate=True) == body


def test_binary_body(serve):
    """Um corpo que não é UTF-8 chega em base64, e body_encoding diz isso."""
    for body in (b"\xff", b"\x1f\x8b\x08\x00", bytes(range(256)) * 40, b"\xed\xa0\x80"):
        _, task = serve("POST", "/", {"Content-Type": "application/octet-stream"}, body)
        assert task.info["body_encoding"] == "base64"
        assert base64.b64decode(task.info["body"], validate=True) == body


def test_empty_body(serve):
    """Content-Length: 0 e nenhum corpo são a mesma coisa: texto vazio."""
    _, task = serve("POST", "/", {"Content-Length": "0"})
    assert task.info["body"] == ""
    assert "body_encoding" not in task.info


def test_one_megabyte_body(serve):
    """Um corpo de 1 MB chega inteiro."""
    body = json.dumps({"texto": "ç" * 350000}, ensure_ascii=False)
    _, task = serve("POST", "/", {"Content-Type": "application/json"}, body)
    assert task.info["body"] == body


def serve_body(conn, worker, body):
    """Recebe a tarefa de um pedido já enviado, confere o corpo e a atende com a linha "ok".

    Argumentos:
        conn: a harness.connection do pedido.
        worker: o harness.worker.
        body: o corpo esperado (str).
    """
    task = worker.next()
    assert task.info["body"] == body
    task.finish("ok")
    assert common(conn.response()).lines() == [b"ok"]


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None]
)
def test_chunked_request_body(content_type, shared_proxy, connect, worker):
    """Um corpo enviado em pedaços chega inteiro, em qualquer tipo."""
    headers = [chunk] + ([("Content-Type", content_type)] if content_type else [])
    conn = connect(shared_proxy).request("POST", "/c", headers)
    text = "a=ação&b=" + "x" * 3000
    data = text.encode()
    pieces = [data[:4], data[4:5], data[5:9], data[9:]]
    for piece in pieces:
        conn.send(b"%X\r\n%s\r\n" % (len(piece), piece))
    worker.idle()
    conn.send(b"0\r\n\r\n")
    serve_body(conn, worker, text)


@pytest.mark.parametrize(
    "raw",
    [
        b"5;nome=valor\r\ncorpo\r\n0\r\n\r\n",
        b'5;nome="a;b"\r\ncorpo\r\n0;fim\r\n\r\n',
        b"5\r\ncorpo\r\n0\r\nX-Final: 1\r\nX-Outro: 2\r\n\r\n",
        b"0005\r\ncorpo\r\n000\r\n\r\n",
    ],
    ids=["extensão", "extensão-aspas", "campos-finais", "zeros"],
)
def test_chunked_request_extras(raw, shared_proxy, connect, worker):
    """Extensões e campos finais de um corpo em pedaços são ignorados, ou recusados por inteiro (o werkzeug não os lê)."""
    conn = connect(shared_proxy).request("POST", "/c", [chunk])
    conn.send(raw)
    if may_refuse(conn):
        task = worker.next()
        assert task.info["body"] == "corpo"
        task.finish("ok")
        assert conn.current.lines() == [b"ok"]
    worker.idle()


def test_chunked_end_in_two_segments(shared_proxy, connect, worker):
    """O último CR chega sem o seu LF, que vem logo depois."""
    conn = connect(shared_proxy)
    conn.send(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r")
    worker.idle()
    conn.send(b"\n")
    serve_body(conn, worker, "ab")


def test_request_in_small_pieces(shared_proxy, connect, worker):
    """Um pedido que chega aos bocados, cortado no meio de uma letra, é o mesmo pedido."""
    conn = connect(shared_proxy)
    raw = 'POST /aos-poucos?c HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n{"a": "ção"}'.encode()
    assert raw.endswith(b"}")
    body = raw.partition(b"\r\n\r\n")[2]
    raw = raw.replace(b"Content-Length: 12", b"Content-Length: %d" % len(body))
    for begin in range(0, len(raw), 7):
        conn.send(raw[begin : begin + 7])
    task = worker.next()
    assert (task.info["path"], task.info["query"], task.info["body"]) == ("/aos-poucos", "c", body.decode())
    task.finish("ok")
    assert conn.response().lines() == [b"ok"]


@pytest.mark.parametrize("target", ["/", "/x", "/ping", "/static/x.js"])
def test_head_makes_no_task(target, shared_proxy, connect, worker):
    """HEAD responde só o cabeçalho, sem corpo e sem tarefa."""
    conn = connect(shared_proxy).request("HEAD", target)
    response = common(conn.response())
    assert response.status == 200
    assert response.header("X-Task-Name") is None
    expected = "text/plain" if target == "/ping" else "application/x-ndjson"
    assert response.header("Content-Type") == f"{expected}; charset=utf-8"
    assert conn.at_end()
    worker.idle()


@pytest.mark.parametrize("target", ["/", "/x", "/ping", "*"])
def test_options_makes_no_task(target, fetch, shared_proxy, worker):
    """OPTIONS diz os métodos atendidos, sem corpo e sem tarefa."""
    response = common(fetch(shared_proxy, "OPTIONS", target))
    assert response.status in (200, 204)
    assert response.body() == b""
    assert set(methods) <= set(re.split(r",\s*", response.header("Allow")))
    assert response.header("Access-Control-Allow-Origin") is None
    worker.idle()


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("target", ["/ping", "/ping?x=1"])
def test_ping(method, target, fetch, shared_proxy, worker):
    """/ping responde 200 "pong" e não cria tarefa."""
    response = common(fetch(shared_proxy, method, target))
    assert response.status == 200
    assert response.body() == b"pong"
    assert response.header("Content-Type").split(";")[0] == "text/plain"
    worker.idle()


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND", "QUERY", "X-ALGUM"])
def test_method_not_allowed(method, fetch, shared_proxy, worker):
    """Outros métodos: 405 em JSON, com Allow, sem tarefa."""
    response = fetch(shared_proxy, method, "/x")
    error(response, 405, "method_not_allowed")
    assert set(methods) <= set(re.split(r",\s*", response.header("Allow")))
    worker.idle()


# Nenhum destes nomeia um dos nossos tipos, ou só o recusa: vale CONTENT_TYPE.
others = [None, "*/*", "", "application/*", "text/html", "text/event-stream", ";;;q=x,,/", "application/jsonx"]
others += ["application/jsonl;q=0", "application/json;q=0"]
# Accept e o tipo que ele pede.
accepts = [
    *((accept, None) for accept in others),
    ("application/x-ndjson", "application/x-ndjson"),
    ("application/json-lines", "application/json-lines"),
    ("application/jsonl", "application/jsonl"),
    ("Application/JSONL", "application/jsonl"),
    ("application/jsonl; charset=utf-8", "application/jsonl"),
    ("application/json, application/json-lines;q=0.5", "application/json-lines"),
    ("application/x-ndjson;q=0.1, application/jsonl;q=0.9", "application/jsonl"),
    ("application/jsonl;q=0.5, application/x-ndjson", "application/x-ndjson"),
    ("text/html, application/jsonl;q=0.1, */*;q=0.2", "application/jsonl"),
    # JSON, só para quem não aceita linhas.
    ("application/json", "application/json"),
    ("application/json;q=0.1", "application/json"),
    ("Application/JSON; charset=utf-8, text/plain", "application/json"),
    ("text/html, application/json", "application/json"),
    ("application/json, application/jsonl;q=0", "application/json"),
    ("application/json, */*;q=0", "application/json"),
    ("application/json, application/*;q=0.0, text/*", "application/json"),
    ("application/json, */*", None),
    ("application/json, text/plain, */*", None),
    ("application/json, application/*;q=0.1", None),
]
types = ("application/x-ndjson", "application/json-lines", "application/jsonl", "application/json")


@pytest.mark.parametrize("default", types)
def test_accept(default, share_proxy, connect, worker):
    """O tipo é o que Accept nomear entre os nossos, JSON só a quem não aceita linhas, ou CONTENT_TYPE; nunca 406."""
    proxy = share_proxy() if default == types[0] else share_proxy("--content-type", default)
    for accept, expected in accepts:
        conn = connect(proxy).request("GET", "/", {} if accept is None else {"Accept": accept})
        worker.next().finish('{"a": 1}')
        response = common(conn.response())
        assert (response.status, response.body()) == (200, b'{"a": 1}\n')
        assert response.header("Content-Type") == f"{expected or default}; charset=utf-8", accept
        conn.close()
    response = connect(proxy).request("HEAD", "/", {"Accept": "application/json"}).response()
    assert response.header("Content-Type") == "application/json; charset=utf-8"


def test_accept_in_several_lines(serve):
    """Linhas repetidas de Accept são uma lista só."""
    response, _ = serve("GET", "/", [("Accept", "application/json"), ("Accept", "application/jsonl;q=0.2")])
    assert response.header("Content-Type") == "application/jsonl; charset=utf-8"


@pytest.mark.parametrize("coding", ["length", "chunked"])
def test_expect_continue(coding, shared_proxy, connect, worker):
    """Expect: 100-continue é respondido exatamente uma vez, antes do corpo, e o corpo chega inteiro."""
    conn = connect(shared_proxy)
    size = "Content-Length: 5" if coding == "length" else "Transfer-Encoding: chunked"
    conn.send(f"POST /e HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n{size}\r\n\r\n".encode())
    response = conn.expect()
    conn.read_until(lambda: response.interim, 5, "100 Continue")
    assert response.interim == [100]
    worker.idle()
    conn.send(b"corpo" if coding == "length" else b"5\r\ncorpo\r\n0\r\n\r\n")
    task = worker.next()
    assert task.info["body"] == "corpo"
    task.finish("ok")
    conn.read_until(lambda: response.head is not None, 5, "o cabeçalho final")
    assert common(response).lines() == [b"ok"]
    assert response.interim == [100]


def test_expect_continue_without_waiting(shared_proxy, connect, worker):
    """Um cliente que não espera pelo 100 também é atendido, com no máximo um 100."""
    conn = connect(shared_proxy).request("POST", "/e", {"Expect": "100-continue"}, "corpo")
    task = worker.next()
    assert task.info["body"] == "corpo"
    task.finish("ok")
    response = conn.response()
    assert response.lines() == [b"ok"]
    assert response.interim in ([], [100])


@pytest.fixture
def small(share_proxy, host):
    """Um proxy que só aceita corpos de até 1000 bytes, no hospedeiro parametrizado.

    Retorno:
        Um harness.proxy_process.
    """
    return share_proxy("--max-body", "1000", host=host)


def test_expect_continue_too_large(small, host, connect, worker):
    """Quem pergunta antes de enviar um corpo grande demais recebe 413 sem enviá-lo; o waitress deixa enviar."""
    conn = connect(small).request("POST", "/e", {"Expect": "100-continue", "Content-Length": "1001"})
    if host == "waitress":
        conn.send(b"x" * 1001)
    error(conn.response(), 413, "body_too_large")
    worker.idle()


@pytest.mark.parametrize("size", [1001, 300000, 5000000])
@pytest.mark.parametrize("coding", ["length", "chunked"])
def test_body_too_large(size, coding, small, connect, worker):
    """Um corpo maior que MAX_BODY: 413 em JSON, mesmo a quem só lê depois de enviar tudo; sem tarefa."""
    conn = connect(small)
    body = b"x" * size
    # O proxy pode responder e fechar antes do fim do corpo; a resposta ainda deve poder ser lida.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if coding == "length":
            conn.request("POST", "/", body=body)
        else:
            conn.request("POST", "/", [chunk])
            for begin in range(0, size, 50000):
                piece = body[begin : begin + 50000]
                conn.send(b"%X\r\n%s\r\n" % (len(piece), piece))
            conn.send(b"0\r\n\r\n")
    error(conn.response(), 413, "body_too_large")
    worker.idle()


@pytest.mark.parametrize("coding", ["length", "chunked"])
def test_body_of_exactly_the_limit(coding, small, connect, worker):
    """Um corpo de exatamente MAX_BODY bytes é aceito."""
    conn = connect(small)
    if coding == "length":
        conn.request("POST", "/", body=b"x" * 1000)
    else:
        conn.request("POST", "/", [chunk]).send(b"3E8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n")
    task = worker.next()
    assert task.info["body"] == "x" * 1000
    task.finish()
    assert conn.response().lines() == []


def test_no_body_allowed(share_proxy, host, connect, worker):
    """MAX_BODY=0 recusa qualquer corpo e aceita pedidos sem ele."""
    proxy = share_proxy("--max-body", "0", host=host)
    error(connect(proxy).request("POST", "/", body="x").response(), 413, "body_too_large")
    worker.idle()
    conn = connect(proxy).request("GET", "/")
    worker.next().finish()
    assert conn.response().lines() == []


def test_body_cut_short(shared_proxy, connect, worker):
    """Um corpo que acaba antes do anunciado não vira tarefa: 400 em JSON, ou só o fechamento."""
    for headers, start in (({"Content-Length": "10"}, b"abc"), ([chunk], b"5\r\nab"), ([chunk], b"5\r\nabcde\r\n")):
        conn = connect(shared_proxy).request("POST", "/", headers)
        conn.send(start)
        conn.half_close()
        try:
            response = conn.response(5)
        except (harness.broken, ConnectionResetError):
            pass
        else:
            error(response, 400, "bad_request")
        worker.idle()


# Quem julga estes é o hospedeiro, e os dois não julgam igual: o que um recusa o outro pode atender.
malformed = {
    "linha": b"LIXO\r\n\r\n",
    "linha-vazia-de-sentido": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "quatro-palavras": b"GET / a HTTP/1.1\r\nHost: x\r\n\r\n",
    "versão": b"GET / HTTP/3.0\r\nHost: x\r\n\r\n",
    "colchetes": b"GET http://[:::]/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "tamanho-texto": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
    "tamanho-negativo": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    "tamanho-mais": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nabcde",
    "dois-tamanhos": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "pedaço": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    "pedaço-negativo": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "codificação": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
    "sem-dois-pontos": b"POST / HTTP/1.1\r\nHost: x\r\nlixo\r\nContent-Length: 2\r\n\r\nab",
    "nome-com-espaço": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length : 2\r\n\r\nab",
    "linha-longa": b"GET /" + b"a" * 300000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "cabeçalho-longo": b"GET / HTTP/1.1\r\nX: " + b"a" * 300000 + b"\r\n\r\n",
    "muitos-cabeçalhos": b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 60000 + b"\r\n",
}
# O que nenhum hospedeiro pode tomar por um pedido.
unreadable = {"linha", "linha-vazia-de-sentido", "linha-longa", "cabeçalho-longo", "muitos-cabeçalhos", "pedaço"}


@pytest.mark.parametrize("kind", malformed)
def test_malformed_requests(kind, shared_proxy, connect, fetch, worker):
    """Um pedido que não é HTTP: um erro em JSON com Server e X-Author, sem tarefa; e o proxy segue atendendo."""
    conn = connect(shared_proxy)
    # Recusado antes do fim, o envio pode falhar; a resposta ainda deve poder ser lida.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        conn.send(malformed[kind])
    # Há quem atenda sem o corpo que não entendeu, e quem espere por ele.
    with contextlib.suppress(OSError):
        conn.half_close()
    try:
        is_served = may_refuse(conn)
    except harness.broken:
        # O urllib.parse, com que os dois leem o alvo, levanta uma exceção que eles não esperam.
        assert kind == "colchetes"
        is_served = False
    if is_served:
        assert kind not in unreadable
        # Quem fechou o seu lado de envio é um cliente que saiu.
        key = worker.next_key()
        harness.eventually(lambda: not worker.client.exists(key), 2, "tarefa apagada")
    worker.idle()
    assert fetch(shared_proxy, "GET", "/ping").body() == b"pong"


def test_smuggling_is_refused(shared_proxy, connect, worker):
    """Transfer-Encoding com Content-Length: no máximo uma tarefa, e o resto nunca é lido como outro pedido."""
    conn = connect(shared_proxy)
    inner = b"0\r\n\r\nPOST /escondido HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    head = b"POST /visto HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n" % len(inner)
    conn.send(head + inner)
    response = conn.expect()
    harness.eventually(lambda: conn.pump(0.01) and (response.head or conn.at_end()), 5, "uma resposta")
    if response.status == 200:
        task = worker.next()
        assert task.info["path"] == "/visto"
        task.finish()
        assert response.lines() == []
        assert conn.at_end(), "o pedido escondido foi atendido"
    else:
        error(response, 400, "bad_request")
    worker.idle()


def test_task_refused_by_redis(start_redis, start_proxy, host, connect, start_worker):
    """O Redis que recusa gravar (sem memória): 500 em JSON, e volta a atender quando ele aceita."""
    server = start_redis()
    proxy = start_proxy(redis=server)
    worker = start_worker(server.client())
    server.client().config_set("maxmemory", "1")
    error(connect(proxy).request("POST", "/").response(), 500, "redis_error")
    worker.idle()
    server.client().config_set("maxmemory", "0")
    conn = connect(proxy).request("POST", "/")
    worker.next().finish("ok")
    assert conn.response().lines() == [b"ok"]


def test_servername(start_proxy, host, connect, worker):
    """Server é SERVERNAME, um só, em qualquer resposta."""
    proxy = start_proxy("-s", "Meu Servidor/2.0 (teste)")
    conn = connect(proxy).request("POST", "/")
    worker.next().finish()
    for response in (
        conn.response(),
        connect(proxy).request("GET", "/ping").response(),
        connect(proxy).request("TRACE", "/").response(),
        connect(proxy).request("HEAD", "/").response(),
        connect(proxy).request("OPTIONS", "/").response(),
    ):
        common(response, "Meu Servidor/2.0 (teste)")
        response.body()
    conn = connect(proxy)
    conn.send(b"LIXO\r\n\r\n")
    common(conn.response(), "Meu Servidor/2.0 (teste)")


def test_remote_address(connect, shared_proxy, worker):
    """remote_addr é o endereço de quem conectou; X-Forwarded-For vai nos cabeçalhos, mas não é acreditado."""
    conn = connect(shared_proxy, source="127.0.0.9").request("GET", "/", {"X-Forwarded-For": "192.0.2.7"})
    task = worker.next()
    assert task.info["remote_addr"] == "127.0.0.9"
    headers = {key.lower(): value for key, value in task.info["headers"].items()}
    assert headers["x-forwarded-for"] == "192.0.2.7"
    task.finish()
    assert conn.response().lines() == []


def origins(response):
    """Resume os cabeçalhos de CORS de uma resposta.

    Argumentos:
        response: a harness.response.

    Retorno:
        Tupla de (Access-Control-Allow-Origin ou None, nomes em Vary em minúsculas).
    """
    vary = {name.lower() for value in response.header_all("Vary") for name in re.split(r",\s*", value)}
    return response.header("Access-Control-Allow-Origin"), vary


origin_list = (
    "https://a.test, http://b.test:8080 https://d.test:443,http://e.test:80/ http://f.test:443 https://exemplo.ção "
    "http://[::1]:8080"
)
# CORS_ORIGIN, a origem da página e a que a resposta diz permitir.
cors = [
    ("*", "https://qualquer.test", "*"),
    ("*", None, "*"),
    ("", "https://a.test", None),
    (origin_list, "https://a.test", "https://a.test"),
    (origin_list, "http://b.test:8080", "http://b.test:8080"),
    (origin_list, "https://outro.test", None),
    (origin_list, "http://a.test", None),
    (origin_list, "https://a.test.outro", None),
    (origin_list, "null", None),
    (origin_list, None, None),
    (origin_list, "https://d.test", "https://d.test"),
    (origin_list, "http://e.test", "http://e.test"),
    (origin_list, "http://f.test:443", "http://f.test:443"),
    (origin_list, "http://f.test", None),
    (origin_list, "https://exemplo.xn--o-xfal", "https://exemplo.xn--o-xfal"),
    (origin_list, "http://[::1]:8080", "http://[::1]:8080"),
]


def test_cors(share_proxy, host, connect, worker):
    """CORS_ORIGIN: cada resposta, erros inclusive, diz uma vez a origem permitida, e nada às outras."""
    for setting, origin, allowed in cors:
        proxy = share_proxy("--cors-origin", setting, "--max-body", "10", host=host)
        headers = {"Origin": origin} if origin else {}
        conn = connect(proxy).request("POST", "/", headers)
        worker.next().finish()
        stream = common(conn.response())
        exposed = re.split(r",\s*", stream.header("Access-Control-Expose-Headers") or "")
        assert ("X-Task-Name" in exposed) == (allowed is not None)
        others = [
            connect(proxy).request("GET", "/ping", headers).response(),
            connect(proxy).request("TRACE", "/", headers).response(),
            connect(proxy).request("POST", "/", headers, "x" * 11).response(),
            connect(proxy).request("OPTIONS", "/", headers).response(),
        ]
        assert [response.status for response in others[:3]] == [200, 405, 413]
        for response in (stream, *others):
            found, vary = origins(common(response))
            assert found == allowed, (setting, origin, response.head)
            # Uma resposta que depende da origem não pode ser guardada para outra.
            assert "origin" in vary or setting in ("", "*"), response.head
            response.body()
            response.conn.close()


def test_cors_preflight(start_proxy, host, fetch, worker):
    """A consulta prévia do navegador: 204 sem corpo e sem tarefa, com método e cabeçalhos pedidos permitidos."""
    proxy = start_proxy("--cors-origin", "https://a.test")
    asked = {
        "Origin": "https://a.test",
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "content-type,x-meu",
    }
    response = common(fetch(proxy, "OPTIONS", "/x", asked))
    assert response.status == 204
    assert response.body() == b""
    assert origins(response)[0] == "https://a.test"
    assert set(methods) <= set(re.split(r",\s*", response.header("Access-Control-Allow-Methods")))
    allowed = response.header("Access-Control-Allow-Headers").lower()
    assert {"content-type", "x-meu"} <= set(re.split(r",\s*", allowed))
    assert int(response.header("Access-Control-Max-Age")) > 0
    other = fetch(proxy, "OPTIONS", "/x", {**asked, "Origin": "https://outro.test"})
    for name in ("Origin", "Methods", "Headers"):
        assert other.header(f"Access-Control-Allow-{name}") is None
    worker.idle()


unfinished = {
    "cabeçalhos": b"X-Lento: a",
    "corpo": b"Content-Length: 10\r\n\r\nabc",
    "pedaços": b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
}


def test_cors_of_a_late_request(share_proxy, host, connect, worker):
    """O 408 de um pedido cujo corpo não chegou inteiro pode ser lido pela página que o fez; o de um cabeçalho pela metade,
    que navegador nenhum manda, não precisa. O waitress pode não responder, ou não dizer a origem."""
    proxy = share_proxy("--cors-origin", "https://a.test", "--request-timeout", "2000", host=host)
    opened = []
    for kind, rest in unfinished.items():
        for origin, allowed in (("https://a.test", "https://a.test"), ("https://b.test", None)):
            conn = connect(proxy)
            conn.send(b"POST / HTTP/1.1\r\nHost: x\r\nOrigin: %s\r\n%s" % (origin.encode(), rest))
            opened.append((conn, {allowed} if kind != "cabeçalhos" else {allowed, None}))
    for conn, allowed in opened:
        try:
            response = conn.response()
        except (harness.broken, ConnectionResetError):
            assert host == "waitress"
            continue
        error(response, 408, "request_timeout")
        found, vary = origins(response)
        assert (host == "waitress" and not found) or (found in allowed and vary == {"origin"})
        assert conn.at_end()
    worker.idle()


def test_cors_of_a_huge_header(share_proxy, host, connect, worker):
    """O 431 de um cabeçalho enorme que vem depois do Origin também pode ser lido."""
    proxy = share_proxy("--cors-origin", "*", "--max-body", "10", host=host)
    conn = connect(proxy)
    # Recusado antes do fim, o envio pode falhar; a resposta ainda deve poder ser lida.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        conn.request("POST", "/", {"Origin": "https://a.test", "X-Enorme": "a" * 1000000})
    response = conn.response()
    error(response, 431, "headers_too_large")
    assert origins(response)[0] == "*"
    worker.idle()


def test_client_that_connects_and_leaves(shared_proxy, connect, fetch, worker):
    """Quem conecta e sai sem pedir nada, de qualquer modo, não deixa rastro."""
    connect(shared_proxy).close()
    connect(shared_proxy).reset()
    half = connect(shared_proxy)
    half.send(b"POST / HT")
    half.reset()
    quiet = connect(shared_proxy)
    quiet.half_close()
    quiet.sock.settimeout(5)
    assert quiet.sock.recv(1) == b""
    assert fetch(shared_proxy, "GET", "/ping").body() == b"pong"
    worker.idle()
    assert "Traceback" not in shared_proxy.log()


def test_streams_have_no_thread(share_proxy, host, connect, worker):
    """300 streams em silêncio não somam uma linha de execução às do repouso; depois deles, de erros e de clientes que
    somem, os soquetes também são os do repouso."""
    proxy = share_proxy("--max-body", "10", host=host)
    sockets = proxy.sockets()
    # As do waitress nascem com os primeiros pedidos e ficam; as do flask vivem o tempo de um pedido.
    assert [connect(proxy).request("GET", "/ping").response().body() for _ in range(20)] == [b"pong"] * 20
    harness.eventually(lambda: proxy.sockets() <= sockets, 5, "soquetes em repouso")
    threads = proxy.threads()
    pairs = support.open_streams(connect, proxy, worker, 300)
    harness.eventually(lambda: proxy.threads() <= threads, 5, "nenhuma linha de execução a mais")
    for response, _ in pairs[:100]:
        response.conn.reset()
    for number, (_, task) in enumerate(pairs[100:]):
        task.finish(str(number))
    found = harness.read_all([response for response, _ in pairs[100:]])
    assert found == [[str(number).encode()] for number in range(200)]
    for raw in (b"LIXO\r\n\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n", b"GET / HT"):
        conn = connect(proxy)
        conn.send(raw)
        conn.half_close()
        assert conn.expect() is conn.current
        with contextlib.suppress(harness.broken, ConnectionResetError):
            conn.current.body()
        conn.close()
    support.wait_empty(worker.client, 5)
    harness.eventually(lambda: proxy.sockets() <= sockets, 5, "soquetes em repouso")
    harness.eventually(lambda: proxy.threads() <= threads, 5, "linhas de execução em repouso")


def test_no_delay(shared_proxy, connect, worker):
    """Cada linha sai num envio só, na ordem e na hora, mesmo com o cliente confirmando devagar, e o fim, na do DEL."""
    conn = connect(shared_proxy).request("POST", "/")
    # Sem TCP_QUICKACK o núcleo confirma com atraso de até 40 ms; com Nagle ligado, as linhas esperariam por isso.
    conn.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
    response = conn.response()
    task = worker.next()
    delays = []
    for number in range(20):
        began = time.monotonic()
        task.push(f"{number}")
        assert response.line() == f"{number}".encode()
        delays.append(response.all_lines[-1].when - began)
    task.finish()
    assert response.lines() == []
    assert sorted(delays)[10] < 0.1
    assert [bytes(part) for part in response.chunks] == [b"%d\n" % number for number in range(20)]
