"""Quem pede e não lê: a memória não cresce com o que está à espera, ninguém mais sente, e o lugar volta."""

import contextlib
import re
import socket
import statistics
import time

import pytest

import harness
import peers
import support

# Megabytes à espera de cada um, e o que o proxy pode guardar por leitor parado, em KiB: o resto é do Redis.
waiting = 10
held = 2048
line_size = 10_000
lines = waiting * 1_000_000 // line_size

# Na forma curta o prazo de quem não lê é este, em segundos; na completa, o do programa.
short_patience = 2


@pytest.fixture
def patience(monkeypatch, tmp_path):
    """Prazo de quem não lê, em segundos. É uma constante do programa: a forma curta roda uma cópia em que ela é menor.

    Retorno:
        O prazo (int ou float).
    """
    text = harness.program.read_text(encoding="utf-8")
    found = re.search(r"^client_timeout = ([\d.]+)$", text, re.MULTILINE)
    assert found, "o programa já não tem a constante client_timeout"
    if peers.FAULTS == "full":
        return float(found[1])
    copy = tmp_path / "json-proxy.py"
    copy.write_text(text.replace(found[0], f"client_timeout = {short_patience}.0"), encoding="utf-8")
    monkeypatch.setattr(harness, "program", copy)
    return short_patience


def deaf(port, number):
    """Faz um pedido de quem não vai ler a resposta, com a menor janela possível.

    Argumentos:
        port: porta do proxy.
        number: número do leitor.

    Retorno:
        O soquete.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", port))
    sock.sendall(b"GET /surdo%d HTTP/1.1\r\nHost: proxy.test\r\n\r\n" % number)
    return sock


def latencies(response, task, count):
    """Mede a demora entre empurrar uma linha e ela chegar ao cliente.

    Argumentos:
        response: o streaming de quem lê.
        task: a tarefa dele.
        count: quantas medidas.

    Retorno:
        Lista de segundos.
    """
    found = []
    for number in range(count):
        began = time.monotonic()
        task.push(str(number))
        line = response.line(30)
        assert line == str(number).encode()
        found.append(line.when - began)
        time.sleep(0.01)
    return found


def fill(tasks):
    """Põe à espera de cada tarefa as suas linhas, e aguarda que o proxy pare de tirá-las.

    Argumentos:
        tasks: as tarefas dos leitores parados.

    Retorno:
        Lista do que resta no Redis para cada uma, em linhas.
    """
    chunk = [b"x" * line_size] * 100
    for task in tasks:
        for _ in range(lines // 100):
            task.push(*chunk)
    seen, left = [], dict.fromkeys(tasks, lines)

    def still():
        """Diz se as listas pararam de encolher por meio segundo; a de quem já foi derrubado não conta mais."""
        for task in tasks:
            size = task.client.llen(task.list)
            if task.exists():
                left[task] = size
        seen.append(list(left.values()))
        time.sleep(0.05)
        return len(seen) > 10 and all(each == seen[-1] for each in seen[-10:])

    harness.eventually(still, 60, "listas paradas")
    return seen[-1]


@peers.counted(3, 50, "leitores_parados")
def test_readers_that_never_read(count, patience, start_proxy, host, connect, worker):
    """Cada um com 10 MB à espera: a memória do proxy é limitada, o que não foi pedido fica no Redis, a demora dos outros
    é a de antes, e no prazo os lugares, as chaves e as linhas de execução voltam, sem que eles saiam."""
    proxy = start_proxy("-P", 0, "-t", 600000)
    rest = peers.warm(proxy)
    response, task = support.open_stream(connect, proxy, worker)
    before, calm = proxy.memory(), latencies(response, task, 60)
    with contextlib.ExitStack() as stack:
        for number in range(count):
            stack.callback(deaf(proxy.port, number).close)
        tasks = [worker.next() for _ in range(count)]
        began = time.monotonic()
        left = fill(tasks)
        busy, used = latencies(response, task, 60), proxy.memory() - before
        peers.say(
            f"{count} leitores parados com {waiting} MB cada ({host}): {used} KiB a mais no proxy ({used // count} por leitor); "
            f"no Redis restam de {min(left)} a {max(left)} das {lines} linhas"
        )
        peers.say(f"demora de uma linha antes: {peers.spread(calm)}; com eles: {peers.spread(busy)}")
        problems = []
        if used > held * count + 20480 or count < 10 and used + before > 100_000:
            problems.append(f"{used // count} KiB por leitor; o máximo é {held}")
        if min(left) < lines // 2:
            problems.append(f"o proxy tirou {lines - min(left)} das {lines} linhas de quem não lê")
        if statistics.median(busy) > 3 * statistics.median(calm) + 0.01 or max(busy) > 1:
            problems.append(f"a demora dos outros foi de {peers.spread(calm)} a {peers.spread(busy)}")
        # O prazo recomeça a cada vez que o sistema ainda aceita um pouco: são até três antes de nada mais caber.
        limit = 4 * patience + 10
        try:
            harness.eventually(lambda: len(support.finished_rows(proxy)) == count, limit, "lugares devolvidos")
            peers.say(f"todos derrubados {time.monotonic() - began:.1f} s depois de encher; prazo de {patience} s")
        except AssertionError:
            done = len(support.finished_rows(proxy))
            problems.append(f"{count - done} de {count} leitores seguem presos depois de {limit} s")
            worker.client.delete(*[each.key for each in tasks], *[each.list for each in tasks])
        assert not problems, problems
        assert {row["fim"] for row in support.finished_rows(proxy)} == {"cliente"}
        assert not [each for each in tasks if each.traces()]
        task.finish()
        assert response.lines() == []
        back = peers.settle(proxy, rest)
        peers.say(f"linhas de execução e descritores de volta ao repouso em {back:.1f} s")
