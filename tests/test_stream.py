"""O streaming: ordem, fim, ritmo (PAUSE, MAXTIME, HEARTBEAT), leitura literal, saída do cliente, chaves e log."""

import contextlib
import json
import time

import pytest

import harness
import support

eof_words = ("EOF", "EOL", "END-OF-FILE", "END-OF-LIST")


def test_set_comes_before_publish(redis_main, share_proxy, connect, worker):
    """O Redis executa o SET da tarefa antes do PUBLISH (visto com MONITOR)."""
    with redis_main.client().monitor() as monitor:
        response, task = support.open_stream(connect, share_proxy(), worker)
        seen = []
        while not seen or seen[-1][0] != "PUBLISH":
            seen.append(monitor.next_command()["command"].split(" "))
    assert seen[-1][1:] == ["ndjson_jobs", task.key]
    assert ["SET", task.key] in [words[:2] for words in seen[:-1]]
    task.finish()
    assert response.lines() == []


def test_lines_before_delete_are_not_lost(share_proxy, connect, worker):
    """Empurrar e apagar em comandos separados, um em seguida do outro: nada do que veio antes do DEL se perde."""
    proxy = share_proxy("-P", 1)
    for count in range(12):
        response, task = support.open_stream(connect, proxy, worker)
        for number in range(count):
            task.push(f"{count}-{number}")
        task.delete()
        assert response.lines() == [f"{count}-{number}".encode() for number in range(count)]


def test_five_thousand_lines_and_delete_in_one_transaction(share_proxy, connect, worker):
    """PAUSE=0: 5.000 elementos e o DEL num MULTI só chegam todos, em ordem."""
    proxy = share_proxy("-P", 0)
    response, task = support.open_stream(connect, proxy, worker)
    with task.client.pipeline(transaction=True) as pipe:
        for number in range(5000):
            pipe.rpush(task.list, f'{{"n": {number}}}')
        pipe.delete(task.key)
        pipe.execute()
    assert response.lines() == [f'{{"n": {number}}}'.encode() for number in range(5000)]
    row = support.finished_row(proxy, task)
    assert (row["fim"], row["linhas"], row["bytes"]) == ("concluida", "5000", str(len(response.body())))


def test_large_lines_with_pause_zero(share_proxy, connect, worker):
    """PAUSE=0: linhas maiores que o limite de uma retirada (uma de 3 MB entre elas) chegam inteiras e em ordem."""
    proxy = share_proxy("-P", 0)
    response, task = support.open_stream(connect, proxy, worker)
    lines = [bytes([97 + number]) * size for number, size in enumerate((200_000, 300_000, 1, 3_000_000, 2, 262_144, 3))]
    task.finish(*lines)
    assert response.lines(20) == lines


def test_slow_reader_loses_nothing(share_proxy, host, connect, worker):
    """Um cliente que para de ler por mais que MAXTIME para a retirada das suas linhas: o Redis guarda o resto, o proxy não
    cresce, os outros recebem na hora; e ele, quando lê, não perde linha nem recebe MAXTIME_ERROR."""
    proxy = share_proxy("-P", 0, "-t", 2000, host=host)
    response, task = support.open_stream(connect, proxy, worker)
    other, other_task = support.open_stream(connect, proxy, worker)
    lines = [bytes([97 + number % 26]) * 1_000_000 for number in range(30)]
    for line in lines:
        task.push(line)
    task.delete()
    began = time.monotonic()
    while time.monotonic() - began < 2.5:  # o próprio silêncio do cliente, maior que MAXTIME
        pushed = time.monotonic()
        other_task.push("uma")
        assert other.line() == b"uma"
        assert other.all_lines[-1].when - pushed < 1
        time.sleep(0.1)
    other_task.finish()
    assert other.lines() == []
    assert task.client.llen(task.list) > 10
    assert proxy.memory() < 100_000
    assert response.lines(30) == lines
    assert support.finished_row(proxy, task)["fim"] == "concluida"


def test_ends_pass_clients_that_do_not_read(start_proxy, connect, worker):
    """Streams que acabam com um cliente que não lê a última linha não seguram o fim dos outros."""
    proxy = start_proxy("-P", 0)
    large = [bytes([97 + number]) * 600_000 for number in range(20)]
    slow = support.open_streams(connect, proxy, worker, len(large), narrow=True)
    others = support.open_streams(connect, proxy, worker, 20)
    for (_, task), line in zip(slow, large, strict=True):
        task.finish(line)
    for _, task in slow:
        # Retirada a linha, o envio a este cliente fica preso.
        harness.eventually(lambda task=task: not worker.client.exists(task.list), 10, "última linha retirada")
    began = time.monotonic()
    for _, task in others:
        task.finish("uma")
    assert harness.read_all([response for response, _ in others]) == [[b"uma"]] * 20
    assert time.monotonic() - began < 5
    assert harness.read_all([response for response, _ in slow]) == [[line] for line in large]


@pytest.mark.parametrize("narrow", [False, True])
def test_client_that_does_not_close(start_proxy, connect, worker, narrow):
    """Quem leu tudo e não fecha é fechado em cerca de um segundo, ainda que o fim, longo, só tenha sido lido tarde."""
    proxy = start_proxy("-P", 0)
    rest = proxy.sockets()
    response, task = support.open_stream(lambda where: connect(where, narrow=narrow), proxy, worker)
    line = b"x" * (600_000 if narrow else 10)
    task.finish(line)
    harness.eventually(lambda: not task.traces(), 10, "último trecho tirado")
    if narrow:
        # Além da espera de quem já leu.
        time.sleep(1.5)
        assert proxy.sockets() > rest
    assert response.lines() == [line]
    began = time.monotonic()
    harness.eventually(lambda: proxy.sockets() <= rest, 10, "socket fechado")
    assert time.monotonic() - began < 4


def test_many_ends_at_once(share_proxy, connect, worker):
    """Duzentos streams que acabam no mesmo instante, uns com linha e outros não, acabam todos, e por inteiro."""
    proxy = share_proxy()
    pairs = support.open_streams(connect, proxy, worker, 200)
    with worker.client.pipeline(transaction=True) as pipe:
        for number, (_, task) in enumerate(pairs):
            if number % 2:
                pipe.rpush(task.list, *map(str, range(number % 4)))
            pipe.delete(task.key)
        pipe.execute()
    expected = [[str(line).encode() for line in range(number % 4)] if number % 2 else [] for number in range(200)]
    assert harness.read_all([response for response, _ in pairs]) == expected
    support.wait_empty(worker.client)
    assert {support.finished_row(proxy, task)["fim"] for _, task in pairs} == {"concluida"}


def test_last_lines_do_not_wait_for_the_others(share_proxy, connect, worker):
    """Uma linha e o fim, em cem streams no mesmo instante: nenhum espera PAUSE para acabar, nem passa de MAXTIME."""
    proxy = share_proxy("-P", 4000, "-t", 6000)
    pairs = support.open_streams(connect, proxy, worker, 100)
    with worker.client.pipeline(transaction=True) as pipe:
        for _, task in pairs:
            pipe.rpush(task.list, "uma")
            pipe.delete(task.key)
        began = time.monotonic()
        pipe.execute()
    assert harness.read_all([response for response, _ in pairs]) == [[b"uma"]] * 100
    assert time.monotonic() - began < 3.5


def test_half_closed_clients_do_not_delay_ends(start_proxy, connect, worker):
    """Clientes que não leem e fecham metade da conexão não ocupam o lugar de quem acaba."""
    proxy = start_proxy("-P", 0, "-t", 100000)
    honest, honest_task = support.open_stream(connect, proxy, worker)
    stuck = support.open_streams(connect, proxy, worker, 120, narrow=True)
    for _, task in stuck:
        # Mais do que o sistema guarda por um cliente que não lê.
        task.push(b"x" * 600_000)
    for _, task in stuck:
        harness.eventually(lambda task=task: not worker.client.exists(task.list), 30, "linha retirada")
    for response, _ in stuck:
        response.conn.half_close()
    began = time.monotonic()
    honest_task.delete()
    assert honest.lines() == []
    # A vez de cada um dos presos passaria a outro só depois de 100 ms, quatro de cada vez: três segundos.
    assert time.monotonic() - began < 2
    for response, _ in stuck:
        response.conn.reset()
    support.wait_empty(worker.client, 10)


def test_pause_separates_lines(share_proxy, connect, worker):
    """PAUSE=300: duas linhas nunca chegam com menos de 270 ms entre si, nem as que já estavam na lista."""
    proxy = share_proxy("--pause", 300)
    response, task = support.open_stream(connect, proxy, worker)
    task.finish(*[str(number) for number in range(6)])
    lines = support.stamped_lines(response)
    assert lines == [str(number).encode() for number in range(6)]
    gaps = [after.when - before.when for before, after in zip(lines, lines[1:], strict=False)]
    assert min(gaps) >= 0.270, gaps
    assert max(gaps) < 1.0, gaps


def test_maxtime_counts_from_the_request(share_proxy, connect, worker):
    """Sem linha alguma, MAXTIME conta da requisição; a última linha é MAXTIME_ERROR, e as chaves somem."""
    proxy = share_proxy("-t", 700)
    began = time.monotonic()
    response, task = support.open_stream(connect, proxy, worker)
    line = response.line()
    assert json.loads(line) == {"error": "timeout"}
    assert 0.7 <= line.when - began < 2.5
    assert response.lines() == []
    support.wait_empty(task.client)


def test_maxtime_counts_from_the_last_line(share_proxy, connect, worker):
    """Cada linha recomeça MAXTIME: um streaming mais longo que ele, com linhas no meio, só vence depois da última."""
    proxy = share_proxy("-t", 1200)
    began = time.monotonic()
    response, task = support.open_stream(connect, proxy, worker)
    for number in range(3):
        response.conn.silent(0.6)
        pushed = time.monotonic()
        task.push(str(number))
        assert response.line() == str(number).encode()
    line = response.line()
    assert json.loads(line) == {"error": "timeout"}
    assert line.when - began > 3 * 0.6 + 1.2
    assert 1.2 <= line.when - pushed < 3
    assert response.lines() == []
    support.wait_empty(task.client)
    assert support.finished_row(proxy, task)["fim"] == "timeout"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ('{\r\n  "error":\n  "demorou"\r\n}\n', '{    "error":   "demorou"  }'),
        ("não\u0085é\u2028JSON", "não\\u0085é\\u2028JSON"),
    ],
)
def test_maxtime_error_is_one_line(start_proxy, connect, worker, given, sent):
    """MAXTIME_ERROR dada com quebras de linha sai numa linha só."""
    proxy = start_proxy("-t", 150, "-P", 0, "-E", given)
    response, _ = support.open_stream(connect, proxy, worker)
    assert [line.decode() for line in response.lines()] == [sent]


def test_heartbeat_does_not_reset_maxtime(share_proxy, connect, worker):
    """HEARTBEAT preenche o silêncio, mas MAXTIME continua a contar; uma linha adia o próximo HEARTBEAT."""
    proxy = share_proxy("-t", 1000, "--heartbeat", 300, "--heartbeat-line", '{"type":\n"viva"}')
    began = time.monotonic()
    response, _ = support.open_stream(connect, proxy, worker)
    *beats, last = response.lines()
    assert json.loads(last) == {"error": "timeout"}
    assert 1.0 <= last.when - began < 3.0
    assert 2 <= len(beats) <= 3
    assert set(beats) == {b'{"type": "viva"}'}
    assert beats[0].when - began >= 0.3


def test_heartbeats_do_not_keep_who_does_not_read(share_proxy, connect, worker):
    """HEARTBEATs que ninguém lê não enchem a memória nem adiam MAXTIME."""
    proxy = share_proxy("-t", 1500, "--heartbeat", 1, "--heartbeat-line", "x" * 20000)
    conn = connect(proxy, narrow=True).request()
    task = worker.next()
    proxy.wait_log(rf"tarefa={task.name} .*fim=timeout", 10)
    conn.close()


@pytest.mark.parametrize("flags", [(), ("--wake", "off"), ("-P", "0"), ("-i", "60000")], ids="".join)
def test_literal_worker(share_proxy, connect, worker, flags):
    """A leitura literal: a string da tarefa trocada, num MULTI, por uma lista de mesmo nome, servida até o fim."""
    proxy = share_proxy(*flags)
    response, task = support.open_stream(connect, proxy, worker)
    task.replace("um", "dois", "três")
    assert response.lines(5) == [b"um", b"dois", "três".encode()]
    assert support.finished_row(proxy, task)["fim"] == "concluida"
    support.wait_empty(task.client)


def test_literal_worker_after_ordinary_lines(share_proxy, connect, worker):
    """Quem empurrou em task_list e só depois troca a chave tem tudo servido, as de task_list primeiro."""
    proxy = share_proxy("-P", 50)
    response, task = support.open_stream(connect, proxy, worker)
    task.push("a", "b", "c")
    task.replace("d", "e")
    task.client.rpush(task.key, "f")
    assert response.lines() == [b"a", b"b", b"c", b"d", b"e", b"f"]


@pytest.mark.parametrize("pause", [0, 5])
def test_end_words(share_proxy, connect, worker, pause):
    """Cada palavra nua de fim encerra o streaming sem ser entregue; o que vem depois dela é descartado."""
    proxy = share_proxy("-P", pause)
    for word in eof_words:
        response, task = support.open_stream(connect, proxy, worker)
        task.push("um", "dois", word, "depois")
        assert response.lines() == [b"um", b"dois"]
        support.wait_empty(task.client)
        row = support.finished_row(proxy, task)
        assert (row["fim"], row["linhas"], row["bytes"]) == ("eof", "2", "8")


def test_quoted_end_words_are_lines(share_proxy, connect, worker):
    """Entre aspas, dentro de um objeto ou de um texto maior, a palavra de fim é uma linha como outra."""
    response, task = support.open_stream(connect, share_proxy(), worker)
    lines = [json.dumps(word) for word in eof_words]
    lines += ['{"EOF": "EOL"}', "EOF.", "EOFEOF", "END-OF-FILES", "OF", '["END-OF-LIST"]']
    task.finish(*lines)
    assert [line.decode() for line in response.lines()] == lines


def test_body_whole_at_the_deadline(share_proxy, host, connect, start_worker):
    """Um corpo que se completa perto do instante de REQUEST_TIMEOUT é aceito ou recusado, nunca as duas coisas."""
    proxy, worker = share_proxy("--request-timeout", 1000, host=host), start_worker()
    opened = []
    for _ in range(60):
        opened.append((time.monotonic(), connect(proxy)))
        opened[-1][1].send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\na")
    for number, (began, conn) in enumerate(opened):
        time.sleep(max(0.0, began + 0.95 + number * 0.006 - time.monotonic()))
        with contextlib.suppress(OSError):
            conn.send(b"b")
    answers = [conn.response() for _, conn in opened]
    accepted = [answer for answer in answers if answer.status == 200]
    assert {answer.status for answer in answers} <= {200, 408}
    tasks = {each.name: each for each in (worker.next() for _ in accepted)}
    worker.idle()
    for answer in accepted:
        tasks.pop(answer.header("X-Task-Name")).finish("fim")
    assert harness.read_all(accepted) == [[b"fim"]] * len(accepted)
    print(f"contado: {len(accepted)} de 60 aceitos ({host})")


def test_frozen_process_delivers_before_the_timeout(start_proxy, connect, worker):
    """Antes de dar o tempo por esgotado olha-se a lista uma última vez: o processo congelado entrega o que chegou."""
    proxy = start_proxy("-t", 1000)
    pairs = support.open_streams(connect, proxy, worker, 3)
    proxy.freeze()
    pairs[0][1].push("a")
    pairs[1][1].finish("b")
    time.sleep(1.5)
    proxy.thaw()
    assert pairs[0][0].line() == b"a"
    assert pairs[1][0].lines() == [b"b"]
    assert [json.loads(line) for line in pairs[2][0].lines()] == [{"error": "timeout"}]
    pairs[0][1].finish()
    assert pairs[0][0].lines() == []


def test_client_leaves_while_lines_flow(share_proxy, connect, worker):
    """O cliente que sai no meio de muitas linhas: as chaves somem, ainda que a lista esteja cheia."""
    proxy = share_proxy("-P", 1)
    response, task = support.open_stream(connect, proxy, worker)
    task.push(*["x" * 1000] * 5000)
    assert response.line()
    response.conn.close()
    support.wait_empty(task.client, 2)
    assert support.finished_row(proxy, task)["fim"] == "cliente"


def end_done(task, response):
    """Termina como a tarefa concluída. Argumentos: a tarefa e a response. Retorno: linhas que o fim acrescenta."""
    task.finish()
    return []


def end_eof(task, response):
    """Termina por palavra de fim. Argumentos: a tarefa e a response. Retorno: linhas que o fim acrescenta."""
    task.push("EOF")
    return []


def end_timeout(task, response):
    """Termina por MAXTIME. Argumentos: a tarefa e a response. Retorno: linhas que o fim acrescenta."""
    return [{"error": "timeout"}]


def end_error(task, response):
    """Termina por erro: a lista vira texto. Argumentos: a tarefa e a response. Retorno: linhas que o fim acrescenta."""
    task.client.set(task.list, "texto")
    return ["redis_error"]


ends = {"concluida": end_done, "eof": end_eof, "timeout": end_timeout, "erro": end_error}


@pytest.mark.parametrize("reason", ends)
def test_every_end_cleans_and_is_logged(share_proxy, host, connect, worker, reason):
    """Seja qual for o fim, nenhuma chave resta no banco e sai uma linha de log, com motivo, linhas e bytes certos."""
    proxy = share_proxy("-t", 500 if reason == "timeout" else 45000, host=host)
    response, task = support.open_stream(connect, proxy, worker, "PUT", "/a/b%2Fc?d=e")
    task.push("", "primeira", "linha\ncom quebra")
    assert [response.line(), response.line()] == [b"primeira", b"linha com quebra"]
    expected = ends[reason](task, response)
    rest = [json.loads(line) for line in response.lines()]
    if reason == "erro":
        assert rest[0]["message"]
        rest = [line["error"] for line in rest]
    assert rest == expected
    support.wait_empty(task.client)
    row = support.finished_row(proxy, task)
    seen = {name: row[name] for name in ("cliente", "metodo", "caminho", "fim", "linhas", "bytes", "puladas")}
    assert seen == {
        "cliente": "127.0.0.1",
        "metodo": "PUT",
        "caminho": "/a/b%2Fc",
        "fim": reason,
        "linhas": str(2 + len(rest)),
        "bytes": str(len(response.body())),
        "puladas": "1",
    }
    assert 0 <= int(row["primeira_ms"]) <= int(row["duracao_ms"]) < 5000
    assert response.conn.at_end()


def test_streams_longer_than_ttl(start_proxy, connect, worker):
    """REDIS_TTL=3, streamings de mais que o dobro: o que tem linhas no meio, o calado e o que espera a vez (PAUSE) não são
    cortados nem perdem linha, com avisos ou sem; e nenhuma chave fica sem validade."""
    proxies = [start_proxy("--ttl", 3, "--wake", wake) for wake in ("on", "off")]
    busy = [support.open_stream(connect, proxy, worker) for proxy in proxies]
    quiet = [support.open_stream(connect, proxy, worker) for proxy in proxies]
    paced = [support.open_stream(connect, start_proxy("--ttl", 3, "--pause", 500), worker)]
    numbers = [str(number).encode() for number in range(16)]
    paced[0][1].push(*numbers)
    began = time.monotonic()
    while time.monotonic() - began < 6.5:
        for response, task in busy:
            task.push("linha")
            assert response.line() == b"linha"
            response.conn.silent(0.2)
        assert all(0 < task.client.ttl(task.key) <= 3 for _, task in busy + quiet + paced)
    # A lista que o worker criou sem validade ganhou uma na primeira renovação.
    assert 0 < worker.client.ttl(paced[0][1].list) <= 3
    for response, task in busy + quiet:
        task.finish("fim")
        assert response.lines() == [b"fim"]
    paced[0][1].delete()
    assert paced[0][0].lines() == numbers
    support.wait_empty(worker.client)


def test_two_proxies_on_one_redis(start_proxy, connect, worker):
    """Dois proxies no mesmo Redis e canal: cada cliente recebe só o que é seu, e nenhum apaga chaves do outro."""
    proxies = [start_proxy("-P", 0), start_proxy("-P", 0)]
    pairs = [support.open_stream(connect, proxy, worker) for proxy in proxies * 5]
    for number in range(20):
        for _, task in pairs:
            task.push(f"{task.name} {number}")
    for response, task in pairs:
        assert [response.line() for _ in range(20)] == [f"{task.name} {number}".encode() for number in range(20)]
        task.finish("fim")
        assert response.lines() == [b"fim"]
    support.wait_empty(worker.client)


def test_nobody_listens(start_proxy, connect, start_worker, db):
    """PUBLISH que ninguém ouviu: um aviso no log, e a tarefa espera e é servida como sempre."""
    proxy = start_proxy()
    response = connect(proxy).request().response()
    assert response.status == 200
    proxy.wait_log(r"aviso: .*ndjson_jobs")
    name = response.header("X-Task-Name")
    assert db.exists(harness.default_prefix + name)
    db.rpush(harness.default_list_prefix + name, "tarde")
    db.delete(harness.default_prefix + name)
    assert response.lines() == [b"tarde"]
    quiet = start_proxy()
    heard, task = support.open_stream(connect, quiet, start_worker())
    task.finish()
    heard.lines()
    quiet.stop()
    assert "aviso" not in quiet.log()


def test_log_holds_no_payload_header_or_secret(start_redis, start_proxy, host, connect, start_worker):
    """Nem em LOG_LEVEL=debug o log traz corpo, cabeçalho, consulta, linha ou senha; e ninguém forja uma linha."""
    server = start_redis(password="senha-oculta")
    proxy = start_proxy("--log-level", "debug", redis=server)
    worker = start_worker(server.client())
    headers = {"Authorization": "Bearer cabeca-oculta", "Cookie": "c=cabeca-oculta"}
    response, task = support.open_stream(
        connect, proxy, worker, "POST", "/x%0Atarefa=forjada?t=consulta-oculta", headers, "corpo-oculto"
    )
    task.push("linha-oculta")
    assert response.line() == b"linha-oculta"
    task.client.set(task.list, "lista-oculta")
    assert json.loads(response.lines()[0])["error"] == "redis_error"
    for raw in (
        b"POST /?t=consulta-oculta HTTX/1.1\r\nCookie: cabeca-oculta\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\ncorpo-oculto\r\n",
    ):
        conn = connect(proxy)
        conn.send(raw)
        assert conn.response().status >= 400
    left, left_task = support.open_stream(connect, proxy, worker, "POST", "/", headers, "corpo-oculto")
    left.conn.reset()
    support.finished_row(proxy, task)
    support.finished_row(proxy, left_task)
    support.wait_empty(worker.client)
    proxy.stop()
    assert "ocult" not in proxy.log()
    assert len(support.finished_rows(proxy)) == 2
