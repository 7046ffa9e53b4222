"""``unirefiner estimate``: from a config alone, for devices that are not here."""

import json

import pytest

from tests.conftest import make_tiny_tower
from unirefiner_hf.cli import main
from unirefiner_hf.estimation.devices import GPUS, Device, find_device

RECIPE = ["estimate", "--config", "dinov2/small", "--image_size", "32"]


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory):
    """A config and no weights."""
    folder = tmp_path_factory.mktemp("tower") / "tiny"
    make_tiny_tower("dinov2").config.save_pretrained(folder)
    return folder


@pytest.fixture
def estimated(config_folder, tmp_path, capsys):
    """Run the verb; returns its numbers and what it printed."""

    def run(*words):
        file = tmp_path / "numbers.json"
        model = ["--model", str(config_folder)]
        assert main([*RECIPE, *model, *words, "--json", str(file)]) == 0
        return json.loads(file.read_text()), capsys.readouterr().out

    return run


def test_it_tells_parameters_passes_memory_and_time(estimated):
    numbers, out = estimated("--gpu", "h200", "--images", "160")
    assert numbers["parameters"]["trained"] > 0
    assert f"{numbers['flops']['losses and filters'] / 1e12:.3f}" in out
    assert numbers["steps"] == 20 and "for 20 steps (2 of them before L_scd)" in out
    for part in ("teacher, composites", "relation crops", "backward", "optimiser"):
        assert part in out or part in numbers["memory"]
    assert "tiny: dinov2, 2 layers of 32, 32 px, bf16" in out
    assert "batch 16 on one h200" in out and "of 141" in out


def test_several_devices_part_what_the_strategy_says(estimated):
    alone, _ = estimated()
    ddp, out = estimated("--gpus", "4")
    assert "4 x h100, ddp" in out and "exchanged" in out
    assert ddp["memory"]["frozen base"] == alone["memory"]["frozen base"]
    assert (alone["steps"], ddp["steps"]) == (626, 158)
    zero2, _ = estimated("--gpus", "4", "--strategy", "zero2")
    trained = alone["parameters"]["trained"]
    assert zero2["memory"]["optimiser"] == 3 * trained
    zero3, _ = estimated("--gpus", "4", "--strategy", "zero3")
    base = alone["memory"]["frozen base"]
    assert zero3["memory"]["frozen base"] == pytest.approx(base / 4, abs=1)
    assert zero3["memory"]["gathered layers"] == base


def test_the_method_of_the_recipe_is_estimated(estimated):
    refined, _ = estimated()
    plain, out = estimated("--method", "plain")
    assert "teacher, crops" in out and "teacher, composites" not in out
    assert sum(plain["flops"].values()) < sum(refined["flops"].values())


def test_accumulation_takes_as_many_steps_of_the_tower(estimated):
    plain, _ = estimated("--images", "320")
    more, _ = estimated("--images", "320", "--gradient_accumulation_steps", "2")
    assert more["steps"] == plain["steps"] / 2
    assert more["run_seconds"] == pytest.approx(plain["run_seconds"], rel=0.05)


def test_recomputation_keeps_less(estimated):
    kept, _ = estimated("--per_device_train_batch_size", "64")
    freed, out = estimated(
        "--per_device_train_batch_size", "64", "--gradient_checkpointing", "true"
    )
    assert freed["peak_bytes"] < kept["peak_bytes"]
    assert "recomputation" in out


def test_what_does_not_fit_is_said_with_a_remedy(estimated, monkeypatch):
    small = Device("l4", 1e12, 1e12, 1e12, 1e12, 1e6, 1e9)
    monkeypatch.setitem(GPUS, "l4", small)
    _, out = estimated("--gpu", "l4")
    assert "does not fit: --gradient_checkpointing true" in out
    _, out = estimated("--gpu", "l4", "--gradient_checkpointing", "true")
    assert "does not fit: --no_grad_batch 1" in out


def test_float8_speeds_up_what_has_no_gradient(estimated):
    plain, _ = estimated("--gpu", "h200")
    faster, out = estimated("--gpu", "h200", "--teacher_float8", "true")
    assert 0.6 < faster["seconds_a_step"] / plain["seconds_a_step"] < 1
    assert faster["flops"] == plain["flops"]
    assert faster["memory"]["float8 copy of the frozen layers"] > 0


def test_a_quantised_base_is_smaller(estimated):
    sizes = [estimated("--base_quantization", kind)[0] for kind in ("nf4", "int8")]
    sizes = [size["memory"]["frozen base"] for size in (*sizes, estimated()[0])]
    assert sizes == sorted(sizes) and sizes[0] < 0.6 * sizes[2]


def test_this_machine_counts_in_float32_and_its_own_rate(estimated):
    numbers, out = estimated("--gpu", "cpu")
    assert "float32" in out.splitlines()[0] and "measured rates" in out
    assert find_device("cpu").float32 > 1e8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "gpu is 'h1000'; known are b200, h200"),
        (["--gpus", "0"], "gpus is 0"),
        (["--strategy", "fsdp"], "strategy is 'fsdp'; use ddp, zero2, zero3"),
        (["--teacher_float8", "--gpu", "a100"], "a100 has no float8 products"),
        (
            ["--teacher_float8", "--base_quantization", "nf4"],
            "must be false where base_quantization is set",
        ),
        (["--efficiency", "40"], "efficiency is 40.0"),
        (["--image_size", "33"], "does not divide into patches of 4"),
        (["--lora_rnk", "4"], "did you mean --lora_rank"),
    ],
)
def test_bad_values_are_one_line(words, message, config_folder, capsys):
    assert main([*RECIPE, "--model", str(config_folder), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("name", GPUS)
def test_rates_of_the_table_are_ordered(name):
    device = GPUS[name]
    assert device.float8 == 0 or device.float8 >= 1.9 * device.bfloat16
    assert device.bfloat16 >= device.tf32 >= device.float32
    assert 20e9 < device.memory < 200e9
