"""Ferramentas das provas de falhas do Redis: um intermediário que estraga conexões ao acaso, um worker que numera o que
empurra, e a conferência do que chegou. As contas de cada prova têm duas formas, curta e longa (FAULTS=full)."""

import collections
import contextlib
import heapq
import itertools
import json
import os
import random
import re
import select
import selectors
import socket
import struct
import threading
import time

import redis

import harness
import peers
import support

# Prazo de cada prova, em segundos: o da forma longa cobre a mais demorada numa máquina ocupada.
limit = peers.scale(120, 1800)

# Semente dos sorteios, impressa com a conta de cada prova: com ela uma falha se repete tanto quanto o relógio deixa. Na
# integração contínua é fixa; fora dela, outra a cada vez, se FAULTS_SEED não a escolhe.
FAULTS_SEED = int(
    os.environ.get("FAULTS_SEED") or (5 if os.environ.get("CI") else random.SystemRandom().randrange(1000000))
)


class fault:
    """Uma falha sorteada para uma conexão: de que tipo (os de fault_relay), em que sentido, depois de quantos bytes ou em que instante."""

    def __init__(self, kind, is_request, left, due):
        """Guarda o sorteio.

        Argumentos:
            kind: o tipo.
            is_request: verdadeiro no sentido do proxy para o Redis.
            left: bytes que ainda passam antes da falha.
            due: instante monotônico em que a conexão é cortada se os bytes não vierem.
        """
        self.kind, self.is_request, self.left, self.due = kind, is_request, left, due


class link:
    """Uma conexão do proxy e a correspondente com o Redis."""

    def __init__(self, near, far):
        """Guarda os soquetes.

        Argumentos:
            near: o do proxy.
            far: o do Redis.
        """
        self.near, self.far = near, far
        self.plan = None
        self.name = "sem nome"
        self.closed = self.paused = False

    def target(self, is_request):
        """Diz para onde vai um trecho. Argumentos: is_request, o sentido. Retorno: o soquete."""
        return self.far if is_request else self.near


class fault_relay(threading.Thread):
    """Intermediário de TCP entre o proxy e o Redis que falha ao acaso, em qualquer byte dos dois sentidos.

    Cada conexão tem uma falha sorteada por vez. Os tipos:

        reset   os dois lados recebem RST; o que passou até ali pode ser meio pedido ou meia resposta;
        close   o mesmo, com FIN;
        stall   nada passa por um tempo menor que a paciência do proxy, e depois tudo segue;
        drip    o que vem passa byte a byte, dezenas deles, e depois tudo segue;
        mute    nada passa por um tempo menor que a paciência do proxy, e depois RST;
        silence nada passa até o proxy desistir; o retido se perde;
        late    uma retirada de linhas fica retida até o proxy desistir; só chega ao Redis quando release a solta, depois
                de repetida por outra conexão, como um segmento de TCP retransmitido depois de uma partição da rede.

    Contam-se como cortes todas, menos stall e drip.
    """

    common = ("reset", "reset", "reset", "close", "close", "stall", "drip", "mute")

    def __init__(self, port, seed=FAULTS_SEED):
        """Começa a escutar e a repassar, sem falhas.

        Argumentos:
            port: porta do Redis.
            seed: semente dos sorteios.
        """
        super().__init__(name="fault_relay", daemon=True)
        self.destination = port
        self.random = random.Random(seed)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listener.getsockname()[1]
        self.bell, self.hand = socket.socketpair()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.bell, selectors.EVENT_READ)
        self.links, self.orders = [], collections.deque()
        self.timers, self.serial = [], itertools.count()
        self.goal = self.cuts = self.stalls = 0
        self.counts = collections.Counter()
        self.choices, self.silences, self.longest, self.age = (), set(), 0, 0.0
        self.held, self.arrived = collections.deque(), 0
        self.start()

    @property
    def address(self):
        """Endereço na forma de REDIS_SERVER (str)."""
        return f"127.0.0.1:{self.port}/{harness.default_db}"

    def begin(self, goal, choices=common, silences=0, longest=20000, age=0.12):
        """Passa a falhar, até um número de cortes.

        Argumentos:
            goal: quantos cortes.
            choices: tipos sorteados; repetir um o torna mais frequente.
            silences: quantos dos cortes são silence, que custa a paciência do proxy.
            longest: mais bytes que uma conexão passa antes da falha.
            age: maior idade, em segundos, com que uma conexão é cortada se os bytes não vierem.
        """
        self.orders.append((goal, choices, silences, longest, age))
        self.hand.send(b"x")

    def release(self):
        """Entrega ao Redis o que as falhas late retiveram; arrived conta as que ele já executou ou recusou."""
        self.hand.send(b"r")

    def over(self):
        """Diz se todos os cortes pedidos já foram feitos (bool)."""
        return self.cuts >= self.goal and not self.orders

    def summary(self):
        """Descreve as falhas feitas (str)."""
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        return f"semente {FAULTS_SEED}: {self.cuts} cortes e {self.stalls} paradas ({kinds})"

    def run(self):
        """Repassa até close."""
        while True:
            timeout = max(0.0, self.timers[0][0] - time.monotonic()) if self.timers else None
            for key, _ in self.selector.select(timeout):
                if key.fileobj is self.bell:
                    told = self.bell.recv(64)
                    if b"q" in told:
                        return
                    self.take_orders()
                    while b"r" in told and self.held:
                        self.arrive_late(*self.held.popleft())
                elif key.fileobj is self.listener:
                    self.accept()
                elif not key.data[0].paused:
                    # Pode ter parado, ou caído, por causa de outro soquete desta mesma volta.
                    self.forward(*key.data)
            while self.timers and self.timers[0][0] <= time.monotonic():
                _, _, action, arguments = heapq.heappop(self.timers)
                action(*arguments)

    def later(self, delay, action, *arguments):
        """Agenda uma ação na própria linha de execução.

        Argumentos:
            delay: espera em segundos.
            action: a função.
            arguments: os argumentos dela.
        """
        heapq.heappush(self.timers, (time.monotonic() + delay, next(self.serial), action, arguments))

    def take_orders(self):
        """Cumpre os pedidos de begin."""
        while self.orders:
            goal, self.choices, silences, self.longest, self.age = self.orders[0]
            self.goal = self.cuts + goal
            self.silences = {self.cuts + (step + 1) * goal // (silences + 1) for step in range(silences)}
            self.orders.popleft()
            for each in self.links:
                self.draw(each)

    def accept(self):
        """Aceita uma conexão e abre a correspondente com o Redis."""
        near = self.listener.accept()[0]
        try:
            far = socket.create_connection(("127.0.0.1", self.destination), 5)
        except OSError:
            near.close()
            return
        each = link(near, far)
        for sock in (near, far):
            sock.settimeout(5)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.links.append(each)
        self.draw(each)
        self.listen(each)

    def listen(self, each):
        """Passa a ler uma conexão. Argumentos: each, a link."""
        each.paused = False
        self.selector.register(each.near, selectors.EVENT_READ, (each, True))
        self.selector.register(each.far, selectors.EVENT_READ, (each, False))

    def ignore(self, each):
        """Deixa de ler uma conexão. Argumentos: each, a link."""
        each.paused = True
        for sock in (each.near, each.far):
            with contextlib.suppress(KeyError):
                self.selector.unregister(sock)

    def draw(self, each):
        """Sorteia a próxima falha de uma conexão, se ainda faltam cortes.

        Argumentos:
            each: a link.
        """
        each.plan = None
        if self.cuts >= self.goal:
            return
        # Em escala logarítmica: tanto o começo da conexão quanto o meio de um lote grande são atingidos. Mas um começo
        # cortado faz o proxy esperar cada vez mais para tentar outra vez: só uma em quatro pode cair nele.
        left = int(self.longest ** self.random.uniform(0 if self.random.random() < 0.25 else 0.75, 1))
        kind = self.random.choice(self.choices)
        is_request = kind == "late" or self.random.random() < 0.5
        age = self.random.uniform(0.002, self.age)
        each.plan = fault(kind, is_request, left, time.monotonic() + age)
        self.later(age, self.grow_old, each, each.plan)

    def grow_old(self, each, plan):
        """Faz a falha de uma conexão pela qual não passaram bytes que bastassem.

        Argumentos:
            each: a link.
            plan: a falha sorteada quando isto foi agendado.
        """
        # A retida só importa se houver um pedido inteiro a reter: essa espera pelos bytes.
        if each.plan is plan and not each.paused and plan.kind != "late":
            self.strike(each, b"")

    def forward(self, each, is_request):
        """Repassa um trecho, ou parte dele, até a falha sorteada.

        Argumentos:
            each: a link.
            is_request: verdadeiro do proxy para o Redis.
        """
        data = b""
        with contextlib.suppress(OSError):
            data = each.target(not is_request).recv(65536)
        if not data:
            self.shut(each, False)
            return
        if is_request and (found := re.search(rb"SETNAME\r\n\$\d+\r\n([\w-]+)", data)):
            each.name = found[1].decode()
        plan = each.plan
        if plan is None or plan.is_request != is_request or plan.kind == "late" and b":taken" not in data:
            self.deliver(each, is_request, data)
        elif plan.kind == "late":
            self.strike(each, data)
        elif len(data) < plan.left:
            plan.left -= len(data)
            self.deliver(each, is_request, data)
        else:
            self.deliver(each, is_request, data[: plan.left])
            self.strike(each, data[plan.left :])

    def deliver(self, each, is_request, data):
        """Entrega um trecho.

        Argumentos:
            each: a link.
            is_request: o sentido.
            data: os bytes.
        """
        with contextlib.suppress(OSError):
            each.target(is_request).sendall(data)

    def strike(self, each, held):
        """Faz a falha sorteada.

        Argumentos:
            each: a link.
            held: o que tinha sido lido e não passou.
        """
        plan, each.plan = each.plan, None
        if self.cuts >= self.goal:
            self.deliver(each, plan.is_request, held)
            return
        if self.cuts in self.silences:
            self.silences.discard(self.cuts)
            plan.kind = "silence"
        self.counts[plan.kind] += 1
        self.counts[each.name] += 1
        if plan.kind in ("stall", "drip"):
            self.stalls += 1
        else:
            self.cuts += 1
        if plan.kind in ("reset", "close"):
            self.shut(each, plan.kind == "reset")
            return
        self.ignore(each)
        if plan.kind == "stall":
            self.later(self.random.uniform(0.01, 0.2), self.resume, each, plan, held)
        elif plan.kind == "drip":
            self.drip(each, plan, held, 40)
        elif plan.kind == "mute":
            self.later(self.random.uniform(0.01, 0.2), self.shut, each, True)
        else:
            self.later(0.05, self.wait_surrender, each, held if plan.kind == "late" else b"")

    def resume(self, each, plan, held):
        """Acaba uma parada: o retido passa e a conexão segue.

        Argumentos:
            each: a link.
            plan: a falha.
            held: o retido.
        """
        self.deliver(each, plan.is_request, held)
        self.listen(each)
        self.draw(each)

    def drip(self, each, plan, held, left):
        """Passa um byte por vez, e depois o resto.

        Argumentos:
            each: a link.
            plan: a falha.
            held: o que não passou.
            left: quantos bytes ainda passam sozinhos.
        """
        if len(held) > 1 and left:
            self.deliver(each, plan.is_request, held[:1])
            self.later(0.005, self.drip, each, plan, held[1:], left - 1)
        else:
            self.resume(each, plan, held)

    def wait_surrender(self, each, held):
        """Espera que o proxy desista de uma conexão parada; o retido, se há, ainda vai ao Redis, bem depois.

        Argumentos:
            each: a link.
            held: o retido, ou b"" para que se perca.
        """
        poller = select.poll()
        poller.register(each.near, select.POLLRDHUP)
        if not poller.poll(0):
            self.later(0.02, self.wait_surrender, each, held)
        elif held:
            self.held.append((each, held))
        else:
            self.shut(each, True)

    def arrive_late(self, each, held):
        """Entrega ao Redis um pedido de que o proxy já desistiu.

        Argumentos:
            each: a link.
            held: o pedido.
        """
        self.deliver(each, True, held)
        self.wait_answer(each)

    def wait_answer(self, each):
        """Espera que o Redis responda ao pedido atrasado, ou que feche a conexão.

        Argumentos:
            each: a link.
        """
        poller = select.poll()
        poller.register(each.far, select.POLLIN | select.POLLRDHUP)
        if poller.poll(0):
            self.arrived += 1
            self.shut(each, False)
        else:
            self.later(0.01, self.wait_answer, each)

    def shut(self, each, reset):
        """Fecha uma conexão dos dois lados.

        Argumentos:
            each: a link.
            reset: verdadeiro para RST, falso para FIN.
        """
        if each.closed:
            return
        each.closed = True
        self.ignore(each)
        self.links.remove(each)
        for sock in (each.near, each.far):
            if reset:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()

    def close(self):
        """Fecha tudo e espera a linha de execução."""
        self.hand.send(b"q")
        self.join(10)
        assert not self.is_alive()
        for each in list(self.links):
            self.shut(each, False)
        for sock in (self.listener, self.bell, self.hand):
            sock.close()
        self.selector.close()


class feeder(threading.Thread):
    """Worker de muitas tarefas: empurra linhas numeradas a todas, em rodadas, e ao fim apaga as chaves das tarefas.

    Cada rodada é uma transação com a marca da seguinte: se o Redis cair no meio, é a marca que diz por onde continuar,
    e nada é empurrado duas vezes.
    """

    mark = "marca-do-worker"

    def __init__(self, connect, tasks, total, hold, seed=FAULTS_SEED):
        """Sorteia as rodadas.

        Argumentos:
            connect: função que devolve um redis.Redis do banco das tarefas, que não repete comando por conta própria.
            tasks: as tarefas.
            total: quantas linhas por tarefa.
            hold: função chamada com a fração já empurrada (0 a 1) antes de cada rodada e antes do fim; ela espera o que
                quiser.
            seed: semente do sorteio.
        """
        super().__init__(name="feeder", daemon=True)
        self.connect, self.tasks, self.total, self.hold = connect, tasks, total, hold
        self.edges = [0]
        draw = random.Random(seed)
        while self.edges[-1] < total:
            self.edges.append(min(total, self.edges[-1] + draw.choice((1, 1, 1, 2, 3, 8))))
        self.round = 0
        self.halt = threading.Event()
        self.done = False

    def run(self):
        """Empurra tudo, refazendo a conexão quantas vezes for preciso."""
        while not self.halt.is_set() and not self.done:
            try:
                with contextlib.closing(self.connect()) as client:
                    self.round = int(client.get(self.mark) or 0)
                    self.push(client)
                    client.delete(*[task.key for task in self.tasks], self.mark)
                    self.done = True
            except (redis.RedisError, OSError):
                self.halt.wait(0.02)

    def push(self, client):
        """Empurra o que falta.

        Argumentos:
            client: um redis.Redis.
        """
        while self.round < len(self.edges) - 1:
            self.hold(self.edges[self.round] / self.total)
            if self.halt.is_set():
                raise redis.ConnectionError("prova encerrada")
            numbers = range(self.edges[self.round], self.edges[self.round + 1])
            with client.pipeline(transaction=True) as pipe:
                for place, task in enumerate(self.tasks):
                    pipe.rpush(task.list, *[numbered_line(place, number) for number in numbers])
                pipe.set(self.mark, self.round + 1)
                pipe.execute()
            self.round += 1
        self.hold(1.0)

    def close(self):
        """Para e espera a linha de execução."""
        self.halt.set()
        self.join(15)
        assert not self.is_alive()


def numbered_line(place, number):
    """Monta uma linha numerada. Argumentos: place, o stream; number, a linha. Retorno: a linha (str)."""
    return f'{{"s": {place}, "n": {number}}}'


@contextlib.contextmanager
def closing_thread(thread):
    """Inicia uma linha de execução, se preciso, e a encerra na saída.

    Argumentos:
        thread: uma feeder ou fault_relay.

    Retorno:
        Gera a própria.
    """
    if not thread.is_alive():
        thread.start()
    try:
        yield thread
    finally:
        thread.close()


def pace(interval):
    """Faz um hold de feeder que apenas espera.

    Argumentos:
        interval: espera entre rodadas, em segundos.

    Retorno:
        A função.
    """
    return lambda _: time.sleep(interval)


def follow(relay, longest=None):
    """Faz um hold de feeder que segue os cortes: a fração das linhas empurradas acompanha a dos cortes feitos.

    Argumentos:
        relay: a fault_relay.
        longest: espera máxima por rodada, em segundos, para que sempre haja o que cortar; None, a da forma da prova.

    Retorno:
        A função.
    """

    longest = longest or peers.scale(0.25, 1.0)

    def hold(fraction):
        """Espera os cortes; todos, depois da última linha. Argumentos: fraction, a fração das linhas já empurrada."""
        deadline = time.monotonic() + (longest if fraction < 1 else peers.scale(20, 300))
        wanted = relay.goal * (1 if fraction == 1 else fraction - 0.02)
        while relay.cuts < wanted and time.monotonic() < deadline:
            time.sleep(0.002)

    return hold


def open_many(connect, proxy, worker, count):
    """Abre muitos streamings, aos poucos, para não cobrar do worker uma rajada que a prova não é sobre ela.

    Argumentos:
        connect: o acessório de mesmo nome.
        proxy: o proxy.
        worker: o harness.worker que recebe as tarefas.
        count: quantos.

    Retorno:
        Lista de pares (response, task).
    """
    pairs = []
    for _ in range(count // 20):
        pairs += support.open_streams(connect, proxy, worker, 20)
    if count % 20:
        pairs += support.open_streams(connect, proxy, worker, count % 20)
    return pairs


def deliver_across_cuts(proxy, server, relay, pairs, total, patience):
    """Empurra linhas a todos os streams enquanto a intermediária corta, e confere o que chega.

    Argumentos:
        proxy: o proxy.
        server: o harness.redis_server.
        relay: a fault_relay, já a cortar.
        pairs: os streams, pares (response, task).
        total: quantas linhas a cada um.
        patience: prazo em segundos.

    Retorno:
        A conta (str).
    """
    tasks = [task for _, task in pairs]
    source = feeder(lambda: support.plain_client(server), tasks, total, follow(relay))
    with closing_thread(source):
        text = deliver_all(proxy, pairs, total, patience)
        harness.eventually(lambda: source.done, 10, "worker encerrado")
    assert relay.over(), relay.summary()
    support.wait_empty(server.client(), 5)
    return f"{relay.summary()}; {text}"


def judge(received, total):
    """Confere o que chegou a cada stream com o que lhe foi empurrado.

    Argumentos:
        received: lista, por stream, das linhas recebidas (bytes).
        total: quantas linhas foram empurradas a cada um.

    Retorno:
        Tupla (perdidas, repetidas, fora de ordem, de outro stream ou estranhas).
    """
    lost = doubled = disordered = strange = 0
    for place, lines in enumerate(received):
        seen, numbers = collections.Counter(), []
        for line in lines:
            value = json.loads(line)
            if value.get("s") != place or line != numbered_line(place, value["n"]).encode():
                strange += 1
                continue
            numbers.append(value["n"])
            seen[value["n"]] += 1
        lost += sum(number not in seen for number in range(total))
        doubled += sum(count - 1 for count in seen.values())
        disordered += sum(after < before for before, after in itertools.pairwise(numbers))
    return lost, doubled, disordered, strange


def deliver_all(proxy, pairs, total, timeout):
    """Lê todos os streams até o fim e confere que tudo chegou exatamente uma vez, na ordem, e que o log o conta.

    Argumentos:
        proxy: o proxy.
        pairs: pares (response, task).
        total: quantas linhas foram empurradas a cada um.
        timeout: prazo em segundos para tudo.

    Retorno:
        Frase com a conta, para tell.
    """
    harness.read_all([response for response, _ in pairs], timeout)
    verdict = judge([response.all_lines for response, _ in pairs], total)
    text = "{} perdidas, {} repetidas, {} fora de ordem, {} estranhas".format(*verdict)
    text = f"{len(pairs)} streams, {len(pairs) * total} linhas: {text}"
    assert verdict == (0, 0, 0, 0), f"semente {FAULTS_SEED}: {text}; log:\n{proxy.log()}"
    names = {task.name for _, task in pairs}

    def ends():
        """Devolve as linhas de log do fim das tarefas, se estão todas lá."""
        rows = [row for row in support.finished_rows(proxy) if row["tarefa"] in names]
        return rows if len(rows) >= len(names) else None

    rows = harness.eventually(ends, 10, "linhas de fim das tarefas")
    assert sorted(row["tarefa"] for row in rows) == sorted(names)
    assert {(row["fim"], row["linhas"]) for row in rows} == {("concluida", str(total))}, rows
    return text


def log_lines(proxy, words):
    """Procura linhas de log.

    Argumentos:
        proxy: o proxy.
        words: expressão regular.

    Retorno:
        Lista das linhas (str) em que ela aparece.
    """
    return [line for line in proxy.log().splitlines() if re.search(words, line)]
