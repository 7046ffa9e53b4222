"""Whether a checkpoint is whole: each file is there, and is what was written."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from ..loading import adapter as adapter_files
from ..outputs import write_json
from .digests import sha256
from .run_folder import (
    CHECKPOINT,
    REFINER_STATE,
    TRAINER_STATE,
    checkpoint_name,
    checkpoint_step,
)

MANIFEST, MANIFEST_FORMAT = "files.json", 1
"""In a checkpoint, written last: name -> bytes and sha256 of every other file."""
NEEDED = (TRAINER_STATE, REFINER_STATE, adapter_files.WEIGHTS)
"""Without them there is nothing to go on from."""


def write_manifest(checkpoint: Path) -> None:
    """Note what every file of a checkpoint holds; to be called when all are written."""
    files = {
        name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for name, file in _files(checkpoint).items()
    }
    content = {"format": MANIFEST_FORMAT, "files": files}
    write_json(checkpoint / MANIFEST, content)


def note_change(checkpoint: Path, name: str) -> None:
    """Note what a file holds that was changed on purpose, where there is a manifest."""
    manifest = _read_object(checkpoint / MANIFEST)
    if manifest is None:
        return
    file = checkpoint / name
    entry = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    files = {**manifest["files"], name: entry}
    write_json(checkpoint / MANIFEST, {**manifest, "files": files})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None where it is whole.

    By its manifest, every file is as it was written. Older checkpoints have none: there,
    what is needed exists, no file is empty, JSON parses, and safetensors files are as long
    as their headers say.
    """
    found = _files(checkpoint)
    lacking = [name for name in NEEDED if name not in found]
    if lacking:
        return f"{lacking[0]} is missing"
    if (checkpoint / MANIFEST).exists():
        return _against_manifest(checkpoint, found)
    problems = ((name, _by_itself(file)) for name, file in found.items())
    first = next(((name, problem) for name, problem in problems if problem), None)
    if first is not None:
        return f"{first[0]} {first[1]}"
    return _unread_state(checkpoint)


def newest_whole(run: Path) -> tuple[Path | None, dict[str, str]]:
    """The checkpoint to go on from, and what is wrong with those newer than it.

    Returns:
        The newest whole ``checkpoint-N``, None where there is none; name -> damage.
    """
    passed: dict[str, str] = {}
    for step in sorted(named_steps(run), reverse=True):
        folder = run / checkpoint_name(step)
        problem = damage(folder)
        if problem is None:
            return folder, passed
        passed[folder.name] = problem
    return None, passed


def named_steps(run: Path) -> list[int]:
    """Steps of every folder that is called a checkpoint, whatever is in it."""
    folders = run.glob(f"{CHECKPOINT}*")
    steps = [checkpoint_step(folder) for folder in folders if folder.is_dir()]
    return sorted(step for step in steps if step is not None)


def _files(folder: Path) -> dict[str, Path]:
    found = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    found.pop(MANIFEST, None)
    return found


def _against_manifest(checkpoint: Path, found: dict[str, Path]) -> str | None:
    manifest = _read_object(checkpoint / MANIFEST)
    listed = manifest.get("files") if manifest else None
    if not isinstance(listed, dict):
        return f"{MANIFEST} cannot be read"
    for name, entry in listed.items():
        if name not in found:
            return f"{name} is missing"
        size = found[name].stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size:,} bytes, of {entry['bytes']:,}"
        if sha256(found[name]) != entry["sha256"]:
            return f"{name} is not what was written (its sha256 differs)"
    return None


def _by_itself(file: Path) -> str | None:
    size = file.stat().st_size
    if not size:
        return "is empty"
    if file.suffix == ".json" and _read_object(file) is None:
        return "cannot be read"
    if file.suffix == ".safetensors":
        return _wrong_length(file, size)
    return None


def _wrong_length(file: Path, size: int) -> str | None:
    """Of a safetensors file: 8 bytes, a header of that length, and the tensors."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            return "is cut short"
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            ends = [h["data_offsets"][1] for n, h in header.items() if n[0] != "_"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return "has no header of safetensors"
    if size != 8 + length + max(ends, default=0):
        return "is cut short"
    return None


def _unread_state(checkpoint: Path) -> str | None:
    state = _read_object(checkpoint / TRAINER_STATE) or {}
    if state.get("global_step") != checkpoint_step(checkpoint):
        return f"{TRAINER_STATE} does not tell its step"
    state = _read_object(checkpoint / REFINER_STATE) or {}
    for name in ("lazy_channels", "skipped"):
        if name not in state:
            return f"{REFINER_STATE} does not tell {name}"
    return None


def _read_object(file: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is none to read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
