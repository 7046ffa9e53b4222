"""A tower some of whose own weights are trained, and which can still be its old self."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..errors import UniRefinerError
from ..modeling.families import family_of


def unlocked_names(tower: PreTrainedModel) -> list[str]:
    """What PH-Reg trains of a tower: position and patch embedding and the last layer.

    Source: arXiv 2505.21501, section 4, and the authors' release.

    Raises:
        ValueError: the tower has no learned absolute position embedding.
    """
    family, config = family_of(tower.config), tower.config
    family.check_register_tokens(config)
    parameters = dict(tower.named_parameters())
    if family.positions not in parameters:
        raise UniRefinerError(
            f"This {config.model_type} tower was built without {family.positions}, the "
            "position embedding that PH-Reg trains."
        )
    projection = (
        tower.get_input_embeddings()
        if family.projection is None
        else tower.get_submodule(family.projection)
    )
    embedding = {id(p) for p in projection.parameters()}
    last = f"{family.layers}.{config.num_hidden_layers - 1}."
    return [
        name
        for name, parameter in parameters.items()
        if name == family.positions
        or id(parameter) in embedding
        or name.startswith(last)
    ]


class UnlockedTower(nn.Module):
    """Trains some weights of a tower in place and keeps a copy of them as they were.

    Stands where an adapter would: `disable_adapter` gives the old tower, so that the
    teacher shares every other weight; attributes are the tower's.

    Args:
        tower: changed in place: all but the named parameters are frozen.
        names: of the parameters to train, as of `named_parameters`.
    """

    def __init__(self, tower: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.base = tower
        self.names = list(names)
        self._is_off = False
        tower.requires_grad_(False)
        parameters = dict(tower.named_parameters())
        for number, name in enumerate(self.names):
            parameters[name].requires_grad_(True)
            copy = parameters[name].detach().clone()
            self.register_buffer(f"original_{number}", copy, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The tower's."""
        if not self._is_off:
            return self.base(*args, **kwargs)
        return functional_call(self.base, self.originals, args, kwargs)

    @property
    def originals(self) -> dict[str, Tensor]:
        """The trained parameters as they were."""
        buffers = dict(self.named_buffers(recurse=False))
        return {n: buffers[f"original_{i}"] for i, n in enumerate(self.names)}

    def trained(self) -> dict[str, Tensor]:
        """The trained parameters, by the tower's names."""
        parameters = dict(self.base.named_parameters())
        return {name: parameters[name] for name in self.names}

    @torch.no_grad()
    def load_trained(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what `trained` gave."""
        for name, parameter in self.trained().items():
            parameter.copy_(weights[name])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The tower as it was before training."""
        before, self._is_off = self._is_off, True
        try:
            yield
        finally:
            self._is_off = before

    def get_base_model(self) -> PreTrainedModel:
        """The tower."""
        return self.base

    def merge_and_unload(self) -> PreTrainedModel:
        """The tower with its trained weights, which are its own already."""
        return self.base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)
