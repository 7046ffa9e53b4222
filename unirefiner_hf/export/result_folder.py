"""Where a model is written: only what this package wrote is ever replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..modeling.errors import UniRefinerError
from .card import own_metadata
from .model_files import files_of, is_written
from .run_folder import MERGED, RECORD, as_path, is_run


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


def check_run_folder(run: Path, base: Path | None) -> None:
    """Refuse a run's folder that its merged model could not go into at its end.

    What a folder that is no run's may hold, the trainer knows.

    Args:
        base: where the backbone lies; None where it comes from elsewhere.

    Raises:
        ExportError: the folder is the base's, or holds a ``merged/`` that is not ours.
    """
    if base is not None and run.exists() and run.samefile(base):
        raise ExportError(
            f"output_dir is {run}, the folder of the base itself: name another folder."
        )
    if is_run(run):
        keep = {} if base is None else {"the base of the run": base}
        check_target(run / MERGED, keep, overwrite=True)


def check_results(folder: Path, record: str, others: Sequence[str]) -> Path:
    """Refuse a folder in which results would write over what is not their own.

    Args:
        record: the results' own file; where it is there, all of them are ours.
        others: names of the files beside it.

    Raises:
        ExportError: a run, a model, or files of these names that are somebody else's.
    """
    if is_run(folder) or (folder / "config.json").is_file():
        raise ExportError(
            f"{folder} holds a {'run' if is_run(folder) else 'model'}: name a folder of its "
            "own for the results."
        )
    try:
        told = json.loads((folder / record).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = None
    if isinstance(told, dict) and "checkpoints" in told:
        return folder
    taken = [name for name in (record, *others) if (folder / name).exists()]
    if taken:
        raise ExportError(
            f"{folder} holds {taken[0]}, which unirefiner did not write: name another folder, "
            "or move it away."
        )
    return folder


def check_card(file: Path) -> Path:
    """Refuse to write a card over one that somebody else wrote.

    Raises:
        ExportError: it is another's.
    """
    if file.exists() and own_metadata(file.parent) is None:
        raise ExportError(
            f"{file} is a card that unirefiner did not write: name another folder, or move "
            "it away."
        )
    return file


def folder_of(model: object) -> Path | None:
    """Where a model, given by name or in memory, lies on disk; None of any other."""
    named = isinstance(model, (str, Path))
    name = str(model) if named else str(getattr(model, "name_or_path", "") or "")
    folder = Path(name).expanduser()
    return folder if name and folder.is_dir() else None


__all__ = [
    "ExportError",
    "check_card",
    "check_results",
    "check_run_folder",
    "check_target",
    "folder_of",
    "holds",
    "is_ours",
]
