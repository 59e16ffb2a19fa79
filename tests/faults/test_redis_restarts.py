"""Linha 2 da tabela: kill -9 e reinício do Redis (appendonly, fsync a cada escrita) sob carga, exatamente uma vez."""

import re
import threading

import pytest

import harness
import peers
import redis_faults
import support

pytestmark = pytest.mark.timeout(redis_faults.limit)

kills, streams, lines = peers.scale((3, 20, 3000), (20, 100, 100000))
counted = f"{kills}_kill-{streams}_streams-{lines}_linhas"


class killer(threading.Thread):
    """Mata e reinicia o Redis, nas mesmas porta e pasta, várias vezes ao longo do trabalho de uma feeder."""

    def __init__(self, server, proxy, source, times):
        """Guarda o que usa.

        Argumentos:
            server: o harness.redis_server.
            proxy: o proxy, que deve notar cada queda e cada volta.
            source: a redis_faults.feeder.
            times: quantas vezes.
        """
        super().__init__(name="killer", daemon=True)
        self.server, self.proxy, self.source, self.times = server, proxy, source, times
        self.made, self.error = 0, None

    def run(self):
        """Mata e reinicia; um erro fica em self.error."""
        try:
            for step in range(1, self.times + 1):
                wanted = (len(self.source.edges) - 1) * step // (self.times + 1)
                harness.eventually(lambda wanted=wanted: self.source.round >= wanted, 120, "linhas empurradas")
                self.server.kill()
                self.wait_count("Redis fora do ar", step)
                self.server.start(30)
                self.wait_count("Redis de volta", step)
                self.made = step
        except Exception as error:
            self.error = error

    def wait_count(self, words, count):
        """Espera que o log do proxy tenha um número de linhas. Argumentos: words, o trecho; count, o número."""
        harness.eventually(lambda: len(re.findall(words, self.proxy.log())) >= count, 15, f"{count} vezes {words}")

    def close(self):
        """Espera o fim e repassa o erro que houve."""
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("pause", [0, 20], ids=["em_lotes", "linha_a_linha"])
@pytest.mark.parametrize("total", [lines], ids=[counted])
def test_killed_and_restarted_under_load(start_redis, start_proxy, connect, start_worker, pause, total):
    """Nenhuma linha perdida, repetida ou fora de ordem; uma linha de log por queda e uma por volta; nenhuma chave fica."""
    server = start_redis(appendonly=True)
    proxy = start_proxy("-P", pause, redis=server)
    pairs = redis_faults.open_many(connect, proxy, start_worker(server.client()), streams)
    share = total // streams
    hold = redis_faults.pace(peers.scale(0.02, 0.05))
    tasks = [task for _, task in pairs]
    source = redis_faults.feeder(lambda: support.plain_client(server), tasks, share, hold)
    with redis_faults.closing_thread(source), redis_faults.closing_thread(killer(server, proxy, source, kills)) as one:
        text = redis_faults.deliver_all(proxy, pairs, share, peers.scale(90, 1500))
        harness.eventually(lambda: source.done, 15, "worker encerrado")
    assert one.made == kills
    log = proxy.log()
    assert (log.count("Redis fora do ar"), log.count("Redis de volta")) == (kills, kills), log
    peers.say(f"{kills} kill -9 e reinícios; {text}")
    server.close_clients()
    support.wait_empty(server.client(), 5)
