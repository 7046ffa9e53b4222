"""Crop proposals and the tokens of crops."""

import pytest
import torch

from unirefiner_hf.methods.views import crop_maps, crop_tokens, propose_crops


def test_crops_lie_inside_with_the_drawn_area_and_aspect():
    torch.manual_seed(0)
    boxes = propose_crops(500, 3)
    x0, y0, x1, y1 = boxes.unbind(-1)
    assert boxes.shape == (500, 3, 4)
    assert (boxes >= 0).all() and (boxes <= 1 + 1e-6).all()
    widths, heights = x1 - x0, y1 - y0
    area, aspect = widths * heights, widths / heights
    assert area.min() >= 0.25 - 1e-5 and area.max() <= 0.5 + 1e-5
    assert aspect.min() >= 2 / 3 - 1e-4 and aspect.max() <= 1.5 + 1e-4
    assert area.mean() == pytest.approx(0.375, abs=0.01)
    assert aspect.log().mean() == pytest.approx(0.0, abs=0.03)


def test_crops_follow_the_global_random_state():
    torch.manual_seed(3)
    first = propose_crops(2, 3)
    assert not torch.equal(first, propose_crops(2, 3))
    torch.manual_seed(3)
    assert torch.equal(first, propose_crops(2, 3))


def test_the_whole_image_is_its_own_crop():
    maps = torch.randn(2, 3, 6, 10)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 1, 4)
    assert torch.allclose(crop_maps(maps, whole, (6, 10)), maps, atol=1e-5)


def test_crop_coordinates_are_x_then_y_on_a_non_square_grid():
    rows, columns = 6, 10
    position = torch.stack(
        torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1
    )
    tokens = position.reshape(1, rows * columns, 2).float()
    right_half = torch.tensor([[[0.5, 0.0, 1.0, 1.0]]])
    cropped = crop_tokens(tokens, (rows, columns), right_half).view(rows, columns, 2)
    assert cropped[..., 1].amin() >= columns / 2 - 0.5
    assert torch.allclose(cropped[:, 0, 0], torch.arange(float(rows)), atol=1e-5)


def test_crops_of_an_image_lie_side_by_side():
    maps = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    boxes = propose_crops(2, 3)
    means = crop_maps(maps, boxes, (4, 4)).mean(dim=(1, 2, 3))
    assert torch.allclose(means, torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_gradients_reach_the_tokens():
    tokens = torch.randn(1, 16, 4, requires_grad=True)
    crop_tokens(tokens, (4, 4), propose_crops(1, 2)).sum().backward()
    assert tokens.grad is not None and tokens.grad.abs().sum() > 0
