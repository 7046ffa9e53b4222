"""The tower a run starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoImageProcessor,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..methods.settings import UniRefinerSettings
from ..modeling.modeling_unirefiner import UniRefinerModel
from ..modeling.text_side import (
    NoTextSideError,
    TextSide,
    TextSideError,
    find_text_side,
    load_text_side,
)
from ..modeling.families import DUAL_ENCODERS, family_of, image_size_of
from ..modeling.towers import load_tower, tower_config
from ..training.arguments import ModelArguments
from .float8 import use_float8
from .lora import add_adapter
from .quantized import quantization
from .starter import LICENSE, NAME, starter_tower
from .unlocked import UnlockedTower, unlocked_names

logger = logging.get_logger(__name__)


class BaseError(ValueError):
    """The tower cannot be used as asked."""


@dataclass(frozen=True)
class Base:
    """The tower a run starts from.

    Attributes:
        name: Hub id, or the last part of a local path; safe to publish.
        mean, std: of each channel, as the image processor normalises.
        license: as the model's card or the user says; None if neither does.
        text_side: reads the text side that is kept; None where none is.
    """

    model: UniRefinerModel
    processor: BaseImageProcessor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    license: str | None
    image_size: int
    text_side: Callable[[], TextSide] | None = None


def load_base(
    model_args: ModelArguments,
    settings: UniRefinerSettings | None = None,
    *,
    bf16: bool = False,
) -> Base:
    """The register model round the tower the arguments name, ready to be trained.

    Args:
        settings: of the method, which says what is trained: a fresh adapter, or with
            PH-Reg some of the tower's own weights and its register tokens.

    Raises:
        BaseError: the image size is off the patch grid, or unknown; or the text side
            should be kept and cannot be.
        QuantizationError: the base should be quantised, and bitsandbytes is missing.
        ValueError: the tower is not supported.
    """
    source, name = base_source(model_args)
    license_name = model_args.model_license
    if model_args.model in ("starter", NAME):
        license_name = license_name or LICENSE
    trust = model_args.trust_remote_code
    dtype = base_dtype(model_args, bf16, settings)
    quantised = None
    if model_args.base_quantization is not None:
        quantised = quantization(
            model_args.base_quantization, tower_without_weights(model_args), dtype
        )
    tower = load_tower(
        source,
        revision=model_args.revision,
        dtype=dtype,
        quantization_config=quantised,
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=trust,
    )
    text_side = _text_side(model_args, source)
    processor = load_processor(
        source, revision=model_args.revision, trust_remote_code=trust
    )
    model, image_size = framed(tower, model_args, name, settings)
    mean, std = _normalisation(processor, name)
    return Base(
        model=model,
        processor=processor,
        mean=mean,
        std=std,
        name=name,
        license=license_name or _license(source),
        image_size=image_size,
        text_side=text_side,
    )


def load_processor(source: str, **options: Any) -> Any:
    """The image processor of a tower, which tells its normalisation.

    Args:
        source: folder or Hub id.
        options: of `AutoImageProcessor.from_pretrained`.

    Raises:
        BaseError: a folder without one.
    """
    try:
        return AutoImageProcessor.from_pretrained(source, **options)
    except OSError as error:
        if not Path(source).is_dir():
            raise
        raise BaseError(
            f"{Path(source).name} has no usable preprocessor_config.json, which tells "
            "the mean and deviation its images were normalised with. Save the processor "
            "of its training there: processor.save_pretrained(folder)."
        ) from error


def _text_side(
    model_args: ModelArguments, source: str
) -> Callable[[], TextSide] | None:
    """What reads the text side at the end; found out at the start whether it can."""
    if model_args.keep_text is False:
        return None
    place: dict[str, Any] = {
        "revision": model_args.revision,
        "trust_remote_code": model_args.trust_remote_code,
    }
    try:
        find_text_side(source, **place)
    except TextSideError as problem:
        if model_args.keep_text:
            raise BaseError(f"keep_text is true. {problem}") from problem
        if not isinstance(problem, NoTextSideError):
            logger.warning(f"The merged model will be without text: {problem}")
        return None
    return partial(load_text_side, source, **place)


def base_source(model_args: ModelArguments) -> tuple[str, str]:
    """Where the tower lies (folder or Hub id), and what it is called in public."""
    name = model_args.model
    if name in ("starter", NAME):
        return str(starter_tower()), NAME
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), path.resolve().name
    return name, name


def base_dtype(
    model_args: ModelArguments, bf16: bool, settings: UniRefinerSettings | None = None
) -> torch.dtype:
    """Type of the frozen weights; PH-Reg trains weights of the tower, in float32.

    Raises:
        BaseError: PH-Reg is asked for another type.
    """
    if settings is not None and settings.method == "ph_reg":
        _check_whole_weights(model_args)
        return torch.float32
    if model_args.base_dtype == "auto":
        return torch.bfloat16 if bf16 else torch.float32
    return getattr(torch, model_args.base_dtype)


def _check_whole_weights(model_args: ModelArguments) -> None:
    asked = {
        "base_dtype": model_args.base_dtype == "bfloat16",
        "base_quantization": model_args.base_quantization is not None,
        "teacher_float8": model_args.teacher_float8,
    }
    why = "it trains weights of the tower itself, in float32"
    _refuse(model_args, asked, "ph_reg", why)


def _check_frame(model_args: ModelArguments, method: str) -> None:
    asked = {
        "register_fill": model_args.register_fill == "learnable",
        "inference_register_width": bool(model_args.inference_register_width),
    }
    _refuse(model_args, asked, method, "it trains without a frame")


def _refuse(
    model_args: ModelArguments, asked: dict[str, bool], method: str, why: str
) -> None:
    for name, refused in asked.items():
        if refused:
            raise BaseError(
                f"{name} is {getattr(model_args, name)!r}, which does not go with method "
                f"{method}: {why}. Leave it out."
            )


def tower_without_weights(model_args: ModelArguments) -> PreTrainedModel:
    """The vision tower on the meta device, from its config.

    Raises:
        ValueError: an unsupported family.
    """
    source, _ = base_source(model_args)
    config = tower_config(
        source,
        revision=model_args.revision,
        trust_remote_code=model_args.trust_remote_code,
    )
    family_of(config)
    dual = config.model_type in DUAL_ENCODERS
    with torch.device("meta"):
        return AutoModel.from_config(
            config.vision_config if dual else config,
            attn_implementation=_attention(model_args),
            trust_remote_code=model_args.trust_remote_code,
        )


def _attention(model_args: ModelArguments) -> str | None:
    """Flash attention of any package is counted as that of PyTorch."""
    asked = model_args.attn_implementation
    return "sdpa" if asked is not None and "flash" in asked else asked


def framed(
    tower: PreTrainedModel,
    model_args: ModelArguments,
    name: str,
    settings: UniRefinerSettings | None = None,
) -> tuple[UniRefinerModel, int]:
    """The register model round a tower, ready to be trained, and its image size.

    Raises:
        BaseError: the image size is off the patch grid, or a frame is asked for that the
            method does not train.
        ValueError: PH-Reg of a tower that has no position embedding to train.
    """
    if settings is not None and settings.method != "unirefiner":
        _check_frame(model_args, settings.method)
    unlocks = settings is not None and settings.method == "ph_reg"
    model = UniRefinerModel.from_tower(
        tower,
        register_fill=model_args.register_fill,
        final_norm=_final_norm(model_args, tower),
        num_register_tokens=settings.register_tokens if settings and unlocks else 0,
    )
    image_size = _image_size(model_args.image_size, tower, model.patch_size)
    if model_args.teacher_float8:
        use_float8(tower)
    if unlocks:
        model.tower = UnlockedTower(tower, unlocked_names(tower))
        return model, image_size
    model.tower = add_adapter(
        tower,
        rank=model_args.lora_rank,
        alpha=model_args.lora_alpha,
        dropout=model_args.lora_dropout,
        name=name,
    )
    return model, image_size


def _normalisation(processor: Any, name: str) -> tuple[tuple[float, ...], ...]:
    settings = processor.to_dict()
    if not settings.get("image_mean") or not settings.get("image_std"):
        raise BaseError(
            f"The image processor of {name} states no image_mean and image_std: add them "
            "to its preprocessor_config.json."
        )
    return tuple(settings["image_mean"]), tuple(settings["image_std"])


def _final_norm(model_args: ModelArguments, tower: PreTrainedModel) -> bool:
    if model_args.final_norm is not None:
        return model_args.final_norm
    return takes_final_norm(tower.config)


def takes_final_norm(config: PreTrainedConfig) -> bool:
    """Whether patch tokens go through the last norm unless said otherwise.

    Published for CLIP; MetaCLIP 2 is the same tower.
    """
    return config.model_type in ("clip_vision_model", "metaclip_2_vision_model")


def _image_size(asked: int | None, tower: PreTrainedModel, patch: int) -> int:
    size = image_size_of(tower.config) if asked is None else asked
    if asked is None:
        size = size // patch * patch
    if size < patch or size % patch:
        low = max(patch, size // patch * patch)
        raise BaseError(
            f"image_size is {size}, which does not divide into patches of {patch}: use "
            f"{low} or {low + patch}."
        )
    return size


def _license(source: str) -> str | None:
    """The licence in the base's own card, None where there is none to read."""
    try:
        readme = Path(source) / "README.md"
        card = ModelCard.load(readme if Path(source).is_dir() else source)
    except Exception:
        return None
    return card.data.license
