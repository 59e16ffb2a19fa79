"""As páginas de manual, nas duas línguas, e o completamento do bash: presos à tabela de configurações do programa."""

import contextlib
import os
import pathlib
import pty
import re
import select
import shlex
import shutil
import subprocess
import time
import typing

import pytest

import harness
import support

module = harness.load_program()
source = harness.program.read_text(encoding="utf-8")
table = module.settings
by_name = {row.name: row for row in table}
actions = ("--check", "--version", "-h", "--help")
flags = [flag for row in table for flag in row.flags]

manuals = harness.root / "packaging" / "man"
completion = harness.root / "packaging" / "completion" / module.program
languages = ("en", "pt_BR")
names = ("py-ndjson-proxy.8", "py-ndjson-proxy.env.5")
every_page = [(language, name) for language in languages for name in names]

# As palavras que as provas procuram, em cada língua.
words = {
    "en": {"to": "to", "default": "default", "empty": "empty", "ms": "milliseconds", "s": "seconds"}
    | {"allowed": "Allowed:", "cost": "Cost:", "bytes": "bytes"},
    "pt_BR": {"to": "a", "default": "padrão", "empty": "vazio", "ms": "milissegundos", "s": "segundos"}
    | {"allowed": "Permitido:", "cost": "Custo:", "bytes": "bytes"},
}
titles = {
    ("en", names[0]): "NAME SYNOPSIS DESCRIPTION OPTIONS CLIENTS WORKERS SIGNALS EXIT_STATUS FILES ENVIRONMENT LOG "
    "EXAMPLES SEE_ALSO AUTHORS",
    ("pt_BR", names[0]): "NOME SINOPSE DESCRIÇÃO OPÇÕES CLIENTES WORKERS SINAIS STATUS_DE_SAÍDA ARQUIVOS AMBIENTE LOG "
    "EXEMPLOS VEJA_TAMBÉM AUTORES",
    ("en", names[1]): "NAME SYNOPSIS DESCRIPTION LAYERS SYNTAX SETTINGS EXAMPLES FILES SEE_ALSO AUTHORS",
    ("pt_BR", names[1]): "NOME SINOPSE DESCRIÇÃO CAMADAS SINTAXE CONFIGURAÇÕES EXEMPLOS ARQUIVOS VEJA_TAMBÉM AUTORES",
}

# O que as páginas usam do man(7) e do roff, e mais nada: qualquer outra coisa é um engano.
macros = {"TH", "SH", "SS", "PP", "TP", "TQ", "IP", "RS", "RE", "B", "I", "BR", "nf", "fi", "br", "nh", "ad", "nr", "ds"}
escapes = {"-": "-", "e": "\\", "(aq": "'", "(dq": '"', "(bu": "•", " ": " "}

# Palavras em maiúsculas que não são configurações: siglas, comandos, métodos, sinais, palavras de fim.
capitals = {
    *("HTTP", "NDJSON", "JSON", "URL", "TCP", "CORS", "ASCII", "TLS", "UUID", "UTF", "ACL", "README", "HOME"),
    *("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "SUBSCRIBE", "SET", "RPUSH", "LPUSH", "BLPOP", "LREM", "DEL"),
    *("INFO", "PUBLISH", "LXC", "FILES", "ARQUIVOS"),
    *("CLIENT", "TRACKING", "EXPIRE", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "EOF", "EOL", "END", "NAME", "NOME"),
    *("OPÇÕES", "EXAMPLES", "EXEMPLOS", "NOTIFY_SOCKET", "JOURNAL_STREAM"),
}


class event(typing.NamedTuple):
    """Um pedaço de uma página: section, subsection, tag, item, text, break ou literal, e o texto dele sem marcas."""

    kind: str
    text: str


class manual(typing.NamedTuple):
    """Uma página lida: os argumentos de .TH e os seus pedaços, em ordem."""

    title: list
    events: list


def plain(text):
    """Tira as marcas do roff de uma linha, recusando as que as páginas não usam.

    Argumentos:
        text: a linha, ou o argumento de uma macro.

    Retorno:
        O texto como o leitor o vê. AssertionError se houver marca desconhecida, fonte que não volta ao normal, ou
        sinal que o roff trocaria por outro: o leitor não conseguiria copiá-lo.
    """
    font = "R"
    shown = []
    rest = text
    while rest:
        if rest[0] != "\\":
            assert rest[0] not in "-`^~\t", f"{rest[0]!r} deve ser escrito com escape: {text}"
            shown.append(rest[0])
            rest = rest[1:]
            continue
        name = rest[1:4] if rest[1:2] == "(" else rest[1:2]
        if name == "f":
            font = rest[2:3]
            assert font in ("B", "I", "R"), f"fonte desconhecida: {text}"
            rest = rest[3:]
            continue
        assert name in escapes, f"escape desconhecido: {text}"
        shown.append(escapes[name])
        rest = rest[1 + len(name) :]
    assert font == "R", f"a fonte não volta ao normal: {text}"
    return "".join(shown)


def arguments(text):
    """Separa os argumentos de uma macro.

    Argumentos:
        text: o que vem depois do nome dela.

    Retorno:
        Lista de textos, sem as aspas duplas que juntam palavras.
    """
    found = re.findall(r'"([^"]*)"|((?:\\.|[^\s"])+)', text)
    return [quoted or bare for quoted, bare in found]


class reader:
    """Lê uma página, conferindo cada linha dela."""

    def __init__(self, path):
        """Lê o arquivo inteiro.

        Argumentos:
            path: o caminho (pathlib.Path).
        """
        self.title = []
        self.events = []
        self.literal = None
        self.waits_for_tag = False
        self.depth = 0
        text = path.read_text(encoding="utf-8")
        assert text.startswith('.\\" -*- coding: UTF-8 -*-\n')
        assert text.endswith("\n")
        assert "\r" not in text
        for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
            try:
                self.read(line)
            except AssertionError as error:
                raise AssertionError(f"{path.name}, linha {number}: {error}") from None
        assert self.literal is None, "falta um .fi"
        assert self.depth == 0, "falta um .RE"
        assert not self.waits_for_tag, "falta o texto de um .TP"

    def read(self, line):
        """Lê uma linha.

        Argumentos:
            line: a linha, sem o LF.
        """
        assert line == line.rstrip(), "espaço no fim da linha"
        if line.startswith('.\\"'):
            return
        assert line, "linha vazia: use .PP"
        assert not line.startswith("'"), "um ' no início da linha é uma macro"
        if self.literal is not None and line != ".fi":
            assert "'" not in line, "em um comando, a aspa simples se escreve \\(aq"
            shown = plain(line)
            assert len(shown) <= 68, f"{len(shown)} colunas não cabem em um terminal de 80"
            self.literal.append(shown)
        elif line.startswith("."):
            name, _, rest = line[1:].partition(" ")
            assert name in macros, f"macro desconhecida: {name}"
            self.run(name, arguments(rest))
        else:
            assert not line.startswith(" "), "um espaço no início quebra a linha"
            self.add("text", plain(line))

    def run(self, name, given):
        """Interpreta uma macro.

        Argumentos:
            name: o nome dela.
            given: os argumentos dela.
        """
        if name in ("B", "I", "BR"):
            assert given
            self.add("text", ("" if name == "BR" else " ").join(plain(word) for word in given))
            return
        assert not self.waits_for_tag, "falta o texto de um .TP"
        if name == "TH":
            self.title = given
        elif name in ("SH", "SS"):
            assert self.depth == 0
            self.add({"SH": "section", "SS": "subsection"}[name], plain(" ".join(given)))
        elif name in ("TP", "TQ"):
            self.waits_for_tag = True
        elif name == "IP":
            self.add("item", plain(given[0]))
        elif name in ("PP", "br"):
            self.add("break", "")
        elif name in ("RS", "RE"):
            self.depth += 1 if name == "RS" else -1
            assert self.depth in (0, 1)
        elif name == "nf":
            self.literal = []
        elif name == "fi":
            assert self.literal, ".fi sem .nf"
            self.add("literal", "\n".join(self.literal))
            self.literal = None

    def add(self, kind, text):
        """Junta um pedaço à página.

        Argumentos:
            kind: o que ele é; "text" vira "tag" logo depois de .TP, e se junta ao texto que o antecede.
            text: o texto.
        """
        if kind == "text" and self.waits_for_tag:
            self.waits_for_tag = False
            kind = "tag"
        elif kind == "text" and self.events and self.events[-1].kind == "text":
            text = f"{self.events.pop().text} {text}"
        self.events.append(event(kind, text))


def read_page(language, name):
    """Lê uma página de manual.

    Argumentos:
        language: a língua.
        name: o nome do arquivo.

    Retorno:
        O manual.
    """
    folder = manuals if language == "en" else manuals / language
    found = reader(folder / name)
    return manual(found.title, found.events)


def section(language, name, number):
    """Lê uma seção de uma página.

    Argumentos:
        language: a língua.
        name: o nome do arquivo.
        number: a posição da seção.

    Retorno:
        Lista dos pedaços dela, sem o título.
    """
    events = read_page(language, name).events
    starts = [place for place, item in enumerate(events) if item.kind == "section"]
    return events[starts[number] + 1 : [*starts, len(events)][number + 1]]


def entries(events):
    """Reúne cada termo de uma lista à sua explicação.

    Argumentos:
        events: os pedaços.

    Retorno:
        Lista de (termo, parágrafos da explicação).
    """
    found = []
    is_open = False
    for item in events:
        if item.kind == "tag":
            found.append((item.text, []))
            is_open = True
        elif item.kind in ("section", "subsection", "item"):
            is_open = False
        elif item.kind == "text" and is_open:
            found[-1][1].append(item.text)
    return found


def flags_in(text):
    """Acha os argumentos escritos em um texto.

    Argumentos:
        text: o texto.

    Retorno:
        Lista deles, em ordem.
    """
    return re.findall(r"(?<![\w-])--?[^\W\d_][\w-]*", text)


def row_words(row):
    """Lê as palavras que uma configuração aceita. Argumentos: row, a linha da tabela. Retorno: lista, ou vazia."""
    return re.split(", | ou ", row.kind.allowed) if re.fullmatch(r"[\w/-]+(, [\w/-]+)* ou [\w/-]+", row.kind.allowed) else []


def check_values(language, row, text):
    """Confere que um texto diz o que uma configuração permite: limites e unidade, ou as palavras.

    Argumentos:
        language: a língua do texto.
        row: a linha da tabela.
        text: o texto.
    """
    limits = re.search(r"de (\d+) a (\d+)$", row.kind.allowed)
    if limits:
        assert re.search(rf"\b{limits[1]} {words[language]['to']} {limits[2]}\b", text), row.name
    if row.unit:
        assert words[language][row.unit] in text, row.name
    for word in row_words(row):
        assert re.search(rf"\b{word}\b", text), (row.name, word)


@pytest.mark.parametrize(("language", "name"), every_page)
def test_clean(language, name):
    """Só há marcas conhecidas e bem fechadas; havendo man na máquina, ele e o mandoc também não têm queixa."""
    assert read_page(language, name).events
    if shutil.which("man"):
        folder = manuals if language == "en" else manuals / language
        done = subprocess.run(
            [manuals / "lint", folder / name],
            env=harness.base_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("language", "name"), every_page)
def test_title_and_sections(language, name):
    """O cabeçalho traz nome, seção, data e a versão do programa; a primeira seção tem a forma que o whatis lê."""
    page = read_page(language, name)
    command, number = name.rsplit(".", 1)
    assert page.title[:2] == [command.upper(), number]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", page.title[2])
    assert page.title[3] == f"{module.program} {module.version}"
    assert len(page.title) == 5
    shown = [item.text for item in page.events if item.kind == "section"]
    assert shown == [word.replace("_", " ") for word in titles[language, name].split()]
    assert page.events[1].text.startswith(f"{command} - ")


@pytest.mark.parametrize("name", names)
def test_same_in_both_languages(name):
    """As duas línguas têm a mesma estrutura, os mesmos termos técnicos e os mesmos exemplos."""
    english, portuguese = (read_page(language, name).events for language in languages)
    assert [item.kind for item in english] == [item.kind for item in portuguese]
    for left, right in zip(english, portuguese, strict=True):
        if left.kind in ("item", "literal"):
            assert left.text == right.text
        elif left.kind == "tag":
            # Traduzem-se o nome do valor de um argumento, o NAME de um caminho e um comentário.
            first, second = (re.sub(r"NAME\b|NOME\b|   #.*", "", item.text) for item in (left, right))
            assert (flags_in(first) or first) == (flags_in(second) or second)
        for pattern in (r"\b\d[\d.,]*\b", r"\b[A-Z]+(?:_[A-Z]+)+\b"):
            one, two = (sorted(re.findall(pattern, item.text.replace(",", "."))) for item in (left, right))
            assert one == two, (left.text, right.text)


@pytest.mark.parametrize("language", languages)
def test_languages_are_not_mixed(language):
    """Nenhuma frase ficou na outra língua."""
    other = {
        "en": r"\b(não|que|uma|para|com|dos|pelo|são)\b",
        "pt_BR": r"\b(the|and|is|are|with|when|which|from|not|every)\b",
    }
    for name in names:
        for item in read_page(language, name).events:
            if item.kind == "text":
                assert len(re.findall(other[language], item.text)) < 2, item.text


@pytest.mark.parametrize("language", languages)
def test_options(language):
    """As opções são as da tabela, na ordem dela, cada uma com a sua variável, unidade, limites e padrão."""
    found = entries(section(language, names[0], 3))
    assert [tuple(flags_in(tag)) for tag, _ in found] == [
        *(row.flags for row in table),
        *(("--check",), ("--version",), ("-h", "--help")),
    ]
    for row, (_, body) in zip(table, found, strict=False):
        shown = re.fullmatch(rf"(\w+), (.*), {words[language]['default']} (.*)\.", body[-1])
        assert shown, (row.name, body)
        assert shown[1] == row.name
        check_values(language, row, shown[2])
        if row.default:
            assert shown[3] == row.default
        else:
            assert shown[3].split(" ")[0] == words[language]["empty"]


@pytest.mark.parametrize("language", languages)
def test_settings(language, tmp_path):
    """O manual do arquivo tem toda configuração, na ordem da tabela, escrita com o seu padrão, e diz o que ela custa."""
    found = entries(section(language, names[1], 5))
    assert [tag.partition("=")[0] for tag, _ in found] == [row.name for row in table]
    for row, (tag, body) in zip(table, found, strict=True):
        (tmp_path / "one.env").write_text(tag + "\n", encoding="utf-8")
        assert module.read_env_file(tmp_path / "one.env", True) == {row.name: row.default}
        allowed = [text for text in body if text.startswith(words[language]["allowed"])]
        assert len(allowed) == 1, row.name
        check_values(language, row, allowed[0])
        assert len([text for text in body if text.startswith(words[language]["cost"])]) == 1, row.name


@pytest.mark.parametrize("language", languages)
def test_syntax_is_the_real_one(language, tmp_path):
    """O que o manual diz que é lido de cada linha de exemplo é o que o programa lê."""
    found = entries(section(language, names[1], 4))
    assert len(found) >= 7
    for tag, body in found:
        (tmp_path / "one.env").write_text(tag + "\n", encoding="utf-8")
        assert list(module.read_env_file(tmp_path / "one.env", True).values()) == body


@pytest.mark.parametrize(("language", "name"), every_page)
def test_no_unknown_name(language, name):
    """Não há nome de configuração nem argumento que o programa não conheça."""
    known = {*by_name, *capitals}
    extra = {"--now", "-n", "--option", "-value", "--opção", "-valor"}
    for item in read_page(language, name).events:
        if item.kind in ("section", "subsection"):
            continue
        assert set(re.findall(r"(?<![\w-])[^\W\d_a-z]{3,}(?:_[A-Z]+)*\b(?!_)", item.text)) <= known, item.text
        if item.kind != "literal":
            assert set(flags_in(item.text)) <= {*flags, *actions, *extra}, item.text


def test_commands_are_valid(tmp_path):
    """Todo comando do programa nos exemplos é aceito por ele; todo exemplo de arquivo ou de unit usa nomes válidos."""
    literals = [item.text for name in names for item in read_page("en", name).events if item.kind == "literal"]
    commands = 0
    for line in "\n".join(literals).replace("\\\n", " ").splitlines():
        given = shlex.split(line.replace("&&", ";").split(";")[0]) if module.program in line else []
        while given and "=" in given[0] and given[0].split("=")[0] in by_name:
            del given[0]
        if given[:1] == [module.program]:
            commands += 1
            for key, value in module.read_arguments(given[1:]).items():
                if key in by_name:
                    by_name[key].kind.parse(value)
        elif line.startswith("Environment="):
            key, _, value = shlex.split(line)[0].removeprefix("Environment=").partition("=")
            by_name[key].kind.parse(value)
    assert commands >= 3
    files = [text for text in literals if re.match(r"[A-Z_]+=\S+\n", text)]
    assert files
    for text in files:
        (tmp_path / "one.env").write_text(text + "\n", encoding="utf-8")
        for key, value in module.read_env_file(tmp_path / "one.env", True).items():
            by_name[key].kind.parse(value)


@pytest.mark.parametrize("language", languages)
def test_contract_is_the_program_s(language, share_proxy, connect, worker):
    """Códigos de erro, campos e frases do log, razões do fim e palavras de fim são os do programa."""
    clients, workers = (section(language, names[0], number) for number in (4, 5))
    codes = [tag.split() for tag, _ in entries(clients)]
    assert len(codes) == 10
    for status, code in codes:
        assert re.search(rf'{status}[,:].{{0,60}}"{code}"|"{code}"', source), (status, code)
    text = " ".join(item.text for item in workers)
    for word in ("EOF", "EOL", "END-OF-FILE", "END-OF-LIST", "task_key", "task_list", "body_encoding"):
        assert re.search(rf"(?<![\w-]){word}(?![\w-])", text), word

    log = entries(section(language, names[0], 10))
    documented = [word for tag, _ in log for word in tag.split(", ")]
    proxy = share_proxy()
    response, task = support.open_stream(connect, proxy, worker)
    task.finish()
    assert response.lines() == []
    fields = list(support.finished_row(proxy, task))
    assert documented[: len(fields)] == fields
    for phrase in documented[len(fields) :]:
        for part in phrase.split(": ... "):
            assert part in source, part
    reason_text = next(body for tag, body in log if tag == "fim")[0]
    assert {"concluida", "eof", "timeout", "cliente", "erro", "shutdown"} <= set(re.findall(r"\w+", reason_text))


# -- completamento do bash ------------------------------------------------------


def complete(*line, breaks=None):
    """Pede ao bash as respostas do completamento.

    Argumentos:
        line: as palavras da linha, sem o comando, como o bash as separa; a última é a que está sendo completada.
        breaks: o COMP_WORDBREAKS; None é o do bash.

    Retorno:
        Lista das respostas; "<files>" se o bash foi mandado completar nomes de arquivos.
    """
    script = (
        'source "$1"; shift\n'
        "compopt() { echo '<files>'; [[ $* == '-o default' ]]; }\n"
        '[[ -z $1 ]] || COMP_WORDBREAKS=$1; shift\n'
        'COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))\n'
        '_py_ndjson_proxy "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"\n'
        '[[ ${#COMPREPLY[@]} -eq 0 ]] || printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "--noprofile", "-euc", script, "bash", completion, breaks or "", module.program, *line],
        env=harness.base_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_completion_of_flags():
    """Onde cabe um argumento são oferecidos todos os da tabela, na ordem dela, e só eles."""
    assert complete("") == [*flags, *actions]
    assert complete("-") == [*flags, *actions]
    assert complete("--max") == [flag for flag in flags if flag.startswith("--max")]
    assert complete("--check", "--che") == ["--check"]
    assert complete("--server", "flask", "--hea") == ["--headers-exclude", "--heartbeat", "--heartbeat-line"]
    assert complete("-p", "8771", "--vers") == ["--version"]
    assert complete("--server", "=", "flask", "--vers") == ["--version"]
    assert complete("--nada") == []
    assert complete("x") == []


@pytest.mark.parametrize("flag", flags)
def test_completion_of_values(flag):
    """Depois de um argumento vêm as palavras que ele aceita, ou nomes de arquivos, ou nada: nunca outro argumento."""
    row = next(row for row in table if flag in row.flags)
    expected = ["<files>"] if row.name == "ENV_FILE" else row_words(row)
    assert complete(flag, "") == expected
    if expected and row.name != "ENV_FILE":
        assert complete(flag, expected[-1][:2]) == [word for word in expected if word.startswith(expected[-1][:2])]
    if flag.startswith("--"):
        assert complete(flag, "=") == expected
        assert complete("--check", flag, "=", "") == expected
        assert complete(f"{flag}=", breaks=" \t\n") == [
            word if row.name == "ENV_FILE" else f"{flag}={word}" for word in expected
        ]


def test_completion_inside_a_value():
    """Valores que o bash separa em palavras, por causa de : e de =, continuam sendo um valor só."""
    assert complete("-f", "/etc/a.env", ":", "/etc/b") == ["<files>"]
    assert complete("-f", "/etc/a.env", ":") == ["<files>"]
    assert complete("--env-file", "=", "/a", ":", "/b", ":", "/c") == ["<files>"]
    assert complete("-R", "127.0.0.1", ":", "63") == []
    assert complete("--redis", "=", "redis", "://", "x") == []
    assert complete("--host", "::") == []
    assert complete("--host", "::", "--server", "w") == ["waitress"]
    assert complete(":") == [*flags, *actions]


def test_completion_is_found_by_name():
    """O arquivo tem o nome do comando, que é como o bash-completion o acha, e se declara para ele."""
    done = subprocess.run(
        ["bash", "--norc", "--noprofile", "-euc", 'source "$1"; complete -p', "bash", completion],
        env=harness.base_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"complete -F _py_ndjson_proxy {completion.name}" in done.stdout.splitlines()
    assert not completion.stat().st_mode & 0o111


class terminal:
    """Um bash interativo, com o readline de verdade, em um terminal de mentira."""

    def __init__(self, folder):
        """Inicia o bash e carrega o completamento.

        Argumentos:
            folder: pasta em que ele trabalha (pathlib.Path).
        """
        self.seen = ""
        self.main, side = pty.openpty()
        self.process = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "-i"],
            stdin=side,
            stdout=side,
            stderr=side,
            cwd=folder,
            env={**harness.base_environment(), "TERM": "dumb", "HISTFILE": "", "INPUTRC": "/dev/null", "PS1": ""},
            start_new_session=True,
        )
        os.close(side)
        # Sem colchetes de colagem nem sinos; Ctrl-X e d mostra a linha que está sendo escrita.
        self.send(
            "bind 'set enable-bracketed-paste off' 'set bell-style none'\n"
            'show() { printf "\\n<%s>\\n" "$READLINE_LINE"; }\n'
            "bind -x '\"\\C-xd\": show'\n"
            f"source {shlex.quote(str(completion))}; echo re''ady\n"
        )
        self.wait_for(r"ready")

    def send(self, text):
        """Escreve no terminal.

        Argumentos:
            text: o que seria teclado.
        """
        os.write(self.main, text.encode())

    def wait_for(self, pattern):
        """Espera que algo apareça no terminal, a partir do que ainda não foi visto.

        Argumentos:
            pattern: expressão regular.

        Retorno:
            O re.Match.
        """
        deadline = time.monotonic() + 20
        while True:
            found = re.search(pattern, self.seen)
            if found:
                self.seen = self.seen[found.end() :]
                return found
            ready, _, _ = select.select([self.main], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"não apareceu {pattern!r} em {self.seen!r}"
            self.seen += os.read(self.main, 65536).decode(errors="replace").replace("\r", "")

    def complete(self, text):
        """Tecla uma linha e TAB.

        Argumentos:
            text: a linha.

        Retorno:
            A linha como o readline a deixou.
        """
        self.send(f"{text}\t\x18d")
        found = self.wait_for(r"\n<([^\n]*)>\n")[1]
        self.send("\x15")
        return found

    def close(self):
        """Encerra o bash."""
        self.process.kill()
        self.process.wait()
        os.close(self.main)


def test_completion_in_a_terminal(tmp_path):
    """Num bash interativo, TAB completa argumentos, palavras e nomes de arquivos, os que têm espaço inclusive."""
    (tmp_path / "um arquivo.env").touch()
    (tmp_path / "outro.env").touch()
    (tmp_path / "pasta").mkdir()
    (tmp_path / "pasta" / "dentro.env").touch()
    (tmp_path / "waitress.txt").touch()
    with contextlib.closing(terminal(tmp_path)) as screen:
        for given, expected in (
            ("--log-l", "--log-level "),
            ("--log-level war", "--log-level warning "),
            ("--server=w", "--server=waitress "),
            ("-f ou", "-f outro.env "),
            ("-f um", r"-f um\ arquivo.env "),
            ("--env-file=pasta/d", "--env-file=pasta/dentro.env "),
            ("-f outro.env:pas", "-f outro.env:pasta/"),
            ("-R wait", "-R wait"),
        ):
            assert screen.complete(f"{module.program} {given}") == f"{module.program} {expected}"
        program = pathlib.Path("/opt/json-proxy.py")
        assert screen.complete(f"{program} --drai") == f"{program} --drain "
