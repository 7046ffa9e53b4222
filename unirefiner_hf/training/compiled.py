"""The tower's layers through torch.compile."""

from __future__ import annotations

from ..modeling.families import layers_of
from ..modeling.modeling_unirefiner import UniRefinerModel


def compile_layers(model: UniRefinerModel, backend: str = "inductor") -> None:
    """Compile each transformer layer in place, when it is first called.

    Layers are alike, so all share a few graphs: with and without adapter, with and
    without gradient, one size and any size. Filters and losses depend on values and stay
    as they are. Where queries and keys are recorded, a layer runs uncompiled.
    """
    for layer in layers_of(model.tower, model.family):
        layer.compile(backend=backend)
