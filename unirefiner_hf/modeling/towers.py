"""Building, loading and checking towers, and what they are called with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import logging

from .errors import UniRefinerError
from .families import (
    DUAL_ENCODERS,
    TowerFamily,
    family_of,
    layers_of,
    part_of,
    patch_size_of,
)
from .files import (
    check_finite_weights,
    check_model,
    check_reachable,
    refuse_report,
)
from .own_towers import own_models, published_config
from .weight_files import check_no_adapter, check_weights, pickled_alone

# transformers has this class, but its AutoModel does not know it. By name: a model may not
# be imported here, since transformers' own imports may have brought us here.
MODEL_MAPPING_NAMES.setdefault("metaclip_2_vision_model", "MetaClip2VisionModel")

# By name: where this code came with a checkpoint, config classes may be loaded twice.
_OWN = own_models()
for _model in _OWN.values():
    AutoModel.register(_model.config_class, _model, exist_ok=True)

# What transformers, the Hub and safetensors raise for what was named or asked for: no such
# model, another format, a damaged file, an attention or a library that is not there.
_REFUSALS = (OSError, ValueError, ImportError, StrictDataclassError, SafetensorError)


def tower_config(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Config of a checkpoint; published EVA-CLIP and InternViT give those read here.

    Raises:
        UniRefinerError: no such checkpoint, one with an adapter beside it, a config that
            cannot be read, an unknown model type, or a variant of those two that is not
            supported.
    """
    check_model(name_or_path)
    check_reachable(name_or_path, revision)
    with translated(f"{name_or_path} cannot be loaded", Exception):
        check_no_adapter(name_or_path, revision=revision)
        published, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
        return published_config(published) or AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )


@contextmanager
def translated(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Make what transformers and the Hub refuse inside a `UniRefinerError`.

    Args:
        what: names what was asked for, and that it cannot be had.
        kinds: of further errors, where a config that nobody checked is built.
    """
    try:
        yield
    except UniRefinerError:
        raise
    except Exception as problem:
        if not isinstance(problem, (*_REFUSALS, *kinds)):
            raise
        if "cannot be loaded with `safetensors`" in str(problem):
            raise UniRefinerError(f"{what}: {pickled_alone('it')}") from problem
        raise UniRefinerError(f"{what}: {problem}") from problem


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower with fresh weights, without the pooler its family leaves out.

    Raises:
        UniRefinerError: an unsupported family or variant.
    """
    family = family_of(config)
    _check_requirements(config, family)
    settle(config)
    own: Any = _OWN.get(config.model_type)
    if own is not None:
        return own._from_config(config)
    return AutoModel.from_config(config, **_build_options(family))


def settle(config: PreTrainedConfig) -> None:
    """Take chance out of training mode: masking, moved positions, dropped layers.

    Student and teacher are compared token by token, so a pass must not draw its own.
    """
    for field, value in family_of(config).settings:
        setattr(config, field, value)


def settle_tower(tower: PreTrainedModel) -> None:
    """`settle` for a tower in memory; its pooler goes where the family leaves it out."""
    settle(tower.config)
    for module in tower.modules():
        if type(module).__name__.endswith("DropPath"):
            module.drop_prob = 0.0  # type: ignore[assignment]
    if family_of(tower.config).without_pooler:
        tower.pooler = None  # type: ignore[assignment]


def tower_inputs(
    family: TowerFamily, pixel_values: Tensor, patch_size: int, joining: int = 0
) -> dict[str, Any]:
    """What the tower is called with.

    Args:
        pixel_values: ``(batch, 3, height, width)``, framed.
        patch_size: side of a patch in pixels.
        joining: learned register tokens that join the sequence behind the patches.
    """
    batch, _, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    device = pixel_values.device
    if family.takes_patches:
        cells = pixel_values.unflatten(3, (columns, patch_size))
        cells = cells.unflatten(2, (rows, patch_size))
        # (batch, 3, rows, patch, columns, patch) -> channels last inside a patch
        cells = cells.permute(0, 2, 4, 3, 5, 1)
        shape = torch.tensor([[rows, columns]], device=device).expand(batch, 2)
        return {
            "pixel_values": cells.flatten(3).flatten(1, 2),
            "pixel_attention_mask": torch.ones(
                batch, rows * columns + joining, dtype=torch.long, device=device
            ),
            "spatial_shapes": shape,
        }
    inputs: dict[str, Any] = {"pixel_values": pixel_values}
    if family.interpolate:
        inputs["interpolate_pos_encoding"] = True
    if family.shuffles:
        order = torch.arange(rows * columns, device=device, dtype=torch.float32)
        inputs["noise"] = order.expand(batch, -1)
    return inputs


def load_tower(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a vision tower; an image-text checkpoint gives its vision half.

    Args:
        name_or_path: Hub name or folder of a checkpoint, weights as safetensors.
        revision: branch, tag or commit on the Hub.
        dtype: dtype of the weights; None keeps that of the checkpoint.
        attn_implementation: ``sdpa``, ``eager``, ...; None leaves it to transformers.
        quantization_config: of transformers, for weights in fewer bits; None: none.
        trust_remote_code: run code that the checkpoint brings along.

    Raises:
        UniRefinerError: no such checkpoint, an unsupported family, weights that are
            pickled, damaged, missing from the checkpoint, of another shape, of no known
            part or not finite, or an attention or quantisation that is not there.
    """
    config = tower_config(
        name_or_path, revision=revision, trust_remote_code=trust_remote_code
    )
    family = family_of(config)
    dual = config.model_type in DUAL_ENCODERS
    vision: Any = config.vision_config if dual else config
    _check_requirements(vision, family)
    settle(vision)
    verbosity = logging.get_verbosity()
    # Other parts are left out on purpose; the check below replaces the report.
    logging.set_verbosity_error()
    try:
        with translated(f"{name_or_path} cannot be loaded", Exception):
            check_weights(name_or_path, revision=revision)
            tower, report = AutoModel.from_pretrained(
                name_or_path,
                config=vision,
                revision=revision,
                dtype="auto" if dtype is None else dtype,
                attn_implementation=attn_implementation,
                quantization_config=quantization_config,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported, and refused below
                output_loading_info=True,
                **_build_options(family),
            )
    finally:
        logging.set_verbosity(verbosity)
    prefix = f"{tower.base_model_prefix}."
    unknown = {str(key).removeprefix(prefix) for key in report["unexpected_keys"]}
    refuse_report(
        {**report, "unexpected_keys": unknown},
        name_or_path,
        type(tower).__name__,
        family.other_parts,
    )
    check_finite_weights(tower, name_or_path)
    check_tower(tower)
    return tower


def _build_options(family: TowerFamily) -> dict[str, Any]:
    return {"add_pooling_layer": False} if family.without_pooler else {}


def _check_requirements(config: PreTrainedConfig, family: TowerFamily) -> None:
    for field, value, reason in family.requires:
        if getattr(config, field) != value:
            raise UniRefinerError(
                f"a {config.model_type} with {field}={getattr(config, field)} is not "
                f"supported: {reason}."
            )


def check_tower(tower: PreTrainedModel) -> None:
    """Probe that a live tower is built as its family's table entry says.

    Raises:
        UniRefinerError: a part is not where the table says; names what was looked for.
    """
    config = tower.config
    family = family_of(config)
    patch_size_of(config)
    _check_requirements(config, family)
    layers = layers_of(tower, family)
    if len(layers) != config.num_hidden_layers:
        raise UniRefinerError(
            f"{type(tower).__name__} has {len(layers)} layers at {family.layers!r}, "
            f"its config says num_hidden_layers={config.num_hidden_layers}."
        )
    for layer in layers:
        part_of(layer, family.query)
        part_of(layer, family.key)
    norm = family.norm_path(config)
    if norm is not None:
        part_of(tower, norm)
    if family.pooling_head is not None and family.pools_over_patches(config):
        part_of(tower, family.pooling_head)


# The last name on purpose: `auto_registration` reads from it that this module is whole.
__all__ = [
    "build_tower",
    "check_tower",
    "load_tower",
    "settle_tower",
    "tower_config",
    "tower_inputs",
    "translated",
]
