"""The frozen weights' products in float8, in passes without gradient.

Teacher and relation passes are about three quarters of a step, and no gradient comes of
them. Queries and keys are left as they are. Weights are scaled by row (output channel),
inputs by token; products are accumulated in float32. The student, its gradient and the
adapter stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import UniRefinerError
from ..modeling.families import family_of
from .quantized import layer_linears

logger = logging.get_logger(__name__)

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
CAPABILITY = (8, 9)
MULTIPLE = 16
"""Both sides of a weight have to be multiples of this for the GPU's product."""


class Float8Error(UniRefinerError):
    """Float8 products are not to be had here."""


class Float8Linear(nn.Linear):
    """A frozen Linear that multiplies in float8 in eval mode without gradient.

    The float8 copy is made at the first such call and kept: one byte a weight more. On a
    CPU the same float8 values are multiplied in float32.
    """

    _eight: tuple[Tensor, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        if self.training or torch.is_grad_enabled():
            return super().forward(input)
        if self._eight is None or self._eight[0].device != input.device:
            self._eight = to_float8(self.weight)
        dtype = input.dtype
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
        weight, weight_scale = self._eight
        tokens, scale = to_float8(input.flatten(0, -2))
        if input.is_cuda:
            output = torch._scaled_mm(
                tokens,
                weight.t(),
                scale_a=scale,
                scale_b=weight_scale.t(),
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            ).to(dtype)
        else:
            output = tokens.float() @ weight.float().t() * scale * weight_scale.t()
            output = output.to(dtype)
        if self.bias is not None:
            output = output + self.bias.to(dtype)
        return output.unflatten(0, input.shape[:-1])


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``(n, channels)`` in float8, and their scales ``(n, 1)`` in float32."""
    rows = rows.detach().float()
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (rows / scale).to(FLOAT8), scale


def float8_linears(tower: PreTrainedModel) -> list[nn.Linear]:
    """The Linear modules of a tower's layers that may multiply in float8.

    Queries and keys stay out: the attention-flow filter reads them, and its masks are
    the first to change (benchmarks/RESULTS.md).
    """
    family = family_of(tower.config)
    read = (f".{family.query}", f".{family.key}")
    return [
        linear
        for name, linear in layer_linears(tower).items()
        if not name.endswith(read)
    ]


def use_float8(tower: PreTrainedModel) -> int:
    """Let `float8_linears` multiply in float8.

    Returns:
        How many do; those with a side off the GPU's multiple are left, and counted in a
        warning.
    """
    linears = float8_linears(tower)
    fitting = [
        linear
        for linear in linears
        if not (linear.in_features % MULTIPLE or linear.out_features % MULTIPLE)
    ]
    for linear in fitting:
        linear.__class__ = Float8Linear
    if len(fitting) < len(linears):
        logger.warning(
            f"{len(linears) - len(fitting)} of {len(linears)} Linear modules stay out of "
            f"float8: a side is no multiple of {MULTIPLE}."
        )
    return len(fitting)


def leave_float8(model: nn.Module) -> None:
    """Back to plain Linear modules."""
    for module in model.modules():
        if isinstance(module, Float8Linear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
            module.__dict__.pop("_eight", None)


def check_float8(device: torch.device) -> None:
    """Refuse a device without float8 products.

    Raises:
        Float8Error: names what is needed.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise Float8Error(
            "teacher_float8 needs a GPU with float8 products (compute capability 8.9 or "
            "more: L40S, 4090, H100 and newer). Leave it off here."
        )
