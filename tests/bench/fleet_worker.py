#!/usr/bin/env python3
"""Worker da frota: disputa cada tarefa com os outros e responde em partes, como o README manda a um worker sério.

Ouve o canal, toma posse com SET NX, lê a tarefa com GET e, em cada instante sorteado, pergunta se a chave ainda existe,
empurra a linha e renova a validade da lista em uma só transação. Apaga a chave no fim. Uma thread basta: o que vence
junto vai junto.

Recebe comandos pela entrada padrão, um objeto JSON por linha ("report" é o único), e sai quando ela se fecha.
"""

import heapq
import json
import os
import random
import re
import select
import sys
import time

import redis

host = "127.0.0.1"
channel = "ndjson_jobs"
claim_prefix = b"worker:claim:"
# Tempo máximo sem olhar para os comandos, em segundos.
tick = 0.02


class fleet_worker:
    """Um dos workers da frota."""

    def __init__(self, port, lines, low, high, expiry):
        """Conecta e assina o canal.

        Argumentos:
            port: porta do Redis.
            lines: linhas de cada tarefa.
            low: menor intervalo entre linhas, em segundos.
            high: maior intervalo.
            expiry: validade do que o worker cria, em segundos.
        """
        self.lines, self.low, self.high, self.expiry = lines, low, high, expiry
        self.link = redis.Redis(host=host, port=port, db=0, socket_timeout=30)
        self.channel = self.link.pubsub(ignore_subscribe_messages=True)
        self.channel.subscribe(channel)
        self.name = f"{os.getpid()}".encode()
        self.chance = random.Random(os.getpid())
        self.events = []
        self.tasks = {}
        self.strange = []
        self.pushed = self.dropped = 0
        self.pending = b""

    def run(self):
        """Atende tarefas e comandos até a entrada se fechar."""
        while True:
            wait = max(0.0, min(tick, self.events[0][0] - time.monotonic())) if self.events else tick
            keys = []
            message = self.channel.get_message(timeout=wait)
            while message:
                keys.append(message["data"])
                message = self.channel.get_message(timeout=0)
            if keys:
                self.claim(keys)
            self.push_due()
            while select.select([0], [], [], 0)[0]:
                self.read_command()

    def read_command(self):
        """Lê comandos; no fim da entrada, sai do programa."""
        data = os.read(0, 65536)
        if not data:
            sys.exit(0)
        *whole, self.pending = (self.pending + data).split(b"\n")
        for _ in whole:
            told = {"tasks": self.tasks, "pushed": self.pushed, "dropped": self.dropped, "strange": self.strange}
            print(json.dumps(told), flush=True)

    def claim(self, keys):
        """Toma posse das tarefas que puder e agenda as linhas delas.

        Argumentos:
            keys: chaves publicadas no canal, bytes.
        """
        with self.link.pipeline(transaction=False) as batch:
            for key in keys:
                batch.set(claim_prefix + key, self.name, nx=True, ex=self.expiry).get(key)
            answers = batch.execute()
        for key, claimed, text in zip(keys, answers[::2], answers[1::2], strict=True):
            if not claimed:
                continue
            task = json.loads(text) if text else {"path": ""}
            found = re.fullmatch(r"/fleet/(\d{6})", task["path"])
            if not found or task["body"] not in ("", found[1]):
                self.strange.append(key.decode())
                continue
            self.tasks.setdefault(found[1], []).append(key.decode())
            self.schedule(time.monotonic(), (found[1], 0, key, task["task_list"]))

    def schedule(self, now, event):
        """Agenda uma linha, ou o fim.

        Argumentos:
            now: relógio monotônico em segundos.
            event: (número, ordem, chave, lista).
        """
        heapq.heappush(self.events, (now + self.chance.uniform(self.low, self.high), *event))

    def push_due(self):
        """Empurra as linhas vencidas e encerra as tarefas que acabaram, em uma transação."""
        now = time.monotonic()
        due = []
        while self.events and self.events[0][0] <= now:
            due.append(heapq.heappop(self.events)[1:])
        if not due:
            return
        with self.link.pipeline(transaction=True) as batch:
            for number, order, key, items in due:
                batch.exists(key)
                if order < self.lines:
                    batch.rpush(items, f'{{"s":"{number}","n":"{order:08d}"}}').expire(items, self.expiry)
                else:
                    batch.delete(key)
            answers = iter(batch.execute())
        for number, order, key, items in due:
            living = next(answers)
            for _ in range(2 if order < self.lines else 1):
                next(answers)
            self.pushed += order < self.lines
            if not living:
                # A chave sumiu: ninguém lê. O RPUSH recriou a lista.
                self.dropped += 1
                self.link.delete(items)
            elif order < self.lines:
                self.schedule(now, (number, order + 1, key, items))


def main(words):
    """Programa principal.

    Argumentos:
        words: porta do Redis, linhas por tarefa, menor e maior intervalo, validade.
    """
    port, lines, low, high, expiry = words
    made = fleet_worker(int(port), int(lines), float(low), float(high), int(expiry))
    print(json.dumps({"ready": True}), flush=True)
    made.run()


if __name__ == "__main__":
    main(sys.argv[1:])
