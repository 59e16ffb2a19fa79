"""Cenários da bancada. Cada um recebe o concorrente e devolve números, ou levanta rig.broken e não tem números."""

import time

import rig
import servers

first = 101
proxies = ("proxy-flask", "proxy-waitress", "proxy-poll")
peers = ("limit", "limit-redis", "nchan", "webdis")
# Clientes que saem no meio do silêncio de IDLE.
leavers = 20
# As configurações de END, THR, REQ e BIG: as linhas saem em lotes, sem pausa depois de cada uma.
batches = {"PAUSE": 0}
# A de RENEW: a validade é renovada a cada 5 s, e não a cada 200.
renewal = {"REDIS_TTL": 15}


def timed(make, seed, streams, lines, gap, every=True):
    """Abre streams e lhes envia linhas no tempo (L1, L100, L1000, SCALE).

    Argumentos:
        make: classe do concorrente.
        seed: semente da rodada.
        streams: quantos.
        lines: linhas de cada um.
        gap: [mínimo, máximo] segundos entre as linhas.
        every: falso para espalhar as fases.

    Retorna:
        dict: latências, tempos do fim, tempo de abertura e custo por linha.
    """
    with rig.rig(make, seed) as bench:
        opened = bench.open(first, streams)
        figures = bench.play("timed", first, streams, lines, gap, every=every)
        return figures | {"open_s": opened["seconds"], "redis_clients": clients(bench)}


def end(make, seed, streams, gap):
    """Mede do DEL ao fim do cliente, com PAUSE=0 (END).

    Argumentos:
        make: classe do concorrente.
        seed: semente da rodada.
        streams: quantos.
        gap: [mínimo, máximo] segundos antes da linha e antes do DEL.

    Retorna:
        dict: tempos do fim e latências.
    """
    with rig.rig(make, seed, settings=batches) as bench:
        bench.open(first, streams)
        return bench.play("end", first, streams, 1, gap)


def clients(bench):
    """Conta as conexões do servidor com o Redis.

    Argumentos:
        bench: a bancada.

    Retorna:
        int: conexões, menos as da própria bancada.
    """
    return bench.redis.usage()["clients"] - rig.worker_clients[bench.server.worker]


def idle(make, seed, streams, seconds, settings=None, lines=0, gap=None):
    """Deixa streams em silêncio e mede o que custam, e a linha avulsa que passa entre eles (IDLE, IDLE18000, RENEW).

    Argumentos:
        make: classe do concorrente.
        seed: semente da rodada.
        streams: quantos em silêncio.
        seconds: duração do silêncio.
        settings: outras configurações do proxy (nome -> valor), ou None.
        lines: linhas de um stream a mais, o único ativo; 0 se não há nenhum.
        gap: [mínimo, máximo] segundos entre elas.

    Retorna:
        dict: processador por 1000 streams e minuto, conexões, comandos por segundo, memória, threads, saída de clientes
        e latências do ativo.
    """
    with rig.rig(make, seed, settings=settings) as bench:
        time.sleep(0.5)
        empty = bench.server.memory()
        opened = bench.open(first, streams)
        time.sleep(1.5)
        before = bench.usage()
        time.sleep(seconds)
        after = bench.usage()
        full = bench.server.memory()
        took = after["when"] - before["when"]
        share = 1000 / streams * 60 / took
        calls = bench.calls(before, after)
        figures = {
            "server_cpu_s": (sum(after["server"]) - sum(before["server"])) * share,
            "redis_cpu_s": (after["redis"]["cpu"] - before["redis"]["cpu"]) * share,
            "redis_clients": clients(bench),
            "redis_commands_s": sum(calls.values()) / took,
            "expires": calls.get("expire", 0) / streams,
            "memory_kib": (full - empty) / streams,
            "memory_empty_kib": empty,
            "threads": bench.server.threads(),
            "open_s": opened["seconds"],
        }
        if lines:
            figures |= alone(bench, first + streams, lines, gap)
        staying = streams
        if make.name in proxies:
            wait_keys(bench, streams)
            staying -= leavers
            figures["gone_ms"] = gone(bench, first + staying, leavers, staying)
        # Silêncio sem stream perdido: cada um dos que ficaram ainda recebe uma linha e acaba.
        rest = bench.play("after", first, staying, 1, [0, max(1.0, streams / 1000)])
        if make.name in proxies:
            wait_keys(bench, 0)
        return figures | {f"after_{name}": rest[name] for name in ("latency_p50_ms", "latency_p99_ms")}


def alone(bench, number, lines, gap):
    """Abre um stream entre os que estão em silêncio e lhe envia linhas no tempo.

    Argumentos:
        bench: a bancada.
        number: número dele.
        lines: quantas linhas.
        gap: [mínimo, máximo] segundos entre elas.

    Retorna:
        dict: latências.
    """
    bench.open(number, 1)
    figures = bench.play("timed", number, 1, lines, gap, end=False)
    bench.worker.do("timed", seed="end", first=number, count=1, lines=0, gap=[0, 0], pad=0, end=True)
    bench.driver.do("settle", quiet=0.3, timeout=60)
    bench.check(number, 1, lines, 0, True, {})
    return {name: value for name, value in figures.items() if name.startswith("latency")}


def gone(bench, number, count, left):
    """Mede de quando clientes saem em silêncio, entre muitos que ficam, até que o último vestígio deles suma do Redis.

    Argumentos:
        bench: a bancada, com os streams em silêncio: cada um tem uma chave no Redis.
        number: número do primeiro que sai.
        count: quantos saem.
        left: quantos ficam.

    Retorna:
        float: milissegundos.
    """
    began = bench.driver.do("drop", first=number, count=count)["now"]
    wait_keys(bench, left)
    return (time.monotonic_ns() - began) / 1e6


def wait_keys(bench, count):
    """Espera até que no Redis só restem as chaves dos streams vivos.

    Argumentos:
        bench: a bancada.
        count: quantas.

    Levanta:
        rig.broken: se sobram chaves depois de 30 s, ou se sumiram as de quem ficou.
    """
    deadline = time.monotonic() + 30
    while (keys := bench.redis.keys()) != count:
        if keys < count or time.monotonic() > deadline:
            raise rig.broken(f"{keys} chaves no Redis, e não {count}")
        time.sleep(0.001)


def opening(make, seed, streams):
    """Abre todos os streams de uma vez (OPEN).

    Argumentos:
        make: classe do concorrente.
        seed: semente da rodada.
        streams: quantos.

    Retorna:
        dict: tempo até o último cabeçalho, distribuição e custo por stream.
    """
    with rig.rig(make, seed) as bench:
        before = bench.usage()
        told = bench.open(first, streams, window=streams)
        after = bench.usage()
        cost = bench.cost(before, after, streams)
        figures = {
            "open_s": told["seconds"],
            **rig.milliseconds(told["heads"], "open"),
            "server_us_open": cost["server_us_line"],
            "redis_us_open": cost["redis_us_line"],
            "driver_load": cost["driver_load"],
        }
        bench.play("after", first, streams, 1, [0, 2])
        return figures


def throughput(make, seed, streams, lines, pad=0, batch=100):
    """Empurra tudo o mais depressa possível, com PAUSE=0 (THR).

    Argumentos:
        make: classe do concorrente.
        seed: semente da rodada.
        streams: quantos.
        lines: linhas de cada um.
        pad: bytes de enchimento.
        batch: linhas por RPUSH.

    Retorna:
        dict: linhas e MB por segundo e custo por linha.
    """
    with rig.rig(make, seed, settings=batches) as bench:
        return burst(bench, first, streams, lines, pad, batch)


def burst(bench, number, streams, lines, pad, batch):
    """Faz uma rajada em uma bancada já pronta.

    Argumentos:
        bench: a bancada.
        number: número do primeiro stream.
        streams: quantos.
        lines: linhas de cada um.
        pad: bytes de enchimento.
        batch: linhas por RPUSH.

    Retorna:
        dict: linhas e MB por segundo e custo por linha.
    """
    bench.open(number, streams)
    before = bench.usage()
    told = bench.worker.do("burst", first=number, count=streams, lines=lines, pad=pad, batch=batch)
    bench.wait_end(True)
    after = bench.usage()
    found = bench.check(number, streams, lines, pad, True, told["ends"])
    seconds = (found["last"] - told["began"]) / 1e9
    figures = bench.cost(before, after, streams * lines)
    return figures | {"lines_s": streams * lines / seconds, "mb_s": found["bytes"] / seconds / 1e6, "seconds": seconds}


def requests(make, seed, total, parallel, seconds):
    """Requisições curtas, uma linha e DEL, várias ao mesmo tempo (REQ).

    Argumentos:
        make: classe do concorrente.
        seed: semente da rodada.
        total: máximo de requisições.
        parallel: quantas ao mesmo tempo.
        seconds: duração.

    Retorna:
        dict: requisições por segundo, tempo de cada uma e custo.
    """
    with rig.rig(make, seed, settings=batches) as bench:
        bench.worker.do("answer", on=True)
        before = bench.usage()
        told = bench.driver.do("loop", first=first, total=total, port=bench.port, parallel=parallel, seconds=seconds)
        after = bench.usage()
        bench.check(first, told["count"], 1, 0, True, {})
        cost = bench.cost(before, after, told["count"])
        return {
            "requests_s": told["count"] / told["seconds"],
            **rig.milliseconds(told["times"], "request"),
            "server_us_request": cost["server_us_line"],
            "redis_us_request": cost["redis_us_line"],
            "redis_calls_request": cost["redis_calls_line"],
            "driver_load": cost["driver_load"],
            "worker_load": cost["worker_load"],
        }


def big(make, seed, lines, pad, streams):
    """Linhas de 1 MB: uma por vez, e depois várias ao mesmo tempo (BIG).

    Argumentos:
        make: classe do concorrente.
        seed: semente da rodada.
        lines: linhas de cada stream.
        pad: tamanho de cada linha.
        streams: streams da segunda parte.

    Retorna:
        dict: latência de uma linha e MB por segundo.
    """
    with rig.rig(make, seed, settings=batches) as bench:
        bench.open(first, 1)
        figures = bench.play("big", first, 1, lines, [0.05, 0.15], pad=pad)
        rest = burst(bench, first + 1, streams, lines, pad, 1)
        return {name: figures[name] for name in figures if name.startswith("latency")} | {
            "mb_s": rest["mb_s"],
            "server_us_line": rest["server_us_line"],
        }


def foreign(make, seed, streams, lines, gap, idle_streams):
    """Dois proxies no mesmo Redis: o que o tráfego de um custa ao outro (FOREIGN).

    Argumentos:
        make: classe do concorrente.
        seed: semente da rodada.
        streams: streams do primeiro proxy.
        lines: linhas de cada um.
        gap: [mínimo, máximo] segundos entre as linhas.
        idle_streams: streams em silêncio do segundo.

    Retorna:
        dict: microssegundos de processador do segundo por linha do primeiro, e o consumo dele com e sem o tráfego.
    """
    with rig.rig(make, seed, proxies=2) as bench:
        busy, other = bench.servers
        quiet = 300_001
        bench.open(first, streams, port=busy.port)
        bench.open(quiet, idle_streams, port=other.port)
        time.sleep(1.5)
        start = time.monotonic(), other.cpu()
        time.sleep(8)
        rest = (other.cpu() - start[1]) / (time.monotonic() - start[0])
        start = time.monotonic(), other.cpu()
        figures = bench.play("timed", first, streams, lines, gap, end=False)
        took = time.monotonic() - start[0]
        loaded = (other.cpu() - start[1]) / took
        bench.worker.do("timed", seed=seed, first=first, count=streams, lines=0, gap=[0, 1], pad=0, end=True)
        bench.worker.do("timed", seed=seed, first=quiet, count=idle_streams, lines=0, gap=[0, 1], pad=0, end=True)
        bench.wait_end(True)
        bench.check(first, streams, lines, 0, True, {})
        bench.check(quiet, idle_streams, 0, 0, True, {})
        return {
            "foreign_us_line": (loaded - rest) * took / (streams * lines) * 1e6,
            "foreign_rest_load": rest,
            "foreign_busy_load": loaded,
            "foreign_lines_s": streams * lines / took,
            "latency_p50_ms": figures["latency_p50_ms"],
            "latency_p99_ms": figures["latency_p99_ms"],
        }


class scenario:
    """Um cenário: função, parâmetros completos e rápidos, quem participa e quantos streams abre."""

    def __init__(self, function, who, streams, full, quick=None):
        """Guarda a descrição.

        Argumentos:
            function: função do cenário.
            who: nomes dos concorrentes.
            streams: maior número de streams simultâneos.
            full: parâmetros.
            quick: parâmetros da forma rápida, ou None se não faz parte dela.
        """
        self.function = function
        self.who = who
        self.streams = streams
        self.full = full
        self.quick = quick

    def refusal(self, make):
        """Diz por que um concorrente não participa: o servidor e o motorista têm cada um o limite de descritores.

        Argumentos:
            make: classe do concorrente.

        Retorna:
            str: frase, vazia se participa; None se o cenário nem se aplica a ele.
        """
        if make.name not in self.who:
            return None
        needed = self.streams * make.per_stream + 300
        if needed > servers.hard_limit:
            return f"precisa de {needed} descritores, e o limite é {servers.hard_limit}"
        return make(None).missing()


everyone = (*proxies, *peers)
measured = (*everyone, "floor")
scale = {"lines": 4, "every": False}
scenarios = {
    "L1": scenario(
        timed,
        measured,
        1,
        {"streams": 1, "lines": 50, "gap": [0.3, 0.7]},
        {"streams": 1, "lines": 12, "gap": [0.2, 0.4]},
    ),
    "L100": scenario(timed, measured, 100, {"streams": 100, "lines": 5, "gap": [0.5, 2]}),
    "L1000": scenario(timed, measured, 1000, {"streams": 1000, "lines": 5, "gap": [0.5, 2]}),
    "END": scenario(end, (*proxies, "limit", "limit-redis", "nchan", "floor"), 100, {"streams": 100, "gap": [0.5, 4]}),
    "IDLE": scenario(idle, everyone, 1000, {"streams": 1000, "seconds": 15}, {"streams": 300, "seconds": 5}),
    "IDLE18000": scenario(idle, everyone, 18001, {"streams": 18000, "seconds": 15, "lines": 50, "gap": [0.3, 0.7]}),
    "RENEW": scenario(idle, proxies, 1000, {"streams": 1000, "seconds": 15, "settings": renewal}),
    "OPEN": scenario(opening, measured, 1000, {"streams": 1000}),
    "THR": scenario(throughput, measured, 20, {"streams": 20, "lines": 5000}, {"streams": 20, "lines": 1000}),
    "REQ": scenario(
        requests,
        (*proxies, "limit", "limit-redis"),
        32,
        {"total": 20000, "parallel": 32, "seconds": 6},
        {"total": 5000, "parallel": 32, "seconds": 2},
    ),
    "BIG": scenario(big, everyone, 4, {"lines": 20, "pad": 1_000_000, "streams": 4}),
    "SCALE2000": scenario(timed, measured, 2000, {"streams": 2000, **scale, "gap": [4.5, 5.5]}),
    "SCALE10000": scenario(timed, measured, 10000, {"streams": 10000, **scale, "gap": [4.5, 5.5]}),
    # O ritmo de SCALE10000, 2.000 linhas por segundo.
    "SCALE18000": scenario(timed, measured, 18000, {"streams": 18000, **scale, "gap": [8.1, 9.9]}),
    "FOREIGN": scenario(foreign, proxies, 1000, {"streams": 1000, "lines": 8, "gap": [0.5, 1.5], "idle_streams": 1000}),
}
