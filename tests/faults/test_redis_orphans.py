"""Linha 7 da tabela: nada fica no Redis para sempre. Uma lista nossa, sem tarefa e sem validade, ganha uma (REDIS_TTL): pelo
aviso do Redis, em poucos segundos, ou por uma varredura única, quando o proxy parte e quando o Redis volta. A varredura
custa pouco, e nada mais é tocado."""

import contextlib
import time
import uuid

import pytest

import harness
import peers
import redis_faults
import support

pytestmark = pytest.mark.timeout(redis_faults.limit)

# Prazo prometido para uma lista que o aviso nomeia ganhar validade, e a folga de uma máquina ocupada, em segundos.
promised, slack = 5, 10
# A varredura não espera: só o tempo de percorrer o banco.
first_pass = 15

orphans, foreign_keys = peers.scale((20, 5000), (2000, 1000000))

# Prefixos com o que o MATCH do SCAN trataria como coringa, e o prefixo comum.
prefixes = {"padrão": harness.default_list_prefix, "coringas": "l[ab]*?\\x_"}


def make_orphans(client, prefix, count):
    """Cria listas sem tarefa e sem validade, como um worker que continua depois do fim.

    Argumentos:
        client: um redis.Redis.
        prefix: o REDIS_LIST_PREFIX.
        count: quantas.

    Retorno:
        Lista dos nomes (str).
    """
    names = [prefix + str(uuid.uuid4()) for _ in range(count)]
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.rpush(name, "ninguém lê")
        pipe.execute()
    return names


def lifetimes(client, names):
    """Lê a validade de muitas chaves.

    Argumentos:
        client: um redis.Redis.
        names: os nomes.

    Retorno:
        Lista de segundos; -1 sem validade, -2 se a chave não existe.
    """
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.ttl(name)
        return pipe.execute()


def all_expiring(client, names, longest):
    """Diz se todas as chaves têm validade de no máximo um tanto.

    Argumentos:
        client: um redis.Redis.
        names: os nomes.
        longest: REDIS_TTL, em segundos.

    Retorno:
        bool.
    """
    return all(0 <= seconds <= longest for seconds in lifetimes(client, names))


def make_untouchable(client, prefix):
    """Cria o que a varredura não pode tocar.

    Argumentos:
        client: um redis.Redis.
        prefix: o REDIS_LIST_PREFIX.

    Retorno:
        Dicionário de nome (str) para a validade que deve conservar: -1, nenhuma; outro número, o máximo dela.
    """
    names = {
        # De outro dono: outro prefixo, ou um que só casa se os coringas do nosso valerem.
        "alheia": -1,
        "outra_" + prefix + "x": -1,
        prefix[:-1]: -1,
        "la123x_" + str(uuid.uuid4()): -1,
        # Já tem validade, mais longa que REDIS_TTL.
        prefix + "marcada": 86400,
    }
    for name in names:
        client.rpush(name, "x")
    client.expire(prefix + "marcada", 86400)
    # Não são listas.
    client.set(prefix + "texto", "x")
    client.hset(prefix + "hash", "campo", "x")
    return names | {prefix + "texto": -1, prefix + "hash": -1}


def check_untouched(client, names):
    """Confere que as chaves alheias estão como estavam, e as apaga.

    Argumentos:
        client: um redis.Redis.
        names: o que make_untouchable devolveu.
    """
    for name, wanted in names.items():
        found = client.ttl(name)
        assert found == wanted or (wanted > 0 and wanted - 300 < found <= wanted), (name, found, wanted)
    client.delete(*names)


@pytest.mark.parametrize("name", prefixes)
@pytest.mark.parametrize("count", [orphans], ids=[f"{orphans}_listas"])
def test_orphans_found_at_start(start_redis, start_proxy, name, count):
    """As que já estavam lá quando o proxy parte, as da leitura literal (no lugar da tarefa) inclusive: a varredura lhes dá
    validade, e só a elas."""
    server = start_redis()
    client, prefix = server.client(), prefixes[name]
    untouchable = make_untouchable(client, prefix)
    names = make_orphans(client, prefix, count) + make_orphans(client, harness.default_prefix, count)
    began = time.monotonic()
    proxy = start_proxy("-L", prefix, "--ttl", 30, redis=server)
    harness.eventually(lambda: all_expiring(client, names, 30), first_pass, "validade de todas")
    peers.say(f"{2 * count} listas sem dona, todas com validade em {time.monotonic() - began:.1f} s (com o início)")
    assert proxy.alive()
    check_untouched(client, untouchable)
    client.delete(*names)


@pytest.mark.parametrize("count", [orphans], ids=[f"{orphans}_listas"])
def test_orphans_found_when_redis_returns(start_redis, start_proxy, count):
    """As feitas com a conexão caída, de que nenhum aviso veio: a volta também varre; depois, ninguém mais varre."""
    server = start_redis()
    proxy = start_proxy("--ttl", 30, redis=server)
    harness.eventually(lambda: server.calls("scan"), first_pass, "varredura do início")
    server.kill()
    proxy.wait_log("Redis fora do ar")
    proxy.freeze()
    client = server.start().client()
    untouchable = make_untouchable(client, harness.default_list_prefix)
    names = make_orphans(client, harness.default_list_prefix, count)
    proxy.thaw()
    harness.eventually(lambda: all_expiring(client, names, 30), first_pass, "validade de todas")
    # A varredura acaba; depois disso, várias vezes o INTERVAL padrão sem nenhuma.
    time.sleep(1)
    calls = server.calls("scan")
    time.sleep(1.5)
    assert server.calls("scan") == calls, "ninguém devia varrer"
    check_untouched(client, untouchable)
    client.delete(*names)


@pytest.mark.parametrize("count", [orphans], ids=[f"{orphans}_streams"])
def test_worker_that_keeps_pushing(start_redis, start_proxy, connect, start_worker, count):
    """O cliente sai e o worker continua; um stream acaba por palavra de fim e o worker continua; uma tarefa vence, e ele
    continua: o aviso do Redis nomeia cada lista, que logo tem validade. As dos streams vivos continuam a ser renovadas."""
    server = start_redis()
    client = server.client()
    proxy = start_proxy("--ttl", 4, redis=server)
    worker = start_worker(client)
    live, live_task = support.open_stream(connect, proxy, worker)
    pairs = redis_faults.open_many(connect, proxy, worker, count)
    for place, (response, task) in enumerate(pairs):
        if place % 2:
            response.conn.close()
        else:
            task.push("EOF")
            assert response.lines() == []
    for _, task in pairs:
        task.gone(5)
        task.push("tarde", "demais")
    names = [task.list for _, task in pairs]
    untouchable = make_untouchable(client, harness.default_list_prefix)
    began = time.monotonic()
    # Vista com validade, ou já vencida: as duas valem.
    seen = set()

    def all_seen():
        """Anota as listas que já têm validade, ou já venceram; diz se são todas (bool)."""
        seen.update(name for name, left in zip(names, lifetimes(client, names), strict=True) if left != -1)
        return len(seen) == len(names)

    harness.eventually(all_seen, promised + slack, "validade de todas")
    took = time.monotonic() - began
    peers.say(f"{count} listas empurradas depois do fim: todas com validade em {took:.1f} s")
    check_untouched(client, untouchable)
    live_task.push("viva")
    assert live.line() == b"viva"
    live_task.finish("fim")
    assert live.lines() == [b"fim"]
    harness.eventually(lambda: not client.keys("*"), 4 + slack, "listas vencidas")


@pytest.mark.parametrize("count", [orphans], ids=[f"{orphans}_streams"])
def test_proxy_killed(start_redis, start_proxy, connect, start_worker, count):
    """kill -9 do proxy com streams vivos, cujos workers continuam: outro proxy dá validade a todas as listas."""
    server = start_redis()
    client = server.client()
    proxy = start_proxy("--ttl", 3, redis=server)
    pairs = redis_faults.open_many(connect, proxy, start_worker(client), count)
    proxy.kill()
    for _, task in pairs:
        task.push("um", "dois")
    names = [task.list for _, task in pairs]
    assert set(lifetimes(client, names)) == {-1}
    # As chaves das tarefas vencem por si; até lá, as listas têm dona.
    harness.eventually(lambda: not client.exists(*[task.key for _, task in pairs]), 3 + slack, "tarefas vencidas")
    start_proxy("--ttl", 3, redis=server)
    harness.eventually(lambda: all(left != -1 for left in lifetimes(client, names)), first_pass, "validade de todas")
    peers.say(f"{count} streams mortos com o proxy: todas as listas com validade")
    harness.eventually(lambda: not client.keys("*"), 3 + slack, "listas vencidas")


@pytest.mark.parametrize("count", [foreign_keys], ids=[f"{foreign_keys}_chaves_alheias"])
def test_sweep_is_cheap(start_redis, start_proxy, connect, start_worker, count):
    """Num banco com muitas chaves alheias a varredura é feita aos poucos: cada SCAN é curto, e as linhas não atrasam."""
    server = start_redis("slowlog-log-slower-than 20000", "slowlog-max-len 1000")
    client = server.client()
    for begin in range(0, count, 10000):
        client.mset({f"alheia:{number}": "x" for number in range(begin, min(count, begin + 10000))})
    names = make_orphans(client, harness.default_list_prefix, 10)
    client.slowlog_reset()
    began = time.monotonic()
    proxy = start_proxy("-P", 0, redis=server)
    response, task = support.open_stream(connect, proxy, start_worker(client))
    delays, took = [], None
    # A varredura de um banco pequeno pode acabar antes da primeira linha: algumas são medidas assim mesmo.
    while took is None or len(delays) < 20:
        assert time.monotonic() - began < peers.scale(first_pass, 60), lifetimes(client, names)
        pushed = time.monotonic()
        task.push("x")
        delays.append(response.line().when - pushed)
        if took is None and all_expiring(client, names, 600):
            took = time.monotonic() - began
    with contextlib.closing(server.new_client(0)) as other:
        scan = other.info("commandstats")["cmdstat_scan"]
    delays.sort()
    peers.say(
        f"{count} chaves alheias: todas as órfãs achadas em {took:.1f} s, {scan['calls']} SCAN, {scan['usec'] / 1000:.1f} ms de "
        f"Redis ao todo, {scan['usec_per_call']:.0f} µs cada; linhas enquanto isso: {len(delays)}, mediana "
        f"{delays[len(delays) // 2] * 1000:.2f} ms, pior {delays[-1] * 1000:.1f} ms"
    )
    # Em média, nem um milissegundo de cada vez: o Redis atende a um comando só.
    assert scan["usec_per_call"] < 5000, scan
    slow = [row for row in client.slowlog_get(100) if row["command"].upper().startswith(b"SCAN")]
    assert len(slow) <= 1, slow
    assert delays[len(delays) // 2] < 0.2, delays[-5:]
    task.delete()
    assert response.lines() == []
    client.flushdb()
