"""Read a finished or stopped run back, to merge it."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers.utils import logging

from ..evaluation.results import FILE as EVALUATION
from ..evaluation.results import read_results
from ..loading.base import Base, load_base
from ..loading.starter import NAME as STARTER
from ..methods.settings import UniRefinerSettings
from ..training.arguments import ModelArguments
from ..training.trainer import (
    ADAPTER_WEIGHTS,
    CheckpointError,
    load_adapter,
    read_refiner_state,
)
from .card import card_from_record
from .checkpoint import ADAPTER, SHARD_SIZE, export_refined

logger = logging.get_logger(__name__)

RECORD = "run.json"
PICTURE = "before_after.png"
BASE_KEYS = (
    "image_size",
    "final_norm",
    "register_fill",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
)


class RunFolderError(ValueError):
    """The folder holds no run that could be merged, or not of this base."""


@dataclass(frozen=True)
class RunFolder:
    """An adapter on disk and the record of the run it belongs to.

    Attributes:
        record: the content of ``run.json``; of a checkpoint, without what was only
            known or measured at the end.
        adapter: folder of the adapter.
        pictures: files the card shows.
        evaluation: results of `unirefiner evaluate` on the run's merged model, if any.
    """

    record: dict[str, Any]
    adapter: Path
    pictures: tuple[Path, ...]
    evaluation: Path | None = None


def read_run(folder: str | Path) -> RunFolder:
    """Find the adapter and the record of a run.

    Args:
        folder: a finished run, or a ``checkpoint-N`` inside a run.

    Raises:
        RunFolderError: no record, no adapter, or a run that is not finished (names its
            checkpoints).
    """
    folder = Path(folder).absolute()
    checkpoint = folder.name.removeprefix("checkpoint-")
    is_checkpoint = folder.name.startswith("checkpoint-") and checkpoint.isdigit()
    run = folder.parent if is_checkpoint else folder
    if not (run / RECORD).is_file():
        raise RunFolderError(
            f"{folder} is not a run: there is no {run / RECORD}. Name the output_dir of "
            "a refinement, or a checkpoint-N inside it."
        )
    record = json.loads((run / RECORD).read_text(encoding="utf-8"))
    adapter = folder if is_checkpoint else run / ADAPTER
    if not is_checkpoint and not record["finished"]:
        raise RunFolderError(
            f"{run} is not finished: continue it with --resume, or merge one of its "
            f"checkpoints ({_checkpoints(run)})."
        )
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise RunFolderError(f"{adapter} holds no {ADAPTER_WEIGHTS}.")
    if is_checkpoint:
        record = _at_checkpoint(record, int(checkpoint))
        skipped = read_refiner_state(folder)["skipped"]
        record["data"].setdefault("skipped", skipped)
    picture = run / PICTURE
    shown = picture.is_file() and not is_checkpoint
    measured = run / "merged" / EVALUATION
    return RunFolder(
        record,
        adapter,
        (picture,) if shown else (),
        measured if measured.is_file() and not is_checkpoint else None,
    )


def _checkpoints(run: Path) -> str:
    folders = sorted(run.glob("checkpoint-*"), key=lambda f: int(f.name.split("-")[1]))
    return ", ".join(folder.name for folder in folders) or "it has none yet"


def _at_checkpoint(record: dict[str, Any], step: int) -> dict[str, Any]:
    """The record as of a checkpoint: nothing that was measured at another step."""
    record = copy.deepcopy(record)
    record["training"].update(steps=step, seconds=None)
    record.update(losses={}, spurious_shares=None)
    return record


def merge_run(
    folder: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    model_license: str | None = None,
    register_width: int | None = None,
    keep_text: bool | None = None,
    dtype: torch.dtype = torch.float32,
    native: bool = False,
    overwrite: bool = False,
    max_shard_size: str = SHARD_SIZE,
) -> Path:
    """Load a run's base in float32, put its adapter on, merge, and write the result.

    Args:
        folder: as in `read_run`.
        output: folder of the checkpoint; see `export_refined`, as for the last four.
        model: Hub name or folder of the base, where it is not the recorded Hub name.
        model_license: of the base, where the run does not know it.
        register_width: frame of the published model in patches; None: the run's.
        keep_text: keep the base's text side; None: as the run was asked to.

    Returns:
        The folder written.

    Raises:
        RunFolderError: as `read_run`; the base is not known where it lies; or the
            adapter does not fit it.
        ExportError: see `export_refined`.
    """
    run = read_run(folder)
    kept = False if native else keep_text
    base = load_refined(run, model, model_license, register_width, kept)
    return export_run(
        run,
        base,
        output,
        dtype=dtype,
        native=native,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
    )


def load_refined(
    run: RunFolder,
    model: str | None = None,
    model_license: str | None = None,
    register_width: int | None = None,
    keep_text: bool | None = None,
) -> Base:
    """The refined model of a run, its adapter not merged; arguments as in `merge_run`.

    What is asked for goes into the record too, for the card.

    Raises:
        RunFolderError: see `merge_run`.
    """
    if model_license is not None:
        run.record["model"]["license"] = model_license
    base = _load(run, model, keep_text)
    run.record["model"]["license"] = base.license
    config = base.model.config
    config.register_width = _register_width(run, register_width, base)
    run.record["model"]["register_width"] = config.register_width
    return base


def export_run(
    run: RunFolder,
    base: Base,
    output: str | Path,
    *,
    repo_id: str | None = None,
    **options: Any,
) -> Path:
    """Merge what `load_refined` gave and write it; options as of `export_refined`.

    Args:
        repo_id: where it will be on the Hub; None where that is not known.
    """
    entries, results = [], {}
    if run.evaluation is not None:
        results[EVALUATION] = run.evaluation.read_bytes()
        entries = read_results(run.evaluation)
    width = 0 if options.get("native") else base.model.config.register_width
    other = [entry for entry in entries if entry["register_width"] != width]
    if other:
        logger.warning(
            f"{len(other)} evaluations are not in the card: they were made with another "
            f"frame than the {width} patches of this model."
        )
    entries = [entry for entry in entries if entry["register_width"] == width]
    return export_refined(
        base.model,
        output,
        image_processor=base.processor,
        image_size=base.image_size,
        card=card_from_record(run.record, entries, repo_id),
        images={picture.name: Image.open(picture) for picture in run.pictures},
        results=results,
        text_side=None if base.text_side is None else base.text_side(),
        **options,
    )


def _load(run: RunFolder, model: str | None, keep_text: bool | None) -> Base:
    recorded = run.record["model"]
    name = recorded["base"]
    if model is None and "/" not in name and name != STARTER:
        raise RunFolderError(
            f"The run started from a local model called {name!r}: say where it lies with "
            "--model."
        )
    arguments = ModelArguments(
        model=name if model is None else model,
        revision=recorded["revision"] if model is None else None,
        model_license=recorded["license"],
        base_dtype="float32",
        keep_text=recorded.get("keep_text") if keep_text is None else keep_text,
        **{key: recorded[key] for key in BASE_KEYS},
    )
    try:
        base = load_base(arguments, _settings(run.record["method"]))
        load_adapter(base.model, run.adapter)
    except CheckpointError as problem:
        raise RunFolderError(
            f"{arguments.model} is not the base of this run, which is {name}: {problem}"
        ) from problem
    if isinstance(base.model.tower, PeftModel):
        base.model.tower.peft_config["default"].base_model_name_or_path = name
    return base


def _settings(method: dict[str, Any]) -> UniRefinerSettings:
    """What decides the shape of the trained weights; older records lack some of it."""
    tokens = {k: v for k, v in method.items() if k == "register_tokens"}
    return UniRefinerSettings(method=method["name"], **tokens)


def _register_width(run: RunFolder, asked: int | None, base: Base) -> int:
    """Asked for, recorded at the end of the run, or that of training."""
    recorded = run.record["model"]
    if asked is not None:
        return asked
    for key in ("register_width", "inference_register_width"):
        if recorded.get(key) is not None:
            return recorded[key]
    if run.record["method"]["name"] in ("plain", "ph_reg"):
        return 0
    side = base.image_size // base.model.patch_size
    return max(1, side // recorded["register_factor"])
