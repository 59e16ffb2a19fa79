#!/usr/bin/env python3
"""Bancada do py-ndjson-proxy: mede, em loopback, qualquer servidor que cumpra o contrato, ao lado de seus pares.

Use tests/bench/run, que prepara o que é preciso. O README desta pasta diz o que cada cenário mede.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import re
import signal
import sys
import time

import report
import rig
import scenarios
import servers

usual = ("proxy-flask", "proxy-waitress", "limit", "limit-redis", "nchan", "webdis")
quick_usual = ("proxy-flask", "proxy-waitress", "limit")
# Programas de outros: um stream que um deles quebra é um resultado, e não um defeito daqui.
foreigners = ("nchan", "webdis")


def read_arguments(argv):
    """Lê os argumentos.

    Argumentos:
        argv: sem o nome do programa.

    Retorna:
        argparse.Namespace: runs, quick, only, server, out e factor.
    """
    parser = argparse.ArgumentParser(prog="tests/bench/run", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, help="rodadas de cada cenário (padrão: 3; 1 com --quick)")
    parser.add_argument(
        "--quick", action="store_true", help="forma de cerca de um minuto: L1, IDLE, THR e REQ pequenos"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="CENÁRIO",
        help=f"só este cenário; pode ser repetido: {', '.join(scenarios.scenarios)}",
    )
    parser.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="NOME",
        help=f"só este servidor; pode ser repetido: {', '.join(servers.contestants)}",
    )
    parser.add_argument("--out", metavar="PASTA", help="pasta dos resultados (padrão: na pasta de cache)")
    parser.add_argument("--report", metavar="PASTA", help="só refaz tabela e gráfico dos resultados desta pasta")
    given = parser.parse_args(argv)
    for name, known in [
        *((name, scenarios.scenarios) for name in given.only),
        *((name, servers.contestants) for name in given.server),
    ]:
        if name not in known:
            parser.error(f"{name} não existe; use {', '.join(known)}")
    given.runs = given.runs or (1 if given.quick else 3)
    return given


def package_version(name):
    """Lê a versão de um pacote do Python.

    Argumentos:
        name: nome do pacote.

    Retorna:
        str: a versão, ou "-".
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def describe_machine():
    """Descreve a máquina, sem nomes de máquina nem caminhos.

    Retorna:
        dict: rótulo -> texto.
    """
    cpu = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^model name\s*:\s*(.+)$", cpu, re.MULTILINE)
    memory = re.search(r"MemTotal:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text(encoding="ascii"))
    nchan = servers.nchan(None)
    return {
        "data": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processador": f"{model[1] if model else platform.machine()}, {len(os.sched_getaffinity(0))} núcleos",
        "memória": f"{int(memory[1]) / 1048576:.0f} GiB",
        "núcleo do sistema": platform.release(),
        "python": platform.python_version(),
        "pacotes": ", ".join(f"{name} {package_version(name)}" for name in ("flask", "werkzeug", "waitress", "redis")),
        "redis": " ".join(servers.redis_version().split()[:3]).replace(" server", ""),
        "nchan": nchan.missing() or nchan.version(),
        "descritores": str(servers.hard_limit),
        "carga antes de começar": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def measure(scenario, quick, make, seed):
    """Faz uma medição.

    Argumentos:
        scenario: o cenário.
        quick: verdadeiro para os parâmetros rápidos.
        make: classe do concorrente.
        seed: semente da rodada.

    Retorna:
        dict: figures, ou broken com a frase que diz o que se quebrou.
    """
    parameters = scenario.quick if quick and scenario.quick else scenario.full
    try:
        return {"figures": scenario.function(make, seed, **parameters)}
    except (rig.broken, servers.failure) as error:
        return {"broken": str(error)[:400]}


def show(record):
    """Escreve uma medição no terminal.

    Argumentos:
        record: a medição.
    """
    figures = record.get("figures")
    words = (
        " ".join(f"{name}={report.short(value)}" for name, value in figures.items() if name not in ("last", "bytes"))
        if figures
        else f"QUEBRADO: {record['broken']}"
    )
    print(f"{record['scenario']:10} {record['server']:14} {record['run']}: {words}", file=sys.stderr, flush=True)


def run_all(given, folder):
    """Faz todas as medições, com os concorrentes intercalados, guardando cada uma assim que sai.

    Argumentos:
        given: argumentos.
        folder: pasta dos resultados.

    Retorna:
        dict: machine, missing (cenário -> servidor -> motivo) e records.
    """
    names = given.only or [name for name, item in scenarios.scenarios.items() if item.quick or not given.quick]
    chosen = given.server or [*(quick_usual if given.quick else usual), "floor"]
    results = {"machine": describe_machine(), "quick": given.quick, "runs": given.runs, "missing": {}, "records": []}
    for name in names:
        scenario = scenarios.scenarios[name]
        ready = []
        for server in chosen:
            refusal = scenario.refusal(servers.contestants[server])
            if refusal:
                results["missing"].setdefault(name, {})[server] = refusal
            elif refusal == "":
                ready.append(server)
        for run in range(1, given.runs + 1):
            # Em cada rodada outra ordem: nenhum concorrente fica sempre com o mesmo vizinho de antes.
            for server in random.Random(f"{name}-{run}").sample(ready, len(ready)):
                record = {"scenario": name, "server": server, "run": run}
                record["short"] = given.quick and bool(scenario.quick)
                record |= measure(scenario, given.quick, servers.contestants[server], f"{name}-{run}")
                results["records"].append(record)
                show(record)
                (folder / "results.json").write_text(
                    json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
                )
    return results


def leave(number, frame):
    """Transforma SIGTERM e SIGHUP em uma saída que encerra tudo.

    Argumentos:
        number: sinal.
        frame: quadro interrompido.

    Levanta:
        SystemExit: sempre.
    """
    raise SystemExit(128 + number)


def main(argv):
    """Programa principal.

    Argumentos:
        argv: argumentos.

    Retorna:
        int: 1 se uma medição se quebrou, a não ser a de um par que não é nosso; 0 se nenhuma.
    """
    given = read_arguments(argv)
    if given.report:
        folder = pathlib.Path(given.report)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    else:
        if not servers.find_redis():
            print("tests/bench/run: não há redis-server nem valkey-server", file=sys.stderr)
            return 1
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, leave)
        servers.raise_limit()
        base = pathlib.Path(os.environ.get("BENCH_CACHE") or ".")
        folder = pathlib.Path(given.out or base / time.strftime("bench-results/%Y%m%d-%H%M%S"))
        folder.mkdir(parents=True, exist_ok=True)
        results = run_all(given, folder)
    print(report.write(results, folder))
    print(f"resultados em {folder}", file=sys.stderr)
    return 1 if any("broken" in record and record["server"] not in foreigners for record in results["records"]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
