"""What a person reads: commands, options in groups, and no import that takes seconds."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import unirefiner_hf
from tests.cli.conftest import python
from unirefiner_hf import cli
from unirefiner_hf.cli import COMMANDS, main
from unirefiner_hf.cli import estimate as estimate_command
from unirefiner_hf.cli import evaluate as evaluate_command
from unirefiner_hf.cli import refine as refine_command
from unirefiner_hf.cli.options import Option, options_of
from unirefiner_hf.methods.registry import METHODS, method_named, setting_names
from unirefiner_hf.training.arguments import REFUSED, UniRefinerArguments

HEAVY = {"torch", "transformers", "numpy", "peft", "PIL", "datasets"}


def help_of(command, capsys, word="--help"):
    """The help, its status being 0."""
    try:
        assert main([command, word]) == 0
    except SystemExit as stop:
        assert stop.code == 0
    return capsys.readouterr().out


def options_in(text):
    return set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_the_options_of_all(command, capsys):
    out = help_of(command, capsys)
    assert f"unirefiner {command}" in out and COMMANDS[command] in out
    assert {"--json", "--quiet", "--help"} <= options_in(out)
    assert "--traceback" in help_of(command, capsys, "--help-all")
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        [],
        ["recipes"],
        *([name, "--help"] for name in COMMANDS),
    ],
)
def test_light_commands_load_no_heavy_library(words):
    code = (
        "import sys\nfrom unirefiner_hf.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    done = python("-c", code, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_overview_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for command, text in COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(text)}$", out, re.MULTILINE)
    assert main([]) == 2
    assert capsys.readouterr().out == out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == unirefiner_hf.__version__


def test_as_a_module():
    done = python("-m", "unirefiner_hf", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, unirefiner_hf.__version__)


def test_commands_are_files():
    for command in COMMANDS:
        assert (Path(cli.__file__).parent / f"{command}.py").is_file()


# refine, estimate, evaluate


def test_the_help_of_refine_is_short_and_in_groups(capsys):
    out = help_of("refine", capsys)
    assert len(out.splitlines()) < 60
    for group in ("backbone", "images", "border and adapter", "training", "output"):
        assert f"\n{group}:\n" in out
    assert "More: --help-all." in out
    shown = options_in(out)
    assert {
        "--config",
        *(f"--{n.replace('_', '-')}" for n in refine_command.BRIEF),
    } <= shown
    # One line an option: none is wrapped.
    body = out.split("\nbackbone:")[1].split("\nall commands:")[0]
    own = [line for line in body.splitlines() if line.startswith("    ")]
    assert all(line.startswith(" " * 16) for line in own)


def test_the_help_of_refine_shows_defaults(capsys):
    out = help_of("refine", capsys)
    for option, end in {
        "--learning-rate X": "[0.0001]",
        "--streaming BOOL": "[false]",
        "--image-size N ...": "[as in pretraining]",
        "--register-fill FILL": "zero, randn, rand, learnable [zero]",
        "--bf16 BOOL": "[on GPUs that can, off on CPUs]",
        "--output-dir DIR": "Folder of the run",
    }.items():
        assert re.search(rf"^  {option} .*{re.escape(end)}$", out, re.MULTILINE), option


def test_the_help_of_refine_names_every_setting_of_every_method(capsys):
    out = help_of("refine", capsys)
    parts = dict(
        re.findall(
            r"^  (\w+)  +((?:[\w-]+ ?|\n {10,})+)", out.split("\nmethod")[1], re.M
        )
    )
    assert list(parts)[: len(METHODS)] == list(METHODS)
    words = {method: parts[method].replace("-", "_").split() for method in METHODS}
    assert words["unirefiner"][-4:] == ["and", "those", "of", "distillation"]
    for method in METHODS:
        named = set(words[method]) | {
            name for name in words["distillation"] if "of" in words[method]
        }
        assert set(setting_names(method_named(method))) <= named


def test_defaults_in_the_help_are_those_of_the_arguments():
    real = {field.name: field for field in dataclasses.fields(UniRefinerArguments)}
    for option in refine_command.TRAINER:
        default = real[option.name].default
        if option.value == "BOOL":
            default = bool(default)
        assert str(default) == option.default, option.name
    ours = [o for options in refine_command.groups().values() for o in options]
    names = [option.name for option in ours]
    assert len(set(names)) == len(names)
    assert {name for name in names} - {"model", "data", "method"} <= real.keys()
    elsewhere = (*refine_command.TRAINER, refine_command.RESUME)
    for option in options_of(UniRefinerArguments).values():
        for own in ours:
            if own.name == option.name and own not in elsewhere:
                assert own.default == option.default, own.name


def test_briefs_name_options_there_are():
    for command in (refine_command, estimate_command):
        names = {
            o.name for options in refine_command.groups().values() for o in options
        }
        assert set(command.BRIEF) <= names
    fields = options_of(*evaluate_command.GROUPS.values())
    assert set(evaluate_command.BRIEF) <= fields.keys()


def test_everything_but_what_is_refused_is_in_help_all(capsys):
    out = help_of("refine", capsys, "--help-all")
    shown = options_in(out)
    names = {f.name for f in dataclasses.fields(UniRefinerArguments) if f.init}
    names |= {n for m in METHODS for n in setting_names(method_named(m))}
    for name in names:
        option = f"--{name.replace('_', '-')}"
        assert (option in shown) == (name not in REFUSED), name
    assert "\ntransformers.TrainingArguments:\n" in out
    assert "\nmethod unirefiner, and those of distillation:\n" in out
    assert "needed]" in out and "default: 0.0001]" in out
    assert {"--gpu", "--max-grad-norm", "--uniformity"} <= options_in(
        help_of("estimate", capsys, "--help_all")
    )


def test_the_helps_of_estimate_and_evaluate_are_short(capsys):
    estimated = help_of("estimate", capsys)
    assert len(estimated.splitlines()) < 60
    assert {"--gpu", "--config", "--gradient-checkpointing"} <= options_in(estimated)
    assert "--report-to" not in estimated
    evaluated = help_of("evaluate", capsys)
    assert len(evaluated.splitlines()) < 60
    assert "--head-dropout" not in evaluated
    every = options_in(help_of("evaluate", capsys, "--help-all"))
    for name in options_of(*evaluate_command.GROUPS.values()):
        assert f"--{name.replace('_', '-')}" in every


def test_every_own_field_is_explained():
    kinds = [method_named(method) for method in METHODS]
    for kind in (*evaluate_command.GROUPS.values(), *kinds):
        for option in options_of(kind).values():
            assert option.help and option.help.endswith((".", "]")), option.name
    for options in refine_command.groups().values():
        assert all(option.help for option in options)


@pytest.mark.parametrize(
    ("help", "default", "brief"),
    [
        ("Steps; of all. More.", "3", "Steps [3]"),
        ("Seeds 0, 1, ...", "3", "Seeds 0, 1, ... [3]"),
        ("A size. Unset: the model's own.", "None", "A size [the model's own]"),
        (f"A size. Unset: {'long ' * 10}.", "None", "A size [unset]"),
        ("A size.", "None", "A size [unset]"),
        ("Folder. Needed.", None, "Folder"),
    ],
)
def test_a_brief_help_is_a_clause_and_the_default(help, default, brief):
    assert Option("x", "int", default, help).brief() == brief
