"""Which files make a model: those this package writes, and those that can change a result."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ..loading import adapter as adapter_files
from ..modeling.remote_code import CODE_FILES
from ..modeling.text_side import TEXT
from .run_folder import (
    ADAPTER,
    CARD,
    CHECKPOINT,
    EVALUATION,
    LAST,
    METRICS,
    PICTURE,
    RECORD,
    REFINER_STATE,
    TRAINER_STATE,
)

EARLIER_CODE = ("configuration_intern_vit.py", "modeling_intern_vit.py")
"""Files of code that earlier versions put beside the weights."""
_ROOT = {
    CARD,
    EVALUATION,
    PICTURE,
    RECORD,  # of a run in progress, on the main branch in earlier versions
    "config.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    *CODE_FILES,
    *EARLIER_CODE,
}
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

PICKLED = (
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"),
    *(".npy", ".npz", ".pyc"),
)
"""Endings of files that can run code as they are read."""
_CHANGING = (
    *(".safetensors", ".h5", ".msgpack", ".gguf", ".json", ".jinja", ".model"),
    *(".py", ".so", ".pyd", ".dll", ".dylib"),
    *PICKLED,
)
_CODE = (".py", ".pyc", ".so", ".pyd", ".dll", ".dylib")


_RECORDS = (METRICS, TRAINER_STATE, REFINER_STATE, adapter_files.CONFIG, "index.json")


def is_part(file: Path) -> bool:
    """Whether a file that is there belongs to a run, a model or a folder of features."""
    known = is_written(file.name) or file.name in _RECORDS
    return file.exists() and (known or file.suffix == ".safetensors")


def is_of_training(name: str) -> bool:
    """Whether a file of a repository belongs to a checkpoint of training.

    Runs in progress leave such folders there; they are no part of the model.
    """
    return "/" in name and name.startswith((LAST, CHECKPOINT))


def is_written(name: str) -> bool:
    """Whether a model's file of this name, relative to its folder, is one that we write."""
    folder, _, rest = name.rpartition("/")
    if folder == ADAPTER:
        return rest in adapter_files.FILES
    if folder == TEXT:
        return True
    return not folder and (name in _ROOT or _WEIGHTS.fullmatch(name) is not None)


def can_change(name: str) -> bool:
    """Whether a file of this name could run, or change what the model gives.

    Everything a loader may read on its own: weights in any format, code, and settings in
    the top folder, in ``adapter/`` and in ``text/``. Results of an evaluation and what is
    written for readers (the card, pictures, licences) cannot.
    """
    if name == EVALUATION or is_of_training(name):
        return False
    folder = name.partition("/")[0] if "/" in name else ""
    ending = PurePosixPath(name).suffix.lower()
    if folder == TEXT:
        return True
    if folder in ("", ADAPTER):
        return ending in _CHANGING
    return ending in _CODE


def files_of(folder: Path, *, hidden: bool = False) -> Iterator[str]:
    """Names of all files and links below a folder, relative to it.

    Args:
        hidden: those of hidden folders, too (what a client of the Hub notes down, git).
    """
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if not hidden and any(part.startswith(".") for part in name.parts[:-1]):
            continue
        if file.is_file() or file.is_symlink():
            yield name.as_posix()
