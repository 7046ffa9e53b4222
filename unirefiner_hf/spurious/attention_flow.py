"""Attention hijackees: tokens the others hardly read from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional


def attention_inflow(
    queries_keys: Iterable[tuple[Tensor, Tensor]],
    rejected: Tensor,
    form: str = "release",
    num_heads: int = 1,
) -> Tensor:
    """Attention each token receives from the tokens of its image.

    Attention is averaged over layers, and over heads in the paper's form.

    Args:
        queries_keys: query and key projections of each layer,
            ``(batch, patches, heads * head_size)``.
        rejected: ``(batch, patches)`` bool, tokens other filters rejected.
        form: ``"release"``: queries and keys L2-normalised over all heads at once,
            keys of rejected tokens set to 0, softmax without temperature.
            ``"paper"``: ``softmax(q k^T / sqrt(head_size))`` per head.
        num_heads: heads of the tower, read in the paper's form only.

    Returns:
        ``(batch, patches)``, mean 1.

    Raises:
        ValueError: no layer was given, or the form is unknown.
    """
    if form not in ("release", "paper"):
        raise ValueError(
            f"Attention flow has no form {form!r}: use 'release' or 'paper'."
        )
    total = torch.zeros(rejected.shape, device=rejected.device)
    layers = 0
    for queries, keys in queries_keys:
        queries, keys = queries.float(), keys.float()
        if form == "release":
            queries = functional.normalize(queries, dim=-1)
            keys = functional.normalize(keys, dim=-1)
            keys = keys.masked_fill(rejected.unsqueeze(-1), 0.0)
            attention = (queries @ keys.transpose(1, 2)).softmax(dim=-1)
            total = total + attention.sum(dim=1)
        else:
            queries = queries.unflatten(-1, (num_heads, -1)).transpose(1, 2)
            keys = keys.unflatten(-1, (num_heads, -1)).transpose(1, 2)
            scale = queries.shape[-1] ** -0.5
            attention = (queries @ keys.transpose(2, 3) * scale).softmax(dim=-1)
            total = total + attention.mean(dim=1).sum(dim=1)
        layers += 1
    if layers == 0:
        raise ValueError(
            "Attention flow needs the queries and keys of at least one layer."
        )
    return total / layers


def inflow_threshold(inflow: Tensor, rejected: Tensor, sigma: float = 0.5) -> Tensor:
    """The inflow below which a token is an attention hijackee.

    ``mean - sigma * std`` over the batch's tokens that are not rejected. Over fewer
    than two of them there is no spread to speak of, and the threshold is 0: nothing
    is rejected.
    """
    kept = inflow[~rejected]
    if kept.numel() < 2:
        return inflow.new_zeros(())
    return kept.mean() - sigma * kept.std()


def read_by_others(inflow: Tensor, rejected: Tensor, sigma: float = 0.5) -> Tensor:
    """Tokens that are not attention hijackees (AH filter).

    Args:
        inflow: ``(batch, patches)`` from `attention_inflow`.
        rejected: ``(batch, patches)`` bool, tokens other filters rejected.

    Returns:
        ``(batch, patches)`` bool, True = clean.
    """
    return inflow >= inflow_threshold(inflow, rejected, sigma)
