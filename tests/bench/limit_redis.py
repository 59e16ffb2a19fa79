#!/usr/bin/env python3
"""Servidor `limit-redis` da bancada: o stream empurrado como se escreve com as bibliotecas, sem os deveres do proxy.

Um processo, os streams do asyncio para o HTTP e o redis-py (redis.asyncio, sem o hiredis) para o Redis: cada stream
prende em BLMPOP uma conexão do pool. A tarefa é gravada e publicada como no proxy. Não há limites, prazos, PAUSE, log,
retirada repetível nem recuperação de falhas, e o cliente que sai não é percebido. O fim é a palavra EOF, empurrada na
lista.

Argumentos: porta do Redis. Escreve na saída padrão a porta HTTP que abriu.
"""

import asyncio
import itertools
import json
import resource
import sys

import limit
import redis.asyncio


async def read_body(reader):
    """Lê a requisição.

    Argumentos:
        reader: asyncio.StreamReader do cliente.

    Retorna:
        bytes: o corpo, do tamanho que Content-Length diz.
    """
    return await reader.readexactly(limit.body_size(await reader.readuntil(b"\r\n\r\n")))


async def relay(client, name, writer):
    """Envia as linhas de uma lista até a palavra EOF.

    Argumentos:
        client: redis.asyncio.Redis.
        name: nome da lista.
        writer: asyncio.StreamWriter do cliente.
    """
    while True:
        _, lines = await client.blmpop(0, 1, name, direction="LEFT", count=limit.batch)
        is_last = lines[-1] == b"EOF"
        if is_last:
            lines.pop()
        body = b"".join(line + b"\n" for line in lines)
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        writer.write(chunk + (b"0\r\n\r\n" if is_last else b""))
        await writer.drain()
        if is_last:
            return


async def serve(client, number, reader, writer):
    """Atende um cliente: uma requisição, um stream.

    Argumentos:
        client: redis.asyncio.Redis.
        number: número da tarefa.
        reader: asyncio.StreamReader.
        writer: asyncio.StreamWriter.
    """
    body = await read_body(reader)
    task_key, task_list = f"ndjson_task_{number}", f"ndjson_list_{number}"
    writer.write(limit.head)
    task = {"body": body.decode(), "task_key": task_key, "task_list": task_list}
    await client.set(task_key, json.dumps(task), ex=600)
    await client.publish("ndjson_jobs", task_key)
    try:
        await relay(client, task_list, writer)
    finally:
        await client.delete(task_key, task_list)
        writer.close()


async def main():
    """Programa principal: um argumento, a porta do Redis. Atende até ser encerrado."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    client = redis.asyncio.Redis(host=limit.host, port=int(sys.argv[1]), max_connections=hard, socket_timeout=None)
    numbers = itertools.count()
    listener = await asyncio.start_server(
        lambda reader, writer: serve(client, next(numbers), reader, writer), limit.host, 0, backlog=4096
    )
    print(listener.sockets[0].getsockname()[1], flush=True)
    await listener.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
