"""O peso em volta do programa: cada arquivo tem a sua linha na página da pasta, e nada do que se define aqui está à toa."""

import ast
import collections
import re

import pytest

import harness

# Os que outros chamam, pelo nome: getattr, e os protocolos do asyncio.
called_by_name = re.compile(r"(do|read)_\w+|(pause|resume)_writing|connection_lost")


@pytest.mark.parametrize("name", ["packaging", "packaging/examples", "tests"])
def test_page_names_its_files(name):
    """A página da pasta tem um elo para cada coisa que está na pasta."""
    folder = harness.root / name
    links = re.findall(r"\]\(([^)]+)\)", (folder / "README.md").read_text(encoding="utf-8"))
    named = {link.split("/")[0] for link in links} | {"README.md", "__pycache__"}
    assert {each.name for each in folder.iterdir()} - named == set()


def test_demo_is_short():
    """A demonstração cabe em 300 linhas."""
    assert len((harness.root / "packaging" / "demo").read_text(encoding="utf-8").splitlines()) <= 300


def test_nothing_is_unused():
    """Toda função, classe ou variável de módulo das provas é citada em algum lugar além daquele em que nasce."""
    files = [path for path in (harness.root / "tests").rglob("*.py") if "__pycache__" not in path.parts]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    words = collections.Counter(re.findall(r"\w+", "\n".join(texts.values())))
    unused = []
    for path, text in texts.items():
        tree = ast.parse(text)
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        made = [(node.name, node) for node in ast.walk(tree) if isinstance(node, kinds)]
        # O que um decorador recebe, é ele que usa.
        names = [name for name, node in made if not node.decorator_list]
        names += [item.id for node in tree.body if isinstance(node, ast.Assign) for item in node.targets if hasattr(item, "id")]
        for name in names:
            if words[name] == 1 and not re.match("test_|pytest_|__", name) and not called_by_name.fullmatch(name):
                unused.append(f"{path.relative_to(harness.root)}: {name}")
    assert unused == []
