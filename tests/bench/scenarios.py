"""Cenários da bancada. Cada um recebe o concorrente e devolve números, ou levanta rig.broken e não tem números."""

import time

import rig
import servers

first = 101
proxies = ("proxy-flask", "proxy-waitress", "proxy-poll")
peers = ("limit", "limit-redis", "nchan", "webdis")
# Clientes que saem no meio do silêncio de IDLE.
leavers = 20
# O REDIS_TTL padrão do proxy, em segundos.
usual_ttl = 600
# As configurações de END, THR, REQ e BIG: as linhas saem em lotes, sem pausa depois de cada uma.
batches = {"PAUSE": 0}
# As de MUTE: com um minuto de INTERVAL, a consulta periódica não corre durante a medição.
mute = {"INTERVAL": 60000}


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


def idle(make, seed, streams, seconds, settings=None):
    """Deixa streams em silêncio e mede o que custam (IDLE, MUTE).

    Argumentos:
        make: classe do concorrente.
        seed: semente da rodada.
        streams: quantos.
        seconds: duração do silêncio.
        settings: outras configurações do proxy (nome -> valor), ou None.

    Retorna:
        dict: processador por 1000 streams e minuto, conexões, comandos por segundo, memória e saída de clientes.
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
        connected = clients(bench)
        took = after["when"] - before["when"]
        share = 1000 / streams * 60 / took
        figures = {
            "server_cpu_s": (sum(after["server"]) - sum(before["server"])) * share,
            "redis_cpu_s": (after["redis"]["cpu"] - before["redis"]["cpu"]) * share,
            "redis_clients": connected,
            "redis_commands_s": sum(bench.calls(before, after).values()) / took,
            "memory_kib": (full - empty) / streams,
            "memory_empty_kib": empty,
            "open_s": opened["seconds"],
        }
        staying = streams
        if make.name in proxies:
            staying -= leavers
            figures["gone_ms"] = gone(bench, first + staying, leavers, streams)
        # Silêncio sem stream perdido: cada um dos que ficaram ainda recebe uma linha e acaba.
        rest = bench.play("after", first, staying, 1, [0, max(1.0, streams / 1000)])
        figures |= {f"after_{name}": rest[name] for name in ("latency_p50_ms", "latency_p99_ms")}
        if make.name in proxies:
            wait_keys(bench, 0)
        return figures


def gone(bench, number, count, alive):
    """Mede de quando clientes saem em silêncio, entre muitos que ficam, até que o último vestígio deles suma do Redis.

    Argumentos:
        bench: a bancada, com os streams em silêncio.
        number: número do primeiro que sai.
        count: quantos saem.
        alive: quantos streams há, com os que saem; cada um em silêncio tem uma chave no Redis.

    Retorna:
        float: milissegundos.

    Levanta:
        rig.broken: se as chaves não eram as esperadas, ou se as de quem saiu não sumiram.
    """
    if bench.redis.keys() != alive:
        raise rig.broken(f"{bench.redis.keys()} chaves no Redis, e não {alive}")
    began = bench.driver.do("drop", first=number, count=count)["now"]
    wait_keys(bench, alive - count)
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


def renew(make, seed, streams, ttl, seconds):
    """Mede a renovação da validade das chaves, que o silêncio curto de IDLE não alcança (RENEW).

    Com um REDIS_TTL curto, um trecho sem renovação e um período inteiro dela (um terço de REDIS_TTL), em que cada stream
    é renovado uma vez. O que o período gasta a mais, dividido pelo período do REDIS_TTL padrão, é o que a renovação soma
    ao silêncio.

    Argumentos:
        make: classe do concorrente.
        seed: semente da rodada.
        streams: quantos.
        ttl: REDIS_TTL da medição, em segundos.
        seconds: duração do trecho sem renovação.

    Retorna:
        dict: EXPIRE por stream e renovação; comandos por segundo e processador por 1000 streams e minuto, só da
        renovação e com o silêncio, com o REDIS_TTL padrão.

    Levanta:
        rig.broken: se a renovação não caiu inteira no período medido.
    """
    with rig.rig(make, seed, settings={"REDIS_TTL": ttl}) as bench:
        began = time.monotonic()
        bench.open(first, streams)
        opened = time.monotonic()
        time.sleep(1.5)
        readings = [bench.usage()]
        for pause in (seconds, ttl / 3):
            time.sleep(readings[-1]["when"] + pause - time.monotonic())
            readings.append(bench.usage())
        start, middle, end = readings
        # Cada stream é renovado um período depois de aberto, e depois a cada período.
        first_turn, last_turn, second_turn = began + ttl / 3, opened + ttl / 3, began + 2 * ttl / 3
        if not (middle["when"] < first_turn and last_turn < end["when"] < second_turn):
            raise rig.broken("a máquina atrasou a medição: o período não contém uma renovação inteira")
        before, during = bench.calls(start, middle), bench.calls(middle, end)
        if before.get("expire") or during.get("expire", 0) < streams:
            raise rig.broken(f"EXPIRE: {before.get('expire', 0)} antes do período e {during.get('expire', 0)} nele")
        took, period = middle["when"] - start["when"], end["when"] - middle["when"]
        spent = {
            "server_cpu_s": [sum(reading["server"]) for reading in readings],
            "redis_cpu_s": [reading["redis"]["cpu"] for reading in readings],
        }
        figures = {"renewal_expires": during["expire"] / streams}
        share = 1000 / streams
        figures["renewal_commands_s"] = during["expire"] * share / (usual_ttl / 3)
        figures["redis_commands_s"] = sum(before.values()) / took + figures["renewal_commands_s"]
        for name, (first_value, second, third) in spent.items():
            rate = (second - first_value) / took
            figures[f"renewal_{name}"] = (third - second - rate * period) * share * 60 / (usual_ttl / 3)
            figures[name] = rate * share * 60 + figures[f"renewal_{name}"]
        # As chaves renovadas continuam vivas: cada stream ainda recebe uma linha e acaba.
        bench.play("after", first, streams, 1, [0, 1])
        wait_keys(bench, 0)
        return figures


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


def lone(make, seed, streams, lines, gap):
    """Um stream ativo entre muitos em silêncio (LONE).

    Argumentos:
        make: classe do concorrente.
        seed: semente da rodada.
        streams: quantos em silêncio.
        lines: linhas do ativo.
        gap: [mínimo, máximo] segundos entre as linhas.

    Retorna:
        dict: latências do ativo.
    """
    with rig.rig(make, seed) as bench:
        bench.open(first, streams + 1)
        active = first + streams
        time.sleep(1)
        figures = bench.play("timed", active, 1, lines, gap, end=False)
        bench.worker.do("timed", seed=seed, first=first, count=streams + 1, lines=0, gap=[0, 3], pad=0, end=bench.ends)
        bench.wait_end(True)
        bench.check(first, streams, 0, 0, True, {})
        bench.check(active, 1, lines, 0, True, {})
        return figures


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
every_five = {"lines": 4, "gap": [4.5, 5.5], "every": False}
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
    "IDLE5000": scenario(idle, everyone, 5000, {"streams": 5000, "seconds": 15}),
    "IDLE10000": scenario(idle, everyone, 10000, {"streams": 10000, "seconds": 15}),
    "MUTE": scenario(idle, proxies, 1000, {"streams": 1000, "seconds": 15, "settings": mute}),
    "MUTE10000": scenario(idle, proxies, 10000, {"streams": 10000, "seconds": 15, "settings": mute}),
    "RENEW": scenario(renew, proxies, 1000, {"streams": 1000, "ttl": 60, "seconds": 10}),
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
    "SCALE2000": scenario(timed, measured, 2000, {"streams": 2000, **every_five}),
    "SCALE5000": scenario(timed, measured, 5000, {"streams": 5000, **every_five}),
    "SCALE10000": scenario(timed, measured, 10000, {"streams": 10000, **every_five}),
    "LONE": scenario(lone, everyone, 10000, {"streams": 10000, "lines": 50, "gap": [0.3, 0.7]}),
    "FOREIGN": scenario(foreign, proxies, 1000, {"streams": 1000, "lines": 8, "gap": [0.5, 1.5], "idle_streams": 1000}),
}
