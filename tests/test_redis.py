"""O Redis difícil: consulta por INTERVAL, avisos perdidos ou negados, scripts negados, quedas, reinícios, respostas
perdidas. Em nenhum desses casos uma linha se perde, se repete ou troca de lugar."""

import contextlib
import itertools
import json
import random
import re
import threading
import time

import pytest

import harness
import support

# Folgas, em segundos, para uma máquina ocupada: a da mediana de várias demoras, e a de uma só.
median_slack = 0.4
slack = 3.0


@pytest.fixture
def start_pusher():
    """Fábrica de support.pusher já iniciados; parados ao fim da prova.

    Retorno:
        Função que devolve um support.pusher.
    """
    with contextlib.ExitStack() as stack:

        def start(*args):
            """Inicia um. Argumentos: os de support.pusher. Retorno: o pusher."""
            made = support.pusher(*args)
            made.start()
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def start_relay():
    """Fábrica de support.relay; o proxy deve partir depois dele.

    Retorno:
        Função que devolve um support.relay.
    """
    with contextlib.ExitStack() as stack:

        def start(port):
            """Inicia um. Argumentos: port, a do Redis. Retorno: o relay."""
            made = support.relay(port)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def start_relayed(start_redis, start_relay, start_proxy):
    """Fábrica de proxies ligados ao Redis por um support.relay; a ordem aqui faz o proxy parar antes do relay.

    Retorno:
        Função que, dados os argumentos do proxy, devolve (server, relay, proxy).
    """

    def start(*flags):
        """Inicia um. Argumentos: flags, os do proxy. Retorno: a tupla acima."""
        server = start_redis()
        relay = start_relay(server.port)
        return server, relay, start_proxy(*flags, env={"REDIS_SERVER": relay.address}, redis=server)

    return start


@pytest.fixture
def open_through_relay(start_relayed, connect, start_worker):
    """Abre um streaming num proxy ligado ao Redis por um support.relay, e confere que as linhas passam.

    Retorno:
        Função que, dados os argumentos do proxy, devolve (server, relay, proxy, response, task).
    """

    def start(*flags):
        """Abre um. Argumentos: flags, os do proxy. Retorno: a tupla acima."""
        server, relay, proxy = start_relayed(*flags)
        response, task = support.open_stream(connect, proxy, start_worker(server.client()))
        push_into_silence(response, task, 3, 0.1)
        return server, relay, proxy, response, task

    return start


def numbered(count):
    """Monta as linhas que um support.pusher empurra. Argumentos: count. Retorno: lista de bytes."""
    return [f'{{"n": {number}}}'.encode() for number in range(count)]


def kill_connection(server, name):
    """Derruba a conexão do proxy que tem um nome, esperando que exista.

    Argumentos:
        server: o harness.redis_server.
        name: o nome dado com CLIENT SETNAME.

    Retorno:
        O id dela.
    """
    rows = harness.eventually(lambda: server.clients_named(name), 5, f"conexão {name}")
    assert len(rows) == 1, rows
    with contextlib.closing(server.new_client()) as client:
        client.execute_command("CLIENT", "KILL", "ID", rows[0]["id"])
    return rows[0]["id"]


def push_into_silence(response, task, count, longest):
    """Empurra linhas, uma a uma, sempre em silêncio, e confere a demora de cada uma.

    Argumentos:
        response: a response.
        task: a tarefa.
        count: quantas linhas.
        longest: demora máxima prometida, em segundos; vale com as folgas, para a mediana (de três ou mais) e para todas.

    Retorno:
        Lista das demoras, em segundos, da menor à maior.
    """
    delays = []
    for number in range(count):
        task.push(f"linha {number}")
        pushed = time.monotonic()
        line = response.line()
        assert line == f"linha {number}".encode()
        delays.append(line.when - pushed)
    delays.sort()
    assert delays[-1] < longest + slack, delays
    assert count < 3 or delays[count // 2] < longest + median_slack, delays
    return delays


def effort(server):
    """Conta os comandos que a procura e a retirada gastam. Argumentos: server, o harness.redis_server. Retorno: int."""
    return sum(server.calls(command) for command in ("type", "exists", "lpop", "evalsha"))


def test_polling_without_wake(start_redis, start_proxy, connect, start_worker):
    """REDIS_WAKE=off, INTERVAL=1000: em 3 s de silêncio há consulta, mas uma por INTERVAL, e quatro LPOP no máximo, com
    scripts ou sem eles."""
    streams = []
    for rules in ([], ["-eval", "-evalsha", "-script"]):
        server = start_redis()
        env = support.limited_user(server, *rules)
        proxy = start_proxy("--wake", "off", "-i", 1000, redis=server, env=env)
        streams.append((server, *support.open_stream(connect, proxy, start_worker(server.client()))))
        (row,) = server.clients_named("py-ndjson-proxy")
        assert "t" not in row["flags"], row
        assert "REDIS_WAKE" not in proxy.log()
    before = [(effort(server), server.calls("lpop")) for server, _, _ in streams]
    streams[0][1].conn.silent(3)
    for (server, response, task), (spent, taken) in zip(streams, before, strict=True):
        assert 2 <= effort(server) - spent <= 4 * 3
        assert server.calls("lpop") - taken <= 4
        push_into_silence(response, task, 1, 1)
        task.finish()
        assert response.lines() == []


def test_polling_cost_does_not_follow_the_number_of_streams(start_redis, start_proxy, connect, start_worker):
    """Com avisos, cem streams calados custam o exame de uma fatia por INTERVAL, como cinquenta, e nenhum LPOP."""
    server = start_redis()
    proxy = start_proxy("-i", 250, redis=server)
    worker = start_worker(server.client())
    pairs, costs = [], []
    for _ in range(2):
        pairs += support.open_streams(connect, proxy, worker, 50)
        before = effort(server), server.calls("lpop"), server.calls("evalsha")
        pairs[0][0].conn.silent(2)
        costs.append(effort(server) - before[0])
        assert (server.calls("lpop"), server.calls("evalsha")) == before[1:]
    # Oito INTERVAL, mais ou menos um, de uma fatia que não cresce.
    assert 0 < costs[1] <= costs[0] * 9 / 7 + 2, costs
    assert costs[0] <= 9 * 2 * 16, costs
    for response, task in pairs:
        task.finish(task.name)
        assert response.lines() == [task.name.encode()]


@pytest.mark.parametrize(
    "prefixes",
    [(), ("-X", "p:", "-L", "p:l:"), ("-X", "p:k:", "-L", "p:"), ("-X", "tarefa_ção*?[", "-L", "x")],
    ids=["padrão", "lista_dentro", "tarefa_dentro", "estranhos"],
)
def test_wake_cuts_the_wait_short(share_proxy, connect, worker, prefixes):
    """INTERVAL=5000: linha, fim e leitura literal não esperam por ele, e a demora mediana de uma linha é bem menor que 1 s."""
    proxy = share_proxy("-i", 5000, *prefixes)
    for _ in range(3):
        response, task = support.open_stream(connect, proxy, worker)
        push_into_silence(response, task, 5, 0.1)
        task.delete()
        assert response.lines(slack) == []
    response, task = support.open_stream(connect, proxy, worker)
    task.replace("a", "b")
    assert response.lines(slack) == [b"a", b"b"]
    response, task = support.open_stream(connect, proxy, worker)
    worker.client.flushdb()
    assert response.lines(slack) == []
    assert support.polling_only not in proxy.log()


def test_wake_ups_come_by_the_only_connection(start_redis, start_proxy, connect, start_worker):
    """Uma conexão só, que caiu e voltou: com INTERVAL=60000 as linhas vêm na hora, e as da queda também."""
    server = start_redis()
    proxy = start_proxy("-i", 60000, "-t", 90000, redis=server)
    worker = start_worker(server.client())
    (response, task), (literal, literal_task), (gone, gone_task) = support.open_streams(connect, proxy, worker, 3)
    (row,) = [each for each in server.client().client_list() if each["name"].startswith("py-ndjson-proxy")]
    assert row["resp"] == "3" and "t" in row["flags"] and "B" in row["flags"], row
    push_into_silence(response, task, 3, 0.1)
    proxy.freeze()
    killed = kill_connection(server, "py-ndjson-proxy")
    task.push("na queda")
    literal_task.replace("na queda")
    gone_task.delete()
    proxy.thaw()
    assert response.line(2) == b"na queda"
    assert literal.lines(2) == [b"na queda"]
    assert gone.lines(2) == []
    support.wait_reopened(server, killed)
    push_into_silence(response, task, 5, 0.1)
    task.finish()
    assert response.lines(slack) == []
    assert "REDIS_WAKE" not in proxy.log()


def test_wake_ups_denied_and_then_allowed(start_redis, start_proxy, connect, start_worker):
    """Os avisos negados ao reabrir a conexão: linhas dentro de INTERVAL; permitidos de novo, na hora. O log diz uma vez."""
    server = start_redis()
    proxy = start_proxy("-i", 400, redis=server, env=support.limited_user(server))
    worker = start_worker(server.client())
    response, task = support.open_stream(connect, proxy, worker)
    for rule in ("-client|tracking", "+client|tracking"):
        worker.client.execute_command("ACL", "SETUSER", "limitado", rule)
        for times in (1, 2):
            support.wait_reopened(server, kill_connection(server, "py-ndjson-proxy"))
            push_into_silence(response, task, times, 0.4)
    push_into_silence(response, task, 5, 0.1)
    task.finish()
    assert response.lines() == []
    assert proxy.log().count(support.polling_only) == 1, proxy.log()


denials = {
    "tracking": ["-client|tracking"],
    "client": ["-client"],
}


@pytest.mark.parametrize("denied", denials)
def test_wake_denied_by_the_server(start_redis, start_proxy, connect, start_worker, denied):
    """Os avisos negados por ACL: linhas, fim e leitura literal dentro de INTERVAL, e o log diz uma só vez."""
    server = start_redis()
    env = support.limited_user(server, *denials[denied])
    proxy = start_proxy("-i", 300, redis=server, env=env)
    proxy.wait_log(r"REDIS_WAKE.*só a consulta periódica")
    worker = start_worker(server.client())
    response, task = support.open_stream(connect, proxy, worker)
    push_into_silence(response, task, 4, 0.3)
    assert worker.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "USER", "limitado") == 1
    # Sem CLIENT a conexão não tem nome.
    harness.eventually(
        lambda: [row for row in worker.client.client_list() if row["user"] == "limitado"], 5, "conexão reaberta"
    )
    push_into_silence(response, task, 2, 0.3)
    task.delete()
    assert response.lines(0.3 + slack) == []
    response, task = support.open_stream(connect, proxy, worker)
    task.replace("a", "b")
    assert response.lines(0.6 + slack) == [b"a", b"b"]
    assert proxy.log().count(support.polling_only) == 1, proxy.log()
    assert proxy.log().count("REDIS_WAKE") == 1, proxy.log()


@pytest.mark.parametrize("missing", [harness.no_client_command, 'rename-command HELLO ""'], ids=["CLIENT", "HELLO"])
def test_command_of_the_wake_ups_renamed_away(start_redis, start_proxy, connect, start_worker, missing):
    """Um Redis sem o comando CLIENT ou sem HELLO (rename-command): o proxy parte e serve só com a consulta periódica."""
    server = start_redis(missing)
    proxy = start_proxy("-i", 300, redis=server)
    worker = start_worker(server.client())
    response, task = support.open_stream(connect, proxy, worker)
    push_into_silence(response, task, 3, 0.3)
    task.finish("fim")
    assert response.lines() == [b"fim"]
    # Sem CLIENT não se pergunta.
    if missing != harness.no_client_command:
        (row,) = server.clients_named("py-ndjson-proxy")
        assert "t" not in row["flags"], row
    assert proxy.log().count(support.polling_only) == 1, proxy.log()


@pytest.mark.parametrize(("pause", "wake"), [(0, "on"), (1, "off")])
def test_scripts_denied(start_redis, start_proxy, connect, start_worker, pause, wake):
    """Scripts negados por ACL: com LPOP simples tudo é servido, a leitura literal inclusive, e o log avisa uma vez."""
    server = start_redis()
    env = support.limited_user(server, "-eval", "-evalsha", "-script")
    proxy = start_proxy("-P", pause, "-i", 100, "--wake", wake, redis=server, env=env)
    worker = start_worker(server.client())
    response, task = support.open_stream(connect, proxy, worker)
    push_into_silence(response, task, 3, 0.1)
    task.finish(*numbered(1200 if pause == 0 else 200))
    assert response.lines() == numbered(1200 if pause == 0 else 200)
    response, task = support.open_stream(connect, proxy, worker)
    task.push("antes")
    task.replace("um", "dois", "três")
    assert response.lines() == [b"antes", b"um", b"dois", "três".encode()]
    response, task = support.open_stream(connect, proxy, worker)
    task.push("um", "EOF")
    assert response.lines() == [b"um"]
    response, task = support.open_stream(connect, proxy, worker)
    task.client.hset(task.list, "a", "b")
    assert json.loads(response.lines()[0])["error"] == "redis_error"
    support.wait_empty(worker.client)
    assert len([line for line in proxy.log().splitlines() if "script" in line]) == 1, proxy.log()


def test_scripts_denied_in_mid_stream(start_redis, start_proxy, connect, start_worker):
    """Scripts negados com streams vivos: o LPOP simples toma o lugar deles, sem linha perdida nem stream acabado."""
    server = start_redis()
    proxy = start_proxy("-i", 100, redis=server, env=support.limited_user(server))
    worker = start_worker(server.client())
    pairs = support.open_streams(connect, proxy, worker, 3)
    for response, task in pairs:
        push_into_silence(response, task, 2, 0.1)
    support.limited_user(server, "-@scripting")
    for response, task in pairs:
        push_into_silence(response, task, 2, 0.1)
        task.finish(*numbered(20))
    for response, _ in pairs:
        assert response.lines() == numbered(20)
    assert proxy.log().count("tiradas com LPOP simples") == 1, proxy.log()


def test_redis_away_at_a_request(start_redis, start_proxy, host, fetch, connect, start_worker):
    """Redis fora do ar: 504 em JSON e /ping 500, depressa; de volta, o pedido seguinte é atendido sem reinício."""
    server = start_redis()
    proxy = start_proxy(redis=server)
    for _ in range(2):
        server.kill()
        for _ in range(3):
            began = time.monotonic()
            response = fetch(proxy, "POST", "/", body="x")
            assert response.status == 504
            assert response.header("X-Author") and response.header("Server") == "py-ndjson-proxy"
            assert response.header("Content-Type") == "application/json; charset=utf-8"
            body = response.json()
            assert body["error"] == "redis_unavailable" and body["message"]
            ping = fetch(proxy, "GET", "/ping")
            assert ping.status == 500
            assert ping.header("Content-Type").startswith("text/plain")
            assert ping.body() != b"pong"
            assert time.monotonic() - began < 6
        server.start()
        response, task = support.open_stream(connect, proxy, start_worker(server.client()))
        task.finish("de volta")
        assert response.lines() == [b"de volta"]
        assert fetch(proxy, "GET", "/ping").body() == b"pong"
    log = proxy.log()
    assert (log.count("Redis fora do ar"), log.count("Redis de volta")) == (2, 2)
    # A queda é uma linha só: outra, sobre os avisos, nada acrescentaria.
    assert "REDIS_WAKE" not in log


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_stream_that_ends_while_redis_is_away(start_redis, start_proxy, connect, start_worker, how):
    """Sem Redis, ou com ele mudo, HEARTBEAT e MAXTIME ainda valem, e a saída do cliente ainda é notada; as chaves somem
    assim que ele volta."""
    server = start_redis(appendonly=True)
    proxy = start_proxy("-t", 1200, "--heartbeat", 300, redis=server)
    worker = start_worker(server.client())
    (late, late_task), (left, left_task) = support.open_streams(connect, proxy, worker, 2)
    began = time.monotonic()
    getattr(server, how)()
    left.conn.close()
    assert support.finished_row(proxy, left_task)["fim"] == "cliente"
    *beats, last = late.lines()
    assert json.loads(last) == {"error": "timeout"}
    assert len(beats) >= 3 and set(beats) == {b'{"type": "ping"}'}
    assert beats[2].when - began < 3 * 0.3 + 1
    assert last.when - began < 1.2 + slack
    assert support.finished_row(proxy, late_task)["fim"] == "timeout"
    if how == "kill":
        server.start()
    server.thaw()
    with contextlib.closing(server.new_client()) as client:
        support.wait_empty(client, 3)


@pytest.mark.parametrize(("pause", "wake", "ran"), [(0, "on", True), (1, "off", True), (0, "off", False)])
def test_lost_answers(start_relayed, connect, start_worker, start_pusher, pause, wake, ran):
    """A retirada perdida com a conexão, depois de rodar ou antes, vinte vezes: nada se perde, se repete ou se troca."""
    server, relay, proxy = start_relayed("-P", pause, "-i", 20, "--wake", wake)
    pairs = support.open_streams(connect, proxy, start_worker(server.client()), 2)
    relay.cut(b":taken", 20, ran)
    total = 150
    pushers = [start_pusher(server, task, total, 0.004) for _, task in pairs]
    for lines in harness.read_all([response for response, _ in pairs], 30):
        assert lines == numbered(total)
    assert relay.cuts == 20
    for one in pushers:
        one.close()


def test_main_lost_while_asking_for_wake_ups(start_relayed, connect, start_worker):
    """A conexão que cai quando pede os avisos é reaberta por inteiro: com nome, e com avisos que funcionam."""
    server, relay, proxy = start_relayed("-i", 60000)
    for ran in (True, False):
        relay.cut(b"TRACKING", 1, ran)
        kill_connection(server, "py-ndjson-proxy")
        harness.eventually(lambda: relay.left == 0, 5, "conexão cortada")
        harness.eventually(lambda: len(server.clients_named("py-ndjson-proxy")) == 1, 5, "conexão com nome")
        response, task = support.open_stream(connect, proxy, start_worker(server.client()))
        push_into_silence(response, task, 3, 0.1)
        task.finish()
        assert response.lines(slack) == []


def test_lost_removal(start_relayed, connect, start_worker):
    """O pedido de apagar as chaves que se perdeu com a conexão é refeito: nenhuma fica, seja qual for o fim."""
    server, relay, proxy = start_relayed()
    worker = start_worker(server.client())
    response, task = support.open_stream(connect, proxy, worker)
    relay.cut(b"UNLINK", 2, ran=False)
    task.push("EOF")
    assert response.lines() == []
    support.wait_empty(worker.client)
    assert relay.cuts == 2


@pytest.mark.parametrize("interval", [2, 300])
def test_every_wake_up_lost(start_relayed, connect, start_worker, interval):
    """Avisos que se perdem em silêncio, com a conexão viva: linha, fim e leitura literal dentro de INTERVAL."""
    server, relay, proxy = start_relayed("-i", interval)
    worker = start_worker(server.client())
    relay.swap(support.invalidation, b"")
    response, task = support.open_stream(connect, proxy, worker)
    push_into_silence(response, task, 3, interval / 1000)
    task.delete()
    assert response.lines(interval / 1000 + slack) == []
    response, task = support.open_stream(connect, proxy, worker)
    task.replace("a", "b")
    assert response.lines(2 * interval / 1000 + slack) == [b"a", b"b"]


@pytest.mark.parametrize("replaced", [False, True])
def test_every_stream_has_its_turn(start_relayed, connect, start_worker, replaced):
    """O rodízio passa por todos: o aviso de um só, perdido, é suprido seja qual for o lugar dele entre os que esperam."""
    server, relay, proxy = start_relayed("-i", 10)
    worker = start_worker(server.client())
    pairs = support.open_streams(connect, proxy, worker, 130)
    relay.swap(support.invalidation, b"")
    for response, task in pairs[::13]:
        if replaced:
            task.replace("a", "b")
            assert response.lines(10) == [b"a", b"b"]
        else:
            task.push("a")
            assert response.line(10) == b"a"
    worker.client.flushdb()
    harness.read_all([response for response, _ in pairs], 10)


def test_turn_of_a_silent_stream_among_busy_ones(start_relayed, fetch, connect, start_worker):
    """Quem recebe linhas sai da espera e volta a ela: isso não tira a vez de quem está em silêncio."""
    server, relay, proxy = start_relayed("-P", 0, "-i", 20)
    worker = start_worker(server.client())
    pairs = support.open_streams(connect, proxy, worker, 100)
    chance = random.Random(4)
    chance.shuffle(pairs)
    busy, silent = [task for _, task in pairs[:60]], pairs[60:]
    relay.swap(support.invalidation, b"")
    for _, task in silent:
        task.replace("a")
    # Uma volta ao Redis pela mesma conexão: os avisos das trocas já passaram pelo relay.
    assert fetch(proxy, "GET", "/ping").status == 200
    relay.swap(rb"nunca", b"")
    done = threading.Event()

    def talk():
        """Empurra uma linha por INTERVAL a um dos outros, até que acabem os silenciosos."""
        while not done.wait(0.02):
            chance.choice(busy).push("x")

    talker = threading.Thread(target=talk)
    talker.start()
    began = time.monotonic()
    try:
        assert harness.read_all([response for response, _ in silent], 20) == [[b"a"]] * 40
    finally:
        done.set()
        talker.join()
    # Cem esperam, e todos têm a vez muito antes disto, por pequena que seja a fatia de cada INTERVAL.
    assert time.monotonic() - began < 100 * 0.02 + slack
    for task in busy:
        task.delete()


@pytest.mark.parametrize("wake", ["on", "off"])
def test_refusal_that_lasts_does_not_loop(start_redis, start_proxy, connect, start_worker, wake):
    """Uma ACL nega o que a procura faz: nem queda atrás de queda, nem enxurrada no log, e os streams continuam vivos."""
    server = start_redis()
    proxy = start_proxy("--ttl", 3, "--wake", wake, redis=server, env=support.limited_user(server))
    pairs = support.open_streams(connect, proxy, start_worker(server.client()), 5)
    support.limited_user(server, "-exists")
    time.sleep(2)
    assert proxy.log().count("Redis fora do ar") < 12, proxy.log()
    for response, task in pairs:
        task.push("a")
        assert response.line(5) == b"a"
    support.limited_user(server, "+exists")
    for response, task in pairs:
        task.push("b")
        assert response.line(5) == b"b"
        task.finish()
        assert response.lines(5) == []


def test_task_replaced_just_before_its_renewal(start_redis, start_proxy, connect, start_worker):
    """NOLOOP cala a troca da tarefa por uma lista, se o EXPIRE do proxy vem logo depois e no mesmo instante do Redis."""
    server = start_redis()
    proxy = start_proxy("--ttl", 3, "-i", 60000, redis=server)
    worker = start_worker(server.client())
    # Mais streams que os examinados em uma volta do rodízio, que aqui nem chega.
    pairs = support.open_streams(connect, proxy, worker, 8)
    for some in (pairs[:4], pairs[4:]):
        renewed = server.calls("expire")
        harness.eventually(lambda renewed=renewed: server.calls("expire") > renewed, 5, "renovação")
        server.freeze()
        changes = [threading.Thread(target=task.replace, args=("a", "b")) for _, task in some]
        for change in changes:
            change.start()
        # A próxima renovação vence, e espera no soquete atrás das trocas.
        time.sleep(1.2)
        server.thaw()
        for change in changes:
            change.join()
        for response, _ in some:
            assert response.lines(slack) == [b"a", b"b"]


def test_wake_up_with_a_very_long_list_of_keys(share_proxy, connect, worker):
    """Dezenas de milhares de chaves alheias mudam num só instante: o aviso delas, de megabytes, não atrasa o nosso."""
    proxy = share_proxy("-i", 60000)
    response, task = support.open_stream(connect, proxy, worker)
    keys = {f"ndjson_list_alheia_{number:060}": "x" for number in range(30000)}
    for _ in range(3):
        with worker.client.pipeline(transaction=True) as pipe:
            pipe.mset(keys)
            pipe.rpush(task.list, "achada")
            pipe.execute()
        assert response.line(slack) == b"achada"
    task.finish()
    assert response.lines(slack) == []
    worker.client.unlink(*keys)


def test_flood_of_foreign_wake_ups(start_proxy, connect, worker):
    """Milhares de avisos de chaves alheias, acumulados, não escondem os nossos: a linha chega sem esperar INTERVAL."""
    proxy = start_proxy("-i", 60000)
    for burst in (1100, 1300, 1500):
        (response, task), (literal, literal_task) = support.open_streams(connect, proxy, worker, 2)
        proxy.freeze()
        for number in range(burst):
            worker.client.set("ndjson_list_alheia", number)
        task.push("achada")
        literal_task.replace("literal")
        proxy.thaw()
        assert response.line(slack) == b"achada"
        assert literal.lines(slack) == [b"literal"]
        task.finish()
        assert response.lines(slack) == []
    worker.client.delete("ndjson_list_alheia")


def test_lost_answer_of_the_submission(start_relayed, fetch, connect, start_worker):
    """O SET e o PUBLISH que rodaram e cuja resposta se perdeu: 504, nenhuma chave fica, e o pedido seguinte é atendido."""
    server, relay, proxy = start_relayed()
    worker = start_worker(server.client())
    relay.cut(b"PUBLISH")
    response = fetch(proxy, "POST", "/")
    assert response.status == 504
    assert response.json()["error"] == "redis_unavailable"
    assert relay.cuts == 1
    key = worker.next_key()
    harness.eventually(lambda: not worker.client.exists(key), 2, "tarefa apagada")
    response, task = support.open_stream(connect, proxy, worker)
    task.finish("fim")
    assert response.lines() == [b"fim"]


def test_lost_answer_of_the_ping(start_relayed, fetch, connect, start_worker):
    """Uma conexão que caiu na hora do PING não é um Redis fora do ar: o pedido é atendido com 200 mesmo assim."""
    server, relay, proxy = start_relayed()
    relay.cut(b"PING")
    response, task = support.open_stream(connect, proxy, start_worker(server.client()))
    task.finish("fim")
    assert response.lines() == [b"fim"]
    relay.cut(b"PING")
    assert fetch(proxy, "GET", "/ping").status == 200
    assert relay.cuts == 2


@pytest.mark.parametrize(("pause", "wake"), [(0, "on"), (1, "off")])
def test_script_flush_in_mid_stream(start_redis, start_proxy, connect, start_worker, start_pusher, pause, wake):
    """SCRIPT FLUSH vinte vezes no meio do streaming: nada se perde, se repete ou se troca."""
    server = start_redis()
    proxy = start_proxy("-P", pause, "-i", 20, "--wake", wake, redis=server)
    worker = start_worker(server.client())
    pairs = support.open_streams(connect, proxy, worker, 3)
    total = 200
    pushers = [start_pusher(server, task, total, 0.002) for _, task in pairs]
    for step in range(20):
        harness.eventually(lambda step=step: pushers[0].number >= step * total // 20, 20, "linhas empurradas")
        worker.client.script_flush()
    for lines in harness.read_all([response for response, _ in pairs], 30):
        assert lines == numbered(total)
    for one in pushers:
        one.close()


@pytest.mark.parametrize("wake", ["on", "off"])
def test_flushdb_ends_the_streams(redis_main, share_proxy, connect, worker, wake):
    """FLUSHDB apaga as tarefas: todos os streams terminam, limpos, dentro de INTERVAL; os de outro banco, não."""
    proxy = share_proxy("-i", 300, "--wake", wake)
    pairs = support.open_streams(connect, proxy, worker, 5)
    redis_main.client(2).flushdb()
    pairs[0][0].conn.silent(0.7)  # mais que dois INTERVAL
    worker.client.flushdb()
    for lines in harness.read_all([response for response, _ in pairs], 0.3 + slack):
        assert lines == []
    for _, task in pairs:
        assert support.finished_row(proxy, task)["fim"] == "concluida"


def test_task_replaced_while_the_connection_is_away(start_redis, start_proxy, connect, start_worker):
    """A leitura literal feita enquanto a conexão caía: as linhas são achadas quando ela volta, e não em rodízio."""
    server = start_redis()
    proxy = start_proxy("-i", 60000, redis=server)
    worker = start_worker(server.client())
    pairs = support.open_streams(connect, proxy, worker, 40)
    proxy.freeze()
    kill_connection(server, "py-ndjson-proxy")
    for _, task in pairs:
        task.replace("a", "b")
    proxy.thaw()
    for response, _ in pairs:
        assert response.lines() == [b"a", b"b"]


@pytest.mark.parametrize("wake", ["on", "off"])
def test_reply_nobody_asked_for(open_through_relay, fetch, wake):
    """O Redis manda uma resposta sem pergunta: não pode ser lida como a da pergunta seguinte; a conexão é reaberta."""
    _, relay, proxy, response, task = open_through_relay("--wake", wake, "-i", 300)
    relay.inject(b":7\r\n")
    proxy.wait_log("fora do ar: resposta (sem pergunta|fora do protocolo)")
    proxy.wait_log("Redis de volta")
    push_into_silence(response, task, 2, 0.3)
    assert fetch(proxy, "GET", "/ping").status == 200
    task.finish()
    assert response.lines() == []
    assert "falha interna" not in proxy.log()


@pytest.mark.parametrize(
    "junk", [b"$abc\r\n", b":x\r\n", b"*zz\r\n", b"*1\r\n" * 3000, b"HTTP/1.1 400 Bad Request\r\n\r\n"]
)
def test_reply_outside_the_protocol(open_through_relay, fetch, junk):
    """O Redis responde o que não é do protocolo: o proxy reabre a conexão, e nenhum stream é esquecido."""
    _, relay, proxy, response, task = open_through_relay("--wake", "off", "-i", 100)
    relay.spoil(junk)
    proxy.wait_log("Redis de volta")
    push_into_silence(response, task, 3, 0.1)
    assert fetch(proxy, "GET", "/ping").status == 200
    task.finish()
    assert response.lines() == []
    assert "falha interna" not in proxy.log()


def test_script_that_loads_but_may_not_run(start_redis, start_proxy, connect, start_worker):
    """Uma ACL aceita SCRIPT LOAD e nega EVALSHA: vale o LPOP simples, e o log avisa uma vez."""
    server = start_redis()
    proxy = start_proxy("-i", 100, redis=server, env=support.limited_user(server, "-evalsha"))
    proxy.wait_log("tiradas com LPOP simples")
    response, task = support.open_stream(connect, proxy, start_worker(server.client()))
    task.finish(*numbered(20))
    assert response.lines() == numbered(20)
    assert len([line for line in proxy.log().splitlines() if "script" in line]) == 1, proxy.log()


def test_disabled_command_tells_no_password(start_redis):
    """Um Redis sem o comando AUTH repete os argumentos dele no erro: a senha não vai ao log nem ao --check."""
    server = start_redis('rename-command AUTH ""')
    for flags in ((), ("--check",)):
        env = {"REDIS_SERVER": server.address, "REDIS_PASSWORD": "s3gr3d0", "ENV_FILE": "/dev/null", "HTTP_PORT": "0"}
        done = harness.run_proxy(*flags, env=env)
        assert done.status == 2, done
        assert "unknown command" in done.out + done.err
        assert "s3gr3d0" not in done.out + done.err


refused_commands = {
    "SET": ("-set", "REDIS_PREFIX"), "PUBLISH": ("-publish", "REDIS_CHANNEL"), "RPUSH": ("-rpush", "REDIS_QUEUE"),
    "LPOP": ("-lpop", "REDIS_LIST_PREFIX"), "EXEC": ("-exec", "REDIS_SERVER"), "multi": ("-multi", "REDIS_SERVER"),
    "select": ("-select", "REDIS_SERVER"), "channel": ("resetchannels", "REDIS_CHANNEL"),
}


@pytest.mark.parametrize("command", refused_commands)
def test_refused_command_ends_the_start(redis_main, command):
    """O que a ACL nega do que uma tarefa pede: o início e o --check acabam com 2, e a frase diz a configuração e o comando."""
    rule, name = refused_commands[command]
    env = support.limited_user(redis_main, "reset", "on", ">senha", "~*", "&*", "+@all", rule) | {"ENV_FILE": "/dev/null"}
    for flags in ((), ("--check",)):
        done = harness.run_proxy(*flags, "--queue", "fila", "-p", "0", env=env)
        assert done.status == 2, done
        assert re.search(rf"(?m)^erro: {name}: .*{command}", done.err), done
        assert "senha" not in done.out + done.err


def test_busy_server(start_redis, start_proxy, connect, start_worker):
    """Um script longo de outro programa faz o Redis responder BUSY: o stream espera por ele."""
    server = start_redis("lua-time-limit 100")
    proxy = start_proxy("-i", 50, redis=server)
    client = server.client()
    response, task = support.open_stream(connect, proxy, start_worker(client))
    task.push("antes")
    assert response.line() == b"antes"
    busy = server.new_client()
    script = threading.Thread(target=busy.eval, args=(
        "local t = redis.call('TIME') repeat local n = redis.call('TIME') until n[1] - t[1] > 2", 0))
    script.start()
    proxy.wait_log("BUSY", timeout=20)
    script.join()
    busy.close()
    task.push("depois")
    task.delete()
    assert response.lines(20) == [b"depois"]


@pytest.mark.parametrize("code", ["READONLY", "NOREPLICAS"])
def test_server_that_cannot_write(start_redis, start_proxy, connect, fetch, start_worker, code):
    """O Redis passa a recusar toda escrita: 504 e uma linha no log; o stream vivo espera e continua quando ele volta."""
    server = start_redis()
    client, worker = server.client(), start_worker(server.client())
    proxy = start_proxy(redis=server)
    response, task = support.open_stream(connect, proxy, worker)
    if code == "READONLY":
        client.execute_command("REPLICAOF", "127.0.0.1", harness.free_port())
    else:
        client.config_set("min-replicas-to-write", 1)
    harness.eventually(lambda: fetch(proxy, "POST", "/").status == 504, 10, "504 de um Redis que não grava")
    assert fetch(proxy, "POST", "/").json()["error"] == "redis_unavailable"
    if code == "READONLY":
        client.execute_command("REPLICAOF", "NO", "ONE")
    else:
        client.config_set("min-replicas-to-write", 0)
    proxy.wait_log("Redis de volta")
    assert proxy.log().count("fora do ar") == 1
    harness.eventually(lambda: fetch(proxy, "GET", "/ping").status == 200, 5, "pong")
    task.finish("depois")
    assert response.lines() == [b"depois"]


def test_ended_streams_leave_no_renewal(start_redis, start_proxy, connect, fetch, start_worker):
    """600 tarefas que acabam na hora: a memória do proxy não cresce com elas (antes, 2 kB por tarefa, por REDIS_TTL/3)."""
    server = start_redis()
    worker = start_worker(server.client())
    proxy = start_proxy(redis=server)

    def serve(count):
        """Atende tarefas vazias em sequência. Argumentos: count, quantas."""
        for _ in range(count):
            request = connect(proxy).request()
            worker.next().finish()
            assert request.response().lines() == []
            request.close()

    # O que vaza cresce em todas as voltas; o que só se aquece, não.
    sizes = []
    for _ in range(4):
        serve(600)
        sizes.append(proxy.memory())
    grown = min(after - before for before, after in itertools.pairwise(sizes))
    assert grown < 600, f"{grown} kB a mais depois de 600 tarefas: {sizes}"


def test_silent_stream_renews_one_key(start_redis, start_proxy, connect, start_worker):
    """A renovação da validade de quem espera custa um EXPIRE: as outras chaves da tarefa não existem."""
    server = start_redis()
    proxy = start_proxy("--ttl", 12, redis=server)
    pairs = support.open_streams(connect, proxy, start_worker(server.client()), 20)
    before = server.calls("expire")
    harness.eventually(lambda: server.calls("expire") >= before + 20, 10, "renovação")
    assert server.calls("expire") == before + 20
    assert all(task.client.ttl(task.key) > 8 for _, task in pairs)
    for response, task in pairs:
        task.finish()
        assert response.lines() == []


def test_list_of_a_slow_stream_is_renewed(start_redis, start_proxy, connect, start_worker):
    """Linhas que esperam pela vez por mais que REDIS_TTL não vencem: a lista de quem não espera é renovada."""
    server = start_redis()
    proxy = start_proxy("-P", 2000, "--ttl", 3, redis=server)
    response, task = support.open_stream(connect, proxy, start_worker(server.client()))
    task.push("a", "b", "c", "d")
    task.client.expire(task.list, 3)
    task.delete()
    assert response.lines(20) == [b"a", b"b", b"c", b"d"]


def test_long_reply_on_a_slow_link(start_relayed, connect, start_worker):
    """Um lote que leva mais que o prazo de uma resposta para chegar, sem nunca parar, não é um Redis mudo."""
    server, relay, proxy = start_relayed("-P", 0)
    response, task = support.open_stream(connect, proxy, start_worker(server.client()))
    relay.pace = 80000
    task.push(*[b"x" * 500] * 480)
    assert sum(response.line(20) == b"x" * 500 for _ in range(480)) == 480
    relay.pace = 0
    task.finish()
    assert response.lines() == []
    assert "fora do ar" not in proxy.log()


def test_silence_right_after_the_greeting(start_redis, start_relay, start_proxy):
    """O Redis que responde à saudação e emudece logo depois: o início e o --check acabam com uma frase e status 1."""
    server = start_redis()
    relay = start_relay(server.port)
    relay.mute(b"proto-max-bulk-len")
    proxy = start_proxy(env={"REDIS_SERVER": relay.address}, redis=server, ready=False)
    proxy.expected_status = 1
    assert proxy.wait(10) == 1
    assert "erro: REDIS_SERVER: o Redis em" in proxy.log() and "sem resposta em 2 s" in proxy.log()
    done = harness.run_proxy("--check", env={"REDIS_SERVER": relay.address, "HTTP_PORT": "0"}, timeout=10)
    assert done.status == 1 and "sem resposta em 2 s" in done.out + done.err


def test_refused_announcement_is_not_heard(start_redis, start_proxy, connect, start_worker):
    """PUBLISH negado ao anunciar de novo não vale por ouvido: a tarefa ainda é anunciada quando ele volta."""
    server = start_redis()
    proxy = start_proxy(redis=server, env=support.limited_user(server))
    client = server.client()
    response = connect(proxy).request("POST", "/").response()
    proxy.wait_log("ninguém ouve o canal")
    support.limited_user(server, "-publish")

    def denied():
        """Conta os PUBLISH negados."""
        return client.info("commandstats").get("cmdstat_publish", {}).get("rejected_calls", 0)

    harness.eventually(lambda: denied() >= 2, 10, "dois anúncios negados")
    assert "ouvida" not in proxy.log()
    worker = start_worker(client)
    support.limited_user(server, "+publish")
    task = worker.next()
    task.finish("fim")
    assert response.lines() == [b"fim"]
