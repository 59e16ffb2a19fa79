"""Um Redis Cluster de verdade para as provas: três mestres e três réplicas em 127.0.0.1, que morrem, trocam de papel e
passam o lugar de uma tag uns aos outros."""

import contextlib
import re

import redis
import redis.cluster
import redis.crc

import harness
import support

masters = 3
# Tempo, em milissegundos, em que um nó calado é dado por morto pelos outros.
node_timeout = 1000
# O que a troca de um mestre pode levar, em segundos, numa máquina ocupada.
failover_time = 30

# Empurra uma linha uma vez só, por mais que o pedido se repita: a marca diz quantas já foram.
push_script = """
if tonumber(redis.call('GET', KEYS[2]) or 0) == tonumber(ARGV[1]) then
  redis.call('RPUSH', KEYS[1], ARGV[2])
  redis.call('SET', KEYS[2], ARGV[1] + 1)
end
return redis.call('GET', KEYS[2])
"""


class node(harness.redis_server):
    """Um nó; clientes dele falam só com ele, e um cluster só tem o banco 0."""

    def __init__(self, folder, *config):
        """Prepara o nó. Argumentos: folder, a pasta; config, linhas extras do redis.conf."""
        super().__init__(
            folder,
            "cluster-enabled yes",
            "cluster-config-file nodes.conf",
            f"cluster-node-timeout {node_timeout}",
            # Um mestre morto sem réplica não cala os outros; e nenhuma réplica é velha demais para assumir.
            "cluster-require-full-coverage no",
            "cluster-replica-validity-factor 0",
            "cluster-allow-replica-migration no",
            "repl-diskless-sync yes",
            "repl-diskless-sync-delay 0",
            "repl-ping-replica-period 1",
            *config,
        )

        self.extra = self.config
        self.choose_ports()

    def choose_ports(self):
        """Escolhe as duas portas, a dos clientes e a dos outros nós."""
        self.port, self.bus = harness.free_port(), harness.free_port()
        self.config = (*self.extra, f"cluster-port {self.bus}")

    @property
    def address(self):
        """O endereço (str), sem banco."""
        return f"127.0.0.1:{self.port}"

    def new_client(self, db=0, **options):
        """Abre um cliente só deste nó. Argumentos: db, sem uso; options, os de redis.Redis. Retorno: um redis.Redis."""
        return super().new_client(0, **options)

    def client(self, db=0, **options):
        """O mesmo, fechado com o nó. Argumentos: db, sem uso; options, os de redis.Redis. Retorno: um redis.Redis."""
        return super().client(0, **options)

    def ask(self, *words, default=None):
        """Faz uma pergunta por uma conexão só dela.

        Argumentos:
            words: o comando.
            default: o que devolver se ele não responde, ou recusa.

        Retorno:
            A resposta, ou default.
        """
        if self.alive():
            with contextlib.suppress(redis.RedisError), contextlib.closing(support.plain_client(self)) as client:
                return client.execute_command(*words)
        return default

    def points_to(self, tag):
        """Pergunta ao nó quem atende uma tag. Argumentos: tag. Retorno: a porta (int), ou None se ele não diz."""
        try:
            with contextlib.closing(support.plain_client(self)) as client:
                client.exists(f"{{{tag}}}")
        except redis.RedisError as error:
            found = re.search(r":(\d+)$", str(error))
            return int(found[1]) if found else None
        return self.port

    def identity(self):
        """Dá o nome do nó no cluster (str)."""
        return self.ask("CLUSTER", "MYID").decode()

    def start(self, timeout=10.0, ready=True):
        """Inicia ou reinicia; vive mais que uma prova. Argumentos e retorno como em harness.redis_server."""
        super().start(timeout, False)
        harness.resident_pids.add(self.pid)
        if ready:
            harness.eventually(self.answers, timeout, f"nó na porta {self.port}")
        return self

    def start_first(self):
        """Inicia pela primeira vez, em outras portas se alguém tomou as escolhidas."""
        for _ in range(5):
            with contextlib.suppress(AssertionError):
                return self.start()
            self.kill()
            self.choose_ports()
        raise AssertionError(f"o nó não inicia:\n{self.output()}")


class cluster:
    """Os nós: os três primeiros nascem mestres, cada um de um terço dos lugares, e os outros, réplicas deles na ordem."""

    def __init__(self, folder, stack, *config, replicas=1):
        """Inicia tudo e espera que esteja de pé, com as réplicas em dia.

        Argumentos:
            folder: pasta de dados.
            stack: contextlib.ExitStack que encerra os nós.
            config: linhas extras do redis.conf de todos.
            replicas: réplicas de cada mestre.
        """
        self.nodes = [node(folder / f"node-{number}", *config) for number in range(masters * (1 + replicas))]
        for each in self.nodes:
            stack.callback(each.stop)
            each.start_first()
        first = self.nodes[0]
        for number, each in enumerate(self.nodes):
            each.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < masters:
                low, high = (16384 * place // masters for place in (number, number + 1))
                each.ask("CLUSTER", "ADDSLOTSRANGE", low, high - 1)
            if each is not first:
                each.ask("CLUSTER", "MEET", "127.0.0.1", first.port, first.bus)
        names = [each.identity() for each in self.nodes[:masters]]
        for number, each in enumerate(self.nodes[masters:]):
            harness.eventually(
                lambda each=each, name=names[number % masters]: each.ask("CLUSTER", "REPLICATE", name), 20, "réplica"
            )
        self.wait_whole()

    def wait_whole(self):
        """Espera que todos os nós estejam de pé e em dia, e que o que se publica em um chegue a todos."""
        harness.eventually(lambda: self.settled(len(self.nodes)), failover_time, "cluster inteiro")
        with contextlib.ExitStack() as stack:
            ears = []
            for each in self.nodes:
                ears.append(stack.enter_context(contextlib.closing(each.new_client())).pubsub())
                stack.callback(ears[-1].close)
                ears[-1].subscribe("barramento")
            heard = [set() for _ in ears]

            def reaches(source):
                """Publica num nó e diz se todos já ouviram algo dele (bool). Argumentos: source."""
                source.ask("PUBLISH", "barramento", source.port)
                for ear, found in zip(ears, heard, strict=True):
                    while message := ear.get_message():
                        found.add(message["data"])
                return all(str(source.port).encode() in found for found in heard)

            for each in self.nodes:
                harness.eventually(lambda each=each: reaches(each), 20, "barramento do cluster")

    def settled(self, count):
        """Diz se todo nó vivo vê o cluster inteiro, e toda réplica está em dia (bool). Argumentos: count, quantos nós."""
        for each in self.nodes:
            if each.alive():
                told = str(each.ask("CLUSTER", "INFO"))
                role = each.ask("ROLE", default=[b""])
                if not re.search(r"cluster_state\W+ok\b", told) or not re.search(rf"known_nodes\W+{count}\b", told):
                    return False
                if role[0] != b"master" and b"connected" not in role:
                    return False
        return True

    def address(self, *seeds):
        """Dá REDIS_SERVER. Argumentos: seeds, os nós nomeados, ou portas; nenhum, todos. Retorno: str."""
        named = [each if isinstance(each, int) else each.port for each in seeds or self.nodes]
        return "cluster://" + ",".join(f"127.0.0.1:{port}" for port in named)

    def client(self):
        """Abre um cliente do cluster inteiro, que quem chama fecha. Retorno: um redis.cluster.RedisCluster."""
        places = [redis.cluster.ClusterNode("127.0.0.1", each.port) for each in self.nodes if each.alive()]
        return redis.cluster.RedisCluster(startup_nodes=places, socket_timeout=10, **harness.resp2)

    def owner(self, tag):
        """Acha o nó que atende as chaves de uma tag. Argumentos: tag, sem as chaves. Retorno: o node, ou None."""
        return next((each for each in self.nodes if each.ask("EXISTS", f"{{{tag}}}") is not None), None)

    def replica(self, master):
        """Acha a réplica viva de um mestre. Argumentos: master, o node. Retorno: o node, ou None."""
        rows = [(each, each.ask("ROLE", default=[b""])) for each in self.nodes if each is not master]
        return next((each for each, role in rows if len(role) > 3 and int(role[2]) == master.port), None)

    def wait_copied(self, tag):
        """Espera que a réplica da tag tenha tudo. Argumentos: tag."""
        with contextlib.closing(self.owner(tag).new_client()) as client:
            client.set(f"{{{tag}}}copiado", 1, px=1)
            assert client.wait(1, 10000) >= 1

    def cut_off(self, master):
        """Congela a réplica de um mestre e fecha a conexão dos dois: o que ele fizer daqui em diante, ela não saberá.

        Argumentos:
            master: o node.

        Retorno:
            O node da réplica, que quem chama descongela.
        """
        spare = self.replica(master)
        spare.freeze()
        assert master.ask("CLIENT", "KILL", "TYPE", "replica") == 1
        return spare

    def wait_failover(self, tag, dead):
        """Espera que outro nó atenda a tag. Argumentos: tag; dead, o morto. Retorno: o node."""
        found = harness.eventually(
            lambda: next((each for each in [self.owner(tag)] if each and each is not dead), None),
            failover_time,
            "mestre novo",
        )
        harness.eventually(lambda: self.settled(len(self.nodes)), failover_time, "cluster de pé")
        living = [each for each in self.nodes if each.alive()]
        harness.eventually(lambda: {each.points_to(tag) for each in living} == {found.port}, 10, "nós de acordo")
        return found

    def rejoin(self, dead):
        """Traz um nó morto de volta e espera que o cluster o aceite. Argumentos: dead, o node."""
        dead.start()
        self.wait_whole()

    def begin_move(self, tag, target):
        """Começa a passar o lugar de uma tag: daí em diante, ASK e TRYAGAIN.

        Argumentos:
            tag: a tag.
            target: o node que o recebe.

        Retorno:
            Função sem argumentos que leva as chaves e acaba a passagem; daí em diante, MOVED.
        """
        slot, source = redis.crc.key_slot(tag.encode()), self.owner(tag)
        with contextlib.closing(target.new_client()) as client:
            client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source.identity())
        with contextlib.closing(source.new_client()) as client:
            client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target.identity())

        def finish():
            """Leva as chaves, até que não reste nenhuma, e diz a todos os mestres de quem é o lugar."""
            with contextlib.closing(source.new_client()) as client:
                while keys := client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                    client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
            name = target.identity()
            for each in (target, source, *self.nodes):
                each.ask("CLUSTER", "SETSLOT", slot, "NODE", name)
            harness.eventually(lambda: self.owner(tag) is target, 10, "lugar passado")

        return finish

    def leftovers(self):
        """Lista as chaves que restam nos mestres. Retorno: lista de bytes."""
        alive = [each for each in self.nodes if each.ask("ROLE", default=[b""])[0] == b"master"]
        return [key for each in alive for key in each.ask("KEYS", "*", default=[])]


def tag_on(number):
    """Escolhe uma tag cujas chaves nascem num dos mestres. Argumentos: number, qual deles, de 0 a 2. Retorno: str."""
    tags = (f"t{count}" for count in range(1000))
    return next(tag for tag in tags if redis.crc.key_slot(tag.encode()) * masters // 16384 == number)


def prefixes(tag, queue=False):
    """Monta as configurações de um proxy. Argumentos: tag; queue, verdadeiro para ter também a fila. Retorno: dict."""
    pairs = {"REDIS_PREFIX": f"{{{tag}}}_task_", "REDIS_LIST_PREFIX": f"{{{tag}}}_list_"}
    return pairs | ({"REDIS_QUEUE": f"{{{tag}}}_queue"} if queue else {})


class pusher(support.pusher):
    """Worker de uma tarefa do cluster: numera as linhas, insiste em cada uma até que esteja lá uma vez, e acaba a tarefa."""

    patience = 30

    def __init__(self, group, task, total, pace):
        """Começa a empurrar. Argumentos: group, o cluster; os demais, os de support.pusher."""
        super().__init__(group, task, total, pace)
        # Com a tag da tarefa.
        self.mark = f"{task.key}:marca"
        self.start()

    def run(self):
        """Empurra tudo, abrindo outro cliente a cada falha."""
        while not self.halt.wait(0.02):
            with contextlib.suppress(redis.RedisError), contextlib.closing(self.server.client()) as client:
                while self.number < self.total:
                    line = f'{{"n": {self.number}}}'
                    found = client.eval(push_script, 2, self.task.list, self.mark, self.number, line)
                    self.number = int(found or 0)
                    if self.halt.wait(self.pace):
                        return
                client.delete(self.task.key)
                client.delete(self.mark)
                return


def lines_of(total):
    """Monta as linhas que um pusher empurra. Argumentos: total. Retorno: lista de bytes."""
    return [f'{{"n": {number}}}'.encode() for number in range(total)]
