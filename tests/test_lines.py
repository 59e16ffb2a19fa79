"""As regras das linhas, com hypothesis: um elemento da lista é uma linha, na ordem em que foi empurrado; o em branco, nenhuma."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest

import harness
import support

eof_words = (b"EOF", b"EOL", b"END-OF-FILE", b"END-OF-LIST")

# O que as regras tratam de modo especial, para que o acaso o encontre: quebras, fins de linha Unicode, UTF-8 partido
# ou proibido (sobrelongo, substituto), palavras de fim quase nuas.
special = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b"\x0b", b"\x0c", b"\x00", b" ", b"\xc2\x85", b"\xe2\x80\xa8", b"\xe2\x80\xa9"]
    + [b"\x85", b"\xc2", b"\xe2\x80", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf0\x9f\x98\x80", b"\xff"]
    + [b"EOF", b'"EOF"', b"EOL", b"END-OF-FILE", b"\\u2028", b"{}", b"data: "]
)


def is_blank(element):
    """Diz se um elemento, normalizado, está em branco. Argumentos: element, em bytes. Retorno: bool."""
    return not element.strip(b" \r\n")


elements = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace")),
    st.lists(st.one_of(special, st.binary(max_size=4)), max_size=8).map(b"".join),
).filter(lambda element: element.strip() not in eof_words and (element.strip() or is_blank(element)))

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(["\u2028", "\u2029", "\x85", "EOF", "\r\n"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


def expected_line(element):
    """Diz a linha que o contrato promete para um elemento.

    Argumentos:
        element: bytes, como o worker o empurrou.

    Retorno:
        Os bytes da linha.
    """
    text = element.replace(b"\r", b" ").replace(b"\n", b" ").decode("utf-8", "replace")
    return "".join(f"\\u{ord(c):04x}" if c in "\x85\u2028\u2029" else c for c in text).encode()


def exchange(connect, proxy, worker, pushed):
    """Empurra elementos e recebe o corpo inteiro.

    Argumentos:
        connect, worker: os acessórios de mesmo nome.
        proxy: o proxy.
        pushed: elementos, em bytes.

    Retorno:
        Lista das linhas recebidas.
    """
    response, task = support.open_stream(connect, proxy, worker)
    task.finish(*pushed)
    lines = response.lines()
    response.conn.close()
    return lines


@pytest.mark.parametrize(("pause", "most", "examples"), [(0, 120, 60), (1, 12, 30)], ids=["pause0", "pause1"])
def test_n_elements_are_n_lines(share_proxy, connect, worker, pause, most, examples):
    """n elementos de bytes quaisquer são n linhas, em ordem, normalizadas como o contrato diz; os em branco são pulados."""
    proxy = share_proxy("-P", pause)

    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(st.lists(elements, max_size=most))
    def check(pushed):
        """Confere uma lista. Argumentos: pushed, os elementos."""
        lines = exchange(connect, proxy, worker, pushed)
        assert lines == [expected_line(element) for element in pushed if not is_blank(element)]
        for line in lines:
            assert not set("\r\n\x85\u2028\u2029") & set(line.decode("utf-8"))

    check()


blanks = [b"", b" ", b"\r", b"\n", b"\r\n", b"  \n \r "]


@pytest.mark.parametrize("flags", [("-P", 0), ("-P", 1)], ids=["pause0", "pause1"])
def test_blank_elements_are_counted(share_proxy, connect, worker, flags):
    """O elemento em branco não é uma linha: nada sai no lugar dele, e o log diz quantos foram, depois de bytes=."""
    proxy = share_proxy(*flags)
    response, task = support.open_stream(connect, proxy, worker)
    task.finish(*blanks, "um", *blanks, "dois", b" ")
    assert response.lines() == [b"um", b"dois"]
    row = support.finished_row(proxy, task)
    assert (row["linhas"], row["bytes"], row["puladas"]) == ("2", "8", "13")
    assert list(row)[list(row).index("bytes") :][:3] == ["bytes", "puladas", "primeira_ms"]
    response, task = support.open_stream(connect, proxy, worker)
    task.push(*blanks)
    harness.eventually(lambda: not task.client.exists(task.list), 5, "elementos em branco retirados")
    task.finish()
    assert (response.lines(), response.chunks) == ([], [])
    row = support.finished_row(proxy, task)
    assert (row["linhas"], row["bytes"], row["puladas"], row["primeira_ms"]) == ("0", "0", "6", "-")


def test_json_stays_equal(share_proxy, connect, worker):
    """JSON válido continua igual para json.loads, com ou sem indentação, com ou sem escapes."""
    proxy = share_proxy("-P", 0)

    @hypothesis.settings(max_examples=50)
    @hypothesis.given(st.lists(st.tuples(values, st.sampled_from([None, 2]), st.booleans()), max_size=60))
    def check(rows):
        """Confere uma lista. Argumentos: rows, valores e o modo de escrever cada um."""
        texts = [json.dumps(value, indent=indent, ensure_ascii=plain) for value, indent, plain in rows]
        lines = exchange(connect, proxy, worker, [text.encode() for text in texts])
        assert [json.loads(line) for line in lines] == [value for value, _, _ in rows]

    check()


def test_numbers_and_spaces_are_untouched(share_proxy, connect, worker):
    """O texto não é relido nem reescrito: dígitos, ordem, chaves repetidas, espaços e escapes ficam como vieram."""
    pushed = [
        b"1.10",
        b"12345678901234567890.1234567890123456789e-400",
        b'{"b":1,  "a" :2,"b":3 }',
        b"  espa\xc3\xa7os \t ",
        b'"\\u00e7\\/\\ud83d\\ude00"',
        b"data: x",
        b"0\r\n\r\n",
        "\ufeff{}".encode(),
    ]
    lines = exchange(connect, share_proxy(), worker, pushed)
    assert lines == [element.replace(b"\r", b" ").replace(b"\n", b" ") for element in pushed]


def test_worked_examples(share_proxy, connect, worker):
    """Os exemplos do contrato, um a um."""
    pairs = {
        b'{\r\n "a": 1\n}': b'{   "a": 1 }',
        b"a\nb\n": b"a b ",
        "a\u0085b\u2028c\u2029d".encode(): b"a\\u0085b\\u2028c\\u2029d",
        b"a\xffb\xe2\x80": "a\ufffdb\ufffd".encode(),
        b"\x00\x01": b"\x00\x01",
        b'"EOF"': b'"EOF"',
    }
    lines = exchange(connect, share_proxy(), worker, [b" ", *pairs, b"", b"\n"])
    assert lines == list(pairs.values())
