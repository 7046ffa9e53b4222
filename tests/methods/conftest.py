"""A tiny objective for the tests of refinement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import make_tiny_tower
from unirefiner_hf.loading.lora import add_adapter
from unirefiner_hf.methods.unirefiner.objective import UniRefiner
from unirefiner_hf.methods.unirefiner.settings import UniRefinerSettings
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel


def make_objective(
    family: str = "dinov2", *, fill: str = "zero", **settings: Any
) -> UniRefiner:
    """An objective on a tiny tower whose adapter is not at its neutral start."""
    torch.manual_seed(0)
    tower = make_tiny_tower(family)
    model = UniRefinerModel.from_tower(tower, register_fill=fill)
    model.tower = add_adapter(tower, rank=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    settings.setdefault("ah_layers", [0, 1])
    reference = torch.randn(1, 3, 24, 24)
    return UniRefiner(model, UniRefinerSettings(**settings), reference).train()


@pytest.fixture
def objective() -> Callable[..., UniRefiner]:
    """Factory of tiny objectives; see `make_objective`."""
    return make_objective
