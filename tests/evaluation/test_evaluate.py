"""`evaluate` as a user writes it, and what it refuses."""

import dataclasses
import json
import os

import datasets
import pytest
from PIL import Image

from tests.evaluation.conftest import save_refined
from unirefiner_hf import evaluate
from unirefiner_hf.data.labelled import LabelError, open_pairs
from unirefiner_hf.evaluation import checkpoints as loading
from unirefiner_hf.evaluation.arguments import EvaluationArguments
from unirefiner_hf.evaluation.depth import DepthSettings
from unirefiner_hf.evaluation.evaluate import ArgumentError
from unirefiner_hf.evaluation.segmentation import SegmentationSettings
from unirefiner_hf.export.run_folder import read_evaluation
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.outputs import OutputError

FAST = {"fast": True, "crop": 24, "fast_iterations": 5, "seeds": 1}


@pytest.fixture
def no_loading(monkeypatch):
    """Loading a model is a failure: what is checked before comes cheap."""

    def fail(*_, **__):
        raise AssertionError("a backbone was loaded")

    monkeypatch.setattr(loading, "load_tower", fail)


@pytest.fixture(scope="module")
def in_memory(scenes):
    """The scenes as a `datasets.DatasetDict`."""
    splits = {}
    for split in ("train", "val"):
        pairs = open_pairs(str(scenes), split)
        read = [pairs.pair(number) for number in range(len(pairs))]
        rows = {
            "image": [image for image, _ in read],
            "label": [Image.fromarray(label) for _, label in read],
        }
        features = datasets.Features({k: datasets.Image() for k in rows})
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    return datasets.DatasetDict(splits)


def test_a_base_and_its_refined_model(tower_folder, scenes, tmp_path):
    mine = save_refined(tmp_path / "mine", tower_folder, "unirefiner", 0.02)
    found = evaluate(
        [tower_folder, mine],
        scenes,
        dataset_name="<Tiny> | set",
        evaluation_output=str(tmp_path / "out"),
        pictures=1,
        **FAST,
    )
    base = tower_folder.name
    names = [base, f"{base} + border of 1", "refined"]
    assert [row.name for row in found.rows] == names
    assert not any(hasattr(row, "model") for row in found.rows)
    text = str(found)
    assert text == found.to_markdown() == (tmp_path / "out/table.md").read_text()[:-1]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert "Missing control: self-distillation baseline" in text
    assert found.to_dict() == json.loads((tmp_path / "out/evaluation.json").read_text())
    entries = found.to_dict()["checkpoints"]["refined"]
    assert entries == read_evaluation(mine / "evaluation.json")
    assert list(entries[0]["controls"]) == names[:2]
    page = found.save_html(tmp_path / "page.html").read_text()
    assert page == (tmp_path / "out/report.html").read_text()
    assert page.count("<img") == 5 + 4 and "<Tiny>" not in page
    assert "&lt;Tiny&gt; | set" in page and "http" not in page
    assert page.count("<tr>") == 4 + 4  # the table and the classes, with their heads


def test_a_set_in_memory_measures_as_its_folder(tower_folder, scenes, in_memory):
    model = UniRefinerModel.from_tower(str(tower_folder), register_width=0).train()
    fields = {**FAST, "num_classes": 3, "pictures": 0}
    ours = evaluate(model, in_memory, image_processor=str(tower_folder), **fields)
    theirs = evaluate(str(tower_folder), str(scenes), **fields)
    assert model.training and ours.sections == ()
    (mine,), (base,) = (found.rows for found in (ours, theirs))
    for metric in ("mean_iou", "mean_accuracy"):
        assert mine.measured[metric].values == base.measured[metric].values
    assert ours.dataset == "data set in memory"


def test_objects_are_taken_and_left_as_they_are(tower_folder, scenes):
    arguments = EvaluationArguments(seeds=1, pictures=0)
    settings = SegmentationSettings(fast=True, crop=22, fast_iterations=2)
    before = [dataclasses.asdict(settings), dataclasses.asdict(arguments)]
    found = evaluate(tower_folder, scenes, args=arguments, protocol=settings)
    again = evaluate(tower_folder, scenes, args=arguments, protocol=settings)
    assert [dataclasses.asdict(settings), dataclasses.asdict(arguments)] == before
    assert found.to_dict() == again.to_dict()
    assert found.settings["crop"] == 22 and "22 px" in found.protocol


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sead": 1}, "no field 'sead'; did you mean 'seeds'"),
        (
            {"variant": "naclip"},
            "variant is a field of ZeroShotSettings, and the task is",
        ),
        ({"task": "depth", "crop": 24}, "crop is a field of SegmentationSettings"),
        ({"seeds": "3"}, "seeds is '3'; it must be int"),
        ({"seeds": True}, "seeds is True; it must be int"),
        ({"max_val": 1.5}, "max_val is 1.5; it must be int or None"),
        ({"args": EvaluationArguments(), "seeds": 1}, "seeds is given twice, in args"),
        ({"args": EvaluationArguments(data="x")}, "data is given twice, in args"),
        (
            {"args": SegmentationSettings()},
            "args is a SegmentationSettings; it must be a",
        ),
        (
            {"protocol": SegmentationSettings(), "crop": 24},
            "crop is given twice, in proto",
        ),
        (
            {"protocol": DepthSettings(), "task": "segmentation"},
            "protocol is a DepthSett",
        ),
        (
            {"protocol": {"crop": 2}},
            "protocol is a dict; it must be one of Segmentation",
        ),
        (
            {"protocol": DepthSettings(), "args": EvaluationArguments()},
            "protocol is a DepthSettings; it must be a SegmentationSettings of task",
        ),
    ],
)
def test_options_that_do_not_fit(options, message, tower_folder, scenes, no_loading):
    with pytest.raises(ArgumentError, match=message):
        evaluate(tower_folder, scenes, **options)


def test_data_that_do_not_fit(tower_folder, scenes, in_memory, no_loading):
    with pytest.raises(ArgumentError, match="data is missing"):
        evaluate(tower_folder)
    with pytest.raises(ArgumentError, match="data is a Dataset; it must be a folder"):
        evaluate(tower_folder, in_memory["val"])
    with pytest.raises(LabelError, match="no split 'test'; it has train, val"):
        evaluate(tower_folder, in_memory, num_classes=3, val_split="test")
    with pytest.raises(LabelError, match="train has no column 'mask'; it has image"):
        evaluate(tower_folder, in_memory, num_classes=3, label_column="mask")
    with pytest.raises(LabelError, match="how many classes the set has"):
        evaluate(tower_folder, in_memory)
    with pytest.raises(ValueError, match="seeds is 0; it must be at least 1"):
        evaluate(tower_folder, scenes, seeds=0)
    stream = {k: v.to_iterable_dataset() for k, v in in_memory.items()}
    with pytest.raises(LabelError, match="train is a IterableDataset"):
        evaluate(tower_folder, datasets.IterableDatasetDict(stream), num_classes=3)


def test_outputs_are_checked_first(tower_folder, scenes, tmp_path, no_loading):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is a file: name a folder"):
        evaluate(tower_folder, scenes, evaluation_output=str(tmp_path / "file/below"))
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(OutputError, match="locked is not writable"):
            evaluate(tower_folder, scenes, evaluation_output=str(tmp_path / "locked"))


def test_later_results_are_seen_before_measuring(
    tower_folder, scenes, tmp_path, monkeypatch
):
    mine = save_refined(tmp_path / "mine", tower_folder)
    (mine / "evaluation.json").write_text('{"format": 9}')
    monkeypatch.setattr(SegmentationSettings, "protocol", None)
    with pytest.raises(UniRefinerError, match="is of format 9, expected 1"):
        evaluate([tower_folder, mine], scenes, **FAST)
