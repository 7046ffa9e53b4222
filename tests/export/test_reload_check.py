"""Nothing is uploaded whose tokens are not those of the trained model."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from unirefiner_hf.export.merge import export_run, load_refined
from unirefiner_hf.export.reload_check import (
    ReloadError,
    check_reload,
    encode,
    example_pixels,
)
from unirefiner_hf.export.run_folder import read_run


@pytest.fixture
def written(save_run, tmp_path):
    """What a push holds before its check: folder, base, trained tokens, pixels."""
    _, run, base_folder = save_run()
    found = read_run(run)
    base = load_refined(found, str(base_folder))
    pixels = example_pixels(base)
    trained = encode(base.model, pixels, native=False)
    return export_run(found, base, tmp_path / "out"), base, trained, pixels


def check(folder, base, trained, pixels, **options):
    options = {"dtype": torch.float32, "native": False} | options
    return check_reload(folder, base, trained, pixels, **options)


def test_what_was_written_is_what_was_trained(written):
    report = check(*written)
    assert report.merged < 1e-5
    assert report.reloaded.keys() == {"package", "remote"}
    assert max(report.reloaded.values()) < 1e-5


def test_a_wrong_merge_is_found(written):
    folder, base, trained, pixels = written
    other = trained + 0.01 * torch.randn_like(trained)
    with pytest.raises(ReloadError, match="merged weights.*Nothing was uploaded"):
        check(folder, base, other, pixels)
    with pytest.raises(ReloadError, match="merged weights"):
        check(folder, base, trained * float("nan"), pixels)


def test_wrong_weights_on_disk_are_found(written):
    file = written[0] / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("fc1.weight"))
    weights[name] = 1.05 * weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ReloadError, match="fresh process .package code."):
        check(*written)


def test_code_that_does_not_run_is_found(written):
    (written[0] / "registers.py").write_text("raise RuntimeError('broken code')\n")
    with pytest.raises(ReloadError, match="does not load.*remote code.*broken code"):
        check(*written)


def test_the_pixels_are_those_the_tower_takes(written):
    _, base, _, pixels = written
    assert pixels.shape == (1, 3, *base.image_size)
    wider = dataclasses.replace(base, image_size=(24, 48))
    assert example_pixels(wider).shape[-2:] == (24, 48)
