"""Relatório da bancada: tabelas em Markdown, JSON e o gráfico da latência contra o número de streams."""

import json
import re
import statistics

import scenarios

# Linhas da tabela: cenário, números, rótulo.
rows = [
    ("L1", "latency", "L1: latência p50 / p99, ms"),
    ("L100", "latency", "L100: latência p50 / p99, ms"),
    ("L1000", "latency", "L1000: latência p50 / p99, ms"),
    ("END", "end", "END: do DEL ao fim do cliente, p50 / p99, ms"),
    *(
        (scenario, name, f"{words}: {label}")
        for scenario, words in (("IDLE", "IDLE"), ("IDLE18000", "18.000 em silêncio"))
        for name, label in (
            ("server_cpu_s", "processador, s por 1000 streams e minuto"),
            ("redis_cpu_s", "processador do Redis, s, idem"),
            ("redis_clients", "conexões com o Redis"),
            ("redis_commands_s", "comandos do Redis por s"),
            ("memory_kib", "memória por stream, KiB"),
            ("threads", "threads"),
            ("gone_ms", "da saída de 20 clientes à última chave deles apagada, ms"),
        )
    ),
    ("IDLE18000", "open_s", "18.000 em silêncio: tempo para abrir, s"),
    ("IDLE18000", "latency", "18.000 em silêncio: linha avulsa entre eles, p50 / p99, ms"),
    ("RENEW", "expires", "RENEW: EXPIRE por stream em 15 s"),
    ("RENEW", "server_cpu_s", "RENEW: processador, s por 1000 streams e minuto"),
    ("RENEW", "redis_cpu_s", "RENEW: processador do Redis, s, idem"),
    ("RENEW", "redis_commands_s", "RENEW: comandos do Redis por s"),
    ("OPEN", "open_s", "OPEN: abrir 1000 de uma vez, s"),
    ("OPEN", "server_us_open", "OPEN: processador por stream aberto, µs"),
    ("THR", "lines_s", "THR: linhas por s"),
    ("THR", "server_us_line", "THR: processador por linha, µs"),
    ("REQ", "requests_s", "REQ: requisições por s"),
    ("REQ", "request", "REQ: duração de uma, p50 / p99, ms"),
    ("REQ", "server_us_request", "REQ: processador por requisição, µs"),
    ("REQ", "redis_calls_request", "REQ: comandos do Redis por requisição"),
    ("BIG", "latency", "BIG: latência de uma linha de 1 MB, p50 / p99, ms"),
    ("BIG", "mb_s", "BIG: MB por s"),
    ("SCALE2000", "latency", "SCALE 2.000: latência p50 / p99, ms"),
    ("SCALE10000", "latency", "SCALE 10.000: latência p50 / p99, ms"),
    ("SCALE18000", "latency", "SCALE 18.000: latência p50 / p99, ms"),
    ("L1000", "server_us_line", "L1000: processador por linha, µs"),
    ("L1000", "redis_us_line", "L1000: processador do Redis por linha, µs"),
    ("L1000", "redis_calls_line", "L1000: comandos do Redis por linha, os do trabalhador inclusive"),
    ("FOREIGN", "foreign_us_line", "FOREIGN: processador por linha de outro proxy, µs"),
    ("FOREIGN", "foreign_rest_load", "FOREIGN: carga em repouso, núcleos"),
    ("FOREIGN", "foreign_busy_load", "FOREIGN: carga com o tráfego alheio, núcleos"),
    ("FOREIGN", "foreign_lines_s", "FOREIGN: linhas alheias por s"),
]

# Alvos: rótulo, cenário, número, a base de que o valor é um fator (limit: o mesmo cenário nele; L1: o mesmo servidor
# em L1; None: nenhuma) e o valor, negativo se é um mínimo.
targets = [
    *(
        (f"{name}: {part} ≤ {text} × limit", name, f"latency_{part}_ms", "limit", bound)
        for name in ("L1", "L100", "L1000")
        for part, text, bound in (("p50", "1,8", 1.8), ("p99", "2,2", 2.2))
    ),
    ("END: p50 ≤ 3 ms", "END", "end_p50_ms", None, 3),
    ("IDLE: processador ≤ 0,3 s", "IDLE", "server_cpu_s", None, 0.3),
    ("IDLE: processador do Redis ≤ 0,2 s", "IDLE", "redis_cpu_s", None, 0.2),
    ("IDLE: conexões ≤ 10", "IDLE", "redis_clients", None, 10),
    ("IDLE: comandos por s ≤ 10", "IDLE", "redis_commands_s", None, 10),
    ("IDLE: memória ≤ 14 KiB", "IDLE", "memory_kib", None, 14),
    ("IDLE: threads ≤ 40", "IDLE", "threads", None, 40),
    ("IDLE: saída de cliente ≤ 2 s", "IDLE", "gone_ms", None, 2000),
    ("18.000 em silêncio: memória ≤ 14 KiB", "IDLE18000", "memory_kib", None, 14),
    ("18.000 em silêncio: p50 da linha avulsa ≤ 2 × L1", "IDLE18000", "latency_p50_ms", "L1", 2),
    ("18.000 em silêncio: p99 da linha avulsa ≤ 2 × L1", "IDLE18000", "latency_p99_ms", "L1", 2),
    ("OPEN ≤ 1 s", "OPEN", "open_s", None, 1),
    ("THR ≥ 150.000 linhas/s", "THR", "lines_s", None, -150_000),
    ("REQ ≥ 1.000 por s", "REQ", "requests_s", None, -1000),
]


def short(value):
    """Escreve um número com três algarismos significativos, à brasileira.

    Argumentos:
        value: número, ou None.

    Retorna:
        str: texto curto.
    """
    if value is None:
        return "–"
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4
    return f"{value:,.{digits}f}".translate(str.maketrans(",.", ".,"))


def medians(results):
    """Calcula as medianas das rodadas inteiras.

    Argumentos:
        results: resultados.

    Retorna:
        dict: (cenário, servidor) -> números, com as chaves extras whole e broken (quantas rodadas) e short (se alguma
        foi da forma rápida, mais curta que o cenário).
    """
    groups = {}
    for record in results["records"]:
        groups.setdefault((record["scenario"], record["server"]), []).append(record)
    found = {}
    for key, records in groups.items():
        whole = [record["figures"] for record in records if "figures" in record]
        names = {name for figures in whole for name, value in figures.items() if isinstance(value, int | float)}
        found[key] = {name: statistics.median(f[name] for f in whole if name in f) for name in names}
        found[key] |= {"whole": len(whole), "broken": len(records) - len(whole)}
        # Resultados antigos não dizem de cada medição se é curta.
        usual = results["quick"] and bool(scenarios.scenarios[key[0]].quick)
        found[key]["short"] = any(record.get("short", usual) for record in records)
    return found


def cell(found, missing, scenario, name, server):
    """Escreve uma célula da tabela.

    Argumentos:
        found: medianas.
        missing: motivos de quem não participou.
        scenario: cenário.
        name: número, ou prefixo de p50 e p99.
        server: concorrente.

    Retorna:
        str: texto.
    """
    figures = found.get((scenario, server))
    if figures is None:
        return "n/d" if missing.get(scenario, {}).get(server) else "–"
    if not figures["whole"]:
        return "**quebrado**"
    if name in figures:
        text = short(figures[name])
    elif f"{name}_p50_ms" in figures:
        text = f"{short(figures[f'{name}_p50_ms'])} / {short(figures[f'{name}_p99_ms'])}"
    else:
        return "–"
    if figures["broken"]:
        text += f" (**{figures['broken']} quebrada{'s' if figures['broken'] > 1 else ''}**)"
    return text


def table(head, lines):
    """Monta uma tabela em Markdown.

    Argumentos:
        head: títulos.
        lines: listas de textos.

    Retorna:
        str: a tabela.
    """
    text = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in text) + "\n"


def judge(found, server, target):
    """Compara um alvo com o medido.

    Argumentos:
        found: medianas.
        server: concorrente.
        target: o alvo.

    Retorna:
        str: o medido e se o alvo foi alcançado; quebrado se alguma rodada do cenário se quebrou; n/d se o cenário foi
        encurtado ou se a base não foi medida inteira; vazio se o cenário não foi medido.
    """
    _, scenario, name, base, bound = target
    figures = found.get((scenario, server))
    if figures is None:
        return ""
    if figures["broken"]:
        return f"**quebrado** ({figures['broken']} de {figures['broken'] + figures['whole']})"
    if name not in figures:
        return ""
    if figures["short"]:
        return "n/d"
    value = figures[name]
    if base is None:
        return f"{short(value)} {'sim' if (value >= -bound if bound < 0 else value <= bound) else '**não**'}"
    reference = found.get((scenario, base) if base == "limit" else (base, server))
    if not reference or reference["broken"] or reference["short"] or not reference.get(name):
        return "n/d"
    ratio = value / reference[name]
    return f"{short(ratio)} × {'sim' if ratio <= bound else '**não**'}"


def count_runs(results):
    """Diz de quantas rodadas são as medianas.

    Argumentos:
        results: resultados, talvez reunidos de várias execuções.

    Retorna:
        str: frase; se os cenários não têm todos o mesmo número de rodadas, diz quantas tem cada um.
    """
    counts = {}
    for (scenario, _), figures in medians(results).items():
        counts[scenario] = max(counts.get(scenario, 0), figures["whole"] + figures["broken"])
    if not counts:
        return "Nada foi medido"
    names = {}
    for scenario, count in counts.items():
        names.setdefault(count, []).append(scenario)
    if len(names) == 1:
        return f"Medianas de {next(iter(names))} rodada(s)"
    return "Medianas de " + "; ".join(f"{count} rodada(s) em {', '.join(names[count])}" for count in sorted(names))


def render(results):
    """Escreve o relatório.

    Argumentos:
        results: resultados.

    Retorna:
        str: Markdown.
    """
    found, missing = medians(results), results["missing"]
    order = [
        server for server in (*scenarios.proxies, *scenarios.peers, "floor") if any(key[1] == server for key in found)
    ]
    parts = [count_runs(results) + (", forma rápida" if results["quick"] else "") + ".\n"]
    parts.append(table(["máquina", ""], [[name, text] for name, text in results["machine"].items()]))
    lines = []
    for scenario, name, label in rows:
        cells = [cell(found, missing, scenario, name, server) for server in order]
        if set(cells) - {"–", "n/d"}:
            lines.append([label, *cells])
    parts.append(table(["cenário", *order], lines))
    ours = [server for server in order if server in scenarios.proxies]
    lines = [[target[0], *[judge(found, server, target) for server in ours]] for target in targets]
    lines = [line for line in lines if any(line[1:])]
    if ours and lines:
        parts.append(table(["alvo", *ours], lines))
        if any("n/d" in line for line in lines):
            parts.append("n/d: não se julga, pois o cenário foi encurtado ou a base da razão não foi medida inteira.\n")
    notes = sorted(
        {
            f"- {server}, {scenario}: {reason}."
            for scenario, refused in missing.items()
            for server, reason in refused.items()
        }
    )
    notes += [
        f"- quebrado: {record['scenario']}, {record['server']}, rodada {record['run']}: {record['broken']}"
        for record in results["records"]
        if "broken" in record
    ]
    if notes:
        parts.append("\n".join(notes) + "\n")
    return "\n".join(parts)


def plot(results, path):
    """Desenha a latência contra o número de streams.

    Argumentos:
        results: resultados.
        path: arquivo PNG a escrever.

    Retorna:
        bool: falso se não há o que desenhar ou se o matplotlib não está instalado.
    """
    found = medians(results)
    names = [name for name in scenarios.scenarios if re.fullmatch(r"(L|SCALE)\d+", name)]
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot

    figure, axes = matplotlib.pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    drawn = 0
    for index, server in enumerate((*scenarios.proxies, *scenarios.peers, "floor")):
        points = [
            (scenarios.scenarios[name].streams, found[name, server])
            for name in names
            if "latency_p50_ms" in found.get((name, server), {})
        ]
        if not points:
            continue
        drawn += 1
        counts = [streams for streams, _ in points]
        gray = {"color": "0.6"} if server == "floor" else {"color": f"C{index}"}
        axes.plot(counts, [figures["latency_p50_ms"] for _, figures in points], "o-", label=server, **gray)
        axes.plot(counts, [figures["latency_p99_ms"] for _, figures in points], "o:", markersize=3, **gray)
    if drawn:
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="streams simultâneos",
            ylabel="latência de uma linha, ms",
            title="Do RPUSH do trabalhador ao cliente: p50 (linha cheia) e p99 (pontilhada)",
        )
        axes.grid(True, which="both", alpha=0.25)
        axes.legend()
        figure.savefig(path, dpi=110)
    matplotlib.pyplot.close(figure)
    return bool(drawn)


def write(results, folder):
    """Grava tabela, JSON e gráfico.

    Argumentos:
        results: resultados.
        folder: pasta (pathlib.Path).

    Retorna:
        str: a tabela.
    """
    text = render(results)
    (folder / "results.json").write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(text, encoding="utf-8")
    plot(results, folder / "latency.png")
    return text
