"""Redis Cluster: a tag acha o seu nó de qualquer semente, o lugar dela muda com streams vivos, o nó dela morre; e o que um
servidor perdeu não parece um fim limpo."""

import contextlib
import json
import re
import time

import pytest

import cluster
import harness
import support

tags = [cluster.tag_on(number) for number in range(cluster.masters)]


@pytest.fixture(scope="module")
def whole_group(tmp_path_factory):
    """O cluster das provas deste módulo. Retorno: um cluster.cluster."""
    with contextlib.ExitStack() as stack:
        yield cluster.cluster(tmp_path_factory.mktemp("cluster"), stack)


@pytest.fixture
def group(whole_group):
    """O cluster, inteiro no começo da prova, e sem chave no fim. Retorno: um cluster.cluster."""
    yield whole_group
    for each in whole_group.nodes:
        if not each.alive():
            each.start()
    whole_group.wait_whole()
    harness.eventually(lambda: not whole_group.leftovers(), 5, "cluster sem chaves")


@pytest.fixture
def client(group):
    """Um cliente do cluster inteiro. Retorno: um redis.cluster.RedisCluster."""
    with contextlib.closing(group.client()) as made:
        yield made


@pytest.fixture
def listen(client):
    """Fábrica de trabalhadores: listen(nó) ouve o canal num nó, e lê e escreve em todo o cluster.

    Retorno:
        Função que devolve um harness.worker.
    """
    with contextlib.ExitStack() as stack:

        def start(node):
            """Assina o canal. Argumentos: node, o nó. Retorno: o harness.worker."""
            near = stack.enter_context(contextlib.closing(node.new_client()))
            made = stack.enter_context(contextlib.closing(harness.worker(near)))
            made.client = client
            return made

        yield start


def test_tags_of_the_manual(group):
    """Os lugares que o manual dá às tags de exemplo são os do Redis, e as três que recomenda caem uma em cada mestre."""
    manual = (harness.root / "packaging" / "doc" / "redis.md").read_text(encoding="utf-8")
    found = re.findall(r"(?m)^([a-z]) (\d+)$", manual)
    assert found
    for tag, slot in found:
        assert group.nodes[0].ask("CLUSTER", "KEYSLOT", tag) == int(slot)
    three = re.search(r"as tags `(\w)`, `(\w)` e `(\w)` caem uma em cada", manual).groups()
    assert len({group.owner(tag) for tag in three}) == 3


def away(group, tag):
    """Acha um nó que não guarda uma tag. Argumentos: group, o cluster; tag. Retorno: o nó."""
    owner = group.owner(tag)
    return next(each for each in group.nodes if each not in (owner, group.replica(owner)))


def serve(connect, proxy, worker):
    """Faz uma tarefa e lhe responde. Argumentos: connect; proxy; worker. Retorno: a tarefa, já acabada."""
    response, task = support.open_stream(connect, proxy, worker, "POST", "/")
    task.push("um", "dois")
    assert [response.line(), response.line()] == [b"um", b"dois"]
    task.push("três")
    task.delete()
    assert response.lines() == ["três".encode()]
    assert support.finished_row(proxy, task)["fim"] == "concluida"
    task.gone()
    return task


def test_any_seed(group, start_proxy, connect, listen):
    """A primeira semente está morta e a segunda não é a dona da tag; só uma réplica; ou uma URL de um nó só: MOVED leva à
    dona. A tarefa vai também à fila, e quem ouve noutro nó não é dado por ausente."""
    dead = harness.free_port()
    forms = [
        (tags[2], group.address(dead, group.nodes[0])),
        (tags[1], group.address(group.replica(group.owner(tags[0])))),
        (tags[0], f"redis://{group.owner(tags[1]).address}/0"),
        (tags[1], f"{group.owner(tags[2]).address}/0"),
    ]
    worker = listen(group.replica(group.owner(tags[0])))
    for tag, address in forms:
        settings = cluster.prefixes(tag, queue=True)
        proxy = start_proxy(env={"REDIS_SERVER": address, **settings})
        task = serve(connect, proxy, worker)
        assert task.key.startswith(settings["REDIS_PREFIX"]) and task.list.startswith(settings["REDIS_LIST_PREFIX"])
        assert "ninguém ouve" not in proxy.log(), proxy.log()
        proxy.stop()


def test_check(group):
    """--check nomeia o cluster, e diz que os avisos e os scripts funcionam."""
    env = {"ENV_FILE": "/dev/null", "REDIS_SERVER": group.address(), **cluster.prefixes(tags[1])}
    done = harness.run_proxy("--check", env=env)
    assert done.status == 0, done
    for row in (r"^avisos: +sim", r"^scripts: +sim", r"^cluster: +(?!não)\S"):
        assert re.search(row, done.out, re.MULTILINE), done


@pytest.mark.parametrize("queue", ["", "fila", "{outra}_fila"])
@pytest.mark.parametrize("form", ["cluster", "one"])
def test_keys_without_a_common_tag(group, start_proxy, connect, listen, form, queue):
    """Prefixos sem uma tag em comum, ou fila fora dela, são recusados no início e no --check com saída 2 e as linhas a
    escrever; com elas, o serviço atende."""
    address = group.address() if form == "cluster" else f"{group.nodes[1].address}/0"
    env = {"REDIS_SERVER": address} | ({"REDIS_QUEUE": queue, **cluster.prefixes(tags[0])} if "{" in queue else {})
    env |= {"REDIS_QUEUE": queue} if queue else {}
    for flags in ((), ("--check",)):
        done = harness.run_proxy(*flags, env={"ENV_FILE": "/dev/null", "HTTP_PORT": "0", **env})
        assert done.status == 2, done
    advised = dict(re.findall(r"(REDIS_\w+)=(\{\w+\}\S*)", done.err))
    wanted = {"REDIS_PREFIX", "REDIS_LIST_PREFIX", *(["REDIS_QUEUE"] if queue else [])}
    assert wanted <= set(advised) and len({text.partition("}")[0] for text in advised.values()}) == 1, done
    advised = {name: text.rstrip(".,;)") for name, text in advised.items()}
    proxy = start_proxy(env={**env, **advised})
    serve(connect, proxy, listen(group.nodes[0]))


def open_numbered(connect, proxy, worker, group, stack, count, total, pace):
    """Abre streams, com um worker numerado em cada um.

    Argumentos:
        connect, proxy, worker: como em support.open_streams.
        group: o cluster.
        stack: contextlib.ExitStack que encerra os workers.
        count: quantos streams.
        total: quantas linhas de cada um.
        pace: intervalo entre elas, em segundos.

    Retorno:
        Lista de pares (response, pusher).
    """
    pairs = support.open_streams(connect, proxy, worker, count)
    made = [(response, cluster.pusher(group, task, total, pace)) for response, task in pairs]
    for _, pusher in made:
        stack.callback(pusher.close)
    return made


@pytest.mark.parametrize("pause", [0, 20])
def test_slot_moves(group, start_proxy, connect, listen, pause):
    """O lugar da tag passa a outro mestre com streams vivos, ASK e TRYAGAIN no meio, e volta: nenhuma linha se perde ou se
    repete, e pedidos novos são atendidos depois."""
    tag = tags[0]
    env = {"REDIS_SERVER": group.address(), **cluster.prefixes(tag)}
    proxy = start_proxy("-P", pause, "-i", 100, env=env)
    worker = listen(group.nodes[1])
    source, total = group.owner(tag), 60
    with contextlib.ExitStack() as stack:
        made = open_numbered(connect, proxy, worker, group, stack, 4, total, 0.02)
        harness.eventually(lambda: all(pusher.number > 5 for _, pusher in made), 10, "linhas empurradas")
        # Uma tarefa calada, cuja lista não existe: as suas chaves ficam divididas até o fim da passagem.
        silent, quiet = support.open_stream(connect, proxy, worker, "POST", "/calada")
        for target in (next(each for each in map(group.owner, tags) if each is not source), source):
            seen, finish = proxy.log().count("fora do ar"), group.begin_move(tag, target)
            quiet.push("no meio")
            harness.eventually(lambda seen=seen: proxy.log().count("fora do ar") > seen, 10, "uma retirada recusada")
            finish()
            assert silent.line(20) == b"no meio"
            serve(connect, proxy, worker)
        quiet.delete()
        assert silent.lines(20) == []
        for lines in harness.read_all([response for response, _ in made], 30):
            assert lines == cluster.lines_of(total)
    assert {row["fim"] for row in support.finished_rows(proxy)} == {"concluida"}


@pytest.mark.parametrize("pause", [0, 20])
@pytest.mark.parametrize("is_last", [False, True])
def test_list_emptied_while_the_slot_leaves(group, start_proxy, connect, listen, pause, is_last):
    """A retirada que esvazia a lista num lugar que está de saída: a chave que some é recusada ao script dali em diante, e a
    linha que ele já tirou não se perde."""
    tag = tags[0]
    env = {"REDIS_SERVER": group.address(), **cluster.prefixes(tag)}
    proxy = start_proxy("-P", pause, "-i", 100, env=env)
    response, task = support.open_stream(connect, proxy, listen(group.nodes[1]), "POST", "/")
    task.push("um")
    assert response.line() == b"um"
    proxy.freeze()
    task.push("dois")
    if is_last:
        task.delete()
    owner = group.owner(tag)
    finish = group.begin_move(tag, next(each for each in map(group.owner, tags) if each is not owner))
    proxy.thaw()
    # A lista some daqui, ou a retirada é recusada por já faltar a chave da tarefa.
    harness.eventually(
        lambda: owner.ask("EXISTS", task.list) != 1 or "fora do ar" in proxy.log(), 10, "uma retirada na saída"
    )
    finish()
    assert response.line(20) == b"dois"
    if not is_last:
        task.push("três")
        task.delete()
        assert response.line(20) == "três".encode()
    assert response.lines(20) == []
    assert support.finished_row(proxy, task)["fim"] == "concluida"


def test_owner_killed(group, start_proxy, connect, client, listen):
    """O nó da tag morre com kill -9 sob streams vivos e a réplica assume: o que ela tinha chega inteiro e uma vez só, o
    silêncio inclusive, e pedidos novos são atendidos."""
    tag = tags[1]
    proxy = start_proxy("-P", 0, "-i", 100, env={"REDIS_SERVER": group.address(), **cluster.prefixes(tag)})
    worker = listen(away(group, tag))
    total = 120
    with contextlib.ExitStack() as stack:
        silent, quiet = support.open_stream(connect, proxy, worker, "POST", "/calada")
        made = open_numbered(connect, proxy, worker, group, stack, 4, total, 0.03)
        harness.eventually(lambda: all(pusher.number > 20 for _, pusher in made), 15, "linhas empurradas")
        group.wait_copied(tag)
        dead = group.owner(tag)
        dead.kill()
        group.wait_failover(tag, dead)
        for lines in harness.read_all([response for response, _ in made], 40):
            assert lines == cluster.lines_of(total)
    client.nodes_manager.initialize()
    quiet.push("viva")
    quiet.delete()
    assert silent.lines(20) == [b"viva"]
    serve(connect, proxy, worker)
    assert {row["fim"] for row in support.finished_rows(proxy)} == {"concluida"}


@pytest.mark.parametrize("knew", ["das_linhas", "da_primeira", "de_tudo_menos_a_última_retirada"])
@pytest.mark.parametrize("pushed", ["antes", "depois"])
def test_replica_a_step_behind(group, start_proxy, connect, client, listen, knew, pushed):
    """A réplica que assume só soube das linhas e de nenhuma retirada, ou nem de uma linha que o cliente já leu, ou de tudo
    menos a última retirada: nenhuma lida vem outra vez, e vêm as seguintes, antes ou depois de o proxy voltar."""
    tag = tags[1]
    proxy = start_proxy("-P", 0, "-i", 100, env={"REDIS_SERVER": group.address(), **cluster.prefixes(tag)})
    response, task = support.open_stream(connect, proxy, listen(away(group, tag)), "POST", "/")
    unseen = ["um", "dois"] if knew == "das_linhas" else ["dois"]
    if knew != "das_linhas":
        task.push("um")
        assert response.line() == b"um"
        group.wait_copied(tag)
    owner = group.owner(tag)
    if knew == "da_primeira":
        spare = group.cut_off(owner)
        task.push(*unseen)
    else:
        proxy.freeze()
        task.push(*unseen)
        group.wait_copied(tag)
        spare = group.cut_off(owner)
        proxy.thaw()
    assert [response.line() for _ in unseen] == [text.encode() for text in unseen]
    if pushed == "antes":
        proxy.freeze()
    owner.kill()
    spare.thaw()
    group.wait_failover(tag, owner)
    # Este cliente ainda tem o morto por dono.
    client.nodes_manager.initialize()
    if pushed == "depois":
        harness.eventually(lambda: "Redis de volta" in proxy.log(), 20, "o proxy de volta")
    task.push("três", "quatro")
    proxy.thaw()
    assert [response.line(20), response.line(20)] == ["três".encode(), b"quatro"]
    task.push("cinco")
    task.delete()
    assert response.lines(20) == [b"cinco"]
    assert support.finished_row(proxy, task)["fim"] == "concluida"


def test_end_without_lines_after_a_failover(group, start_proxy, connect, client, listen):
    """Uma tarefa sem linhas que a réplica tinha, e que o worker só acaba depois da troca: o fim é limpo."""
    tag = tags[1]
    proxy = start_proxy("-i", 100, env={"REDIS_SERVER": group.address(), **cluster.prefixes(tag)})
    response, task = support.open_stream(connect, proxy, listen(away(group, tag)), "POST", "/")
    group.wait_copied(tag)
    dead = group.owner(tag)
    dead.kill()
    group.wait_failover(tag, dead)
    client.nodes_manager.initialize()
    harness.eventually(lambda: "Redis de volta" in proxy.log(), 20, "o proxy de volta")
    task.delete()
    assert response.lines(20) == []
    assert support.finished_row(proxy, task)["fim"] == "concluida"


def test_password_with_a_comma(tmp_path):
    """A senha de cluster:// pode ter uma vírgula, codificada como em toda URL; crua, serve ou é recusada com uma frase."""
    node = cluster.node(tmp_path / "node")
    node.password = "a,b"
    with contextlib.ExitStack() as stack:
        stack.callback(node.stop)
        node.start_first()
        node.ask("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        harness.eventually(lambda: node.ask("EXISTS", "x") is not None, 10, "lugares atendidos")
        for text, statuses in (("a%2Cb", {0}), ("a,b", {0, 2}), ("errada", {1})):
            env = {
                "ENV_FILE": "/dev/null",
                "REDIS_SERVER": f"cluster://:{text}@{node.address}",
                **cluster.prefixes("t"),
            }
            done = harness.run_proxy("--check", env=env)
            assert done.status in statuses and "Traceback" not in done.err and "a,b" not in done.out + done.err, done


def check_lost(proxy, response, task, begun):
    """Confere o fim de uma tarefa cujos dados se foram.

    Argumentos:
        proxy: o proxy.
        response: a resposta.
        task: a tarefa.
        begun: linhas que devem vir antes da de erro.
    """
    lines = response.lines(20)
    assert lines[:-1] == begun and json.loads(lines[-1])["error"] == "data_lost", lines
    assert support.finished_row(proxy, task)["fim"] == "perdida"


def test_data_lost_in_a_cluster(group, start_proxy, connect, listen):
    """O nó da tag volta vazio, sem réplica que assumisse: a linha de erro e fim=perdida, e o serviço segue."""
    tag = tags[2]
    proxy = start_proxy("-i", 100, env={"REDIS_SERVER": group.address(), **cluster.prefixes(tag)})
    worker = listen(away(group, tag))
    dead = group.owner(tag)
    begun, silent = (support.open_stream(connect, proxy, worker, "POST", "/") for _ in range(2))
    begun[1].push("um")
    assert begun[0].line() == b"um"
    spare = group.replica(dead)
    spare.kill()
    dead.kill()
    dead.start()
    for response, task in (begun, silent):
        check_lost(proxy, response, task, [])
    group.rejoin(spare)
    serve(connect, proxy, worker)


def test_data_lost_with_the_server(start_redis, start_proxy, connect, start_worker):
    """Um Redis sozinho que volta vazio: tarefas com e sem linhas acabam com a linha de erro e fim=perdida."""
    server = start_redis()
    proxy = start_proxy("-i", 100, redis=server)
    worker = start_worker(server.client())
    pairs = support.open_streams(connect, proxy, worker, 3)
    for response, task in pairs[:2]:
        task.push("um")
        assert response.line() == b"um"
    server.kill()
    server.start()
    for response, task in pairs:
        check_lost(proxy, response, task, [])
    worker = start_worker(server.client())
    response, task = support.open_stream(connect, proxy, worker)
    task.finish("ok")
    assert response.lines() == [b"ok"]
    assert support.finished_row(proxy, task)["fim"] == "concluida"


@pytest.mark.parametrize("pause", [0, 20])
def test_lines_after_the_loss(start_redis, start_proxy, connect, start_worker, pause):
    """Um worker que não olha a chave empurra mais linhas depois da perda, antes que o proxy a veja: o fim não é limpo."""
    server = start_redis()
    proxy = start_proxy("-P", pause, redis=server)
    client = server.client()
    response, task = support.open_stream(connect, proxy, start_worker(client))
    task.push("um")
    assert response.line() == b"um"
    client.pipeline().flushall().rpush(task.list, "três").execute()
    task.delete()
    check_lost(proxy, response, task, [])


@pytest.mark.parametrize("last", [(), ("última",)])
def test_end_across_a_restart_that_keeps_the_data(start_redis, start_proxy, connect, start_worker, last):
    """Uma tarefa que acaba no instante em que o Redis, que grava tudo, reinicia: o fim é limpo, e outra viva segue."""
    server = start_redis(appendonly=True)
    proxy = start_proxy("-i", 100, redis=server)
    (ending, task), (living, other) = support.open_streams(connect, proxy, start_worker(server.client()), 2)
    for response, each in ((ending, task), (living, other)):
        each.push("um")
        assert response.line() == b"um"
    proxy.freeze()
    task.finish(*last)
    server.kill()
    server.start()
    proxy.thaw()
    assert ending.lines(20) == [line.encode() for line in last]
    assert support.finished_row(proxy, task)["fim"] == "concluida"
    other.client.close()
    with contextlib.closing(server.new_client()) as again:
        again.rpush(other.list, "dois")
        again.delete(other.key)
    assert living.lines(20) == [b"dois"]
    assert support.finished_row(proxy, other)["fim"] == "concluida"


def test_key_that_expired_in_an_outage(start_redis, start_proxy, connect, start_worker):
    """O Redis congela por mais que REDIS_TTL e volta com as mesmas chaves, menos as que venceram: fim=perdida."""
    server = start_redis()
    proxy = start_proxy("--ttl", 3, "-i", 100, redis=server)
    response, task = support.open_stream(connect, proxy, start_worker(server.client()))
    task.push("um")
    assert response.line() == b"um"
    server.freeze()
    time.sleep(3.5)
    server.thaw()
    check_lost(proxy, response, task, [])
