"""Linha 5 da tabela: três sentinelas de verdade, um mestre morto com kill -9 e streams vivos que seguem no novo."""

import contextlib
import json
import threading
import time

import pytest
import redis

import harness
import peers
import redis_faults
import support

pytestmark = pytest.mark.timeout(redis_faults.limit)

streams = 50
rounds = peers.scale(1, 5)

# Tempo, em segundos, em que um mestre calado é dado por morto pelas sentinelas, e o que a troca pode levar ao todo.
down_after = 0.7
failover_time = 30
# Prazo, em segundos, para que um pedido novo seja aceito depois de haver mestre novo.
recovery_time = 3


class sentinel_server(harness.redis_server):
    """Uma sentinela: o mesmo redis-server, com --sentinel e um arquivo que ele reescreve."""

    def start(self, timeout=10.0, ready=True):
        """Inicia (ou reinicia, com o que o arquivo dela guarda).

        Argumentos:
            timeout: prazo em segundos.
            ready: falso para não esperar.

        Retorno:
            A própria.
        """
        path = self.folder / "sentinel.conf"
        if not path.exists():
            lines = ["bind 127.0.0.1", f"port {self.port}", f"dir {self.folder}", *self.config]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.spawn([harness.redis_binary(), str(path), "--sentinel"], harness.base_environment())
        if ready:
            harness.eventually(self.answers, timeout, f"sentinela na porta {self.port}; saída:\n{self.output()}")
        return self

    def answers(self):
        """Diz se a sentinela responde (bool)."""
        with contextlib.suppress(redis.RedisError), contextlib.closing(self.new_client()) as client:
            return client.ping()
        return False

    def new_client(self, db=0, **options):
        """Abre um cliente; uma sentinela não tem bancos.

        Argumentos:
            db: sem uso.
            options: outros argumentos de redis.Redis.

        Retorno:
            Um redis.Redis.
        """
        return super().new_client(0, **options)

    def leftovers(self):
        """Nada: uma sentinela não guarda chaves. Retorno: lista vazia."""
        return []

    def master(self):
        """Pergunta quem é o mestre. Retorno: a porta (int), ou None se ela ainda não sabe."""
        with contextlib.suppress(redis.RedisError), contextlib.closing(self.new_client()) as client:
            found = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster")
            return int(found[1]) if found else None
        return None


class cluster:
    """Um mestre, suas réplicas e três sentinelas que os vigiam."""

    def __init__(self, folder, stack, password="", user=""):
        """Inicia tudo e espera que as réplicas estejam em dia e as sentinelas se conheçam.

        Argumentos:
            folder: pasta de dados.
            stack: contextlib.ExitStack que encerra tudo.
            password: senha do mestre e das réplicas; vazia, nenhuma.
            user: "nome:senha" com que se fala com as sentinelas; vazio, qualquer um fala.
        """
        self.user = user
        self.servers, self.sentinels = [], []
        for number in range(3):
            config = [f"replicaof 127.0.0.1 {self.servers[0].port}"] if number else []
            config += ["repl-diskless-sync yes", "repl-diskless-sync-delay 0", "repl-ping-replica-period 1"]
            config += [f"masterauth {harness.quote(password)}"] if password else []
            server = harness.redis_server(folder / f"redis-{number}", *config, password=password)
            self.servers.append(server)
            stack.callback(server.stop)
            server.start()
        master = self.servers[0]
        self.wait_replicas(master, 2)
        for number in range(3):
            config = [
                f"sentinel monitor mymaster 127.0.0.1 {master.port} 2",
                f"sentinel down-after-milliseconds mymaster {int(down_after * 1000)}",
                "sentinel failover-timeout mymaster 6000",
            ]
            config += [f"sentinel auth-pass mymaster {harness.quote(password)}"] if password else []
            if user:
                name, _, secret = user.partition(":")
                config += [f"user {name} on >{secret} ~* &* +@all", "user default off"]
                config += [f"sentinel sentinel-user {name}", f"sentinel sentinel-pass {secret}"]
            each = sentinel_server(folder / f"sentinel-{number}", *config)
            self.sentinels.append(each)
            stack.callback(each.stop)
            each.start(ready=not user)
        harness.eventually(self.settled, 20, "sentinelas que se conhecem")

    @property
    def address(self):
        """REDIS_SERVER que nomeia as três sentinelas (str)."""
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in self.sentinels)
        return f"sentinel://{self.user}{'@' if self.user else ''}{hosts}/mymaster/{harness.default_db}"

    def talk(self, each):
        """Abre um cliente de uma sentinela. Argumentos: each, a sentinela. Retorno: um redis.Redis, que quem chama fecha."""
        name, _, secret = self.user.partition(":")
        return each.new_client(username=name or None, password=secret or None)

    def settled(self):
        """Diz se cada sentinela conhece as outras duas e as duas réplicas (bool)."""
        for each in self.sentinels:
            try:
                with contextlib.closing(self.talk(each)) as client:
                    found = client.execute_command("SENTINEL", "MASTER", "mymaster")
            except redis.RedisError:
                return False
            rows = found if isinstance(found, dict) else dict(zip(found[::2], found[1::2], strict=True))
            plain = {str(k.decode() if isinstance(k, bytes) else k): v for k, v in rows.items()}
            if int(plain["num-other-sentinels"]) != 2 or int(plain["num-slaves"]) != 2:
                return False
        return True

    def wait_replicas(self, master, count):
        """Espera que um mestre tenha réplicas em dia. Argumentos: master, o servidor; count, quantas."""
        with contextlib.closing(master.new_client()) as client:

            def online():
                """Diz se as réplicas estão em dia (bool)."""
                info = client.info("replication")
                rows = [info.get(f"slave{number}", {}) for number in range(count)]
                return all(row.get("state") == "online" for row in rows)

            harness.eventually(online, 60, "réplicas em dia")

    def master(self):
        """Acha o mestre de agora, perguntando aos próprios servidores. Retorno: o redis_server, ou None."""
        for server in self.servers:
            if server.alive():
                with contextlib.suppress(redis.RedisError), contextlib.closing(support.plain_client(server)) as client:
                    if client.info("replication")["role"] == "master" and self.votes(server.port) >= 2:
                        return server
        return None

    def votes(self, port):
        """Conta as sentinelas que apontam um mestre. Argumentos: port, a porta dele. Retorno: int."""
        count = 0
        for each in self.sentinels:
            if each.alive():
                with contextlib.suppress(redis.RedisError), contextlib.closing(self.talk(each)) as client:
                    found = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster")
                    count += bool(found) and int(found[1]) == port
        return count

    def kill_master(self):
        """Mata o mestre com kill -9. Retorno: o servidor morto."""
        dead = harness.eventually(self.master, 20, "um mestre")
        dead.kill()
        return dead

    def new_master(self, dead):
        """Espera o mestre novo. Argumentos: dead, o morto. Retorno: o redis_server."""
        return harness.eventually(
            lambda: next((one for one in [self.master()] if one and one is not dead), None),
            failover_time,
            "mestre novo",
        )

    def rejoin(self, dead):
        """Traz um servidor morto de volta, e espera que as sentinelas façam dele uma réplica em dia.

        Argumentos:
            dead: o servidor.
        """
        dead.start()
        self.wait_replicas(harness.eventually(self.master, 20, "um mestre"), 2)


@pytest.fixture
def start_cluster(tmp_path):
    """Fábrica de cluster, encerrados ao fim da prova.

    Retorno:
        Função que recebe as opções de cluster.
    """
    with contextlib.ExitStack() as stack:

        def start(**options):
            """Inicia um. Argumentos: options, as de cluster. Retorno: o cluster."""
            return cluster(tmp_path / "cluster", stack, **options)

        yield start


class prober(threading.Thread):
    """Cliente que faz pedidos sem parar, e anota o status e a hora de cada um."""

    def __init__(self, port):
        """Guarda a porta do proxy. Argumentos: port."""
        super().__init__(name="prober", daemon=True)
        self.port = port
        self.rows = []
        self.halt = threading.Event()
        self.error = None

    def run(self):
        """Faz pedidos até close; um erro fica em self.error."""
        try:
            while not self.halt.wait(0.1):
                began = time.monotonic()
                with contextlib.closing(harness.connection(self.port)) as conn:
                    response = conn.request("POST", "/sonda").response(15)
                    if response.status != 200:
                        assert response.json()["error"] == "redis_unavailable"
                self.rows.append((began, time.monotonic(), response.status))
        except Exception as error:
            self.error = error

    def close(self):
        """Para, espera a linha de execução e repassa o erro que houve."""
        self.halt.set()
        self.join(20)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def check_probes(rows, killed, switched):
    """Confere que pedidos novos só foram recusados durante a troca, e sempre depressa.

    Argumentos:
        rows: as anotações do prober.
        killed: instante da morte do mestre.
        switched: instante em que havia mestre novo.

    Retorno:
        Frase com a conta.
    """
    assert {status for _, _, status in rows} <= {200, 504}
    before = {status for began, ended, status in rows if ended < killed}
    assert before <= {200}, before
    late = [row for row in rows if row[0] > switched + recovery_time]
    assert late and {status for _, _, status in late} == {200}, late
    refused = [row for row in rows if row[2] == 504]
    assert refused, "nenhum pedido caiu na troca"
    longest = max(ended - began for began, ended, _ in rows)
    assert longest < 8, longest
    return (
        f"troca em {switched - killed:.1f} s; {len(rows)} pedidos novos, {len(refused)} com 504, o último "
        f"{refused[-1][1] - switched:+.1f} s da troca; o mais demorado, {longest:.1f} s"
    )


@pytest.mark.parametrize("times", [rounds], ids=[f"{rounds}_mortes-{streams}_streams"])
def test_master_killed(start_cluster, start_proxy, connect, times):
    """O mestre morre com os streams em silêncio: seguem no novo, com tudo o que ele tem; 504 só durante a troca."""
    group = start_cluster()
    proxy = start_proxy("-t", 60000, env={"REDIS_SERVER": group.address})
    master = group.master()
    with contextlib.closing(master.new_client()) as client, contextlib.closing(harness.worker(client)) as worker:
        pairs = redis_faults.open_many(connect, proxy, worker, streams)
        number = push_all(group, client, pairs, 0)
    for step in range(times):
        for response, _ in pairs:
            assert response.json_line()["n"] == number - 2
            assert response.json_line()["n"] == number - 1
        with contextlib.closing(master.new_client()) as client:
            # O que foi tirado da lista também tem de estar nas réplicas: a troca não pode devolvê-lo.
            client.execute_command("SET", "marca", step)
            assert client.wait(2, 5000) == 2
        with redis_faults.closing_thread(prober(proxy.port)) as probe:
            harness.eventually(lambda probe=probe: len(probe.rows) >= 3, 10, "pedidos antes da morte")
            killed = time.monotonic()
            dead = group.kill_master()
            master = group.new_master(dead)
            switched = time.monotonic()
            with contextlib.closing(master.new_client()) as client:
                client.delete("marca")
                number = push_all(group, client, pairs, number, wait=1)
            harness.eventually(
                lambda probe=probe, limit=switched + recovery_time + 1: probe.rows[-1][0] > limit, 30, "pedidos depois"
            )
        peers.say(check_probes(probe.rows, killed, switched))
        if step < times - 1:
            group.rejoin(dead)
    with contextlib.closing(master.new_client()) as client:
        for _, task in pairs:
            client.delete(task.key)
    peers.say(redis_faults.deliver_all(proxy, pairs, number, 20))
    log = proxy.log()
    assert (log.count("Redis fora do ar"), log.count("Redis de volta")) == (times, times), log
    with contextlib.closing(master.new_client()) as client:
        support.wait_empty(client, 5)


def push_all(group, client, pairs, number, wait=2):
    """Empurra duas linhas a cada stream e espera que as réplicas as tenham.

    Argumentos:
        group: o cluster.
        client: um redis.Redis do mestre.
        pairs: pares (response, task).
        number: número da primeira linha.
        wait: quantas réplicas.

    Retorno:
        Número da próxima linha.
    """
    with client.pipeline(transaction=True) as pipe:
        for place, (_, task) in enumerate(pairs):
            pipe.rpush(task.list, *[redis_faults.numbered_line(place, number + step) for step in range(2)])
        pipe.execute()
    assert client.wait(wait, 5000) >= wait, group.servers
    return number + 2


@pytest.mark.parametrize(
    "total", [peers.scale(100, 1000)], ids=lambda total: f"{streams}_streams-{total * streams}_linhas"
)
def test_master_killed_under_load(start_cluster, start_proxy, connect, total):
    """O mestre morre em meio às linhas: o que estava garantido nas réplicas chega todo, na ordem. Só pode repetir-se o que
    foi entregue sem que a retirada chegasse à réplica, e a conta dessas é impressa."""
    group = start_cluster()
    proxy = start_proxy("-P", 0, "-t", 60000, env={"REDIS_SERVER": group.address})
    first = group.master()
    with contextlib.closing(first.new_client()) as client, contextlib.closing(harness.worker(client)) as worker:
        pairs = redis_faults.open_many(connect, proxy, worker, streams)
    sure = []
    with contextlib.closing(first.new_client()) as client:
        for number in range(total // 2):
            push_line(client, pairs, number)
            if number % 10 == 9:
                assert client.wait(2, 5000) == 2
                sure.append(number)
    group.kill_master()
    master = group.new_master(first)
    with contextlib.closing(master.new_client()) as client:
        for number in range(total // 2, total):
            push_line(client, pairs, number)
        for _, task in pairs:
            client.delete(task.key)
    received = harness.read_all([response for response, _ in pairs], 30)
    lost, doubled, disordered, strange = redis_faults.judge(received, total)
    peers.say(
        f"{streams} streams, {streams * total} linhas: {lost} perdidas, {doubled} repetidas na troca, {strange} estranhas"
    )
    # O total foi garantido por WAIT até a última dezena, e a dezena final também.
    assert sure[-1] == total // 2 - 1
    assert (lost, strange) == (0, 0)
    for lines in received:
        numbers = [json.loads(line)["n"] for line in lines]
        # Uma volta, no máximo: a da troca, a um lugar que a réplica ainda tinha.
        assert sum(after <= before for before, after in zip(numbers, numbers[1:], strict=False)) <= 1, numbers
    assert disordered <= streams
    with contextlib.closing(master.new_client()) as client:
        support.wait_empty(client, 5)


def push_line(client, pairs, number):
    """Empurra uma linha a cada stream. Argumentos: client, um redis.Redis; pairs; number, o número da linha."""
    with client.pipeline(transaction=True) as pipe:
        for place, (_, task) in enumerate(pairs):
            pipe.rpush(task.list, redis_faults.numbered_line(place, number))
        pipe.execute()


def test_passwords_and_a_dead_sentinel(start_cluster, start_proxy, connect, fetch):
    """Senha no mestre, usuário e senha nas sentinelas, e a primeira sentinela morta: o proxy parte e serve, e não mostra
    segredo nenhum; com todas mortas, quem já está conectado segue."""
    group = start_cluster(password="segredo do mestre", user="vigia:segredo-da-sentinela")
    group.sentinels[0].kill()
    env = {"REDIS_SERVER": group.address, "REDIS_PASSWORD": "segredo do mestre"}
    checked = harness.run_proxy("--check", "-p", "0", env={**env, "ENV_FILE": "/dev/null"})
    assert checked.status == 0 and "segredo" not in checked.out + checked.err, checked
    proxy = start_proxy(env=env)
    assert "segredo" not in proxy.log()
    master = group.master()
    with contextlib.closing(master.new_client()) as client, contextlib.closing(harness.worker(client)) as worker:
        response, task = support.open_stream(connect, proxy, worker)
        for each in group.sentinels[1:]:
            each.kill()
        task.push("um")
        assert response.line() == b"um"
        task.finish("dois")
        assert response.lines() == [b"dois"]
        assert fetch(proxy, "GET", "/ping").body() == b"pong"
        support.wait_empty(client, 5)


def test_demoted_master(start_cluster, start_proxy, connect):
    """Uma troca a pedido (SENTINEL FAILOVER): o mestre antigo segue vivo, como réplica, e o proxy passa para o novo. E um
    nome de grupo que as sentinelas não conhecem não serve para partir."""
    group = start_cluster()
    refused_start(group.address.replace("mymaster", "outro"), 1, 2)
    proxy = start_proxy("-t", 60000, env={"REDIS_SERVER": group.address})
    first = group.master()
    with contextlib.closing(first.new_client()) as client, contextlib.closing(harness.worker(client)) as worker:
        pairs = redis_faults.open_many(connect, proxy, worker, 5)
        number = push_all(group, client, pairs, 0)
        for response, _ in pairs:
            assert [response.json_line()["n"] for _ in range(2)] == [0, 1]
        client.execute_command("SET", "marca", 1)
        assert client.wait(2, 5000) == 2
    with contextlib.closing(group.talk(group.sentinels[0])) as client:
        client.execute_command("SENTINEL", "FAILOVER", "mymaster")
    master = group.new_master(first)
    with contextlib.closing(master.new_client()) as client:
        client.delete("marca")
        number = push_all(group, client, pairs, number, wait=1)
        for _, task in pairs:
            client.delete(task.key)
        peers.say(redis_faults.deliver_all(proxy, pairs, number, 20))
        support.wait_empty(client, 5)


def refused_start(address, *statuses):
    """Confere que o proxy não parte com um endereço, e o diz em uma frase. Argumentos: address; statuses, os códigos."""
    known = {"HTTP_PORT": "0", "HTTP_HOST": "127.0.0.1", "ENV_FILE": "/dev/null"}
    done = harness.run_proxy(env={**known, "REDIS_SERVER": address})
    assert done.status in statuses, (address, done)
    assert "Traceback" not in done.err and done.err.startswith("erro: "), done
    assert done.took < 15, done


def test_refusals():
    """8 endereços: nenhuma sentinela no ar, ou malfeito: uma frase e um código."""
    refused_start(f"sentinel://127.0.0.1:{harness.free_port()}/mymaster/1", 1)
    for address in (
        "sentinel://127.0.0.1:26379",
        "sentinel:///mymaster/1",
        "sentinel://127.0.0.1:x/mymaster/1",
        "sentinel://127.0.0.1:99999/mymaster/1",
        "sentinel://[::::]:26379/mymaster/1",
        "sentinel://127.0.0.1:26379/mymaster/99999999999999999999",
        "sentinel://127.0.0.1:26379/mymaster/um",
    ):
        refused_start(address, 2)
