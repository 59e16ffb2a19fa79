"""O proxy visto de uma página de outra origem, num Chromium de verdade: chat.html, e o fetch puro do README."""

import contextlib
import json
import re
import signal
import statistics
import sys
import threading
import time
import urllib.parse

import pytest

import browser
import conftest
import harness
import support


@pytest.fixture
def open_page(chromium):
    """Fábrica de páginas: open_page(endereço, **opções). Nenhuma pode ter erro de script nem violar a sua CSP.

    Retorno:
        Função que devolve uma página já carregada.
    """
    faults = []

    def start(address, **options):
        """Abre uma página. Argumentos: address, o endereço; options, as de Browser.new_page. Retorno: a página."""
        page = chromium.new_page(**options)
        page.set_default_timeout(browser.patience)
        page.on("pageerror", lambda error: faults.append(str(error)))
        # Uma requisição recusada também vira mensagem de erro no console; essa cada prova trata.
        page.on("console", lambda message: "Content Security" in message.text and faults.append(message.text))
        page.goto(address)
        return page

    yield start
    assert faults == []


@pytest.fixture
def open_chat(open_page, serve_files, examples):
    """Fábrica de conversas: open_chat(porta, caminho="/chat", **opções), servidas de outra origem.

    Retorno:
        Função que devolve a página.
    """
    site = serve_files(examples)

    def start(port, path="/chat", **options):
        """Abre a conversa. Argumentos: port, a do proxy; path; options, as de new_page. Retorno: a página."""
        address = urllib.parse.quote(f"http://127.0.0.1:{port}{path}", safe="")
        return open_page(f"{site.origin}/chat.html?proxy={address}", **options)

    return start


def say(page, text):
    """Escreve uma mensagem na conversa e a envia.

    Argumentos:
        page: a página.
        text: a mensagem.

    Retorno:
        O quadro (Locator) da resposta, que é a última da página.
    """
    page.get_by_label("Mensagem").fill(text)
    # Enquanto a resposta anterior corre, o botão é Parar e o Enter não envia.
    browser.expect(page.locator("#send")).to_be_visible()
    page.keyboard.press("Enter")
    return page.locator(".answer").last


def item(text):
    """Compõe uma linha na forma do n8n.

    Argumentos:
        text: o conteúdo.

    Retorno:
        A linha (str).
    """
    return json.dumps({"type": "item", "content": text})


def test_chat_shows_each_line(host, start_proxy, open_chat, worker):
    """A conversa mostra cada linha quando ela chega: a seguinte só é empurrada depois que a anterior se vê."""
    proxy = start_proxy("--cors-origin", "*")
    page = open_chat(proxy.port)
    browser.expect(page.locator("#lamp")).to_have_attribute("data-state", "up")
    answer = say(page, "Olá, você")
    task = worker.next()
    sent = json.loads(task.info["body"])
    assert (sent["action"], sent["chatInput"]) == ("sendMessage", "Olá, você")
    task.push('{"type": "begin"}')
    browser.expect(answer.get_by_text("1 linha", exact=True)).to_be_visible()
    text = ""
    for word in ("Cada ", "palavra ", "chega ", "sozinha:\n", "**ç** ", "<b>não</b> ", "é HTML"):
        task.push(item(word))
        text += word
        browser.expect(answer.locator(".prose")).to_have_text(text.rstrip(" "), use_inner_text=True)
        browser.expect(answer).to_have_attribute("data-state", "live")
    task.finish('{"type": "end"}')
    browser.expect(answer).to_have_attribute("data-state", "done")
    browser.expect(answer.get_by_text("9 linhas", exact=True)).to_be_visible()
    assert answer.get_attribute("data-task") == task.name
    assert answer.locator(".lines").get_attribute("d").count("M") >= 2
    answer.get_by_text("ver as linhas").click()
    rows = answer.locator(".wire li span").all_text_contents()
    assert [json.loads(row)["type"] for row in rows] == ["begin", *["item"] * 7, "end"]
    # A conversa seguinte leva o mesmo nome de sessão.
    say(page, "De novo")
    task = worker.next()
    assert json.loads(task.info["body"])["sessionId"] == sent["sessionId"]
    task.finish("texto solto", '"um texto JSON"', '{"output": "de outro worker"}', '{"n": 1}', "null")
    browser.expect(page.locator(".answer").last).to_have_attribute("data-state", "done")
    shown = page.locator(".answer").last.locator(".prose").inner_text()
    assert re.sub(r"\s+", " ", shown) == 'texto soltoum texto JSONde outro worker {"n": 1} null'


def test_chat_opened_from_disk(start_proxy, open_page, examples, worker):
    """Aberta do disco, a página tem a origem null, que CORS_ORIGIN pode autorizar sozinha."""
    proxy = start_proxy("--cors-origin", "null")
    page = open_page(f"{(examples / 'chat.html').as_uri()}?proxy=http://127.0.0.1:{proxy.port}/chat")
    answer = say(page, "Olá")
    task = worker.next()
    assert task.info["headers"]["Origin"] == "null"
    task.push(item("Oi"))
    browser.expect(answer.locator(".prose")).to_have_text("Oi")
    task.finish()
    browser.expect(answer).to_have_attribute("data-state", "done")


def test_chat_stops(start_proxy, open_chat, worker):
    """O botão Parar e a tecla Esc encerram a resposta, e o proxy apaga a tarefa."""
    proxy = start_proxy("--cors-origin", "*")
    page = open_chat(proxy.port)
    for stop in (lambda: page.get_by_role("button", name="Parar").click(), lambda: page.keyboard.press("Escape")):
        answer = say(page, "Conte até mil")
        task = worker.next()
        task.push('{"type": "begin"}', item("um"))
        browser.expect(answer.locator(".prose")).to_have_text("um")
        stop()
        browser.expect(answer).to_have_attribute("data-state", "stopped")
        browser.expect(answer.get_by_text("parada por você")).to_be_visible()
        browser.expect(page.get_by_role("button", name="Enviar")).to_be_visible()
        task.gone(10)
    harness.eventually(lambda: [row.get("fim") for row in proxy.tasks()] == ["cliente"] * 2, 5, "duas saídas no log")


def test_chat_shows_http_errors(start_proxy, start_redis, open_chat, worker):
    """503, 504 e rede fora do ar aparecem com a frase do proxy, e Tentar de novo repete a mensagem."""
    server = start_redis()
    proxy = start_proxy("--cors-origin", "*", "--max-streams", "1", redis=server)
    with contextlib.closing(harness.worker(server.client())) as hand:
        page, other = open_chat(proxy.port), open_chat(proxy.port)
        first = say(other, "ocupa o lugar")
        task = hand.next()
        answer = say(page, "Olá")
        browser.expect(answer.get_by_role("alert")).to_contain_text("limite de streams simultâneos")
        browser.expect(answer.get_by_role("alert")).to_contain_text("HTTP 503, too_many_streams")
        task.finish(item("pronto"))
        browser.expect(first).to_have_attribute("data-state", "done")
        # A página vê o fim antes que o proxy desocupe o lugar.
        support.finished_row(proxy, task)
        page.get_by_role("button", name="Tentar de novo").click()
        task = hand.next()
        assert json.loads(task.info["body"])["chatInput"] == "Olá"
        task.finish(item("agora sim"))
        browser.expect(page.locator(".answer")).to_have_count(1)
        browser.expect(page.locator(".answer .prose")).to_have_text("agora sim")
        support.finished_row(proxy, task)
    server.kill()
    answer = say(page, "Alguém?")
    browser.expect(answer.get_by_role("alert")).to_contain_text("HTTP 504, redis_unavailable")
    browser.expect(page.locator("#lamp")).to_have_attribute("data-state", "down")
    server.start()
    proxy.wait_log("Redis de volta", 15)
    # A luz apagada se acende sozinha: a página torna a perguntar.
    browser.expect(page.locator("#lamp")).to_have_attribute("data-state", "up")
    proxy.stop()
    answer = say(page, "E agora?")
    browser.expect(answer.get_by_role("alert")).to_contain_text("Não consegui falar com o proxy")
    browser.expect(answer.get_by_role("alert")).to_contain_text(page.evaluate("location.origin"))
    browser.expect(page.locator("#lamp")).to_have_attribute("data-state", "down")


def test_chat_shows_broken_answers(start_proxy, open_chat, worker):
    """MAXTIME, o erro do worker, o fim sem a linha de fim e o proxy que morre: cada um com a sua frase."""
    proxy = start_proxy("--cors-origin", "*", "--maxtime", "700")
    page = open_chat(proxy.port)
    answer = say(page, "demora")
    worker.next()
    browser.expect(answer.get_by_role("alert")).to_contain_text("tempo demais")
    # Daqui em diante o prazo não pode vencer antes do que se prova.
    proxy = start_proxy("--cors-origin", "*")
    page = open_chat(proxy.port)
    answer = say(page, "falha")
    worker.next().finish(item("meia"), '{"type": "error", "content": "acabou a tinta"}')
    browser.expect(answer.get_by_role("alert")).to_contain_text("acabou a tinta")
    browser.expect(answer.locator(".prose")).to_have_text("meia")
    answer = say(page, "some")
    worker.next().finish('{"type": "begin"}', item("meia"))
    browser.expect(answer.get_by_role("alert")).to_contain_text("sem a linha de fim")
    answer = say(page, "morre")
    task = worker.next()
    task.push(item("meia"))
    browser.expect(answer.locator(".prose")).to_have_text("meia")
    proxy.kill()
    browser.expect(answer.get_by_role("alert")).to_contain_text("A conexão caiu no meio da resposta")
    browser.expect(answer.locator(".prose")).to_have_text("meia")
    browser.expect(page.locator("#lamp")).to_have_attribute("data-state", "down")
    task.client.delete(*task.traces())


def test_chat_survives_a_burst(start_proxy, open_chat, worker):
    """Cinco mil linhas de uma vez aparecem em poucos segundos, com a hora em que chegaram, e não a em que se viram."""
    proxy = start_proxy("--cors-origin", "*", "--pause", "0")
    page = open_chat(proxy.port)
    answer = say(page, "Tudo de uma vez")
    task = worker.next()
    words = [f"{number} " for number in range(5000)]
    began = time.monotonic()
    task.finish('{"type": "begin"}', *map(item, words), '{"type": "end"}')
    browser.expect(answer).to_have_attribute("data-state", "done")
    took = time.monotonic() - began
    assert took < 10
    browser.expect(answer.get_by_text("5.002 linhas", exact=True)).to_be_visible()
    assert answer.locator(".prose").text_content() == "".join(words).rstrip()
    assert page.evaluate("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 2")
    answer.get_by_text("ver as linhas").click()
    rows = answer.locator(".wire li")
    browser.expect(rows).to_have_count(1000)
    assert json.loads(rows.last.locator("span").text_content()) == {"type": "end"}
    row = support.finished_row(proxy, task)
    last = float(rows.last.locator("time").text_content().strip("+ s").replace(",", "."))
    assert last < int(row["duracao_ms"]) / 1000 + 1
    print(f"5.000 linhas: {took:.1f} s na página; a última chegou em {last:.2f} s; proxy: {row['duracao_ms']} ms")


def test_chat_stops_in_a_burst(start_proxy, open_chat, worker):
    """Parar funciona no meio de uma enxurrada que não acaba, e a página continua a responder."""
    proxy = start_proxy("--cors-origin", "*", "--pause", "0")
    page = open_chat(proxy.port)
    answer = say(page, "Sem parar")
    task = worker.next()
    lines = [item(f"{number} ") for number in range(500)]

    def flood():
        """Empurra linhas, sem deixar a lista crescer, até que a tarefa acabe."""
        while task.exists():
            if task.client.llen(task.list) < 2000:
                task.push(*lines)
        task.client.delete(task.list)

    pushing = threading.Thread(target=flood)
    pushing.start()
    try:
        browser.expect(answer.get_by_text(re.compile(r"^\d+\.\d{3} linhas$"))).to_be_visible()
        began = time.monotonic()
        page.get_by_role("button", name="Parar").click()
        browser.expect(answer).to_have_attribute("data-state", "stopped")
        print(f"Parar: {time.monotonic() - began:.2f} s")
        # A conversa seguinte não espera por nada que tenha ficado da anterior.
        after = say(page, "Olá")
        worker.next().finish(item("Oi"))
        browser.expect(after.locator(".prose")).to_have_text("Oi")
    finally:
        task.delete()
        pushing.join()
    task.client.delete(*task.traces(), task.list)


def test_chat_lamp_follows_the_proxy(start_proxy, open_chat, worker):
    """A luz se acende sozinha quando o proxy volta; e, sem esperar por isso, na primeira resposta que ele dá."""
    port = harness.free_port()
    page = open_chat(port)
    lamp = page.locator("#lamp")
    browser.expect(lamp).to_have_attribute("data-state", "down")
    start_proxy("--cors-origin", "*", "--port", str(port))
    browser.expect(lamp).to_have_attribute("data-state", "up")
    # Daqui em diante ela não torna a perguntar por si.
    page.evaluate("{ const real = setTimeout; setTimeout = (action, delay) => delay < 1000 && real(action, delay); }")
    page.route("**/ping", lambda route: route.abort())
    page.evaluate("address.dispatchEvent(new Event('change'))")
    browser.expect(lamp).to_have_attribute("data-state", "down")
    page.unroute("**/ping")
    answer = say(page, "Olá")
    task = worker.next()
    task.push(item("Oi"))
    browser.expect(answer.locator(".prose")).to_have_text("Oi")
    browser.expect(lamp).to_have_attribute("data-state", "up")
    browser.expect(answer).to_have_attribute("data-state", "live")
    task.finish()
    browser.expect(answer).to_have_attribute("data-state", "done")


def test_chat_says_what_to_type(start_proxy, start_redis, open_page, serve_files, examples):
    """Aberta sem proxy, a página diz logo o que digitar; sem CORS_ORIGIN, o que ligar; sem Redis, onde olhar."""
    port, site = harness.free_port(), serve_files(examples)
    page = open_page(f"{site.origin}/chat.html?proxy=http://127.0.0.1:{port}/chat%23segredo")
    away = page.locator("#lamp_text")
    browser.expect(away).to_have_text(
        f"Nada responde em http://127.0.0.1:{port}/chat. Num terminal, na pasta do projeto, digite: packaging/demo"
    )
    browser.expect(away).to_be_in_viewport(ratio=1)
    for words in ("Luz verde: está no ar", "O da demonstração só devolve o que você escreve.", "packaging/demo, num terminal"):
        browser.expect(page.locator("dd", has_text=words)).to_be_visible()
    assert page.evaluate(contrast_script) == []
    server = start_redis()
    start_proxy("--port", str(port), redis=server).wait_log("pronto")
    page.evaluate("check_proxy()")
    browser.expect(away).to_contain_text(f"não autoriza esta página: inicie o proxy com CORS_ORIGIN={site.origin}")
    proxy = start_proxy("--cors-origin", site.origin, redis=server)
    page.get_by_label("Proxy", exact=True).fill(f"127.0.0.1:{proxy.port}/chat")
    page.keyboard.press("Tab")
    browser.expect(page.locator("#lamp")).to_have_attribute("data-state", "up")
    browser.expect(away).to_be_hidden()
    server.kill()
    page.evaluate("check_proxy()")
    browser.expect(away).to_contain_text("não está pronto (HTTP 500): veja o log do proxy")
    # Num caminho de um site, o /ping pode não ser do proxy.
    page.get_by_label("Proxy", exact=True).fill(f"{site.origin}/chat")
    page.keyboard.press("Tab")
    browser.expect(away).to_contain_text(f"O /ping de {site.origin} não vai ao proxy")
    # Um endereço que não é um endereço também tem a sua frase.
    page.get_by_label("Proxy", exact=True).fill("http://")
    page.keyboard.press("Tab")
    browser.expect(away).to_contain_text("Nada responde em http://.")


def test_demo_serves_the_chat(open_page, tmp_path):
    """packaging/demo diz onde está a página; aberta do disco, ela conversa com o worker, que devolve o que se escreve."""
    demo = harness.background(tmp_path / "demo", "demonstração")
    # O ambiente virtual fica onde as outras provas guardam o que instalam.
    demo.spawn(
        [sys.executable, harness.root / "packaging" / "demo"],
        {**harness.base_environment(), "XDG_CACHE_HOME": str(conftest.CLIENTS_CACHE)},
    )
    try:
        harness.eventually(lambda: "O log do proxy:" in demo.output() or not demo.alive(), 120, "a demonstração no ar")
        assert '  {"type": "end"}\n' in demo.output(), demo.log()
        page = open_page(re.search(r"file://\S+", demo.output())[0])
        browser.expect(page.locator("#lamp")).to_have_attribute("data-state", "up")
        answer = say(page, "Olá, mundo em partes")
        browser.expect(answer).to_have_attribute("data-state", "done")
        browser.expect(answer.locator(".prose")).to_have_text("Olá, mundo em partes")
        harness.eventually(lambda: re.search("fim=concluida", demo.output()), 5, "a tarefa no log mostrado")
        demo.signal(signal.SIGINT)
        assert (demo.wait(), demo.log()) == (0, "")
    finally:
        demo.kill()


def test_chat_retries_in_place(start_proxy, open_chat, worker):
    """Tentar de novo, numa resposta antiga, deixa à vista a resposta nova, e não o fim da conversa."""
    proxy = start_proxy("--cors-origin", "*")
    page = open_chat(proxy.port)
    say(page, "falha")
    worker.next().finish(item("antes do erro\n" * 40), '{"type": "error", "content": "acabou a tinta"}')
    for number in range(2):
        answer = say(page, f"depois {number}")
        worker.next().finish(item("linha\n" * 40))
        browser.expect(answer).to_have_attribute("data-state", "done")
    page.get_by_role("button", name="Tentar de novo").click()
    task = worker.next()
    answer = page.locator(".answer").first
    browser.expect(answer).to_have_attribute("data-state", "live")
    browser.expect(answer.locator(".facts")).to_be_in_viewport()
    # Ela cresce além da tela, e o fim dela continua à vista.
    for number in range(1, 5):
        task.push(item("agora sim\n" * 15))
        browser.expect(answer.get_by_text(re.compile(rf"^{number} linhas?$"))).to_be_in_viewport(ratio=1)
    # Quem rola para longe fica onde está.
    page.evaluate("scroller.scrollTop = 0")
    task.push(item("agora sim\n" * 15))
    browser.expect(answer.get_by_text("5 linhas", exact=True)).to_be_attached()
    assert page.evaluate("scroller.scrollTop") == 0
    task.finish()
    browser.expect(answer).to_have_attribute("data-state", "done")


def test_chat_offers_one_retry_at_a_time(start_proxy, open_chat, worker):
    """Enquanto uma resposta corre, nenhum Tentar de novo é oferecido: não faria nada."""
    proxy = start_proxy("--cors-origin", "*")
    page = open_chat(proxy.port)
    retry = page.get_by_role("button", name="Tentar de novo")
    answer = say(page, "falha e continua")
    task = worker.next()
    task.push('{"type": "error", "content": "acabou a tinta"}')
    browser.expect(answer.get_by_role("alert")).to_contain_text("acabou a tinta")
    browser.expect(retry).to_have_count(0)
    task.finish(item("continua"))
    browser.expect(retry).to_be_visible()
    answer = say(page, "outra")
    task = worker.next()
    browser.expect(retry).to_have_count(0)
    task.finish(item("Oi"))
    browser.expect(retry).to_be_visible()


def test_chat_completes_the_address(start_proxy, open_page, serve_files, examples, worker):
    """Um endereço sem http:// o ganha: nunca é tomado por um caminho do site da página, que receberia o token."""
    token = "segredo-das-provas-0123456789"
    proxy = start_proxy("--cors-origin", "*", env={"AUTH_TOKEN": token})
    site = serve_files(examples)
    page = open_page(f"{site.origin}/chat.html?proxy=127.0.0.1:{proxy.port}/da-url%23{token}")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    place = page.get_by_label("Proxy", exact=True)
    browser.expect(place).to_have_value(f"http://127.0.0.1:{proxy.port}/da-url#{token}")
    for text, path in (
        (None, "/da-url"),
        (f" 127.0.0.1:{proxy.port}/a#{token} ", "/a"),
        (f"localhost:{proxy.port}/b#{token}", "/b"),
        (f"//127.0.0.1:{proxy.port}/c#{token}", "/c"),
        (f"HTTP://127.0.0.1:{proxy.port}/d#{token}", "/d"),
    ):
        if text:
            place.fill(text)
        answer = say(page, "Olá")
        task = worker.next()
        assert task.info["path"] == path
        task.finish(item("Oi"))
        browser.expect(answer.locator(".prose")).to_have_text("Oi")
        browser.expect(page.locator("#lamp")).to_have_attribute("data-state", "up")
    # Estes viram nomes de máquina, que não existem; o que se prova é que nada vai ao site da página.
    page.route(re.compile("^http://chat"), lambda route: route.abort())
    for text in (f"/chat#{token}", f"chat.html#{token}", f"http:chat#{token}", f"?x#{token}", f"#{token}"):
        place.fill(text)
        answer = say(page, "Olá")
        browser.expect(answer.get_by_role("alert")).to_contain_text("Não consegui falar com o proxy")
        browser.expect(page.locator("#lamp")).to_have_attribute("data-state", "down")
    assert [url for url in asked if url.startswith(site.origin)] == []


@pytest.mark.parametrize("name", ["constructor", "__proto__", "toString"])
def test_chat_shows_any_error_name(name, start_proxy, open_chat, worker):
    """Uma linha de erro cujo nome todo objeto de JavaScript tem aparece com esse nome, e não com o que ele é lá."""
    proxy = start_proxy("--cors-origin", "*")
    page = open_chat(proxy.port)
    for line in ({"error": name}, {"error": name, "message": {"não": "é texto"}}):
        answer = say(page, "falha")
        worker.next().finish(json.dumps(line))
        browser.expect(answer.locator(".why")).to_have_text(name)


def test_chat_explains_an_empty_answer(start_proxy, open_chat, worker):
    """Uma resposta sem linhas, ou só com linhas sem texto, diz isso."""
    proxy = start_proxy("--cors-origin", "*", "--heartbeat", "100")
    page = open_chat(proxy.port)
    for lines, sentence in (
        ([], "A resposta acabou sem nenhuma linha."),
        (['{"type": "begin"}', item(""), '{"type": "end"}'], "A resposta acabou sem nenhum texto."),
    ):
        answer = say(page, "Olá")
        task = worker.next()
        # Um batimento não é uma linha do worker.
        harness.eventually(lambda: answer.locator(".pings").get_attribute("d"), 15, "um traço")  # noqa: B023
        task.finish(*lines)
        browser.expect(answer).to_have_attribute("data-state", "done")
        browser.expect(answer.get_by_text(sentence)).to_be_visible()
    answer = say(page, "Olá")
    worker.next().finish(item("Oi"))
    browser.expect(answer).to_have_attribute("data-state", "done")
    browser.expect(answer.get_by_text("A resposta acabou")).to_have_count(0)


def test_chat_draws_heartbeats(start_proxy, open_chat, worker):
    """Os batimentos do proxy não viram texto nem linha: só traços próprios no ritmo."""
    proxy = start_proxy("--cors-origin", "*", "--heartbeat", "100")
    page = open_chat(proxy.port)
    answer = say(page, "Olá")
    task = worker.next()
    harness.eventually(lambda: (answer.locator(".pings").get_attribute("d") or "").count("M") >= 3, 15, "três traços")
    task.finish(item("Oi"), '{"type": "end"}')
    browser.expect(answer).to_have_attribute("data-state", "done")
    browser.expect(answer.locator(".prose")).to_have_text("Oi")
    browser.expect(answer.get_by_text("2 linhas", exact=True)).to_be_visible()


@pytest.mark.parametrize("token", ["segredo-das-provas-0123456789", "um%zz#dois%41"])
def test_chat_sends_the_token(token, start_proxy, open_chat, worker):
    """Com AUTH_TOKEN, a página mostra o 401; com o token depois do #, conversa, e o token não vai na URL."""
    proxy = start_proxy("--cors-origin", "*", env={"AUTH_TOKEN": token})
    answer = say(open_chat(proxy.port), "Olá")
    browser.expect(answer.get_by_role("alert")).to_contain_text("HTTP 401, unauthorized")
    worker.idle()
    page = open_chat(proxy.port, f"/chat#{token}")
    answer = say(page, "Olá")
    task = worker.next()
    assert (task.info["path"], task.info["query"]) == ("/chat", "")
    task.finish(item("Oi"))
    browser.expect(answer.locator(".prose")).to_have_text("Oi")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_chat_fits_the_screen(width, scheme, start_proxy, open_chat, worker):
    """Nada transborda a tela, nem com palavras sem fim; o começo e o fim da conversa ficam à vista, e o texto tem contraste."""
    proxy = start_proxy("--cors-origin", "*")
    options = {"viewport": {"width": width, "height": 640}, "color_scheme": scheme}
    page = open_chat(proxy.port, **options)
    browser.expect(page.locator("#lamp")).to_have_attribute("data-state", "up")
    browser.expect(page.get_by_text("packaging/demo", exact=True)).to_be_in_viewport(ratio=1)
    answer = say(page, "x" * 200)
    task = worker.next()
    task.push(item("palavra " * 400), item("y" * 300), '{"dados": "' + "z" * 300 + '"}')
    browser.expect(answer.get_by_text("3 linhas", exact=True)).to_be_visible()
    answer.get_by_text("ver as linhas").click()
    browser.expect(answer.locator(".wire")).to_be_in_viewport()
    task.finish('{"type": "error", "content": "' + "w" * 200 + '"}')
    browser.expect(answer).to_have_attribute("data-state", "failed")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("scroller.scrollWidth <= scroller.clientWidth")
    box = page.locator(".address").bounding_box()
    assert box["x"] >= 16 and box["x"] + box["width"] <= width - 16
    assert page.evaluate("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 2")
    browser.expect(page.get_by_label("Mensagem")).to_be_in_viewport()
    # WCAG AA: 4,5 para texto.
    low = page.evaluate(contrast_script)
    assert low == []


# Mede o contraste de cada texto visível com o fundo mais próximo, e devolve os que ficam abaixo de 4,5.
contrast_script = """() => {
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const color = channels(getComputedStyle(node).backgroundColor);
            if (color[3] === undefined || color[3] === 1) return color;
        }
        return [255, 255, 255];
    };
    const low = [];
    for (const node of document.querySelectorAll("header *, main *, footer *")) {
        const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        if (!own || !node.checkVisibility()) continue;
        const [a, b] = [light(channels(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
        const ratio = (a + .05) / (b + .05);
        if (ratio < 4.5) low.push([node.className || node.tagName, ratio.toFixed(2)]);
    }
    return low;
}"""


# ---------------------------------------------------------------- fetch puro


@pytest.fixture
def blank_page(open_page, serve_files, tmp_path):
    """Uma página vazia de outra origem.

    Retorno:
        A página.
    """
    folder = tmp_path / "www"
    folder.mkdir()
    (folder / "index.html").write_text("<!DOCTYPE html><title>vazia</title>", encoding="utf-8")
    return open_page(serve_files(folder).origin)


def readme_snippet():
    """Lê do README o exemplo de JavaScript que lê o streaming.

    Retorno:
        O código (str).
    """
    text = (harness.root / "README.md").read_text(encoding="utf-8")
    found = [code for code in re.findall(r"```js\n(.*?)```", text, re.DOTALL) if "getReader" in code]
    assert len(found) == 1
    return found[0]


def test_readme_fetch_shows_each_line(start_proxy, blank_page, worker):
    """O exemplo do README, numa página de outra origem, entrega cada linha antes que a seguinte seja empurrada."""
    proxy = start_proxy("--cors-origin", blank_page.evaluate("location.origin"))
    code = readme_snippet()
    address = re.search(r'"(http://[^"]+)"', code)[1]
    code = code.replace(address, f"http://127.0.0.1:{proxy.port}/chat").replace("console.log", "show")
    assert "show(" in code
    blank_page.evaluate(
        f"show = (value) => seen.push(value); seen = []; done = false; (async () => {{ {code}\n done = true }})(); null"
    )
    task = worker.next()
    assert json.loads(task.info["body"]) == {"chatInput": "Olá, mundo"}
    pushed = []
    for value in ({"n": 1}, [], "ç\u2028\n", 1.5, None, True, {"big": "é" * 70000}, {"n": 2}):
        task.push(json.dumps(value, ensure_ascii=False))
        pushed.append(value)
        blank_page.wait_for_function("count => seen.length === count", arg=len(pushed))
    assert blank_page.evaluate("done") is False
    task.finish()
    blank_page.wait_for_function("done")
    assert blank_page.evaluate("seen") == pushed


def ask(page, port, options="{}"):
    """Faz um fetch na página e espera a resposta inteira.

    Argumentos:
        page: a página.
        port: porta do proxy.
        options: o objeto de opções do fetch, em JavaScript.

    Retorno:
        Dicionário com status, type, task (o cabeçalho X-Task-Name), body; ou error, se o fetch foi negado.
    """
    return page.evaluate(
        f"""async () => {{
            try {{
                const response = await fetch("http://127.0.0.1:{port}/x", {options});
                const task = response.headers.get("X-Task-Name");
                return {{ status: response.status, type: response.headers.get("Content-Type"), task, body: await response.text() }};
            }} catch (error) {{
                return {{ error: error.name }};
            }}
        }}"""
    )


@contextlib.contextmanager
def answering(page, port, options):
    """Começa um fetch na página e devolve, no fim do bloco, o que ele deu em `window.result`.

    Argumentos:
        page: a página.
        port: porta do proxy.
        options: o objeto de opções do fetch, em JavaScript.

    Retorno:
        Gera uma lista, que no fim do bloco tem o corpo e o X-Task-Name.
    """
    found = []
    page.evaluate(
        f"""result = null; fetch("http://127.0.0.1:{port}/x", {options})
            .then(async (response) => result = [await response.text(), response.headers.get("X-Task-Name")],
                  (error) => result = [error.name]); null"""
    )
    yield found
    page.wait_for_function("result !== null")
    found += page.evaluate("result")


def test_preflight(host, start_proxy, blank_page, worker):
    """Cabeçalhos próprios e todos os métodos passam pela consulta prévia, que não cria tarefa; a página lê X-Task-Name."""
    proxy = start_proxy("--cors-origin", blank_page.evaluate("location.origin"))
    headers = '{ "X-Meu-Cabecalho": "1", "Content-Type": "application/json" }'
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        with answering(blank_page, proxy.port, f'{{ method: "{method}", headers: {headers} }}') as found:
            task = worker.next()
            assert task.info["method"] == method
            assert task.info["headers"]["X-Meu-Cabecalho"] == "1"
            worker.idle()
            task.finish("1")
        assert found == ["1\n", task.name]


def test_other_origins_are_refused(start_proxy, blank_page, worker):
    """Uma origem que não está em CORS_ORIGIN não lê nada e, com JSON, nem chega a criar tarefa."""
    proxy = start_proxy("--cors-origin", "https://outra.test")
    json_post = '{ method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" }'
    assert ask(blank_page, proxy.port, json_post) == {"error": "TypeError"}
    worker.idle()
    # Um pedido simples não tem consulta prévia: a tarefa existe, só a resposta é negada à página.
    with answering(blank_page, proxy.port, '{ method: "POST", body: "x" }') as found:
        # A página desiste na hora, e a tarefa pode já não existir quando o aviso é lido.
        worker.next_key()
    assert found == ["TypeError"]


def test_errors_are_readable(host, start_proxy, start_redis, blank_page):
    """A página lê o status e o corpo de um 413, um 503 e um 504."""
    server = start_redis()
    proxy = start_proxy("--cors-origin", "*", "--max-streams", "1", redis=server)
    # Maior que MAX_BODY, e bem maior: o navegador ainda envia quando o proxy já respondeu.
    for size in (17 << 20, 32 << 20):
        found = ask(blank_page, proxy.port, f'{{ method: "POST", body: new Uint8Array({size}) }}')
        assert (found.get("status"), found.get("type")) == (413, "application/json; charset=utf-8"), found
        assert json.loads(found["body"])["error"] == "body_too_large"
    with contextlib.closing(harness.worker(server.client())) as hand:
        with answering(blank_page, proxy.port, "{}"):
            task = hand.next()
            found = ask(blank_page, proxy.port)
            assert (found["status"], json.loads(found["body"])["error"]) == (503, "too_many_streams")
            task.finish()
        support.finished_row(proxy, task)
    server.kill()
    found = ask(blank_page, proxy.port)
    assert (found["status"], json.loads(found["body"])["error"]) == (504, "redis_unavailable")
    server.start()
    proxy.wait_log("Redis de volta", 15)


def test_unauthorized_is_readable(host, start_proxy, blank_page, worker):
    """A página lê um 401; e Authorization, que exige consulta prévia, passa."""
    proxy = start_proxy("--cors-origin", "*", env={"AUTH_TOKEN": "segredo-das-provas-0123456789"})
    found = ask(blank_page, proxy.port)
    assert (found["status"], json.loads(found["body"])["error"]) == (401, "unauthorized")
    worker.idle()
    header = '{ headers: { "Authorization": "Bearer segredo-das-provas-0123456789" } }'
    with answering(blank_page, proxy.port, header) as found:
        worker.next().finish("1")
    assert found[0] == "1\n"


def test_six_streams_per_browser(start_proxy, blank_page, worker):
    """Em HTTP/1.1 o navegador abre seis conexões por servidor: o sétimo streaming espera por um dos seis."""
    proxy = start_proxy("--cors-origin", "*")
    blank_page.evaluate(
        f"for (let n = 0; n < 7; n++) fetch('http://127.0.0.1:{proxy.port}/' + n, {{ method: 'POST' }}); null"
    )
    tasks = [worker.next(15) for _ in range(6)]
    worker.idle()
    tasks[0].finish()
    tasks.append(worker.next(15))
    assert sorted(task.info["path"] for task in tasks) == [f"/{n}" for n in range(7)]
    for task in tasks[1:]:
        task.finish()


# Anota em `shown`, em ms da hora do sistema, quando cada mudança da resposta entrou na página e quando foi pintada.
watch_script = """() => {
    window.shown = [];
    window.painted = [];
    const now = () => performance.timeOrigin + performance.now();
    new MutationObserver((changes) => {
        if (!changes.some((change) => change.target.className === "prose")) return;
        shown.push(now());
        // A página escreve dentro de um quadro: a tarefa seguinte já o encontra pintado.
        setTimeout(() => painted.push(now()));
    }).observe(turns, { childList: true, subtree: true });
}"""


def test_time_to_appear(start_proxy, start_balancer, open_chat, worker, record_property):
    """De um RPUSH à página, por trás do nginx entregue: a mediana de 20 linhas. (Com -rP, a medida é escrita.)"""
    front = start_balancer("nginx", start_proxy("--cors-origin", "*"))
    page = open_chat(front.port)
    say(page, "Meça")
    task = worker.next()
    task.push('{"type": "begin"}')
    page.evaluate(watch_script)
    pushed = []
    for number in range(1, 21):
        # A pausa de 20 ms do proxy depois de cada linha não faz parte do caminho.
        time.sleep(0.05)
        pushed.append(time.time() * 1000)
        task.push(item(f"{number} "))
        page.wait_for_function("count => painted.length >= count", arg=number)
    seen = {name: page.evaluate(name) for name in ("shown", "painted")}
    task.finish('{"type": "end"}')
    for name, whens in seen.items():
        times = [when - began for when, began in zip(whens, pushed, strict=True)]
        assert min(times) > 0
        assert statistics.median(times) < 200
        print(f"{name}: mediana {statistics.median(times):.1f} ms, máximo {max(times):.1f} ms")
        record_property(name, statistics.median(times))
