"""As chaves da tarefa com um tipo que não é o delas: o streaming acaba logo, com uma linha que diz por quê."""

import re

import pytest
import redis

import harness
import support

kinds = {
    "hash": ("HSET", "campo", "valor"),
    "set": ("SADD", "membro"),
    "zset": ("ZADD", "1", "membro"),
    "stream": ("XADD", "*", "campo", "valor"),
}
no_scripts = ["-eval", "-evalsha", "-script"]


def spoil(task, key, kind):
    """Troca uma chave por outra de mesmo nome e de outro tipo, em uma transação.

    Argumentos:
        task: a tarefa.
        key: o nome da chave.
        kind: um dos nomes de kinds.
    """
    command, *words = kinds[kind]
    with task.client.pipeline(transaction=True) as pipe:
        pipe.delete(key)
        pipe.execute_command(command, key, *words)
        pipe.execute()


def failed(response, proxy, task):
    """Confere o fim com erro: a última linha, a do log e as chaves apagadas.

    Argumentos:
        response: a response.
        proxy: o proxy.
        task: a tarefa.

    Retorno:
        A frase da última linha.
    """
    content = response.json_line()
    assert set(content) == {"error", "message"}
    assert content["error"] == "redis_error"
    assert response.lines() == []
    assert support.finished_row(proxy, task)["fim"] == "erro"
    task.gone()
    for text in (content["message"], proxy.log()):
        assert not re.search(r"user_script|script: |f_[0-9a-f]{40}|Error running", text), text
    return content["message"]


@pytest.mark.parametrize("rules", [[], no_scripts], ids=["scripts", "lpop"])
@pytest.mark.parametrize("wake", ["on", "off"])
def test_task_key_of_another_type(wake, rules, start_redis, start_proxy, connect, start_worker):
    """A chave da tarefa trocada por qualquer outro tipo: o que está na lista é entregue, e a última linha diz o tipo."""
    server = start_redis()
    proxy = start_proxy("--wake", wake, "-i", 100, redis=server, env=support.limited_user(server, *rules))
    worker = start_worker(server.client())
    for kind in kinds:
        response, task = support.open_stream(connect, proxy, worker)
        task.push("antes", "ainda antes")
        spoil(task, task.key, kind)
        assert [response.line(), response.line()] == [b"antes", b"ainda antes"]
        assert kind in failed(response, proxy, task)
        response, task = support.open_stream(connect, proxy, worker)
        spoil(task, task.key, kind)
        assert kind in failed(response, proxy, task)


@pytest.mark.parametrize("rules", [[], no_scripts], ids=["scripts", "lpop"])
def test_list_of_another_type(rules, start_redis, start_proxy, connect, start_worker):
    """A lista trocada por outro tipo: as palavras do Redis, sem o que só interessa a quem escreveu o script."""
    server = start_redis()
    proxy = start_proxy("-i", 100, redis=server, env=support.limited_user(server, *rules))
    worker = start_worker(server.client())
    for kind in kinds:
        response, task = support.open_stream(connect, proxy, worker)
        spoil(task, task.list, kind)
        message = failed(response, proxy, task)
        assert message.endswith("WRONGTYPE Operation against a key holding the wrong kind of value"), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ERR Error running script (call to f_0123abcd): @user_script:13: WRONGTYPE Operation", "WRONGTYPE Operation"),
        ("Error running script (call to f_0123abcd): @user_script: 7: OOM command not allowed", "OOM command not allowed"),
        ("WRONGTYPE Operation script: 0123abcd, on @user_script:13.", "WRONGTYPE Operation"),
        ("OOM command not allowed when used memory > 'maxmemory'., script: 0123abcd, on @user_script:2.", "OOM command not "
         "allowed when used memory > 'maxmemory'."),
        ("NOPERM this user has no permissions to run the 'lpop' command", "NOPERM this user has no permissions to run the "
         "'lpop' command"),
    ],
)  # fmt: skip
def test_words_of_redis(text, words):
    """As formas do Redis 6, do 7 e as que não vêm de um script: ficam as palavras que dizem algo ao operador."""
    assert harness.load_program().redis_words(redis.ResponseError(text)) == words
