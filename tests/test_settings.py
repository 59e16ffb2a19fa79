"""Configurações: camadas, valores errados, falhas de início, --check, --help, --version e os textos sobre elas."""

import io
import os
import pathlib
import re
import socket
import subprocess
import sys

import dotenv
import pytest

import harness
import support

program = harness.load_program()
table = program.settings
names = [row.name for row in table]
by_name = {row.name: row for row in table}

# A tabela do contrato: nome, argumentos e padrão. As dez primeiras são da especificação, palavra por palavra.
contract = {
    "HTTP_PORT": ("-p --port", "8771"),
    "REDIS_SERVER": ("-R --redis", "127.0.0.1:6379/1"),
    "REDIS_PASSWORD": ("-S --secret", ""),
    "REDIS_CHANNEL": ("-C --channel", "ndjson_jobs"),
    "REDIS_QUEUE": ("--queue", ""),
    "REDIS_PREFIX": ("-X --prefix", "ndjson_task_"),
    "INTERVAL": ("-i --interval", "200"),
    "PAUSE": ("-P --pause", "20"),
    "MAXTIME": ("-t --maxtime", "45000"),
    "MAXTIME_ERROR": ("-E --maxtime-error", '{"error": "timeout"}'),
    "SERVERNAME": ("-s --servername", "py-ndjson-proxy"),
    "REDIS_LIST_PREFIX": ("-L --list-prefix", "ndjson_list_"),
    "REDIS_TTL": ("--ttl", "600"),
    "REDIS_WAKE": ("--wake", "on"),
    "REDIS_REANNOUNCE": ("--reannounce", "on"),
    "HTTP_HOST": ("--host", "0.0.0.0"),
    "HTTP_SERVER": ("--server", "flask"),
    "MAX_STREAMS": ("--max-streams", "4096"),
    "MAX_BODY": ("--max-body", "16777216"),
    "REQUEST_TIMEOUT": ("--request-timeout", "30000"),
    "CONTENT_TYPE": ("--content-type", "application/x-ndjson"),
    "METRICS_PORT": ("--metrics-port", "0"),
    "METRICS_HOST": ("--metrics-host", "127.0.0.1"),
    "HEARTBEAT": ("--heartbeat", "0"),
    "HEARTBEAT_LINE": ("--heartbeat-line", '{"type": "ping"}'),
    "AUTH_TOKEN": ("--auth-token", ""),
    "HEADERS_EXCLUDE": ("--headers-exclude", ""),
    "CORS_ORIGIN": ("--cors-origin", ""),
    "TRUST_PROXY": ("--trust-proxy", "0"),
    "DRAIN": ("--drain", "5000"),
    "LOG_LEVEL": ("--log-level", "info"),
    "ENV_FILE": ("-f --env-file", "/etc/py-ndjson-proxy.env"),
}

# Três valores válidos de cada configuração, um por camada: arquivo, ambiente, argumento. Uma linha nova da tabela
# pede a sua aqui, e outra em `wrong`.
samples = {
    "HTTP_PORT": ("18771", "28771", "38771"),
    "REDIS_SERVER": ("127.0.0.1:1/2", "127.0.0.2:2/3", "127.0.0.3:3/4"),
    "REDIS_PASSWORD": ("um", "dois", "três"),
    "REDIS_CHANNEL": ("canal_a", "canal_b", "canal_c"),
    "REDIS_QUEUE": ("fila_a", "fila_b", "fila_c"),
    "REDIS_PREFIX": ("tarefa_a:", "tarefa_b:", "tarefa_c:"),
    "INTERVAL": ("201", "202", "203"),
    "PAUSE": ("0", "22", "23"),
    "MAXTIME": ("1001", "1002", "1003"),
    "MAXTIME_ERROR": ('{"a": 1}', '{"b": "x # y"}', '{"c": "${HOME}"}'),
    "SERVERNAME": ("nome a", "nome-b", "nome/c"),
    "REDIS_LIST_PREFIX": ("lista_a:", "lista_b:", "lista_c:"),
    "REDIS_TTL": ("61", "62", "63"),
    "REDIS_WAKE": ("off", "on", "off"),
    "REDIS_REANNOUNCE": ("off", "on", "off"),
    "HTTP_HOST": ("127.0.0.2", "127.0.0.3", "127.0.0.4"),
    "HTTP_SERVER": ("waitress", "flask", "waitress"),
    "MAX_STREAMS": ("11", "12", "13"),
    "MAX_BODY": ("1001", "1002", "1003"),
    "REQUEST_TIMEOUT": ("1001", "1002", "1003"),
    "CONTENT_TYPE": ("application/jsonl", "application/json-lines", "application/json"),
    "METRICS_PORT": ("19771", "29771", "39771"),
    "METRICS_HOST": ("127.0.0.2", "127.0.0.3", "::1"),
    "HEARTBEAT": ("1001", "1002", "1003"),
    "HEARTBEAT_LINE": ('{"type": "a"}', '{"type": "b"}', '{"type": "c"}'),
    "AUTH_TOKEN": ("um", "dois,tres", "$quatro#cinco"),
    "HEADERS_EXCLUDE": ("cookie", "none", "x-a, x-b"),
    "CORS_ORIGIN": ("*", "https://b.test", "https://c.test,https://d.test:8443"),
    "TRUST_PROXY": ("1", "2", "16"),
    "DRAIN": ("101", "102", "103"),
    "LOG_LEVEL": ("debug", "warning", "error"),
    "ENV_FILE": (None, "ambiente.env", "argumento.env"),
}

# Um valor que nenhuma camada pode aceitar. Uma senha pode ser qualquer texto.
wrong = {
    "HTTP_PORT": "abc",
    "REDIS_SERVER": "isto/nao/e",
    "REDIS_PASSWORD": None,
    "REDIS_CHANNEL": "",
    "REDIS_QUEUE": "com espaço",
    "REDIS_PREFIX": "",
    "INTERVAL": "0",
    "PAUSE": "-1",
    "MAXTIME": "x",
    "MAXTIME_ERROR": "",
    "SERVERNAME": "não-ascii",
    "REDIS_LIST_PREFIX": "",
    "REDIS_TTL": "10m",
    "REDIS_WAKE": "talvez",
    "REDIS_REANNOUNCE": "nunca",
    "HTTP_HOST": "",
    "HTTP_SERVER": "gunicorn",
    "MAX_STREAMS": "0",
    "MAX_BODY": "16M",
    "REQUEST_TIMEOUT": "30s",
    "CONTENT_TYPE": "text/plain",
    "METRICS_PORT": "65536",
    "METRICS_HOST": "com espaço",
    "HEARTBEAT": "1.5",
    "HEARTBEAT_LINE": "",
    "AUTH_TOKEN": "não-ascii",
    "HEADERS_EXCLUDE": "X-A: b",
    "CORS_ORIGIN": "exemplo",
    "TRUST_PROXY": "17",
    "DRAIN": "já",
    "LOG_LEVEL": "tudo",
    "ENV_FILE": "",
}

# A senha do contrato: tudo o que um leitor de arquivos ou um shell gostaria de interpretar.
password = "s#e$n ha${HOME}\"'"

layers = ("arquivo", "ambiente", "argumento")


def write_env(folder, text, name="prova.env"):
    """Escreve um arquivo de ambiente.

    Argumentos:
        folder: pasta (pathlib.Path).
        text: conteúdo, str ou bytes.
        name: nome do arquivo.

    Retorno:
        O caminho (str).
    """
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def quoted(value):
    """Escreve um valor entre aspas simples, na sintaxe do python-dotenv.

    Argumentos:
        value: o valor.

    Retorno:
        O texto para depois do sinal de igual.
    """
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def read_check(text):
    """Interpreta a saída de --check.

    Argumentos:
        text: o que foi para stdout.

    Retorno:
        Dicionário de nome para (valor, camada), na ordem em que as linhas vieram.
    """
    rows = re.findall(r"^([A-Z_]+) = (.*)  \((.+)\)$", text, re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len(rows), f"configuração repetida em --check: {text}"
    return {name: (value, layer) for name, value, layer in rows}


def give(folder, layer, name, value):
    """Põe um valor numa camada.

    Argumentos:
        folder: pasta da prova.
        layer: uma de layers.
        name: nome da configuração.
        value: o valor.

    Retorno:
        Tupla de (argumentos, ambiente), com ENV_FILE sempre apontando um arquivo da prova.
    """
    text = f"{name}={quoted(value)}\n" if layer == "arquivo" else ""
    env = {"ENV_FILE": write_env(folder, text)}
    flags = []
    if layer == "ambiente":
        env[name] = value
    if layer == "argumento":
        flag = by_name[name].flags[-1]
        flags = [f"{flag}={value}"]
    return flags, env


def in_time(done):
    """Confere que a execução cabe nos 6 s do contrato; uma máquina ocupada atrasa qualquer uma, mas não três seguidas.

    Argumentos:
        done: o harness.finished.
    """
    times = [done.took]
    while times[-1] >= 6 and len(times) < 3:
        times.append(done.again().took)
    assert times[-1] < 6, (times, done)


def one_sentence(done, status):
    """Confere que o programa terminou com uma frase só em stderr e mais nada.

    Argumentos:
        done: o harness.finished.
        status: código de saída esperado.

    Retorno:
        A frase.
    """
    assert done.status == status, done
    assert done.out == "", done
    lines = done.err.splitlines()
    assert len(lines) == 1, done
    assert lines[0].startswith("erro: "), done
    in_time(done)
    return lines[0]


def test_table_is_the_contract():
    """Nomes, argumentos e padrões são os da especificação e do contrato; linhas novas só se somam."""
    found = {row.name: (" ".join(row.flags), row.default) for row in table}
    assert {name: found.get(name) for name in contract} == contract
    assert len(set(names)) == len(names)
    flags = [flag for row in table for flag in row.flags]
    assert len(set(flags)) == len(flags)
    assert set(samples) == set(names), "toda configuração tem amostras nesta prova"
    assert set(wrong) == set(names), "toda configuração tem um valor errado nesta prova"
    assert [row.name for row in table if row.secret and row.default] == []


@pytest.fixture(scope="module")
def layer_runs(tmp_path_factory):
    """Executa --check com todas as configurações em cada camada, as de cima sempre sobre as de baixo.

    Retorno:
        Dicionário de passo para o resultado de read_check. Passos: "padrão", "arquivo", "ambiente", "argumento curto",
        "argumento longo", "argumento com igual".
    """
    folder = tmp_path_factory.mktemp("camadas")
    lines = [f"{name}={quoted(values[0])}\n" for name, values in samples.items() if values[0] is not None]
    files = {name: write_env(folder, "".join(lines), name) for name in ("um.env", *samples["ENV_FILE"][1:])}
    in_env = {name: values[1] for name, values in samples.items()} | {"ENV_FILE": files[samples["ENV_FILE"][1]]}
    in_arg = {name: values[2] for name, values in samples.items()} | {"ENV_FILE": files[samples["ENV_FILE"][2]]}
    short = [word for row in table for word in (row.flags[0], in_arg[row.name])]
    long = [word for row in table for word in (row.flags[-1], in_arg[row.name])]
    equal = [f"{row.flags[-1]}={in_arg[row.name]}" for row in table]
    steps = {
        "padrão": ([], {"ENV_FILE": write_env(folder, "")}),
        "arquivo": ([], {"ENV_FILE": files["um.env"]}),
        "ambiente": ([], in_env),
        "argumento curto": (short, in_env),
        "argumento longo": (long, in_env),
        "argumento com igual": (equal, in_env),
    }
    runs = {}
    for step, (flags, env) in steps.items():
        # O Redis das amostras não existe: o código é 1, e as configurações aparecem do mesmo modo.
        done = harness.run_proxy("--check", *flags, env=env)
        assert done.status in (0, 1), done
        runs[step] = read_check(done.out)
    runs["arquivos"] = files
    return runs


def test_layers(layer_runs):
    """Cada configuração: padrão, arquivo, ambiente, argumento, nessa ordem de força."""
    files = layer_runs["arquivos"]
    for row in table:
        if row.name == "ENV_FILE":
            continue
        in_file, in_env, in_arg = samples[row.name]
        flags = [f"argumento {flag}" for flag in row.flags]
        for step, value, where in (
            ("padrão", row.default, ["padrão"]),
            ("arquivo", in_file, [f"arquivo {files['um.env']}"]),
            ("ambiente", in_env, ["ambiente"]),
            ("argumento curto", in_arg, flags),
            ("argumento longo", in_arg, flags),
            ("argumento com igual", in_arg, flags),
        ):
            shown, layer = layer_runs[step][row.name]
            assert shown == (("********" if value else "") if row.secret else value), (row.name, step)
            assert layer in where, (row.name, step)
    # ENV_FILE não pode vir do arquivo, e o arquivo lido é o da camada mais forte.
    assert layer_runs["ambiente"]["ENV_FILE"] == (files["ambiente.env"], "ambiente")
    for step in ("argumento curto", "argumento longo", "argumento com igual"):
        assert layer_runs[step]["ENV_FILE"] in [
            (files["argumento.env"], f"argumento {f}") for f in ("-f", "--env-file")
        ]


def test_strongest_env_file(tmp_path, redis_main):
    """O arquivo lido é o da camada mais forte; sem nenhum, ENV_FILE é o padrão."""
    first, second = write_env(tmp_path, "PAUSE=1\n", "um.env"), write_env(tmp_path, "PAUSE=2\n", "dois.env")
    done = harness.run_proxy("--check", env={"REDIS_SERVER": redis_main.address})
    assert read_check(done.out)["ENV_FILE"] == (by_name["ENV_FILE"].default, "padrão")
    done = harness.run_proxy("--check", "-f", first, env={"ENV_FILE": second})
    assert read_check(done.out)["PAUSE"] == ("1", f"arquivo {first}")


@pytest.mark.parametrize("name", ["REDIS_PASSWORD", "CORS_ORIGIN"])
def test_empty_value_is_a_value(name, tmp_path, redis_main):
    """Uma variável de ambiente vazia prevalece sobre o arquivo: é assim que se desliga o que ele liga."""
    file = write_env(tmp_path, f"{name}=*\n")
    done = harness.run_proxy("--check", env={"ENV_FILE": file, name: "", "REDIS_SERVER": redis_main.address})
    assert read_check(done.out)[name] == ("", "ambiente"), done


def test_layers_reach_the_wire(start_proxy, fetch):
    """As quatro camadas valem no processo que atende, e não só em --check."""
    file = "SERVERNAME=do arquivo  # comentário\n"
    for flags, env, text, expected in (
        ((), {}, "", "py-ndjson-proxy"),
        ((), {}, file, "do arquivo"),
        ((), {"SERVERNAME": "do ambiente"}, file, "do ambiente"),
        (("-s", "do argumento"), {"SERVERNAME": "do ambiente"}, file, "do argumento"),
    ):
        proxy = start_proxy(*flags, env=env, env_file=text)
        assert fetch(proxy, "GET", "/ping").header_all("Server") == [expected]


@pytest.fixture
def check_alone(start_redis, tmp_path):
    """Roda --check num espaço de rede próprio, onde a porta padrão está livre.

    Retorno:
        Função que recebe o conteúdo do arquivo de configuração e devolve o harness.finished.
    """
    path = tmp_path / "redis.sock"
    start_redis(f"unixsocket {path}")

    def run(text):
        """Roda. Argumentos: text, o conteúdo do arquivo. Retorno: o harness.finished."""
        env = {"ENV_FILE": write_env(tmp_path, text), "REDIS_SERVER": f"unix://{path}?db=1"}
        return harness.run_proxy("--check", env=env, wrapper=support.apart("net"))

    return run


def test_table_defaults_are_live(check_alone):
    """Sem nenhuma configuração, --check mostra todas, na ordem da tabela, com o padrão de cada uma."""
    done = check_alone("")
    assert done.status == 0, done
    shown = read_check(done.out)
    assert list(shown) == names
    for row in table:
        if row.name not in ("REDIS_SERVER", "ENV_FILE"):
            assert shown[row.name] == (row.default, "padrão")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("export SERVERNAME=abc\n", id="export"),
        pytest.param("# comentário\n\nSERVERNAME=abc\r\nPAUSE=0\r\n", id="crlf"),
        pytest.param("\ufeffSERVERNAME=abc\n", id="bom"),
        pytest.param('SERVERNAME="abc" # com aspas\n', id="aspas"),
        pytest.param("  SERVERNAME = abc\n", id="espaços"),
        pytest.param("SERVERNAME=abc", id="sem-fim-de-linha"),
        pytest.param("SERVERNAME=errado\nSERVERNAME=abc\n", id="repetido"),
    ],
)
def test_env_file_forms(text, tmp_path):
    """O arquivo aceita as formas usuais de um arquivo de ambiente."""
    _, given, warnings = program.load_settings([], {"ENV_FILE": write_env(tmp_path, text)})
    assert (given["SERVERNAME"].text, warnings) == ("abc", [])


@pytest.mark.parametrize(
    ("layer", "form"),
    [
        ("arquivo", "REDIS_PASSWORD=" + password),
        ("arquivo", "REDIS_PASSWORD=" + quoted(password)),
        ("ambiente", None),
        ("argumento", "-S"),
        ("argumento", "--secret"),
        ("url", None),
    ],
    ids=["arquivo-sem-aspas", "arquivo-com-aspas", "ambiente", "-S", "--secret", "url"],
)
def test_password(layer, form, start_redis, start_proxy, fetch, tmp_path):
    """Uma senha cheia de sinais chega intacta por qualquer camada, e nunca aparece no log nem em --check."""
    server = start_redis(password=password)
    plain = {"REDIS_SERVER": server.address}
    flags = []
    env_file = form + "\n" if layer == "arquivo" else ""
    if layer == "ambiente":
        plain["REDIS_PASSWORD"] = password
    if layer == "argumento":
        flags = [form, password]
    if layer == "url":
        coded = "".join(f"%{ord(char):02X}" for char in password)
        plain["REDIS_SERVER"] = f"redis://:{coded}@{server.address}"
    # O acessório daria a senha pelo ambiente: aqui só vale a camada da prova.
    server.password = ""
    try:
        proxy = start_proxy(*flags, env=plain, env_file=env_file, redis=server)
        assert fetch(proxy, "GET", "/ping").body() == b"pong"
        env = {**plain, "HTTP_PORT": "0", "ENV_FILE": write_env(tmp_path, env_file)}
        done = harness.run_proxy("--check", *flags, env=env)
    finally:
        server.password = password
    assert done.status == 0, done
    for text in (proxy.log(), done.out, done.err):
        assert "s#e" not in text
        assert "%73%23" not in text
    if layer != "url":
        assert read_check(done.out)["REDIS_PASSWORD"][0] == "********"


@pytest.mark.parametrize("form", ["url", "unix", "db"])
def test_redis_addresses(form, start_redis, start_proxy, start_worker, connect):
    """REDIS_SERVER aceita URLs, com usuário da ACL, e soquetes; as chaves vão para o banco dito."""
    folder = pathlib.Path(os.environ.get("TMPDIR", "/tmp"))
    sock = folder / f"prova-{os.getpid()}-{harness.free_port()}.sock"
    server = start_redis(f"unixsocket {sock}", "user proxy on >segredo ~* &* +@all")
    address, number = {
        "url": (f"redis://proxy:segredo@127.0.0.1:{server.port}/4", 4),
        "unix": (f"unix://{sock}?db=6", 6),
        "db": (f"127.0.0.1:{server.port}/5", 5),
    }[form]
    proxy = start_proxy(env={"REDIS_SERVER": address}, redis=server)
    worker = start_worker(server.client(number))
    conn = connect(proxy).request("POST", "/x")
    task = worker.next()
    task.finish("1")
    assert conn.response().lines() == [b"1"]
    assert "segredo" not in proxy.log()
    shown = {"url": f"redis://127.0.0.1:{server.port}/4", "unix": address, "db": address}[form]
    assert f"Redis em {shown}\n" in proxy.log()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("127.0.0.1:1", "127.0.0.1:1/0"),
        ("127.0.0.1:1/", "127.0.0.1:1/0"),
        ("127.0.0.1:1/2/", "127.0.0.1:1/2"),
        ("redis://127.0.0.1:1", "redis://127.0.0.1:1/0"),
        ("redis://127.0.0.1:1/", "redis://127.0.0.1:1/0"),
        ("redis://127.0.0.1:1/2/", "redis://127.0.0.1:1/2"),
        ("redis://127.0.0.1:1?db=3", "redis://127.0.0.1:1/3"),
        ("redis://eu:segredo@127.0.0.1:1/2?db=3&password=segredo", "redis://127.0.0.1:1/3"),
        ("rediss://[::1]:1/4?ssl_cert_reqs=none", "rediss://[::1]:1/4"),
        ("unix:///nada.sock", "unix:///nada.sock?db=0"),
        ("unix://eu:segredo@/nada.sock?db=6", "unix:///nada.sock?db=6"),
    ],
)
def test_redis_address_shown(given, shown):
    """O endereço mostrado diz o database em uso, venha ele de onde vier, e não traz segredo; a barra final é aceita."""
    assert by_name["REDIS_SERVER"].kind.parse(given).shown == shown


def test_redis_address_in_check(tmp_path):
    """--check mostra o endereço assim, e nunca o segredo que o valor dado traz."""
    given, shown = "redis://eu:segredo@127.0.0.1:1/2?db=3&password=segredo", "redis://127.0.0.1:1/3"
    done = harness.run_proxy("--check", env={"ENV_FILE": write_env(tmp_path, ""), "REDIS_SERVER": given})
    assert done.status == 1, done
    assert read_check(done.out)["REDIS_SERVER"] == (shown, "ambiente")
    assert f" {shown} " in done.err
    assert "segredo" not in done.out + done.err


@pytest.mark.parametrize("name", [name for name in names if wrong[name] is not None])
def test_wrong_values(name, tmp_path):
    """Um valor errado, em qualquer camada: uma frase com nome, valor, camada e o que é permitido; código 2."""
    row = by_name[name]
    for number, layer in enumerate(layers):
        # ENV_FILE dentro do próprio arquivo não tem efeito: vira um aviso (test_env_file_inside_itself).
        if (name, layer) == ("ENV_FILE", "arquivo"):
            continue
        flags, env = give(tmp_path, layer, name, wrong[name])
        sentence = harness.refusal(*flags, env=env)
        # Em uma das camadas, de verdade; o caminho até a frase é o mesmo nas três.
        if number == names.index(name) % 3:
            assert one_sentence(harness.run_proxy(*flags, env=env), 2) == sentence
        assert re.search(rf"\b{name}\b", sentence)
        assert (wrong[name] in sentence) != row.secret
        assert row.secret or repr(wrong[name]) in sentence
        assert row.kind.allowed in sentence
        where = {
            "arquivo": [f"arquivo {env['ENV_FILE']}"],
            "ambiente": ["ambiente"],
            "argumento": [f"argumento {flag}" for flag in row.flags],
        }[layer]
        assert any(text in sentence for text in where), sentence


@pytest.mark.parametrize(
    "value",
    [
        *("https://*.example.com", "https://user@a.example", "https://user:senha@a.example", "https://a.example?x"),
        *("https://a.example#x", "https://a.example/x", "https://a.example:99999", "https://a.example:0"),
        *("https://a.example:", "https://a.example:80:80", "https://", "a.example", "https://[::1", "https://::1"),
        *("https://a..example", f"https://{'a' * 64}.example", "https://a.test,https://*.test", "*,https://a.test"),
        *("*, http://x.test", "http://x.test *", "*,null"),
    ],
)
def test_wrong_origins(value):
    """Uma origem que navegador algum enviaria não serve, sozinha ou entre outras, nem um * que as tornaria inúteis."""
    sentence = harness.refusal("--cors-origin", value, env={"ENV_FILE": "/dev/null"})
    assert sentence.startswith(f"erro: CORS_ORIGIN: o valor {value!r} (argumento --cors-origin) não é válido")


@pytest.mark.parametrize("flag", ["-S", "-X", "-L", "-C", "-E", "-s"])
def test_argument_outside_utf8(flag):
    """Bytes que não são UTF-8, que o Redis recusaria no meio do serviço: uma frase no início."""
    assert harness.refusal(flag, os.fsdecode(b"a\xffb"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-p", "abc"], ["HTTP_PORT", "'abc'", "argumento", "65535"]),
        (["-p", "70000"], ["HTTP_PORT", "'70000'", "argumento", "65535"]),
        (["-p70000"], ["HTTP_PORT", "'70000'", "argumento", "65535"]),
        (["-p", "1_000"], ["HTTP_PORT", "'1_000'"]),
        (["-p", "٣"], ["HTTP_PORT", "'٣'"]),
        (["-p", ""], ["HTTP_PORT", "''"]),
        (["-i", "-5"], ["INTERVAL", "'-5'", "argumento"]),
        (["-i", "9" * 5000], ["INTERVAL"]),
        (["-R", "isto/nao/e"], ["REDIS_SERVER", "'isto/nao/e'", "argumento", "ip:porta/database"]),
        (["-R", "127.0.0.1:70000/1"], ["REDIS_SERVER", "'127.0.0.1:70000/1'"]),
        (["-R", "http://127.0.0.1"], ["REDIS_SERVER", "'http://127.0.0.1'"]),
        (["--server", "gunicorn"], ["HTTP_SERVER", "'gunicorn'", "flask", "waitress"]),
        (["-s", "a\r\nX-Forjado: 1"], ["SERVERNAME"]),
        (["--prot", "80"], ["--prot", "--port"]),
        (["--port=80", "--nada=1"], ["--nada"]),
        (["sobra"], ["sobra"]),
        (["-p"], ["-p"]),
        (["--check=sim"], ["--check"]),
    ],
)
def test_wrong_arguments(flags, words):
    """Argumentos errados ou desconhecidos: uma frase que os nomeia."""
    sentence = harness.refusal(*flags, env={"ENV_FILE": "/dev/null"})
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MAXTIME=x\n", ["MAXTIME", "'x'", "um número inteiro"]),
        (b"SERVERNAME=caf\xe9\n", ["ENV_FILE", "UTF-8"]),
        ("SERVERNAME=certo\nisto não é uma atribuição\n", ["ENV_FILE", "2"]),
        ('SERVERNAME="aspas abertas\n', ["ENV_FILE", "1"]),
    ],
    ids=["valor", "fora-de-utf8", "linha", "aspas"],
)
def test_wrong_file(text, words, tmp_path):
    """Um arquivo com valor errado, fora de UTF-8 ou malformado: uma frase com o caminho dele."""
    file = write_env(tmp_path, text)
    sentence = harness.refusal("-f", file)
    assert file in sentence
    for word in words:
        assert word in sentence


@pytest.mark.parametrize("layer", ["ambiente", "argumento"])
def test_unreadable_file(layer, tmp_path):
    """Um arquivo pedido que não existe ou não pode ser lido (aqui, uma pasta): uma frase com o caminho."""
    for path in (tmp_path / "não existe.env", tmp_path):
        flags, env = give(tmp_path, layer, "ENV_FILE", str(path))
        sentence = harness.refusal(*flags, env=env)
        assert "ENV_FILE" in sentence
        assert str(path) in sentence


def test_file_without_permission(tmp_path):
    """Um arquivo sem permissão de leitura para quem roda: uma frase com o caminho."""
    file = write_env(tmp_path, "PAUSE=0\n")
    os.chmod(file, 0)
    if os.access(file, os.R_OK):
        # Para o root nada é ilegível, a não ser o que o próprio sistema nega.
        file = "/proc/self/mem"
    sentence = harness.refusal("-f", file)
    assert "ENV_FILE" in sentence
    assert file in sentence


def test_default_file_may_be_missing(redis_main):
    """Sem ENV_FILE, a falta do arquivo padrão não é erro (nem sua presença, como o pacote o instala)."""
    done = harness.run_proxy("--check", env={"REDIS_SERVER": redis_main.address})
    assert done.status == 0, done
    assert done.err == "", done


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [("HTTP_PROT", "HTTP_PORT"), ("REDIS_SERVR", "REDIS_SERVER"), ("INTERVALO", "INTERVAL"), ("max_time", "MAXTIME")],
)
def test_unknown_name_in_file(unknown, nearest, tmp_path):
    """Um nome desconhecido no arquivo: um aviso com a configuração mais parecida, sem o valor."""
    file = write_env(tmp_path, f"{unknown}=valor-que-pode-ser-segredo\n")
    (warning,) = program.load_settings([], {"ENV_FILE": file})[2]
    assert re.search(rf"\b{unknown}\b", warning)
    assert re.search(rf"\b{nearest}\b", warning)
    assert "valor-que-pode-ser-segredo" not in warning


def test_unknown_name_in_the_log(start_proxy, fetch):
    """O aviso vai ao log, e o proxy atende."""
    proxy = start_proxy(env_file="HTTP_PROT=1\n")
    assert fetch(proxy, "GET", "/ping").status == 200
    (warning,) = [line for line in proxy.log().splitlines() if line.startswith("aviso: ")]
    assert "HTTP_PROT" in warning


def test_env_file_inside_itself(tmp_path, redis_main):
    """ENV_FILE dentro do próprio arquivo não tem efeito, e um aviso diz isso."""
    file = write_env(tmp_path, "ENV_FILE=/outro.env\n")
    done = harness.run_proxy("--check", "-p", "0", env={"ENV_FILE": file, "REDIS_SERVER": redis_main.address})
    assert done.status == 0, done
    assert read_check(done.out)["ENV_FILE"] == (file, "ambiente")
    assert done.err.startswith("aviso: ")
    assert "ENV_FILE" in done.err


@pytest.mark.parametrize("layer", ["ambiente", "argumento"])
def test_several_files(layer, tmp_path, redis_main):
    """ENV_FILE pode nomear vários arquivos: o último é o mais forte e o único que precisa existir."""
    first = write_env(tmp_path, "PAUSE=1\nINTERVAL=101\nHTTP_PROT=1\n", "comum.env")
    last = write_env(tmp_path, "PAUSE=2\nMAXTIME_ERRO=x\n", "próprio.env")
    missing = str(tmp_path / "não existe.env")
    flags, env = give(tmp_path, layer, "ENV_FILE", f"{missing}:{first}:{last}")
    done = harness.run_proxy("--check", "-p", "0", *flags, env={**env, "REDIS_SERVER": redis_main.address})
    assert done.status == 0, done
    shown = read_check(done.out)
    assert shown["PAUSE"] == ("2", f"arquivo {last}")
    assert shown["INTERVAL"] == ("101", f"arquivo {first}")
    warnings = done.err.splitlines()
    assert len(warnings) == 2, done
    assert "HTTP_PROT" in warnings[0]
    assert first in warnings[0]
    assert "MAXTIME_ERRO" in warnings[1]
    assert last in warnings[1]
    flags, env = give(tmp_path, layer, "ENV_FILE", f"{first}:{missing}")
    assert missing in harness.refusal(*flags, env=env)


def test_foreign_environment_is_silent(tmp_path, redis_main):
    """Variáveis de ambiente que não são nossas não dizem respeito a ninguém."""
    env = {"ENV_FILE": write_env(tmp_path, ""), "REDIS_SERVER": redis_main.address, "HTTP_PORT": "0", "HTTP_PROT": "1"}
    done = harness.run_proxy("--check", env=env)
    assert done.status == 0, done
    assert done.err == "", done


@pytest.mark.parametrize("layer", layers)
def test_secret_is_never_printed(layer, tmp_path):
    """Nem a senha nem a URL que traz uma aparecem numa frase de erro."""
    url = "redis://eu:segredo@127.0.0.1:porta/1"
    flags, env = give(tmp_path, layer, "REDIS_SERVER", url)
    sentence = harness.refusal("--secret", "outrosegredo", *flags, env=env)
    assert "REDIS_SERVER" in sentence
    assert "segredo" not in sentence


def start_failure(tmp_path, address, status=1, **more):
    """Inicia um proxy que deve falhar ao começar.

    Argumentos:
        tmp_path: pasta da prova.
        address: REDIS_SERVER.
        status: código de saída esperado.
        more: outras variáveis de ambiente.

    Retorno:
        A frase de erro.
    """
    env = {"ENV_FILE": write_env(tmp_path, ""), "HTTP_PORT": "0", "HTTP_HOST": "127.0.0.1"}
    return one_sentence(harness.run_proxy(env={**env, "REDIS_SERVER": address, **more}), status)


def test_redis_unreachable(tmp_path):
    """Redis que não existe: uma frase em português com o nome e o endereço, código 1, em menos de 6 s."""
    port = harness.free_port()
    sentence = start_failure(tmp_path, f"127.0.0.1:{port}/1")
    assert re.fullmatch(rf"erro: REDIS_SERVER: .*127\.0\.0\.1:{port}/1 não atende: Connection refused", sentence)


def test_redis_name_unknown(tmp_path):
    """O nome de uma máquina que não existe pode passar a existir: código 1, para que o serviço insista."""
    sentence = start_failure(tmp_path, "nao-existe.invalid:6379/1")
    assert re.fullmatch(
        r"erro: REDIS_SERVER: .*nao-existe\.invalid:6379/1 não atende: (Name or service|Temporary failure|No address).*",
        sentence,
    )


def test_redis_socket_missing(tmp_path):
    """Um soquete que não existe: o mesmo, com o caminho."""
    sentence = start_failure(tmp_path, f"unix://{tmp_path}/nada.sock")
    assert re.fullmatch(r"erro: REDIS_SERVER: .*/nada\.sock.* não atende: No such file or directory", sentence)


def test_redis_silent(tmp_path):
    """Redis que aceita a conexão e nada responde: o mesmo."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        sentence = start_failure(tmp_path, f"127.0.0.1:{port}/1")
    assert re.fullmatch(rf"erro: REDIS_SERVER: .*:{port}/1 não atende: sem resposta em 2 s", sentence)


@pytest.mark.parametrize("given", ["", "errada"])
def test_redis_wrong_password(given, tmp_path, start_redis):
    """Senha errada ou ausente: uma frase que diz que o Redis recusou, com o endereço e sem a senha, código 1."""
    server = start_redis(password="certa")
    sentence = start_failure(tmp_path, server.address, REDIS_PASSWORD=given)
    assert re.fullmatch(rf"erro: REDIS_PASSWORD: .*{server.address} recusou .*", sentence)
    assert "não atende" not in sentence
    assert "errada" not in sentence
    assert "certa" not in sentence


def test_no_master(tmp_path):
    """Sentinelas que não atendem: uma frase que diz isso, e não a lista de tudo o que há nas conexões; código 1."""
    address = "sentinel://eu:segredo@127.0.0.1:1,127.0.0.1:2/mestre/1"
    sentence = start_failure(tmp_path, address)
    shown = address.replace("eu:segredo@", "")
    assert sentence == f"erro: REDIS_SERVER: o Redis em {shown} não atende: nenhuma sentinela diz quem é o mestre"


def test_redis_without_tls(tmp_path, start_proxy):
    """TLS para quem não fala TLS: uma frase que diz isso, código 1."""
    # O servidor do Flask responde na hora a qualquer coisa.
    plain = start_proxy(host="flask")
    sentence = start_failure(tmp_path, f"rediss://127.0.0.1:{plain.port}/1")
    assert re.fullmatch(r"erro: REDIS_SERVER: .* não atende: falha de TLS \(\w+.*\)", sentence)


def test_redis_acl(tmp_path, start_redis):
    """Um usuário da ACL que nem PING pode: nenhuma espera o conserta; nas palavras do Redis, código 2."""
    server = start_redis("user proxy on >segredo ~* &* +@all -ping")
    sentence = start_failure(tmp_path, f"redis://proxy:segredo@{server.address}", 2)
    assert re.fullmatch(rf"erro: REDIS_SERVER: .*{server.address}.*recusa .*ping.*", sentence)
    assert "segredo" not in sentence


def test_redis_full(tmp_path, start_redis):
    """O Redis que não aceita mais conexões recusou, não deixou de atender; código 1."""
    server = start_redis("maxclients 4")
    held = [server.client() for _ in range(4)]
    for client in held:
        client.ping()
    assert f"{server.address} recusou" in start_failure(tmp_path, server.address)
    for client in held:
        client.close()


def test_redis_is_not_redis(tmp_path, share_proxy):
    """No lugar do Redis, um servidor de outra língua (o próprio proxy): uma frase, código 1."""
    port = share_proxy().port
    assert str(port) in start_failure(tmp_path, f"127.0.0.1:{port}/1")


def test_redis_wrong_database(tmp_path, redis_main):
    """Um database que o Redis não tem é configuração errada: uma frase com nome, valor e camada, código 2."""
    address = f"127.0.0.1:{redis_main.port}/99"
    sentence = start_failure(tmp_path, address, 2)
    assert re.fullmatch(rf"erro: REDIS_SERVER: o valor '{address}' \(ambiente\) .*database.*", sentence)
    done = harness.run_proxy("--check", "-p", "0", "-R", address, env={"ENV_FILE": "/dev/null"})
    assert done.status == 2, done
    assert re.fullmatch(rf"erro: REDIS_SERVER: o valor '{address}' .*database.*", done.err.strip())


@pytest.mark.parametrize("database", ["99999999999", "9" * 30])
def test_impossible_database(database):
    """Um número de database que Redis algum teria é recusado antes de perguntar; código 2."""
    for text in (f"127.0.0.1:1/{database}", f"redis://127.0.0.1:1/{database}", f"redis://127.0.0.1:1?db={database}"):
        assert "REDIS_SERVER: o valor" in harness.refusal("-R", text, env={"ENV_FILE": "/dev/null"})


def test_port_taken(host, tmp_path, redis_main):
    """Porta ocupada: uma frase com a porta, código 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        sentence = start_failure(tmp_path, redis_main.address, HTTP_PORT=port, HTTP_SERVER=host)
    assert re.fullmatch(rf"erro: HTTP_PORT: .*\b{port}\b.* \(ambiente\) .*: Address already in use\b.*", sentence)


def test_foreign_address(host, tmp_path, redis_main):
    """Um HTTP_HOST que não é desta máquina, mas pode vir a ser: uma frase com o endereço, código 1."""
    sentence = start_failure(tmp_path, redis_main.address, HTTP_HOST="192.0.2.1", HTTP_SERVER=host)
    assert re.fullmatch(
        r"erro: HTTP_HOST: .*192\.0\.2\.1.* \(ambiente\) .*: Cannot assign requested address\b.*", sentence
    )


@pytest.mark.parametrize("name", ["nome..vazio", "a" * 64, "1::2::3", "[::1]"])
def test_malformed_host(name):
    """Um HTTP_HOST que não é nome nem endereço de máquina alguma é configuração errada, com nome e camada."""
    sentence = harness.refusal(env={"ENV_FILE": "/dev/null", "HTTP_HOST": name})
    assert re.match(rf"erro: HTTP_HOST: o valor '{re.escape(name)}' \(ambiente\) não é válido", sentence)


def test_unknown_host(tmp_path, redis_main):
    """Um nome que não existe também; sem resposta do DNS não se sabe, e o serviço insiste: código 1."""
    env = {"ENV_FILE": write_env(tmp_path, ""), "REDIS_SERVER": redis_main.address}
    done = harness.run_proxy("--host", "nao-existe.invalid", env=env)
    sentence = one_sentence(done, 1 if "agora" in done.err else 2)
    assert re.match(r"erro: HTTP_HOST: o valor 'nao-existe\.invalid' \(argumento --host\) .*: \w.*", sentence)


@pytest.mark.parametrize("name", ["nome..vazio:6379/1", "a" * 64, "redis://nome..vazio/1"])
def test_malformed_redis_host(name):
    """Um REDIS_SERVER cujo nome de máquina não pode existir, é configuração errada."""
    sentence = harness.refusal(env={"ENV_FILE": "/dev/null", "REDIS_SERVER": name})
    assert re.match(rf"erro: REDIS_SERVER: o valor '{re.escape(name)}' \(ambiente\) ", sentence)


def test_fixed_port(start_proxy, fetch, host):
    """HTTP_PORT diz a porta, e a linha `pronto:` a repete."""
    port = harness.free_port()
    proxy = start_proxy("-p", str(port))
    assert (proxy.address, proxy.port) == ("127.0.0.1", port)
    assert fetch(proxy, "GET", "/ping").status == 200


def test_ready_line_is_one(start_proxy, host):
    """Uma linha `pronto:` só, e nada do servidor de desenvolvimento."""
    proxy = start_proxy()
    assert len(harness.ready_line.findall(proxy.log())) == 1
    assert len(proxy.log().splitlines()) == 1, proxy.log()
    assert proxy.output() == ""


def test_ipv6(start_proxy, host):
    """HTTP_HOST em IPv6: escuta e se anuncia entre colchetes; com ::, atende também IPv4."""
    proxy = start_proxy(env={"HTTP_HOST": "::1"})
    assert proxy.address == "[::1]"
    conn = harness.connection(proxy.port, host="::1")
    assert conn.request("GET", "/ping").response().body() == b"pong"
    conn.close()
    both = start_proxy(env={"HTTP_HOST": "::"})
    assert both.address == "[::]"
    for address in ("::1", "127.0.0.1"):
        conn = harness.connection(both.port, host=address)
        assert conn.request("GET", "/ping").response().body() == b"pong"
        conn.close()


def test_check_redis_down(tmp_path):
    """--check com o Redis fora do ar: mostra as configurações, diz o que houve e sai com 1, em menos de 6 s."""
    port = harness.free_port()
    done = harness.run_proxy("--check", "-p", "0", "-R", f"127.0.0.1:{port}/1", env={"ENV_FILE": write_env(tmp_path, "")})
    assert done.status == 1, done
    in_time(done)
    assert list(read_check(done.out)) == names
    assert re.fullmatch(rf"erro: REDIS_SERVER: .*{port}.*\n", done.err)


def test_check_touches_nothing(tmp_path, redis_main, db):
    """--check não deixa aberta a porta HTTP, nem chave no Redis."""
    port = harness.free_port()
    done = harness.run_proxy("--check", "-R", redis_main.address, "-p", str(port), env={"ENV_FILE": "/dev/null"})
    assert done.status == 0, done
    socket.create_server(("127.0.0.1", port)).close()
    assert re.search("(?m)^Redis em .*: respondeu ao PING\nservidor: .*\ncluster: não\navisos: sim\nscripts: sim$", done.out)
    assert redis_main.leftovers() == []


def test_check_wrong_value():
    """--check com um valor errado: a mesma frase e o mesmo código 2 do início."""
    one_sentence(harness.run_proxy("--check", "-p", "abc", env={"ENV_FILE": "/dev/null"}), 2)


def test_version():
    """--version: o nome e a versão, código 0, sem Redis nem arquivo."""
    done = harness.run_proxy("--version", env={})
    assert done.status == 0, done
    assert re.fullmatch(r"py-ndjson-proxy \d+\.\d+\.\d+\n", done.out), done
    assert done.err == ""


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag):
    """--help: em português, com exatamente as configurações da tabela, seus argumentos e padrões; código 0."""
    done = harness.run_proxy(flag, env={"COLUMNS": "1000"})
    assert done.status == 0, done
    assert done.err == ""
    # O argparse põe na linha de baixo o texto de um argumento longo: volta a ser uma linha por argumento.
    entries = re.sub(r"\n {10,}", "  ", done.out)
    rows = re.findall(r"^  (-.*?)  .*\(([A-Z_]+), padrão: (.*)\)$", entries, re.MULTILINE)
    assert [name for _, name, _ in rows if name not in names] == []
    assert {name: default for _, name, default in rows} == {row.name: row.default or "vazio" for row in table}
    for flags, name, _ in rows:
        assert tuple(re.findall(r"(?:^|\s)(--?[a-zA-Z][a-z-]*)", flags)) == by_name[name].flags
    for flag_name in ("--check", "--version", "--help"):
        assert flag_name in done.out
    assert not re.search(r"\b(usage|options|arguments|show this|default)\b", done.out), done.out


def test_help_in_a_narrow_terminal():
    """--help numa janela estreita continua legível e sem erro."""
    done = harness.run_proxy("--help", env={"COLUMNS": "40"})
    assert done.status == 0, done
    assert all(len(line) <= 60 for line in done.out.splitlines()), done.out


def commented_lines():
    """Lê o arquivo de ambiente distribuído.

    Retorno:
        Lista de (nome, linha descomentada) de cada linha na forma "#NOME=valor".
    """
    text = (harness.root / "etc" / "py-ndjson-proxy.env").read_text(encoding="utf-8")
    found = re.findall(r"^#\s?(([A-Z][A-Z_]*)=.*)$", text, re.MULTILINE)
    return [(name, line) for line, name in found]


def test_shipped_env_file_names():
    """etc/py-ndjson-proxy.env tem toda configuração uma vez, comentada (ENV_FILE, que nele não tem efeito, à parte)."""
    found = [name for name, _ in commented_lines()]
    assert len(set(found)) == len(found)
    assert set(found) | {"ENV_FILE"} == set(names)


def test_shipped_env_file_has_nothing_on():
    """Como vem, o arquivo não muda nada: só comentários e linhas vazias."""
    text = (harness.root / "etc" / "py-ndjson-proxy.env").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.strip() and not line.startswith("#")] == []


def test_shipped_env_file_defaults():
    """Descomentar qualquer linha não muda nada: o valor lido pelo python-dotenv é o padrão da tabela."""
    for name, line in commented_lines():
        value = dotenv.dotenv_values(stream=io.StringIO(line + "\n"), interpolate=False)
        assert value == {name: by_name[name].default}


def test_shipped_env_file_uncommented(check_alone, tmp_path):
    """Com todas as linhas descomentadas, cada valor efetivo é o padrão, vindo do arquivo, sem aviso."""
    lines = [line for name, line in commented_lines() if name != "ENV_FILE"]
    done = check_alone("\n".join(lines) + "\n")
    assert done.status == 0, done
    assert done.err == "", done
    shown = read_check(done.out)
    for row in table:
        if row.name not in ("ENV_FILE", "REDIS_SERVER"):
            assert shown[row.name] == (row.default, f"arquivo {tmp_path}/prova.env")


def run_into(output, *flags, encoding="utf-8"):
    """Executa o programa com a saída padrão dada.

    Argumentos:
        output: descritor ou arquivo em que ele escreve.
        flags: argumentos de linha de comando.
        encoding: codificação da saída dele (PYTHONIOENCODING).

    Retorno:
        Tupla (status, stderr em bytes).
    """
    done = subprocess.run(
        [sys.executable, str(harness.program), *flags],
        env={**harness.base_environment(), "PYTHONIOENCODING": encoding},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.PIPE,
        timeout=20,
        check=False,
    )
    return done.returncode, done.stderr


every_output = [("--help",), ("--version",), ("--check",)]


@pytest.mark.parametrize("flags", every_output, ids=" ".join)
def test_reader_that_left(flags, redis_main):
    """Saída para um cano que ninguém lê (--check | head -1): nada em stderr além da recusa, e o status do que foi feito."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert run_into(writing, *flags, "-p", "0", "-R", redis_main.address) == (0, b"")
        port = harness.free_port()
        status, told = run_into(writing, *flags, "-p", "0", "-R", f"127.0.0.1:{port}/1")
        assert (status, told.count(b"\n")) == ((1, 1) if "--check" in flags else (0, 0))
    finally:
        os.close(writing)


@pytest.mark.parametrize("flags", every_output, ids=" ".join)
def test_output_that_fails(flags, redis_main):
    """Saída para um disco cheio: uma frase, código 1, sem rastro de pilha."""
    with open("/dev/full", "wb") as full:
        status, error = run_into(full, *flags, "-p", "0", "-R", redis_main.address)
    assert (status, error.decode()) == (1, "erro: a saída não pode ser escrita: No space left on device\n")


@pytest.mark.parametrize(
    ("encoding", "flags"), list(zip(["ascii", "latin-1:strict", "cp037"], reversed(every_output), strict=True)), ids=str
)
def test_output_in_another_encoding(encoding, flags, tmp_path, redis_main):
    """Um terminal que não sabe acentos mostra o que sabe: nunca uma exceção."""
    with open(tmp_path / "saida", "w+b") as file:
        flags = [*flags, "-p", "0", "-R", redis_main.address, "-X", "prefixo→ção"]
        status, error = run_into(file, *flags, encoding=encoding)
        file.seek(0)
        text = file.read().decode(encoding.partition(":")[0])
    assert (status, error) == (0, b"")
    if "--check" in flags:
        assert "REDIS_PREFIX = prefixo\\u2192" in text


def test_closed_output(redis_main):
    """Sem saída padrão alguma (>&-) também não há exceção, nem no fim do serviço."""
    for flags in every_output:
        command = [sys.executable, str(harness.program), *flags, "-p", "0", "-R", redis_main.address]
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" >&-', "sh", *command],
            env=harness.base_environment(),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=20,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
