"""The command as a user meets it: help, errors in one line, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import unirefiner_hf
from unirefiner_hf import cli
from unirefiner_hf.cli import VERBS, main
from unirefiner_hf.resources import PACKAGE, recipe_names
from unirefiner_hf.training import run as run_module
from unirefiner_hf.training.trainer import CheckpointError


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


@pytest.fixture
def refined(monkeypatch):
    """What `refine` was called with, in place of a refinement."""
    calls = []
    monkeypatch.setattr(run_module, "refine", lambda *args: calls.append(args))
    return calls


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"unirefiner {verb}" in out
    assert VERBS[verb].split()[0] in out


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["recipes"], []])
def test_light_commands_load_no_heavy_library(words):
    code = (
        "import sys\nfrom unirefiner_hf.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'peft', 'PIL', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = python("-c", code, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_the_verbs_and_no_verb_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n    {verb} " in out
    assert main([]) == 2


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == unirefiner_hf.__version__


def test_refine_help_groups_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["refine", "--help"])
    out = capsys.readouterr().out
    for group in ("model:", "data:", "method (UniRefiner):", "training:"):
        assert f"\n{group}\n" in out
    for option in ("--config RECIPE", "--model [", "--data [", "--uniformity ["):
        assert f"\n  {option}" in out
    assert "required" in out and "default: 0.0001" in out


def test_as_a_module():
    done = python("-m", "unirefiner_hf", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, unirefiner_hf.__version__)


# refine


def test_refine_takes_a_recipe_and_options(refined, tmp_path):
    command = ["refine", "--config", "siglip2/so400m-patch16-512", "--data", "photos"]
    options = ["--ah_layers", "3", "5", "--learning_rate=1e-3", "--lazy_channels", "no"]
    options += ["--output_dir", str(tmp_path), "--resume"]
    assert main([*command, *options]) == 0
    ((model, data, method, training),) = refined
    assert model.model == "google/siglip2-so400m-patch16-512"
    assert data.data == "photos"
    assert (method.ah_layers, method.lazy_channels) == ([3, 5], False)
    assert (training.learning_rate, training.resume) == (1e-3, True)
    assert training.per_device_train_batch_size == 16


def test_refine_takes_a_file_and_works_without_one(refined, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"model": "a", "data": "b", "output_dir": "c"}))
    assert main(["refine", "--config", str(recipe), "--lora_rank", "4"]) == 0
    assert main(["refine", "--model", "a", "--data", "b", "--output_dir", "c"]) == 0
    assert [call[0].lora_rank for call in refined] == [4, 8]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("refin", "invalid choice: 'refin'"),
        ("refine --lora_rnk 4", "unknown option --lora_rnk; did you mean --lora_rank?"),
        ("refine --lora-rank 4", "unknown option --lora-rank; did you mean"),
        ("refine --zzzzzz", "unknown option --zzzzzz ('unirefiner refine --help'"),
        ("refine photos", "unexpected argument 'photos'"),
        (
            "refine --config dinov2/smal",
            "'dinov2/smal' is neither a file nor a shipped",
        ),
        ("refine --config dinov2/small", "data is missing"),
        ("refine --config dinov2/small --data", "data is without a value"),
        ("refine --config dinov2/small --data x --lora_rank y", "lora_rank is 'y'"),
        ("refine --config dinov2/small --data x --temperature 0", "temperature is 0.0"),
        ("merge", "required: RUN, --output"),
        ("merge x --output y --dtype int8", "invalid choice: 'int8'"),
        ("merge /nowhere --output y", "/nowhere is not a run"),
        ("recipes copy", "required: name"),
        ("recipes copy nothing", "'nothing' is neither a file nor a shipped recipe"),
        ("recipes paste", "invalid choice: 'paste'"),
    ],
)
def test_errors_of_the_user_are_one_line(words, message, capsys, refined):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("unirefiner: error: ") and err.count("\n") == 1
    assert message in err
    assert refined == []


# Exit codes

RUN = ["refine", "--model", "a", "--data", "b", "--output_dir", "c"]


def fail_with(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(run_module, "refine", fail)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad\n  value"),
        FileNotFoundError("bad value"),
        PermissionError("bad value"),
        CheckpointError("bad value"),
    ],
)
def test_users_errors_exit_2_without_a_traceback(error, monkeypatch, capsys):
    fail_with(error, monkeypatch)
    assert main(RUN) == 2
    assert capsys.readouterr().err == "unirefiner: error: bad value\n"
    for words in (["--traceback", *RUN], [*RUN, "--traceback"]):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err and type(error).__name__ in err


def test_defects_keep_their_traceback(monkeypatch):
    fail_with(TypeError("ours"), monkeypatch)
    with pytest.raises(TypeError, match="ours"):
        main(RUN)


def test_interrupts_exit_130(monkeypatch, capsys):
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert main(RUN) == 130
    assert capsys.readouterr().err == "unirefiner: interrupted\n"
    fail_with(run_module.Interrupted("checkpoint-2 was left."), monkeypatch)
    assert main(RUN) == 130
    assert "checkpoint-2 was left." in capsys.readouterr().err


# recipes


def test_recipes_are_listed_with_their_model(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert "dinov2/giant" in recipe_names() and "accelerate/ddp" in recipe_names()
    assert any(line.endswith("facebook/dinov2-giant") for line in lines)


def test_copy_goes_over_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    copy = ["recipes", "copy", "dinov2/small"]
    shipped = (PACKAGE.parent / "recipes/dinov2/small.yaml").read_text()
    for words, path in (
        (copy, "small.yaml"),
        ([*copy, "folder"], "folder/small.yaml"),
        ([*copy, "mine.yaml"], "mine.yaml"),
    ):
        assert main(words) == 0
        assert Path(capsys.readouterr().out.strip()) == Path(path)
        assert Path(path).read_text() == shipped
        Path(path).write_text("mine")
        assert main(words) == 2
        assert f"{path} exists" in capsys.readouterr().err
        assert Path(path).read_text() == "mine"
    assert main([*copy, "nowhere/mine.yaml"]) == 2


def test_verbs_are_files():
    for verb in VERBS:
        assert (Path(cli.__file__).parent / f"{verb}.py").is_file()
