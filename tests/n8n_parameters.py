#!/usr/bin/env python3
"""Extrai do pacote n8n-nodes-base os parâmetros dos nós que o fluxo de exemplo usa.

O n8n inteiro ocupa mais de 2 GB: as provas usam só este resumo, guardado em n8n_parameters.json. Para refazê-lo,
ou acrescentar uma versão:

    npm pack n8n-nodes-base@2.40.2
    tests/n8n_parameters.py n8n-nodes-base-*.tgz > tests/n8n_parameters.json
"""

import json
import sys
import tarfile

# Os nós do fluxo de exemplo, sem o nome do pacote na frente.
wanted = ("code", "if", "redis", "redisTrigger", "splitInBatches", "stickyNote", "wait")


def summarize(properties):
    """Resume uma lista de parâmetros do n8n.

    Argumentos:
        properties: os parâmetros, como o pacote os descreve.

    Retorno:
        Lista de dicionários: `name`, `type`, `values` (dos que são uma escolha), `options` (nomes dentro de uma
        coleção), `required`, `show` e `hide` (de que outros parâmetros depende que ele exista), só com o que houver.
    """
    rows = []
    for item in properties:
        if item["type"] == "notice":
            continue
        row = {"name": item["name"], "type": item["type"]}
        if item["type"] == "options":
            row["values"] = [option["value"] for option in item.get("options", [])]
        elif "options" in item:
            row["options"] = [option["name"] for option in item["options"]]
        if item.get("required"):
            row["required"] = True
        rows.append(row | {name: rule for name, rule in item.get("displayOptions", {}).items() if rule})
    return rows


def extract(path):
    """Lê um pacote npm.

    Argumentos:
        path: caminho do .tgz feito por `npm pack`.

    Retorno:
        Tupla (versão, dicionário com `nodes` e `credentials`).
    """
    with tarfile.open(path) as package:

        def read(name):
            """Lê um JSON do pacote.

            Argumentos:
                name: caminho dentro da pasta `package`.

            Retorno:
                O conteúdo, decodificado.
            """
            return json.load(package.extractfile("package/" + name))

        nodes = {}
        for item in read("dist/types/nodes.json"):
            if item["name"] in wanted:
                versions = item["version"] if isinstance(item["version"], list) else [item["version"]]
                row = {"versions": versions, "outputs": len(item["outputs"]), "inputs": len(item["inputs"])}
                row["credentials"] = [kind["name"] for kind in item.get("credentials", [])]
                row["properties"] = summarize(item["properties"])
                nodes.setdefault(item["name"], []).append(row)
        kinds = {item["name"]: item for item in read("dist/types/credentials.json")}
        credentials = {"redis": summarize(kinds["redis"]["properties"])}
        return read("package.json")["version"], {"nodes": dict(sorted(nodes.items())), "credentials": credentials}


def compact(value, margin=""):
    """Escreve um JSON com um parâmetro por linha, para que a diferença entre duas versões se leia.

    Argumentos:
        value: o que escrever.
        margin: espaços no começo das linhas.

    Retorno:
        O texto, sem LF no fim.
    """
    if isinstance(value, dict) and "type" not in value:
        inside = [f"{json.dumps(name)}: {compact(item, margin + ' ')}" for name, item in value.items()]
        left, right = "{}"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        inside = [compact(item, margin + " ") for item in value]
        left, right = "[]"
    else:
        return json.dumps(value, ensure_ascii=False)
    return left + ",".join(f"\n{margin} {line}" for line in inside) + f"\n{margin}{right}"


if __name__ == "__main__":
    found = dict(extract(path) for path in sys.argv[1:])
    print(compact({"package": "n8n-nodes-base", "versions": found}))
