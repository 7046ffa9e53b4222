"""The command as a user meets it: spellings, errors in one line, exit codes."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.cli.conftest import Made, python
from unirefiner_hf.cli import main
from unirefiner_hf.errors import UniRefinerError
from unirefiner_hf.estimation import estimate as estimate_module
from unirefiner_hf.loading.adapter import CheckpointError
from unirefiner_hf.resources import PACKAGE, recipe_names
from unirefiner_hf.training import refine as refine_module
from unirefiner_hf.training.trainer import Interrupted

# refine


def test_refine_takes_a_recipe_and_options(refined, tmp_path):
    command = ["refine", "--config", "siglip2/so400m-patch16-512", "--data", "photos"]
    options = ["--ah_layers", "3", "5", "--learning_rate=1e-3", "--lazy_channels", "no"]
    options += ["--output_dir", str(tmp_path), "--resume"]
    assert main([*command, *options]) == 0
    recipe = refined[0]["recipe"]
    assert recipe.model == "google/siglip2-so400m-patch16-512"
    assert recipe.train_dataset == "photos"
    assert (recipe.method.ah_layers, recipe.method.lazy_channels) == ([3, 5], False)
    assert (recipe.args.learning_rate, recipe.args.resume) == (1e-3, True)
    assert recipe.args.per_device_train_batch_size == 16


def test_both_spellings_are_taken(refined, tmp_path):
    folder = str(tmp_path / "a_b-c")
    for dash in ("-", "_"):
        words = f"refine --config dinov2/small --data a_b-c --output{dash}dir {folder}"
        words += (
            f" --max{dash}steps=7 --lr{dash}scheduler{dash}type constant_with_warmup"
        )
        assert main(words.split()) == 0
    first, second = (call["recipe"] for call in refined)
    assert first.train_dataset == "a_b-c" and first.args.output_dir == folder
    assert first.args.max_steps == 7
    assert first.args.lr_scheduler_type == "constant_with_warmup"
    assert first.to_dict() == second.to_dict()


def test_refine_takes_a_file_and_works_without_one(refined, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"model": "a", "data": "b", "output-dir": "c"}))
    assert main(["refine", "--config", str(recipe), "--lora_rank", "4"]) == 0
    assert main(["refine", "--model", "a", "--data", "b", "--output_dir", "c"]) == 0
    assert [call["recipe"].args.lora_rank for call in refined] == [4, 8]
    assert [call["recipe"].args.output_dir for call in refined] == ["c", "c"]


def test_options_of_the_trainer_and_negative_numbers(refined):
    words = "refine --config demo --max-grad-norm 0.5 --max-steps -1 --seed=3"
    assert main(words.split()) == 0
    args = refined[0]["recipe"].args
    assert (args.max_grad_norm, args.max_steps, args.seed) == (0.5, -1, 3)


def test_what_another_method_leaves_out_is_said(refined, capsys):
    words = ["refine", "--config", "dinov2/small", "--data", "x", "--method", "ph_reg"]
    assert main(words) == 0
    err = capsys.readouterr().err
    assert "unirefiner: method ph_reg does not read register_factor" in err
    assert "left out of dinov2/small" in err and err.count("\n") == 1
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_only_the_first_process_says_so(refined, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main("refine --config dinov2/small --data x --method ph_reg".split()) == 0
    assert capsys.readouterr().err == ""


# demo, estimate, evaluate


def test_demo_is_its_recipe(refined, monkeypatch):
    done = types.SimpleNamespace(picture="p", merged="m", to_dict=dict)
    kept = refine_module.refine
    monkeypatch.setattr(refine_module, "refine", lambda **k: kept(**k) and done)
    assert main(["demo", "--output", "out"]) == 0
    assert refined == [{"recipe": "demo", "output_dir": "out"}]
    words = "demo --output out --model m --images i --steps 2 --size 56"
    assert main(words.split()) == 0
    asked = {"model": "m", "data": "i", "max_steps": 2, "image_size": 56}
    assert refined[1] == {"recipe": "demo", "output_dir": "out", **asked}


@pytest.fixture
def estimated(monkeypatch):
    """What `estimate` was called with."""
    calls = []

    def estimate(**keywords):
        calls.append(keywords)
        return Made()

    monkeypatch.setattr(estimate_module, "estimate", estimate)
    return calls


def test_estimate_takes_what_refine_does_and_where(estimated):
    words = "estimate --config dinov2/small --gpu h200 --gpus 2 --strategy zero2"
    assert main([*words.split(), "--lora_rank", "4", "--efficiency", "0.5"]) == 0
    call = estimated[0]
    recipe = call.pop("recipe")
    where = {"gpu": "h200", "gpus": 2, "strategy": "zero2", "efficiency": 0.5}
    assert call == {**where, "images": None}
    assert recipe.args.lora_rank == 4 and recipe.model == "facebook/dinov2-small"
    assert recipe.train_dataset is None


def test_estimate_needs_neither_the_machine_nor_the_folder_of_the_run(
    estimated, capsys
):
    words = ["estimate", "--model", "x", "--tf32", "true", "--deepspeed", "/no.json"]
    assert main(words) == 0 and len(estimated) == 1
    words = ["estimate", "--config", "dinov2/small", "--method", "ph_reg"]
    assert main(words) == 0
    assert "ph_reg does not read register_factor" in capsys.readouterr().err
    assert main(["estimate", "--model", "x", "--gpux", "a"]) == 2


@pytest.fixture
def evaluated(monkeypatch):
    """What `evaluate` was called with."""
    from unirefiner_hf.evaluation import evaluate as evaluate_module

    calls = []

    def evaluate(checkpoints, **fields):
        calls.append((checkpoints, fields))
        return Made()

    monkeypatch.setattr(evaluate_module, "evaluate", evaluate)
    return calls


def test_evaluate_passes_what_is_given_typed(evaluated, tmp_path):
    file = tmp_path / "protocol.yaml"
    file.write_text("data: scenes\nmax-val: 3\nseeds: 1\n")
    words = f"evaluate base runs/mine --config {file} --max_val null --crop=224 --fast"
    assert main(words.split()) == 0
    checkpoints, fields = evaluated[0]
    assert checkpoints == ["base", "runs/mine"]
    given = {"data": "scenes", "max_val": None, "seeds": 1, "crop": 224, "fast": True}
    assert fields == given


# Errors of the user's


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("refien", "unknown command 'refien'; did you mean refine?"),
        ("zzz", "unknown command 'zzz' ('unirefiner --help'"),
        ("--verson", "unknown option --verson; did you mean --version?"),
        ("refine --lora_rnk 4", "unknown option --lora_rnk; did you mean --lora_rank?"),
        ("refine --lora-rnk=4", "unknown option --lora-rnk; did you mean --lora-rank?"),
        (
            "refine --outputdir x",
            "unknown option --outputdir; did you mean --output-dir?",
        ),
        ("refine --confg demo", "unknown option --confg; did you mean --config?"),
        ("refine --zzzzzz", "unknown option --zzzzzz ('unirefiner refine --help-all'"),
        ("refine photos", "unexpected argument 'photos'"),
        ("refine --config", "argument --config: expected one argument"),
        (
            "refine --config dinov2/smal",
            "'dinov2/smal' is neither a file nor a shipped",
        ),
        ("refine --config dinov2/small --data", "data is without a value"),
        ("refine --config dinov2/small --data x --lora_rank y", "lora_rank is 'y'"),
        ("refine --config dinov2/small --data x --temperature 0", "temperature is 0.0"),
        ("refine --config dinov2/small --data x --optim y", "optim is 'y'; expected"),
        (
            "refine --config demo --eval-strategy steps",
            "eval_strategy is 'steps', which",
        ),
        (
            "refine --config demo --teacher-views 3",
            "is no setting of method unirefiner",
        ),
        ("refine --config demo --method uni", "method is 'uni'; it must be one of"),
        ("refine --model x --data y", "output_dir is not set"),
        ("merge", "required: RUN, --output"),
        ("merge x --output y --dtype int8", "invalid choice: 'int8'"),
        (
            "merge x --output y --no_txt",
            "unknown option --no_txt; did you mean --no_text?",
        ),
        ("merge /nowhere --output y", "/nowhere is not a run"),
        (
            "evaluate base --data x --crp 224",
            "unknown option --crp; did you mean --crop?",
        ),
        ("evaluate base --data x --crop y", "crop is 'y'; expected int."),
        ("demo --output x --steps 0", "--steps: 0 is not 1 or more"),
        ("recipes copy", "required: NAME"),
        ("recipes copy nothing", "'nothing' is neither a file nor a shipped recipe"),
        ("recipes paste", "invalid choice: 'paste'"),
    ],
)
def test_errors_of_the_user_are_one_line(words, message, capsys, refined, evaluated):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("unirefiner: error: ") and err.count("\n") == 1
    assert message in err
    assert refined == [] and evaluated == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--config dinov2/small",
            "data is missing: add it to the recipe, or give --data",
        ),
        (
            "--data x --output-dir y",
            "model is missing: add it to the recipe, or give --m",
        ),
    ],
)
def test_missing_places_are_named_in_both_spellings(words, message, capsys):
    assert main(["refine", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_what_transformers_says_of_an_argument_is_the_users(tmp_path, capsys):
    words = (
        "refine --config demo --use-cpu --image-size 56 --report-to nobody --output-dir"
    )
    assert main([*words.split(), str(tmp_path / "run")]) == 2
    assert "nobody is not supported" in capsys.readouterr().err


# Exit codes

RUN = ["refine", "--model", "a", "--data", "b", "--output_dir", "c"]


def fail_with(error, monkeypatch):
    def fail(**_):
        raise error

    monkeypatch.setattr(refine_module, "refine", fail)


@pytest.mark.parametrize(
    "error",
    [
        UniRefinerError("bad\n  value"),
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


PLANTED = """
import sys
from unirefiner_hf.cli import main
from unirefiner_hf.errors import UniRefinerError
from unirefiner_hf.estimation import estimate as estimate_module
from unirefiner_hf.training import refine as module
def planted(**_):
    raise {error}('planted')
module.refine = planted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("error", ["ValueError", "TypeError", "RuntimeError"])
def test_an_error_of_our_own_keeps_its_traceback(error):
    for quiet in ([], ["--quiet"]):
        done = python("-c", PLANTED.format(error=error), *RUN, *quiet)
        assert done.returncode == 1
        assert "Traceback" in done.stderr and "in planted" in done.stderr
        assert done.stderr.endswith(f"{error}: planted\n")


def test_an_error_of_the_users_does_not():
    done = python("-c", PLANTED.format(error="UniRefinerError"), *RUN)
    assert done.returncode == 2
    assert done.stderr.endswith("unirefiner: error: planted\n")
    assert "Traceback" not in done.stderr


def test_interrupts_exit_130(monkeypatch, capsys):
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert main(RUN) == 130
    assert capsys.readouterr().err == "unirefiner: interrupted\n"
    fail_with(Interrupted("checkpoint-2 was left."), monkeypatch)
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
        ([*copy, "mine.yaml", "--quiet"], "mine.yaml"),
    ):
        assert main(words) == 0
        assert Path(capsys.readouterr().out.strip()) == Path(path)
        assert Path(path).read_text() == shipped
        Path(path).write_text("mine")
        assert main(words) == 2
        assert f"{path} exists" in capsys.readouterr().err
        assert Path(path).read_text() == "mine"
    assert main([*copy, "nowhere/mine.yaml"]) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["extract", "starter", "--images", "", "--output", "out"],
        ["extract", "starter", "--images", "photos", "--output", " "],
        ["diagnose", "starter", "--images", ""],
        ["compare", "starter", "starter", "--images", ""],
        ["merge", "run", "--output", ""],
        ["merge", "", "--output", "out"],
        ["push", "", "user/name"],
        ["evaluate", "starter", "--data", "", "--fast"],
        ["extract", "", "--images", "photos", "--output", "out"],
    ],
)
def test_an_empty_place_is_not_the_current_folder(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "0.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "mine.png")
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "is empty: name a" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.png", "photos"]
