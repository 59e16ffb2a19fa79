"""O que o programa diz a quem errou e a quem chegou na hora errada: frases certas, inteiras, e sem pedaço de segredo."""

import contextlib
import re
import signal
import socket
import threading
import time

import pytest

import harness
import support


@pytest.mark.parametrize("flag", ["--check", "--version", "--help"])
def test_argument_that_takes_no_value(flag):
    """Um valor onde não cabe e a falta de um onde se espera são duas frases diferentes."""
    assert re.search(r"[ /]" + flag + ": este argumento não leva valor$", harness.refusal(f"{flag}=1"))
    for given in ("-p", "--pause"):
        assert re.search(given + r".*: falta o valor do argumento", harness.refusal(given))


@pytest.mark.parametrize(
    "flags",
    [
        ["-S", "minha", "frase-oculta"],
        ["-Sminha", "frase-oculta"],
        ["--secret=minha", "frase-oculta", "-p", "80"],
        ["--secret", "minha", "--frase-oculta=x"],
        ["--auth-token", "um", "frase-oculta"],
        ["-R", "redis://:minha", "frase-oculta@127.0.0.1/1"],
    ],
)
def test_secret_with_spaces_and_no_quotes(flags):
    """O resto de um segredo sem aspas é um argumento desconhecido que não se mostra; a frase diz o que fazer."""
    text = harness.refusal(*flags)
    assert "oculta" not in text and "minha" not in text
    assert "argumento desconhecido" in text and "aspas" in text


def test_typing_error_beside_a_secret():
    """Um argumento mal escrito ao lado de um segredo ainda ganha o nome do mais parecido."""
    assert "--port" in harness.refusal("-S", "minha", "--prot=80")


def test_lists_of_words():
    """As palavras permitidas saem como se escrevem em português: a, b, c ou d."""
    table = {row.name: row for row in harness.load_program().settings}
    assert table["LOG_LEVEL"].kind.allowed == "debug, info, warning ou error"
    assert table["HTTP_SERVER"].kind.allowed == "flask ou waitress"


def test_settings_file_has_its_own_group():
    """O arquivo de configurações não é assunto do log: na ajuda, tem o seu próprio título."""
    text = harness.run_proxy("--help").out
    assert re.search(r"(?m)^Arquivo:\n  -f\b", text), text
    words = text.partition("\nLog:\n")[2].partition("\n\n")[0]
    assert "--log-level" in words and "--env-file" not in words, text


class holder(support.relay):
    """Intermediário que segura o primeiro pedido com um trecho dado, e tudo o que vem depois, até ser solto."""

    def __init__(self, port, needle):
        """Começa a repassar. Argumentos: port, a porta do Redis; needle, bytes procurados nos pedidos."""
        self.awaited = needle
        self.held, self.loose = threading.Event(), threading.Event()
        super().__init__(port)

    def forward(self, sock, other, is_request):
        """Repassa um trecho, quando pode. Argumentos: os de relay.forward."""
        if is_request and not self.held.is_set() and self.awaited in sock.recv(1 << 20, socket.MSG_PEEK):
            self.held.set()
            self.loose.wait(10)
        super().forward(sock, other, is_request)

    def close(self):
        """Solta o que segura e fecha."""
        self.loose.set()
        super().close()


def stop_amid_requests(start_proxy, connect, server):
    """Para um proxy com pedidos a caminho do Redis, e confere cada recusa.

    Com o proxy parado, os pedidos se juntam; solto, fazem juntos o PING, e o Redis se cala no primeiro PUBLISH: os que
    esperam por ele, a ordem de parar os alcança.

    Argumentos:
        start_proxy, connect: os acessórios.
        server: o harness.redis_server.

    Retorno:
        Quantos pedidos foram recusados (os outros começaram, ou nem foram aceitos).
    """
    # O PUBLISH de uma tarefa, e não o da prova que o proxy faz ao abrir a conexão.
    with contextlib.closing(holder(server.port, b"ndjson_jobs\r\n$48\r\n")) as middle:
        proxy = start_proxy("--drain", 0, env={"REDIS_SERVER": middle.address})
        proxy.freeze()
        crowd = [connect(proxy).request("POST", "/") for _ in range(60)]
        proxy.thaw()
        assert middle.held.wait(10)
        proxy.signal(signal.SIGTERM)
        proxy.wait_log("parando")
        # A ordem de parar segue essa linha; o Redis calado por 2 s seria dado por morto.
        time.sleep(0.3)
        middle.loose.set()
        caught = 0
        for conn in crowd:
            # Quem nem foi aceito antes da parada é cortado, ou fica sem resposta.
            with contextlib.suppress(ConnectionResetError, harness.broken):
                response = conn.response()
                if response.status == 503:
                    assert response.json()["error"] == "shutdown"
                    assert (response.header("Retry-After") or "").isdigit(), response.head
                    caught += 1
        assert proxy.wait() == 0
        return caught


def test_refused_while_stopping(start_proxy, host, connect, redis_main, db):
    """Um pedido apanhado pela parada já a caminho do Redis recebe 503, Retry-After e shutdown, e não deixa chaves."""
    # Quantos pedidos cabem na ida que é segura depende da sorte; às vezes, todos.
    caught = 0
    for _ in range(10):
        caught += stop_amid_requests(start_proxy, connect, redis_main)
        assert db.keys("*") == []
        if caught:
            break
    assert caught
