"""packaging/examples/client.sh: cada linha na hora, o tipo do corpo, e o que o seu status quer dizer."""

import contextlib
import signal
import subprocess

import pytest

import harness


class script(harness.background):
    """O client.sh rodando."""

    def start(self, examples, *words):
        """Inicia o programa.

        Argumentos:
            examples: pasta dos exemplos.
            words: argumentos dele.

        Retorno:
            O próprio.
        """
        self.spawn([str(examples / "client.sh"), *words], harness.base_environment())
        return self

    def lines(self):
        """Lista as linhas inteiras escritas até agora (lista de str)."""
        return self.output().split("\n")[:-1]


@pytest.fixture
def run_script(examples, tmp_path):
    """Fábrica de clientes: run_script(porta, texto). Encerrados no fim da prova.

    Retorno:
        Função que devolve um script já iniciado.
    """
    with contextlib.ExitStack() as stack:

        def run(port, text):
            """Inicia um. Argumentos: port, a do proxy; text, o que ele envia. Retorno: o script."""
            made = script(tmp_path / f"client-{port}-{len(list(tmp_path.iterdir()))}", "client.sh")
            stack.callback(made.kill)
            return made.start(examples, f"http://127.0.0.1:{port}/chat", text)

        yield run


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Olá, mundo", "text/plain; charset=utf-8"),
        ("@/etc/hostname", "text/plain; charset=utf-8"),
        ('{"chatInput": "Olá"}', "application/json"),
        ("[1, 2]", "application/json"),
    ],
)
def test_shows_each_line(text, kind, start_proxy, run_script, worker):
    """O texto chega ao worker como está, com o seu tipo, e cada linha aparece antes que a seguinte seja empurrada."""
    client = run_script(start_proxy().port, text)
    task = worker.next(15)
    assert (task.info["body"], task.info["headers"]["Content-Type"]) == (text, kind)
    assert task.info["headers"]["Accept"] == "application/x-ndjson"
    for number in range(3):
        task.push(f'{{"n": {number}}}')
        harness.eventually(lambda n=number: client.lines() == [f'{{"n": {i}}}' for i in range(n + 1)], 10, "a linha")
    task.finish('"ç"')
    assert client.wait() == 0, client.log()
    assert client.lines()[3:] == ['"ç"']


def test_status(start_proxy, run_script, worker):
    """Um corpo que chegou ao fim é 0, diga a última linha o que disser; um erro de HTTP, 22; a queda, outro número."""
    proxy = start_proxy("--max-streams", "1", "--maxtime", "1500")
    client = run_script(proxy.port, "demora")
    worker.next(15)
    full = run_script(proxy.port, "não cabe")
    assert full.wait() == 22
    assert '"error": "too_many_streams"' in full.output()
    assert client.wait() == 0
    assert client.lines() == ['{"error": "timeout"}']
    client = run_script(proxy.port, "morre")
    task = worker.next(15)
    task.push("1")
    harness.eventually(lambda: client.lines() == ["1"], 10, "a linha")
    proxy.expected_status = -signal.SIGKILL
    proxy.kill()
    assert client.wait() not in (0, 22)
    assert run_script(proxy.port, "ninguém").wait() == 7
    task.client.delete(*task.traces())


def test_usage(examples):
    """Sem os dois argumentos, diz como se usa e sai com 2."""
    done = subprocess.run([str(examples / "client.sh"), "só-um"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("uso: client.sh URL TEXTO")
