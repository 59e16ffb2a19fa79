"""Tira o retrato de packaging/examples/chat.html: o proxy de verdade, o worker de exemplo com um answer() próprio.

    python tests/clients/screenshot.py [arquivo.png]

Sem argumento, refaz packaging/examples/chat.png: a página numa tela larga, no claro e no meio de uma resposta, e numa
tela estreita, no escuro.
"""

import base64
import contextlib
import importlib.util
import pathlib
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import redis

import browser
import harness

examples = harness.root / "packaging" / "examples"

# O que o worker responde; a barra vertical é uma pausa de quem está pensando.
answers = {
    "O que é NDJSON?": (
        "É JSON, um objeto por linha. |Quem lê não precisa esperar pelo fim do arquivo: cada quebra de linha "
        "fecha um objeto inteiro, pronto para usar.\n\n|Por isso serve tão bem para streaming."
    ),
    "E por que a resposta chega aos poucos?": (
        "Porque eu a produzo aos poucos. |Cada palavra minha é um RPUSH no Redis; o proxy tira a linha da lista "
        "e a manda a você no mesmo instante.\n\n||Está vendo os traços aqui embaixo? |São elas chegando."
    ),
}


def answer(task):
    """Responde a uma tarefa, no lugar da função de mesmo nome do worker de exemplo.

    Argumentos:
        task: dicionário da tarefa.

    Retorno:
        Gera os objetos de cada linha.
    """
    text = next(text for question, text in answers.items() if question in task["body"])
    yield {"type": "begin"}
    for word in text.replace("\n\n", "\n\n ").split(" "):
        time.sleep(0.45 * word.count("|") + 0.02 + 0.004 * len(word))
        plain = word.replace("|", "")
        yield {"type": "item", "content": plain if plain.endswith("\n") else plain + " "}
    yield {"type": "end"}


def load_worker():
    """Carrega o worker de exemplo com a resposta daqui.

    Retorno:
        O módulo.
    """
    spec = importlib.util.spec_from_file_location("example_worker", examples / "worker.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.answer = answer
    return module


@contextlib.contextmanager
def running():
    """Inicia Redis, worker e proxy, e os encerra no fim.

    Retorno:
        Gera o harness.proxy_process.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        server = harness.redis_server(folder / "redis").start()
        stack.callback(server.stop)
        worker = load_worker()
        link = redis.Redis(port=server.port, db=harness.default_db)
        stack.callback(link.close)
        thread = threading.Thread(target=worker.listen, args=(lambda: link,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(worker.stopping.set)
        env = {"HTTP_PORT": 0, "HTTP_HOST": "127.0.0.1", "REDIS_SERVER": server.address, "CORS_ORIGIN": "null"}
        proxy = harness.proxy_process(folder / "proxy", ["-f", "/dev/null"], env).start()
        stack.callback(proxy.stop)
        yield proxy


def open_page(program, proxy, scheme, width, height, narrow):
    """Abre a conversa numa tela.

    Argumentos:
        program: o Browser.
        proxy: o proxy.
        scheme: "light" ou "dark".
        width, height: tamanho da tela, em pixels da página.
        narrow: verdadeiro para a tela de um telefone.

    Retorno:
        A página.
    """
    page = program.new_page(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        device_scale_factor=2,
        is_mobile=narrow,
        has_touch=narrow,
    )
    page.goto((examples / "chat.html").as_uri() + f"?proxy=http://127.0.0.1:{proxy.port}/chat")
    page.locator("#lamp[data-state=up]").wait_for()
    return page


def talk(page, live):
    """Faz a conversa inteira.

    Argumentos:
        page: a página.
        live: verdadeiro para parar no meio da última resposta; falso para esperar o fim dela.
    """
    for number, question in enumerate(answers, 1):
        page.get_by_label("Mensagem").fill(question)
        page.keyboard.press("Enter")
        answer = page.locator(f".turn:nth-child({number}) .answer")
        if live and number == len(answers):
            answer.get_by_text("Está vendo os traços").wait_for()
        else:
            answer.and_(page.locator("[data-state=done]")).wait_for(timeout=60000)
    # O endereço da foto é o que se usa, não a porta sorteada desta vez.
    page.evaluate("address.value = default_address")


def compose(program, shots, target):
    """Põe os retratos lado a lado, sobre fundo transparente.

    Argumentos:
        program: o Browser.
        shots: pares (bytes do PNG, largura em pixels da página).
        target: arquivo de saída (pathlib.Path).
    """
    images = "".join(
        f'<img width="{width}" src="data:image/png;base64,{base64.b64encode(data).decode()}">' for data, width in shots
    )
    style = (
        "body { margin: 0; padding: 16px 24px 32px; width: max-content; display: flex; gap: 24px; align-items: start }"
        "img { border-radius: 12px; box-shadow: 0 0 0 1px #8886, 0 6px 20px #0003 }"
    )
    page = program.new_page(viewport={"width": 1400, "height": 900}, device_scale_factor=1.5)
    page.set_content(f"<!DOCTYPE html><style>{style}</style>{images}")
    page.evaluate("Promise.all([...document.images].map((image) => image.decode()))")
    page.locator("body").screenshot(path=target, omit_background=True)
    page.close()


def main(target):
    """Tira o retrato.

    Argumentos:
        target: arquivo de saída (pathlib.Path).
    """
    shots = []
    with running() as proxy, browser.open_browser() as program:
        for scheme, width, narrow in (("light", 920, False), ("dark", 390, True)):
            page = open_page(program, proxy, scheme, width, 800, narrow)
            talk(page, live=not narrow)
            shots.append((page.screenshot(animations="disabled"), width))
            # A que ficou pela metade termina antes de o worker sair.
            page.locator(".turn:last-child .answer[data-state=done]").wait_for()
            page.close()
        compose(program, shots, target)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else examples / "chat.png")
