"""Where a model is written: only what this package wrote is ever replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..modeling.errors import UniRefinerError
from .card import own_metadata
from .model_files import files_of, is_written
from .run_folder import RECORD, as_path, is_run


class ExportError(UniRefinerError, RuntimeError):
    """The checkpoint could not be written; nothing is left half-written."""


def is_ours(folder: str | Path) -> bool:
    """Whether a folder holds a model that this package wrote, and nothing else."""
    return _strange(Path(folder)) is None


def _strange(folder: Path) -> str | None:
    """Why a folder is no model of ours that may be replaced; None where it is one.

    A card alone does not tell: the weights that it names have to be there, and no file
    that we do not write.
    """
    if is_run(folder):
        return f"a run ({RECORD})"
    try:
        told = own_metadata(folder) or {}
    except UniRefinerError:
        return "a card that does not parse"
    weights = told.get("weights")
    if not isinstance(weights, dict) or not weights:
        return "no card of a model that unirefiner wrote"
    missing = [name for name in weights if not (folder / name).is_file()]
    if missing:
        return f"a card that names {missing[0]}, which is not there"
    for name in files_of(folder, hidden=True):
        if not is_written(name):
            return f"{name}, which unirefiner did not write"
    return None


def check_target(
    output: str | os.PathLike[str],
    keep: Mapping[str, Path] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """The folder that a model may be written to, links followed; nothing is changed.

    Args:
        output: new, empty, or with `overwrite` a model that this package wrote.
        keep: what it is called -> folder that has to survive, such as the run.

    Raises:
        ExportError: a file; a folder with anything else in it; one that is or holds
            something to keep, or the folder we are in.
    """
    named = as_path(output, "output")
    folder = named.resolve()
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{named} is a file: name a folder.")
    if named.is_symlink() and not folder.exists():
        raise ExportError(f"{named} is a link to nothing: name another folder.")
    for what, place in (keep or {}).items():
        if holds(folder, place):
            raise ExportError(f"{named} holds {what}: name another folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder
    strange = _strange(folder)
    if strange is not None:
        raise ExportError(
            f"{named} is not empty and holds {strange}: it is not replaced. Name another "
            "folder."
        )
    if holds(folder, Path.cwd()):
        raise ExportError(
            f"{named} is the folder this command runs in: name another folder, or run it "
            "elsewhere."
        )
    if not overwrite:
        raise ExportError(
            f"{named} is not empty, it holds a model: name another folder, or allow "
            "--overwrite."
        )
    return folder


def holds(folder: Path, place: Path) -> bool:
    """Whether `place` is a folder or lies below it, however the two are spelled."""
    if not folder.exists():
        return False
    place = place.resolve()
    return any(
        above.exists() and above.samefile(folder) for above in (place, *place.parents)
    )


def draft_of(folder: Path) -> Path:
    """An empty folder beside the one it is to replace; see `put_in_place`."""
    aside = _aside(folder)
    if aside.is_dir() and not folder.exists():
        os.replace(aside, folder)  # a replacement was cut short
    draft = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def put_in_place(draft: Path, folder: Path) -> None:
    """Let a draft take its folder's place; at every moment one of the two is on disk."""
    aside = _aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.replace(folder, aside)
    os.replace(draft, folder)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


__all__ = [
    "ExportError",
    "check_target",
    "draft_of",
    "holds",
    "is_ours",
    "put_in_place",
]
