"""O widget de conversa do n8n, @n8n/chat do npm, num Chromium, com um worker que fala a forma em partes do n8n."""

import base64
import email
import email.policy
import json
import re
import shutil

import pytest

import browser
import harness

# As linhas que o guia manda pôr no proxy, na seção do widget.
guide = (harness.root / "packaging" / "doc" / "clientes.md").read_text(encoding="utf-8")
given = dict(re.findall(r"^(HEARTBEAT_LINE|MAXTIME_ERROR)=(.+)$", guide.partition("## O widget do n8n")[2], re.MULTILINE))

# Conta em `pings` os batimentos que a página leu; o que o widget recebe não muda.
watch_script = """
    window.pings = 0;
    const read = ReadableStreamDefaultReader.prototype.read;
    ReadableStreamDefaultReader.prototype.read = async function () {
        const got = await read.call(this);
        if (got.value === null || got.value?.type === "ping") pings++;
        return got;
    };
"""

page_text = """<!DOCTYPE html>
<html lang="pt-BR">
<meta charset="utf-8">
<title>widget</title>
<link rel="stylesheet" href="/chat/style.css">
<script type="module">
  import { createChat } from "/chat/chat.bundle.es.js";
  createChat({ webhookUrl: "http://127.0.0.1:PORT/webhook/chat", mode: "fullscreen", initialMessages: [], ...OPTIONS });
</script>
"""


@pytest.fixture
def open_widget(chromium, serve_files, node_folder, tmp_path):
    """Fábrica de páginas com o widget: open_widget(porta, **opções de createChat). Nenhuma pode ter erro de script.

    Retorno:
        Função que devolve a página já carregada.
    """
    folder = tmp_path / "www"
    shutil.copytree(node_folder / "node_modules" / "@n8n" / "chat" / "dist", folder / "chat")
    site = serve_files(folder)
    faults = []

    def start(port, **options):
        """Abre o widget. Argumentos: port, a do proxy; options, as de createChat. Retorno: a página."""
        chosen = {"enableStreaming": True, "loadPreviousSession": False, **options}
        text = page_text.replace("PORT", str(port)).replace("OPTIONS", json.dumps(chosen))
        (folder / "index.html").write_text(text, encoding="utf-8")
        page = chromium.new_page()
        page.set_default_timeout(browser.patience)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.add_init_script(watch_script)
        page.goto(site.origin)
        return page

    yield start
    assert faults == []


def say(page, text):
    """Escreve uma mensagem no widget e a envia.

    Argumentos:
        page: a página.
        text: a mensagem.
    """
    page.locator("[data-test-id=chat-input]").fill(text)
    # Enquanto a resposta anterior corre, o Enter não envia.
    browser.expect(page.locator(".chat-input-send-button")).to_be_enabled()
    page.locator("[data-test-id=chat-input]").press("Enter")


def chunk(kind, content=None, node="agente"):
    """Compõe uma parte como o n8n a manda.

    Argumentos:
        kind: begin, item, end ou error.
        content: o texto, se há.
        node: nome do nó que a produz.

    Retorno:
        A linha (str).
    """
    place = {"nodeId": f"id-{node}", "nodeName": node, "itemIndex": 0, "runIndex": 0, "timestamp": 1764000000000}
    whole = {"type": kind, **({} if content is None else {"content": content}), "metadata": place}
    return json.dumps(whole, ensure_ascii=False)


def bot(page):
    """Acha as mensagens do outro lado, sem a animação de quem digita.

    Argumentos:
        page: a página.

    Retorno:
        Um Locator.
    """
    return page.locator(".chat-message-from-bot:not(.chat-message-typing)")


def test_text_appears_progressively(start_proxy, open_widget, worker):
    """Cada parte aparece antes que a seguinte seja empurrada, e o campo volta a aceitar texto no fim."""
    proxy = start_proxy("--cors-origin", "*", "--heartbeat", "100")
    page = open_widget(proxy.port)
    say(page, "Olá, mundo")
    task = worker.next()
    sent = json.loads(task.info["body"])
    assert (sent["action"], sent["chatInput"]) == ("sendMessage", "Olá, mundo")
    assert task.info["path"] == "/webhook/chat"
    task.push(chunk("begin"))
    text = ""
    for word in ("Um", " dois", " três", " **quatro**", " cinco"):
        task.push(chunk("item", word))
        text += word.replace("*", "")
        browser.expect(bot(page)).to_have_text(text)
        browser.expect(page.locator(".chat-message-typing")).to_be_visible()
    task.finish(chunk("end"))
    browser.expect(page.locator(".chat-message-typing")).to_be_hidden()
    browser.expect(bot(page)).to_have_text("Um dois três quatro cinco")
    say(page, "De novo")
    task = worker.next()
    assert json.loads(task.info["body"])["sessionId"] == sent["sessionId"]
    task.finish(chunk("begin"), chunk("item", "Outra"), chunk("end"))
    browser.expect(bot(page)).to_have_text(["Um dois três quatro cinco", "Outra"])


def test_heartbeats_are_ignored(start_proxy, open_widget, worker):
    """O HEARTBEAT_LINE do guia não vira texto nem fim: nem antes da primeira parte, nem entre duas, nem depois."""
    page = open_widget(
        start_proxy("--cors-origin", "*", "--heartbeat", "50", "--heartbeat-line", given["HEARTBEAT_LINE"]).port
    )
    say(page, "Olá")
    task = worker.next()
    parts = [[chunk("begin")], [chunk("item", "Um")], [chunk("item", " dois"), chunk("end")]]
    for count, lines in enumerate(parts, 1):
        # A cada volta, mais três batimentos lidos.
        page.wait_for_function("count => pings >= count", arg=3 * count)
        browser.expect(page.locator(".chat-message-typing")).to_be_visible()
        task.push(*lines)
    browser.expect(bot(page)).to_have_text("Um dois")
    page.wait_for_function("pings >= 12")
    task.finish()
    browser.expect(page.locator(".chat-message-typing")).to_be_hidden()
    browser.expect(bot(page)).to_have_text("Um dois")


@pytest.mark.parametrize(("line", "shown"), [("null", "Error: Failed to receive response"), ("ping", "pingping")])
def test_trap_heartbeats(line, shown, start_proxy, open_widget, worker):
    """Armadilhas: um batimento null, que é JSON, derruba a leitura do widget; um que não é JSON aparece na conversa."""
    page = open_widget(start_proxy("--cors-origin", "*", "--heartbeat", "50", "--heartbeat-line", line).port)
    say(page, "Olá")
    task = worker.next()
    browser.expect(bot(page)).to_contain_text(shown)
    task.delete()


def test_two_nodes_are_two_messages(start_proxy, open_widget, worker):
    """Partes de dois nós, intercaladas, formam duas mensagens."""
    page = open_widget(start_proxy("--cors-origin", "*").port)
    say(page, "Olá")
    task = worker.next()
    for kind, content, node in (
        ("begin", None, "a"),
        ("item", "Da primeira", "a"),
        ("begin", None, "b"),
        ("item", "Da segunda", "b"),
        ("item", " de novo", "a"),
        ("end", None, "a"),
        ("end", None, "b"),
    ):
        task.push(chunk(kind, content, node))
    task.finish()
    browser.expect(bot(page)).to_have_text(["Da primeira de novo", "Da segunda"])


def test_previous_session(start_proxy, open_widget, worker):
    """loadPreviousSession: uma linha só, {"data": [...]}, e as mensagens antigas aparecem; a conversa é a mesma."""
    page = open_widget(start_proxy("--cors-origin", "*").port, loadPreviousSession=True)
    task = worker.next()
    asked = json.loads(task.info["body"])
    assert asked["action"] == "loadPreviousSession"
    history = [
        {"lc": 1, "type": "constructor", "id": ["langchain_core", "messages", kind], "kwargs": {"content": text}}
        for kind, text in (("HumanMessage", "Já falamos?"), ("AIMessage", "Sim, ontem."))
    ]
    # O n8n escreve JSON em várias linhas: o proxy as junta, e o corpo é um JSON só.
    task.finish(json.dumps({"data": history}, indent=2, ensure_ascii=False))
    browser.expect(page.locator(".chat-message-from-user")).to_have_text("Já falamos?")
    browser.expect(bot(page)).to_have_text("Sim, ontem.")
    say(page, "Continue")
    task = worker.next()
    assert json.loads(task.info["body"])["sessionId"] == asked["sessionId"]
    task.finish(chunk("begin"), chunk("item", "Pois não."), chunk("end"))
    browser.expect(bot(page)).to_have_text(["Sim, ontem.", "Pois não."])


def test_trap_heartbeat_before_the_history(start_proxy, open_widget, worker):
    """Armadilha: o histórico é lido como um JSON só; um batimento antes dele o perde, e a conversa começa vazia."""
    page = open_widget(start_proxy("--cors-origin", "*", "--heartbeat", "50").port, loadPreviousSession=True)
    task = worker.next()
    # O batimento é de 50 ms; com um segundo de página, algum já chegou.
    harness.eventually(lambda: page.evaluate("performance.now()") > 1000, 10, "um segundo de página")
    # Até o histórico vir, não há onde escrever.
    browser.expect(page.locator("[data-test-id=chat-input]")).to_be_hidden()
    task.finish(json.dumps({"data": [{"id": ["AIMessage"], "kwargs": {"content": "perdida"}}]}))
    say(page, "Olá")
    task = worker.next()
    task.finish(chunk("begin"), chunk("item", "Oi"), chunk("end"))
    browser.expect(bot(page)).to_have_text("Oi")


def test_file_upload(host, start_proxy, open_widget, worker):
    """Um arquivo vai em multipart, inteiro, com o texto: o worker o lê de body, em base64 se não for UTF-8."""
    page = open_widget(start_proxy("--cors-origin", "*").port, allowFileUploads=True)
    for name, kind, data in (
        ("nota.txt", "text/plain", "Ação\r\ncoração\n".encode()),
        ("foto.png", "image/png", bytes(range(256)) * 400),
    ):
        with page.expect_file_chooser() as chooser:
            page.locator("[data-test-id=chat-attach-file-button]").click()
        chooser.value.set_files({"name": name, "mimeType": kind, "buffer": data})
        browser.expect(page.locator("[data-test-id=chat-file]").last).to_contain_text(name)
        say(page, f"Veja {name}")
        task = worker.next()
        fields, files = read_multipart(task.info)
        assert (fields["action"], fields["chatInput"]) == ("sendMessage", f"Veja {name}")
        assert files == {name: (kind, data)}
        assert task.info.get("body_encoding") == (None if kind == "text/plain" else "base64")
        task.finish(chunk("begin"), chunk("item", f"Recebi {name}"), chunk("end"))
        browser.expect(bot(page).last).to_have_text(f"Recebi {name}")


def read_multipart(info):
    """Lê um formulário multipart de uma tarefa, como um worker leria.

    Argumentos:
        info: o dicionário da tarefa.

    Retorno:
        Par de dicionários: campos (nome: texto) e arquivos (nome do arquivo: (tipo, bytes)).
    """
    body = info["body"].encode()
    if info.get("body_encoding") == "base64":
        body = base64.b64decode(info["body"])
    kind = info["headers"]["Content-Type"].encode()
    message = email.message_from_bytes(b"Content-Type: " + kind + b"\r\n\r\n" + body, policy=email.policy.HTTP)
    fields, files = {}, {}
    for part in message.iter_parts():
        content = part.get_payload(decode=True)
        if part.get_filename():
            files[part.get_filename()] = (part.get_content_type(), content)
        else:
            fields[part.get_param("name", header="content-disposition")] = content.decode()
    return fields, files


def test_timeout_shows_a_message(start_proxy, open_widget, worker):
    """Com o MAXTIME_ERROR do guia, quem esperou demais lê a frase, no começo ou no meio."""
    page = open_widget(start_proxy("--cors-origin", "*", "--maxtime", "2000", "--maxtime-error", given["MAXTIME_ERROR"]).port)
    say(page, "Olá")
    worker.next()
    shown = "Error: " + json.loads(given["MAXTIME_ERROR"])["content"]
    browser.expect(bot(page)).to_have_text(shown)
    browser.expect(page.locator(".chat-message-typing")).to_be_hidden()
    say(page, "De novo")
    worker.next().push(chunk("begin"), chunk("item", "Estou pen"))
    # O aviso não traz o nó: é outra mensagem.
    browser.expect(bot(page)).to_have_text([shown, "Estou pen", shown])


def test_worker_error_shows_a_message(start_proxy, open_widget, worker):
    """A linha de erro do worker, na mesma forma e com o nó da resposta, aparece no fim dela."""
    page = open_widget(start_proxy("--cors-origin", "*").port)
    say(page, "Olá")
    worker.next().finish(chunk("begin"), chunk("item", "Estou pen"), chunk("error", "acabou a tinta"))
    browser.expect(bot(page)).to_have_text("Estou penError: acabou a tinta")
    browser.expect(page.locator(".chat-message-typing")).to_be_hidden()


def test_trap_default_timeout_line(start_proxy, open_widget, worker):
    """Armadilha: a linha padrão, {"error": "timeout"}, o widget ignora: sem nada recebido, a frase dele não ajuda."""
    page = open_widget(start_proxy("--cors-origin", "*", "--maxtime", "2000").port)
    say(page, "Olá")
    worker.next()
    browser.expect(bot(page)).to_contain_text("[No response received.")
    say(page, "De novo")
    worker.next().push(chunk("begin"), chunk("item", "Estou pen"))
    # No meio, nem isso: o texto só para.
    browser.expect(page.locator(".chat-message-typing")).to_be_hidden()
    browser.expect(bot(page).last).to_have_text("Estou pen")


def test_http_error_shows_a_message(start_proxy, open_widget, connect, worker):
    """Um 503 do proxy vira a mensagem de erro do widget."""
    proxy = start_proxy("--cors-origin", "*", "--max-streams", "1")
    busy = connect(proxy).request()
    task = worker.next()
    page = open_widget(proxy.port)
    say(page, "Olá")
    browser.expect(bot(page)).to_have_text("Error: Failed to receive response")
    task.finish()
    busy.response().lines()


def test_without_streaming(start_proxy, open_widget, worker):
    """Sem enableStreaming, uma linha só com "output" é a resposta inteira."""
    page = open_widget(start_proxy("--cors-origin", "*").port, enableStreaming=False)
    say(page, "Olá")
    worker.next().finish('{"output": "Tudo de uma vez"}')
    browser.expect(bot(page)).to_have_text("Tudo de uma vez")
