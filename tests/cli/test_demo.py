"""The demo, at one step and a small size, from the command line."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from unirefiner_hf.cli import main
from unirefiner_hf.loading import starter


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--output", str(folder), "--steps", "1", "--size", "112"]) == 0
    return folder


def test_the_refined_model_loads_and_sees(output):
    model = AutoModel.from_pretrained(output / "merged").eval()
    processor = AutoImageProcessor.from_pretrained(output / "merged")
    photograph = starter.whole_photographs()["chelsea"]
    with torch.no_grad():
        outputs = model(**processor(photograph, return_tensors="pt"))
    assert outputs.feature_map.shape == (1, 384, 8, 8)


def test_metrics_and_picture(output):
    metrics = json.loads((output / "metrics.json").read_text())
    for when in ("before", "after"):
        assert set(metrics["spurious_shares"][when]) == {"fpgp", "ah", "spurious"}
    assert metrics["steps"] == 1 and metrics["seconds"] > 0
    assert metrics["losses"]["loss_uni"] > 0
    picture = Image.open(output / "before_after.png")
    assert picture.width > 1000 and picture.height > 7 * 112
    card = (output / "merged" / "README.md").read_text()
    assert "license: apache-2.0" in card and "before_after.png" not in card


def test_the_segmentation_example_runs_on_it(output):
    result = subprocess.run(
        [
            sys.executable,
            "examples/segmentation_backbone.py",
            str(output / "merged"),
            "2",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "step 2: loss" in result.stdout


def test_a_second_demo_into_the_same_folder_is_refused(output, capsys):
    assert main(["demo", "--output", str(output)]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option,message",
    [
        (["--size", "100"], "image_size is 100.*98 or 112"),
        (["--images", "/missing"], "no such folder"),
        (["--steps", "0"], "--steps: 0 is not 1 or more"),
    ],
)
def test_bad_options_are_told(tmp_path, capsys, option, message):
    assert main(["demo", "--output", str(tmp_path / "out"), *option]) == 2
    assert re.search(message, capsys.readouterr().err)
