#!/usr/bin/env python3
"""Percorre o caminho do operador num Debian de verdade, com o systemd como PID 1.

Roda como root dentro do sistema iniciado por packaging/test-debian, uma vez por fase:
    walk.py FASE
A fase 1 vai da instalação à véspera da reinicialização; a 2, do sistema reiniciado à reinstalação; a 3 é de um sistema
à parte, que tem o seu espaço de nomes de usuário e nele nega os outros. O que não depende da versão do Debian roda numa
só. Cada passo escreve uma linha, "ok nome (segundos)" ou "FALHOU nome: motivo"; as medidas saem como "medida nome =
valor". Sai com erro se algum passo falhou.

Em /root/pacotes: os repositórios 1 e 2, de packaging/install --repo, o segundo com uma versão mais alta; e foreign.deb,
o pacote construído noutra versão do Debian. Em /root/clone, o clone.
"""

import contextlib
import http.client
import json
import os
import pathlib
import platform
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
drop_ins = pathlib.Path(f"/etc/systemd/system/{unit}.d")
examples = pathlib.Path("/usr/share/doc/py-ndjson-proxy/examples")
tls = pathlib.Path("/etc/ssl/walk")
clone = pathlib.Path("/root/clone")
pool = pathlib.Path("/root/pacotes")
repository = pathlib.Path("/srv/apt")
source = pathlib.Path("/etc/apt/sources.list.d/py-ndjson-proxy.list")
keyring = pathlib.Path("/etc/apt/keyrings/py-ndjson-proxy.gpg")
package, upgraded, foreign = f"{pool}/1/*.deb", f"{pool}/2/*_99.*.deb", f"{pool}/foreign.deb"
servers = ("flask", "waitress")
suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
port = 8771


class failure(Exception):
    """Um passo não encontrou o que devia."""


# =============================================================================
# Ferramentas
# =============================================================================


def call(command):
    """Roda um comando do shell; devolve o que o subprocess conta dele, com saída e erros juntos."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, shell=True, check=False, timeout=400, **pipes)


def run(command):
    """Roda um comando do shell, que não pode falhar; devolve o que ele escreveu."""
    done = call(command)
    expect(done.returncode == 0, lambda: f"{command} saiu com {done.returncode}: {done.stdout.strip()[-1500:]}")
    return done.stdout


def fails(command):
    """Diz se um comando do shell sai com erro."""
    return call(command).returncode != 0


def expect(condition, what):
    """Exige uma condição; "what", um texto ou uma função que o monta, diz o que se viu de errado."""
    if not condition:
        raise failure(what() if callable(what) else what)


def equal(found, wanted):
    """Exige que o que se achou seja o que se queria."""
    expect(found == wanted, f"achei {found!r}, e não {wanted!r}")


def holds(text, *words):
    """Exige que o texto tenha todas as palavras; uma que comece com "!" não pode estar nele."""
    for word in words:
        expect((word[1:] not in text) if word[0] == "!" else (word in text), f"{word!r} em: {text[-1500:]}")


def eventually(predicate, timeout, what):
    """Espera a condição valer; devolve o que ela devolveu. "what" é como em expect."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        expect(time.monotonic() < deadline, lambda: f"em {timeout} s: {what() if callable(what) else what}")
        time.sleep(0.05)
    return value


def show(name, of=unit):
    """Lê uma propriedade da unidade."""
    return run(f"systemctl show --property {name} --value {of}").strip()


def active(of=unit):
    """Diz se a unidade está ativa."""
    return show("ActiveState", of) == "active"


def main_pid(of=unit):
    """Lê o PID do processo principal; 0 se não há."""
    return int(show("MainPID", of))


def exposure(of=unit):
    """Lê a exposição da unidade, segundo o systemd."""
    text = run(f"systemd-analyze security --no-pager {of}")
    return float(re.search(r"Overall exposure level for \S+ ([0-9.]+)", text).group(1))


def now():
    """Marca o momento, para ler o diário a partir dele."""
    # O --after-cursor do Debian 12, com um filtro, pula a primeira linha.
    return f"--since=@{time.time():.6f}"


def journal(since, options="", of=unit):
    """Lê o diário da unidade desde a marca, só as mensagens."""
    call("journalctl --sync --quiet")
    return call(f"journalctl {since} -q -o cat --no-pager -u {of} {options}").stdout


def configure(path=conffile, **values):
    """Acrescenta as configurações ao arquivo original, sem trocar dono nem permissões."""
    text = original.read_text(encoding="utf-8") if path == conffile else ""
    path.write_text(text + "".join(f"{name}={value}\n" for name, value in values.items()), encoding="utf-8")


def restart(of=unit):
    """Reinicia e exige que a unidade fique ativa."""
    call(f"systemctl reset-failed {of}")
    run(f"systemctl restart {of}")
    expect(active(of), f"{of} não ficou ativa depois do restart")


def serve(**values):
    """Reinicia o serviço com as configurações dadas, e só elas."""
    configure(**values)
    restart()


def refuses(action, *words, **values):
    """Exige que o restart ou o reload falhe com as configurações dadas, e que o diário diga por quê."""
    mark = now()
    configure(**values)
    expect(fails(f"systemctl {action} {unit}"), f"o {action} devia falhar")
    holds(journal(mark, "-p err"), *words)


def drop_in(*names):
    """Deixa a unidade só com os acréscimos dados, copiados dos exemplos ou escritos na hora."""
    shutil.rmtree(drop_ins, ignore_errors=True)
    for name in names:
        drop_ins.mkdir(parents=True, exist_ok=True)
        if "\n" in name:
            (drop_ins / "walk.conf").write_text(name)
        else:
            shutil.copyfile(examples / name, drop_ins / name)
    run("systemctl daemon-reload")


def settle():
    """Devolve o serviço ao que é depois de instalado, se um passo o mudou."""
    if original.exists() and (drop_ins.exists() or not active() or conffile.read_text() != original.read_text()):
        drop_in()
        serve()


class link:
    """Uma conexão ao Redis, no database 1."""

    def __init__(self):
        """Conecta-se."""
        self.socket = socket.create_connection(("127.0.0.1", 6379), timeout=20)
        self.file = self.socket.makefile("rb")
        self("SELECT", 1)

    def __call__(self, *words):
        """Manda um comando; devolve a resposta."""
        words = [str(word).encode() for word in words]
        head = b"*%d\r\n" % len(words)
        self.socket.sendall(head + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))
        return self.read()

    def read(self):
        """Lê uma resposta."""
        line = self.file.readline().decode()
        kind, text = line[:1], line[1:-2]
        expect(kind and kind != "-", f"o Redis respondeu {line!r}")
        if kind == "*":
            return [self.read() for _ in range(int(text))]
        if kind == "$":
            return None if text == "-1" else self.file.read(int(text) + 2)[:-2].decode()
        return int(text) if kind == ":" else text

    def task(self):
        """Espera o canal assinado dizer uma tarefa; devolve a chave dela e o JSON lido do Redis."""
        key = self.read()[2]
        return key, json.loads(redis("GET", key))


def redis(*words):
    """Manda um comando ao Redis; devolve a resposta."""
    return link()(*words)


def listen(channel="ndjson_jobs"):
    """Assina um canal, como um worker; devolve a conexão."""
    hearing = link()
    hearing("SUBSCRIBE", channel)
    return hearing


def ask(method, path, body=None, at=port, host="127.0.0.1", **headers):
    """Faz um pedido e devolve a resposta com os cabeçalhos lidos e o corpo por ler."""
    connection = http.client.HTTPConnection(host, at, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse()


def server_name(at=port):
    """Devolve o cabeçalho Server."""
    return ask("GET", "/ping", at=at).getheader("Server")


def ping(at=port, host="127.0.0.1"):
    """Devolve o status e o corpo de /ping."""
    answer = ask("GET", "/ping", at=at, host=host)
    return answer.status, answer.read().decode().strip()


def is_open(at=port):
    """Diz se há quem escute na porta."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", at)) == 0


def closes(at=port):
    """Espera que ninguém mais escute na porta."""
    # O systemd solta o socket um instante depois.
    eventually(lambda: not is_open(at), 5, f"a porta {at} ficou aberta")


def stream(at=port, path="/caminho", channel="ndjson_jobs"):
    """Passa uma tarefa inteira: duas linhas, a primeira recebida antes de a segunda existir; devolve a resposta."""
    hearing = listen(channel)
    answer = ask("POST", path, '{"pergunta": "olá"}'.encode(), at=at)
    expect(answer.status == 200, lambda: f"status {answer.status}: {answer.read()}")
    key, task = hearing.task()
    equal((task["body"], task["path"]), ('{"pergunta": "olá"}', path))
    redis("RPUSH", task["task_list"], '{"n": 1}')
    equal(answer.readline(), b'{"n": 1}\n')
    answer.first_line = time.monotonic()
    redis("RPUSH", task["task_list"], '{"n": 2}')
    redis("DEL", key)
    equal(answer.read(), b'{"n": 2}\n')
    keys = (key, task["task_list"], task["task_list"] + ":taken")
    eventually(lambda: redis("EXISTS", *keys) == 0, 5, "sobraram chaves da tarefa no Redis")
    return answer


def open_streams(count, at=port):
    """Abre streams sem linha nenhuma."""
    answers = [ask("POST", f"/vivo/{number}", b"{}", at=at) for number in range(count)]
    expect(all(answer.status == 200 for answer in answers), "um stream não abriu")
    return answers


@contextlib.contextmanager
def counting(what, at=port, channel="ndjson_jobs"):
    """Mantém três streams com uma linha a cada 50 ms; na saída, cada um tem de ter todas, uma vez e em ordem."""
    hearing, hands, arrivals, expected, ending = listen(channel), link(), [[], [], []], [], threading.Event()
    answers = open_streams(3, at)
    tasks = [hearing.task() for _ in answers]

    def feed():
        """Empurra as linhas até a saída; devolve a elas o fim."""
        while not ending.wait(0.05):
            for _, task in tasks:
                hands("RPUSH", task["task_list"], len(expected))
            expected.append(len(expected))
        hands("DEL", *(key for key, _ in tasks))

    def read(answer, into):
        """Lê as linhas de um stream, com o momento de cada uma."""
        for line in answer:
            into.append((int(line), time.monotonic()))

    def advance(lines):
        """Espera mais algumas linhas em cada stream."""
        least = [len(each) + lines for each in arrivals]
        eventually(
            lambda: all(len(each) >= count for each, count in zip(arrivals, least, strict=True)),
            10,
            lambda: f"as linhas pararam em {[len(each) for each in arrivals]}",
        )

    threads = [threading.Thread(target=feed)]
    threads += [threading.Thread(target=read, args=pair) for pair in zip(answers, arrivals, strict=True)]
    for each in threads:
        each.start()
    try:
        advance(5)
        yield
        advance(5)
    finally:
        ending.set()
        for each in threads:
            each.join(20)
    for each in arrivals:
        equal([number for number, _ in each], expected)
    pauses = [later - sooner for each in arrivals for (_, sooner), (_, later) in zip(each, each[1:], strict=False)]
    measure(f"maior pausa de uma linha: {what}", f"{max(pauses):.2f} s")


@contextlib.contextmanager
def knocking(what, at=port):
    """Abre vinte conexões por segundo, em /ping; na saída, todas têm de ter sido atendidas."""
    asked, missed, ending = [], [], threading.Event()

    def knock():
        """Pede, sem esperar pelas respostas."""
        while not ending.wait(0.05):
            asked.append(http.client.HTTPConnection("127.0.0.1", at, timeout=30))
            with contextlib.suppress(OSError):
                asked[-1].request("GET", "/ping")

    along = threading.Thread(target=knock)
    along.start()
    try:
        yield
    finally:
        ending.set()
        along.join()
    for each in asked:
        try:
            equal(each.getresponse().read(), b"pong")
        except (OSError, http.client.HTTPException, failure) as error:
            missed.append(error)
    expect(not missed, f"de {len(asked)} conexões: {missed}")
    measure(f"conexões não atendidas: {what}", f"0 de {len(asked)}")


def reloaded(mark, of=unit):
    """Espera, desde a marca, que o programa novo atenda."""
    eventually(lambda: "pronto: " in journal(mark, of=of) and active(of), 10, f"{of} não recarregou")


def reload(of=unit):
    """Recarrega, espera que o programa novo atenda e exige que o processo seja o mesmo."""
    pid, mark = main_pid(of), now()
    run(f"systemctl reload {of}")
    # O systemctl não espera pelo fim da recarga.
    reloaded(mark, of)
    equal(main_pid(of), pid)


def apt(arguments):
    """Roda o apt-get como o operador: sem perguntas, e com a escolha de manter o arquivo editado."""
    return run(f"apt-get -y -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold {arguments}")


def publish(number, line):
    """Põe no ar o repositório de número dado, na linha que o descreve, e o lê."""
    shutil.copytree(pool / str(number), repository, dirs_exist_ok=True)
    shutil.copyfile(repository / "py-ndjson-proxy.gpg", keyring)
    source.write_text(f"deb [signed-by={keyring}] {line} ./\n")
    # Dos outros repositórios, que estão fora do alcance, o apt só se queixa.
    apt("update")


def measure(name, value):
    """Escreve uma medida."""
    print(f"medida {name} = {value}", flush=True)


steps = {0: [], 1: [], 2: [], 3: []}


def step(phase, only=suite):
    """Inscreve um passo numa fase, em todas as versões do Debian ou numa só; o nome dele é a sua documentação."""

    def add(function):
        """Inscreve a função."""
        if only == suite:
            steps[phase].append((function.__doc__.rstrip("."), function))
        return function

    return add


# =============================================================================
# Fase 1: da instalação à véspera da reinicialização
# =============================================================================


@step(1)
def install():
    """apt install, de um repositório assinado: traz o Redis e deixa o serviço ativo e habilitado, sem ser root."""
    expect(shutil.which("redis-server") is None, "o Redis já estava instalado")
    publish(1, f"file:{repository}")
    began = time.monotonic()
    apt("install py-ndjson-proxy")
    # Nada é esperado: quando o apt devolve o terminal, o serviço já atende.
    expect(active(), lambda: f"inativo ao fim do apt install: {call(f'systemctl status {unit}').stdout}")
    measure("apt install", f"{time.monotonic() - began:.1f} s")
    measure("do apt install à primeira linha", f"{stream().first_line - began:.1f} s")
    equal(run(f"systemctl is-enabled {unit} redis-server").split(), ["enabled"] * 2)
    equal(pathlib.Path(f"/proc/{main_pid()}").owner(), "py-ndjson-proxy")
    shutil.copy2(conffile, original)
    check_conffile()
    holds(run(f"dpkg-deb -c {package}"), "-rw-r----- root/root")
    listed = run("dpkg -L py-ndjson-proxy").splitlines()
    pages = ("man8/py-ndjson-proxy.8.gz", "man7/py-ndjson-proxy.7.gz", "man5/py-ndjson-proxy.env.5.gz")
    names = [f"{folder}/{page}" for folder in ("man", "man/pt_BR") for page in pages]
    names += ["bash-completion/completions/py-ndjson-proxy", "doc/py-ndjson-proxy/README.md.gz"]
    names += [f"doc/py-ndjson-proxy/examples/{name}" for name in ("worker.py", "localhost-only.conf", "container.conf")]
    for name in names:
        expect(f"/usr/share/{name}" in listed and os.path.exists(f"/usr/share/{name}"), f"falta /usr/share/{name}")
    equal(os.path.realpath("/usr/bin/py-ndjson-proxy"), "/usr/share/py-ndjson-proxy/json-proxy.py")


def check_conffile():
    """Confere dono e permissões do arquivo de configuração."""
    equal(run(f"stat -c '%a %U %G' {conffile}").strip(), "640 root py-ndjson-proxy")


@step(1)
def clean_journal():
    """O diário: uma linha por tarefa, nada além de info, sem aviso de servidor de desenvolvimento."""
    mark = now()
    stream(path="/diario")
    eventually(lambda: "caminho=/diario" in journal(mark), 5, "a linha da tarefa não apareceu")
    (line,) = (line for line in journal(mark).splitlines() if "caminho=/diario" in line)
    holds(line, " fim=concluida ", " linhas=2 ", " bytes=18 ", "!olá")
    holds(journal("").lower(), "!development")
    equal(journal("", "-p warning"), "")
    # A unidade não pode gerar avisos do próprio systemd (chaves que a versão daqui não conhece).
    holds(run("journalctl -q --no-pager -p warning _PID=1"), "!ndjson")
    holds(call(f"systemd-analyze verify --man=no {unit} py-ndjson-proxy@x.service").stdout, "!ndjson")


@step(1)
def sandbox():
    """systemd-analyze security: no máximo 1.1; 0.9 só local; e os descritores bastam a MAX_STREAMS."""
    measure("exposição", exposure())
    expect(exposure() <= 1.1, f"exposição {exposure()}")
    process = pathlib.Path(f"/proc/{main_pid()}/status").read_text()
    holds(process, "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2")
    expect(int(show("LimitNOFILE")) > 4096 + 1024, "LimitNOFILE curto")
    # Um endereço desta máquina que não é o de localhost faz o papel do vizinho.
    run("ip address add 192.0.2.1/32 dev lo")
    equal(ping(host="192.0.2.1"), (200, "pong"))
    drop_in("localhost-only.conf")
    restart()
    measure("exposição só local", exposure())
    expect(exposure() <= 0.9, f"exposição {exposure()} com localhost-only.conf")
    stream()
    try:
        socket.create_connection(("192.0.2.1", port), timeout=2).close()
    except OSError:
        return
    raise failure("192.0.2.1 ainda atende com localhost-only.conf")


@step(1)
def status_text():
    """systemctl status conta os streams vivos e as tarefas."""
    answers = open_streams(2)
    shown = "Redis no ar; streams vivos: 2"
    eventually(lambda: shown in run(f"systemctl status --no-pager {unit}"), 15, lambda: show("StatusText"))
    for answer in answers:
        answer.close()
    eventually(lambda: redis("KEYS", "ndjson_*") == [], 5, "sobraram chaves no Redis")


@step(1)
def smoke():
    """O autopkgtest do pacote passa, sem nada na saída de erros, que ele daria por falha."""
    equal(run(f"{clone}/debian/tests/smoke 3>&1 >/dev/null 2>&3"), "")


@step(1)
def edit():
    """HTTP_PORT e SERVERNAME (com espaços) editados valem depois do restart."""
    run(rf"sed -i 's/^#\(HTTP_PORT\)=.*/\1=8080/; s/^#\(SERVERNAME\)=.*/\1=Meu Servidor 1.0/' {conffile}")
    check_conffile()
    restart()
    equal(stream(at=8080).headers.get_all("Server"), ["Meu Servidor 1.0"])
    holds(run("py-ndjson-proxy --check"), f"SERVERNAME = Meu Servidor 1.0  (arquivo {conffile})")


@step(1)
def bad_value():
    """Um valor ruim: a unidade falha, o diário diz nome, valor e arquivo, e ela não insiste; corrigido, volta."""
    mark = now()
    refuses("restart", "HTTP_PORT", "'oitenta'", str(conffile), "65535", HTTP_PORT="oitenta")
    # "auto-restart" seria o estado de quem ainda vai insistir.
    found = [show(name) for name in ("ActiveState", "SubState", "ExecMainStatus", "NRestarts")]
    equal(found, ["failed", "failed", "2", "0"])
    equal(journal(mark).count("oitenta"), 1)
    configure()
    run(f"systemctl restart {unit}")
    stream()


@step(1, "trixie")
def secrets():
    """Nenhum segredo no diário nem em --check."""
    mark = now()
    redis("CONFIG", "SET", "requirepass", "abacaxi-azul")
    try:
        refuses("restart", REDIS_PASSWORD="'senha-errada-77'")
        holds(call("py-ndjson-proxy --check").stdout, "!senha-errada-77")
        configure(REDIS_PASSWORD="'abacaxi-azul'")
        eventually(active, 15, "não subiu sozinho depois de a senha ser corrigida")
        equal(ping(), (200, "pong"))
        holds(journal(mark), "!senha-errada-77", "!abacaxi-azul")
        holds(run("py-ndjson-proxy --check"), "REDIS_PASSWORD = ********")
    finally:
        run("redis-cli -a abacaxi-azul --no-auth-warning CONFIG SET requirepass ''")


@step(1)
def redis_down():
    """Redis parado: /ping 500, stream 504, e o diário diz uma vez só; de volta ele, o serviço volta sem reiniciar."""
    mark, pid = now(), main_pid()
    run("systemctl stop redis-server")
    for _ in range(3):
        equal(ping()[0], 500)
        answer = ask("POST", "/sem-redis", b"{}")
        equal((answer.status, json.loads(answer.read())["error"]), (504, "redis_unavailable"))
    eventually(lambda: "Redis fora do ar; streams vivos: 0" in show("StatusText"), 15, lambda: show("StatusText"))
    equal(journal(mark, "-p warning").count("Redis fora do ar"), 1)
    mark = now()
    run("systemctl start redis-server")
    eventually(lambda: ping() == (200, "pong"), 10, "/ping não voltou")
    stream()
    eventually(lambda: "Redis de volta" in journal(mark), 5, "o diário não diz que o Redis voltou")
    equal(main_pid(), pid)


@step(1, "bookworm")
def patience():
    """Reiniciado sem Redis, insiste a cada 5 s, com uma linha por tentativa, e sobe sozinho quando o Redis volta."""
    run("systemctl stop redis-server")
    refuses("restart")
    mark, began = now(), time.monotonic()
    eventually(lambda: int(show("NRestarts")) >= 2 and show("ExecMainStatus") == "1", 30, lambda: journal(mark))
    took, tries = time.monotonic() - began, int(show("NRestarts"))
    expect(took > 4.9 * tries, f"{tries} tentativas em {took:.1f} s")
    said = journal(mark, "-t py-ndjson-proxy").splitlines()
    expect(len(said) <= tries, f"{tries} tentativas, {len(said)} linhas: {said}")
    began = time.monotonic()
    run("systemctl start redis-server")
    eventually(active, 15, "não subiu sozinho")
    measure("de volta depois do Redis", f"{time.monotonic() - began:.1f} s")
    stream()


def comes_back(pid, what, began):
    """Espera que outro processo tome o lugar do dado, e mede quanto demorou."""
    eventually(lambda: active() and main_pid() not in (0, pid), 40, f"não voltou depois do {what}")
    measure(f"de volta depois do {what}", f"{time.monotonic() - began:.1f} s")


@step(1)
def stopped():
    """SIGSTOP depois de um reload: o watchdog traz de volta, em WatchdogSec; aqui, menos que os 30 s da unidade."""
    equal(show("WatchdogUSec"), "30s")
    drop_in("[Service]\nWatchdogSec=4\n")
    restart()
    # A recarga não o desliga, nem ele a mata.
    reload()
    pid, mark = main_pid(), now()
    time.sleep(6)
    equal((main_pid(), show("NRestarts")), (pid, "0"))
    began = time.monotonic()
    os.kill(pid, 19)
    comes_back(pid, "SIGSTOP", began)
    holds(journal(mark), "Watchdog timeout")
    stream()


@step(1)
def reloading():
    """systemctl reload: os valores novos valem, o processo é o mesmo, e nenhum cliente nota, nos dois servidores."""
    for server in servers:
        serve(HTTP_SERVER=server)
        with knocking(f"reload ({server})"), counting(f"reload ({server})"):
            configure(HTTP_SERVER=server, SERVERNAME="Recarregado")
            began = time.monotonic()
            reload()
            measure(f"systemctl reload ({server})", f"{time.monotonic() - began:.2f} s")
            equal(server_name(), "Recarregado")
            # O outro servidor HTTP.
            configure(HTTP_SERVER=servers[server == "flask"])
            reload()
    with counting("reload com outra porta"):
        configure(HTTP_PORT=8781)
        reload()
        equal(ping(8781), (200, "pong"))
        closes()
        configure()
        reload()
    stream()


@step(1)
def not_reloaded():
    """reload recusado: com um valor errado ou o Redis fora do ar ele falha, o diário diz por quê, e nada muda."""
    pid = main_pid()
    with counting("reload recusado"):
        refuses("reload", "HTTP_PORT", "'oitenta'", str(conffile), "65535", HTTP_PORT="oitenta", SERVERNAME="outro")
        # Sem passar pelo systemctl, quem recusa é o próprio programa.
        mark = now()
        os.kill(pid, 1)
        eventually(lambda: "'oitenta'" in journal(mark, "-p err"), 10, "o programa não disse por que recusou")
        eventually(active, 5, "o systemd ainda espera pela recarga")
        equal((main_pid(), server_name()), (pid, "py-ndjson-proxy"))
    run("systemctl stop redis-server")
    refuses("reload", "não atende")
    run("systemctl start redis-server")
    eventually(lambda: ping() == (200, "pong"), 10, "/ping não voltou")
    equal((active(), main_pid()), (True, pid))
    reload()
    stream()


@step(1)
def nobody_refused():
    """restart e kill -9 não recusam ninguém; parado, ou caído por uma configuração errada, a porta está fechada."""
    for server in servers:
        serve(HTTP_SERVER=server)
        equal(show("NFileDescriptorStore"), "1")
        with knocking(f"restart ({server})"):
            restart()
        pid, began = main_pid(), time.monotonic()
        os.kill(pid, 9)
        eventually(lambda pid=pid: main_pid() != pid, 5, "não morreu")
        with knocking(f"kill -9 ({server})"):
            comes_back(pid, f"kill -9 ({server})", began)
        stream()
        reload()
        eventually(lambda: show("NFileDescriptorStore") == "1", 5, "o socket se perdeu na recarga")
    run(f"systemctl stop {unit}")
    closes()
    serve(HTTP_PORT=8781)
    expect(is_open(8781), "a porta nova está fechada")
    closes()
    serve()
    expect(is_open(), "a porta está fechada")
    closes(8781)
    refuses("restart", HTTP_PORT="oitenta")
    closes()


@step(1, "forky")
def silent_resolver():
    """WatchdogSec=4, e por 15 s nem Redis nem quem resolva o nome dele: os streams e o serviço vivem, e tudo volta."""
    hosts, resolver = pathlib.Path("/etc/hosts"), pathlib.Path("/etc/resolv.conf")
    before = hosts.read_text()
    named = before + "127.0.0.1 redis-distante\n"
    addresses = ("127.0.0.51", "127.0.0.52", "127.0.0.53")
    with contextlib.ExitStack() as stack:
        for address in addresses:
            # Recebe e não responde.
            stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)).bind((address, 53))
        stack.callback(resolver.unlink)
        resolver.write_text("options timeout:2 attempts:1\n" + "".join(f"nameserver {each}\n" for each in addresses))
        stack.callback(hosts.write_text, before)
        hosts.write_text(named)
        drop_in("[Service]\nWatchdogSec=4\n")
        serve(REDIS_SERVER="redis-distante:6379/1", HEARTBEAT=500, HEARTBEAT_LINE="'{\"vivo\": true}'")
        pid = main_pid()
        (answer,) = open_streams(1)
        hosts.write_text(before)
        for kind in ("normal", "pubsub"):
            redis("CLIENT", "KILL", "TYPE", kind)
        ending = time.monotonic() + 15
        while (began := time.monotonic()) < ending:
            equal(answer.readline(), b'{"vivo": true}\n')
            expect(time.monotonic() - began < 1.5, f"um heartbeat demorou {time.monotonic() - began:.1f} s")
        answer.close()
        equal(ping()[0], 500)
        hosts.write_text(named)
        eventually(lambda: ping() == (200, "pong"), 20, "não voltou")
        stream()
        equal((main_pid(), show("NRestarts")), (pid, "0"))


@step(1)
def stopping():
    """Parar: cada stream vivo recebe a linha de shutdown, depois de DRAIN, ainda que TimeoutStopSec seja menor."""
    for server in servers:
        mark = now()
        drop_in("[Service]\nTimeoutStopSec=2\n")
        serve(HTTP_SERVER=server, DRAIN=4000)
        holds(journal(mark), f"({server})")
        answers = open_streams(3)
        began = time.monotonic()
        run(f"systemctl stop {unit}")
        took = time.monotonic() - began
        measure(f"parar com 3 streams ({server})", f"{took:.1f} s")
        expect(4 <= took <= 6, f"parar levou {took:.1f} s")
        for answer in answers:
            equal(answer.read(), b'{"error": "shutdown"}\n')
        equal((show("Result"), show("ActiveState")), ("success", "inactive"))
        equal(redis("KEYS", "ndjson_*"), [])


@step(1, "trixie")
def full_house():
    """MAX_STREAMS=4096 streams vivos cabem na unidade; um a mais recebe 503."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
    serve(MAXTIME="600000", DRAIN="0", LOG_LEVEL="warning")
    began = time.monotonic()
    connections, hearing = [], listen()
    for _ in range(32):
        batch = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(128)]
        for connection in batch:
            connection.sendall(b"POST /cheio HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        for connection in batch:
            equal(connection.recv(12), b"HTTP/1.1 200")
            hearing.read()
        connections += batch
    took = time.monotonic() - began
    answer = ask("POST", "/a-mais", b"{}")
    expect(answer.status == 503 and answer.getheader("Retry-After"), f"o 4097º recebeu {answer.status}")
    equal(ping(), (200, "pong"))
    process = pathlib.Path(f"/proc/{main_pid()}")
    threads, files = (len(list((process / name).iterdir())) for name in ("task", "fd"))
    measure("4096 streams", f"abertos em {took:.1f} s; {threads} threads e {files} descritores")
    expect(threads <= 40 and threads < int(show("TasksMax")) * 0.75, f"{threads} threads")
    expect(4096 < files < int(show("LimitNOFILE")) * 0.75, f"{files} descritores")
    run(f"systemctl stop {unit}")
    equal(show("Result"), "success")
    for connection in connections:
        with connection, connection.makefile("rb") as file:
            holds(file.read(), b'{"error": "shutdown"}\n')
    eventually(lambda: redis("DBSIZE") == 0, 5, lambda: f"sobraram {redis('DBSIZE')} chaves no Redis")


@step(1)
def every_function():
    """Métricas, inclusive as do processo, CORS, token, fila e heartbeat, nos dois servidores, na unidade como vem."""
    apt("install python3-prometheus-client")
    origin, token = "https://exemplo.com.br", "abacaxi-azul-123"
    more = {"HEARTBEAT": 200, "HEARTBEAT_LINE": "'{\"vivo\": true}'", "REDIS_QUEUE": "fila"}
    for server in servers:
        serve(HTTP_SERVER=server, METRICS_PORT=9771, CORS_ORIGIN=origin, AUTH_TOKEN=token, **more)
        equal(ask("POST", "/sem-token", b"{}").status, 401)
        answer = ask("OPTIONS", "/tudo", Origin=origin, Access_Control_Request_Method="POST")
        equal(answer.getheader("Access-Control-Allow-Origin"), origin)
        answer = ask("POST", "/tudo", b"{}", Origin=origin, Authorization=f"Bearer {token}")
        equal(answer.getheader("Access-Control-Allow-Origin"), origin)
        key = redis("LPOP", "fila")
        equal(answer.readline(), b'{"vivo": true}\n')
        redis("RPUSH", json.loads(redis("GET", key))["task_list"], "{}")
        redis("DEL", key)
        expect(answer.read().endswith(b"{}\n"), "o resto veio diferente")
        text = ask("GET", "/metrics", at=9771).read().decode()
        found = set(re.findall(r"^ndjson_proxy_process_(\w+) [0-9.e+]+$", text, re.M))
        names = "virtual_memory_bytes resident_memory_bytes start_time_seconds cpu_seconds_total open_fds max_fds"
        equal(found, set(names.split()))


@step(1, "forky")
def worker_unit():
    """A unit de exemplo do worker, como vem, responde pela fila com o arquivo do proxy, fechada como a do proxy."""
    program = pathlib.Path("/usr/local/lib/py-ndjson-worker.py")
    service = pathlib.Path("/etc/systemd/system/py-ndjson-worker.service")
    shutil.copy(examples / "worker.py", program)
    shutil.copy(examples / "worker.service", service)
    serve(REDIS_QUEUE="fila")
    run("systemctl enable --now py-ndjson-worker")
    holds(ask("POST", "/x", b"oi").read(), b"oi ")
    measure("exposição do worker", exposure("py-ndjson-worker"))
    expect(exposure("py-ndjson-worker") <= 1.1, "exposta demais")
    run("systemctl disable --now py-ndjson-worker")
    expect(fails("systemctl is-failed py-ndjson-worker"), "falhou ao parar")
    program.unlink()
    service.unlink()


@step(1, "bookworm")
def other_redis():
    """Redis por socket unix e por TLS, nos dois servidores HTTP."""
    tls.mkdir(parents=True)
    run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {tls}/key.pem -out {tls}/cert.pem -days 2"
        " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    run(f"chown -R redis {tls}; systemctl stop {unit}")
    with pathlib.Path("/etc/redis/redis.conf").open("a") as file:
        file.write(
            "\nunixsocket /run/redis/redis-server.sock\nunixsocketperm 770\ntls-port 6390\n"
            f"tls-cert-file {tls}/cert.pem\ntls-key-file {tls}/key.pem\n"
            f"tls-ca-cert-file {tls}/cert.pem\ntls-auth-clients no\n"
        )
    run("systemctl restart redis-server")
    drop_in("redis-socket.conf")
    addresses = ("unix:///run/redis/redis-server.sock?db=1", f"rediss://localhost:6390/1?ssl_ca_certs={tls}/cert.pem")
    for address in addresses:
        for server in servers:
            serve(REDIS_SERVER=address, HTTP_SERVER=server)
            stream()


@step(1, "trixie")
def low_port():
    """low-port.conf permite a porta 80, e sem ele o diário diz por que não."""
    refuses("restart", "a porta 80", "low-port.conf", HTTP_PORT=80)
    drop_in("low-port.conf")
    restart()
    stream(at=80)


@step(1, "trixie")
def twin_units():
    """As duas unidades só diferem no que devem."""

    def body(name):
        """Lê de uma unidade as linhas que têm de ser iguais na outra."""
        skip = ("#", "Description=", "SyslogIdentifier=", "Environment=ENV_FILE=")
        lines = (clone / "systemd" / name).read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line and not line.startswith(skip)]

    equal(body("py-ndjson-proxy.service"), body("py-ndjson-proxy@.service"))


@step(1)
def instances():
    """Duas instâncias lado a lado, cada uma com o seu arquivo sobre o comum, que atravessam a reinicialização."""
    configure(SERVERNAME="'nome comum'")
    for name, at in (("azul", 8781), ("verde", 8782)):
        path = pathlib.Path(f"/etc/py-ndjson-proxy@{name}.env")
        run(f"install -m 640 -g py-ndjson-proxy /dev/null {path}")
        prefixes = {"REDIS_PREFIX": f"{name}_task_", "REDIS_LIST_PREFIX": f"{name}_list_"}
        configure(path, HTTP_PORT=at, REDIS_CHANNEL=f"canal_{name}", METRICS_PORT=at + 1000, **prefixes)
    run("systemctl enable --now py-ndjson-proxy@azul py-ndjson-proxy@verde")
    restart()
    check_instances()
    holds(run("journalctl -q --no-pager -t py-ndjson-proxy@azul"), "pronto: http://0.0.0.0:8781")
    text = run(f"py-ndjson-proxy -f {conffile}:/etc/py-ndjson-proxy@azul.env --check")
    holds(text, "HTTP_PORT = 8781  (arquivo /etc/py-ndjson-proxy@azul.env)", f"nome comum  (arquivo {conffile})")
    pids = [main_pid(), main_pid(blue)]
    with counting("reload de uma instância", 8781, "canal_azul"):
        run("echo SERVERNAME=azul >>/etc/py-ndjson-proxy@azul.env")
        reload(blue)
        equal(server_name(8781), "azul")
        rows = [json.loads(line) for line in ask("GET", "/streams", at=9781).read().splitlines()]
        equal({row["path"] for row in rows}, {"/vivo/0", "/vivo/1", "/vivo/2"})
        run("sed -i '$d' /etc/py-ndjson-proxy@azul.env")
        run("systemctl reload 'py-ndjson-proxy*'")
        eventually(lambda: server_name(8781) == "nome comum", 10, "nem todas recarregaram")
    equal([main_pid(), main_pid(blue)], pids)
    check_instances()
    mark, missing = now(), "py-ndjson-proxy@sem-arquivo.service"
    call(f"systemctl start {missing}")
    holds(journal(mark, of=missing), "/etc/py-ndjson-proxy@sem-arquivo.env não existe")
    run(f"systemctl reset-failed {missing}")


def check_instances():
    """Confere a unidade e as duas instâncias, cada uma na sua porta e no seu canal."""
    for at, channel in ((port, "ndjson_jobs"), (8781, "canal_azul"), (8782, "canal_verde")):
        equal(stream(at=at, channel=channel).getheader("Server"), "nome comum")


# =============================================================================
# Fase 2: do sistema reiniciado à reinstalação
# =============================================================================


@step(2)
def rebooted():
    """Reiniciado o sistema, o serviço e as instâncias estão no ar."""
    for of in (unit, blue, "py-ndjson-proxy@verde.service"):
        eventually(lambda of=of: active(of), 20, lambda of=of: call(f"systemctl status {of}").stdout)
        expect(show("NRestarts", of) == "0", f"{of} subiu antes do Redis")
    check_instances()


@step(2)
def upgrade():
    """apt upgrade, com streams vivos e o arquivo editado: os streams e a edição ficam, e o programa novo atende."""
    before = conffile.read_text(encoding="utf-8")
    pids, mark = [main_pid(), main_pid(blue)], now()
    web = ("python3", "-m", "http.server", "-d", str(repository), "8000")
    with subprocess.Popen(web, stderr=subprocess.DEVNULL) as serving, contextlib.ExitStack() as stack:
        stack.callback(serving.kill)
        eventually(lambda: is_open(8000), 10, "o servidor web não subiu")
        publish(2, "http://127.0.0.1:8000")
        with knocking("upgrade"), counting("upgrade"), counting("upgrade da instância", 8781, "canal_azul"):
            apt("upgrade")
            for of in (unit, blue):
                reloaded(mark, of)
    equal([main_pid(), main_pid(blue)], pids)
    equal(run("dpkg-query -W -f '${Version}' py-ndjson-proxy"), "99.0.0-1")
    holds(ask("GET", "/metrics", at=9781).read(), b'version="99.0.0"')
    equal(conffile.read_text(encoding="utf-8"), before)
    check_conffile()
    offered = pathlib.Path(f"{conffile}.dpkg-dist")
    holds(offered.read_text(encoding="utf-8"), "NOVO_PADRAO")
    expect(offered.stat().st_mode & 0o007 == 0, "o .dpkg-dist ficou legível por todos")
    check_instances()
    shutil.rmtree(repository)
    source.unlink()
    keyring.unlink()


@step(2, "forky")
def upgrade_restarts():
    """upgrade de um programa que não sabe recarregar, ou que recusa a recarga: reinicia uma vez."""
    # O que o distingue é não deixar o socket com o systemd, como nenhuma versão de antes da 1.1 deixa.
    drop_in("[Service]\nFileDescriptorStoreMax=0\n")
    restart()
    pids, mark = [main_pid(), main_pid(blue)], now()
    apt(f"install --reinstall {upgraded}")
    expect(active() and main_pid() != pids[0] and main_pid(blue) == pids[1], "não reiniciou, ou não só a unidade")
    equal((journal(mark, "_PID=1").count("Started "), show("NRestarts")), (1, "0"))
    drop_in("[Service]\nIPAddressDeny=192.0.2.0/24\n")
    restart()
    before = conffile.read_text(encoding="utf-8")
    conffile.write_text(before + "HTTP_PORT=oitenta\n", encoding="utf-8")
    # O filtro não valeria.
    equal(apt(f"install --reinstall {upgraded}").count("pede FileDescriptorStoreMax=0"), 1)
    equal(show("ExecMainStatus"), "2")
    conffile.write_text(before, encoding="utf-8")
    drop_in()
    restart()
    check_instances()


@step(2, "trixie")
def upgrade_disabled():
    """upgrade não liga o que o operador desligou."""
    run(f"systemctl disable --now {unit}")
    apt(f"install --reinstall {upgraded}")
    expect(not active() and fails(f"systemctl is-enabled {unit}"), "o upgrade religou o serviço")
    run(f"systemctl enable --now {unit}")
    stream()


@step(2)
def remove():
    """remove: para tudo e conserva o arquivo de configuração; instalado de novo, a edição vale e tudo volta."""
    before = conffile.read_text(encoding="utf-8")
    apt("remove py-ndjson-proxy")
    equal(conffile.read_text(encoding="utf-8"), before)
    check_conffile()
    expect(fails("pgrep -f '/usr/bin/[p]y-ndjson-proxy'"), "há processos vivos")
    expect(shutil.which("py-ndjson-proxy") is None, "o programa ficou")
    apt(f"install {package}")
    expect(active() and active(blue), "não voltaram")
    check_instances()


@step(2)
def purge():
    """purge não deixa arquivo, conta nem estado de unidade."""
    drop_in("localhost-only.conf")
    # Uma unidade parada na falha não pode ficar na lista de falhas.
    configure(HTTP_PORT="oitenta")
    call(f"systemctl restart {unit}")
    apt("purge py-ndjson-proxy")
    # O certificado do passo do TLS ficaria sem dono quando o Redis também fosse removido.
    shutil.rmtree(tls, ignore_errors=True)
    check_purged()


def check_purged():
    """Procura o que um purge não deve deixar."""
    # De fora: o que este teste trouxe, o cache e os registros do apt e do dpkg, e o diário.
    found = run(
        r"find / -xdev \( -path /proc -o -path /root -o -path /var/log -o -path /var/cache/apt \) -prune -o"
        r" \( -name '*ndjson*' -o -name '*json-proxy*' -o -nouser -o -nogroup \) -print;"
        " find /run /dev/shm /tmp /var/tmp -name '*ndjson*' -not -path '/run/log/*';"
        # A conta, as unidades e o pacote.
        " for each in passwd group shadow; do getent $each py-ndjson-proxy; done; systemctl --failed --no-legend;"
        " systemctl list-units --all --no-legend '*ndjson*'; systemctl list-unit-files --no-legend '*ndjson*';"
        " dpkg-query -W -f '${Package} ${Status}\n' | grep ndjson; true"
    )
    equal(found, "")


@step(2)
def reinstall():
    """Reinstalar depois do purge funciona, com o .deb do Debian 14, e com o Valkey onde ele existe."""
    valkey = "" if suite == "bookworm" else "valkey-server"
    if valkey:
        apt("purge redis-server redis-tools")
    apt(f"install {foreign} {valkey}")
    expect(active(), "não ficou ativo")
    check_conffile()
    equal(conffile.read_text(encoding="utf-8"), original.read_text(encoding="utf-8"))
    if valkey:
        expect(shutil.which("redis-server") is None, "o Redis veio apesar do Valkey")
        equal(ping(), (200, "pong"))
        apt("purge valkey-server valkey-tools")
        expect(active(), "o serviço caiu com o Valkey")


@step(2)
def from_clone():
    """packaging/install, de um clone, instala tudo e devolve com o serviço no ar; de novo, por cima, recarrega."""
    apt("purge py-ndjson-proxy redis-server redis-tools")
    check_purged()
    text = run(f"{clone}/packaging/install")
    expect(active(), f"não está no ar: {text[-1500:]}")
    # Diz onde atende.
    holds(text, "http://")
    stream()
    check_conffile()
    if suite == "trixie":
        # O mesmo número de versão, reinstalado.
        pid, mark = main_pid(), now()
        run(f"{clone}/packaging/install")
        reloaded(mark)
        equal(main_pid(), pid)


@step(2, "bookworm")
def from_clone_elsewhere():
    """packaging/install com um REDIS_SERVER de outra máquina não instala Redis, e diz que o serviço espera por ele."""
    apt("purge py-ndjson-proxy redis-server redis-tools")
    check_purged()
    conffile.write_text("REDIS_SERVER=192.0.2.1:6379/1\n", encoding="utf-8")
    began = time.monotonic()
    text = run(f"{clone}/packaging/install")
    measure("packaging/install sem Redis", f"{time.monotonic() - began:.1f} s")
    expect(shutil.which("redis-server") is None, f"o Redis foi instalado: {text[-1500:]}")
    holds(text, "espera pelo Redis", "192.0.2.1:6379/1")
    expect(not active() and show("SubState") in ("auto-restart", "start"), f"SubState={show('SubState')}")
    equal(conffile.read_text(encoding="utf-8"), "REDIS_SERVER=192.0.2.1:6379/1\n")


# =============================================================================
# Fase 3: onde os espaços de nomes são negados
# =============================================================================


def allow(**limits):
    """Muda os limites de espaços de nomes do espaço de usuário deste sistema."""
    # O /proc/sys daqui é só para leitura; e sem espaços de montagem nada mais se monta.
    if not os.path.ismount("/mnt"):
        run("mount -t proc proc /mnt")
    for kind, limit in limits.items():
        pathlib.Path(f"/mnt/sys/user/max_{kind}_namespaces").write_text(str(limit))


@step(3)
def refused():
    """Sem espaços de nomes a unidade não inicia, e o apt, ou packaging/install, diz o que instalar."""
    allow(user=0)
    cloned = suite == "bookworm"
    done = call(f"{clone}/packaging/install" if cloned else f"apt-get -y install {package}")
    expect(done.returncode == cloned and not active(), f"saiu com {done.returncode}: {done.stdout}")
    equal(done.stdout.count(f"instale {examples}/container.conf"), 1)
    equal(show("ExecMainStatus"), "217")
    shutil.copy2(conffile, original)
    # Os de usuário permitidos, faltam os de montagem.
    allow(user=100, mnt=0, ipc=0, uts=0)
    expect(fails(f"systemctl restart {unit}"), "iniciou sem espaços de nomes")
    equal(show("ExecMainStatus"), "226")


@step(3)
def contained():
    """Com container.conf ela inicia e atende, nos dois servidores HTTP."""
    # A unidade do Redis também não inicia.
    run("runuser -u redis -- redis-server --daemonize yes --save '' --dir /tmp")
    drop_in("container.conf")
    allow(user=0)
    for server in servers:
        serve(HTTP_SERVER=server)
        stream()
    measure("exposição com container.conf", exposure())


# =============================================================================


def main(phase):
    """Roda os passos da fase, um por um; devolve 1 se algum falhou, 0 se nenhum."""
    failed = 0
    for name, function in steps[phase]:
        began, mark = time.monotonic(), now()
        try:
            if phase == 1:
                settle()
            function()
        except Exception as error:
            failed = 1
            detail = str(error) if isinstance(error, failure) else f"{type(error).__name__}: {error}"
            print(f"FALHOU {name}: " + " | ".join(detail.splitlines()), flush=True)
            if phase:
                print(journal(mark, "-n 25", "'py-ndjson-proxy*'"), flush=True)
                # Que a falha não arraste os passos seguintes.
                call("systemctl start redis-server; redis-cli FLUSHALL")
        else:
            print(f"ok {name} ({time.monotonic() - began:.1f} s)", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
