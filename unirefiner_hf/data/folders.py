"""What lies in a folder: images, other files, and what is not looked into, with reasons."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..outputs import RECORD
from .images import ImageError
from .left_out import left_out_lines

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .pnm "
    ".jp2 .j2k .jpx .jpf .avif".split()
)
"""Of files that are taken for images."""
OTHER_IMAGES = frozenset(
    ".heic .heif .hif .jxl .svg .eps .psd .tga .dds .ico .exr .hdr .raw .dng .cr2 .cr3 .nef "
    ".arw .orf .rw2 .raf .pcx .qoi .avifs".split()
)
"""Of images that are not read, and named as left out."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names of files and folders -> the split they mean, as in `datasets`."""
HIDDEN = "hidden, by the dot before its name"
LOCKED = "cannot be read"


@dataclass
class Contents:
    """A folder, searched through.

    Attributes:
        files: all that is not hidden, sorted.
        left_out: image that is not read -> reason, by its path below the folder.
        passed_over: folder that is not looked into -> reason.
    """

    folder: Path
    files: list[Path] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> list[Path]:
        """Files with an image's suffix."""
        return [path for path in self.files if path.suffix.lower() in SUFFIXES]

    def name(self, path: Path) -> str:
        """Path below the folder."""
        return path.relative_to(self.folder).as_posix()


def look_through(folder: str | Path) -> Contents:
    """Search a folder and those below it.

    Links are followed, each folder once. Left alone are hidden files and folders, and the
    folders of runs and models: their pictures are results.

    Raises:
        ImageError: the folder is missing, or that of a run or model itself.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ImageError(f"{folder}: there is no such folder.")
    if result := _result(folder):
        raise ImageError(f"{folder.name} is {result}: its pictures are no data.")
    found = Contents(folder)
    seen = {os.path.realpath(folder)}
    links: list[Path] = []
    _visit(folder, found, seen, links)
    while links:
        link = min(links)
        links.remove(link)
        real = os.path.realpath(link)
        if os.path.realpath(folder).startswith(real.rstrip(os.sep) + os.sep):
            found.passed_over[found.name(link)] = "a link to a folder around this one"
        elif real in seen:
            found.passed_over[found.name(link)] = "a link to a folder that is read"
        else:
            seen.add(real)
            _visit(link, found, seen, links)
    found.files.sort()
    return found


def list_images(folder: str | Path) -> list[Path]:
    """Image files below a folder, sorted; see `look_through`.

    Raises:
        ImageError: the folder is missing or holds no image that is read.
    """
    contents = look_through(folder)
    check_images(contents)
    return contents.images


def check_images(contents: Contents) -> None:
    """Refuse a folder without images, saying what it holds.

    Raises:
        ImageError: no image in it that is read.
    """
    if contents.images:
        return
    kinds = sorted({path.suffix.lower() or "no suffix" for path in contents.files})
    holds = f"only files with {', '.join(kinds)}" if kinds else "no files"
    lines = left_out_lines(contents.left_out, contents.passed_over)
    raise ImageError(
        " ".join([f"{contents.folder}: holds no image, {holds}.", *lines[:3]])
    )


def take_split(contents: Contents, split: str) -> bool:
    """Keep one split of a folder that holds nothing but folders named by splits.

    Returns:
        Whether it is such a folder.

    Raises:
        ImageError: it has no such split.
    """
    tops = {path.relative_to(contents.folder).parts[:-1][:1] for path in contents.files}
    names = [top[0] if top else "" for top in tops]
    if len(names) < 2 or not all(name.lower() in SPLITS for name in names):
        return False
    picked = asked_split(
        split, sorted({SPLITS[name.lower()] for name in names}), contents
    )
    for name in sorted(names):
        if SPLITS[name.lower()] != picked:
            contents.passed_over[name] = f"of another split than {split}"
    contents.files = [
        path
        for path in contents.files
        if SPLITS[path.relative_to(contents.folder).parts[0].lower()] == picked
    ]
    return True


def asked_split(split: str, known: Sequence[str], contents: Contents) -> str:
    """The split that is meant.

    Raises:
        ImageError: it is not one of `known`; names them.
    """
    meant = SPLITS.get(split, split)
    if meant not in known:
        raise ImageError(
            f"{contents.folder.name} has no split {split!r}; it has {', '.join(known)}."
        )
    return meant


def split_of(path: Path, folder: Path) -> str | None:
    """The split a file's name tells, else that of the nearest folder below `folder`."""
    below = path.relative_to(folder)
    for part in (below.stem, *reversed(below.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def _visit(place: Path, found: Contents, seen: set[str], links: list[Path]) -> None:
    try:
        entries = list(os.scandir(place))
    except OSError as problem:
        found.passed_over[found.name(place)] = f"{LOCKED} ({problem.strerror})"
        return
    for entry in entries:
        path = place / entry.name
        suffix = path.suffix.lower()
        pictured = suffix in SUFFIXES or suffix in OTHER_IMAGES
        hidden = entry.name.startswith(".")
        linked = entry.is_symlink()
        if os.path.isdir(path) if linked else entry.is_dir(follow_symlinks=False):
            reason = HIDDEN if hidden else _result(path)
            if reason:
                found.passed_over[found.name(path)] = reason
            elif linked:
                links.append(path)
            elif (real := os.path.realpath(path)) in seen:
                found.passed_over[found.name(path)] = "read by a link already"
            else:
                seen.add(real)
                _visit(path, found, seen, links)
        elif hidden:
            if pictured:
                found.left_out[found.name(path)] = HIDDEN
        elif linked and not os.path.exists(path):
            if pictured or not suffix:
                found.left_out[found.name(path)] = "a link to nothing"
        elif not os.path.isfile(path) if linked else not entry.is_file():
            if pictured:
                found.left_out[found.name(path)] = "no file"
        else:
            found.files.append(path)
            if suffix in OTHER_IMAGES:
                found.left_out[found.name(path)] = (
                    f"{suffix} images are not read: convert them to JPEG or PNG"
                )


def _result(folder: Path) -> str | None:
    """Why a folder's pictures are no data: it is a run's or a model's."""
    try:
        names = set(os.listdir(folder))
    except OSError:
        return None  # said when it is visited
    if RECORD in names:
        return f"the folder of a run (it holds {RECORD})"
    weights = any(name.endswith(".safetensors") for name in names)
    if "config.json" in names and weights:
        return "the folder of a model (it holds config.json and weights)"
    return None
