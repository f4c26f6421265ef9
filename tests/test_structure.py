"""How the modules stand on each other: imports go one way, at the top of files, and no module knows its own name."""
import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
FILES = {".".join(file.relative_to(HERE).with_suffix("").parts): file for file in sorted(
    [*HERE.glob("*.py"), *HERE.glob("support/*.py")])}
METHOD = ["model", "lora", "router", "synth", "train", "eval"]  # in the order in which they are read


def imports(tree):
    """(node, full names) of every import of our own modules below `tree`."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)] \
            if isinstance(node, ast.ImportFrom) else []
        yield from ((node, name) for name in names)


GRAPH = {name: {found for _, found in imports(ast.parse(file.read_text(encoding="utf-8"))) if found in FILES}
         for name, file in FILES.items()}


def stands_on(name, seen=()):
    """All modules that `name` imports, and those that they import. AssertionError for a circle."""
    assert name not in seen, f"a circle of imports: {' -> '.join([*seen, name])}"
    return set().union(*({other} | stands_on(other, (*seen, name)) for other in GRAPH[name]))


def test_imports_go_one_way():
    reached = {name: stands_on(name) for name in FILES}
    for earlier, later in zip(METHOD, METHOD[1:]):
        assert later not in reached[earlier]
    assert not reached["support.files"] and reached["support.weights"] == {"support.files", "support.int8"}
    assert set(METHOD) <= {name for name in FILES if "." not in name} == set(METHOD)


@pytest.mark.parametrize("name", FILES)
def test_imports_stand_at_the_top(name):
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    inside = [found for part in ast.walk(tree) if isinstance(part, (ast.FunctionDef, ast.Lambda, ast.ClassDef))
              for _, found in imports(part) if found.split(".")[0] != "matplotlib"]  # optional, and slow to import
    assert not inside
    assert name not in {found for _, found in imports(tree)}


@pytest.mark.parametrize("name", FILES)
def test_no_group_is_repeated_possessively(name):
    """(?:…)*+ matches wrongly before Python 3.11.5 (python/cpython, issues 100061 and 106052); (?>(?:…)*) does not."""
    assert not re.search(r"[^\\]\)(?:[*+?]|\{\d*,?\d*\})\+", FILES[name].read_text(encoding="utf-8"))
