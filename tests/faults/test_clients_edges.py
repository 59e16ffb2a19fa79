"""As bordas do HTTP: os dois hospedeiros respondem o mesmo ao mesmo pedido.

Os limites são um só nos dois: 64 KiB de linha de requisição, 64 KiB e 100 cabeçalhos."""

import contextlib
import re
import socket

import pytest

import harness
import peers

limit = 65536
codes = {
    400: "bad_request",
    405: "method_not_allowed",
    414: "uri_too_long",
    431: "headers_too_large",
    501: "not_implemented",
    505: "version_not_supported",
}


def get(*rows, target=b"/", version=b"HTTP/1.1", host=b"Host: proxy.test"):
    """Monta um GET. Argumentos: rows, os cabeçalhos; o alvo, a versão e a linha de Host. Retorno: os bytes."""
    rows = [b" ".join(part for part in (b"GET", target, version) if part), *([host] if host else []), *rows]
    return b"\r\n".join(rows) + b"\r\n\r\n"


def named(method):
    """Monta um pedido com outro método. Argumentos: method, em bytes. Retorno: os bytes."""
    return method + get()[3:]


def post(*rows, body=b""):
    """Monta um POST. Argumentos: rows, os cabeçalhos, e o corpo. Retorno: os bytes."""
    return b"POST" + get(*rows)[3:] + body


def many(count):
    """Monta um GET com um número exato de cabeçalhos, com o Host. Argumentos: count. Retorno: os bytes."""
    return get(*[b"X-%d: a" % number for number in range(count - 1)])


def fat(size, pieces):
    """Monta um GET com cabeçalhos de um tamanho total. Argumentos: size e pieces, em quantos. Retorno: os bytes."""
    return get(*[b"X-%d: " % number + b"a" * (size // pieces) for number in range(pieces)])


# Caso: (nome, pedido, status). O status 200 é o de um streaming de verdade.
edges = [
    ("linha-60k", get(target=b"/" + b"a" * 60000), 200),
    ("linha-70k", get(target=b"/" + b"a" * 70000), 414),
    ("linha-70k-consulta", get(target=b"/?" + b"a" * 70000), 414),
    ("linha-1M", get(target=b"/" + b"a" * 1000000), 414),
    ("100-headers", many(100), 200),
    ("101-headers", many(101), 431),
    ("150-headers", many(150), 431),
    ("20000-headers", many(20000), 431),
    ("headers-60k-um", fat(60000, 1), 200),
    ("headers-60k-muitos", fat(60000, 60), 200),
    ("headers-70k-um", fat(70000, 1), 431),
    ("headers-70k-muitos", fat(70000, 60), 431),
    ("headers-1M", fat(1000000, 1), 431),
    ("get-minúsculo", named(b"get"), 405),
    ("post-misto", named(b"Post"), 405),
    ("trace", named(b"TRACE"), 405),
    ("query", named(b"QUERY"), 405),
    ("connect", b"CONNECT proxy.test:80 HTTP/1.1\r\nHost: proxy.test\r\n\r\n", 405),
    ("método-arroba", named(b"G@T"), 400),
    ("método-parênteses", named(b"GE(T)"), 400),
    ("método-acento", named(b"G\xc9T"), 400),
    ("método-nul", named(b"GET\x00"), 400),
    ("versão-2.7", get(version=b"HTTP/2.7"), 505),
    ("versão-3.0", get(version=b"HTTP/3.0"), 505),
    ("versão-0.9", get(version=b"HTTP/0.9"), 505),
    ("prefácio-http2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ("sem-versão", get(version=b""), 400),
    ("versão-letra", get(version=b"HTTP/1.x"), 400),
    ("versão-minúscula", get(version=b"http/1.1"), 400),
    ("versão-longa", get(version=b"HTTP/1.1.1"), 400),
    ("tabulação-na-linha", get(target=b"/\tx"), 400),
    ("dois-espaços", b"GET  / HTTP/1.1\r\nHost: proxy.test\r\n\r\n", 400),
    ("espaço-no-início", b" " + get(), 400),
    ("crlf-no-início", b"\r\n" + get(), 200),
    ("sem-host", get(host=b""), 400),
    ("sem-host-1.0", get(host=b"", version=b"HTTP/1.0"), 200),
    ("host-vazio", get(host=b"Host:"), 200),
    ("dois-hosts", get(b"Host: outro.test"), 400),
    ("dois-hosts-iguais", get(b"Host: proxy.test"), 400),
    ("host-com-barra", get(host=b"Host: a/b"), 400),
    ("host-com-espaço", get(host=b"Host: a b"), 400),
    ("alvo-sem-barra", get(target=b"x"), 400),
    ("alvo-asterisco", get(target=b"*"), 400),
    ("alvo-ipv6-aberto", get(target=b"http://[::1/"), 400),
    ("alvo-nul", get(target=b"/a\x00b"), 400),
    ("valor-nul", get(b"X: a\x00b"), 400),
    ("valor-cr", get(b"X: a\rb"), 400),
    ("valor-lf", get(b"X: a\nb"), 400),
    ("valor-dobrado", get(b"X: a\r\n b"), 400),
    ("primeiro-dobrado", get(host=b" Host: proxy.test"), 400),
    ("nome-vazio", get(b": a"), 400),
    ("nome-com-espaço", get(b"X : a"), 400),
    ("nome-com-nul", get(b"X\x00: a"), 400),
    ("nome-com-acento", get(b"X\xc7: a"), 400),
    ("sem-dois-pontos", get(b"lixo"), 400),
    ("só-lf", b"GET / HTTP/1.1\nHost: proxy.test\n\n", 400),
    ("dois-tamanhos-iguais", post(b"Content-Length: 2", b"Content-Length: 2", body=b"ab"), 400),
    ("tamanho-em-lista", post(b"Content-Length: 2, 2", body=b"ab"), 400),
    ("tamanho-vazio", post(b"Content-Length:", body=b""), 400),
    ("tamanho-e-pedaços", post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400),
    ("pedaços-em-1.0", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("codificação-vazia", post(b"Transfer-Encoding:", body=b"0\r\n\r\n"), 501),
    ("codificação-vazia-e-tamanho", post(b"Transfer-Encoding:", b"Content-Length: 2", body=b"ab"), 501),
    ("tamanho-e-codificação-vazia", post(b"Content-Length: 2", b"Transfer-Encoding: \t ", body=b"ab"), 501),
    ("codificação-vazia-em-1.0", b"POST / HTTP/1.0\r\nTransfer-Encoding:\r\n\r\n", 501),
    ("codificação-gzip", post(b"Transfer-Encoding: gzip", body=b"0\r\n\r\n"), 501),
    ("codificação-dupla", post(b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"), 501),
    ("codificação-suja", post(b"Transfer-Encoding: chunked\x0b", body=b"0\r\n\r\n"), 400),
    ("expect-desconhecido", get(b"Expect: milagre"), 200),
    ("upgrade", get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c"), 200),
]


@pytest.mark.parametrize(("name", "raw", "status"), edges, ids=[name for name, *_ in edges])
def test_edge(name, raw, status, shared_proxy, connect, worker):
    """Cada caso da tabela tem o seu status nos dois; o recusado vem em JSON, com fechamento, e nunca vira tarefa."""
    conn = connect(shared_proxy)
    # Recusado antes do fim, o envio pode falhar; a resposta ainda deve poder ser lida.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        conn.send(raw)
    response = conn.expect()
    if status == 200:
        task = worker.next()
        task.finish("ok")
        assert conn.response().status == 200
        assert conn.current.lines() == [b"ok"]
        return
    with contextlib.suppress(AssertionError):
        harness.eventually(lambda: conn.pump(0.05) and response.ended, 3)
    seen, response = response.status, response if response.ended else None
    # Um streaming que não devia existir espera pelo worker: encerrá-lo deixa limpo o que vem depois.
    for key in worker.client.keys("*"):
        worker.client.delete(key)
    assert seen == status, f"respondeu {seen}"
    assert response.json()["error"] == codes[status]
    assert response.header("Content-Type") == "application/json"
    assert response.header_all("Server") == ["py-ndjson-proxy"] and response.header("X-Author")
    assert (response.header("Allow") is not None) == (status == 405)
    # Um método que não se atende não estraga a conexão; o resto, sim.
    assert status == 405 or conn.at_end()
    worker.idle()


# O começo de um corpo em pedaços e o que o segue, sem fim. Um rodapé de muitas linhas, que o flask lê sem guardar, ele só
# recusa no prazo de REQUEST_TIMEOUT.
endless = {
    "tamanho": (b"", b"0"),
    "extensão": (b"1;", b"a"),
    "segundo-tamanho": (b"1\r\na\r\n", b"0"),
    "rodapé": (b"0\r\nX-Final: ", b"a"),
    "rodapé-de-muitas-linhas": (b"0\r\n", b"X-Final: a\r\n"),
}
storm = 32 * 2**20


@pytest.mark.parametrize("kind", endless)
def test_endless_chunk_line(kind, start_proxy, host, connect, worker):
    """A linha que abre um pedaço e o rodapé do corpo têm limite: passados 64 KiB, 400; e a memória não cresce com o que
    ainda chega."""
    start, rest = endless[kind]
    timeout = 500 if host == "flask" and kind == "rodapé-de-muitas-linhas" else 60000
    proxy = start_proxy("--request-timeout", timeout)
    peers.warm(proxy)
    before = peers.memory(proxy.pid)
    conn = connect(proxy).request("POST", "/", [("Transfer-Encoding", "chunked")])
    piece = (rest * limit)[:limit]
    # Recusado antes do fim, o envio pode falhar; a resposta ainda deve poder ser lida.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        conn.send(start + piece + piece)
    response = conn.response()
    if timeout == 60000:
        assert (response.status, response.json()["error"]) == (400, "bad_request")
    else:
        assert response.status in (400, 408), response.head
    assert response.header("Connection") == "close"
    with contextlib.suppress(OSError):
        for _ in range(storm // limit):
            conn.send(piece)
    grown = peers.memory(proxy.pid) - before
    assert grown < storm // 4096, f"{grown} KiB a mais"
    conn.close()
    worker.idle()


def test_options_asterisk(shared_proxy, connect, worker):
    """OPTIONS * é do servidor inteiro (RFC 9110, 9.3.7): 204 com Allow, sem tarefa."""
    response = connect(shared_proxy).request("OPTIONS", "*").response()
    assert response.status == 204
    assert "POST" in response.header("Allow")
    worker.idle()


def answer_to(proxy, payload):
    """Envia bytes crus e lê até o fim da conexão. Argumentos: o proxy e os bytes. Retorno: o que veio (bytes)."""
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as sock:
        sock.sendall(payload)
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                parts.append(part)
    return b"".join(parts)


def test_long_chunk_extension_is_one_line(start_proxy, host, worker):
    """Uma extensão de chunk vai até o fim da linha, por longa que seja: o que há nela não vira corpo, e o corpo falta."""
    proxy = start_proxy("--request-timeout", 500)
    head = b"POST / HTTP/1.1\r\nHost: proxy.test\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = answer_to(proxy, head + b"5;" + b"a" * 4094 + b"hello\r\n0\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] 40[08] ", answer), answer
    worker.idle()


@pytest.mark.parametrize("rows", [b"", b"Host: a\r\nHost: b\r\n", b"Host: a\r\nContent-Length: 9\r\n"], ids=["400", "dois", "408"])
def test_refused_head_has_no_body(start_proxy, host, rows):
    """O erro de um HEAD vem sem corpo (RFC 9110, 9.3.2), seja ele recusado antes ou durante a leitura."""
    proxy = start_proxy("--request-timeout", 500)
    answer = answer_to(proxy, b"HEAD / HTTP/1.1\r\n" + rows + b"Connection: close\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] (200|40[08]) ", answer), answer
    assert answer.endswith(b"\r\n\r\n") and answer.count(b"\r\n\r\n") == 1, answer


def test_blank_lines_are_no_request(start_proxy, host, worker):
    """Linhas em branco repetidas não seguram a conexão: uma só é tolerada antes de um pedido."""
    proxy = start_proxy("--request-timeout", 1000)
    assert answer_to(proxy, b"\r\n\r\n" * 3).split(b" ", 2)[1] == b"400"
    worker.idle()


def test_refused_client_that_is_already_gone(start_proxy, host, fetch):
    """Quem é recusado e já saiu não deixa traceback no log, nem custa uma thread."""
    proxy = start_proxy()
    for _ in range(60):
        with socket.create_connection(("127.0.0.1", proxy.port), 10) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.sendall(b"LIXO\r\n\r\n")
    assert fetch(proxy, "GET", "/ping").status == 200


def test_unread_request_has_what_waitress_assumes():
    """O waitress escreve no log o caminho de quem saiu: sem ele, a thread de uma requisição ilegível morria."""
    module = harness.load_program()
    unread = module.waitress_parser(module.waitress.adjustments.Adjustments())
    unread.received(b"LIXO\r\n\r\n")
    assert unread.completed and unread.error.code == 400
    assert (unread.path, unread.command) == ("", "")
