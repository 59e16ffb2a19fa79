#!/usr/bin/env python3
"""py-ndjson-proxy: transforma uma resposta feita em partes em um streaming NDJSON.

De um lado, um cliente HTTP que lê NDJSON (um chat, o curl, um front-end de LLM).
Do outro, uma aplicação que não sabe fazer streaming, mas produz a resposta em
partes (um fluxo do n8n, um script). Entre os dois, o Redis:

    cliente --HTTP--> proxy --SET, PUBLISH--> Redis --tarefa--> worker
    cliente <--NDJSON-- proxy <----LPOP------ Redis <--RPUSH--- worker

Contrato com o worker
    1. Recebe task_key pelo canal REDIS_CHANNEL, ou a tira da lista REDIS_QUEUE com
       BLPOP, e lê com GET o JSON da tarefa.
    2. Empurra cada parte com RPUSH na lista cujo nome está em "task_list".
    3. Ao terminar, apaga task_key com DEL. O que foi empurrado antes do DEL é
       entregue; o proxy apaga o resto.
    Se task_key sumir antes, o cliente foi embora ou o tempo acabou: pode parar.
    Também é aceita a leitura literal da especificação: o worker troca, em uma
    transação (MULTI, DEL, RPUSH, EXEC), a string de task_key por uma lista de
    mesmo nome; o streaming acaba quando essa lista se esvazia.

Contrato com o cliente
    /ping responde 200 "pong" ou 500. Qualquer outro caminho é o streaming: um
    elemento da lista é uma linha, na ordem em que foi empurrado. Erros antes do
    streaming têm um status HTTP e corpo JSON; depois dele, são a última linha.
    Com AUTH_TOKEN, tudo menos /ping e OPTIONS pede Authorization: Bearer.

Linhas
    CR e LF viram espaço; U+0085, U+2028 e U+2029 viram escapes \\u; UTF-8
    inválido vira U+FFFD; elemento em branco é pulado. Nada mais é tocado. As
    palavras nuas EOF, EOL, END-OF-FILE e END-OF-LIST encerram o streaming.

Quem é dono do quê
    Só o laço toca o Redis, um stream ou um socket entregue; uma thread submete,
    entrega e esquece.

    thread do servidor HTTP (flask ou waitress)       laço (asyncio, thread principal)
      lê a requisição, autoriza, lê o corpo
      submete a tarefa ------------------------------> stream.submit: reserva o lugar, PING,
      espera a aceitação <---------------------------- SET e PUBLISH
      monta o cabeçalho e entrega o socket ----------> stream.adopt: daqui em diante o socket
      sai por handed_over, e esquece                   é de um client; stream.relay o serve

    Um socket tem um dono de cada vez, e só muda de dono em hand_over; antes dela o laço só o
    toca para acabar com uma requisição recusada (dismiss, sweep_late). Por isso não há trava
    nem fila por stream. Um stream é uma corrotina: relay é o laço da especificação, e o
    `finally` de run é o único fim, venha ele de onde vier. Na recarga (SIGHUP) o programa é
    trocado sem trocar o processo: os sockets ficam, e o estado vai em um memfd.

Como uma linha viaja
    O Redis avisa, pela conexão comum (link), qual chave mudou; o aviso acorda o
    stream, que tira a linha com LPOP e a escreve no socket. INTERVAL é só uma rede: um
    aviso perdido é achado por ela, que olha um stream de cada vez. Um cliente que não lê faz parar o LPOP do seu stream.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # Um arquivo vizinho não toma o lugar de um módulo.
    del sys.path[0]

import argparse
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import difflib
import email.utils
import errno
import functools
import gc
import hmac
import http
import http.client
import importlib
import importlib.metadata
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import queue
import re
import resource
import signal
import socket
import ssl
import subprocess
import threading
import time
import traceback
import typing
import urllib.parse
import uuid
import warnings


def quiet_libraries():
    """Apaga do ambiente o que as bibliotecas leriam por conta própria, e cala os avisos delas."""
    for name in list(os.environ):
        if name.upper().startswith(("FLASK_", "WERKZEUG_", "PROMETHEUS_", "SSLKEYLOGFILE")):
            del os.environ[name]
    # O instante em que cada série nasceu seria outra série, que nenhum painel usa.
    os.environ["PROMETHEUS_DISABLE_CREATED_SERIES"] = "true"
    warnings.simplefilter("ignore")


def import_problem(error):
    """Diz que módulo falta ou não serve.

    Argumentos:
        error (Exception): o que impediu a importação.
    Retorna:
        str: frase para o operador.
    """
    file = getattr(error, "filename", None) or traceback.extract_tb(error.__traceback__)[-1].filename
    owner = getattr(getattr(error, "obj", None), "__name__", None) or getattr(error, "name", None)
    module = (owner or os.path.basename(file)).partition(".")[0]
    problem = f"falta o módulo {module}"
    if module in sys.modules or not isinstance(error, ModuleNotFoundError):
        file = getattr(sys.modules.get(module), "__file__", file)
        installed = {each.name.lower(): each.version for each in importlib.metadata.distributions() if each.name}
        problem = f"o módulo {module}, em {file}, não serve: {error}; versão instalada: {installed.get(module) or installed.get('python-' + module)}"
    return (f"{problem}; é preciso Python 3.11, flask 2.2, werkzeug 2.2, redis 4.3, waitress 2.1 e python-dotenv 0.21, ou mais novos; "
            "no Debian: apt install python3-flask python3-redis python3-waitress python3-dotenv")


if __name__ == "__main__":
    quiet_libraries()
try:
    import dotenv
    import dotenv.parser
    import flask
    import flask.cli
    import redis
    import redis.backoff
    import redis.retry
    import redis.sentinel
    import waitress
    import waitress.channel
    import waitress.wasyncore
    import werkzeug.exceptions
    import werkzeug.serving
    # Um Python antigo, ou um arquivo vizinho importado em lugar de um módulo, não os teria.
    needed = (asyncio.timeout, dotenv.dotenv_values, flask.Flask, redis.Redis, waitress.create_server)
except Exception as error:
    print(f"erro: {import_problem(error)}", file=sys.stderr)
    sys.exit(2)

version = "1.1.0"
author = "Patrick Brandao <patrickbrandao@gmail.com>"
program = "py-ndjson-proxy"


# =============================================================================
# Configurações: uma tabela e as variáveis globais que ela preenche
# =============================================================================
# Cada configuração é uma linha da tabela `settings`. Dela saem os argumentos, a
# ajuda, o --check e os testes que prendem o arquivo de /etc e a documentação.


class configuration_error(Exception):
    """Erro de configuração: uma frase pronta para o operador (status de saída 2)."""


class kind(typing.NamedTuple):
    """Tipo de uma configuração: como ler o texto e o que é permitido."""

    parse: typing.Callable[[str], typing.Any]
    allowed: str


class setting(typing.NamedTuple):
    """Uma linha da tabela de configurações."""

    name: str
    flags: tuple
    kind: kind
    default: str
    group: str
    unit: str
    help: str
    secret: bool = False


def integer(low, high):
    """Cria o tipo "número inteiro" com limites.

    Argumentos:
        low (int): menor valor permitido.
        high (int): maior valor permitido.
    Retorna:
        kind: tipo cujo parse devolve int e levanta ValueError fora dos limites.
    """

    def parse(text):
        """Lê o número.

        Argumentos:
            text (str): só dígitos ASCII, com sinal de menos opcional.
        Retorna:
            int: entre low e high.
        Levanta:
            ValueError: se não for um inteiro ou estiver fora dos limites.
        """
        # int() sozinho aceitaria "1_000" e algarismos de outras escritas.
        if not re.fullmatch(r"-?[0-9]{1,18}", text.strip()) or not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return kind(parse, f"um número inteiro de {low} a {high}")


def choice(*names):
    """Cria o tipo "uma das palavras".

    Argumentos:
        names (str): duas ou mais palavras permitidas, em minúsculas.
    Retorna:
        kind: tipo cujo parse devolve a palavra em minúsculas.
    """

    def parse(text):
        """Confere a palavra.

        Argumentos:
            text (str): palavra dada pelo operador, sem diferenciar maiúsculas.
        Retorna:
            str: a palavra em minúsculas.
        Levanta:
            ValueError: se não for uma das permitidas.
        """
        return names[names.index(text.strip().lower())]

    return kind(parse, ", ".join(names[:-1]) + " ou " + names[-1])


def pattern(expression, allowed):
    """Cria o tipo "texto que casa inteiro com uma expressão regular".

    Argumentos:
        expression (str): expressão regular aplicada ao texto todo.
        allowed (str): descrição do que é permitido, em português.
    Retorna:
        kind: tipo cujo parse devolve o próprio texto.
    """

    def parse(text):
        """Confere o texto.

        Argumentos:
            text (str): texto dado pelo operador.
        Retorna:
            str: o mesmo texto, intacto.
        Levanta:
            ValueError: se não casar com a expressão.
        """
        if not re.fullmatch(expression, text, re.DOTALL):
            raise ValueError(text)
        return text

    return kind(parse, allowed)


def parse_switch(text):
    """Lê uma chave liga/desliga.

    Argumentos:
        text (str): on ou off (também 1/0, true/false, yes/no, sim/não).
    Retorna:
        bool: verdadeiro se ligada.
    Levanta:
        ValueError: se a palavra não for conhecida.
    """
    # As que ligam vêm primeiro; index levanta ValueError.
    return ("on", "1", "true", "yes", "sim", "off", "0", "false", "no", "não").index(text.strip().lower()) < 5


def parse_line(text):
    """Lê uma mensagem que será enviada como uma única linha.

    Argumentos:
        text (str): conteúdo, que pode ter quebras de linha.
    Retorna:
        bytes: a linha já normalizada, sem o LF final.
    Levanta:
        ValueError: se o texto for vazio.
    """
    if not text.strip():
        raise ValueError(text)
    return normalize_line(text.strip().encode("utf-8", "replace"))


def split_list(text):
    """Separa os itens de uma lista.

    Argumentos:
        text (str): itens separados por vírgula ou espaço.
    Retorna:
        list[str]: os itens, na ordem; vazia se não há nenhum.
    """
    return [item for item in re.split(r"[,\s]+", text) if item]


def parse_tokens(text):
    """Lê os tokens que autorizam uma requisição.

    Argumentos:
        text (str): vazio, ou tokens separados por vírgula ou espaço.
    Retorna:
        tuple[bytes]: os tokens; vazia se a autorização está desligada.
    Levanta:
        ValueError: se algum não for ASCII visível, ou se só houver separadores, que
            desligariam sem aviso o que o operador quis ligar.
    """
    tokens = split_list(text)
    if (text and not tokens) or not all(re.fullmatch(r"[\x21-\x7e]+", token) for token in tokens):
        raise ValueError(text)
    return tuple(token.encode() for token in tokens)


def parse_header_names(text):
    """Lê a lista de cabeçalhos que não vão para o Redis.

    Argumentos:
        text (str): vazio, none (ou nenhum), ou nomes separados por vírgula ou espaço.
    Retorna:
        frozenset[str]: os nomes em minúsculas.
    Levanta:
        ValueError: se algum não for um nome de cabeçalho.
    """
    # O WSGI não distingue "_" de "-", e quem escreve um costuma querer o outro.
    names = [name.lower().replace("_", "-") for name in split_list(text)]
    if names in (["none"], ["nenhum"]):
        return frozenset()
    # RFC 9110, 5.6.2.
    if {"none", "nenhum"} & set(names) or not all(re.fullmatch(r"[a-z0-9!#$%&'*+.^`|~-]+", name) for name in names):
        raise ValueError(text)
    return frozenset(names)


def parse_origin(text):
    """Lê uma origem de CORS.

    Argumentos:
        text (str): esquema://host[:porta], "*" ou "null".
    Retorna:
        str: a origem como o navegador a envia: em minúsculas, sem barra, sem a porta
        que o esquema já diz e com o nome em ASCII (RFC 6454, 6.2).
    Levanta:
        ValueError: se não tiver essa forma; nenhum navegador enviaria outra.
    """
    origin = text.rstrip("/").lower()
    if origin in ("*", "null"):
        return origin
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#@:*\[\]]+)(:[1-9][0-9]{0,4})?", origin):
        raise ValueError(text)
    # A propriedade port recusa o que passa de 65535.
    url = urllib.parse.urlsplit(origin)
    port = "" if url.port in (None, {"http": 80, "https": 443}.get(url.scheme)) else f":{url.port}"
    return f"{url.scheme}://{url_host(url.hostname).encode('idna').decode()}{port}"


def parse_origins(text):
    """Lê a lista de origens de CORS.

    Argumentos:
        text (str): vazio, "*" ou origens separadas por vírgula ou espaço.
    Retorna:
        frozenset[str]: as origens, na forma de parse_origin.
    Levanta:
        ValueError: se alguma não for uma origem, ou se houver um "*" entre outras, que
            as tornaria inúteis.
    """
    origins = frozenset(map(parse_origin, split_list(text)))
    if "*" in origins and len(origins) > 1:
        raise ValueError(text)
    return origins


def parse_host(text):
    """Lê HTTP_HOST.

    Argumentos:
        text (str): endereço IPv4 ou IPv6, este sem colchetes, ou nome de máquina.
    Retorna:
        str: o mesmo texto.
    Levanta:
        ValueError: se nem pudesse ser procurado no DNS.
    """
    if not re.fullmatch(name_expression, text):
        raise ValueError(text)
    try:
        if ":" in text:
            socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
        else:
            # É como o Python o procuraria; um rótulo vazio ou longo demais seria uma exceção.
            text.encode("idna")
    except OSError as error:
        raise ValueError(text) from error
    return text


def url_host(host):
    """Escreve um endereço como as URLs o pedem.

    Argumentos:
        host (str): endereço ou nome.
    Retorna:
        str: o IPv6 entre colchetes; o resto como veio.
    """
    return f"[{host}]" if ":" in host else host


class redis_address(typing.NamedTuple):
    """Endereço do Redis: a URL para o redis-py e a forma que pode ser mostrada."""

    url: str
    shown: str


name_expression = r"[^\s\x00-\x1f\x7f]+"
# O maior número que o Redis sabe ler; quantos databases ele tem só ele diz.
last_database = 2**31 - 1
# As opções de uma URL do Redis: as outras do redis-py são do programa, ou só falhariam na conexão.
url_options = r"db|username|password|ssl_\w+"


def parse_nodes(text):
    """Lê as formas de REDIS_SERVER que nomeiam vários nós.

    Argumentos:
        text (str): sentinel://[usuário:senha@]ip[:porta],.../mestre[/database], com o usuário e a senha das
            sentinelas; ou cluster://[usuário:senha@]ip[:porta],...; sem porta valem 26379 e 6379.
    Retorna:
        redis_address: o texto completo, ou a URL do primeiro nó do cluster, e o texto sem usuário nem senha.
    Levanta:
        ValueError: se não tiver uma destas formas.
    """
    host = r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\],]+)(?::[0-9]{1,5})?"
    parts = re.fullmatch(
        rf"(sentinel|cluster)://(?:[^\s/@]*@)?({host}(?:,{host})*)(?:/([^\s/?#]+)(?:/([0-9]+))?)?", text)
    if not parts or (parts[1] == "cluster") != (parts[3] is None) or int(parts[4] or 0) > last_database:
        raise ValueError(text)
    for each in parts[2].split(","):
        url = urllib.parse.urlsplit(f"//{each}")
        # A propriedade port recusa o que passa de 65535.
        if url.port == 0:
            raise ValueError(text)
        parse_host(url.hostname)
    if parts[1] == "cluster":
        # Os outros nós só diferem no endereço.
        first = re.sub(r"^cluster://((?:.*@)?[^,@]*).*", r"redis://\1", text)
        redis.ConnectionPool.from_url(first)
        return redis_address(first, f"cluster://{parts[2]}")
    return redis_address(text, f"sentinel://{parts[2]}/{parts[3]}/{int(parts[4] or 0)}")


def parse_redis_address(text):
    """Lê REDIS_SERVER: ip[:porta][/database], uma URL do redis-py, as sentinelas ou os nós de um cluster.

    Argumentos:
        text (str): endereço; sem porta vale 6379 e sem database vale 0.
    Retorna:
        redis_address: a URL completa e o texto sem usuário nem senha.
    Levanta:
        ValueError: se não tiver uma das formas permitidas.
    """
    text = text.strip()
    if text.startswith(("sentinel:", "cluster:")):
        return parse_nodes(text)
    is_bare = "://" not in text
    whole = f"redis://{text}" if is_bare else text
    url = urllib.parse.urlsplit(whole)
    if url.scheme not in ("redis", "rediss", "unix") or not (url.hostname or url.scheme == "unix") or (
            is_bare and re.search("[@?#]", text)):
        raise ValueError(text)
    if url.port == 0 or (url.scheme != "unix" and not re.fullmatch(r"(/[0-9]*/?)?", url.path)):
        raise ValueError(text)
    # A conexão só é construída aqui para que o redis-py confira as opções da URL: uma a uma, para nomear a errada.
    start = f"{url.scheme}://{url.netloc or url.path}"
    for name, value in urllib.parse.parse_qsl(url.query, keep_blank_values=True):
        try:
            if not re.fullmatch(url_options, name):
                raise ValueError("só servem db, username, password e as de TLS, ssl_...")
            if name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
                open(value, "rb").close()
            redis.ConnectionPool.from_url(f"{start}?{urllib.parse.urlencode({name: value})}").make_connection()
        except Exception as error:
            takes = "aceita none, optional ou required" if name == "ssl_cert_reqs" else f"não serve ({error})"
            raise ValueError(text, f"a opção {name} da URL {takes}") from error
    try:
        connection = redis.ConnectionPool.from_url(whole).make_connection()
        if not 0 <= int(connection.db) <= last_database:
            raise ValueError(text)
    except Exception as error:
        raise ValueError(text) from error
    # O database mostrado é o que vale, venha ele do caminho ou de "?db=".
    if url.scheme == "unix":
        return redis_address(text, f"unix://{connection.path}?db={connection.db}")
    parse_host(url.hostname)
    shown = f"{url_host(url.hostname)}:{connection.port}/{connection.db}"
    return redis_address(whole, shown if is_bare else f"{url.scheme}://{shown}")


text_kind = kind(str, "qualquer texto em UTF-8")
name_kind = pattern(name_expression, "um texto sem espaços, de um caractere ou mais")
queue_kind = pattern(f"({name_expression})?", "vazio ou um texto sem espaços")
host_kind = kind(parse_host, "um endereço IP (IPv6 sem colchetes) ou o nome desta máquina")
header_kind = pattern(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?", "um texto ASCII imprimível, de uma só linha")
line_kind = kind(parse_line, "um texto que não seja vazio")
switch_kind = kind(parse_switch, "on ou off")
tokens_kind = kind(parse_tokens, "vazio, ou um ou mais tokens em ASCII visível, separados por vírgula ou espaço")
names_kind = kind(parse_header_names, "vazio, none ou nomes de cabeçalhos separados por vírgula ou espaço")
origins_kind = kind(parse_origins, "vazio, um * sozinho ou uma lista de origens como https://exemplo.com.br")
redis_kind = kind(
    parse_redis_address,
    "ip:porta/database (127.0.0.1:6379/1), uma URL redis://, rediss:// ou unix://, "
    "sentinel://ip:porta,ip:porta/mestre/database, ou cluster://ip:porta,ip:porta",
)
day = 24 * 60 * 60 * 1000
line_types = ("application/x-ndjson", "application/json-lines", "application/jsonl")

settings = [
    setting("HTTP_PORT", ("-p", "--port"), integer(0, 65535), "8771", "HTTP", "", "porta HTTP; 0 escolhe uma livre"),
    # O padrão é o da especificação; quem quer menos tem HTTP_HOST, AUTH_TOKEN e localhost-only.conf.
    setting("HTTP_HOST", ("--host",), host_kind, "0.0.0.0", "HTTP", "", "endereço em que escuta; :: é IPv6 e IPv4"),  # nosec B104
    setting("HTTP_SERVER", ("--server",), choice("flask", "waitress"), "flask", "HTTP", "", "servidor da aplicação"),
    setting("SERVERNAME", ("-s", "--servername"), header_kind, program, "HTTP", "", "cabeçalho Server das respostas"),
    setting("CONTENT_TYPE", ("--content-type",), choice(*line_types, "application/json"), line_types[0], "HTTP", "",
            "tipo do streaming para o cliente cujo Accept não nomeia nenhum dos nossos"),
    setting("AUTH_TOKEN", ("--auth-token",), tokens_kind, "", "HTTP", "", "tokens aceitos em Authorization: Bearer; vazio não exige", True),
    setting("HEADERS_EXCLUDE", ("--headers-exclude",), names_kind, "", "HTTP", "",
            "cabeçalhos que não vão para o Redis; vazio é authorization,cookie se houver AUTH_TOKEN"),
    setting("CORS_ORIGIN", ("--cors-origin",), origins_kind, "", "HTTP", "", "origens autorizadas; vazio desliga"),
    setting("TRUST_PROXY", ("--trust-proxy",), integer(0, 16), "0", "HTTP", "",
            "proxies reversos confiáveis à frente, que dizem em X-Forwarded-For quem é o cliente; 0 não acredita"),
    setting("REDIS_SERVER", ("-R", "--redis"), redis_kind, "127.0.0.1:6379/1", "Redis", "", "endereço do Redis"),
    setting("REDIS_PASSWORD", ("-S", "--secret"), text_kind, "", "Redis", "", "senha do Redis", True),
    setting("REDIS_CHANNEL", ("-C", "--channel"), name_kind, "ndjson_jobs", "Redis", "", "canal em que as tarefas são publicadas"),
    setting("REDIS_QUEUE", ("--queue",), queue_kind, "", "Redis", "", "fila das tarefas, para BLPOP; vazio desliga"),
    setting("REDIS_PREFIX", ("-X", "--prefix"), name_kind, "ndjson_task_", "Redis", "", "prefixo da chave da tarefa"),
    setting("REDIS_LIST_PREFIX", ("-L", "--list-prefix"), name_kind, "ndjson_list_", "Redis", "", "prefixo da lista das linhas"),
    setting("REDIS_TTL", ("--ttl",), integer(3, 31536000), "600", "Redis", "s", "validade das chaves, renovada em uso"),
    setting("REDIS_WAKE", ("--wake",), switch_kind, "on", "Redis", "", "o Redis avisa qual chave mudou; off só consulta"),
    setting("REDIS_REANNOUNCE", ("--reannounce",), switch_kind, "on", "Redis", "", "repete, a cada segundo, o anúncio que ninguém ouviu"),
    setting("INTERVAL", ("-i", "--interval"), integer(1, day), "200", "Tempos", "ms", "tempo entre duas consultas"),
    setting("PAUSE", ("-P", "--pause"), integer(0, day), "20", "Tempos", "ms", "pausa após cada linha; 0: em lotes"),
    setting("MAXTIME", ("-t", "--maxtime"), integer(1, day), "45000", "Tempos", "ms", "tempo máximo sem linha nova"),
    setting("MAXTIME_ERROR", ("-E", "--maxtime-error"), line_kind, '{"error": "timeout"}', "Tempos", "",
            "linha enviada quando MAXTIME se esgota"),
    setting("HEARTBEAT", ("--heartbeat",), integer(0, day), "0", "Tempos", "ms", "silêncio até HEARTBEAT_LINE; 0 desliga"),
    setting("HEARTBEAT_LINE", ("--heartbeat-line",), line_kind, '{"type": "ping"}', "Tempos", "", "linha que HEARTBEAT envia"),
    setting("DRAIN", ("--drain",), integer(0, day), "5000", "Tempos", "ms", "tempo dos streams quando o serviço para"),
    setting("MAX_STREAMS", ("--max-streams",), integer(1, 100000), "4096", "Limites", "", "streams simultâneos; além deles, 503"),
    setting("MAX_BODY", ("--max-body",), integer(0, 536870912), "16777216", "Limites", "bytes", "tamanho máximo do corpo"),
    setting("REQUEST_TIMEOUT", ("--request-timeout",), integer(100, day), "30000", "Limites", "ms", "prazo para a requisição chegar inteira"),
    setting("METRICS_PORT", ("--metrics-port",), integer(0, 65535), "0", "Métricas", "", "porta das métricas; 0 desliga"),
    setting("METRICS_HOST", ("--metrics-host",), host_kind, "127.0.0.1", "Métricas", "", "endereço das métricas, sem senha"),
    setting("LOG_LEVEL", ("--log-level",), choice("debug", "info", "warning", "error"), "info", "Log", "", "nível do log"),
    setting("ENV_FILE", ("-f", "--env-file"), pattern(r"[^\x00:]+(:[^\x00:]+)*", "o caminho de um arquivo, ou de vários separados por :"),
            "/etc/py-ndjson-proxy.env", "Arquivo", "",
            "arquivo de configurações, abaixo do ambiente e dos argumentos; de vários, o último é o mais forte"),
]

# Uma variável global por linha da tabela; load_settings lhes dá o valor.
HTTP_PORT = HTTP_HOST = HTTP_SERVER = SERVERNAME = CONTENT_TYPE = AUTH_TOKEN = HEADERS_EXCLUDE = CORS_ORIGIN = \
    TRUST_PROXY = REDIS_SERVER = REDIS_PASSWORD = REDIS_CHANNEL = REDIS_QUEUE = REDIS_PREFIX = REDIS_LIST_PREFIX = \
    REDIS_TTL = REDIS_WAKE = REDIS_REANNOUNCE = INTERVAL = PAUSE = MAXTIME = MAXTIME_ERROR = HEARTBEAT = \
    HEARTBEAT_LINE = DRAIN = MAX_STREAMS = MAX_BODY = REQUEST_TIMEOUT = METRICS_PORT = METRICS_HOST = LOG_LEVEL = \
    ENV_FILE = None
# O laço, a conexão comum com o Redis, quem escreve o log, e as métricas (None, se desligadas): são de main, serve e check.
loop = link = log_writer = meter = None


# Os arquivos de ENV_FILE que o programa de antes da recarga já conferiu: caminho -> texto.
kept_files = {}


class layered(typing.NamedTuple):
    """O texto efetivo de uma configuração e a camada de onde ele veio."""

    text: str
    layer: str


def build_parser():
    """Monta o leitor de argumentos a partir da tabela.

    Retorna:
        argparse.ArgumentParser: cada configuração vira um atributo com o texto
        dado, ausente se o argumento não foi usado; mais check, version e help.
    """
    parser = argparse.ArgumentParser(
        prog=program, usage=f"{program} [opções]", add_help=False, allow_abbrev=False,
        exit_on_error=False, argument_default=argparse.SUPPRESS,
        description="Middleware HTTP que entrega como NDJSON as partes que um worker empurra no Redis.",
        epilog="Ordem de força: padrão < arquivo ENV_FILE < variável de ambiente < argumento.",
    )
    groups = {}
    for row in settings:
        group = groups.get(row.group) or parser.add_argument_group(row.group)
        groups[row.group] = group
        unit = f", em {row.unit}" if row.unit else ""
        detail = f"{row.help}{unit} ({row.name}, padrão: {row.default or 'vazio'})".replace("%", "%%")
        group.add_argument(*row.flags, dest=row.name, metavar="VALOR", help=detail)
    group = parser.add_argument_group("Ações")
    group.add_argument("--check", action="store_true", help="mostra as configurações, testa o Redis e sai")
    group.add_argument("--version", action="store_true", help="mostra a versão e sai")
    group.add_argument("-h", "--help", action="store_true", help="mostra esta ajuda e sai")
    return parser


def read_arguments(argv):
    """Lê os argumentos da linha de comando, ainda como texto.

    Argumentos:
        argv (list[str]): argumentos, sem o nome do programa.
    Retorna:
        dict: nome da configuração -> texto; e check, version, help -> True.
    Levanta:
        configuration_error: argumento desconhecido ou sem valor.
    """
    try:
        known, unknown = build_parser().parse_known_args(argv)
    except argparse.ArgumentError as error:
        flag = error.argument_name or "argumento"
        wants_value = any(name in row.flags for row in settings for name in flag.split("/"))
        raise configuration_error(
            f"{flag}: falta o valor do argumento (um valor que começa com - se escreve --opção=-valor)"
            if wants_value else f"{flag}: este argumento não leva valor"
        ) from None
    if unknown:
        raise configuration_error(unknown_argument(unknown[0], argv))
    return vars(known)


def unknown_argument(word, argv):
    """Monta a frase sobre um argumento desconhecido.

    Argumentos:
        word (str): o primeiro deles.
        argv (list[str]): todos os argumentos.
    Retorna:
        str: frase com o argumento; sem ele, se pode ser parte de um segredo.
    """
    flags = [flag for row in settings for flag in row.flags] + ["--check", "--version", "--help"]
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name, flags, 1) if name.startswith("-") else []
    hint = f"; o mais parecido é {near[0]}" if near else ""
    # Sem aspas, um segredo com espaços chega aos pedaços, e só o primeiro é o valor.
    secret = tuple(flag for row in settings if row.secret for flag in row.flags)
    if any(each.startswith(secret) or "://" in each for each in argv):
        return f"argumento desconhecido, não mostrado por haver um segredo; um valor com espaços vai entre aspas{hint}"
    return f"argumento desconhecido: {name}{hint} (veja --help)"


def read_env_file(path, required):
    """Lê o arquivo de configuração com o python-dotenv.

    Argumentos:
        path (str): caminho do arquivo, em UTF-8.
        required (bool): falso se o arquivo pode não existir.
    Retorna:
        dict: nome -> texto, sem expandir ${...}: uma senha pode contê-lo.
    Levanta:
        configuration_error: arquivo ilegível, fora de UTF-8 ou com linha inválida.
    """
    try:
        text = kept_files.get(path)
        if text is None:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read()
    except FileNotFoundError:
        if not required:
            return {}
        raise configuration_error(f"ENV_FILE: o arquivo {path} não existe") from None
    except UnicodeDecodeError as error:
        raise configuration_error(f"ENV_FILE: o arquivo {path} não está em UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise configuration_error(f"ENV_FILE: o arquivo {path} não pode ser lido: {cause_of(error)}") from None
    for binding in dotenv.parser.parse_stream(io.StringIO(text)):
        if binding.error or (binding.key is not None and binding.value is None):
            raise configuration_error(
                f"ENV_FILE: a linha {binding.original.line} do arquivo {path} não tem a forma NOME=valor, ou tem aspas a mais"
            )
    return dotenv.dotenv_values(stream=io.StringIO(text), interpolate=False)


def unknown_names(values, path):
    """Procura nomes do arquivo que não são configurações.

    Argumentos:
        values (dict): conteúdo do arquivo.
        path (str): caminho do arquivo, para a mensagem.
    Retorna:
        list[str]: um aviso por nome desconhecido, com a configuração mais parecida.
    """
    names, cautions = [row.name for row in settings], []
    for name in values:
        if name in names:
            continue
        near = difflib.get_close_matches(name.upper(), names, 1, 0.5)
        hint = f"; a mais parecida é {near[0]}" if near else ""
        cautions.append(f"{name}, no arquivo {path}, não é uma configuração conhecida e foi ignorada{hint}")
    return cautions


def parse_setting(row, given):
    """Converte o texto de uma configuração.

    Argumentos:
        row (setting): linha da tabela.
        given (layered): texto e camada.
    Retorna:
        object: o valor, do tipo da configuração.
    Levanta:
        configuration_error: frase com nome, valor, camada e o que é permitido.
    """
    try:
        # Bytes fora de UTF-8 chegam do sistema como surrogates, que o Redis recusaria.
        given.text.encode("utf-8")
        return row.kind.parse(given.text)
    except ValueError as error:
        # Uma URL do Redis traz a senha antes do @ ou entre as opções, depois do "?".
        is_secret = row.secret or (row.name == "REDIS_SERVER" and re.search(r"[@?]", given.text))
        shown = "o valor dado" if is_secret else f"o valor {given.text!r}"
        reason = error.args[1] if type(error) is ValueError and len(error.args) == 2 else ""
        raise configuration_error(
            f"{row.name}: {shown} ({given.layer}) não é válido; {reason or f'é permitido {row.kind.allowed}'}"
        ) from None


def has_password(address):
    """Diz se um endereço do Redis traz uma senha.

    Argumentos:
        address (str): valor de REDIS_SERVER, já conferido.
    Retorna:
        bool: verdadeiro se é uma URL com senha antes do @ ou entre as opções.
    """
    url = urllib.parse.urlsplit(address)
    return "://" in address and bool(url.password or any("password" in name for name in urllib.parse.parse_qs(url.query)))


def load_settings(argv, environ):
    """Resolve todas as configurações e preenche as variáveis globais.

    Argumentos:
        argv (list[str]): argumentos, sem o nome do programa.
        environ (dict): variáveis de ambiente.
    Retorna:
        tuple: (ações pedidas, um dict; texto e camada de cada configuração, um
        dict de layered; avisos, uma lista de frases).
    Levanta:
        configuration_error: no primeiro valor inválido.
    """
    arguments = read_arguments(argv)
    given = {row.name: layered(row.default, "padrão") for row in settings}
    actions = {name: arguments.pop(name) for name in ("check", "version", "help") if name in arguments}
    if "version" in actions or "help" in actions:
        return actions, given, []
    upper = {row.name: layered(environ[row.name], "ambiente") for row in settings if row.name in environ}
    for row in settings:
        if row.name in arguments:
            upper[row.name] = layered(arguments[row.name], f"argumento {row.flags[-1]}")
    named = parse_setting(settings[-1], upper.get("ENV_FILE", given["ENV_FILE"]))
    cautions, paths = [], named.split(":")
    for path in paths:
        # Só o último arquivo que o operador nomeou precisa existir.
        values = read_env_file(path, required=path == paths[-1] and "ENV_FILE" in upper)
        cautions += unknown_names(values, path)
        if values.pop("ENV_FILE", named) != named:
            cautions.append(f"ENV_FILE, dentro do arquivo {path}, não tem efeito")
        given |= {row.name: layered(values[row.name], f"arquivo {path}") for row in settings if row.name in values}
    given |= upper
    if given["AUTH_TOKEN"].text and not given["HEADERS_EXCLUDE"].text.strip():
        # O token, guardado no Redis, daria a quem o lê o direito de criar tarefas.
        given["HEADERS_EXCLUDE"] = layered("authorization,cookie", "padrão com AUTH_TOKEN")
    for row in settings:
        globals()[row.name] = parse_setting(row, given[row.name])
    check_combinations(given)
    for row in settings:
        text, layer = given[row.name]
        if row.kind is line_kind:
            try:
                json.loads(text)
            except ValueError:
                cautions.append(f"{row.name}: o valor ({layer}) não é JSON: um cliente de NDJSON pode recusar essa linha")
        elif re.fullmatch(r"(['\"]).*\1", text):
            cautions.append(f"{row.name}: o valor ({layer}) começa e termina com aspas, que fazem parte dele")
    cautions += [
        f"{row.name}: o argumento {row.flags[-1]} deixa o segredo à vista na lista de processos; "
        f"o lugar dele é o arquivo {paths[-1]}" for row in settings if arguments.get(row.name)
        and (row.secret or (row.name == "REDIS_SERVER" and has_password(arguments[row.name])))
    ]
    return actions, given, cautions


def check_combinations(given):
    """Confere as regras que envolvem duas configurações.

    Argumentos:
        given (dict): texto e camada de cada configuração.
    Levanta:
        configuration_error: se duas configurações não podem andar juntas.
    """
    try:
        if METRICS_PORT:
            importlib.import_module("prometheus_client")
    except Exception as error:
        raise configuration_error(
            f"METRICS_PORT: o valor {METRICS_PORT} ({given['METRICS_PORT'].layer}) pede o módulo prometheus_client, "
            f"que falta ou não serve ({error}); no Debian: apt install python3-prometheus-client"
        ) from None
    is_same_port = METRICS_PORT == HTTP_PORT and (METRICS_HOST == HTTP_HOST or HTTP_HOST in ("0.0.0.0", "::"))
    of_queue = "não pode começar com {}, que é {!r}: a fila seria tomada por uma chave de tarefa"
    for is_wrong, name, why in (
        (REDIS_PREFIX == REDIS_LIST_PREFIX, "REDIS_LIST_PREFIX",
         "deve ser diferente de REDIS_PREFIX, pois uma chave do Redis só tem um tipo"),
        (METRICS_PORT and is_same_port, "METRICS_PORT", "deve ser diferente de HTTP_PORT"),
        (REDIS_QUEUE.startswith(REDIS_PREFIX), "REDIS_QUEUE", of_queue.format("REDIS_PREFIX", REDIS_PREFIX)),
        (REDIS_QUEUE.startswith(REDIS_LIST_PREFIX), "REDIS_QUEUE", of_queue.format("REDIS_LIST_PREFIX", REDIS_LIST_PREFIX)),
        (PAUSE >= MAXTIME, "PAUSE", f"deve ser menor que MAXTIME, que é {MAXTIME} ({given['MAXTIME'].layer}): "
         "toda linha terminaria em MAXTIME_ERROR"),
    ):
        if is_wrong:
            raise configuration_error(f"{name}: o valor {globals()[name]!r} ({given[name].layer}) {why}")


# =============================================================================
# Log e systemd
# =============================================================================

log = logging.getLogger(program)
# Quantas linhas de log esperam por uma saída lenta; além delas, são perdidas e contadas.
log_lines = 10000
# Tempo máximo, em segundos, para escrever o que resta ao encerrar.
log_patience = 1.0
# Tempo, em segundos, até repetir no log um aviso igual.
warning_interval = 60.0
# Assunto de um aviso -> (quando pode sair de novo, quantos foram calados).
told_warnings = {}


class log_formatter(logging.Formatter):
    """Formata uma linha de log: <N> para o journald, palavra do nível fora dele."""

    priorities: typing.ClassVar = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3}
    words: typing.ClassVar = {"WARNING": "aviso: ", "ERROR": "erro: "}

    def __init__(self, is_journal):
        """Guarda o destino.

        Argumentos:
            is_journal (bool): verdadeiro se a saída de erros é o journald.
        """
        super().__init__()
        self.is_journal = is_journal

    def format(self, record):
        """Monta a linha.

        Argumentos:
            record (logging.LogRecord): registro.
        Retorna:
            str: uma só linha, sem caracteres de controle: um texto vindo de fora
            não pode forjar outra linha de log.
        """
        text = record.getMessage()
        if record.exc_info and log.isEnabledFor(logging.DEBUG):
            text += f" | {self.formatException(record.exc_info)}"
        if not text.isprintable():
            text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        if self.is_journal:
            return f"<{self.priorities.get(record.levelname, 6)}>{text}"
        return self.words.get(record.levelname, "") + text


class log_queue(logging.handlers.QueueHandler):
    """Fila entre o programa e a saída de erros: uma saída presa não prende o laço."""

    lost = 0

    def enqueue(self, record):
        """Guarda uma linha, ou a conta como perdida se a fila está cheia.

        Argumentos:
            record (logging.LogRecord): linha já formatada.
        """
        waiting = self.queue.qsize()
        if waiting >= log_lines:
            self.lost += 1
            return
        self.queue.put(record)
        if self.lost and waiting < log_lines // 2:
            count, self.lost = self.lost, 0
            log.warning("%d linhas de log se perderam: a saída de erros não as aceitava", count)


def configure_logging():
    """Prepara o log do programa e cala o das bibliotecas.

    Retorna:
        logging.handlers.QueueListener: quem escreve as linhas, em sua própria thread.
    """
    # Sem isto, uma falha de escrita geraria um traceback a cada linha.
    logging.raiseExceptions = False
    is_journal = False
    with contextlib.suppress(OSError, ValueError, AttributeError):
        status = os.fstat(sys.stderr.fileno())
        is_journal = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    # A fila feita em C; a outra troca de thread mais de duas vezes por linha.
    handler = log_queue(queue.SimpleQueue())
    handler.setFormatter(log_formatter(is_journal))
    logging.basicConfig(handlers=[handler], level=logging.CRITICAL, force=True)
    log.setLevel(logging.INFO)
    # O werkzeug, sem nível próprio, daria a si mesmo o INFO.
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    writer = logging.handlers.QueueListener(handler.queue, logging.StreamHandler(sys.stderr))
    writer.start()
    return writer


def warn_rarely(text, subject=None):
    """Escreve um aviso que outros podem provocar à vontade: sai uma vez por minuto.

    Argumentos:
        text (str): frase para o operador.
        subject (str): o que torna iguais dois avisos; sem ele, a própria frase.
    """
    subject, now = subject or text, time.monotonic()
    due, count = told_warnings.get(subject, (0.0, 0))
    if now < due:
        told_warnings[subject] = (due, count + 1)
        return
    if len(told_warnings) > 1000:
        told_warnings.clear()
    told_warnings[subject] = (now + warning_interval, 0)
    log.warning("%s%s", text, f" (e outras {count} vezes desde o último aviso)" if count else "")


def cause_of(error):
    """Diz por que algo falhou, com as palavras do sistema, do TLS ou do Redis.

    Argumentos:
        error (Exception): erro do sistema ou do redis-py, que guarda a causa.
    Retorna:
        str: trecho de frase.
    """
    cause = error
    while cause is not None and not isinstance(cause, redis.ResponseError | redis.AuthenticationError):
        if isinstance(cause, redis.sentinel.MasterNotFoundError):
            # As palavras deste trazem tudo o que há nas conexões, a senha inclusive.
            return "nenhuma sentinela diz quem é o mestre"
        if isinstance(cause, ssl.SSLError):
            return f"falha de TLS ({getattr(cause, 'verify_message', None) or getattr(cause, 'reason', None) or cause})"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if isinstance(cause, redis.TimeoutError | TimeoutError):
            return f"sem resposta em {redis_timeout:g} s"
        cause = cause.__cause__ or cause.__context__
    words = redis_words(error)
    if words.startswith(("MOVED ", "ASK ", "TRYAGAIN ")):
        return "as chaves mudam de nó no cluster"
    return "conexão fechada pelo servidor" if words.startswith("Connection closed by") else words


def notify_systemd(state, descriptors=()):
    """Informa o estado ao systemd (protocolo sd_notify).

    Argumentos:
        state (str): linhas NOME=valor, como READY=1.
        descriptors (iterable): descritores que ele deve guardar.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            # Um systemd que não lê não pode parar o laço.
            channel.setblocking(False)
            channel.connect(re.sub("^@", "\0", address))
            socket.send_fds(channel, [state.encode()], descriptors)
    except OSError as error:
        log.debug("o systemd não recebeu a notificação: %s", cause_of(error))


# =============================================================================
# Redis: uma conexão, aberta pelo redis-py e falada pelo laço
# =============================================================================

# Sem resposta por este tempo, em segundos, o Redis é dado como fora do ar.
redis_timeout = 2.0
# Enquanto ele está fora do ar, quanto tempo, em segundos, uma requisição espera pela volta.
down_patience = 0.25
# A cada quanto, em segundos, um PING prova que a conexão vive.
ping_interval = 30.0
# Tamanho, em bytes, de uma leitura da conexão.
receive_size = 65536
# O que o sistema guarda por enviar: com muito guardado, um envio que avança pareceria parado.
redis_send_buffer = 65536
# Uma tarefa deste tamanho, em bytes, tem uma conexão só para si: na comum, faria esperar todas as outras, e o Redis
# fecha a conexão que lhe manda mais do que aceita.
large_payload = 262144
# Limites de uma retirada com PAUSE=0: maiores rendem mais linhas por segundo, mas seguram
# por mais tempo os outros streams e a memória.
take_lines = 500
take_bytes = 262144

# Tirar uma linha precisa ser repetível: se a conexão cai depois do LPOP e antes da resposta, a
# linha não está mais na lista nem chegou aqui. Por isso o pedido diz quantos elementos já vieram,
# e o que sai da lista fica guardado até o pedido seguinte, com as contagens de antes e de depois: o
# pedido repetido recebe o guardado; e o que conta menos se atrasou na rede, e não tira nada. O que
# conta mais fala com uma réplica promovida que não soube das últimas retiradas: a resposta diz de
# quantos elementos, e stream.skip_known decide se são velhos. Se o guardado sumiu com a chave da
# tarefa, os dados se perderam ("lost"), ainda que haja linhas novas: o fim de uma tarefa o deixa.
# O guardado é texto, pois cmsgpack falta em alguns servidores, e a falta só se veria depois do LPOP.
# Em um cluster, a lista que se esvazia enquanto as chaves mudam de nó já é recusada ao script: pcall.
# TYPE e LPOP são um só passo: o fim só é declarado quando a chave sumiu E a lista se esvaziou
# no mesmo instante; se a chave sumiu e ainda há linhas, o tipo devolvido é "more".
take_script = """
local kind, had = redis.call('TYPE', KEYS[1]).ok, tonumber(ARGV[1])
local before, after = string.match(redis.call('GETRANGE', KEYS[3], 0, 39), '^(%d+) (%d+)')
before, after = tonumber(before) or -1, tonumber(after) or 0
if before == had then
  local kept, lines = redis.call('GET', KEYS[3]), {}
  local start = string.find(kept, '\\n', 1, true) + 1
  for size in string.gmatch(string.match(kept, '^%S+ %S+ %S+([^\\n]*)'), '%d+') do
    lines[#lines + 1] = string.sub(kept, start, start + size - 1)
    start = start + size
  end
  return {string.match(kept, '^%S+ %S+ (%S+)'), lines, 0}
end
if before > had then return {kind, {}, 0} end
if kind == 'none' and after == 0 and had > 0 then return {'lost', {}, 0} end
local lines, sizes, size, failure = {}, {}, 0, nil
local function fill(source)
  while #lines < tonumber(ARGV[2]) and size < tonumber(ARGV[3]) do
    local line = redis.pcall('LPOP', source)
    if type(line) ~= 'string' then failure = line break end
    size = size + #line
    lines[#lines + 1] = line
    sizes[#sizes + 1] = #line
  end
end
fill(KEYS[2])
if #lines == 0 and kind == 'list' then fill(KEYS[1]) end
if #lines == 0 and failure then return failure end
if #lines > 0 then
  if kind == 'none' and redis.pcall('EXISTS', KEYS[2]) == 1 then kind = 'more' end
  local head = table.concat({had, had + #lines, kind, table.concat(sizes, ' ')}, ' ')
  redis.call('SET', KEYS[3], head .. '\\n' .. table.concat(lines), 'EX', ARGV[4])
end
return {kind, lines, had - after}
"""

# Recusas que não são do comando, mas do estado do servidor, e passam: ele carrega os
# dados, é uma réplica (o mestre mudou), não consegue gravar em disco, ou muda as chaves de nó. E as
# que só uma conexão nova resolve: o script foi esquecido, ou uma ACL o negou agora.
passing_codes = ("LOADING", "READONLY", "MASTERDOWN", "MISCONF", "NOREPLICAS", "NOSCRIPT", "BUSY", "CLUSTERDOWN", "MOVED",
                 "ASK", "TRYAGAIN")
redis_failures = (redis.ConnectionError, redis.TimeoutError)
redis_refusals = (redis.ResponseError, redis.AuthenticationError, redis.BusyLoadingError)


def redis_pool():
    """Cria a fábrica de conexões do redis-py para REDIS_SERVER.

    Retorna:
        redis.ConnectionPool: só constrói conexões; não abre nenhuma.
    """
    options = {
        "socket_timeout": redis_timeout,
        # A repetição silenciosa do redis-py rodaria de novo um comando que já rodou; quem
        # decide o que pode ser repetido é quem o pediu.
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
    }
    # O aperto de mão do redis-py fica em RESP2, o que todas as versões sabem fazer (a 4 não
    # conhece o argumento; a 8 usaria RESP3); redis_link.open passa a RESP3 por conta própria.
    if int(redis.__version__.partition(".")[0]) >= 5:
        options["protocol"] = 2
        # Sem anunciar a biblioteca (CLIENT SETINFO): a quem recusa e fecha, um segundo envio falharia antes que se
        # lesse por quê.
        options |= {"driver_info": None} if hasattr(redis, "driver_info") else {"lib_name": None, "lib_version": None}
    if REDIS_SERVER.url.startswith("sentinel:"):
        pool = sentinel_pool(options)
    else:
        if not REDIS_SERVER.url.startswith("unix:"):
            options |= {"socket_connect_timeout": redis_timeout, "socket_keepalive": True}
        pool = redis.ConnectionPool.from_url(REDIS_SERVER.url, **options)
    pool.connection_kwargs["decode_responses"] = False
    if REDIS_PASSWORD:
        pool.connection_kwargs["password"] = REDIS_PASSWORD
    return pool


def split_nodes(port):
    """Separa os nós que REDIS_SERVER nomeia, sentinelas ou os de um cluster.

    Argumentos:
        port (int): a porta de quem não diz a sua.
    Retorna:
        list[tuple]: pares (endereço, porta).
    """
    hosts = REDIS_SERVER.shown.split("/")[2].split(",")
    return [(url.hostname, url.port or port) for url in (urllib.parse.urlsplit(f"//{host}") for host in hosts)]


def sentinel_pool(options):
    """Cria a fábrica de conexões com o mestre que as sentinelas apontam.

    Argumentos:
        options (dict): opções das conexões com o mestre.
    Retorna:
        redis.sentinel.SentinelConnectionPool: cada conexão pergunta de novo, ao ser
        aberta, quem é o mestre.
    """
    url = urllib.parse.urlsplit(REDIS_SERVER.url)
    master, database = REDIS_SERVER.shown.split("/")[3:]
    # Uma sentinela muda não pode consumir o tempo de quem espera pela resposta.
    asking = {"socket_timeout": redis_timeout / 4, "socket_connect_timeout": redis_timeout / 4, "retry": options["retry"]}
    asking |= {name: urllib.parse.unquote(getattr(url, name)) for name in ("username", "password") if getattr(url, name)}
    sentinels = redis.sentinel.Sentinel(split_nodes(26379), sentinel_kwargs=asking)
    return redis.sentinel.SentinelConnectionPool(
        master, sentinels, socket_connect_timeout=redis_timeout / 2, socket_keepalive=True, db=int(database), **options,
    )


class exchange(typing.NamedTuple):
    """Comandos enviados de uma vez, à espera de suas respostas."""

    future: asyncio.Future
    count: int
    replies: list
    sent_at: float


class redis_link:
    """A conexão com o Redis: comandos em fila, respostas na ordem, avisos no meio."""

    def __init__(self):
        """Prepara a conexão, sem abri-la."""
        # A fábrica do redis-py, que a conexão com sentinelas só referencia fracamente.
        self.pool = redis_pool()
        # A conexão do redis-py, que abre e fecha o socket; aqui só se lê e escreve nele.
        self.connection = self.pool.make_connection()
        self.socket = None
        # Os nós de um cluster, em rodízio (um Redis só é o único), e o das nossas chaves, segundo um deles.
        is_cluster = REDIS_SERVER.shown.startswith("cluster:")
        single = getattr(self.connection, "host", None), getattr(self.connection, "port", None)
        self.nodes, self.moved_to = collections.deque(split_nodes(6379) if is_cluster else [single]), None
        # Bytes que o sistema ainda não aceitou, e se ele avisará quando couberem mais.
        self.outgoing, self.is_blocked = bytearray(), False
        # Bytes recebidos ainda sem resposta inteira, e o mínimo que falta a ela.
        self.incoming, self.missing = [], 1
        # Trocas à espera de resposta, e quando a rede avançou por último: uma resposta longa não é um Redis mudo.
        self.pending, self.moved_at = collections.deque(), 0.0
        # Aberta e pronta; um pedido de pressa para reabrir; o resultado da próxima tentativa; a causa da queda.
        self.up, self.hurry = asyncio.Event(), asyncio.Event()
        self.attempt, self.lost = loop.create_future(), None
        # Se o Redis manda avisos, e o começo da retirada (vazio se ele nega scripts).
        self.is_tracked, self.take_head = False, b""
        # O que o servidor diz de si (INFO; vazio se ele o nega), e o nome que ele deu à sua execução.
        self.info = self.identity = b""
        # Por que o Redis está fora do ar, como o log já o disse; vazio se está no ar.
        self.told = ""

    async def open(self):
        """Abre a conexão com o nó que tem as chaves, carrega o script e liga os avisos.

        Retorna:
            list[tuple]: pares (configuração, por quê) do que o Redis recusa.
        Levanta:
            redis.RedisError, OSError: se o Redis não atender.
        """
        # Cada nó, e mais duas vezes para onde um deles mandar.
        left = len(self.nodes) + 2
        while True:
            try:
                await self.connect()
                async with asyncio.timeout(redis_timeout):
                    problems = await self.greet()
                self.up.set()
                return problems
            except (redis.RedisError, OSError, RuntimeError) as error:
                self.lose(error)
                left -= 1
                if not redis_words(error).startswith("MOVED "):
                    self.moved_to = None
                    self.nodes.rotate(-1)
                if not left or (self.moved_to is None and len(self.nodes) < 2):
                    raise redis.TimeoutError("sem resposta do Redis") if isinstance(error, TimeoutError) else error from None

    async def connect(self):
        """Abre a conexão, e nada mais.

        Levanta:
            redis.RedisError, OSError: se o Redis não atender.
        """
        self.connection.host, self.connection.port = self.moved_to or self.nodes[0]
        # Nomes, TCP, TLS, AUTH e SELECT esperam pela rede: não no laço.
        try:
            await asyncio.to_thread(self.connection.connect)
        except (TypeError, ValueError) as error:
            raise redis.DataError(f"uma opção da URL não serve: {error}") from None
        self.lost = loop.create_future()
        # O redis-py não o publica; o nome é o mesmo da 4 à 8, e está na tabela insides.
        self.socket = self.connection._sock
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, redis_send_buffer)
        loop.add_reader(self.socket, self.receive)

    async def watch(self):
        """Espera a queda da conexão; prova que ela vive, e derruba a que não responde."""
        ping_at = loop.time() + ping_interval
        while not self.lost.done():
            await asyncio.wait([self.lost], timeout=redis_timeout / 4)
            now = loop.time()
            if now >= ping_at:
                ping_at = now + ping_interval
                self.send(("PING",))
            if self.pending and now > max(self.pending[0].sent_at, self.moved_at) + redis_timeout:
                self.lose(redis.TimeoutError("sem resposta do Redis"))

    async def survey(self):
        """Procura no Redis o que recusaria ou perderia uma tarefa; do que ele nega, nada se diz.

        Retorna:
            list[str]: um aviso por perigo.
        Levanta:
            redis.RedisError, TimeoutError: se o Redis não responder.
        """
        async with asyncio.timeout(redis_timeout):
            limits = await self.send(*[("CONFIG", "GET", n) for n in ("proto-max-bulk-len", "client-query-buffer-limit")])
        cautions = []
        if found := re.search(rb"\nmaxmemory:[1-9].*maxmemory_policy:(?!noeviction)(\S+)", self.info, re.DOTALL):
            cautions.append(f"maxmemory-policy é {found[1].decode()}: sem memória, o Redis apagaria tarefas e linhas, e uma "
                            "resposta pela metade pareceria inteira; o certo é noeviction")
        for name, limit in (reply for reply in limits if isinstance(reply, list) and reply):
            if int(limit) < MAX_BODY:
                cautions.append(f"MAX_BODY: o valor {MAX_BODY} passa de {name.decode()}, que no Redis é {int(limit)}: "
                                "ele recusará uma tarefa maior")
        return cautions

    async def greet(self):
        """Prova a conexão recém-aberta e pede o que o programa usa.

        Retorna:
            list[tuple]: como em open.
        Levanta:
            redis.RedisError: se o Redis recusar o indispensável.
        """
        key, lines, queue = REDIS_PREFIX + "?", REDIS_LIST_PREFIX + "?", [REDIS_QUEUE] if REDIS_QUEUE else []
        taken, problems = lines + ":taken", []
        # Em uma transação cada comando é julgado (ACL, cluster, réplica, memória) ao entrar na fila; um GET sem nome faz o
        # EXEC desistir de todos, e assim não é preciso o DISCARD, que uma ACL pode não ter dado.
        trial = [
            ("REDIS_LIST_PREFIX", "EXISTS", key, lines), *[("REDIS_QUEUE", "EXISTS", key, each) for each in queue],
            ("REDIS_PREFIX", "SET", key, "", "EX", REDIS_TTL), *[("REDIS_QUEUE", "RPUSH", each, key) for each in queue],
            ("REDIS_CHANNEL", "PUBLISH", REDIS_CHANNEL, key), ("REDIS_PREFIX", "TYPE", key),
            ("REDIS_LIST_PREFIX", "LPOP", lines), ("REDIS_LIST_PREFIX", "GET", taken),
            ("REDIS_LIST_PREFIX", "EXPIRE", lines, REDIS_TTL), ("REDIS_LIST_PREFIX", "UNLINK", key, lines, taken),
        ]
        # O nome é para o operador; uma ACL pode negá-lo, e INFO também.
        loaded, _, info, *replies = await self.send(
            ("SCRIPT", "LOAD", take_script), ("CLIENT", "SETNAME", program), ("INFO",), ("PING",), ("MULTI",))
        self.info = info if isinstance(info, bytes) else b""
        self.identity = b"".join(re.findall(rb"run_id:(\w+)", self.info))
        if error := first_error(replies):
            # Sem a transação, a prova valeria.
            raise error
        *replies, _, last = await self.send(*[row[1:] for row in trial], ("GET",), ("EXEC",))
        for row, reply in zip([*trial, ("REDIS_SERVER", "EXEC")], [*replies, last], strict=True):
            # A falta de memória passa, e a tarefa recusada por ela o diz.
            if not isinstance(reply, Exception) or re.match("OOM |EXECABORT .* previous", words := redis_words(reply)):
                continue
            if is_passing(reply):
                raise reply
            problems.append((row[0], f"o Redis recusa {row[1]}: {words}"))
            if words.startswith("CROSSSLOT"):
                tag = "".join(re.findall(r"\{([^}]+)\}", REDIS_PREFIX)[:1]) or "ndjson"
                named = " e ".join([f"REDIS_PREFIX={{{tag}}}_task_", f"REDIS_LIST_PREFIX={{{tag}}}_list_"] + [f"REDIS_QUEUE={{{tag}}}_jobs"] * len(queue))
                return [(row[0], f"em um cluster, os nomes pedem um mesmo trecho entre chaves: {named} ({words})")]
        denied = loaded
        if isinstance(loaded, bytes):
            # Quem pode carregar um script pode não poder rodá-lo; nestas chaves não há o que tirar.
            denied, = await self.send(("EVALSHA", loaded, 3, key, lines, taken, 0, 1, 1, REDIS_TTL))
        self.take_head = b"" if isinstance(denied, Exception) else pack_words("EVALSHA", loaded, 3)
        if not self.take_head:
            warn_rarely(f"o Redis não aceita scripts ({cause_of(denied)}): as linhas são tiradas com LPOP simples, "
                        "e uma queda da conexão pode perder a que estava a caminho")
        if REDIS_WAKE:
            short, long = sorted((REDIS_PREFIX, REDIS_LIST_PREFIX), key=len)
            # O Redis recusa prefixos que se sobrepõem; o mais curto abrange o outro.
            words = ["PREFIX", short, *([] if long.startswith(short) else ["PREFIX", long])]
            # Em RESP2 o Redis aceitaria o pedido, e trabalharia por avisos que não tem como mandar.
            denied = first_error(await self.send(("HELLO", 3))) or first_error(
                await self.send(("CLIENT", "TRACKING", "ON", "BCAST", *words, "NOLOOP")))
            self.is_tracked = denied is None
            if denied:
                warn_rarely(f"REDIS_WAKE: o Redis recusou os avisos ({cause_of(denied)}); fica só a consulta periódica")
        return problems

    def lose(self, error, is_quiet=False):
        """Fecha a conexão; quem esperava por uma resposta recebe a falha.

        Argumentos:
            error (Exception): a causa.
            is_quiet (bool): verdadeiro se o Redis a fechou em repouso: só é uma queda se a próxima não abrir.
        """
        if self.socket is None:
            return
        if moved := re.match(r"MOVED \d+ (.*):(\d+)", str(error)):
            self.moved_to = moved[1] or self.connection.host, int(moved[2])
        loop.remove_reader(self.socket)
        loop.remove_writer(self.socket)
        self.connection.disconnect()
        self.socket, self.is_tracked, self.is_blocked = None, False, False
        self.up.clear()
        self.outgoing.clear()
        self.incoming, self.missing = [], 1
        waiting, self.pending = self.pending, collections.deque()
        failure = redis.TimeoutError if isinstance(error, redis.TimeoutError) else redis.ConnectionError
        for each in waiting:
            if not each.future.done():
                each.future.set_exception(failure(str(error)))
        self.lost.set_result(None if is_quiet or moved else error)

    def send(self, *commands):
        """Põe comandos na fila de saída; saem juntos com os que outros pedirem neste giro do laço.

        Argumentos:
            commands (tuple | bytes): as palavras de cada comando, ou ele já escrito por pack_command.
        Retorna:
            asyncio.Future: dará a lista das respostas, com os erros do Redis no lugar das suas;
            levanta redis.ConnectionError ou redis.TimeoutError se a conexão falhar: não se sabe
            então quais comandos rodaram.
        """
        future = loop.create_future()
        if self.socket is None:
            future.set_exception(redis.ConnectionError("a conexão não está aberta"))
            return future
        if not self.outgoing:
            loop.call_soon(self.flush)
        for command in commands:
            self.outgoing += command if isinstance(command, bytes) else pack_command(*command)
        self.pending.append(exchange(future, len(commands), [], loop.time()))
        return future

    def flush(self):
        """Entrega ao sistema o que houver na fila de saída; o que não couber espera que caiba."""
        if not self.outgoing:
            return
        try:
            sent = self.socket.send(self.outgoing)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            sent = 0
        except OSError as error:
            # Quem fecha diz antes por quê.
            self.receive()
            self.lose(error)
            return
        del self.outgoing[:sent]
        if self.outgoing and not self.is_blocked:
            loop.add_writer(self.socket, self.flush)
        elif self.is_blocked:
            # Um envio longo que avança não é um Redis mudo.
            self.moved_at = loop.time() if sent else self.moved_at
            if not self.outgoing:
                loop.remove_writer(self.socket)
        self.is_blocked = bool(self.outgoing)

    def receive(self):
        """Lê o que chegou e o distribui: respostas a quem pediu, avisos aos streams."""
        try:
            # O TLS guarda registros já decifrados, de que o epoll não sabe.
            while data := self.socket.recv(receive_size):
                self.incoming.append(data)
                self.missing -= len(data)
                if len(data) < receive_size and not getattr(self.socket, "pending", int)():
                    break
            else:
                self.lose(redis.ConnectionError("conexão fechada pelo servidor"), not self.pending)
                return
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except (OSError, MemoryError) as error:
            self.lose(error, not self.pending)
            return
        self.moved_at = loop.time()
        if self.missing > 0:
            # Uma linha de muitos MB chega em milhares de pedaços: juntá-los um a um custaria o
            # quadrado do tamanho.
            return
        try:
            self.distribute(b"".join(self.incoming))
        except (ValueError, IndexError, RecursionError, redis.InvalidResponse):
            self.lose(redis.ConnectionError("resposta fora do protocolo"))

    def distribute(self, data):
        """Interpreta o que chegou inteiro e guarda o resto.

        Argumentos:
            data (bytes): o que chegou, a partir do começo de uma resposta; a última pode estar incompleta.
        Levanta:
            ValueError, IndexError, redis.InvalidResponse: se não é do protocolo, ou se ninguém perguntou.
        """
        position, self.missing = 0, 1
        while position < len(data):
            reply, end = parse_reply(data, position)
            if end < 0:
                self.missing = -end
                break
            is_push, position = data[position] == ord(">"), end
            if is_push:
                if reply[0] == b"invalidate":
                    # FLUSHALL e FLUSHDB avisam sem nomear chaves.
                    hear_changes(list(stream_of_key) if reply[1] is None else reply[1])
                continue
            first = self.pending[0]
            first.replies.append(reply)
            if isinstance(reply, redis.ResponseError) and self.up.is_set() and is_passing(reply):
                self.incoming = []
                self.lose(reply)
                return
            if len(first.replies) == first.count:
                self.pending.popleft()
                if meter is not None:
                    meter.round(first)
                if not first.future.done():
                    first.future.set_result(first.replies)
        self.incoming = [data[position:]] if position < len(data) else []

    async def insist(self, *commands):
        """Envia comandos que podem ser repetidos, até que uma conexão lhes dê as respostas.

        Argumentos:
            commands (tuple | bytes): como em send.
        Retorna:
            list: as respostas, com os erros do Redis no lugar das suas.
        """
        if not commands:
            return []
        while True:
            await self.up.wait()
            with contextlib.suppress(*redis_failures):
                return await self.send(*commands)

    async def ready(self):
        """Espera a conexão de que uma requisição precisa; se caiu, apressa a próxima tentativa.

        Levanta:
            redis.RedisError, OSError: se o Redis está fora do ar.
        """
        if self.up.is_set():
            return
        self.hurry.set()
        await asyncio.wait([self.attempt], timeout=down_patience if self.told else redis_timeout)
        if not self.up.is_set():
            raise redis.ConnectionError("o Redis está fora do ar")


def pack_words(*words):
    """Escreve palavras no protocolo do Redis.

    Argumentos:
        words (bytes | str | int): palavras de um comando.
    Retorna:
        bytes: cada palavra com seu tamanho.
    """
    words = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


def pack_command(*words):
    """Escreve um comando no protocolo do Redis.

    Argumentos:
        words (bytes | str | int): o comando e seus argumentos.
    Retorna:
        bytes: o comando.
    """
    return b"*%d\r\n%b" % (len(words), pack_words(*words))


def parse_reply(data, start):
    """Lê uma resposta ou um aviso do protocolo do Redis (RESP3).

    Argumentos:
        data (bytes): o que chegou da conexão.
        start (int): posição do começo da resposta.
    Retorna:
        tuple: (resposta, posição do fim); se ainda não chegou inteira, (None, o
        mínimo de bytes que faltam, negativo). Um erro do Redis é uma resposta do
        tipo redis.ResponseError; um mapa, a lista de suas chaves e valores.
    Levanta:
        redis.InvalidResponse, ValueError: se os bytes não são do protocolo.
    """
    end = data.find(b"\r\n", start)
    if end < 0:
        return None, -1
    mark, text, position = data[start:start + 1], data[start + 1:end], end + 2
    if mark in b"$=":
        end = position + int(text)
        if end < position:
            return None, position
        missing = end + 2 - len(data)
        return (None, -missing) if missing > 0 else (data[position:end], end + 2)
    if mark == b":":
        return int(text), position
    if mark in b"+,#(":
        # Texto; os números e booleanos do RESP3, que nenhum dos nossos comandos devolve.
        return text, position
    if mark == b"-":
        return redis.ResponseError(text.decode("utf-8", "replace")), position
    if mark == b"_":
        return None, position
    if mark not in b"*>%":
        raise redis.InvalidResponse(f"resposta fora do protocolo: {mark!r}")
    size, items = int(text), []
    if size < 0:
        return None, position
    for _ in range(2 * size if mark == b"%" else size):
        item, position = parse_reply(data, position)
        if position < 0:
            return None, position
        items.append(item)
    return items, position


def is_alone(info):
    """Diz se todo worker só pode estar ouvindo este servidor: sem réplicas nem cluster, o que PUBLISH conta é tudo.

    Argumentos:
        info (bytes | Exception): a resposta a INFO.
    Retorna:
        bool: falso também se não se sabe.
    """
    return isinstance(info, bytes) and all(each in info for each in (b"role:master", b"connected_slaves:0", b"cluster_enabled:0"))


def first_error(replies):
    """Procura um erro entre respostas do Redis.

    Argumentos:
        replies (list): respostas de redis_link.send, ou de dentro de um EXEC.
    Retorna:
        redis.ResponseError: o primeiro erro, ou None.
    """
    return next((reply for reply in replies if isinstance(reply, redis.ResponseError)), None)


def redis_words(error):
    """Dá as palavras de um erro do Redis, sem argumentos nem a linha do script.

    Argumentos:
        error (Exception): erro do redis-py.
    Retorna:
        str: as palavras do Redis.
    """
    # O Redis 6 as põe no começo; o 7 e os seguintes, no fim.
    words = re.sub(r"^(ERR )?Error running script \(call to \w+\): @user_script: ?\d+: ", "", str(error))
    # Um comando desligado traz os argumentos: a senha, no AUTH; o pedido do cliente, no SET.
    words = re.sub(r"(?s),?\s+with\s+args\s+beginning\s+with:.*", "", words)
    return re.sub(r",? ?script: \w+, on @user_script:\d+\.?$", "", words)


def is_passing(error):
    """Diz se uma recusa é do estado do servidor, e não do comando: outra conexão pode ser atendida.

    Argumentos:
        error (redis.ResponseError): a recusa.
    Retorna:
        bool: verdadeiro se é como se o Redis estivesse fora do ar.
    """
    words = redis_words(error)
    return words.lstrip("-").partition(" ")[0] in passing_codes or (words.startswith("NOPERM") and "'evalsha" in words)


async def redis_ping():
    """Testa o Redis com o comando PING.

    Retorna:
        bool: verdadeiro se o Redis respondeu PONG.
    """
    # Uma conexão que o Redis fechou enquanto dormia não prova que ele caiu: vale uma segunda
    # tentativa. Já o silêncio prova.
    for _ in range(2):
        try:
            await link.ready()
            answer, = await link.send(("PING",))
        except redis.ConnectionError:
            continue
        except (redis.RedisError, OSError):
            return False
        if answer != b"PONG":
            warn_rarely(f"o Redis recusou o PING: {cause_of(answer)}")
        return answer == b"PONG"
    return False


# =============================================================================
# Tarefas e linhas
# =============================================================================

end_words = frozenset((b"EOF", b"EOL", b"END-OF-FILE", b"END-OF-LIST"))
line_breaks = bytes.maketrans(b"\r\n", b"  ")


def normalize_line(element):
    """Faz de um elemento da lista exatamente uma linha.

    Argumentos:
        element (bytes): elemento como o worker o empurrou.
    Retorna:
        bytes: UTF-8 válido, sem CR, LF, U+0085, U+2028 nem U+2029; sem o LF final.
    """
    if b"\n" in element or b"\r" in element:
        element = element.translate(line_breaks)
    if element.isascii():
        return element
    text = element.decode("utf-8", "replace")
    # Leitores que usam splitlines() quebrariam a linha nestes três.
    text = text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return text.encode("utf-8")


def join_lines(elements):
    """Transforma elementos da lista no trecho de bytes que vai ao cliente.

    Argumentos:
        elements (list[bytes]): elementos, na ordem em que foram empurrados.
    Retorna:
        tuple: (bytes com as linhas terminadas em LF; número de linhas; número de elementos
        em branco, pulados; verdadeiro se uma palavra de fim foi encontrada).
    """
    lines, skipped = [], 0
    for element in elements:
        if len(element) < 16 and element.strip() in end_words:
            return b"".join(lines), len(lines), skipped, True
        if element and not element.isspace():
            lines.append(normalize_line(element) + b"\n")
        else:
            skipped += 1
    return b"".join(lines), len(lines), skipped, False


def error_line(code, message=""):
    """Monta uma linha de erro, do streaming ou de antes dele.

    Argumentos:
        code (str): código do erro, para programas.
        message (str): frase em português, para pessoas; vazia é omitida.
    Retorna:
        bytes: objeto JSON com error e message, terminado em LF.
    """
    content = {"error": code, "message": message} if message else {"error": code}
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def request_target(environ):
    """Separa caminho e consulta como o cliente os enviou, sem decodificar.

    Argumentos:
        environ (dict): ambiente WSGI; REQUEST_URI traz o alvo da linha de requisição em latin-1.
    Retorna:
        tuple: (caminho, consulta sem o "?"), dois str.
    """
    target = environ["REQUEST_URI"]
    if not target.startswith("/") and "://" in target:
        # Forma absoluta (RFC 9112, 3.2.2), enviada por quem fala com um proxy.
        target = re.sub(r"^[^/?#]*/?", "/", target.partition("://")[2])
    try:
        target = target.encode("latin-1").decode("utf-8")
    except UnicodeError:
        target = urllib.parse.quote(target, safe="%/?#[]@!$&'()*+,;=:~", encoding="latin-1", errors="replace")
    path, _, query = target.partition("#")[0].partition("?")
    return path, query


def forwarded_address(text):
    """Lê um elemento de X-Forwarded-For.

    Argumentos:
        text (str): IPv4 ou IPv6, este talvez entre colchetes, com ou sem porta.
    Retorna:
        str: o endereço na forma canônica, sem porta nem zona; "" se não é um endereço.
    """
    text = text.strip()
    parts = re.fullmatch(r"(?:\[([^\[\]]*)\]|([0-9.]+))(?::[0-9]{1,5})?", text)
    try:
        address = ipaddress.ip_address((parts[1] or parts[2]) if parts else text)
    except ValueError:
        return ""
    # A zona de um IPv6 aceita qualquer letra e só faz sentido na máquina de quem a deu.
    return str(getattr(address, "ipv4_mapped", None) or address).partition("%")[0]


def client_address(environ):
    """Descobre o endereço do cliente.

    Cada proxy reverso acrescenta à direita de X-Forwarded-For quem se conectou a ele;
    o que está à esquerda dos confiáveis foi escrito por quem quis.

    Argumentos:
        environ (dict): ambiente WSGI, que junta com vírgula as linhas do cabeçalho.
    Retorna:
        str: o endereço a TRUST_PROXY elementos da direita, ou o mais à esquerda se são
        menos; o de quem se conectou se TRUST_PROXY é 0 ou se não é um endereço.
    """
    direct = environ.get("REMOTE_ADDR", "-").removeprefix("::ffff:")
    if not TRUST_PROXY:
        return direct
    hops = environ.get("HTTP_X_FORWARDED_FOR", "").split(",")[-TRUST_PROXY:]
    return forwarded_address(hops[0]) or direct


def task_headers(request):
    """Reúne os cabeçalhos que vão para o Redis.

    Argumentos:
        request (flask.Request): requisição.
    Retorna:
        dict: nome -> valor, sem os de HEADERS_EXCLUDE; o WSGI os entrega em latin-1.
    """
    headers = {}
    for name, value in request.headers.items():
        if name.lower() in HEADERS_EXCLUDE:
            continue
        headers[name] = value
        with contextlib.suppress(UnicodeError):
            headers[name] = headers[name].encode("latin-1").decode("utf-8")
    return headers


class task:
    """O pedido de um cliente: o que o worker lê e o que o log diz dele."""

    __slots__ = ("address", "is_chunked", "key", "list", "method", "name", "path", "payload", "started", "taken")

    def __init__(self, request, body):
        """Compõe a tarefa de uma requisição.

        Argumentos:
            request (flask.Request): requisição.
            body (bytes): corpo como veio.
        """
        self.name = str(uuid.uuid4())
        # As chaves da tarefa, das linhas por tirar e das últimas tiradas.
        self.key = (REDIS_PREFIX + self.name).encode()
        self.list = (REDIS_LIST_PREFIX + self.name).encode()
        self.taken = self.list + b":taken"
        self.address, self.method = client_address(request.environ), request.method
        path, query = request_target(request.environ)
        # Acima de 48 KiB o journald parte a linha em duas.
        self.path = path[:200]
        self.started = time.monotonic()
        self.is_chunked = request.environ.get("SERVER_PROTOCOL") == "HTTP/1.1"
        content = {
            "task_name": self.name,
            "request_time": time.time(),
            "headers": task_headers(request),
            "body": "",
            "task_key": self.key.decode(),
            "task_list": self.list.decode(),
            "method": self.method,
            "path": path,
            "query": query,
            "remote_addr": self.address,
        }
        try:
            content["body"] = body.decode("utf-8")
        except UnicodeDecodeError:
            content |= {"body": base64.b64encode(body).decode("ascii"), "body_encoding": "base64"}
        # O JSON da tarefa, que o stream larga assim que o Redis o recebe.
        self.payload = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


# =============================================================================
# Streams: o laço da especificação
# =============================================================================

# Motivos do fim de um streaming, como aparecem no log.
end_reasons = ("concluida", "eof", "timeout", "cliente", "shutdown", "erro", "perdida")
ended_done, ended_word, ended_timeout, ended_client, ended_shutdown, ended_error, ended_lost = end_reasons

# Tempo máximo, em segundos, de um cliente que não lê nada do que lhe foi enviado.
client_timeout = 60.0
# Tempo, em segundos, que um cliente já servido tem para fechar: fechar antes dele, com
# bytes seus por ler, apagaria o fim da resposta ainda a caminho (RST).
closing_patience = 1.0
# Tempo, em segundos, que tem a última consulta, depois que MAXTIME se esgota ou que o cliente sai.
last_take_patience = 0.5
# De quantos elementos um stream se lembra.
most_recent = 32
redis_unavailable = (504, "redis_unavailable", "o Redis não respondeu; tente de novo em instantes")
last_chunk = b"0\r\n\r\n"
send_buffer = 262144

# Os streams que ocupam um lugar, na ordem em que cast_net os examina.
live = {}
# A chave e a lista de cada stream que já foi ao Redis -> o stream.
stream_of_key = {}
# A corrotina de cada stream, que o asyncio só referencia fracamente -> o stream.
runners = {}
# Os streams cuja tarefa ninguém ouviu ainda.
unheard = {}
# Chaves de tarefas encerradas, por apagar: além do limite, a validade das chaves faz o serviço.
removals = collections.deque(maxlen=10000)
has_removals = asyncio.Event()
# Nomes de que o Redis falou e que não são de um stream vivo: talvez listas sem dono.
ownerless = set()
most_ownerless = 10000


class gate:
    """Quem pode entrar: o limite de streams, quantos já acabaram, e em que pé está o serviço."""

    limit = 0
    served = 0
    # O serviço está parando.
    is_closed = False
    # Uma recarga está em curso, e foi pedida outra vez.
    is_reloading = is_asked_again = False
    # Não se aceita mais ninguém, pois o programa vai ser trocado ou parar; e uma conexão está sendo aceita.
    is_paused = is_accepting = False
    # As linhas podem ser tiradas do Redis.
    may_take = asyncio.Event()
    may_take.set()


class refusal(Exception):
    """Recusa de uma requisição antes do streaming: status, código e frase da resposta."""

    def __init__(self, status, code, message):
        """Guarda a resposta.

        Argumentos:
            status (int): status HTTP.
            code (str): código do erro, para programas.
            message (str): frase em português, para pessoas.
        """
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class task_key_error(Exception):
    """A chave da tarefa foi trocada por algo que não é string nem lista."""


class client(asyncio.Protocol):
    """O socket de um cliente: o que saiu por ele, e a notícia de que ele se foi."""

    __slots__ = ("bytes", "first_at", "is_chunked", "lines", "room", "sent_at", "skipped", "stream", "transport")

    def __init__(self, owner):
        """Começa sem socket.

        Argumentos:
            owner (stream): quem será avisado quando o cliente sair.
        """
        self.stream, self.is_chunked = owner, owner.task.is_chunked
        # O transporte do asyncio, depois da entrega.
        self.transport = None
        # Futuro à espera de que o cliente leia, ou se vá; None se cabe mais.
        self.room = None
        # O que o log conta, quando saiu a primeira linha e o que quer que seja por último.
        self.lines = self.bytes = self.skipped = 0
        self.first_at, self.sent_at = None, owner.task.started

    def connection_made(self, transport):
        """Recebe o socket.

        Argumentos:
            transport (asyncio.Transport): o socket, agora do laço.
        """
        self.transport = transport

    def eof_received(self):
        """Encerra o stream: quem fecha o seu lado de envio conta como quem saiu."""
        self.stream.end(ended_client)

    def connection_lost(self, error):
        """Encerra o stream de um cliente que saiu.

        Argumentos:
            error (Exception): a causa, ou None.
        """
        self.resume_writing()
        self.stream.end(ended_client)

    def pause_writing(self):
        """Para o stream: o cliente não lê, e o que ele não leu fica no Redis."""
        self.room = loop.create_future()

    def resume_writing(self):
        """Deixa o stream continuar."""
        if self.room is not None and not self.room.done():
            self.room.set_result(None)
        self.room = None

    def count(self, chunk, lines, skipped=0, is_ours=False):
        """Anota o que vai ser enviado.

        Argumentos:
            chunk (bytes): trecho com linhas inteiras.
            lines (int): número de linhas do trecho.
            skipped (int): elementos em branco, que não vão.
            is_ours (bool): verdadeiro se não vem do worker: é a linha de um erro.
        """
        self.skipped += skipped
        if meter is not None:
            meter.skipped.inc(skipped)
        if not lines:
            return
        self.lines += lines
        self.bytes += len(chunk)
        if meter is not None:
            meter.lines.inc(lines)
            meter.bytes.inc(len(chunk))
        if self.first_at is None:
            self.first_at = loop.time()
            if meter is not None and not is_ours:
                meter.first_line.observe(self.first_at - self.stream.task.started)

    def frame(self, chunk):
        """Dá a um trecho a forma em que ele vai no socket.

        Argumentos:
            chunk (bytes): linhas inteiras; vazio não é nada, pois um chunk vazio é o último.
        Retorna:
            bytes: o trecho, com o tamanho à frente em HTTP/1.1, cuja resposta vai em chunks.
        """
        return b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunk and self.is_chunked else chunk

    async def send(self, chunk):
        """Envia linhas e espera que o cliente as leia, se já há muitas por ler.

        Argumentos:
            chunk (bytes): linhas inteiras.
        """
        self.transport.write(self.frame(chunk))
        while self.room is not None:
            left = self.transport.get_write_buffer_size()
            await asyncio.wait([self.room], timeout=client_timeout)
            if self.room is not None and self.transport.get_write_buffer_size() == left:
                self.transport.abort()
        self.sent_at = loop.time()

    async def finish(self, tail):
        """Envia o fim da resposta e fecha a conexão, quando o cliente o tiver lido.

        Argumentos:
            tail (bytes): últimas linhas.
        """
        # De uma vez: dois envios acordariam o cliente duas vezes.
        self.transport.write(self.frame(tail) + (last_chunk if self.is_chunked else b""))
        with contextlib.suppress(OSError):
            self.transport.write_eof()
        # Com este limite, o transporte diz quando o último byte saiu.
        self.transport.set_write_buffer_limits(0)
        while not self.transport.is_closing():
            left = self.transport.get_write_buffer_size()
            if self.room is None:
                self.room = loop.create_future()
            await asyncio.wait([self.room], timeout=client_timeout if left else closing_patience)
            if self.transport.get_write_buffer_size() == left:
                self.transport.abort()


class stream:
    """A resposta de um cliente, da submissão da tarefa ao fim do streaming."""

    __slots__ = ("accepted", "behind", "client", "handed", "identity", "is_late", "is_noticed", "last_line", "reason",
                 "received", "recent", "runner", "tail", "task", "timer", "waiter")

    def __init__(self, asked):
        """Prepara o stream, na thread da requisição.

        Argumentos:
            asked (task): a tarefa do cliente.
        """
        self.task = asked
        self.client = client(self)
        # O que a thread espera, a aceitação da tarefa ou uma refusal; None depois da entrega.
        self.accepted = concurrent.futures.Future()
        # O que a corrotina espera da thread, o socket e o cabeçalho da resposta; None depois.
        self.handed = None
        # A corrotina; por que ela acaba; as últimas linhas, ainda por enviar.
        self.runner, self.reason, self.tail = None, None, b""
        # Quantos elementos já vieram do Redis, os hashes dos últimos, e quantos deles podem vir de novo.
        self.received, self.recent, self.behind = 0, (), 0
        # A execução do Redis que tem a tarefa: uma queda pode dar em outra, sem ela.
        self.identity = link.identity
        # O Redis avisou depois da última retirada; o futuro que o aviso acorda.
        self.is_noticed, self.waiter = False, None
        # O próximo prazo (None até que o socket seja do laço), se MAXTIME já se esgotou, e de quando ele conta.
        self.timer, self.is_late, self.last_line = None, False, asked.started

    # -- chamados no laço, por quem submete, entrega, avisa ou encerra ---------

    def begin(self):
        """Começa a corrotina do stream."""
        self.handed = loop.create_future()
        self.runner = loop.create_task(self.run())
        runners[self.runner] = self
        self.runner.add_done_callback(runners.pop)

    def resume(self, connection):
        """Recomeça o stream que outro programa deixou, com a chave já gravada e o cabeçalho já enviado.

        Argumentos:
            connection (socket.socket): socket do cliente.
        """
        live[self] = None
        stream_of_key[self.task.key] = stream_of_key[self.task.list] = self
        self.is_noticed = True
        self.begin()
        self.adopt(connection, b"")

    def adopt(self, connection, head):
        """Recebe o socket da thread, que o esquece.

        Argumentos:
            connection (socket.socket): socket do cliente; None se a thread não pôde entregá-lo.
            head (bytes): cabeçalho da resposta.
        """
        if connection is None:
            self.handed.set_exception(ConnectionAbortedError("o socket não foi entregue"))
        else:
            self.handed.set_result((connection, head))

    def wake(self):
        """Diz que pode haver o que tirar do Redis."""
        self.is_noticed = True
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def end(self, reason):
        """Encerra o stream de fora; antes da entrega do socket, só quando ele chegar.

        Argumentos:
            reason (str): motivo do fim.
        """
        if self.reason is None:
            self.reason = reason
            if self.client.transport is not None:
                self.runner.cancel()

    def tick(self):
        """Cuida dos prazos, que correm, espere a corrotina o que esperar: HEARTBEAT e MAXTIME."""
        now = loop.time()
        if self.client.room is not None:
            # Um cliente lento não faz vencer o prazo de linhas que já estão na lista.
            self.last_line = self.client.sent_at = now
        due = self.last_line + MAXTIME / 1000
        if now >= due:
            if self.is_late or not link.up.is_set():
                self.end(ended_timeout)
                return
            # Um processo que esteve parado pode ter a linha à espera: uma última consulta, com prazo.
            self.is_late, due = True, now + last_take_patience
            self.wake()
        elif HEARTBEAT:
            # A quem não lê, mais uma só encheria a memória.
            if now >= self.client.sent_at + HEARTBEAT / 1000 and not self.client.transport.get_write_buffer_size():
                self.client.transport.write(self.client.frame(HEARTBEAT_LINE + b"\n"))
                self.client.sent_at = now
            due = min(due, max(now, self.client.sent_at) + HEARTBEAT / 1000)
        self.timer = loop.call_at(due, self.tick)

    # -- a corrotina -------------------------------------------------------------

    async def run(self):
        """Atende o cliente até o fim, venha ele de onde vier; é aqui que toda tarefa acaba."""
        try:
            if self not in live:
                await self.submit()
            await self.receive_socket()
            self.timer = loop.call_soon(self.tick)
            if self.reason is None:
                self.reason = await self.relay()
        except (asyncio.CancelledError, OSError):
            # Quem cancelou já disse o motivo, em end; o resto é a rede do cliente.
            self.reason = self.reason or ended_client
            if self.reason == ended_client and self.task.key in stream_of_key and await self.was_finished():
                self.reason = ended_done
        except refusal as error:
            self.reason = ended_error
            self.accepted.set_exception(error)
        except Exception as error:
            self.reason, self.tail = ended_error, self.explain(error)
            if self.accepted is not None and not self.accepted.done():
                self.accepted.set_exception(error)
        finally:
            self.leave()
        if self.client.transport is not None:
            if self.reason == ended_client:
                self.client.transport.abort()
            else:
                await self.client.finish(self.tail)
        # Um apontaria para o outro até que o coletor de lixo, raro, os achasse.
        self.client = None

    async def receive_socket(self):
        """Espera que a thread entregue o socket, e envia o cabeçalho.

        Levanta:
            OSError: se ela não pôde entregá-lo, ou se o cliente já saiu.
        """
        connection, head = await self.handed
        # Quem espera em silêncio não precisa mais disto, e são muitos.
        self.accepted = self.handed = None
        # O sistema guardaria 4 MB para quem não lê, e por eles um leitor lento pareceria parado.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        await loop.connect_accepted_socket(lambda: self.client, connection)
        self.client.transport.write(head)

    async def submit(self):
        """Grava e publica a tarefa, e diz à thread que ela foi aceita.

        Levanta:
            refusal: se não há lugar, ou se o Redis não atende ou recusa.
        """
        if gate.is_closed:
            raise refusal(503, *error_codes[503])
        if len(live) >= gate.limit:
            raise refusal(503, "too_many_streams", f"o limite de streams simultâneos, {gate.limit}, foi atingido")
        live[self] = None
        if not await redis_ping():
            raise refusal(*redis_unavailable)
        key = self.task.key
        # Antes da gravação: um worker veloz já empurra enquanto a resposta dela volta.
        stream_of_key[key] = stream_of_key[self.task.list] = self
        stored = [("SET", key, self.task.payload, "EX", REDIS_TTL)]
        if len(self.task.payload) >= large_payload:
            await self.store_apart(stored.pop())
        queued = [("RPUSH", REDIS_QUEUE, key)] if REDIS_QUEUE else []
        try:
            # Uma transação: se o SET for recusado, nada é publicado nem entra na fila.
            replies = await link.send(("MULTI",), *stored, *queued, ("PUBLISH", REDIS_CHANNEL, key), ("EXEC",))
        except redis_failures:
            raise refusal(*redis_unavailable) from None
        self.task.payload = b""
        self.identity = link.identity
        # Dentro da transação, só a fila pode falhar: não é uma lista.
        if error := first_error(replies) or first_error(replies[-1]):
            self.reject(redis_words(error))
        # Em um cluster, PUBLISH só conta quem ouve este nó.
        if replies[-1][-1] == 0 and not REDIS_QUEUE and b"cluster_enabled:1" not in link.info:
            unheard[self] = None
            again = "será anunciada de novo a cada segundo" if REDIS_REANNOUNCE and is_alone(link.info) else (
                "não será anunciada de novo")
            log.warning("tarefa=%s ninguém ouve o canal %s: a tarefa %s", self.task.name, REDIS_CHANNEL, again)
            if meter is not None:
                meter.unheard.inc()
        self.accepted.set_result(None)

    async def store_apart(self, command):
        """Grava por uma conexão própria uma tarefa longa.

        Argumentos:
            command (tuple): o SET.
        Levanta:
            refusal: se o Redis não atende, ou a recusa.
        """
        apart = redis_link()
        apart.moved_to, apart.nodes = link.moved_to, link.nodes.copy()
        try:
            await apart.connect()
            spawn(apart.watch())
            answer, = await apart.send(command)
        except (redis.RedisError, OSError, RuntimeError) as error:
            # Um Redis que fecha esta conexão e atende na outra não quis a tarefa.
            if not await redis_ping():
                raise refusal(*redis_unavailable) from None
            answer = error
        finally:
            apart.lose(redis.ConnectionError("já não é precisa"))
        if not isinstance(answer, Exception):
            return
        words, is_answer = cause_of(answer), isinstance(answer, redis.ResponseError)
        if is_answer and is_passing(answer):
            raise refusal(*redis_unavailable)
        if not is_answer or "bulk length" in words:
            words += f" (são {len(self.task.payload)} bytes; veja proto-max-bulk-len e client-query-buffer-limit)"
        self.reject(words)

    def reject(self, words):
        """Recusa a tarefa, porque o Redis a recusou.

        Argumentos:
            words (str): as palavras dele.
        Levanta:
            refusal: sempre.
        """
        warn_rarely(f"o Redis recusou uma tarefa: {words}", "tarefa recusada")
        raise refusal(500, "redis_error", f"o Redis recusou a tarefa: {words}")

    async def relay(self):
        """Tira as linhas do Redis e as envia, até o fim: o laço da especificação.

        Retorna:
            str: motivo do fim; as últimas linhas ficam em tail.
        Levanta:
            redis.ResponseError, task_key_error: se o Redis recusa a consulta ou a chave não serve.
        """
        while True:
            if not self.is_noticed:
                self.waiter = loop.create_future()
                await self.waiter
            self.is_noticed = False
            key_type, elements, behind = await self.take()
            if elements:
                chunk, lines, skipped, is_word = join_lines(self.skip_known(elements, behind))
                self.client.count(chunk, lines, skipped)
                if is_word or key_type == b"none":
                    self.tail = chunk
                    return ended_word if is_word else ended_done
                self.is_noticed = True
                if chunk:
                    await self.client.send(chunk)
                self.is_late, self.last_line = False, loop.time()
                if PAUSE:
                    await asyncio.sleep(PAUSE / 1000)
            elif key_type == b"none" and (self.received or self.identity == link.identity):
                return ended_done
            elif key_type in (b"none", b"lost"):
                self.tail = error_line("data_lost", "o Redis já não tem os dados desta tarefa")
                return ended_lost
            elif key_type not in (b"string", b"list"):
                raise task_key_error(
                    f"a chave da tarefa foi trocada por um valor do tipo {key_type.decode()}: só se aceita uma lista")
            elif self.is_late:
                return ended_timeout

    def skip_known(self, elements, behind):
        """Separa o que é novo do que uma réplica promovida devolve por não ter sabido das últimas retiradas.

        Ela pode também não ter sabido das linhas, e só o conteúdo diz se uma é velha ou nova.

        Argumentos:
            elements (list[bytes]): elementos que vieram, um ou mais.
            behind (int): quantas retiradas de elementos ela desconhece.
        Retorna:
            list[bytes]: os novos.
        """
        self.received += len(elements)
        self.behind = behind or self.behind
        if self.behind:
            # O último dos que podem ser velhos, e o lugar dele entre os lembrados; de antes deles nada se sabe.
            known = min(len(elements), self.behind)
            place = len(self.recent) + known - self.behind - 1
            is_old = place >= 0 and self.recent[place] == hash(elements[known - 1])
            elements = elements[known:] if is_old else elements
            self.behind = self.behind - known if is_old or place < 0 else 0
        if not self.behind:
            self.recent = (*self.recent, *map(hash, elements[-most_recent:]))[-most_recent:]
        return elements

    async def take(self):
        """Tira as próximas linhas e vê, no mesmo passo, se a chave da tarefa existe.

        Retorna:
            tuple: (tipo da chave em bytes, none se ela e as linhas acabaram; lista de elementos; quantos dos que já
            vieram o Redis desconhece).
        Levanta:
            redis.ResponseError: se o Redis recusa.
        """
        key, most = self.task.key, 1 if PAUSE else take_lines
        while True:
            # Uma queda pode trocar o começo: o comando é escrito de novo a cada tentativa.
            await link.up.wait()
            await gate.may_take.wait()
            if not link.take_head:
                break
            command = b"*10\r\n" + link.take_head + pack_words(
                key, self.task.list, self.task.taken, self.received, most, take_bytes, REDIS_TTL)
            with contextlib.suppress(*redis_failures):
                reply, = await link.send(command)
                if isinstance(reply, Exception):
                    raise reply
                return reply
        for source in (self.task.list, key):
            # O guardado de quando havia scripts já não diria quantos elementos saíram.
            *_, reply = await link.insist(
                ("MULTI",), ("TYPE", key), ("LPOP", source), ("UNLINK", self.task.taken), ("EXEC",))
            if error := first_error([reply]) or first_error(reply):
                raise error
            key_type, line, _ = reply
            if line is not None:
                # Só a próxima consulta dirá se a lista se esvaziou.
                return b"more", [line], 0
            if key_type != b"list":
                break
        return key_type, [], 0

    async def was_finished(self):
        """Vê se o cliente que saiu já tinha tudo: a chave da tarefa e as linhas já acabaram.

        Retorna:
            bool: falso também se o Redis não o disse.
        """
        answer = link.send(("EXISTS", self.task.key, self.task.list))
        done, _ = await asyncio.wait([answer], timeout=last_take_patience)
        return bool(done) and answer.exception() is None and answer.result() == [0]

    def explain(self, error):
        """Registra um fim por erro e o escreve para o cliente.

        Argumentos:
            error (Exception): recusa do Redis, chave que não serve ou defeito nosso.
        Retorna:
            bytes: a última linha.
        """
        if isinstance(error, task_key_error | redis.ResponseError):
            message = str(error)
            if not isinstance(error, task_key_error):
                message = f"o Redis recusou a consulta: {redis_words(error)}"
            log.warning("tarefa=%s %s", self.task.name, message)
            return error_line("redis_error", message)
        log.error("tarefa=%s falha interna: %s: %s", self.task.name, type(error).__name__, error, exc_info=True)
        return error_line("internal", "falha interna do proxy")

    def leave(self):
        """Devolve o lugar, manda apagar as chaves, conta a última linha e registra o fim."""
        if self.timer is not None:
            self.timer.cancel()
        live.pop(self, None)
        unheard.pop(self, None)
        asked, sent = self.task, self.client
        if stream_of_key.pop(asked.key, None) is None:
            return
        del stream_of_key[asked.list]
        removals.append((asked.key, asked.list, asked.taken))
        has_removals.set()
        gate.served += 1
        if self.reason in (ended_timeout, ended_shutdown):
            self.tail = MAXTIME_ERROR + b"\n" if self.reason == ended_timeout else error_line("shutdown")
        if self.reason in (ended_timeout, ended_shutdown, ended_error, ended_lost):
            sent.count(self.tail, len(self.tail) > 0, is_ours=True)
        now = loop.time()
        if meter is not None and sent.transport is not None:
            meter.ends[self.reason].inc()
            meter.duration.observe(now - asked.started)
        log.info(
            "tarefa=%s cliente=%s metodo=%s caminho=%s fim=%s linhas=%d bytes=%d puladas=%d primeira_ms=%s duracao_ms=%d",
            asked.name, asked.address, asked.method, asked.path, self.reason, sent.lines, sent.bytes, sent.skipped,
            "-" if sent.first_at is None else round((sent.first_at - asked.started) * 1000),
            round((now - asked.started) * 1000),
        )


def hear_changes(keys):
    """Acorda os streams de que falam os avisos do Redis.

    Argumentos:
        keys (list[bytes]): chaves que mudaram, nossas, já encerradas ou de outro proxy no mesmo Redis.
    """
    for key in keys:
        owner = stream_of_key.get(key)
        if owner is not None:
            owner.wake()
        elif len(ownerless) < most_ownerless and not key.endswith(b":taken"):
            ownerless.add(key)


# =============================================================================
# Deveres do laço, cada um uma corrotina
# =============================================================================

# Com avisos, quantos streams a rede examina a cada INTERVAL; sem eles, todos.
net_size = 1
# Streams ou chaves de um só comando ou grupo: mais seguraria o Redis e os outros.
slice_size = 500
# Informe ao systemd, em segundos, se o vigia não pede mais; novo anúncio do que ninguém ouviu; exame das listas sem
# dono e dos prazos das requisições.
status_interval = announce_interval = 1.0
ownerless_interval = 5.0
sweep_interval = 0.25
# Espera, em segundos, para pedir de novo que se apaguem as chaves que o Redis recusou apagar.
removal_retry = 2.0
# Passo, em segundos, da procura pelo que ficou de proxies mortos, e o que se olha em um passo.
dead_pause = 0.02
dead_keys = 1000
dead_queued = 200
# As corrotinas dos deveres, que o asyncio só referencia fracamente.
duties = set()


def spawn(coroutine):
    """Põe uma corrotina a rodar, e a guarda até que acabe.

    Argumentos:
        coroutine (coroutine): o que rodar.
    """
    duties.add(made := loop.create_task(coroutine))
    made.add_done_callback(duties.discard)


def start_duty(duty):
    """Põe um dever a rodar; um defeito nosso é registrado, e ele recomeça.

    Argumentos:
        duty (callable): função sem argumentos que devolve a corrotina.
    """
    async def keep_doing():
        """Roda o dever até que ele acabe por si."""
        while True:
            try:
                await duty()
                return
            except Exception as error:
                log.error("falha interna em %s: %s: %s", duty, type(error).__name__, error, exc_info=True)
                await asyncio.sleep(1)

    spawn(keep_doing())


def slices(items):
    """Divide uma coleção em fatias.

    Argumentos:
        items (iterable): o que dividir; copiado antes, pois pode mudar enquanto se espera.
    Retorna:
        list[list]: fatias de até slice_size itens.
    """
    items = list(items)
    return [items[start:start + slice_size] for start in range(0, len(items), slice_size)]


async def keep_link():
    """Mantém a conexão com o Redis: prova que ela vive, percebe a queda e a reabre."""
    failures = 0
    while True:
        await link.watch()
        if link.lost.result() is not None:
            tell_down(link.lost.result())
        while not link.up.is_set():
            link.hurry.clear()
            if failures:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(link.hurry.wait(), min(1.0, 0.05 * 2 ** min(failures - 1, 5)))
            opening = loop.create_task(link.open())
            done, _ = await asyncio.wait([opening], timeout=redis_timeout)
            if not done:
                tell_down(redis.TimeoutError())
            try:
                for name, why in await opening:
                    warn_rarely(f"{name}: {why}")
            except (redis.RedisError, OSError, RuntimeError) as error:
                failures += 1
                tell_down(error)
            attempt, link.attempt = link.attempt, loop.create_future()
            attempt.set_result(None)
        # O que mudou enquanto ninguém ouvia.
        start_duty(functools.partial(examine, live))
        if link.told:
            link.told = ""
            log.info("Redis de volta")
            if meter is not None:
                meter.returns.inc()
            tell_systemd()
            start_duty(look_for_dead)
        await asyncio.wait([link.lost], timeout=1.0)
        # Uma recusa que dura seria achada de novo logo depois de reabrir; um corte, não.
        is_refused = link.lost.done() and isinstance(link.lost.result(), redis_refusals)
        failures = failures + 1 if is_refused else int(link.lost.done())


def tell_down(error):
    """Registra a queda da conexão, e a causa se ela muda para uma recusa.

    Argumentos:
        error (Exception): a causa.
    """
    words, was_told = cause_of(error), link.told
    link.told = words
    if not was_told:
        log.warning("Redis fora do ar: %s", words)
        tell_systemd()
        if meter is not None:
            meter.cuts.inc()
    elif words not in was_told and isinstance(error, redis_refusals):
        # Ele atende de novo, mas recusa: é isso que o operador precisa saber.
        log.warning("Redis ainda fora do ar: %s", words)


async def examine(streams):
    """Acorda os streams que têm o que buscar: linha na lista, tarefa apagada ou trocada por uma lista.

    Argumentos:
        streams (iterable): streams a examinar.
    """
    for part in slices(streams):
        commands = [(("TYPE", each.task.key), ("EXISTS", each.task.list)) for each in part]
        replies = await link.insist(*itertools.chain.from_iterable(commands))
        for each, key_type, lines in zip(part, replies[::2], replies[1::2], strict=True):
            if key_type != b"none":
                each.identity = link.identity
            if key_type != b"string" or lines != 0:
                each.wake()


async def cast_net():
    """Procura, a cada INTERVAL, o que nenhum aviso disse: alguns streams em rodízio, ou todos se não há avisos."""
    while True:
        due = loop.time() + INTERVAL / 1000
        await asyncio.sleep(INTERVAL / 1000)
        if meter is not None:
            meter.lag.observe(max(0.0, loop.time() - due))
        part = list(itertools.islice(live, net_size if link.is_tracked else None))
        for each in part:
            live[each] = live.pop(each)
        await examine(part)


async def announce_again():
    """Anuncia de novo, a cada segundo, as tarefas que ninguém ouviu: o worker delas pode ter chegado depois."""
    while REDIS_REANNOUNCE:
        await asyncio.sleep(announce_interval)
        with contextlib.suppress(*redis_failures):
            if not unheard or not is_alone(*await link.send(("INFO",))):
                continue
            for part in slices(unheard):
                # Se a resposta se perder, não se sabe se foram ouvidas: não se repete.
                for each in part:
                    unheard.pop(each, None)
                counts = await link.send(*[("PUBLISH", REDIS_CHANNEL, each.task.key) for each in part])
                for each, count in zip(part, counts, strict=True):
                    # A que já tem linhas foi achada de outro modo.
                    if isinstance(count, int) and count > 0:
                        log.info("tarefa=%s ouvida, ao ser anunciada de novo", each.task.name)
                    elif each in live and not each.received:
                        unheard[each] = None


async def renew_keys():
    """Renova a validade das chaves dos streams vivos, que sobrevive a este processo."""
    while True:
        await asyncio.sleep(REDIS_TTL / 3)
        for part in slices(live):
            # Quem espera tem a lista vazia, e uma lista vazia não existe.
            keys = [each.task.key for each in part] + [each.task.list for each in part if each.is_noticed]
            keys += [each.task.taken for each in part if each.received]
            replies = await link.insist(*[("EXPIRE", key, REDIS_TTL) for key in keys])
            if error := first_error(replies):
                warn_rarely(f"o Redis não renovou a validade das chaves: {cause_of(error)}")
            # NOLOOP cala a mudança de uma chave que nós também mudamos no mesmo instante, e EXPIRE conta como mudança.
            await examine(part)


async def remove_keys():
    """Apaga as chaves das tarefas encerradas, e as tira da fila."""
    while True:
        await has_removals.wait()
        part = list(itertools.islice(removals, slice_size))
        keys = itertools.chain.from_iterable(part)
        # Sair da fila a cada fim a mantém do tamanho do que está vivo: é o que torna barato o LREM.
        queued = [("LREM", REDIS_QUEUE, 1, key) for key, _, _ in part] if REDIS_QUEUE else []
        replies = await link.insist(("UNLINK", *keys), *queued)
        if isinstance(replies[0], Exception):
            warn_rarely(f"o Redis não apagou as chaves das tarefas: {cause_of(replies[0])}")
            await asyncio.sleep(removal_retry)
            continue
        if error := first_error(replies):
            warn_rarely(f"REDIS_QUEUE: as tarefas mortas não saem da fila: {cause_of(error)}")
        for _ in part:
            removals.popleft()
        if not removals:
            has_removals.clear()


async def expire_ownerless():
    """Dá validade às listas sem dono de que o Redis falou: um worker que empurra depois do fim as recria."""
    while True:
        await asyncio.sleep(ownerless_interval)
        found = list(ownerless)
        ownerless.clear()
        for part in slices(found):
            await expire_lone(part)


async def expire_lone(keys):
    """Dá a validade REDIS_TTL às listas que não têm nenhuma.

    A de um stream vivo de outro proxy não corre perigo: o dono dela a renova.

    Argumentos:
        keys (list[bytes]): nomes com os nossos prefixos.
    """
    replies = await link.insist(*[command for key in keys for command in (("TYPE", key), ("TTL", key))])
    found = zip(keys, replies[::2], replies[1::2], strict=True)
    lone = [key for key, key_type, ttl in found if key_type == b"list" and ttl == -1 and key not in stream_of_key]
    await link.insist(*[("EXPIRE", key, REDIS_TTL) for key in lone])


async def look_for_dead():
    """Cuida do que proxies mortos deixaram: dá validade às listas sem nenhuma e tira da fila as tarefas mortas."""
    prefixes = (REDIS_LIST_PREFIX.encode(), REDIS_PREFIX.encode())
    # Uma volta só para as duas formas de lista: o que custa é percorrer o banco.
    form = re.sub(r"([*?\[\]\\])", r"\\\1", os.path.commonprefix([REDIS_LIST_PREFIX, REDIS_PREFIX])) + "*"
    cursor = None
    while cursor != b"0":
        reply, = await link.insist(("SCAN", cursor or 0, "MATCH", form, "COUNT", dead_keys, "TYPE", "list"))
        if isinstance(reply, Exception):
            warn_rarely(f"as listas órfãs não são procuradas: {cause_of(reply)}")
            break
        cursor, found = reply
        await expire_lone([key for key in found if key.startswith(prefixes) and key not in stream_of_key])
        await asyncio.sleep(dead_pause)
    start, found = 0, [b""]
    while REDIS_QUEUE and found:
        found, = await link.insist(("LRANGE", REDIS_QUEUE, start, start + dead_queued - 1))
        if isinstance(found, Exception):
            warn_rarely(f"REDIS_QUEUE: as tarefas mortas não são procuradas na fila: {cause_of(found)}")
            return
        exist = await link.insist(*[("EXISTS", key) for key in found])
        # Do que não é tarefa, posto ali por outro programa, a falta da chave nada diz.
        dead = [key for key, count in zip(found, exist, strict=True) if count == 0 and key.startswith(prefixes[1])]
        if error := first_error(await link.insist(*[("LREM", REDIS_QUEUE, 1, key) for key in dead])):
            warn_rarely(f"REDIS_QUEUE: as tarefas mortas não saem da fila: {cause_of(error)}")
            return
        start += len(found) - len(dead)
        await asyncio.sleep(dead_pause)


def tell_systemd():
    """Informa o estado ao systemd e alimenta o vigia (WatchdogSec): se o laço travar, o serviço recomeça."""
    state = "fora do ar" if link.told else "no ar"
    notify_systemd(f"WATCHDOG=1\nSTATUS=Redis {state}; streams vivos: {len(live)}; tarefas atendidas: {gate.served}")


async def keep_systemd_informed():
    """Informa o systemd de tempos em tempos, se há um, e com folga sobre o prazo do vigia."""
    watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    while "NOTIFY_SOCKET" in os.environ:
        tell_systemd()
        await asyncio.sleep(min(status_interval, watchdog / 3 or status_interval))


async def sweep_late():
    """Deixa de ler as requisições cujo prazo venceu, mesmo as que chegam a um byte por segundo."""
    while True:
        await asyncio.sleep(sweep_interval)
        now = time.monotonic()
        for connection, due in list(arrivals.items()):
            # Pode ter chegado inteira neste instante.
            if due > now or arrivals.get(connection) != due:
                continue
            arrivals.pop(connection, None)
            if HTTP_SERVER == "waitress":
                # Ele fecharia sem uma palavra; no do Flask, é a thread quem responde.
                with contextlib.suppress(OSError):
                    spawn(dismiss(connection.dup(), whole_error(408)))
            # Quem espera pelo resto da requisição lê o fim dela.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)


# =============================================================================
# Aplicação HTTP
# =============================================================================

stream_methods = ("GET", "POST", "PUT", "PATCH", "DELETE")
all_methods = (*stream_methods, "HEAD", "OPTIONS")
read_size = 65536
# Espera máxima, em segundos, de uma thread pela resposta do laço.
answer_timeout = 5.0
# O que ela concede, em bytes por segundo, à gravação de uma tarefa longa em uma rede lenta.
slowest_send = 100_000
error_codes = {
    400: ("bad_request", "a requisição não é válida"),
    401: ("unauthorized", "falta um token válido no cabeçalho Authorization: Bearer"),
    405: ("method_not_allowed", f"método não atendido; use {', '.join(all_methods)}"),
    408: ("request_timeout", "a requisição não chegou inteira a tempo"),
    413: ("body_too_large", "o corpo da requisição passa do limite permitido"),
    414: ("uri_too_long", "o endereço pedido é longo demais"),
    431: ("headers_too_large", "os cabeçalhos da requisição passam do limite permitido"),
    500: ("internal", "falha interna do proxy"),
    503: ("shutdown", "o serviço está parando ou recomeçando; tente de novo em instantes"),
    501: ("not_implemented", "a requisição usa um recurso que o servidor não atende"),
    505: ("version_not_supported", "versão do HTTP não atendida"),
}
# Cabeçalhos que acompanham um status, seja quem for que o envie.
error_headers = {401: [("WWW-Authenticate", "Bearer")], 405: [("Allow", ", ".join(all_methods))], 503: [("Retry-After", "5")]}


app = flask.Flask(program, static_folder=None)
plain_app = app.wsgi_app


def route_as_sent(environ, start_response):
    """Mostra ao roteador só o que ele deve distinguir: juntaria barras e decodificaria o caminho.

    Argumentos:
        environ (dict): ambiente WSGI; o worker recebe o alvo de REQUEST_URI.
        start_response (callable): função do WSGI.
    Retorna:
        iterable: trechos de bytes da resposta.
    """
    environ["PATH_INFO"] = "/ping" if request_target(environ)[0] == "/ping" else "/"
    return plain_app(environ, start_response)


app.wsgi_app = route_as_sent


def cors_headers(origin):
    """Monta os cabeçalhos de CORS de qualquer resposta.

    Argumentos:
        origin (str): cabeçalho Origin da requisição, ou None.
    Retorna:
        list: pares (nome, valor); vazia se CORS está desligado.
    """
    if not CORS_ORIGIN:
        return []
    allowed = "*" if "*" in CORS_ORIGIN else origin if (origin or "").lower() in CORS_ORIGIN else None
    granted = [("Access-Control-Allow-Origin", allowed), ("Access-Control-Expose-Headers", "X-Task-Name")]
    return [("Vary", "Origin"), *granted] if allowed else [("Vary", "Origin")]


def error_parts(status, code=None, message=None):
    """Monta um erro, venha ele da aplicação ou do servidor HTTP, e o conta.

    Argumentos:
        status (int): status HTTP.
        code (str): código do erro; sem ele, o do status.
        message (str): frase em português; sem ela, a do status.
    Retorna:
        tuple: (corpo em bytes; lista de pares de cabeçalhos, com o tipo do corpo).
    """
    if code is None:
        code, message = error_codes.get(status, error_codes[400 if status < 500 else 500])
    if meter is not None:
        meter.refusals.labels(str(status), code).inc()
    return error_line(code, message), [("Content-Type", "application/json; charset=utf-8"), *error_headers.get(status, [])]


@app.errorhandler(Exception)
def refuse(error):
    """Transforma qualquer exceção em um erro JSON.

    Argumentos:
        error (Exception): refusal, exceção HTTP ou defeito nosso.
    Retorna:
        flask.Response: corpo JSON {"error", "message"}.
    """
    if isinstance(error, refusal):
        status, parts = error.status, error_parts(error.status, error.code, error.message)
    else:
        status = getattr(error, "code", None)
        if not isinstance(error, werkzeug.exceptions.HTTPException) or status not in error_codes:
            log.error("falha interna ao atender uma requisição: %s: %s", type(error).__name__, error, exc_info=True)
            status = 500
        parts = error_parts(status)
    return flask.Response(parts[0], status, parts[1])


@app.after_request
def complete(response):
    """Completa qualquer resposta da aplicação; o cabeçalho Server é do servidor HTTP.

    Argumentos:
        response (flask.Response): a resposta.
    Retorna:
        flask.Response: a mesma, com X-Author e CORS.
    """
    response.headers["X-Author"] = author
    response.headers.extend(cors_headers(flask.request.headers.get("Origin")))
    if getattr(response, "owner", None) is None:
        close_after(flask.request.environ)
    return response


@app.before_request
def admit():
    """Atende OPTIONS, sem criar tarefa, e recusa quem não traz um token válido.

    Retorna:
        flask.Response: 204 para OPTIONS, com a consulta prévia do CORS; None se a requisição segue.
    Levanta:
        werkzeug.exceptions.HTTPException: 401.
    """
    request = flask.request
    if request.method == "OPTIONS":
        response = flask.Response(status=204, headers=error_headers[405])
        del response.headers["Content-Type"]
        asked = request.headers.get("Access-Control-Request-Method")
        if asked and "Access-Control-Allow-Origin" in dict(cors_headers(request.headers.get("Origin"))):
            response.headers["Access-Control-Allow-Methods"] = ", ".join(stream_methods)
            response.headers["Access-Control-Max-Age"] = "600"
            if wanted := request.headers.get("Access-Control-Request-Headers"):
                response.headers["Access-Control-Allow-Headers"] = wanted
        return response
    if AUTH_TOKEN and request.path != "/ping":
        scheme, _, token = request.headers.get("Authorization", "").strip().partition(" ")
        given = token.strip().encode("latin-1", "replace")
        # Todos são comparados, e por inteiro: o tempo da resposta não diz quanto se acertou.
        found = sum(hmac.compare_digest(given, allowed) for allowed in AUTH_TOKEN)
        if scheme.lower() != "bearer" or not found:
            sender = client_address(request.environ)
            warn_rarely(f"requisição sem um AUTH_TOKEN válido recusada: cliente={sender}", "AUTH_TOKEN")
            raise werkzeug.exceptions.Unauthorized()
    return None


@app.route("/ping", methods=all_methods, provide_automatic_options=False)
def ping():
    """Testa o Redis.

    Retorna:
        flask.Response: 200 "pong" se o Redis respondeu; senão 500, em texto.
    """
    with contextlib.suppress(TimeoutError):
        if asyncio.run_coroutine_threadsafe(redis_ping(), loop).result(answer_timeout):
            return flask.Response("pong", content_type="text/plain; charset=utf-8")
    return flask.Response("o Redis não respondeu", 500, content_type="text/plain; charset=utf-8")


def read_body(request):
    """Lê o corpo da requisição, seja qual for o Content-Type.

    Argumentos:
        request (flask.Request): requisição ainda não lida.
    Retorna:
        bytes: o corpo, ou b"" se não houver.
    Levanta:
        werkzeug.exceptions.HTTPException: 413 se passar de MAX_BODY; 408 se não
        chegar em REQUEST_TIMEOUT; 400 se não chegar inteiro ou tiver um chunk
        inválido.
    """
    connection = client_socket(request.environ)
    # O werkzeug tomaria por vazio um corpo de tamanho ilegível, ou em uma forma que ele não sabe ler.
    if not request.environ.get("CONTENT_LENGTH", "0").isdecimal():
        raise werkzeug.exceptions.BadRequest()
    if request.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
        raise werkzeug.exceptions.NotImplemented()
    if (request.content_length or 0) > MAX_BODY:
        raise werkzeug.exceptions.RequestEntityTooLarge()
    parts, size = [], 0
    try:
        # request.stream não passa pelos formulários, que esvaziariam o corpo.
        while part := request.stream.read(read_size):
            size += len(part)
            if size > MAX_BODY:
                raise werkzeug.exceptions.RequestEntityTooLarge()
            parts.append(part)
    except (OSError, werkzeug.exceptions.BadRequest) as error:
        late = werkzeug.exceptions.RequestTimeout()
        raise werkzeug.exceptions.BadRequest() if connection in arrivals else late from error
    # Quem a varredura já tirou daqui não chegou a tempo.
    if connection not in arrivals:
        raise werkzeug.exceptions.RequestTimeout()
    arrivals[connection] = math.inf
    return b"".join(parts)


def response_head(status, fields, minor=1):
    """Escreve o cabeçalho de uma resposta que sai pelo laço.

    Argumentos:
        status (int): status HTTP.
        fields (list): pares de cabeçalhos.
        minor (int): 1 em HTTP/1.1, 0 em HTTP/1.0.
    Retorna:
        bytes: da linha de status à linha em branco.
    """
    fields = [("Server", SERVERNAME), ("Date", email.utils.formatdate(usegmt=True)), *fields, ("Connection", "close")]
    rows = [f"HTTP/1.{minor} {status} {http.HTTPStatus(status).phrase}", *[f"{name}: {value}" for name, value in fields]]
    return "\r\n".join([*rows, "", ""]).encode("latin-1")


def choose_type(request):
    """Escolhe o tipo do streaming; nunca 406, que um cliente não saberia tratar.

    Argumentos:
        request (flask.Request): requisição.
    Retorna:
        str: o tipo de linhas que Accept prefere; application/json se ele só admite esse, pois uma
        resposta de uma linha é JSON; senão CONTENT_TYPE.
    """
    named = [value.partition(";")[0].strip().lower() for value, quality in request.accept_mimetypes if quality]
    if chosen := next((name for name in named if name in line_types), None):
        return chosen
    admits_all = {"*/*", "application/*"} & set(named)
    return "application/json" if "application/json" in named and not admits_all else CONTENT_TYPE


class stream_response(flask.Response):
    """Resposta de streaming: seu cabeçalho vai ao laço, com o socket."""

    # O stream aceito; None na resposta a HEAD, que acaba no cabeçalho.
    owner = None

    def __call__(self, environ, start_response):
        """Entrega o socket ao laço.

        Argumentos:
            environ (dict): ambiente WSGI.
            start_response (callable): função do WSGI.
        Retorna:
            iterable: o corpo vazio da resposta a HEAD.
        Levanta:
            handed_over: o socket já não é da thread.
        """
        if self.owner is None:
            return super().__call__(environ, start_response)
        is_chunked = self.owner.task.is_chunked
        fields = [*self.headers, *[("Transfer-Encoding", "chunked")] * is_chunked]
        return hand_over(environ, self.owner, response_head(200, fields, int(is_chunked)))


@app.route("/", methods=all_methods, provide_automatic_options=False)
def streaming():
    """Função principal: atende um cliente, da requisição à entrega do socket ao laço.

    Retorna:
        stream_response: o streaming.
    Levanta:
        refusal, werkzeug.exceptions.HTTPException: um erro com status próprio e corpo JSON.
    """
    request = flask.request
    response = stream_response(content_type=f"{choose_type(request)}; charset=utf-8", headers=[
        ("Cache-Control", "no-cache, no-transform"),
        # O nginx guarda a resposta inteira se não for avisado.
        ("X-Accel-Buffering", "no"),
        ("X-Content-Type-Options", "nosniff"),
    ])
    if request.method == "HEAD":
        return response
    made = stream(task(request, read_body(request)))
    loop.call_soon_threadsafe(made.begin)
    try:
        made.accepted.result(answer_timeout + len(made.task.payload) / slowest_send)
    except TimeoutError:
        loop.call_soon_threadsafe(made.adopt, None, b"")
        raise refusal(*redis_unavailable) from None
    response.owner = made
    response.headers["X-Task-Name"] = made.task.name
    return response


# =============================================================================
# Servidores HTTP e a entrega do socket
# =============================================================================
# Os dois rodam como seus autores os fazem, cada um em sua thread. O que se usa de dentro deles e do
# redis-py, sem estar em seus manuais, fica todo nesta seção: na tabela insides, conferida no início, e
# mais "werkzeug.socket" e os campos requests e error do waitress.

backlog = 4096
line_limit = 65537
# Threads do waitress: cada uma espera pelo Redis no começo de uma tarefa, e só então.
waitress_threads = 16
# Descritores usados pelo próprio programa, com folga, e os que ficam para responder 503 e /ping.
own_descriptors = 32
refusal_descriptors = 64
# Bytes além de MAX_BODY que o waitress aceita: ele conta também as marcas dos chunks.
chunk_marks = 65536
# Pausa, em segundos, antes de aceitar de novo, se faltam descritores ou threads.
accept_pause = 0.1
# Sockets escutando que vieram abertos: do programa de antes da recarga, ou do systemd, que os guarda.
kept_listeners = []
# Sockets cuja requisição ainda chega -> prazo, no relógio monotônico; infinito se já chegou e
# a resposta está sendo feita.
arrivals = {}


# O que chega a uma porta de HTTP por engano: o começo, de que se trata e o que fazer.
strangers_to_http = (
    (rb"\x16\x03[\x00-\x04]..\x01", "TLS", "o TLS fica em um proxy reverso à frente deste"),
    (rb"PROXY [TU]|\r\n\r\n\x00\r\nQUIT", "o protocolo PROXY", "o proxy reverso deve nomear o cliente em X-Forwarded-For"),
    (rb"PRI \* HTTP/2", "HTTP/2", "o proxy reverso deve falar HTTP/1.1 com este"),
)


def tell_stranger(data, address):
    """Avisa que uma conexão não é de HTTP/1: a recusa só a vê o outro lado.

    Argumentos:
        data (bytes): o que chegou da conexão.
        address (tuple): endereço de quem se conectou.
    """
    for start, name, remedy in strangers_to_http:
        if re.match(start, data, re.DOTALL):
            warn_rarely(f"{address[0]} fala {name} com a porta do HTTP: {remedy}", name)


class handed_over(ConnectionError):
    """O socket agora é do laço. Os dois servidores tomam isto por um cliente que caiu, e nada escrevem."""


def client_socket(environ):
    """Dá o socket do cliente de uma requisição.

    Argumentos:
        environ (dict): ambiente WSGI.
    Retorna:
        socket.socket: o socket, ainda do servidor HTTP.
    """
    disconnected = environ.get("waitress.client_disconnected")
    return disconnected.__self__.socket if disconnected else environ["werkzeug.socket"]


def close_after(environ):
    """Faz o servidor HTTP fechar a conexão depois desta resposta.

    Argumentos:
        environ (dict): ambiente WSGI.
    """
    if disconnected := environ.get("waitress.client_disconnected"):
        # O WSGI não deixa a aplicação dizê-lo; é como se o cliente o tivesse pedido.
        disconnected.__self__.requests[0].headers["CONNECTION"] = "close"
    else:
        # O do Flask ainda leria até o fim um corpo que ninguém quis: a varredura o interrompe.
        arrivals[environ["werkzeug.socket"]] = time.monotonic() + closing_patience


def hand_over(environ, owner, head):
    """Entrega o socket de um cliente ao laço.

    Argumentos:
        environ (dict): ambiente WSGI.
        owner (stream): stream que o recebe.
        head (bytes): cabeçalho da resposta.
    Levanta:
        handed_over: sempre; a thread que a vê cair esquece a conexão.
    """
    connection, entrusted = client_socket(environ), None
    try:
        # O socketserver desliga (shutdown) o que lhe resta ao fim da requisição: uma cópia não serviria. Já o laço
        # do waitress ainda conhece o número deste descritor, e só o fecha.
        is_flask = "werkzeug.socket" in environ
        entrusted = socket.socket(fileno=connection.detach()) if is_flask else connection.dup()
    except OSError as error:
        log.debug("o socket de um cliente não pôde ser entregue: %s", cause_of(error))
    # Se o cliente saiu enquanto o corpo era lido, o servidor já a esqueceu, e ninguém mais o faria.
    arrivals.pop(connection, None)
    loop.call_soon_threadsafe(owner.adopt, entrusted, head)
    raise handed_over


def accept_patiently(accept, pause):
    """Aceita uma conexão, e começa a contar o prazo da requisição dela.

    Se faltam descritores, ela espera na fila do sistema, e sem pausa o servidor giraria à toa.

    Argumentos:
        accept (callable): o método do servidor.
        pause (callable): o que faz o servidor não aceitar mais nenhuma; no do Flask, a thread dorme para sempre.
    Retorna:
        tuple: (socket, endereço do cliente); None se não há nenhuma.
    Levanta:
        OSError: se o sistema não tem mais descritores ou o cliente desistiu.
        KeyboardInterrupt: se o serviço está parando; é como o werkzeug aceita parar.
    """
    # Nesta ordem, quem põe is_paused sabe que, depois disto, nenhuma falta em arrivals.
    gate.is_accepting = True
    if gate.is_paused:
        gate.is_accepting = False
        # A que está na fila do sistema é de quem vier depois.
        return pause()
    try:
        if accepted := accept():
            arrivals[accepted[0]] = time.monotonic() + REQUEST_TIMEOUT / 1000
        return accepted
    except OSError as error:
        if gate.is_closed and HTTP_SERVER == "flask":
            raise KeyboardInterrupt from None
        if error.errno in (errno.EMFILE, errno.ENFILE):
            warn_rarely("faltam descritores de arquivo: aumente o limite (LimitNOFILE) ou diminua MAX_STREAMS")
            time.sleep(accept_pause)
        raise
    finally:
        gate.is_accepting = False


class line_reader(io.BufferedReader):
    """Leitura de uma requisição que não toma o fim da conexão pelo fim dela, nem guarda o que não tem fim."""

    def read(self, size=-1):
        """Lê bytes; o que o werkzeug só lê para descartar, 10 MB por vez, é descartado até o fim, ou até a varredura.

        Argumentos:
            size (int): quantos bytes.
        Retorna:
            bytes: todos eles; nenhum, se eram para descartar.
        Levanta:
            ConnectionAbortedError: se a conexão acabou antes: de um chunk cortado o werkzeug daria como lidos bytes
                que não chegaram, e o Python os tiraria de outro lugar da memória.
        """
        if size > read_size:
            # Uma exceção aqui deixaria aberto o epoll com que o werkzeug espera.
            with contextlib.suppress(OSError):
                while self.read1(read_size):
                    pass
            return b""
        data = super().read(size)
        if len(data) < size:
            raise ConnectionAbortedError("a requisição não chegou inteira")
        return data

    def readline(self, size=-1):
        """Lê uma linha.

        Argumentos:
            size (int): máximo de bytes; o werkzeug não dá nenhum ao ler as marcas dos chunks.
        Retorna:
            bytes: a linha, com o seu fim, ou os primeiros bytes de uma longa demais.
        Levanta:
            ConnectionAbortedError: se a conexão acabou antes.
        """
        size = line_limit if size < 0 else size
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) < size:
            raise ConnectionAbortedError("a requisição não chegou inteira")
        return line


class flask_handler(werkzeug.serving.WSGIRequestHandler):
    """Atende uma conexão, e nela uma só requisição, no servidor do Flask."""

    disable_nagle_algorithm = True
    # O werkzeug a supõe lida, também ao responder a quem nada enviou.
    requestline = ""

    def setup(self):
        """Prepara a leitura da requisição."""
        super().setup()
        self.rfile = line_reader(self.rfile.detach())
        with contextlib.suppress(OSError):
            tell_stranger(self.rfile.peek(1), self.client_address)

    def finish(self):
        """Esquece a conexão."""
        arrivals.pop(self.connection, None)
        super().finish()

    def version_string(self):
        """Nomeia o servidor.

        Retorna:
            str: valor do cabeçalho Server.
        """
        return SERVERNAME

    def handle_one_request(self):
        """Atende a requisição; o socket pode ter sido entregue, e não há outra."""
        try:
            super().handle_one_request()
        except ConnectionAbortedError:
            # Quem a varredura tirou daqui ainda espera pela resposta; os outros se foram.
            if self.connection not in arrivals:
                self.send_error(408)
        self.close_connection = True

    def handle_expect_100(self):
        """Deixa o "100 Continue" para o werkzeug, que também o envia.

        Retorna:
            bool: verdadeiro: a requisição segue.
        """
        return True

    def make_environ(self):
        """Completa o ambiente WSGI.

        Retorna:
            dict: ambiente com o alvo como veio: self.path já perdeu as barras repetidas do início.
        """
        # O werkzeug 2.2 tomaria os nomes com "_" pelos que têm "-", e X_Forwarded_For forjaria um endereço.
        for name in [name for name in self.headers if "_" in name]:
            del self.headers[name]
        if self.request_version != "HTTP/1.1":
            # Quem fala HTTP/1.0 não conhece chunks.
            self.protocol_version = "HTTP/1.0"
        environ = super().make_environ() | {"REQUEST_URI": self.requestline.split()[1]}
        if cookies := self.headers.get_all("Cookie"):
            # Juntos por vírgula, que pode estar em um valor, não se saberia onde cada um acaba (RFC 9113, 8.2.3).
            environ["HTTP_COOKIE"] = "; ".join(cookies)
        return environ

    def send_error(self, code, message=None, explain=None):
        """Responde a uma requisição que não chega à aplicação.

        Argumentos:
            code (int): status HTTP.
            message (str): sem uso.
            explain (str): sem uso.
        """
        self.wfile.write(whole_error(code, getattr(self, "headers", {}).get("Origin")))


def start_thread(process_request, *connection):
    """Dá uma thread a uma conexão do servidor do Flask, esperando se o sistema não pode criá-la.

    Argumentos:
        process_request (callable): o método do servidor.
        connection (tuple): socket aceito e endereço do cliente.
    """
    while True:
        try:
            process_request(*connection)
            return
        except RuntimeError as error:
            warn_rarely(f"faltam threads ({error}): aumente o limite (TasksMax) e a memória")
            time.sleep(accept_pause)


def tell_misunderstood(*_):
    """Registra em uma linha a falha de uma conexão do servidor do Flask.

    Argumentos:
        _ (tuple): sem uso: socket e endereço do cliente.
    """
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
        warn_rarely(f"o servidor HTTP não entendeu uma requisição: {type(error).__name__}: {error}", "requisição")


def whole_error(status, origin=None):
    """Escreve a resposta inteira a uma requisição que não chega à aplicação.

    Argumentos:
        status (int): status HTTP.
        origin (str): cabeçalho Origin da requisição, ou None.
    Retorna:
        bytes: cabeçalho e corpo.
    """
    body, fields = error_parts(status)
    fields += [("X-Author", author), *cors_headers(origin), ("Content-Length", str(len(body)))]
    return response_head(status, fields) + body


async def dismiss(connection, response):
    """Responde a uma recusa e descarta o que o cliente ainda envia: fechar antes apagaria a resposta (RST).

    Argumentos:
        connection (socket.socket): socket entregue.
        response (bytes): a resposta inteira.
    """
    with contextlib.suppress(OSError):
        # A resposta e o fim saem juntos: entre os dois, a thread ainda poderia dar uma segunda.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        reader, writer = await asyncio.open_connection(sock=connection)
        writer.write(response)
        writer.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(closing_patience):
                while await reader.read(read_size):
                    pass
        writer.close()


class waitress_error:
    """Erro do waitress, que o laço responde: o waitress fecharia antes de ler o que o cliente ainda envia."""

    def __init__(self, channel):
        """Guarda a conexão.

        Argumentos:
            channel (waitress_channel): conexão cuja requisição foi recusada.
        """
        self.connection, request = channel.socket, channel.requests[0]
        self.response = whole_error(request.error.code, request.headers.get("ORIGIN"))

    def to_response(self, ident=None):
        """Entrega o socket ao laço, quando o waitress pede a resposta.

        Argumentos:
            ident (str): sem uso; a 2.1 nem o passa.
        Levanta:
            handed_over: o socket já não é da thread.
        """
        loop.call_soon_threadsafe(spawn, dismiss(self.connection.dup(), self.response))
        raise handed_over


class waitress_channel(waitress.channel.HTTPChannel):
    """Conexão do waitress, e nela uma só requisição."""

    def recv(self, size):
        """Lê o que chegou.

        Argumentos:
            size (int): máximo de bytes.
        Retorna:
            bytes: o que chegou.
        """
        data = super().recv(size)
        tell_stranger(data, self.addr)
        return data

    def service(self):
        """Atende a requisição, na thread dela."""
        request = self.requests[0]
        if "COOKIE" in request.headers:
            request.headers["COOKIE"] = request.headers["COOKIE"].replace(", ", "; ")
        if request.error:
            request.error = waitress_error(self)
        super().service()

    def handle_close(self):
        """Fecha a conexão e a esquece."""
        arrivals.pop(self.socket, None)
        super().handle_close()


# De quem é, e o nome; check_insides os confere no início.
insides = (
    (flask.cli, "show_server_banner"), (werkzeug.serving.WSGIRequestHandler, "make_environ"), (redis.Connection(), "_sock"),
    (waitress.channel.HTTPChannel, "service"), (waitress.channel.HTTPChannel, "handle_close"), (waitress.wasyncore, "dispatcher"),
)


def check_insides():
    """Confere se as bibliotecas ainda têm por dentro o que o programa usa.

    Levanta:
        configuration_error: se falta algo, com o nome do módulo e a versão.
    """
    for owner, name in insides:
        if not hasattr(owner, name):
            named = owner if hasattr(owner, "__name__") else type(owner)
            module = getattr(named, "__module__", named.__name__).partition(".")[0]
            raise configuration_error(
                f"esta versão do módulo {module} não serve: falta {named.__name__}.{name}, de que o programa depende")


def serve_flask(listener):
    """Atende com o servidor do Flask, uma thread por requisição, até que o socket deixe de escutar.

    Argumentos:
        listener (socket.socket): socket escutando.
    """
    def run_simple(host, port, application, **options):
        """Roda o servidor no socket já aberto; o do werkzeug abriria outro, e diria em inglês por que não pôde.

        Argumentos:
            host (str): HTTP_HOST.
            port (int): HTTP_PORT.
            application (flask.Flask): a aplicação.
            options (dict): argumentos de app.run.
        """
        server = werkzeug.serving.make_server(
            host, port, application, threaded=options["threaded"], request_handler=options["request_handler"],
            fd=listener.fileno())
        server.get_request = functools.partial(accept_patiently, server.get_request, threading.Event().wait)
        server.process_request = functools.partial(start_thread, server.process_request)
        server.handle_error = tell_misunderstood
        server.serve_forever()

    werkzeug.serving.run_simple = run_simple
    # O aviso de servidor de desenvolvimento, que iria para a saída padrão.
    flask.cli.show_server_banner = lambda *_: None
    app.run(host=HTTP_HOST, port=HTTP_PORT, threaded=True, debug=False, load_dotenv=False, request_handler=flask_handler)


def serve_waitress(listener):
    """Atende com o waitress, até que o socket deixe de escutar e as respostas acabem.

    Argumentos:
        listener (socket.socket): socket escutando.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = waitress.create_server(
        app, sockets=[listener], ident=SERVERNAME, threads=waitress_threads, backlog=backlog,
        # Além do limite as conexões esperam na fila do sistema; sem ele, a falta de descritores
        # faria o laço do waitress girar à toa. select() não passa do descritor 1023.
        connection_limit=max(refusal_descriptors, most - own_descriptors - gate.limit), asyncore_use_poll=True,
        # O prazo do waitress segue o relógio do sistema, que pode voltar no tempo; quem julga é sweep_late.
        channel_request_lookahead=0, channel_timeout=10**9,
        # O corpo fica na memória, como no servidor do Flask: um arquivo provisório custaria um
        # descritor a mais por conexão, e o disco pode estar cheio.
        inbuf_overflow=MAX_BODY + chunk_marks + 1, max_request_body_size=MAX_BODY + chunk_marks,
        clear_untrusted_proxy_headers=False, log_socket_errors=False,
    )
    server.channel_class = waitress_channel
    server.accept = functools.partial(
        accept_patiently, server.accept, functools.partial(setattr, server, "accepting", False))
    # O socket que deixa de escutar é fechado na thread do waitress; o dele fecharia junto o alarme das outras.
    server.handle_close = functools.partial(waitress.wasyncore.dispatcher.close, server)
    server.run()


servers = {"flask": serve_flask, "waitress": serve_waitress}


def run_server(listener):
    """Roda o servidor HTTP, em sua thread; sem ele, não há serviço.

    Argumentos:
        listener (socket.socket): socket escutando.
    """
    try:
        servers[HTTP_SERVER](listener)
    except (Exception, SystemExit) as error:
        log.error("o servidor HTTP parou: %s: %s", type(error).__name__, error)
    if not gate.is_closed:
        exit_process(1)


def raise_descriptor_limit():
    """Eleva o limite de descritores ao máximo permitido e limita por ele os streams.

    Sem sobra, quem passa do limite esperaria na fila do sistema por um 503.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1048576
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gate.limit = max(1, min(MAX_STREAMS, hard - own_descriptors - refusal_descriptors))
    if gate.limit < MAX_STREAMS:
        log.warning("MAX_STREAMS é %d, mas o processo só pode abrir %d descritores: o limite passa a %d",
                    MAX_STREAMS, hard, gate.limit)


def open_listener(host, port, is_check):
    """Abre o socket em que um servidor escuta, ou usa o que já veio aberto.

    Argumentos:
        host (str): endereço ou nome desta máquina.
        port (int): porta; 0 escolhe uma livre.
        is_check (bool): verdadeiro se é só para saber se pode ser aberto.
    Retorna:
        socket.socket: socket escutando.
    Levanta:
        OSError: se o endereço não existe ou a porta está ocupada.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    for each in kept_listeners:
        name = each.getsockname()
        if each.family == family and name[0] == address[0] and port in (0, name[1]):
            kept_listeners.remove(each)
            return each
    for each in [each for each in kept_listeners if each.getsockname()[1] == port]:
        # A mesma porta em outro endereço só se abre depois que este deixa de escutar.
        if is_check:
            return each
        each.shutdown(socket.SHUT_RDWR)
    return socket.create_server(address, family=family, backlog=backlog, dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6())


# =============================================================================
# Métricas, para o Prometheus
# =============================================================================
# Desligadas (meter é None), não custam nada, e o prometheus_client nem é carregado.

# Limites das faixas: segundos até a primeira linha, da duração, de uma ida ao Redis
# e do atraso do laço; e comandos em uma ida.
first_line_limits = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
duration_limits = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
round_limits = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 2)
lag_limits = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
command_limits = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
# Erros que não estão em error_codes.
refusal_codes = ((500, "redis_error"), (503, "too_many_streams"), (504, "redis_unavailable"))


def sample_key(sample):
    """Dá um nome a uma amostra.

    Argumentos:
        sample (prometheus_client.Sample): a amostra.
    Retorna:
        str: o nome e os rótulos dela, em JSON.
    """
    return json.dumps([sample.name, sample.labels], sort_keys=True)


async def list_streams():
    """Descreve os streams vivos.

    Retorna:
        list[str]: um objeto JSON por stream.
    """
    now, rows = loop.time(), []
    for each in live:
        asked, sent = each.task, each.client
        state = "starting" if each.timer is None else "ending" if each.reason else "blocked" if sent.room else "waiting"
        rows.append(json.dumps({
            "task": asked.name, "client": asked.address, "method": asked.method, "path": asked.path,
            "age_ms": round((now - asked.started) * 1000), "lines": sent.lines, "bytes": sent.bytes,
            "idle_ms": round((now - each.last_line) * 1000), "state": state}, ensure_ascii=False))
    return rows


class metrics_meter:
    """O que o programa conta para as métricas."""

    def __init__(self):
        """Cria as métricas, todas em zero."""
        # Importado só se preciso: sem métricas, o módulo pode nem existir.
        import prometheus_client

        registry = prometheus_client.CollectorRegistry()
        options = {"namespace": "ndjson_proxy", "registry": registry}
        counter = functools.partial(prometheus_client.Counter, **options)
        gauge = functools.partial(prometheus_client.Gauge, **options)
        histogram = functools.partial(prometheus_client.Histogram, **options)
        # O que os streams e as requisições contam.
        self.lines = counter("lines", "Linhas enviadas, as de erro inclusive.")
        self.skipped = counter("lines_skipped", "Elementos em branco, pulados.")
        self.bytes = counter("sent_bytes", "Bytes de linhas enviados.")
        self.unheard = counter("tasks_unheard", "Tarefas publicadas sem ninguém no canal nem fila.")
        self.first_line = histogram("first_line_seconds", "Da requisição à primeira linha.", buckets=first_line_limits)
        self.duration = histogram("stream_seconds", "Da requisição ao fim do streaming.", buckets=duration_limits)
        tasks = counter("tasks", "Tarefas terminadas, por motivo do fim.", ["reason"])
        self.ends = {name: tasks.labels(name) for name in end_reasons}
        self.refusals = counter("requests_refused", "Requisições recusadas antes do streaming.", ["status", "reason"])
        for status, code in (*refusal_codes, *((status, code) for status, (code, _) in error_codes.items())):
            self.refusals.labels(str(status), code)
        # O que o laço conta de si.
        self.lag = histogram("collector_lag_seconds", "Atraso do laço em relação ao que venceu.", buckets=lag_limits)
        self.rounds = histogram("collector_round_seconds", "Duração de uma ida ao Redis.", buckets=round_limits)
        self.commands = histogram("collector_round_commands", "Comandos em uma ida ao Redis.", buckets=command_limits)
        # O que se lê na hora.
        gauge("info", "Versão e servidor HTTP.", ["version", "server"]).labels(version, HTTP_SERVER).set(1)
        for name, text, read in (
            ("streams", "Streams vivos.", lambda: len(live)),
            ("streams_limit", "MAX_STREAMS, ou menos se faltam descritores.", lambda: gate.limit),
            ("threads", "Threads do processo.", threading.active_count),
            ("redis_up", "1 se o Redis responde.", lambda: int(not link.told)),
            ("redis_wake_up", "1 se o Redis avisa as mudanças (REDIS_WAKE).", lambda: int(link.is_tracked)),
        ):
            gauge(name, text).set_function(read)
        self.cuts = counter("redis_cuts", "Quedas do Redis ou da conexão com ele.")
        self.returns = counter("redis_reconnects", "Voltas do Redis.")
        prometheus_client.ProcessCollector(namespace="ndjson_proxy", registry=registry)
        # O que o programa de antes da recarga já tinha contado: nome e rótulos de uma amostra -> valor.
        self.registry, self.carried = registry, {}
        total = prometheus_client.CollectorRegistry()
        total.register(self)
        self.metrics = prometheus_client.make_wsgi_app(total)

    def collect(self):
        """Soma o que se conta ao que o programa de antes da recarga contou.

        Retorna:
            iterator: famílias de métricas do prometheus_client.
        """
        for family in self.registry.collect():
            # As do processo, que é o mesmo, o núcleo continua a contar.
            if family.type in ("counter", "histogram") and "_process_" not in family.name:
                family.samples = [
                    each._replace(value=each.value + self.carried.get(sample_key(each), 0)) for each in family.samples]
            yield family

    def counted(self):
        """Dá o que deve continuar na recarga.

        Retorna:
            dict: nome e rótulos de cada amostra -> valor, como em carried.
        """
        return {sample_key(each): each.value for family in self.collect()
                if family.type in ("counter", "histogram") for each in family.samples}

    def application(self, environ, start_response):
        """Responde com os streams vivos em /streams, e com as métricas em qualquer outro caminho.

        Argumentos:
            environ (dict): ambiente WSGI.
            start_response (callable): função do WSGI.
        Retorna:
            iterable: trechos de bytes.
        """
        if environ["PATH_INFO"] != "/streams":
            return self.metrics(environ, start_response)
        rows = asyncio.run_coroutine_threadsafe(list_streams(), loop).result(answer_timeout)
        start_response("200 OK", [("Content-Type", "application/x-ndjson; charset=utf-8")])
        return [row.encode() + b"\n" for row in rows]

    def round(self, done):
        """Conta uma ida ao Redis.

        Argumentos:
            done (exchange): comandos já respondidos.
        """
        self.commands.observe(done.count)
        self.rounds.observe(loop.time() - done.sent_at)

    def serve(self, listener):
        """Serve as métricas, em uma thread, com o waitress.

        Argumentos:
            listener (socket.socket): socket escutando em METRICS_HOST e METRICS_PORT.
        """
        server = waitress.create_server(self.application, sockets=[listener], ident=SERVERNAME, threads=1,
                                        asyncore_use_poll=True, connection_limit=1000, channel_timeout=10,
                                        cleanup_interval=5, log_socket_errors=False)
        threading.Thread(target=server.run, name="métricas", daemon=True).start()
        log.info("métricas: http://%s:%d/metrics", url_host(METRICS_HOST), METRICS_PORT)


# =============================================================================
# Recarga, sinais e programa principal
# =============================================================================

stop_signals = (signal.SIGTERM, signal.SIGINT)
handled_signals = (*stop_signals, signal.SIGHUP, signal.SIGUSR1)
# Tempo, em segundos, que cada etapa da parada espera sem ver progresso.
stop_patience = 1.0


def show(text):
    """Escreve na saída padrão, que pode ser um cano, um arquivo ou nada.

    Argumentos:
        text (str): uma ou mais linhas, sem o LF final.
    Levanta:
        OSError: se a saída falhar; quem parou de ler (head) não é uma falha.
    """
    # Sem saída padrão, sys.stdout é None.
    with contextlib.suppress(BrokenPipeError, AttributeError):
        # Um terminal que não sabe uma letra não é motivo para não mostrar as outras.
        sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def redis_problem(error, given):
    """Descreve por que o Redis não serve, no início ou no --check.

    Argumentos:
        error (Exception): falha da conexão ou recusa do Redis.
        given (dict): texto e camada de cada configuração.
    Retorna:
        tuple: (status de saída, frase): 2 se o database não existe, o que nenhuma
        espera conserta; 1 nos outros casos.
    """
    shown, words = REDIS_SERVER.shown, cause_of(error)
    refused = isinstance(error, redis.ResponseError) and re.match("(ERR )?(DB index|SELECT |unknown command|.*no permissions)", words)
    if refused or isinstance(error, redis.DataError):
        why = f"o Redis recusa {'um comando' if 'command' in words else 'esse database'} ({words})" if refused else words
        return 2, f"REDIS_SERVER: o valor {shown!r} ({given['REDIS_SERVER'].layer}) não serve: {why}"
    if isinstance(error, redis.AuthenticationError) or words.startswith(("NOAUTH", "WRONGPASS")):
        name = "REDIS_SERVER" if has_password(given["REDIS_SERVER"].text) else "REDIS_PASSWORD"
        return 1, f"{name}: o Redis em {shown} recusou a senha ({given[name].layer}): {words}"
    # Uma recusa é uma resposta: o endereço está certo, e o Redis, no ar.
    is_refusal = isinstance(error, redis.ResponseError | redis.BusyLoadingError) or "max number of clients" in words
    verb = "recusou a conexão" if is_refusal else "não atende"
    if words in (os.strerror(errno.ECONNRESET), "conexão fechada pelo servidor"):
        words += "; se ele só aceita TLS, a URL começa com rediss://"
    return 1, f"REDIS_SERVER: o Redis em {shown} {verb}: {words}"


def tell_problems(problems, given):
    """Diz o que o Redis recusa do que uma tarefa pede.

    Argumentos:
        problems (list[tuple]): o que redis_link.open devolve.
        given (dict): texto e camada de cada configuração.
    Retorna:
        int: status de saída: 2 se ele recusa algo, ou 0.
    """
    for name, why in problems:
        text = REDIS_SERVER.shown if name == "REDIS_SERVER" else given[name].text
        log.error("%s: o valor %r (%s) não serve ao Redis em %s: %s", name, text, given[name].layer, REDIS_SERVER.shown, why)
    return 2 if problems else 0


async def check(given, state):
    """Mostra as configurações e tenta o que o início tentaria: o Redis e as portas (--check).

    Argumentos:
        given (dict): texto e camada de cada configuração.
        state (dict): o de read_state, se é uma recarga que pergunta.
    Retorna:
        int: 0 se tudo serve; 1 se o Redis ou uma porta não atende; 2 se nenhuma espera o consertaria.
    Levanta:
        OSError: se a saída padrão falhar.
    """
    global loop, link
    loop = asyncio.get_running_loop()
    for row in settings:
        text, layer = given[row.name]
        text = REDIS_SERVER.shown if row.name == "REDIS_SERVER" else "********" if row.secret and text else text
        show(f"{row.name} = {text}  ({layer})")
    status, _ = open_listeners(given, True, bool(state))
    if 0 < HTTP_PORT < 1024:
        show("aviso: HTTP_PORT: no serviço, uma porta abaixo de 1024 pede low-port.conf")
    link = redis_link()
    try:
        problems = await link.open()
        names = re.findall(r"(?m)^(?!gcc_)(\w+)_version:(\S+)", link.info.decode())
        show("\n".join([
            f"Redis em {REDIS_SERVER.shown}: respondeu ao PING", f"servidor: {' '.join(names[-1]) if names else 'não diz'}",
            f"cluster: {'sim, nó {}:{}'.format(*(link.moved_to or link.nodes[0])) if b'cluster_enabled:1' in link.info else 'não'}",
            f"avisos: {'sim' if link.is_tracked else 'não'}", f"scripts: {'sim' if link.take_head else 'não'}",
            *[f"aviso: {caution}" for caution in await link.survey()]]))
        return max(status, tell_problems(problems, given))
    except (redis.RedisError, OSError) as error:
        problem, sentence = redis_problem(error, given)
        log.error("%s", sentence)
        return max(status, problem)


def is_served(host, port):
    """Pergunta se um py-ndjson-proxy já atende em uma porta.

    Argumentos:
        host (str): endereço ou nome desta máquina.
        port (int): porta da aplicação ou das métricas.
    Retorna:
        bool: verdadeiro se quem responde é um deles.
    """
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection(host, port, timeout=1)
        connection.request("GET", "/ping")
        answer = connection.getresponse()
        # As métricas respondem o mesmo em qualquer caminho.
        return answer.getheader("X-Author") == author or b"ndjson_proxy_" in answer.read()
    return False


def open_listeners(given, is_check=False, is_reload=False):
    """Abre o socket da aplicação e, se METRICS_PORT pede, o das métricas.

    Argumentos:
        given (dict): texto e camada de cada configuração.
        is_check (bool): verdadeiro se é --check: a porta já pode ser a do serviço, que está no ar.
        is_reload (bool): verdadeiro se quem pergunta é uma recarga, que sabe quais são as suas.
    Retorna:
        tuple: (status de saída se algum não abriu, ou 0; lista de sockets): 2 se o nome ou a família não
        existe, ou se falta privilégio, o que nenhuma espera conserta; 1 nos outros casos.
    """
    listeners = []
    for server in ("HTTP", "METRICS") if METRICS_PORT else ("HTTP",):
        (host, host_layer), (port, port_layer) = (
            (globals()[name], f"({given[name].layer})") for name in (f"{server}_HOST", f"{server}_PORT")
        )
        try:
            listeners.append(open_listener(host, port, is_check))
        except socket.gaierror as error:
            log.error("%s_HOST: o valor %r %s não serve: %s", server, host, host_layer, cause_of(error))
            return (1 if error.errno == socket.EAI_AGAIN else 2), []
        except OSError as error:
            if is_check and not is_reload and error.errno == errno.EADDRINUSE and is_served(host, port):
                show(f"{server}_PORT: a porta {port} já é atendida por um {program}")
                continue
            # As palavras de create_server trazem o endereço, em inglês.
            low = "; abaixo de 1024, o serviço pede low-port.conf"
            cause = os.strerror(error.errno) + low * (error.errno == errno.EACCES)
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL):
                log.error("%s_HOST: o endereço %s %s não pode ser aberto: %s", server, host, host_layer, cause)
            else:
                log.error("%s_PORT: a porta %s %s em %s não pode ser aberta: %s", server, port, port_layer, host, cause)
            return (2 if error.errno in (errno.EACCES, errno.EAFNOSUPPORT, errno.EINVAL) else 1), []
    return 0, listeners


async def settle(count, limit=math.inf):
    """Espera uma contagem chegar a zero, enquanto ela diminui.

    Milhares de streams levam segundos para receber a última linha; um cliente que
    não lê nunca a recebe, e não pode segurar a parada nem a recarga.

    Argumentos:
        count (callable): devolve a contagem.
        limit (float): tempo máximo, em segundos, mesmo que ela diminua.
    """
    left, deadline, end = count(), loop.time() + stop_patience, loop.time() + limit
    while left and loop.time() < min(deadline, end):
        await asyncio.sleep(0.01)
        now = count()
        if now < left:
            left, deadline = now, loop.time() + stop_patience


def unread():
    """Conta o que os clientes não leram.

    Retorna:
        int: bytes.
    """
    transports = [each.client.transport for each in runners.values() if each.client and each.client.transport]
    return sum(each.get_write_buffer_size() for each in transports)


async def finish_requests():
    """Deixa de aceitar: o que já chegou é respondido; o que ainda chega, recusado; e quem se conecta agora espera."""
    gate.is_paused = True
    while gate.is_accepting:
        await asyncio.sleep(0.01)
    await settle(lambda: len(arrivals))
    for connection, due in list(arrivals.items()):
        if due != math.inf and arrivals.get(connection) == due:
            arrivals.pop(connection, None)
            with contextlib.suppress(OSError):
                spawn(dismiss(connection.dup(), whole_error(503)))


async def stop_service(listener):
    """Deixa de escutar, encerra os streams vivos dentro do prazo e apaga suas chaves.

    Argumentos:
        listener (socket.socket): socket escutando.
    """
    # O prazo do systemd acompanha DRAIN, seja qual for o TimeoutStopSec da unidade.
    notify_systemd(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={(DRAIN + 10000) * 1000}")
    if "NOTIFY_SOCKET" in os.environ:
        # O systemd guarda este socket: quem espera é do próximo início, ou é recusado se não houver um.
        await finish_requests()
    else:
        # Quem aceita conexões nos dois servidores vê este socket parar, e para.
        listener.shutdown(socket.SHUT_RDWR)
    log.info("parando: streams vivos: %d%s", len(live), f", que têm até {DRAIN} ms para acabar" if live else "")
    deadline = loop.time() + DRAIN / 1000
    while live and loop.time() < deadline:
        await asyncio.sleep(0.01)
    for each in list(live):
        each.end(ended_shutdown)
    # Streams vivos, bytes que seus clientes não leram e respostas que as threads fazem.
    await settle(lambda: len(live) + unread() + sum(due == math.inf for due in list(arrivals.values())))
    await settle(lambda: len(removals))
    log.info("parado")


# A recarga troca o programa sem trocar o processo (exec): os sockets ficam, e o resto vai em um memfd, cujo descritor
# está nesta variável de ambiente. Outra forma do estado pede outra versão.
state_variable = "NDJSON_PROXY_STATE"
state_version = 1
check_timeout = 30.0


def write_state(state):
    """Escreve um estado para outro programa ler.

    Argumentos:
        state (dict): o que ele deve saber; os descritores nele passam a ser herdados.
    Retorna:
        int: o descritor em que foi escrito.
    """
    memory = os.memfd_create(program)
    with open(memory, "w", encoding="utf-8", closefd=False) as file:
        json.dump(state, file)
    for descriptor in (memory, *state["listeners"], *[row["fd"] for row in state["streams"]]):
        os.set_inheritable(descriptor, True)
    return memory


def try_program(listeners, files):
    """Tenta o programa em disco, com as configurações de agora e os mesmos argumentos.

    Argumentos:
        listeners (list[socket.socket]): sockets escutando, que ele não deve tentar abrir.
        files (dict): caminho -> texto dos arquivos de ENV_FILE: o que se confere é o que será usado.
    Retorna:
        str: por que não serve; "" se serve.
    """
    descriptors = [each.fileno() for each in listeners]
    try:
        with open(__file__, encoding="utf-8") as file:
            is_able = state_variable in file.read()
        memory = write_state({"version": state_version, "listeners": descriptors, "streams": [], "files": files})
        try:
            done = subprocess.run(
                [sys.executable, *sys.orig_argv[1:], "--check"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=check_timeout, check=False, pass_fds=(memory, *descriptors),
                env=os.environ | {state_variable: str(memory)})
        finally:
            os.close(memory)
    except subprocess.TimeoutExpired:
        # As palavras desta trazem o comando, e nele pode haver um segredo.
        return f"o --check não acabou em {check_timeout:g} s"
    except (OSError, ValueError) as error:
        return cause_of(error)
    told = re.findall("(?m)^erro: (.+)", done.stderr) or done.stderr.splitlines() or [f"saiu com {done.returncode}"]
    if done.returncode:
        return told[-1]
    return "" if is_able else "o programa em disco não sabe continuar os streams deste: reinicie o serviço"


async def reload(listeners):
    """Recomeça com o programa e as configurações que estão em disco, sem que um cliente que lê o note.

    Argumentos:
        listeners (list[socket.socket]): sockets escutando.
    """
    gate.is_asked_again = True
    if gate.is_reloading or gate.is_closed:
        return
    gate.is_reloading = True
    notify_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    while gate.is_asked_again:
        gate.is_asked_again, files = False, {}
        for path in ENV_FILE.split(":"):
            # O que não puder ser lido é dito por --check.
            with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8-sig") as file:
                files[path] = file.read()
        problem = await asyncio.to_thread(try_program, listeners, files)
    if problem:
        log.error("a recarga foi recusada, e nada mudou: %s", problem)
        gate.is_reloading = False
        notify_systemd("READY=1")
        return
    try:
        await make_still()
        # Um sinal que chegue daqui em diante fica pendente até que o programa novo saiba tratá-lo, pois só esta thread os
        # recebe; um de antes ainda está a caminho do laço.
        signal.pthread_sigmask(signal.SIG_BLOCK, handled_signals)
        await asyncio.sleep(0.01)
        if not gate.is_closed:
            log.info("recarregando: streams vivos: %d", len(live))
            exec_program(listeners, files)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled_signals)
        # Uma parada chegou no meio: os streams têm até DRAIN.
        gate.may_take.set()
        for each in live:
            if each.timer is not None and each.timer.cancelled():
                each.timer = loop.call_soon(each.tick)
    except Exception as error:
        # Já não se aceita ninguém: só um início conserta.
        print(f"erro: a recarga falhou: {type(error).__name__}: {error}", file=sys.stderr)
        exit_process(1)


async def make_still():
    """Leva os streams a um ponto em que outro programa pode continuá-los: nada por enviar, nem retirada a caminho."""
    await finish_requests()
    deadline = loop.time() + answer_timeout
    while loop.time() < deadline and not gate.is_closed and (arrivals or any(each.timer is None for each in live)):
        await asyncio.sleep(0.01)
    # Quem lê devagar uma linha longa a lê enquanto os outros ainda recebem as suas.
    await settle(lambda: sum(each.client.transport.get_write_buffer_size() for each in live if each.client.room),
                 answer_timeout)
    if gate.is_closed:
        return
    # Daqui em diante nada se tira do Redis, e nenhum prazo vence; o que já foi tirado tem de chegar aos clientes.
    gate.may_take.clear()
    adopted = [each for each in live if each.timer is not None]
    for each in adopted:
        each.timer.cancel()
    # As respostas vêm em ordem: depois da deste PING, nenhuma retirada está a caminho.
    await redis_ping()
    await settle(unread, answer_timeout)
    for each in adopted:
        if each in live and each.client.transport.get_write_buffer_size():
            each.client.transport.abort()
            each.end(ended_client)
    await settle(lambda: sum(each.reason is not None for each in runners.values()))


def kept_values(each):
    """Diz o que um stream leva consigo; o resto recomeça, e a retirada a caminho é repetida.

    Argumentos:
        each (stream): o stream.
    Retorna:
        tuple: pares (dono, nomes dos atributos).
    """
    return ((each.task, ("name", "address", "method", "path", "started")), (each, ("received", "last_line")),
            (each.client, ("lines", "bytes", "skipped", "first_at", "sent_at")))


def exec_program(listeners, files):
    """Troca o programa do processo.

    Argumentos:
        listeners (list[socket.socket]): sockets escutando.
        files (dict): caminho -> texto dos arquivos de ENV_FILE.
    Levanta:
        OSError: se o exec falhou.
    """
    state = {
        "version": state_version, "files": files, "redis": [REDIS_SERVER.url, REDIS_PREFIX, REDIS_LIST_PREFIX],
        "listeners": [each.fileno() for each in listeners], "counted": meter.counted() if meter else {},
        "removals": [[key.decode() for key in keys] for keys in removals], "served": gate.served,
        "streams": [{
            "fd": each.client.transport.get_extra_info("socket").fileno(), "is_chunked": each.task.is_chunked,
            "keys": [each.task.key.decode(), each.task.list.decode()], "is_unheard": each in unheard,
            "values": [[getattr(owner, name) for name in names] for owner, names in kept_values(each)],
        } for each in live if each.timer is not None and each.reason is None],
    }
    os.environ[state_variable] = str(write_state(state))
    flush_log()
    os.execv(sys.executable, sys.orig_argv)


def read_state():
    """Lê o que o programa de antes da recarga deixou, e os sockets que o systemd guardou.

    Retorna:
        dict: o estado; vazio se este é um início.
    """
    state, kept = {}, []
    if state_variable in os.environ:
        with open(int(os.environ.pop(state_variable)), encoding="utf-8") as file:
            file.seek(0)
            state = json.load(file)
        kept += state["listeners"]
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDNAMES") == "http":
        del os.environ["LISTEN_PID"]
        kept.append(3)
    for descriptor in (*kept, *[row["fd"] for row in state.get("streams", ())]):
        os.set_inheritable(descriptor, False)
    kept_listeners.extend(socket.socket(fileno=descriptor) for descriptor in kept)
    kept_files.update(state.get("files", {}))
    return state


def take_over(state):
    """Continua o que o programa de antes da recarga fazia.

    Argumentos:
        state (dict): o que ele escreveu; as outras versões também leem "version", "listeners", "fd" e "is_chunked".
    """
    is_known = state["version"] == state_version
    for row in state["streams"]:
        connection = socket.socket(fileno=row["fd"])
        if not is_known:
            line = error_line("shutdown")
            spawn(dismiss(connection, b"%x\r\n%b\r\n%b" % (len(line), line, last_chunk) if row["is_chunked"] else line))
            continue
        asked = task.__new__(task)
        asked.key, asked.list = map(str.encode, row["keys"])
        asked.taken, asked.payload = asked.list + b":taken", b""
        asked.is_chunked, asked.started = row["is_chunked"], 0.0
        made = stream(asked)
        for (owner, names), values in zip(kept_values(made), row["values"], strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(owner, name, value)
        made.resume(connection)
        if row["is_unheard"]:
            unheard[made] = None
        if state["redis"] != [REDIS_SERVER.url, REDIS_PREFIX, REDIS_LIST_PREFIX]:
            # As chaves deste ficaram em outro Redis, ou sob outro prefixo.
            made.end(ended_shutdown)
    if is_known:
        gate.served = state["served"]
        for keys in state["removals"]:
            removals.append([key.encode() for key in keys])
            has_removals.set()


async def tell_streams():
    """Descreve no log os streams vivos."""
    for row in await list_streams():
        log.info("stream: %s", row)


def request_stop(stopping):
    """Pede a parada; um segundo sinal encerra na hora.

    Argumentos:
        stopping (asyncio.Future): o que a parada espera.
    """
    if stopping.done():
        return
    gate.is_closed = True
    for each in stop_signals:
        if loop.remove_signal_handler(each):
            signal.signal(each, end_at_once)
    stopping.set_result(None)


def end_at_once(number, _):
    """Encerra o processo pela ação padrão de um sinal.

    Argumentos:
        number (int): o sinal.
        _ (frame): sem uso.
    """
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    # O processo 1 de um contêiner não morre dela.
    os._exit(128 + number)


def tell_fault(_, context):
    """Registra uma falha que nenhuma corrotina tratou.

    Argumentos:
        _ (asyncio.AbstractEventLoop): sem uso.
        context (dict): o que o asyncio diz dela.
    """
    error = context.get("exception")
    # Uma resposta que ninguém mais espera falhou com a conexão.
    if not isinstance(error, (*redis_failures, OSError)):
        log.error("falha interna no laço: %s: %s", context["message"], error)


async def serve(given, state):
    """Conecta ao Redis, abre a porta e atende até o sinal de parada.

    Argumentos:
        given (dict): texto e camada de cada configuração.
        state (dict): o de read_state.
    Retorna:
        int: 0 se parou por um sinal; 1 se o Redis ou a porta não atenderam; 2 se o
        database, o nome ou a família não existem, ou se falta privilégio.
    """
    global link, loop, meter
    loop = asyncio.get_running_loop()
    # PYTHONDEVMODE o ligaria, e cada espera longa seria uma linha de log.
    loop.set_debug(False)
    loop.set_exception_handler(tell_fault)
    loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(
        initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, handled_signals)))
    link = redis_link()
    while True:
        try:
            problems = await link.open()
            for caution in await link.survey():
                log.warning("%s", caution)
            if tell_problems(problems, given) and not state:
                return 2
            break
        except (redis.RedisError, OSError, RuntimeError) as error:
            status, sentence = redis_problem(error, given)
            log.error("%s", sentence)
            if not state:
                return status
            # Os clientes que vieram do programa de antes esperam, a menos que se peça a parada.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals)
            notify_systemd("WATCHDOG=1")
            await asyncio.sleep(stop_patience)
    status, listeners = open_listeners(given)
    if status:
        return status
    # Os que sobram fecham com o último dono.
    kept_listeners.clear()
    raise_descriptor_limit()
    stopping = loop.create_future()
    for each in stop_signals:
        # Quem o herdou ignorado (nohup) continua a ignorá-lo.
        if signal.getsignal(each) is not signal.SIG_IGN:
            loop.add_signal_handler(each, request_stop, stopping)
    loop.add_signal_handler(signal.SIGUSR1, lambda: spawn(tell_streams()))
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, lambda: spawn(reload(listeners)))
    signal.pthread_sigmask(signal.SIG_BLOCK, handled_signals)
    if METRICS_PORT:
        meter = metrics_meter()
        meter.carried = state.get("counted", {})
        meter.serve(listeners[1])
    if state:
        take_over(state)
    for duty in (keep_link, look_for_dead, cast_net, announce_again, renew_keys, remove_keys, expire_ownerless,
                 keep_systemd_informed, sweep_late):
        start_duty(duty)
    threading.Thread(target=run_server, args=(listeners[0],), name=HTTP_SERVER, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handled_signals)
    # Percorrer os objetos de milhares de streams pararia todos por décimos de
    # segundo; o lixo cíclico deles é jovem, e as duas primeiras gerações o recolhem.
    gc.freeze()
    gc.set_threshold(10000, 20, 10)
    log.info("pronto: http://%s:%d (%s), Redis em %s", url_host(HTTP_HOST), listeners[0].getsockname()[1],
             HTTP_SERVER, REDIS_SERVER.shown)
    notify_systemd("READY=1")
    # Guardado pelo systemd, o socket não recusa ninguém entre uma queda e o próximo início.
    notify_systemd("FDSTOREREMOVE=1\nFDNAME=http")
    notify_systemd("FDSTORE=1\nFDNAME=http", [listeners[0].fileno()])
    await stopping
    await stop_service(listeners[0])
    return 0


def main(argv):
    """Programa principal.

    Argumentos:
        argv (list[str]): argumentos, sem o nome do programa.
    Retorna:
        int: status de saída: 0 parada limpa, 1 Redis, porta ou saída, 2 configuração.
    """
    global log_writer
    # Só a thread principal recebe sinais: as outras herdam a máscara de quem as cria.
    signal.pthread_sigmask(signal.SIG_BLOCK, handled_signals)
    log_writer = configure_logging()
    # Até o serviço começar, um Ctrl-C encerra como os outros sinais, sem traceback.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    state = read_state()
    if not state:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled_signals)
    try:
        actions, given, cautions = load_settings(argv, os.environ)
        if "help" in actions:
            # O título que o argparse escreve em inglês.
            show(build_parser().format_help().rstrip("\n").replace("usage:", "uso:", 1))
            return 0
        if "version" in actions:
            show(f"{program} {version}")
            return 0
        log.setLevel(LOG_LEVEL.upper())
        for caution in cautions:
            log.warning("%s", caution)
        check_insides()
        if "check" in actions:
            return asyncio.new_event_loop().run_until_complete(check(given, state))
    except configuration_error as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("a saída não pode ser escrita: %s", cause_of(error))
        return 1
    return asyncio.new_event_loop().run_until_complete(serve(given, state))


def flush_log():
    """Dá ao log um instante para escrever o que resta."""
    last = threading.Thread(target=log_writer.stop, daemon=True)
    last.start()
    last.join(log_patience)


def exit_process(status):
    """Encerra o processo.

    As threads que restam não podem prender o fim do interpretador: tudo o que importa já
    foi enviado, apagado e registrado.

    Argumentos:
        status (int): status de saída.
    """
    flush_log()
    os._exit(status)


if __name__ != "__main__":
    raise ImportError(f"{program} é um programa, com o seu próprio servidor HTTP, e não uma aplicação WSGI: "
                      f"rode-o com {sys.executable} {__file__}")
exit_process(main(sys.argv[1:]))
