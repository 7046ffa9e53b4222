"""A small ext4 disk in a file, whose power can be cut: what is on it is what was flushed.

The file system lies on a loop device, and the loop device's file is copied while a command
writes to it. What the kernel still holds in memory is not in the copy, as it would not be on
a disk without power. The command is stopped for the moment of the copy, and the file is
copied until two copies are the same, so that the kernel wrote nothing meanwhile: the copy is
of one moment. What was handed to the disk counts as kept, so a disk that loses its own cache
is not played.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEGABYTES = 48


class NoDiskError(RuntimeError):
    """This machine allows no loop devices."""


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    """Mount the disk of a file at a folder; made, with its file system, where missing.

    Raises:
        NoDiskError: not root, no loop devices, or no mkfs.ext4.
    """
    place.mkdir(parents=True, exist_ok=True)
    if not image.exists():
        with image.open("wb") as file:
            file.truncate(MEGABYTES << 20)
        _run("mkfs.ext4", "-q", str(image))
    _run("mount", "-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        try:
            _run("umount", str(place))
        except NoDiskError:  # something still has a file open there
            _run("umount", "--lazy", str(place))


def copy_of_a_moment(image: Path, copy: Path, tries: int = 50) -> None:
    """Copy a disk that nobody writes to at the moment.

    Raises:
        RuntimeError: it was written to all the time.
    """
    before = None
    for _ in range(tries):
        shutil.copyfile(image, copy)
        content = copy.read_bytes()
        if content == before:
            return
        before = content
    raise RuntimeError(f"{image} does not come to rest.")


def why_not(folder: Path) -> str | None:
    """Why no such disk can be used here, None where one can."""
    try:
        with mounted(folder / "try.img", folder / "try"):
            pass
    except NoDiskError as problem:
        return str(problem)
    finally:
        with contextlib.suppress(OSError):
            (folder / "try.img").unlink()
            (folder / "try").rmdir()
    return None


def _run(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError as problem:
        raise NoDiskError(f"there is no {words[0]}") from problem
    if done.returncode:
        raise NoDiskError(f"{words[0]}: {done.stderr.strip() or done.stdout.strip()}")
