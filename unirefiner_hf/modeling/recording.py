"""What a tower's attention works on, recorded as it runs: queries and keys, or its maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import UniRefinerError
from .families import family_of, layers_of, part_of

QueriesKeys = Mapping[int, tuple[Tensor, Tensor]]


def check_forms_maps(attention: str | None) -> None:
    """Refuse attention maps where the attention never forms them.

    Args:
        attention: the config's ``_attn_implementation``.

    Raises:
        UniRefinerError: it is not ``eager``.
    """
    if attention != "eager":
        raise UniRefinerError(
            f"output_attentions=True, but attn_implementation={attention!r} never "
            "forms the attention maps. Load the model with "
            "attn_implementation='eager' or call "
            "model.set_attn_implementation('eager')."
        )


@contextmanager
def record_queries_keys(
    tower: PreTrainedModel, layers: Sequence[int]
) -> Iterator[QueriesKeys]:
    """Record the query and key projections of the forward passes made inside.

    Args:
        tower: a tower of a supported family; it may be wrapped by an adapter that
            forwards attributes.
        layers: layers to record, counted from 0.

    Yields:
        A dict, filled by each forward pass: layer -> (queries, keys), each
        ``(batch, prefix + patches, channels)``, all heads side by side, as projected
        (before a rotary embedding, where the tower has one). The hooks are gone on
        exit. Layers compiled with `nn.Module.compile` run uncompiled inside: a
        compiled layer would not call the hooks.

    Raises:
        UniRefinerError: a layer the tower does not have.
    """
    family = family_of(tower.config)
    blocks = layers_of(tower, family)
    wrong = [layer for layer in layers if not 0 <= layer < len(blocks)]
    if wrong:
        raise UniRefinerError(
            f"no layer {wrong[0]} in a tower of {len(blocks)} layers "
            f"(0 to {len(blocks) - 1})."
        )
    queries: dict[int, Tensor] = {}
    recorded = _Recorded(tower.config.num_attention_heads)
    handles = []
    compiled = {layer: blocks[layer]._compiled_call_impl for layer in layers}

    def keep_rotation(layer: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            recorded.rotations[layer] = tuple(kwargs["position_embeddings"])

        return hook

    def keep_query(layer: int):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            queries[layer] = output

        return hook

    def keep_key(layer: int):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            recorded.projections[layer] = (queries.pop(layer), output)

        return hook

    try:
        for layer in layers:
            blocks[layer]._compiled_call_impl = None
            if family.rotary:
                attention = part_of(blocks[layer], family.query.rpartition(".")[0])
                hook = keep_rotation(layer)
                handles.append(
                    attention.register_forward_pre_hook(hook, with_kwargs=True)
                )
            query = part_of(blocks[layer], family.query)
            key = part_of(blocks[layer], family.key)
            handles.append(query.register_forward_hook(keep_query(layer)))
            handles.append(key.register_forward_hook(keep_key(layer)))
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
        for layer, call in compiled.items():
            blocks[layer]._compiled_call_impl = call


class _Recorded(Mapping[int, tuple[Tensor, Tensor]]):
    """Layer -> (queries, keys), rotated when read.

    Not in the hooks: what is computed inside a layer has to be recomputed there by
    activation checkpointing, when the hooks are gone.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.projections: dict[int, tuple[Tensor, Tensor]] = {}
        self.rotations: dict[int, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        query, key = self.projections[layer]
        if layer not in self.rotations:
            return query, key
        cosines, sines = self.rotations[layer]
        return (
            _rotate(query, cosines, sines, self.heads),
            _rotate(key, cosines, sines, self.heads),
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self.projections)

    def __len__(self) -> int:
        return len(self.projections)


def _rotate(tokens: Tensor, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
    """Rotary embedding of the last tokens, as many as there are angles.

    Args:
        tokens: ``(batch, tokens, channels)``, heads side by side.
        cosines, sines: ``(rotated, head_size)``; the halves of a head are pairs.
    """
    cosines, sines = cosines.float().unsqueeze(1), sines.float().unsqueeze(1)
    split = tokens.unflatten(-1, (heads, -1))
    plain = split.shape[1] - cosines.shape[0]
    rest = split[:, plain:].float()
    first, second = rest.chunk(2, dim=-1)
    rotated = rest * cosines + torch.cat([-second, first], dim=-1) * sines
    return torch.cat([split[:, :plain], rotated.to(tokens.dtype)], dim=1).flatten(2)


__all__ = ["QueriesKeys", "check_forms_maps", "record_queries_keys"]
