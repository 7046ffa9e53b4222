"""A tiny tower, tiny labelled folders, and stand-ins for the Debian packages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.conftest import save_tiny_tower
from unirefiner_hf.loading.adapter import save_adapter
from unirefiner_hf.loading.backbone import load_base
from unirefiner_hf.training.arguments import ModelArguments

COLOURS = np.array([[30, 30, 30], [220, 60, 40], [40, 90, 220]], dtype=np.uint8)


def save_pairs(folder: Path, count: int, size: tuple[int, int] = (24, 32)) -> Path:
    """Images whose colour tells the class: background and two rectangles."""
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        label = np.zeros(size, dtype=np.uint8)
        for name in (1, 2):
            top, left = random.integers(0, 12, 2)
            label[top : top + 10, left : left + 12] = name
        noise = random.integers(0, 20, (*size, 3), dtype=np.uint8)
        Image.fromarray(COLOURS[label] + noise).save(
            folder / "images" / f"{number}.png"
        )
        Image.fromarray(label).save(folder / "labels" / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def tower_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tower(tmp_path_factory.mktemp("tower") / "tiny-dinov2")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with splits train (8 pairs) and val (4)."""
    root = tmp_path_factory.mktemp("scenes")
    save_pairs(root / "train", 8)
    save_pairs(root / "val", 4)
    (root / "dataset.json").write_text('{"classes": ["nothing", "red", "blue"]}')
    return root


@pytest.fixture
def planter(tower_folder, tmp_path):
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
