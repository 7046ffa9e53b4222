"""The diagnosis of whole images."""

import dataclasses

import pytest
import torch

from tests.conftest import FAMILIES, make_tiny_tower
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.spurious.diagnose import diagnose, middle_layers
from unirefiner_hf.spurious.settings import FilterSettings


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 16, 24, generator=generator)


REFERENCE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_diagnosed(family, images):
    model = UniRefinerModel.from_tower(make_tiny_tower(family), register_width=2)
    found = diagnose(model, images, REFERENCE)
    assert found.grid == (4, 6)
    for tokens in (found.fpgp, found.ah, found.similarity, found.inflow):
        assert tokens.shape == (2, 24)
    assert not (found.fpgp & found.ah).any()
    shares = found.shares()
    assert shares["spurious"] == pytest.approx(shares["fpgp"] + shares["ah"])
    assert not found.similarity.requires_grad


@pytest.fixture
def without_context():
    """A tower without attention and positions: a token is its patch."""
    tower = make_tiny_tower("siglip_vision_model", layers=1)
    for name, parameter in tower.named_parameters():
        if "out_proj" in name or "position" in name:
            parameter.data.zero_()
    return UniRefinerModel.from_tower(tower, register_width=0)


def noise(seed):
    return torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def test_a_token_copied_from_the_reference_is_found(without_context, images):
    reference = noise(1)
    images[0, :, 4:8, 8:12] = reference[0, :, 8:12, 0:4]
    settings = FilterSettings(fpgp_cosine=0.999)
    found = diagnose(without_context, images, reference, settings)
    assert found.fpgp.nonzero().tolist() == [[0, 8]]


def test_the_strip_of_the_composite_finds_by_itself(without_context, images):
    """The strip is the reference's right third: what lies left of it is not found."""
    reference = noise(1)
    images[0, :, 4:8, 8:12] = reference[0, :, 8:12, 20:24]
    images[1, :, 0:4, 0:4] = reference[0, :, 8:12, 0:4]
    base = diagnose(without_context, images, reference)
    strip_only = dataclasses.replace(
        base.yardstick,
        reference_limit=torch.full((2, 1), 2.0),
        strip_limit=torch.full((2, 1), 0.999),
    )
    found = diagnose(without_context, images, reference, yardstick=strip_only)
    assert found.fpgp.nonzero().tolist() == [[0, 8]]
    elsewhere = dataclasses.replace(strip_only, strip=strip_only.strip.roll(1, dims=-1))
    assert not diagnose(
        without_context, images, reference, yardstick=elsewhere
    ).fpgp.any()


def test_the_yardstick_of_another_model_is_used(images):
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    base = diagnose(model, images, REFERENCE, register_width=0)
    again = diagnose(
        model, images, REFERENCE, register_width=0, yardstick=base.yardstick
    )
    assert torch.equal(again.spurious, base.spurious)
    strict = diagnose(
        model, images, REFERENCE, FilterSettings(fpgp_sigma=-9.0), register_width=0
    )
    judged = diagnose(
        model, images, REFERENCE, register_width=0, yardstick=strict.yardstick
    )
    assert strict.fpgp.all() and judged.fpgp.all()


def test_lazy_channels_take_no_part(images):
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    mask = torch.ones(32)
    mask[:8] = 0
    plain = diagnose(model, images, REFERENCE)
    masked = diagnose(model, images, REFERENCE, channel_mask=mask)
    assert not torch.allclose(plain.similarity, masked.similarity)


def test_the_frame_changes_what_is_diagnosed(images):
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"), register_width=2)
    framed = diagnose(model, images, REFERENCE)
    bare = diagnose(model, images, REFERENCE, register_width=0)
    assert not torch.allclose(framed.similarity, bare.similarity)


@pytest.mark.parametrize("layers,expected", [(12, [5, 6]), (24, [10, 12]), (2, [1, 1])])
def test_middle_layers(layers, expected):
    assert middle_layers(layers) == expected
