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
    inválido vira U+FFFD; elemento vazio é pulado. Nada mais é tocado. As palavras
    nuas EOF, EOL, END-OF-FILE e END-OF-LIST encerram o streaming.

Consulta
    Uma só thread (o coletor) pergunta ao Redis por todos os streams, em uma só
    conexão. INTERVAL é a espera máxima: com REDIS_WAKE=on o próprio Redis avisa
    qual chave mudou e a linha sai na hora.
"""

import argparse
import base64
import bisect
import collections
import contextlib
import difflib
import errno
import gc
import heapq
import hmac
import http
import http.server
import importlib.util
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
import select
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import types
import typing
import urllib.parse
import uuid

try:
    import dotenv
    import dotenv.parser
    import flask
    import redis
    import redis.backoff
    import redis.retry
    import redis.sentinel
    import waitress
    import waitress.channel
    import waitress.parser
    import waitress.task
    import waitress.utilities
    import waitress.wasyncore
    import werkzeug.exceptions
    import werkzeug.serving
except ModuleNotFoundError:
    print(f"erro: falta o módulo {sys.exc_info()[1].name}; no Debian: apt install python3-flask python3-redis "
          "python3-waitress python3-dotenv", file=sys.stderr)
    sys.exit(2)

version = "1.0.0"
author = "Patrick Brandao <patrickbrandao@gmail.com>"
program = "py-ndjson-proxy"


# =============================================================================
# Configurações: uma tabela e as variáveis globais que ela preenche
# =============================================================================
# Cada configuração é uma linha da tabela `settings`. Dela saem os argumentos, a
# ajuda, o --check e os testes que prendem o arquivo de /etc, o manual e o README.


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

    @property
    def allowed(self):
        """Descreve os valores permitidos.

        Retorna:
            str: trecho de frase em português, usado nos erros e na ajuda.
        """
        return self.kind.allowed


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
        if not re.fullmatch(r"-?[0-9]{1,18}", text.strip()):
            raise ValueError(text)
        value = int(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

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
        value = text.strip().lower()
        if value not in names:
            raise ValueError(text)
        return value

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
    words = {"on": True, "1": True, "true": True, "yes": True, "sim": True}
    words |= {"off": False, "0": False, "false": False, "no": False, "não": False}
    try:
        return words[text.strip().lower()]
    except KeyError:
        raise ValueError(text) from None


def parse_json_line(text):
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


origin_form = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^\s/?#@:*\[\]]+)(?::([0-9]{1,5}))?")
default_ports = {"http": 80, "https": 443}


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
    parts = origin_form.fullmatch(origin)
    if not parts:
        raise ValueError(text)
    scheme, host, port = parts[1], parts[2].encode("idna").decode(), int(parts[3] or default_ports.get(parts[1], 1))
    if not 1 <= port <= 65535:
        raise ValueError(text)
    is_implied = parts[3] is None or port == default_ports.get(scheme)
    return f"{scheme}://{host}" if is_implied else f"{scheme}://{host}:{port}"


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


class redis_address(typing.NamedTuple):
    """Endereço do Redis: a URL para o redis-py e a forma que pode ser mostrada."""

    url: str
    shown: str


name_expression = r"[^\s\x00-\x1f\x7f]+"
# O maior número que o Redis sabe ler; quantos databases ele tem só ele diz.
last_database = 2**31 - 1
url_reserved = {
    "protocol", "decode_responses", "encoding", "socket_timeout", "socket_connect_timeout", "socket_keepalive",
    "health_check_interval", "max_connections", "retry_on_timeout", "retry_on_error", "client_name",
}


def parse_sentinels(text):
    """Lê a forma de REDIS_SERVER que nomeia sentinelas.

    Argumentos:
        text (str): sentinel://[usuário:senha@]ip[:porta],.../mestre[/database]; o
            usuário e a senha são os das sentinelas; sem porta vale 26379.
    Retorna:
        redis_address: o texto completo e o texto sem usuário nem senha.
    Levanta:
        ValueError: se não tiver essa forma.
    """
    host = r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\],]+)(?::[0-9]{1,5})?"
    parts = re.fullmatch(rf"sentinel://(?:[^\s/@]*@)?({host}(?:,{host})*)/([^\s/?#]+)(?:/([0-9]+))?", text)
    if not parts or int(parts[3] or 0) > last_database:
        raise ValueError(text)
    for each in parts[1].split(","):
        url = urllib.parse.urlsplit(f"//{each}")
        # A propriedade port recusa o que passa de 65535.
        if url.port == 0:
            raise ValueError(text)
        parse_host(url.hostname)
    return redis_address(text, f"sentinel://{parts[1]}/{parts[2]}/{int(parts[3] or 0)}")


def parse_redis_address(text):
    """Lê REDIS_SERVER: ip[:porta][/database], uma URL do redis-py ou as sentinelas.

    Argumentos:
        text (str): endereço; sem porta vale 6379 e sem database vale 0.
    Retorna:
        redis_address: a URL completa e o texto sem usuário nem senha.
    Levanta:
        ValueError: se não tiver uma das formas permitidas.
    """
    text = text.strip()
    if "://" not in text:
        parts = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+)(?::([0-9]+))?(?:/([0-9]*)/?)?", text)
        if not parts:
            raise ValueError(text)
        host, port, database = parts.group(1), int(parts.group(2) or 6379), int(parts.group(3) or 0)
        if not 1 <= port <= 65535 or database > last_database:
            raise ValueError(text)
        parse_host(host.strip("[]"))
        shown = f"{host}:{port}/{database}"
        return redis_address(f"redis://{shown}", shown)
    if text.startswith("sentinel:"):
        return parse_sentinels(text)
    url = urllib.parse.urlsplit(text)
    if url.scheme not in ("redis", "rediss", "unix") or not (url.hostname or url.scheme == "unix"):
        raise ValueError(text)
    if url.port == 0 or (url.scheme != "unix" and not re.fullmatch(r"(/[0-9]*/?)?", url.path)):
        raise ValueError(text)
    # Na URL, estas opções valeriam mais que as do programa, que depende das suas.
    if url_reserved & set(urllib.parse.parse_qs(url.query, keep_blank_values=True)):
        raise ValueError(text)
    # A conexão só é construída aqui para que o redis-py confira as opções da URL.
    try:
        connection = redis.ConnectionPool.from_url(text).make_connection()
        if not 0 <= int(connection.db) <= last_database:
            raise ValueError(text)
    except Exception as error:
        raise ValueError(text) from error
    # O database mostrado é o que vale, venha ele do caminho ou de "?db=".
    if url.scheme == "unix":
        return redis_address(text, f"unix://{connection.path}?db={connection.db}")
    parse_host(url.hostname)
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return redis_address(text, f"{url.scheme}://{host}:{connection.port}/{connection.db}")


text_kind = kind(str, "qualquer texto em UTF-8")
name_kind = pattern(name_expression, "um texto sem espaços, de um caractere ou mais")
queue_kind = pattern(f"({name_expression})?", "vazio ou um texto sem espaços")
host_kind = kind(parse_host, "um endereço IP (IPv6 sem colchetes) ou o nome desta máquina")
header_kind = pattern(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?", "um texto ASCII imprimível, de uma só linha")
line_kind = kind(parse_json_line, "um texto que não seja vazio")
switch_kind = kind(parse_switch, "on ou off")
tokens_kind = kind(parse_tokens, "vazio, ou um ou mais tokens em ASCII visível, separados por vírgula ou espaço")
names_kind = kind(parse_header_names, "vazio, none ou nomes de cabeçalhos separados por vírgula ou espaço")
origins_kind = kind(parse_origins, "vazio, um * sozinho ou uma lista de origens como https://exemplo.com.br")
redis_kind = kind(
    parse_redis_address,
    "ip:porta/database (127.0.0.1:6379/1), uma URL redis://, rediss:// ou unix://, ou "
    "sentinel://ip:porta,ip:porta/mestre/database",
)
day = 24 * 60 * 60 * 1000

settings = [
    setting("HTTP_PORT", ("-p", "--port"), integer(0, 65535), "8771", "HTTP", "",
            "porta HTTP; 0 escolhe uma porta livre, informada no log"),
    # O padrão é o da especificação; quem quer menos tem HTTP_HOST, AUTH_TOKEN e localhost-only.conf.
    setting("HTTP_HOST", ("--host",), host_kind, "0.0.0.0", "HTTP", "",  # nosec B104
            "endereço em que o servidor escuta; :: atende IPv6 e IPv4"),
    setting("HTTP_SERVER", ("--server",), choice("flask", "waitress"), "flask", "HTTP", "",
            "servidor HTTP que hospeda a aplicação"),
    setting("SERVERNAME", ("-s", "--servername"), header_kind, program, "HTTP", "",
            "nome do servidor, enviado no cabeçalho Server"),
    setting("AUTH_TOKEN", ("--auth-token",), tokens_kind, "", "HTTP", "",
            "token exigido em Authorization: Bearer, ou vários; vazio não exige", True),
    setting("HEADERS_EXCLUDE", ("--headers-exclude",), names_kind, "", "HTTP", "",
            "cabeçalhos que não vão para o Redis; vazio é authorization,cookie se houver AUTH_TOKEN"),
    setting("CORS_ORIGIN", ("--cors-origin",), origins_kind, "", "HTTP", "",
            "origens de navegador autorizadas por CORS; vazio desliga"),
    setting("TRUST_PROXY", ("--trust-proxy",), integer(0, 16), "0", "HTTP", "",
            "proxies reversos confiáveis à frente, que dizem em X-Forwarded-For quem é o cliente; 0 não acredita"),
    setting("REDIS_SERVER", ("-R", "--redis"), redis_kind, "127.0.0.1:6379/1", "Redis", "",
            "endereço do Redis"),
    setting("REDIS_PASSWORD", ("-S", "--secret"), text_kind, "", "Redis", "",
            "senha do Redis; vazio não autentica", True),
    setting("REDIS_CHANNEL", ("-C", "--channel"), name_kind, "ndjson_jobs", "Redis", "",
            "canal em que as tarefas são publicadas"),
    setting("REDIS_QUEUE", ("--queue",), queue_kind, "", "Redis", "",
            "lista em que as tarefas também entram, para workers que usam BLPOP; vazio desliga"),
    setting("REDIS_PREFIX", ("-X", "--prefix"), name_kind, "ndjson_task_", "Redis", "",
            "prefixo da chave da tarefa"),
    setting("REDIS_LIST_PREFIX", ("-L", "--list-prefix"), name_kind, "ndjson_list_", "Redis", "",
            "prefixo da lista em que o worker empurra as linhas"),
    setting("REDIS_TTL", ("--ttl",), integer(3, 31536000), "600", "Redis", "s",
            "validade das chaves da tarefa, renovada enquanto o streaming vive"),
    setting("REDIS_WAKE", ("--wake",), switch_kind, "on", "Redis", "",
            "o Redis avisa qual chave mudou, e a linha sai antes de INTERVAL"),
    setting("INTERVAL", ("-i", "--interval"), integer(1, day), "200", "Tempos", "ms",
            "espera máxima entre duas consultas à lista vazia"),
    setting("PAUSE", ("-P", "--pause"), integer(0, day), "20", "Tempos", "ms",
            "pausa depois de enviar uma linha; 0 envia em lotes"),
    setting("MAXTIME", ("-t", "--maxtime"), integer(1, day), "45000", "Tempos", "ms",
            "tempo máximo sem linha nova, contado da última linha ou da requisição"),
    setting("MAXTIME_ERROR", ("-E", "--maxtime-error"), line_kind, '{"error": "timeout"}', "Tempos", "",
            "linha enviada quando MAXTIME se esgota"),
    setting("HEARTBEAT", ("--heartbeat",), integer(0, day), "0", "Tempos", "ms",
            "silêncio após o qual HEARTBEAT_LINE é enviada; 0 desliga"),
    setting("HEARTBEAT_LINE", ("--heartbeat-line",), line_kind, '{"type": "ping"}', "Tempos", "",
            "linha que mantém viva uma conexão silenciosa; não conta para MAXTIME"),
    setting("DRAIN", ("--drain",), integer(0, day), "5000", "Tempos", "ms",
            "tempo que os streams têm para acabar quando o serviço para"),
    setting("MAX_STREAMS", ("--max-streams",), integer(1, 100000), "4096", "Limites", "",
            "streams simultâneos; um a mais recebe 503"),
    setting("MAX_BODY", ("--max-body",), integer(0, 536870912), "16777216", "Limites", "bytes",
            "tamanho máximo do corpo da requisição; maior recebe 413"),
    setting("REQUEST_TIMEOUT", ("--request-timeout",), integer(100, day), "30000", "Limites", "ms",
            "prazo para a requisição chegar inteira, com o corpo; vencido, recebe 408"),
    setting("ONE_CORE", ("--one-core",), switch_kind, "on", "Limites", "",
            "prende o processo a um núcleo: sob o GIL, os outros só atrasam a troca de threads"),
    setting("METRICS_PORT", ("--metrics-port",), integer(0, 65535), "0", "Métricas", "",
            "porta das métricas para o Prometheus, em /metrics; 0 desliga"),
    setting("METRICS_HOST", ("--metrics-host",), host_kind, "127.0.0.1", "Métricas", "",
            "endereço em que as métricas são servidas, sem senha"),
    setting("LOG_LEVEL", ("--log-level",), choice("debug", "info", "warning", "error"), "info", "Log", "",
            "nível mínimo das mensagens de log"),
    setting("ENV_FILE", ("-f", "--env-file"), pattern(r"[^\x00:]+(:[^\x00:]+)*", "o caminho de um arquivo, ou de vários separados por :"),
            "/etc/py-ndjson-proxy.env", "Arquivo", "",
            "arquivo de configurações, abaixo do ambiente e dos argumentos; de vários, o último é o mais forte"),
]

# Uma variável global por linha da tabela; load_settings lhes dá o valor.
HTTP_PORT: int = ...
HTTP_HOST: str = ...
HTTP_SERVER: str = ...
SERVERNAME: str = ...
AUTH_TOKEN: tuple = ...
HEADERS_EXCLUDE: frozenset = ...
CORS_ORIGIN: frozenset = ...
TRUST_PROXY: int = ...
REDIS_SERVER: redis_address = ...
REDIS_PASSWORD: str = ...
REDIS_CHANNEL: str = ...
REDIS_QUEUE: str = ...
REDIS_PREFIX: str = ...
REDIS_LIST_PREFIX: str = ...
REDIS_TTL: int = ...
REDIS_WAKE: bool = ...
INTERVAL: int = ...
PAUSE: int = ...
MAXTIME: int = ...
MAXTIME_ERROR: bytes = ...
HEARTBEAT: int = ...
HEARTBEAT_LINE: bytes = ...
DRAIN: int = ...
MAX_STREAMS: int = ...
MAX_BODY: int = ...
REQUEST_TIMEOUT: int = ...
ONE_CORE: bool = ...
METRICS_PORT: int = ...
METRICS_HOST: str = ...
LOG_LEVEL: str = ...
ENV_FILE: str = ...


class layered(typing.NamedTuple):
    """O texto efetivo de uma configuração e a camada de onde ele veio."""

    text: str
    layer: str


class help_formatter(argparse.HelpFormatter):
    """Ajuda do argparse com os títulos em português."""

    def add_usage(self, usage, actions, groups, prefix="uso: "):
        """Escreve a linha de uso.

        Argumentos:
            usage (str): texto de uso.
            actions (list): ações do argparse.
            groups (list): grupos do argparse.
            prefix (str): título da linha.
        """
        super().add_usage(usage, actions, groups, prefix)


def build_parser():
    """Monta o leitor de argumentos a partir da tabela.

    Retorna:
        argparse.ArgumentParser: cada configuração vira um atributo com o texto
        dado, ausente se o argumento não foi usado; mais check, version e help.
    """
    parser = argparse.ArgumentParser(
        prog=program, usage=f"{program} [opções]", add_help=False, allow_abbrev=False,
        exit_on_error=False, argument_default=argparse.SUPPRESS, formatter_class=help_formatter,
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
    parser = build_parser()
    try:
        known, unknown = parser.parse_known_args(argv)
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
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except FileNotFoundError:
        if not required:
            return {}
        raise configuration_error(f"ENV_FILE: o arquivo {path} não existe") from None
    except UnicodeDecodeError as error:
        raise configuration_error(f"ENV_FILE: o arquivo {path} não está em UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise configuration_error(f"ENV_FILE: o arquivo {path} não pode ser lido: {reason(error)}") from None
    for binding in dotenv.parser.parse_stream(io.StringIO(text)):
        if binding.error or (binding.key is not None and binding.value is None):
            raise configuration_error(
                f"ENV_FILE: a linha {binding.original.line} do arquivo {path} não tem a forma NOME=valor"
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
    names = [row.name for row in settings]
    warnings = []
    for name in values:
        if name in names:
            continue
        near = difflib.get_close_matches(name.upper(), names, 1, 0.5)
        hint = f"; a mais parecida é {near[0]}" if near else ""
        warnings.append(f"{name}, no arquivo {path}, não é uma configuração conhecida e foi ignorada{hint}")
    return warnings


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
    except ValueError:
        # Uma URL do Redis traz a senha antes do @ ou entre as opções, depois do "?".
        is_secret = row.secret or (row.name == "REDIS_SERVER" and re.search(r"[@?]", given.text))
        shown = "o valor dado" if is_secret else f"o valor {given.text!r}"
        raise configuration_error(
            f"{row.name}: {shown} ({given.layer}) não é válido; é permitido {row.allowed}"
        ) from None


def secret_arguments(arguments):
    """Acha os segredos dados na linha de comando.

    Argumentos:
        arguments (dict): nome da configuração -> texto, como em read_arguments.
    Retorna:
        list[setting]: linhas da tabela; a de REDIS_SERVER se a URL traz uma senha.
    """
    given = [row for row in settings if arguments.get(row.name)]
    return [row for row in given if row.secret or (row.name == "REDIS_SERVER" and has_password(arguments[row.name]))]


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
    warnings = []
    *common, last = named.split(":")
    for path in (*common, last):
        # Só o último arquivo que o operador nomeou precisa existir.
        values = read_env_file(path, required=path == last and "ENV_FILE" in upper)
        warnings += unknown_names(values, path)
        if values.pop("ENV_FILE", named) != named:
            warnings.append(f"ENV_FILE, dentro do arquivo {path}, não tem efeito")
        given |= {row.name: layered(values[row.name], f"arquivo {path}") for row in settings if row.name in values}
    given |= upper
    if given["AUTH_TOKEN"].text and not given["HEADERS_EXCLUDE"].text.strip():
        # O token, guardado no Redis, daria a quem o lê o direito de criar tarefas.
        given["HEADERS_EXCLUDE"] = layered("authorization,cookie", "padrão com AUTH_TOKEN")
    for row in settings:
        globals()[row.name] = parse_setting(row, given[row.name])
    check_combinations(given)
    warnings += [
        f"{row.name}: o argumento {row.flags[-1]} deixa o segredo à vista na lista de processos; "
        f"o lugar dele é o arquivo {last}" for row in secret_arguments(arguments)
    ]
    return actions, given, warnings


def check_combinations(given):
    """Confere as regras que envolvem duas configurações.

    Argumentos:
        given (dict): texto e camada de cada configuração.
    Levanta:
        configuration_error: se duas configurações não podem andar juntas.
    """
    if REDIS_PREFIX == REDIS_LIST_PREFIX:
        raise configuration_error(
            f"REDIS_LIST_PREFIX: o valor {REDIS_LIST_PREFIX!r} ({given['REDIS_LIST_PREFIX'].layer}) "
            "deve ser diferente de REDIS_PREFIX, pois uma chave do Redis só tem um tipo"
        )
    if METRICS_PORT and importlib.util.find_spec("prometheus_client") is None:
        raise configuration_error(
            f"METRICS_PORT: o valor {METRICS_PORT} ({given['METRICS_PORT'].layer}) pede o módulo prometheus_client, "
            "que falta; no Debian: apt install python3-prometheus-client"
        )
    if METRICS_PORT and METRICS_PORT == HTTP_PORT and (METRICS_HOST == HTTP_HOST or HTTP_HOST in ("0.0.0.0", "::")):
        raise configuration_error(
            f"METRICS_PORT: o valor {METRICS_PORT} ({given['METRICS_PORT'].layer}) deve ser diferente de HTTP_PORT"
        )
    for name, prefix in (("REDIS_PREFIX", REDIS_PREFIX), ("REDIS_LIST_PREFIX", REDIS_LIST_PREFIX)):
        if REDIS_QUEUE.startswith(prefix):
            raise configuration_error(
                f"REDIS_QUEUE: o valor {REDIS_QUEUE!r} ({given['REDIS_QUEUE'].layer}) não pode começar com "
                f"{name}, que é {prefix!r}: a fila seria tomada por uma chave de tarefa"
            )
    if PAUSE >= MAXTIME:
        raise configuration_error(
            f"PAUSE: o valor {PAUSE} ({given['PAUSE'].layer}) deve ser menor que MAXTIME, "
            f"que é {MAXTIME} ({given['MAXTIME'].layer}): toda linha terminaria em MAXTIME_ERROR"
        )


# =============================================================================
# Log e notificação do systemd
# =============================================================================

log = logging.getLogger(program)


def plural(count, one, many):
    """Escreve um número e o que ele conta.

    Argumentos:
        count (int): quantidade.
        one (str): palavras no singular.
        many (str): palavras no plural.
    Retorna:
        str: "1 stream", "2 streams".
    """
    return f"{count} {one if count == 1 else many}"


class log_formatter(logging.Formatter):
    """Formata uma linha de log: <N> para o journald, palavra do nível fora dele."""

    priorities: typing.ClassVar = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
    words: typing.ClassVar = {"WARNING": "aviso: ", "ERROR": "erro: ", "CRITICAL": "erro: "}

    def __init__(self, journal):
        """Guarda o destino.

        Argumentos:
            journal (bool): verdadeiro se a saída de erros é o journald.
        """
        super().__init__()
        self.journal = journal

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
        if self.journal:
            return f"<{self.priorities.get(record.levelname, 6)}>{text}"
        return self.words.get(record.levelname, "") + text


# Linhas de log que esperam por uma saída lenta; além delas, são perdidas e contadas.
log_lines = 10000
# Tempo máximo, em segundos, para escrever o que resta ao encerrar.
log_patience = 1.0


class log_queue(logging.handlers.QueueHandler):
    """Fila entre o programa e a saída de erros: uma saída presa não prende streams."""

    lost = 0

    def prepare(self, record):
        """Formata uma linha na thread de quem a escreve.

        Argumentos:
            record (logging.LogRecord): registro, que nenhum outro handler recebe: dispensa
                a cópia que o Python faria.
        Retorna:
            logging.LogRecord: o mesmo, com o texto pronto.
        """
        record.msg = self.format(record)
        record.args = record.exc_info = record.exc_text = record.stack_info = None
        return record

    def enqueue(self, record):
        """Guarda uma linha, ou a conta como perdida se a fila está cheia.

        Argumentos:
            record (logging.LogRecord): linha já formatada.
        """
        if self.queue.qsize() < log_lines:
            self.queue.put(record)
        else:
            self.lost += 1

    def drain(self):
        """Espera que as linhas guardadas sejam escritas, por log_patience segundos."""
        written = threading.Event()
        self.queue.put(written)
        written.wait(log_patience)


class log_writer(logging.handlers.QueueListener):
    """Escreve as linhas da fila, em sua própria thread."""

    def __init__(self, source, output):
        """Guarda de onde ler e onde escrever.

        Argumentos:
            source (log_queue): fila.
            output (logging.StreamHandler): saída.
        """
        super().__init__(source.queue, output)
        self.source, self.output = source, output

    def handle(self, record):
        """Escreve uma linha e conta as que se perderam antes dela.

        Argumentos:
            record (logging.LogRecord | threading.Event): linha já formatada, ou quem espera
                que se escrevam as anteriores.
        """
        if isinstance(record, threading.Event):
            record.set()
            return
        super().handle(record)
        lost, self.source.lost = self.source.lost, 0
        if lost:
            self.output.handle(self.source.prepare(logging.LogRecord(
                program, logging.WARNING, "", 0, "%d linhas de log se perderam: a saída de erros não as aceitava",
                (lost,), None,
            )))


# Tempo, em segundos, até repetir no log um aviso igual.
warning_interval = 60.0


class rare_warnings:
    """Avisos que outros podem provocar à vontade: cada um sai uma vez por minuto."""

    def __init__(self):
        """Começa sem nada a avisar."""
        self.lock = threading.Lock()
        self.told = {}

    def tell(self, text, subject=None):
        """Escreve um aviso, se for hora; senão, só o conta.

        Argumentos:
            text (str): frase para o operador.
            subject (str): o que torna iguais dois avisos; sem ele, a própria frase.
        """
        subject, now = subject or text, time.monotonic()
        with self.lock:
            due, count = self.told.get(subject, (0.0, 0))
            if now < due:
                self.told[subject] = (due, count + 1)
                return
            self.told = {name: row for name, row in self.told.items() if row[0] > now}
            self.told[subject] = (now + warning_interval, 0)
        log.warning("%s%s", text, f" (e outras {count} vezes desde o último aviso)" if count else "")


rare = rare_warnings()


def stderr_is_journal():
    """Descobre se a saída de erros vai para o journald.

    Retorna:
        bool: verdadeiro se JOURNAL_STREAM nomeia o mesmo dispositivo e inode.
    """
    try:
        status = os.fstat(sys.stderr.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    except (OSError, ValueError, AttributeError):
        return False


def configure_logging(level):
    """Prepara o log do programa e cala o dos servidores HTTP.

    Argumentos:
        level (str): debug, info, warning ou error.
    """
    # Sem isto, uma falha de escrita geraria um traceback a cada linha.
    logging.raiseExceptions = False
    # Nossas linhas não mostram de onde vêm: não se paga para descobri-lo.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = logging.logAsyncioTasks = False
    # A fila feita em C; a outra troca de thread mais de duas vezes por linha.
    handler = log_queue(queue.SimpleQueue())
    handler.setFormatter(log_formatter(stderr_is_journal()))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    log_writer(handler, logging.StreamHandler(sys.stderr)).start()
    log.setLevel(level.upper())
    # Os dois escrevem uma linha por requisição ou por fila; o que interessa ao
    # operador já sai nas nossas.
    for name in ("werkzeug", "waitress", "waitress.queue"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


system_reasons = {
    errno.ECONNREFUSED: "conexão recusada",
    errno.ECONNRESET: "a conexão foi cortada",
    errno.EPIPE: "a conexão foi cortada",
    errno.EADDRINUSE: "o endereço já está em uso",
    errno.EADDRNOTAVAIL: "o endereço não é desta máquina",
    errno.EACCES: "permissão negada",
    errno.EPERM: "operação não permitida",
    errno.ENOENT: "o arquivo não existe",
    errno.EISDIR: "é uma pasta, e não um arquivo",
    errno.EIO: "falha de leitura ou gravação",
    errno.ENOSPC: "não há espaço no disco",
    errno.ETIMEDOUT: "não houve resposta a tempo",
    errno.EHOSTUNREACH: "não há caminho até a máquina",
    errno.ENETUNREACH: "não há caminho até a rede",
    # Os de getaddrinfo são negativos e não se confundem com os outros.
    socket.EAI_NONAME: "o nome não existe",
    socket.EAI_NODATA: "o nome não tem endereço",
    socket.EAI_AGAIN: "o nome não pôde ser procurado agora",
}


def reason(error):
    """Diz em português por que algo falhou.

    Argumentos:
        error (Exception): erro do sistema ou do redis-py, que guarda a causa.
    Retorna:
        str: trecho de frase; sem tradução conhecida, as palavras do próprio erro.
    """
    cause = error
    while cause is not None and not isinstance(cause, redis.ResponseError | redis.AuthenticationError):
        if isinstance(cause, redis.sentinel.MasterNotFoundError):
            # As palavras deste trazem tudo o que há nas conexões, a senha inclusive.
            return "nenhuma sentinela diz quem é o mestre"
        if isinstance(cause, ssl.SSLError):
            # O errno destes não é um errno.
            return f"falha de TLS ({getattr(cause, 'verify_message', None) or cause.reason or cause})"
        if isinstance(cause, OSError) and cause.errno in system_reasons:
            return system_reasons[cause.errno]
        if isinstance(cause, redis.TimeoutError):
            return f"sem resposta em {redis_timeout:g} s"
        cause = cause.__cause__ or cause.__context__
    return getattr(error, "strerror", None) or redis_words(error)


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


def notify_systemd(state):
    """Informa o estado ao systemd (protocolo sd_notify).

    Argumentos:
        state (str): linhas NOME=valor, como READY=1.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), address)
    except OSError as error:
        log.debug("o systemd não recebeu a notificação: %s", reason(error))


# =============================================================================
# Redis
# =============================================================================

# Sem resposta por este tempo, em segundos, o Redis é dado como fora do ar.
redis_timeout = 2.0
# Tamanho, em bytes, de uma leitura da conexão com o Redis.
receive_size = 65536
# Bytes de avisos acumulados que se leem antes de os interpretar.
most_pending = 1 << 24

# Tirar uma linha precisa ser repetível: se a conexão cai depois do LPOP e antes
# da resposta, a linha não está mais na lista nem chegou aqui. Por isso o que sai
# da lista fica guardado, com o número do pedido, até o pedido seguinte; o pedido
# repetido recebe o guardado. Um número menor que o guardado é de um pedido que se
# atrasou na rede e já foi repetido por outra conexão: não pode tirar nada. TYPE e
# LPOP são um só passo: o fim só é declarado quando a chave sumiu E a lista se esvaziou
# no mesmo instante; se a chave sumiu e ainda há linhas, o tipo devolvido é "more".
take_script = """
local kind = redis.call('TYPE', KEYS[1]).ok
local past = tonumber(string.match(redis.call('GETRANGE', KEYS[3], 0, 19), '^%d+')) or 0
if past == tonumber(ARGV[1]) then
  local kept = redis.call('GET', KEYS[3])
  return cmsgpack.unpack(string.sub(kept, string.find(kept, ' ', 1, true) + 1))
end
if past > tonumber(ARGV[1]) then return {kind, {}} end
local lines, size = {}, 0
local function fill(source)
  while #lines < tonumber(ARGV[2]) and size < tonumber(ARGV[3]) do
    local line = redis.call('LPOP', source)
    if not line then break end
    size = size + #line
    lines[#lines + 1] = line
  end
end
fill(KEYS[2])
if #lines == 0 and kind == 'list' then fill(KEYS[1]) end
if #lines > 0 then
  if kind == 'none' and redis.call('EXISTS', KEYS[2]) == 1 then kind = 'more' end
  redis.call('SET', KEYS[3], ARGV[1] .. ' ' .. cmsgpack.pack({kind, lines}), 'EX', ARGV[4])
end
return {kind, lines}
"""

# Diz quais streams à espera têm o que buscar: linha na lista, tarefa apagada ou
# tarefa trocada por uma lista. KEYS são pares (tarefa, lista); devolve posições.
search_script = """
local found = {}
for i = 1, #KEYS, 2 do
  if redis.call('TYPE', KEYS[i]).ok ~= 'string' or redis.call('EXISTS', KEYS[i + 1]) == 1 then
    found[#found + 1] = (i - 1) / 2
  end
end
return found
"""


# Respostas do Redis que impedem a conexão; as do redis-py não derivam todas de ResponseError.
redis_refusals = (redis.ResponseError, redis.AuthenticationError, redis.BusyLoadingError)


def redis_pool():
    """Cria a fábrica de conexões do redis-py para REDIS_SERVER.

    Retorna:
        redis.ConnectionPool: só constrói conexões; não abre nenhuma.
    """
    options = {
        "socket_timeout": redis_timeout,
        # A repetição silenciosa do redis-py rodaria de novo um comando que já
        # rodou; quem decide o que pode ser repetido é o coletor.
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
    }
    # O aperto de mão do redis-py fica em RESP2, o que todas as versões sabem fazer (a 4 não
    # conhece o argumento; a 8 usaria RESP3); o coletor passa a RESP3 por conta própria.
    if int(redis.__version__.partition(".")[0]) >= 5:
        options["protocol"] = 2
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


def sentinel_pool(options):
    """Cria a fábrica de conexões com o mestre que as sentinelas apontam.

    Argumentos:
        options (dict): opções das conexões com o mestre.
    Retorna:
        redis.sentinel.SentinelConnectionPool: cada conexão pergunta de novo, ao ser
        aberta, quem é o mestre.
    """
    access = REDIS_SERVER.url.removeprefix("sentinel://").rpartition("@")[0]
    user, _, password = access.partition(":")
    hosts, master, database = REDIS_SERVER.shown.removeprefix("sentinel://").split("/")
    split = [urllib.parse.urlsplit(f"//{host}") for host in hosts.split(",")]
    # Uma sentinela muda não pode consumir o tempo de quem espera pela resposta.
    asking = {"socket_timeout": redis_timeout / 4, "socket_connect_timeout": redis_timeout / 4,
              "retry": options["retry"]}
    if access:
        asking |= {"username": urllib.parse.unquote(user) or None, "password": urllib.parse.unquote(password)}
    sentinels = redis.sentinel.Sentinel([(url.hostname, url.port or 26379) for url in split], sentinel_kwargs=asking)
    return redis.sentinel.SentinelConnectionPool(
        master, sentinels, socket_connect_timeout=redis_timeout / 2, socket_keepalive=True, db=int(database), **options,
    )


def set_deadline(connection, seconds):
    """Dá a um socket que espera um prazo do sistema para ler e para escrever.

    Ao contrário de um prazo do Python, não custa um poll() e uma disputa pelo GIL a
    cada chamada. Vencido, a chamada levanta BlockingIOError.

    Argumentos:
        connection (socket.socket): socket sem prazo do Python.
        seconds (float): prazo, em segundos.
    """
    limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1000000))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


class redis_link:
    """Uma conexão com o Redis, usada por uma só thread, que pode ser reaberta."""

    def __init__(self, pool, name):
        """Constrói a conexão sem abri-la.

        Argumentos:
            pool (redis.ConnectionPool): fábrica da conexão.
            name (str): nome mostrado por CLIENT LIST.
        """
        # A conexão que pergunta às sentinelas só guarda uma referência fraca.
        self.pool = pool
        self.connection = pool.make_connection()
        self.name = name
        self.is_open = self.is_tls = False
        self.socket = None
        self.buffer, self.position = b"", 0
        self.pushes = []

    def open(self):
        """Abre (ou reabre) a conexão, autentica e escolhe o database.

        Levanta:
            redis.RedisError: se o Redis não aceitar.
        """
        self.close()
        try:
            self.connection.connect()
            # O redis-py não publica o socket; o nome é o mesmo em todas as versões.
            self.socket = self.connection._sock
            self.is_open = True
            self.is_tls = isinstance(self.socket, ssl.SSLSocket)
            if not self.is_tls:
                # Um prazo do Python custaria um poll() por leitura e por escrita.
                self.socket.settimeout(None)
                set_deadline(self.socket, redis_timeout)
            # O nome só serve ao operador; uma ACL pode negá-lo.
            self.call([("CLIENT", "SETNAME", self.name)])
        except OSError as error:
            self.close()
            raise redis.ConnectionError(str(error)) from error
        except redis.RedisError:
            self.close()
            raise

    def close(self):
        """Fecha a conexão, se estiver aberta."""
        self.is_open = False
        self.socket = None
        self.buffer, self.position = b"", 0
        self.pushes = []
        self.connection.disconnect()

    def call(self, commands):
        """Envia comandos em uma só ida e volta.

        Argumentos:
            commands (list): comandos, cada um uma tuple com suas palavras ou os
                bytes de pack_command.
        Retorna:
            list: uma resposta por comando; um erro do Redis vem como a exceção
            redis.ResponseError, no lugar da resposta.
        Levanta:
            redis.ConnectionError, redis.TimeoutError: se a conexão falhar; não se
            sabe então quais comandos rodaram.
        """
        if not self.is_open:
            raise redis.ConnectionError("a conexão não está aberta")
        try:
            self.send(commands)
            return [self.read() for _ in commands]
        except (BlockingIOError, TimeoutError):
            raise redis.TimeoutError("sem resposta do Redis") from None
        except OSError as error:
            raise redis.ConnectionError(str(error)) from error

    def send(self, commands):
        """Envia comandos sem esperar pelas respostas.

        Argumentos:
            commands (list): comandos, como em call.
        Levanta:
            OSError: se a conexão falhar.
        """
        self.socket.sendall(b"".join([
            command if isinstance(command, bytes) else pack_command(len(command), pack_words(*command))
            for command in commands
        ]))

    def read(self):
        """Lê uma resposta, esperando por ela; guarda os avisos que vierem antes.

        Retorna:
            object: int, bytes, list, None ou redis.ResponseError.
        Levanta:
            OSError, redis.ConnectionError: se a conexão falhar.
            redis.InvalidResponse: se o que chegou não é do protocolo.
        """
        while True:
            if self.position == len(self.buffer):
                self.receive(1)
            is_push, reply, missing = self.next_reply()
            if missing:
                self.receive(missing)
            elif is_push:
                self.pushes.append(reply)
            else:
                return reply

    def next_reply(self):
        """Tira do buffer o que vem primeiro, uma resposta ou um aviso.

        Retorna:
            tuple: (verdadeiro se é um aviso, conteúdo, bytes que faltam); se faltam, nada
            foi tirado.
        Levanta:
            redis.InvalidResponse: se o que chegou não é do protocolo.
        """
        try:
            reply, end = parse_reply(self.buffer, self.position)
        except (ValueError, RecursionError):
            raise redis.InvalidResponse("resposta fora do protocolo") from None
        if end < 0:
            return False, None, -end
        is_push = self.buffer.startswith(b">", self.position)
        self.position = end
        return is_push, reply, 0

    def listen(self):
        """Lê, sem esperar, o que o Redis mandou sem que se pedisse: só avisos.

        Levanta:
            OSError, redis.ConnectionError: se a conexão falhar.
        """
        try:
            if self.is_tls:
                self.listen_tls()
                return
            self.receive(1, socket.MSG_DONTWAIT)
            if len(self.buffer) >= receive_size:
                # Um aviso de muitas chaves, interpretado de novo a cada pedaço, custaria o
                # quadrado do tamanho.
                self.receive(most_pending, socket.MSG_DONTWAIT)
        except (BlockingIOError, ssl.SSLWantReadError):
            pass

    def listen_tls(self):
        """Lê, sem esperar, o que há em uma conexão com TLS.

        Levanta:
            ssl.SSLWantReadError: lido tudo.
            OSError, redis.ConnectionError: se a conexão falhar.
        """
        self.socket.setblocking(False)
        try:
            # Um registro por vez; o último pode não ter chegado inteiro.
            self.receive(most_pending)
        finally:
            self.socket.settimeout(redis_timeout)

    def has_pushes(self):
        """Diz se há avisos a entregar, ou um começo de aviso.

        Retorna:
            bool: falso se tudo o que chegou eram respostas.
        """
        return bool(self.pushes) or self.position < len(self.buffer)

    def take_pushes(self):
        """Entrega os avisos que já chegaram inteiros.

        Retorna:
            list: um por aviso: nomes das chaves que mudaram, ou None se mudaram todas.
        Levanta:
            redis.InvalidResponse: se chegou uma resposta que ninguém pediu.
        """
        while self.position < len(self.buffer):
            is_push, reply, missing = self.next_reply()
            if missing:
                break
            if not is_push:
                raise redis.InvalidResponse("resposta sem pergunta")
            self.pushes.append(reply)
        pushes, self.pushes = self.pushes, []
        return [push[1] for push in pushes if push and push[0] == b"invalidate"]

    def receive(self, size, flags=0):
        """Acrescenta ao buffer o que chegar da conexão.

        Argumentos:
            size (int): mínimo de bytes que faltam à resposta.
            flags (int): opções do recv; no TLS, nenhuma.
        Levanta:
            OSError, redis.ConnectionError: se a conexão falhar; o que já chegou
            fica no buffer.
        """
        # Uma linha de muitos MB chega em milhares de pedaços: juntá-los um a um
        # custaria o quadrado do tamanho.
        parts = [self.buffer[self.position:]]
        try:
            while size > 0:
                part = self.socket.recv(receive_size, flags)
                if not part:
                    raise redis.ConnectionError("conexão fechada pelo servidor")
                parts.append(part)
                size -= len(part)
        finally:
            self.buffer, self.position = b"".join(parts), 0

    def fileno(self):
        """Descritor do socket, para o epoll.

        Retorna:
            int: descritor aberto.
        """
        return self.socket.fileno()


def pack_words(*words):
    """Escreve palavras no protocolo do Redis.

    Argumentos:
        words (bytes | str | int): palavras de um comando.
    Retorna:
        bytes: cada palavra com seu tamanho; a ser juntado por pack_command.
    """
    words = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


def pack_command(count, *parts):
    """Monta um comando com partes já escritas.

    O redis-py escreve qualquer comando, mas leva 1 µs por palavra; a consulta
    periódica tem milhares delas, sempre as mesmas.

    Argumentos:
        count (int): número de palavras.
        parts (bytes): palavras escritas por pack_words.
    Retorna:
        bytes: o comando no protocolo do Redis.
    """
    return b"*%d\r\n" % count + b"".join(parts)


def parse_reply(data, start):
    """Lê uma resposta ou um aviso do protocolo do Redis (RESP3).

    O redis-py também os lê, mas com dois recv() e seis ioctl() por resposta; esta
    leitura está no caminho de toda linha.

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
    if mark == b"$":
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


# Recusas que não são do comando, mas do estado do servidor, e passam: ele carrega os
# dados, é uma réplica (o mestre mudou) ou não consegue gravar em disco.
unable_codes = frozenset(("LOADING", "READONLY", "MASTERDOWN", "MISCONF", "CLUSTERDOWN", "NOREPLICAS"))


def is_unable(error):
    """Diz se o erro vale para qualquer comando, até o servidor mudar de estado.

    Argumentos:
        error (Exception): resposta do Redis, ou None.
    Retorna:
        bool: verdadeiro se é como se o Redis estivesse fora do ar.
    """
    return error_code(error) in unable_codes


def is_evalsha_denied(error):
    """Diz se o Redis negou rodar um script, e não o que ele faz.

    Argumentos:
        error (Exception): resposta do Redis, ou None.
    Retorna:
        bool: verdadeiro se o usuário não pode usar EVALSHA.
    """
    return error_code(error) == "NOPERM" and "'evalsha" in str(error)


def error_code(error):
    """Extrai o código de um erro do Redis.

    Argumentos:
        error (Exception): resposta ou falha da conexão.
    Retorna:
        str: a primeira palavra, como NOSCRIPT, se é uma resposta do Redis; senão "".
    """
    return str(error).partition(" ")[0] if isinstance(error, redis.ResponseError) else ""


def redis_ping():
    """Testa o Redis com o comando PING, através do coletor.

    Retorna:
        bool: verdadeiro se o Redis respondeu PONG a tempo.
    """
    answers = queue.SimpleQueue()
    hub.ping(answers)
    try:
        return answers.get(timeout=answer_timeout) is True
    except queue.Empty:
        return False


# =============================================================================
# Tarefas e linhas
# =============================================================================

class task_key_error(Exception):
    """A chave da tarefa foi trocada por algo que não é string nem lista."""


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
        tuple: (bytes com as linhas terminadas em LF; int com o número de linhas;
        bool verdadeiro se uma palavra de fim foi encontrada).
    """
    lines = []
    for element in elements:
        if len(element) < 16 and element.strip() in end_words:
            return b"".join(lines), len(lines), True
        if element:
            lines.append(normalize_line(element) + b"\n")
    return b"".join(lines), len(lines), False


def request_target(environ):
    """Separa caminho e consulta como o cliente os enviou, sem decodificar.

    Argumentos:
        environ (dict): ambiente WSGI; "ndjson.target" ou REQUEST_URI traz o alvo
            da linha de requisição em latin-1.
    Retorna:
        tuple: (caminho, consulta sem o "?"), dois str.
    """
    target = environ.get("ndjson.target") or environ["REQUEST_URI"]
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
    direct = environ.get("REMOTE_ADDR", "-")
    if not TRUST_PROXY:
        return direct
    hops = environ.get("HTTP_X_FORWARDED_FOR", "").rsplit(",", TRUST_PROXY)
    return forwarded_address(hops[-min(TRUST_PROXY, len(hops))]) or direct


def decode_header(value):
    """Recupera um cabeçalho que o WSGI entrega em latin-1.

    Argumentos:
        value (str): valor em latin-1.
    Retorna:
        str: o texto em UTF-8, ou o próprio valor se não for UTF-8.
    """
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return value


def build_task(name, request, body):
    """Compõe o JSON da tarefa.

    Argumentos:
        name (str): task_name, um UUIDv4.
        request (flask.Request): requisição.
        body (bytes): corpo como veio.
    Retorna:
        bytes: objeto JSON em UTF-8 com task_name, request_time (segundos desde a
        época, float), headers, body, task_key, task_list, method, path, query e
        remote_addr; body_encoding é "base64" se o corpo não for UTF-8.
    """
    path, query = request_target(request.environ)
    task = {
        "task_name": name,
        "request_time": time.time(),
        "headers": {
            key: decode_header(value) for key, value in request.headers.items() if key.lower() not in HEADERS_EXCLUDE
        },
        "body": "",
        "task_key": REDIS_PREFIX + name,
        "task_list": REDIS_LIST_PREFIX + name,
        "method": request.method,
        "path": path,
        "query": query,
        "remote_addr": client_address(request.environ),
    }
    try:
        task["body"] = body.decode("utf-8")
    except UnicodeDecodeError:
        task["body"] = base64.b64encode(body).decode("ascii")
        task["body_encoding"] = "base64"
    return json.dumps(task, ensure_ascii=False).encode("utf-8", "replace")


# =============================================================================
# Coletor: uma thread e uma conexão que perguntam ao Redis por todos os streams
# =============================================================================

# Limites de uma retirada com PAUSE=0 e de uma ida ao Redis: maiores rendem mais
# linhas por segundo, mas seguram por mais tempo os outros streams e a memória.
take_lines = 500
take_bytes = 262144
round_takes = 128
# Redes de segurança, em rodízio, a cada INTERVAL com avisos: streams contados, e tarefas
# examinadas uma a uma, pois a contagem não percebe uma tarefa trocada por uma lista.
count_size = 16
types_size = 1
# Espera máxima, em segundos, de uma requisição por uma resposta do coletor.
answer_timeout = 5.0
# Tempos do coletor, em segundos: tolerância para um aviso já a caminho, sinal de
# vida quando nada acontece, e informe ao systemd (WatchdogSec é 30).
wake_grace = 0.005
idle_ping = 15.0
status_interval = 5.0
# Uma recusa em menos deste tempo, em segundos, depois de outra faz esperar mais para reabrir.
refusal_memory = 5.0
# Espera, em segundos, para pedir de novo que se apaguem as chaves que o Redis recusou apagar.
removal_retry = 2.0
# Procura por listas órfãs: tempo entre duas voltas e entre dois passos de uma volta,
# em segundos, e chaves olhadas em um passo, que seguram o Redis por menos de 1 ms.
orphan_interval = 20.0
orphan_pause = 0.02
orphan_keys = 1000
# Posições da fila conferidas em um passo: cada uma custa um EXISTS.
queue_keys = 200
# Streams que acabam ao mesmo tempo: cada um põe uma thread a disputar o GIL com o coletor,
# e mil de uma vez atrasariam as linhas dos outros. Quem demora mais que ending_patience
# segundos, porque seu cliente não lê, não ocupa o lugar do próximo. Quem tem ainda linhas a
# enviar tem mais lugares: sem um, quem as envia é o coletor, à parte do fim.
most_endings = 4
most_last_lines = 16
ending_patience = 0.1


class batch_entry(typing.NamedTuple):
    """Comandos de um assunto dentro de uma ida ao Redis, e quem trata a resposta.

    on_reply recebe (subject, respostas); se a conexão caiu, no lugar das respostas
    vem a exceção, e o assunto deve ser refeito ou dado por perdido.
    """

    commands: list
    on_reply: typing.Callable
    subject: typing.Any


def first_error(replies):
    """Procura um erro entre as respostas do Redis.

    Argumentos:
        replies (list): respostas de redis_link.call.
    Retorna:
        redis.ResponseError: o primeiro erro, ou None.
    """
    return next((reply for reply in replies if isinstance(reply, redis.ResponseError)), None)


def slices(streams):
    """Divide uma lista de streams, para que um comando não segure o Redis.

    Argumentos:
        streams (list[stream]): streams.
    Retorna:
        list[list]: fatias de até 500 streams.
    """
    return [streams[start:start + 500] for start in range(0, len(streams), 500)]


def take_turn(streams, size):
    """Escolhe os streams da vez em um rodízio, e os põe no fim.

    Uma lista de todos custaria em proporção a quantos são; e um lugar contado do
    começo mudaria de dono com quem sai e quem volta.

    Argumentos:
        streams (dict): de stream a qualquer valor; na frente, os que esperam há mais tempo pela vez.
        size (int): quantos escolher.
    Retorna:
        list[stream]: até size streams.
    """
    part = list(itertools.islice(streams, size))
    for each in part:
        streams[each] = streams.pop(each)
    return part


class collector(threading.Thread):
    """Thread que conversa com o Redis em nome de todos os streams.

    As outras threads só chamam os métodos do primeiro grupo, que deixam um pedido
    na caixa de entrada; a resposta vai para a fila do stream. Todo o estado
    restante pertence a esta thread e dispensa travas. O custo acompanha o que
    acontece, e não quantos esperam: um stream à espera só é consultado quando um
    aviso ou a consulta periódica diz que há o que buscar.
    """

    def __init__(self):
        """Constrói o coletor sem abrir conexões (veja open_link)."""
        super().__init__(name="coletor", daemon=True)
        self.pool = redis_pool()
        self.link = redis_link(self.pool, program)
        self.inbox = collections.deque()
        self.alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.poller = select.epoll()
        self.poller.register(self.alarm, select.EPOLLIN)
        self.asleep = False
        self.order = itertools.count()
        self.names = {}
        self.clients = {}
        self.pings, self.submissions, self.removals, self.refused = [], [], [], []
        self.hungry, self.waiting = {}, {}
        self.endings, self.ending = collections.deque(), {}
        self.paused = []
        self.renewals = {}
        self.scripts = None
        self.take_head = b""
        self.link_fd = -1
        self.is_down = self.is_tracked = self.wake_refused = self.scripts_refused = False
        self.failures = self.refusals = self.cuts = self.returns = 0
        self.retry_at = self.census_at = self.moment = 0.0
        self.status_at = 0.0 if "NOTIFY_SOCKET" in os.environ else math.inf
        self.recount_at = self.stop_at = self.refused_at = math.inf
        self.refusal_at = -math.inf
        self.refusal = ""
        self.idle_at = time.monotonic() + idle_ping
        self.exams = {}
        self.suspects, self.counted, self.census_serial = [], [], 0
        self.cursor, self.orphan_at = b"0", 0.0
        self.strangers, self.orphans = [], []
        self.queue_at, self.queue_start = 0.0 if REDIS_QUEUE else math.inf, 0
        self.queued, self.expired = [], []

    # -- chamados pelas outras threads ----------------------------------------

    def post(self, action, *subjects):
        """Deixa um pedido na caixa de entrada e acorda o coletor se ele dorme.

        Argumentos:
            action (callable): método que rodará na thread do coletor.
            subjects (object): argumentos do método.
        """
        self.inbox.append((action, subjects))
        if self.asleep:
            os.eventfd_write(self.alarm, 1)

    def ping(self, answers):
        """Pede um PING; pedidos simultâneos são atendidos por um só.

        Argumentos:
            answers (queue.SimpleQueue): recebe True ou uma exceção.
        """
        self.post(self.accept_ping, answers)

    def submit(self, stream, payload):
        """Pede o SET da tarefa e o PUBLISH; o stream já fica à espera de linhas.

        Argumentos:
            stream (stream): sua fila recebe o número de ouvintes ou uma exceção.
            payload (bytes): JSON da tarefa.
        """
        self.post(self.accept_submission, stream, payload)

    def ask(self, stream, delay):
        """Pede as próximas linhas de um stream.

        Argumentos:
            stream (stream): sua fila recebe (lista de bytes, verdadeiro se são as
                últimas) ou o motivo do fim.
            delay (int): tempo a esperar antes de consultar, em ms.
        """
        self.post(self.accept_ask, stream, time.monotonic() + delay / 1000)

    def release(self, stream):
        """Encerra um stream: suas chaves serão apagadas do Redis.

        Argumentos:
            stream (stream): o stream encerrado.
        """
        self.post(self.accept_release, stream)

    def leave(self, stream):
        """Avisa que o cliente de um stream saiu, se não é o coletor quem o vigia.

        Argumentos:
            stream (stream): o stream.
        """
        self.post(self.finish, stream, ended_client)

    def broadcast(self, reason):
        """Encerra todos os streams vivos.

        Argumentos:
            reason (str): motivo do fim, entregue à fila de cada um.
        """
        self.post(self.accept_broadcast, reason)

    def stop(self, patience):
        """Para o coletor depois de apagar as chaves pendentes.

        Argumentos:
            patience (float): espera máxima, em segundos.
        """
        self.post(self.accept_stop, time.monotonic() + patience)
        self.join(patience + redis_timeout)

    # -- caixa de entrada (daqui em diante, só a thread do coletor) -----------

    def accept_ping(self, answers):
        """Anota um pedido de PING.

        Argumentos:
            answers (queue.SimpleQueue): fila de quem pediu.
        """
        self.pings.append((answers, 0))

    def accept_submission(self, stream, payload):
        """Anota uma tarefa a gravar; a partir daqui um aviso já acha o stream.

        Argumentos:
            stream (stream): stream da tarefa.
            payload (bytes): JSON da tarefa.
        """
        self.names[stream.key] = self.names[stream.list] = stream
        self.submissions.append((stream, payload))
        if stream.socket is not None:
            descriptor = stream.socket.fileno()
            self.clients[descriptor] = stream
            self.poller.register(descriptor, select.EPOLLRDHUP)

    def accept_ask(self, stream, due):
        """Anota que um stream quer linhas a partir de um instante.

        Argumentos:
            stream (stream): stream que pede.
            due (float): instante do relógio monotônico, em segundos.
        """
        if due <= time.monotonic():
            self.hungry[stream] = None
        else:
            heapq.heappush(self.paused, (due, next(self.order), stream))

    def accept_release(self, stream):
        """Esquece um stream e anota suas chaves para apagar.

        Argumentos:
            stream (stream): stream encerrado.
        """
        stream.ended = True
        self.hungry.pop(stream, None)
        self.waiting.pop(stream, None)
        self.renewals.pop(stream, None)
        self.exams.pop(stream, None)
        self.names.pop(stream.key, None)
        self.names.pop(stream.list, None)
        self.removals.append(stream)
        if self.ending.pop(stream, None) is not None:
            self.start_endings()
        for descriptor in [fd for fd in (stream.descriptor,) if self.clients.get(fd) is stream]:
            self.forget_client(descriptor)

    def accept_broadcast(self, reason):
        """Entrega um motivo de fim a todos os streams.

        Argumentos:
            reason (str): motivo do fim.
        """
        for stream in set(self.names.values()):
            stream.answers.put(stream.fate or reason)

    def accept_stop(self, deadline):
        """Anota o prazo para parar e encerra o que restou.

        Um cliente que não lê prende a sua thread, que não chega a encerrar o
        stream; suas chaves são apagadas mesmo assim.

        Argumentos:
            deadline (float): instante do relógio monotônico, em segundos.
        """
        self.stop_at = deadline
        for stream in set(self.names.values()):
            self.accept_release(stream)

    # -- laço -----------------------------------------------------------------

    def run(self):
        """Repete: dormir até haver o que fazer, ler os pedidos, ir ao Redis."""
        while not self.is_finished():
            try:
                self.sleep()
                self.read_inbox()
                now = time.monotonic()
                if now >= self.moment:
                    self.run_timers(now)
                if self.link.is_open or self.reconnect():
                    self.go_to_redis(time.monotonic())
            except Exception as error:
                # Um defeito nosso não pode deixar todos os clientes sem resposta.
                log.error("falha interna no coletor: %s: %s", type(error).__name__, error)
                log.debug("falha interna no coletor", exc_info=True)
                self.lose_link(error)
        self.link.close()

    def is_finished(self):
        """Diz se o coletor pode parar.

        Retorna:
            bool: verdadeiro se a parada foi pedida e nada resta a fazer, ou se o
            prazo passou.
        """
        if self.stop_at == math.inf:
            return False
        idle = not (self.inbox or self.removals or self.submissions or self.pings)
        return idle or time.monotonic() >= self.stop_at

    def sleep(self):
        """Dorme até um pedido, um aviso, um cliente que sai ou o próximo prazo."""
        self.moment = self.next_moment()
        timeout = max(0.0, self.moment - time.monotonic())
        self.asleep = True
        # A caixa é olhada depois de asleep: quem chegou antes não tocou o alarme.
        events = self.poller.poll(0 if self.inbox else timeout)
        self.asleep = False
        if meter is not None:
            meter.note_wake(self.moment, time.monotonic())
        for descriptor, _ in events:
            if descriptor == self.alarm:
                os.eventfd_read(self.alarm)
            elif descriptor == self.link_fd:
                self.read_wake_ups()
            else:
                self.check_client(descriptor)

    def next_moment(self):
        """Calcula quando o coletor precisa agir, mesmo sem nada acontecer.

        Retorna:
            float: instante do relógio monotônico, em segundos.
        """
        moments = [self.stop_at, self.status_at]
        if self.endings:
            moments.append(self.next_ending())
        if not self.link.is_open:
            return min(*moments, self.retry_at)
        if any((self.hungry, self.removals, self.suspects, self.strangers, self.orphans, self.queued, self.expired)):
            return 0.0
        moments += [self.idle_at, self.recount_at, self.orphan_at, self.refused_at, self.queue_at]
        if self.waiting:
            moments.append(self.census_at)
        if self.paused:
            moments.append(self.paused[0][0])
        if self.renewals:
            moments.append(next(iter(self.renewals.values())))
        return min(moments)

    def read_inbox(self):
        """Executa os pedidos das outras threads, na ordem em que chegaram."""
        for _ in range(len(self.inbox)):
            action, subjects = self.inbox.popleft()
            action(*subjects)

    def run_timers(self, now):
        """Trata o que venceu e não depende do Redis.

        Argumentos:
            now (float): instante do relógio monotônico, em segundos.
        """
        while self.endings and self.next_ending() <= now:
            del self.ending[next(iter(self.ending))]
            self.start_endings()
        while self.paused and self.paused[0][0] <= now:
            stream = heapq.heappop(self.paused)[2]
            if not stream.ended:
                self.hungry[stream] = None
        if now >= self.refused_at:
            self.removals += self.refused
            self.refused, self.refused_at = [], math.inf
        if now >= self.status_at:
            self.tell_systemd(now)

    def hurry_status(self):
        """Antecipa o informe ao systemd, se houver um systemd a informar."""
        if self.status_at < math.inf:
            self.status_at = 0.0

    def tell_systemd(self, now):
        """Informa o estado ao systemd e alimenta o vigia (WatchdogSec).

        É o coletor quem informa: se ele travar, o systemd reinicia o serviço.

        Argumentos:
            now (float): instante do relógio monotônico, em segundos.
        """
        self.status_at = now + status_interval
        state = "fora do ar" if self.is_down else "no ar"
        notify_systemd(
            f"WATCHDOG=1\nSTATUS=Redis {state}; streams vivos: {gate.alive}; tarefas atendidas: {gate.served}"
        )

    # -- fins -----------------------------------------------------------------

    def finish(self, stream, reason):
        """Diz a um stream que acabou, quando chegar a sua vez.

        Argumentos:
            stream (stream): stream vivo.
            reason (str): motivo do fim.
        """
        stream.fate = reason
        self.endings.append(stream)
        self.start_endings()

    def finish_lines(self, stream, lines):
        """Entrega as últimas linhas de um stream.

        Argumentos:
            stream (stream): stream vivo.
            lines (list[bytes]): linhas tiradas.
        """
        if len(self.ending) < most_last_lines:
            self.start_ending(stream, (lines, True))
        else:
            # Só o fim espera por um lugar: as linhas, não.
            stream.send_now(lines)
            self.finish(stream, ended_done)

    def start_endings(self):
        """Acorda os próximos streams que acabaram, enquanto houver lugar."""
        while self.endings and len(self.ending) < most_endings:
            stream = self.endings.popleft()
            if stream.turn.locked():
                # Sua thread está enviando, talvez a um cliente que não lê: nada a acordar.
                stream.answers.put(stream.fate)
            elif not stream.ended:
                self.start_ending(stream, stream.fate)

    def next_ending(self):
        """Diz quando o lugar de quem acaba há mais tempo passa a outro.

        Retorna:
            float: instante do relógio monotônico, em segundos.
        """
        return next(iter(self.ending.values()))

    def start_ending(self, stream, answer):
        """Dá a um stream a sua última resposta.

        Argumentos:
            stream (stream): stream vivo.
            answer (str | tuple): motivo do fim, ou as últimas linhas.
        """
        self.ending[stream] = time.monotonic() + ending_patience
        stream.answers.put(answer)

    # -- clientes -------------------------------------------------------------

    def check_client(self, descriptor):
        """Encerra o stream de um cliente que fechou a conexão.

        Argumentos:
            descriptor (int): descritor do socket do cliente.
        """
        stream = self.clients.get(descriptor)
        if stream is not None:
            self.finish(stream, ended_client)
        self.forget_client(descriptor)

    def forget_client(self, descriptor):
        """Para de vigiar o socket de um cliente.

        Argumentos:
            descriptor (int): descritor do socket, talvez já fechado.
        """
        self.clients.pop(descriptor, None)
        with contextlib.suppress(OSError, ValueError):
            self.poller.unregister(descriptor)

    # -- conexões -------------------------------------------------------------

    def open_link(self):
        """Abre a conexão, carrega os scripts e liga os avisos.

        Levanta:
            redis.RedisError: se o Redis não atender.
        """
        self.link.open()
        try:
            # Apagar o que não existe não muda nada, e uma réplica recusa.
            pong, trial, *digests = self.link.call([
                ("PING",), ("UNLINK", REDIS_LIST_PREFIX),
                ("SCRIPT", "LOAD", take_script), ("SCRIPT", "LOAD", search_script),
            ])
            if isinstance(pong, redis.ResponseError):
                raise pong
            if is_unable(trial):
                raise trial
            # Quem pode carregar um script pode não poder rodá-lo.
            refusal = first_error(digests) or first_error(self.link.call([("EVALSHA", digests[1], 0)]))
        except redis.RedisError:
            self.link.close()
            raise
        self.scripts = None if refusal else digests
        self.take_head = pack_words("EVALSHA", digests[0], 3) if self.scripts else b""
        if refusal and not self.scripts_refused:
            log.warning(
                "o Redis não aceita scripts (%s): as linhas são tiradas com LPOP simples, e uma queda "
                "da conexão pode perder a que estava a caminho", reason(refusal),
            )
        self.scripts_refused = refusal is not None
        if REDIS_WAKE:
            self.ask_wake_ups()
        self.link_fd = self.link.fileno()
        # Um cliente que acaba de sair pode ter deixado este número, e esquecê-lo tiraria a
        # conexão do epoll.
        self.clients.pop(self.link_fd, None)
        self.poller.register(self.link_fd, select.EPOLLIN | select.EPOLLRDHUP)
        self.failures = 0
        # O que mudou enquanto ninguém avisava é procurado agora. Contar não bastaria: não
        # mostra uma tarefa trocada por uma lista.
        self.suspects = list(self.waiting)
        self.schedule_census(time.monotonic())

    def ask_wake_ups(self):
        """Pede ao Redis que avise, por esta conexão, das chaves que mudarem.

        Em RESP3 os avisos vêm em meio às respostas, em ordem: depois de uma resposta,
        todo aviso do que aconteceu antes dela já chegou, ou chega logo a seguir.

        Levanta:
            redis.RedisError: se a conexão falhar.
        """
        # Em RESP2 o Redis aceitaria o pedido, e trabalharia por avisos que não tem como mandar.
        refusal = first_error(self.link.call([("HELLO", 3)])) or first_error(self.link.call([tracking_command()]))
        self.is_tracked = refusal is None
        if refusal and not self.wake_refused:
            log.warning("REDIS_WAKE: o Redis recusou os avisos (%s); fica só a consulta periódica", reason(refusal))
        if self.is_tracked and self.wake_refused:
            log.info("REDIS_WAKE: avisos do Redis restabelecidos")
        self.wake_refused = refusal is not None

    def lose_link(self, error):
        """Fecha a conexão, se outra resposta da mesma ida já não o fez.

        Argumentos:
            error (Exception): a causa.
        """
        if self.link.is_open:
            self.note_failure(error)

    def note_failure(self, error):
        """Registra que a conexão caiu ou não abriu; a próxima volta a reabre.

        Argumentos:
            error (Exception): a causa.
        """
        now, is_refused = time.monotonic(), isinstance(error, redis_refusals)
        self.link.close()
        self.link_fd, self.is_tracked = -1, False
        if not self.is_down:
            self.cuts += 1
            log.warning("Redis fora do ar: %s", reason(error))
            self.hurry_status()
        elif is_refused and str(error) != self.refusal:
            # Ele atende de novo, mas recusa: é isso que o operador precisa saber.
            log.warning("Redis ainda fora do ar: %s", reason(error))
        self.is_down, self.refusal = True, str(error)
        if is_refused:
            # Uma recusa que dura, como a de uma ACL, seria achada de novo logo depois de reabrir.
            self.refusals = self.refusals + 1 if now < self.refusal_at + refusal_memory else 0
            self.refusal_at = now
            self.failures = max(self.failures, self.refusals)
        self.retry_at = now + min(1.0, 0.05 * 2 ** min(self.failures, 6)) * (self.failures > 0)
        self.failures += 1

    def reconnect(self):
        """Tenta reabrir a conexão, se for hora ou se alguém espera.

        Retorna:
            bool: verdadeiro se o Redis está de volta.
        """
        if not (self.pings or self.submissions) and time.monotonic() < self.retry_at:
            return False
        failures = self.failures
        try:
            self.open_link()
        except (redis.RedisError, OSError) as error:
            self.failures = failures
            self.note_failure(error)
            # Quem chegou durante a tentativa não espera por outra.
            self.read_inbox()
            self.refuse(error)
            return False
        self.is_down = False
        self.returns += 1
        self.hurry_status()
        log.info("Redis de volta")
        return True

    def refuse(self, error):
        """Responde com erro a quem espera pelo Redis.

        Argumentos:
            error (Exception): a causa.
        """
        for answers, _ in self.pings:
            answers.put(error)
        for stream, _ in self.submissions:
            stream.answers.put(error)
        self.pings, self.submissions = [], []

    # -- avisos ---------------------------------------------------------------

    def read_wake_ups(self):
        """Lê os avisos que chegaram enquanto o coletor dormia, ou a queda da conexão."""
        try:
            self.link.listen()
        except (redis.RedisError, OSError) as error:
            self.lose_link(error)
            return
        self.hear_wake_ups()

    def hear_wake_ups(self):
        """Acorda os streams de que falam os avisos já lidos."""
        try:
            pushes = self.link.take_pushes()
        except redis.RedisError as error:
            self.lose_link(error)
            return
        for keys in pushes:
            # FLUSHALL e FLUSHDB avisam sem nomear chaves.
            self.wake_streams(list(self.names) if keys is None else keys)

    def wake_streams(self, keys):
        """Põe na fila da próxima ida os streams à espera cujas chaves mudaram.

        Argumentos:
            keys (list[bytes]): chaves, nossas ou de outro proxy no mesmo Redis.
        """
        for key in keys:
            stream = self.names.get(key)
            if stream is not None:
                self.rouse(stream)

    def rouse(self, stream):
        """Põe um stream na fila da próxima ida, se ele está à espera.

        Argumentos:
            stream (stream): stream que pode ter o que buscar.
        """
        if self.waiting.pop(stream, None) is not None:
            self.hungry[stream] = None

    # -- ida ao Redis ---------------------------------------------------------

    def go_to_redis(self, now):
        """Faz em uma só ida tudo o que está pendente e distribui as respostas.

        Argumentos:
            now (float): instante do relógio monotônico, em segundos.
        """
        batch = self.build_batch(now)
        if not batch:
            return
        self.idle_at = now + idle_ping
        commands = [command for entry in batch for command in entry.commands]
        try:
            replies = self.link.call(commands)
        except (redis.RedisError, OSError) as error:
            self.lose_link(error)
            for entry in batch:
                entry.on_reply(entry.subject, error)
            if isinstance(error, redis.TimeoutError):
                # Quem chegou durante a espera não espera por outra.
                self.read_inbox()
                self.refuse(error)
            return
        if meter is not None:
            meter.note_round(len(commands), time.monotonic() - now)
        position = 0
        for entry in batch:
            entry.on_reply(entry.subject, replies[position:position + len(entry.commands)])
            position += len(entry.commands)
        # Depois das respostas: um aviso que chegou no meio delas pode ser de uma linha posta
        # depois da retirada que a teria levado.
        if self.link.has_pushes():
            self.hear_wake_ups()

    def build_batch(self, now):
        """Reúne os comandos pendentes.

        Argumentos:
            now (float): instante do relógio monotônico, em segundos.
        Retorna:
            list[batch_entry]: vazia se não há o que fazer.
        """
        batch = []
        if self.pings or now >= self.idle_at:
            batch.append(batch_entry([("PING",)], self.on_ping, self.pings))
            self.pings = []
        batch += [
            batch_entry(submit_commands(stream, payload), self.on_submission, stream)
            for stream, payload in self.submissions
        ]
        self.submissions = []
        if self.removals:
            batch.append(batch_entry(removal_commands(self.removals), self.on_removal, self.removals))
            self.removals = []
        # Acordado antes da hora, só há o que o acordou: uma linha não espera pelo exame do resto.
        is_due = now >= self.moment
        if is_due:
            # Antes das retiradas e da procura: NOLOOP cala a mudança de uma chave que nós, depois de
            # um worker e no mesmo instante do Redis, também mudamos, e EXPIRE é mudar.
            batch += self.build_renewal(now)
        takes = list(itertools.islice(self.hungry, round_takes))
        for stream in takes:
            del self.hungry[stream]
            batch.append(batch_entry(self.take_commands(stream), self.on_take, stream))
        if is_due:
            batch += self.build_census(now) + self.build_orphans(now) + self.build_queue(now)
        return batch

    def build_census(self, now):
        """Monta a consulta periódica, que responde por todos os que esperam.

        Com os avisos ligados basta prová-los e contar alguns: quase sempre não há nada a
        buscar. Se a conta não fecha, quase sempre é um aviso a caminho: depois de wake_grace,
        recontam-se, em fatias, os que ainda esperam, e só na fatia que não fecha procura-se
        quem é.

        Argumentos:
            now (float): instante do relógio monotônico, em segundos.
        Retorna:
            list[batch_entry]: vazia se ainda não é hora.
        """
        if not self.waiting:
            self.recount_at, self.suspects, self.counted = math.inf, [], []
            return []
        batch = []
        if now >= self.recount_at:
            self.recount_at = math.inf
            # Quem voltou a esperar depois da conta não foi contado.
            old = [stream for stream in self.counted if self.waiting.get(stream, math.inf) <= self.census_serial]
            batch += [self.count_entry(part, self.on_recount) for part in slices(old)]
        if now >= self.census_at:
            self.schedule_census(now)
            batch += self.build_count()
        suspects, self.suspects = self.suspects, []
        if self.scripts is None:
            for stream in suspects:
                self.rouse(stream)
            return batch
        return batch + [
            batch_entry([pack_command(
                3 + 2 * len(part), pack_words("EVALSHA", self.scripts[1], 2 * len(part)),
                *[keys for s in part for keys in (s.packed_key, s.packed_list)],
            )], self.on_search, part)
            for part in slices(suspects)
        ]

    def schedule_census(self, now):
        """Marca a próxima consulta periódica.

        Argumentos:
            now (float): instante do relógio monotônico, em segundos.
        """
        self.census_at = now + INTERVAL / 1000

    def build_count(self):
        """Monta a prova dos avisos e uma contagem; sem avisos, a procura.

        A prova confirma que o Redis ainda os manda por esta conexão: a ordem dela garante
        o resto.

        Retorna:
            list[batch_entry]: a prova, o exame de algumas tarefas e a contagem de alguns
            streams, em rodízio; vazia sem avisos.
        """
        if not self.is_tracked:
            self.suspects = list(self.waiting)
            return []
        self.census_serial = next(self.order)
        counted = take_turn(self.waiting, count_size)
        # Quem não espera está em uma retirada, que também lê o tipo.
        typed = [each for each in take_turn(self.exams, types_size) if each in self.waiting]
        return [
            batch_entry([("CLIENT", "GETREDIR")], self.on_proof, None),
            batch_entry([("TYPE", s.key) for s in typed], self.on_types, typed),
            self.count_entry(counted, self.on_count),
        ]

    def count_entry(self, streams, on_reply):
        """Monta a contagem das listas e das tarefas que existem.

        Argumentos:
            streams (list[stream]): streams à espera.
            on_reply (callable): quem trata a resposta.
        Retorna:
            batch_entry: dois comandos, seja qual for o número de streams.
        """
        words = 1 + len(streams)
        head = pack_words("EXISTS")
        return batch_entry([
            pack_command(words, head, *[s.packed_list for s in streams]),
            pack_command(words, head, *[s.packed_key for s in streams]),
        ], on_reply, streams)

    def build_renewal(self, now):
        """Monta a renovação da validade das chaves dos streams vivos.

        Argumentos:
            now (float): instante do relógio monotônico, em segundos.
        Retorna:
            list[batch_entry]: no máximo uma entrada.
        """
        # Estão em ordem, pois todos têm o mesmo prazo; quem é renovado vai para o fim.
        if not self.renewals or next(iter(self.renewals.values())) > now:
            return []
        due = itertools.takewhile(lambda item: item[1] <= now, self.renewals.items())
        streams = [stream for stream, _ in itertools.islice(due, 500)]
        for stream in streams:
            del self.renewals[stream]
            self.renewals[stream] = now + REDIS_TTL / 3
        self.suspects += [stream for stream in streams if stream in self.waiting]
        # Quem espera tem a lista vazia, e uma lista vazia não existe; a chave das linhas
        # tiradas só serve à retirada que a gravou, com uma validade inteira.
        keys = [key for each in streams for key in ((each.key,) if each in self.waiting else (each.key, each.list))]
        return [batch_entry([("EXPIRE", key, REDIS_TTL) for key in keys], self.on_renewal, None)]

    def build_orphans(self, now):
        """Monta um passo da procura por listas órfãs.

        Um worker que empurra depois do fim da tarefa, ou depois de o proxy ser morto,
        recria a lista sem validade, e ela ficaria no Redis para sempre; também a que
        ele pôs no lugar da tarefa, na leitura literal.

        Argumentos:
            now (float): instante do relógio monotônico, em segundos.
        Retorna:
            list[batch_entry]: vazia se não é hora.
        """
        batch = []
        if self.orphans:
            orphans, self.orphans = self.orphans, []
            batch.append(batch_entry([("EXPIRE", name, REDIS_TTL) for name in orphans], self.on_renewal, None))
        if self.strangers:
            strangers, self.strangers = self.strangers, []
            commands = [each for name, other in strangers for each in (("EXISTS", other), ("TTL", name))]
            batch.append(batch_entry(commands, self.on_strangers, [name for name, _ in strangers]))
        if now >= self.orphan_at:
            self.orphan_at = math.inf
            # Uma volta só para as duas formas de lista: o que custa é percorrer o banco.
            prefix = os.path.commonprefix([REDIS_LIST_PREFIX, REDIS_PREFIX])
            pattern = re.sub(r"([*?\[\]\\])", r"\\\1", prefix) + "*"
            command = ("SCAN", self.cursor, "MATCH", pattern, "COUNT", orphan_keys, "TYPE", "list")
            batch.append(batch_entry([command], self.on_scan, None))
        return batch

    def build_queue(self, now):
        """Monta um passo da procura por tarefas mortas na fila.

        Todo fim tira a sua tarefa da fila; um proxy morto deixa nela as que tinha, e
        sem um worker elas ficariam para sempre.

        Argumentos:
            now (float): instante do relógio monotônico, em segundos.
        Retorna:
            list[batch_entry]: vazia se não é hora.
        """
        batch = []
        if self.expired:
            expired, self.expired = self.expired, []
            batch.append(batch_entry([("LREM", REDIS_QUEUE, 1, key) for key in expired], self.on_cleaning, None))
        if self.queued:
            queued, self.queued = self.queued, []
            batch.append(batch_entry([("EXISTS", key) for key in queued], self.on_queued, queued))
        if now >= self.queue_at:
            self.queue_at = math.inf
            command = ("LRANGE", REDIS_QUEUE, self.queue_start, self.queue_start + queue_keys - 1)
            batch.append(batch_entry([command], self.on_queue, None))
        return batch

    def take_commands(self, stream):
        """Monta a retirada de linhas de um stream.

        Argumentos:
            stream (stream): stream que pediu linhas.
        Retorna:
            list: comandos; a última resposta traz [tipo da chave, linhas].
        """
        if self.scripts is None:
            return [("MULTI",), ("TYPE", stream.key), ("LPOP", stream.source, self.most_lines()), ("EXEC",)]
        return [stream.packed_take or self.pack_take(stream)]

    def pack_take(self, stream):
        """Escreve a retirada pelo script.

        Argumentos:
            stream (stream): stream que pede linhas.
        Retorna:
            bytes: o comando no protocolo do Redis.
        """
        return pack_command(10, self.take_head, stream.packed_keys, pack_words(
            stream.sequence, self.most_lines(), take_bytes, REDIS_TTL,
        ))

    def most_lines(self):
        """Diz quantas linhas uma retirada pode trazer.

        Retorna:
            int: uma, se há uma pausa depois de cada linha.
        """
        return 1 if PAUSE else take_lines

    def wait_for_lines(self, stream):
        """Deixa um stream à espera de um aviso ou da consulta periódica.

        Argumentos:
            stream (stream): stream sem linhas na lista.
        """
        if not self.waiting:
            # O primeiro a esperar terá um INTERVAL inteiro.
            self.schedule_census(time.monotonic())
        self.waiting[stream] = next(self.order)
        self.exams.setdefault(stream)
        # Pronta agora, a retirada sai mais cedo quando o aviso chegar.
        stream.packed_take = self.pack_take(stream) if self.scripts else None

    # -- respostas ------------------------------------------------------------

    def is_good(self, replies, complaint):
        """Diz se as respostas de uma tarefa de rotina servem, e registra a recusa.

        Argumentos:
            replies (list | Exception): respostas ou a falha da conexão.
            complaint (str): o que deixa de ser feito, para o operador.
        Retorna:
            bool: falso se a conexão falhou ou se o Redis recusou.
        """
        if isinstance(replies, Exception):
            return False
        error = first_error(replies)
        if error is not None:
            rare.tell(f"{complaint}: {reason(error)}")
        return error is None

    def on_ping(self, subject, replies):
        """Responde a quem pediu PING.

        Argumentos:
            subject (list): pares (fila, número de tentativas).
            replies (list | Exception): respostas ou a falha da conexão.
        """
        if isinstance(replies, Exception):
            # Uma conexão que o Redis fechou enquanto dormia não prova que ele
            # caiu: vale uma segunda tentativa. Já o silêncio prova.
            late = isinstance(replies, redis.TimeoutError)
            for answers, tries in subject:
                if late or tries:
                    answers.put(replies)
                else:
                    self.pings.append((answers, 1))
            return
        answer = True if replies[0] == b"PONG" else replies[0]
        if answer is not True:
            rare.tell(f"o Redis recusou o PING: {reason(answer)}")
        for answers, _ in subject:
            answers.put(answer)

    def on_submission(self, stream, replies):
        """Trata a resposta de SET e PUBLISH.

        Argumentos:
            stream (stream): stream da tarefa.
            replies (list | Exception): respostas ou a falha da conexão.
        """
        # Dentro da transação, só a fila pode falhar: não é uma lista.
        error = replies if isinstance(replies, Exception) else first_error(replies) or first_error(replies[-1])
        if is_unable(error):
            self.lose_link(error)
        if error is None and not stream.ended:
            self.wait_for_lines(stream)
            self.renewals[stream] = time.monotonic() + REDIS_TTL / 3
        stream.answers.put(replies[-1][-1] if error is None else error)

    def on_removal(self, streams, replies):
        """Confere se as chaves foram apagadas.

        Argumentos:
            streams (list[stream]): streams encerrados.
            replies (list | Exception): respostas ou a falha da conexão.
        """
        if isinstance(replies, Exception):
            # Se o Redis demorar a voltar, a validade das chaves faz o serviço.
            self.removals = (streams + self.removals)[:10000]
        elif not self.is_good(replies[:1], "o Redis não apagou as chaves das tarefas"):
            self.refused = (streams + self.refused)[:10000]
            self.refused_at = time.monotonic() + removal_retry
        else:
            # Repetir não ajudaria: a procura na fila tira depois o que ficou.
            self.on_cleaning(None, replies)

    def on_take(self, stream, replies):
        """Entrega ao stream as linhas tiradas, ou o deixa à espera.

        Argumentos:
            stream (stream): stream que pediu linhas.
            replies (list | Exception): respostas ou a falha da conexão.
        """
        if stream.ended:
            return
        stream.packed_take = None
        if isinstance(replies, Exception):
            self.hungry[stream] = None
            return
        if self.scripts is None or isinstance(replies[0], redis.ResponseError):
            # Dentro de uma transação o erro vem entre as respostas do EXEC.
            error = first_error(replies) or first_error(replies[-1])
            if error is not None:
                self.on_refused_take(stream, error)
                return
        type_name, lines = replies[-1]
        if lines:
            stream.sequence += 1
            # Sem scripts só a próxima consulta dirá se a lista se esvaziou.
            if type_name == b"none" and self.scripts is not None:
                self.finish_lines(stream, lines)
            elif stream.send_now(lines):
                self.accept_ask(stream, time.monotonic() + PAUSE / 1000)
        elif type_name == b"none":
            self.finish(stream, ended_done)
        elif type_name == b"list" and self.scripts is None and stream.source != stream.key:
            stream.source = stream.key
            self.hungry[stream] = None
        elif type_name in (b"string", b"list"):
            self.wait_for_lines(stream)
        else:
            stream.answers.put(task_key_error(
                f"a chave da tarefa foi trocada por um valor do tipo {type_name.decode()}: só se aceita uma lista"))

    def on_refused_take(self, stream, error):
        """Trata uma retirada que o Redis recusou.

        Argumentos:
            stream (stream): stream que pediu linhas.
            error (redis.ResponseError): a recusa.
        """
        if error_code(error) == "NOSCRIPT" or is_unable(error) or is_evalsha_denied(error):
            # SCRIPT FLUSH, ou uma ACL mudada agora: quem reabre a conexão carrega os scripts de novo, ou passa sem eles.
            self.hungry[stream] = None
            self.lose_link(error)
        else:
            stream.answers.put(error)

    def on_proof(self, _, replies):
        """Reabre a conexão se os avisos cessaram; conta todos se o Redis não o diz.

        Argumentos:
            _ (None): sem uso.
            replies (list | Exception): zero se os avisos vêm por esta conexão, -1 se não.
        """
        if replies == [-1]:
            self.lose_link(redis.ConnectionError("o Redis deixou de mandar os avisos"))
        elif not isinstance(replies, Exception) and replies != [0]:
            self.recount(list(self.waiting))

    def on_count(self, streams, replies):
        """Compara uma contagem com o esperado.

        Argumentos:
            streams (list[stream]): streams contados.
            replies (list | Exception): respostas ou a falha da conexão.
        """
        if not isinstance(replies, Exception) and is_unable(first_error(replies)):
            self.lose_link(first_error(replies))
        elif self.is_good(replies, "a consulta periódica falhou") and replies != [0, len(streams)]:
            self.recount(streams)

    def recount(self, streams):
        """Marca uma nova contagem, dando tempo a um aviso que já esteja a caminho.

        Argumentos:
            streams (list[stream]): streams a contar; não substituem uma marcada com mais.
        """
        if self.recount_at == math.inf or len(streams) > len(self.counted):
            self.counted = streams
        # Sem adiar a que já está marcada: com INTERVAL menor que wake_grace ela nunca viria.
        self.recount_at = min(self.recount_at, time.monotonic() + wake_grace)

    def on_recount(self, streams, replies):
        """Anota para procura a fatia cuja conta não fecha, ou todos, se ela é só a da vez.

        Argumentos:
            streams (list[stream]): streams contados.
            replies (list | Exception): respostas ou a falha da conexão.
        """
        if not isinstance(replies, Exception) and replies != [0, len(streams)]:
            # Se um aviso se perdeu, outros podem ter-se perdido com ele.
            self.suspects = self.suspects + streams if len(streams) > count_size else list(self.waiting)

    def on_types(self, streams, replies):
        """Põe na fila os streams cuja tarefa já não é a string que gravamos.

        Argumentos:
            streams (list[stream]): streams consultados, na ordem da pergunta.
            replies (list | Exception): respostas ou a falha da conexão.
        """
        if isinstance(replies, Exception) or first_error(replies):
            return
        for stream, type_name in zip(streams, replies, strict=True):
            if type_name != b"string":
                self.rouse(stream)

    def on_search(self, streams, replies):
        """Põe na fila os streams que têm o que buscar.

        Argumentos:
            streams (list[stream]): streams consultados, na ordem da pergunta.
            replies (list | Exception): respostas ou a falha da conexão.
        """
        if isinstance(replies, Exception):
            return
        if isinstance(replies[0], redis.ResponseError):
            self.lose_link(replies[0])
            return
        for position in replies[0]:
            self.rouse(streams[position])

    def on_scan(self, _, replies):
        """Separa as listas que não são de um stream vivo deste proxy.

        Argumentos:
            _ (None): sem uso.
            replies (list | Exception): respostas ou a falha da conexão.
        """
        self.orphan_at = time.monotonic() + orphan_interval
        if not self.is_good(replies, "as listas órfãs não são procuradas"):
            return
        self.cursor, names = replies[0]
        if self.cursor != b"0":
            self.orphan_at += orphan_pause - orphan_interval
        self.strangers = [
            (name, other) for name, other in zip(names, map(companion, names), strict=True)
            if other and name not in self.names
        ]

    def on_strangers(self, names, replies):
        """Anota as listas sozinhas e sem validade.

        Argumentos:
            names (list[bytes]): listas.
            replies (list | Exception): para cada uma, se a companheira existe e a
                validade.
        """
        if not isinstance(replies, Exception):
            self.orphans = [name for i, name in enumerate(names) if replies[2 * i:2 * i + 2] == [0, -1]]

    def on_queue(self, _, replies):
        """Separa as tarefas da fila que não são de um stream vivo deste proxy.

        Argumentos:
            _ (None): sem uso.
            replies (list | Exception): respostas ou a falha da conexão.
        """
        self.queue_at = time.monotonic() + orphan_interval
        if not self.is_good(replies, "REDIS_QUEUE: as tarefas mortas não são procuradas na fila"):
            return
        if len(replies[0]) < queue_keys:
            self.queue_start = 0
        else:
            self.queue_start += queue_keys
            self.queue_at += orphan_pause - orphan_interval
        # Do que não é tarefa, posto ali por outro programa, a falta da chave nada diz.
        prefix = REDIS_PREFIX.encode()
        self.queued = [key for key in replies[0] if key not in self.names and key.startswith(prefix)]

    def on_queued(self, keys, replies):
        """Anota as tarefas da fila que não existem mais; uma chave nunca volta a existir.

        Argumentos:
            keys (list[bytes]): chaves das tarefas.
            replies (list | Exception): se cada uma existe, ou a falha da conexão.
        """
        if not isinstance(replies, Exception):
            self.expired = [key for key, reply in zip(keys, replies, strict=True) if reply == 0]
            self.queue_start = max(0, self.queue_start - len(self.expired))

    def on_cleaning(self, _, replies):
        """Confere se as tarefas mortas saíram da fila.

        Argumentos:
            _ (None): sem uso.
            replies (list | Exception): respostas ou a falha da conexão.
        """
        self.is_good(replies, "REDIS_QUEUE: as tarefas mortas não saem da fila")

    def on_renewal(self, _, replies):
        """Confere se a validade das chaves foi renovada.

        Argumentos:
            _ (None): sem uso.
            replies (list | Exception): respostas ou a falha da conexão.
        """
        self.is_good(replies, "o Redis não renovou a validade das chaves")


def companion(name):
    """Dá a outra chave da tarefa de uma lista.

    Argumentos:
        name (bytes): nome de uma lista.
    Retorna:
        bytes: a chave da tarefa; se é dela o nome, pois o worker a trocou por uma
        lista, o da lista que a tarefa nomeava; b"" se o nome não é dos nossos.
    """
    prefixes = [REDIS_LIST_PREFIX.encode(), REDIS_PREFIX.encode()]
    # Um pode ser o começo do outro.
    for prefix in sorted(prefixes, key=len, reverse=True):
        if name.startswith(prefix):
            return prefixes[prefix == prefixes[0]] + name[len(prefix):]
    return b""


def tracking_command():
    """Monta o pedido dos avisos.

    Retorna:
        tuple: o comando.
    """
    prefixes = {REDIS_PREFIX, REDIS_LIST_PREFIX}
    # O Redis recusa prefixos que se sobrepõem; o mais curto abrange o outro.
    prefixes = [p for p in prefixes if not any(p != q and p.startswith(q) for q in prefixes)]
    options = [word for prefix in prefixes for word in ("PREFIX", prefix)]
    return ("CLIENT", "TRACKING", "ON", "BCAST", *options, "NOLOOP")


def submit_commands(stream, payload):
    """Monta a gravação e a publicação da tarefa.

    Argumentos:
        stream (stream): stream da tarefa.
        payload (bytes): JSON da tarefa.
    Retorna:
        list[tuple]: uma transação: se o SET for recusado, nada é publicado nem entra na
        fila. A última resposta da transação é a do PUBLISH.
    """
    queued = [("RPUSH", REDIS_QUEUE, stream.key)] if REDIS_QUEUE else []
    return [
        ("MULTI",), ("SET", stream.key, payload, "EX", REDIS_TTL), *queued, ("PUBLISH", REDIS_CHANNEL, stream.key),
        ("EXEC",),
    ]


def removal_commands(streams):
    """Monta a remoção do que resta de streams encerrados.

    Sair da fila a cada fim a mantém do tamanho do que está vivo: é o que torna barato
    o LREM, que a percorre quando um worker já tirou a tarefa.

    Argumentos:
        streams (list[stream]): streams encerrados.
    Retorna:
        list[tuple]: comandos.
    """
    keys = [key for stream in streams for key in (stream.key, stream.list, stream.taken)]
    queued = [("LREM", REDIS_QUEUE, 1, stream.key) for stream in streams] if REDIS_QUEUE else []
    return [("UNLINK", *keys), *queued]


# =============================================================================
# Stream: a resposta de um cliente
# =============================================================================

# Até este tamanho, em bytes, o coletor envia as linhas ele mesmo: preparar mais que
# isso faria os outros streams esperarem.
direct_bytes = 65536
# Motivos do fim de um streaming, como aparecem no log.
ended_done = "concluida"
ended_word = "eof"
ended_timeout = "timeout"
ended_client = "cliente"
ended_shutdown = "shutdown"
ended_error = "erro"
end_reasons = (ended_done, ended_word, ended_timeout, ended_client, ended_shutdown, ended_error)


class stream_gate:
    """Conta os streams vivos e limita quantos podem existir."""

    limit = 0

    def __init__(self):
        """Começa aberto e vazio; o limite é dado por raise_descriptor_limit."""
        self.changed = threading.Condition()
        self.alive = self.served = 0
        self.closed = False

    def enter(self):
        """Reserva o lugar de um stream.

        Retorna:
            bool: falso se já há limit streams ou se o serviço está parando.
        """
        with self.changed:
            if self.closed or self.alive >= self.limit:
                return False
            self.alive += 1
            return True

    def leave(self):
        """Devolve o lugar de um stream."""
        with self.changed:
            self.alive -= 1
            self.served += 1
            self.changed.notify_all()

    def close(self):
        """Recusa os próximos streams."""
        self.closed = True

    def wait_empty(self, timeout):
        """Espera que não reste stream vivo.

        Argumentos:
            timeout (float): espera máxima, em segundos.
        Retorna:
            bool: verdadeiro se não resta nenhum.
        """
        with self.changed:
            return self.changed.wait_for(lambda: self.alive == 0, timeout)


class stream:
    """Um cliente à espera das linhas de sua tarefa.

    Quem escreve no socket é quem tem a vez (turn): a thread do cliente, que só a
    larga enquanto espera, ou o coletor, que então envia a linha ele mesmo: acordar a
    thread custaria mais que enviar.
    """

    def __init__(self, name, environ):
        """Prepara o stream de uma requisição.

        Argumentos:
            name (str): task_name da tarefa.
            environ (dict): ambiente WSGI da requisição.
        """
        self.key = (REDIS_PREFIX + name).encode()
        self.list = self.source = (REDIS_LIST_PREFIX + name).encode()
        self.taken = self.list + b":taken"
        self.packed_key, self.packed_list = pack_words(self.key), pack_words(self.list)
        self.packed_keys = pack_words(self.key, self.list, self.taken)
        self.packed_take = None
        self.sequence = 1
        self.ended = False
        # O motivo do fim, enquanto espera a vez de ser entregue.
        self.fate = None
        self.answers = queue.SimpleQueue()
        # O flask (werkzeug) entrega o socket, vigiado pelo epoll do coletor; no
        # waitress é a conexão, vigiada pelo laço dele, que diz que o cliente saiu.
        self.socket = environ.get("werkzeug.socket")
        self.descriptor = self.socket.fileno() if self.socket is not None else -1
        self.handler = environ.get("ndjson.handler")
        if "ndjson.channel" in environ:
            environ["ndjson.channel"].watch(self)
        self.name = name
        self.client = client_address(environ)
        self.method = environ["REQUEST_METHOD"]
        # Acima de 48 KiB o journald parte a linha em duas.
        self.path = request_target(environ)[0][:200]
        self.started = time.monotonic()
        self.first_line = None
        self.lines = self.bytes = 0
        self.reason = ended_client
        self.once = threading.Lock()
        self.turn = threading.Lock()
        self.turn.acquire()
        self.last_line = self.last_sent = self.started
        self.is_chunked = environ.get("SERVER_PROTOCOL") == "HTTP/1.1"

    def __iter__(self):
        """Gera os bytes da resposta e cuida do encerramento.

        Retorna:
            iterator: trechos de bytes, cada um com uma ou mais linhas inteiras.
        """
        try:
            yield from self.pump()
        except OSError:
            # O cliente saiu: o servidor sabe o que fazer com a conexão.
            raise
        except Exception as error:
            self.reason = ended_error
            log.error("tarefa=%s falha interna: %s: %s", self.name, type(error).__name__, error)
            log.debug("tarefa=%s falha interna", self.name, exc_info=True)
            yield self.count(error_line("internal", "falha interna do proxy"), 1, is_ours=True)
        finally:
            self.close()

    def pump(self):
        """Espera as respostas do coletor e as transforma em linhas.

        Retorna:
            iterator: trechos de bytes.
        Levanta:
            OSError: se o cliente saiu ou não lê.
        """
        while True:
            answer = self.wait()
            if answer is None:
                if time.monotonic() >= self.line_deadline():
                    self.reason = ended_timeout
                    yield self.count(MAXTIME_ERROR + b"\n", 1, is_ours=True)
                    return
                if time.monotonic() >= self.beat_deadline():
                    yield HEARTBEAT_LINE + b"\n"
                    self.last_sent = time.monotonic()
                continue
            if isinstance(answer, bytes):
                send_all(self.socket, answer)
            elif isinstance(answer, tuple):
                chunk, lines, is_end = join_lines(answer[0])
                is_last = is_end or answer[1]
                if chunk and is_last and self.handler is not None:
                    # De uma vez: dois envios acordariam o cliente duas vezes.
                    end = last_chunk if self.is_chunked else b""
                    self.handler.send_last(frame(self.count(chunk, lines), self.is_chunked) + end)
                elif chunk:
                    yield self.count(chunk, lines)
                if is_last:
                    self.reason = ended_word if is_end else ended_done
                    return
            else:
                yield from self.end(answer)
                return
            # O relógio conta a partir do envio: um cliente lento não faz vencer
            # o prazo de linhas que já estão na lista.
            self.last_line = self.last_sent = time.monotonic()
            hub.ask(self, PAUSE)

    def line_deadline(self):
        """Calcula quando MAXTIME se esgota.

        Retorna:
            float: instante do relógio monotônico, em segundos.
        """
        return self.last_line + MAXTIME / 1000

    def beat_deadline(self):
        """Calcula quando HEARTBEAT_LINE deve sair.

        Retorna:
            float: instante do relógio monotônico, em segundos.
        """
        return self.last_sent + HEARTBEAT / 1000 if HEARTBEAT else math.inf

    def wait(self):
        """Larga a vez até o coletor responder ou um prazo vencer.

        Retorna:
            object: resposta do coletor; None se um prazo pode ter vencido.
        """
        limit = min(self.line_deadline(), self.beat_deadline())
        self.turn.release()
        try:
            return self.answers.get(timeout=max(0.0, limit - time.monotonic()))
        except queue.Empty:
            pass
        finally:
            self.turn.acquire()
        # O coletor pode ter respondido entre o prazo e a vez; um resto de linha
        # precisa sair antes de qualquer outra coisa, e quem já acabou não se atrasou.
        return self.fate if self.answers.empty() else self.answers.get()

    def send_now(self, elements):
        """Envia linhas na thread do coletor, se isso não a faz esperar.

        Argumentos:
            elements (list[bytes]): elementos da lista.
        Retorna:
            bool: verdadeiro se tudo foi enviado; senão, o que falta fica para a
            thread do cliente, que pedirá as próximas linhas.
        """
        is_large = sum(map(len, elements)) > direct_bytes
        if self.socket is None or is_large or not self.turn.acquire(blocking=False):
            self.answers.put((elements, False))
            return False
        rest = (elements, False)
        try:
            chunk, lines, is_end = join_lines(elements)
            if not is_end:
                rest = send_some(self.socket, frame(self.count(chunk, lines), self.is_chunked)) if chunk else b""
                self.last_line = self.last_sent = time.monotonic()
        except OSError:
            rest = ended_client
        finally:
            # Antes de largar a vez: nada pode sair no meio de uma linha.
            if rest:
                self.answers.put(rest)
            self.turn.release()
        return not rest

    def end(self, answer):
        """Gera a última linha, se o motivo do fim pede uma.

        Argumentos:
            answer (str | Exception): motivo do fim ou erro do Redis.
        Retorna:
            iterator: nenhum ou um trecho de bytes.
        """
        if isinstance(answer, Exception):
            self.reason = ended_error
            message = f"o Redis recusou a consulta: {redis_words(answer)}"
            if isinstance(answer, task_key_error):
                message = str(answer)
            log.warning("tarefa=%s %s", self.name, message)
            yield self.count(error_line("redis_error", message), 1, is_ours=True)
            return
        self.reason = answer
        if answer == ended_shutdown:
            yield self.count(error_line("shutdown"), 1, is_ours=True)

    def count(self, chunk, lines, is_ours=False):
        """Anota o que vai ser enviado.

        Argumentos:
            chunk (bytes): trecho com linhas inteiras.
            lines (int): número de linhas do trecho.
            is_ours (bool): verdadeiro se não vem do worker: é a linha de um erro.
        Retorna:
            bytes: o mesmo trecho.
        """
        if self.first_line is None:
            self.first_line = time.monotonic()
            if meter is not None and not is_ours:
                meter.note_first_line(self.first_line - self.started)
        self.lines += lines
        self.bytes += len(chunk)
        return chunk

    def close(self):
        """Encerra o stream, uma só vez: devolve o lugar, apaga as chaves, registra."""
        if not self.once.acquire(blocking=False):
            return
        hub.release(self)
        gate.leave()
        duration = time.monotonic() - self.started
        if meter is not None:
            meter.finish(self, duration)
        first = "-" if self.first_line is None else round((self.first_line - self.started) * 1000)
        log.info(
            "tarefa=%s cliente=%s metodo=%s caminho=%s fim=%s linhas=%d bytes=%d primeira_ms=%s duracao_ms=%d",
            self.name, self.client, self.method, self.path, self.reason, self.lines, self.bytes, first,
            round(duration * 1000),
        )


def frame(chunk, is_chunked):
    """Dá a um trecho a forma em que ele vai no socket.

    Argumentos:
        chunk (bytes): trecho com linhas inteiras, não vazio.
        is_chunked (bool): verdadeiro em HTTP/1.1, cuja resposta vai em chunks.
    Retorna:
        bytes: o trecho, com o tamanho à frente se vai em chunks.
    """
    return b"%x\r\n%b\r\n" % (len(chunk), chunk) if is_chunked else chunk


def send_some(connection, data):
    """Envia a um cliente o que couber sem esperar.

    Argumentos:
        connection (socket.socket): conexão com o cliente.
        data (bytes): bytes a enviar.
    Retorna:
        bytes: o resto, que não coube.
    Levanta:
        OSError: se o cliente saiu.
    """
    try:
        return data[connection.send(data, socket.MSG_DONTWAIT):]
    except BlockingIOError:
        return data


def send_all(connection, data):
    """Envia tudo a um cliente, esperando que ele leia.

    Argumentos:
        connection (socket.socket): conexão com o cliente, com um prazo do sistema.
        data (bytes): bytes a enviar.
    Levanta:
        OSError: se o cliente saiu ou não lê há client_timeout segundos.
    """
    try:
        connection.sendall(data)
    except BlockingIOError:
        raise TimeoutError("o cliente não lê a resposta") from None


def error_line(code, message=""):
    """Monta uma linha de erro dentro do streaming.

    Argumentos:
        code (str): código do erro, para programas.
        message (str): frase em português, para pessoas; vazia é omitida.
    Retorna:
        bytes: objeto JSON com error e message, terminado em LF.
    """
    content = {"error": code, "message": message} if message else {"error": code}
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


# =============================================================================
# Aplicação HTTP
# =============================================================================

stream_methods = ("GET", "POST", "PUT", "PATCH", "DELETE")
allow_header = ", ".join((*stream_methods, "HEAD", "OPTIONS"))
line_types = ("application/x-ndjson", "application/json-lines", "application/jsonl")
read_size = 65536
retry_later = [("Retry-After", "5")]
ask_token = [("WWW-Authenticate", "Bearer")]


class application(flask.Flask):
    """Aplicação de um só destino, sem o roteador e os contextos do Flask.

    Servem a rotas, sessões e extensões, que aqui não há, e custariam mais que a tarefa.
    """

    def wsgi_app(self, environ, start_response):
        """Atende uma requisição.

        Argumentos:
            environ (dict): ambiente WSGI.
            start_response (callable): função do WSGI.
        Retorna:
            iterable: trechos de bytes da resposta.
        """
        # O ambiente que apontasse para a requisição, que aponta para ele, ficaria para o
        # coletor de lixo.
        request = flask.Request(environ, populate_request=False)
        try:
            response = dispatch(request)
        except Exception as error:
            response = exception_response(error)
        # O cabeçalho Server é do servidor HTTP, que o enviaria de novo se saísse também daqui.
        response.headers["X-Author"] = author
        response.headers.extend(cors_headers(request.headers.get("Origin")))
        return response(environ, start_response)


app = application(program, static_folder=None)


class stream_response(flask.Response):
    """Resposta cujos cabeçalhos saem antes da primeira linha."""

    def __call__(self, environ, start_response):
        """Envia os cabeçalhos e devolve o corpo.

        Argumentos:
            environ (dict): ambiente WSGI.
            start_response (callable): função do WSGI.
        Retorna:
            iterable: trechos de bytes da resposta.
        """
        body, status, headers = self.get_wsgi_response(environ)
        try:
            # write(b"") vale nos dois servidores; o waitress, sozinho, só os
            # enviaria com a primeira linha.
            start_response(status, headers)(b"")
        except BaseException:
            # Sem iterador o servidor não chama close().
            self.close()
            raise
        return body


def error_response(status, code, message, headers=()):
    """Monta uma resposta de erro.

    Argumentos:
        status (int): status HTTP.
        code (str): código do erro, para programas.
        message (str): frase em português, para pessoas.
        headers (list): pares de cabeçalhos adicionais.
    Retorna:
        flask.Response: corpo JSON {"error", "message"}.
    """
    if meter is not None:
        meter.note_refusal(status, code)
    return flask.Response(error_line(code, message), status, headers, content_type="application/json")


def cors_headers(origin):
    """Monta os cabeçalhos de CORS de qualquer resposta.

    Argumentos:
        origin (str): cabeçalho Origin da requisição, ou None.
    Retorna:
        list: pares (nome, valor); vazia se CORS está desligado.
    """
    if not CORS_ORIGIN:
        return []
    if "*" in CORS_ORIGIN:
        allowed = "*"
    elif origin and origin.lower() in CORS_ORIGIN:
        allowed = origin
    else:
        return [("Vary", "Origin")]
    return [
        ("Access-Control-Allow-Origin", allowed), ("Vary", "Origin"),
        ("Access-Control-Expose-Headers", "X-Task-Name"),
    ]


def options_response(request):
    """Responde a OPTIONS, sem criar tarefa; atende a consulta prévia do CORS.

    Argumentos:
        request (flask.Request): requisição.
    Retorna:
        flask.Response: 204 sem corpo.
    """
    response = flask.Response(status=204, headers=[("Allow", allow_header)])
    del response.headers["Content-Type"]
    asked = request.headers.get("Access-Control-Request-Method")
    if asked and any(name == "Access-Control-Allow-Origin" for name, _ in cors_headers(request.headers.get("Origin"))):
        response.headers["Access-Control-Allow-Methods"] = ", ".join(stream_methods)
        wanted = request.headers.get("Access-Control-Request-Headers")
        if wanted:
            response.headers["Access-Control-Allow-Headers"] = wanted
        if request.headers.get("Access-Control-Request-Private-Network") == "true":
            response.headers["Access-Control-Allow-Private-Network"] = "true"
        response.headers["Access-Control-Max-Age"] = "600"
    return response


def is_authorized(environ):
    """Confere o token de uma requisição.

    Argumentos:
        environ (dict): ambiente WSGI.
    Retorna:
        bool: verdadeiro se o token é um dos de AUTH_TOKEN, ou se nenhum é exigido.
    """
    if not AUTH_TOKEN:
        return True
    scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").strip().partition(" ")
    given = token.strip().encode("latin-1", "replace")
    # Todos são comparados, e por inteiro: o tempo da resposta não diz quanto se acertou.
    found = sum(hmac.compare_digest(given, allowed) for allowed in AUTH_TOKEN)
    return scheme.lower() == "bearer" and found > 0


def refuse_unauthorized(request):
    """Responde a uma requisição sem um token válido, cujo corpo nem é lido.

    Argumentos:
        request (flask.Request): requisição.
    Retorna:
        flask.Response: erro 401.
    """
    tell_unauthorized(request.environ)
    return error_response(401, *error_codes[401], ask_token)


def tell_unauthorized(environ):
    """Registra uma requisição sem um token válido.

    Argumentos:
        environ (dict): ambiente WSGI.
    """
    rare.tell(f"requisição sem um AUTH_TOKEN válido recusada: cliente={client_address(environ)}", "AUTH_TOKEN")


def ping_response():
    """Responde a /ping.

    Retorna:
        flask.Response: 200 "pong" se o Redis respondeu; senão 500, em texto.
    """
    if redis_ping():
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
    if (request.content_length or 0) > MAX_BODY:
        raise werkzeug.exceptions.RequestEntityTooLarge()
    parts, size = [], 0
    handler = request.environ.get("ndjson.handler")
    try:
        # request.stream não passa pelos formulários, que esvaziariam o corpo.
        while part := request.stream.read(read_size):
            size += len(part)
            if size > MAX_BODY:
                raise werkzeug.exceptions.RequestEntityTooLarge()
            parts.append(part)
    except (OSError, werkzeug.exceptions.BadRequest) as error:
        if handler is not None and handler.is_late:
            raise werkzeug.exceptions.RequestTimeout() from error
        raise werkzeug.exceptions.BadRequest() from error
    if handler is not None and not handler.received():
        raise werkzeug.exceptions.RequestTimeout()
    return b"".join(parts)


def head_response(request):
    """Monta a resposta de streaming ainda sem corpo.

    Argumentos:
        request (flask.Request): requisição.
    Retorna:
        stream_response: 200 com os cabeçalhos do streaming.
    """
    # Vêm em ordem de preferência; nunca 406, que um cliente não saberia tratar.
    chosen = line_types[0]
    if "json" in request.headers.get("Accept", "").lower():
        named = (value.partition(";")[0].strip().lower() for value, quality in request.accept_mimetypes if quality)
        chosen = next((name for name in named if name in line_types), chosen)
    return stream_response(content_type=chosen, headers=[
        ("Cache-Control", "no-cache, no-transform"),
        # O nginx guarda a resposta inteira se não for avisado.
        ("X-Accel-Buffering", "no"),
        ("X-Content-Type-Options", "nosniff"),
    ])


def redis_failure(error):
    """Monta a resposta para uma tarefa que o Redis não recebeu.

    Argumentos:
        error (Exception): falha da conexão ou recusa do Redis.
    Retorna:
        flask.Response: 504 se o Redis não atendeu; 500 se ele recusou.
    """
    if isinstance(error, redis.ResponseError) and not is_unable(error):
        rare.tell(f"o Redis recusou uma tarefa: {redis_words(error)}")
        return error_response(500, "redis_error", f"o Redis recusou a tarefa: {redis_words(error)}")
    return error_response(504, "redis_unavailable", "o Redis não respondeu; tente de novo em instantes")


def stopping_response():
    """Monta a resposta para quem chega durante a parada.

    Retorna:
        flask.Response: erro 503.
    """
    return error_response(503, "shutdown", "o serviço está parando", retry_later)


def start_stream(request, body):
    """Grava e publica a tarefa e devolve o streaming; o lugar já foi reservado.

    Argumentos:
        request (flask.Request): requisição.
        body (bytes): corpo já lido.
    Retorna:
        flask.Response: o streaming, ou um erro 500 ou 504.
    """
    name = str(uuid.uuid4())
    client = stream(name, request.environ)
    hub.submit(client, build_task(name, request, body))
    try:
        answer = client.answers.get(timeout=answer_timeout)
    except queue.Empty:
        answer = redis.TimeoutError("sem resposta do Redis")
    if not isinstance(answer, int):
        client.reason = ended_error
        client.close()
        return redis_failure(answer) if isinstance(answer, Exception) else stopping_response()
    if meter is not None:
        meter.begin(client)
    if answer == 0 and not REDIS_QUEUE:
        if meter is not None:
            meter.note_unheard()
        log.warning("tarefa=%s ninguém ouve o canal %s: a tarefa espera por um worker", name, REDIS_CHANNEL)
    response = head_response(request)
    response.headers["X-Task-Name"] = name
    response.response = iter(client)
    # Um gerador que nunca começou não roda o seu finally.
    response.call_on_close(client.close)
    return response


def streaming(request):
    """Função principal: atende um cliente, da requisição ao fim do streaming.

    Argumentos:
        request (flask.Request): requisição.
    Retorna:
        flask.Response: o streaming ou um erro com status próprio e corpo JSON.
    """
    body = read_body(request)
    if not gate.enter():
        if gate.closed:
            return stopping_response()
        limit = plural(gate.limit, "stream simultâneo", "streams simultâneos")
        return error_response(503, "too_many_streams", f"o limite de {limit} foi atingido", retry_later)
    try:
        if redis_ping():
            return start_stream(request, body)
    except BaseException:
        gate.leave()
        raise
    gate.leave()
    return redis_failure(redis.TimeoutError("sem resposta ao PING"))


def dispatch(request):
    """Escolhe quem atende, pelo caminho como o cliente o enviou.

    O roteador do Flask não serve aqui: juntaria barras, decodificaria o caminho e
    responderia por conta própria a HEAD e OPTIONS.

    Argumentos:
        request (flask.Request): requisição.
    Retorna:
        flask.Response: a resposta.
    """
    if request.method == "OPTIONS":
        return options_response(request)
    if request_target(request.environ)[0] == "/ping":
        return ping_response()
    if not is_authorized(request.environ):
        return refuse_unauthorized(request)
    if request.method == "HEAD":
        return head_response(request)
    return streaming(request)


error_codes = {
    400: ("bad_request", "a requisição não é válida"),
    401: ("unauthorized", "falta um token válido no cabeçalho Authorization: Bearer"),
    405: ("method_not_allowed", f"método não atendido; use {allow_header}"),
    408: ("request_timeout", "a requisição não chegou inteira a tempo"),
    413: ("body_too_large", "o corpo da requisição passa do limite permitido"),
    414: ("uri_too_long", "o endereço pedido é longo demais"),
    431: ("headers_too_large", "os cabeçalhos da requisição passam do limite permitido"),
    500: ("internal", "falha interna do proxy"),
    501: ("not_implemented", "a requisição usa um recurso que o servidor não atende"),
    503: ("too_many_streams", "o sistema não tem threads para mais um stream"),
    505: ("version_not_supported", "versão do HTTP não atendida"),
}


def exception_response(error):
    """Transforma qualquer exceção em um erro JSON.

    Argumentos:
        error (Exception): exceção não tratada.
    Retorna:
        flask.Response: status da exceção HTTP, ou 500.
    """
    status = getattr(error, "code", None)
    if not isinstance(error, werkzeug.exceptions.HTTPException) or status not in error_codes:
        log.error("falha interna ao atender uma requisição: %s: %s", type(error).__name__, error)
        log.debug("falha interna ao atender uma requisição", exc_info=True)
        status = 500
    return error_response(status, *error_codes[status])


origin_line = re.compile(rb"^origin:[ \t]*([!-~]+)[ \t]*\r$", re.IGNORECASE | re.MULTILINE)


cookie_line = re.compile(rb"(?im)^cookie:([^\r\n]*)")


def joined_cookies(head):
    """Junta os cabeçalhos Cookie de uma requisição.

    Os dois servidores os juntariam com vírgula, que pode estar dentro de um valor:
    depois disso não se sabe mais onde um acaba (RFC 9113, 8.2.3).

    Argumentos:
        head (bytes): linha de requisição e cabeçalhos.
    Retorna:
        str: valores em latin-1, com ponto e vírgula entre eles; vazio se não há.
    """
    return "; ".join(value.strip(b" \t").decode("latin-1") for value in cookie_line.findall(head))


def host_error(status, head):
    """Monta o erro de uma requisição que nem chega à aplicação.

    Argumentos:
        status (int): status HTTP.
        head (bytes): o que se leu da linha de requisição e dos cabeçalhos.
    Retorna:
        tuple: (corpo em bytes, vazio se quem pediu foi HEAD; lista de pares de
        cabeçalhos, sem Content-Length).
    """
    code, message = error_codes.get(status, error_codes[400 if status < 500 else 500])
    if meter is not None:
        meter.note_refusal(status, code)
    found = origin_line.search(head)
    origin = found[1].decode("ascii") if found else None
    headers = [("Content-Type", "application/json"), ("X-Author", author), *cors_headers(origin)]
    if status == 405:
        headers.append(("Allow", allow_header))
    if status == 401:
        headers += ask_token
    if status == 503:
        headers += retry_later
    return b"" if head.startswith(b"HEAD ") else error_line(code, message), headers


# =============================================================================
# Servidores HTTP
# =============================================================================
# Cada um recebe o socket já escutando, atende até o sinal de parada, deixa de
# escutar e devolve uma função que diz quantas conexões ainda não terminaram.

backlog = 4096
# Tempo máximo, em segundos, de um cliente que não lê a resposta ou não faz outra
# requisição na mesma conexão. No servidor do Flask o tempo recomeça quando o sistema
# ainda aceita um pouco: quem parou de ler cai em até três vezes isso.
client_timeout = 60
# Intervalo, em segundos, entre dois exames dos prazos das conexões.
sweep_interval = 1.0
# Bytes que o waitress guarda de uma resposta antes de fazer a thread esperar.
high_watermark = 262144
# Descritores usados pelo próprio programa, com folga, e os que ficam para responder
# 503 e /ping.
own_descriptors = 32
refusal_descriptors = 64
# Tempo, em segundos, que uma conexão recusada tem para ler a resposta.
discard_patience = 1.0
# Intervalo, em segundos, em que a thread principal procura por sinais.
signal_interval = 0.5
# Pausa, em segundos, antes de aceitar de novo, se faltam descritores.
accept_pause = 0.1
# Tempo, em segundos, que uma thread do servidor do Flask espera por outro cliente.
thread_patience = 2
last_chunk = b"0\r\n\r\n"
# Limites da requisição, os mesmos nos dois: bytes da primeira linha, bytes e número
# dos cabeçalhos.
line_limit = 65536
headers_limit = 65536
header_count = 100

token = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
request_line = re.compile(rb"(%b) ([^\x00-\x20\x7f]+) HTTP/([0-9])\.[0-9]" % token)
header_line = re.compile(rb"(%b):[ \t]*([\t\x20-\x7e\x80-\xff]*)" % token)
target_form = re.compile(rb"/.*|(?i:https?)://(?:\[[0-9A-Fa-f:.]+\]|[^\[\]/?#]+)(?::[0-9]*)?(?:[/?#].*)?")
leading_blank = re.compile(rb"(?:\r\n)?[ \t\v\f]")
bare_break = re.compile(rb"(?<!\r)\n")
host_form = re.compile(rb"[^\s/?#@\\]*")


def head_error(head):
    """Confere a primeira linha e os cabeçalhos de uma requisição.

    Os dois servidores têm cada um a sua tolerância; o que um aceita e o outro recusa,
    ou o que um terceiro no caminho leria de outro modo, é recusado aqui (RFC 9112).

    Argumentos:
        head (bytes): do começo da requisição à linha em branco, exclusive; cada linha
            terminada em CRLF.
    Retorna:
        int: status HTTP da recusa; 0 se tudo está certo.
    """
    first, *rows = head.removesuffix(b"\r\n").split(b"\r\n")
    status = line_error(first)
    if status:
        return status
    if len(rows) > header_count or len(head) - len(first) > headers_limit:
        return 431
    fields = {}
    for row in rows:
        field = header_line.fullmatch(row)
        if not field:
            return 400
        fields.setdefault(field[1].lower(), []).append(field[2].rstrip(b" \t"))
    return body_error(fields, not first.endswith(b"1.0"))


def line_error(line):
    """Confere a linha de requisição.

    Argumentos:
        line (bytes): a linha, sem o fim dela.
    Retorna:
        int: status HTTP da recusa; 0 se está certa.
    """
    if len(line) > line_limit:
        return 414
    parts = request_line.fullmatch(line)
    if not parts:
        return 400
    method, target, major = parts.groups()
    if major != b"1":
        return 505
    if method.decode() not in (*stream_methods, "HEAD", "OPTIONS"):
        return 405
    if not target_form.fullmatch(target):
        return 0 if (method, target) == (b"OPTIONS", b"*") else 400
    if target.startswith(b"/"):
        return 0
    try:
        # Só ele diz se o que está entre colchetes é um endereço, e os servidores o chamam.
        urllib.parse.urlsplit(target.decode("latin-1"))
    except ValueError:
        return 400
    return 0


def body_error(fields, is_current):
    """Confere os cabeçalhos que dizem de quem e de que tamanho é a requisição.

    Argumentos:
        fields (dict): nome em minúsculas -> lista de valores, em bytes.
        is_current (bool): verdadeiro a partir de HTTP/1.1.
    Retorna:
        int: status HTTP da recusa; 0 se tudo está certo.
    """
    hosts, lengths = fields.get(b"host", []), fields.get(b"content-length", [])
    codings = [coding.lower() for coding in fields.get(b"transfer-encoding", [])]
    if codings not in ([], [b"chunked"]):
        return 501
    if len(hosts) > 1 or (is_current and not hosts) or not all(map(host_form.fullmatch, hosts)):
        return 400
    # Um tamanho ambíguo deixaria outro servidor ver outro fim para o corpo (6.3).
    if len(lengths) > 1 or (codings and (lengths or not is_current)):
        return 400
    return 0 if all(re.fullmatch(rb"[0-9]{1,18}", length) for length in lengths) else 400


class response_writer(io.BufferedIOBase):
    """Junta os pedaços de um chunk e os envia de uma vez.

    O werkzeug escreve um chunk em quatro partes e chama flush; depois do último,
    não chama, e ainda espera 10 ms por dados do cliente antes de fechar.
    """

    def __init__(self, connection):
        """Guarda o socket.

        Argumentos:
            connection (socket.socket): conexão com o cliente.
        """
        self.connection = connection
        self.parts = []
        self.is_done = False

    def writable(self):
        """Diz que aceita escrita.

        Retorna:
            bool: sempre verdadeiro.
        """
        return True

    def write(self, data):
        """Guarda um pedaço; o último da resposta sai na hora.

        Argumentos:
            data (bytes): pedaço.
        Retorna:
            int: número de bytes aceitos.
        """
        if not self.is_done:
            self.parts.append(data)
        if data == last_chunk:
            self.flush()
        return len(data)

    def flush(self):
        """Envia o que foi guardado.

        Levanta:
            OSError: se o cliente saiu ou não lê há client_timeout segundos.
        """
        data, self.parts = b"".join(self.parts), []
        if data:
            send_all(self.connection, data)


class chunked_input(werkzeug.serving.DechunkedInput):
    """Corpo em chunks, com as extensões e os trailers que a RFC 9112 manda ignorar."""

    def read_chunk_len(self):
        """Lê a linha que abre um chunk.

        Retorna:
            int: tamanho do chunk em bytes; 0 no último.
        Levanta:
            OSError: se a linha não é válida.
        """
        line = self._rfile.readline(line_limit)
        if not line.endswith(b"\n"):
            # O resto de uma extensão sem fim passaria por conteúdo.
            raise OSError("chunk inválido")
        size = line.partition(b";")[0].strip(b" \t\r\n")
        # int() sozinho aceitaria "0x5", "+5" e "1_0".
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,16}", size):
            raise OSError("chunk inválido")
        if int(size, 16) == 0:
            while (row := self._rfile.readline(line_limit)) not in (b"\r\n", b"\n"):
                if not row.endswith(b"\n"):
                    raise OSError("trailer inválido")
            # Quem chama ainda lê a linha em branco; peek() podia ver só metade dela, e a outra
            # metade passaria por mais um trailer.
            self._rfile = io.BytesIO(b"\r\n")
        return int(size, 16)


class flask_handler(werkzeug.serving.WSGIRequestHandler):
    """Atende uma conexão no servidor do Flask."""

    disable_nagle_algorithm = True
    # O Python 3.14 daria 128 KiB a cada conexão, e escreveria neles uma página ou duas.
    rbufsize = 2048
    live: typing.ClassVar = set()
    # Quem ainda envia a requisição, na ordem dos prazos, que são todos iguais.
    receiving: typing.ClassVar = {}

    @classmethod
    def expire(cls, now):
        """Deixa de ler as requisições cujo prazo venceu.

        Argumentos:
            now (float): instante do relógio monotônico, em segundos.
        """
        late = itertools.takewhile(lambda item: item[1] <= now, list(cls.receiving.items()))
        for handler, _ in late:
            if cls.receiving.pop(handler, None) is not None:
                handler.is_late = True
                # Quem espera pelo resto da requisição lê o fim dela.
                with contextlib.suppress(OSError):
                    handler.connection.shutdown(socket.SHUT_RD)

    def setup(self):
        """Prepara a conexão."""
        self.is_late, self.is_unread, self.head = False, False, b""
        self.close_connection = True
        self.live.add(self)
        super().setup()
        self.receiving[self] = time.monotonic() + REQUEST_TIMEOUT / 1000
        set_deadline(self.connection, client_timeout)
        self.wfile = response_writer(self.connection)

    def finish(self):
        """Encerra a conexão."""
        try:
            super().finish()
        finally:
            if self.is_unread:
                self.discard()
            self.received()
            self.live.discard(self)
            # O ambiente aponta para cá: o ciclo só seria desfeito pelo coletor de lixo.
            vars(self).pop("environ", None)

    def discard(self):
        """Descarta o que o cliente ainda envia, para que ele possa ler a resposta.

        Fechar com bytes por ler apagaria a resposta a caminho (RST).
        """
        deadline = time.monotonic() + discard_patience
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            set_deadline(self.connection, discard_patience)
            while time.monotonic() < deadline and self.connection.recv(read_size):
                pass

    def received(self):
        """Anota que a requisição chegou inteira, ou que não é mais esperada.

        Retorna:
            bool: falso se o prazo já tinha vencido.
        """
        self.is_unread = False
        return self.receiving.pop(self, None) is not None

    def send_last(self, data):
        """Envia o fim de um streaming; o que o werkzeug ainda escrever não sai.

        Argumentos:
            data (bytes): últimas linhas e o último chunk, na forma em que vão no socket.
        Levanta:
            OSError: se o cliente saiu ou não lê há client_timeout segundos.
        """
        send_all(self.connection, data)
        self.wfile.is_done = True

    def version_string(self):
        """Nomeia o servidor.

        Retorna:
            str: valor do cabeçalho Server.
        """
        return SERVERNAME

    def make_environ(self):
        """Completa o ambiente WSGI.

        Retorna:
            dict: ambiente com "ndjson.target", o alvo como veio: self.path já
            perdeu as barras repetidas do início.
        """
        if self.request_version != "HTTP/1.1":
            # Quem fala HTTP/1.0 não conhece chunks.
            self.protocol_version = "HTTP/1.0"
        environ = super().make_environ()
        if "HTTP_COOKIE" in environ:
            environ["HTTP_COOKIE"] = joined_cookies(self.head)
        environ["ndjson.target"] = self.target
        environ["ndjson.handler"] = self
        self.is_unread = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        if environ.get("wsgi.input_terminated"):
            environ["wsgi.input"] = chunked_input(self.rfile)
        return environ

    def parse_request(self):
        """Lê a linha de requisição e os cabeçalhos, e os confere.

        Retorna:
            bool: falso se a requisição já foi respondida com um erro.
        """
        if self.raw_requestline == b"\r\n":
            # Sobra de quem envia um CRLF depois do corpo (RFC 9112, 2.2).
            self.raw_requestline = self.rfile.readline(line_limit + 1)
        self.head = self.raw_requestline
        status = line_error(self.head.removesuffix(b"\r\n"))
        # Quem não fala HTTP, como quem fala TLS, não enviaria mais nada; já um erro de
        # método precisa do Origin, para que a página possa lê-lo.
        rows = self.read_headers() if status in (0, 405) else []
        self.head += b"".join(rows[:-1])
        if self.is_late:
            status = 408
        elif not status and rows[-1] != b"\r\n":
            # Ou passou do limite, ou o cliente parou no meio.
            is_large = sum(map(len, rows)) > headers_limit or len(rows) > header_count
            status = 431 if is_large else 400
        elif not status:
            status = 400 if bare_break.search(self.head) else head_error(self.head)
        if status:
            self.send_error(status)
            return False
        self.keep_request(rows[:-1])
        if self.is_waiting and int(self.headers.get("Content-Length", "0")) > MAX_BODY:
            self.send_error(413)
            return False
        return True

    def keep_request(self, rows):
        """Guarda a requisição, já conferida, onde o http.server a guardaria.

        Ele leria os cabeçalhos com o interpretador de e-mails, um décimo do custo de uma
        requisição.

        Argumentos:
            rows (list[bytes]): linhas de cabeçalho.
        """
        self.requestline = self.raw_requestline.decode("latin-1").removesuffix("\r\n")
        self.command, self.target, self.request_version = self.requestline.split(" ")
        # Duas barras no começo pareceriam o nome de uma máquina.
        self.path = "/" + self.target.lstrip("/") if self.target.startswith("//") else self.target
        fields = [row.decode("latin-1").partition(":") for row in rows]
        self.headers = werkzeug.datastructures.Headers([(name, value.strip(" \t\r\n")) for name, _, value in fields])
        is_waiting = self.headers.get("Expect", "").lower() == "100-continue"
        # O HTTP/1.0 não conhece a espera.
        self.is_waiting = is_waiting and self.request_version != "HTTP/1.0"
        if is_waiting:
            # O werkzeug também responderia, e só com o resto da resposta.
            del self.headers["Expect"]

    def read_headers(self):
        """Lê os cabeçalhos até a linha em branco, o fim da conexão ou o limite.

        Retorna:
            list[bytes]: linhas, com seus fins; a última é a linha em branco se os
            cabeçalhos chegaram inteiros.
        """
        rows, size = [], 0
        while size <= headers_limit and len(rows) <= header_count:
            rows.append(self.rfile.readline(headers_limit + 1))
            size += len(rows[-1])
            if rows[-1] in (b"\r\n", b"\n", b""):
                break
        return rows

    def run_wsgi(self):
        """Atende a requisição; o "100 Continue" sai sem esperar pelo buffer."""
        if self.is_waiting:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wfile.flush()
        super().run_wsgi()

    def send_error(self, code, message=None, explain=None):
        """Responde a uma requisição que não chega à aplicação.

        Argumentos:
            code (int): status HTTP.
            message (str): sem uso.
            explain (str): sem uso.
        """
        body, fields = host_error(int(code), self.head)
        self.close_connection = self.is_unread = True
        # Uma linha de requisição sem versão faria o http.server omitir tudo.
        self.request_version = "HTTP/1.0"
        self.send_response(int(code))
        for name, value in (*fields, ("Content-Length", str(len(body))), ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log(self, type, message, *args):
        """Leva ao nosso log, em debug, o que o servidor diria.

        Argumentos:
            type (str): nível.
            message (str): formato.
            args (object): argumentos do formato.
        """
        log.debug("servidor HTTP: " + message, *args)

    def log_request(self, code="-", size="-"):
        """Não registra: cada tarefa já tem a sua linha.

        Argumentos:
            code (int): status HTTP.
            size (int): tamanho da resposta.
        """


class no_selector:
    """Toma o lugar do seletor do werkzeug, que ele usa só ao fim da resposta.

    Ele abriria um epoll e esperaria 10 ms por conexão, leria até 10 GB de quem não
    para de enviar e, se o cliente saísse nessa hora, deixaria o epoll aberto. O que
    resta por ler é descartado por flask_handler.discard.
    """

    def register(self, connection, events):
        """Não registra.

        Argumentos:
            connection (socket.socket): sem uso.
            events (int): sem uso.
        """

    def select(self, timeout):
        """Não espera.

        Argumentos:
            timeout (float): sem uso.
        Retorna:
            tuple: vazia: não há nada a ler.
        """
        return ()

    def close(self):
        """Não fecha."""


class flask_server(werkzeug.serving.ThreadedWSGIServer):
    """Servidor do Flask que para entre duas conexões e sobrevive a erros."""

    def __init__(self, *args, **options):
        """Prepara as threads reaproveitadas.

        Argumentos:
            args (object): argumentos do werkzeug.
            options (object): argumentos nomeados do werkzeug.
        """
        self.idle = collections.deque()
        super().__init__(*args, **options)

    def process_request(self, request, client_address):
        """Entrega a conexão a uma thread livre, criando-a se preciso.

        Criar e encerrar uma thread por conexão custa mais que reaproveitá-la. A última a
        ficar livre é a primeira a servir: as que sobram podem então acabar.

        Argumentos:
            request (socket.socket): conexão aceita.
            client_address (tuple): endereço do cliente.
        """
        with contextlib.suppress(IndexError):
            self.idle.pop().put((request, client_address))
            return
        try:
            threading.Thread(target=self.work, args=(request, client_address), name="cliente", daemon=True).start()
        except RuntimeError as error:
            tell_thread_lack(error)
            self.refuse_starved(request)

    def refuse_starved(self, request):
        """Responde, sem ler a requisição, à conexão para a qual não há thread.

        Argumentos:
            request (socket.socket): conexão aceita.
        """
        body, headers = host_error(503, b"")
        headers += [("Content-Length", str(len(body))), ("Connection", "close")]
        rows = "".join(f"{name}: {value}\r\n" for name, value in headers)
        with contextlib.suppress(OSError):
            # Fechar com bytes por ler apagaria a resposta a caminho (RST).
            request.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                request.recv(line_limit + headers_limit)
            request.send(f"HTTP/1.1 503 Service Unavailable\r\n{rows}\r\n".encode() + body)
        self.shutdown_request(request)

    def work(self, request, client_address):
        """Atende conexões até passar thread_patience segundos sem nenhuma.

        Argumentos:
            request (socket.socket): primeira conexão.
            client_address (tuple): endereço do primeiro cliente.
        """
        inbox = queue.SimpleQueue()
        while True:
            self.process_request_thread(request, client_address)
            del request
            self.idle.append(inbox)
            try:
                request, client_address = inbox.get(timeout=thread_patience)
            except queue.Empty:
                try:
                    self.idle.remove(inbox)
                    return
                except ValueError:
                    # Foi escolhida neste instante: a conexão vem aí.
                    request, client_address = inbox.get()

    def get_request(self):
        """Aceita uma conexão.

        Retorna:
            tuple: (socket, endereço do cliente).
        Levanta:
            OSError: se o sistema não tem mais descritores ou o cliente desistiu.
        """
        # Daqui até service_actions o sinal de parada não interrompe: a conexão
        # aceita seria perdida.
        stop.is_busy = True
        try:
            return super().get_request()
        except OSError as error:
            if lacks_descriptors(error):
                time.sleep(accept_pause)
            raise

    def service_actions(self):
        """Para o laço, se foi pedido, e examina os prazos, a cada conexão e meio segundo.

        Levanta:
            KeyboardInterrupt: se um sinal de parada chegou.
        """
        stop.is_busy = False
        if stop.is_requested:
            raise KeyboardInterrupt
        flask_handler.expire(time.monotonic())

    def shutdown_request(self, request):
        """Fecha uma conexão, sem o shutdown que o Python faria antes: ninguém mais a tem.

        Argumentos:
            request (socket.socket): conexão.
        """
        self.close_request(request)

    def handle_error(self, request, client_address):
        """Registra em uma linha a falha de uma conexão.

        Argumentos:
            request (socket.socket): conexão.
            client_address (tuple): endereço do cliente.
        """
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log.error("falha interna em uma conexão: %s: %s", type(error).__name__, error)


def raise_descriptor_limit():
    """Eleva o limite de descritores ao máximo permitido e limita por ele os streams.

    Sem sobra, quem passa do limite esperaria na fila do sistema por um 503.

    Retorna:
        int: número de conexões que o processo pode ter abertas.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1048576
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gate.limit = max(1, min(MAX_STREAMS, hard - own_descriptors - refusal_descriptors))
    if gate.limit < MAX_STREAMS:
        log.warning("MAX_STREAMS é %d, mas o processo só pode abrir %d descritores: são atendidos %d streams",
                    MAX_STREAMS, hard, gate.limit)
    return max(1, hard - own_descriptors)


def lacks_descriptors(error):
    """Diz se faltam descritores, e o registra.

    Argumentos:
        error (OSError): falha ao aceitar uma conexão.
    Retorna:
        bool: verdadeiro se faltam: a conexão continua na fila do sistema, e sem uma
        pausa o laço giraria à toa.
    """
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return False
    rare.tell("faltam descritores de arquivo: aumente o limite (LimitNOFILE) ou diminua MAX_STREAMS")
    return True


def tell_thread_lack(error):
    """Registra que o sistema não deixa criar mais threads.

    Argumentos:
        error (RuntimeError): a recusa.
    """
    rare.tell(f"faltam threads ({error}): aumente o limite (TasksMax) e a memória, ou diminua MAX_STREAMS")


def open_listener(host, port):
    """Abre o socket em que um servidor escuta.

    Argumentos:
        host (str): endereço ou nome desta máquina.
        port (int): porta; 0 escolhe uma livre.
    Retorna:
        socket.socket: socket escutando.
    Levanta:
        OSError: se o endereço não existe ou a porta está ocupada.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def serve_flask(listener):
    """Atende com o servidor do Flask, uma thread por cliente.

    Argumentos:
        listener (socket.socket): socket escutando.
    Retorna:
        callable: função que devolve o número de conexões vivas.
    """
    # O werkzeug só aceita um socket pronto pela porta de seu recarregador. Por
    # ela, a porta já está aberta quando o systemd é avisado, uma porta ocupada é
    # dita com a nossa frase, e o aviso de "servidor de desenvolvimento" não sai.
    raise_descriptor_limit()
    vars(werkzeug.serving).update(
        ThreadedWSGIServer=flask_server,
        selectors=types.SimpleNamespace(DefaultSelector=no_selector, EVENT_READ=select.EPOLLIN),
    )
    os.environ |= {"WERKZEUG_RUN_MAIN": "true", "WERKZEUG_SERVER_FD": str(listener.fileno())}
    app.run(host=HTTP_HOST, port=HTTP_PORT, threaded=True, debug=False, use_reloader=False,
            load_dotenv=False, request_handler=flask_handler)
    listener.close()
    return lambda: len(flask_handler.live)


class waitress_error(waitress.task.ErrorTask):
    """Erro do waitress no mesmo formato dos outros."""

    def execute(self):
        """Escreve a resposta de erro."""
        status = self.request.error.code
        if status == 401:
            forwarded = self.request.headers.get("X_FORWARDED_FOR", "")
            tell_unauthorized({"REMOTE_ADDR": self.channel.addr[0], "HTTP_X_FORWARDED_FOR": forwarded})
        body, headers = host_error(status, self.request.head)
        self.status = f"{status} {self.request.error.reason}"
        self.response_headers.extend([*headers, ("Connection", "close")])
        self.close_on_finish = True
        self.content_length = len(body)
        self.write(body)


class waitress_task(waitress.task.WSGITask):
    """Requisição do waitress que conhece a sua conexão."""

    def get_environment(self):
        """Completa o ambiente WSGI.

        Retorna:
            dict: ambiente com "ndjson.channel", a conexão.
        """
        return super().get_environment() | {"ndjson.channel": self.channel}

    def build_response_header(self):
        """Monta os cabeçalhos; fecha a conexão de quem foi recusado, e todas se são muitas.

        Guardada, ela ocuparia um descritor que falta a quem ainda espera por resposta.

        Retorna:
            bytes: linha de status e cabeçalhos.
        """
        is_crowded = len(self.channel.server.active_channels) - gate.alive > kept_connections
        if is_crowded or not self.status.startswith("2"):
            self.request.headers["CONNECTION"] = "close"
        return super().build_response_header()


class request_refused(waitress.utilities.Error):
    """Requisição recusada antes de chegar à aplicação."""

    def __init__(self, status):
        """Dá o status ao waitress.

        Argumentos:
            status (int): status HTTP.
        """
        super().__init__("")
        self.code, self.reason = status, http.HTTPStatus(status).phrase


class waitress_parser(waitress.parser.HTTPRequestParser):
    """Requisição do waitress com o alvo como veio e com os nossos limites."""

    refusal = 0
    head = b""
    # O waitress os supõe em qualquer requisição, também na que não pôde ler.
    command = path = ""

    def parse_header(self, header_plus):
        """Lê a linha de requisição e os cabeçalhos.

        Argumentos:
            header_plus (bytes): a linha de requisição e os cabeçalhos.
        Levanta:
            waitress.parser.ParsingError: se não forem válidos.
        """
        self.head = header_plus.removesuffix(b"\r\n")
        self.refusal = head_error(self.head)
        if self.refusal:
            raise waitress.parser.ParsingError("")
        line, separator, rest = header_plus.partition(b"\r\n")
        # O waitress recusa UTF-8 sem escapes no alvo; o alvo original é reposto.
        super().parse_header(re.sub(rb"[\x80-\xff]", lambda byte: b"%%%02X" % byte[0][0], line) + separator + rest)
        words = line.split(b" ")
        if len(words) > 1:
            self.request_uri = words[1].decode("latin-1")
        if "COOKIE" in self.headers:
            self.headers["COOKIE"] = joined_cookies(self.head)
        # Depois do "100 Continue" o waitress esperaria por um corpo que não vem.
        self.expect_continue = self.expect_continue and self.body_rcv is not None
        if self.body_rcv is not None and not self.is_welcome():
            self.refusal = 401
            raise waitress.parser.ParsingError("")

    def is_welcome(self):
        """Diz se o corpo desta requisição pode ser lido.

        Retorna:
            bool: falso se ela precisa de um token que não traz: o corpo de quem não
            pode pedir não ocupa memória.
        """
        environ = {"HTTP_AUTHORIZATION": self.headers.get("AUTHORIZATION", ""), "REQUEST_URI": self.request_uri}
        is_free = self.command == "OPTIONS" or request_target(environ)[0] == "/ping"
        return is_free or is_authorized(environ)

    def received(self, data):
        """Recebe um trecho da requisição.

        Argumentos:
            data (bytes): trecho.
        Retorna:
            int: número de bytes consumidos.
        """
        before = self.header_plus
        is_start = not self.headers_finished and len(before) < 3
        start = before + data[:3] if is_start else b""
        consumed = super().received(data)
        if isinstance(self.error, waitress.utilities.RequestHeaderFieldsTooLarge):
            # Nesse caso o waitress lê, no lugar dos cabeçalhos, uma requisição inventada.
            self.head = before + data
        if self.empty or leading_blank.match(start):
            # O waitress tira qualquer espaço do começo; a RFC 9112 (2.2), só um CRLF.
            self.refusal, self.completed, self.empty = 400, True, False
        if not self.headers_finished and not self.completed:
            self.refusal = self.unfinished_error(len(data))
            self.completed = self.refusal > 0
        is_chunked = self.chunked and self.body_rcv is not None
        if is_chunked and len(self.body_rcv.control_line) + len(self.body_rcv.trailer) > line_limit:
            # O waitress juntaria, um trecho por vez, uma linha ou um rodapé sem fim.
            self.refusal, self.completed = 400, True
        size = len(self.body_rcv) if is_chunked else self.content_length
        if self.error is None and size > MAX_BODY:
            self.refusal, self.completed = 413, True
        if self.refusal:
            self.error = request_refused(self.refusal)
        if self.error is not None:
            # Pedir o corpo de uma requisição recusada adiaria o erro.
            self.expect_continue = False
        return consumed

    def unfinished_error(self, size):
        """Confere cabeçalhos que ainda não chegaram inteiros.

        O waitress esperaria para sempre por um CRLF duplo.

        Argumentos:
            size (int): bytes do último trecho.
        Retorna:
            int: status HTTP da recusa; 0 se tudo está certo até aqui.
        """
        if bare_break.search(self.header_plus, max(0, len(self.header_plus) - size)):
            return 400
        is_long = len(self.header_plus) > line_limit and self.header_plus.find(b"\r\n", 0, line_limit + 2) < 0
        return 414 if is_long else 0


class waitress_channel(waitress.channel.HTTPChannel):
    """Conexão do waitress com a nossa leitura da requisição, erros e prazos.

    Os prazos do waitress seguem o relógio do sistema, que pode voltar no tempo, e
    não alcançam quem envia a requisição aos poucos nem quem não lê a resposta.
    """

    parser_class = waitress_parser
    task_class = waitress_task
    error_task_class = waitress_error
    watcher = None

    def __init__(self, server, *args, **options):
        """Começa a contar o prazo da requisição.

        Argumentos:
            server (waitress.server.BaseWSGIServer): servidor.
            args (object): argumentos do waitress.
            options (object): argumentos nomeados do waitress.
        """
        self.poller = server.asyncore
        self.moved_at = time.monotonic()
        self.began_at = self.moved_at
        self.is_refused, self.discard_at = False, None
        super().__init__(server, *args, **options)

    def add_channel(self, map=None):
        """Entra no laço.

        Argumentos:
            map (dict): descritores do laço.
        """
        super().add_channel(map)
        self.poller.touched.append(self._fileno)

    def service(self):
        """Atende uma requisição, na thread do cliente."""
        descriptor = self._fileno
        self.is_refused = self.requests[0].error is not None
        super().service()
        self.watcher = None
        self.poller.touched.append(descriptor)
        self.server.pull_trigger()

    def write_soon(self, data):
        """Envia um trecho da resposta, na thread do cliente.

        Argumentos:
            data (bytes): trecho.
        Retorna:
            int: número de bytes aceitos.
        Levanta:
            waitress.channel.ClientDisconnected: se o cliente saiu.
        """
        descriptor = self._fileno
        size = super().write_soon(data)
        if self.total_outbufs_len or self.will_close:
            self.poller.touched.append(descriptor)
            self.server.pull_trigger()
        return size

    def send(self, data, do_close=True):
        """Escreve no socket.

        Argumentos:
            data (bytes): bytes a enviar.
            do_close (bool): verdadeiro se um erro deve fechar a conexão já.
        Retorna:
            int: número de bytes enviados.
        """
        sent = super().send(data, do_close)
        if sent:
            self.moved_at = time.monotonic()
        return sent

    def received(self, data):
        """Recebe bytes do cliente.

        Argumentos:
            data (bytes): bytes recebidos.
        Retorna:
            bool: falso se foram ignorados.
        """
        self.moved_at = time.monotonic()
        if self.discard_at is not None:
            return False
        accepted = super().received(data)
        # Uma requisição pode começar enquanto outra, da mesma conexão, é atendida.
        self.began_at = None if self.request is None else self.began_at or self.moved_at
        return accepted

    def may_expire(self):
        """Diz se algum prazo corre; um stream em silêncio não tem nenhum, e são muitos.

        Retorna:
            bool: verdadeiro se expire deve ser chamado.
        """
        return self.watcher is None or self.total_outbufs_len > 0

    def expire(self, now):
        """Encerra a conexão se um prazo venceu.

        Argumentos:
            now (float): instante do relógio monotônico, em segundos.
        """
        silence = now - self.moved_at
        if self.discard_at is not None:
            if now >= self.discard_at:
                self.handle_close()
        elif self.began_at is not None and now - self.began_at > REQUEST_TIMEOUT / 1000 and not self.requests:
            self.began_at = None
            self.refuse()
        elif silence > client_timeout and (self.total_outbufs_len or not self.requests):
            # Quem não lê nunca deixa o socket pronto para escrita: o waitress, que só
            # fecha quem está pronto, esperaria para sempre.
            self.handle_close()

    def watch(self, stream):
        """Anota o stream que precisa saber que o cliente saiu.

        Argumentos:
            stream (stream): stream da requisição atendida.
        """
        self.watcher = stream
        if not self.connected:
            hub.leave(stream)

    def handle_close(self):
        """Fecha a conexão; a recusada, só depois de descartar o que o cliente envia.

        Fechar com bytes por ler apagaria a resposta a caminho (RST).
        """
        if self.is_refused and self.discard_at is None and self.connected:
            self.discard_at = time.monotonic() + discard_patience
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
                self.will_close = self.close_when_flushed = False
                return
        super().handle_close()
        # Nesta ordem: watch anota e só depois olha se a conexão já fechou.
        watcher = self.watcher
        if watcher is not None and not watcher.ended:
            hub.leave(watcher)

    def refuse(self):
        """Responde que a requisição não chegou a tempo."""
        with self.requests_lock:
            late, self.request = self.request or self.parser_class(self.adj), None
            late.head = late.head or late.header_plus
            late.error = request_refused(408)
            self.requests.append(late)
            self.server.add_task(self)

    def refuse_starved(self):
        """Responde, na thread do laço, à requisição para a qual não há thread."""
        self.requests[0].error = request_refused(503)
        self.service()


class waitress_poller:
    """Laço do waitress com epoll, cujo custo segue o que acontece.

    O do waitress pergunta a todas as conexões, a cada volta, o que elas esperam:
    com milhares de streams, aceitar um cliente custaria milissegundos.
    """

    def __init__(self):
        """Começa sem conexões."""
        self.epoll = select.epoll()
        self.known = {}
        # Descritores cuja espera pode ter mudado por obra de outra thread.
        self.touched = collections.deque()
        # Conexões com uma requisição completa para a qual não há thread.
        self.starved = collections.deque()

    def loop(self, timeout, map, use_poll):
        """Atende as conexões até não restar nenhuma.

        Argumentos:
            timeout (float): espera máxima de uma volta, em segundos.
            map (dict): descritor -> conexão, mantido pelo waitress.
            use_poll (bool): sem uso.
        """
        fixed = list(map)
        changed, sweep_at = set(fixed), 0.0
        while map:
            for descriptor in changed:
                self.update(descriptor, map.get(descriptor))
            changed = set(fixed)
            for descriptor, flags in self.epoll.poll(timeout):
                if descriptor in map:
                    waitress.wasyncore.readwrite(map[descriptor], flags)
                    changed.add(descriptor)
            now = time.monotonic()
            if now >= sweep_at:
                sweep_at = now + sweep_interval
                for channel in [each for each in map.values() if isinstance(each, waitress_channel) and each.may_expire()]:
                    channel.expire(now)
            while self.starved:
                self.starved.popleft().refuse_starved()
            while self.touched:
                changed.add(self.touched.popleft())

    def update(self, descriptor, channel):
        """Diz ao epoll o que uma conexão espera agora.

        Argumentos:
            descriptor (int): descritor da conexão.
            channel (waitress.wasyncore.dispatcher): conexão; None se já fechou.
        """
        if channel is None:
            self.known.pop(descriptor, None)
            return
        flags = select.EPOLLIN | select.EPOLLPRI if channel.readable() else 0
        if channel.writable() and not channel.accepting:
            flags |= select.EPOLLOUT
        known = self.known.get(descriptor)
        if known == (channel, flags):
            return
        self.known[descriptor] = (channel, flags)
        # O número do descritor pode ser de uma conexão nova: fechar um socket o
        # tira do epoll.
        if known is not None and known[0] is channel:
            self.epoll.modify(descriptor, flags)
        else:
            self.epoll.register(descriptor, flags)


class waitress_dispatcher(waitress.task.ThreadedTaskDispatcher):
    """Threads do waitress criadas à medida que os clientes chegam.

    O número fixo do waitress teria de ser o de MAX_STREAMS desde o início, ou o
    quinto cliente esperaria pelo fim de um dos quatro primeiros.
    """

    def add_task(self, task):
        """Entrega uma conexão a uma thread livre, criando-a se preciso.

        Argumentos:
            task (waitress_channel): conexão com uma requisição completa.
        """
        with self.lock:
            free = len(self.threads) - self.stop_count - self.active_count - len(self.queue)
        if free <= 0 and len(self.threads) < MAX_STREAMS + spare_threads:
            try:
                self.set_thread_count(len(self.threads) + 1)
            except RuntimeError as error:
                tell_thread_lack(error)
                # A trava da conexão está na mão de quem chama: a resposta fica para o laço.
                task.poller.starved.append(task)
                task.server.pull_trigger()
                return
        super().add_task(task)

    def start_new_thread(self, target, thread_no):
        """Cria uma thread.

        Argumentos:
            target (callable): função da thread.
            thread_no (int): número da thread, que o waitress já contou.
        Levanta:
            RuntimeError: se o sistema não deixa criar mais uma.
        """
        try:
            super().start_new_thread(target, thread_no)
        except RuntimeError:
            self.threads.discard(thread_no)
            raise

    def handler_thread(self, thread_no):
        """Atende conexões; além de spare_threads, só enquanto há o que atender.

        Argumentos:
            thread_no (int): número da thread.
        """
        while True:
            with self.lock:
                if not self.wait_task():
                    self.threads.discard(thread_no)
                    self.thread_exit_cv.notify()
                    return
                task = self.queue.popleft()
            try:
                task.service()
            except Exception as error:
                # A thread acabaria e continuaria contada.
                log.error("falha interna em uma conexão: %s: %s", type(error).__name__, error)
                task.cancel()

    def wait_task(self):
        """Espera por uma conexão, com a trava na mão.

        Retorna:
            bool: falso se a thread deve acabar; já não é contada como ativa.
        """
        while not self.queue:
            self.active_count -= 1
            is_called = self.queue_cv.wait(thread_patience)
            if not is_called and not self.queue and len(self.threads) > spare_threads:
                return False
            self.active_count += 1
        return True


# Threads e conexões do waitress além de MAX_STREAMS: respondem 503 e /ping.
spare_threads = 16
spare_connections = 1024
# Conexões sem stream a partir das quais nenhuma é guardada para outra requisição.
kept_connections = 32


def pausing_accept(server):
    """Faz o waitress esperar, sem girar à toa, quando faltam descritores.

    Argumentos:
        server (waitress.server.BaseWSGIServer): servidor.
    Retorna:
        tuple: substitutos dos métodos accept e readable do servidor.
    """
    plain_accept, plain_readable, ready_at = server.accept, server.readable, 0.0

    def accept():
        """Aceita uma conexão.

        Retorna:
            tuple: (socket, endereço do cliente); None se não há nenhuma.
        Levanta:
            OSError: se o sistema não tem mais descritores ou o cliente desistiu.
        """
        nonlocal ready_at
        try:
            return plain_accept()
        except OSError as error:
            if lacks_descriptors(error):
                ready_at = time.monotonic() + accept_pause
            raise

    def readable():
        """Diz se o laço deve esperar por conexões.

        Retorna:
            bool: falso durante a pausa ou além do limite de conexões.
        """
        return plain_readable() and time.monotonic() >= ready_at

    return accept, readable


def serve_waitress(listener):
    """Atende com o waitress.

    Argumentos:
        listener (socket.socket): socket escutando.
    Retorna:
        callable: função que devolve o número de conexões com resposta pendente.
    """
    server = waitress.create_server(
        app, sockets=[listener], ident=SERVERNAME, threads=1, backlog=backlog,
        # Além do limite as conexões esperam na fila do sistema; sem ele, a falta
        # de descritores faria o laço do waitress girar à toa.
        connection_limit=min(MAX_STREAMS + spare_connections, raise_descriptor_limit()), asyncore_use_poll=True,
        channel_request_lookahead=1, outbuf_high_watermark=high_watermark,
        # O corpo fica na memória, como no servidor do Flask: um arquivo provisório
        # custaria um descritor a mais por conexão, e o disco pode estar cheio.
        inbuf_overflow=MAX_BODY + 1,
        # O limite é conferido por waitress_parser: este contaria também as
        # marcas dos chunks.
        max_request_header_size=line_limit + 2 * headers_limit, max_request_body_size=sys.maxsize, clear_untrusted_proxy_headers=False,
        log_socket_errors=False,
    )
    server.channel_class = waitress_channel
    server.asyncore = waitress_poller()
    server.maintenance = lambda now: None
    server.accept, server.readable = pausing_accept(server)
    server.task_dispatcher.set_thread_count(0)
    server.task_dispatcher = waitress_dispatcher()
    server.task_dispatcher.set_thread_count(spare_threads)

    def close_listener():
        """Deixa de escutar; roda na thread do laço do waitress."""
        server.accepting = False
        server.del_channel()
        listener.close()

    def unfinished():
        """Conta as conexões com resposta pendente.

        Retorna:
            int: número de conexões.
        """
        channels = list(server.active_channels.values())
        return sum(1 for channel in channels if channel.requests or channel.total_outbufs_len)

    # O laço do waitress envia e fecha as respostas: deve viver até o fim delas.
    threading.Thread(target=server.run, name="waitress", daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        while not stop.is_requested:
            # O sistema pode entregar o sinal a outra thread, o que não acorda esta, a
            # única em que o Python o trata: uma espera sem prazo o perderia.
            time.sleep(signal_interval)
    server.trigger.pull_trigger(close_listener)
    return unfinished


hosts = {"flask": serve_flask, "waitress": serve_waitress}


# =============================================================================
# Métricas, para o Prometheus
# =============================================================================
# Desligadas (meter é None), não custam nada. Ligadas, o caminho de uma linha só paga
# por uma ida ao Redis; o resto são números que o programa já guarda, lidos na hora.

# Limites das faixas: segundos até a primeira linha, da duração, de uma ida ao Redis
# e do atraso do coletor; e comandos em uma ida.
first_line_limits = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
duration_limits = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
round_limits = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 2)
lag_limits = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
command_limits = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
# Tempo máximo, em segundos, de quem pede as métricas e não fala.
metrics_timeout = 10
# Erros que não estão em error_codes.
refusal_codes = ((500, "redis_error"), (503, "shutdown"), (504, "redis_unavailable"))


class histogram:
    """Valores contados em faixas; quem observa cuida de que seja uma thread por vez."""

    def __init__(self, limits):
        """Começa vazio.

        Argumentos:
            limits (tuple): maior valor de cada faixa; há mais uma, sem limite.
        """
        self.limits = limits
        self.counts = [0] * (len(limits) + 1)
        self.total = 0.0

    def observe(self, value):
        """Conta um valor.

        Argumentos:
            value (float): o valor.
        """
        self.counts[bisect.bisect_left(self.limits, value)] += 1
        self.total += value

    def buckets(self):
        """Soma as faixas como o Prometheus as quer.

        Retorna:
            list: pares (limite em texto, quantos valores até ele).
        """
        names = [*map(str, map(float, self.limits)), "+Inf"]
        return list(zip(names, itertools.accumulate(self.counts), strict=True))


class metrics_server(http.server.ThreadingHTTPServer):
    """Servidor HTTP das métricas, que não escreve no log o que um cliente faz."""

    daemon_threads = True

    def __init__(self, listener, handler):
        """Recebe o socket pronto.

        Argumentos:
            listener (socket.socket): socket escutando.
            handler (type): quem atende uma conexão.
        """
        super().__init__(listener.getsockname(), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener

    def get_request(self):
        """Aceita uma conexão.

        Retorna:
            tuple: (socket, endereço do cliente).
        Levanta:
            OSError: se o sistema não tem mais descritores ou o cliente desistiu.
        """
        try:
            return super().get_request()
        except OSError as error:
            if lacks_descriptors(error):
                time.sleep(accept_pause)
            raise

    def handle_error(self, request, client_address):
        """Registra em debug a falha de uma conexão.

        Argumentos:
            request (socket.socket): conexão.
            client_address (tuple): endereço do cliente.
        """
        log.debug("métricas: %s", sys.exc_info()[1])


class metrics_meter:
    """O que o programa conta para as métricas e o servidor que as mostra."""

    def __init__(self, listener):
        """Começa a contar e a servir.

        Argumentos:
            listener (socket.socket): socket escutando em METRICS_HOST e METRICS_PORT.
        """
        # Importado só aqui: sem métricas, o módulo pode nem existir.
        import prometheus_client
        import prometheus_client.core

        self.library = prometheus_client
        self.lock = threading.Lock()
        self.live = {}
        self.ends = dict.fromkeys(end_reasons, 0)
        known = (*refusal_codes, *((status, code) for status, (code, _) in error_codes.items()))
        self.refusals = dict.fromkeys(sorted(known), 0)
        self.lines = self.bytes = self.unheard = 0
        self.first_line, self.duration = histogram(first_line_limits), histogram(duration_limits)
        self.rounds, self.commands = histogram(round_limits), histogram(command_limits)
        self.lag = histogram(lag_limits)
        registry = prometheus_client.CollectorRegistry()
        registry.register(self)
        prometheus_client.ProcessCollector(namespace="ndjson_proxy", registry=registry)
        handler = prometheus_client.MetricsHandler.factory(registry)
        handler.timeout = metrics_timeout
        handler.version_string = lambda self: SERVERNAME
        self.server = metrics_server(listener, handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.1,), name="métricas", daemon=True)
        self.thread.start()
        log.info("métricas: http://%s:%d/metrics", url_host(METRICS_HOST), METRICS_PORT)

    def stop(self):
        """Deixa de servir e fecha a porta."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    # -- contagem ---------------------------------------------------------------

    def begin(self, stream):
        """Passa a somar as linhas de um stream enquanto ele vive.

        Argumentos:
            stream (stream): stream cuja tarefa foi aceita.
        """
        with self.lock:
            self.live[stream] = None

    def finish(self, stream, duration):
        """Conta o fim de um stream.

        Argumentos:
            stream (stream): stream encerrado.
            duration (float): da requisição ao fim, em segundos.
        """
        with self.lock:
            if stream not in self.live:
                # O Redis recusou a tarefa: já foi contada como recusa.
                return
            del self.live[stream]
            self.ends[stream.reason] += 1
            self.lines += stream.lines
            self.bytes += stream.bytes
            self.duration.observe(duration)

    def note_first_line(self, seconds):
        """Conta a primeira linha de um stream.

        Argumentos:
            seconds (float): da requisição a ela.
        """
        with self.lock:
            self.first_line.observe(seconds)

    def note_refusal(self, status, code):
        """Conta um erro respondido antes do streaming.

        Argumentos:
            status (int): status HTTP.
            code (str): código do erro.
        """
        with self.lock:
            self.refusals[status, code] = self.refusals.get((status, code), 0) + 1

    def note_unheard(self):
        """Conta uma tarefa publicada sem ninguém ouvindo."""
        with self.lock:
            self.unheard += 1

    def note_round(self, commands, seconds):
        """Conta uma ida ao Redis; só o coletor chama, e por isso sem trava.

        Argumentos:
            commands (int): comandos enviados.
            seconds (float): de reunir os comandos à última resposta.
        """
        self.commands.observe(commands)
        self.rounds.observe(seconds)

    def note_wake(self, moment, now):
        """Conta o atraso do coletor; só ele chama, e por isso sem trava.

        Argumentos:
            moment (float): quando havia algo a fazer; 0.0 se já havia, ou infinito.
            now (float): quando ele acordou.
        """
        if 0.0 < moment <= now:
            self.lag.observe(now - moment)

    # -- leitura ----------------------------------------------------------------

    def collect(self):
        """Lê tudo; é o que o prometheus_client chama a cada consulta.

        Retorna:
            iterator: famílias de métricas.
        """
        with self.lock:
            lines = self.lines + sum(stream.lines for stream in self.live)
            size = self.bytes + sum(stream.bytes for stream in self.live)
            ends = [((name,), count) for name, count in self.ends.items()]
            refusals = [((str(status), code), count) for (status, code), count in self.refusals.items()]
            first_line = self.histogram("first_line_seconds", "Da requisição à primeira linha.", self.first_line)
            duration = self.histogram("stream_seconds", "Da requisição ao fim do streaming.", self.duration)
        yield first_line
        yield duration
        yield self.labelled("info", "Versão e servidor HTTP.", ("version", "server"), [((version, HTTP_SERVER), 1)])
        yield self.gauge("streams", "Streams vivos.", gate.alive)
        yield self.gauge("streams_limit", "MAX_STREAMS, ou menos se faltam descritores.", gate.limit)
        yield self.gauge("threads", "Threads do processo.", threading.active_count())
        yield self.labelled("tasks", "Tarefas terminadas, por motivo do fim.", ("reason",), ends, is_counter=True)
        yield self.labelled("requests_refused", "Requisições recusadas antes do streaming.", ("status", "reason"),
                            refusals, is_counter=True)
        yield self.counter("lines", "Linhas enviadas, as de erro inclusive.", lines)
        yield self.counter("sent_bytes", "Bytes de linhas enviados.", size)
        yield self.counter("tasks_unheard", "Tarefas publicadas sem ninguém no canal nem fila.", self.unheard)
        yield from self.collect_redis()

    def collect_redis(self):
        """Lê o que diz respeito ao Redis e ao coletor.

        Retorna:
            iterator: famílias de métricas.
        """
        yield self.gauge("redis_up", "1 se o Redis responde.", int(not hub.is_down))
        yield self.counter("redis_cuts", "Quedas do Redis ou da conexão com ele.", hub.cuts)
        yield self.counter("redis_reconnects", "Voltas do Redis.", hub.returns)
        yield self.gauge("redis_wake_up", "1 se o Redis avisa as mudanças (REDIS_WAKE).", int(hub.is_tracked))
        yield self.histogram("collector_round_seconds", "Duração de uma ida ao Redis.", self.rounds)
        yield self.histogram("collector_round_commands", "Comandos em uma ida ao Redis.", self.commands)
        yield self.histogram("collector_lag_seconds", "Atraso do coletor em relação ao que venceu.", self.lag)

    def gauge(self, name, text, value):
        """Monta um valor que sobe e desce.

        Argumentos:
            name (str): nome sem o prefixo.
            text (str): descrição.
            value (float): valor.
        Retorna:
            prometheus_client.core.GaugeMetricFamily: a família.
        """
        return self.library.core.GaugeMetricFamily(f"ndjson_proxy_{name}", text, value=value)

    def counter(self, name, text, value):
        """Monta um valor que só sobe.

        Argumentos:
            name (str): nome sem o prefixo nem "_total".
            text (str): descrição.
            value (float): valor.
        Retorna:
            prometheus_client.core.CounterMetricFamily: a família.
        """
        return self.library.core.CounterMetricFamily(f"ndjson_proxy_{name}", text, value=value)

    def labelled(self, name, text, labels, rows, is_counter=False):
        """Monta um valor por combinação de rótulos.

        Argumentos:
            name (str): nome sem o prefixo.
            text (str): descrição.
            labels (tuple): nomes dos rótulos.
            rows (list): pares (valores dos rótulos, valor).
            is_counter (bool): verdadeiro se os valores só sobem.
        Retorna:
            prometheus_client.core.Metric: a família.
        """
        core = self.library.core
        form = core.CounterMetricFamily if is_counter else core.GaugeMetricFamily
        family = form(f"ndjson_proxy_{name}", text, labels=labels)
        for values, value in rows:
            family.add_metric(values, value)
        return family

    def histogram(self, name, text, source):
        """Monta uma distribuição.

        Argumentos:
            name (str): nome sem o prefixo.
            text (str): descrição.
            source (histogram): os valores contados.
        Retorna:
            prometheus_client.core.HistogramMetricFamily: a família.
        """
        return self.library.core.HistogramMetricFamily(
            f"ndjson_proxy_{name}", text, buckets=source.buckets(), sum_value=source.total
        )


# =============================================================================
# Sinais e programa principal
# =============================================================================

stop_signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
hub: collector
gate = stream_gate()
meter = None


class stop_switch:
    """Pedido de parada: o sinal só interrompe a thread principal quando ela espera."""

    is_requested = False
    is_busy = False


stop = stop_switch()


def handle_signal(number, frame):
    """Pede a parada; um segundo sinal encerra na hora, pela ação padrão.

    Argumentos:
        number (int): número do sinal.
        frame (frame): quadro interrompido.
    Levanta:
        KeyboardInterrupt: se nenhuma conexão está sendo aceita; é como o laço do
            werkzeug aceita parar. Senão, service_actions a levanta em seguida.
    """
    for each in stop_signals:
        signal.signal(each, signal.SIG_DFL)
    stop.is_requested = True
    if not stop.is_busy:
        raise KeyboardInterrupt


def shown_value(row, given):
    """Mostra o valor efetivo de uma configuração.

    Argumentos:
        row (setting): linha da tabela.
        given (layered): texto e camada.
    Retorna:
        str: o texto, mascarado se for segredo.
    """
    if row.secret:
        return "********" if given.text else ""
    if row.name == "REDIS_SERVER":
        return REDIS_SERVER.shown
    return given.text


def secret_places(argv):
    """Acha os segredos na linha de comando, também os que um argumento posterior trocou.

    Argumentos:
        argv (list[str]): argumentos, sem o nome do programa.
    Retorna:
        list: pares (posição do argumento, início do segredo dentro dele, em bytes).
    """
    owners = {flag: row for row in settings if row.secret or row.name == "REDIS_SERVER" for flag in row.flags}
    # O valor vem na palavra seguinte, ou na mesma: -Svalor, --secret=valor.
    prefixes = {flag + "=" if flag.startswith("--") else flag: row for flag, row in owners.items()}
    places, owner = [], None
    for position, word in enumerate(argv):
        prefix = "" if owner else next((prefix for prefix in prefixes if word.startswith(prefix)), "")
        row = owner or prefixes.get(prefix)
        # O endereço que outro argumento trocou ninguém conferiu: cobre-se o que possa ter senha.
        if row and (row.secret or re.search("@|password", urllib.parse.unquote(word[len(prefix):]))):
            places.append((position, len(prefix)))
        owner = None if owner else owners.get(word)
    return places


def hide_secrets(argv):
    """Cobre com asteriscos os segredos que a lista de processos mostra.

    É o que se pode fazer depois de iniciado, e onde o sistema não deixa nada muda: o
    lugar de um segredo é o arquivo.

    Argumentos:
        argv (list[str]): argumentos, sem o nome do programa.
    """
    places = secret_places(argv)
    if not places:
        return
    try:
        with open("/proc/self/stat", "rb") as file:
            # Campos 48 e 49, depois do nome do processo, que pode ter espaços.
            start, end = map(int, file.read().rpartition(b")")[2].split()[45:47])
        # Um endereço errado aqui é um erro de leitura; com um ponteiro, seria o fim.
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            words = memory.read(end - start).removesuffix(b"\0").split(b"\0")
            first = len(words) - len(argv)
            for position, begin in places:
                before = sum(len(word) + 1 for word in words[:first + position])
                memory.seek(start + before + begin)
                memory.write(b"*" * (len(words[first + position]) - begin))
    except (OSError, ValueError) as error:
        log.debug("os segredos continuam à vista na lista de processos: %s", reason(error))


def show(text):
    """Escreve na saída padrão, que pode ser um cano, um arquivo ou nada.

    Argumentos:
        text (str): uma ou mais linhas, sem o LF final.
    Levanta:
        OSError: se a saída falhar; quem parou de ler (head) não é uma falha.
    """
    if sys.stdout is None:
        return
    with contextlib.suppress(BrokenPipeError):
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
    shown, words = REDIS_SERVER.shown, reason(error)
    if isinstance(error, redis.ResponseError) and "DB index" in words:
        return 2, (f"REDIS_SERVER: o valor {shown!r} ({given['REDIS_SERVER'].layer}) não serve: "
                   f"o Redis não tem esse database ({words})")
    if isinstance(error, redis.AuthenticationError) or words.startswith(("NOAUTH", "WRONGPASS")):
        name = "REDIS_SERVER" if has_password(given["REDIS_SERVER"].text) else "REDIS_PASSWORD"
        return 1, f"{name}: o Redis em {shown} recusou a senha ({given[name].layer}): {words}"
    # Uma recusa é uma resposta: o endereço está certo, e o Redis, no ar.
    is_refusal = isinstance(error, redis.ResponseError | redis.BusyLoadingError) or "max number of clients" in words
    verb = "recusou a conexão" if is_refusal else "não atende"
    return 1, f"REDIS_SERVER: o Redis em {shown} {verb}: {words}"


def check(given):
    """Mostra as configurações e testa o Redis (--check).

    Argumentos:
        given (dict): texto e camada de cada configuração.
    Retorna:
        int: 0 se o Redis respondeu; 1 se não; 2 se ele não tem o database.
    Levanta:
        OSError: se a saída padrão falhar.
    """
    show("\n".join(f"{row.name} = {shown_value(row, given[row.name])}  ({given[row.name].layer})" for row in settings))
    link = redis_link(redis_pool(), f"{program}-check")
    try:
        link.open()
        error = first_error(link.call([("PING",)]))
    except (redis.RedisError, OSError) as failure:
        error = failure
    link.close()
    status, sentence = redis_problem(error, given) if error else (0, f"Redis em {REDIS_SERVER.shown}: respondeu ao PING")
    show(sentence)
    return status


def wait_while_falling(count):
    """Espera uma contagem chegar a zero, enquanto ela diminui.

    Milhares de streams levam segundos para receber a última linha; um cliente que
    não lê nunca a recebe, e não pode segurar a parada.

    Argumentos:
        count (callable): devolve a contagem.
    """
    left, deadline = count(), time.monotonic() + shutdown_patience
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        now = count()
        if now < left:
            left, deadline = now, time.monotonic() + shutdown_patience


def stop_service(unfinished):
    """Encerra os streams vivos dentro do prazo e apaga suas chaves.

    Argumentos:
        unfinished (callable): devolve o número de conexões não terminadas.
    """
    # O prazo do systemd acompanha DRAIN, seja qual for o TimeoutStopSec da unidade.
    notify_systemd(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={(DRAIN + 10000) * 1000}")
    gate.close()
    alive = gate.alive
    log.info("parando: %s", f"{plural(alive, 'stream tem', 'streams têm')} até {DRAIN} ms para acabar" if alive else
             "nenhum stream vivo")
    if not gate.wait_empty(DRAIN / 1000):
        hub.broadcast(ended_shutdown)
        wait_while_falling(lambda: gate.alive)
    wait_while_falling(unfinished)
    hub.stop(shutdown_patience)
    if meter is not None:
        meter.stop()
    log.info("parado")


# Tempo, em segundos, que cada etapa da parada espera sem ver progresso.
shutdown_patience = 1.0


def keep_one_core():
    """Prende o processo a um dos núcleos que ele pode usar.

    Com vários proxies no mesmo servidor, o número do processo os espalha.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        return
    try:
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
    except OSError as error:
        # A unidade do systemd nega esta chamada; lá, quem escolhe é CPUAffinity=.
        level = logging.DEBUG if "INVOCATION_ID" in os.environ else logging.INFO
        log.log(level, "ONE_CORE: o sistema não deixa escolher o núcleo: %s", reason(error))


def listener_problem(error, given, server):
    """Descreve por que um servidor não pode escutar.

    Argumentos:
        error (OSError): falha de open_listener.
        given (dict): texto e camada de cada configuração.
        server (str): HTTP ou METRICS, o início do nome das configurações dele.
    Retorna:
        tuple: (status de saída, frase): 2 se o nome não existe, o que nenhuma espera
        conserta; 1 nos outros casos.
    """
    (host, host_layer), (port, port_layer) = (
        (globals()[name], f"({given[name].layer})") for name in (f"{server}_HOST", f"{server}_PORT")
    )
    if isinstance(error, socket.gaierror):
        status = 1 if error.errno == socket.EAI_AGAIN else 2
        return status, f"{server}_HOST: o valor {host!r} {host_layer} não serve: {reason(error)}"
    if error.errno == errno.EADDRNOTAVAIL:
        return 1, f"{server}_HOST: o endereço {host} {host_layer} não pode ser aberto: {reason(error)}"
    return 1, f"{server}_PORT: a porta {port} {port_layer} em {host} não pode ser aberta: {reason(error)}"


def open_listeners(given):
    """Abre o socket da aplicação e, se METRICS_PORT pede, o das métricas.

    Argumentos:
        given (dict): texto e camada de cada configuração.
    Retorna:
        tuple: (status de saída se algum não abriu, ou 0; lista de sockets).
    """
    listeners = []
    for server in ("HTTP", "METRICS") if METRICS_PORT else ("HTTP",):
        try:
            listeners.append(open_listener(globals()[f"{server}_HOST"], globals()[f"{server}_PORT"]))
        except OSError as error:
            status, sentence = listener_problem(error, given, server)
            log.error("%s", sentence)
            return status, []
    return 0, listeners


def url_host(host):
    """Escreve um endereço como as URLs o pedem.

    Argumentos:
        host (str): endereço ou nome.
    Retorna:
        str: o IPv6 entre colchetes; o resto como veio.
    """
    return f"[{host}]" if ":" in host else host


def serve(given):
    """Conecta ao Redis, abre a porta e atende até o sinal de parada.

    Argumentos:
        given (dict): texto e camada de cada configuração.
    Retorna:
        int: 0 se parou por um sinal; 1 se o Redis ou a porta não atenderam; 2 se o
        database ou o endereço não existem.
    """
    global hub, meter
    hub = collector()
    try:
        hub.open_link()
    except (redis.RedisError, OSError) as error:
        status, sentence = redis_problem(error, given)
        log.error("%s", sentence)
        return status
    status, listeners = open_listeners(given)
    if status:
        return status
    listener = listeners[0]
    for each in stop_signals:
        signal.signal(each, handle_signal)
    if ONE_CORE:
        keep_one_core()
    # Percorrer os objetos de milhares de streams pararia todos por décimos de
    # segundo; o lixo cíclico deles é jovem, e as duas primeiras gerações o recolhem.
    gc.freeze()
    gc.set_threshold(10000, 20, 1000)
    hub.start()
    if METRICS_PORT:
        meter = metrics_meter(listeners[1])
    try:
        log.info("pronto: http://%s:%d (%s), Redis em %s", url_host(HTTP_HOST), listener.getsockname()[1],
                 HTTP_SERVER, REDIS_SERVER.shown)
        notify_systemd("READY=1")
        unfinished = hosts[HTTP_SERVER](listener)
    except KeyboardInterrupt:
        unfinished = int
    stop_service(unfinished)
    return 0


def main(argv):
    """Programa principal.

    Argumentos:
        argv (list[str]): argumentos, sem o nome do programa.
    Retorna:
        int: status de saída: 0 parada limpa, 1 Redis, porta ou saída, 2 configuração.
    """
    configure_logging("info")
    # Até o serviço começar, um Ctrl-C encerra como os outros sinais, sem traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        actions, given, warnings = load_settings(argv, os.environ)
        if "help" in actions:
            show(build_parser().format_help().rstrip("\n"))
            return 0
        if "version" in actions:
            show(f"{program} {version}")
            return 0
        log.setLevel(LOG_LEVEL.upper())
        for warning in warnings:
            log.warning("%s", warning)
        hide_secrets(argv)
        if "check" in actions:
            return check(given)
    except configuration_error as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("a saída não pode ser escrita: %s", reason(error))
        return 1
    return serve(given)


def leave(status):
    """Encerra o processo.

    As threads dos clientes que restam não podem prender o fim do interpretador: tudo
    o que importa já foi enviado, apagado e registrado.

    Argumentos:
        status (int): status de saída.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, log_queue):
            handler.drain()
    os._exit(status)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
