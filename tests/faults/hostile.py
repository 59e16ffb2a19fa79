"""Gerador de pedidos hostis, por semente: o mesmo número dá sempre os mesmos bytes.

Cada espécie devolve os bytes. O que não é HTTP quem julga é o hospedeiro, e os dois podem discordar; as espécies de
refused, porém, nunca viram tarefa em nenhum.
"""

import random

# Texto de uma linha de log que o atacante gostaria de ver escrita como se fosse nossa.
forged = b"tarefa=00000000-0000-4000-8000-000000000000 cliente=6.6.6.6 metodo=GET caminho=/forjado fim=concluida"

# O que separa linhas para alguém: o protocolo, o terminal, o journald ou str.splitlines.
breaks = [
    *(b"\r\n", b"\n", b"\r", b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e", b"\x85", b"\xc2\x85"),
    *(b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"%0d%0a", b"%0a", b"\x1b[2K\x1b[1G", b"\x08" * 40, b"\x00"),
]

# Um pedido escondido no corpo de outro: nunca pode ser lido como pedido.
hidden = b"POST /escondido HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def head(line, *rows, close=True):
    """Monta um pedido sem corpo.

    Argumentos:
        line: a linha de requisição, sem CRLF.
        rows: os cabeçalhos, cada um sem CRLF.
        close: verdadeiro para pedir o fechamento ao fim.

    Retorno:
        Os bytes, até a linha em branco.
    """
    extra = [b"Connection: close"] if close else []
    return b"\r\n".join([line, b"Host: proxy.test", *extra, *rows]) + b"\r\n\r\n"


def post(*rows, target=b"/"):
    """Monta o cabeçalho de um POST. Argumentos: rows e o alvo. Retorno: os bytes."""
    return head(b"POST " + target + b" HTTP/1.1", *rows)


def noise(rng, low, high, alphabet=None):
    """Sorteia bytes.

    Argumentos:
        rng: o gerador.
        low, high: limites do tamanho.
        alphabet: bytes entre os quais sortear; omitido, todos.

    Retorno:
        Os bytes.
    """
    size = rng.randint(low, high)
    return rng.randbytes(size) if alphabet is None else bytes(rng.choices(alphabet, k=size))


def garbage_line(rng):
    """Uma linha de requisição que não é uma."""
    line = rng.choice(
        [
            *(b"LIXO", b"GET", b"GET /", b"/ HTTP/1.1", b"GET  HTTP/1.1", b"HTTP/1.1 200 OK", b"GET / a HTTP/1.1"),
            *(
                b"GET /\tHTTP/1.1",
                b"GET\t/\tHTTP/1.1",
                b" GET / HTTP/1.1",
                b"GET / HTTP/1.1 x",
                b"\x00",
                b"GET\x00/ HTTP/1.1",
            ),
            noise(rng, 1, 60, bytes(range(33, 127))),
            b" ".join(noise(rng, 1, 9, b"abcXYZ") for _ in range(rng.choice((1, 2, 4, 5)))),
        ]
    )
    return head(line)


def bad_version(rng):
    """Uma versão que não existe."""
    version = rng.choice(
        [
            *(b"HTTP/2.7", b"HTTP/2", b"HTTP/3.0", b"HTTP/9.9", b"HTTP/1.x", b"HTTP/", b"HTTP/1", b"http/1.1"),
            *(
                b"HTTP/1.1.1",
                b"HTTP/-1.1",
                b"HTTP/+1.1",
                b"HTTP/1.1\x00",
                b"HTTP/1,1",
                b"HTCPCP/1.0",
                b"1.1",
                b"HTTP/1.\xb2",
            ),
            *(b"HTTP/0.9", b"HTTP/ 1.1", b"HTTP/99999999999999999999.1", b"HTTP/1_1.0", b"HTTP/1." + b"1" * 40),
        ]
    )
    return head(b"GET / " + version)


def bad_method(rng):
    """Um método que não é atendido ou nem é um nome."""
    method = rng.choice(
        [
            *(b"G@T", b"GE(T)", b"G\xc9T", b"GET\x00", b"TRACE", b"CONNECT", b"PROPFIND", b"A" * 5000),
            *(b"QUERY", b"__init__", b"run_wsgi", b"GET:", b'"GET"', b"{}", b"GET/", noise(rng, 1, 9, b"abcdefghij")),
        ]
    )
    return head(method + b" / HTTP/1.1")


def odd_target(rng):
    """Um alvo estranho."""
    target = rng.choice(
        [
            *(
                b"*",
                b"x",
                b"//",
                b"/../../etc/passwd",
                b"/%",
                b"/%zz",
                b"/%00",
                b"http://",
                b"http://[::1/",
                b"http://x:y/",
            ),
            *(
                b"/\x01\x02",
                b"/\x7f",
                b"/a\x00b",
                b"\\x",
                b"/#x",
                b"?x",
                b"/" + b"%0d%0a" * 20 + forged.replace(b" ", b"%20"),
            ),
            *(b"ftp://x/y", b"javascript:alert(1)", b"/" + noise(rng, 1, 40, bytes(range(128, 256))), b"http://\xff/"),
            *(b"://", b"/?" + b"&" * 5000, b"/" + b"a" * 60000, b"///ping", b"/ping/", b"[::]", b"http://[/"),
        ]
    )
    return head(b"GET " + target + b" HTTP/1.1")


def long_line(rng):
    """Uma linha de requisição acima de 64 KiB."""
    size = rng.choice((65537, 70000, 131072, 300000, 1000000))
    return head(b"GET /" + b"a" * size + b" HTTP/1.1")


def header_flood(rng):
    """Cabeçalhos demais."""
    return post(*[b"X-%d: a" % number for number in range(rng.choice((101, 150, 500, 3000, 20000)))])


def header_bytes(rng):
    """Cabeçalhos de mais de 64 KiB ao todo: um só, ou muitos de tamanho comum."""
    size = rng.choice((70000, 131072, 262144, 1000000))
    if rng.random() < 0.5:
        return post(b"X: " + b"a" * size)
    return post(*[b"X-%d: " % number + b"a" * (size // 90) for number in range(90)])


def broken_header(rng):
    """Um cabeçalho que a RFC 9112 manda recusar."""
    row = rng.choice(
        [
            *(
                b"lixo",
                b": vazio",
                b"X : a",
                b"X\t: a",
                b"X Y: a",
                b"X(a): b",
                b"X\x00: a",
                b"\x00: a",
                b"X\xc7: a",
                b"X@: a",
            ),
            *(b"Content-Length : 5", b"Transfer-Encoding : chunked", b"=", b"{}", b"X\x0b: a", b'"X": a', b"X/Y: a"),
        ]
    )
    rows = [b"X-A: a", row, b"X-B: b"]
    rng.shuffle(rows)
    return post(*rows)


def dirty_value(rng):
    """Um valor com NUL, CR ou LF soltos, ou dobrado: recusado, ou entregue sem eles (RFC 9110, 5.5)."""
    value = rng.choice(
        (
            b"a\x00b",
            b"a\rb",
            b"a\nb",
            b"a\r\n b",
            b"a\r\n\tX-Injected: b",
            b"a\rX-Injected: b",
            b"\x00",
            b"a\n X-Injected: b",
        )
    )
    name = rng.choice((b"X", b"User-Agent", b"Accept", b"Origin", b"Cookie", b"Content-Type"))
    return post(name + b": " + value)


def bad_length(rng):
    """Um Content-Length inválido, ambíguo ou absurdo."""
    value = rng.choice(
        [
            *(
                b"-1",
                b"-5",
                b"+5",
                b"5.0",
                b"0x5",
                b"5_0",
                b"1e1",
                b"abc",
                b"5,6",
                b"5, 6",
                b"5 5",
                b"5;",
                b"5\x00",
                b"\xb2",
            ),
            *(
                b"9" * 30,
                b"9" * 5000,
                b"99999999999",
                b"18446744073709551616",
                b"\xd9\xa5",
                b"5\x0b",
                b"NaN",
                b"Infinity",
            ),
        ]
    )
    rows = [b"Content-Length: " + value]
    if rng.random() < 0.3:
        rows = [b"Content-Length: 5", b"Content-Length: " + rng.choice((b"6", b"0", b"50", b"05", b"-5"))]
        rng.shuffle(rows)
    return post(*rows) + b"abcde"


def odd_length(rng):
    """Um Content-Length repetido com o mesmo valor ou vazio: a RFC deixa recusar ou aceitar."""
    rows = rng.choice(
        ([b"Content-Length: 5"] * 2, [b"Content-Length: 5, 5"], [b"Content-Length:"], [b"Content-Length:  5 "])
    )
    return post(*rows) + b"abcde"


def bad_coding(rng):
    """Um Transfer-Encoding que não é só chunked."""
    value = rng.choice(
        [
            *(
                b"gzip",
                b"identity",
                b"chunked, chunked",
                b"chunked, gzip",
                b"gzip, chunked",
                b"xchunked",
                b"chunked\x0b",
            ),
            *(
                b"chunked\x00",
                b"chunkedx",
                b"\x85chunked",
                b'"chunked"',
                b"chunked;q=1",
                b"deflate",
                b"CHUNKED chunked",
            ),
        ]
    )
    return post(b"Transfer-Encoding: " + value) + b"5\r\nabcde\r\n0\r\n\r\n"


def both_lengths(rng):
    """Transfer-Encoding e Content-Length no mesmo pedido, com outro escondido onde um dos dois acabaria."""
    rows = [b"Transfer-Encoding: " + rng.choice((b"chunked", b"Chunked", b" chunked", b"\tchunked", b"x"))]
    rows.append(b"Content-Length: " + rng.choice((b"0", b"4", b"5", b"%d" % (5 + len(hidden)))))
    rng.shuffle(rows)
    return post(*rows) + rng.choice((b"0\r\n\r\n", b"5\r\nabcde\r\n0\r\n\r\n")) + hidden


def old_chunked(rng):
    """Chunked num HTTP/1.0, que não o conhece."""
    return head(b"POST / HTTP/1.0", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + hidden


def bad_chunk(rng):
    """Um corpo em pedaços com um pedaço inválido."""
    size = rng.choice(
        (b"zz", b"-1", b"0x5", b"+5", b"5_0", b"", b" ", b"5 5", b"f" * 17, b"1" * 5000, b"\x00", b"5\x00", b"\xb2")
    )
    body = rng.choice(
        (size + b"\r\nabcde\r\n0\r\n\r\n", b"5\r\nabcde\r\n" + size + b"\r\n\r\n", b"5\r\nabcdeXX0\r\n\r\n")
    )
    return post(b"Transfer-Encoding: chunked") + body


def odd_chunk(rng):
    """Um corpo em pedaços com extensões e trailers, que a RFC manda ignorar, em doses ruins."""
    extra = b";" + noise(rng, 1, 2000, b'abc=;"\\ ')
    trailer = rng.choice(
        (b"", b"X: a\r\n", b"X: a\r\n" * 2000, b"X: " + b"a" * 100000 + b"\r\n", b"Content-Length: 9\r\n")
    )
    return post(b"Transfer-Encoding: chunked") + b"5" + extra + b"\r\nabcde\r\n0\r\n" + trailer + b"\r\n"


def cut_short(rng):
    """Um pedido válido interrompido em qualquer byte: quem não terminou de pedir não pediu nada."""
    body = b"x" * rng.choice((0, 5, 200))
    whole = post(b"Content-Length: %d" % len(body), b"X-A: a") + body
    if rng.random() < 0.4:
        whole = post(b"Transfer-Encoding: chunked", b"X-A: a") + b"5\r\nabcde\r\n0\r\n\r\n"
    return whole[: rng.randrange(1, len(whole))]


def mutated(rng):
    """Um pedido válido com alguns bytes trocados, tirados, postos ou repetidos."""
    body = b'{"prompt": "ol\xc3\xa1"}'
    whole = bytearray(post(b"Content-Length: %d" % len(body), b"Content-Type: application/json", b"X-A: a") + body)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(whole))
        act = rng.randrange(4)
        if act == 0:
            whole[place] = rng.choice((0, 9, 10, 13, 32, 58, 127, 255, rng.randrange(256)))
        elif act == 1:
            del whole[place : place + rng.randint(1, 8)]
        elif act == 2:
            whole[place:place] = rng.choice((b"\r\n", b"\n", b"\x00", b" ", b":", b"\r\n\r\n", noise(rng, 1, 20)))
        else:
            whole[place:place] = whole[place : place + rng.randint(1, 60)]
        if not whole:
            return b"\x00"
    return bytes(whole)


def line_breaks(rng):
    """Quebras de linha em cada lugar em que a entrada chega a um cabeçalho, à tarefa ou ao log."""
    attack = rng.choice(breaks) + rng.choice(
        (forged, b"X-Injected: 1", b"Set-Cookie: a=b", b"pronto: http://6.6.6.6:1 (flask)")
    )
    place = rng.randrange(7)
    if place == 0:
        return head(b"GET /" + attack.replace(b" ", rng.choice((b"%20", b"\xc2\xa0", b"+"))) + b" HTTP/1.1")
    if place == 1:
        return head(b"GET /?q=" + attack.replace(b" ", b"%20") + b" HTTP/1.1")
    if place == 2:
        return head(
            b"OPTIONS / HTTP/1.1",
            b"Origin: https://a.test",
            b"Access-Control-Request-Method: POST",
            b"Access-Control-Request-Headers: x" + attack,
        )
    if place == 3:
        return head(b"GET" + attack.replace(b" ", b"_") + b" / HTTP/1.1")
    name = (b"Origin", b"X-Forwarded-For", b"Accept")[place - 4]
    return head(b"GET / HTTP/1.1", name + b": a" + attack)


def pipelined(rng):
    """Lixo, ou outro pedido, logo depois de um pedido inteiro."""
    return post(b"Content-Length: 5") + b"abcde" + rng.choice((b"\r\n", noise(rng, 1, 200), hidden, b"\x00" * 50))


def bad_host(rng):
    """HTTP/1.1 sem Host, com dois, ou com um que não é nome."""
    rows = rng.choice(
        ([], [b"Host: a", b"Host: b"], [b"Host: a", b"Host: a"], [b"Host: a b"], [b"Host: a/b"], [b"Host: a\x00"])
    )
    return b"\r\n".join([b"GET / HTTP/1.1", *rows, b"Connection: close"]) + b"\r\n\r\n"


def other_protocol(rng):
    """Quem fala outra língua."""
    return rng.choice(
        [
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise(rng, 100, 500),
            *(
                b"SSH-2.0-OpenSSH_9.9\r\n",
                b"EHLO x\r\n",
                b"*1\r\n$4\r\nPING\r\n",
                b"\x00" * 100,
                b"\r\n" * 50,
                b"\n",
                b"\xff" * 3000,
            ),
            noise(rng, 1, 4000),
        ]
    )


def expectation(rng):
    """Expect e Upgrade com o resto do pedido em ordem ou não."""
    rows = rng.choice(
        (
            [b"Expect: 100-continue", b"Content-Length: -1"],
            [b"Expect: 100-continue", b"Content-Length: 99999999999"],
            [b"Expect: milagre", b"Content-Length: x"],
            [b"Expect: 100-continue", b"Transfer-Encoding: gzip"],
        )
    )
    return post(*rows, b"Upgrade: h2c")


kinds = [
    *(garbage_line, bad_version, bad_method, odd_target, long_line, header_flood, header_bytes, broken_header),
    *(dirty_value, bad_length, odd_length, bad_coding, both_lengths, old_chunked, bad_chunk, odd_chunk, cut_short),
    *(mutated, mutated, line_breaks, line_breaks, pipelined, bad_host, other_protocol, expectation),
]


# O que não acabou de chegar, e o método que não se atende.
refused = {cut_short.__name__, bad_method.__name__}


def requests(seed, count):
    """Gera pedidos hostis, um de cada espécie por vez.

    Argumentos:
        seed: a semente (int).
        count: quantos.

    Retorno:
        Iterador de (rótulo, bytes).
    """
    for number in range(count):
        kind = kinds[number % len(kinds)]
        payload = kind(random.Random(f"{seed}-{number}"))
        yield f"{kind.__name__}-{seed}-{number}", payload
