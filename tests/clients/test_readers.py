"""Leitores de verdade, de várias linguagens: os mesmos objetos, e o primeiro lido antes que o último seja empurrado."""

import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

import conftest
import harness

readers = pathlib.Path(__file__).resolve().parent / "readers"

# Cada leitor é uma linha do shell: {url} é o endereço; {go}, o programa de Go compilado. Escreve um objeto por linha.
commands = {
    "client.sh": f"{harness.root}/packaging/examples/client.sh {{url}} {{{{}}}}",
    "curl": "curl -sSN -d {{}} {url}",
    "curl-jq": "curl -sSN -d {{}} {url} | jq --unbuffered -c .",
    "wget": "wget -q -O - --post-data={{}} {url}",
    "requests": f"{sys.executable} {readers}/with_requests.py {{url}}",
    "httpx": f"{sys.executable} {readers}/with_httpx.py {{url}}",
    "aiohttp": f"{sys.executable} {readers}/with_aiohttp.py {{url}}",
    "urllib": f"{sys.executable} {readers}/with_urllib.py {{url}}",
    "node-fetch": f"node {readers}/fetch.mjs {{url}}",
    "npm-ndjson": f"node {readers}/ndjson.cjs {{url}}",
    "npm-can-ndjson-stream": f"node {readers}/can_ndjson_stream.cjs {{url}}",
    "php-curl": f"php {readers}/with_curl.php {{url}}",
    "php-fgets": f"php {readers}/with_fgets.php {{url}}",
    "perl": f"perl {readers}/reader.pl {{url}}",
    "go": "{go} {url}",
}

# Um de cada tipo de JSON, texto que engana quem separa linhas sem cuidado, e uma linha maior que os buffers.
values = [
    {"type": "begin"},
    {"type": "item", "content": "Ação, coração e 🙂"},
    {"text": 'quebra\nde linha, \u2028 separador, \u0085 NEL, \x00 nulo e "aspas" \\ barra'},
    [1, 2.5, -3e20, 0.1, True, False, None, {}, [], "", {"a": {"b": ["c"]}}],
    "um texto só",
    12345678901,
    {"grande": "çã" * 100000},
    {"fim": True},
]


@pytest.fixture(scope="session")
def go_reader():
    """Compila o leitor de Go, uma vez para cada versão dele e do compilador.

    Retorno:
        O caminho do programa (str).
    """
    source = readers / "reader.go"
    version = subprocess.run(["go", "version"], capture_output=True, check=True).stdout
    target = conftest.CLIENTS_CACHE / f"go-reader-{hashlib.sha256(source.read_bytes() + version).hexdigest()[:12]}"
    if not target.exists():
        made = target.with_name(f"{target.name}.{os.getpid()}")
        # A pasta de trabalho do compilador é a de sempre do usuário; nada é baixado.
        env = {**harness.base_environment(), "GOCACHE": str(conftest.CLIENTS_CACHE / "go-build"), "GOPROXY": "off"}
        done = subprocess.run(
            ["go", "build", "-o", str(made), str(source)], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        made.rename(target)
    return str(target)


class reader(harness.background):
    """Um leitor rodando, com os objetos que já escreveu."""

    def start(self, command, node_folder):
        """Inicia o leitor.

        Argumentos:
            command: a linha do shell.
            node_folder: pasta dos pacotes do npm.

        Retorno:
            O próprio leitor.
        """
        env = {**harness.base_environment(), "NODE_PATH": str(node_folder / "node_modules")}
        self.spawn(["sh", "-c", command], env)
        return self

    def objects(self):
        """Lê os objetos escritos até agora, os de linhas inteiras.

        Retorno:
            Lista de valores.
        """
        return [json.loads(line) for line in self.output().split("\n")[:-1]]


@pytest.mark.parametrize("name", list(commands))
def test_same_objects(name, host, shared_proxy, worker, tmp_path, node_folder, request):
    """Cada objeto é lido antes que o seguinte seja empurrado, e são todos os mesmos."""
    program = request.getfixturevalue("go_reader") if name == "go" else ""
    url = f"http://127.0.0.1:{shared_proxy.port}/leitor?nome={name}"
    reading = reader(tmp_path / "reader", name)
    reading.start(commands[name].format(url=shlex.quote(url), go=program), node_folder)
    try:
        task = worker.next(20)
        assert (task.info["method"], task.info["body"]) == ("POST", "{}")
        for number, value in enumerate(values, 1):
            task.push(json.dumps(value, ensure_ascii=False))
            harness.eventually(lambda n=number: len(reading.objects()) == n, 15, f"{name} ler a linha {number}")
        assert reading.alive()
        task.finish()
        assert reading.wait(15) == 0, reading.log()
        assert reading.objects() == values
    finally:
        reading.kill()


def test_many_lines_at_once(start_proxy, worker, tmp_path, node_folder, go_reader):
    """Milhares de linhas empurradas de uma vez, que chegam em pedaços quaisquer: cada leitor vê todas, em ordem."""
    proxy = start_proxy("--pause", "0")
    pushed = [{"n": number, "pad": "é" * (number % 97)} for number in range(3000)]
    lines = [json.dumps(value, ensure_ascii=False) for value in pushed]
    running = []
    try:
        for name, command in commands.items():
            url = f"http://127.0.0.1:{proxy.port}/{name}"
            reading = reader(tmp_path / name, name)
            running.append(reading.start(command.format(url=url, go=go_reader), node_folder))
        for _ in running:
            worker.next(20).finish(*lines)
        for reading in running:
            assert reading.wait(30) == 0, f"{reading.name}: {reading.log()}"
            assert reading.objects() == pushed, reading.name
    finally:
        for reading in running:
            reading.kill()


@pytest.mark.parametrize("name", ["requests", "aiohttp"])
def test_long_line(name, share_proxy, worker, tmp_path, node_folder):
    """Uma linha de 8 MB: o aiohttp só a lê com read_bufsize maior, e o requests, sem chunk_size, leva meio minuto."""
    proxy = share_proxy()
    reading = reader(tmp_path / "reader", name)
    reading.start(commands[name].format(url=f"http://127.0.0.1:{proxy.port}/"), node_folder)
    try:
        worker.next(20).finish(json.dumps("x" * 8000000))
        assert reading.wait(15) == 0, reading.log()
        assert reading.objects() == ["x" * 8000000]
    finally:
        reading.kill()
