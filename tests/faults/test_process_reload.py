"""Recargas sob carga, com milhares de calados, com corpos que chegam devagar; e o socket que fica quando o processo morre."""

import contextlib
import itertools
import json
import random
import signal
import threading
import time

import pytest

import harness
import peers
import redis_faults
import support

# Pausa máxima de uma linha, em segundos, no percentil 99; na forma curta, a máquina é de muitas provas.
longest_pause = peers.scale(6.0, 1.5)


class parallel(contextlib.ExitStack):
    """Funções que rodam sem parar em suas linhas de execução, até o fim do bloco."""

    def __init__(self):
        """Prepara, sem nenhuma."""
        super().__init__()
        self.stop = threading.Event()

    def keep(self, function):
        """Roda uma função sem parar. Argumentos: function, sem argumentos."""

        def loop():
            """Repete."""
            while not self.stop.is_set():
                function()

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        self.callback(thread.join, 30)

    def __exit__(self, *details):
        """Manda parar e espera. Argumentos: details, os do protocolo. Retorno: o de ExitStack."""
        self.stop.set()
        return super().__exit__(*details)


class numbering:
    """O worker de muitos streams: a cada passo, empurra a próxima linha dos que estão na hora, com o instante dela."""

    def __init__(self, client, tasks):
        """Guarda os streams. Argumentos: client, um redis.Redis; tasks, as tarefas."""
        self.client, self.tasks = client, tasks
        self.counts = dict.fromkeys(tasks, 0)
        self.due = {each: time.monotonic() + random.uniform(0, 0.5) for each in tasks}

    def step(self):
        """Empurra o que está na hora."""
        now = time.monotonic()
        with self.client.pipeline(transaction=False) as pipe:
            for each in [each for each, due in self.due.items() if due <= now]:
                pipe.rpush(each.list, json.dumps([self.counts[each], time.monotonic()]))
                self.counts[each] += 1
                self.due[each] = now + random.uniform(0.1, 0.5)
            pipe.execute()
        time.sleep(0.01)


def check_lines(pairs, counts, everyone):
    """Confere que cada linha chegou uma vez e em ordem.

    Argumentos:
        pairs: pares (response, task).
        counts: dicionário de tarefa para quantas linhas.
        everyone: as linhas de cada response.

    Retorno:
        Lista ordenada das demoras, em segundos.
    """
    delays = []
    for (_, task), lines in zip(pairs, everyone, strict=True):
        rows = [json.loads(line) for line in lines]
        assert [number for number, _ in rows] == list(range(counts[task]))
        delays += [line.when - pushed for line, (_, pushed) in zip(lines, rows, strict=True)]
    return sorted(delays)


@peers.counted(4, 50, "recargas")
def test_reloads_under_load(count, start_proxy, host, connect, worker, start_worker, redis_main):
    """Streams com linhas numeradas e pedidos novos, sob recargas de valores mudados e algumas recusadas: nenhuma linha
    perdida, repetida ou fora de ordem, nenhum pedido recusado ou cortado, e o mesmo processo."""
    many = peers.scale(40, 500)
    peers.allow_descriptors(many + 500)
    proxy = start_proxy("-t", 600000, env_file="PAUSE=0\n")
    pairs = redis_faults.open_many(connect, proxy, worker, many)
    crowd = numbering(redis_main.client(), [task for _, task in pairs])
    mine, faults, waits, took = {task.key for _, task in pairs}, [], [], []

    def visit():
        """Faz um pedido, que deve ser atendido."""
        began = time.monotonic()
        try:
            with contextlib.closing(harness.connection(proxy.port)) as conn:
                assert conn.request("POST", "/", body="x").response().lines() == [b"fim"]
        except (OSError, AssertionError) as error:
            faults.append(repr(error))
        waits.append(time.monotonic() - began)
        time.sleep(max(0.0, 0.2 - waits[-1]))

    def answer():
        """Encerra a tarefa de um pedido."""
        with contextlib.suppress(AssertionError):
            task = worker.next(0.5)
            assert task.key not in mine
            task.finish("fim")

    everyone, failure = [], []

    def read():
        """Lê todos os streams até o fim."""
        try:
            everyone.extend(harness.read_all([response for response, _ in pairs], peers.scale(300, 1500)))
        except AssertionError as error:
            failure.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with parallel() as busy:
        # Os pedidos acabam antes de quem os responde.
        busy.keep(crowd.step)
        busy.keep(answer)
        with parallel() as asking:
            for _ in range(4):
                asking.keep(visit)
            for number in range(count):
                began = time.monotonic()
                if number % 4 == 3:
                    proxy.refuse_reload("PAUSE=muito\n")
                else:
                    proxy.reload(f"PAUSE=0\nHEARTBEAT={10**6 + number}\n")
                    took.append(time.monotonic() - began)
    for _, task in pairs:
        task.delete()
    reader.join(60)
    assert failure == [] and not reader.is_alive()
    delays = check_lines(pairs, crowd.counts, everyone)
    worst = delays[int(len(delays) * 0.99)]
    peers.say(
        f"{count} recargas ({host}), {many} streams: {len(delays)} linhas, pausa p99 {worst:.2f} s e máxima {delays[-1]:.2f} s; "
        f"{len(waits)} pedidos, o mais lento {max(waits):.2f} s; recarga de {min(took):.2f} a {max(took):.2f} s"
    )
    assert faults == []
    assert worst <= longest_pause
    assert proxy.alive() and proxy.log().count("recarregando") == len(took)
    for _, task in pairs:
        task.gone(10)


@peers.counted(200, 5000, "streams")
def test_silent_streams(count, start_proxy, host, connect, worker):
    """Muitos streams calados: a recarga é breve, todos seguem vivos, e memória e descritores não crescem."""
    peers.allow_descriptors(count + 500)
    proxy = start_proxy("-t", 3600000, "-P", 0, "--max-streams", count + 10)
    rest = peers.warm(proxy)
    began = time.monotonic()
    proxy.reload()
    empty = time.monotonic() - began
    pairs = redis_faults.open_many(connect, proxy, worker, count)
    proxy.reload()
    peers.warm(proxy)
    memory, opened, took = proxy.memory(), proxy.descriptors(), []
    for _ in range(peers.scale(3, 100)):
        began = time.monotonic()
        proxy.reload()
        took.append(time.monotonic() - began)
    peers.warm(proxy)
    harness.eventually(lambda: proxy.descriptors() <= opened, 10, f"no máximo {opened} descritores")
    grown = proxy.memory() - memory
    peers.say(f"{count} streams calados ({host}): {len(took)} recargas de {min(took):.2f} a {max(took):.2f} s; sem nenhum, "
              f"{empty:.2f} s; {grown} KiB e nenhum descritor a mais")
    assert grown < memory * 0.1 + 8192
    for _, task in pairs:
        task.finish(task.name)
    everyone = harness.read_all([response for response, _ in pairs], 120)
    assert everyone == [[task.name.encode()] for _, task in pairs]
    peers.settle(proxy, rest, 30)


@peers.counted(1, 5, "recargas")
def test_long_body_arriving(count, start_proxy, host, connect, worker):
    """Um corpo de 10 MB que ainda chega na recarga recebe um 503 inteiro, e não um corte; nenhuma tarefa nasce dele."""
    size = 10 * 2**20
    for _ in range(count):
        proxy = start_proxy("-P", 0, "--request-timeout", 60000)
        response, task = support.open_stream(connect, proxy, worker)
        late = connect(proxy)
        late.send(b"POST /longo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
        late.expect()
        seen = proxy.ask_reload()
        sent, began = 0, time.monotonic()
        while late.current.head is None and sent < size - 65536:
            assert time.monotonic() - began < 20
            with contextlib.suppress(ConnectionError):
                late.sock.sendall(b"x" * 16384)
            sent += 16384
            late.pump(0.02)
        assert late.current.status == 503 and late.current.json()["error"] == "shutdown"
        late.close()
        proxy.wait_ready(since=seen)
        worker.idle()
        task.finish("fim")
        assert response.lines() == [b"fim"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@peers.counted(2, 20, "mortes")
def test_death_refuses_nobody(count, start_proxy, host, redis_main, monkeypatch, how):
    """Com o socket guardado pelo supervisor, quem se conecta durante um reinício ou depois de um kill -9 espera e é
    atendido; só o kill -9 corta o que estava sendo respondido."""
    with contextlib.closing(support.supervisor()) as supervisor:
        env, file = supervisor.env, f"HTTP_PORT={harness.free_port()}\n"
        wrapper = ("env", "-u", "HTTP_PORT")
        proxy = start_proxy(env=env, env_file=file, wrapper=wrapper)
        port, refused, cut, waits = proxy.port, [], [], []

        def ask():
            """Faz um /ping."""
            began = time.monotonic()
            try:
                conn = harness.connection(port)
            except OSError as error:
                refused.append(repr(error))
                return
            with contextlib.closing(conn):
                try:
                    assert conn.request("GET", "/ping").response(20).body() == b"pong"
                except (OSError, AssertionError) as error:
                    cut.append(repr(error))
            waits.append(time.monotonic() - began)

        with parallel() as busy:
            for _ in range(4):
                busy.keep(ask)
            for number in itertools.count(1):
                harness.eventually(lambda number=number: len(waits) > number * 20, 20, "pedidos atendidos")
                if number > count:
                    break
                kept = harness.eventually(lambda: supervisor.kept and supervisor.kept[-1], 5, "socket guardado").dup()
                proxy.signal(how)
                assert proxy.wait() == (0 if how == signal.SIGTERM else -how)
                given = support.given_listener(monkeypatch, kept)
                proxy = start_proxy(env=env, env_file=file, wrapper=(*wrapper, *given))
                kept.close()
                monkeypatch.setattr(harness.background, "inherited", ())
        peers.say(f"{count} mortes por {how.name} ({host}): {len(waits)} pedidos, nenhum recusado, {len(cut)} cortados, "
                  f"espera máxima {max(waits):.2f} s")
        assert refused == []
        assert len(cut) <= (4 * count if how == signal.SIGKILL else 0), cut
