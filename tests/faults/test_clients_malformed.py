"""Pedidos que não são HTTP, em massa: nada cai, nada trava, nada chega pela metade ao Redis, nada se forja no log.

O que o HTTP manda recusar, quem julga é o hospedeiro: os dois podem discordar no status, ou um aceitar o que o outro
recusa. A forma do erro é sempre a nossa."""

import contextlib
import json
import re

import harness
import hostile
import peers
import support

seed = 20240607

# Toda linha que o proxy escreve sozinho, em debug: nada mais pode aparecer no log.
known_lines = re.compile(
    r"pronto: http://127\.0\.0\.1:\d+ \((?:flask|waitress)\), Redis em \S+"
    r"|parando: .*|parado"
    r"|(?:servidor HTTP|aviso: o servidor HTTP não entendeu uma requisição): [^\n]*"
    r"|aviso: 127\.0\.0\.1 fala (?:HTTP/2|TLS|o protocolo PROXY) [^\n]*"
    r"|tarefa=[0-9a-f-]{36} cliente=127\.0\.0\.1 metodo=(?:GET|POST|PUT|PATCH|DELETE) caminho=\S* fim=(?:concluida|cliente)"
    r" linhas=\d+ bytes=\d+ puladas=0 primeira_ms=(?:\d+|-) duracao_ms=\d+"
)

# Os cabeçalhos de uma resposta nossa; um a mais veio de fora.
known_headers = {
    *("server", "date", "content-type", "content-length", "transfer-encoding", "connection", "allow", "vary"),
    *("retry-after", "x-author", "x-task-name", "x-accel-buffering", "x-content-type-options", "cache-control"),
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
    if answer.header("Connection") != "close":
        problems.append("sem Connection: close")
    if answer.status == 500:
        problems.append("500 para um erro do cliente")
    if (answer.status == 200 and "cache-control" in names) != ("x-task-name" in names):
        problems.append("X-Task-Name fora do lugar")
    if answer.status >= 400 and answer.ended:
        if answer.header("Content-Type") != "application/json; charset=utf-8":
            problems.append("erro que não é JSON")
        elif set(json.loads(b"".join(answer.chunks))) != {"error", "message"}:
            problems.append("erro com outros campos")
    return problems


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


def talk_problems(talk):
    """Procura o que está errado numa conversa.

    Argumentos:
        talk: a conversa, terminada.

    Retorno:
        Lista de frases.
    """
    problems = ["não fechou"] * talk.hung + [talk.fault] * (talk.fault is not None)
    problems += ["mais de uma resposta numa conexão"] * (len(talk.answers) > 1)
    problems += [problem for answer in talk.answers for problem in answer_problems(answer)]
    if talk.label.partition("-")[0] in hostile.refused:
        problems += [f"aceito com {answer.status}" for answer in talk.answers if answer.status < 400]
    return problems


def judge(talks, seen, logged):
    """Confere todas as conversas contra as tarefas que o worker viu; o que houver de errado sai junto, por espécie.

    Argumentos:
        talks: as conversas, terminadas.
        seen: dicionário de nome para JSON da tarefa, ou None.
        logged: frases de log_problems.
    """
    found, accepted = {"no log": logged} if logged else {}, set()
    for talk in talks:
        accepted |= {answer.header("X-Task-Name") for answer in talk.answers} - {None}
        for problem in talk_problems(talk):
            status = talk.answers[0].status if talk.answers else "-"
            kind = f"{talk.label.partition('-')[0]} ({status}): {problem}"
            found.setdefault(kind, []).append(f"{talk.label}: {talk.payload[:160]!r}")
    # O que foi publicado é o que foi aceito, nem mais nem menos.
    for name in set(seen) - accepted:
        found.setdefault("publicado sem ter sido aceito", []).append(str(seen[name])[:200])
    for name in accepted - set(seen):
        found.setdefault("aceito sem ter sido publicado", []).append(name)
    lines = [f"{kind}: {len(cases)} vezes; por exemplo {cases[0]}" for kind, cases in sorted(found.items())]
    assert not lines, "\n".join(["", *lines])


@peers.counted(300, 20000, "pedidos")
def test_malformed(count, start_proxy, host, redis_main):
    """Milhares de pedidos gerados: nem queda, nem traceback, nem demora, nem tarefa de pedido incompleto, nem log forjado.
    O proxy registra tudo e atende CORS: todo lugar em que a entrada chega ao log ou a um cabeçalho."""
    proxy = start_proxy("--log-level", "debug", "--cors-origin", "*", "-P", 0)
    peers.warm(proxy)
    talks = [peers.talk(payload, label) for label, payload in hostile.requests(seed, count)]
    with peers.finishing(redis_main) as finisher:
        talks = peers.swarm(proxy.port, talks, width=100)
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
    judge(talks, finisher.seen, log_problems(proxy, finisher.seen))


def test_wide_requests_are_served(shared_proxy, connect, worker):
    """1 pedido grande de cada forma, que os dois aceitam: 60 KiB de linha, 90 cabeçalhos, 60 KiB num cabeçalho."""
    many = [(f"X-{number}", "a") for number in range(90)]
    for target, headers in (("/" + "a" * 60000, ()), ("/", many), ("/", [("X-A", "a" * 60000)])):
        conn = connect(shared_proxy).request("GET", target, headers)
        worker.next().finish("ok")
        assert conn.response().lines() == [b"ok"]


# O começo de um corpo em pedaços e o que o segue, sem fim.
endless = {
    "tamanho": (b"", b"0"),
    "extensão": (b"1;", b"a"),
    "segundo-tamanho": (b"1\r\na\r\n", b"0"),
    "rodapé": (b"0\r\nX-Final: ", b"a"),
    "rodapé-de-muitas-linhas": (b"0\r\n", b"X-Final: a\r\n"),
}
storm = 32 * 2**20


def test_endless_chunk_line(start_proxy, host, connect, worker):
    """5 corpos em pedaços em que uma linha não acaba: recusados, ou cortados no prazo, e a memória não cresce com o que
    ainda chega além de MAX_BODY."""
    proxy = start_proxy("--request-timeout", 1500, "--max-body", 2**20)
    peers.warm(proxy)
    before = proxy.memory()
    for name, (start, rest) in endless.items():
        conn = connect(proxy).request("POST", "/", [("Transfer-Encoding", "chunked")])
        piece = (rest * 65536)[:65536]
        grown = 0
        # Recusado antes do fim, o envio falha.
        with contextlib.suppress(OSError):
            conn.send(start)
            for number in range(storm // len(piece)):
                conn.send(piece)
                if number % 32 == 0:
                    grown = max(grown, proxy.memory() - before)
        assert grown < storm // 4096, f"{name}: {grown} KiB a mais"
        conn.close()
    worker.idle()


def test_options_asterisk(shared_proxy, connect, worker):
    """1 OPTIONS * é do servidor inteiro (RFC 9110, 9.3.7): 204 com Allow, sem tarefa."""
    response = connect(shared_proxy).request("OPTIONS", "*").response()
    assert response.status == 204
    assert "POST" in response.header("Allow")
    worker.idle()


def test_refused_client_that_is_already_gone(start_proxy, host, connect, fetch):
    """60 recusados que já saíram, ou saem no meio da recusa: nenhum deixa traceback no log, nem um descritor aberto."""
    proxy = start_proxy()
    rest = peers.warm(proxy)
    for number in range(60):
        conn = connect(proxy)
        if number % 2:
            conn.send(b"LIXO\r\n\r\n")
        else:
            conn.request("POST", "/", [("Transfer-Encoding", "chunked")]).send(b"zz\r\nabcde\r\n0\r\nX-A: a\r\n\r\n")
            conn.sock.recv(20)
        conn.reset()
    assert fetch(proxy, "GET", "/ping").status == 200
    peers.settle(proxy, rest)
