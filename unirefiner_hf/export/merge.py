"""A run's adapter into a checkpoint that loads by itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..loading.adapter import CheckpointError, load_adapter
from ..loading.arguments import BackboneArguments
from ..loading.backbone import Backbone, Model
from ..loading.base_digest import base_sha256
from ..loading.starter import NAME as STARTER
from ..methods.base import load_trainable
from ..modeling.registers import check_width
from ..results import Result, Table
from .card import card_from_record
from .checkpoint import SHARD_SIZE, export_refined, weight_dtype
from .holding import holding
from .result_folder import ExportError, check_target, folder_of
from .run_folder import (
    EVALUATION,
    RECORD,
    RunFolder,
    RunFolderError,
    checkpoint_step,
    folder_of_run,
    read_evaluation,
    read_run,
)
from .whole import damage

logger = logging.get_logger(__name__)

BASE_KEYS = (
    "image_size",
    "final_norm",
    "register_fill",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
)


@dataclass(frozen=True)
class Merged(Result):
    """A checkpoint that was written.

    Attributes:
        folder: what `AutoModel` loads.
        base: name of the backbone.
        method: name of the method.
        register_width: border of registers in patches.
        files: names relative to the folder -> bytes.
    """

    folder: Path
    base: str
    method: str
    register_width: int
    files: dict[str, int]

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return f"The merged model is in {self.folder}."

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "folder": str(self.folder),
            "base": self.base,
            "method": self.method,
            "register_width": self.register_width,
            "files": dict(self.files),
        }

    @property
    def title(self) -> str:
        """What was written."""
        return f"{self.base}, merged ({self.method})"

    def tables(self) -> list[Table]:
        """The files."""
        rows = [(name, f"{size:,}") for name, size in self.files.items()]
        return [Table(("file", "bytes"), rows)]


def merge(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: Model | None = None,
    processing_class: BaseImageProcessor | None = None,
    model_license: str | None = None,
    register_width: int | None = None,
    keep_text: bool | None = None,
    dtype: torch.dtype | str = torch.float32,
    native: bool = False,
    overwrite: bool = False,
    max_shard_size: str = SHARD_SIZE,
    pictures: bool = False,
    trust_remote_code: bool = False,
) -> Merged:
    """Load a run's base in float32, put its adapter on, merge, and write the result.

    Args:
        run: as in `read_run`.
        output: folder of the checkpoint; see `export_refined`, as for the other options.
        model: the base, where it is not the recorded Hub name; see `load_backbone`.
        processing_class: its image processor, of a base in memory.
        model_license: of the base, where the run does not know it.
        register_width: border of the published model in patches; None: the run's.
        keep_text: keep the base's text encoder; None: as the run was asked to. A native
            export keeps none.
        pictures: put ``before_after.png`` beside the weights and into the card; it shows
            images of the training set.
        trust_remote_code: run the base repository's own code.

    Raises:
        RunFolderError: as `read_run`; the base is not known where it lies; its weights
            are not those the run started from; or the adapter does not fit it.
        HeldError: another command is at work in the run's folder.
        ExportError: a border for a method that has none, a text encoder in a native export,
            an output that holds the run or its base; or see `export_refined`.
    """
    dtype = weight_dtype(dtype)
    output = check_output(read_run(run), output, model, overwrite=overwrite)
    with holding(folder_of_run(run), "merge"):
        found = read_run(run)
        base = load_refined(
            found,
            model,
            model_license,
            register_width,
            keeps_text(keep_text, native=native),
            processing_class,
            trust_remote_code,
        )
        folder = export_run(
            found,
            base,
            output,
            dtype=dtype,
            native=native,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            pictures=pictures,
        )
    return written_checkpoint(folder, base, native=native)


def keeps_text(asked: bool | None, *, native: bool) -> bool | None:
    """Whether to keep the text encoder; None: as the run was asked to.

    Raises:
        ExportError: it is asked for in a native export, which has no place for it.
    """
    if native and asked:
        raise ExportError(
            "keep_text is true, and a native export is the vision backbone alone: leave "
            "one of the two out."
        )
    return False if native else asked


def check_output(
    run: RunFolder,
    output: str | os.PathLike[str],
    model: Model | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """The folder that a run's model may be written to; see `check_target`.

    Raises:
        ExportError: it holds the run, its adapter or its base, or what we did not write.
    """
    keep = {"the run itself": run.adapter, "its record": run.folder / RECORD}
    base = folder_of(run.record["model"]["base"] if model is None else model)
    if base is not None:
        keep["the base of the run"] = base
    return check_target(output, keep, overwrite=overwrite)


def written_checkpoint(folder: Path, base: Backbone, *, native: bool = False) -> Merged:
    """What a folder holds that `export_refined` wrote."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    config = base.model.config
    return Merged(
        folder=folder,
        base=base.name,
        method=str(config.method),
        register_width=0 if native else config.register_width,
        files={f.relative_to(folder).as_posix(): f.stat().st_size for f in files},
    )


def load_refined(
    run: RunFolder,
    model: Model | None = None,
    model_license: str | None = None,
    register_width: int | None = None,
    keep_text: bool | None = None,
    processing_class: BaseImageProcessor | None = None,
    trust_remote_code: bool = False,
) -> Backbone:
    """The refined model of a run, its adapter not merged; arguments as in `merge`.

    What is asked for goes into the record too, for the card.

    Raises:
        RunFolderError, ExportError: see `merge`.
    """
    _check_register_width(run, register_width)
    if model_license is not None:
        run.record["model"]["license"] = model_license
    base = _load(run, model, keep_text, processing_class, trust_remote_code)
    run.record["model"]["license"] = base.license
    config = base.model.config
    config.register_width = _register_width(run, register_width, base)
    run.record["model"]["register_width"] = config.register_width
    return base


def export_run(
    run: RunFolder,
    base: Backbone,
    output: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    pictures: bool = False,
    **options: Any,
) -> Path:
    """Merge what `load_refined` gave and write it; options as of `export_refined`.

    Args:
        repo_id: where it will be on the Hub; None where that is not known.
        pictures: see `merge`.
    """
    shown = run.pictures if pictures else ()
    entries, results = [], {}
    if run.evaluation is not None:
        results[EVALUATION] = run.evaluation.read_bytes()
        entries = read_evaluation(run.evaluation)
    width = 0 if options.get("native") else base.model.config.register_width
    other = [entry for entry in entries if entry["register_width"] != width]
    if other:
        logger.warning(
            f"{len(other)} evaluations are not in the card: they were made with another "
            f"border than the {width} patches of this model."
        )
    entries = [entry for entry in entries if entry["register_width"] == width]
    return export_refined(
        base.model,
        output,
        image_processor=base.processor,
        image_size=base.image_size,
        card=card_from_record(run.record, entries, repo_id),
        images={picture.name: Image.open(picture) for picture in shown},
        results=results,
        text_side=None if base.text_side is None else base.text_side(),
        **options,
    )


def _load(
    run: RunFolder,
    model: Model | None,
    keep_text: bool | None,
    processing_class: BaseImageProcessor | None,
    trust_remote_code: bool,
) -> Backbone:
    recorded = run.record["model"]
    name = recorded["base"]
    if model is None and "/" not in name and name != STARTER:
        raise RunFolderError(
            f"The run started from a local model called {name!r}: say where it lies with "
            "--model."
        )
    settings = run.settings
    keys = [key for key in BASE_KEYS if key not in settings.unread]
    lacking = [key for key in keys if key not in recorded]
    if lacking:
        raise RunFolderError(
            f"{RECORD} does not tell {', '.join(lacking)} of the model: put back the record "
            "that the run wrote."
        )
    in_memory = model is not None and not isinstance(model, (str, Path))
    arguments = BackboneArguments(
        # Another place holds what was downloaded, not the Hub's versions.
        revision=recorded.get("revision") if model in (None, name) else None,
        trust_remote_code=trust_remote_code,
        model_license=recorded["license"],
        base_dtype="float32" if "base_dtype" not in settings.unread else "auto",
        keep_text=_keeps_text(recorded, keep_text, in_memory),
        **{key: recorded[key] for key in keys},
    )
    source = name if model is None else model
    _check_whole(run)
    try:
        base = load_trainable(source, arguments, settings, processor=processing_class)
        _check_base(run, base)
        load_adapter(base.model, run.adapter)
    except CheckpointError as problem:
        called = source if isinstance(source, (str, Path)) else "The model in memory"
        raise RunFolderError(
            f"{called} is not the base of this run, which is {name}: {problem}"
        ) from problem
    if hasattr(base.model.tower, "peft_config"):
        base.model.tower.peft_config["default"].base_model_name_or_path = name
    return base


def _check_whole(run: RunFolder) -> None:
    """Refuse a checkpoint that is damaged."""
    folder = run.adapter
    problem = None if checkpoint_step(folder) is None else damage(folder)
    if problem is not None:
        raise RunFolderError(
            f"{folder} is not whole: {problem}. Name another checkpoint of the run."
        )


def _check_base(run: RunFolder, base: Backbone) -> None:
    """Refuse a base whose weights have changed since; older records do not tell.

    Bits of a quantised base say nothing of the weights they were made from.
    """
    recorded = run.record["model"].get("sha256")
    quantised = run.record["training"].get("base_quantization") is not None
    if recorded is None or quantised:
        return
    found = base_sha256(base.model)
    if found != recorded:
        raise RunFolderError(
            f"{base.name} is not the base of this run, which is "
            f"{run.record['model']['base']}: its weights have the sha256 {found[:16]}, and "
            f"the run started from {recorded[:16]}. Name the model as it was, or the "
            "revision."
        )


def _keeps_text(
    recorded: dict[str, Any], asked: bool | None, in_memory: bool
) -> bool | None:
    """As asked, else as the run did; of a base in memory none is kept."""
    if asked is not None or in_memory:
        return asked
    return recorded.get("keep_text")


def _check_register_width(run: RunFolder, asked: int | None) -> None:
    if asked is None:
        return
    check_width(asked)
    if asked and not run.settings.has_border:
        raise ExportError(
            f"register_width is {asked}, and method {run.settings.name} trains without a "
            "border of registers: leave it out."
        )


def _register_width(run: RunFolder, asked: int | None, base: Backbone) -> int:
    """Asked for, recorded at the end of the run, or that of training."""
    recorded = run.record["model"]
    if asked is not None:
        return asked
    for key in ("register_width", "inference_register_width"):
        if recorded.get(key) is not None:
            return recorded[key]
    if not run.settings.has_border:
        return 0
    side = min(base.image_size) // base.model.patch_size
    return max(1, side // recorded["register_factor"])
