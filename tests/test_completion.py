"""O completamento do bash: preso à tabela de configurações do programa, e provado num terminal."""

import contextlib
import os
import pathlib
import pty
import re
import select
import shlex
import subprocess
import time

import pytest

import harness
import support

module = harness.load_program()
table = module.settings
actions = ("--check", "--version", "-h", "--help")
flags = [flag for row in table for flag in row.flags]
completion = harness.root / "packaging" / "completion" / module.program


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
        "[[ -z $1 ]] || COMP_WORDBREAKS=$1; shift\n"
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
    expected = ["<files>"] if row.name == "ENV_FILE" else support.row_words(row)
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
