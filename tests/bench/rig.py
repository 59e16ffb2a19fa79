"""Bancada de uma medição: Redis, servidor, trabalhador e motorista, todos novos, e o que se lê deles."""

import contextlib
import json
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time

import servers

here = pathlib.Path(__file__).resolve().parent
# Conexões com o Redis que são do trabalhador, e não do servidor em prova.
worker_clients = {"task": 3, "limit": 3, "webdis": 1, "nchan": 0, "floor": 0}


class broken(Exception):
    """Um stream se quebrou, ou um servidor não fez o que devia: a medição não tem números."""


class helper:
    """O motorista ou o trabalhador: um processo que recebe comandos e responde, em JSON."""

    def __init__(self, script, *words):
        """Inicia o processo.

        Argumentos:
            script: nome do arquivo.
            words: argumentos.
        """
        self.name = script.removesuffix(".py")
        self.child = subprocess.Popen(
            [sys.executable, str(here / script), *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=servers.die_with_parent,
        )
        self.data = b""

    def tell(self, action, **details):
        """Envia um comando sem esperar pela resposta.

        Argumentos:
            action: nome do comando.
            details: argumentos dele.
        """
        self.child.stdin.write(json.dumps({"do": action, **details}).encode() + b"\n")
        self.child.stdin.flush()

    def hear(self, timeout=300.0):
        """Espera por uma resposta.

        Argumentos:
            timeout: prazo em segundos.

        Retorna:
            dict: a resposta.

        Levanta:
            broken: se não veio resposta, ou se ela é um erro.
        """
        deadline = time.monotonic() + timeout
        while b"\n" not in self.data:
            ready, _, _ = select.select([self.child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = self.child.stdout.read1(1 << 20) if ready else b""
            if not part:
                raise broken(f"{self.name}: " + ("saiu" if ready else "não respondeu a tempo"))
            self.data += part
        line, _, self.data = self.data.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise broken(f"{self.name}: {answer['error']}")
        return answer

    def do(self, action, **details):
        """Envia um comando e espera pela resposta.

        Argumentos:
            action: nome do comando.
            details: argumentos dele.

        Retorna:
            dict: a resposta.
        """
        self.tell(action, **details)
        return self.hear(details.get("timeout", 270) + 30)

    def stop(self):
        """Encerra o processo, que sai quando sua entrada se fecha."""
        self.child.stdin.close()
        try:
            self.child.wait(5)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()


def percentile(values, part):
    """Calcula um percentil.

    Argumentos:
        values: números, em qualquer ordem.
        part: de 0 a 1.

    Retorna:
        float: o valor, ou None se não há valores.
    """
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else None


def milliseconds(values, prefix):
    """Resume durações.

    Argumentos:
        values: durações em ns.
        prefix: começo dos nomes.

    Retorna:
        dict: p50, p99 e máximo em ms; vazio se não há valores.
    """
    if not values:
        return {}
    return {
        f"{prefix}_p50_ms": percentile(values, 0.5) / 1e6,
        f"{prefix}_p99_ms": percentile(values, 0.99) / 1e6,
        f"{prefix}_max_ms": max(values) / 1e6,
    }


class assembly:
    """Partes que se iniciam juntas e se encerram da última à primeira. Usada com `with`: ao fim, nada fica."""

    def __init__(self, prefix):
        """Cria a pasta das partes.

        Argumentos:
            prefix: começo do nome dela.
        """
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix))
        self.parts = []

    def keep(self, part):
        """Guarda uma parte para encerrar no fim.

        Argumentos:
            part: processo, servidor ou ajudante.

        Retorna:
            object: a própria parte.
        """
        self.parts.append(part)
        return part

    def __enter__(self):
        """Começa.

        Retorna:
            assembly: ela mesma.
        """
        return self

    def __exit__(self, *details):
        """Encerra tudo.

        Argumentos:
            details: exceção, se houve.
        """
        self.stop()

    def stop(self):
        """Encerra as partes e apaga a pasta, haja o que houver com uma delas."""
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            for part in self.parts:
                stack.callback(self.end, part)

    def end(self, part):
        """Encerra uma parte.

        Argumentos:
            part: processo, servidor ou ajudante.
        """
        part.stop()


class rig(assembly):
    """Uma medição, do Redis ao motorista."""

    def __init__(self, make, seed, settings=None, proxies=1):
        """Inicia tudo e faz uma volta de aquecimento.

        Argumentos:
            make: classe do concorrente.
            seed: semente dos sorteios, a mesma para todos os concorrentes de uma rodada.
            settings: configurações do proxy que não são as da bancada (nome -> valor), ou None; os pares as ignoram.
            proxies: quantos servidores sobre o mesmo Redis.
        """
        super().__init__("bench-")
        self.seed = seed
        try:
            self.redis = self.keep(servers.redis_server(self.folder))
            self.redis.start()
            self.servers = [self.keep(make(self.folder)) for _ in range(proxies)]
            for server in self.servers:
                server.start(self.redis, settings)
            self.server = self.servers[0]
            self.contract = make.contract
            self.ends = make.contract != "webdis"
            port = self.redis.port if make.uses_redis else self.server.port
            self.worker = self.keep(helper("worker.py", make.worker, port))
            self.port = self.worker.hear(20)["port"] or self.server.port
            self.driver = self.keep(helper("driver.py", make.contract))
            for server in self.servers:
                self.warm_up(server.port or self.port)
        except BaseException:
            self.stop()
            raise

    def warm_up(self, port):
        """Passa por todo o caminho uma vez, para que nada do que se mede seja a primeira vez.

        Argumentos:
            port: porta do servidor.
        """
        self.open(1, 8, port=port)
        self.play("warm", 1, 8, 3, [0.02, 0.05])
        self.driver.do("forget")
        self.worker.do("forget")

    # -- passos ---------------------------------------------------------------

    def open(self, first, count, window=200, port=None, timeout=120):
        """Abre streams e espera que o trabalhador os conheça.

        Argumentos:
            first: número do primeiro.
            count: quantos.
            window: quantos podem estar à espera dos cabeçalhos ao mesmo tempo.
            port: porta do servidor, ou None para a do primeiro.
            timeout: prazo em segundos.

        Retorna:
            dict: a resposta do motorista.

        Levanta:
            broken: se algum não abriu.
        """
        told = self.driver.do("open", first=first, count=count, port=port or self.port, window=window, timeout=timeout)
        if told["failed"]:
            raise broken(f"{told['failed']} de {count} streams não abriram: {told['reasons']}")
        known = self.worker.do("known", first=first, count=count, timeout=30)["known"]
        if known != count:
            raise broken(f"o trabalhador só conheceu {known} de {count} tarefas")
        return told

    def play(self, label, first, count, lines, gap, pad=0, end=True, every=True):
        """Empurra linhas no tempo, espera pelo fim e confere.

        Argumentos:
            label: entra na semente.
            first: número do primeiro stream.
            count: quantos.
            lines: linhas de cada um.
            gap: [mínimo, máximo] segundos entre as linhas.
            pad: bytes de enchimento.
            end: verdadeiro para encerrar os streams.
            every: falso para espalhar as fases.

        Retorna:
            dict: latências, tempos do fim e custo por linha.
        """
        before = self.usage()
        told = self.worker.do(
            "timed",
            seed=f"{self.seed}-{label}",
            first=first,
            count=count,
            lines=lines,
            gap=gap,
            pad=pad,
            end=end and self.ends,
            every=every,
        )
        self.wait_end(end)
        after = self.usage()
        figures = self.cost(before, after, told["pushed"])
        figures["worker_late_p99_ms"] = told["late"][1]
        return figures | self.check(first, count, lines, pad, end, told["ends"])

    def wait_end(self, end):
        """Espera que os streams acabem, ou que nada mais chegue.

        Argumentos:
            end: verdadeiro se devem acabar.
        """
        if end and self.ends:
            self.driver.do("finish", timeout=60)
        else:
            self.driver.do("settle", quiet=0.3, timeout=60)

    def check(self, first, count, lines, pad, end, ends):
        """Confere um grupo de streams.

        Argumentos:
            first: número do primeiro.
            count: quantos.
            lines: linhas que cada um deve ter.
            pad: bytes de enchimento.
            end: verdadeiro se devem ter acabado.
            ends: número -> ns do fim, segundo o trabalhador.

        Retorna:
            dict: latências e tempos do fim, last e bytes.

        Levanta:
            broken: se algum se quebrou.
        """
        told = self.driver.do(
            "check",
            first=first,
            count=count,
            lines=lines,
            pad=pad,
            end=end and self.ends,
            clocks=self.worker.do("clocks", first=first, count=count)["clocks"],
        )
        if told["broken"]:
            raise broken(f"{told['broken']} de {count} streams quebrados: {told['reasons']}")
        took = [told["ends"][number] - moment for number, moment in ends.items() if number in told["ends"]]
        return {
            **milliseconds(told["latencies"], "latency"),
            **milliseconds(took, "end"),
            "last": told["last"],
            "bytes": told["bytes"],
        }

    # -- consumo --------------------------------------------------------------

    def usage(self):
        """Lê o consumo de todos até agora.

        Retorna:
            dict: when, server (segundos de processador de cada um), worker, driver e redis.
        """
        return {
            "when": time.monotonic(),
            "server": [server.cpu() for server in self.servers],
            "worker": servers.process_cpu(self.worker.child.pid),
            "driver": servers.process_cpu(self.driver.child.pid),
            "redis": self.redis.usage(),
        }

    def calls(self, before, after):
        """Conta os comandos do Redis entre duas leituras.

        Argumentos:
            before: primeira leitura de usage.
            after: segunda.

        Retorna:
            dict: comando -> chamadas.
        """
        old, new = before["redis"]["commands"], after["redis"]["commands"]
        return {name: count - old.get(name, 0) for name, count in new.items() if count > old.get(name, 0)}

    def cost(self, before, after, lines):
        """Calcula o custo por linha entre duas leituras.

        Argumentos:
            before: primeira leitura de usage.
            after: segunda.
            lines: linhas entregues.

        Retorna:
            dict: microssegundos por linha, comandos do Redis por linha e carga da própria bancada.
        """
        seconds = after["when"] - before["when"]
        lines = max(lines, 1)
        calls = self.calls(before, after)
        return {
            "seconds": seconds,
            "server_us_line": sum(after["server"]) / lines * 1e6 - sum(before["server"]) / lines * 1e6,
            "redis_us_line": (after["redis"]["cpu"] - before["redis"]["cpu"]) / lines * 1e6,
            "redis_calls_line": sum(calls.values()) / lines,
            "driver_load": (after["driver"] - before["driver"]) / seconds,
            "worker_load": (after["worker"] - before["worker"]) / seconds,
        }
