"""Filters on tokens whose answer is known by construction."""

import pytest
import torch

from unirefiner_hf.spurious.attention_flow import attention_inflow, read_by_others
from unirefiner_hf.spurious.composites import SIDES, add_strip, split_strip, strip_width
from unirefiner_hf.spurious.detectors import draw_detectors, undetected
from unirefiner_hf.spurious.settings import FilterSettings
from unirefiner_hf.spurious.similarity import (
    dissimilar,
    draw_most_similar,
    highest_cosine,
    nearest_tokens,
    unit_tokens,
)


def test_planted_fixed_patterns_are_found():
    torch.manual_seed(0)
    comparison = unit_tokens(torch.randn(1, 40, 64))
    tokens = unit_tokens(torch.randn(2, 50, 64))
    tokens[0, 7] = comparison[0, 3]
    tokens[1, 20] = comparison[0, 11]
    clean = dissimilar(highest_cosine(tokens, comparison), sigma=3.0)
    assert (~clean).nonzero().tolist() == [[0, 7], [1, 20]]


def test_fixed_cosine_replaces_the_statistics():
    scores = torch.tensor([[0.1, 0.5, 0.9]])
    assert dissimilar(scores, cosine=0.5).tolist() == [[True, False, False]]


def test_lazy_channels_are_left_out_of_cosines():
    tokens = torch.tensor([[[100.0, 1.0, 0.0], [100.0, 0.0, 1.0]]])
    mask = torch.tensor([0.0, 1.0, 1.0])
    unit = unit_tokens(tokens, mask)
    assert (unit[0, 0] @ unit[0, 1]).item() == 0
    assert torch.allclose(unit.norm(dim=-1), torch.ones(1, 2))


def test_candidates_come_from_the_most_similar_share():
    torch.manual_seed(0)
    tokens = torch.arange(10.0).view(1, 10, 1)
    scores = torch.arange(10.0).view(1, 10)
    drawn = draw_most_similar(tokens, scores, share=0.4, count=200)
    assert set(drawn.flatten().tolist()) == {6.0, 7.0, 8.0, 9.0}


def test_nearest_tokens_come_from_the_samples_own_bank():
    bank = unit_tokens(torch.randn(2, 5, 8))
    assert torch.equal(nearest_tokens(bank[:, [3, 0]], bank), bank[:, [3, 0]])


def test_detectors_are_distinct_registers_of_the_sample():
    registers = torch.arange(24.0).view(2, 12, 1)
    drawn = draw_detectors(registers, 1 / 3)
    assert drawn.shape == (2, 4, 1)
    assert all(len(set(row.flatten().tolist())) == 4 for row in drawn)
    assert drawn[0].max() < 12 <= drawn[1].min()


def test_detected_tokens_are_rejected():
    tokens = unit_tokens(torch.eye(4)[None])
    detectors = unit_tokens(torch.tensor([[[1.0, 0.1, 0.0, 0.0]]]))
    assert undetected(tokens, detectors).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("form", ["release", "paper"])
def test_a_token_nobody_reads_is_hijacked(form):
    queries = torch.zeros(1, 6, 8)
    queries[..., 0] = 1
    keys = torch.zeros(1, 6, 8)
    keys[..., 0] = 1
    keys[0, 2, 0] = -9
    rejected = torch.zeros(1, 6, dtype=torch.bool)
    inflow = attention_inflow([(queries, keys)] * 2, rejected, form, num_heads=2)
    assert torch.allclose(inflow.sum(), torch.tensor(6.0))
    clean = read_by_others(inflow, rejected, sigma=0.5)
    assert clean.tolist() == [[True, True, False, True, True, True]]


def test_the_papers_flow_attends_per_head():
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 1, 5, 8)
    rejected = torch.zeros(1, 5, dtype=torch.bool)
    inflow = attention_inflow([(queries, keys)], rejected, "paper", num_heads=2)
    expected = torch.zeros(5)
    for head in (slice(0, 4), slice(4, 8)):
        scores = queries[0, :, head] @ keys[0, :, head].T / 2
        expected += scores.softmax(dim=-1).sum(dim=0) / 2
    assert torch.allclose(inflow[0], expected, atol=1e-6)


def test_flow_without_kept_tokens_rejects_nothing():
    inflow = torch.tensor([[0.5, 1.5]])
    assert read_by_others(inflow, torch.ones(1, 2, dtype=torch.bool)).all()


def test_flow_needs_a_layer_and_a_known_form():
    rejected = torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one layer"):
        attention_inflow([], rejected)
    with pytest.raises(ValueError, match="'other'"):
        attention_inflow([], rejected, "other")


@pytest.mark.parametrize("patches,width", [(6, 2), (16, 6), (32, 12), (37, 12), (4, 2)])
def test_strip_width_is_even(patches, width):
    assert strip_width(patches) == width


@pytest.mark.parametrize("side", SIDES)
def test_a_composite_divides_into_its_parts(side):
    """With one token a pixel, splitting undoes glueing, on a non-square grid."""
    crops = torch.randn(2, 3, 6, 8)
    reference = torch.randn(1, 3, 6, 8)
    composite = add_strip(crops, reference, side, patch_size=1)
    tokens = composite.flatten(2).transpose(1, 2)
    crop, strip = split_strip(tokens, (6, 8), side)
    assert torch.equal(crop, crops.flatten(2).transpose(1, 2))
    width = strip_width(8 if side in ("left", "right") else 6)
    expected = {
        "left": reference[..., :width],
        "right": reference[..., -width:],
        "top": reference[..., :width, :],
        "bottom": reference[..., -width:, :],
    }[side]
    expected = expected.flatten(2).transpose(1, 2).expand(2, -1, -1)
    assert torch.equal(strip, expected)


def test_composites_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\(8, 8\).*\(6, 8\)"):
        add_strip(torch.zeros(1, 3, 6, 8), torch.zeros(1, 3, 8, 8), "left", 1)
    with pytest.raises(ValueError, match="'front'"):
        add_strip(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), "front", 1)


@pytest.mark.parametrize(
    "wrong", [{"ah_layers": [3, 1]}, {"ah_form": "x"}, {"strip_ratio": 0.0}]
)
def test_settings_name_the_wrong_field(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        FilterSettings(**wrong)
