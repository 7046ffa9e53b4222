"""Every block equals the authors' implementation, values and gradients."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.golden import check

ATOL = 2e-5


@pytest.mark.parametrize("block", check.CHECKS)
def test_block_equals_the_reference(block):
    error, name, compared = check.largest_errors(check.REFERENCE)[block]
    assert compared > 0
    assert error <= ATOL, f"{name} differs by {error}"


def test_every_output_of_the_file_is_compared():
    golden = check.GoldenFile(check.REFERENCE)
    inputs = {
        "registers.image",
        "roi.boxes",
        "roi.tokens",
        "roi.pixels",
        "fpgp.comparison",
        "fpgp.foreground",
        "adaptive.registers",
        "adaptive.tokens",
        "ah.foreground",
        "ah.rejected",
        "lazy.bank",
        "scd.target",
    }
    inputs |= {name for name in golden.tensors if name.startswith("loss.in.")}
    inputs |= {
        name for name, _ in ((m[0], t) for m, t in golden.matching(r"ah\.[qk]\d+"))
    }
    compared = {name for run in check.CHECKS.values() for name, _ in run(golden)} - {
        "lazy.masked_channels",
        "lazy.final_neg_mean",
    }
    assert compared == golden.tensors.keys() - inputs


@pytest.mark.parametrize(
    "name", ["scd.value", "ah.clean_sigma0.5", "loss.u0.3.grad.reg"]
)
def test_the_runner_fails_on_a_changed_value(tmp_path, capsys, name):
    with safe_open(check.REFERENCE, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        metadata = file.metadata()
    changed = tensors[name].view(-1)
    changed[0] = ~changed[0] if changed.dtype == torch.bool else changed[0] + 1e-3
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    assert check.main([str(check.REFERENCE)]) == 0
    assert check.main([str(tmp_path / "changed.safetensors")]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_the_runner_refuses_a_file_of_another_layout(tmp_path, capsys):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert check.main([str(tmp_path / "other.safetensors")]) == 2
    assert "lacks" in capsys.readouterr().err
