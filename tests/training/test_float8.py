"""Float8 products of the frozen weights: where they are used, and how close they are."""

import pytest
import torch
from torch import nn

from tests.conftest import make_tiny_tower
from tests.training.conftest import refine, save_tiny_tower
from unirefiner_hf.loading.arguments import BackboneArguments
from unirefiner_hf.loading.backbone import load_backbone
from unirefiner_hf.loading.float8 import (
    Float8Error,
    Float8Linear,
    leave_float8,
    to_float8,
    use_float8,
)
from unirefiner_hf.loading.lora import add_adapter
from unirefiner_hf.methods.unirefiner.objective import UniRefiner
from unirefiner_hf.methods.unirefiner.settings import UniRefinerSettings
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel


def objective(float8):
    tower = make_tiny_tower("dinov2")
    if float8:
        assert use_float8(tower) == 8
    model = UniRefinerModel.from_tower(tower)
    torch.manual_seed(0)
    model.tower = add_adapter(tower, rank=4, dropout=0.0)
    reference = torch.randn(1, 3, 24, 24)
    return UniRefiner(model, UniRefinerSettings(), reference).train()


def test_the_product_is_that_of_torch():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False).bfloat16().eval()
    linear.__class__ = Float8Linear
    rows = torch.randn(2, 24, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        ours = linear(rows)
    (tokens, scale), (weight, by_row) = to_float8(rows.flatten(0, 1)), linear._eight
    theirs = torch._scaled_mm(
        tokens,
        weight.t(),
        scale_a=scale,
        scale_b=by_row.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    torch.testing.assert_close(ours, theirs.unflatten(0, (2, 24)))


def test_each_row_uses_the_whole_range():
    rows = torch.randn(5, 16) * torch.logspace(-6, 6, 5)[:, None]
    eight, scale = to_float8(rows)
    assert torch.equal(eight.float().abs().amax(dim=1), torch.full((5,), 448.0))
    torch.testing.assert_close(eight.float() * scale, rows, rtol=0.07, atol=0)
    assert torch.equal(to_float8(torch.zeros(2, 4))[0].float(), torch.zeros(2, 4))


def test_only_passes_without_gradient_change():
    plain, eight = objective(False), objective(True)
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    student = [o.model.encode(pixels, 1).image for o in (plain, eight)]
    assert torch.equal(*student)
    expected, tokens = (o.teacher_tokens(pixels) for o in (plain, eight))
    assert not torch.equal(tokens, expected)
    likeness = nn.functional.cosine_similarity(tokens, expected, dim=-1)
    assert likeness.min() > 0.98
    out = eight(pixels, progress=1.0)
    out["loss"].backward()
    assert all(p.grad is not None for p in eight.parameters() if p.requires_grad)
    leave_float8(eight.model)
    assert torch.equal(eight.teacher_tokens(pixels), expected)


def test_queries_and_keys_stay_out():
    attention = objective(True).model.tower.encoder.layer[0].attention
    kinds = {
        name: type(getattr(attention, name).base_layer)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    assert kinds.pop("q_proj") is kinds.pop("k_proj") is nn.Linear
    assert set(kinds.values()) == {Float8Linear}


def test_a_side_off_the_multiple_is_left_and_counted(monkeypatch):
    tower = make_tiny_tower("siglip_vision_model", hidden_size=24)
    warnings = []
    logger = "unirefiner_hf.loading.float8.logger.warning"
    monkeypatch.setattr(logger, warnings.append)
    assert use_float8(tower) == 0
    assert "8 of 8 Linear modules stay out of float8" in warnings[0]


def test_the_option_reaches_the_tower_and_wants_a_gpu(arguments, tmp_path):
    folder = str(save_tiny_tower(tmp_path / "tower"))
    model = load_backbone(folder, BackboneArguments(teacher_float8=True)).model
    assert any(isinstance(module, Float8Linear) for module in model.modules())
    with pytest.raises(Float8Error, match="compute capability 8.9"):
        refine(*arguments(model={"teacher_float8": True}))
