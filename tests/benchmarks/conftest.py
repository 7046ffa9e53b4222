"""The tiny tower and scenes of the evaluation's tests, and an adapter that plants."""

from __future__ import annotations

import pytest
import torch

from tests.evaluation.conftest import scenes, tower_folder  # noqa: F401
from unirefiner_hf.loading.adapter import save_adapter
from unirefiner_hf.loading.backbone import load_base
from unirefiner_hf.training.arguments import ModelArguments


@pytest.fixture
def planter(tower_folder, tmp_path):  # noqa: F811
    """An adapter of the tiny tower that changes its tokens."""
    model = load_base(ModelArguments(str(tower_folder), image_size=24)).model
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "planter"
    folder.mkdir()
    save_adapter(model, folder)
    return folder, model.eval()
