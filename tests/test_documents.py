"""A documentação: presa ao programa, igual nas duas línguas, com todo elo inteiro e todo comando que pode rodar, rodado."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

import harness
import support

module = harness.load_program()
source = harness.program.read_text(encoding="utf-8")
by_name = {row.name: row for row in module.settings}
flags = {flag for row in module.settings for flag in row.flags} | {"--check", "--version", "-h", "--help"}
documents = harness.root / "packaging" / "doc"
pairs = {
    "README.md": "README.en.md",
    **{
        f"packaging/doc/{one}.md": f"packaging/doc/en/{other}.md"
        for one, other in (
            ("contrato", "contract"),
            ("configuracao", "settings"),
            ("operacao", "operation"),
            ("redis", "redis"),
            ("capacidade", "capacity"),
        )
    },
}
every_page = sorted(
    str(path.relative_to(harness.root))
    for folder, pattern in ((".", "README*.md"), ("packaging", "**/*.md"), ("tests", "**/*.md"))
    for path in (harness.root / folder).glob(pattern)
)
commented = [page for page in every_page if not page.startswith("tests/")]

# As palavras que as provas procuram, em cada língua.
words = {
    "pt": {"to": "a", "default": "padrão", "empty": "vazio", "ms": "milissegundos", "s": "segundos"}
    | {"allowed": "permitido:", "cost": "Custo: ", "bytes": "bytes"},
    "en": {"to": "to", "default": "default", "empty": "empty", "ms": "milliseconds", "s": "seconds"}
    | {"allowed": "allowed:", "cost": "Cost: ", "bytes": "bytes"},
}

# Os blocos de comandos que não rodam aqui, pela primeira linha: por quê, e quem os roda.
elsewhere = {
    "packaging/demo": "tests/clients/test_browser.py",
    "(umask 077; echo AUTH_TOKEN=$(openssl rand -hex 32) >>/etc/py-ndjson-proxy.env)": "root: packaging/test-debian",
    "packaging/install": "apt, como root: packaging/test-debian",
    "packaging/install --build-only .": "apt, como root: packaging/test-debian",
    "docker compose -f packaging/container/compose.yaml up --build": "um contêiner",
    "python3 -m venv .venv": "a rede; é o que tests/run faz",
    "cp /usr/share/doc/py-ndjson-proxy/examples/worker.service /etc/systemd/system/py-ndjson-worker.service": "root, systemd",
    "py-ndjson-proxy --check": "systemd: packaging/test-debian",
    "tests/run": "é esta bateria",
    "journalctl -u py-ndjson-proxy -o cat -S today | grep -o ' fim=[a-z]*' | sort | uniq -c": "systemd",
    "$ curl -s http://127.0.0.1:9771/streams": "jq; os objetos são os de tests/test_reports.py",
    "$ systemctl kill -s USR1 py-ndjson-proxy": "systemd: packaging/test-debian",
    "install -m 0640 -g py-ndjson-proxy /dev/null \\": "root, systemd: packaging/test-debian",
    "systemctl reload 'py-ndjson-proxy*'": "systemd",
    "n8n import:credentials --input=credentials.json": "um n8n de verdade",
    '$ curl -N http://127.0.0.1:8771/chat -d \'{"chatInput": "Olá, mundo"}\'': "um n8n de verdade",
    "python3 packaging/examples/ollama/ollama_worker.py &": "tests/clients/test_ollama.py",
}


def read(page):
    """Lê uma página. Argumentos: page, o caminho a partir da raiz. Retorno: o texto."""
    return (harness.root / page).read_text(encoding="utf-8")


def prose(text):
    """Tira de um texto os blocos cercados. Argumentos: text. Retorno: o resto."""
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def blocks(page, *kinds):
    """Lê os blocos cercados de uma página.

    Argumentos:
        page: o caminho dela.
        kinds: as linguagens; nenhuma, todas.

    Retorno:
        Lista de textos.
    """
    found = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", read(page))
    return [text for kind, text in found if not kinds or kind in kinds]


# -- os elos --------------------------------------------------------------------


def anchors(text):
    """Lista as âncoras que o GitHub dá aos títulos de uma página. Argumentos: text. Retorno: conjunto."""
    titles = re.findall(r"(?m)^#+ (.*)$", prose(text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", every_page)
def test_links(page):
    """Todo elo para um arquivo daqui acha o arquivo e, se nomeia uma seção, a seção."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(read(page))):
        if not re.match(r"[a-z]+:", link):
            name, _, anchor = link.partition("#")
            path = (harness.root / page).parent / name if name else harness.root / page
            assert path.exists(), link
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), link


def test_links_of_other_files():
    """O que o resto do projeto cita da documentação, existe."""
    cited = set()
    for folder in (".", "debian", "etc", "systemd", "packaging", "tests", ".ci"):
        for path in (harness.root / folder).glob("*" if folder == "." else "**/*"):
            if path.is_file() and path.suffix not in (".png", ".md", ".pyc"):
                found = re.findall(
                    r"(packaging/doc/[\w/.-]+|README[\w.]*\.md)(?:#([\w-]+))?", path.read_text(errors="replace")
                )
                cited |= {(name.rstrip("."), anchor) for name, anchor in found}
    for name, anchor in cited - {("README.md", ""), ("README.en.md", "")}:
        assert (harness.root / name).exists(), name
        assert not anchor or anchor in anchors(read(name)), (name, anchor)


# -- o tamanho e as duas línguas ------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "README.en.md"])
def test_readme_is_short(page):
    """O README se lê até o fim: no máximo 260 linhas e 2.200 palavras, que são dez minutos."""
    text = read(page)
    assert len(text.splitlines()) <= 260
    assert len(text.split()) <= 2200


def parts(page):
    """Separa uma página por seus títulos.

    Argumentos:
        page: o caminho dela.

    Retorno:
        Lista de (nível do título, texto da seção), na ordem.
    """
    found = re.split(r"(?m)^(#{1,4}) .*$", re.sub(r"(?m)^#(?=.*\n(?:.*\n)*?```$)", "#", read(page)))
    return [(len(level), text) for level, text in zip(found[1::2], found[2::2], strict=True)]


def shape(text):
    """Lê o que uma tradução não muda.

    Argumentos:
        text: o texto de uma seção.

    Retorno:
        Tupla: os nomes de configurações, os números e os blocos de comandos, estes sem comentários nem nomes traduzidos.
    """
    names = sorted(set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", text)))
    numbers = sorted(re.findall(r"\b\d[\d.,]*\b", text.replace(",", ".")))
    code = re.findall(r"(?ms)^```(?:console|sh|ini|python|js)\n(.*?)^```$", text)
    same = [re.sub(r" *#.*|ndjson_(?:fila|queue)|NOME|NAME", "", block) for block in code]
    return names, numbers, same


@pytest.mark.parametrize("page", pairs)
def test_both_languages_say_the_same(page):
    """As duas línguas têm as mesmas seções e, em cada uma, os mesmos nomes, números e comandos."""
    one, other = parts(page), parts(pairs[page])
    assert [level for level, _ in one] == [level for level, _ in other]
    for (_, left), (_, right) in zip(one, other, strict=True):
        for mine, theirs in zip(shape(left), shape(right), strict=True):
            assert mine == theirs, (left[:200], right[:200])


@pytest.mark.parametrize("page", [page for pair in pairs.items() for page in pair])
def test_languages_are_not_mixed(page):
    """Nenhuma frase ficou na outra língua."""
    english = page in pairs.values()
    other = (
        r"\b(não|que|uma|para|com|dos|pelo|são)\b"
        if english
        else r"\b(the|and|is|are|with|when|which|from|not|every)\b"
    )
    for line in re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", prose(read(page))).splitlines():
        assert len(re.findall(other, line)) < 2, line


def test_no_sentence_in_two_places():
    """Nenhuma frase está em dois lugares: quem muda uma coisa, muda-a uma vez."""
    places = {}
    for page in every_page:
        text = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", prose(read(page)))
        for sentence in re.split(r"(?<=[.:;])\s+|\n+|\s\|\s", text):
            if len(words_only := re.sub(r"\W+", " ", sentence).strip()) >= 50:
                places.setdefault(words_only.lower(), []).append(page)
    assert {sentence: pages for sentence, pages in places.items() if len(pages) > 1} == {}


# -- as configurações -----------------------------------------------------------


@pytest.mark.parametrize(("language", "page"), [("pt", "configuracao.md"), ("en", "en/settings.md")])
def test_settings(language, page):
    """Cada configuração da tabela tem a sua seção, na ordem, com argumentos, padrão, unidade e limites, e o que custa."""
    told = words[language]
    found = re.findall(r"(?ms)^### ([A-Z_]+)\n\n(.*?)(?=^#|\Z)", read(f"packaging/doc/{page}"))
    assert [name for name, _ in found] == list(by_name)
    for name, text in found:
        row = by_name[name]
        head, *rest = text.strip().split("\n\n")
        default = f"`{row.default}`" if row.default else told["empty"]
        start = f"{', '.join(f'`{flag}`' for flag in row.flags)}; {told['default']} {default}; {told['allowed']} "
        assert head.startswith(start), name
        allowed = head.removeprefix(start)
        limits = re.search(r"de (\d+) a (\d+)$", row.kind.allowed)
        assert not limits or re.search(rf"\b{limits[1]} {told['to']} {limits[2]}\b", allowed), name
        assert not row.unit or told[row.unit] in allowed, name
        assert all(re.search(rf"\b{word}\b", allowed) for word in support.row_words(row)), name
        assert [part.startswith(told["cost"]) for part in rest] == [False, True], name


@pytest.mark.parametrize(("language", "page"), [("pt", "README.md"), ("en", "README.en.md")])
def test_ten_settings(language, page):
    """As dez do README são configurações, com um argumento seu e o seu padrão; ele conta quantas são ao todo."""
    text = read(page)
    found = re.findall(r"(?m)^\| `([A-Z_]+)` \| `(-\S+)` \| (\S+) \|", text)
    assert len(found) == 10
    for name, flag, default in found:
        assert flag in by_name[name].flags, name
        assert default == (f"`{by_name[name].default}`" if by_name[name].default else words[language]["empty"]), name
    assert re.search(rf"\b{len(by_name)} (ao todo|in all)\b", text)


@pytest.mark.parametrize("page", ["configuracao.md", "en/settings.md"])
def test_file_syntax_is_the_real_one(page, tmp_path):
    """O que se diz que é lido de cada linha de exemplo é o que o programa lê."""
    found = re.findall(r"(?m)^\| `([A-Z_]+=.*)` \| `(.*)` \|$", read(f"packaging/doc/{page}"))
    assert len(found) >= 7
    for line, value in found:
        (tmp_path / "one.env").write_text(line + "\n", encoding="utf-8")
        assert list(module.read_env_file(tmp_path / "one.env", True).values()) == [value]


@pytest.mark.parametrize("page", [page for pair in pairs.items() for page in pair])
def test_no_unknown_name(page):
    """Todo nome em maiúsculas com sublinhado é uma configuração, e todo argumento citado no texto é do programa."""
    text = read(page)
    names = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", text))
    assert names - set(by_name) <= {"NOTIFY_SOCKET", "JOURNAL_STREAM"}
    told = set(re.findall(r"`(--?[a-z][a-z-]*)`", text))
    assert told - flags <= {"-N", "-n"}, told


def test_examples_of_files(tmp_path):
    """Todo exemplo de arquivo ou de unit usa nomes e valores que o programa aceita."""
    lines = [line for page in commented for text in blocks(page, "ini") for line in text.splitlines()]
    told = [re.sub(r'^Environment=("?)(.*)\1$', r"\2", line) for line in lines]
    told = [line for line in told if re.match(r"[A-Z_]+=", line)]
    assert len(told) >= 10
    for line in told:
        (tmp_path / "one.env").write_text(line + "\n", encoding="utf-8")
        for name, value in module.read_env_file(tmp_path / "one.env", True).items():
            by_name[name].kind.parse(value)


# -- o contrato e o log ---------------------------------------------------------


def test_contract_is_the_program_s(share_proxy, connect, worker):
    """Códigos de erro, palavras de fim, campos da tarefa e do log, razões do fim e trechos do log são os do programa."""
    text = read("packaging/doc/contrato.md")
    codes = re.findall(r"(?m)^\| (\d{3}) \| `(\w+)` \|", text)
    assert len(codes) == 10
    for status, code in codes:
        assert re.search(rf'{status}[,:].{{0,60}}"{code}"|"{code}"', source), (status, code)
    ends = set(re.findall(r"(?m)^\|.*\|.*\| `([a-z]+)` \|$", text))
    for word in ("EOF", "EOL", "END-OF-FILE", "END-OF-LIST"):
        assert f"`{word}`" in text
    response, task = support.open_stream(connect, share_proxy(), worker)
    table = text.partition("## O JSON da tarefa")[2].partition("\n## ")[0]
    fields = re.findall(r"`(\w+)`", " ".join(re.findall(r"(?m)^\| (.*?) \|", table)))
    assert [name for name in fields if name != "body_encoding"] == list(task.info)
    task.finish()
    assert response.lines() == []

    log = read("packaging/doc/operacao.md").partition("## Log")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([^`]+)`", cell) for cell in re.findall(r"(?m)^\| (`.*?) \|", log)]
    told = [name for row in rows for name in row]
    shown = list(support.finished_row(share_proxy(), task))
    assert told[: len(shown)] == shown
    assert set(re.findall(r"`([a-z]+)`", re.search(r"(?m)^\| `fim` \| (.*)$", log)[1])) == ends
    for phrase in told[len(shown) :]:
        assert phrase in source, phrase


# -- os comandos ----------------------------------------------------------------


def plain(text, port=None, server=None):
    """Troca, num texto, o que muda de uma execução a outra.

    Argumentos:
        text: o texto, da documentação ou de um comando.
        port: a porta do proxy, que passa à do exemplo.
        server: o harness.redis_server, cujo endereço passa ao do exemplo.

    Retorno:
        O texto trocado.
    """
    if server is not None:
        text = text.replace(f"127.0.0.1:{server.port}", "127.0.0.1:6379")
    if port is not None:
        text = text.replace(f":{port}", ":8771")
    for pattern in (
        r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}",
        r"(?<=request_time\": )[\d.]+",
        r"(?<=curl/)[\d.]+",
        r"(?<=Date: ).*",
        r"(?<=servidor: ).*",
        r"(?<=http://)[\d.]+:\d+(?= \(flask)",
        r"(?<=Content-Length: )\d+",
    ):
        text = re.sub(pattern, "<>", text)
    return text.replace("\r", "")


def steps(text):
    """Separa um bloco de terminal em comandos.

    Argumentos:
        text: o bloco.

    Retorno:
        Lista de (comando, com o documento de entrada se houver; saída esperada).
    """
    found = []
    waits = None
    for line in text.splitlines(keepends=True):
        if waits is not None:
            found[-1][0] += line
            waits = None if line.rstrip() == waits else waits
        elif line.startswith("$ "):
            found.append([line[2:], ""])
            here = re.search(r"<<'?(\w+)'?", line)
            waits = here and here[1]
        else:
            found[-1][1] += line
    return found


class terminal:
    """Um terminal para os comandos da documentação: o redis-cli, o curl e o python3 deles falam com os desta prova."""

    def __init__(self, folder, server, port=8771, **env):
        """Prepara o terminal.

        Argumentos:
            folder: pasta em que os comandos rodam.
            server: o harness.redis_server.
            port: a porta do proxy.
            env: variáveis de ambiente.
        """
        self.folder, self.server, self.port, self.id = folder, server, port, ""
        self.env = {**harness.base_environment(), "HTTP_PORT": "0", **env}
        self.running = []
        if not (folder / "json-proxy.py").exists():
            (folder / "json-proxy.py").symlink_to(harness.program)

    def start(self, command):
        """Inicia um comando.

        Argumentos:
            command: o texto dele, como na documentação.

        Retorno:
            O subprocess.Popen, com as duas saídas juntas.
        """
        command = command.replace("127.0.0.1:8771", f"127.0.0.1:{self.port}")
        command = re.sub(r"127\.0\.0\.1:6379\b", self.server.address.partition("/")[0], command)
        before = (
            f'redis-cli() {{ command redis-cli -p {self.server.port} "$@"; }}\ncurl() {{ command curl -sS "$@"; }}\n'
            f'python3() {{ exec {shlex.quote(sys.executable)} "$@"; }}\nid={self.id}\n'
        )
        process = subprocess.Popen(
            ["bash", "-c", before + command],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def check(self, process, expected):
        """Lê a saída de um comando até o fim e a compara; o que continua depois da última linha é encerrado.

        Argumentos:
            process: o que start devolveu.
            expected: a saída da documentação; uma linha "..." são quaisquer linhas.

        Retorno:
            A saída, sem trocas.
        """
        count = len(expected.splitlines())
        shown = [process.stdout.readline() for _ in range(count)] if "..." not in expected else list(process.stdout)
        if "$" in expected or process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        elif "..." not in expected:
            shown += process.stdout
        output = "".join(shown)
        pattern = (
            re.escape(plain(expected).rstrip("\n"))
            .replace("\\.\\.\\.", "(?:.*\n)*.*")
            .replace("(?:.*\n)*.*\\\n", "(?:.*\n)*")
        )
        assert re.fullmatch(pattern + "\n*", plain(output, self.port, self.server)), output
        return output

    def run(self, text):
        """Roda os comandos de um bloco, um depois do outro. Argumentos: text, o bloco. Retorno: a última saída."""
        output = ""
        client = self.server.client()
        for command, expected in steps(text):
            if not command.startswith("id="):
                harness.eventually(lambda: not client.exists(f"ndjson_list_{self.id}"), 5, "o proxy tirou as linhas")
                output = self.check(self.start(command), expected)
        return output

    def close(self):
        """Encerra o que ficou."""
        for process in self.running:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
            process.stdout.close()


@pytest.fixture
def open_terminal(tmp_path, redis_main):
    """Fábrica de terminais: open_terminal(server=o da sessão, port=8771, **ambiente). Fechados ao fim.

    Retorno:
        Função que devolve um terminal.
    """
    with contextlib.ExitStack() as stack:

        def make(server=redis_main, **options):
            """Abre um terminal. Argumentos: como em terminal. Retorno: ele."""
            return stack.enter_context(contextlib.closing(terminal(tmp_path, server, **options)))

        yield make


# Os blocos que as provas abaixo rodam, e os de outra página que são o mesmo bloco.
ran = {
    "README.md": ["$ curl http://127.0.0.1:8771/ping"],
    "packaging/doc/clientes.md": ["CORS_ORIGIN='*' python3 json-proxy.py &"],
    "packaging/doc/configuracao.md": ["$ cat meu.env", "$ PAUSE=vinte python3 json-proxy.py"],
    "packaging/doc/operacao.md": ["$ python3 json-proxy.py -R 127.0.0.1:1/1"],
    "packaging/doc/redis.md": [
        "$ redis-cli <<'FIM'",
        "$ redis-cli ACL SETUSER proxy ~ndjson_fila +rpush +lrem +lrange",
    ],
    "packaging/doc/contrato.md": [
        '$ curl -Ni http://127.0.0.1:8771/chat -d \'{"chatInput": "Olá"}\'',
        "$ curl -i http://127.0.0.1:8771/b",
        "$ redis-cli --raw -n 1 BLPOP ndjson_fila 0",
        "$ id=26b22251-ad61-4788-8b21-2bb46fb72281",
        '$ redis-cli -n 1 RPUSH ndjson_list_$id \'{"type": "begin"}\'',
        "$ redis-cli -n 1 DEL ndjson_task_$id",
        "$ redis-cli --raw SUBSCRIBE ndjson_jobs",
        "$ redis-cli -n 1 SET worker:claim:ndjson_task_$id eu NX EX 600",
        "$ redis-cli -n 1 <<FIM",
        "$ redis-cli -n 1 <<FIM",
    ],
}


def console(page):
    """Lê os blocos de comandos que rodam numa página, na ordem. Argumentos: page. Retorno: lista de textos."""
    found = [text for text in blocks(page, "console", "sh") if text.split("\n")[0].partition("  ")[0] not in elsewhere]
    assert [text.split("\n")[0] for text in found] == ran.get(page, [])
    return found


@pytest.mark.parametrize("page", commented)
def test_every_command_has_its_place(page):
    """Cada bloco diz o que é; o de comandos é rodado aqui, na página que o tem em português, ou está na lista dos outros."""
    fences = re.findall(r"(?m)^```(.*)$", read(page))
    assert set(fences[::2]) <= {"console", "sh", "ini", "text", "python", "js", "html"} and set(fences[1::2]) <= {""}
    if page not in pairs.values():
        console(page)


def test_commands_of_the_contract(open_terminal, start_proxy, connect, db, worker):
    """O contrato, comando a comando: a fila, o canal, a posse, a forma segura, a leitura literal e a recusa."""
    response, refused, pop, get, push, delete, listen, claim, safe, literal = console("packaging/doc/contrato.md")
    proxy = start_proxy(env={"REDIS_QUEUE": "ndjson_fila"})
    shell = open_terminal(port=proxy.port)

    def ask():
        """Faz a requisição e tira a tarefa. Retorno: o processo do cliente e a saída esperada dele."""
        [[command, expected]] = steps(response)
        process = shell.start(command)
        shell.id = shell.run(pop).split("ndjson_task_")[1].strip()
        return process, expected

    [[command, expected]] = steps(listen)
    listener = shell.start(command)
    harness.eventually(lambda: dict(db.pubsub_numsub("ndjson_jobs"))[b"ndjson_jobs"] == 2, 5, "o redis-cli ouve")
    client, answer = ask()
    shell.check(listener, expected)
    for text in (claim, get, push, delete):
        shell.run(text)
    shell.check(client, answer)

    for text, lines in ((safe, ['{"type": "item", "content": "Olá"}']), (literal, ["um", "dois", "três"])):
        client, answer = ask()
        shell.run(text)
        if text == safe:
            shell.run(delete)
        shell.check(client, answer.partition("\n\n")[0] + "\n\n" + "".join(line + "\n" for line in lines))
    worker.close()
    db.delete(*db.keys("worker:claim:*"))

    full = start_proxy("--max-streams", 1)
    held = connect(full).request("GET", "/").response()
    open_terminal(port=full.port).run(refused)
    harness.task(db, key := f"ndjson_task_{held.header('X-Task-Name')}", db.get(key)).finish()
    assert held.lines() == []


def test_commands_of_the_settings(open_terminal, tmp_path):
    """O --check do exemplo mostra o que se diz, e o valor errado é recusado com a frase que se diz."""
    check, wrong = console("packaging/doc/configuracao.md")
    (tmp_path / "meu.env").write_text(steps(check)[0][1], encoding="utf-8")
    open_terminal(REDIS_SERVER="127.0.0.1:1/1").run(wrong)
    shell = open_terminal()
    shell.env["REDIS_SERVER"] = shell.server.address
    shell.run(check)


def test_commands_of_the_operation(open_terminal):
    """As falhas do início são as frases que se diz."""
    [failures] = console("packaging/doc/operacao.md")
    open_terminal(ENV_FILE="/dev/null").run(failures)


def test_commands_of_redis(open_terminal, start_redis):
    """O usuário do proxy se cria como está escrito, e o proxy inicia com ele."""
    first, second = console("packaging/doc/redis.md")
    shell = open_terminal(server=start_redis(), ENV_FILE="/dev/null")
    shell.run(first)
    shell.run(second)


def test_commands_of_the_clients(open_terminal, redis_main):
    """O proxy e o worker de exemplo sobem juntos com as duas linhas do guia."""
    [both] = console("packaging/doc/clientes.md")
    shell = open_terminal(REDIS_SERVER=redis_main.address, ENV_FILE="/dev/null")
    (shell.folder / "packaging").symlink_to(harness.root / "packaging")
    process = shell.start(both.replace("python3", shlex.quote(sys.executable)) + "wait")
    shown = ""
    while not ("pronto: " in shown and "inscrito no canal" in shown):
        line = process.stdout.readline()
        assert line, shown
        shown += line


@pytest.mark.parametrize("page", ["README.md", "README.en.md"])
def test_worker_of_the_readme(page, open_terminal, start_proxy, redis_main, connect, db, tmp_path):
    """O worker do README tem até vinte linhas e responde ao curl do README; o cliente que sai não o derruba."""
    [code] = blocks(page, "python")
    assert len(code.splitlines()) <= 20
    [queue] = re.findall(r'"(ndjson_[a-z]+)", 1\)', code)
    assert f"`REDIS_QUEUE={queue}`" in read(page)
    proxy = start_proxy(env={"REDIS_QUEUE": queue})
    (tmp_path / "own.py").write_text(code.replace("127.0.0.1:6379/1", redis_main.address), encoding="utf-8")
    process = subprocess.Popen([sys.executable, tmp_path / "own.py"], env=harness.base_environment())
    try:
        [session] = console("README.md")
        open_terminal(port=proxy.port).run(session)
        gone = connect(proxy).request("POST", "/", body="palavra " * 1000)
        assert gone.response().line() == b'{"type": "item", "content": "palavra "}'
        gone.close()
        harness.eventually(lambda: not [key for key in db.keys("*") if b"_task_" in key], 5, "a tarefa acabou")
        response = connect(proxy).request("POST", "/", body="mais uma").response()
        assert [json.loads(line).get("content") for line in response.lines()] == ["mais ", "uma ", None]
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(10)
    harness.eventually(lambda: not db.keys("*"), 10, "nada sobrou")
