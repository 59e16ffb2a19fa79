"""Acessórios das provas com clientes e intermediários de verdade; os comuns estão em tests/conftest.py."""

import contextlib
import os
import pathlib
import signal
import subprocess

import pytest

import balancers
import browser
import harness

# Onde tests/clients/run deixou o que veio do npm e guarda o que se compila.
CLIENTS_CACHE = pathlib.Path(os.environ.get("CLIENTS_CACHE") or "/var/cache/py-ndjson-proxy")


@pytest.fixture
def node_folder():
    """Pasta em que o npm instalou os pacotes de tests/clients/package.json.

    Retorno:
        Um pathlib.Path.
    """
    folder = pathlib.Path(os.environ.get("CLIENTS_NODE", ""))
    assert (folder / "node_modules").is_dir(), "CLIENTS_NODE não aponta os pacotes do npm; use tests/clients/run"
    return folder


@pytest.fixture
def start_balancer(start_proxy, tmp_path):
    """Fábrica de intermediários: start_balancer(nome, proxy, timeout=None, edits={}). Encerrados antes dos proxies.

    Retorno:
        Função que devolve um balancers.balancer que já escuta.
    """
    running = []

    def start(name, proxy, **options):
        """Inicia um. Argumentos: name, o nome em balancers.kinds; proxy; options, as de balancer. Retorno: ele."""
        made = balancers.kinds[name](tmp_path / f"balancer-{len(running)}", proxy.port, **options)
        running.append(made)
        return made.start()

    yield start
    with contextlib.ExitStack() as stack:
        for made in running:
            stack.callback(made.stop)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Um certificado de site.test, feito pelo openssl, que é a sua própria autoridade; a chave está no mesmo arquivo.

    Retorno:
        Um pathlib.Path.
    """
    path = tmp_path_factory.mktemp("tls") / "site.pem"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=site.test"
    # O Python 3.13 em diante exige o que a RFC 5280 pede.
    extra = ("subjectAltName=DNS:site.test", "keyUsage=critical,digitalSignature,keyCertSign")
    asked = [word for text in extra for word in ("-addext", text)]
    command = [*words.split(), *asked, "-keyout", str(path), "-out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def resident_chromium():
    """Um Chromium para a sessão: abri-lo custa mais que a maioria das provas.

    Retorno:
        Um playwright.sync_api.Browser.
    """
    before = set(harness.marked_processes())
    with browser.open_browser() as program:
        harness.resident_pids.update(set(harness.marked_processes()) - before)
        yield program


@pytest.fixture
def chromium(resident_chromium, start_proxy):
    """O Chromium da sessão, sem nenhuma página: as abertas pela prova são fechadas antes dos proxies.

    Cada página tem o seu contexto, com memória, conexões e cookies próprios.

    Retorno:
        Um playwright.sync_api.Browser.
    """
    assert resident_chromium.contexts == []
    yield resident_chromium
    for context in resident_chromium.contexts:
        context.close()


@pytest.fixture
def serve_files(start_proxy, tmp_path):
    """Fábrica de servidores de arquivos: serve_files(pasta). Cada um é outra origem.

    Retorno:
        Função que devolve um browser.file_site.
    """
    with contextlib.ExitStack() as stack:

        def start(root):
            """Serve uma pasta. Argumentos: root, a pasta. Retorno: o browser.file_site."""
            site = browser.file_site(tmp_path / "site", root)
            stack.callback(site.stop)
            return site.start()

        yield start


class example_worker(harness.background):
    """Um worker de exemplo rodando."""

    def start(self, command, env):
        """Inicia o worker. Argumentos: command, a lista do comando; env, o ambiente dele. Retorno: o próprio."""
        self.spawn(command, {**harness.base_environment(), "ENV_FILE": os.devnull, **env})
        return self


@pytest.fixture
def start_example(redis_main, db, tmp_path):
    """Fábrica de workers de exemplo: start_example(comando, **ambiente). Ao fim, são encerrados e as posses, apagadas.

    Retorno:
        Função que devolve um example_worker já iniciado, no Redis da sessão se o ambiente não disser outro.
    """
    running = []

    def start(*command, **env):
        """Inicia um. Argumentos: command, o comando; env, o ambiente. Retorno: o example_worker."""
        made = example_worker(tmp_path / f"worker-{len(running)}", "worker")
        running.append(made)
        return made.start(list(map(str, command)), {"REDIS_SERVER": redis_main.address, **env})

    yield start
    for made in running:
        if made.alive():
            made.signal(signal.SIGTERM)
            made.wait()
    for key in db.keys("worker:claim:*"):
        db.delete(key)


@pytest.fixture
def examples():
    """Pasta dos exemplos.

    Retorno:
        Um pathlib.Path.
    """
    return harness.root / "packaging" / "examples"
