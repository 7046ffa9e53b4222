"""PH-Reg: views and their way back, the objective, the tower that is trained in place."""

import numpy as np
import pytest
import torch

from tests.conftest import ALL_FAMILIES, make_tiny_tower
from unirefiner_hf.loading.unlocked import UnlockedTower, unlocked_names
from unirefiner_hf.methods.ph_reg.objective import PHReg
from unirefiner_hf.methods.ph_reg.settings import PHRegSettings
from unirefiner_hf.methods.ph_reg.shifted_views import (
    View,
    draw_views,
    make_view,
    mean_over_views,
)
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.families import FAMILIES as TABLE
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel

TAKING = tuple(f for f in ALL_FAMILIES if TABLE[f].positions is not None)
REFUSED = tuple(f for f in ALL_FAMILIES if f not in TAKING)


def make(family="dinov2", *, attention=None, **settings):
    """An objective on a tiny tower, its trained weights moved off their start."""
    torch.manual_seed(0)
    settings = PHRegSettings(**settings)
    tower = make_tiny_tower(family)
    model = UniRefinerModel.from_tower(
        tower,
        register_width=0,
        num_register_tokens=settings.register_tokens,
        attn_implementation=attention,
    )
    model.tower = UnlockedTower(tower, unlocked_names(tower))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    white = torch.tensor([2.0, 3.0, 4.0])
    return PHReg(model, settings, white).train()


def test_views_lie_far_apart_and_start_with_the_image():
    random = np.random.default_rng(0)
    views = draw_views(10, (40, 20), random)
    assert views[0] == View((0, 0), False) and len(views) == 10
    rows, columns = zip(*(view.offset for view in views), strict=True)
    assert max(map(abs, rows)) == 6 and max(map(abs, columns)) == 3
    assert {view.flip for view in views} == {True, False}
    # Farthest points: no two of the others coincide, out of 100 on a grid of 91.
    assert len({view.offset for view in views[1:]}) == 9
    assert all(not v.flip for v in draw_views(10, (40, 20), random, flip=0))
    assert draw_views(1, (40, 20), random) == [View((0, 0), False)]


def test_farthest_points_by_hand():
    """Each kept offset is the one farthest from those before, as a plain search finds."""
    views = draw_views(4, (20, 20), np.random.default_rng(7), candidates=12)
    random = np.random.default_rng(7)
    drawn = [random.integers(-3, 3, 12, endpoint=True) for _ in range(2)]
    points = list(zip(*(axis.tolist() for axis in drawn), strict=True))
    kept = [points[random.integers(12)]]
    for view in views[1:]:
        nearest = [min((a - c) ** 2 + (b - d) ** 2 for c, d in kept) for a, b in points]
        kept.append(points[nearest.index(max(nearest))])
        assert view.offset == kept[-1]


@pytest.mark.parametrize("flip", [False, True])
def test_a_view_is_the_image_moved_and_white_where_it_ends(flip):
    image = torch.arange(2 * 4 * 6.0).view(2, 4, 6)[[0, 1, 0]]
    white = torch.tensor([-1.0, -2.0, -3.0])
    view = make_view(image, View((1, -1), flip), 2, white)
    if flip:
        view = view.flip(-1)
    assert view[:, :2, 2:].equal(image[:, 2:, :4])
    assert view[:, 2:].equal(white[:, None, None].expand(3, 2, 6))
    assert view[:, :, :2].equal(white[:, None, None].expand(3, 4, 2))


def test_the_way_back_meets_the_place_it_came_from():
    """Tokens that name their own place: after the way back every mean is that place."""
    grid = (5, 7)
    views = draw_views(10, grid, np.random.default_rng(3), shift=0.4)
    assert any(v.flip for v in views)
    names = torch.arange(35.0).view(1, *grid)
    moved = [make_view(names.expand(3, -1, -1), v, 1, torch.zeros(3))[0] for v in views]
    tokens = torch.stack(moved).flatten(1).unsqueeze(-1)
    mean = mean_over_views(tokens, views, grid)
    torch.testing.assert_close(mean[:, 0], torch.arange(35.0))


def test_the_mean_counts_valid_places_only():
    views = [View((0, 0), False), View((0, 1), False)]
    tokens = torch.tensor([[[2.0], [4.0]], [[6.0], [100.0]]])
    mean = mean_over_views(tokens, views, (1, 2))
    assert mean.flatten().tolist() == [2.0, 5.0]


@pytest.mark.parametrize("family", TAKING)
def test_a_step_trains_what_the_paper_unlocks(family):
    objective = make(family, teacher_views=2, teacher_offsets=5)
    out = objective(torch.randn(2, 3, 24, 16))
    assert set(out) == {"loss", "loss_cosine", "loss_mse"}
    out["loss"].backward()
    model, family = objective.model, objective.model.family
    last = f"{family.layers}.1."
    for name, parameter in objective.named_parameters():
        name = name.removeprefix("model.").removeprefix("tower.base.")
        unlocked = name in ("register_tokens", family.positions)
        unlocked = unlocked or name.startswith(last)
        unlocked = unlocked or any(
            parameter is p for p in model.get_input_embeddings().parameters()
        )
        assert (parameter.grad is not None) == unlocked, name
    assert model.register_tokens.grad.abs().sum() > 0
    total = out["loss_cosine"] + out["loss_mse"]
    assert out["loss"].item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_other_towers_are_refused_with_the_reason(family):
    with pytest.raises(ValueError, match=f"{family} tower takes no register tokens"):
        make(family)
    with pytest.raises(ValueError, match="takes no register tokens"):
        unlocked_names(make_tiny_tower(family))


def test_the_loss_by_hand():
    objective = make(teacher_views=1, mse_weight=0.5)
    pixels = torch.randn(2, 3, 24, 24)
    out = objective(pixels)
    tower = make_tiny_tower("dinov2")
    with torch.no_grad():
        target = tower(pixels).last_hidden_state[:, 1:]
        student = objective.model.encode(pixels, 0).image
    dot = (target * student).sum(-1) / target.norm(dim=-1) / student.norm(dim=-1)
    assert out["loss_cosine"].item() == pytest.approx(1 - dot.mean().item(), abs=1e-5)
    error = ((target - student) ** 2).mean().item()
    assert out["loss_mse"].item() == pytest.approx(error, rel=1e-4)
    total = out["loss_cosine"] + 0.5 * out["loss_mse"]
    assert out["loss"].item() == pytest.approx(total.item(), rel=1e-5)


def test_the_teacher_is_the_old_tower_over_its_views(monkeypatch):
    objective = make(teacher_views=3, teacher_shift=0.3)
    torch.manual_seed(3)
    pixels = torch.randn(2, 3, 24, 24)
    seen = []
    draw = draw_views

    def watched(*args, **options):
        seen.append(draw(*args, **options))
        return seen[-1]

    monkeypatch.setattr("unirefiner_hf.methods.ph_reg.objective.draw_views", watched)
    found = objective.denoised(pixels)
    assert len(seen) == 2 and seen[0] != seen[1]
    tower = make_tiny_tower("dinov2")
    for image, views, tokens in zip(pixels, seen, found, strict=True):
        white = torch.tensor([2.0, 3.0, 4.0])
        moved = torch.stack([make_view(image, v, 4, white) for v in views])
        with torch.no_grad():
            each = tower(moved).last_hidden_state[:, 1:]
        expected = mean_over_views(each, views, (6, 6))
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)
    assert not found.requires_grad
    assert objective.model.tower._is_off is False
    assert objective.model._is_bare is False


def test_without_registers_it_is_the_control():
    objective = make(register_tokens=0)
    assert objective.model.register_tokens is None
    objective(torch.randn(1, 3, 24, 24))["loss"].backward()


def test_the_place_of_register_tokens_does_not_matter():
    """Behind the patches or before the CLS token: the same image tokens."""
    objective = make()
    model, pixels = objective.model.eval(), torch.randn(1, 3, 24, 24)
    tower = model.tower.base
    with torch.no_grad():
        expected = model.encode(pixels, 0).image
        with model.without_register_tokens():
            embedded = tower.embeddings(pixels)
        sequence = torch.cat([model.register_tokens.unsqueeze(0), embedded], dim=1)
        output = tower.encoder(sequence)
        output = output if torch.is_tensor(output) else output[0]
        found = tower.layernorm(output)[:, 17:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_checkpointing_gives_the_same_gradients():
    pixels = torch.randn(2, 3, 24, 24)
    gradients = []
    for checkpointing in (False, True):
        objective = make(teacher_views=2)
        if checkpointing:
            objective.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        torch.manual_seed(5)
        objective(pixels)["loss"].backward()
        tokens = objective.model.register_tokens.grad
        gradients.append((tokens, *[p.grad for p in objective.parameters()][:1]))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], atol=1e-6, rtol=1e-4)


def test_a_tower_with_an_adapter_is_refused():
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    with pytest.raises(UniRefinerError, match="UnlockedTower"):
        PHReg(model, PHRegSettings())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("register_tokens", -1),
        ("teacher_views", 0),
        ("teacher_shift", 0.5),
        ("teacher_offsets", 9),
        ("teacher_flip", 1.5),
        ("mse_weight", -1.0),
    ],
)
def test_settings_out_of_range_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        PHRegSettings(**{field: value})
