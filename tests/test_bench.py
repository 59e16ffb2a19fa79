"""A bancada confere o que mede: um stream que se quebra não passa por inteiro, e um alvo não alcançado não passa por um."""

import importlib
import json
import types

import pytest

import harness

head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
clocks = [1000, 2000, 3000]


@pytest.fixture
def bench(monkeypatch):
    """Importa um módulo da bancada pelo nome. Retorno: a função que o faz."""
    monkeypatch.syspath_prepend(str(harness.root / "tests" / "bench"))
    return importlib.import_module


def chunk(number, order):
    """Escreve a linha de um stream como o trabalhador, em um chunk.

    Argumentos:
        number: número do stream.
        order: posição da linha.

    Retorno:
        O chunk (bytes).
    """
    line = b'{"s":"%06d","n":"%08d","t":"%020d"}\n' % (number, order, clocks[order])
    return b"%x\r\n%b\r\n" % (len(line), line)


def examine(bench, *parts, when=9000, finished=True):
    """Confere uma resposta com o motorista da bancada.

    Argumentos:
        bench: o acessório.
        parts: pedaços recebidos, em ordem (bytes).
        when: instante em que chegaram, em ns.
        finished: se a conexão foi fechada.

    Retorno:
        As latências, em ns.
    """
    item = types.SimpleNamespace(failure=None, number=7, finished=finished, events=[(when, part) for part in parts])
    return bench("driver").examine(item, 3, 0, True, "task", clocks)


good = [chunk(7, 0), chunk(7, 1), chunk(7, 2)]
last = b"0\r\n\r\n"


def test_whole_stream_passes(bench):
    """As latências de um stream inteiro, chegue ele em quantos pedaços chegar."""
    assert examine(bench, head, *good, last) == [8000, 7000, 6000]
    assert examine(bench, head + b"".join(good) + last) == [8000, 7000, 6000]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([head, good[0], good[2], last], id="perdida"),
        pytest.param([head, good[0], good[1], good[1], good[2], last], id="repetida"),
        pytest.param([head, good[1], good[0], good[2], last], id="fora_de_ordem"),
        pytest.param([head, good[0], chunk(8, 1), good[2], last], id="alheia"),
        pytest.param([head, good[0], good[1].replace(b"2000", b"2001"), good[2], last], id="alterada"),
        pytest.param([head, *good], id="sem_fim"),
        pytest.param([head, *good, last, b"x"], id="dados_depois_do_fim"),
        pytest.param([head.replace(b"200", b"500"), *good, last], id="erro"),
        pytest.param([head.replace(b"200", b"2005"), *good, last], id="status_longo"),
        *(
            pytest.param([head, *good[:2], size + good[2][2:], last], id=f"tamanho_{name}")
            for size, name in ((b"-2", "negativo"), (b"0x39", "0x"), (b"+39", "sinal"), (b"3_9", "sublinhado"))
        ),
    ],
)
def test_broken_stream_has_no_figures(bench, parts):
    """Nenhuma das formas de se quebrar passa."""
    with pytest.raises(ValueError):
        examine(bench, *parts)


def test_open_or_early_stream_has_no_figures(bench):
    """Uma conexão que não se fecha e uma linha recebida antes de enviada não passam."""
    with pytest.raises(ValueError, match="não acabou"):
        examine(bench, head, *good, last, finished=False)
    with pytest.raises(ValueError, match="antes de enviada"):
        examine(bench, head, *good, last, when=2500)


def test_targets_are_judged_by_their_own_base(bench):
    """Cada limite julga por si, e um cenário quebrado ou encurtado nunca diz sim."""
    report = bench("report")

    def figures(value, broken=0, short=False):
        """Compõe a mediana de um concorrente (dict)."""
        return {"latency_p50_ms": value, "whole": 3 - broken, "broken": broken, "short": short}

    found = {
        ("L1000", "proxy-flask"): figures(0.57),
        ("L1000", "limit"): figures(0.30),
        ("IDLE18000", "proxy-flask"): figures(1.70),
        ("L1", "proxy-flask"): figures(1.00),
    }
    beside, alone = (
        next(target for target in report.targets if target[0] == name)
        for name in ("L1000: p50 ≤ 1,8 × limit", "18.000 em silêncio: p50 da linha avulsa ≤ 2 × L1")
    )
    assert report.judge(found, "proxy-flask", beside) == "1,90 × **não**"
    assert report.judge(found, "proxy-flask", alone) == "1,70 × sim"
    found["L1", "proxy-flask"] = figures(1.00, short=True)
    assert report.judge(found, "proxy-flask", alone) == "n/d"
    found["L1000", "proxy-flask"] = figures(0.1, broken=1)
    assert report.judge(found, "proxy-flask", beside) == "**quebrado** (1 de 3)"


@pytest.mark.parametrize(("server", "status"), [("proxy-flask", 1), ("limit", 1), ("webdis", 0), ("nchan", 0)])
def test_only_our_own_broken_runs_fail_the_bench(bench, tmp_path, capsys, server, status):
    """Um par de outros que se quebra é um resultado; o proxy, ou a base por que se julga, reprova."""
    record = {"scenario": "THR", "server": server, "run": 1, "short": False, "broken": "linha perdida"}
    results = {"machine": {}, "quick": False, "runs": 1, "missing": {}, "records": [record]}
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert bench("bench").main(["--report", str(tmp_path)]) == status
    assert f"- quebrado: THR, {server}, rodada 1: linha perdida" in capsys.readouterr().out


def test_limit_knows_how_much_of_a_reply_is_missing(bench):
    """Seja onde for o corte, o limit espera sem reler e sem esperar demais; inteira, a resposta é lida."""
    parse = bench("limit").parse
    reply = b"*2\r\n$4\r\nnome\r\n*2\r\n$5\r\nlinha\r\n$-1\r\n"
    assert parse(reply, 0) == ([b"nome", [b"linha", None]], len(reply))
    for size in range(len(reply)):
        _, position = parse(reply[:size], 0)
        assert -(len(reply) - size) <= position < 0
