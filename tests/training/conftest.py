"""A tiny tower and a folder of images, on disk as a user has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import BitImageProcessorPil

import unirefiner_hf
from tests.conftest import make_tiny_tower
from unirefiner_hf.methods.registry import method_settings
from unirefiner_hf.training.arguments import UniRefinerArguments


def save_tiny_tower(folder: Path, family: str = "dinov2") -> Path:
    """A tower and its image processor, as on the Hub."""
    make_tiny_tower(family).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    return folder


def save_images(folder: Path, count: int = 12) -> Path:
    """Noise with some structure, 40x30 pixels."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        small = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 30)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="session")
def tower_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tower(tmp_path_factory.mktemp("tower") / "tiny-dinov2")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def arguments(
    tower_folder: Path, image_folder: Path, tmp_path: Path
) -> Callable[..., tuple[Any, ...]]:
    """The four arguments of `refine` for a run of a few steps; options by field name."""

    def make(
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        method: dict[str, Any] | None = None,
        **training: Any,
    ) -> tuple[Any, ...]:
        options = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 6,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "image_size": 24,
            "report_images": 2,
            **training,
            **(model or {}),
            **(data or {}),
        }
        settings = dict(method or {})
        name = settings.pop("method", "unirefiner")
        if name == "unirefiner":
            settings.setdefault("ah_layers", [0, 1])
        return (
            options.pop("model", str(tower_folder)),
            options.pop("data", str(image_folder)),
            UniRefinerArguments(**options),
            method_settings(name, settings),
        )

    return make


def refine(*given: Any) -> Path:
    """`unirefiner_hf.refine`, as far as the run's folder."""
    refined = unirefiner_hf.refine(*given)
    assert refined is not None
    return refined.folder
