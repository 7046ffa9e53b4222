"""The search for channels that dominate every cosine."""

import pytest
import torch

from unirefiner_hf.spurious.lazy_channels import find_lazy_channels, unrelated_cosine


def bank(planted=()):
    torch.manual_seed(0)
    tokens = torch.randn(8, 32, 48)
    for channel in planted:
        tokens[..., channel] = 30 + 0.1 * torch.randn(8, 32)
    return tokens


def test_planted_channels_are_found():
    found = find_lazy_channels(bank(planted=(5, 40)))
    assert sorted(found.channels) == [5, 40]
    assert found.unrelated_cosine[0] > 0.9
    assert found.unrelated_cosine[-1] <= 0.2
    assert found.stopped_by == "threshold"
    assert found.mask(48).nonzero().flatten().tolist() == [
        channel for channel in range(48) if channel not in (5, 40)
    ]


def test_a_clean_tower_keeps_every_channel():
    assert find_lazy_channels(bank()).channels == []


def test_the_search_stops_at_its_limit():
    found = find_lazy_channels(bank(planted=range(8)), max_channels=3)
    assert len(found.channels) <= 3
    assert found.stopped_by in ("count", "gain")


def test_similarity_spread_over_all_channels_is_left_alone():
    """No single channel explains it: masking would only lose information."""
    tokens = bank() + 3
    found = find_lazy_channels(tokens)
    assert found.stopped_by == "gain"
    assert found.channels == []


def test_the_bank_is_not_changed():
    tokens = bank(planted=(5,))
    before = tokens.clone()
    find_lazy_channels(tokens)
    assert torch.equal(tokens, before)


def test_one_image_is_not_enough():
    with pytest.raises(ValueError, match="two images"):
        find_lazy_channels(torch.randn(1, 4, 8))


def test_unrelated_cosine_pairs_the_list_with_its_reverse():
    tokens = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]], [[1.0, 0.0]]])
    expected = (1.0 + 0.5**0.5) / 2
    assert unrelated_cosine(tokens).item() == pytest.approx(expected)
