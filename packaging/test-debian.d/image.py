#!/usr/bin/env python3
"""Prova a imagem do contêiner, já construída, com o buildah no papel do Docker.

Roda como root em espaços de rede, de processos e de montagem só seus, com um Redis em 127.0.0.1:6379, iniciados por
packaging/test-debian. Escreve as linhas que walk.py escreve.
"""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile

import walk

image = "localhost/py-ndjson-proxy"
config = json.loads(walk.run(f"buildah inspect --type image {image}"))["Docker"]["config"]
health = shlex.join(config["Healthcheck"]["Test"][1:])


class container:
    """Um contêiner da imagem."""

    def __init__(self):
        """Cria o contêiner, parado."""
        self.name = walk.run(f"buildah from --pull-never {image}").strip()
        self.root = pathlib.Path(walk.run(f"buildah mount {self.name}").strip())

    @contextlib.contextmanager
    def running(self, options=""):
        """Roda-o, com as opções do "buildah run", até o fim do contexto."""
        words = ["buildah", "run", *shlex.split(options), self.name, "--", *config["Entrypoint"]]
        with (
            tempfile.TemporaryFile() as self.log,
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=self.log) as self.process,
            contextlib.ExitStack() as ending,
        ):
            # Neste espaço de processos só há este.
            ending.callback(walk.call, "pkill -x py-ndjson-proxy")
            walk.eventually(lambda: walk.is_open() and walk.ping() == (200, "pong"), 20, self.said)
            self.pid = int(walk.run("pgrep -x py-ndjson-proxy"))
            yield self
            walk.call(f"kill {self.pid}")
            # O log não é escrito aqui.
            walk.equal(self.process.stdout.read(), b"")

    def said(self):
        """Devolve o que saiu na saída de erros."""
        return os.pread(self.log.fileno(), 65536, 0).decode()

    def healthy(self):
        """Diz se a prova de saúde da imagem passa."""
        return walk.call(f"buildah run {self.name} -- {health}").returncode == 0


@walk.step(0)
def served():
    """A imagem atende, sem ser root; o log sai só na saída de erros, e a prova de saúde dela diz a verdade."""
    walk.measure("imagem do contêiner", walk.run(f"buildah images --format '{{{{.Size}}}}' {image}").strip())
    with container().running("--env SERVERNAME=imagem --env METRICS_PORT=9771") as one:
        walk.equal(os.stat(f"/proc/{one.pid}").st_uid, 8771)
        walk.equal(walk.stream().getheader("Server"), "imagem")
        walk.equal(walk.ask("GET", "/metrics", at=9771).status, 200)
        walk.eventually(lambda: "fim=concluida" in one.said(), 5, one.said)
        walk.holds(one.said(), "pronto: http://0.0.0.0:8771")
        walk.expect(one.healthy(), "a prova de saúde falha com o programa no ar")
        hands = walk.link()
        hands("CONFIG", "SET", "requirepass", "outra")
        hands("CLIENT", "KILL", "TYPE", "normal")
        walk.eventually(lambda: not one.healthy(), 10, "a prova de saúde passa sem o Redis")
        hands("CONFIG", "SET", "requirepass", "")
        walk.eventually(one.healthy, 10, "a prova de saúde não voltou")


@walk.step(0)
def drained():
    """SIGTERM espera o stream vivo, que recebe o resto, e sai com 0."""
    with container().running() as one:
        hearing = walk.listen()
        answer = walk.ask("POST", "/vivo", b"{}")
        key, task = hearing.task()
        walk.redis("RPUSH", task["task_list"], '{"n": 1}')
        walk.equal(answer.readline(), b'{"n": 1}\n')
        os.kill(one.pid, signal.SIGTERM)
        walk.closes()
        walk.redis("RPUSH", task["task_list"], '{"n": 2}')
        walk.redis("DEL", key)
        walk.equal(answer.read(), b'{"n": 2}\n')
        walk.equal(one.process.wait(20), 0)


@walk.step(0)
def read_only():
    """Com a raiz só para leitura, um usuário qualquer e o arquivo montado: atende, e SIGHUP recarrega."""
    one = container()
    # O buildah 1.28 só se contenta com uma raiz assim se o que ele põe nela já existir.
    walk.run(f"buildah run {one.name} -- true; touch {one.root}/run/.containerenv")
    walk.run(f"mount --bind {one.root} {one.root}; mount -o remount,bind,ro {one.root}")
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("SERVERNAME=do arquivo\nHTTP_PORT=1\n")
        file.flush()
        os.chmod(file.name, 0o644)
        with one.running(f"--user 4321:0 -v {file.name}:/etc/py-ndjson-proxy.env:ro") as one:
            walk.equal(os.stat(f"/proc/{one.pid}").st_uid, 4321)
            walk.expect(os.statvfs(f"/proc/{one.pid}/root").f_flag & os.ST_RDONLY, "a raiz não é só para leitura")
            walk.stream()
            walk.equal(walk.server_name(), "do arquivo")
            file.write("SERVERNAME=outro\n")
            file.flush()
            os.kill(one.pid, signal.SIGHUP)
            walk.eventually(lambda: walk.server_name() == "outro", 10, one.said)
            walk.stream()


if __name__ == "__main__":
    sys.exit(walk.main(0))
