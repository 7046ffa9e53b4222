"""The sha256 of every weight file of a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .run_folder import CHECKPOINT, LAST


def sha256(file: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_of_training(name: str) -> bool:
    """Whether a file of a repository belongs to a checkpoint of training.

    Runs in progress leave such folders there; they are no part of the model.
    """
    return "/" in name and name.startswith((LAST, CHECKPOINT))


def weight_digests(folder: Path) -> dict[str, str]:
    """Path relative to the folder -> sha256, of every safetensors file below it."""
    files = sorted(folder.rglob("*.safetensors"))
    names = [file.relative_to(folder).as_posix() for file in files]
    return {
        name: sha256(file)
        for name, file in zip(names, files, strict=True)
        if not is_of_training(name)
    }
