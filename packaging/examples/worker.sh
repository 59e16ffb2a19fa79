#!/usr/bin/env bash
# Worker de exemplo do py-ndjson-proxy só com redis-cli, bash e sed.
#
# Uso: worker.sh [segundos entre as palavras, padrão 0.3]
# Lê REDIS_SERVER, REDIS_PASSWORD, REDIS_CHANNEL e REDIS_QUEUE do ambiente, como o proxy.
# Com REDIS_QUEUE, tira as tarefas dessa lista, no lugar de ouvir o canal.
# Se o Redis cair no meio de uma tarefa, ela é abandonada (worker.py mostra como continuar).
set -uf                         # -f: as palavras da tarefa não são nomes de arquivos
export LC_ALL=C                 # bytes, não letras: nada aqui depende do idioma da máquina

server=${REDIS_SERVER:-127.0.0.1:6379/1}
channel=${REDIS_CHANNEL:-ndjson_jobs}
queue=${REDIS_QUEUE:-}
delay=${1:-0.3}
expiry=600                      # segundos; nada do que o worker cria dura mais que isso
parallel=16                     # tarefas da fila ao mesmo tempo neste processo

log() { printf 'worker: %s\n' "$*" >&2; }

# Traduz REDIS_SERVER (host:porta/banco, redis://, rediss:// ou unix://) para redis-cli.
# A senha vai por REDISCLI_AUTH: na linha de comando, qualquer um a leria com ps.
decode() { local text=${1//\\/\\\\}; printf '%b' "${text//%/\\x}"; }
export REDISCLI_AUTH=${REDIS_PASSWORD:-}
options=()
case $server in rediss://*) options+=(--tls) ;; esac
scheme=${server%%://*} rest=${server#*://} database=
case $rest in *[?]*) case ${rest#*[?]} in *db=*) database=${rest##*db=} database=${database%%&*} ;; esac ;; esac
rest=${rest%%[?]*}
case $rest in *@*)
    user=${rest%@*} rest=${rest##*@}
    case $user in *:*) REDISCLI_AUTH=${REDISCLI_AUTH:-$(decode "${user#*:}")} ;; esac
    user=$(decode "${user%%:*}")
    [ -z "$user" ] || options+=(--user "$user") ;;
esac
[ -n "$REDISCLI_AUTH" ] || unset REDISCLI_AUTH
if [ "$scheme" = unix ]; then
    options+=(-s "$rest")
else
    case $rest in */?*) database=${database:-${rest#*/}} ;; esac
    rest=${rest%%/*} port=6379
    case $rest in *:*[0-9]) port=${rest##*:} rest=${rest%:*} ;; esac
    rest=${rest#[} rest=${rest%]}               # [::1] -> ::1
    options+=(-h "${rest:-127.0.0.1}" -p "$port")
fi
redis() { redis-cli "${options[@]}" -n "${database:-0}" "$@"; }

# Escreve o argumento entre aspas simples, como redis-cli as lê em stdin.
quote() { printf "'%s'" "${1//\'/\\\'}"; }

# Entrega uma linha. Retorna 1 se a chave da tarefa sumiu (o cliente saiu, ou esgotou o tempo).
# Em MULTI, o proxy não apaga nada entre o EXISTS e o RPUSH; e o EXPIRE dá fim à lista mesmo
# que este processo morra aqui. Linhas da resposta: OK, três QUEUED, e a quinta é a do EXISTS.
push() {
    local key list
    key=$(quote "$task_key") list=$(quote "$task_list")
    case $(printf '%s\n' MULTI "EXISTS $key" "RPUSH $list $(quote "$1")" "EXPIRE $list $expiry" EXEC |
           redis | sed -n 5p) in
        1) ;;
        0) redis DEL "$task_list" >/dev/null    # nosso RPUSH recriou a lista, já sem leitor
           return 1 ;;
        *) log "tarefa $task_key abandonada: o Redis não aceitou a linha"
           return 1 ;;
    esac
}

# Produz a resposta: TROQUE ESTA. Recebe o corpo como texto JSON, sem as aspas e ainda com os
# escapes (\" \n \u00e9), que assim pode voltar para dentro de outro texto JSON.
answer() {
    local word
    push '{"type": "begin"}' || return
    for word in $1; do
        sleep "$delay"
        push "{\"type\": \"item\", \"content\": \"$word \"}" || return
    done
    push '{"type": "end"}'
}

# Atende uma tarefa. Argumento: a chave da tarefa, como veio pelo canal.
serve() {
    local task_key=$1 task_list task body inner string='"(([^"\\]|\\.)*)"'
    # PUBLISH chega a todos os workers; SET NX deixa passar um só.
    [ "$(redis SET "worker:claim:$task_key" "$$" NX EX "$expiry")" = OK ] || return
    task=$(redis GET "$task_key")
    [ -n "$task" ] || return                    # o cliente já desistiu
    # Os cabeçalhos são do cliente: saem antes, para que um deles não se passe por task_list.
    task=$(sed -E "s/\"headers\": *\{( *$string: *$string,?)*\}//" <<<"$task")
    task_list=$(sed -nE "s/.*\"task_list\": *$string.*/\1/p" <<<"$task")
    body=$(sed -nE "s/.*\"body\": *$string.*/\1/p" <<<"$task")
    # O corpo é JSON dentro de JSON: tira um nível de escapes e procura os campos conhecidos.
    inner=$(sed -E 's/\\(["\\\/])/\1/g' <<<"$body" |
            sed -nE "s/.*\"(chatInput|message|prompt)\": *$string.*/\2/p")
    [ -n "$task_list" ] || { log "tarefa $task_key sem task_list"; return; }
    # Ao término, avisar é melhor que deixar o cliente esperar até MAXTIME. Uma vez só: o sinal
    # chega duas quando é dado ao grupo, como faz o systemd.
    trap 'trap "" TERM; push "{\"error\": \"worker_stopped\"}" && redis DEL "$task_key" >/dev/null; exit' TERM
    # Apagar a chave é dizer "acabou". A lista não: o proxy ainda a está lendo.
    answer "${inner:-$body}" && redis DEL "$task_key" >/dev/null
}

# Espera que haja menos de $parallel tarefas em andamento: as outras ficam na fila, para quem
# estiver livre.
wait_for_room() {
    # shellcheck disable=SC2046  # um argumento por tarefa: é para separar
    set -- $(jobs -pr)
    while [ $# -ge "$parallel" ]; do
        wait -n
        # shellcheck disable=SC2046
        set -- $(jobs -pr)
    done
}

stop() {
    trap '' TERM INT HUP
    # shellcheck disable=SC2046  # vários números: é para separar
    kill ${listener:+"$listener"} $(jobs -p) 2>/dev/null
    wait
    exit 0
}
listener=
trap stop TERM INT HUP

if [ -n "$queue" ]; then
    ask=(-n "${database:-0}" BLPOP "$queue" 5)
    log "à espera na fila $queue"
else
    ask=(SUBSCRIBE "$channel")
fi
pause=0
while :; do
    # O redis-cli da volta anterior acabou; o número dele já pode ser de outro processo.
    listener=
    [ -z "$queue" ] || wait_for_room
    # redis-cli escreve três linhas por mensagem do canal, tipo, canal e conteúdo; da fila, o
    # nome dela e a chave, ou uma linha vazia, e sai.
    exec 3< <(exec redis-cli "${options[@]}" "${ask[@]}" </dev/null 2>&1)
    listener=$!
    reason="conexão fechada"
    while IFS= read -r kind <&3 || [ -n "$kind" ]; do
        [ -z "$queue" ] || case $kind in
            "$queue")  IFS= read -r key <&3; reason=; serve "$key" & continue ;;
            '')        reason= ;;
        esac
        case $kind in
            subscribe) read -r _ <&3; read -r _ <&3; pause=0
                       log "inscrito no canal $channel" ;;
            message)   read -r _ <&3; IFS= read -r key <&3; serve "$key" & ;;
            ?*)        reason=$kind ;;      # uma linha de erro
        esac
    done
    [ -n "$reason" ] || { pause=0; continue; }
    # Uma linha por queda, não uma por tentativa.
    [ "$pause" -gt 0 ] || log "sem Redis, tentando de novo até conseguir: $reason"
    pause=$(( pause ? (pause < 8 ? pause * 2 : 8) : 1 ))
    sleep "$pause"
done
