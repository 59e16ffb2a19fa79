"""Linha 6 da tabela: TLS, com certificados feitos aqui mesmo pelo openssl, e o usuário de ACL que a documentação manda criar."""

import contextlib
import json
import re
import subprocess

import pytest
import redis

import harness
import peers
import redis_faults
import support

pytestmark = pytest.mark.timeout(redis_faults.limit)

cuts, streams, lines = peers.scale((20, 10, 1000), (500, 50, 25000))

# A linha de ACL é a da documentação, como um operador a copiaria.
document = (harness.root / "packaging" / "doc" / "redis.md").read_text(encoding="utf-8")
acl_line = re.search(r"^ACL SETUSER (?P<user>\S+) (?P<rules>.*>(?P<password>\S+).*)$", document, re.MULTILINE)


class authority:
    """Uma autoridade certificadora de prova e os certificados que ela emite."""

    def __init__(self, folder):
        """Cria a autoridade.

        Argumentos:
            folder: pasta dos arquivos, que é criada.
        """
        self.folder = folder
        folder.mkdir()
        self.run(
            "req",
            "-x509",
            *self.key("ca"),
            "-days",
            "2",
            "-subj",
            "/CN=autoridade",
            "-out",
            self.path("ca.crt"),
            # O Python 3.13 em diante exige o que a RFC 5280 pede.
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
        )

    def path(self, name):
        """Nomeia um arquivo. Argumentos: name, o nome. Retorno: o caminho (str)."""
        return str(self.folder / name)

    def key(self, name):
        """Monta as opções que criam uma chave. Argumentos: name, o nome. Retorno: lista de opções do openssl."""
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
        return [*curve, "-nodes", "-keyout", self.path(f"{name}.key")]

    def run(self, *arguments):
        """Roda o openssl. Argumentos: arguments, os dele."""
        done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def issue(self, name, subject):
        """Emite um certificado.

        Argumentos:
            name: nome dos arquivos.
            subject: nomes alternativos, na sintaxe do openssl.
        """
        request, extra = self.path(f"{name}.csr"), self.path(f"{name}.ext")
        with open(extra, "w", encoding="utf-8") as file:
            file.write(f"subjectAltName={subject}\nbasicConstraints=CA:FALSE\nkeyUsage=digitalSignature\n")
            file.write("subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n")
        self.run("req", *self.key(name), "-subj", f"/CN={name}", "-out", request)
        signer = ("-CA", self.path("ca.crt"), "-CAkey", self.path("ca.key"), "-CAcreateserial", "-days", "2")
        self.run("x509", "-req", "-in", request, *signer, "-extfile", extra, "-out", self.path(f"{name}.crt"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Uma authority com os certificados "server" (127.0.0.1), "other" (outro nome) e "client".

    Retorno:
        A authority.
    """
    made = authority(tmp_path_factory.mktemp("tls") / "ca")
    made.issue("server", "IP:127.0.0.1,DNS:localhost")
    made.issue("other", "DNS:outro.test")
    made.issue("client", "DNS:cliente.test")
    return made


@pytest.fixture
def start_tls(start_redis, certificates):
    """Fábrica de servidores Redis que também atendem TLS, na porta guardada em tls_port.

    Retorno:
        Função que recebe o nome do certificado e mais linhas de redis.conf.
    """

    def start(name="server", *config, clients="no"):
        """Inicia um. Argumentos: name, o certificado; config, linhas; clients, tls-auth-clients. Retorno: o servidor."""
        port = harness.free_port()
        server = start_redis(
            f"tls-port {port}",
            f"tls-cert-file {certificates.path(name + '.crt')}",
            f"tls-key-file {certificates.path(name + '.key')}",
            f"tls-ca-cert-file {certificates.path('ca.crt')}",
            f"tls-auth-clients {clients}",
            *config,
        )
        server.tls_port = port
        return server

    return start


def tls_url(certificates, port, user="", **options):
    """Monta um REDIS_SERVER com TLS.

    Argumentos:
        certificates: a authority em que o proxy confia.
        port: a porta.
        user: "nome@", se há.
        options: outras opções da URL.

    Retorno:
        Dicionário do ambiente do proxy.
    """
    query = "&".join(
        f"{name}={value}" for name, value in {"ssl_ca_certs": certificates.path("ca.crt"), **options}.items()
    )
    return {"REDIS_SERVER": f"rediss://{user}127.0.0.1:{port}/{harness.default_db}?{query}"}


def test_tls(start_tls, certificates, start_proxy, connect, fetch, start_worker):
    """Tudo funciona por TLS: linhas na hora com INTERVAL=60000, leitura literal, lotes grandes, /ping e --check."""
    server = start_tls()
    env = tls_url(certificates, server.tls_port)
    proxy = start_proxy("-i", 60000, "-P", 0, "-t", 90000, redis=server, env=env)
    worker = start_worker(server.client())
    response, task = support.open_stream(connect, proxy, worker)
    for number in range(5):
        task.push(f"linha {number}")
        assert response.line(3) == f"linha {number}".encode()
    # Um lote maior que um registro do TLS (16 KiB), e mais de um deles.
    wide = [json.dumps({"n": number, "x": "y" * 5000}) for number in range(100)]
    task.finish(*wide)
    assert response.lines() == [line.encode() for line in wide]
    response, task = support.open_stream(connect, proxy, worker)
    task.replace("a", "b")
    assert response.lines(3) == [b"a", b"b"]
    assert fetch(proxy, "GET", "/ping").body() == b"pong"
    assert support.polling_only not in proxy.log()
    checked = harness.run_proxy("--check", "-p", "0", env={**env, "ENV_FILE": "/dev/null"})
    assert checked.status == 0, checked


def test_many_wake_ups_in_one_tls_record(start_tls, certificates, start_proxy, connect, start_worker):
    """Milhares de avisos acumulados, que o TLS entrega aos pedaços: o nosso, no meio deles, acorda o stream."""
    server = start_tls()
    env = tls_url(certificates, server.tls_port)
    proxy = start_proxy("-i", 60000, "-t", 90000, redis=server, env=env)
    worker = start_worker(server.client())
    pairs = support.open_streams(connect, proxy, worker, 2)
    for step in range(3):
        proxy.freeze()
        with worker.client.pipeline(transaction=False) as pipe:
            for number in range(3000):
                pipe.set(f"ndjson_list_alheia{number % 7}", number)
            pipe.rpush(pairs[0][1].list, f"achada {step}")
            for number in range(step * 777):
                pipe.set(f"ndjson_list_alheia{number % 7}", number)
            pipe.rpush(pairs[1][1].list, f"achada {step}")
            pipe.execute()
        proxy.thaw()
        for response, _ in pairs:
            assert response.line(5) == f"achada {step}".encode()
    worker.client.delete(*[f"ndjson_list_alheia{number}" for number in range(7)])
    for response, task in pairs:
        task.finish()
        assert response.lines(5) == []


@pytest.mark.parametrize("total", [lines], ids=[f"{cuts}_cortes-{streams}_streams-{lines}_linhas"])
def test_exactly_once_across_cuts_of_tls(start_tls, certificates, start_proxy, connect, start_worker, total):
    """Registros de TLS cortados em qualquer byte, nos dois sentidos: nada se perde, se repete ou troca de lugar."""
    server = start_tls()
    relay = redis_faults.fault_relay(server.tls_port)
    with redis_faults.closing_thread(relay):
        proxy = start_proxy("-P", 1, "-t", 600000, redis=server, env=tls_url(certificates, relay.port))
        pairs = redis_faults.open_many(connect, proxy, start_worker(server.client()), streams)
        # Um aperto de mão numa máquina ocupada leva mais que a idade padrão, e nenhuma linha passaria.
        relay.begin(cuts, age=0.5)
        patience = peers.scale(90, 1500)
        text = redis_faults.deliver_across_cuts(proxy, server, relay, pairs, total // streams, patience)
        peers.say(f"TLS: {text}")
        proxy.stop()


def refused_start(env, words, status=(1,)):
    """Confere um início que o Redis, ou o TLS, não permite: uma frase, um código, nenhum traceback, e depressa.

    Argumentos:
        env: ambiente do proxy.
        words: expressão regular da causa.
        status: códigos de saída permitidos.
    """
    done = harness.run_proxy(env={"HTTP_PORT": "0", "HTTP_HOST": "127.0.0.1", "ENV_FILE": "/dev/null", **env})
    assert done.status in status, done
    assert "Traceback" not in done.err and re.search("^erro: ", done.err, re.MULTILINE), done
    assert re.search(words, done.err, re.IGNORECASE), done
    assert done.took < 10, done


def test_tls_refusals(start_tls, certificates, tmp_path):
    """Autoridade desconhecida, nome que não confere, porta trocada, certificado que falta: o proxy não parte, e diz por quê."""
    server, other, strict = start_tls(), start_tls("other"), start_tls(clients="yes")
    stranger = authority(tmp_path / "outra")
    refused_start(tls_url(stranger, server.tls_port), "certificate")
    refused_start(tls_url(certificates, other.tls_port), "certificate|mismatch")
    refused_start(tls_url(certificates, server.port), "redis")
    refused_start({"REDIS_SERVER": f"redis://127.0.0.1:{server.tls_port}/1"}, "redis")
    refused_start(tls_url(certificates, strict.tls_port), "redis")
    missing = {"REDIS_SERVER": f"rediss://127.0.0.1:{server.tls_port}/1?ssl_ca_certs={tmp_path}/nada.pem"}
    refused_start(missing, "REDIS|nada.pem", (1, 2))


def test_mutual_tls(start_tls, certificates, start_proxy, connect, start_worker):
    """Um Redis que exige certificado do cliente atende o proxy que o apresenta (ssl_certfile e ssl_keyfile na URL)."""
    server = start_tls(clients="yes")
    pair = {"ssl_certfile": certificates.path("client.crt"), "ssl_keyfile": certificates.path("client.key")}
    proxy = start_proxy(redis=server, env=tls_url(certificates, server.tls_port, **pair))
    response, task = support.open_stream(connect, proxy, start_worker(server.client()))
    task.finish("fim")
    assert response.lines() == [b"fim"]
    assert str(certificates.folder) not in proxy.log()


def work_hard(server, proxy, connect, worker):
    """Exercita tudo o que o proxy pede ao Redis: linhas, lotes, leitura literal, erros, renovação, saída, queda.

    Argumentos:
        server: o harness.redis_server.
        proxy: o proxy, com REDIS_TTL=3.
        connect: o acessório de mesmo nome.
        worker: o harness.worker.
    """
    response, task = support.open_stream(connect, proxy, worker)
    task.push("um")
    assert response.line() == b"um"
    # Vive mais que a validade das chaves: elas são renovadas.
    renewed = server.calls("expire")
    harness.eventually(lambda: server.calls("expire") > renewed, 10, "renovação da validade")
    task.finish("dois", "três")
    assert response.lines() == [b"dois", "três".encode()]
    response, task = support.open_stream(connect, proxy, worker)
    task.replace("a", "b")
    assert response.lines(3) == [b"a", b"b"]
    response, task = support.open_stream(connect, proxy, worker)
    response.conn.close()
    task.gone(5)
    for row in server.clients_named("py-ndjson-proxy"):
        worker.client.execute_command("CLIENT", "KILL", "ID", row["id"])
    harness.eventually(lambda: server.calls("exists"), 5, "consulta periódica")


def lose_an_answer(relay, proxy, connect, worker):
    """Derruba a conexão quando um pedido já rodou, e a resposta se perde: se era uma retirada, ela é repetida.

    Argumentos:
        relay: o support.relay entre o proxy e o Redis.
        proxy: o proxy.
        connect: o acessório de mesmo nome.
        worker: o harness.worker.
    """
    response, task = support.open_stream(connect, proxy, worker)
    # No TLS não se vê o que é pedido: corta-se o primeiro, seja qual for.
    relay.cut(b"")
    task.push("na queda")
    assert response.line() == b"na queda"
    task.finish()
    assert response.lines() == []


def commands_of_the_proxy(admin, spy):
    """Lê do MONITOR os comandos que o proxy deu até agora, e os que os scripts dele deram.

    Argumentos:
        admin: um redis.Redis.
        spy: conexão do redis-py que pediu MONITOR antes de o proxy partir.

    Retorno:
        Conjunto de nomes de comando, em minúsculas.
    """
    token = "fim-da-espionagem"
    admin.echo(token)
    rows = []
    while token not in str(rows[-1:]):
        rows.append(spy.read_response().decode("utf-8", "replace"))
    parsed = [re.match(r'\S+ \[\d+ ([^\]]+)\] "([^"]+)"(?: "([^"]*)" "([^"]*)")?', row) for row in rows]
    sources = {row[1] for row in parsed if row and (row[4] or "").startswith("py-ndjson-proxy")} | {"lua"}
    return {row[2].lower() for row in parsed if row and row[1] in sources}


@pytest.mark.parametrize("tls", [False, True], ids=["sem_tls", "com_tls"])
def test_documented_acl_line(start_tls, certificates, start_proxy, connect, start_worker, tls):
    """Com o usuário da documentação tudo funciona, avisos e varredura inclusive; o Redis só anota a recusa da pergunta pelos
    seus limites, feita no início, e nenhum direito sobra: cada comando permitido foi usado."""
    server = start_tls()
    admin = server.client()
    user, password = acl_line["user"], acl_line["password"]
    admin.execute_command("ACL", "SETUSER", user, *acl_line["rules"].split())
    # Uma lista sem dona, para que a varredura do início tenha o que fazer.
    admin.rpush("ndjson_list_orfa", "x")
    relay = support.relay(server.tls_port if tls else server.port)
    plain = {"REDIS_SERVER": f"redis://{user}@{relay.address}"}
    env = tls_url(certificates, relay.port, f"{user}@") if tls else plain
    env["REDIS_PASSWORD"] = password
    spy = server.client().connection_pool.get_connection()
    spy.send_command("MONITOR")
    assert spy.read_response() == b"OK"
    with contextlib.closing(relay):
        proxy = start_proxy("--ttl", 3, "-i", 100, redis=server, env=env)
        harness.eventually(lambda: not admin.exists("ndjson_list_orfa"), 10, "órfã vencida")
        worker = start_worker(admin)
        work_hard(server, proxy, connect, worker)
        granted = {rule[1:].partition("|")[0] for rule in acl_line["rules"].split() if rule.startswith("+")}
        used = commands_of_the_proxy(admin, spy)
        # Repetir uma retirada é questão de sorte: o pedido cuja resposta se perde pode ser outro.
        for _ in range(50):
            if granted <= used:
                break
            lose_an_answer(relay, proxy, connect, worker)
            used |= commands_of_the_proxy(admin, spy)
        spy.disconnect()
        log = proxy.log()
        proxy.stop()
    denied = [row for row in admin.execute_command("ACL", "LOG") if user.encode() in row and b"config|get" not in row]
    assert not denied, denied
    assert support.polling_only not in log, log
    assert "não aceita scripts" not in log and password not in log, log
    assert granted - used == set(), f"direitos que sobram na documentação: {sorted(granted - used)}"
    with contextlib.closing(server.new_client(username=user, password=password)) as client:
        for command in (
            ("GET", "alheia"),
            ("CONFIG", "GET", "*"),
            ("KEYS", "*"),
            ("FLUSHALL",),
            ("DEL", "ndjson_task_x"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
