#!/usr/bin/env python3
"""Percorre o caminho do operador num Debian de verdade, com o systemd como PID 1.

Roda como root dentro do sistema iniciado por packaging/test-debian, uma vez por fase:
    walk.py FASE PACOTE PACOTE_NOVO PACOTE_ALHEIO CLONE
PACOTE_ALHEIO é o mesmo pacote construído noutra versão do Debian. A fase 1 vai da instalação à véspera da
reinicialização; a 2, do sistema reiniciado à reinstalação; a 3 é de um sistema à parte, que tem o seu espaço de nomes
de usuário e nele nega os outros. Cada passo escreve uma linha, "ok nome (segundos)" ou "FALHOU nome: motivo";
as medidas saem como "medida nome = valor". Sai com erro se algum passo falhou.
"""

import contextlib
import http.client
import json
import os
import pathlib
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time

unit = "py-ndjson-proxy.service"
blue = "py-ndjson-proxy@azul.service"
conffile = pathlib.Path("/etc/py-ndjson-proxy.env")
original = pathlib.Path("/root/py-ndjson-proxy.env.original")
examples = pathlib.Path("/usr/share/doc/py-ndjson-proxy/examples")
redis_conf = pathlib.Path("/etc/redis/redis.conf")
tls = pathlib.Path("/etc/ssl/walk")
port = 8771
drain = 5.0


class failure(Exception):
    """Um passo não encontrou o que devia."""


# =============================================================================
# Ferramentas
# =============================================================================


def run(*command, check=True, timeout=120):
    """Roda um comando e devolve o que ele escreveu, com saída e erros juntos."""
    done = subprocess.run(
        command,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode != 0:
        raise failure(f"{' '.join(command)} saiu com {done.returncode}: {done.stdout.strip()[-1500:]}")
    return done.stdout


def status(*command):
    """Roda um comando e devolve só o código de saída."""
    return subprocess.run(
        command,
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        timeout=120,
    ).returncode


def expect(condition, what):
    """Exige uma condição; "what", um texto ou uma função que o monta, diz o que se viu de errado."""
    if not condition:
        raise failure(what() if callable(what) else what)


def eventually(predicate, timeout, what):
    """Espera a condição valer; devolve o que ela devolveu. "what" é como em expect."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise failure(f"em {timeout} s: {what() if callable(what) else what}")
        time.sleep(0.05)


def show(name, of=unit):
    """Lê uma propriedade da unidade."""
    return run("systemctl", "show", "--property", name, "--value", of).strip()


def active(of=unit):
    """Diz se a unidade está ativa."""
    return show("ActiveState", of) == "active"


def main_pid(of=unit):
    """Lê o PID do processo principal; 0 se não há."""
    return int(show("MainPID", of))


def now():
    """Marca o momento, para ler o diário a partir dele."""
    # O --after-cursor do Debian 12, com um filtro, pula a primeira linha.
    return f"--since=@{time.time():.6f}"


def journal(since, *options, of=unit):
    """Lê o diário da unidade desde a marca, só as mensagens."""
    run("journalctl", "--sync", "--quiet", check=False)
    return run("journalctl", since, "-q", "-o", "cat", "--no-pager", "-u", of, *options)


def configure(path=conffile, **values):
    """Acrescenta as configurações ao arquivo original, sem trocar dono nem permissões."""
    text = original.read_text(encoding="utf-8") if path == conffile else ""
    path.write_text(text + "".join(f"{name}={value}\n" for name, value in values.items()), encoding="utf-8")


def restart(of=unit):
    """Reinicia e exige que a unidade fique ativa."""
    run("systemctl", "reset-failed", of, check=False)
    run("systemctl", "restart", of)
    expect(active(of), f"{of} não ficou ativa depois do restart")


def drop_in(*names):
    """Deixa a unidade só com os acréscimos dados, copiados dos exemplos ou escritos na hora."""
    folder = pathlib.Path(f"/etc/systemd/system/{unit}.d")
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        folder.mkdir(parents=True, exist_ok=True)
        if "\n" in name:
            (folder / "walk.conf").write_text(name)
        else:
            run("install", "-D", "-m", "644", str(examples / name), str(folder / name))
    run("systemctl", "daemon-reload")


def redis(*command):
    """Manda um comando ao Redis pelo redis-cli, no database 1."""
    return run("redis-cli", "-n", "1", *command).strip()


def ask(method, path, body=None, at=port, host="127.0.0.1", timeout=20, **headers):
    """Faz um pedido e devolve a resposta com os cabeçalhos lidos e o corpo por ler."""
    connection = http.client.HTTPConnection(host, at, timeout=timeout)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse()


def ping(at=port, host="127.0.0.1"):
    """Devolve o status e o corpo de /ping."""
    answer = ask("GET", "/ping", at=at, host=host)
    return answer.status, answer.read().decode().strip()


class worker:
    """O redis-cli no papel de worker: assina o canal e lê os nomes das tarefas."""

    def __init__(self, channel="ndjson_jobs"):
        """Assina o canal e espera a confirmação."""
        self.process = subprocess.Popen(
            ["redis-cli", "-n", "1", "SUBSCRIBE", channel], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        self.take("subscribe", 2)

    def take(self, word, count):
        """Lê até a palavra dada e mais "count" linhas; devolve a última."""
        while self.process.stdout.readline().strip() != word:
            expect(self.process.poll() is None, "o redis-cli saiu")
        return [self.process.stdout.readline().strip() for _ in range(count)][-1]

    def next(self):
        """Espera a próxima tarefa; devolve a chave dela e o JSON lido do Redis."""
        key = self.take("message", 2)
        return key, json.loads(redis("GET", key))

    def __enter__(self):
        """Devolve o próprio worker."""
        return self

    def __exit__(self, *error):
        """Encerra o redis-cli."""
        self.process.terminate()
        self.process.wait()


def stream(at=port, path="/caminho", channel="ndjson_jobs", host="127.0.0.1"):
    """Passa uma tarefa inteira: duas linhas, a primeira recebida antes de a segunda existir."""
    with worker(channel) as hands:
        answer = ask("POST", path, '{"pergunta": "olá"}'.encode(), at=at, host=host)
        expect(answer.status == 200, lambda: f"status {answer.status}: {answer.read()}")
        key, task = hands.next()
        expect(task["body"] == '{"pergunta": "olá"}' and task["path"] == path, f"tarefa {task}")
        redis("RPUSH", task["task_list"], '{"n": 1}')
        expect(answer.readline() == b'{"n": 1}\n', "a primeira linha veio diferente")
        answer.first_line = time.monotonic()
        redis("RPUSH", task["task_list"], '{"n": 2}')
        redis("DEL", key)
        expect(answer.read() == b'{"n": 2}\n', "o resto veio diferente")
        eventually(
            lambda: redis("EXISTS", key, task["task_list"], task["task_list"] + ":taken") == "0",
            5,
            "sobraram chaves da tarefa no Redis",
        )
    return answer


def open_streams(count, at=port):
    """Abre streams sem linha nenhuma."""
    answers = [ask("POST", f"/vivo/{number}", b"{}", at=at) for number in range(count)]
    expect(all(answer.status == 200 for answer in answers), "um stream não abriu")
    return answers


@contextlib.contextmanager
def counting(what, at=port, channel="ndjson_jobs"):
    """Mantém três streams com uma linha numerada a cada 50 ms; na saída, cada um tem de ter todas, uma vez e em ordem."""
    arrivals, ending = [[] for _ in range(3)], threading.Event()

    def feed():
        """Empurra as linhas até a saída; devolve a elas o fim."""
        pushed = 0
        while not ending.wait(0.05):
            for _, task in tasks:
                print("RPUSH", task["task_list"], pushed, file=hands.stdin, flush=True)
            pushed += 1
        for key, _ in tasks:
            print("DEL", key, file=hands.stdin, flush=True)
        expected.extend(range(pushed))

    def read(answer, into):
        """Lê as linhas de um stream, com o momento de cada uma."""
        for line in answer:
            into.append((int(line), time.monotonic()))

    expected = []
    with (
        subprocess.Popen(
            ["redis-cli", "-n", "1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as hands,
        worker(channel) as hearing,
    ):
        answers = open_streams(3, at)
        tasks = [hearing.next() for _ in answers]
        threads = [threading.Thread(target=feed)]
        threads += [threading.Thread(target=read, args=pair) for pair in zip(answers, arrivals, strict=True)]
        for each in threads:
            each.start()
        try:
            eventually(lambda: all(len(each) > 4 for each in arrivals), 5, "as linhas não chegam")
            yield
            at_least = [len(each) + 4 for each in arrivals]
            eventually(
                lambda: all(len(each) > least for each, least in zip(arrivals, at_least, strict=True)),
                10,
                lambda: f"as linhas pararam em {[len(each) for each in arrivals]}",
            )
        finally:
            ending.set()
            for each in threads:
                each.join(20)
            hands.stdin.close()
    for each in arrivals:
        expect([number for number, _ in each] == expected, lambda each=each: f"de {len(expected)} linhas: {each}")
    pauses = [later - sooner for each in arrivals for (_, sooner), (_, later) in zip(each, each[1:], strict=False)]
    measure(f"maior pausa de uma linha: {what}", f"{max(pauses):.2f} s")


@contextlib.contextmanager
def knocking(what, at=port):
    """Abre vinte conexões por segundo, em /ping; na saída, todas têm de ter sido atendidas."""
    answers, threads, ending = [], [], threading.Event()

    def knock():
        """Pede uma vez."""
        try:
            answers.append(ping(at))
        except OSError as error:
            answers.append(error)

    def run_along():
        """Pede sem esperar pelas respostas."""
        while not ending.wait(0.05):
            threads.append(threading.Thread(target=knock))
            threads[-1].start()

    along = threading.Thread(target=run_along)
    along.start()
    try:
        yield
    finally:
        ending.set()
        along.join()
        for each in threads:
            each.join(30)
    missed = [each for each in answers if each != (200, "pong")]
    expect(not missed and len(answers) == len(threads), f"de {len(threads)} conexões: {missed}")
    measure(f"conexões não atendidas: {what}", f"0 de {len(answers)}")


def is_open(at=port):
    """Diz se há quem escute na porta."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", at)) == 0


def reload(of=unit):
    """Recarrega, espera que o programa novo atenda e exige que o processo seja o mesmo."""
    pid, mark = main_pid(of), now()
    run("systemctl", "reload", of)
    # O systemctl não espera pelo fim da recarga.
    eventually(lambda: "pronto: " in journal(mark, of=of) and active(of), 10, f"{of} não recarregou")
    expect(main_pid(of) == pid, f"{of} não é mais o processo {pid}")


def stop_with_streams(limit):
    """Para o serviço com três streams vivos; devolve quanto demorou."""
    answers = open_streams(3)
    began = time.monotonic()
    run("systemctl", "stop", unit)
    took = time.monotonic() - began
    for answer in answers:
        text = answer.read()
        expect(text == b'{"error": "shutdown"}\n', f"um stream acabou com {text!r}")
    expect(show("Result") == "success", f"Result={show('Result')}")
    expect(show("ActiveState") == "inactive", f"ActiveState={show('ActiveState')}")
    expect(took <= limit, f"parar levou {took:.1f} s")
    expect(redis("KEYS", "ndjson_*") == "", "sobraram chaves no Redis")
    return took


def apt(*arguments):
    """Roda o apt-get como o operador: sem perguntas, e com a escolha de manter o arquivo editado."""
    return run(
        "apt-get", "-y", "-o", "Dpkg::Use-Pty=0", "-o", "Dpkg::Options::=--force-confold", *arguments, timeout=300
    )


def measure(name, value):
    """Escreve uma medida."""
    print(f"medida {name} = {value}", flush=True)


steps = {1: [], 2: [], 3: []}


def step(phase):
    """Inscreve um passo numa fase; o nome dele é a sua documentação."""

    def add(function):
        """Inscreve a função."""
        steps[phase].append((function.__doc__.rstrip("."), function))
        return function

    return add


# =============================================================================
# Fase 1: da instalação à véspera da reinicialização
# =============================================================================


@step(1)
def install():
    """apt install traz o Redis e deixa o serviço ativo e habilitado, sem ser root."""
    expect(shutil.which("redis-server") is None, "o Redis já estava instalado")
    began = time.monotonic()
    apt("install", package)
    # Nada é esperado: quando o apt devolve o terminal, o serviço já atende.
    expect(active(), lambda: f"inativo ao fim do apt install: {run('systemctl', 'status', unit, check=False)}")
    measure("apt install", f"{time.monotonic() - began:.1f} s")
    measure("do apt install à primeira linha", f"{stream().first_line - began:.1f} s")
    expect(run("systemctl", "is-enabled", unit).strip() == "enabled", "não está habilitado")
    expect(run("systemctl", "is-active", "redis-server").strip() == "active", "o Redis não está ativo")
    owner = pathlib.Path(f"/proc/{main_pid()}").owner()
    expect(owner == "py-ndjson-proxy", f"o processo é de {owner}")
    shutil.copy2(conffile, original)


@step(1)
def conffile_mode():
    """O arquivo de configuração nasce 0640 root:py-ndjson-proxy."""
    check_conffile()
    listed = run("sh", "-c", f"dpkg-deb -c {package} | grep etc/py-ndjson-proxy.env")
    expect(listed.startswith("-rw-r----- root/root"), f"no pacote: {listed}")


def check_conffile():
    """Confere dono e permissões do arquivo de configuração."""
    mode = run("stat", "-c", "%a %U %G", str(conffile)).strip()
    expect(mode == "640 root py-ndjson-proxy", f"está {mode}")


@step(1)
def contents():
    """O pacote traz os manuais, em inglês e português, a completação, os exemplos e o README."""
    listed = run("dpkg", "-L", "py-ndjson-proxy").splitlines()
    for name in (
        "man/man8/py-ndjson-proxy.8.gz",
        "man/man5/py-ndjson-proxy.env.5.gz",
        "man/pt_BR/man8/py-ndjson-proxy.8.gz",
        "man/pt_BR/man5/py-ndjson-proxy.env.5.gz",
        "bash-completion/completions/py-ndjson-proxy",
        "doc/py-ndjson-proxy/README.md.gz",
        "doc/py-ndjson-proxy/examples/worker.py",
        "doc/py-ndjson-proxy/examples/localhost-only.conf",
        "doc/py-ndjson-proxy/examples/container.conf",
    ):
        expect(f"/usr/share/{name}" in listed and os.path.exists(f"/usr/share/{name}"), f"falta /usr/share/{name}")
    expect(os.path.realpath("/usr/bin/py-ndjson-proxy") == "/usr/share/py-ndjson-proxy/json-proxy.py", "outro programa")


@step(1)
def answer_ping():
    """/ping responde 200 pong."""
    expect(ping() == (200, "pong"), f"{ping()}")


@step(1)
def clean_journal():
    """O diário: uma linha por tarefa, nada além de info, sem aviso de servidor de desenvolvimento."""
    mark = now()
    stream(path="/diario")
    eventually(lambda: "caminho=/diario" in journal(mark), 5, "a linha da tarefa não apareceu")
    lines = [line for line in journal(mark).splitlines() if "caminho=/diario" in line]
    expect(len(lines) == 1, f"{len(lines)} linhas: {lines}")
    fields = dict(field.partition("=")[::2] for field in lines[0].split())
    expect(fields["fim"] == "concluida" and fields["linhas"] == "2" and fields["bytes"] == "18", f"{lines[0]}")
    expect("olá" not in lines[0], "o conteúdo da tarefa está no diário")
    everything = run("journalctl", "-q", "-o", "cat", "--no-pager", "-u", unit)
    expect("development" not in everything.lower(), "há aviso de servidor de desenvolvimento")
    noise = run("journalctl", "-q", "--no-pager", "-p", "warning", "-u", unit)
    expect(noise == "", f"journalctl -p warning: {noise}")
    # A unidade não pode gerar avisos do próprio systemd (chaves que a versão daqui não conhece).
    noise = run("sh", "-c", "journalctl -q --no-pager -p warning _PID=1 | grep -i ndjson || true")
    expect(noise == "", f"o systemd reclama: {noise}")
    verify = run("systemd-analyze", "verify", "--man=no", unit, "py-ndjson-proxy@x.service", check=False)
    expect("ndjson" not in verify, f"systemd-analyze verify: {verify}")


@step(1)
def exposure():
    """systemd-analyze security: no máximo 1.1; 0.9 só local; e os descritores bastam a MAX_STREAMS."""

    def overall():
        """Lê a exposição da unidade."""
        text = run("systemd-analyze", "security", "--no-pager", unit)
        return float(re.search(r"Overall exposure level for \S+ ([0-9.]+)", text).group(1))

    value = overall()
    measure("exposição", value)
    expect(value <= 1.1, f"exposição {value}")
    process = pathlib.Path(f"/proc/{main_pid()}/status").read_text()
    for line in ("CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
        expect(line in process, f"falta {line!r} em /proc/PID/status")
    expect(int(show("LimitNOFILE")) > 4096 + 1024, "LimitNOFILE curto")
    # Um endereço desta máquina que não é o de localhost faz o papel do vizinho.
    run("ip", "address", "add", "192.0.2.1/32", "dev", "lo")
    expect(ping(host="192.0.2.1") == (200, "pong"), "sem o acréscimo, 192.0.2.1 devia atender")
    drop_in("localhost-only.conf")
    restart()
    value = overall()
    measure("exposição só local", value)
    expect(value <= 0.9, f"exposição {value} com localhost-only.conf")
    stream()
    try:
        connection = socket.create_connection(("192.0.2.1", port), timeout=2)
    except OSError:
        connection = None
    expect(connection is None, "192.0.2.1 ainda atende com localhost-only.conf")
    drop_in()
    restart()


@step(1)
def status_text():
    """systemctl status conta os streams vivos e as tarefas."""
    answers = open_streams(2)
    eventually(
        lambda: "Redis no ar; streams vivos: 2" in run("systemctl", "status", "--no-pager", unit),
        15,
        lambda: f"systemctl status não mostra: {show('StatusText')!r}",
    )
    for answer in answers:
        answer.close()
    for key in redis("KEYS", "ndjson_task_*").split():
        redis("DEL", key)


@step(1)
def smoke():
    """O autopkgtest do pacote passa."""
    done = subprocess.run(
        [f"{clone}/debian/tests/smoke"],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    expect(done.returncode == 0, f"saiu com {done.returncode}: {done.stdout} {done.stderr}")
    # O autopkgtest dá por falha qualquer coisa na saída de erros.
    expect(done.stderr == "", f"na saída de erros: {done.stderr}")


@step(1)
def edit():
    """HTTP_PORT e SERVERNAME (com espaços) editados valem depois do restart."""
    run(
        "sed",
        "-i",
        "-e",
        "s/^#HTTP_PORT=.*/HTTP_PORT=8080/",
        "-e",
        "s/^#SERVERNAME=.*/SERVERNAME=Meu Servidor 1.0/",
        str(conffile),
    )
    check_conffile()
    run("systemctl", "restart", "py-ndjson-proxy")
    answer = stream(at=8080)
    expect(answer.headers.get_all("Server") == ["Meu Servidor 1.0"], f"Server: {answer.headers.get_all('Server')}")
    expect(
        "SERVERNAME = Meu Servidor 1.0  (arquivo /etc/py-ndjson-proxy.env)" in run("py-ndjson-proxy", "--check"),
        "--check não mostra o valor e o arquivo",
    )


@step(1)
def bad_value():
    """Um valor ruim: a unidade falha, o diário diz nome, valor e arquivo, e ela não insiste."""
    mark = now()
    configure(HTTP_PORT="oitenta")
    expect(status("systemctl", "restart", unit) != 0, "o restart devia falhar")
    text = journal(mark, "-p", "err", "_PID=" + show("ExecMainPID"))
    for word in ("HTTP_PORT", "'oitenta'", "/etc/py-ndjson-proxy.env", "65535"):
        expect(word in text, f"falta {word} em: {text}")
    # "auto-restart" seria o estado de quem ainda vai insistir.
    found = [show(name) for name in ("ActiveState", "SubState", "ExecMainStatus", "NRestarts")]
    expect(found == ["failed", "failed", "2", "0"], f"{found}")
    expect(journal(mark).count("oitenta") == 1, "repetiu a falha")


@step(1)
def mended():
    """Corrigido o valor, o serviço volta."""
    configure()
    run("systemctl", "restart", unit)
    stream()


@step(1)
def secrets():
    """Nenhum segredo no diário nem em --check."""
    mark = now()
    redis("CONFIG", "SET", "requirepass", "abacaxi-azul")
    try:
        configure(REDIS_PASSWORD="'senha-errada-77'")
        expect(status("systemctl", "restart", unit) != 0, "o restart devia falhar com a senha errada")
        expect("senha-errada-77" not in run("py-ndjson-proxy", "--check", check=False), "a senha está no --check")
        configure(REDIS_PASSWORD="'abacaxi-azul'")
        eventually(active, 15, "não subiu sozinho depois de a senha ser corrigida")
        expect(ping() == (200, "pong"), f"{ping()}")
        text = journal(mark)
        expect("senha-errada-77" not in text and "abacaxi-azul" not in text, f"a senha está no diário: {text}")
        expect("REDIS_PASSWORD = ********" in run("py-ndjson-proxy", "--check"), "--check não mascara a senha")
    finally:
        run("redis-cli", "-a", "abacaxi-azul", "--no-auth-warning", "CONFIG", "SET", "requirepass", "", check=False)
        configure()
        restart()


@step(1)
def redis_down():
    """Redis parado: /ping 500, stream 504, e o diário diz uma vez só."""
    mark = now()
    run("systemctl", "stop", "redis-server")
    for _ in range(3):
        expect(ping()[0] == 500, f"/ping: {ping()}")
        answer = ask("POST", "/sem-redis", b"{}")
        expect(answer.status == 504 and json.loads(answer.read())["error"] == "redis_unavailable", f"{answer.status}")
    eventually(
        lambda: "Redis fora do ar; streams vivos: 0" in show("StatusText"), 15, lambda: f"STATUS: {show('StatusText')}"
    )
    warnings = journal(mark, "-p", "warning")
    expect(warnings.count("Redis fora do ar") == 1, f"{warnings}")
    expect(active(), "o serviço caiu junto com o Redis")


@step(1)
def redis_back():
    """De volta o Redis, o serviço volta sem reiniciar."""
    mark = now()
    pid = main_pid()
    run("systemctl", "start", "redis-server")
    eventually(lambda: ping() == (200, "pong"), 10, "/ping não voltou")
    expect(main_pid() == pid, "o serviço reiniciou")
    stream()
    eventually(lambda: "Redis de volta" in journal(mark), 5, "o diário não diz que o Redis voltou")


@step(1)
def patience():
    """Reiniciado sem Redis, insiste a cada 5 s, com uma linha por tentativa, e sobe sozinho quando o Redis volta."""
    run("systemctl", "stop", "redis-server")
    expect(status("systemctl", "restart", unit) != 0, "o restart devia falhar sem o Redis")
    mark, began = now(), time.monotonic()
    eventually(
        lambda: int(show("NRestarts")) >= 2 and show("ExecMainStatus") == "1",
        30,
        lambda: f"não insistiu: NRestarts={show('NRestarts')}, ExecMainStatus={show('ExecMainStatus')}",
    )
    took, tries = time.monotonic() - began, int(show("NRestarts"))
    expect(took > 4.9 * tries, f"{tries} tentativas em {took:.1f} s")
    said = journal(mark, "-t", "py-ndjson-proxy").splitlines()
    expect(len(said) <= tries, f"{tries} tentativas, {len(said)} linhas: {said}")
    began = time.monotonic()
    run("systemctl", "start", "redis-server")
    eventually(active, 15, "não subiu sozinho")
    measure("de volta depois do Redis", f"{time.monotonic() - began:.1f} s")
    stream()


@step(1)
def killed():
    """kill -9: de volta em segundos."""
    pid = main_pid()
    began = time.monotonic()
    os.kill(pid, 9)
    eventually(lambda: active() and main_pid() not in (0, pid), 20, "não voltou")
    measure("de volta depois do kill -9", f"{time.monotonic() - began:.1f} s")
    stream()


@step(1)
def stopped():
    """SIGSTOP depois de um reload: o watchdog traz de volta, em WatchdogSec; aqui, menos que os 30 s da unidade."""
    expect(show("WatchdogUSec") == "30s", f"WatchdogUSec={show('WatchdogUSec')}")
    drop_in("[Service]\nWatchdogSec=4\n")
    restart()
    # A recarga não o desliga, nem ele a mata.
    reload()
    pid = main_pid()
    time.sleep(10)
    expect(main_pid() == pid and show("NRestarts") == "0", "o watchdog agiu depois da recarga")
    mark = now()
    began = time.monotonic()
    os.kill(pid, 19)
    eventually(lambda: active() and main_pid() not in (0, pid), 40, "o watchdog não agiu")
    measure("de volta depois do SIGSTOP", f"{time.monotonic() - began:.1f} s")
    expect("Watchdog timeout" in journal(mark), "o diário não diz que foi o watchdog")
    stream()
    drop_in()


@step(1)
def reloaded():
    """systemctl reload: os valores novos valem, o processo é o mesmo, e nenhum cliente nota, nos dois servidores HTTP."""
    for server in ("flask", "waitress"):
        configure(HTTP_SERVER=server)
        restart()
        with knocking(f"reload ({server})"), counting(f"reload ({server})"):
            configure(HTTP_SERVER=server, SERVERNAME="Recarregado")
            began = time.monotonic()
            reload()
            measure(f"systemctl reload ({server})", f"{time.monotonic() - began:.2f} s")
            name = ask("GET", "/ping").getheader("Server")
            expect(name == "Recarregado", f"depois do reload, Server: {name}")
            # O outro servidor HTTP.
            configure(HTTP_SERVER="waitress" if server == "flask" else "flask")
            reload()
    with counting("reload com outra porta"):
        configure(HTTP_PORT=8781)
        reload()
        expect(ping(8781) == (200, "pong"), "a porta nova não atende")
        eventually(lambda: not is_open(), 5, "a porta velha ficou aberta")
        configure()
        reload()
    stream()


@step(1)
def not_reloaded():
    """reload recusado: com um valor errado ou o Redis fora do ar ele falha, o diário diz por quê, e nada muda."""
    pid = main_pid()
    with counting("reload recusado"):
        mark = now()
        configure(HTTP_PORT="oitenta", SERVERNAME="outro")
        expect(status("systemctl", "reload", unit) != 0, "o reload devia falhar")
        text = journal(mark, "-p", "err")
        for word in ("HTTP_PORT", "'oitenta'", "/etc/py-ndjson-proxy.env", "65535"):
            expect(word in text, f"falta {word} em: {text}")
        # Sem passar pelo systemctl, quem recusa é o próprio programa.
        mark = now()
        os.kill(pid, 1)
        eventually(lambda: "'oitenta'" in journal(mark, "-p", "err"), 10, "o programa não disse por que recusou")
        eventually(active, 5, "o systemd ainda espera pela recarga")
        expect(main_pid() == pid and ask("GET", "/ping").getheader("Server") == "py-ndjson-proxy", "algo mudou")
    configure()
    mark = now()
    run("systemctl", "stop", "redis-server")
    try:
        expect(status("systemctl", "reload", unit) != 0, "o reload devia falhar sem o Redis")
        text = journal(mark, "-p", "err")
        expect("não atende" in text, f"o diário não diz por quê: {journal(mark)}")
        expect(active() and main_pid() == pid, "algo mudou")
    finally:
        run("systemctl", "start", "redis-server")
    eventually(lambda: ping() == (200, "pong"), 10, "/ping não voltou")
    reload()
    stream()


@step(1)
def nobody_refused():
    """restart e kill -9 não recusam ninguém; parado, ou caído por uma configuração errada, a porta está fechada."""
    for server in ("flask", "waitress"):
        configure(HTTP_SERVER=server)
        restart()
        expect(show("NFileDescriptorStore") == "1", "o systemd não guardou o socket")
        with knocking(f"restart ({server})"):
            restart()
        pid = main_pid()
        os.kill(pid, 9)
        eventually(lambda pid=pid: main_pid() != pid, 5, "não morreu")
        with knocking(f"kill -9 ({server})"):
            eventually(lambda pid=pid: active() and main_pid() not in (0, pid), 20, "não voltou")
        reload()
        eventually(lambda: show("NFileDescriptorStore") == "1", 5, "o socket se perdeu na recarga")
    run("systemctl", "stop", unit)
    # O systemd solta o socket um instante depois.
    eventually(lambda: not is_open(), 5, "parado, a porta está aberta")
    configure(HTTP_PORT=8781)
    restart()
    expect(is_open(8781), "a porta nova está fechada")
    eventually(lambda: not is_open(), 5, "a porta velha ficou aberta")
    configure()
    restart()
    expect(is_open(), "a porta está fechada")
    eventually(lambda: not is_open(8781), 5, "a porta velha ficou aberta")
    configure(HTTP_PORT="oitenta")
    expect(status("systemctl", "restart", unit) != 0, "o restart devia falhar")
    eventually(lambda: not is_open(), 5, "caído, a porta está aberta")
    configure()
    restart()


@step(1)
def silent_resolver():
    """WatchdogSec=4, e por 15 s nem Redis nem quem resolva o nome dele: os streams e o serviço vivem, e tudo volta."""
    hosts, resolver = pathlib.Path("/etc/hosts"), pathlib.Path("/etc/resolv.conf")
    original_hosts = hosts.read_text()
    named = original_hosts + "127.0.0.1 redis-distante\n"
    addresses = ("127.0.0.51", "127.0.0.52", "127.0.0.53")
    with contextlib.ExitStack() as stack:
        for address in addresses:
            # Recebe e não responde.
            stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)).bind((address, 53))
        stack.callback(resolver.unlink)
        resolver.write_text("options timeout:2 attempts:1\n" + "".join(f"nameserver {each}\n" for each in addresses))
        stack.callback(hosts.write_text, original_hosts)
        hosts.write_text(named)
        drop_in("[Service]\nWatchdogSec=4\n")
        configure(REDIS_SERVER="redis-distante:6379/1", HEARTBEAT=500, HEARTBEAT_LINE="'{\"vivo\": true}'")
        restart()
        pid = main_pid()
        (answer,) = open_streams(1)
        hosts.write_text(original_hosts)
        for kind in ("normal", "pubsub"):
            redis("CLIENT", "KILL", "TYPE", kind)
        ending = time.monotonic() + 15
        while (began := time.monotonic()) < ending:
            expect(answer.readline() == b'{"vivo": true}\n', "o stream acabou")
            expect(time.monotonic() - began < 1.5, f"um heartbeat demorou {time.monotonic() - began:.1f} s")
        answer.close()
        expect(main_pid() == pid, "o watchdog matou o serviço")
        expect(ping()[0] == 500, "/ping devia acusar o Redis")
        hosts.write_text(named)
        eventually(lambda: ping() == (200, "pong"), 20, "não voltou")
        stream()
        expect(main_pid() == pid and show("NRestarts") == "0", "o serviço reiniciou")
    drop_in()
    configure()
    restart()


@step(1)
def stop_flask():
    """Parar com streams vivos: cada um recebe a linha de shutdown, em DRAIN + 2 s, ainda que TimeoutStopSec seja menor."""
    drop_in("[Service]\nTimeoutStopSec=2\n")
    restart()
    took = stop_with_streams(drain + 2)
    measure("parar com 3 streams (flask)", f"{took:.1f} s")
    expect(took > 4, "parou antes de DRAIN")
    drop_in()
    restart()


@step(1)
def full_house():
    """MAX_STREAMS=4096 streams vivos cabem na unidade; um a mais recebe 503."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
    configure(MAXTIME="600000", DRAIN="0", LOG_LEVEL="warning")
    restart()
    began = time.monotonic()
    connections = []
    with worker("ndjson_jobs") as hands:
        for _ in range(32):
            batch = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(128)]
            for connection in batch:
                connection.sendall(b"POST /cheio HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            for connection in batch:
                expect(connection.recv(12) == b"HTTP/1.1 200", "um stream foi recusado")
            connections += batch
            hands.take("message", 2)
        took = time.monotonic() - began
        answer = ask("POST", "/a-mais", b"{}")
        expect(answer.status == 503 and answer.getheader("Retry-After"), f"o 4097º recebeu {answer.status}")
        expect(ping() == (200, "pong"), "/ping não atende com a casa cheia")
        pid = main_pid()
        threads = int(re.search(r"Threads:\t(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text()).group(1))
        files = len(os.listdir(f"/proc/{pid}/fd"))
        measure("4096 streams", f"abertos em {took:.1f} s; {threads} threads e {files} descritores")
        expect(threads <= 40 and threads < int(show("TasksMax")) * 0.75, f"{threads} threads")
        expect(4096 < files < int(show("LimitNOFILE")) * 0.75, f"{files} descritores")
        run("systemctl", "stop", unit)
    expect(show("Result") == "success", f"Result={show('Result')}")
    ended = 0
    for connection in connections:
        text = b""
        while piece := connection.recv(65536):
            text += piece
        ended += b'{"error": "shutdown"}\n' in text
        connection.close()
    expect(ended == 4096, f"só {ended} streams receberam a linha de shutdown")
    eventually(lambda: redis("DBSIZE") == "0", 5, lambda: f"sobraram {redis('DBSIZE')} chaves no Redis")
    configure()
    restart()


@step(1)
def with_waitress():
    """HTTP_SERVER=waitress: tudo igual, protegido do mesmo jeito."""
    mark = now()
    configure(HTTP_SERVER="waitress", DRAIN="2000")
    run("systemctl", "restart", unit)
    stream()
    expect(ping() == (200, "pong"), f"{ping()}")
    expect("(waitress)" in journal(mark), "o diário não diz waitress")
    measure("parar com 3 streams (waitress)", f"{stop_with_streams(4):.1f} s")
    restart()


@step(1)
def every_function():
    """Métricas, inclusive as do processo, CORS, token, fila e heartbeat, nos dois servidores, na unidade como vem."""
    apt("install", "python3-prometheus-client")
    origin, token = "https://exemplo.com.br", "abacaxi-azul-123"
    for server in ("flask", "waitress"):
        configure(
            HTTP_SERVER=server,
            METRICS_PORT=9771,
            CORS_ORIGIN=origin,
            AUTH_TOKEN=token,
            REDIS_QUEUE="fila",
            HEARTBEAT=200,
            HEARTBEAT_LINE="'{\"vivo\": true}'",
        )
        restart()
        expect(ask("POST", "/sem-token", b"{}").status == 401, "atendeu sem o token")
        answer = ask("OPTIONS", "/tudo", Origin=origin, Access_Control_Request_Method="POST")
        expect(answer.getheader("Access-Control-Allow-Origin") == origin, f"OPTIONS: {answer.getheaders()}")
        answer = ask("POST", "/tudo", b"{}", Origin=origin, Authorization=f"Bearer {token}")
        expect(answer.getheader("Access-Control-Allow-Origin") == origin, f"POST: {answer.getheaders()}")
        key = redis("LPOP", "fila")
        expect(answer.readline() == b'{"vivo": true}\n', "não veio o heartbeat")
        redis("RPUSH", json.loads(redis("GET", key))["task_list"], "{}")
        redis("DEL", key)
        expect(answer.read().endswith(b"{}\n"), "o resto veio diferente")
        text = ask("GET", "/metrics", at=9771).read().decode()
        found = set(re.findall(r"^ndjson_proxy_process_(\w+) [0-9.e+]+$", text, re.M))
        names = "virtual_memory_bytes resident_memory_bytes start_time_seconds cpu_seconds_total open_fds max_fds"
        expect(found == set(names.split()), f"métricas do processo: {found}")
    configure()
    restart()


@step(1)
def other_redis():
    """Redis por socket unix e por TLS, nos dois servidores HTTP."""
    tls.mkdir(parents=True)
    run(
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        str(tls / "key.pem"),
        "-out",
        str(tls / "cert.pem"),
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
    )
    run("chown", "-R", "redis", str(tls))
    run("systemctl", "stop", unit)
    with redis_conf.open("a") as file:
        file.write(
            "\nunixsocket /run/redis/redis-server.sock\nunixsocketperm 770\ntls-port 6390\n"
            f"tls-cert-file {tls}/cert.pem\ntls-key-file {tls}/key.pem\n"
            f"tls-ca-cert-file {tls}/cert.pem\ntls-auth-clients no\n"
        )
    run("systemctl", "restart", "redis-server")
    drop_in("redis-socket.conf")
    addresses = ("unix:///run/redis/redis-server.sock?db=1", f"rediss://localhost:6390/1?ssl_ca_certs={tls}/cert.pem")
    for address in addresses:
        for server in ("flask", "waitress"):
            configure(REDIS_SERVER=address, HTTP_SERVER=server)
            restart()
            stream()
    drop_in()
    configure()
    restart()


@step(1)
def low_port():
    """low-port.conf permite a porta 80, e sem ele o diário diz por que não."""
    mark = now()
    configure(HTTP_PORT="80")
    expect(status("systemctl", "restart", unit) != 0, "a porta 80 devia ser negada")
    text = journal(mark, "-p", "err")
    expect("a porta 80" in text and "low-port.conf" in text, f"o diário não explica: {text}")
    drop_in("low-port.conf")
    restart()
    stream(at=80)
    drop_in()
    configure()
    restart()


@step(1)
def instances():
    """Duas instâncias lado a lado, cada uma com o seu arquivo sobre o comum."""
    configure(SERVERNAME="'nome comum'")
    for name, at in (("azul", 8781), ("verde", 8782)):
        path = pathlib.Path(f"/etc/py-ndjson-proxy@{name}.env")
        run("install", "-m", "640", "-g", "py-ndjson-proxy", "/dev/null", str(path))
        configure(
            path,
            HTTP_PORT=at,
            REDIS_CHANNEL=f"canal_{name}",
            REDIS_PREFIX=f"{name}_task_",
            REDIS_LIST_PREFIX=f"{name}_list_",
            METRICS_PORT=at + 1000,
        )
    run("systemctl", "enable", "--now", "py-ndjson-proxy@azul", "py-ndjson-proxy@verde")
    restart()
    check_instances()
    text = run("journalctl", "-q", "--no-pager", "-t", "py-ndjson-proxy@azul")
    expect("pronto: http://0.0.0.0:8781" in text, f"diário da instância: {text}")
    text = run("py-ndjson-proxy", "-f", f"{conffile}:/etc/py-ndjson-proxy@azul.env", "--check")
    expect("HTTP_PORT = 8781  (arquivo /etc/py-ndjson-proxy@azul.env)" in text, f"--check: {text}")
    expect(f"SERVERNAME = nome comum  (arquivo {conffile})" in text, f"--check: {text}")
    pids = [main_pid(of) for of in (unit, blue)]
    with counting("reload de uma instância", 8781, "canal_azul"):
        with pathlib.Path("/etc/py-ndjson-proxy@azul.env").open("a") as file:
            file.write("SERVERNAME=azul\n")
        reload(blue)
        expect(ask("GET", "/ping", at=8781).getheader("Server") == "azul", "o valor novo não vale")
        rows = [json.loads(line) for line in ask("GET", "/streams", at=9781).read().splitlines()]
        expect({row["path"] for row in rows} == {"/vivo/0", "/vivo/1", "/vivo/2"}, f"/streams: {rows}")
        run("sed", "-i", "$d", "/etc/py-ndjson-proxy@azul.env")
        run("systemctl", "reload", "py-ndjson-proxy*")
        eventually(
            lambda: ask("GET", "/ping", at=8781).getheader("Server") == "nome comum", 10, "nem todas recarregaram"
        )
    expect(pids == [main_pid(of) for of in (unit, blue)], "o processo mudou")
    check_instances()
    mark = now()
    run("systemctl", "start", "py-ndjson-proxy@sem-arquivo", check=False)
    text = journal(mark, of="py-ndjson-proxy@sem-arquivo.service")
    expect("/etc/py-ndjson-proxy@sem-arquivo.env não existe" in text, f"{text}")
    run("systemctl", "reset-failed", "py-ndjson-proxy@sem-arquivo")


def check_instances():
    """Confere a unidade e as duas instâncias, cada uma na sua porta e no seu canal."""
    for at, channel in ((port, "ndjson_jobs"), (8781, "canal_azul"), (8782, "canal_verde")):
        answer = stream(at=at, channel=channel)
        expect(answer.getheader("Server") == "nome comum", f"porta {at}: Server {answer.getheader('Server')}")


@step(1)
def twin_units():
    """As duas unidades só diferem no que devem."""

    def body(name):
        """Lê de uma unidade as linhas que têm de ser iguais na outra."""
        text = pathlib.Path(f"{clone}/systemd/{name}").read_text(encoding="utf-8")
        skip = ("#", "Description=", "SyslogIdentifier=", "Environment=ENV_FILE=")
        return [line for line in text.splitlines() if line and not line.startswith(skip)]

    expect(body("py-ndjson-proxy.service") == body("py-ndjson-proxy@.service"), "py-ndjson-proxy@.service destoa")


# =============================================================================
# Fase 2: do sistema reiniciado à reinstalação
# =============================================================================


@step(2)
def rebooted():
    """Reiniciado o sistema, o serviço e as instâncias estão no ar."""
    for of in (unit, blue, "py-ndjson-proxy@verde.service"):
        eventually(
            lambda of=of: active(of), 20, lambda of=of: f"{of} não subiu: {run('systemctl', 'status', of, check=False)}"
        )
        expect(show("NRestarts", of) == "0", f"{of} subiu antes do Redis (NRestarts={show('NRestarts', of)})")
    check_instances()


@step(2)
def upgrade():
    """upgrade com streams vivos e o arquivo editado: os streams e a edição ficam, e o programa novo é o que atende."""
    before = conffile.read_text(encoding="utf-8")
    pids, mark = [main_pid(of) for of in (unit, blue)], now()
    with knocking("upgrade"), counting("upgrade"), counting("upgrade da instância", 8781, "canal_azul"):
        apt("install", upgraded)
        for of in (unit, blue):
            eventually(lambda of=of: "pronto: " in journal(mark, of=of), 10, f"{of} não recarregou")
        expect(pids == [main_pid(of) for of in (unit, blue)], "não é o mesmo processo")
    expect(run("dpkg-query", "-W", "-f", "${Version}", "py-ndjson-proxy") == "99.0.0-1", "a versão não mudou")
    text = ask("GET", "/metrics", at=9781).read().decode()
    expect('version="99.0.0"' in text, "o programa ainda é o velho")
    expect(conffile.read_text(encoding="utf-8") == before, "a edição se perdeu")
    check_conffile()
    offered = pathlib.Path(f"{conffile}.dpkg-dist")
    expect("NOVO_PADRAO" in offered.read_text(encoding="utf-8"), "o novo padrão não foi deixado ao lado")
    expect(offered.stat().st_mode & 0o007 == 0, "o .dpkg-dist ficou legível por todos")
    check_instances()


@step(2)
def upgrade_restarts():
    """upgrade de um programa que não sabe recarregar, ou que recusa a recarga: reinicia uma vez."""
    # O que o distingue é não deixar o socket com o systemd, como nenhuma versão de antes da 1.1 deixa.
    drop_in("[Service]\nFileDescriptorStoreMax=0\n")
    restart()
    pids, mark = [main_pid(of) for of in (unit, blue)], now()
    apt("install", "--reinstall", upgraded)
    expect(active() and main_pid() != pids[0] and main_pid(blue) == pids[1], "não reiniciou, ou não só a unidade")
    text = journal(mark, "_PID=1")
    expect(text.count("Started ") == 1 and show("NRestarts") == "0", f"{text}")
    drop_in("[Service]\nIPAddressDeny=192.0.2.0/24\n")
    restart()
    before = conffile.read_text(encoding="utf-8")
    conffile.write_text(before + "HTTP_PORT=oitenta\n", encoding="utf-8")
    text = apt("install", "--reinstall", upgraded)
    expect(text.count("pede FileDescriptorStoreMax=0") == 1, f"não avisa que o filtro não valeria: {text}")
    expect(show("ExecMainStatus") == "2", f"ExecMainStatus={show('ExecMainStatus')}")
    conffile.write_text(before, encoding="utf-8")
    drop_in()
    restart()
    check_instances()


@step(2)
def upgrade_disabled():
    """upgrade não liga o que o operador desligou."""
    run("systemctl", "disable", "--now", unit)
    apt("install", "--reinstall", upgraded)
    expect(not active() and status("systemctl", "is-enabled", "-q", unit) != 0, "o upgrade religou o serviço")
    run("systemctl", "enable", "--now", unit)
    stream()


@step(2)
def remove():
    """remove: para tudo e conserva o arquivo de configuração."""
    before = conffile.read_text(encoding="utf-8")
    apt("remove", "py-ndjson-proxy")
    expect(conffile.read_text(encoding="utf-8") == before, "o arquivo mudou")
    check_conffile()
    expect(not list_processes(), f"processos vivos: {list_processes()}")
    expect(shutil.which("py-ndjson-proxy") is None, "o programa ficou")


def list_processes():
    """Lista os processos do programa."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if b"/usr/bin/py-ndjson-proxy\0" in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


@step(2)
def back_again():
    """Instalado de novo depois do remove: a edição vale, e as instâncias voltam."""
    apt("install", package)
    expect(active() and active(blue), "não voltaram")
    check_instances()


@step(2)
def purge():
    """purge não deixa arquivo, conta nem estado de unidade."""
    drop_in("localhost-only.conf")
    # Uma unidade parada na falha não pode ficar na lista de falhas.
    configure(HTTP_PORT="oitenta")
    run("systemctl", "restart", unit, check=False)
    apt("purge", "py-ndjson-proxy")
    # O certificado do passo do TLS ficaria sem dono quando o Redis também fosse removido.
    shutil.rmtree(tls, ignore_errors=True)
    check_purged()


def check_purged():
    """Procura o que um purge não deve deixar."""
    # De fora: o que este teste trouxe, o cache e os registros do apt e do dpkg, e o diário.
    found = run(
        "sh",
        "-c",
        "find / -xdev \\( -path /proc -o -path /root -o -path /var/log -o -path /var/cache/apt "
        "\\) -prune -o \\( -name '*ndjson*' -o -name '*json-proxy*' -o -nouser -o -nogroup \\) -print",
    )
    found += run("sh", "-c", "find /run /dev/shm /tmp /var/tmp -name '*ndjson*' -not -path '/run/log/*'")
    expect(found == "", f"ficaram: {found}")
    for database in ("passwd", "group", "shadow"):
        expect(status("getent", database, "py-ndjson-proxy") != 0, f"a conta ficou em {database}")
    text = run("systemctl", "list-units", "--all", "--no-legend", "*ndjson*") + run(
        "systemctl", "list-unit-files", "--no-legend", "*ndjson*", check=False
    )
    expect(text.strip() == "", f"o systemd ainda conhece: {text}")
    expect("py-ndjson-proxy" not in run("dpkg-query", "-W", "-f", "${Package} ${Status}\n"), "o dpkg ainda o lista")
    expect(run("systemctl", "--failed", "--no-legend").strip() == "", run("systemctl", "--failed"))


@step(2)
def reinstall():
    """Reinstalar depois do purge funciona, com o .deb do Debian 14, e com o Valkey onde ele existe."""
    extra = []
    if "Candidate: (none)" not in run("apt-cache", "policy", "valkey-server") and run(
        "apt-cache", "show", "valkey-server", check=False
    ).startswith("Package:"):
        apt("purge", "redis-server", "redis-tools")
        extra = ["valkey-server"]
        measure("reinstalado com", "valkey-server")
    apt("install", foreign, *extra)
    expect(active(), "não ficou ativo")
    check_conffile()
    expect(original.read_text(encoding="utf-8") == conffile.read_text(encoding="utf-8"), "não é o arquivo original")
    if extra:
        expect(shutil.which("redis-server") is None, "o Redis veio apesar do Valkey")
        expect(ping() == (200, "pong"), f"{ping()}")
        apt("purge", "valkey-server", "valkey-tools")
        expect(active(), "o serviço caiu com o Valkey")


@step(2)
def from_clone():
    """packaging/install, de um clone, instala tudo e devolve com o serviço no ar."""
    apt("purge", "py-ndjson-proxy", "redis-server", "redis-tools")
    check_purged()
    text = run(f"{clone}/packaging/install", timeout=400)
    expect(active(), f"não está no ar: {text[-1500:]}")
    expect("http://" in text, f"não diz onde atende: {text[-1500:]}")
    stream()
    check_conffile()
    # De novo, por cima: o mesmo número de versão, reinstalado.
    pid, mark = main_pid(), now()
    run(f"{clone}/packaging/install", timeout=400)
    eventually(lambda: "pronto: " in journal(mark), 10, "a segunda vez não recarregou")
    expect(main_pid() == pid, "a segunda vez reiniciou o serviço")


@step(2)
def from_clone_elsewhere():
    """packaging/install com um REDIS_SERVER de outra máquina não instala Redis, e diz que o serviço espera por ele."""
    apt("purge", "py-ndjson-proxy", "redis-server", "redis-tools")
    check_purged()
    conffile.write_text("REDIS_SERVER=192.0.2.1:6379/1\n", encoding="utf-8")
    began = time.monotonic()
    text = run(f"{clone}/packaging/install", timeout=400)
    measure("packaging/install sem Redis", f"{time.monotonic() - began:.1f} s")
    expect(shutil.which("redis-server") is None, f"o Redis foi instalado: {text[-1500:]}")
    expect("espera pelo Redis" in text and "192.0.2.1:6379/1" in text, f"não diz por quem espera: {text[-1500:]}")
    expect(not active() and show("SubState") in ("auto-restart", "start"), f"SubState={show('SubState')}")
    expect(conffile.read_text(encoding="utf-8") == "REDIS_SERVER=192.0.2.1:6379/1\n", "a configuração foi trocada")
    apt("purge", "py-ndjson-proxy")


# =============================================================================
# Fase 3: onde os espaços de nomes são negados
# =============================================================================


def allow(**limits):
    """Muda os limites de espaços de nomes do espaço de usuário deste sistema."""
    # O /proc/sys daqui é só para leitura; e sem espaços de montagem nada mais se monta.
    if not os.path.ismount("/mnt"):
        run("mount", "-t", "proc", "proc", "/mnt")
    for kind, limit in limits.items():
        pathlib.Path(f"/mnt/sys/user/max_{kind}_namespaces").write_text(str(limit))


@step(3)
def refused():
    """Sem espaços de nomes a unidade não inicia, e packaging/install diz o que instalar."""
    allow(user=0)
    done = subprocess.run(
        [f"{clone}/packaging/install"],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    expect(done.returncode == 1 and not active(), f"saiu com {done.returncode}: {done.stdout}")
    expect(done.stdout.count(f"instale {examples}/container.conf") == 1, f"não diz o que fazer: {done.stdout}")
    expect(show("ExecMainStatus") == "217", f"ExecMainStatus={show('ExecMainStatus')}")
    shutil.copy2(conffile, original)
    # Os de usuário permitidos, faltam os de montagem.
    allow(user=100, mnt=0, ipc=0, uts=0)
    expect(status("systemctl", "restart", unit) != 0, "iniciou sem espaços de nomes")
    expect(show("ExecMainStatus") == "226", f"ExecMainStatus={show('ExecMainStatus')}")


@step(3)
def contained():
    """Com container.conf ela inicia e atende, nos dois servidores HTTP."""
    # A unidade do Redis também não inicia.
    run("runuser", "-u", "redis", "--", "redis-server", "--daemonize", "yes", "--save", "", "--dir", "/tmp")
    drop_in("container.conf")
    allow(user=0)
    for server in ("flask", "waitress"):
        configure(HTTP_SERVER=server)
        restart()
        stream()
    text = run("systemd-analyze", "security", "--no-pager", unit)
    measure("exposição com container.conf", re.search(r"Overall exposure level for \S+ ([0-9.]+)", text).group(1))


# =============================================================================


def main():
    """Roda os passos da fase, um por um, e conta as falhas."""
    failed = 0
    for name, function in steps[phase]:
        began, mark = time.monotonic(), now()
        try:
            function()
        except Exception as error:
            failed += 1
            detail = str(error) if isinstance(error, failure) else f"{type(error).__name__}: {error}"
            print(f"FALHOU {name}: " + " | ".join(detail.splitlines()), flush=True)
            tail = run("journalctl", mark, "-q", "--no-pager", "-n", "25", "-u", "py-ndjson-proxy*", check=False)
            print("".join(f"    {line}\n" for line in tail.splitlines()), end="", flush=True)
            recover()
        else:
            print(f"ok {name} ({time.monotonic() - began:.1f} s)", flush=True)
    return 1 if failed else 0


def recover():
    """Devolve o sistema ao estado de repouso, para que uma falha não arraste os passos seguintes."""
    try:
        run("systemctl", "start", "redis-server", check=False)
        run("redis-cli", "FLUSHALL", check=False)
        if original.exists() and conffile.exists():
            drop_in()
            configure()
            restart()
    except (failure, OSError, subprocess.SubprocessError) as error:
        print(f"    não pude recuperar: {error}", flush=True)


if __name__ == "__main__":
    phase = int(sys.argv[1])
    package, upgraded, foreign, clone = sys.argv[2:6]
    sys.exit(main())
