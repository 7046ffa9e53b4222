"""Build StampScenes: a segmentation set out of files that Debian packages ship.

Cut-outs of Tux Paint's stamps (photographs with exact alpha masks) are pasted on
photographs of wallpaper packages. Nobody drew the labels: they are the alpha masks.
Cut-outs and photographs of train and val are disjoint; the same seed gives the same scenes.

    python -m examples.stampscenes.build --output stampscenes

Only files whose name has an odd ``int(sha1(name)[:8], 16)`` are opened; the other half is
kept unseen, for a test of whatever was chosen on this one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

APT = (
    "apt-get install tuxpaint-stamps-default gnome-backgrounds "
    "plasma-workspace-wallpapers mate-backgrounds"
)
STAMPS = "usr/share/tuxpaint/stamps"
PHOTO_ROOTS = ("usr/share/wallpapers", "usr/share/backgrounds")
CLASSES = ("background", "animal", "plant", "artifact")
FOLDERS = {
    "animal": ("animals",),
    "plant": ("food/fruit", "food/nuts", "food/vegetables", "plants"),
    "artifact": (
        "vehicles",
        "military/vehicles",
        "household",
        "hobbies",
        "sports",
        "clothes",
        "medical",
        "town/monuments",
    ),
}
# Drawings that do not lie in a folder called cartoon, and a part of a car.
DRAWN = {
    "green_fedora",
    "hedgehog",
    "inukshuk-outline",
    "sedan_police",
    "t_glove",
    "t_poloshirt",
    "t_shirt",
    "t_tshirt",
    "tooth",
    "tophat",
}
# Wallpapers that are photographs and show no single animal, plant or artifact.
PHOTOGRAPHS = (
    "BytheWater/contents/images/2560x1600.jpg",
    "ColdRipple/contents/images/2560x1600.jpg",
    "DarkestHour/contents/images/2560x1600.jpg",
    "FallenLeaf/contents/images/2560x1600.jpg",
    "Grey/contents/images/2560x1600.jpg",
    "Kite/contents/images/2560x1600.jpg",
    "OneStandsOut/contents/images/2560x1600.jpg",
    "Path/contents/images/2560x1600.jpg",
    "mate/nature/RainDrops.jpg",
    "mate/nature/Wood.jpg",
    "summer_1am/contents/images/2560x1600.jpg",
)
TRAIN_SHARE = 0.65
PHOTO_SIDE = 800
"""Photographs are kept with this shorter side, in pixels."""


class SourceError(FileNotFoundError):
    """The packages' files are not where they are looked for."""


@dataclass(frozen=True)
class Sources:
    """Files of one split.

    Attributes:
        stamps: class name -> cut-outs.
        photographs: backgrounds.
    """

    stamps: dict[str, list[Path]]
    photographs: list[Path]


def in_our_half(path: Path) -> bool:
    """Whether the file's name hashes to the half this set may open."""
    return int(hashlib.sha1(path.name.encode()).hexdigest()[:8], 16) % 2 == 1


def find_stamps(packages: Path) -> dict[str, list[Path]]:
    """Photographic cut-outs of each class, without drawings.

    Raises:
        SourceError: the stamps are not there, or a class has fewer than 4.
    """
    root = packages / STAMPS
    if not root.is_dir():
        raise SourceError(
            f"{root}: there is no such folder. Install the packages ({APT}), or name the "
            "folder they were extracted into with --packages."
        )
    found = {}
    for name, folders in FOLDERS.items():
        paths = [
            p for folder in folders for p in sorted((root / folder).rglob("*.png"))
        ]
        found[name] = [
            path
            for path in paths
            if in_our_half(path)
            and "cartoon" not in path.parts
            and path.stem not in DRAWN
        ]
        if len(_groups(found[name])) < 4:
            raise SourceError(
                f"{root} holds {len(found[name])} cut-outs of {name!r}; at least 4 are "
                "needed. Is the package complete?"
            )
    return found


def find_photographs(packages: Path) -> list[Path]:
    """The photographs among the wallpapers.

    Raises:
        SourceError: fewer than 4 of them are there.
    """
    found = []
    for root in PHOTO_ROOTS:
        for name in PHOTOGRAPHS:
            path = packages / root / name
            if path.is_file() and in_our_half(path):
                found.append(path)
    if len(found) < 4:
        raise SourceError(
            f"{len(found)} of {len(PHOTOGRAPHS)} photographs lie below {packages}; at least "
            f"4 are needed. Install the packages: {APT}."
        )
    return found


def _groups(paths: list[Path]) -> list[list[Path]]:
    """Files that show the same thing (``rabbit``, ``rabbit-2``, ``rabbit_mirror``)."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        stem = re.sub(r"_mirror$", "", path.stem.lower())
        groups.setdefault(re.sub(r"[-_]?\d+$", "", stem), []).append(path)
    return [groups[key] for key in sorted(groups)]


def split_sources(packages: Path, seed: int) -> dict[str, Sources]:
    """Cut-outs and photographs of train and val, disjoint.

    Raises:
        SourceError: see `find_stamps` and `find_photographs`.
    """
    draw = random.Random(f"split {seed}")
    stamps: dict[str, dict[str, list[Path]]] = {"train": {}, "val": {}}
    for name, paths in find_stamps(packages).items():
        groups = _groups(paths)
        draw.shuffle(groups)
        cut = round(TRAIN_SHARE * len(groups))
        stamps["train"][name] = [path for group in groups[:cut] for path in group]
        stamps["val"][name] = [path for group in groups[cut:] for path in group]
    photographs = find_photographs(packages)
    draw.shuffle(photographs)
    cut = round(TRAIN_SHARE * len(photographs))
    return {
        "train": Sources(stamps["train"], photographs[:cut]),
        "val": Sources(stamps["val"], photographs[cut:]),
    }


class Painter:
    """Draws scenes of one split.

    Args:
        sources: cut-outs and photographs.
        size: side of a scene in pixels.
    """

    def __init__(self, sources: Sources, size: int) -> None:
        self.sources = sources
        self.size = size
        self.photographs = [_shrunk(path) for path in sources.photographs]
        self.cutouts: dict[Path, Image.Image] = {}

    def scene(self, draw: random.Random) -> tuple[Image.Image, Image.Image]:
        """One scene: 2 to 4 cut-outs on a crop of a photograph.

        Returns:
            The image, RGB, and its labels, greyscale, indices into `CLASSES`.
        """
        image = self._background(draw)
        labels = np.zeros((self.size, self.size), dtype=np.uint8)
        for _ in range(draw.randint(2, 4)):
            name = draw.choice(CLASSES[1:])
            cutout = self._placed(draw.choice(self.sources.stamps[name]), draw)
            left = draw.randint(0, self.size - cutout.width)
            top = draw.randint(0, self.size - cutout.height)
            image.paste(cutout, (left, top), cutout)
            opaque = np.asarray(cutout.getchannel("A")) >= 128
            window = labels[top : top + cutout.height, left : left + cutout.width]
            window[opaque] = CLASSES.index(name)
        return image, Image.fromarray(labels)

    def _background(self, draw: random.Random) -> Image.Image:
        photograph = draw.choice(self.photographs)
        side = int(min(photograph.size) * draw.uniform(0.4, 1.0))
        left = draw.randint(0, photograph.width - side)
        top = draw.randint(0, photograph.height - side)
        crop = photograph.crop((left, top, left + side, top + side))
        return crop.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def _placed(self, path: Path, draw: random.Random) -> Image.Image:
        """A cut-out in its scene's scale, turned a little and perhaps mirrored."""
        if path not in self.cutouts:
            with Image.open(path) as opened:
                stamp = opened.convert("RGBA")
            self.cutouts[path] = stamp.crop(_opaque_box(stamp))
        stamp = self.cutouts[path]
        longest = draw.uniform(0.3, 0.6) * self.size
        scale = longest / max(stamp.size)
        size = (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale)))
        stamp = stamp.resize(size, Image.Resampling.LANCZOS)
        if draw.random() < 0.5:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        angle = draw.uniform(-15, 15)
        return stamp.rotate(angle, Image.Resampling.BICUBIC, expand=True)


def _opaque_box(stamp: Image.Image) -> tuple[int, int, int, int]:
    opaque = stamp.getchannel("A").point(lambda alpha: 255 if alpha >= 128 else 0)
    return opaque.getbbox() or (0, 0, *stamp.size)


def _shrunk(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        photograph = opened.convert("RGB")
    scale = PHOTO_SIDE / min(photograph.size)
    if scale >= 1:
        return photograph
    size = (round(photograph.width * scale), round(photograph.height * scale))
    return photograph.resize(size, Image.Resampling.LANCZOS)


def build(
    output: Path,
    packages: Path = Path("/"),
    *,
    train: int = 240,
    val: int = 160,
    size: int = 224,
    seed: int = 0,
) -> Path:
    """Write ``{train,val}/images``, ``{train,val}/labels`` and ``dataset.json``.

    Args:
        output: folder; files of the same names are written anew.
        packages: where the packages' ``usr`` lies.
        train, val: scenes.
        size: side of a scene in pixels.

    Raises:
        SourceError: the packages' files are not there.
    """
    splits = split_sources(packages, seed)
    counts = {"train": train, "val": val}
    for split, sources in splits.items():
        painter = Painter(sources, size)
        for kind in ("images", "labels"):
            (output / split / kind).mkdir(parents=True, exist_ok=True)
        for number in range(counts[split]):
            draw = random.Random(f"{seed} {split} {number}")
            image, labels = painter.scene(draw)
            image.save(output / split / "images" / f"{number:05}.png")
            labels.save(output / split / "labels" / f"{number:05}.png")
    record = {
        "name": "StampScenes",
        "classes": list(CLASSES),
        "size": size,
        "seed": seed,
        "scenes": counts,
        "files": {
            split: {
                "stamps": {
                    name: sorted(path.name for path in paths)
                    for name, paths in sources.stamps.items()
                },
                "photographs": sorted(
                    path.relative_to(packages).as_posix()
                    for path in sources.photographs
                ),
            }
            for split, sources in splits.items()
        },
    }
    (output / "dataset.json").write_text(json.dumps(record, indent=2) + "\n")
    return output


def main(argv: list[str] | None = None) -> None:
    """Build the set from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--packages",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help=f"folder with the extracted packages (default: the system's; {APT})",
    )
    parser.add_argument("--train", type=int, default=240, help="scenes to train on")
    parser.add_argument("--val", type=int, default=160, help="scenes to measure on")
    parser.add_argument("--size", type=int, default=224, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(argv))
    try:
        print(f"The scenes are in {build(**options)}.")
    except SourceError as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main()
