"""Linha 1 da tabela: exatamente uma vez através de cortes da conexão com o Redis, em qualquer byte dos dois sentidos."""

import pytest

import harness
import peers
import redis_faults
import support

pytestmark = pytest.mark.timeout(redis_faults.limit)

cuts, streams, lines = peers.scale((60, 20, 3000), (2000, 100, 100000))
counted = f"{cuts}_cortes-{streams}_streams-{lines}_linhas"
late_times, late_streams = peers.scale((2, 5), (50, 20))


@pytest.fixture
def start_fault_relay():
    """Fábrica de redis_faults.fault_relay, fechados ao fim da prova; o proxy deve partir depois dele.

    Retorno:
        Função que recebe a porta do Redis e devolve a fault_relay.
    """
    made = []

    def start(port):
        """Inicia um. Argumentos: port, a porta do Redis. Retorno: a fault_relay."""
        made.append(redis_faults.fault_relay(port))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.mark.parametrize("pause", [0, 20], ids=["em_lotes", "linha_a_linha"])
@pytest.mark.parametrize("total", [lines], ids=[counted])
def test_exactly_once_across_cuts(start_redis, start_fault_relay, start_proxy, connect, start_worker, pause, total):
    """Resets, meias mensagens e paradas ao acaso, avisos ligados: nenhuma linha perdida, repetida ou fora de ordem."""
    server = start_redis()
    relay = start_fault_relay(server.port)
    # MAXTIME não é desta prova: cortes em seguida podem parar um stream por mais que o padrão.
    proxy = start_proxy("-P", pause, "-t", 600000, redis=server, env={"REDIS_SERVER": relay.address})
    pairs = redis_faults.open_many(connect, proxy, start_worker(server.client()), streams)
    relay.begin(cuts, silences=peers.scale(1, 40))
    patience = peers.scale(90, 1500)
    peers.say(redis_faults.deliver_across_cuts(proxy, server, relay, pairs, total // streams, patience))
    assert "REDIS_WAKE: o Redis recusou" not in proxy.log()


@pytest.mark.parametrize("pause", [0, 20], ids=["em_lotes", "linha_a_linha"])
@pytest.mark.parametrize("times", [late_times], ids=[f"{late_times}_vezes-{late_streams}_streams"])
def test_requests_that_arrive_late(start_redis, start_fault_relay, start_proxy, connect, start_worker, pause, times):
    """Uma retirada retida na rede chega ao Redis depois de repetida por outra conexão: não pode tirar linha nenhuma."""
    server = start_redis()
    relay = start_fault_relay(server.port)
    proxy = start_proxy("-P", pause, redis=server, env={"REDIS_SERVER": relay.address})
    pairs = redis_faults.open_many(connect, proxy, start_worker(server.client()), late_streams)

    def push(number):
        """Empurra a todos uma linha. Argumentos: number, o número dela."""
        for place, (_, task) in enumerate(pairs):
            task.push(redis_faults.numbered_line(place, number))

    for step in range(times):
        relay.begin(1, ("late",))
        harness.eventually(lambda: not relay.orders, 5, "falha armada")
        push(2 * step)
        for place, (response, _) in enumerate(pairs):
            assert response.json_line() == {"s": place, "n": 2 * step}
        harness.eventually(lambda: relay.held, 5, "o proxy desistiu do pedido retido")
        # O proxy não lê nada enquanto o pedido atrasado roda: a linha seguinte está ao alcance dele.
        proxy.freeze()
        push(2 * step + 1)
        relay.release()
        harness.eventually(lambda step=step: relay.arrived == step + 1, 5, "pedido atrasado executado ou recusado")
        proxy.thaw()
        for place, (response, _) in enumerate(pairs):
            assert response.json_line(8) == {"s": place, "n": 2 * step + 1}
    for _, task in pairs:
        task.delete()
    text = redis_faults.deliver_all(proxy, pairs, 2 * times, 30)
    peers.say(f"{relay.arrived} pedidos atrasados; {text}")
    support.wait_empty(server.client(), 5)
