"""O fluxo de exemplo do n8n: preso aos nomes do pacote n8n-nodes-base e ao contrato, e fora de cada armadilha.

Ele foi executado num n8n de verdade, que é grande demais para estar aqui (packaging/doc/n8n.md diz o que se
viu). Estas provas impedem que uma mudança o estrague: leem o fluxo e os parâmetros que o pacote declara, resumidos em
n8n_parameters.json. E cada defeito conhecido, posto de propósito, tem de ser notado por elas.
"""

import copy
import json
import re

import pytest

import harness

folder = harness.root / "packaging" / "examples" / "n8n"
workflow = json.loads((folder / "workflow.json").read_text(encoding="utf-8"))
credentials = json.loads((folder / "credentials.json").read_text(encoding="utf-8"))
package = json.loads((harness.root / "tests" / "n8n_parameters.json").read_text(encoding="utf-8"))
guide = (harness.root / "packaging" / "doc" / "n8n.md").read_text(encoding="utf-8")
settings = {row.name: row.default for row in harness.load_program().settings}
prefix = package["package"] + "."
every_version = sorted(package["versions"])

# Tipo de cada parâmetro simples, em JSON. Um texto que começa com "=" é uma expressão, e serve a qualquer um.
simple = {"string": str, "options": str, "number": (int, float), "boolean": bool, "collection": dict, "filter": dict}


def allowed(rule, value):
    """Diz se um valor satisfaz uma condição de exibição do n8n.

    Argumentos:
        rule: lista de valores, ou de condições `{"_cnd": {"gte": 1}}`.
        value: o valor do outro parâmetro, ou a versão do nó.

    Retorno:
        True se algum dos itens da lista vale.
    """
    compare = {
        "gte": lambda a, b: a >= b,
        "gt": lambda a, b: a > b,
        "lte": lambda a, b: a <= b,
        "lt": lambda a, b: a < b,
    }
    for item in rule:
        if not isinstance(item, dict):
            if item == value:
                return True
        elif all(compare[name](value, limit) for name, limit in item["_cnd"].items()):
            return True
    return False


def visible(row, node):
    """Diz se o n8n mostra (e usa) um parâmetro, dados os outros do mesmo nó.

    Argumentos:
        row: o parâmetro, em n8n_parameters.json.
        node: o nó do fluxo.

    Retorno:
        True ou False.
    """
    known = {**node["parameters"], "@version": node["typeVersion"]}
    # "/nome" é um parâmetro da raiz, e todos os daqui são da raiz.
    values = {name: known.get(name.lstrip("/")) for name in (*row.get("show", {}), *row.get("hide", {}))}
    return all(allowed(rule, values[name]) for name, rule in row.get("show", {}).items()) and not any(
        allowed(rule, values[name]) for name, rule in row.get("hide", {}).items()
    )


def describe(node, version):
    """Procura a descrição de um nó no pacote.

    Argumentos:
        node: o nó do fluxo.
        version: a versão do pacote.

    Retorno:
        A descrição, ou None se o tipo ou a versão do nó não existirem.
    """
    rows = package["versions"][version]["nodes"].get(node["type"].removeprefix(prefix), [])
    return next((row for row in rows if node["typeVersion"] in row["versions"]), None)


def parameter_problems(flow):
    """Confere tipos, versões e parâmetros de todos os nós com o que o pacote declara.

    Argumentos:
        flow: o fluxo.

    Retorno:
        Lista de frases, vazia se tudo confere.
    """
    problems = []
    for node in flow["nodes"]:
        for version in every_version:
            place = f"{node['name']} ({version})"
            row = describe(node, version)
            if row is None or not node["type"].startswith(prefix):
                problems.append(f"{place}: não existe {node['type']} {node['typeVersion']}")
                continue
            if "redis" in row["credentials"] and set(node.get("credentials", {})) != {"redis"}:
                problems.append(f"{place}: sem credencial")
            shown = {item["name"]: item for item in row["properties"] if visible(item, node)}
            for name, value in node["parameters"].items():
                item = shown.get(name)
                if item is None:
                    problems.append(f"{place}: o parâmetro {name} não existe aqui")
                elif not (isinstance(value, str) and value.startswith("=")) and not isinstance(
                    value, simple[item["type"]]
                ):
                    problems.append(f"{place}: {name} não é {item['type']}")
                elif item["type"] == "options" and value not in item["values"]:
                    problems.append(f"{place}: {name} não pode ser {value}")
                elif item["type"] == "collection" and not set(value) <= set(item["options"]):
                    problems.append(f"{place}: {name} não tem {sorted(value)}")
            missing = {name for name, item in shown.items() if item.get("required")} - set(node["parameters"])
            problems += [f"{place}: falta {name}" for name in sorted(missing)]
    return problems


def connection_problems(flow):
    """Confere as ligações: nós que existem, entradas e saídas que existem, todos alcançados a partir do gatilho.

    Argumentos:
        flow: o fluxo.

    Retorno:
        Lista de frases, vazia se tudo confere.
    """
    nodes = {node["name"]: node for node in flow["nodes"]}
    problems = [] if len(nodes) == len(flow["nodes"]) else ["há dois nós com o mesmo nome"]
    reached = {name for name, node in nodes.items() if node["type"] == prefix + "redisTrigger"}
    if len(reached) != 1:
        problems.append(f"há {len(reached)} gatilhos")
    for name, kinds in flow["connections"].items():
        row = describe(nodes[name], every_version[-1]) if name in nodes else None
        if row is None or set(kinds) != {"main"} or len(kinds["main"]) > row["outputs"]:
            problems.append(f"{name}: saída que não existe")
        for link in [link for output in kinds["main"] for link in output]:
            if link["node"] not in nodes:
                problems.append(f"{name}: ligado a {link['node']}, que não existe")
            elif link["index"] >= (describe(nodes[link["node"]], every_version[-1]) or {"inputs": 1})["inputs"]:
                problems.append(f"{name}: entrada que não existe em {link['node']}")
    while True:
        links = [link for name in reached for output in targets(flow, name) for link in output]
        if reached >= set(links):
            break
        reached |= set(links)
    notes = {name for name, node in nodes.items() if node["type"] == prefix + "stickyNote"}
    return problems + [f"{name}: nada leva a ele" for name in sorted(set(nodes) - reached - notes)]


def targets(flow, name):
    """Lista os nós a que um nó leva.

    Argumentos:
        flow: o fluxo.
        name: o nome do nó.

    Retorno:
        Uma lista de nomes por saída.
    """
    return [[link["node"] for link in output] for output in flow["connections"].get(name, {"main": []})["main"]]


def texts(value):
    """Percorre os textos de um valor de JSON.

    Argumentos:
        value: o valor.

    Retorno:
        Iterador de textos.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


def expression_problems(text):
    """Procura o que quebra uma expressão: o n8n a termina no primeiro fecha-chaves duplo, esteja ele onde estiver.

    Argumentos:
        text: o texto do parâmetro, sem o sinal de igual do começo.

    Retorno:
        Lista de frases, vazia se a expressão está inteira.
    """
    problems = []
    pairs = {")": "(", "]": "[", "}": "{"}
    for inside in re.findall(r"\{\{(.*?)\}\}", text, re.DOTALL):
        waiting = []
        for mark in re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "", inside):
            if mark not in pairs:
                waiting += [mark] if mark in "([{'\"`" else []
            elif not waiting or waiting.pop() != pairs[mark]:
                waiting.append(mark)
        if waiting:
            problems.append(f"a expressão acaba cedo: {inside!r}")
    rest = re.sub(r"\{\{.*?\}\}", "", text, flags=re.DOTALL)
    if "{{" in rest or "}}" in rest:
        problems.append(f"sobra de expressão: {rest!r}")
    return problems


def trap_problems(flow):
    """Confere que o fluxo segue o contrato e não cai em nenhuma das armadilhas do n8n.

    Argumentos:
        flow: o fluxo.

    Retorno:
        Lista de frases, vazia se tudo confere.
    """
    problems = []
    names = {node["name"] for node in flow["nodes"]}
    by_operation = {}
    for node in flow["nodes"]:
        by_operation.setdefault(node["parameters"].get("operation"), []).append(node)
        for text in texts(node["parameters"]):
            used = set(re.findall(r"\$\(['\"](.+?)['\"]\)", text))
            problems += [f"{node['name']}: usa {name}, que não existe" for name in sorted(used - names)]
            if text.startswith("="):
                problems += [f"{node['name']}: {problem}" for problem in expression_problems(text[1:])]
        if node["type"] == prefix + "redisTrigger" and node["parameters"].get("channels") != settings["REDIS_CHANNEL"]:
            problems.append("o canal não é o do proxy")
    for node in by_operation.get("push", []):
        if node["parameters"].get("tail") is not True:
            problems.append(f"{node['name']}: Tail desligado")
        if "task_list" not in node["parameters"]["list"]:
            problems.append(f"{node['name']}: não empurra em task_list")
    claims = [node["parameters"] for node in by_operation.get("incr", [])]
    if not any(row["key"].startswith("=worker:claim:{{") and row.get("expire") is True for row in claims):
        problems.append("dois assinantes responderiam à mesma tarefa")
    if any(row.get("ttl") != int(settings["REDIS_TTL"]) for row in claims):
        problems.append("a posse não dura o mesmo que a tarefa")
    code = "\n".join(node["parameters"].get("jsCode", "") for node in flow["nodes"])
    source = re.search(r"const text = \$input\.first\(\)\.json\.(\w+);", code)
    if not source or "JSON.parse(text)" not in code:
        problems.append("o texto do Get não passa por JSON.parse")
    elif source[1] not in {row["parameters"]["propertyName"] for row in by_operation.get("get", [])}:
        problems.append("o Code não lê o que o Get escreveu")
    # Nenhuma chave é montada no fluxo: task_key vem pelo canal, e task_list, dentro da tarefa.
    for name in ("REDIS_PREFIX", "REDIS_LIST_PREFIX"):
        if any(settings[name] in text for node in flow["nodes"] for text in texts(node["parameters"])):
            problems.append(f"o fluxo repete {name}")
    return problems + ending_problems(flow, by_operation)


def ending_problems(flow, by_operation):
    """Confere o fim: a chave apagada só depois da última linha; a lista, só se o cliente saiu.

    Argumentos:
        flow: o fluxo.
        by_operation: os nós Redis, por operação.

    Retorno:
        Lista de frases, vazia se tudo confere.
    """
    problems = []
    loops = [node["name"] for node in flow["nodes"] if node["type"] == prefix + "splitInBatches"]
    ends = [node["name"] for node in by_operation.get("delete", []) if "task_list" not in node["parameters"]["key"]]
    cleans = [node["name"] for node in by_operation.get("delete", []) if "task_list" in node["parameters"]["key"]]
    pushes = [node["name"] for node in by_operation.get("push", [])]
    checks = [node["name"] for node in by_operation.get("get", [])]
    if len(ends) != 1 or len(loops) != 1 or targets(flow, loops[0])[:1] != [ends]:
        problems.append("a chave da tarefa não é apagada no fim, e só nele")
    if not pushes or any(targets(flow, name) not in [[[check]] for check in checks] for name in pushes):
        problems.append("depois da linha, ninguém confere se o cliente saiu")
    if len(cleans) != 1 or not any(cleans in targets(flow, name)[:1] for name in names_of(flow, "if")):
        problems.append("a lista de um cliente que saiu fica no Redis")
    return problems


def names_of(flow, kind):
    """Lista os nós de um tipo.

    Argumentos:
        flow: o fluxo.
        kind: o tipo, sem o nome do pacote.

    Retorno:
        Lista de nomes.
    """
    return [node["name"] for node in flow["nodes"] if node["type"] == prefix + kind]


def all_problems(flow):
    """Junta todas as conferências.

    Argumentos:
        flow: o fluxo.

    Retorno:
        Lista de frases.
    """
    return parameter_problems(flow) + connection_problems(flow) + trap_problems(flow)


def find(flow, kind, operation=None):
    """Acha o primeiro nó de um tipo.

    Argumentos:
        flow: o fluxo.
        kind: o tipo, sem o nome do pacote.
        operation: a operação, se for um nó Redis.

    Retorno:
        O nó.
    """
    return next(
        node
        for node in flow["nodes"]
        if node["type"] == prefix + kind and operation in (None, node["parameters"].get("operation"))
    )


def spoil(place, name, value):
    """Prepara um defeito: um parâmetro com outro valor.

    Argumentos:
        place: tupla (tipo, operação) do nó.
        name: o parâmetro.
        value: o valor; None tira o parâmetro.

    Retorno:
        Função que põe o defeito no fluxo dado.
    """

    def change(flow):
        """Põe o defeito.

        Argumentos:
            flow: o fluxo, que é mudado.
        """
        parameters = find(flow, *place)["parameters"]
        if value is None:
            del parameters[name]
        else:
            parameters[name] = value

    return change


def lose_connection(flow):
    """Tira a ligação que leva à limpeza da lista.

    Argumentos:
        flow: o fluxo, que é mudado.
    """
    last = names_of(flow, "if")[-1]
    flow["connections"][last]["main"][0] = []


def rename_node(flow):
    """Muda o nome do gatilho sem mudar as expressões que o citam.

    Argumentos:
        flow: o fluxo, que é mudado.
    """
    node = find(flow, "redisTrigger")
    flow["connections"]["Redis Trigger"] = flow["connections"].pop(node["name"])
    node["name"] = "Redis Trigger"


def skip_check(flow):
    """Liga a linha empurrada direto à próxima, sem conferir se o cliente saiu.

    Argumentos:
        flow: o fluxo, que é mudado.
    """
    name = find(flow, "redis", "push")["name"]
    flow["connections"][name]["main"][0][0]["node"] = find(flow, "splitInBatches")["name"]


def end_early(flow):
    """Apaga a chave da tarefa antes da primeira linha.

    Argumentos:
        flow: o fluxo, que é mudado.
    """
    end = find(flow, "redis", "delete")["name"]
    flow["connections"][find(flow, "code")["name"]]["main"][0].append({"node": end, "type": "main", "index": 0})
    flow["connections"][find(flow, "splitInBatches")["name"]]["main"][0] = []


def newer_node(flow):
    """Dá ao nó Redis uma versão que o pacote não tem.

    Argumentos:
        flow: o fluxo, que é mudado.
    """
    find(flow, "redis")["typeVersion"] = 2


def lose_credential(flow):
    """Tira a credencial do gatilho.

    Argumentos:
        flow: o fluxo, que é mudado.
    """
    del find(flow, "redisTrigger")["credentials"]


push = ("redis", "push")
defects = {
    "tail desligado": (spoil(push, "tail", False), "Tail desligado"),
    "tail ausente": (spoil(push, "tail", None), "Tail desligado"),
    "nome de parâmetro": (spoil(push, "data", "x"), "o parâmetro data não existe aqui"),
    "parâmetro de outra operação": (spoil(push, "ttl", 60), "o parâmetro ttl não existe aqui"),
    "parâmetro obrigatório": (spoil(push, "messageData", None), "falta messageData"),
    "tipo do parâmetro": (spoil(("redis", "incr"), "ttl", "600"), "ttl não é number"),
    "operação": (spoil(push, "operation", "rpush"), "operation não pode ser rpush"),
    "opção": (spoil(("redis", "get"), "options", {"dot": False}), "options não tem ['dot']"),
    "versão do nó": (newer_node, "não existe n8n-nodes-base.redis 2"),
    "credencial": (lose_credential, "sem credencial"),
    "canal": (spoil(("redisTrigger",), "channels", "ndjson-jobs"), "o canal não é o do proxy"),
    "chaves": (spoil(push, "messageData", "={{ JSON.stringify({ a: { b: $json.line }}) }}"), "acaba cedo"),
    "sem JSON.parse": (spoil(("code",), "jsCode", "return $input.first().json.task.body"), "JSON.parse"),
    "posse": (spoil(("redis", "incr"), "key", "={{ $json.message }}"), "dois assinantes"),
    "posse sem fim": (spoil(("redis", "incr"), "expire", False), "dois assinantes"),
    "lista calculada": (spoil(push, "list", "=ndjson_list_{{ $json.task_name }}"), "não empurra em task_list"),
    "nó renomeado": (rename_node, "que não existe"),
    "sem conferir": (skip_check, "ninguém confere se o cliente saiu"),
    "fim antes da hora": (end_early, "não é apagada no fim"),
    "limpeza": (lose_connection, "nada leva a ele"),
}


def test_workflow_follows_package_and_contract():
    """O fluxo só usa o que o pacote declara, está todo ligado, e não cai em nenhuma armadilha."""
    assert all_problems(workflow) == []


@pytest.mark.parametrize("defect", defects)
def test_each_defect_is_noticed(defect):
    """Cada defeito, posto num fluxo são, é notado e dito pelo nome."""
    change, words = defects[defect]
    flow = copy.deepcopy(workflow)
    change(flow)
    found = all_problems(flow)
    assert any(words in problem for problem in found), found


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("{{ $json.line }}", True),
        ("worker:claim:{{ $json.message }}", True),
        ("{{ JSON.stringify({ a: { b: $json.line } }) }}", True),
        ('{{ JSON.stringify({ a: "chave } dentro de texto" }) }}', True),
        ('{{ JSON.stringify({"type":"item","content":{"text":$json.line}}) }}', False),
        ("{{ $json.line ? {a:{b:1}} : 2 }}", False),
        ('{{ "}}" + $json.line }}', False),
        ("{{ $json.line", False),
        ("{{ $json['line' }}", False),
    ],
)
def test_expression_check(text, whole):
    """A conferência de expressões separa as que um n8n de verdade aceitou das que ele recusou ("invalid syntax")."""
    assert (expression_problems(text) == []) is whole


def test_credential_is_the_proxys_redis():
    """A credencial tem os campos que o pacote declara, é a que os nós citam, e leva ao Redis padrão do proxy."""
    [row] = credentials
    for version in every_version:
        fields = {item["name"]: item for item in package["versions"][version]["credentials"][row["type"]]}
        assert set(row["data"]) <= set(fields)
        assert all(isinstance(value, simple[fields[name]["type"]]) for name, value in row["data"].items())
    data = row["data"]
    assert f"{data['host']}:{data['port']}/{data['database']}" == settings["REDIS_SERVER"]
    assert (data["password"], data["user"], data["ssl"]) == ("", "", False)
    used = [node["credentials"]["redis"] for node in workflow["nodes"] if "credentials" in node]
    assert used
    assert all(item == {"id": row["id"], "name": row["name"]} for item in used)


def test_workflow_can_be_imported():
    """O arquivo tem o que as duas importações pedem: um objeto só (a tela), com id e versionId (a linha de comando)."""
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", workflow["versionId"])
    assert workflow["active"] is False
    assert len({node["id"] for node in workflow["nodes"]}) == len(workflow["nodes"])
    # O update:workflow e o publish:workflow do guia recebem esse id.
    assert f"--id={workflow['id']}" in guide


def test_claim_is_shared_with_the_other_workers():
    """A chave de posse é a mesma dos outros workers: os dois lados podem ouvir o mesmo canal."""
    for name in ("worker.py", "worker.sh"):
        assert "worker:claim:" in (folder.parent / name).read_text(encoding="utf-8")
    claim = find(workflow, "redis", "incr")
    # Um worker.py que chegou antes deixa ali um texto, e o INCR falha: o fluxo segue, e o nó If o detém.
    assert claim["onError"] == "continueRegularOutput"
    after = next(node for node in workflow["nodes"] if node["name"] == targets(workflow, claim["name"])[0][0])
    [condition] = after["parameters"]["conditions"]["conditions"]
    assert condition["leftValue"] == "={{ Object.values($json)[0] === 1 }}"
    assert condition["operator"]["operation"] == "true"


@pytest.mark.parametrize("name", ["packaging/doc/n8n.md", "packaging/doc/en/n8n.md"])
def test_documented_expressions(name):
    """As expressões que os textos mandam copiar estão inteiras; as que eles mostram como erro estão quebradas."""
    text = (harness.root / name).read_text(encoding="utf-8")
    # Numa tabela ou numa frase: `{{ ... }}`; o erro é marcado com a palavra ao lado.
    found = re.findall(r"(errado: |wrong: )?`([^`\n]*\{\{[^`\n]*)`", text)
    assert found
    for wrong, expression in found:
        assert bool(expression_problems(expression)) is bool(wrong), expression


def test_guide_names_what_exists():
    """O guia fala dos nós e dos valores que estão nos arquivos."""
    for node in workflow["nodes"]:
        if node["type"] != prefix + "stickyNote":
            assert f"**{node['name']}**" in guide, node["name"]
    assert credentials[0]["name"] in guide
    for version in every_version:
        assert f"{package['package']} {version}" in guide
