"""Runs as a refinement leaves them, without the hour it takes."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    SiglipImageProcessorPil,
)
from transformers.image_processing_utils import BaseImageProcessor

import unirefiner_hf
from tests.conftest import make_tiny_tower
from unirefiner_hf.loading.adapter import save_adapter
from unirefiner_hf.loading.arguments import BackboneArguments
from unirefiner_hf.loading.lora import add_adapter
from unirefiner_hf.methods.base import load_trainable
from unirefiner_hf.methods.registry import method_settings
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel

SIZE = 24

RECORD: dict[str, Any] = {
    "format": 1,
    "model": {
        "base": "example-lab/tiny-tower",
        "revision": None,
        "license": "apache-2.0",
        "family": "dinov2",
        "layers": 2,
        "image_size": SIZE,
        "final_norm": False,
        "register_factor": 32,
        "register_fill": "zero",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "register_width": 2,
    },
    "data": {
        "source": "made-up photos",
        "split": "train",
        "max_images": None,
        "seed": 42,
        "images": 12,
        "skipped": {"broken.jpg": "not an image"},
    },
    "method": {"name": "unirefiner", "num_crops": 3, "fpgp_cosine": None},
    "training": {
        "optimizer": "adamw_torch_fused",
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "schedule": "constant",
        "precision": "float32",
        "processes": 1,
        "hardware": "2 CPU cores (x86_64)",
        "total_batch": 16,
        "steps": 30,
        "epochs": 2.0,
        "seconds": 61.5,
        "resumed": False,
    },
    "versions": {"unirefiner_hf": "0.1.0"},
    "losses": {"loss": 1.25, "loss_uni": 0.5, "clean_ratio": 0.9},
    "spurious_shares": {
        "before": {"fpgp": 0.25, "ah": 0.125, "spurious": 0.375},
        "after": {"fpgp": 0.125, "ah": 0.1, "spurious": 0.2},
        "after_own_yardstick": {"fpgp": 0.3, "ah": 0.1, "spurious": 0.4},
        "images": 8,
    },
    "finished": True,
}
"""What version 0.1.0 wrote; the numbers are made up."""


def make_record(**changes: Any) -> dict[str, Any]:
    """A copy of `RECORD`; a change is ``section__key=value`` or ``key=value``."""
    record = copy.deepcopy(RECORD)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            record[section][key] = value
        else:
            record[section] = value
    return record


def make_processor(family: str) -> BaseImageProcessor:
    """The image processor towers of the family come with: others resize and crop."""
    if family == "clip_vision_model":
        return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    if family == "siglip_vision_model":
        return SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return BitImageProcessorPil(size={"shortest_edge": 20}, crop_size=16)


def make_refined(family: str, *, seed: int = 0, **options: Any) -> UniRefinerModel:
    """A model whose adapter does something."""
    tower = make_tiny_tower(family)
    model = UniRefinerModel.from_tower(tower, **options)
    model.tower = add_adapter(tower, name="example-lab/tiny-tower")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name == "register_patch":
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def merge(*given: Any, **options: Any) -> Path:
    """`unirefiner_hf.merge`, as far as the folder."""
    return unirefiner_hf.merge(*given, **options).folder


def pixels(grid: tuple[int, int] = (6, 5)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, grid[0] * 4, grid[1] * 4, generator=generator)


@pytest.fixture
def save_run(tmp_path: Path) -> Callable[..., tuple[UniRefinerModel, Path, Path]]:
    """Factory: a run on disk -> (its model, its folder, the folder of its base)."""

    def save(family: str = "dinov2", **changes: Any):
        fill = changes.get("model__register_fill", "zero")
        norm = family == "clip_vision_model"
        model = make_refined(
            family, register_width=2, register_fill=fill, final_norm=norm
        )
        base = tmp_path / "tiny-tower"
        make_tiny_tower(family).save_pretrained(base)
        make_processor(family).save_pretrained(base)
        run = tmp_path / "run"
        for name in ("adapter", "checkpoint-20"):
            (run / name).mkdir(parents=True)
            save_adapter(model, run / name)
        state = {"lazy_channels": [], "skipped": {}}
        (run / "checkpoint-20" / "refiner_state.json").write_text(json.dumps(state))
        (run / "checkpoint-20" / "trainer_state.json").write_text('{"global_step": 20}')
        record = make_record(model__family=family, model__final_norm=norm, **changes)
        (run / "run.json").write_text(json.dumps(record))
        Image.new("RGB", (8, 8)).save(run / "before_after.png")
        return model, run, base

    return save


TRAINED = {"unirefiner": {}, "distillation": {}, "ph_reg": {"register_tokens": 4}}
"""Method -> settings of its tiny run."""
WIDTHS = {"unirefiner": 2, "distillation": 0, "ph_reg": 0}


@pytest.fixture
def save_method_run(
    tmp_path: Path,
) -> Callable[[str], tuple[UniRefinerModel, Path, Path]]:
    """Factory: a run of a method as today's record tells it; gives what `save_run` does."""

    def save(method: str):
        base, run = tmp_path / "tiny-tower", tmp_path / "run"
        make_tiny_tower("dinov2").save_pretrained(base)
        make_processor("dinov2").save_pretrained(base)
        settings = method_settings(method, TRAINED[method])
        arguments = BackboneArguments(image_size=SIZE, model_license="apache-2.0")
        model = load_trainable(str(base), arguments, settings).model
        model.config.register_width = WIDTHS[method]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.1 * noise)
        save_adapter(model, run / "adapter")
        record = make_record(model__register_width=WIDTHS[method])
        for name in settings.unread:
            record["model"].pop(name, None)
        record["method"] = {"name": method, **dataclasses.asdict(settings)}
        (run / "run.json").write_text(json.dumps(record))
        return model.eval(), run, base

    return save
