#!/usr/bin/env python3
"""Trabalhador da bancada: empurra as linhas, cada uma com o relógio monotônico de logo antes do envio.

Fala cru com o servidor da vez, para custar pouco:

    task    o contrato do proxy: ouve o canal, lê a tarefa com GET, RPUSH na lista, DEL na chave
    limit   o mesmo, com a palavra EOF no fim da lista
    nchan   POST em /pub/STREAM, DELETE no fim
    webdis  PUBLISH no canal de nome STREAM; não há fim
    floor   o próprio trabalhador é o servidor HTTP: escreve direto no soquete do motorista. É o piso da bancada.

Os instantes de cada linha são sorteados antes, com semente, e são os mesmos para todos os servidores de uma rodada.
Recebe comandos pela entrada padrão, um objeto JSON por linha, e responde do mesmo modo pela saída padrão.
"""

import gc
import json
import os
import random
import re
import resource
import select
import socket
import sys
import time

host = "127.0.0.1"
channel = b"ndjson_jobs"
burst_lines = 100
task_body = re.compile(rb'"body": ?"(\d{6})"')
task_list = re.compile(rb'"task_list": ?"([^"]+)"')


def pack(*words):
    """Monta um comando do Redis.

    Argumentos:
        words: palavras do comando, bytes.

    Retorna:
        bytes do comando em RESP.
    """
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def parse_bulks(data):
    """Lê as cadeias completas (`$N`) de um trecho de RESP, ignorando o resto.

    Argumentos:
        data: bytes recebidos.

    Retorna:
        tuple: (lista de bytes, posição depois da última completa).

    Levanta:
        ValueError: se uma resposta é um erro.
    """
    found, position = [], 0
    while (stop := data.find(b"\r\n", position)) >= 0:
        kind = data[position : position + 1]
        if kind == b"-":
            raise ValueError(data[position:stop].decode())
        if kind != b"$":
            position = stop + 2
            continue
        size = int(data[position + 1 : stop])
        if size < 0:
            found.append(b"")
            position = stop + 2
            continue
        if stop + 2 + size + 2 > len(data):
            break
        found.append(data[stop + 2 : stop + 2 + size])
        position = stop + 2 + size + 2
    return found, position


class link:
    """Uma conexão com o que ela ainda não leu."""

    def __init__(self, port):
        """Conecta.

        Argumentos:
            port: porta em 127.0.0.1.
        """
        self.sock = socket.create_connection((host, port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.fileno = self.sock.fileno
        self.pending = b""

    def receive(self):
        """Lê o que chegou.

        Retorna:
            bytes: o que estava pendente e o que chegou.

        Levanta:
            ConnectionError: se o servidor fechou a conexão.
        """
        data = self.sock.recv(1 << 18)
        if not data:
            raise ConnectionError("o servidor fechou a conexão do trabalhador")
        data, self.pending = self.pending + data, b""
        return data


class worker:
    """O que é comum a todos os servidores: comandos, agenda e envio."""

    def __init__(self):
        """Começa sem streams nem plano."""
        self.pending = b""
        self.commands = []
        self.known = {}
        self.inputs = {0: self.read_commands}
        self.answering = False
        self.ends = {}
        self.pushed = 0
        self.pads = {}
        # De cada stream, o relógio posto em cada linha, em ordem: o que o motorista deve ter recebido.
        self.clocks = {}

    # -- o que cada servidor define -------------------------------------------

    def discover(self, first, count):
        """Espera até conhecer os streams; por padrão o nome deles basta.

        Argumentos:
            first: número do primeiro.
            count: quantos.
        """
        for number in range(first, first + count):
            self.known[number] = b"%06d" % number

    def push(self, target, lines):
        """Monta o envio de linhas.

        Argumentos:
            target: o stream como discover o guardou.
            lines: bytes de cada linha, sem LF.

        Retorna:
            tuple: (soquete, bytes a enviar).
        """
        raise NotImplementedError

    def close(self, target):
        """Monta o fim de um stream.

        Argumentos:
            target: o stream como discover o guardou.

        Retorna:
            tuple: (soquete, bytes a enviar, vazios se não há fim).
        """
        raise NotImplementedError

    # -- laço -----------------------------------------------------------------

    def step(self, timeout):
        """Espera por respostas, tarefas ou comandos e os lê.

        Argumentos:
            timeout: espera máxima em segundos, com precisão de microssegundos (por isso select), ou None.
        """
        for item in select.select(list(self.inputs), [], [], timeout)[0]:
            self.inputs[item]()

    def read_commands(self):
        """Lê os comandos que chegaram; no fim da entrada, sai do programa."""
        data = os.read(0, 1 << 20)
        if not data:
            sys.exit(0)
        *lines, self.pending = (self.pending + data).split(b"\n")
        self.commands += [json.loads(line) for line in lines]

    def run(self):
        """Executa um comando de cada vez."""
        while True:
            while not self.commands:
                self.step(None)
            command = self.commands.pop(0)
            try:
                answer = getattr(self, f"do_{command.pop('do')}")(**command)
            except (ValueError, OSError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()

    def send(self, sock, data):
        """Envia tudo, lendo enquanto isso as respostas que chegam.

        Argumentos:
            sock: soquete.
            data: bytes.
        """
        view = memoryview(data)
        while view:
            try:
                view = view[sock.send(view, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                readable, _, _ = select.select(list(self.inputs), [sock], [], 10)
                for item in readable:
                    self.inputs[item]()

    # -- comandos -------------------------------------------------------------

    def do_known(self, first, count, timeout):
        """Espera até conhecer um grupo de streams.

        Argumentos:
            first: número do primeiro.
            count: quantos.
            timeout: prazo em segundos.

        Retorna:
            dict: known, quantos do grupo são conhecidos.
        """
        deadline = time.monotonic() + timeout
        self.discover(first, count)
        while time.monotonic() < deadline:
            known = sum(number in self.known for number in range(first, first + count))
            if known == count:
                break
            self.step(0.05)
        return {"known": known}

    def do_answer(self, on):
        """Liga ou desliga o modo em que cada tarefa recebe na hora uma linha e o fim.

        Argumentos:
            on: verdadeiro para ligar.

        Retorna:
            dict: vazio.
        """
        self.answering = on
        return {}

    def do_clocks(self, first, count):
        """Diz os relógios postos nas linhas de um grupo de streams, para a conferência.

        Argumentos:
            first: número do primeiro.
            count: quantos.

        Retorna:
            dict: clocks, uma lista para cada stream, com o relógio de cada linha, em ns.
        """
        return {"clocks": [self.clocks.get(number, []) for number in range(first, first + count)]}

    def do_forget(self):
        """Esquece os streams que já acabaram, para que seus números possam ser usados de novo.

        Retorna:
            dict: vazio.
        """
        self.known.clear()
        self.clocks.clear()
        return {}

    def do_timed(self, seed, first, count, lines, gap, pad, end, every=True):
        """Empurra linhas em instantes sorteados.

        Argumentos:
            seed: semente do sorteio.
            first: número do primeiro stream.
            count: quantos.
            lines: linhas de cada um.
            gap: [mínimo, máximo] segundos antes de cada linha e antes do fim.
            pad: bytes de enchimento de cada linha.
            end: verdadeiro para encerrar cada um.
            every: falso para que a primeira linha já saia depois de um tempo de 0 a máximo (fases espalhadas).

        Retorna:
            dict: ends (número -> ns de antes do fim), pushed, seconds e late (atraso do próprio trabalhador, p50 e
            p99, em ms).
        """
        chance = random.Random(seed)
        events = []
        for number in range(first, first + count):
            moment = chance.uniform(*gap) if every else chance.uniform(0, gap[1])
            for order in range(lines):
                events.append((moment, number, order))
                moment += chance.uniform(*gap)
            if end:
                events.append((moment, number, -1))
        events.sort()
        self.ends, late = {}, []
        clock = time.monotonic_ns
        began = clock() + 1_000_000
        for moment, number, order in events:
            due = began + int(moment * 1e9)
            while (now := clock()) < due:
                self.step((due - now) / 1e9)
            late.append(now - due)
            if order < 0:
                self.finish(number)
            else:
                self.push_one(number, order, pad)
        late.sort()
        return {
            "ends": self.ends,
            "pushed": count * lines,
            "seconds": (clock() - began) / 1e9,
            "late": [late[int(len(late) * part)] / 1e6 for part in (0.5, 0.99)] if late else [0, 0],
        }

    def do_burst(self, first, count, lines, pad, batch=burst_lines):
        """Empurra todas as linhas o mais depressa possível, em lotes já montados, e encerra os streams.

        Argumentos:
            first: número do primeiro stream.
            count: quantos.
            lines: linhas de cada um.
            pad: bytes de enchimento de cada linha.
            batch: linhas por envio.

        Retorna:
            dict: began (ns de antes do primeiro envio) e ends (número -> ns de antes do fim).
        """
        tail = b'","p":"' + b"x" * pad + b'"}' if pad else b'"}'
        ready = []
        for start in range(0, lines, batch):
            for number in range(first, first + count):
                texts = [
                    b'{"s":"%06d","n":"%08d","t":"%020d' % (number, order, 0) + tail
                    for order in range(start, min(start + batch, lines))
                ]
                ready.append(self.push(self.known[number], texts))
        self.clocks |= {number: [0] * lines for number in range(first, first + count)}
        self.ends = {}
        began = time.monotonic_ns()
        for sock, data in ready:
            self.send(sock, data)
            self.step(0)
        for number in range(first, first + count):
            self.finish(number)
        return {"began": began, "ends": self.ends}

    def push_one(self, number, order, pad):
        """Empurra uma linha com o relógio do instante.

        Argumentos:
            number: número do stream.
            order: ordem da linha.
            pad: bytes de enchimento.
        """
        target = self.known[number]
        text = b'{"s":"%06d","n":"%08d","t":"' % (number, order)
        tail = b'"}'
        if pad:
            tail = self.pads.get(pad) or self.pads.setdefault(pad, b'","p":"' + b"x" * pad + b'"}')
        clock = time.monotonic_ns()
        sock, data = self.push(target, [text + b"%020d" % clock + tail])
        self.send(sock, data)
        self.clocks.setdefault(number, []).append(clock)

    def finish(self, number):
        """Encerra um stream, anotando o instante.

        Argumentos:
            number: número do stream.
        """
        sock, data = self.close(self.known[number])
        if data:
            self.ends[number] = time.monotonic_ns()
            self.send(sock, data)


class task_worker(worker):
    """Trabalhador do contrato: canal, GET, RPUSH, DEL."""

    def __init__(self, port):
        """Conecta ao Redis e assina o canal.

        Argumentos:
            port: porta do Redis.
        """
        super().__init__()
        self.listener, self.fetcher, self.pusher = link(port), link(port), link(port)
        self.asked = []
        self.listener.sock.sendall(pack(b"SUBSCRIBE", channel))
        while not self.listener.receive().endswith(b":1\r\n"):
            pass
        self.inputs |= {
            self.listener: self.read_tasks,
            self.fetcher: self.read_bodies,
            self.pusher: self.read_replies,
        }

    def discover(self, first, count):
        """Nada a fazer: as tarefas chegam pelo canal.

        Argumentos:
            first: número do primeiro.
            count: quantos.
        """

    def read_tasks(self):
        """Lê as chaves publicadas no canal e pede o conteúdo de cada uma."""
        data = self.listener.receive()
        found, position = parse_bulks(data)
        # Cada mensagem são três cadeias; uma mensagem pela metade fica inteira para depois.
        whole = len(found) // 3 * 3
        if whole != len(found):
            found, position = found[:whole], self.message_end(data, whole)
        self.listener.pending = data[position:]
        keys = found[2::3]
        if keys:
            self.asked += keys
            self.send(self.fetcher.sock, b"".join(pack(b"GET", key) for key in keys))

    def message_end(self, data, bulks):
        """Acha onde acaba um número de cadeias.

        Argumentos:
            data: bytes recebidos.
            bulks: número de cadeias.

        Retorna:
            int: posição depois da última delas.
        """
        position = 0
        while bulks:
            stop = data.find(b"\r\n", position)
            if data[position : position + 1] == b"$":
                stop += int(data[position + 1 : stop]) + 2
                bulks -= 1
            position = stop + 2
        return position

    def read_bodies(self):
        """Lê as tarefas pedidas."""
        data = self.fetcher.receive()
        found, position = parse_bulks(data)
        self.fetcher.pending = data[position:]
        output = []
        for text in found:
            key = self.asked.pop(0)
            if not text:
                continue
            number = int(task_body.search(text)[1])
            self.known[number] = (key, task_list.search(text)[1])
            if self.answering:
                clock = time.monotonic_ns()
                self.clocks[number] = [clock]
                line = b'{"s":"%06d","n":"%08d","t":"%020d"}' % (number, 0, clock)
                output += [self.push(self.known[number], [line])[1], self.close(self.known[number])[1]]
        if output:
            self.send(self.pusher.sock, b"".join(output))

    def read_replies(self):
        """Descarta as respostas dos RPUSH; um erro derruba a medição.

        Levanta:
            ValueError: se o Redis respondeu com um erro.
        """
        data = self.pusher.receive()
        if b"-" in data:
            raise ValueError(data[:80])

    def push(self, target, lines):
        """Monta um RPUSH.

        Argumentos:
            target: (chave, lista).
            lines: bytes de cada linha.

        Retorna:
            tuple: (soquete, bytes).
        """
        return self.pusher.sock, pack(b"RPUSH", target[1], *lines)

    def close(self, target):
        """Monta o DEL da tarefa.

        Argumentos:
            target: (chave, lista).

        Retorna:
            tuple: (soquete, bytes).
        """
        return self.pusher.sock, pack(b"DEL", target[0])


class limit_worker(task_worker):
    """Trabalhador do servidor limit: o fim é a palavra EOF."""

    def close(self, target):
        """Monta o RPUSH da palavra EOF.

        Argumentos:
            target: (chave, lista).

        Retorna:
            tuple: (soquete, bytes).
        """
        return self.pusher.sock, pack(b"RPUSH", target[1], b"EOF")


class webdis_worker(worker):
    """Trabalhador do webdis: PUBLISH no canal do stream."""

    def __init__(self, port):
        """Conecta ao Redis.

        Argumentos:
            port: porta do Redis.
        """
        super().__init__()
        self.pusher = link(port)
        self.inputs[self.pusher] = self.pusher.receive

    def push(self, target, lines):
        """Monta um PUBLISH por linha.

        Argumentos:
            target: nome do canal.
            lines: bytes de cada linha.

        Retorna:
            tuple: (soquete, bytes).
        """
        return self.pusher.sock, b"".join(pack(b"PUBLISH", target, line) for line in lines)

    def close(self, target):
        """Não há como encerrar uma assinatura do webdis.

        Argumentos:
            target: nome do canal.

        Retorna:
            tuple: (soquete, bytes vazios).
        """
        return self.pusher.sock, b""


class nchan_worker(worker):
    """Trabalhador do nchan: publica por HTTP, em uma conexão mantida."""

    def __init__(self, port):
        """Conecta ao nginx.

        Argumentos:
            port: porta do nginx.
        """
        super().__init__()
        self.pusher = link(port)
        self.inputs[self.pusher] = self.read_replies

    def read_replies(self):
        """Descarta as respostas; uma recusa derruba a medição.

        Levanta:
            ValueError: se o nginx recusou uma publicação.
        """
        data = self.pusher.receive()
        if b"HTTP/1.1 4" in data or b"HTTP/1.1 5" in data:
            raise ValueError(data[:80])

    def push(self, target, lines):
        """Monta um POST; o LF vai junto, pois o nchan não o acrescenta, e um lote é uma mensagem de várias linhas.

        Argumentos:
            target: nome do canal.
            lines: bytes de cada linha.

        Retorna:
            tuple: (soquete, bytes).
        """
        body = b"\n".join(lines)
        return self.pusher.sock, (
            b"POST /pub/%b HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n%b\n" % (target, len(body) + 1, body)
        )

    def close(self, target):
        """Monta o DELETE do canal.

        Argumentos:
            target: nome do canal.

        Retorna:
            tuple: (soquete, bytes).
        """
        return self.pusher.sock, b"DELETE /pub/%b HTTP/1.1\r\nHost: bench\r\n\r\n" % target


class floor_worker(worker):
    """O piso: o trabalhador é o servidor HTTP, sem Redis nem outro processo no meio."""

    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"

    def __init__(self, port):
        """Abre a porta.

        Argumentos:
            port: sem uso.
        """
        super().__init__()
        self.listener = socket.create_server((host, 0), backlog=4096)
        self.inputs[self.listener] = self.accept

    def discover(self, first, count):
        """Nada a fazer: os streams são conhecidos quando conectam.

        Argumentos:
            first: número do primeiro.
            count: quantos.
        """

    def accept(self):
        """Aceita um cliente e lhe envia os cabeçalhos."""
        sock, _ = self.listener.accept()
        sock.settimeout(5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        text = b""
        while b"\r\n\r\n" not in text or len(text.partition(b"\r\n\r\n")[2]) < 6:
            text += sock.recv(4096)
        sock.sendall(self.head)
        self.known[int(text[-6:])] = sock

    def push(self, target, lines):
        """Monta um chunk.

        Argumentos:
            target: soquete do cliente.
            lines: bytes de cada linha.

        Retorna:
            tuple: (soquete, bytes).
        """
        body = b"\n".join(lines)
        return target, b"%x\r\n%b\n\r\n" % (len(body) + 1, body)

    def close(self, target):
        """Monta o último chunk.

        Argumentos:
            target: soquete do cliente.

        Retorna:
            tuple: (soquete, bytes).
        """
        return target, b"0\r\n\r\n"

    def finish(self, number):
        """Encerra um stream e fecha a conexão.

        Argumentos:
            number: número do stream.
        """
        super().finish(number)
        self.known.pop(number).close()


kinds = {
    "task": task_worker,
    "limit": limit_worker,
    "webdis": webdis_worker,
    "nchan": nchan_worker,
    "floor": floor_worker,
}


def main():
    """Programa principal: dois argumentos, o tipo e a porta do Redis (ou do nginx)."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.disable()
    made = kinds[sys.argv[1]](int(sys.argv[2]))
    listener = getattr(made, "listener", None)
    port = listener.getsockname()[1] if isinstance(listener, socket.socket) else 0
    print(json.dumps({"port": port}), flush=True)
    made.run()


if __name__ == "__main__":
    main()
