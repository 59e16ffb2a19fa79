"""O Chromium do sistema, guiado pelo playwright, e um servidor de arquivos para dar às páginas outra origem."""

import contextlib
import shutil
import sys

import playwright.sync_api

import harness

# Debian e Ubuntu o chamam assim; nos outros sistemas há mais nomes.
names = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# Prazo, em milissegundos, do que se espera de uma página.
patience = 15000


def chromium():
    """Acha o Chromium.

    Retorno:
        O caminho do executável (str). Sem nenhum, AssertionError.
    """
    found = next(filter(None, map(shutil.which, names)), None)
    assert found, f"não há Chromium no PATH ({', '.join(names)})"
    return found


@contextlib.contextmanager
def open_browser():
    """Abre um Chromium sem tela e o fecha no fim. Ele não leva a marca das provas: pode viver mais que uma.

    Retorno:
        Gera um playwright.sync_api.Browser.
    """
    with playwright.sync_api.sync_playwright() as driver:
        env = {name: value for name, value in harness.base_environment().items() if name != harness.mark_name}
        browser = driver.chromium.launch(executable_path=chromium(), env=env)
        try:
            yield browser
        finally:
            browser.close()


class file_site(harness.background):
    """Um servidor HTTP de arquivos, numa porta própria: outra origem que não a do proxy."""

    def __init__(self, folder, root):
        """Prepara o servidor, sem iniciá-lo.

        Argumentos:
            folder: pasta para a saída do processo.
            root: pasta servida.
        """
        super().__init__(folder, "servidor de arquivos")
        self.port = harness.free_port()
        self.origin = f"http://127.0.0.1:{self.port}"
        self.root = root

    def start(self):
        """Inicia o servidor e espera que ele escute.

        Retorno:
            O próprio servidor.
        """
        where = ["--bind", "127.0.0.1", "--directory", str(self.root), str(self.port)]
        self.spawn([sys.executable, "-m", "http.server", *where], harness.base_environment())
        harness.eventually(lambda: harness.accepts(self.port), 10, "o servidor de arquivos escutar")
        return self

    def stop(self):
        """Encerra o servidor."""
        self.kill()


def expect(place):
    """Atalho para as esperas do playwright, com o prazo daqui.

    Argumentos:
        place: a página ou o Locator.

    Retorno:
        O objeto de asserções.
    """
    playwright.sync_api.expect.set_options(timeout=patience)
    return playwright.sync_api.expect(place)
