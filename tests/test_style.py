"""O estilo da especificação, lido da árvore sintática: documentação, idioma, maiúsculas e minúsculas, dependências."""

import ast
import builtins
import dis
import functools
import io
import re
import subprocess
import sys
import tokenize
import types

import pytest

import harness

path = harness.program
source = path.read_text(encoding="utf-8")
tree = ast.parse(source)
settings = [row.name for row in harness.load_program().settings]
functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]

# Os outros programas em Python do repositório seguem o mesmo idioma e as mesmas minúsculas.
others = sorted(
    file
    for file in (*harness.root.glob("tests/**/*.py"), *harness.root.glob("packaging/**/*.py"))
    if "__pycache__" not in file.parts
)

# Palavras que só o inglês tem, e as mais comuns do português: bastam para dizer em que língua está uma frase.
english = re.compile(
    r"\b(the|and|is|are|was|with|when|because|this|that|from|for|returns?|should|which|into|will|must|each|every"
    r"|has|have|been|not|only|whether|does|then|than|they|there|their)\b",
    re.IGNORECASE,
)
portuguese = re.compile(
    r"\b(o|a|os|as|de|da|do|das|dos|que|não|com|se|um|uma|em|no|na|é|são|por|para|ao|à|e|ou|mais|sem)\b",
    re.IGNORECASE,
)

# Palavras escritas sem o acento que levam, as que mais escapam.
unaccented = re.compile(
    r"\b(nao|sao|entao|funcao|funcoes|conexao|conexoes|configuracao|configuracoes|padrao|requisicao|requisicoes|secao"
    r"|versao|opcao|opcoes|excecao|execucao|posicao|informacao|descricao|ate|ja|so|tambem|alem|apos|voce|numero"
    r"|codigo|metodo|maximo|minimo|unico|unica|ultima|ultimo|proximo|proxima|possivel|disponivel|invalido|invalida"
    r"|valido|valida|usuario|variavel|variaveis|cabecalho|cabecalhos|endereco|servico|inicio|memoria|periodica"
    r"|saida|conteudo|tres|sera)\b(?!=)",
    re.IGNORECASE,
)

# Palavras portuguesas que não podem estar em identificadores, que são em inglês.
foreign = {
    *("tarefa", "tarefas", "linha", "linhas", "chave", "chaves", "fila", "senha", "porta", "servidor", "cliente"),
    *("clientes", "arquivo", "mensagem", "erro", "erros", "valor", "valores", "nome", "nomes", "tempo", "prazo"),
    *("espera", "pedido", "resposta", "corpo", "cabecalho", "caminho", "metodo", "conexao", "banco", "camada"),
    *("padrao", "inicio", "fim", "lista", "listas", "novo", "nova", "dados", "texto", "numero", "codigo", "rede"),
    *("aviso", "avisos", "ler", "gravar", "enviar", "receber", "abrir", "fechar", "apagar", "buscar", "tirar"),
}

# As palavras de uso do Python e do protocolo que o código tem de escrever como elas são.
allowed_uppercase = {name for name in dir(builtins) if name != name.lower()}


def language_problems(text):
    """Procura inglês e acentos esquecidos num texto que devia estar em português.

    Argumentos:
        text: o texto; o que está entre crases ou aspas é código e não conta.

    Retorno:
        Lista de frases que descrevem os problemas.
    """
    plain = re.sub(r"`[^`]*`|\"[^\"]*\"|'[^'\s]*'|\bhttps?://\S+", " ", text)
    problems = [f"sem acento: {word}" for word in unaccented.findall(plain)]
    found = english.findall(plain)
    if found and len(found) > len(portuguese.findall(plain)):
        problems.append(f"parece inglês: {text[:60]!r}")
    return problems


def comments(text):
    """Lê os comentários de um programa.

    Argumentos:
        text: o código.

    Retorno:
        Lista de (linha, texto), com os de linhas seguidas reunidos num só.
    """
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT or token.string.startswith("#!"):
            continue
        if found and found[-1][2] == token.start[0] - 1:
            found[-1] = (found[-1][0], f"{found[-1][1]} {token.string.lstrip('# ')}", token.start[0])
        else:
            found.append((token.start[0], token.string.lstrip("# "), token.start[0]))
    return [(line, content) for line, content, _ in found]


def docstrings(module):
    """Lê os textos de documentação de um programa.

    Argumentos:
        module: a árvore sintática.

    Retorno:
        Lista de (linha, nome, texto ou None), do módulo, das classes e das funções.
    """
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(module) if isinstance(node, kinds)]
    return [(getattr(node, "lineno", 1), getattr(node, "name", "o módulo"), ast.get_docstring(node)) for node in nodes]


def own_nodes(function):
    """Percorre uma função sem entrar nas que ela contém.

    Argumentos:
        function: o nó da função.

    Retorno:
        Iterador dos nós do corpo dela.
    """
    waiting = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def section(doc, title):
    """Lê uma seção de um texto de documentação.

    Argumentos:
        doc: o texto.
        title: expressão regular do título, sem os dois pontos.

    Retorno:
        O texto da seção, ou None se não existe.
    """
    found = re.search(rf"^(?:{title}):\s*$\n((?:[ \t]+.*\n?|\n)*)", doc + "\n", re.MULTILINE)
    return found[1] if found else None


def all_names(module):
    """Lê todos os nomes que um programa cria.

    Argumentos:
        module: a árvore sintática.

    Retorno:
        Lista de (linha, nome): variáveis, atributos, argumentos, funções, classes, importados e exceções nomeadas.
    """
    found = []
    imports = [node for node in ast.walk(module) if isinstance(node, ast.Import)]
    modules = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append((node.lineno, node.name))
        elif isinstance(node, ast.arg):
            found.append((node.lineno, node.arg))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            found.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            # Trocar o atributo de um módulo alheio não cria nome: o nome é dele.
            if ast.unparse(node.value).split(".")[0] not in modules:
                found.append((node.lineno, node.attr))
        elif isinstance(node, ast.alias):
            found.append((0, node.asname or node.name))
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.append((node.lineno, node.name))
        elif isinstance(node, ast.Global | ast.Nonlocal):
            found += [(node.lineno, name) for name in node.names]
    return found


def describe(problems):
    """Monta a mensagem de falha.

    Argumentos:
        problems: lista de problemas.

    Retorno:
        Um por linha (str).
    """
    return "\n" + "\n".join(str(problem) for problem in problems)


def test_every_definition_is_documented():
    """O módulo, cada classe e cada função, as internas inclusive, têm documentação, em português."""
    rows = docstrings(tree)
    problems = [f"linha {line}: {name} sem documentação" for line, name, doc in rows if not doc]
    problems += [
        f"linha {line}: {name}: {problem}" for line, name, doc in rows if doc for problem in language_problems(doc)
    ]
    assert not problems, describe(problems)


def test_first_line_says_what_it_does():
    """A primeira linha da documentação é uma frase completa: começa com maiúscula e tem ponto final."""
    problems = []
    for line, name, doc in docstrings(tree):
        first = re.sub(r"\s+", " ", (doc or "").split("\n\n")[0])
        if not re.match(r"[A-ZÀ-Ý\"<]|py-ndjson-proxy: ", first) or not re.search(r"[.:]\"?$", first):
            problems.append(f"linha {line}: {name}: {first[:70]!r}")
    assert not problems, describe(problems)


def test_every_argument_is_documented():
    """Cada argumento (menos self e cls) está na seção Argumentos, e ela não fala de argumentos que não existem."""
    problems = []
    for node in functions:
        args = node.args
        given = [item.arg for item in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
        given += [item.arg for item in (args.vararg, args.kwarg) if item]
        given = [name for name in given if name not in ("self", "cls")]
        text = section(ast.get_docstring(node) or "", "Argumentos")
        described = re.findall(r"^[ \t]+(\w+)(?: \([^)]*\))?:", text or "", re.MULTILINE)
        if described != given:
            problems.append(f"linha {node.lineno}: {node.name}: argumentos {given}, documentados {described}")
    assert not problems, describe(problems)


def test_every_return_is_documented():
    """Toda função que devolve ou gera algo tem a seção Retorna (ou Retorno), com o tipo; as outras não a têm."""
    problems = []
    for node in functions:
        inside = list(own_nodes(node))
        gives = any(isinstance(item, ast.Return) and item.value is not None for item in inside)
        gives = gives or any(isinstance(item, ast.Yield | ast.YieldFrom) for item in inside)
        text = section(ast.get_docstring(node) or "", "Retorna|Retorno")
        if gives and not (text or "").strip():
            problems.append(f"linha {node.lineno}: {node.name} devolve algo e não diz o quê")
        if not gives and text is not None:
            problems.append(f"linha {node.lineno}: {node.name} não devolve nada e documenta um retorno")
    assert not problems, describe(problems)


def test_raised_exceptions_are_documented():
    """Toda exceção levantada pelo nome está na seção Levanta, ela mesma ou uma de que deriva."""
    module = harness.load_program()
    problems = []
    for node in functions:
        text = section(ast.get_docstring(node) or "", "Levanta") or ""
        for item in own_nodes(node):
            if isinstance(item, ast.Raise) and isinstance(item.exc, ast.Call):
                first, *rest = ast.unparse(item.exc.func).split(".")
                kind = functools.reduce(getattr, rest, getattr(module, first, None) or getattr(builtins, first))
                # As de que todas derivam não dizem nada.
                names = {base.__name__ for base in kind.__mro__} - {"Exception", "BaseException", "object"}
                if not any(name in text for name in names):
                    problems.append(f"linha {item.lineno}: {node.name} não documenta {kind.__name__}")
    assert not problems, describe(problems)


def test_comments_are_portuguese():
    """Os comentários estão em português, com seus acentos."""
    rows = comments(source)
    assert rows
    problems = [f"linha {line}: {problem}" for line, text in rows for problem in language_problems(text)]
    assert not problems, describe(problems)


def test_messages_are_portuguese():
    """As frases do código (ajuda, erros, log) estão em português, com seus acentos."""
    docs = {doc for _, _, doc in docstrings(tree) if doc}
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            text = node.value
            if ast.get_docstring(ast.Module([ast.Expr(node)], [])) in docs or "redis.call" in text:
                continue
            problems += [f"linha {node.lineno}: {problem}" for problem in language_problems(text)]
    assert not problems, describe(problems)


def test_names_are_lowercase():
    """Funções, variáveis, atributos, argumentos, classes e importados são minúsculos; maiúsculas, só as configurações."""
    problems = [
        f"linha {line}: {name}" for line, name in all_names(tree) if name != name.lower() and name not in settings
    ]
    assert not problems, describe(problems)


def test_settings_are_uppercase_globals():
    """Cada configuração é uma variável global maiúscula do módulo, e nenhum outro nome maiúsculo é criado ou lido."""
    statements = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    names = {item.id for node in statements for item in ast.walk(node) if isinstance(item, ast.Name)}
    stored = {name for name in names if name == name.upper() and name != "_"}
    assert stored == set(settings)
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert {name for name in loaded if name != name.lower()} - set(settings) - allowed_uppercase == set()


def test_identifiers_are_english():
    """Os identificadores são ASCII e não trazem palavras portuguesas."""
    names = {name for _, name in all_names(tree)} - set(settings)
    problems = [name for name in sorted(names) if not name.isascii() or foreign & set(re.split(r"[_.]+", name))]
    assert not problems, describe(problems)


def test_imports_are_modules():
    """Só se importam módulos inteiros, da biblioteca padrão, das quatro dependências ou a das métricas, opcional."""
    assert [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)] == []
    top = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    # O werkzeug vem com o Flask, que é construído sobre ele.
    outside = {name for name in top if name not in sys.stdlib_module_names}
    assert outside <= {"flask", "redis", "waitress", "dotenv", "werkzeug", "prometheus_client"}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert top - used == set()


def global_loads(code):
    """Lista os nomes globais que um código lê, funções internas inclusive.

    Argumentos:
        code: o objeto de código.

    Retorno:
        Conjunto de nomes.
    """
    names = {item.argval for item in dis.get_instructions(code) if item.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names |= global_loads(inner)
    return names


def test_no_undefined_name():
    """Todo nome global lido existe no módulo, é uma configuração anotada nele, ou é do Python."""
    module = harness.load_program()
    known = {*vars(module), *dir(builtins)}
    inside = {item for item in global_loads(compile(tree, str(path), "exec")) if item not in known}
    # Nomes do corpo de uma classe são lidos como globais pelo interpretador.
    local = {name for node in classes for _, name in all_names(node)}
    assert inside - local - {"__module__", "__qualname__", "__firstlineno__", "__name__", "__classdict__", "__annotations__"} == set()


def test_no_global_name_is_made_twice():
    """Nenhum nome do módulo é criado duas vezes: o segundo tomaria, em silêncio, o lugar do primeiro."""
    made = [(node.lineno, node.name) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            made += [
                (item.lineno, item.id)
                for each in targets
                for item in ast.walk(each)
                if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)
            ]
    seen, problems = {}, []
    for line, name in made:
        if seen.setdefault(name, line) != line:
            problems.append(f"linha {line}: {name}, que já existe na linha {seen[name]}")
    assert not problems, describe(problems)


def test_functions_are_short():
    """Nenhuma função passa de 70 linhas."""
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: size for name, size in sizes.items() if size > 70} == {}


def test_weight():
    """O arquivo cabe na cabeça de quem o lê: até 2300 linhas de código; nenhuma classe de 30 métodos ou de 20 atributos."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for item in tokens if item.type not in silent for line in range(item.start[0], item.end[0] + 1)}
    for node in (tree, *functions, *classes):
        code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1)) if ast.get_docstring(node) else set()
    assert len(code) <= 2300
    for node in classes:
        stored = [
            item for item in ast.walk(node) if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store)
        ]
        attributes = {item.attr for item in stored if ast.unparse(item.value) == "self"}
        assert len(attributes) <= 20, (node.name, attributes)
        assert len([item for item in node.body if item in functions]) < 30, node.name


def test_sections_in_order():
    """As seções do arquivo, sob suas faixas, estão na ordem da arquitetura."""
    titles = re.findall(r"^# =+\n# (.+)\n# =+$", source, re.MULTILINE)
    words = ["Configura", "Log", "Redis", "Tarefas", "Streams", "Deveres", "Aplica", "Servidores", "Métricas", "Recarga"]
    places = [next((n for n, title in enumerate(titles) if word in title), None) for word in words]
    assert None not in places, (titles, places)
    assert places == sorted(places), titles


def test_specification_words():
    """O que a especificação pede pelo nome está no código: app.run com threaded, redis_ping com PING, SET e PUBLISH."""
    run = next(
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("app.run")
    )
    given = {item.arg: ast.unparse(item.value) for item in run.keywords}
    assert (given["host"], given["port"], given["threaded"]) == ("HTTP_HOST", "HTTP_PORT", "True")
    assert "redis_ping" in {node.name for node in functions}
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {"PING", "SET", "PUBLISH"} <= words
    assert "X-Author" in source
    assert "Patrick Brandao <patrickbrandao@gmail.com>" in words


def test_loading_has_no_side_effect(tmp_path):
    """Ler as definições do programa não imprime, não abre soquete, não cria linha de execução nem mexe no ambiente."""
    code = (
        "import os, threading, harness\n"
        "before = dict(os.environ)\n"
        "harness.load_program()\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert dict(os.environ) == before\n"
        "links = [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if n != '3']\n"
        "assert not [link for link in links if 'socket' in link or 'event' in link], links\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=harness.loading_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_file_is_clean():
    """O arquivo é UTF-8 sem BOM, com fim de linha do Unix, sem tabulações nem espaços no fim, e é executável."""
    raw = path.read_bytes()
    assert raw.startswith(b"#!/usr/bin/env python3\n")
    assert b"\r" not in raw
    assert b"\t" not in raw
    assert raw.endswith(b"\n")
    assert not raw.endswith(b"\n\n")
    assert [number for number, line in enumerate(source.splitlines(), 1) if line != line.rstrip()] == []
    assert path.stat().st_mode & 0o111, "falta a permissão de execução"


@pytest.mark.parametrize("file", others, ids=[str(file.relative_to(harness.root)) for file in others])
def test_other_programs(file):
    """Provas e exemplos: nomes minúsculos em inglês, documentação e comentários em português."""
    text = file.read_text(encoding="utf-8")
    module = ast.parse(text)
    rows = docstrings(module)
    problems = [f"linha {line}: {name} sem documentação" for line, name, doc in rows if not doc]
    problems += [f"linha {line}: {problem}" for line, _, doc in rows if doc for problem in language_problems(doc)]
    problems += [f"linha {line}: {problem}" for line, body in comments(text) for problem in language_problems(body)]
    # Pela especificação, maiúscula é a variável global que vem do ambiente ou dos argumentos.
    imported = {
        target.id
        for node in ast.walk(module)
        if isinstance(node, ast.Assign) and re.search(r"\b(environ|getenv|argv|parse_args)\b", ast.unparse(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for line, name in all_names(module):
        if name != name.lower() and name not in imported and name not in settings:
            problems.append(f"linha {line}: {name} não é minúsculo")
        if not name.isascii() or foreign & set(re.split(r"[_.]+", name)):
            problems.append(f"linha {line}: {name} não é inglês")
    problems += [
        f"linha {node.lineno}: {ast.unparse(node)}: importe o módulo"
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom)
    ]
    assert not problems, describe(problems)
