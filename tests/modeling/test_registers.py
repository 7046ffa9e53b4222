"""The frame: put on, told apart, taken off."""

import pytest
import torch

from unirefiner_hf.modeling.registers import (
    FILLS,
    frame_pixels,
    register_mask,
    split_frame,
)


def frame(pixels, width=2, fill="zero", **options):
    return frame_pixels(pixels, width, 4, fill, **options)


def test_image_stays_in_the_middle_for_every_fill():
    pixels = torch.randn(2, 3, 8, 12)
    for fill in FILLS:
        framed = frame(pixels, fill=fill, patch=torch.randn(3, 4, 4))
        assert framed.shape == (2, 3, 24, 28)
        assert torch.equal(framed[..., 8:-8, 8:-8], pixels)


def test_zero_frame_is_zero():
    framed = frame(torch.ones(1, 3, 8, 8))
    assert framed.sum() == 3 * 64


def test_width_zero_is_the_image_itself():
    pixels = torch.randn(1, 3, 8, 8)
    assert frame(pixels, width=0, fill="randn") is pixels


def test_drawn_frame_is_shared_by_the_batch_and_seeded():
    def draw(batch):
        generator = torch.Generator().manual_seed(7)
        return frame(torch.zeros(batch, 3, 8, 8), fill="randn", generator=generator)

    assert torch.equal(draw(3)[0], draw(3)[2])
    assert torch.equal(draw(1)[0], draw(3)[1])


def test_drawn_frame_without_generator_differs_between_images():
    framed = frame(torch.zeros(2, 3, 8, 8), fill="randn")
    assert not torch.equal(framed[0], framed[1])


def test_fills_have_their_distributions():
    torch.manual_seed(0)
    normal = frame(torch.zeros(1, 3, 8, 8), width=8, fill="randn")
    uniform = frame(torch.zeros(1, 3, 8, 8), width=8, fill="rand")
    outside = normal != 0
    assert normal[outside].mean().abs() < 0.05
    assert abs(normal[outside].std() - 1) < 0.05
    assert 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform[outside].mean() - 0.5) < 0.02


def test_learnable_patch_is_tiled_and_gets_a_gradient():
    patch = torch.randn(3, 4, 4, requires_grad=True)
    framed = frame(torch.zeros(2, 3, 8, 8), width=1, fill="learnable", patch=patch)
    assert torch.equal(framed[1, :, :4, :4], patch)
    assert torch.equal(framed[0, :, 4:8, 12:], patch)
    framed.sum().backward()
    # 12 patches round a 2 x 2 grid, in each of two images.
    assert torch.equal(patch.grad, torch.full((3, 4, 4), 24.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fill", FILLS)
def test_frame_has_the_dtype_of_the_image(fill, dtype):
    pixels = torch.zeros(1, 3, 8, 8, dtype=dtype)
    for generator in (None, torch.Generator()):
        framed = frame(
            pixels, fill=fill, generator=generator, patch=torch.zeros(3, 4, 4)
        )
        assert framed.dtype == dtype


def test_errors_name_the_value():
    pixels = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="-1"):
        frame(pixels, width=-1)
    with pytest.raises(ValueError, match="noise"):
        frame(pixels, fill="noise")
    with pytest.raises(ValueError, match="learnable"):
        frame(pixels, fill="learnable")
    with pytest.raises(ValueError, match="-2"):
        register_mask((2, 2), -2)
    with pytest.raises(ValueError, match="9 tokens"):
        split_frame(torch.zeros(1, 9, 2), (2, 2), 1)


def test_mask_by_hand():
    expected = [
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 1],
        [1, 0, 0, 0, 1],
        [1, 1, 1, 1, 1],
    ]
    mask = register_mask((2, 3), 1)
    assert torch.equal(mask, torch.tensor(expected).bool().flatten())


@pytest.mark.parametrize("width", [0, 1, 3])
def test_split_agrees_with_the_mask_in_raster_order(width):
    grid = (2, 3)
    mask = register_mask(grid, width)
    tokens = torch.arange(2 * len(mask) * 2).view(2, len(mask), 2)
    image, registers = split_frame(tokens, grid, width)
    assert torch.equal(image, tokens[:, ~mask])
    assert torch.equal(registers, tokens[:, mask])
