"""The tiny tower and scenes of the evaluation's tests, and an adapter that plants."""

from __future__ import annotations

import pytest
import torch

from tests.evaluation.conftest import scenes, tower_folder  # noqa: F401
from unirefiner_hf.loading.adapter import save_adapter
from unirefiner_hf.loading.arguments import BackboneArguments
from unirefiner_hf.methods.base import load_trainable
from unirefiner_hf.methods.unirefiner.settings import UniRefinerSettings


@pytest.fixture
def planter(tower_folder, tmp_path):  # noqa: F811
    """An adapter of the tiny tower that changes its tokens."""
    args = BackboneArguments(image_size=24)
    model = load_trainable(str(tower_folder), args, UniRefinerSettings()).model
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "planter"
    folder.mkdir()
    save_adapter(model, folder)
    return folder, model.eval()
