"""``unirefiner estimate``: options of a run and where it would run, in words."""

import json

import pytest

from tests.conftest import make_tiny_tower
from unirefiner_hf.cli import main

RECIPE = ["estimate", "--config", "dinov2/small", "--image_size", "32"]


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory):
    """A config and no weights."""
    folder = tmp_path_factory.mktemp("tower") / "tiny"
    make_tiny_tower("dinov2").config.save_pretrained(folder)
    return folder


def test_it_prints_the_estimate_and_writes_its_numbers(config_folder, tmp_path, capsys):
    file = tmp_path / "numbers.json"
    words = ["--model", str(config_folder), "--gpu", "h200", "--gpus", "4"]
    words += ["--strategy", "zero3", "--efficiency", "0.5", "--images", "640"]
    words += ["--method", "distillation", "--scd_weight", "0"]
    assert main([*RECIPE, *words, "--json", str(file)]) == 0
    numbers, out = json.loads(file.read_text()), capsys.readouterr().out
    assert "tiny: dinov2, 2 layers of 32, 32 px, bf16" in out
    assert "batch 16 on 4 x h200, zero3" in out and "at 50% of the published" in out
    assert "teacher, crops" in out and "relation crops" not in out
    assert numbers["steps"] == 20 and "for 20 steps" in out
    assert numbers["gpus"] == 4 and numbers["memory"]["gathered layers"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "gpu is 'h1000'; known are b200, h200"),
        (["--gpus", "0"], "gpus is 0"),
        (["--teacher_float8", "--gpu", "a100"], "a100 has no float8 products"),
        (["--image_size", "33"], "does not divide into patches of 4"),
        (["--lora_rnk", "4"], "did you mean --lora_rank"),
    ],
)
def test_bad_values_are_one_line(words, message, config_folder, capsys):
    assert main([*RECIPE, "--model", str(config_folder), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
