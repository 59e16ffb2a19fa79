"""A prova longa (tests/faults/soak): streams que entram e saem sem parar, clientes que somem, o Redis cortado.

Em cada hospedeiro vivem centenas de streams ao mesmo tempo, de clientes de seis modos: o que fica até o fim, o que sai,
o que cai, o que não lê, o que desiste no meio do pedido e o que só pergunta por /ping. Entre os proxies e o Redis está
um intermediário que, uma vez por minuto, derruba tudo e recusa conexões por dois segundos.

Mede em repouso (no início, depois de um aquecimento com a carga inteira, e no fim) e sob carga (a cada minuto): memória
(PSS), linhas de execução, descritores, chaves no Redis e streams abertos.

A regra: em repouso, no fim, a memória é no máximo 10% e 8 MiB maior que no início; os descritores não passam dos do
início, nem as linhas de execução em mais de seis; nenhuma chave resta. Sob carga, da primeira à última medida, a
memória não cresce mais que 15% e 8 MiB; linhas de execução e descritores, mais que 30% e 40. E nenhum stream que ficou
até o fim perde, repete ou troca uma linha, ou acaba sem o seu fim; só há 504 perto de um corte, e nenhum outro status
de erro; nenhum traceback."""

import argparse
import collections
import contextlib
import heapq
import json
import pathlib
import random
import selectors
import socket
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import harness
import peers
import support

# Duração de um corte e folga depois dele em que um 504 é aceito, em segundos.
outage = 2.0
recovery = 8.0
# Linhas de execução que reabrir a conexão com o Redis pode deixar à espera (as do executor do asyncio).
pool_threads = 6
# Aquecimento, e espera pelo repouso depois da carga, em segundos.
warm_time = 20.0
rest_time = 90.0

# Modos de cliente e seus pesos.
ways = {"fica": 60, "sai": 12, "cai": 10, "surdo": 5, "desiste": 8, "ping": 5}

# Empurra uma linha só se a tarefa ainda existe; com a última, apaga a tarefa.
push_script = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('RPUSH', KEYS[2], ARGV[1])
if ARGV[2] == '1' then redis.call('DEL', KEYS[1]) end
return 1
"""


class breaker(support.relay):
    """Intermediário que, pedido, derruba todas as conexões e recusa novas por um tempo."""

    tick = 0.1
    blocked = 0.0

    def sever(self):
        """Corta tudo por outage segundos."""
        self.blocked = time.monotonic() + outage

    def look(self):
        """Corta o que há, quando pedido."""
        if time.monotonic() < self.blocked:
            for key in list(self.selector.get_map().values()):
                if key.data is not None:
                    self.selector.unregister(key.fileobj)
                    key.fileobj.close()

    def accept(self):
        """Aceita uma conexão; durante um corte, só para fechá-la."""
        if time.monotonic() < self.blocked:
            self.listener.accept()[0].close()
        else:
            super().accept()


class producer(peers.finisher):
    """Worker que atende a todas as tarefas, cada uma no seu ritmo: o corpo do pedido diz quantas linhas e de quanto em
    quanto tempo. Fala com o Redis sem intermediário."""

    def __init__(self, server):
        """Assina o canal e começa. Argumentos: server, o harness.redis_server."""
        self.order, self.queue, self.count, self.wrong = 0, [], 0, []
        super().__init__(server)

    def pause(self):
        """Empurra as linhas cuja hora chegou. Retorno: segundos até a próxima."""
        while self.queue and self.queue[0][0] <= time.monotonic():
            self.feed(*heapq.heappop(self.queue)[2:])
        return min(0.1, max(0.0, self.queue[0][0] - time.monotonic())) if self.queue else 0.1

    def finish(self, key):
        """Toma uma tarefa. Argumentos: key, a chave publicada."""
        raw = self.client.get(key)
        self.count += 1
        if raw is not None:
            info = json.loads(raw)
            try:
                wish = json.loads(info["body"])
            except ValueError:
                self.wrong.append(("tarefa de um pedido incompleto", f"{info['headers']} {info['body']!r}"))
                self.client.delete(key)
                return
            self.schedule(key, info["task_list"], 0, wish["total"], wish["pace"])

    def schedule(self, key, name, number, total, pace):
        """Marca a próxima linha.

        Argumentos:
            key: a chave da tarefa.
            name: a lista.
            number: número da linha.
            total: quantas são.
            pace: intervalo, em segundos.
        """
        self.order += 1
        heapq.heappush(self.queue, (time.monotonic() + pace, self.order, key, name, number, total, pace))

    def feed(self, key, name, number, total, pace):
        """Empurra uma linha e marca a seguinte. Argumentos: os de schedule."""
        last = number == total - 1
        line = json.dumps({"n": number, "fim": last})
        alive = self.client.eval(push_script, 2, key, name, line, int(last))
        if alive and not last:
            self.schedule(key, name, number + 1, total, pace)


class visitor(peers.talk):
    """Um cliente da multidão: o que pede, quanto fica e como sai."""

    def __init__(self, rng):
        """Sorteia um cliente. Argumentos: rng, o gerador."""
        self.way = rng.choices(list(ways), list(ways.values()))[0]
        self.total, self.pace = rng.randint(1, 40), round(rng.choice((0.01, 0.1, 0.3, 0.5)), 2)
        # Instante, contado da conexão, em que quem sai sai; quem fica tem um prazo bem maior que o trabalho.
        self.stay = rng.uniform(0, 12) if self.way in ("sai", "cai", "surdo", "desiste") else 60
        body = json.dumps({"total": self.total, "pace": self.pace}).encode()
        if self.way == "ping":
            payload = b"GET /ping HTTP/1.1\r\nHost: proxy.test\r\nConnection: close\r\n\r\n"
        else:
            head = (
                b"POST /multid%%C3%%A3o HTTP/1.1\r\nHost: proxy.test\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            )
            payload = head % len(body) + body
        if self.way == "desiste":
            payload = payload[: rng.randrange(1, len(payload) - 1)]
        super().__init__(payload, self.way)

    def is_stream(self):
        """Diz se está num streaming (bool)."""
        return bool(self.answers) and self.answers[0].status == 200 and self.way != "ping"

    def verdict(self, now):
        """Diz se a visita acabou. Argumentos: now, o instante. Retorno: bool."""
        return self.closed or now - self.began > self.stay

    def lines_are_right(self):
        """Confere quem ficou até o fim: todas as linhas, uma vez, em ordem, e o fim (bool)."""
        answer = self.answers[0]
        wanted = [{"n": number, "fim": number == self.total - 1} for number in range(self.total)]
        return answer.ended and [json.loads(line) for line in answer.all_lines] == wanted


class crowd(threading.Thread):
    """A multidão de um proxy: mantém tantos clientes quantos pedidos, e toma nota do que deu errado."""

    def __init__(self, proxy, count, seed):
        """Prepara; começa com start.

        Argumentos:
            proxy: o harness.proxy_process.
            count: clientes ao mesmo tempo.
            seed: semente do sorteio.
        """
        super().__init__(name="crowd", daemon=True)
        self.proxy, self.count, self.rng = proxy, count, random.Random(seed)
        self.statuses, self.ended, self.wrong = collections.Counter(), collections.Counter(), []
        self.alive = self.streams = 0
        self.cut_at = -1e9
        self.failure = None

    def run(self):
        """Repõe quem sai até que count seja 0 e todos tenham saído."""
        try:
            with selectors.DefaultSelector() as selector:
                while self.count or selector.get_map():
                    self.fill(selector)
                    for key, mask in selector.select(0.05):
                        self.serve(selector, key.data, mask)
                    self.sweep(selector)
        except OSError as error:
            self.failure = error

    def fill(self, selector):
        """Abre clientes até a conta, poucos por vez. Argumentos: o seletor."""
        for _ in range(min(20, self.count - len(selector.get_map()))):
            each = visitor(self.rng)
            each.open(self.proxy.port)
            selector.register(each.sock, each.events(), each)

    def serve(self, selector, each, mask):
        """Envia e recebe por um cliente.

        Argumentos:
            selector: o seletor.
            each: o visitor.
            mask: o que o soquete pode fazer.
        """
        if mask & selectors.EVENT_WRITE:
            each.send()
            if not each.left:
                selector.modify(each.sock, selectors.EVENT_READ, each)
        # O surdo lê o cabeçalho e depois deixa tudo no soquete.
        if mask & selectors.EVENT_READ and not (each.way == "surdo" and each.answers):
            each.receive()
        elif mask & selectors.EVENT_READ:
            time.sleep(0.0005)

    def sweep(self, selector):
        """Retira quem acabou e atualiza as contas. Argumentos: o seletor."""
        now, streams = time.monotonic(), 0
        for key in list(selector.get_map().values()):
            each = key.data
            if each.verdict(now) or (not self.count and each.way != "fica"):
                selector.unregister(each.sock)
                self.leave(each, now)
            else:
                streams += each.is_stream()
        self.alive, self.streams = len(selector.get_map()), streams

    def leave(self, each, now):
        """Fecha um cliente e julga o que ele viu.

        Argumentos:
            each: o visitor.
            now: o instante.
        """
        if each.way == "cai":
            with contextlib.suppress(OSError):
                each.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        elif each.way != "fica":
            each.fault = None
        each.close()
        self.ended[each.way] += 1
        status = each.answers[0].status if each.answers else None
        self.statuses[status] += 1
        if status == 200 and each.way == "fica" and not each.lines_are_right():
            lines = [bytes(line)[:60] for line in each.answers[0].all_lines]
            seen = f"{len(lines)} de {each.total} linhas em {now - each.began:.0f} s, acaba em {lines[-2:]}"
            self.wrong.append(("linhas perdidas, repetidas ou fora de ordem, ou sem fim", seen))
        elif status not in (200, None) and not (status in (500, 504) and self.cut_recent(each, now)):
            self.wrong.append((f"status {status} longe de um corte", each.way))
        elif status is None and each.way == "fica":
            self.wrong.append(("sem resposta", f"em {now - each.began:.0f} s"))

    def cut_recent(self, each, now):
        """Diz se a visita toca o tempo de um corte (bool). Argumentos: o visitor e o instante."""
        return each.began < self.cut_at + outage + recovery and now > self.cut_at


def measure(proxy, server, people):
    """Mede um proxy.

    Argumentos:
        proxy: o harness.proxy_process.
        server: o harness.redis_server.
        people: a crowd dele, ou None em repouso.

    Retorno:
        Dicionário com memory (KiB), threads, descriptors, keys e streams.
    """
    with contextlib.closing(server.new_client()) as client:
        keys = client.dbsize()
    return {
        "memory": proxy.memory(),
        "threads": proxy.threads(),
        "descriptors": proxy.descriptors(),
        "keys": keys,
        "streams": people.streams if people else 0,
    }


def show(moment, name, row):
    """Escreve uma linha da tabela. Argumentos: o momento, o hospedeiro e a medida."""
    print(
        f"{moment:>10}  {name:<9} memória {row['memory']:>7} KiB  threads {row['threads']:>4}  "
        f"descritores {row['descriptors']:>4}  chaves {row['keys']:>4}  streams {row['streams']:>4}",
        flush=True,
    )


def rest_problems(start, end):
    """Compara os dois repousos. Argumentos: as medidas do início e do fim. Retorno: lista de frases."""
    problems = []
    if end["memory"] > start["memory"] * 1.10 + 8192:
        problems.append(f"memória em repouso: de {start['memory']} a {end['memory']} KiB")
    for name, slack in (("threads", pool_threads), ("descriptors", 0)):
        if end[name] > start[name] + slack:
            problems.append(f"{name} em repouso: de {start[name]} a {end[name]}")
    if end["keys"]:
        problems.append(f"{end['keys']} chaves restam")
    return problems


def load_problems(rows):
    """Compara a primeira medida sob carga com a última. Argumentos: as medidas. Retorno: lista de frases."""
    problems = []
    if len(rows) < 2:
        return problems
    first, last = rows[0], rows[-1]
    if last["memory"] > first["memory"] * 1.15 + 8192:
        problems.append(f"memória sob carga: de {first['memory']} a {last['memory']} KiB")
    for name in ("threads", "descriptors"):
        if last[name] > first[name] * 1.3 + 40:
            problems.append(f"{name} sob carga: de {first[name]} a {last[name]}")
    return problems


class soak:
    """A prova inteira: o Redis, o intermediário, os proxies e as multidões."""

    def __init__(self, options, folder):
        """Prepara tudo.

        Argumentos:
            options: os argumentos de linha de comando.
            folder: pasta dos arquivos (pathlib.Path).
        """
        self.options = options
        self.server = harness.redis_server(folder / "redis").start()
        self.relay = breaker(self.server.port)
        self.producer = producer(self.server)
        self.proxies = [self.start_proxy(folder / name, name) for name in options.server.split(",")]
        self.people, self.rows, self.wrong = [], {proxy: [] for proxy in self.proxies}, []

    def start_proxy(self, folder, name):
        """Inicia um proxy ligado ao Redis pelo intermediário. Argumentos: pasta e hospedeiro. Retorno: o proxy."""
        env = {"HTTP_PORT": 0, "HTTP_HOST": "127.0.0.1", "HTTP_SERVER": name, "REDIS_SERVER": self.relay.address}
        return harness.proxy_process(folder, [], {**env, "ENV_FILE": "/dev/null"}).start()

    def enter(self, seed):
        """Põe uma multidão em cada proxy. Argumentos: seed, a semente."""
        self.people = [crowd(proxy, self.options.streams, f"{seed}-{proxy.server}") for proxy in self.proxies]
        for each in self.people:
            each.start()

    def leave(self):
        """Despede as multidões, espera que saiam e recolhe o que viram."""
        for each in self.people:
            each.count = 0
        for each in self.people:
            each.join(150)
            name = each.proxy.server
            self.wrong += [(f"{name}: {kind}", seen) for kind, seen in each.wrong]
            if each.is_alive() or each.failure:
                self.wrong.append((f"{name}: a multidão não acabou", str(each.failure)))
            print(f"{'':>10}  {name:<9} saíram {dict(each.ended)}; status {dict(each.statuses)}", flush=True)

    def rest(self, moment, limits=None):
        """Espera o repouso e mede.

        Argumentos:
            moment: nome do momento.
            limits: medidas do primeiro repouso, por proxy; a espera acaba quando nada as passa.

        Retorno:
            Dicionário de proxy para medida.
        """
        deadline = time.monotonic() + rest_time
        last, quiet = None, 0
        while time.monotonic() < deadline:
            now = [measure(proxy, self.server, None) for proxy in self.proxies]
            calm = all(row["keys"] == 0 for row in now)
            if limits:
                calm &= not any(rest_problems(limits[proxy], row) for proxy, row in zip(self.proxies, now, strict=True))
            counts = [(row["threads"], row["descriptors"]) for row in now]
            quiet = quiet + 1 if counts == last and calm else 0
            last = counts
            if quiet >= 10:
                break
            time.sleep(1)
        found = {proxy: measure(proxy, self.server, None) for proxy in self.proxies}
        for proxy, row in found.items():
            show(moment, proxy.server, row)
        return found

    def load(self, seconds):
        """Mantém a carga, cortando o Redis no meio de cada minuto e medindo no fim dele; acaba antes se o worker parar.

        Argumentos:
            seconds: por quanto tempo.
        """
        began = time.monotonic()
        for number in range(1, int(seconds // 60) + 1):
            time.sleep(max(0.0, began + number * 60 - 30 - time.monotonic()))
            for each in self.people:
                each.cut_at = time.monotonic()
            self.relay.sever()
            time.sleep(max(0.0, began + number * 60 - time.monotonic()))
            for each in self.people:
                row = measure(each.proxy, self.server, each)
                self.rows[each.proxy].append(row)
                show(f"minuto {number}", each.proxy.server, row)
            if not self.producer.is_alive():
                # Sem ele, cada cliente que fica contaria como uma falha do proxy.
                self.wrong.append(("o worker da prova parou", repr(self.producer.failure)))
                return

    def run(self):
        """Faz a prova. Retorno: lista do que não ficou plano."""
        self.enter(f"{self.options.seed}-aquecimento")
        time.sleep(warm_time)
        self.leave()
        start = self.rest("início")
        self.enter(self.options.seed)
        self.load(self.options.minutes * 60)
        self.leave()
        end = self.rest("fim", start)
        self.wrong += self.producer.wrong
        counts, examples = collections.Counter(kind for kind, _ in self.wrong), dict(reversed(self.wrong))
        problems = [f"{kind}: {count} vezes; por exemplo {examples[kind]}" for kind, count in counts.items()]
        for proxy in self.proxies:
            found = rest_problems(start[proxy], end[proxy]) + load_problems(self.rows[proxy])
            found += ["traceback no log"] * ("Traceback" in proxy.log())
            problems += [f"{proxy.server}: {text}" for text in found]
        print(f"{self.producer.count} tarefas; {len(self.wrong)} coisas erradas", flush=True)
        return problems

    def close(self):
        """Encerra tudo o que foi iniciado."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.server.stop)
            stack.callback(self.relay.close)
            stack.callback(self.producer.close)
            for proxy in self.proxies:
                stack.callback(proxy.stop, 60)


def main(argv):
    """Lê os argumentos, roda e diz o resultado. Argumentos: argv. Retorno: 0 se tudo ficou plano, 1 se não."""
    parser = argparse.ArgumentParser(prog="tests/faults/soak", description="Prova longa do py-ndjson-proxy.")
    parser.add_argument("--minutes", type=int, default=15, help="duração da carga, em minutos (padrão: 15)")
    parser.add_argument(
        "--streams", type=int, default=300, help="clientes ao mesmo tempo em cada hospedeiro (padrão: 300)"
    )
    parser.add_argument(
        "--server", default="flask,waitress", help="hospedeiros, separados por vírgula (padrão: os dois)"
    )
    parser.add_argument("--seed", type=int, default=1, help="semente do sorteio dos clientes (padrão: 1)")
    options = parser.parse_args(argv)
    peers.allow_descriptors(4 * options.streams + 1000)
    with tempfile.TemporaryDirectory(prefix="py-ndjson-proxy-soak-") as folder, contextlib.ExitStack() as stack:
        whole = soak(options, pathlib.Path(folder))
        stack.callback(whole.close)
        problems = whole.run()
    print("plano" if not problems else "NÃO ficou plano:")
    for text in problems:
        print(f"  - {text}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
