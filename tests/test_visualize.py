"""Pictures: what is drawn is what the tokens say."""

import numpy as np
import pytest
import torch

from unirefiner_hf.visualize import (
    AH_COLOUR,
    FPGP_COLOUR,
    FigureRow,
    before_after_figure,
    fit_pca,
    pca_rgb,
)


def two_regions(rows=4, columns=6):
    """Tokens of two kinds: the left half and the right half, with a little noise."""
    torch.manual_seed(0)
    kinds = torch.randn(2, 16)
    index = (torch.arange(columns) >= columns // 2).long().repeat(rows)
    return kinds[index] + 0.05 * torch.randn(rows * columns, 16)


def row(**changes):
    tokens = two_regions()
    none = torch.zeros(24, dtype=torch.bool)
    values = dict(
        image=np.full((40, 60, 3), 200, dtype=np.uint8),
        before=tokens,
        after=two_regions(6, 8),
        grid=(4, 6),
        register_width=1,
        fpgp_before=none,
        ah_before=none,
        fpgp_after=none,
        ah_after=none,
    )
    return FigureRow(**{**values, **changes})


def test_regions_get_their_own_colours():
    colours = pca_rgb(two_regions()[None], (4, 6))[0].astype(int)
    assert colours.shape == (4, 6, 3)
    left, right = colours[:, :3, 0], colours[:, 3:, 0]
    assert abs(left.mean() - right.mean()) > 200
    assert left.std() < 20 and right.std() < 20


def test_a_shared_basis_gives_shared_colours():
    tokens = two_regions()
    basis = fit_pca(tokens)
    part = pca_rgb(tokens[:12][None], (2, 6), basis)
    assert np.array_equal(part[0], pca_rgb(tokens[None], (4, 6), basis)[0, :2])


def test_the_sign_of_a_component_is_fixed():
    basis = fit_pca(two_regions())
    largest = basis.components.abs().argmax(dim=0)
    assert (basis.components[largest, range(3)] > 0).all()


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match="5x5"):
        pca_rgb(torch.zeros(1, 24, 16), (5, 5))
    with pytest.raises(ValueError, match="at least 4 tokens"):
        fit_pca(torch.zeros(2, 16))
    with pytest.raises(ValueError, match="at least one image"):
        before_after_figure([])


def test_spurious_tokens_are_drawn_where_they_are():
    fpgp, ah = torch.zeros(2, 24, dtype=torch.bool)
    fpgp[-1], ah[6] = True, True
    before = np.asarray(before_after_figure([row()], cell=120))
    marked = np.asarray(
        before_after_figure([row(fpgp_after=fpgp, ah_after=ah)], cell=120)
    )
    changed = (before != marked).any(axis=-1)
    ys, xs = np.nonzero(changed)
    column = 4 * (120 + 12) + 12
    assert xs.min() >= column and xs.max() < column + 120
    red = marked[ys.max() - 5, xs.max() - 5].astype(int)
    assert np.abs(red - FPGP_COLOUR).max() < 70 and red[0] > red[2]
    blue = marked[ys.min() : ys.max(), column + 5].astype(int)
    assert (np.abs(blue - AH_COLOUR).max(axis=1) < 70).any()


def test_a_white_line_divides_the_frame_from_the_image():
    """The refined map is 6x8 cells of 15 pixels; the line runs round the inner 4x6."""
    canvas = np.asarray(before_after_figure([row()], cell=120))
    x, height = 2 * (120 + 12) + 12, 90
    y = 12 + 26 + (height - 90) // 2
    refined = canvas[y : y + height, x : x + 120]
    white = (refined == 255).all(axis=-1)
    assert white[15, 15:105].all() and white[75, 15:105].all()
    assert white[15:75, 15].all() and white[15:75, 105].all()
    assert not white[5].all() and not white[:, 5].all()


def test_the_frame_takes_no_part_in_the_colours_inside():
    def inside(frame_value):
        tokens = torch.full((6, 8, 16), frame_value)
        tokens[1:-1, 1:-1] = two_regions().view(4, 6, 16)
        canvas = before_after_figure([row(after=tokens.flatten(0, 1))], cell=120)
        return np.asarray(canvas)[58:108, 296:370]

    assert np.array_equal(inside(0.0), inside(50.0))
