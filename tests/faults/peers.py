"""Ferramentas das provas de ataques e falhas: muitas conversas cruas ao mesmo tempo, um worker que encerra tudo o que
aparece, e as medidas do processo sob prova.

Cada prova daqui tem uma forma curta, que roda na bateria comum, e uma completa, com os números da questão, escolhida
por FAULTS=full no ambiente."""

import contextlib
import errno
import json
import os
import pathlib
import resource
import selectors
import socket
import statistics
import threading
import time

import pytest

import harness

# "full" pede a forma completa; qualquer outra coisa, a curta.
FAULTS = os.environ.get("FAULTS", "")

# Prazo de cada prova na forma completa, em segundos.
full_limit = 3000


def scale(short, full):
    """Escolhe um número pela forma pedida.

    Argumentos:
        short: o da forma curta.
        full: o da forma completa.

    Retorno:
        Um dos dois.
    """
    return full if FAULTS == "full" else short


def counted(short, full, word):
    """Parametriza uma prova com a sua contagem, que assim aparece no nome dela (argumento `count`).

    Argumentos:
        short: contagem da forma curta.
        full: contagem da forma completa.
        word: o que se conta, em português e sem espaços.

    Retorno:
        Decorador do pytest, que também alarga o prazo na forma completa.
    """
    count = scale(short, full)

    def decorate(function):
        """Aplica a contagem e o prazo. Argumentos: function, a prova. Retorno: a prova."""
        if FAULTS == "full":
            function = pytest.mark.timeout(full_limit)(function)
        return pytest.mark.parametrize("count", [count], ids=[f"{count}_{word}"])(function)

    return decorate


def say(text):
    """Escreve uma medida na saída da prova (pytest -rP mostra a das que passaram).

    Argumentos:
        text: a frase.
    """
    print(f"contado: {text}")


def allow_descriptors(wanted):
    """Eleva o limite de descritores deste processo, se o sistema deixa; senão a prova falha com a frase certa.

    Argumentos:
        wanted: quantos descritores a prova abre.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        assert hard == resource.RLIM_INFINITY or hard >= wanted, f"a prova precisa de {wanted} descritores, e há {hard}"
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class talk:
    """Uma conversa crua: o que foi enviado, o que voltou e como acabou.

    Atributos depois dela: answers (lista de harness.response com cabeçalho lido), refused (não conectou), closed (o
    outro lado fechou), reset (com RST), hung (não fechou a tempo), halved (fechamos nosso lado por silêncio), fault (o
    que veio fora do protocolo, ou None), took (segundos).
    """

    def __init__(self, payload, label=""):
        """Prepara a conversa.

        Argumentos:
            payload: bytes a enviar.
            label: nome da conversa, para as mensagens.
        """
        self.payload = payload
        self.label = label
        self.left = memoryview(payload)
        self.answers = []
        self.current = harness.response(None, "GET")
        self.refused = self.closed = self.reset = self.hung = self.halved = False
        self.fault = None
        self.began = self.heard = time.monotonic()
        self.took = 0.0
        self.sock = None

    def open(self, port):
        """Conecta e deixa o soquete sem bloqueio.

        Argumentos:
            port: porta do proxy.
        """
        self.sock = socket.create_connection(("127.0.0.1", port), 10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.began = self.heard = time.monotonic()

    def events(self):
        """Diz o que esperar do soquete (máscara de selectors)."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self.left else 0)

    def send(self):
        """Envia o que couber; um envio recusado não encerra a conversa: a resposta ainda pode estar a caminho."""
        try:
            self.left = self.left[self.sock.send(self.left[:262144]) :]
            self.heard = time.monotonic()
        except BlockingIOError:
            pass
        except OSError:
            self.left = self.left[:0]

    def receive(self):
        """Lê o que chegou e o entrega à resposta corrente."""
        try:
            data = self.sock.recv(262144)
        except BlockingIOError:
            return
        except OSError as error:
            self.closed = True
            self.reset = error.errno == errno.ECONNRESET
            return
        self.heard = time.monotonic()
        if data:
            self.feed(data)
        else:
            self.closed = True

    def feed(self, data):
        """Interpreta bytes recebidos, resposta após resposta.

        Argumentos:
            data: os bytes.
        """
        try:
            while data and self.fault is None:
                self.current.feed(data, self.heard)
                if self.current.head is not None and self.current not in self.answers:
                    self.answers.append(self.current)
                if not self.current.ended:
                    return
                data, self.current = self.current.buffer, harness.response(None, "GET")
        except AssertionError as error:
            self.fault = str(error)

    def quiet(self):
        """Diz se a última resposta terminou e nada mais há a enviar (bool)."""
        return bool(self.answers) and self.answers[-1].ended and not self.left

    def half_close(self):
        """Fecha o lado de envio, como quem desistiu de mandar o resto."""
        self.halved = True
        self.heard = time.monotonic()
        self.left = self.left[:0]
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self):
        """Fecha a conversa e confere o que restou."""
        self.took = time.monotonic() - self.began
        self.sock.close()
        whole = self.current.state == "raw" and self.current.left is None
        if self.closed and not self.reset and self.current.head is not None and not self.current.ended and not whole:
            self.fault = self.fault or "resposta cortada"


def swarm(port, talks, width=64, patience=3.0, limit=15.0):
    """Conduz muitas conversas ao mesmo tempo, cada uma até que o outro lado feche.

    Quem passa patience segundos sem ouvir nada, ou já ouviu tudo, fecha o seu lado; depois disso o proxy tem limit
    segundos para fechar o dele.

    Argumentos:
        port: porta do proxy.
        talks: iterável de talk.
        width: quantas ao mesmo tempo.
        patience: silêncio tolerado, em segundos.
        limit: prazo do fechamento, em segundos.

    Retorno:
        Lista das conversas, terminadas.
    """
    waiting, done = iter(talks), []
    with selectors.DefaultSelector() as selector:

        def fill():
            """Abre conversas até a largura pedida. Retorno: verdadeiro se alguma vive."""
            while len(selector.get_map()) < width:
                each = next(waiting, None)
                if each is None:
                    break
                each.open(port)
                selector.register(each.sock, each.events(), each)
            return bool(selector.get_map())

        while fill():
            for key, mask in selector.select(0.05):
                if mask & selectors.EVENT_WRITE:
                    key.data.send()
                if mask & selectors.EVENT_READ:
                    key.data.receive()
            now = time.monotonic()
            for key in list(selector.get_map().values()):
                each = key.data
                if not each.halved and (each.quiet() or now - each.heard > patience):
                    each.half_close()
                each.hung = each.halved and not each.closed and now - each.heard > limit
                if each.closed or each.hung:
                    selector.unregister(each.sock)
                    each.close()
                    done.append(each)
                elif key.events != each.events():
                    selector.modify(each.sock, each.events(), each)
    return done


# Encerra uma tarefa só se ela ainda existe: quem já saiu deixaria para trás uma lista que ninguém apaga.
finish_script = """
local raw = redis.call('GET', KEYS[1])
if raw then
  local list = ARGV[2] .. string.sub(KEYS[1], #ARGV[1] + 1)
  for i = 3, #ARGV do redis.call('RPUSH', list, ARGV[i]) end
  redis.call('DEL', KEYS[1])
end
return raw
"""


class finisher(threading.Thread):
    """Worker que toma nota de toda tarefa publicada e a encerra na hora, com as linhas dadas."""

    def __init__(self, server, *lines):
        """Assina o canal e começa.

        Argumentos:
            server: o harness.redis_server.
            lines: linhas entregues a cada tarefa antes do fim.
        """
        super().__init__(name="finisher", daemon=True)
        self.client = server.new_client()
        self.worker = harness.worker(self.client)
        self.lines = lines
        self.seen = {}
        self.halt = threading.Event()
        self.failure = None
        self.start()

    def run(self):
        """Atende até close. O que a tarefa trazia fica em seen (None se já tinha sido apagada)."""
        try:
            while not self.halt.is_set():
                message = self.worker.pubsub.get_message(timeout=self.pause())
                if message and message["type"] == "message":
                    self.finish(message["data"].decode())
        except Exception as error:
            self.failure = error

    def pause(self):
        """Diz quanto esperar pela próxima tarefa. Retorno: segundos."""
        return 0.1

    def finish(self, key):
        """Anota e encerra uma tarefa.

        Argumentos:
            key: a chave publicada.
        """
        raw = self.client.eval(finish_script, 1, key, harness.default_prefix, harness.default_list_prefix, *self.lines)
        self.seen[key.removeprefix(harness.default_prefix)] = None if raw is None else json.loads(raw)

    def close(self):
        """Para e espera a linha de execução; uma falha dela é uma falha da prova."""
        self.halt.set()
        self.join(30)
        assert not self.is_alive()
        self.worker.close()
        self.client.close()
        self.client.connection_pool.disconnect()
        assert self.failure is None, self.failure


@contextlib.contextmanager
def finishing(server, *lines):
    """Mantém um finisher durante um bloco.

    Argumentos:
        server: o harness.redis_server.
        lines: linhas entregues a cada tarefa.

    Retorno:
        Gera o finisher.
    """
    made = finisher(server, *lines)
    try:
        yield made
    finally:
        made.close()


def ping_times(port, seconds, pace=0.05, timeout=30.0):
    """Mede /ping repetidas vezes, numa conexão nova por vez.

    Argumentos:
        port: porta do proxy.
        seconds: por quanto tempo medir.
        pace: intervalo entre duas medidas, em segundos.
        timeout: prazo de cada uma.

    Retorno:
        Lista de demoras, em segundos.
    """
    found, halt = [], time.monotonic() + seconds
    while time.monotonic() < halt or len(found) < 5:
        began = time.monotonic()
        with contextlib.closing(harness.connection(port, timeout=timeout)) as conn:
            answer = conn.request("GET", "/ping", {"Connection": "close"}).response(timeout)
            assert (answer.status, answer.body(timeout)) == (200, b"pong")
        found.append(time.monotonic() - began)
        time.sleep(pace)
    return found


def spread(times):
    """Resume demoras.

    Argumentos:
        times: lista de demoras, em segundos.

    Retorno:
        Frase com quantas, a mediana e a maior, em milissegundos.
    """
    return f"{len(times)} medidas, mediana {statistics.median(times) * 1000:.1f} ms, maior {max(times) * 1000:.1f} ms"


def processor(pid):
    """Lê o tempo de processador gasto por um processo.

    Argumentos:
        pid: número do processo.

    Retorno:
        Segundos (float), de usuário e de sistema.
    """
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def warm(proxy, count=4):
    """Leva o proxy ao repouso de quem já trabalhou: abre o que ele guarda aberto e espera que se aquiete.

    Argumentos:
        proxy: o harness.proxy_process.
        count: quantos /ping ao mesmo tempo.

    Retorno:
        Par (linhas de execução, descritores) em repouso.
    """
    threads = proxy.threads()
    opened = [harness.connection(proxy.port) for _ in range(count)]
    for conn in opened:
        conn.request("GET", "/ping")
    for conn in opened:
        assert conn.response().body() == b"pong"
    if proxy.server == "waitress":
        # Ele cria as suas linhas de execução depois de dizer que está pronto; o flask, só as de cada cliente.
        threads = proxy.threads()
    for conn in opened:
        conn.close()
    # O repouso é o que para de mudar.
    seen = []

    def still():
        """Diz se as linhas de execução voltaram e os descritores não mudam há dez medidas."""
        seen.append(proxy.descriptors())
        return proxy.threads() <= threads and len(seen) > 10 and len(set(seen[-10:])) == 1

    harness.eventually(still, 15, "proxy em repouso")
    return threads, seen[-1]


def settle(proxy, rest, seconds=15.0):
    """Espera as linhas de execução e os descritores (soquetes inclusive) voltarem ao repouso.

    Uma linha de execução livre espera alguns segundos por outro cliente antes de sair.

    Argumentos:
        proxy: o harness.proxy_process.
        rest: par (linhas de execução, descritores) aceitável.
        seconds: prazo.

    Retorno:
        Segundos que levou.
    """
    began = time.monotonic()

    def seen():
        """Diz o que há agora e o que devia haver (str), ou vazio se está em repouso."""
        now = proxy.threads(), proxy.descriptors()
        return (
            f"{now} (linhas de execução, descritores); em repouso, {rest}"
            if now[0] > rest[0] or now[1] > rest[1]
            else ""
        )

    try:
        harness.eventually(lambda: not seen(), seconds)
    except AssertionError:
        if problem := seen():
            raise AssertionError(f"depois de {seconds} s, {problem}") from None
    return time.monotonic() - began
