"""Pedidos que não são HTTP, em massa: nada cai, nada trava, nada chega ao Redis, nada se forja no log."""

import json
import re

import pytest

import harness
import hostile
import peers
import support

seed = 20240607

# Toda linha que o proxy escreve sozinho, em debug: nada mais pode aparecer no log.
known_lines = re.compile(
    r"pronto: http://127\.0\.0\.1:\d+ \((?:flask|waitress)\), Redis em \S+"
    r"|parando: .*|parado"
    r"|servidor HTTP: [^\n]*"
    r"|tarefa=[0-9a-f-]{36} cliente=127\.0\.0\.1 metodo=(?:GET|POST|PUT|PATCH|DELETE) caminho=\S* fim=(?:concluida|cliente)"
    r" linhas=\d+ bytes=\d+ primeira_ms=(?:\d+|-) duracao_ms=\d+"
)

# Os cabeçalhos de uma resposta nossa; um a mais veio de fora.
known_headers = {
    *(
        "server",
        "date",
        "content-type",
        "content-length",
        "transfer-encoding",
        "connection",
        "allow",
        "vary",
        "retry-after",
    ),
    *("x-author", "x-task-name", "x-accel-buffering", "x-content-type-options", "cache-control"),
    *("access-control-allow-origin", "access-control-expose-headers", "access-control-allow-methods"),
    *("access-control-allow-headers", "access-control-max-age"),
}


def answer_problems(answer):
    """Procura o que está errado numa resposta, aceita ou recusada.

    Argumentos:
        answer: a harness.response.

    Retorno:
        Lista de frases.
    """
    names = {name.lower() for name, _ in answer.headers}
    problems = [f"cabeçalho a mais: {name}" for name in names - known_headers]
    if answer.header_all("Server") != ["py-ndjson-proxy"] or len(answer.header_all("X-Author")) != 1:
        problems.append("sem Server ou X-Author, ou repetidos")
    if answer.status == 500:
        problems.append("500 para um erro do cliente")
    if (answer.status == 200 and "cache-control" in names) != ("x-task-name" in names):
        problems.append("X-Task-Name fora do lugar")
    if answer.status >= 400 and answer.ended:
        if answer.header("Content-Type") != "application/json":
            problems.append("erro que não é JSON")
        elif set(json.loads(b"".join(answer.chunks))) != {"error", "message"}:
            problems.append("erro com outros campos")
    return problems


def task_problems(info):
    """Procura, numa tarefa aceita, o que quebra linhas para quem a lê.

    Argumentos:
        info: o JSON da tarefa.

    Retorno:
        Lista de frases.
    """
    texts = [
        info["method"],
        info["path"],
        info["query"],
        info["remote_addr"],
        *info["headers"],
        *info["headers"].values(),
    ]
    return [f"{text!a}" for text in texts if re.search(r"[\r\n\0]", text)]


def log_problems(proxy, names):
    """Confere o log linha a linha: só as nossas, e uma de fim por tarefa publicada.

    Argumentos:
        proxy: o proxy.
        names: nomes das tarefas publicadas.

    Retorno:
        Lista de frases.
    """
    text = proxy.log()
    strange = [line[:200] for line in text.split("\n") if line and not known_lines.fullmatch(line)]
    problems = [f"{len(strange)} linhas estranhas: {strange[:5]}"] if strange else []
    problems += [f"caractere cru no log: {each!r}" for each in set(text) if not each.isprintable() and each != "\n"]
    if "Traceback" in text:
        problems.append("Traceback no log")
    ends = [row["tarefa"] for row in proxy.tasks() if "fim" in row]
    if sorted(ends) != sorted(names):
        problems.append(f"{len(ends)} linhas de fim de tarefa para {len(names)} tarefas")
    return problems


def talk_problems(talk, verdict):
    """Procura o que está errado numa conversa.

    Argumentos:
        talk: a conversa, terminada.
        verdict: o destino que o contrato lhe dá.

    Retorno:
        Lista de frases.
    """
    problems = ["não fechou"] * talk.hung + [talk.fault] * (talk.fault is not None)
    problems += [problem for answer in talk.answers for problem in answer_problems(answer)]
    if verdict == hostile.refuse:
        problems += [f"aceito com {answer.status}" for answer in talk.answers if answer.status < 400]
    return problems


def judge(talks, seen, verdicts, logged):
    """Confere todas as conversas contra as tarefas que o worker viu; o que houver de errado sai junto, por espécie.

    Argumentos:
        talks: as conversas, terminadas.
        seen: dicionário de nome para JSON da tarefa, ou None.
        verdicts: dicionário de rótulo para destino.
        logged: frases de log_problems.
    """
    found, accepted = {"no log": logged} if logged else {}, set()
    for talk in talks:
        accepted |= {answer.header("X-Task-Name") for answer in talk.answers} - {None}
        for problem in talk_problems(talk, verdicts[talk.label]):
            status = talk.answers[0].status if talk.answers else "-"
            kind = f"{talk.label.partition('-')[0]} ({status}): {problem}"
            found.setdefault(kind, []).append(f"{talk.label}: {talk.payload[:160]!r}")
    for info in seen.values():
        for problem in task_problems(info) if info is not None else ():
            found.setdefault("uma tarefa leva CR, LF ou NUL", []).append(problem)
    # O que foi publicado é o que foi aceito, nem mais nem menos.
    for name in set(seen) - accepted:
        found.setdefault("publicado sem ter sido aceito", []).append(str(seen[name])[:200])
    for name in accepted - set(seen):
        found.setdefault("aceito sem ter sido publicado", []).append(name)
    lines = [f"{kind}: {len(cases)} vezes; por exemplo {cases[0]}" for kind, cases in sorted(found.items())]
    assert not lines, "\n".join(["", *lines])


@pytest.fixture
def open_proxy(start_proxy, host):
    """Um proxy que registra tudo e atende CORS: todo lugar em que a entrada chega ao log ou a um cabeçalho.

    Retorno:
        O harness.proxy_process.
    """
    return start_proxy("--log-level", "debug", "--cors-origin", "*", "-P", 0, host=host)


@peers.counted(300, 20000, "pedidos")
def test_malformed(count, open_proxy, redis_main):
    """Milhares de pedidos gerados: nem queda, nem traceback, nem demora, nem chave de pedido recusado, nem log forjado."""
    proxy = open_proxy
    peers.warm(proxy)
    cases = list(hostile.requests(seed, count))
    verdicts = {label: verdict for label, _, verdict in cases}
    with peers.finishing(redis_main) as finisher:
        talks = peers.swarm(proxy.port, [peers.talk(payload, label) for label, payload, _ in cases], width=100)
        harness.eventually(lambda: not finisher.client.keys("*"), 10, "Redis sem chaves")
    refused = sum(1 for talk in talks if talk.answers and talk.answers[0].status >= 400)
    mute = sum(1 for talk in talks if not talk.answers)
    peers.say(
        f"{count} pedidos ({proxy.server}): {refused} recusados com resposta, {mute} só fechados, "
        f"{len(finisher.seen)} aceitos; o mais demorado levou {max(talk.took for talk in talks):.1f} s"
    )
    assert proxy.alive()
    assert max(peers.ping_times(proxy.port, 0.3)) < 2
    harness.eventually(lambda: len(support.finished_rows(proxy)) >= len(finisher.seen), 10, "uma linha por tarefa")
    judge(talks, finisher.seen, verdicts, log_problems(proxy, finisher.seen))
