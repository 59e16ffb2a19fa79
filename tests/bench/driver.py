#!/usr/bin/env python3
"""Motorista da bancada: abre os streams, lê tudo com soquetes crus e epoll e, só depois, confere cada linha.

No caminho medido faz o mínimo: epoll, recv, relógio, append. O exame (chunks, ordem, linhas perdidas, repetidas,
trocadas ou alheias, fim limpo) é feito depois que a medição acabou, para que não seja ele o medido.

Recebe comandos pela entrada padrão, um objeto JSON por linha, e responde do mesmo modo pela saída padrão:

    open    abre streams; responde quando todos receberam os cabeçalhos
    finish  responde quando todos os streams abertos acabaram
    settle  responde quando nada mais chega
    loop    requisições em série, um número fixo delas ao mesmo tempo
    drop    fecha de repente os streams abertos
    check   confere os streams e devolve as latências
    forget  fecha e esquece tudo
"""

import bisect
import errno
import gc
import itertools
import json
import os
import re
import resource
import select
import socket
import sys
import time

# Formato de uma linha: campos de largura fixa.
#   {"s":"000012","n":"00000001","t":"00000012345678901234"}
# s é o stream, n a ordem, t o relógio monotônico em ns antes do RPUSH; as linhas grandes têm mais um campo, p.
line_size = 56
stream_at = slice(6, 12)
order_at = slice(19, 27)
# O começo de uma linha, com os três campos; o fim é '"}' e LF, ou o enchimento entre eles.
line_form = b'{"s":"%06d","n":"%08d","t":"%020d'

# O último chunk vem depois de outro ou dos cabeçalhos: sem o CRLF da frente, um cabeçalho final acabado em 0 o imitaria.
last_chunk = b"\r\n0\r\n\r\n"
read_size = 1 << 18


class stream:
    """Um stream do ponto de vista do cliente: o que chegou e quando."""

    __slots__ = ("connected", "done", "events", "failure", "finished", "head", "number", "sock", "tail")

    def __init__(self, number, sock):
        """Começa sem nada recebido.

        Argumentos:
            number: número do stream na medição.
            sock: soquete já conectado ou conectando.
        """
        self.number = number
        self.sock = sock
        self.connected = time.monotonic_ns()
        self.events = []
        self.tail = b""
        self.head = self.finished = self.done = self.failure = None


class driver:
    """Laço único de epoll sobre os streams e os comandos."""

    def __init__(self, kind):
        """Prepara o laço.

        Argumentos:
            kind: contrato do servidor: "task" (proxy e limit), "nchan", "webdis" ou "floor".
        """
        self.kind = kind
        self.poller = select.epoll()
        self.poller.register(0, select.EPOLLIN)
        self.live = {}
        self.streams = {}
        self.pending = b""
        self.commands = []
        self.waiting_heads = self.active = 0
        self.queue = None
        self.closes = kind in ("task", "floor")

    # -- requisições ----------------------------------------------------------

    def request(self, number):
        """Monta a requisição de um stream.

        Argumentos:
            number: número do stream.

        Retorna:
            bytes da requisição inteira.
        """
        name = b"%06d" % number
        if self.kind == "nchan":
            return b"GET /sub/%b HTTP/1.1\r\nHost: bench\r\nTE: chunked\r\nConnection: close\r\n\r\n" % name
        if self.kind == "webdis":
            return b"GET /SUBSCRIBE/%b HTTP/1.1\r\nHost: bench\r\n\r\n" % name
        return (
            b"POST /bench HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            b"Content-Length: 6\r\nConnection: close\r\n\r\n" + name
        )

    def start(self, number, port):
        """Conecta e envia a requisição de um stream.

        Argumentos:
            number: número do stream.
            port: porta do servidor em 127.0.0.1.
        """
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        item = stream(number, sock)
        self.streams[number] = self.live[sock.fileno()] = item
        self.active += 1
        self.waiting_heads += 1
        code = sock.connect_ex(("127.0.0.1", port))
        events = select.EPOLLIN
        if code == 0:
            sock.send(self.request(number))
        elif code == errno.EINPROGRESS:
            events |= select.EPOLLOUT
        self.poller.register(sock.fileno(), events)
        if code not in (0, errno.EINPROGRESS):
            self.fail(item, os.strerror(code))

    def connected(self, item):
        """Envia a requisição de uma conexão que acaba de se completar.

        Argumentos:
            item: o stream.
        """
        try:
            item.sock.send(self.request(item.number))
            self.poller.modify(item.sock.fileno(), select.EPOLLIN)
        except OSError as error:
            self.fail(item, error.strerror)

    def fail(self, item, reason):
        """Anota a falha de um stream e o encerra.

        Argumentos:
            item: o stream.
            reason: frase.
        """
        item.failure = item.failure or reason
        self.leave(item)

    def leave(self, item):
        """Fecha o soquete de um stream e o tira do laço.

        Argumentos:
            item: o stream.
        """
        if item.sock is None:
            return
        del self.live[item.sock.fileno()]
        item.sock.close()
        item.sock = None
        if item.head is None:
            self.waiting_heads -= 1
        self.active -= 1

    # -- laço -----------------------------------------------------------------

    def step(self, timeout):
        """Espera por dados e lê o que houver.

        Argumentos:
            timeout: espera máxima em segundos.
        """
        live, clock = self.live, time.monotonic_ns
        for descriptor, event in self.poller.poll(timeout):
            if descriptor == 0:
                self.read_commands()
                continue
            item = live.get(descriptor)
            if item is None:
                continue
            if event & select.EPOLLOUT:
                self.connected(item)
                continue
            try:
                data = item.sock.recv(read_size)
            except BlockingIOError:
                continue
            except OSError as error:
                self.fail(item, error.strerror)
                continue
            now = clock()
            if not data:
                item.finished = now
                self.leave(item)
                continue
            item.events.append((now, data))
            if item.head is None:
                self.look_for_head(item, now)
            tail = data if len(data) > 6 else (item.tail + data)[-7:]
            if tail.endswith(last_chunk):
                item.done = now
                if self.queue is not None or not self.closes:
                    item.finished = now
                    self.leave(item)
            item.tail = tail[-7:]

    def look_for_head(self, item, now):
        """Procura o fim dos cabeçalhos de um stream.

        Argumentos:
            item: o stream, cujo último dado acaba de ser guardado.
            now: instante da chegada, em ns.
        """
        data = item.events[-1][1] if len(item.events) == 1 else b"".join(part for _, part in item.events)
        if b"\r\n\r\n" in data:
            item.head = now
            self.waiting_heads -= 1

    def read_commands(self):
        """Lê os comandos que chegaram; no fim da entrada, sai do programa."""
        data = os.read(0, 1 << 20)
        if not data:
            sys.exit(0)
        *lines, self.pending = (self.pending + data).split(b"\n")
        self.commands += [json.loads(line) for line in lines]

    def run(self):
        """Executa um comando de cada vez, lendo os streams o tempo todo."""
        while True:
            while not self.commands:
                self.step(None)
            command = self.commands.pop(0)
            answer = getattr(self, f"do_{command.pop('do')}")(**command)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()

    # -- comandos -------------------------------------------------------------

    def do_open(self, first, count, port, window, timeout):
        """Abre streams e espera pelos cabeçalhos de todos.

        Argumentos:
            first: número do primeiro.
            count: quantos.
            port: porta do servidor.
            window: quantos podem estar à espera dos cabeçalhos ao mesmo tempo.
            timeout: prazo em segundos.

        Retorna:
            dict: seconds (do primeiro connect ao último cabeçalho), failed e heads (ns de cada abertura).
        """
        began = time.monotonic_ns()
        deadline = time.monotonic() + timeout
        numbers = iter(range(first, first + count))
        left = count
        while left or self.waiting_heads:
            while left and self.waiting_heads < window:
                self.start(next(numbers), port)
                left -= 1
            if time.monotonic() > deadline:
                break
            self.step(0.1 if self.waiting_heads else 0)
        items = [self.streams[number] for number in range(first, first + count) if number in self.streams]
        heads = [item.head for item in items if item.head]
        return {
            "seconds": (max(heads, default=began) - began) / 1e9,
            "failed": count - len(heads),
            "reasons": sorted({item.failure or "sem cabeçalhos" for item in items if not item.head})[:3],
            "heads": [item.head - item.connected for item in items if item.head],
        }

    def do_finish(self, timeout):
        """Espera que todos os streams acabem.

        Argumentos:
            timeout: prazo em segundos.

        Retorna:
            dict: left, quantos não acabaram.
        """
        deadline = time.monotonic() + timeout
        while self.active and time.monotonic() < deadline:
            self.step(min(0.1, deadline - time.monotonic()))
        return {"left": self.active}

    def do_settle(self, quiet, timeout):
        """Espera até que nada mais chegue, para um servidor que não encerra os streams.

        Argumentos:
            quiet: segundos sem dado nenhum.
            timeout: prazo em segundos.

        Retorna:
            dict: vazio.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            before = sum(len(item.events) for item in self.streams.values())
            limit = time.monotonic() + quiet
            while time.monotonic() < limit:
                self.step(limit - time.monotonic())
            if before == sum(len(item.events) for item in self.streams.values()):
                break
        return {}

    def do_loop(self, first, total, port, parallel, seconds):
        """Faz requisições em série, várias ao mesmo tempo, até um total ou um tempo.

        Argumentos:
            first: número da primeira.
            total: máximo de requisições.
            port: porta do servidor.
            parallel: quantas ao mesmo tempo.
            seconds: tempo depois do qual não se começa outra.

        Retorna:
            dict: count, seconds e times (ns de cada uma, do connect ao fim).
        """
        began = time.monotonic_ns()
        limit = time.monotonic() + seconds
        self.queue = numbers = iter(range(first, first + total))
        started = 0
        while True:
            while self.active < parallel and time.monotonic() < limit and (number := next(numbers, None)) is not None:
                self.start(number, port)
                started += 1
            if not self.active or time.monotonic() > limit + 30:
                break
            self.step(0.1)
        self.queue = None
        items = [self.streams[number] for number in range(first, first + started)]
        ended = [item for item in items if item.done]
        last = max((item.done for item in ended), default=began + 1)
        return {
            "count": started,
            "seconds": (last - began) / 1e9,
            "times": [item.done - item.connected for item in ended],
        }

    def do_drop(self, first, count):
        """Fecha de repente alguns streams, como um cliente que sai.

        Argumentos:
            first: número do primeiro.
            count: quantos.

        Retorna:
            dict: now, o relógio monotônico em ns, antes do primeiro fechamento.
        """
        now = time.monotonic_ns()
        for number in range(first, first + count):
            self.leave(self.streams.pop(number))
        return {"now": now}

    def do_check(self, first, count, lines, pad, end, clocks):
        """Confere um grupo de streams.

        Argumentos:
            first: número do primeiro.
            count: quantos.
            lines: linhas que cada um deve ter.
            pad: bytes de enchimento de cada linha.
            end: verdadeiro se cada um deve ter acabado de modo limpo.
            clocks: de cada stream, o relógio que o trabalhador pôs em cada linha (0: a linha não traz relógio).

        Retorna:
            dict: broken (quantos quebrados), reasons (exemplos), latencies (ns, uma por linha que traz relógio),
            ends (número -> ns do fim), last (ns do último dado) e bytes.
        """
        reasons, latencies, ends = [], [], {}
        last = size = 0
        for number, noted in zip(range(first, first + count), clocks, strict=True):
            item = self.streams.get(number)
            if item is None:
                reasons.append(f"{number}: nunca foi aberto")
                continue
            try:
                found = examine(item, lines, pad, end, self.kind, noted)
            except ValueError as error:
                reasons.append(f"{number}: {error}")
                continue
            latencies += found
            if item.done:
                ends[number] = item.done
            last = max(last, item.events[-1][0])
            size += sum(len(data) for _, data in item.events)
        return {
            "broken": len(reasons),
            "reasons": reasons[:5],
            "latencies": latencies,
            "ends": ends,
            "last": last,
            "bytes": size,
        }

    def do_forget(self):
        """Fecha e esquece todos os streams.

        Retorna:
            dict: vazio.
        """
        for item in list(self.live.values()):
            self.leave(item)
        self.streams.clear()
        gc.collect()
        return {}


def examine(item, lines, pad, end, kind, clocks):
    """Confere um stream inteiro.

    Argumentos:
        item: o stream.
        lines: linhas que deve ter.
        pad: bytes de enchimento de cada linha.
        end: verdadeiro se deve ter acabado de modo limpo.
        kind: contrato do servidor.
        clocks: o relógio que o trabalhador pôs em cada linha.

    Retorna:
        list: latência de cada linha que traz relógio, em ns.

    Levanta:
        ValueError: com a frase que diz como o stream se quebrou.
    """
    if item.failure:
        raise ValueError(item.failure)
    raw = b"".join(data for _, data in item.events)
    size = raw.find(b"\r\n\r\n") + 4
    head = raw[:size].lower()
    if not head.startswith(b"http/1.1 200 "):
        raise ValueError(f"resposta {raw[:60]!r}")
    if b"transfer-encoding: chunked" not in head:
        raise ValueError("a resposta não é chunked")
    starts, parts, complete = split_chunks(raw, size)
    if end and kind != "webdis" and not (complete and item.finished):
        raise ValueError(f"o fim não foi limpo: {raw[-80:]!r}" if item.finished else "não acabou")
    if not end and (complete or item.finished):
        raise ValueError("acabou antes da hora")
    if kind == "webdis":
        starts, parts = unwrap(starts, parts)
    return examine_lines(item, starts, parts, lines, pad, clocks)


def split_chunks(raw, position):
    """Separa os chunks de uma resposta.

    Argumentos:
        raw: a resposta inteira.
        position: onde acabam os cabeçalhos.

    Retorna:
        tuple: (lista da posição em raw de cada chunk, lista do conteúdo, bool que diz se o último chunk veio).

    Levanta:
        ValueError: se a resposta não obedece ao formato.
    """
    starts, parts = [], []
    while position < len(raw):
        stop = raw.find(b"\r\n", position)
        if stop < 0:
            break
        # int() também aceita sinal, "0x" e sublinhado.
        if not re.fullmatch(rb"[0-9A-Fa-f]+", raw[position:stop]):
            raise ValueError(f"tamanho de chunk {raw[position:stop][:20]!r}")
        size = int(raw[position:stop], 16)
        begin = stop + 2
        if size == 0:
            if raw[begin:] != b"\r\n":
                raise ValueError("há dados depois do último chunk")
            return starts, parts, True
        if begin + size + 2 > len(raw):
            break
        if raw[begin + size : begin + size + 2] != b"\r\n":
            raise ValueError("chunk de tamanho errado")
        starts.append(begin)
        parts.append(raw[begin : begin + size])
        position = begin + size + 2
    return starts, parts, False


def unwrap(starts, parts):
    """Tira as linhas de dentro do JSON do webdis, que embrulha cada mensagem.

    Argumentos:
        starts: posição de cada chunk na resposta.
        parts: conteúdo de cada chunk.

    Retorna:
        tuple: (posições, linhas terminadas em LF), sem as que só confirmam a assinatura.
    """
    found = []
    for start, part in zip(starts, parts, strict=True):
        word, _, content = json.loads(part)["SUBSCRIBE"]
        if word == "message":
            found.append((start, content.encode() + b"\n"))
    return [start for start, _ in found], [part for _, part in found]


def examine_lines(item, starts, parts, lines, pad, clocks):
    """Confere as linhas de um stream, uma a uma e inteiras, com as que o trabalhador empurrou.

    Argumentos:
        item: o stream.
        starts: posição em que cada parte começa, na resposta.
        parts: conteúdo de cada chunk.
        lines: linhas que deve ter.
        pad: bytes de enchimento de cada linha.
        clocks: o relógio que o trabalhador pôs em cada linha; 0 se ela não traz relógio.

    Retorna:
        list: latência de cada linha que traz relógio, em ns.

    Levanta:
        ValueError: se falta, sobra ou difere uma linha, ou se ela chegou antes de ser enviada.
    """
    body = b"".join(parts)
    size = line_size + (pad + len('","p":"') if pad else 0)
    if len(body) != lines * (size + 1):
        raise ValueError(f"{len(body)} bytes no lugar de {lines} linhas de {size + 1}")
    if len(clocks) != lines:
        raise ValueError(f"o trabalhador empurrou {len(clocks)} linhas, e não {lines}")
    name = b"%06d" % item.number
    tail = b'","p":"' + b"x" * pad + b'"}\n' if pad else b'"}\n'
    # De cada parte, onde ela acaba no corpo e quanto somar para achar a posição na resposta.
    stops = list(itertools.accumulate(len(part) for part in parts))
    shifts = [start + len(part) - stop for start, part, stop in zip(starts, parts, stops, strict=True)]
    arrivals = list(itertools.accumulate(len(data) for _, data in item.events))
    latencies = []
    for order, clock in enumerate(clocks):
        at = order * (size + 1)
        line = body[at : at + size + 1]
        if line[stream_at] != name:
            raise ValueError(f"linha alheia: {line[:60]!r}")
        if line[order_at] != b"%08d" % order:
            raise ValueError(f"linha {order} perdida, repetida ou fora de ordem: {line[:60]!r}")
        expected = line_form % (item.number, order, clock) + tail
        if line != expected:
            place = next(index for index, pair in enumerate(zip(line, expected, strict=True)) if pair[0] != pair[1])
            raise ValueError(f"linha alterada no byte {place}: {line[:60]!r}, e não {expected[:60]!r}")
        if clock:
            chunk = bisect.bisect_left(stops, at + size + 1)
            event = bisect.bisect_left(arrivals, at + size + 1 + shifts[chunk])
            latency = item.events[event][0] - clock
            if latency <= 0:
                raise ValueError(f"linha {order} recebida antes de enviada: {line[:60]!r}")
            latencies.append(latency)
    return latencies


def main():
    """Programa principal: um argumento, o contrato do servidor."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.disable()
    driver(sys.argv[1]).run()


if __name__ == "__main__":
    main()
