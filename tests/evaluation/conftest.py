"""A tiny tower, tiny labelled folders, and stand-ins for the Debian packages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.conftest import save_tiny_tower

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
