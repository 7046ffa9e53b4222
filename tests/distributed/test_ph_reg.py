"""PH-Reg on two processes: the losses and weights of one."""

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.conftest import history
from unirefiner_hf.training.state_tree import load_tree

PH_REG = {"method": "ph_reg", "register_tokens": 4, "teacher_views": 2}


def weights(run):
    names = ("adapter_model", "register_tokens")
    files = [
        load_file(run.folder / "adapter" / f"{name}.safetensors") for name in names
    ]
    return {name: value for file in files for name, value in file.items()}


def moments(run):
    """Number of a parameter, of both of the optimiser's groups -> its first moment."""
    last = max(run.folder.glob("checkpoint-*"), key=lambda f: int(f.name[11:]))
    state = load_tree(last / "optimizer.safetensors")["state"]
    return {number: entries["exp_avg"] for number, entries in state.items()}


@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_two_processes_train_what_one_does(launch, tmp_path, mode):
    alone = launch("single", tmp_path / "one", gradient_accumulation_steps=4, **PH_REG)
    _, expected = alone.finished()
    both = launch(mode, tmp_path / "two", **PH_REG)
    record, metrics = both.finished()
    assert record["training"]["processes"] == 2
    for name in ("loss", "loss_cosine", "loss_mse"):
        assert history(metrics, name) == pytest.approx(
            history(expected, name), abs=1e-5
        ), name
    one, two = weights(alone), weights(both)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(two[name], value, atol=1e-3), name
    one, two = moments(alone), moments(both)
    assert one.keys() == two.keys() and len(one) > 20
    for number, value in one.items():
        assert value.any() and torch.allclose(two[number], value, atol=1e-3), number


def test_zero3_is_refused(launch, tmp_path):
    run = launch("zero3", tmp_path / "run", **PH_REG)
    assert run.wait() != 0
    assert "ddp.yaml or zero2.yaml" in run.text()
