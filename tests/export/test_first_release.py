"""Checkpoints keep loading: this one was written by version 0.1.0, format 1.

It is a DINOv2 of random weights in a ``randn`` frame. Never write it anew: a change that
needs that breaks every published checkpoint.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from unirefiner_hf import UniRefinerBackbone

FIRST = Path(__file__).parent / "first_release"


def test_the_first_release_gives_its_tokens():
    expected = load_file(FIRST / "expected.safetensors")
    model, report = AutoModel.from_pretrained(FIRST, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        tokens = model(expected["pixels"]).last_hidden_state
    torch.testing.assert_close(tokens, expected["tokens"], atol=1e-4, rtol=0)
    assert AutoImageProcessor.from_pretrained(FIRST).size == {"height": 8, "width": 8}


def test_the_first_release_is_a_backbone():
    backbone = UniRefinerBackbone.from_pretrained(FIRST, out_features=["stage1"])
    maps = backbone(load_file(FIRST / "expected.safetensors")["pixels"]).feature_maps
    assert [tuple(stage.shape) for stage in maps] == [(1, 8, 3, 2)]


def test_a_later_format_says_what_to_install(tmp_path):
    shutil.copytree(FIRST, tmp_path / "later")
    file = tmp_path / "later" / "config.json"
    config = json.loads(file.read_text())
    assert config["format_version"] == 1
    file.write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(ValueError, match="pip install -U unirefiner_hf"):
        AutoModel.from_pretrained(tmp_path / "later")
