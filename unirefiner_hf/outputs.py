"""Files and folders that results are written to: checked early, whole or not there at all.

What appears under its name is on the disk: every file and every folder is flushed before
the rename that publishes it, so that a kill, a full disk or a power cut leaves the old or
the new, never half of one.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .modeling.errors import UniRefinerError

UNFINISHED = ".unfinished"
"""End of the name of what is being written; its start is a dot."""
REPLACED = ".replaced"
"""End of the name of a folder on its way out."""
RECORD = "run.json"
"""In a run's folder, its own account; what tells the folder of a run from any other."""


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


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write bytes, or text as UTF-8; a reader finds the old file or the new one.

    Returns:
        The path.

    Raises:
        OutputError: see `check_file`.
        OSError: the disk is full, or fails; the old file stays.
    """
    path = check_file(path)
    draft = _draft(path)
    raw = content.encode("utf-8") if isinstance(content, str) else content
    try:
        draft.write_bytes(raw)
        put_in_place(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, content: Any) -> Path:
    """`write_whole` of indented JSON."""
    return write_whole(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A draft to write into, which takes the folder's place, or nothing's, at the end.

    What was in the folder is gone then: ask first whether it may be. After an error the
    folder is as it was, and the draft is gone.

    Raises:
        OSError: the disk is full, or fails.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(folder)
    try:
        draft.mkdir()
        yield draft
        put_in_place(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def put_in_place(draft: Path, folder: Path) -> None:
    """Flush what is written, and give it its name; what had the name goes.

    Args:
        draft: a folder, or a file, on the same file system.

    Raises:
        OSError: the disk is full, or fails.
    """
    flush_tree(draft)
    if draft.is_file() or not folder.exists():
        os.replace(draft, folder)
        flush(folder.parent)
        return
    old = folder.parent / f".{folder.name}{REPLACED}"
    shutil.rmtree(old, ignore_errors=True)
    if _exchange(draft, folder):
        os.replace(draft, old)
    else:
        os.replace(folder, old)
        os.replace(draft, folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    """Have a file, or a folder with everything below it, on the disk."""
    if folder.is_file():
        flush(folder)
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            flush(Path(parent) / name)
        flush(Path(parent))


def flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk.

    Raises:
        OSError: the disk is full, or fails.
    """
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # its folders cannot be opened
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        # Some network file systems keep names by themselves and say so.
        if not is_folder or problem.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def is_gone(pid: int) -> bool:
    """Whether no process of this machine has a number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        return False
    return False


def _draft(path: Path) -> Path:
    """Where this process writes what will be called `path`.

    Two processes write beside each other, and the last to end has the name. What killed
    ones left goes.
    """
    for old in path.parent.glob(f".{glob.escape(path.name)}.*{UNFINISHED[1:]}"):
        pid = old.name.removeprefix(f".{path.name}.").removesuffix(UNFINISHED)
        if pid.isdigit() and int(pid) != os.getpid() and not is_gone(int(pid)):
            continue
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot.

    Without it there is a moment between two renames in which neither has the name.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return not renameat2(here, os.fsencode(one), here, os.fsencode(other), swap)
