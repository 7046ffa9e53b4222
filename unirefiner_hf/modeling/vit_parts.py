"""Parts that the package's own towers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling


class RMSNorm(nn.Module):
    """``weight * x / rms(x)`` over the last dimension, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, tokens: Tensor) -> Tensor:
        wide = tokens.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(self.weight.dtype)


class MLP(nn.Module):
    """Two Linear layers and an activation; `config` names sizes and ``hidden_act``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(tokens)))


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that forms its map; `query` and the rest ``(batch, heads, tokens, head)``.

    Returns:
        ``(batch, tokens, heads, head)`` and the map ``(batch, heads, tokens, tokens)``.
    """
    weights = (query @ key.transpose(2, 3) * scaling).float().softmax(dim=-1)
    weights = functional.dropout(weights.to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def resized_positions(table: Tensor, grid: tuple[int, int], native: int) -> Tensor:
    """Position embeddings of a grid, resized bicubically in float32 unless it is native.

    Args:
        table: ``(1 + native * native, hidden)``, CLS first.
        grid: ``(rows, columns)`` in patches.

    Returns:
        ``(1 + rows * columns, hidden)``.
    """
    if grid == (native, native):
        return table
    patches = table[1:].float().T.unflatten(1, (native, native))
    resized = functional.interpolate(
        patches.unsqueeze(0), size=grid, mode="bicubic", align_corners=False
    )
    return torch.cat([table[:1], resized[0].flatten(1).T.to(table.dtype)])


def run_layers(
    encoder: Any,
    tokens: Tensor,
    output_hidden_states: bool,
    output_attentions: bool,
) -> BaseModelOutputWithPooling:
    """Run the layers of an encoder and record; each is recomputed if checkpointed.

    Args:
        encoder: has ``layers``, each ``tokens -> (tokens, attention map or None)``, and
            ``gradient_checkpointing``, which transformers sets.
    """
    states: list[Tensor] = [tokens]
    maps: list[Tensor] = []
    for layer in encoder.layers:
        if encoder.gradient_checkpointing and encoder.training:
            run = encoder._gradient_checkpointing_func
            tokens, attention = run(layer.__call__, tokens)
        else:
            tokens, attention = layer(tokens)
        if output_hidden_states:
            states.append(tokens)
        if output_attentions:
            maps.append(attention)
    return BaseModelOutputWithPooling(
        last_hidden_state=tokens,
        hidden_states=tuple(states) if output_hidden_states else None,
        attentions=tuple(maps) if output_attentions else None,
    )
