"""Scores against an independent reading of the arithmetic, on random predictions."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from unirefiner_hf.evaluation.metrics import (
    ConfusionMatrix,
    depth_errors,
    mean_iou_statistic,
    mean_statistic,
    paired_bootstrap,
    scores_of,
)

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


def count_all(pairs):
    confusion = ConfusionMatrix(CLASSES)
    areas = [
        confusion.update(torch.from_numpy(p), torch.from_numpy(x)).numpy()
        for p, x in pairs
    ]
    return confusion, np.stack(areas)


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
    confusion, _ = count_all(random_pairs())
    scores = confusion.scores()
    iou, accuracy, overall = mean_iou_by_histograms(list(random_pairs()))
    np.testing.assert_allclose(scores.iou, iou)
    np.testing.assert_allclose(scores.accuracy, accuracy)
    assert np.isnan(scores.iou[5]) and scores.iou[4] == 0
    assert np.isnan(scores.accuracy[4])
    assert scores.mean_iou == pytest.approx(np.nanmean(iou))
    assert scores.mean_accuracy == pytest.approx(np.nanmean(accuracy))
    assert scores.overall_accuracy == pytest.approx(overall)


def test_matrix_is_sklearns():
    confusion, _ = count_all(random_pairs())
    pairs = list(random_pairs())
    label = np.concatenate([x.ravel() for _, x in pairs])
    prediction = np.concatenate([p.ravel() for p, _ in pairs])
    kept = label != 255
    expected = confusion_matrix(label[kept], prediction[kept], labels=range(CLASSES))
    np.testing.assert_array_equal(confusion.matrix.numpy(), expected)


def test_areas_of_images_sum_to_the_scores():
    confusion, areas = count_all(random_pairs())
    assert scores_of(areas.sum(0)).mean_iou == confusion.scores().mean_iou
    statistic = mean_iou_statistic(areas[None])
    ones = np.ones((1, len(areas)))
    assert statistic(ones)[0] == pytest.approx(confusion.scores().mean_iou)


def test_values_out_of_range_are_named():
    confusion = ConfusionMatrix(3)
    with pytest.raises(ValueError, match="A label is 7; there are 3 classes"):
        confusion.update(torch.zeros(2, 2), torch.full((2, 2), 7))
    with pytest.raises(ValueError, match="A prediction is 3"):
        confusion.update(torch.full((2, 2), 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"\(2, 2\), the label \(2, 3\)"):
        confusion.update(torch.zeros(2, 2), torch.zeros(2, 3))


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
    with pytest.raises(ValueError, match="No pixel"):
        depth_errors(guess, torch.full((2, 2), 11.0))
