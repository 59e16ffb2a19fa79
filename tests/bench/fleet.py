#!/usr/bin/env python3
"""Prova da frota: nginx na frente de três proxies e dois workers, milhares de tarefas, um proxy morto no meio.

Use tests/bench/fleet, que prepara o que é preciso. O README desta pasta diz o que é prometido e como se confere.
"""

import argparse
import contextlib
import errno
import json
import os
import pathlib
import re
import selectors
import signal
import socket
import sys
import time

import driver
import redis
import rig
import servers

example = servers.here.parent.parent / "packaging" / "examples" / "nginx-fleet.conf"
proxies = 3
workers = 2
# Linhas de cada tarefa e intervalo entre elas, em segundos: cada tarefa dura cerca de 1,5 s.
lines = 8
gap = (0.02, 0.32)
# Validade das chaves, em segundos: curta, para que se possa vê-las sumir.
expiry = 6
# Requisições abertas juntas no instante da morte, e as da segunda morte.
burst = 60
caught = 36
# Prazo de tudo o que deve acontecer logo, em segundos; folgado, que a máquina pode estar ocupada.
patience = 60
line_form = re.compile(rb'\{"s":"(\d{6})","n":"(\d{8})"\}')


class member(servers.proxy):
    """Um proxy da frota."""

    def __init__(self, folder, number, server):
        """Prepara sem iniciar.

        Argumentos:
            folder: pasta dos arquivos.
            number: número do proxy.
            server: HTTP_SERVER.
        """
        super().__init__(folder)
        self.name = f"proxy-{number}"
        # A marca das provas, se houver, segue adiante: a verificação de vazamentos procura por ela.
        marks = {name: text for name, text in os.environ.items() if name == "NDJSON_TEST_MARK"}
        self.settings = {"HTTP_SERVER": server, "REDIS_TTL": str(expiry), "MAXTIME": "45000", **marks}

    @property
    def address(self):
        """O endereço como o nginx o escreve no log (str)."""
        return f"{servers.host}:{self.port}"


class balancer(servers.process):
    """O nginx, com a configuração de exemplo e os endereços da frota no lugar dos dela."""

    name = "nginx"

    def start(self, members, config):
        """Escreve a configuração, inicia e espera que atenda.

        Argumentos:
            members: os proxies.
            config: arquivo (pathlib.Path) com o upstream e o server.

        Levanta:
            failure: se o arquivo não tem o que trocar, ou se o nginx não inicia.
        """
        self.port = servers.free_port()
        self.record = self.folder / "access.log"
        (self.folder / "fleet.conf").write_text(self.adapt(config.read_text(encoding="utf-8"), members), "utf-8")
        places = "".join(
            f"{name}_temp_path {self.folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        main = self.folder / "nginx.conf"
        main.write_text(
            f"""
            {"user root;" if os.getuid() == 0 else ""}
            daemon off;
            worker_processes 2;
            worker_rlimit_nofile 4096;
            pid {self.folder}/nginx.pid;
            error_log {self.folder}/nginx-error.log warn;
            events {{ worker_connections 2048; }}
            http {{ {places} include {self.folder}/fleet.conf; }}
        """,
            encoding="utf-8",
        )
        error_log = str(self.folder / "nginx-error.log")
        self.spawn([servers.find_program("nginx"), "-c", str(main), "-p", str(self.folder), "-e", error_log])
        self.wait_until(self.answers, "o nginx atender")

    def adapt(self, text, members):
        """Troca os endereços da configuração pelos da frota, e nada mais.

        Argumentos:
            text: a configuração.
            members: os proxies.

        Retorna:
            str: a configuração trocada.

        Levanta:
            failure: se não havia exatamente o que trocar.
        """
        ports = iter(members)
        text, found = re.subn(r"^(\s+server )\S+:8771 ", lambda m: f"{m[1]}{next(ports).address} ", text, flags=re.M)
        text, listens = re.subn(r"^(\s+listen )80;", rf"\g<1>{servers.host}:{self.port};", text, flags=re.M)
        text, logs = re.subn(r"^(\s+access_log )\S+", rf"\g<1>{self.record}", text, flags=re.M)
        if (found, listens, logs) != (len(members), 1, 1):
            raise servers.failure(f"a configuração do nginx mudou de forma: {found}, {listens} e {logs} trocas")
        return text

    def records(self):
        """Lê o log de acesso.

        Retorna:
            dict: número da tarefa -> dict com method, status, e tries, lista de (endereço, bytes enviados).
        """
        found = {}
        for text in self.record.read_text(encoding="utf-8").splitlines():
            row = json.loads(text)
            number = re.fullmatch(r"/fleet/(\d{6})", row["path"])
            if number:
                sent = [int(word) if word.isdigit() else 0 for word in re.split(r", | : ", row["upstream_sent"])]
                tries = list(zip(re.split(r", | : ", row["upstream"]), sent, strict=True))
                found[number[1]] = {"method": row["method"], "status": row["status"], "tries": tries}
        return found


class request:
    """Uma tarefa vista pelo cliente."""

    def __init__(self, number, method, port, after):
        """Começa a conectar.

        Argumentos:
            number: número da tarefa.
            method: o método.
            port: porta do nginx.
            after: verdadeiro se foi feita depois da morte de um proxy.
        """
        self.number = f"{number:06d}"
        self.method, self.after = method, after
        self.parts = []
        self.head = self.ended = False
        body = "" if method == "GET" else self.number
        size = f"Content-Length: {len(body)}\r\n" if body else ""
        self.text = (
            f"{method} /fleet/{self.number} HTTP/1.1\r\nHost: fleet\r\n{size}Connection: close\r\n\r\n{body}".encode()
        )
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        code = self.sock.connect_ex((servers.host, port))
        if code not in (0, errno.EINPROGRESS):
            raise servers.failure(f"o nginx não aceita conexões: {os.strerror(code)}")

    def verdict(self):
        """Confere o que o cliente recebeu.

        Retorna:
            dict: state ("whole", "short", de fim limpo mas incompleta, ou "cut", quebrada), begun (se o streaming
            começou), gap, doubled, foreign (se há linhas puladas, repetidas, alheias) e why, uma frase.
        """
        raw = b"".join(self.parts)
        head, found, _ = raw.partition(b"\r\n\r\n")
        told = dict.fromkeys(("begun", "gap", "doubled", "foreign"), False) | {"state": "cut", "why": "sem resposta"}
        if not found:
            return told
        told["why"] = head.split(b"\r\n")[0].decode("latin-1")
        if not head.startswith(b"HTTP/1.1 200 ") or b"transfer-encoding: chunked" not in head.lower():
            return told
        told["begun"] = True
        try:
            _, parts, complete = driver.split_chunks(raw, len(head) + 4)
        except ValueError as error:
            return {**told, "gap": True, "why": str(error)}
        # O que não acaba em LF é uma linha que a morte cortou.
        *texts, rest = b"".join(parts).split(b"\n")
        seen = []
        for text in texts:
            match = line_form.fullmatch(text)
            if not match or match[1].decode() != self.number:
                told["foreign"] = True
            else:
                told["doubled"] |= int(match[2]) in seen
                seen.append(int(match[2]))
        told["gap"] = seen != list(range(len(seen)))
        told["why"] = f"{len(seen)} de {lines} linhas, fim {'limpo' if complete else 'quebrado'}"
        if complete:
            right = seen == list(range(lines)) and not rest and not told["foreign"]
            told["state"] = "whole" if right else "short"
        return told


class fleet(rig.assembly):
    """Redis, proxies, workers e nginx."""

    def __init__(self, server, config):
        """Inicia tudo.

        Argumentos:
            server: HTTP_SERVER dos proxies.
            config: configuração do nginx (pathlib.Path).
        """
        super().__init__("fleet-")
        self.selector = selectors.DefaultSelector()
        self.requests = {}
        self.active = 0
        try:
            self.redis = self.keep(servers.redis_server(self.folder)).start()
            self.link = redis.Redis(host=servers.host, port=self.redis.port, db=0, socket_timeout=30)
            self.members = [self.keep(member(self.folder, number + 1, server)) for number in range(proxies)]
            for item in self.members:
                item.start(self.redis)
            words = (self.redis.port, lines, *gap, expiry)
            self.workers = [self.keep(rig.helper("fleet_worker.py", *words)) for _ in range(workers)]
            for item in self.workers:
                item.hear(20)
            self.balancer = self.keep(balancer(self.folder))
            self.balancer.start(self.members, config)
        except BaseException:
            self.stop()
            raise

    def stop(self):
        """Encerra as partes e apaga a pasta."""
        for item in self.requests.values():
            item.sock.close()
        self.selector.close()
        if hasattr(self, "link"):
            self.link.close()
        super().stop()

    def end(self, part):
        """Encerra uma parte.

        Argumentos:
            part: processo ou ajudante.
        """
        if getattr(part, "child", None) is not None:
            with contextlib.suppress(ProcessLookupError):
                # Um proxy congelado não ouviria o pedido de sair.
                os.kill(part.child.pid, signal.SIGCONT)
        # O cano de um ajudante que já saiu está quebrado.
        with contextlib.suppress(BrokenPipeError):
            part.stop()

    # -- o cliente ------------------------------------------------------------

    def ask(self, method="POST", after=False):
        """Faz uma requisição, sem esperar por ela.

        Argumentos:
            method: o método.
            after: verdadeiro se um proxy já foi morto.

        Retorna:
            request: a requisição.
        """
        item = request(len(self.requests) + 1, method, self.balancer.port, after)
        self.requests[item.number] = item
        self.active += 1
        self.selector.register(item.sock, selectors.EVENT_WRITE, item)
        return item

    def step(self, timeout=0.1):
        """Lê o que chegou e envia o que pode ser enviado.

        Argumentos:
            timeout: espera máxima em segundos.
        """
        for key, events in self.selector.select(timeout):
            item = key.data
            try:
                if events & selectors.EVENT_WRITE:
                    item.sock.send(item.text)
                    self.selector.modify(item.sock, selectors.EVENT_READ, item)
                    continue
                data = item.sock.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if data:
                item.parts.append(data)
                item.head = item.head or b"\r\n\r\n" in b"".join(item.parts)
                continue
            self.selector.unregister(item.sock)
            item.sock.close()
            item.ended = True
            self.active -= 1

    def pump(self, condition, what):
        """Lê até que uma condição valha.

        Argumentos:
            condition: função sem argumentos.
            what: o que se espera.

        Levanta:
            broken: se o prazo passou.
        """
        deadline = time.monotonic() + patience
        while not condition():
            if time.monotonic() > deadline:
                raise rig.broken(f"em {patience} s não aconteceu: {what}")
            self.step(0.05)

    # -- o Redis e os workers -------------------------------------------------

    def reports(self):
        """Pergunta aos workers o que fizeram.

        Retorna:
            list: um dict por worker: tasks (número -> chaves), pushed, dropped e strange.
        """
        return [item.do("report") for item in self.workers]

    def made(self):
        """Junta as tarefas dos workers.

        Retorna:
            dict: número da tarefa -> lista das chaves com que ela foi feita.
        """
        found = {}
        for told in self.reports():
            for number, keys in told["tasks"].items():
                found.setdefault(number, []).extend(keys)
        return found

    def traces(self):
        """Lista as chaves das tarefas que estão no Redis, menos as posses dos workers.

        Retorna:
            dict: nome da chave -> validade em segundos (-1 se não tem nenhuma).
        """
        names = [name for name in self.link.scan_iter(count=1000) if not name.startswith(b"worker:claim:")]
        with self.link.pipeline(transaction=False) as batch:
            for name in names:
                batch.ttl(name)
            ages = batch.execute()
        return {name.decode(): age for name, age in zip(names, ages, strict=True) if age != -2}

    # -- as fases -------------------------------------------------------------

    def load(self, tasks):
        """Faz as tarefas, muitas ao mesmo tempo, e mata o primeiro proxy no meio.

        Argumentos:
            tasks: quantas.

        Retorna:
            dict: seconds, killed_at (tarefas feitas até a morte) e left (chaves que havia no Redis logo depois dela).
        """
        parallel = max(burst, min(300, tasks // 3))
        began = time.monotonic()
        while len(self.requests) < tasks // 2:
            while self.active < parallel and len(self.requests) < tasks // 2:
                self.ask()
            self.step()
        # A morte vem com streams em todas as idades e no meio de uma rajada: há requisições em todos os pontos do caminho.
        self.pump(lambda: any(item.ended for item in self.requests.values()), "o fim do primeiro stream")
        fresh = [self.ask() for _ in range(min(burst, tasks // 5))]
        self.pump(lambda: any(item.head for item in fresh), "um cabeçalho da rajada")
        self.kill(self.members[0])
        killed_at, left = len(self.requests), self.traces()
        while len(self.requests) < tasks or self.active:
            while self.active < parallel and len(self.requests) < tasks:
                self.ask(after=True)
            self.step()
            if time.monotonic() > began + patience + tasks / 10:
                raise rig.broken(f"{self.active} streams não acabaram")
        return {"seconds": time.monotonic() - began, "killed_at": killed_at, "left": left}

    def kill(self, victim):
        """Mata um proxy com SIGKILL e espera que o sistema feche o que era dele.

        Argumentos:
            victim: o proxy.
        """
        victim.child.kill()
        victim.child.wait()

    def catch(self):
        """Mata o segundo proxy com requisições que já fizeram a tarefa e ainda não têm resposta.

        O Redis deixa de executar escritas; os proxies lhe enviam as suas e esperam; o segundo é congelado; o Redis
        volta, e a tarefa existe, sem que o proxy possa dizê-lo ao cliente. É quando reenviar faria o trabalho dobrado.

        Retorna:
            list: as requisições desta fase.
        """
        victim = self.members[1]
        self.link.execute_command("CLIENT", "PAUSE", patience * 1000, "WRITE")
        fresh = [self.ask(method, True) for method in ("POST", "GET", "PUT") for _ in range(caught // 3)]
        self.pump(lambda: self.waiting() == proxies - 1, "os dois proxies à espera do Redis")
        victim.child.send_signal(signal.SIGSTOP)
        self.pump(lambda: frozen(victim.child.pid), "o proxy congelado")
        self.link.execute_command("CLIENT", "UNPAUSE")

        def ready():
            """Diz se só restam as requisições presas no congelado, e se há tarefa feita entre elas (bool)."""
            stuck = {item.number for item in fresh if not item.head}
            return all(item.ended or not item.head for item in fresh) and stuck & set(self.made())

        self.pump(ready, "uma tarefa feita por um proxy congelado")
        self.kill(victim)
        self.pump(lambda: not self.active, "o fim dos streams depois da segunda morte")
        return fresh

    def waiting(self):
        """Conta os proxies que esperam por uma escrita no Redis (int)."""
        return sum("b" in row["flags"] for row in self.link.client_list() if row["name"] == "py-ndjson-proxy")

    def come_back(self):
        """Faz uma tarefa de cada vez, até que o nginx volte a tentar um morto, passado o fail_timeout.

        Retorna:
            list: as requisições. Um POST que acha o morto passa a um vivo, e chega inteiro como os outros.
        """
        fresh = []
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            fresh.append(self.ask(after=True))
            self.pump(lambda: not self.active, "o fim de uma tarefa")
            self.pump(lambda: len(self.balancer.records()) == len(self.requests), "o log do nginx")
            if len(self.balancer.records()[fresh[-1].number]["tries"]) > 1:
                break
        return fresh

    def look_at_keys(self, names):
        """Confere as chaves que há quando todos os streams acabaram.

        Argumentos:
            names: nomes (UUID) das tarefas dos proxies mortos.

        Retorna:
            dict: stray (chaves que não são deles) e endless (sem validade, ou com uma maior que a pedida).
        """
        stray = endless = {"?"}
        deadline = time.monotonic() + patience / 4
        # O que é de um proxy vivo ele apaga logo; a lista sem validade, um proxy vivo a acha e lhe dá uma.
        while (stray or endless) and time.monotonic() < deadline:
            found = self.traces()
            stray = {name for name in found if not any(word in names for word in re.findall(r"[0-9a-f-]{36}", name))}
            endless = {name for name, age in found.items() if not 0 <= age <= expiry}
            time.sleep(0.05)
        return {"stray": sorted(stray), "endless": sorted(endless)}

    def watch_expiry(self):
        """Espera que as chaves dos proxies mortos sumam.

        Retorna:
            list: as que não sumiram.
        """
        deadline = time.monotonic() + expiry + patience
        while (found := self.traces()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return sorted(found)


def frozen(pid):
    """Diz se todas as threads de um processo estão paradas.

    Argumentos:
        pid: o processo.

    Retorna:
        bool: verdadeiro se estão.
    """
    stats = pathlib.Path(f"/proc/{pid}/task").glob("*/stat")
    return all(
        item.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] == "T" for item in stats
    )


def task_name(key):
    """Tira o nome da tarefa de uma chave.

    Argumentos:
        key: nome da chave.

    Retorna:
        str: o UUID.
    """
    return key[-36:]


def judge_load(made, fresh, records, victim):
    """Confere as tarefas da carga.

    Argumentos:
        made: número -> chaves, dos workers.
        fresh: as requisições.
        records: o log do nginx.
        victim: endereço do proxy morto.

    Retorna:
        dict: as contagens, e reasons, exemplos do que se perdeu.
    """
    told = dict.fromkeys(("whole", "broken", "short", "lost", "doubled", "foreign", "after", "passed_on", "unheard"), 0)
    told["reasons"] = []
    for item in fresh:
        tries, verdict = records[item.number]["tries"], item.verdict()
        on_victim = tries[-1][0] == victim
        state = verdict["state"]
        if state == "whole":
            told["whole"] += 1
        elif on_victim and state == "short":
            told["short"] += 1
        elif on_victim and not item.after and not verdict["gap"]:
            told["broken"] += 1
            told["unheard"] += not verdict["begun"]
        else:
            told["lost"] += 1
            told["reasons"].append(f"{item.number} por {tries}: {verdict['why']}")
        told["doubled"] += verdict["doubled"] or len(made.get(item.number, ())) > 1
        told["foreign"] += verdict["foreign"]
        told["after"] += item.after
        told["passed_on"] += len(tries) > 1
    return told


def judge_catch(made, fresh, records, dead):
    """Confere as requisições da segunda morte.

    Argumentos:
        made: número -> chaves, dos workers.
        fresh: as requisições.
        records: o log do nginx.
        dead: endereços do primeiro e do segundo morto.

    Retorna:
        dict: sent (enviadas ao segundo, sem resposta), tasks (as que já tinham feito a tarefa), wrong (exemplos do que
        não devia ser).
    """
    told = {"sent": 0, "tasks": 0, "wrong": []}
    for item in fresh:
        row, verdict = records[item.number], item.verdict()
        address, sent = row["tries"][-1]
        keys = len(made.get(item.number, ()))
        if address == dead[1] and sent:
            told["sent"] += 1
            told["tasks"] += keys
            right = row["status"] == "502" and verdict["state"] == "cut" and keys <= 1
        elif address == dead[0]:
            # O preço de nunca repetir um GET ou PUT: é a recusa que ensina ao nginx que o proxy caiu.
            right = row["status"] == "502" and item.method != "POST" and not keys
        else:
            right = verdict["state"] == "whole" and keys == 1
        if not right:
            told["wrong"].append(f"{item.method} {item.number} por {row['tries']}: {verdict['why']}, {keys} tarefas")
    return told


def resent(records):
    """Procura requisições que o nginx enviou a mais de um proxy.

    Argumentos:
        records: o log do nginx.

    Retorna:
        list: os números.
    """
    return sorted(number for number, row in records.items() if any(sent for _, sent in row["tries"][:-1]))


def prove(tasks, server, config):
    """Faz a prova inteira.

    Argumentos:
        tasks: quantas tarefas.
        server: HTTP_SERVER.
        config: configuração do nginx (pathlib.Path).

    Retorna:
        dict: os números, e failures, as promessas quebradas (lista de frases).
    """
    with fleet(server, config) as rigged:
        told = rigged.load(tasks)
        main = list(rigged.requests.values())
        second = rigged.catch()
        rigged.pump(lambda: len(rigged.balancer.records()) == len(rigged.requests), "o log do nginx")
        records = rigged.balancer.records()
        dead = [item.address for item in rigged.members[:2]]
        made = rigged.made()
        told |= judge_load(made, main, records, dead[0])
        told["caught"] = judge_catch(made, second, records, dead)
        orphans = {
            task_name(key)
            for number, row in records.items()
            if row["tries"][-1][0] in dead
            for key in made.get(number, ())
        }
        told["keys"] = rigged.look_at_keys(orphans)
        told["left"] = sum(any(name in key for name in orphans) for key in told["left"])
        late = rigged.come_back()
        told["back"] = judge_load(rigged.made(), late, rigged.balancer.records(), dead[0]) | {"tasks": len(late)}
        told["unexpired"] = rigged.watch_expiry()
        told["resent"] = resent(rigged.balancer.records())
        told["proxies"] = [
            sum(records[item.number]["tries"][-1][0] == part.address for item in main) for part in rigged.members
        ]
        told["workers"] = [len(report["tasks"]) for report in rigged.reports()]
        told["strange"] = sum((report["strange"] for report in rigged.reports()), [])
        told["logs"] = [part.name for part in rigged.members if "Traceback" in part.output()]
    told |= {"tasks": tasks, "server": server}
    told["failures"] = failures(told)
    return told


def failures(told):
    """Diz que promessas foram quebradas.

    Argumentos:
        told: os números.

    Retorna:
        list: frases; vazia se todas foram cumpridas.
    """
    caught, keys, back = told["caught"], told["keys"], told["back"]
    rules = [
        (
            told["lost"],
            f"{told['lost']} tarefas que não eram do proxy morto não chegaram inteiras: {told['reasons'][:3]}",
        ),
        (told["short"], f"{told['short']} tarefas do proxy morto acabaram curtas, mas com fim limpo"),
        (told["doubled"], f"{told['doubled']} tarefas dobradas"),
        (told["foreign"], f"{told['foreign']} tarefas com linhas alheias"),
        (told["resent"], f"requisições já enviadas foram reenviadas a outro proxy: {told['resent'][:5]}"),
        (caught["wrong"], f"depois da segunda morte: {caught['wrong'][:3]}"),
        (keys["stray"], f"chaves que não são dos proxies mortos ficaram: {keys['stray'][:3]}"),
        (keys["endless"], f"chaves sem validade, ou com validade maior que a pedida: {keys['endless'][:3]}"),
        (told["unexpired"], f"{len(told['unexpired'])} chaves não sumiram: {told['unexpired'][:3]}"),
        (back["whole"] != back["tasks"] or back["doubled"], f"passado o fail_timeout: {back['reasons'][:3]}"),
        (told["strange"], f"tarefas que não são as pedidas: {told['strange'][:3]}"),
        (told["logs"], f"Traceback no log de {told['logs']}"),
        # Uma prova em que nada se quebrou não prova nada.
        (told["broken"] <= told["unheard"], "nenhum streaming começado se quebrou: a morte não foi no meio"),
        (not told["left"], "o proxy morto não deixou chaves"),
        (not back["passed_on"], "passado o fail_timeout, o nginx não tentou o proxy morto"),
        (not caught["sent"], "na segunda morte, nenhuma requisição esperava por resposta"),
        (not all(told["proxies"]) or not all(told["workers"]), "algum proxy ou worker ficou sem tarefas"),
    ]
    return [text for wrong, text in rules if wrong]


def show(told):
    """Escreve o relatório.

    Argumentos:
        told: os números.

    Retorna:
        str: o texto, em markdown.
    """
    caught, back = told["caught"], told["back"]
    head = ("servidor", "tarefas", "inteiras", "quebradas pela morte", "curtas", "perdidas", "dobradas", "alheias")
    row = [told[name] for name in ("server", "tasks", "whole", "broken", "short", "lost", "doubled", "foreign")]
    head += ("segundos", "por proxy", "por worker")
    row += [f"{told['seconds']:.1f}", *(" + ".join(map(str, told[name])) for name in ("proxies", "workers"))]
    verdict = "\n".join(f"QUEBRADO: {text}" for text in told["failures"]) or "Todas as promessas cumpridas."
    return f"""\
| {" | ".join(head)} |
|{" --- |" * len(head)}
| {" | ".join(map(str, row))} |

Morte do proxy 1 depois de {told["killed_at"]} tarefas ({told["unheard"]} ainda sem cabeçalho). Feitas depois dela:
{told["after"]}; acharam o morto e passaram a outro: {told["passed_on"]}; reenviadas: {len(told["resent"])}.
Morte do proxy 2 com {caught["sent"]} requisições sem resposta, {caught["tasks"]} delas com a tarefa já feita: todas devem
receber 502 e não ser reenviadas; as que não cumprem isso, ou que foram a outro proxy e não acabaram bem: {len(caught["wrong"])}.
Passado o fail_timeout: {back["tasks"]} tarefas, {back["passed_on"]} acharam um morto e passaram ao vivo, {back["whole"]} inteiras.
Chaves na morte do proxy 1, das tarefas dele: {told["left"]}; sem sumir no fim (REDIS_TTL {expiry} s): {len(told["unexpired"])}.

{verdict}
"""


def main(argv):
    """Programa principal.

    Argumentos:
        argv: argumentos.

    Retorna:
        int: 0 se todas as promessas foram cumpridas; 1 se alguma se quebrou.
    """
    parser = argparse.ArgumentParser(prog="tests/bench/fleet", description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=3000, help="quantas tarefas, de 120 a 100000 (padrão: 3000)")
    parser.add_argument("--host", choices=("flask", "waitress"), default="flask", help="servidor HTTP dos proxies")
    parser.add_argument("--nginx", type=pathlib.Path, default=example, metavar="ARQUIVO", help="outra configuração")
    parser.add_argument("--json", type=pathlib.Path, metavar="ARQUIVO", help="grava também os números")
    given = parser.parse_args(argv)
    if not 120 <= given.tasks <= 100000:
        parser.error("--tasks vai de 120 a 100000")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda code, frame: sys.exit(128 + code))
    if not servers.find_redis() or not servers.find_program("nginx"):
        print("tests/bench/fleet: é preciso nginx, e redis-server ou valkey-server", file=sys.stderr)
        return 1
    servers.raise_limit()
    try:
        told = prove(given.tasks, given.host, given.nginx)
    except (rig.broken, servers.failure, OSError, redis.RedisError) as error:
        print(f"tests/bench/fleet: {error}", file=sys.stderr)
        return 1
    if given.json:
        given.json.write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(show(told))
    return 1 if told["failures"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
