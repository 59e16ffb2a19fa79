"""packaging/examples/ollama: clientes de verdade do Ollama, e as linhas do proxy que eles aceitam."""

import asyncio
import concurrent.futures
import contextlib
import datetime
import json
import pathlib
import re
import subprocess
import sys

import aiohttp
import langchain_ollama
import ollama
import pydantic
import pytest

import harness

folder = harness.root / "packaging" / "examples" / "ollama"

# As configurações do proxy que o guia manda usar, menos a porta e os tempos.
guide = (folder / "README.md").read_text(encoding="utf-8")
settings = dict(re.findall(r"^(CONTENT_TYPE|HEARTBEAT_LINE|MAXTIME_ERROR)='?(.+?)'?$", guide, re.MULTILINE))
timeout_text = re.search(r'"error": "(.+?)"', settings["MAXTIME_ERROR"])[1]

question = "Olá, mundo em partes"
pieces = ["Olá, ", "mundo ", "em ", "partes "]
whole = "".join(pieces)
chat = {"model": "eco", "messages": [{"role": "user", "content": "antes"}, {"role": "user", "content": question}]}


def run_apart(coroutine):
    """Roda uma corrotina em uma thread sua: na desta prova, o navegador de outra pode ter deixado um laço em curso.

    Argumentos:
        coroutine: a corrotina.

    Retorno:
        O que ela devolve.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


@pytest.fixture
def proxy(host, share_proxy):
    """O proxy com as configurações do guia, em cada hospedeiro.

    Retorno:
        Um harness.proxy_process.
    """
    return share_proxy(host=host, env=settings)


@pytest.fixture
def echo(start_example, db):
    """O worker do Ollama, como vem, já à espera de tarefas.

    Retorno:
        O conftest.example_worker.
    """
    made = start_example(sys.executable, folder / "ollama_worker.py", "--delay", "0.2")
    made.wait_log("inscrito no canal", 15)
    return made


@contextlib.contextmanager
def client_of(proxy, kind=ollama.Client):
    """Abre um cliente do Ollama, e o fecha.

    Argumentos:
        proxy: o proxy.
        kind: a classe.

    Retorno:
        Gera o cliente.
    """
    made = kind(host=f"http://127.0.0.1:{proxy.port}")
    try:
        yield made
    finally:
        if kind is ollama.Client:
            made._client.close()


def test_sync(proxy, echo, db):
    """Chat e generate, inteiros e em partes, cada uma antes da seguinte; o modelo pedido volta; list e a versão."""
    with client_of(proxy) as client:
        parts = client.chat(**chat, stream=True)
        first = next(parts)
        assert (first.message.content, first.message.role, first.model, first.done) == (
            "Olá, ",
            "assistant",
            "eco",
            False,
        )
        assert db.keys("ndjson_task_*"), "a primeira parte chegou com a tarefa viva"
        rest = list(parts)
        assert [part.message.content for part in rest] == [*pieces[1:], ""]
        assert [part.done for part in rest] == [False, False, False, True]
        assert rest[-1].done_reason == "stop"
        answer = client.chat(**chat)
        assert (answer.message.content, answer.done) == (whole, True)
        assert [part.response for part in client.generate("eco", question, stream=True)] == [*pieces, ""]
        assert client.generate("eco", question).response == whole
        [model] = client.list().models
        assert (model.model, type(model.modified_at)) == ("eco:latest", datetime.datetime)
        assert client._client.get("/api/version").json()["version"]


def test_async(proxy, echo, db):
    """O mesmo, com o cliente assíncrono."""

    async def run():
        """Faz os pedidos. Sem argumentos."""
        client = ollama.AsyncClient(host=f"http://127.0.0.1:{proxy.port}")
        async with client._client:
            parts = [part async for part in await client.chat(**chat, stream=True)]
            assert [part.message.content for part in parts] == [*pieces, ""]
            both = await asyncio.gather(client.chat(**chat), client.generate("eco", question))
            assert (both[0].message.content, both[1].response) == (whole, whole)
            assert (await client.list()).models[0].model == "eco:latest"

    run_apart(run())


def test_langchain(proxy, echo, db):
    """ChatOllama e OllamaLLM: o modelo é achado no início, invoke e stream, síncronos e não."""
    options = {"model": "eco", "base_url": f"http://127.0.0.1:{proxy.port}", "validate_model_on_init": True}
    talk, plain = langchain_ollama.ChatOllama(**options), langchain_ollama.OllamaLLM(**options)
    assert talk.invoke(question).content == whole
    assert [text for part in talk.stream(question) if (text := part.content)] == pieces
    assert plain.invoke(question) == whole

    async def run():
        """Faz os pedidos assíncronos. Sem argumentos. Retorno: os textos, numa lista."""
        found = [part.content async for part in talk.astream(question) if part.content]
        await talk._async_client._client.aclose()
        return found

    assert run_apart(run()) == pieces
    close_langchain(talk, plain)


def close_langchain(*models):
    """Fecha as conexões que os modelos do LangChain guardam. Argumentos: models, os modelos."""
    for model in models:
        model._client._client.close()


def run_javascript(port, node_folder):
    """Roda o cliente de JavaScript. Argumentos: port, a do proxy; node_folder, a do npm. Retorno: o que ele escreveu."""
    script = pathlib.Path(__file__).resolve().parent / "readers" / "ollama.cjs"
    done = subprocess.run(
        ["node", str(script), f"http://127.0.0.1:{port}", question],
        env={**harness.base_environment(), "NODE_PATH": str(node_folder / "node_modules")},
        capture_output=True,
        timeout=30,
        check=True,
    )
    return json.loads(done.stdout)


def test_javascript(proxy, echo, db, node_folder):
    """O cliente de JavaScript: em partes, inteiro, generate e list."""
    found = run_javascript(proxy.port, node_folder)
    assert found == {"parts": [*pieces, "", whole, whole, "eco:latest"], "error": None}


def test_insists_on_json(proxy, echo, db, share_proxy):
    """O .json() do aiohttp só aceita application/json: com o CONTENT_TYPE do guia, é o que vem; com o padrão, não."""

    async def ask(port):
        """Pede uma resposta inteira. Argumentos: port, a do proxy. Retorno: o objeto."""
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{port}/api/chat"
            async with session.post(url, json={**chat, "stream": False}) as response:
                return await response.json()

    assert run_apart(ask(proxy.port))["message"] == {"role": "assistant", "content": whole}
    with pytest.raises(aiohttp.ContentTypeError):
        run_apart(ask(share_proxy().port))


def test_liveness(proxy, fetch, db, echo):
    """HEAD e GET na raiz, com que os clientes conferem se o servidor vive, são 200; o que não existe é um erro."""
    assert fetch(proxy, "HEAD", "/").status == 200
    answer = fetch(proxy, "GET", "/")
    assert (answer.status, answer.json()) == (200, "Ollama is running")
    assert fetch(proxy, "POST", "/api/embed", body="{}").json() == {"error": "/api/embed: este worker não atende"}
    # Um pedido que reply() não entende.
    broken = fetch(proxy, "POST", "/api/chat", body='{"messages": 1}')
    assert broken.json() == {"error": "worker_failed"}


def test_token(share_proxy, echo, db, monkeypatch):
    """Com AUTH_TOKEN, o cliente manda o de OLLAMA_API_KEY; sem ele, o erro traz o 401."""
    proxy = share_proxy(env={**settings, "AUTH_TOKEN": "segredo"})
    with client_of(proxy) as client, pytest.raises(ollama.ResponseError) as caught:
        client.list()
    assert caught.value.status_code == 401
    monkeypatch.setenv("OLLAMA_API_KEY", "segredo")
    with client_of(proxy) as client:
        assert client.chat(**chat).message.content == whole


@pytest.fixture
def silent(share_proxy):
    """Um proxy com as linhas do guia, que bate a cada 200 ms e desiste aos 900.

    Retorno:
        Um harness.proxy_process.
    """
    return share_proxy(env={**settings, "HEARTBEAT": "200", "MAXTIME": "900"})


def drain(stream, texts):
    """Lê um streaming até o erro do tempo esgotado.

    Argumentos:
        stream: iterável das partes.
        texts: lista em que o texto de cada parte é posto.
    """
    for part in stream:
        texts.append(part["message"]["content"] if "message" in part else part["response"])


def test_silence(silent, db):
    """Num silêncio, os batimentos são partes vazias, e o tempo esgotado é um ResponseError com a frase do guia."""
    with client_of(silent) as client:
        for stream in (client.chat(**chat, stream=True), client.generate("eco", question, stream=True)):
            texts = []
            with pytest.raises(ollama.ResponseError) as caught:
                drain(stream, texts)
            assert (caught.value.error, set(texts)) == (timeout_text, {""})
            assert len(texts) >= 2


def test_silence_async(silent, db):
    """O mesmo, com o cliente assíncrono."""

    async def run():
        """Lê até o erro. Sem argumentos. Retorno: os textos, numa lista."""
        client = ollama.AsyncClient(host=f"http://127.0.0.1:{silent.port}")
        texts = []
        async with client._client:
            with pytest.raises(ollama.ResponseError, match=timeout_text):
                async for part in await client.chat(**chat, stream=True):
                    texts.append(part.message.content)
        return texts

    texts = run_apart(run())
    assert len(texts) >= 2 and set(texts) == {""}


def test_silence_javascript(silent, node_folder, db):
    """O mesmo, com o de JavaScript."""
    found = run_javascript(silent.port, node_folder)
    assert (set(found["parts"]), found["error"]) == ({""}, timeout_text)


def test_silence_langchain(silent, share_proxy, start_worker, db):
    """O mesmo, com o LangChain, e uma resposta que chega depois de um batimento."""
    impatient = langchain_ollama.ChatOllama(model="eco", base_url=f"http://127.0.0.1:{silent.port}")
    with pytest.raises(ollama.ResponseError, match=timeout_text):
        impatient.invoke(question)
    patient = share_proxy(env={**settings, "HEARTBEAT": "200"})
    talk = langchain_ollama.ChatOllama(model="eco", base_url=f"http://127.0.0.1:{patient.port}")
    worker = start_worker()
    stream = talk.stream(question)
    assert next(stream).content == "", "um batimento"
    worker.next().finish('{"message": {"role": "assistant", "content": "Olá"}, "done": true, "done_reason": "stop"}')
    assert "".join(part.content for part in stream) == "Olá"
    close_langchain(impatient, talk)


def test_silence_in_one_line(silent, share_proxy, db):
    """Sem streaming: o batimento estraga o JSON, e por isso o guia manda desligá-lo; o tempo esgotado, o chat recusa."""
    with client_of(silent) as client, pytest.raises(json.JSONDecodeError):
        client.chat(**chat)
    with client_of(share_proxy(env={**settings, "MAXTIME": "900"})) as client:
        with pytest.raises(pydantic.ValidationError):
            client.chat(**chat)
        assert client.generate("eco", question).response is None


def test_default_lines(share_proxy, db):
    """Com as linhas padrão do proxy, o chat não passa do primeiro batimento: é para isso que servem as do guia."""
    proxy = share_proxy(env={"HEARTBEAT": "200", "MAXTIME": "900"})
    with client_of(proxy) as client, pytest.raises(pydantic.ValidationError):
        list(client.chat(**chat, stream=True))
