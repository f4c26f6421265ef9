"""Laws of the command line that synth.py, train.py and eval.py share: options, help, one-line errors."""
import dataclasses
import os
import re
import subprocess
import sys

import pytest

import eval as evaluation
import synth
import train
from conftest import ROOT
from support import command, review
from support.command import parse
from support.files import UserError

COMMANDS = [(synth, [name], options) for name, (options, _) in review.COMMANDS.items()] + [
    (evaluation, [name], options) for name, (options, _) in evaluation.COMMANDS.items()]


@pytest.mark.parametrize("options", [train.Args, synth.Args, *(options for *_, options in COMMANDS)],
                         ids=lambda options: f"{options.__module__}.{options.__name__}")
def test_every_option_has_a_sentence(options):
    sentences = command.field_help(options)
    assert set(sentences) == {field.name for field in dataclasses.fields(options)}
    for name, sentence in sentences.items():
        assert len(sentence) > 5 and sentence.endswith((".", "…")) and "\n" not in sentence, name


@pytest.mark.parametrize("program, argv, options", [
    (train, [], train.Args), (synth, [], synth.Args), (evaluation, [], None), *COMMANDS],
    ids=lambda value: value[0] if value and type(value) is list else None)
def test_help_shows_every_option_with_its_sentence_and_default_on_80_columns(program, argv, options, capsys,
                                                                             monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        program.main([*argv, "--help"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0 and "What is notable" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "--seed N" not in shown or "(default: 0)" in shown
    if not argv:
        assert f"python {program.__name__}.py" in shown  # how it is used
    for name, sentence in command.field_help(options).items() if options else ():
        assert "".join(sentence.split()) in "".join(shown.split()), name


@dataclasses.dataclass
class Percent:
    words: list[str]
    """100 % of them."""
    share: float = 5.0
    """At most 100 %."""


def test_help_may_contain_a_percent_sign(capsys):
    with pytest.raises(SystemExit):
        parse(Percent, ["--help"])
    shown = capsys.readouterr().out
    assert "100 % of them." in shown and "At most 100 %. (default: 5.0)" in shown


def test_options_are_the_dataclass_and_its_defaults():
    assert parse(train.Args, []) == train.Args()
    found = parse(train.Args, "--stage joint --lr 1e-3 --steps 7 --joint-gate uniform --recompute --data d".split())
    assert found == train.Args(stage="joint", lr=1e-3, steps=7, joint_gate="uniform", recompute=True, data="d")
    assert type(found.lr) is float and type(found.steps) is int
    assert parse(train.Args, "--seed 0 --lam 0 --lr-warmup 0".split()) and parse(train.Args, ["--lr-warmup", "1"])


@pytest.mark.parametrize("argv, int8", [([], None), (["--int8"], True), (["--no-int8"], False)])
def test_a_switch_without_a_default_has_an_opposite(argv, int8):
    assert parse(evaluation.Talk, argv).int8 is int8


def train_main(argv):
    return parse(train.Args, argv)


@pytest.mark.parametrize("main, argv, why", [
    *((train_main, argv, why) for argv, why in [
        ("--stge router", "unrecognized arguments: --stge"), ("router", "unrecognized arguments: router"),
        ("--stage all --ste 5", "unrecognized arguments: --ste"),  # no abbreviations: a new option could change them
        ("--stage pretrain", "invalid choice"), ("--preset huge", "invalid choice"),
        ("--dtype float16", "invalid choice"), ("--joint-gate oracle", "invalid choice"),
        ("--steps 1.5", "--steps: invalid int"), ("--lr fast", "--lr: invalid float"),
        ("--seed x", "--seed: invalid int"), ("--run", "--run: expected one argument"),
        ("--resume yes", "unrecognized"),
        ("--lr nan", "--lr is nan, expected a number from"), ("--tau inf", "to 2,147,483,648"),
        ("--lam nan", "--lam is nan"), ("--steps 0", "--steps is 0, expected a number from 1 on"),
        ("--lr-warmup 1.5", "--lr-warmup is 1.5, expected a number from 0 to 1"),
        *((f"--{option} {value}", f"--{option} is {value}") for option, value in [
            ("tau", 0), ("tau", -1), ("contrastive-tau", 0), ("batch", -2), ("rank", 0), ("tokens", 0), ("clip", 0),
            ("alpha", 0), ("lr", 0), ("lam", -0.1), ("seed", -1), ("keep", 0), ("save-every", 0), ("log-every", 0),
            ("eval-records", 0)])]),
    *((evaluation.main, argv, why) for argv, why in [
        ("", "required: COMMAND"), ("measure", "invalid choice"), ("ask", "queries"),
        ("ask --top-p 0 Hi", "--top-p is 0"), ("ask --top-p 1.1 Hi", "--top-p is 1.1"),
        ("ask --temperature -1 Hi", "--temperature is -1"), ("ask --max-new-tokens 0 Hi", "--max-new-tokens is 0"),
        ("routing --show 0", "--show is 0"), ("routing more", "unrecognized arguments: more"),
        ("routing --stage router", "invalid choice"), ("routing --r x", "unrecognized"),
        ("ablate --replies -1", "--replies is -1"), ("ablate --records 0", "--records is 0"),
        ("ablate --tau nan", "--tau is nan"), ("prefer sheet.csv", "unrecognized arguments: sheet.csv"),
        ("prefer", "give messages with --file or"), ("prefer --import", "expected at least one argument"),
        ("prefer --file m.txt --max-new-tokens 0", "--max-new-tokens is 0")])])
def test_arguments_that_make_no_sense_are_refused_in_one_line(main, argv, why):
    with pytest.raises(UserError, match=re.escape(why)) as error:
        main(argv.split())
    assert "\n" not in str(error.value)


def test_a_users_error_is_one_line_and_status_two_and_other_statuses_are_kept(capsys):
    def fails():
        raise UserError("no such thing; look there")
    for main, status in ((fails, 2), (lambda: 130, 130)):
        with pytest.raises(SystemExit) as exit:
            command.run_command(main)
        assert exit.value.code == status
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1
    assert found.err.endswith("error: no such thing; look there\n")


def test_a_reader_that_has_ended_is_no_error():
    """`… | head`: also where all of the output is still in the buffer when main() returns."""
    read, write = os.pipe()
    os.close(read)
    program = "from support.command import run_command; run_command(lambda: print('x'))"
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=60,
                           env=buffered)
    os.close(write)
    assert (found.returncode, found.stderr) == (141, b"")
