"""Data sets of `datasets`: files, folders, saved sets and the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from .folders import Contents, asked_split, look_through, split_of
from .images import ImageError
from .report import DataReport

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
FORMS = (
    "Images are taken as PIL images, or as encoded files: paths, bytes, or a column of "
    "datasets.Image. Arrays and tensors do not tell their range and channel order: turn them "
    "into images first (PIL.Image.fromarray)."
)


class FormError(ImageError):
    """What stands for an image is of a form that is not taken."""


def unread(name: str, value: Any, data: str, why: str) -> ImageError:
    """The error of an argument that does not go with the data."""
    return ImageError(f"{name} is {value!r}, and data is {data}: {why}. Leave it out.")


def check_split(split: str, data: str) -> None:
    """Refuse to choose from what has one split."""
    if split != "train":
        raise unread("data_split", split, data, "all of its images are one split")


def is_saved(path: Path) -> bool:
    """Whether `datasets` saved a set in a folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def builder_of(path: Path) -> str | None:
    """The `datasets` builder of a file, or of the tables in a folder; None: it has none.

    Raises:
        ImageError: a folder with tables of several kinds.
    """
    if path.is_file():
        return BUILDERS.get(path.suffix)
    return _table_kind(look_through(path))


def load_table(
    data: str,
    config_name: str | None,
    split: str,
    streaming: bool,
    report: DataReport | None = None,
) -> Any:
    """A `datasets` set of a file, a folder of files, a saved folder, or the Hub.

    Of a folder of tables, those of one split are read, where the names of files or folders
    tell splits as they do for `datasets`.

    Args:
        report: gets what a folder holds besides the tables that are read.

    Raises:
        ImageError: nothing there, no such split, or a configuration or split of what has
            none.
    """
    path = Path(data).expanduser()
    if path.exists():
        if config_name is not None:
            raise unread(
                "data_config", config_name, path.name, "sets on the Hub have one"
            )
        if is_saved(path):
            with _reading(path.name):
                table = datasets.load_from_disk(str(path))
            if isinstance(table, datasets.DatasetDict):
                if split not in table:
                    raise ImageError(
                        f"{path.name} has no split {split!r}; it has {', '.join(table)}."
                    )
                table = table[split]
            else:
                check_split(split, path.name)
            return table.to_iterable_dataset() if streaming else table
        builder = builder_of(path)
        if builder is None:
            raise ImageError(
                f"{path.name}: not a folder, nor one of {', '.join(BUILDERS)} files."
            )
        if path.is_file():
            check_split(split, path.name)
            files = [path]
        else:
            files = _tables_of(look_through(path), split, report)
        names = [str(file) for file in files]
        with _reading(path.name):
            return datasets.load_dataset(
                builder, data_files={"train": names}, split="train", streaming=streaming
            )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data) or data.startswith("."):
        raise ImageError(f"{data}: there is no such folder or file.")
    try:
        return datasets.load_dataset(
            data, config_name, split=split, streaming=streaming
        )
    except ValueError as problem:
        raise ImageError(f"{data}: {problem}") from problem
    except (FileNotFoundError, ConnectionError) as problem:
        raise ImageError(
            f"{data} is neither here nor to be had from the Hub: {problem}"
        ) from None


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """What `datasets` raises of files here is about the files, whatever its class."""
    try:
        yield
    except Exception as problem:
        if "corresponds to no data" in str(problem):
            raise ImageError(
                f"{name} has no rows: there is no image in it."
            ) from problem
        cause = problem.__cause__ or problem
        raise ImageError(f"{name} cannot be read as a data set: {cause}") from problem


def _table_kind(contents: Contents) -> str | None:
    kinds = sorted({path.suffix for path in contents.files} & set(BUILDERS))
    if len(kinds) > 1:
        raise ImageError(
            f"{contents.folder.name} holds {' and '.join(kinds)} files: name a folder with "
            "those of one kind."
        )
    return BUILDERS[kinds[0]] if kinds else None


def _tables_of(contents: Contents, split: str, report: DataReport | None) -> list[Path]:
    """The tables of a split; all else goes into the report."""
    folder = contents.folder
    tables = [path for path in contents.files if path.suffix in BUILDERS]
    splits = {path: split_of(path, folder) for path in tables}
    known = sorted({name for name in splits.values() if name is not None})
    passed_over, picked = dict(contents.passed_over), tables
    if not known:
        check_split(split, folder.name)
    else:
        meant = asked_split(split, known, contents)
        picked = [path for path in tables if splits[path] == meant]
        for path in tables:
            if splits[path] != meant:
                passed_over[contents.name(path)] = f"of another split than {split}"
    if report is not None:
        report.passed_over |= passed_over
        report.skipped |= contents.left_out
        for path in contents.images:
            report.skipped[contents.name(path)] = (
                f"beside {tables[0].suffix} files, which are read in its place"
            )
    return picked


def source_of(value: Any) -> Any:
    """What `load_rgb` takes of a cell: bytes, a path or an image."""
    if isinstance(value, dict):
        content = value.get("bytes")
        value = value.get("path") if content is None else content
    if value is None:
        raise ImageError("an empty cell.")
    if not isinstance(value, (str, bytes, Image.Image)):
        raise FormError(f"holds a {type(value).__name__}. {FORMS}")
    return value
