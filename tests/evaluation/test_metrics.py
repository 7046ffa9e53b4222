"""Scores against an independent reading of the arithmetic, on random predictions."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from unirefiner_hf.evaluation.metrics import (
    class_areas,
    depth_errors,
    depth_scores,
    mean_iou_statistic,
    mean_statistic,
    paired_bootstrap,
    scores_of,
)
from unirefiner_hf.modeling.errors import UniRefinerError

CLASSES = 6


def random_pairs(count=5, seed=0):
    """Predictions and labels; class 5 never occurs, 4 is predicted only."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        label = random.integers(0, 4, (13, 17))
        prediction = np.where(
            random.random(label.shape) < 0.6, label, random.integers(0, 5, label.shape)
        )
        label[random.random(label.shape) < 0.1] = 255
        yield prediction, label


def areas_of(pairs):
    """``(images, classes, 3)``."""
    areas = [
        class_areas(torch.from_numpy(p), torch.from_numpy(x), CLASSES).numpy()
        for p, x in pairs
    ]
    return np.stack(areas)


def mean_iou_by_histograms(pairs):
    """The arithmetic of evaluate's mean_iou: histograms of each image, summed."""
    total = np.zeros((3, CLASSES))
    for prediction, label in pairs:
        kept = label != 255
        prediction, label = prediction[kept], label[kept]
        for row, values in enumerate(
            (prediction[prediction == label], prediction, label)
        ):
            total[row] += np.histogram(values, bins=CLASSES, range=(0, CLASSES - 1))[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = total[0] / (total[1] + total[2] - total[0])
        accuracy = total[0] / total[2]
    return iou, accuracy, total[0].sum() / total[2].sum()


def test_scores_are_those_of_mean_iou():
    scores = scores_of(areas_of(random_pairs()).sum(axis=0))
    iou, accuracy, overall = mean_iou_by_histograms(list(random_pairs()))
    np.testing.assert_allclose(scores.iou, iou)
    np.testing.assert_allclose(scores.accuracy, accuracy)
    assert np.isnan(scores.iou[5]) and scores.iou[4] == 0
    assert np.isnan(scores.accuracy[4])
    assert scores.mean_iou == pytest.approx(np.nanmean(iou))
    assert scores.mean_accuracy == pytest.approx(np.nanmean(accuracy))
    assert scores.overall_accuracy == pytest.approx(overall)


def test_areas_are_sklearns():
    areas = areas_of(random_pairs()).sum(axis=0)
    pairs = list(random_pairs())
    label = np.concatenate([x.ravel() for _, x in pairs])
    prediction = np.concatenate([p.ravel() for p, _ in pairs])
    kept = label != 255
    matrix = confusion_matrix(label[kept], prediction[kept], labels=range(CLASSES))
    expected = np.stack((matrix.diagonal(), matrix.sum(0), matrix.sum(1)), axis=1)
    np.testing.assert_array_equal(areas, expected)


def test_areas_of_images_sum_to_the_scores():
    areas = areas_of(random_pairs())
    statistic = mean_iou_statistic(areas[None])
    ones = np.ones((1, len(areas)))
    assert statistic(ones)[0] == pytest.approx(scores_of(areas.sum(axis=0)).mean_iou)


def test_values_out_of_range_are_named():
    zeros = torch.zeros(2, 2, dtype=torch.long)
    for prediction, label, message in (
        (zeros, zeros + 7, "A label is 7; there are 3 classes, 0 to 2, and 255"),
        (zeros + 3, zeros, "A prediction is 3"),
        (zeros - 1, zeros, "A prediction is -1"),
        (zeros, zeros[:, :1], r"\(2, 2\), the label \(2, 1\)"),
        (zeros + 0.5, zeros, "The prediction is torch.float32"),
    ):
        with pytest.raises(UniRefinerError, match=message):
            class_areas(prediction, label, 3)
    ignored = class_areas(zeros - 100, zeros + 255, 3)
    assert not ignored.any()


def test_bootstrap_is_paired():
    """A constant gain over noisy images has a narrow interval, only if paired."""
    base = np.random.default_rng(0).normal(0.5, 0.2, (1, 200))
    low, high = paired_bootstrap(
        mean_statistic(base + 0.01), mean_statistic(base), images=200
    )
    assert low == pytest.approx(0.01) and high == pytest.approx(0.01)
    other = np.random.default_rng(1).normal(0.5, 0.2, (1, 200))
    low, high = paired_bootstrap(mean_statistic(other), mean_statistic(base), 200)
    gap = other.mean() - base.mean()
    spread = (other - base).std() / np.sqrt(200)
    assert low == pytest.approx(gap - 1.96 * spread, abs=0.3 * spread)
    assert high == pytest.approx(gap + 1.96 * spread, abs=0.3 * spread)


def test_depth_errors():
    depth = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    guess = torch.tensor([[1.1, 3.0], [4.0, 9.0]])
    errors = depth_errors(guess, depth)
    assert errors.pixels == 3
    assert errors.rmse == pytest.approx(((0.01 + 1.0) / 3) ** 0.5, rel=1e-5)
    assert errors.absrel == pytest.approx((0.1 + 0.5) / 3, rel=1e-5)
    assert errors.delta1 == pytest.approx(2 / 3)
    with pytest.raises(UniRefinerError, match=r"No pixel has a depth in \(0.001, 10"):
        depth_errors(guess, torch.full((2, 2), 11.0))
    with pytest.raises(UniRefinerError, match=r"\(2, 2\), the depth \(1, 2\)"):
        depth_errors(guess, depth[:1])
    with pytest.raises(UniRefinerError, match="1 of 3 predicted depths are nan"):
        depth_errors(torch.tensor([[1.1, torch.nan], [4.0, torch.nan]]), depth)


def test_depth_scores():
    """Means of images, and of an image with three times the pixels only where pooled."""
    small = depth_errors(torch.tensor([[3.0]]), torch.tensor([[1.0]]))
    large = depth_errors(torch.full((1, 3), 2.0), torch.full((1, 3), 2.0))
    scores = depth_scores([small, large])
    assert scores == {"rmse": 1.0, "absrel": 1.0, "delta1": 0.5, "rmse_pooled": 1.0}
    assert depth_scores([small, large, large])["rmse_pooled"] == (4 / 7) ** 0.5
