"""One training step as a whole: passes, gradients, and what is computed once."""

import pytest
import torch

from tests.conftest import FAMILIES, make_tiny_tower
from unirefiner_hf.methods import losses
from unirefiner_hf.methods.distillation.objective import Distillation
from unirefiner_hf.methods.unirefiner.objective import FILTERS, UniRefiner
from unirefiner_hf.methods.unirefiner.settings import UniRefinerSettings
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel


def images(batch=2, height=24, width=24):
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(1)
    )


def count_passes(objective):
    """Images and frame widths of every tower pass, and which asked for q and k."""
    passes = []
    encode = objective.model.encode

    def spy(pixels, register_width=0, query_key_layers=()):
        adapter_off = objective.model.tower.get_submodule(
            f"{objective.model.family.layers}.0.{objective.model.family.query}"
        ).disable_adapters
        passes.append(
            {
                "images": len(pixels),
                "frame": register_width,
                "layers": tuple(query_key_layers),
                "teacher": adapter_off,
                "gradient": torch.is_grad_enabled(),
                "training": objective.model.training,
            }
        )
        return encode(pixels, register_width, query_key_layers=query_key_layers)

    objective.model.encode = spy
    return passes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_gives_every_term_and_trains_only_the_adapter(objective, family):
    step = objective(family)
    out = step(images(), progress=1.0)
    assert set(out) == {
        "loss",
        "theta",
        "clean_ratio",
        *UniRefiner.LOSS_TERMS,
        *FILTERS,
    }
    assert all(torch.isfinite(value) for value in out.values())
    assert all(0 <= out[name] <= 1 for name in ("clean_ratio", *FILTERS))
    out["loss"].backward()
    for name, parameter in step.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_the_loss_is_the_weighted_sum_of_its_terms(objective):
    out = objective()(images(), progress=1.0)
    expected = out["loss_regu"] + out["loss_uni"]
    expected = expected + 0.1 * out["loss_spu"] + 0.4 * out["loss_scd"]
    assert torch.allclose(out["loss"].detach(), expected)


def test_scd_sets_in_after_the_first_tenth(objective):
    step = objective()
    passes = count_passes(step)
    assert "loss_scd" not in step(images(), progress=0.09)
    without = len(passes)
    assert "loss_scd" in step(images(), progress=0.1)
    assert max(p["frame"] for p in passes[:without]) == 1
    assert max(p["frame"] for p in passes[without:]) == 4


def test_every_pass_is_made_once_and_in_its_mode(objective):
    step = objective(no_grad_batch=100)
    passes = count_passes(step)
    step(images(), progress=1.0)
    first = list(passes)
    passes.clear()
    step(images(), progress=1.0)
    kinds = [(p["images"], p["frame"], p["teacher"], p["gradient"]) for p in passes]
    composite, full = (6, 0, True, False), (2, 0, True, False)
    student, relation = (2, 1, False, True), (6, 4, False, False)
    assert kinds == [composite, full, student, relation]
    assert [p["training"] for p in passes] == [False, False, True, False]
    assert [p["layers"] for p in passes] == [(0, 1), (), (), ()]
    reference = (1, 0, True, False)
    assert len(first) == 5, "the reference image is encoded once, in the first step"
    assert [(p["images"], p["frame"], p["teacher"], p["gradient"]) for p in first][
        0
    ] == (reference)


def test_no_queries_are_read_where_the_flow_filter_is_off(objective):
    step = objective(ah_layers=None)
    passes = count_passes(step)
    out = step(images(), progress=1.0)
    assert "rejected_ah" not in out
    assert all(p["layers"] == () for p in passes)


def test_the_base_is_in_memory_once_and_stays_as_it_was(objective):
    step = objective()
    before = {
        name: value.clone()
        for name, value in step.named_parameters()
        if "lora" not in name
    }
    base = sum(p.numel() for p in make_tiny_tower("dinov2").parameters())
    assert sum(value.numel() for value in before.values()) == base
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad])
    step(images())["loss"].backward()
    optimizer.step()
    for name, value in step.named_parameters():
        if name in before:
            assert torch.equal(value, before[name]), name


def test_the_teacher_does_not_move_with_the_student(objective):
    step = objective()
    first = step.teacher_tokens(images())
    for name, parameter in step.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    assert torch.equal(step.teacher_tokens(images()), first)
    bare = make_tiny_tower("dinov2")(images()).last_hidden_state[:, 1:]
    assert torch.equal(first, bare)


@pytest.mark.parametrize("chunk", [1, 5])
def test_chunks_of_passes_without_gradient_change_nothing(objective, chunk):
    torch.manual_seed(7)
    whole = objective(no_grad_batch=100)
    torch.manual_seed(7)
    expected = whole(images(), progress=1.0)
    chunked = objective(no_grad_batch=chunk)
    torch.manual_seed(7)
    got = chunked(images(), progress=1.0)
    for name, value in expected.items():
        assert torch.allclose(got[name], value, atol=1e-5), name


def test_the_reference_is_encoded_anew_for_another_size_only(objective):
    step = objective()
    passes = count_passes(step)
    for _ in range(2):
        step(images(), progress=0.0)
        step(images(height=16, width=32), progress=0.0)
    singles = [p for p in passes if p["images"] == 1 and not p["gradient"]]
    assert len(singles) == 2


def test_lazy_channels_take_no_part_in_any_cosine(objective):
    mask = torch.ones(32)
    mask[3] = 0
    step = objective()
    assert (step.reference_views(24, 24)[1][..., 3] != 0).any()
    step.set_channel_mask(mask)
    views = step.teacher_views(images(), images(batch=6), "left")
    assert (views.image[..., 3] == 0).all() and (views.crop[..., 3] == 0).all()
    assert (step.reference_views(24, 24)[1][..., 3] == 0).all()


def test_gradient_checkpointing_gives_the_same_gradients(objective):
    gradients = []
    for checkpointing in (False, True):
        step = objective()
        if checkpointing:
            step.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        torch.manual_seed(5)
        step(images(), progress=1.0)["loss"].backward()
        gradients.append([p.grad for p in step.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_bfloat16_autocast_still_trains_every_adapter(objective):
    step = objective()
    with torch.autocast("cpu", torch.bfloat16):
        out = step(images(), progress=1.0)
    assert out["loss"].dtype == torch.float32
    out["loss"].backward()
    for name, parameter in step.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_learnable_frame_is_trained(objective):
    step = objective(fill="learnable")
    step(images())["loss"].backward()
    assert step.model.register_patch.grad.abs().sum() > 0


def test_own_crop_tokens_can_be_the_targets(objective):
    outs = []
    for match in (True, False):
        step = objective(match_to_full_image=match)
        torch.manual_seed(2)
        outs.append(step(images())["loss_regu"])
    assert not torch.allclose(*outs)


def test_targets_of_the_crop_alone_never_saw_the_strip(objective):
    """Only the source of the targets changes: the strip and all filters' tokens stay."""
    crops = images(batch=6)
    composite = objective().teacher_views(images(), crops, "left")
    assert composite.source is composite.crop
    step = objective(target_view="crop")
    alone = step.teacher_views(images(), crops, "left")
    for name in ("image", "crop", "strip"):
        assert getattr(alone, name).equal(getattr(composite, name)), name
    expected = torch.nn.functional.normalize(step.teacher_tokens(crops), dim=-1)
    torch.testing.assert_close(alone.source, expected)
    assert not torch.allclose(alone.source, alone.crop, atol=1e-3)

    losses = []
    for view in ("composite", "crop"):
        step = objective(target_view=view, match_to_full_image=False)
        torch.manual_seed(2)
        losses.append(step(images())["loss_regu"])
    assert not torch.allclose(*losses)


@pytest.mark.parametrize("method", ["unirefiner", "distillation"])
@pytest.mark.parametrize("match", [True, False])
def test_negatives_are_of_the_image_or_of_the_crop(
    objective, monkeypatch, match, method
):
    """Unset they go with the targets; set they leave the targets as they are."""
    seen, refinement_loss = [], losses.refinement_loss

    def recorded(crop, target, negatives, *rest, **named):
        seen.append((target, negatives))
        return refinement_loss(crop, target, negatives, *rest, **named)

    monkeypatch.setattr(losses, "refinement_loss", recorded)
    for negatives in (None, "image", "crop"):
        step = objective(match_to_full_image=match, negatives=negatives)
        if method == "distillation":
            step = Distillation(step.model, step.settings)
        torch.manual_seed(2)
        step(images())
    targets, (unset, image, crop) = zip(*seen, strict=True)
    assert targets[0].equal(targets[1]) and targets[0].equal(targets[2])
    assert unset.equal(image if match else crop)
    with step.teaching():
        full = step.unit(step.encode(images(), 0))
    assert image.equal(full.repeat_interleave(3, dim=0))
    assert not crop.equal(image)


def test_with_no_clean_token_all_count(objective):
    step = objective(fpgp_cosine=-1.0)
    out = step(images(), progress=0.0)
    assert out["clean_ratio"] == 0
    assert torch.isfinite(out["loss"])


def test_a_tower_without_adapter_is_refused():
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    with pytest.raises(UniRefinerError, match="adapter"):
        UniRefiner(model, UniRefinerSettings(), torch.randn(1, 3, 24, 24))


def test_layers_the_tower_lacks_are_refused(objective):
    with pytest.raises(ValueError, match=r"\[1, 2\].*2 layers"):
        objective(ah_layers=[1, 2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_crops": 0},
        {"crop_area_max": 0.1},
        {"scd_start": 2},
        {"target_view": "strip"},
        {"negatives": "strip"},
    ],
)
def test_settings_out_of_range_name_the_field(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        UniRefinerSettings(**wrong)


@pytest.mark.parametrize(
    "size,factor,width", [(24, 32, 1), (24, 3, 2), (24, 1, 6), (32, 2, 4)]
)
def test_the_frame_follows_the_shorter_side(objective, size, factor, width):
    step = objective()
    step.register_factor = factor
    assert step.register_width(size, size + 8) == width
