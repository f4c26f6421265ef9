"""README says where things are: the lines it names hold what it says."""
import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")


def lines_of(file):
    """{qualified name: line of its def or class}."""
    found = {}

    def walk(node, prefix=""):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + child.name] = child.lineno
                walk(child, f"{prefix}{child.name}.")
    walk(ast.parse((HERE / file).read_text(encoding="utf-8")))
    return found


NAMED = re.findall(r"`([\w/]+\.py):(\d+)` `([\w.]+)`", README)


@pytest.mark.parametrize("file, line, name", NAMED)
def test_a_named_line_holds_the_function_that_readme_says(file, line, name):
    assert lines_of(file).get(name) == int(line)


def test_every_equation_has_its_line():
    table = README.split("| equation |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 12 and all(re.search(r"`[\w/]+\.py:\d+` `[\w.]+`", row) for row in table)


def test_every_module_is_in_the_reading_order():
    order = re.findall(r"^\| `(\w+\.py)` \| \d+ \|", README, re.M)
    assert sorted(order) == sorted(p.name for p in HERE.glob("*.py"))


def test_functions_and_files_in_back_quotes_exist():
    for name in re.findall(r"`((?:tests/|data/)?\w+\.(?:py|json|csv))`", README):
        assert (HERE / name).exists() or name in ("config.json", "replies.jsonl", "results.json"), name
