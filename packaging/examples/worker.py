#!/usr/bin/env python3
"""Worker de exemplo do py-ndjson-proxy: recebe tarefas e responde em partes.

Só precisa de redis-py e python-dotenv. Lê REDIS_SERVER, REDIS_PASSWORD, REDIS_CHANNEL e
REDIS_QUEUE do ambiente e dos arquivos de ENV_FILE (/etc/py-ndjson-proxy.env), como o proxy.
Com REDIS_QUEUE, tira as tarefas dessa lista, no lugar de ouvir o canal: nenhuma se perde
por não haver um worker ouvindo, e só um a recebe. Num cluster://, um só canal traz as tarefas
de todas as tags. Para fazer o seu worker, troque a função answer().
"""
import argparse
import json
import os
import random
import re
import signal
import sys
import threading
import time
import urllib.parse
import uuid

import dotenv
import redis
import redis.backoff
import redis.retry


def log(text):
    """Escreve text em stderr, numa linha. Sem retorno."""
    sys.stderr.write(f"worker: {text}\n")


def fail(text):
    """Diz em text o que esperar não conserta e sai com 2, como o proxy. Não retorna."""
    log(text)
    sys.exit(2)


def read_settings():
    """Lê os arquivos de ENV_FILE, do mais fraco ao mais forte, e o ambiente, que vale mais. Retorna um dict."""
    named, values = os.environ.get("ENV_FILE"), {}
    paths = (named or "/etc/py-ndjson-proxy.env").split(":")
    for path in paths:
        if os.path.exists(path) or (named and path == paths[-1]):
            try:
                with open(path, encoding="utf-8-sig") as file:
                    values |= dotenv.dotenv_values(stream=file, interpolate=False)
            except (OSError, UnicodeDecodeError) as error:
                fail(f"ENV_FILE: {path}: {error}")
    return {**values, **os.environ}


environ = read_settings()
REDIS_SERVER = environ.get("REDIS_SERVER") or "127.0.0.1:6379/1"
REDIS_PASSWORD = environ.get("REDIS_PASSWORD") or None
REDIS_CHANNEL = environ.get("REDIS_CHANNEL") or "ndjson_jobs"
REDIS_QUEUE = environ.get("REDIS_QUEUE") or None
parallel = 16                   # tarefas da fila ao mesmo tempo neste processo
DELAY = 0.3                     # segundos entre as palavras (--delay)
expiry = 600                    # segundos; nada do que o worker cria dura mais que isso
stopping = threading.Event()    # o sinal de término só levanta esta bandeira
# O que passa sozinho: a queda, o Redis que troca de mestre, e as chaves que mudam de nó num cluster (MOVED é um ASK). O
# redis-py 4 não dá classes a estas, fora de um RedisCluster: valem as palavras do Redis.
passing = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, redis.exceptions.ReadOnlyError,
           redis.exceptions.ClusterDownError, redis.exceptions.AskError, redis.exceptions.TryAgainError)
passing_codes = re.compile(r"\b(CLUSTERDOWN|MASTERDOWN|MOVED|ASK|TRYAGAIN) ")
# Sem repetição automática: um RPUSH que rodou e cuja resposta se perdeu rodaria de novo, e o cliente receberia a linha
# duas vezes (o redis-py repete desde a 6.0). E no RESP2, que todo servidor fala (o redis-py 8 pediria o RESP3).
options = {"retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0), "socket_timeout": 10, "health_check_interval": 15,
           "max_connections": 10000} | ({"protocol": 2} if int(redis.__version__.partition(".")[0]) >= 5 else {})


def answer(task):
    """TROQUE ESTA. Recebe o dict da tarefa; produz objetos, cada um uma linha para o cliente."""
    text = task["body"]
    try:
        body = json.loads(text)
        values = (body[name] for name in ("chatInput", "message", "prompt") if name in body)
        text = next(value for value in values if isinstance(value, str))
    except (ValueError, TypeError, StopIteration):
        pass                    # não é JSON, ou não tem um texto nesses campos: vale o texto cru
    yield {"type": "begin"}
    for word in text.split():
        time.sleep(DELAY)
        yield {"type": "item", "content": word + " "}
    yield {"type": "end"}


class servers:
    """O Redis, ou os nós de um cluster: cada tag mora em um, e qualquer outro diz qual é (MOVED)."""

    def __init__(self):
        """Lê REDIS_SERVER, sem conectar. Levanta ValueError se não entende o que lê."""
        self.links, self.homes, self.access = {}, {}, {}    # conexões por endereço, endereço por tag
        if REDIS_SERVER.startswith("cluster://"):
            access, _, self.shown = REDIS_SERVER.removeprefix("cluster://").rpartition("@")
            user, _, password = map(urllib.parse.unquote, access.partition(":"))
            self.access = {"username": user or None, "password": REDIS_PASSWORD or password or None}
            for seed in self.shown.split(","):
                url = urllib.parse.urlsplit("//" + seed)
                self.add((url.hostname, url.port or 6379))
            return
        link = redis.Redis.from_url(REDIS_SERVER if "://" in REDIS_SERVER else "redis://" + REDIS_SERVER, **options)
        used = link.connection_pool.connection_kwargs
        if REDIS_PASSWORD:          # vale mais que a senha da URL, como no proxy
            used["password"] = REDIS_PASSWORD
        where = used.get("path") or f"{used.get('host', 'localhost')}:{used.get('port', 6379)}"
        self.shown, self.links = f"{where}/{used.get('db', 0)}", {None: link}

    def add(self, where):
        """Guarda uma conexão com where, par de endereço e porta, se ainda não há. Retorna where."""
        if where not in self.links:
            self.links[where] = redis.Redis(host=where[0], port=where[1], **self.access, **options)
        return where

    def keeper(self, key):
        """Dá a conexão com o nó que guarda key (str ou bytes), ou com um qualquer que diga qual é."""
        where = None if None in self.links else self.homes.setdefault(tag_of(key), random.choice(list(self.links)))
        return self.links[where]

    def learn(self, key, error):
        """Aprende com o erro de um nó quem guarda key; se não foi MOVED, outro nó dirá. Retorna se foi."""
        if None in self.links:
            return False
        found = re.search(r"\b\d+ (\S+):(\d+)$", str(error))
        if found and (isinstance(error, redis.exceptions.MovedError) or "MOVED " in str(error)):
            self.homes[tag_of(key)] = self.add((found[1], int(found[2])))
            return True
        others = [each for each in self.links if each != self.homes.get(tag_of(key))]
        self.homes[tag_of(key)] = random.choice(others or list(self.links))
        return False


def tag_of(key):
    """Dá o começo de key (str ou bytes) até o fim da tag, como str."""
    return (key.decode(errors="replace") if isinstance(key, bytes) else key).partition("}")[0]


def persist(link, key, action):
    """Chama action(conexão com quem guarda key, é repetição?) até o Redis responder. Retorna o que ela retornar."""
    pause, again = 0.05, False
    while True:
        try:
            return action(link.keeper(key), again)
        except redis.exceptions.RedisError as error:
            if not (isinstance(error, passing) or passing_codes.search(str(error))):
                raise
            again = True
            if not link.learn(key, error):
                if stopping.wait(pause):
                    raise
                pause = min(pause * 2, 1)


def lines(task):
    """Chama answer(task) e produz o texto de cada linha; erro ou término viram a última."""
    try:
        for part in answer(task):
            if stopping.is_set():   # avisar é melhor que deixar o cliente esperar até MAXTIME
                raise InterruptedError("worker encerrado")
            yield json.dumps(part, ensure_ascii=False)
    except Exception as error:      # um defeito em answer() também não pode calar o cliente
        log(f"tarefa {task['task_name']}: {error!r}")
        yield json.dumps({"error": "worker_stopped" if stopping.is_set() else "worker_failed"})


def serve(link, task_key):
    """Responde a tarefa de task_key pela conexão link, numa thread só dela. Sem retorno."""
    claim, owner, number = b"worker:claim:" + task_key, uuid.uuid4().hex, 0
    try:
        # PUBLISH chega a todos os workers; SET NX deixa passar um só. O valor da posse
        # (dono:linhas) conta o que já foi gravado, caso a conexão caia sem resposta.
        mark = f"{owner}:0".encode()
        if not persist(link, task_key, lambda node, again: node.set(claim, mark, nx=True, ex=expiry)
                       or again and node.get(claim) == mark):
            return
        text = persist(link, task_key, lambda node, again: node.get(task_key))
        if text is None:            # o cliente já desistiu
            return
        task = json.loads(text)
        for number, line in enumerate(lines(task), 1):
            mark = f"{owner}:{number}".encode()

            def push(node, again, mark=mark, line=line):
                """Empurra a linha em node; again diz que é uma repetição. Retorna se a tarefa ainda existe."""
                if again and node.get(claim) == mark:
                    return True     # a linha foi gravada; só a resposta se perdeu
                # Em transação, o proxy não apaga nada entre o EXISTS e o RPUSH; e o
                # EXPIRE dá fim à lista mesmo que este processo morra aqui.
                with node.pipeline(transaction=True) as batch:
                    batch.exists(task_key).rpush(task["task_list"], line)
                    batch.expire(task["task_list"], expiry).set(claim, mark, ex=expiry)
                    return batch.execute()[0]

            if not persist(link, task_key, push):   # a chave sumiu: o cliente saiu, ou esgotou o tempo;
                link.keeper(task_key).delete(task["task_list"])     # nosso RPUSH recriou a lista, sem leitor
                log(f"tarefa {task['task_name']}: acabou no proxy antes da linha {number}")
                return
        persist(link, task_key, lambda node, again: node.delete(task_key))  # "acabou"; a lista o proxy ainda lê
        log(f"tarefa {task['task_name']}: {number} linhas")
    except (redis.exceptions.RedisError, ValueError, KeyError) as error:
        log(f"tarefa {task_key.decode(errors='replace')} abandonada: {error}")


def published(link):
    """Produz a chave de cada tarefa publicada no canal; None ao assinar."""
    channel = link.keeper(REDIS_CHANNEL).pubsub()   # num cluster, qualquer nó: o que se publica em um chega a todos
    try:
        channel.subscribe(REDIS_CHANNEL)
        while not stopping.is_set():
            message = channel.get_message(timeout=0.5) or {"type": None}
            if message["type"] == "subscribe":
                log(f"inscrito no canal {REDIS_CHANNEL}")
                yield None
            elif message["type"] == "message":
                yield message["data"]
    finally:
        channel.close()


def queued(link):
    """Produz a chave de cada tarefa tirada da fila, que já não é de mais ninguém; None ao conectar."""
    node = persist(link, REDIS_QUEUE, lambda node, again: (node.exists(REDIS_QUEUE), node)[1])
    log(f"à espera na fila {REDIS_QUEUE}")
    yield None
    while not stopping.is_set():
        if threading.active_count() > parallel:     # as outras ficam para quem estiver livre
            stopping.wait(0.05)
        elif popped := node.blpop(REDIS_QUEUE, timeout=1):
            if stopping.is_set():                   # tirada tarde demais: volta para o seu lugar
                node.lpush(REDIS_QUEUE, popped[1])
                return
            if node.exists(popped[1]):              # senão, venceu enquanto esperava
                yield popped[1]


def listen(link):
    """Recebe tarefas do Redis de link e abre uma thread para cada uma, até o término. Sem retorno."""
    pause = 0
    while not stopping.is_set():
        try:
            for task_key in queued(link) if REDIS_QUEUE else published(link):
                pause = 0
                if task_key:
                    threading.Thread(target=serve, args=(link, task_key)).start()
        except redis.exceptions.RedisError as error:
            if not pause:           # uma linha por queda, não uma por tentativa
                log(f"sem Redis, tentando de novo até conseguir: {error}")
            stopping.wait(pause)    # a primeira vez é já: enquanto não ouve, perde o que o canal diz
            pause = min(pause * 2 or 0.25, 8)
            link.learn(REDIS_QUEUE or REDIS_CHANNEL, error)


def main():
    """Lê os argumentos, conecta e atende até o término. Sem retorno."""
    global DELAY
    parser = argparse.ArgumentParser(description="Worker de exemplo do py-ndjson-proxy.")
    parser.add_argument("--delay", type=float, default=DELAY, help="segundos entre as palavras")
    DELAY = parser.parse_args().delay
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        link = servers()
    except ValueError:              # a frase do redis-py poderia trazer um pedaço da senha
        fail("REDIS_SERVER: este worker entende ip:porta/database, redis://, rediss://, unix:// e cluster://")
    log(f"Redis em {link.shown}")
    listen(link)


if __name__ == "__main__":
    main()
