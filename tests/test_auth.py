"""AUTH_TOKEN e HEADERS_EXCLUDE: quem entra, o que a recusa diz e o que nunca se vê, no Redis, no log ou no ps."""

import contextlib
import json
import re

import pytest

import harness

token = "um-token.De_prova~1+2/3="
other = "outro#token$de%prova"


def refused(response, method="POST"):
    """Confere uma recusa.

    Argumentos:
        response: a harness.response.
        method: o método do pedido; a resposta a HEAD não tem corpo.
    """
    assert response.status == 401, response.head
    assert response.header("WWW-Authenticate") == "Bearer"
    assert response.header("X-Author") and response.header("Server") == "py-ndjson-proxy"
    assert response.header("Content-Type") == "application/json; charset=utf-8"
    assert response.header("Connection") == "close"
    assert response.header("X-Task-Name") is None
    body = response.body()
    assert token.encode() not in body and other.encode() not in body
    if method != "HEAD":
        content = json.loads(body)
        assert (set(content), content["error"]) == ({"error", "message"}, "unauthorized")
        assert content["message"]
    # Guardada, a conexão ocuparia um descritor.
    assert response.conn.at_end()


def bearer(value):
    """Monta o cabeçalho de um token. Argumentos: value. Retorno: dicionário de um cabeçalho."""
    return {"Authorization": f"Bearer {value}"}


@pytest.fixture
def guarded(share_proxy, worker, host):
    """Um proxy com dois tokens, partilhado.

    Retorno:
        Par (proxy, worker).
    """
    return share_proxy(host=host, env={"AUTH_TOKEN": f"{token}, {other}"}), worker


wrong_headers = {
    "nenhum": {},
    "vazio": {"Authorization": ""},
    "só-esquema": {"Authorization": "Bearer"},
    "só-token": {"Authorization": token},
    "outro-token": bearer("x" * len(token)),
    "começo": bearer(token[:-1]),
    "mais": bearer(token + "x"),
    "maiúsculas": bearer(token.upper()),
    "lista-inteira": bearer(f"{token},{other}"),
    "lista-com-espaço": bearer(f"{token} {other}"),
    "basic": {"Authorization": f"Basic {token}"},
    "entre-aspas": bearer(f'"{token}"'),
    "não-ascii": {"Authorization": b"Bearer \xff\xfe"},
    "utf-8": bearer("ação"),
    "repetido": [("Authorization", "Bearer x"), ("Authorization", f"Bearer {token}")],
    "outro-cabeçalho": {"X-Authorization": f"Bearer {token}"},
    "cookie": {"Cookie": f"Authorization=Bearer {token}"},
}


def test_refusals(start_redis, start_proxy, host, connect, start_worker):
    """Sem o token certo, no lugar certo, 401 em JSON e nada no Redis: nem tarefa, nem PING; e o log avisa uma vez só."""
    server = start_redis()
    proxy = start_proxy(env={"AUTH_TOKEN": f"{token}, {other}"}, redis=server)
    worker = start_worker(server.client())
    before = {name: server.calls(name) for name in ("set", "publish", "ping")}
    tried = 0
    for headers in wrong_headers.values():
        for method in ("POST", "GET", "HEAD"):
            refused(connect(proxy).request(method, "/x", headers).response(), method)
            tried += 1
    refused(connect(proxy).request("POST", f"/x?access_token={token}", body=f"access_token={token}").response())
    assert connect(proxy).request("TRACE", "/x").response().status in (401, 405)
    refused(connect(proxy).request("POST", "/ping/").response())
    assert tried == 3 * len(wrong_headers)
    worker.idle()
    after = {name: server.calls(name) for name in before}
    # Uma das publicações é a de worker.idle; um PING pode ser o do proxy, quando nada acontece.
    assert (after["set"], after["publish"]) == (before["set"], before["publish"] + 1), (before, after)
    assert after["ping"] <= before["ping"] + 2, (before, after)
    assert len(re.findall(r"(?m)^aviso: .*AUTH_TOKEN.*cliente=127\.0\.0\.1", proxy.log())) == 1, proxy.log()
    assert proxy.tasks() == []


def test_right_tokens(guarded, connect):
    """Cada um dos tokens abre a porta, com o esquema em qualquer caixa; e o Redis não fica sabendo dele."""
    proxy, worker = guarded
    for value in (f"Bearer {token}", f"bearer {other}", f"BEARER   {token}  "):
        conn = connect(proxy).request("POST", "/x", {"Authorization": value, "Cookie": "a=1", "X-Meu": "b"}, "corpo")
        task = worker.next()
        assert {name.lower() for name in task.info["headers"]} == {"host", "x-meu", "content-length"}
        assert token.encode() not in task.raw and other.encode() not in task.raw
        assert task.info["body"] == "corpo"
        task.finish("ok")
        assert conn.response().lines() == [b"ok"]
        head = connect(proxy).request("HEAD", "/x", {"Authorization": value}).response()
        assert (head.status, head.header("Content-Type")) == (200, "application/x-ndjson; charset=utf-8")
    for text in (proxy.log(), proxy.output()):
        assert token not in text and other not in text


def test_free_requests(guarded, connect):
    """/ping e OPTIONS dispensam o token."""
    proxy, worker = guarded
    for method in ("GET", "POST", "HEAD"):
        response = connect(proxy).request(method, "/ping").response()
        assert (response.status, response.body()) == (200, b"" if method == "HEAD" else b"pong")
    response = connect(proxy).request("OPTIONS", "/x").response()
    assert (response.status, response.body()) == (204, b"")
    worker.idle()


def test_cors_of_a_refusal(start_proxy, host, connect, worker):
    """A recusa leva os cabeçalhos de CORS, e a consulta prévia deixa o navegador mandar Authorization."""
    proxy = start_proxy("--cors-origin", "https://a.test", env={"AUTH_TOKEN": token})
    origin = {"Origin": "https://a.test"}
    response = connect(proxy).request("POST", "/", origin).response()
    refused(response)
    assert response.header("Access-Control-Allow-Origin") == "https://a.test"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    response = connect(proxy).request("OPTIONS", "/", {**origin, **asked}).response()
    assert response.status == 204
    assert "authorization" in response.header("Access-Control-Allow-Headers")
    worker.idle()


@pytest.mark.parametrize("coding", ["length", "chunked"])
def test_refusal_with_a_body(coding, guarded, connect):
    """Quem manda 5 MB antes de ler também recebe o seu 401, e o corpo não vira tarefa."""
    proxy, worker = guarded
    conn = connect(proxy)
    piece = b"x" * 50000
    # O proxy pode responder e fechar antes do fim do corpo; a resposta ainda deve poder ser lida.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if coding == "length":
            conn.request("POST", "/", body=piece * 100)
        else:
            conn.request("POST", "/", [("Transfer-Encoding", "chunked")])
            for _ in range(100):
                conn.send(b"%X\r\n%s\r\n" % (len(piece), piece))
            conn.send(b"0\r\n\r\n")
    refused(conn.response())
    worker.idle()


announced = [("Content-Length", "5000000"), ("Transfer-Encoding", "chunked")]


def test_refusal_before_the_body(start_proxy, connect, worker):
    """O corpo de quem não traz o token nem é esperado pelo flask: o 401 vem antes dele, com o fechamento, e o log diz uma
    vez de quem era, visto através do proxy reverso. (O waitress lê o corpo antes.)"""
    proxy = start_proxy("--trust-proxy", "1", env={"AUTH_TOKEN": token})
    forwarded = [("X-Forwarded-For", "198.51.100.1"), ("X-Forwarded-For", "198.51.100.2, 192.0.2.7")]
    for size in announced:
        for headers in wrong_headers.values():
            given = list(headers.items() if isinstance(headers, dict) else headers)
            conn = connect(proxy).request("POST", "/x", [*given, *forwarded, size])
            refused(conn.response())
            conn.close()
    worker.idle()
    assert proxy.tasks() == []
    lines = [line for line in proxy.log().splitlines() if "AUTH_TOKEN" in line]
    assert len(lines) == 1 and lines[0].endswith("cliente=192.0.2.7"), lines


def test_body_read_before_the_refusal_is_bounded(share_proxy, connect, worker):
    """O waitress lê o corpo antes de ver o token, mas não o que passa de MAX_BODY, nem por mais que REQUEST_TIMEOUT."""
    proxy = share_proxy("--max-body", "1000", "--request-timeout", "1500", host="waitress", env={"AUTH_TOKEN": token})
    slow = connect(proxy).request("POST", "/x", {"Content-Length": "900"})
    assert connect(proxy).request("POST", "/x", body="x" * 1001).response().status in (401, 413)
    refused(connect(proxy).request("POST", "/x", body="x" * 1000).response())
    with contextlib.suppress(harness.broken, ConnectionResetError):
        assert slow.response().status == 408
    assert slow.at_end()
    worker.idle()


def test_refusal_instead_of_continue(share_proxy, connect, worker):
    """Quem pergunta ao flask se pode enviar o corpo e não traz o token recebe o 401 sem enviá-lo."""
    proxy = share_proxy(env={"AUTH_TOKEN": f"{token}, {other}"})
    conn = connect(proxy).request("POST", "/x", {"Expect": "100-continue", "Content-Length": "5000000"})
    refused(conn.response())
    worker.idle()


@pytest.mark.parametrize("coding", ["length", "chunked"])
def test_body_of_who_may_ask(coding, guarded, connect):
    """O corpo de quem traz o token é lido; e /ping e OPTIONS, que não o pedem, aceitam corpos."""
    proxy, worker = guarded
    body = "x" * 300000
    raw = body.encode()
    headers = {"Content-Length": str(len(raw))} if coding == "length" else {"Transfer-Encoding": "chunked"}
    raw = raw if coding == "length" else b"%X\r\n%s\r\n0\r\n\r\n" % (len(raw), raw)
    conn = connect(proxy).request("POST", "/x", headers | bearer(token))
    worker.idle()
    conn.send(raw)
    task = worker.next()
    assert task.info["body"] == body
    task.finish("ok")
    assert conn.response().lines() == [b"ok"]
    for method, target, status in (
        *(("POST", "/ping", 200), ("GET", "/ping?x", 200), ("OPTIONS", "/x", 204)),
        ("POST", "http://outro.test/ping", 200),
    ):
        conn = connect(proxy).request(method, target, headers)
        # Quem não precisa do corpo pode responder e fechar antes do fim dele.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            conn.send(raw)
        response = conn.response()
        assert (response.status, response.body()) == (status, b"pong" if status == 200 else b"")
    conn = connect(proxy).request("POST", "http://outro.test?/ping", headers)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        conn.send(raw)
    refused(conn.response())
    worker.idle()


sent = [
    *(("Authorization", f"Bearer {token}"), ("Cookie", "a=1"), ("X-Api-Key", "k")),
    *(("Proxy-Authorization", "p"), ("X-Outro", "o")),
]
every = {"host", *(name.lower() for name, _ in sent)}


@pytest.mark.parametrize(
    ("auth", "exclude", "hidden"),
    [
        ("", None, set()),
        ("", "", set()),
        ("", "Authorization", {"authorization"}),
        (token, None, {"authorization", "cookie"}),
        (token, "", {"authorization", "cookie"}),
        (token, "none", set()),
        (token, "Nenhum", set()),
        (token, "X-API-KEY, cookie  proxy-authorization,", {"x-api-key", "cookie", "proxy-authorization"}),
        ("", "x_api_key x-outr outro", {"x-api-key"}),
    ],
)
def test_excluded_headers(auth, exclude, hidden, start_proxy, connect, worker):
    """HEADERS_EXCLUDE: o que não vai para o Redis; com AUTH_TOKEN e sem lista, Authorization e Cookie."""
    env = {"AUTH_TOKEN": auth} | ({} if exclude is None else {"HEADERS_EXCLUDE": exclude})
    proxy = start_proxy(env=env)
    conn = connect(proxy).request("GET", "/", sent)
    task = worker.next()
    assert {name.lower() for name in task.info["headers"]} == every - hidden
    task.finish()
    assert conn.response().lines() == []


@pytest.mark.parametrize("value", [",", "  ", "tokén", "a\x01b"], ids=["vírgula", "espaços", "acento", "controle"])
def test_wrong_tokens(value):
    """Um AUTH_TOKEN sem token, ou que cliente algum poderia enviar, impede o início, e a frase não o mostra."""
    sentence = harness.refusal(env={"ENV_FILE": "/dev/null", "AUTH_TOKEN": value})
    assert sentence.startswith("erro: AUTH_TOKEN: o valor dado (ambiente) não é válido; ")
    assert value.strip(" ,") == "" or value not in sentence


@pytest.mark.parametrize("value", ["a:b", "none,cookie", "acentuação"])
def test_wrong_names(value):
    """Um HEADERS_EXCLUDE que não são nomes de cabeçalhos impede o início."""
    sentence = harness.refusal("--headers-exclude", value, env={"ENV_FILE": "/dev/null"})
    assert sentence.startswith("erro: HEADERS_EXCLUDE: ") and repr(value) in sentence


def test_check_shows_what_is_in_force(tmp_path, redis_main):
    """--check mostra a lista que vale, de onde ela vem, e asteriscos no lugar do token."""
    for text, expected in (
        ("", "HEADERS_EXCLUDE =   (padrão)"),
        (f"AUTH_TOKEN={token}\n", "HEADERS_EXCLUDE = authorization,cookie  (padrão com AUTH_TOKEN)"),
        (f"AUTH_TOKEN={token}\nHEADERS_EXCLUDE=none\n", f"HEADERS_EXCLUDE = none  (arquivo {tmp_path / 'prova.env'})"),
    ):
        (tmp_path / "prova.env").write_text(text)
        done = harness.run_proxy(
            "--check", "-p", "0", env={"ENV_FILE": str(tmp_path / "prova.env"), "REDIS_SERVER": redis_main.address}
        )
        assert (done.status, done.err) == (0, "")
        assert expected in done.out.splitlines()
        assert token not in done.out
        assert ("AUTH_TOKEN = ********" in done.out) == bool(text)


@pytest.mark.parametrize(
    "form", [["-S", "senha ção"], ["-Ssenha ção"], ["--secret=senha ção"]], ids=["-S", "-Svalor", "--secret="]
)
def test_secret_in_the_process_list(form, start_redis, start_proxy, connect):
    """Um segredo da linha de comando vale, e um aviso, que não o mostra, diz onde é o lugar dele."""
    server = start_redis(password="senha ção")
    # O acessório daria a senha pelo ambiente.
    server.password = ""
    try:
        proxy = start_proxy(*form, "--auth-token", other, redis=server)
        assert connect(proxy).request("GET", "/ping").response().body() == b"pong"
    finally:
        server.password = "senha ção"
    warnings = [line for line in proxy.log().splitlines() if line.startswith("aviso: ")]
    assert len(warnings) == 2, proxy.log()
    for warning, (name, flag) in zip(
        warnings, (("AUTH_TOKEN", "--auth-token"), ("REDIS_PASSWORD", "--secret")), strict=True
    ):
        assert name in warning and flag in warning and str(proxy.env["ENV_FILE"]) in warning
    assert "senha ção" not in proxy.log() and other not in proxy.log()
    refused(connect(proxy).request("POST", "/").response())


def test_redis_url_in_the_process_list(start_redis, start_proxy, connect):
    """Uma URL com senha em -R também é avisada; uma sem senha, não."""
    server = start_redis("user proxy on >segredo ~* &* +@all")
    proxy = start_proxy("-R", f"redis://proxy:segredo@{server.address}", redis=server)
    assert connect(proxy).request("GET", "/ping").response().body() == b"pong"
    assert len(re.findall(r"(?m)^aviso: REDIS_SERVER.*--redis", proxy.log())) == 1
    assert "proxy:segredo" not in proxy.log()
    quiet = start_proxy("-R", f"redis://{server.address}", redis=server)
    assert "aviso" not in quiet.log()
