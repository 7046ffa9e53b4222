"""A training step on tensors that hold no data: what it computes and what it keeps.

The objective itself runs, its tower included, on fake tensors (shape and type, no
storage), so the counts follow the code and a new vision family needs nothing here.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from ..loading.arguments import both_sides
from ..methods.objective import (
    COMPOSITES,
    CROPS,
    FULL_IMAGE,
    LOSSES,
    RELATION,
    STUDENT,
    VIEWS,
    Objective,
    Surroundings,
)
from ..methods.settings import MethodSettings
from ..modeling.families import layers_of
from ..modeling.modeling_unirefiner import UniRefinerModel

aten = torch.ops.aten
_FLASH = "_scaled_dot_product_flash_attention"
_ENTER = torch.ops.profiler._record_function_enter_new.default
_EXIT = torch.ops.profiler._record_function_exit._RecordFunction
_ALL_AT_ONCE = 2**31

BACKWARD = "backward"
RECOMPUTATION = "recomputation"
OTHER = "views and tokens"
_FORWARD = (COMPOSITES, CROPS, VIEWS, FULL_IMAGE, STUDENT, RELATION, LOSSES)
_LAST = (BACKWARD, RECOMPUTATION, OTHER)

BASE, ADAPTER, BATCH = "frozen base", "adapter", "images and buffers"


@dataclass
class StepCost:
    """What one step of one process takes.

    A part is the innermost `torch.profiler.record_function` scope of the objective,
    `OTHER` outside of all; `BACKWARD`, and `RECOMPUTATION` for the forward it repeats.

    Attributes:
        flops: part of the step -> dtype of the products -> floating point operations,
            two for a multiply-add. Matrix products, convolutions and attention are
            counted, as in `torch.utils.flop_counter`.
        calls, images, tokens: part -> calls of the tower in its forward, and the images
            and the tokens (with prefix and border) that they carried.
        tokens_without_gradient: those of the tokens that no gradient goes to.
        peak: what holds the memory at the fullest moment -> bytes.
        base, trainable: parameters.
    """

    flops: dict[str, dict[torch.dtype, int]]
    calls: dict[str, int]
    images: dict[str, int]
    tokens: dict[str, int]
    tokens_without_gradient: dict[str, int]
    peak: dict[str, int]
    base: int
    trainable: int

    @property
    def total_flops(self) -> int:
        """Floating point operations of the whole step."""
        return sum(sum(by_dtype.values()) for by_dtype in self.flops.values())

    @property
    def parts(self) -> list[str]:
        """The parts, in the order they are told."""
        own = [part for part in self.flops if part not in (*_FORWARD, *_LAST)]
        return [p for p in (*_FORWARD[:-1], *own, LOSSES, *_LAST) if p in self.flops]

    @property
    def peak_bytes(self) -> int:
        """Bytes at the fullest moment of the step."""
        return sum(self.peak.values())


def dry_step(
    model: UniRefinerModel,
    settings: MethodSettings,
    *,
    image_size: int | tuple[int, int],
    batch: int,
    register_factor: int = 32,
    progress: float = 1.0,
    autocast: torch.dtype | None = None,
    as_on_gpu: bool = True,
    checkpointing: bool = False,
    gradients_kept: bool = False,
) -> StepCost:
    """Run forward and backward of one step without data.

    Where the real step looks at values, the worst case is taken: every token is clean.

    Args:
        model: the register model, made trainable by the method; on the meta device, so
            that nothing is in memory. Moved to fake tensors in place.
        settings: of the method.
        image_size: of the images, pixels: a side, or height and width.
        batch: images a step.
        progress: as for the objective.
        autocast: type of mixed precision, None for none.
        as_on_gpu: mixed precision and passes without gradient as on a GPU: layer norms
            in float32, whole batches at once.
        checkpointing: the student's activations are recomputed.
        gradients_kept: a step after the first of an accumulation.
    """
    if as_on_gpu and settings.no_grad_batch is None:
        settings = replace(settings, no_grad_batch=_ALL_AT_ONCE)
    meter = _Meter()
    with _no_cached_tensors(), FakeTensorMode(), meter:
        model._apply(_without_data)
        height, width = both_sides(image_size)
        reference = torch.empty(1, 3, height, width)
        objective = _built(model, settings, reference, register_factor).train()
        if checkpointing:
            objective.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        trained = [p for p in objective.parameters() if p.requires_grad]
        pixels = torch.empty(batch, 3, height, width)
        if gradients_kept:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        mixed = torch.autocast("cpu", autocast, enabled=autocast is not None)
        with _kernels(norms_in_float32=as_on_gpu):
            with mixed:
                objective.prepare(height, width)
                meter.start(objective, pixels)
                loss = objective(pixels, progress)["loss"]
            meter.backward = True
            loss.backward()
    total = sum(p.numel() for p in objective.model.parameters())
    trainable = sum(p.numel() for p in trained)
    return StepCost(
        flops={part: dict(count) for part, count in meter.flops.items()},
        calls=dict(meter.calls),
        images=dict(meter.images),
        tokens=dict(meter.tokens),
        tokens_without_gradient=dict(meter.tokens_without_gradient),
        peak=meter.peak,
        base=total - trainable,
        trainable=trainable,
    )


def _built(
    model: UniRefinerModel,
    settings: MethodSettings,
    reference: Tensor,
    register_factor: int,
) -> Objective:
    """The objective; of what surrounds it, it alone keeps what it reads."""
    given = Surroundings(reference, register_factor, white=torch.empty(3))
    return settings.objective().build(model, settings, given)


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


class _Meter(TorchDispatchMode):
    """Counts operations and the bytes that are alive, by part of the step.

    The profiler's scopes are operations as others are, and pass through here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.formulas = dict(FlopCounterMode(display=False).flop_registry)
        for ending in ("", "_backward"):
            kernel = getattr(aten, f"{_FLASH}_for_cpu{ending}")
            self.formulas[kernel] = self.formulas[getattr(aten, f"{_FLASH}{ending}")]
        self.flops: dict[str, Counter] = defaultdict(Counter)
        self.calls: Counter = Counter()
        self.images: Counter = Counter()
        self.tokens: Counter = Counter()
        self.tokens_without_gradient: Counter = Counter()
        self.peak: dict[str, int] = {}
        self._alive: Counter = Counter()
        self.backward = False
        self._scopes = [OTHER]
        self._owned = WeakIdKeyDictionary()

    def start(self, objective: Objective, pixels: Tensor) -> None:
        """Forget what came before; from here on it is the step."""
        for name, parameter in objective.named_parameters():
            kind = ADAPTER if parameter.requires_grad else BASE
            self._own(parameter, kind)
        for tensor in (*objective.buffers(), pixels):
            self._own(tensor, BATCH)
        for counter in (self.flops, self.calls, self.images, self.tokens):
            counter.clear()
        self.tokens_without_gradient.clear()
        self.peak = dict(self._alive)
        model = objective.model
        layers_of(model.tower, model.family)[0].register_forward_hook(self._count)

    def _count(self, layer: nn.Module, args: Any, output: Any) -> None:
        """A call of the tower's first layer."""
        tokens = output[0] if isinstance(output, tuple) else output
        part, carried = self._part, tokens.shape[0] * tokens.shape[1]
        self.calls[part] += 1
        self.images[part] += tokens.shape[0]
        self.tokens[part] += carried
        if not torch.is_grad_enabled():
            self.tokens_without_gradient[part] += carried

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ENTER:
            self._scopes.append(args[0])
        elif func is _EXIT:
            self._scopes.pop()
        out = _value_free(func, args, kwargs)
        formula = self.formulas.get(func.overloadpacket)
        if formula is not None:
            # A convolution's backward gives None for the gradient of the image.
            dtype = next(leaf.dtype for leaf in tree_leaves(out) if leaf is not None)
            self.flops[self._part][dtype] += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._own(leaf)
        if sum(self._alive.values()) > sum(self.peak.values()):
            self.peak = dict(self._alive)
        return out

    @property
    def _part(self) -> str:
        if not self.backward:
            return self._scopes[-1]
        # A backward pass runs without gradient, but for the forward it repeats.
        return RECOMPUTATION if torch.is_grad_enabled() else BACKWARD

    def _own(self, tensor: Tensor, kind: str | None = None) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if storage not in self._owned:
            entry = self._owned[storage] = [kind or self._part]
            self._alive[entry[0]] += size
            weakref.finalize(storage, self._release, entry, size)
        elif kind is not None:
            entry = self._owned[storage]
            self._alive[entry[0]] -= size
            entry[0] = kind
            self._alive[kind] += size

    def _release(self, entry: list[str], size: int) -> None:
        self._alive[entry[0]] -= size


def _value_free(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation; where it depends on values, every mask is true."""
    if func is aten._local_scalar_dense.default:
        return _one(args[0])
    if func is aten.index.Tensor and _is_mask(args[1]):
        return args[0].flatten(0, args[1][0].ndim - 1).clone()
    if "index_put" in func.__name__ and _is_mask(args[1]):
        return args[0].clone()
    return func(*args, **kwargs)


def _one(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _is_mask(indices: Any) -> bool:
    return indices[0] is not None and indices[0].dtype == torch.bool


def _no_cached_tensors() -> Any:
    """Position grids that transformers keeps between calls are neither read nor kept.

    A real one does not mix with fake tensors, and a fake one would break the next real
    run. transformers passes its caches by while it believes to be compiled.
    """
    return mock.patch(
        "transformers.pytorch_utils.is_torchdynamo_compiling", lambda: True
    )


@contextmanager
def _kernels(norms_in_float32: bool) -> Iterator[None]:
    """Attention without its matrix, and layer norms as a GPU's mixed precision has them.

    The functions themselves are exchanged: a mode would not reach the forward that a
    backward pass repeats.
    """
    layer_norm = functional.layer_norm

    def float32_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            input = input.float()
        return layer_norm(input, *args, **kwargs)

    with ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(
            patch(functional, "scaled_dot_product_attention", _attention)
        )
        if norms_in_float32:
            stack.enter_context(patch(functional, "layer_norm", float32_norm))
        yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    kernel = getattr(aten, f"{_FLASH}_for_cpu")
    return kernel(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
