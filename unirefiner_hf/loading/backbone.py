"""From a name, a folder or a model to the register model a run starts from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..data.pixels import PixelReading
from ..errors import UniRefinerError, as_users
from ..modeling.configuration_unirefiner import UniRefinerConfig
from ..modeling.families import DUAL_ENCODERS, family_of, image_size_of
from ..modeling.files import check_model
from ..modeling.modeling_unirefiner import UniRefinerModel
from ..modeling.text_side import (
    NoTextSideError,
    TextSide,
    TextSideError,
    find_text_side,
    load_text_side,
)
from ..modeling.towers import load_tower, tower_config
from .arguments import BackboneArguments, both_sides
from .float8 import use_float8
from .processor import load_processor, pixel_reading
from .quantized import quantization
from .starter import LICENSE, NAME, starter_tower

logger = logging.get_logger(__name__)

Model = str | Path | PreTrainedModel
"""A Hub id or ``starter``, a folder, or a model in memory (also a `UniRefinerModel`)."""

IN_MEMORY = {
    "revision": "it names a version on the Hub",
    "trust_remote_code": "its code runs already",
    "base_quantization": "quantised weights are read from files",
    "keep_text": "text encoders are read from files",
}
"""Fields of `BackboneArguments` that a model in memory has no use for, and why."""


class BackboneError(UniRefinerError):
    """The backbone cannot be used as asked."""


@dataclass(frozen=True)
class Backbone:
    """The register model a run starts from.

    Attributes:
        name: Hub id, or the last part of a local path; safe to publish.
        reading: of pixels, as the image processor says.
        image_size: height and width in pixels.
        license: as the model's card or the user says; None if neither does.
        text_side: reads the text encoder that is kept; None where none is.
    """

    model: UniRefinerModel
    processor: BaseImageProcessor
    reading: PixelReading
    name: str
    license: str | None
    image_size: tuple[int, int]
    text_side: Callable[[], TextSide] | None = field(default=None, compare=False)


def load_backbone(
    model: Model,
    args: BackboneArguments,
    *,
    dtype: torch.dtype = torch.float32,
    num_register_tokens: int = 0,
    processor: BaseImageProcessor | None = None,
) -> Backbone:
    """The register model round a backbone, nothing in it trainable yet.

    Args:
        model: see `Model`. One in memory is copied, so that it stays as it is. Of a
            `UniRefinerModel`, in memory or saved, the backbone, the fill of its border and
            `final_norm` are taken.
        dtype: of the frozen weights.
        num_register_tokens: learned tokens that join the sequence.
        processor: its image processor; None: from the model's own files.

    Raises:
        BackboneError: the image size is off the patch grid, or unknown; the text encoder
            should be kept and cannot be; or an argument that a model in memory has no use
            for.
        ProcessorError: no image processor, or one that cannot be followed.
        QuantizationError: the base should be quantised, and bitsandbytes is missing.
        UniRefinerError: the backbone is not supported.
    """
    fill, final_norm = args.register_fill, args.final_norm
    if isinstance(model, (str, Path)):
        source, name = backbone_source(model)
        check_model(source)
        if args.revision is not None and Path(source).is_dir():
            raise BackboneError(
                f"revision is {args.revision!r}, and {name} is a folder: {IN_MEMORY['revision']}. "
                "Leave it out."
            )
        text_side = _text_side(args, source)
        refined = _read_refined(source, args)
        if refined is None:
            tower = _read_tower(model, source, args, dtype)
        else:
            fill, final_norm = _settings_of(refined, args)
            tower = bare_tower(refined).to(dtype)  # type: ignore[arg-type]
    else:
        source, name = _origin(model)
        _check_in_memory(args)
        fill, final_norm = _settings_of(model, args)
        tower = copied_tower(model, dtype, args.attn_implementation)
        text_side = None
    if processor is None:
        processor = load_processor(
            source,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
        )
    framed = UniRefinerModel.from_tower(
        tower,
        register_fill=fill,
        final_norm=takes_final_norm(tower.config) if final_norm is None else final_norm,
        num_register_tokens=num_register_tokens,
    )
    if args.teacher_float8:
        use_float8(tower)
    reading = pixel_reading(processor, tower.config, name)
    license_name = args.model_license
    if name == NAME:
        license_name = license_name or LICENSE
    return Backbone(
        model=framed,
        processor=processor,
        reading=reading,
        name=name,
        license=license_name or _license(source),
        image_size=image_size(args.image_size, tower.config, framed.patch_size),
        text_side=text_side,
    )


def backbone_source(model: str | Path) -> tuple[str, str]:
    """Where the backbone lies (folder or Hub id), and what it is called in public.

    Raises:
        BackboneError: an empty name, or a path where there is no folder.
    """
    name = str(model)
    if name in ("starter", NAME):
        return str(starter_tower()), NAME
    path = Path(name).expanduser()
    if not name.strip():
        raise BackboneError("model is empty: name a Hub id, a folder, or 'starter'.")
    if path.is_dir():
        return str(path), path.resolve().name
    if path.is_file():
        raise BackboneError(
            f"model is {name}, a file: name the folder that holds config.json and weights "
            "as safetensors."
        )
    if isinstance(model, Path) or name.startswith((".", "/", "~")):
        raise BackboneError(f"model is {name}: there is no such folder.")
    return name, name


def public_name(model: Model) -> str:
    """What a model is called in records and cards.

    Raises:
        BackboneError: see `backbone_source`; or an object of another kind.
    """
    if isinstance(model, (str, Path)):
        return backbone_source(model)[1]
    return _origin(model)[1]


def weightless_tower(model: str | Path, args: BackboneArguments) -> PreTrainedModel:
    """The backbone on the meta device, from its config.

    Raises:
        UniRefinerError: an unsupported family.
    """
    source, _ = backbone_source(model)
    config = tower_config(
        source, revision=args.revision, trust_remote_code=args.trust_remote_code
    )
    if config.model_type == UniRefinerConfig.model_type:
        config = config.vision_config
    family_of(config)
    dual = config.model_type in DUAL_ENCODERS
    with torch.device("meta"):
        return AutoModel.from_config(
            config.vision_config if dual else config,
            attn_implementation=_counted(args.attn_implementation),
            trust_remote_code=args.trust_remote_code,
        )


def weightless_backbone(
    model: Model,
    args: BackboneArguments,
    *,
    dtype: torch.dtype = torch.float32,
    num_register_tokens: int = 0,
) -> tuple[UniRefinerModel, str, tuple[int, int]]:
    """What `load_backbone` makes of the same, on the meta device: a config is enough.

    Frozen layers are neither quantised nor in float8.

    Returns:
        The register model, its backbone's name, and height and width of the images in
        pixels.

    Raises:
        UniRefinerError: as `load_backbone`, of what the config tells.
    """
    tower: Any
    fill, final_norm = args.register_fill, args.final_norm
    if isinstance(model, (str, Path)):
        name = backbone_source(model)[1]
        tower = weightless_tower(model, args)
    else:
        name = _origin(model)[1]
        _check_in_memory(args)
        fill, final_norm = _settings_of(model, args)
        inner = bare_tower(model)
        with torch.device("meta"):
            tower = type(inner)(copy.deepcopy(inner.config))
        asked = args.attn_implementation or inner.config._attn_implementation
        _set_attention(tower, _counted(asked))
    framed = UniRefinerModel.from_tower(
        tower.to(dtype),  # type: ignore[arg-type]
        register_fill=fill,
        final_norm=takes_final_norm(tower.config) if final_norm is None else final_norm,
        num_register_tokens=num_register_tokens,
    )
    return framed, name, image_size(args.image_size, tower.config, framed.patch_size)


def copied_tower(
    model: PreTrainedModel, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A copy of a model's backbone, on the CPU; the model stays as it is.

    Raises:
        BackboneError: see `bare_tower`.
    """
    copied: Any = copy.deepcopy(bare_tower(model))
    copied.to(device="cpu", dtype=dtype)
    _set_attention(copied, attn_implementation)
    return copied.train(False)


def bare_tower(model: PreTrainedModel) -> PreTrainedModel:
    """The backbone of a model: itself, its vision half, or what a border is round.

    Raises:
        BackboneError: a `UniRefinerModel` with register tokens in its sequence, or that an
            adapter is round already.
    """
    tower: Any = model
    if isinstance(model, UniRefinerModel):
        if model.config.num_register_tokens:
            raise BackboneError(
                f"The model has {model.config.num_register_tokens} register tokens in its "
                "sequence: refine the base it was made from."
            )
        tower = model.tower
    if not isinstance(tower, PreTrainedModel):
        raise BackboneError(
            f"The model's backbone is wrapped by a {type(tower).__name__}: merge its adapter "
            "first (model.tower = model.tower.merge_and_unload())."
        )
    if tower.config.model_type in DUAL_ENCODERS:
        tower = tower.vision_model
    family_of(tower.config)
    return tower


def _set_attention(tower: PreTrainedModel, name: str | None) -> None:
    if name is not None:
        with as_users("attn_implementation"):
            tower.set_attn_implementation(name)


def _counted(attention: str | None) -> str | None:
    """Flash attention of any package is counted as that of PyTorch."""
    return "sdpa" if attention is not None and "flash" in attention else attention


def takes_final_norm(config: PreTrainedConfig) -> bool:
    """Whether patch tokens go through the last norm unless said otherwise.

    Published for CLIP; MetaCLIP 2 is the same backbone.
    """
    return config.model_type in ("clip_vision_model", "metaclip_2_vision_model")


def image_size(asked: Any, config: PreTrainedConfig, patch: int) -> tuple[int, int]:
    """Height and width of the images in pixels: asked for, or of the pre-training.

    Args:
        asked: a side, height and width, or None.

    Raises:
        BackboneError: one of them does not divide into two patches or more.
    """
    if asked is None:
        asked = image_size_of(config) // patch * patch
    size = both_sides(asked)
    for side in size:
        if side == patch:
            raise BackboneError(
                f"image_size is {side}, a single patch: use {2 * patch} or more, in steps of "
                f"{patch}."
            )
        if side < patch or side % patch:
            low = max(2 * patch, side // patch * patch)
            given = " ".join(map(str, dict.fromkeys(size)))
            raise BackboneError(
                f"image_size is {given}, which does not divide into patches of {patch}: use "
                f"{low} or {low + patch} for {side}."
            )
    return size


def _read_refined(source: str, args: BackboneArguments) -> UniRefinerModel | None:
    """A checkpoint of ours to refine once more, None where it is another's."""
    place: dict[str, Any] = {
        "revision": args.revision,
        "trust_remote_code": args.trust_remote_code,
    }
    if tower_config(source, **place).model_type != UniRefinerConfig.model_type:
        return None
    if args.base_quantization is not None:
        raise BackboneError(
            f"base_quantization is {args.base_quantization!r}, and {Path(source).name} is a "
            "refined checkpoint, which is read whole. Leave it out."
        )
    return UniRefinerModel.from_pretrained(
        source, attn_implementation=args.attn_implementation, **place
    )


def _read_tower(
    model: str | Path, source: str, args: BackboneArguments, dtype: torch.dtype
) -> PreTrainedModel:
    quantised = None
    if args.base_quantization is not None:
        plain = weightless_tower(model, args)
        quantised = quantization(args.base_quantization, plain, dtype)
    return load_tower(
        source,
        revision=args.revision,
        dtype=dtype,
        quantization_config=quantised,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )


def _check_in_memory(args: BackboneArguments) -> None:
    for name, why in IN_MEMORY.items():
        if getattr(args, name):
            raise BackboneError(
                f"{name} is {getattr(args, name)!r}, and the model is in memory: {why}. Leave "
                "it out, or give the model's name or folder."
            )


def _settings_of(
    model: PreTrainedModel, args: BackboneArguments
) -> tuple[str, bool | None]:
    """Fill of the border and final norm, of the arguments or of a register model."""
    if not isinstance(model, UniRefinerModel):
        return args.register_fill, args.final_norm
    config = model.config
    untouched = args.register_fill == BackboneArguments().register_fill
    fill = config.register_fill if untouched else args.register_fill
    norm = config.final_norm if args.final_norm is None else args.final_norm
    return fill, norm


def _origin(model: PreTrainedModel) -> tuple[str, str]:
    """Where a model in memory was loaded from, if anywhere, and its public name."""
    if not isinstance(model, PreTrainedModel):
        raise BackboneError(
            f"model is a {type(model).__name__}: give a Hub id, a folder, a vision model of "
            "transformers, or a UniRefinerModel."
        )
    inner = model.tower if isinstance(model, UniRefinerModel) else model
    source = str(model.name_or_path or getattr(inner, "name_or_path", "") or "")
    if not source:
        return "", f"{model.config.model_type}-in-memory"
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path), path.resolve().name
    if path.is_absolute() or source.startswith((".", "~")):  # gone since
        return "", path.name
    return source, source


def _text_side(args: BackboneArguments, source: str) -> Callable[[], TextSide] | None:
    """What reads the text encoder at the end; found out at the start whether it can."""
    if args.keep_text is False:
        return None
    place: dict[str, Any] = {
        "revision": args.revision,
        "trust_remote_code": args.trust_remote_code,
    }
    try:
        find_text_side(source, **place)
    except TextSideError as problem:
        if args.keep_text:
            raise BackboneError(f"keep_text is true. {problem}") from problem
        if not isinstance(problem, NoTextSideError):
            logger.warning(f"The merged model will be without text: {problem}")
        return None
    return partial(load_text_side, source, **place)


def _license(source: str) -> str | None:
    """The licence in the base's own card, None where there is none to read."""
    try:
        readme = Path(source) / "README.md"
        card = ModelCard.load(readme if Path(source).is_dir() else source)
    except Exception:
        return None
    return card.data.license
