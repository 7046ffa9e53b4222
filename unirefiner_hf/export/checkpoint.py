"""Merge the adapter and write the checkpoint that is published."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers.image_processing_utils import BaseImageProcessor

from ..loading.adapter import is_adapted, merge_adapter, save_adapter
from ..loading.arguments import both_sides
from ..loading.processor import resized_processor
from ..modeling.modeling_unirefiner import UniRefinerModel
from ..modeling.remote_code import save_remote_code
from ..modeling.text_side import TextSide
from ..outputs import whole_folder
from .card import CardData, render_card
from .digests import digests
from .result_folder import ExportError, check_target
from .run_folder import ADAPTER, CARD

SHARD_SIZE = "5GB"
"""Largest file of weights; bigger models are written as several."""
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Of saved weights."""


def weight_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A type that weights are saved in, by name or itself.

    Raises:
        ExportError: another type; names those there are.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ExportError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def export_refined(
    model: UniRefinerModel,
    folder: str | os.PathLike[str],
    *,
    image_processor: BaseImageProcessor,
    image_size: int | tuple[int, int],
    card: CardData,
    images: Mapping[str, Image.Image] | None = None,
    results: Mapping[str, bytes] | None = None,
    text_side: TextSide | None = None,
    dtype: torch.dtype | str = torch.float32,
    native: bool = False,
    overwrite: bool = False,
    max_shard_size: str = SHARD_SIZE,
) -> Path:
    """Write the merged model with everything its user needs.

    Weights as safetensors, a config that says the method, image processor, the adapter
    alone in ``adapter/``, a model card with the sha256 of every file that can change what
    the model gives, and the model's own code, so that it loads with
    ``trust_remote_code=True`` where this package is not installed. The text encoder of a
    dual encoder goes into ``text/`` as it is, in its own dtype: loading the model does not
    fetch it, so it costs nobody who does not want it.

    Args:
        model: the refined model; its adapter is merged in place.
        folder: appears whole or not at all.
        image_processor: of the base; saved so that it resizes to the refined size.
        image_size: of the images the model was refined on, in pixels: a side, or height
            and width.
        images: pictures the card shows, by file name.
        results: further files that lie beside the weights, by name.
        text_side: of the base; None leaves it out, as does `native`.
        dtype: of the saved weights; the merge itself is in float32.
        native: save the bare backbone, for users who pad by themselves, without border
            or code of this package; of the method its card alone tells.
        overwrite: replace a model that this package wrote there; see `check_target`.
        max_shard_size: such as ``5GB``; a larger model is saved in several files.

    Raises:
        ExportError: `image_size` is not a multiple of the patch size, a folder that is not
            ours to replace (see `check_target`), writing failed (a full disk), a `dtype` or
            `max_shard_size` that there is not, or `native` is asked of a model with register
            tokens, which the bare backbone has no place for.
    """
    if native and model.config.num_register_tokens:
        raise ExportError(
            f"The model has {model.config.num_register_tokens} register tokens in its "
            "sequence, and the bare backbone has no place for them: merge without --native."
        )
    dtype = weight_dtype(dtype)
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", str(max_shard_size), re.IGNORECASE):
        raise ExportError(
            f"max_shard_size is {max_shard_size!r}; write it as 5GB or 500MB."
        )
    size = both_sides(image_size)
    if any(side % model.patch_size for side in size):
        raise ExportError(
            f"image_size is {image_size}; it must be a multiple of the patch size "
            f"{model.patch_size}."
        )
    folder = check_target(folder, overwrite=overwrite)
    try:
        with whole_folder(folder) as draft:
            if is_adapted(model):
                save_adapter(model, draft / ADAPTER)
            merge_adapter(model, dtype)
            model.config.method = card.method.name
            saved = model.tower if native else model
            for config in (model.config, model.tower.config):
                config._name_or_path = ""
            saved.save_pretrained(draft, max_shard_size=max_shard_size)
            if not native:
                save_remote_code(draft)
                if text_side is not None:
                    text_side.save(draft, max_shard_size=max_shard_size)
            resized_processor(image_processor, size).save_pretrained(draft)
            for name, image in (images or {}).items():
                image.save(draft / name)
            for name, content in (results or {}).items():
                (draft / name).write_bytes(content)
            pictures = sorted(images or {})
            text = render_card(card, pictures, native=native, files=digests(draft))
            (draft / CARD).write_text(text, encoding="utf-8")
            for weights in draft.rglob("*.safetensors"):
                # safetensors 0.8 writes them for their owner alone.
                shutil.copymode(draft / CARD, weights)
    except (OSError, SafetensorError) as problem:
        raise ExportError(
            f"{folder.name} could not be written: {problem}. Free space or choose another "
            "folder, then merge again; the adapter is unharmed."
        ) from problem
    return folder
