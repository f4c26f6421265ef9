"""README.md and docs/ name files, lines, functions, commands and options: all of them exist."""
import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

import eval
import synth
import train

HERE = Path(__file__).parent.parent
TEXTS = {str(file.relative_to(HERE)): file.read_text(encoding="utf-8")
         for file in [HERE / "README.md", *sorted(HERE.glob("docs/*.md"))]}
README = TEXTS["README.md"]
# Files of a run or a model folder, and users' own files
NOT_OURS = {"config.json", "tokenizer.json", "tokenizer_config.json", "log.jsonl", "results.json", "replies.jsonl",
            "train.jsonl", "validation.jsonl", "test.jsonl", "mine.rejected.jsonl", "growth.png"}


def lines_of(file):
    """{qualified name: line} of a module's functions, classes and variables."""
    found = {}

    def walk(node, prefix=""):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + child.name] = child.lineno
                walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign):
                found.update({prefix + target.id: child.lineno for target in child.targets
                              if isinstance(target, ast.Name)})
    walk(ast.parse((HERE / file).read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("file, line, name", re.findall(r"`([\w/]+\.py):(\d+)` `([\w.]+)`", README))
def test_a_named_line_holds_the_function_that_readme_says(file, line, name):
    assert lines_of(file).get(name) == int(line)


def test_every_equation_has_its_line():
    table = README.split("| equation |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 12 and all(re.search(r"`[\w/]+\.py:\d+` `[\w.]+`", row) for row in table)


def test_every_module_is_in_the_reading_order():
    order = re.findall(r"^\| `(\w+\.py)` \| \d+ \|", README, re.M)
    assert sorted(order) == sorted(p.name for p in HERE.glob("*.py"))


def test_every_file_of_support_is_in_the_design():
    named = set(re.findall(r"`support/(\w+\.py)`", TEXTS["docs/design.md"]))
    assert named == {p.name for p in HERE.glob("support/*.py")} - {"__init__.py"}


@pytest.mark.parametrize("text", TEXTS)
def test_files_in_back_quotes_and_links_exist(text):
    quoted = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|jsonl?|csv|md|png))`", TEXTS[text])
    for name in {name for name in quoted if not name.startswith("RUN/")} - NOT_OURS:
        assert (HERE / name).exists(), name
    for link in re.findall(r"\]\(([^)#:]+)", TEXTS[text]):
        assert ((HERE / text).parent / link).exists(), link


@pytest.mark.parametrize("text", TEXTS)
def test_links_to_headings_find_one(text):
    for link, heading in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", TEXTS[text]):
        target = ((HERE / text).parent / link).resolve().relative_to(HERE) if link else text
        headings = re.findall(r"^#+ (.+)$", TEXTS[str(target)], re.M)
        assert heading in {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings}, heading


@pytest.mark.parametrize("text", TEXTS)
def test_functions_in_back_quotes_exist(text):
    before = re.findall(r"`([\w/]+\.py)(?::\d+)?` `([\w.]+)`", TEXTS[text])
    after = re.findall(r"`([\w.]+)` (?:\w+ )?in\s+`?((?:support/)?\w+\.py)`?", TEXTS[text])
    for file, name in before + [(file, name) for name, file in after]:
        assert name in lines_of(file), f"{name} in {file}"


def options(*classes):
    return {f"--{field.name.strip('_').replace('_', '-')}" for cls in classes for field in fields(cls)}


OPTIONS = {"train.py": options(train.Args),
           "synth.py": options(synth.Args, *(cls for cls, _ in synth.COMMANDS.values())),
           "eval.py": options(*(cls for cls, _ in eval.COMMANDS.values()))}


@pytest.mark.parametrize("text", TEXTS)
def test_commands_and_their_options_exist(text):
    for program, rest in re.findall(r"\b((?:train|synth|eval)\.py)( [^\n#`&;]+)", TEXTS[text]):
        assert set(re.findall(r" (--[a-z][\w-]*)", rest)) <= OPTIONS[program], f"{program}{rest}"
    assert set(re.findall(r"python eval\.py ([a-z]+)", TEXTS[text])) <= eval.COMMANDS.keys()
