"""One command at a time in the folder of a run."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from ..modeling.errors import UniRefinerError
from ..outputs import is_gone, write_json

logger = logging.get_logger(__name__)

LOCK, HOLDER = ".lock", ".holder.json"
"""In a run: what is locked, and who holds it while somebody does."""
PATIENCE = 15.0
"""Seconds in which a lock without a living holder gets one, or is let go."""

UNKNOWN = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What a file system answers that knows no locks."""

_held: set[tuple[Path, int]] = set()


class HeldError(UniRefinerError):
    """Another command is at work in the folder."""


@contextmanager
def holding(run: str | os.PathLike[str], command: str) -> Iterator[None]:
    """Keep other commands out of a run's folder for as long as the context lasts.

    The system lets go of the lock when the process ends, however it does. Once more in the
    same thread it changes nothing. A folder that may not be written to is not locked:
    nothing can happen to it.

    Args:
        run: made where it is missing. Of a launch with several processes the first holds.
        command: what is done, said to those who wait: ``refine``, ``merge``, ``push``.

    Raises:
        HeldError: it is held; names by whom.
    """
    folder = Path(run).resolve()
    key = (folder, threading.get_ident())
    if key in _held:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        yield
        return
    lock = FileLock(folder / LOCK)
    try:
        _acquire(lock, folder)
    except (OSError, NotImplementedError) as problem:
        if isinstance(problem, OSError) and problem.errno not in UNKNOWN:
            raise
        logger.warning(
            f"{folder} lies on a file system without locks ({problem}): nothing keeps a "
            "second command out of it. Start one at a time."
        )
        yield
        return
    _held.add(key)
    try:
        write_json(folder / HOLDER, _this_process(command))
        yield
    finally:
        _held.discard(key)
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def check_free(run: str | os.PathLike[str], command: str) -> None:
    """Refuse at once what `holding` would refuse later; leaves no trace.

    Raises:
        HeldError: it is held; names by whom.
    """
    if (Path(run) / LOCK).is_file():
        with holding(run, command):
            pass


def _acquire(lock: FileLock, folder: Path) -> None:
    """Take the lock, or say who has it.

    Between taking it and saying so a holder is unknown, and of a killed one, workers that
    read its images let go a moment later: both are waited for.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout:
            holder = _holder(folder)
        known = bool(holder) and not _is_gone(holder)
        if known or time.monotonic() > until:
            raise HeldError(
                f"{folder} is in use by {_named(holder)}. Wait for it or stop it, or name "
                "another folder."
            )
        time.sleep(0.05)


def _this_process(command: str) -> dict[str, str | int]:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "command": command,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": since,
    }


def _holder(folder: Path) -> dict[str, str | int]:
    """Empty for the moment in which it is being written."""
    try:
        told = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _named(holder: dict[str, str | int]) -> str:
    if not holder:
        return "another command"
    names = ("command", "pid", "host", "since")
    command, pid, host, since = (holder.get(name, "?") for name in names)
    return f"{command} (process {pid} on {host}, since {since})"


def _is_gone(holder: dict[str, str | int]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    return is_gone(pid)
