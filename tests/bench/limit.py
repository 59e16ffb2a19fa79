#!/usr/bin/env python3
"""Servidor `limit` da bancada: o melhor que um stream empurrado pode ser em Python, sem nenhum dever nosso.

Um processo, asyncio.Protocol puro (sem as camadas de streams e sem biblioteca de Redis), uma conexão do Redis presa
em BLMPOP para cada stream (BLPOP seguido de LPOP em lotes antes do Redis 7). A tarefa é gravada e publicada como no
proxy, mas nada se espera dela: os cabeçalhos saem na hora. Não há limites, prazos, PAUSE, INTERVAL, normalização de
linhas, log, retirada repetível nem recuperação de falhas; o fim é a palavra EOF, empurrada na lista.

Argumentos: porta do Redis. Escreve na saída padrão a porta HTTP que abriu.
"""

import asyncio
import itertools
import json
import os
import resource
import sys

host = "127.0.0.1"
batch = 500
head = (
    b"HTTP/1.1 200 OK\r\nServer: limit\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n"
    b"Cache-Control: no-cache\r\nConnection: close\r\n\r\n"
)


def pack(*words):
    """Monta um comando do Redis.

    Argumentos:
        words: palavras do comando, bytes.

    Retorna:
        bytes do comando em RESP.
    """
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def parse(data, position):
    """Lê uma resposta do Redis.

    Argumentos:
        data: bytes recebidos.
        position: onde a resposta começa.

    Retorna:
        tuple: (valor, posição seguinte); se a resposta ainda não chegou inteira, no lugar da posição, o número de bytes
        que ao menos faltam, negativo.
    """
    stop = data.find(b"\r\n", position)
    if stop < 0:
        return None, -1
    kind, count = data[position : position + 1], data[position + 1 : stop]
    position = stop + 2
    if kind == b"$":
        size = int(count)
        if size < 0:
            return None, position
        missing = position + size + 2 - len(data)
        if missing > 0:
            return None, -missing
        return data[position : position + size], position + size + 2
    if kind == b"*":
        items = []
        for _ in range(max(int(count), 0)):
            item, position = parse(data, position)
            if position < 0:
                return None, position
            items.append(item)
        return items, position
    return count, position


def body_size(text):
    """Lê o tamanho do corpo de uma requisição.

    Argumentos:
        text: os cabeçalhos.

    Retorna:
        int: o de Content-Length; 0 sem ele.
    """
    return int(text.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)


class command_link(asyncio.Protocol):
    """Conexão dos comandos sem espera: grava, publica e apaga."""

    def connection_made(self, transport):
        """Guarda a conexão.

        Argumentos:
            transport: transporte do asyncio.
        """
        self.write = transport.write

    def data_received(self, data):
        """Ignora as respostas, salvo um erro, que encerra o servidor.

        Argumentos:
            data: bytes recebidos.
        """
        if data.startswith(b"-") or b"\n-" in data:
            sys.exit(f"limit: {data!r}")


class list_link(asyncio.Protocol):
    """Conexão presa à lista de um stream; ao fim dele, serve a outro."""

    def __init__(self, server):
        """Começa livre.

        Argumentos:
            server: o servidor.
        """
        self.server = server
        self.owner = None
        self.parts = []
        self.missing = 0

    def connection_made(self, transport):
        """Guarda a conexão.

        Argumentos:
            transport: transporte do asyncio.
        """
        self.transport = transport

    def serve(self, owner):
        """Passa a esperar pelas linhas de um stream.

        Argumentos:
            owner: o stream (client).
        """
        self.owner = owner
        owner.link = self
        if self.server.has_blmpop:
            self.take = pack(b"BLMPOP", b"0", b"1", owner.list, b"LEFT", b"COUNT", b"%d" % batch)
        else:
            self.take = pack(b"BLPOP", owner.list, b"0") + pack(b"LPOP", owner.list, b"%d" % batch)
        self.ask()

    def ask(self):
        """Pede as próximas linhas, a não ser que o cliente esteja atrasado."""
        if not self.owner.paused:
            self.transport.write(self.take)

    def data_received(self, data):
        """Entrega as linhas que chegaram inteiras.

        Argumentos:
            data: bytes recebidos.
        """
        if self.parts:
            # Uma linha longa chega em muitos pedaços: lê-la a cada um custaria o quadrado do tamanho.
            self.parts.append(data)
            self.missing -= len(data)
            if self.missing > 0:
                return
            data = b"".join(self.parts)
        reply, position = parse(data, 0)
        lines = []
        if position > 0:
            if self.server.has_blmpop:
                lines = reply[1]
            else:
                more, position = parse(data, position)
                lines = [reply[1], *(more or [])]
        if position < 0:
            self.parts, self.missing = [data], -position
            return
        self.parts = []
        self.deliver(lines)

    def deliver(self, lines):
        """Escreve linhas em um chunk e pede outras, ou encerra na palavra EOF.

        Argumentos:
            lines: elementos da lista.
        """
        owner = self.owner
        if lines[-1] == b"EOF":
            lines.pop()
            body = b"\n".join([*lines, b""])
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if lines else b""
            owner.transport.write(chunk + b"0\r\n\r\n")
            owner.transport.close()
            self.release()
            return
        body = b"\n".join(lines)
        owner.transport.write(b"%x\r\n%b\n\r\n" % (len(body) + 1, body))
        self.ask()

    def release(self):
        """Fica livre para outro stream."""
        self.server.commands.write(pack(b"DEL", self.owner.key, self.owner.list))
        self.owner.link = None
        self.owner = None
        self.server.free.append(self)


class client(asyncio.Protocol):
    """Um cliente HTTP: uma requisição, um stream."""

    def __init__(self, server):
        """Começa sem requisição.

        Argumentos:
            server: o servidor.
        """
        self.server = server
        self.buffer = b""
        self.link = None
        self.paused = False

    def connection_made(self, transport):
        """Guarda a conexão.

        Argumentos:
            transport: transporte do asyncio.
        """
        self.transport = transport

    def data_received(self, data):
        """Junta a requisição; inteira, começa o stream.

        Argumentos:
            data: bytes recebidos.
        """
        self.buffer += data
        text, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found or len(body) < body_size(text):
            return
        number = b"%d" % next(self.server.numbers)
        self.key = b"ndjson_task_" + number
        self.list = b"ndjson_list_" + number
        task = {"body": body.decode(), "task_key": self.key.decode(), "task_list": self.list.decode()}
        self.transport.write(head)
        self.server.commands.write(
            pack(b"SET", self.key, json.dumps(task).encode(), b"EX", b"600")
            + pack(b"PUBLISH", b"ndjson_jobs", self.key)
        )
        if self.server.free:
            self.server.free.pop().serve(self)
        else:
            task = asyncio.ensure_future(self.server.connect(self))
            self.server.tasks.add(task)
            task.add_done_callback(self.server.tasks.discard)

    def pause_writing(self):
        """Deixa de pedir linhas enquanto o cliente não lê."""
        self.paused = True

    def resume_writing(self):
        """Volta a pedir linhas."""
        self.paused = False
        if self.link:
            self.link.ask()

    def connection_lost(self, error):
        """Solta a conexão do Redis de um cliente que saiu.

        Argumentos:
            error: exceção ou None.
        """
        if self.link:
            self.server.commands.write(pack(b"DEL", self.key, self.list))
            self.link.transport.close()
            self.link = None


class server:
    """O servidor e suas conexões com o Redis."""

    def __init__(self, redis_port):
        """Guarda o endereço do Redis.

        Argumentos:
            redis_port: porta em 127.0.0.1.
        """
        self.redis_port = redis_port
        self.numbers = itertools.count()
        self.free = []
        self.tasks = set()
        self.has_blmpop = False

    async def connect(self, owner):
        """Abre mais uma conexão com o Redis para um stream.

        Argumentos:
            owner: o stream.
        """
        loop = asyncio.get_running_loop()
        _, link = await loop.create_connection(lambda: list_link(self), host, self.redis_port)
        link.serve(owner)

    async def run(self):
        """Abre a porta, escreve qual é e atende até ser encerrado."""
        loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_connection(host, self.redis_port)
        writer.write(pack(b"BLMPOP", b"0.001", b"1", b"bench_none", b"LEFT"))
        self.has_blmpop = not (await reader.readline()).startswith(b"-")
        writer.close()
        _, self.commands = await loop.create_connection(command_link, host, self.redis_port)
        listener = await loop.create_server(lambda: client(self), host, 0, backlog=4096)
        print(listener.sockets[0].getsockname()[1], flush=True)
        await listener.serve_forever()


def main():
    """Programa principal: um argumento, a porta do Redis."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        asyncio.run(server(int(sys.argv[1])).run())
    except KeyboardInterrupt:
        os._exit(0)


if __name__ == "__main__":
    main()
