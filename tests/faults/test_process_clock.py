"""O relógio de parede que anda para trás ou para a frente: nenhum prazo do programa depende dele.

O libfaketime não está em toda parte; aqui quem mente é time.time, que um sitecustomize do ambiente troca no processo do
proxy, para ele e para as bibliotecas, e que passa a valer no meio da prova."""

import ast
import contextlib
import json
import signal
import time

import pytest

import harness
import support

shifts = [-3600, 3600]
names = ["atrasado_1_hora", "adiantado_1_hora"]

# Troca o relógio enquanto existir o arquivo, que traz a diferença em segundos.
liar = '''
import time

real, path = time.time, {path!r}


def shifted():
    """Devolve a hora, com a diferença escrita no arquivo."""
    try:
        with open(path) as file:
            return real() + float(file.read())
    except OSError:
        return real()


time.time = shifted
time.time_ns = lambda: int(shifted() * 1000000000)
'''


@pytest.fixture
def clock(tmp_path):
    """Prepara o relógio que mente.

    Retorno:
        Par (ambiente do proxy, função que acerta o relógio dele: clock_set(segundos)).
    """
    folder, path = tmp_path / "python", tmp_path / "shift"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(liar.format(path=str(path)), encoding="utf-8")

    def turn(seconds):
        """Acerta o relógio. Argumentos: seconds, a diferença."""
        fresh = path.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.rename(path)

    return {"PYTHONPATH": str(folder)}, turn


@pytest.mark.parametrize("shift", shifts, ids=names)
def test_clock_set_in_mid_stream(shift, clock, start_proxy, connect, worker):
    """1 stream antes e 1 depois da mudança: linhas, sinais de vida, MAXTIME e DRAIN seguem no tempo certo; só a hora
    escrita na tarefa acompanha o relógio."""
    env, turn = clock
    flags = ("-t", 1500, "--heartbeat", 400, "-P", 50, "--drain", 500)
    proxy = start_proxy(*flags, env=env)
    response, task = support.open_stream(connect, proxy, worker)
    assert abs(task.info["request_time"] - time.time()) < 60
    task.push("1", "2")
    assert [response.line(), response.line()] == [b"1", b"2"]
    turn(shift)
    after, own = support.open_stream(connect, proxy, worker)
    assert abs(own.info["request_time"] - time.time() - shift) < 60
    began = time.monotonic()
    for number in range(3):
        task.push(str(number))
        line = response.line(3)
        # Numa máquina ocupada cabe um sinal de vida entre o pedido e a linha.
        assert (response.line(3) if b"ping" in line else line) == str(number).encode()
    for answer in (response, after):
        *beats, last = answer.lines(10)
        assert beats and {json.loads(beat)["type"] for beat in beats} == {"ping"}
        assert json.loads(last) == {"error": "timeout"}
        assert 1.2 < last.when - began < 5
    assert support.finished_row(proxy, task)["fim"] == "timeout"
    assert 1000 < int(support.finished_row(proxy, own)["duracao_ms"]) < 6000
    late, lone = support.open_stream(connect, proxy, worker)
    began = time.monotonic()
    proxy.signal(signal.SIGTERM)
    assert json.loads(late.lines()[-1]) == {"error": "shutdown"}
    assert proxy.wait(10) == 0
    assert time.monotonic() - began < 6
    assert not lone.traces()


@pytest.mark.parametrize("shift", shifts, ids=names)
def test_clock_set_in_mid_request(shift, clock, start_proxy, host, connect, worker):
    """2 pedidos começados antes da mudança: o que não termina é derrubado no prazo de REQUEST_TIMEOUT, nem antes nem uma
    hora depois; o que termina a tempo é atendido."""
    env, turn = clock
    proxy = start_proxy("--request-timeout", 2000, "-P", 0, env=env)
    head = b"POST / HTTP/1.1\r\nHost: proxy.test\r\nContent-Length: 5\r\n\r\n"
    began = time.monotonic()
    stuck, slow = connect(proxy), connect(proxy)
    for conn in (stuck, slow):
        conn.send(head + b"ab")
    stuck.silent(0.5)
    turn(shift)
    stuck.silent(0.5)
    slow.send(b"cde")
    task = worker.next()
    assert task.info["body"] == "abcde"
    task.finish("ok")
    assert slow.response().lines() == [b"ok"]
    answer = stuck.expect()
    with contextlib.suppress(harness.broken, ConnectionResetError, AssertionError):
        stuck.read_until(lambda: answer.ended, 8, "o fim da conexão")
        assert answer.status == 408
        assert stuck.at_end()
    took = time.monotonic() - began
    assert 1.8 < took < 7, f"derrubado depois de {took:.1f} s"
    assert answer.status in (None, 408)
    worker.idle()


def test_only_the_task_reads_the_wall_clock():
    """No programa, time.time aparece 1 vez: a hora da requisição, que a especificação pede. O resto é time.monotonic."""
    tree = ast.parse(harness.program.read_text(encoding="utf-8"))
    clocks = {"time", "time_ns", "localtime", "gmtime", "ctime", "strftime", "asctime", "mktime"}
    found = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id == "time" and node.attr in clocks or node.value.id == "datetime")
    ]
    assert found == ["time"]
