"""A quantised base: smaller, trained on, and merged into the unquantised one."""

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModel, BitImageProcessorPil

from tests.conftest import make_tiny_tower
from tests.training.conftest import refine
from unirefiner_hf.loading import quantized
from unirefiner_hf.loading.arguments import BackboneArguments
from unirefiner_hf.loading.quantized import QuantizationError, quantization
from unirefiner_hf.methods.base import load_trainable
from unirefiner_hf.methods.unirefiner.settings import UniRefinerSettings
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.towers import load_tower


@pytest.fixture(params=["dinov2"])
def folder(request, tmp_path):
    """A tower on disk whose widths are multiples of a block of 64 weights."""
    make_tiny_tower(request.param, hidden_size=64).save_pretrained(tmp_path / "tower")
    BitImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(tmp_path / "tower")
    return str(tmp_path / "tower")


def frozen_bytes(tower):
    return sum(p.nbytes for n, p in tower.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("folder", ["dinov2", "siglip_vision_model"], indirect=True)
def test_only_the_layers_are_quantised_and_the_adapter_learns(kind, folder):
    pytest.importorskip("bitsandbytes")
    plain, model = (
        load_trainable(folder, arguments, UniRefinerSettings()).model
        for arguments in (
            BackboneArguments(),
            BackboneArguments(base_quantization=kind),
        )
    )
    assert frozen_bytes(model.tower) < 0.8 * frozen_bytes(plain.tower)
    small = {
        name.removeprefix("base_model.model.")
        for name, p in model.tower.named_parameters()
        if not p.is_floating_point()
    }
    assert small and all(name.startswith(model.family.layers) for name in small)
    pixels = torch.randn(2, 3, 24, 24)
    tokens, expected = model.encode(pixels, 1).image, plain.encode(pixels, 1).image
    likeness = nn.functional.cosine_similarity(tokens, expected, dim=-1)
    assert 0.9 < likeness.mean() < 0.999999
    tokens.square().mean().backward()
    for name, parameter in model.tower.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_the_merge_is_into_the_base_as_it_was(arguments, folder):
    pytest.importorskip("bitsandbytes")
    model = {"model": folder, "base_quantization": "int8"}
    run = refine(*arguments(model=model, max_steps=3))
    adapted = PeftModel.from_pretrained(load_tower(folder), run / "adapter")
    merged = AutoModel.from_pretrained(run / "merged").eval()
    expected = adapted.merge_and_unload().state_dict()
    for name, weight in merged.tower.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(quantized, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(QuantizationError, match="pip install"):
        quantization("nf4", make_tiny_tower("dinov2"), torch.float32)


def test_nf4_on_a_cpu_is_refused_before_anything_is_loaded(arguments):
    with pytest.raises(QuantizationError, match="does not train on a CPU"):
        refine(*arguments(model={"base_quantization": "nf4", "model": "/nowhere"}))


def test_another_kind_is_refused():
    with pytest.raises(
        UniRefinerError, match="base_quantization is 'fp4'; it must be one"
    ):
        BackboneArguments(base_quantization="fp4")
