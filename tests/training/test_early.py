"""What is wrong and cheap to tell is told before the backbone is loaded."""

from __future__ import annotations

import datasets
import pytest

from tests.training.conftest import refine
from unirefiner_hf.errors import UniRefinerError
from unirefiner_hf.training import trainer


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": {"data": "/no/such"}}, "/no/such: there is no such folder or file"),
        ({"data": {"data": "./photos"}}, "./photos: there is no such folder or file"),
        ({"data": {"data": " "}}, "data is empty"),
        (
            {"data": {"reference_image": "/no/such.jpg"}},
            "such.jpg: there is no such file",
        ),
        (
            {"data": {"data": "lab/photos", "streaming": True}, "max_steps": -1},
            "A stream does not tell how long it is",
        ),
        ({"output_dir": __file__}, "test_early.py is a file: name a folder"),
        ({"output_dir": f"{__file__}/run"}, "test_early.py is a file: name a folder"),
        ({"optim": "galore_adamw"}, "optim is 'galore_adamw': .*install"),
        ({"optim_args": "foo=1"}, "optim_args is 'foo=1', and optim .* reads none"),
        ({"optim": "adafactor", "optim_args": "foo"}, "optim"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_type 'cosine_with_min",
        ),
        ({"lr_scheduler_kwargs": {"power": 1}}, "'constant' does not read it"),
        (
            {"lr_scheduler_type": "linear", "final_lr_share": 0.1},
            "lr_scheduler_type is 'linear', which final_lr_share",
        ),
        ({"warmup_steps": 10}, "warmup_steps is 10, and .*'constant' does not read it"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"teapot": 1}},
            "lr_scheduler_kwargs {'teapot': 1}",
        ),
        ({"per_device_train_batch_size": 0}, "it must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "it must be at least 1"),
    ],
)
def test_it_is_told_before_the_backbone_is_loaded(given, said, arguments, monkeypatch):
    monkeypatch.setattr(trainer, "load_trainable", None)
    with pytest.raises(UniRefinerError, match=said):
        refine(*arguments(**given))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "photos"),
        ({"data_split": "val"}, "val"),
        ({"output_dir": "photos"}, "output_dir is .*the folder of the images"),
    ],
)
def test_images_are_looked_for_before_the_backbone_is_loaded(
    options, said, arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "load_trainable", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(UniRefinerError, match=said):
        refine(*arguments(**{"data": {"data": "photos"}, **options}))


def test_a_table_without_rows_or_of_junk_is_named(arguments, tmp_path):
    empty, junk = tmp_path / "empty.parquet", tmp_path / "junk.parquet"
    datasets.Dataset.from_dict({"image": []}).to_parquet(str(empty))
    junk.write_bytes(b"junk" * 99)
    for file, said in ((empty, "has no rows"), (junk, "cannot be read as a data set")):
        with pytest.raises(UniRefinerError, match=f"{file.name} {said}"):
            refine(*arguments(data={"data": str(file)}))


def test_a_rank_beyond_the_channels_is_refused(arguments):
    with pytest.raises(UniRefinerError, match="lora_rank is 33; .* have 32 channels"):
        refine(*arguments(model={"lora_rank": 33}))


@pytest.mark.parametrize(
    "given",
    [
        {"optim": "sgd"},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 0.1},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
    ],
)
def test_what_is_right_goes_on(given, arguments, monkeypatch):
    def loaded(*_, **__):
        raise KeyError("loaded")

    monkeypatch.setattr(trainer, "load_trainable", loaded)
    with pytest.raises(KeyError, match="loaded"):
        refine(*arguments(**given))
