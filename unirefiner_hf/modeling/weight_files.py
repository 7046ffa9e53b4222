"""Weights are read from safetensors alone, by every way a model is loaded.

A pickle can run code as it is read. transformers would read one where there is nothing else,
where an index or a config names it, and from an adapter that lies beside a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from transformers.utils import cached_file, has_file

from .errors import UniRefinerError
from .files import ADAPTER, INDEX, WEIGHTS, read_json

SAFE = (".safetensors", ".safetensors.index.json")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin.index.json")
EXPLICIT = "transformers_weights"
"""Field of a config that names the file of its weights."""
PLACE = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
"""Arguments of `from_pretrained` that say where files are."""


class WeightFilesError(UniRefinerError):
    """The weights are pickled, missing, or of two models at once."""


def find_file(name_or_path: str, file: str, **place: Any) -> str | None:
    """Where a file of a checkpoint is; None where it has none of this name."""
    return cached_file(
        name_or_path, file, _raise_exceptions_for_missing_entries=False, **place
    )


def _peek(name_or_path: str, file: str, place: dict[str, Any]) -> str | None:
    """`find_file` that leaves it to the loader to say that the Hub cannot be reached."""
    return cached_file(
        name_or_path,
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **place,
    )


def check_no_adapter(name_or_path: str, **place: Any) -> None:
    """Refuse a checkpoint with an adapter beside it, which transformers would put on.

    Raises:
        WeightFilesError: says how to get either of the two models.
    """
    if _peek(name_or_path, ADAPTER, place) is not None:
        raise WeightFilesError(
            f"{name_or_path} holds an adapter ({ADAPTER}) in the place of a backbone: for "
            "the backbone alone, use a folder without the adapter's files; for both in one, "
            "merge them first: PeftModel.from_pretrained(backbone, folder)"
            ".merge_and_unload().save_pretrained(new_folder)."
        )


def check_weights(name_or_path: str, **place: Any) -> None:
    """Refuse weights that would be unpickled, and a folder without weights.

    Args:
        name_or_path: Hub id or folder.
        place: of `PLACE`.

    Raises:
        WeightFilesError: names the file, and how to convert it.
    """
    check_no_adapter(name_or_path, **place)
    indices = [INDEX]
    for named in _named_by_config(name_or_path, place):
        if not str(named).endswith(SAFE):
            raise WeightFilesError(
                f"The config of {name_or_path} names {named!r} as its weights ({EXPLICIT}), "
                "which is no safetensors file: pickled weights can run code. Take the field "
                "out, and convert the weights."
            )
        if named.endswith(".index.json"):
            indices.append(named)
    for index in indices:
        _check_index(name_or_path, index, place)
    if os.path.isdir(name_or_path):
        _check_there(Path(name_or_path, place.get("subfolder") or ""))
    elif not is_offline_mode():
        _check_on_hub(name_or_path, place)


def _named_by_config(name_or_path: str, place: dict[str, Any]) -> Iterator[Any]:
    """Every value of `EXPLICIT` in a config, those of its parts among them."""
    file = _peek(name_or_path, "config.json", place)
    if file is None:
        return
    left: list[Any] = [read_json(file)]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            if part.get(EXPLICIT) is not None:
                yield part[EXPLICIT]
            left.extend(part.values())


def _check_index(name_or_path: str, index: str, place: dict[str, Any]) -> None:
    file = _peek(name_or_path, index, place)
    if file is None:
        return
    named = read_json(file).get("weight_map")
    if not isinstance(named, dict):
        raise WeightFilesError(f"{index} of {name_or_path} names no files.")
    for shard in sorted(set(map(str, named.values()))):
        if not shard.endswith(".safetensors") or os.path.basename(shard) != shard:
            raise WeightFilesError(
                f"{index} of {name_or_path} names {shard!r}, which is no safetensors file "
                "beside it: pickled weights can run code. Use the model as it was published."
            )


def _check_there(folder: Path) -> None:
    """Say rightly why a folder has no weights to load."""
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        return
    if any(file.suffix == ".safetensors" for file in folder.iterdir()):
        return  # under a name that its own loader may know
    pickled = sorted(f.name for f in folder.iterdir() if f.name.endswith(PICKLED))
    if not pickled:
        raise WeightFilesError(f"{folder} holds no weights: there is no {WEIGHTS}.")
    raise WeightFilesError(pickled_alone(str(folder), ", ".join(pickled[:3])))


def _check_on_hub(name: str, place: dict[str, Any]) -> None:
    """Say so where a repository's weights are pickled; transformers would ask a service to
    convert them, and take what another hand proposes there.
    """
    if any(_peek(name, file, place) is not None for file in (WEIGHTS, INDEX)):
        return
    options = {k: v for k, v in place.items() if k != "subfolder"}
    below = f"{place['subfolder']}/" if place.get("subfolder") else ""
    for file in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if has_file(name, f"{below}{file}", **options):
            raise WeightFilesError(pickled_alone(name, file))


def pickled_alone(name_or_path: str, files: str = ".bin") -> str:
    """What to say of a checkpoint whose weights are pickled."""
    return (
        f"{name_or_path} holds no safetensors, and pickled weights ({files}) can run code. "
        "Convert them once: for each .bin file, "
        "safetensors.torch.save_file(torch.load(file, weights_only=True), "
        "file_with_safetensors_ending, metadata={'format': 'pt'}), and rename the files in "
        "the index likewise."
    )


__all__ = [
    "WeightFilesError",
    "check_no_adapter",
    "check_weights",
    "find_file",
    "pickled_alone",
]
