"""Files that results are written to: checked early, and whole or not there at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .modeling.errors import UniRefinerError


class OutputError(UniRefinerError):
    """Something cannot be written where it should be."""


class UnwrittenError(OutputError):
    """What was measured could not be written; it is not lost.

    Attributes:
        result: what was measured.
    """

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


def check_file(path: str | Path) -> Path:
    """Refuse a path that no file can be written to, before anything is measured.

    Raises:
        OutputError: a folder, or a file in a folder that is missing or not writable.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file in it.")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}. Make it first.")
    _check_writable(path.parent)
    return path


def check_folder(path: str | Path) -> Path:
    """Refuse a path that no folder can be made at, before anything is measured.

    Raises:
        OutputError: a file, or a place that is not writable.
    """
    path = Path(path).expanduser()
    standing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not standing.is_dir():
        raise OutputError(f"{standing} is a file: name a folder.")
    _check_writable(standing)
    return path


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder} is not writable: name another place.")


def write_whole(path: str | Path, text: str) -> Path:
    """Write UTF-8 text; a reader finds the old file or the new one.

    Returns:
        The path.

    Raises:
        OutputError: see `check_file`.
    """
    path = check_file(path)
    draft = path.with_name(f".{path.name}.unfinished")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
    return path


def write_json(path: str | Path, content: Any) -> Path:
    """`write_whole` of indented JSON."""
    return write_whole(path, json.dumps(content, indent=2) + "\n")
