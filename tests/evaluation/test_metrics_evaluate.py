"""The metrics as modules of `evaluate`: as its users reach them, equal to our arithmetic."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tests.conftest import make_tiny_tower
from unirefiner_hf import load_metric, metric_path
from unirefiner_hf.data.labelled import class_labels, open_pairs
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.evaluation.cleanliness import knn_retrieval
from unirefiner_hf.evaluation.metric_modules import METRICS
from unirefiner_hf.evaluation.metrics import (
    class_areas,
    depth_errors,
    depth_scores,
    scores_of,
)
from unirefiner_hf.modeling.errors import UniRefinerError

ROOT = Path(__file__).parents[2]
SIZES = ((13, 17), (9, 21), (16, 16))
OPTIONS = {"mean_iou": {"num_classes": 6}, "dense_knn": {"num_classes": 4}}
REFUSED_NETWORK = (
    "import socket\n"
    "def refuse(*_):\n    raise AssertionError('a connection was tried')\n"
    "socket.socket.connect = socket.getaddrinfo = refuse\n"
)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """What `evaluate` writes goes into the test's folder."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    return tmp_path / "metrics"


def label_maps(seed=0):
    """Predictions and labels; class 5 never occurs, 4 is predicted only."""
    random = np.random.default_rng(seed)
    for size in SIZES:
        label = random.integers(0, 4, size)
        found = random.random(size) < 0.6
        prediction = np.where(found, label, random.integers(0, 5, size))
        label[random.random(size) < 0.1] = 255
        yield prediction, label


def depth_maps(seed=0):
    random = np.random.default_rng(seed)
    for size in SIZES:
        depth = random.uniform(0, 12, size)
        yield depth * random.uniform(0.5, 2, size), depth


def token_maps(seed=0):
    """Tokens of 8 channels that tell their label of 4, and the label; some are ignored."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(4, 8))
    for count in (30, 41, 36):
        label = random.integers(0, 4, count)
        tokens = centres[label] + random.normal(size=(count, 8))
        label[random.random(count) < 0.1] = 255
        yield tokens.astype(np.float32), label


EXAMPLES = {
    "mean_iou": label_maps,
    "depth_errors": depth_maps,
    "dense_knn": token_maps,
}


def whole(name, **options):
    """Scores of all examples in one call, in memory."""
    predictions, references = zip(*EXAMPLES[name](), strict=True)
    metric = load_metric(name, keep_in_memory=True, **OPTIONS.get(name, {}), **options)
    return metric.compute(predictions=predictions, references=references)


# Equal to the arithmetic of the probes


def test_mean_iou_by_hand():
    """Two images of different sizes; the areas are summed before they are divided."""
    predictions = [[[0, 1], [1, 1]], [[2, 0, 1]]]
    references = [[[0, 1], [0, 255]], [[2, 2, 1]]]
    metric = load_metric("mean_iou", num_classes=4, per_category=True)
    scores = metric.compute(predictions=predictions, references=references)
    # Class 0: 1 of 3, class 1: 2 of 3, class 2: 1 of 2, class 3 does not occur.
    assert scores["per_category_iou"][:3] == [1 / 3, 2 / 3, 1 / 2]
    assert scores["per_category_accuracy"][:3] == [1 / 2, 1, 1 / 2]
    assert np.isnan(scores["per_category_iou"][3])
    assert scores["mean_iou"] == pytest.approx(1 / 2, abs=1e-15)
    assert scores["mean_accuracy"] == pytest.approx(2 / 3, abs=1e-15)
    assert scores["overall_accuracy"] == 4 / 6


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_mean_iou_is_ours(in_memory, one_by_one):
    areas = [
        class_areas(torch.from_numpy(p), torch.from_numpy(x), 6).numpy()
        for p, x in label_maps()
    ]
    expected = scores_of(np.sum(areas, axis=0))
    metric = load_metric(
        "mean_iou", num_classes=6, per_category=True, keep_in_memory=in_memory
    )
    for _ in range(2):
        if one_by_one:
            for prediction, label in label_maps():
                metric.add(prediction=torch.from_numpy(prediction), reference=label)
        else:
            predictions, references = zip(*label_maps(), strict=True)
            metric.add_batch(predictions=predictions, references=references)
        scores = metric.compute()
        assert scores["mean_iou"] == expected.mean_iou
        assert scores["mean_accuracy"] == expected.mean_accuracy
        assert scores["overall_accuracy"] == expected.overall_accuracy
        np.testing.assert_array_equal(scores["per_category_iou"], expected.iou)
        np.testing.assert_array_equal(
            scores["per_category_accuracy"], expected.accuracy
        )
        assert np.isnan(expected.iou[5]) and expected.iou[4] == 0


def test_another_label_can_be_ignored():
    prediction, label = np.array([[0, 1, 1]]), np.array([[0, 0, 1]])
    for ignore, expected in ((255, 1 / 2), (0, 1.0), (-100, 1 / 2)):
        metric = load_metric("mean_iou", num_classes=2, ignore=ignore)
        scores = metric.compute(predictions=[prediction], references=[label])
        assert scores["mean_iou"] == expected


def test_depth_errors_are_ours():
    errors = [
        depth_errors(torch.from_numpy(p), torch.from_numpy(x)) for p, x in depth_maps()
    ]
    scores = whole("depth_errors")
    assert scores == depth_scores(errors)
    assert scores["rmse"] == np.mean([image.rmse for image in errors])
    pooled = sum(image.squared for image in errors) / sum(e.pixels for e in errors)
    assert scores["rmse_pooled"] == pooled**0.5 != scores["rmse"]
    near = whole("depth_errors", high=5.0)
    assert near["rmse"] < scores["rmse"]


def knn_by_sklearn(images, classes, neighbours):
    """Scores of a published k-NN, one image left out at a time."""
    found, truth = [], []
    for number, (tokens, labels) in enumerate(images):
        rest = [image for other, image in enumerate(images) if other != number]
        bank = np.concatenate([image for image, _ in rest])
        known = np.concatenate([image for _, image in rest])
        model = KNeighborsClassifier(
            neighbours,
            metric="cosine",
            weights=lambda gaps: np.exp((gaps[:, :1] - gaps) / 0.02),
        ).fit(bank[known != 255], known[known != 255])
        found.append(model.predict(tokens)[labels != 255])
        truth.append(labels[labels != 255])
    matrix = confusion_matrix(
        np.concatenate(truth), np.concatenate(found), labels=range(classes)
    )
    hit, predicted, labelled = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
    return {
        "knn_accuracy": np.mean(hit / labelled),
        "knn_iou": np.mean(hit / (predicted + labelled - hit)),
    }


@pytest.mark.parametrize("neighbours", [1, 7, 500])
def test_dense_knn_is_sklearns(neighbours):
    images = list(token_maps())
    fewest = (
        sum(len(x) for _, x in images) - 41 - sum((x == 255).sum() for _, x in images)
    )
    expected = knn_by_sklearn(images, 4, min(neighbours, int(fewest)))
    scores = whole("dense_knn", neighbours=neighbours)
    assert scores == pytest.approx(expected, abs=1e-12 if neighbours < 500 else 0.02)
    assert 0.4 < scores["knn_iou"] < 0.95


def test_knn_retrieval_goes_through_the_module(tower_folder, scenes):
    tiny = load_checkpoint(str(tower_folder))
    pairs, classes = open_pairs(str(scenes), "train"), class_labels(str(scenes))
    images = []
    for number in range(len(pairs)):
        image, label = pairs.pair(number)
        pixels = torch.from_numpy(np.array(image.resize((24, 24), 2), np.float32) / 255)
        mean, std = (torch.tensor(v) for v in (tiny.reading.mean, tiny.reading.std))
        found = tiny.feature_map(((pixels - mean) / std).permute(2, 0, 1)[None])[0]
        side = found.shape[1]
        rows, columns = (
            ((np.arange(side) + 0.5) * length / side).astype(int)
            for length in label.shape
        )
        picked = label[rows][:, columns].flatten().astype(int)
        images.append((found.flatten(1).T.numpy(), picked))
    expected = knn_by_sklearn(images, 3, 5)
    found = knn_retrieval(tiny, pairs, classes, 24, neighbours=5)
    assert found == pytest.approx(expected, abs=0.02)
    metric = load_metric("dense_knn", num_classes=3, neighbours=5)
    predictions, references = zip(*images, strict=True)
    same = metric.compute(predictions=predictions, references=references)
    assert found == pytest.approx(same, abs=0.02)


# As users of evaluate reach them


@pytest.mark.parametrize("name", METRICS)
def test_a_module_says_what_it_is(name):
    metric = load_metric(name, **OPTIONS.get(name, {}))
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == name and metric.module_type == "metric"
    assert "@" in metric.citation and len(metric.description) > 100
    for part in ("predictions:", "references:", "Returns:", "Raises:"):
        assert part in metric.inputs_description
    assert all(f"{score}" in metric.inputs_description for score in whole(name))
    assert set(metric.features) == {"predictions", "references"}
    assert metric.inputs_description in metric.compute.__doc__


def test_offline_from_the_scripts(tmp_path):
    """`evaluate.load` of each path in a fresh process that may not connect anywhere."""
    code = f"""{REFUSED_NETWORK}
import json, evaluate
from tests.evaluation.test_metrics_evaluate import EXAMPLES, OPTIONS
from unirefiner_hf import metric_path
scores = {{}}
for name, images in EXAMPLES.items():
    metric = evaluate.load(metric_path(name), **OPTIONS.get(name, {{}}))
    assert type(metric).__module__.startswith("evaluate_modules"), type(metric)
    predictions, references = zip(*images(), strict=True)
    scores[name] = metric.compute(predictions=predictions, references=references)
print(json.dumps(scores))
"""
    out = python(code, tmp_path)
    assert json.loads(out.splitlines()[-1]) == {name: whole(name) for name in METRICS}
    written = [p for p in (tmp_path / "home").rglob("*") if p.is_file()]
    assert not [p for p in written if p.suffix == ".arrow"]


def test_the_snippet_of_the_docs(tmp_path):
    text = (ROOT / "docs" / "evaluation.md").read_text()
    section = text.split("## The metrics in your own code")[1].split("\n## ")[0]
    snippets = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    out = python(REFUSED_NETWORK + "\n".join(snippets), tmp_path)
    assert out.count("'mean_iou': 0.5") == 1 and "'rmse': 0.5" in out


def python(code, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    for name in ("HF_METRICS_CACHE", "HF_MODULES_CACHE", "HF_EVALUATE_CACHE"):
        environment.pop(name, None)
    path = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_combined():
    both = {
        "all": load_metric("mean_iou", num_classes=6),
        "things": load_metric("mean_iou", num_classes=6, ignore=0),
    }
    apart = {name: load_metric("mean_iou", num_classes=6) for name in both}
    apart["things"] = load_metric("mean_iou", num_classes=6, ignore=0)
    images = [(np.where(x == 255, 0, x), x) for _, x in label_maps()]
    images = [(p, np.where(x == 255, 1, x)) for p, x in images]
    predictions, references = zip(*images, strict=True)
    expected = {
        f"{name}_{key}": value
        for name, metric in apart.items()
        for key, value in metric.compute(
            predictions=predictions, references=references
        ).items()
    }
    combined = evaluate.combine(both)
    assert combined.compute(predictions=predictions, references=references) == expected
    combined.add_batch(predictions=predictions[:2], references=references[:2])
    combined.add(predictions[2], references[2])
    assert combined.compute() == expected
    assert expected["all_mean_iou"] != expected["things_mean_iou"]


def test_combined_by_path(caches, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(caches / "modules"))
    combined = evaluate.combine(
        [metric_path("depth_errors"), load_metric("depth_errors")]
    )
    predictions, references = zip(*depth_maps(), strict=True)
    scores = combined.compute(predictions=predictions, references=references)
    for number in (0, 1):
        for name, value in whole("depth_errors").items():
            assert scores[f"depth_errors_{number}_{name}"] == value


class Segmenter(nn.Module):
    """A 1x1 convolution on a tiny backbone; class scores at the size of the patches."""

    def __init__(self):
        super().__init__()
        self.backbone = make_tiny_tower("dinov2")
        self.classify = nn.Conv2d(32, 3, 1)

    def forward(self, pixel_values, labels=None):
        tokens = self.backbone(pixel_values).last_hidden_state[:, 1:]
        scores = self.classify(tokens.transpose(1, 2).unflatten(2, (4, 4)))
        large = functional.interpolate(scores, labels.shape[1:])
        loss = functional.cross_entropy(large, labels, ignore_index=255)
        return {"loss": loss, "logits": scores}


class Scenes(Dataset):
    """5 images of noise with labels of 3 classes and some that are ignored."""

    def __len__(self):
        return 5

    def __getitem__(self, number):
        random = torch.Generator().manual_seed(number)
        labels = torch.randint(0, 4, (16, 16), generator=random)
        pixels = torch.randn(3, 16, 16, generator=random)
        return {"pixel_values": pixels, "labels": labels.where(labels < 3, 255)}


def predicted(scores, labels):
    """What the Trainer keeps of a batch: classes at the size of the labels."""
    return functional.interpolate(scores, labels.shape[1:]).argmax(dim=1)


@pytest.mark.parametrize("in_batches", [False, True])
def test_in_a_trainer(tmp_path, in_batches):
    torch.manual_seed(0)
    metric = load_metric("mean_iou", num_classes=3)

    def at_once(output):
        return metric.compute(
            predictions=output.predictions, references=output.label_ids
        )

    def batch_by_batch(output, compute_result):
        metric.add_batch(predictions=output.predictions, references=output.label_ids)
        return metric.compute() if compute_result else {}

    model = Segmenter()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path / "run"),
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            batch_eval_metrics=in_batches,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Scenes(),
        eval_dataset=Scenes(),
        compute_metrics=batch_by_batch if in_batches else at_once,
        preprocess_logits_for_metrics=predicted,
    )
    trainer.train()
    logged = [x for x in trainer.state.log_history if "eval_mean_iou" in x]
    assert len(logged) == 2
    areas = torch.zeros(3, 3, dtype=torch.long)
    with torch.no_grad():
        for scene in (Scenes()[number] for number in range(5)):
            batch = {name: value[None] for name, value in scene.items()}
            scores = model.eval()(**batch)["logits"]
            areas += class_areas(predicted(scores, batch["labels"]), batch["labels"], 3)
    expected = scores_of(areas.numpy())
    assert logged[-1]["eval_mean_iou"] == pytest.approx(expected.mean_iou, abs=1e-3)
    again = trainer.evaluate()
    assert again["eval_overall_accuracy"] == logged[-1]["eval_overall_accuracy"]


# Over several processes, and what is stored


def share(rank, folder):
    """Of three images the second process takes one, or none."""
    found = {}
    for experiment, mine in (("shared", ([0, 2], [1])), ("idle", ([0, 1, 2], []))):
        for name, images in EXAMPLES.items():
            metric = load_metric(
                name,
                num_process=2,
                process_id=rank,
                experiment_id=experiment,
                cache_dir=folder,
                timeout=60,
                **OPTIONS.get(name, {}),
            )
            pairs = [list(images())[number] for number in mine[rank]]
            metric.add_batch(
                predictions=[prediction for prediction, _ in pairs],
                references=[reference for _, reference in pairs],
            )
            found[f"{experiment} {name}"] = metric.compute()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def test_two_processes_score_as_one(tmp_path):
    multiprocessing.spawn(share, args=(str(tmp_path),), nprocs=2)
    first, second = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    expected = {name: whole(name) for name in METRICS}
    for experiment in ("shared", "idle"):
        for name in METRICS:
            assert first[f"{experiment} {name}"] == expected[name]
    assert set(second.values()) == {None}
    assert not list(tmp_path.rglob("*.arrow"))


def test_pixels_are_not_stored(caches):
    metric = load_metric("mean_iou", num_classes=150)
    maps = np.random.default_rng(0).integers(0, 150, (4, 512, 512))
    metric.add_batch(predictions=maps, references=maps)
    metric.writer.finalize()
    (file,) = caches.rglob("*.arrow")
    assert 4 * 150 * 3 * 8 <= file.stat().st_size < 30_000


def test_tokens_are_stored_as_they_are(caches):
    metric = load_metric("dense_knn", num_classes=4)
    tokens, labels = np.ones((2, 1000, 64), np.float32), np.zeros((2, 1000), int)
    metric.add_batch(predictions=tokens, references=labels)
    metric.writer.finalize()
    (file,) = caches.rglob("*.arrow")
    assert tokens.nbytes <= file.stat().st_size < tokens.nbytes + 20_000


def test_in_memory_leaves_no_folder(caches):
    for name in METRICS:
        whole(name)
    assert not caches.exists()


# Bad input


def scored(name, predictions, references, **options):
    metric = load_metric(
        name, **{"keep_in_memory": True, **OPTIONS.get(name, {}), **options}
    )
    return metric.compute(predictions=predictions, references=references)


ZEROS = np.zeros((2, 3, 4), int)
METRES = np.ones((2, 3, 4))
TOKENS = np.ones((2, 3, 4))
LABELS = np.zeros((2, 3), int)
BAD_TOKENS = np.full((2, 3, 4), np.inf)


@pytest.mark.parametrize(
    ("name", "predictions", "references", "message"),
    [
        (
            "mean_iou",
            ZEROS,
            ZEROS[:, :2],
            r"prediction is \(3, 4\), the label \(2, 4\)",
        ),
        (
            "mean_iou",
            ZEROS[0],
            ZEROS[0],
            r"shape \(4,\); that of one image is \(height",
        ),
        ("mean_iou", ZEROS, ZEROS + 6, "A label is 6; there are 6 classes"),
        ("mean_iou", ZEROS - 1, ZEROS, "A prediction is -1"),
        (
            "mean_iou",
            ZEROS + 0.5,
            ZEROS,
            "prediction is torch.float64: classes are whole",
        ),
        ("mean_iou", ZEROS, ZEROS + 255, "Every label of the 2 images is 255"),
        ("mean_iou", ZEROS, None, "mean_iou needs references; they are missing"),
        ("mean_iou", None, ZEROS, "mean_iou needs predictions; they are missing"),
        ("mean_iou", None, None, "mean_iou has no image to score"),
        ("mean_iou", [], [], "mean_iou has no image to score"),
        ("mean_iou", ZEROS, ZEROS[:1], "2 predictions do not go with 1 references"),
        ("mean_iou", [None], [ZEROS[0]], r"The prediction is missing \(None\)"),
        ("mean_iou", [[[0, 1], [0]]], [ZEROS[0]], "prediction is no array of numbers"),
        ("mean_iou", [[["a"]]], [ZEROS[0]], "prediction is no array of numbers"),
        ("depth_errors", METRES, METRES[:, :2], r"is \(3, 4\), the depth \(2, 4\)"),
        (
            "depth_errors",
            METRES,
            METRES * 11,
            r"No pixel has a depth in \(0.001, 10.0\]",
        ),
        ("depth_errors", METRES * np.nan, METRES, "12 of 12 predicted depths are nan"),
        ("depth_errors", METRES, None, "depth_errors needs references"),
        ("dense_knn", TOKENS, LABELS[:, :2], "3 tokens do not go with 2 labels"),
        ("dense_knn", TOKENS[:1], LABELS[:1], "1 image is too few for dense_knn"),
        ("dense_knn", TOKENS, LABELS + 4, "A label is 4; there are 4 classes"),
        ("dense_knn", TOKENS, LABELS + 255, "all images but number 0"),
        ("dense_knn", BAD_TOKENS, LABELS, "Tokens hold values that are not finite"),
        ("dense_knn", TOKENS[:, :0], LABELS[:, :0], r"tokens of the shape \(0, 4\)"),
        (
            "dense_knn",
            [TOKENS[0], TOKENS[0, :, :2]],
            LABELS,
            "2 channels in one image and 4 in another",
        ),
    ],
)
def test_bad_input_is_refused(name, predictions, references, message):
    with pytest.raises(UniRefinerError, match=message):
        scored(name, predictions, references)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mean_iuo", {}, "no metric 'mean_iuo'; choose one of mean_iou"),
        ("mean_iou", {}, "num_classes is None; it must be 1 or more"),
        ("dense_knn", {"num_classes": 0}, "num_classes is 0"),
        ("dense_knn", {"num_classes": 3, "neighbours": 0}, "neighbours is 0"),
        ("dense_knn", {"num_classes": 3, "temperature": 0}, "temperature is 0"),
        ("depth_errors", {"low": 0}, "low is 0; it must be positive"),
        ("depth_errors", {"high": 1e-3}, "high is 0.001; it must be above low"),
        (
            "depth_errors",
            {"hihg": 3},
            "DepthErrors has no option 'hihg'.*high, keep_in",
        ),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(UniRefinerError, match=message):
        load_metric(name, **options)
    with pytest.raises(UniRefinerError, match="no metric"):
        metric_path("iou")


def test_a_refusal_leaves_nothing_behind(caches):
    """Neither of a batch with a bad image nor of images without a score."""
    metric = load_metric("mean_iou", num_classes=6)
    with pytest.raises(UniRefinerError, match="A label is 9"):
        metric.add_batch(predictions=ZEROS, references=[ZEROS[0], ZEROS[0] + 9])
    with pytest.raises(UniRefinerError, match="no image to score"):
        metric.compute()
    with pytest.raises(UniRefinerError, match="is ignored"):
        metric.compute(predictions=ZEROS, references=ZEROS + 255)
    assert not list(caches.rglob("*.arrow"))
    with pytest.raises(UniRefinerError, match="takes predictions and references, no x"):
        metric.add(prediction=ZEROS[0], reference=ZEROS[0], x=1)
    assert metric.compute(predictions=ZEROS, references=ZEROS)["mean_iou"] == 1
