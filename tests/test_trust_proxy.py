"""TRUST_PROXY: de quem é o endereço que o worker e o log recebem, e o que um cliente não consegue forjar."""

import pytest

import harness
import support

module = harness.load_program()
direct = "127.0.0.9"

# Elementos de X-Forwarded-For e o endereço que vale; None é o de quem se conectou.
elements = {
    "192.0.2.7": "192.0.2.7",
    "192.0.2.7:54321": "192.0.2.7",
    "  192.0.2.7\t": "192.0.2.7",
    "[192.0.2.7]:80": "192.0.2.7",
    "2001:db8::7": "2001:db8::7",
    "2001:DB8:0:0::7": "2001:db8::7",
    "[2001:db8::7]": "2001:db8::7",
    "[2001:db8::7]:443": "2001:db8::7",
    "::ffff:192.0.2.7": "192.0.2.7",
    "[::ffff:192.0.2.7]:80": "192.0.2.7",
    "fe80::7%eth0": "fe80::7",
    "fe80::7%x fim=concluida": "fe80::7",
    "": None,
    "unknown": None,
    "_oculto": None,
    "localhost": None,
    "192.0.2": None,
    "192.0.2.300": None,
    "192.0.2.07": None,
    "3221225991": None,
    "192.0.2.7 cliente=1.1.1.1": None,
    "192.0.2.7;1.1.1.1": None,
    "192.0.2.7:": None,
    "192.0.2.7:porta": None,
    "192.0.2.7:123456": None,
    "[2001:db8::7": None,
    "2001:db8::7]": None,
    "[2001:db8::7]x": None,
    "[]": None,
    "[]:80": None,
    "[[::1]]": None,
    '"192.0.2.7"': None,
    "for=192.0.2.7": None,
    "192.0.2.7/24": None,
    "fe80::7%": None,
    "１92.0.2.7": None,
    "9" * 5000: None,
    "[" * 5000: None,
}


def test_element():
    """Portas, colchetes e zonas saem; o que não é um endereço não vale."""
    assert {text: module.forwarded_address(text) for text in elements} == {
        text: address or "" for text, address in elements.items()
    }


# TRUST_PROXY, linhas do cabeçalho e o endereço que vale.
cases = {
    "desligado": (0, ["192.0.2.7"], None),
    "sem-cabeçalho": (1, [], None),
    "um": (1, ["192.0.2.7"], "192.0.2.7"),
    "o-último": (1, ["198.51.100.1, 192.0.2.7"], "192.0.2.7"),
    "o-penúltimo": (2, ["198.51.100.1,203.0.113.5, 192.0.2.7"], "203.0.113.5"),
    "menos-que-n": (3, ["203.0.113.5, 192.0.2.7"], "203.0.113.5"),
    "menos-que-16": (16, ["192.0.2.7:80"], "192.0.2.7"),
    "exatos-16": (16, [", ".join(f"192.0.2.{number}" for number in range(1, 17))], "192.0.2.1"),
    "mais-que-16": (16, [", ".join(f"192.0.2.{number}" for number in range(1, 19))], "192.0.2.3"),
    "várias-linhas": (2, ["198.51.100.1", "203.0.113.5", "192.0.2.7"], "203.0.113.5"),
    "várias-linhas-com-listas": (3, ["198.51.100.1, 203.0.113.5", "192.0.2.7, 192.0.2.8"], "203.0.113.5"),
    "inválido": (1, ["192.0.2.7, unknown"], None),
    # Um vazio conta como posição: pulá-lo daria a vez ao que o cliente escreveu.
    "vazio-no-fim": (1, ["192.0.2.7,"], None),
    "vazio-no-meio": (2, ["192.0.2.7,,198.51.100.1"], None),
    "vazio-antes": (1, [", 192.0.2.7"], "192.0.2.7"),
    "cabeçalho-vazio": (1, [""], None),
    "ipv6-com-porta": (1, ["[2001:db8::7]:5000"], "2001:db8::7"),
    "linha-forjada": (1, ["fe80::7%a fim=concluida tarefa=x"], "fe80::7"),
}


@pytest.mark.parametrize("hops", sorted({hops for hops, _, _ in cases.values()}))
def test_hops(hops, host, share_proxy, connect, worker):
    """remote_addr e cliente= são o endereço a tantas posições da direita, e o cabeçalho chega inteiro ao worker."""
    proxy = share_proxy("--trust-proxy", hops, host=host)
    tried = 0
    for name, (wanted, lines, expected) in cases.items():
        if wanted != hops:
            continue
        headers = [("X-Forwarded-For", line) for line in lines]
        # O que tem sublinhado não se passa pelo outro, nem o padrão novo, que ninguém leu.
        headers += [("X_Forwarded_For", "198.51.100.66"), ("Forwarded", "for=198.51.100.67")]
        conn = connect(proxy, source=direct).request("GET", "/", headers)
        task = worker.next()
        assert task.info["remote_addr"] == (expected or direct), name
        task.finish("ok")
        assert conn.response().lines() == [b"ok"]
        row = support.finished_row(proxy, task)
        assert (row["cliente"], row["fim"]) == (expected or direct, "concluida"), name
        given = {key.lower(): value for key, value in task.info["headers"].items()}.get("x-forwarded-for", "")
        assert given.replace(" ", "") == ",".join(lines).replace(" ", ""), name
        tried += 1
    assert tried
