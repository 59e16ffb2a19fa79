"""Linha 8 da tabela: uma frota sobre um Redis Cluster, com um mestre morto com kill -9 e trocado no meio das tarefas."""

import asyncio
import collections
import contextlib
import json
import os
import re
import signal
import sys
import time

import pytest

import cluster
import harness
import peers

sys.path.append(str(harness.root / "tests" / "bench"))
import fleet

examples = harness.root / "packaging" / "examples"
tasks = peers.scale(200, 3000)
# Requisições ao mesmo tempo, palavras de cada tarefa e segundos entre elas.
parallel, words, delay = peers.scale(60, 150), 8, 0.1
# Prazo de cada resposta, em segundos: cobre a troca.
patience = 60


@pytest.fixture
def rig(tmp_path, start_proxy):
    """O cluster, um proxy para cada mestre, o nginx na frente e dois worker.py no canal de todos.

    Retorno:
        Tripla (cluster, proxies, balanceador), e os workers.
    """
    with contextlib.ExitStack() as stack:
        group = cluster.cluster(tmp_path / "cluster", stack)
        address = group.address(*group.nodes[: cluster.masters])
        tags = [cluster.tag_on(number) for number in range(cluster.masters)]
        workers = []
        for number in range(2):
            made = harness.background(tmp_path / f"worker-{number}", "worker")
            env = {**harness.base_environment(), "ENV_FILE": os.devnull, "REDIS_SERVER": address}
            made.spawn([sys.executable, str(examples / "worker.py"), "--delay", str(delay)], env)
            stack.callback(made.kill)
            workers.append(made)
        proxies = [start_proxy(env={"REDIS_SERVER": address, **cluster.prefixes(tag)}) for tag in tags]
        for each in workers:
            each.wait_log("inscrito no canal", 20)
        for each in proxies:
            stack.callback(each.stop)
            each.address = f"127.0.0.1:{each.port}"
        folder = tmp_path / "nginx"
        folder.mkdir()
        balancer = fleet.balancer(folder)
        stack.callback(balancer.stop)
        balancer.start(proxies, examples / "nginx-fleet.conf")
        yield group, proxies, balancer, workers
        for each in workers:
            each.signal(signal.SIGTERM)
            assert each.wait(20) == 0


async def ask(number, port, counts):
    """Faz uma tarefa pelo nginx, até que seja aceita, e lê a resposta até o fim.

    Argumentos:
        number: número da tarefa, que está em cada palavra dela.
        port: a do nginx.
        counts: collections.Counter do que houve.

    Retorno:
        Par (como acabou, a harness.response).
    """
    texts = [f"{number:05d}-{place} " for place in range(words)]
    body = "".join(texts).encode()
    head = f"POST /frota HTTP/1.1\r\nHost: frota\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        answer = harness.response(None, "POST")
        with contextlib.suppress(harness.broken, OSError):
            while not answer.ended:
                answer.feed(await asyncio.wait_for(reader.read(65536), patience), time.monotonic())
        writer.close()
        if answer.status == 200:
            break
        # Recusada, sem que a tarefa exista: o cliente tenta outra vez.
        counts[f"recusadas com {answer.status}"] += 1
        await asyncio.sleep(0.5)
    rows = [json.loads(line) for line in answer.all_lines]
    found = [row["content"] for row in rows if row.get("type") == "item"]
    expected = [{"type": "begin"}, *({"type": "item", "content": text} for text in texts), {"type": "end"}]
    if len(set(found)) < len(found):
        return "dobradas", answer
    if any("error" in row for row in rows):
        return "quebradas com linha de erro", answer
    if not answer.ended:
        return "cortadas", answer
    return "inteiras" if rows == expected else "perdidas", answer


async def load(group, port, victim):
    """Faz as tarefas, e no meio mata um nó com kill -9, espera a troca e o traz de volta.

    Argumentos:
        group: o cluster.
        port: a do nginx.
        victim: o nó.

    Retorno:
        Par (counts, lista dos pares de ask), com os segundos da troca em counts.
    """
    counts, gate, half = collections.Counter(), asyncio.Semaphore(parallel), asyncio.Event()

    async def one(number):
        """Faz uma das tarefas. Argumentos: number. Retorno: o par de ask."""
        async with gate:
            if number == tasks // 2:
                half.set()
            return await ask(number, port, counts)

    async def replace():
        """Mata o nó com metade das tarefas feitas, espera a troca e o traz de volta."""
        await half.wait()
        # No meio das tarefas, e não entre uma leva e outra.
        await asyncio.sleep(words * delay / 2)
        began = time.monotonic()
        await asyncio.to_thread(victim.kill)
        await asyncio.to_thread(group.wait_failover, cluster.tag_on(1), victim)
        counts["segundos da troca"] = round(time.monotonic() - began, 1)
        await asyncio.to_thread(group.rejoin, victim)

    *rows, _ = await asyncio.gather(*map(one, range(tasks)), replace())
    return counts, rows


@pytest.mark.timeout(peers.scale(120, 900))
@pytest.mark.parametrize("count", [tasks], ids=[f"{tasks}_tarefas"])
def test_fleet_over_a_cluster(rig, count):
    """Três mestres com réplicas, três proxies, dois workers e o nginx: um mestre morre no meio e é trocado. Nenhuma tarefa
    acaba curta com um fim limpo, nem é dobrada; a que perdeu os seus dados acaba com uma linha de erro."""
    group, proxies, balancer, workers = rig
    began = time.monotonic()
    counts, rows = asyncio.run(load(group, balancer.port, group.owner(cluster.tag_on(1))))
    counts.update(state for state, _ in rows)
    logs = "".join(each.log() for each in workers)
    served = collections.Counter(re.findall(r"tarefa (\S+): \d+ linhas", logs))
    counts["feitas por dois"] = sum(times > 1 for times in served.values())
    ends = collections.Counter(row["fim"] for each in proxies for row in each.tasks() if "fim" in row)
    share = [len(each.tasks()) for each in proxies]
    # A maior pausa entre duas linhas de um cliente: a da troca.
    gaps = [b.when - a.when for _, answer in rows for a, b in zip(answer.all_lines, answer.all_lines[1:], strict=False)]
    peers.say(
        f"{count} tarefas em {time.monotonic() - began:.1f} s, {share} por proxy; {dict(counts)}; "
        f"maior pausa de uma linha {max(gaps):.1f} s; fins {dict(ends)}"
    )
    assert not counts["perdidas"] and not counts["dobradas"] and not counts["cortadas"], counts
    assert not counts["feitas por dois"], served
    assert counts["inteiras"] + counts["quebradas com linha de erro"] == count
    # Só o que estava no mestre morto pode ter perdido dados.
    assert counts["quebradas com linha de erro"] < parallel / 2
    assert min(share) > 0 and "Traceback" not in logs
    # Uma prova em que nenhuma linha esperou pela troca não prova nada.
    assert max(gaps) > cluster.node_timeout / 1000
