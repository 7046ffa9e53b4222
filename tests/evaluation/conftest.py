"""A tiny tower, tiny labelled folders, and stand-ins for the Debian packages."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.conftest import save_tiny_tower
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel

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


def save_refined(folder, tower_folder, method=None, noise=0.0):
    """A checkpoint of the tiny tower with a border, in a run's folder if a method is named."""
    merged = folder / "merged" if method else folder
    baseline = method in ("plain", "distillation")
    model = UniRefinerModel.from_tower(
        str(tower_folder), register_width=0 if baseline else 1
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer" in name and noise:
                parameter += noise * torch.randn_like(parameter)
    model.save_pretrained(merged)
    source = tower_folder / "preprocessor_config.json"
    (merged / "preprocessor_config.json").write_text(source.read_text())
    if method:
        record = {"format": 1, "method": {"name": method}}
        (folder / "run.json").write_text(json.dumps(record))
    return merged


@pytest.fixture(scope="session")
def refined(tower_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refined checkpoint of the tiny tower, whose tokens moved."""
    torch.manual_seed(0)
    return save_refined(
        tmp_path_factory.mktemp("refined") / "mine", tower_folder, None, 0.05
    )


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 5 images, below it a folder, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    random = np.random.default_rng(3)
    for number in range(5):
        coarse = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((40, 30))
        image.save(folder / ("more" if number > 2 else "") / f"{number}.png")
    (folder / "broken.jpg").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def photo_set(photos: Path) -> datasets.Dataset:
    """The same images, and the broken one last, as rows."""
    files = [*sorted(photos.rglob("*.png")), photos / "broken.jpg"]
    rows = {"image": [str(file) for file in files], "number": list(range(6))}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
