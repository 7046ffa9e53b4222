"""`extract_features`: dense features of images on disk, and reading them back lazily.

The folder holds ``features-00001.safetensors``, ... and ``index.json``, format 1::

    {
      "format": "unirefiner_hf features 1",
      "finished": true,                false while it is written, or after a stop
      "model": "dinov2-base",
      "weights_sha256": "...",         of every weight: name, dtype, shape and bytes
      "method": null, "register_width": 0,
      "size": [224, 224],              height and width every image was resized to
      "dtype": "float16",
      "mean": [...], "std": [...],     of each channel, for pixels in [0, 1]
      "resample": "bicubic",           how images were resized
      "version": "0.1.0",              of unirefiner_hf
      "images": [
        {"name": "a/1.jpg", "shard": "features-00001.safetensors", "key": "0",
         "grid": [16, 16], "original_size": [480, 640]}
      ],
      "skipped": {"a/2.jpg": "not an image ..."},
      "passed_over": {"b": "hidden ..."} folders and tables that were not read
    }

A tensor is ``(hidden, rows, columns)``, as the model's ``feature_map``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import __version__
from ..data.images import ImageError
from ..data.left_out import left_out_lines, reason_of
from ..data.sources import Images, InputError, open_images
from ..modeling.errors import UniRefinerError
from ..modeling.families import image_size_of
from ..modeling.registers import check_width
from ..outputs import OutputError, check_folder, put_in_place, write_json
from ..results import Result, Table
from .checkpoints import Checkpoint, Source, load_checkpoints, measuring

INDEX, FORMAT = "index.json", "unirefiner_hf features 1"
SHARD = re.compile(r"\.?features-\d+\.safetensors(\.unfinished)?")
DTYPES = ("float16", "bfloat16", "float32")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class FeaturesError(UniRefinerError):
    """Features cannot be written as asked, or read back."""


class Features(Result, Mapping[str, Tensor]):
    """Dense features on disk: image name -> ``(hidden, rows, columns)``, read when asked.

    Args:
        folder: what `extract_features` wrote.

    Attributes:
        index: the content of ``index.json``.

    Raises:
        FeaturesError: no such folder, another format, or one that was not finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.index = _read_index(self.folder)
        if not self.index["finished"]:
            raise FeaturesError(
                f"{self.folder} was not finished: extract again with overwrite=True."
            )
        self._entries = {entry["name"]: entry for entry in self.index["images"]}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        file = self.folder / entry["shard"]
        try:
            with safe_open(str(file), framework="pt") as shard:
                return shard.get_tensor(entry["key"])
        except (OSError, SafetensorError) as problem:
            raise FeaturesError(
                f"{file} cannot be read ({problem}): extract again with overwrite=True."
            ) from problem

    @property
    def skipped(self) -> dict[str, str]:
        """Image -> why it was left out."""
        return self.index["skipped"]

    @property
    def title(self) -> str:
        """Whose features they are."""
        return f"Features of {self.index['model']}"

    def to_dict(self) -> dict[str, Any]:
        """The content of ``index.json``."""
        return self.index

    def tables(self) -> list[Table]:
        """What was extracted, how, and what was left out."""
        index, entries = self.index, self._entries.values()
        shards = {entry["shard"] for entry in entries}
        size = sum((self.folder / shard).stat().st_size for shard in shards)
        rows = [
            ["images", str(len(self))],
            ["left out", str(len(self.skipped))],
            ["size", "{} x {} px".format(*index["size"])],
            ["grid", "{} x {}".format(*next(iter(entries))["grid"])],
            ["border of register patches", str(index["register_width"])],
            ["dtype", index["dtype"]],
            ["on disk", f"{size / 1e6:.1f} MB in {len(shards)} files"],
            ["sha256 of the weights", index["weights_sha256"]],
        ]
        notes = left_out_lines(self.skipped, self.index.get("passed_over"))
        return [Table(["features", index["model"]], rows, notes=notes)]


def extract_features(
    model: Source,
    images: Any,
    output: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    register_width: int | None = None,
    batch: int = 8,
    dtype: str = "float16",
    shard_size: str | int = "500MB",
    overwrite: bool = False,
    image_column: str | None = None,
    processing_class: Any = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Features:
    """Write a model's dense features of images to a folder of safetensors.

    A shard appears whole or not at all; the index says that the folder is finished when
    all of them are there.

    Args:
        model: see `load_checkpoint`.
        images: a folder, a path, a PIL image, a list of paths or PIL images, or a
            `datasets.Dataset`. Unreadable ones are left out and named in the index.
        output: a new or empty folder, or with `overwrite` one that this wrote before.
        size: every image is resized to it, a side in pixels or height and width, rounded
            up to patches. None: that of the backbone's pretraining.
        register_width: border of register patches; None: the model's own.
        batch: images the model takes at once.
        dtype: of the features, one of `DTYPES`.
        shard_size: of a file: bytes, or a word such as ``500MB``.
        overwrite: replace features that this wrote before.
        image_column: of a `datasets.Dataset`.
        processing_class: of a model in memory.

    Raises:
        FeaturesError: an option out of range, features too large for the dtype, or images
            none of which can be read.
        OutputError: `output` cannot be written, or holds something else.
        InputError: images of another kind.
        CheckpointMismatchError: see `load_checkpoint`.
    """
    plan = _plan(size, register_width, batch, dtype, shard_size)
    folder = _check_output(Path(output).expanduser(), overwrite)
    opened = open_images(images, image_column)
    if isinstance(model, (list, tuple)):
        raise FeaturesError(f"model is {len(model)} models; features are of one.")
    (checkpoint,) = load_checkpoints(
        model,
        device=device,
        processing_class=processing_class,
        trust_remote_code=trust_remote_code,
    )
    if register_width is not None:
        checkpoint = replace(checkpoint, register_width=register_width)
    index = _new_index(checkpoint, plan)
    index["skipped"] = dict(opened.left_out)
    index["passed_over"] = dict(opened.passed_over)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / INDEX, index)
    for old in folder.iterdir():
        if SHARD.fullmatch(old.name):
            old.unlink()
    with measuring([checkpoint]):
        _encode(checkpoint, opened, folder, index, plan)
    if not index["images"]:
        name = opened.names[0]
        raise InputError(
            f"None of the {len(opened)} images can be read: {name}: "
            f"{index['skipped'][name]}"
        )
    write_json(folder / INDEX, {**index, "finished": True})
    return Features(folder)


@dataclass(frozen=True)
class _Plan:
    """Options of an extraction, checked."""

    size: tuple[int, int] | None
    batch: int
    dtype: str
    shard_bytes: int


def _plan(
    size: Any, register_width: Any, batch: Any, dtype: Any, shard_size: Any
) -> _Plan:
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and not (
        isinstance(sides, (tuple, list))
        and len(sides) == 2
        and all(map(_counts, sides))
    ):
        raise FeaturesError(
            f"size is {size!r}; it must be a side in pixels, or height and width."
        )
    if register_width is not None:
        check_width(register_width)
    if not _counts(batch):
        raise FeaturesError(f"batch is {batch!r}; it must be 1 or more images.")
    if dtype not in DTYPES:
        raise FeaturesError(
            f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}."
        )
    sides = None if sides is None else (sides[0], sides[1])
    return _Plan(sides, batch, dtype, _bytes(shard_size))


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 1


def _bytes(size: str | int) -> int:
    if _counts(size):
        return int(size)
    found = re.fullmatch(r"(\d+) ?(KB|MB|GB)", str(size).strip().upper())
    if found is None or int(found[1]) < 1:
        raise FeaturesError(
            f"shard_size is {size!r}; it must be a number of bytes, or a word such as 500MB."
        )
    return int(found[1]) * UNITS[found[2]]


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise FeaturesError(f"{folder} holds no features: no {INDEX}.") from problem
    except ValueError as problem:
        raise FeaturesError(f"{file} is not JSON: {problem}") from problem
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise FeaturesError(f"{file} is not of the format {FORMAT!r}.")
    return index


def _check_output(folder: Path, overwrite: bool) -> Path:
    """Refuse a folder that holds anything but features, or these without `overwrite`."""
    check_folder(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder
    try:
        _read_index(folder)
    except FeaturesError as problem:
        raise OutputError(
            f"{folder} is not empty and holds no features of this package: name a new "
            "folder."
        ) from problem
    if not overwrite:
        raise OutputError(
            f"{folder} holds features, or the start of some: name another folder, or allow "
            "overwrite."
        )
    return folder


def _new_index(checkpoint: Checkpoint, plan: _Plan) -> dict[str, Any]:
    model = checkpoint.model
    side = image_size_of(model.config.vision_config)
    height, width = plan.size or (side, side)
    return {
        "format": FORMAT,
        "finished": False,
        "model": checkpoint.name,
        "weights_sha256": weights_sha256(model),
        "method": checkpoint.method,
        "register_width": checkpoint.register_width,
        "size": [checkpoint.side(height), checkpoint.side(width)],
        "dtype": plan.dtype,
        "mean": list(checkpoint.reading.mean),
        "std": list(checkpoint.reading.std),
        "resample": checkpoint.reading.resample.name.lower(),
        "version": __version__,
        "images": [],
        "skipped": {},
        "passed_over": {},
    }


def weights_sha256(model: nn.Module) -> str:
    """One sha256 of all weights in memory: name, dtype, shape and bytes of each, sorted."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class _Shards:
    """Collects tensors and writes a file whenever enough are there."""

    folder: Path
    limit: int
    held: dict[str, Tensor] = field(default_factory=dict)
    held_bytes: int = 0
    written: int = 0

    @property
    def name(self) -> str:
        """Of the file the next tensor goes into."""
        return f"features-{self.written + 1:05}.safetensors"

    def add(self, key: str, value: Tensor) -> str:
        """Take a tensor; returns the file it will lie in."""
        size = value.numel() * value.element_size()
        if self.held and self.held_bytes + size > self.limit:
            self.write()
        self.held[key] = value
        self.held_bytes += size
        return self.name

    def write(self) -> None:
        """Write what is held, whole or not at all."""
        if not self.held:
            return
        draft = self.folder / f".{self.name}.unfinished"
        save_file(self.held, draft, metadata={"format": "pt"})
        put_in_place(draft, self.folder / self.name)
        self.held, self.held_bytes = {}, 0
        self.written += 1


def _encode(
    checkpoint: Checkpoint,
    images: Images,
    folder: Path,
    index: dict[str, Any],
    plan: _Plan,
) -> None:
    """Write the features of all readable images, and fill the index."""
    shards = _Shards(folder, plan.shard_bytes)
    size = (index["size"][0], index["size"][1])
    waiting: list[tuple[str, Image.Image]] = []

    def encode() -> None:
        pixels = [checkpoint.reading(picture, size) for _, picture in waiting]
        maps = checkpoint.feature_map(torch.stack(pixels).to(checkpoint.model.device))
        for (name, picture), features in zip(waiting, maps.cpu(), strict=True):
            key = str(len(index["images"]))
            shard = shards.add(key, _cast(features, name, plan.dtype))
            entry = {
                "name": name,
                "shard": shard,
                "key": key,
                "grid": list(features.shape[1:]),
                "original_size": [picture.height, picture.width],
            }
            index["images"].append(entry)
        waiting.clear()

    title = f"features of {checkpoint.name}"
    for number, name in enumerate(tqdm(images.names, desc=title, leave=False)):
        try:
            waiting.append((name, images.load(number)))
        except ImageError as problem:
            index["skipped"][name] = reason_of(problem, name)
        if len(waiting) == plan.batch:
            encode()
    if waiting:
        encode()
    shards.write()


def _cast(features: Tensor, name: str, dtype: str) -> Tensor:
    cast = features.to(getattr(torch, dtype), copy=True).contiguous()
    if not torch.isfinite(cast).all():
        largest = features.abs().max().item()
        raise FeaturesError(
            f"{name}: features up to {largest:g} do not fit {dtype}: take bfloat16 or "
            "float32."
        )
    return cast
