#!/usr/bin/env bash
# Cliente de exemplo do py-ndjson-proxy: mostra cada linha no momento em que ela chega.
#
# Uso: client.sh URL TEXTO        (o texto pode ser JSON: '{"chatInput": "Olá, mundo"}')
# Status: 0 se a resposta chegou ao fim; 22 em erro de HTTP (o JSON do erro é mostrado); outro
# número, o do curl, em erro de conexão. O que as linhas dizem é com quem as lê: uma resposta
# que acaba em {"error": "timeout"} também chegou ao fim.
set -u

if [ $# -ne 2 ]; then
    echo "uso: ${0##*/} URL TEXTO   (ex.: ${0##*/} http://127.0.0.1:8771/chat '{\"chatInput\": \"Olá, mundo\"}')" >&2
    exit 2
fi

case $2 in
    "{"*|"["*) kind="application/json" ;;
    *)         kind="text/plain; charset=utf-8" ;;
esac

# -N: sem isto o curl guarda as linhas até encher o seu buffer, e não há streaming.
# --fail-with-body: em erro de HTTP mostra o corpo e termina com status 22.
# O texto vai por stdin: como argumento, um "@" no início seria lido como nome de arquivo.
printf '%s' "$2" | curl -sS -N --fail-with-body --data-binary @- \
    -H "Content-Type: $kind" -H "Accept: application/x-ndjson" -- "$1"
