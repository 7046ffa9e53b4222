"""The sha256 of every file of a folder that can change what its model gives."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .model_files import can_change, files_of


def sha256(file: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Path relative to the folder -> sha256, of every file that `can_change` a result."""
    return {
        name: sha256(folder / name) for name in files_of(folder) if can_change(name)
    }


def is_weights(name: str) -> bool:
    """Whether a file that this package wrote holds weights."""
    return name.endswith(".safetensors")
