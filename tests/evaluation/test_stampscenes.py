"""StampScenes from stand-ins for the Debian packages."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.stampscenes import build as stampscenes
from examples.stampscenes.build import CLASSES, FOLDERS, PHOTOGRAPHS, STAMPS, build

COLOURS = {"animal": (250, 0, 0), "plant": (0, 250, 0), "artifact": (0, 0, 250)}


def odd(stem):
    return int(hashlib.sha1(f"{stem}.png".encode()).hexdigest()[:8], 16) % 2 == 1


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Grey wallpapers and cut-outs in their class's colour, with decoys."""
    root = tmp_path_factory.mktemp("packages")
    for name, folders in FOLDERS.items():
        stems = [f"{letter}thing" for letter in "abcdefghijklmnopqrst"]
        for number, stem in enumerate(stems):
            folder = root / STAMPS / folders[number % len(folders)]
            folder.mkdir(parents=True, exist_ok=True)
            stamp = np.zeros((40, 60, 4), dtype=np.uint8)
            # Files of the reserved half are white: one opened would show.
            colour = COLOURS[name] if odd(stem) else (255, 255, 255)
            stamp[5:35, 10:50] = (*colour, 255)
            Image.fromarray(stamp).save(folder / f"{stem}.png")
        drawn = root / STAMPS / folders[0] / "cartoon"
        drawn.mkdir()
        white = Image.new("RGBA", (40, 40), "white")
        for stem in stems:
            white.save(drawn / f"{stem}2.png")
        for stem in stampscenes.DRAWN:
            white.save(root / STAMPS / folders[0] / f"{stem}.png")
    for parent in stampscenes.PHOTO_ROOTS:
        for number, name in enumerate(PHOTOGRAPHS):
            if ("mate" in name) == ("backgrounds" in parent):
                path = root / parent / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (320, 240), (100 + number,) * 3).save(path)
    return root


@pytest.fixture(scope="module")
def scenes(packages, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    return build(output, packages, train=12, val=8, size=64, seed=3)


def test_labels_lie_where_the_cutouts_are(scenes):
    seen = set()
    for split, count in (("train", 12), ("val", 8)):
        files = sorted((scenes / split / "images").iterdir())
        assert len(files) == count
        for file in files:
            image = np.asarray(Image.open(file)).astype(int)
            label = np.asarray(Image.open(scenes / split / "labels" / file.name))
            assert image.shape == (64, 64, 3) and label.shape == (64, 64)
            seen |= set(np.unique(label).tolist())
            assert not (image > 240).all(axis=2).any()
            for number, name in enumerate(CLASSES[1:]):
                strong = np.abs(image - COLOURS[name]).max(axis=2) < 10
                assert (label[strong] == number + 1).all()
            grey = np.ptp(image, axis=2) == 0
            assert (label[grey] == 0).mean() > 0.98
    assert seen == {0, 1, 2, 3}


def test_train_and_val_share_nothing_and_only_our_half_is_used(scenes):
    record = json.loads((scenes / "dataset.json").read_text())
    assert record["classes"] == list(CLASSES)
    train, val = record["files"]["train"], record["files"]["val"]
    assert not set(train["photographs"]) & set(val["photographs"])
    for name in COLOURS:
        assert train["stamps"][name] and val["stamps"][name]
        assert not set(train["stamps"][name]) & set(val["stamps"][name])
        for file in train["stamps"][name] + val["stamps"][name]:
            assert odd(Path(file).stem)
            assert Path(file).stem not in stampscenes.DRAWN
            assert not file.endswith("2.png")


def test_the_seed_decides(packages, scenes, tmp_path):
    again = build(tmp_path / "a", packages, train=2, val=1, size=64, seed=3)
    other = build(tmp_path / "b", packages, train=2, val=1, size=64, seed=4)
    first = (scenes / "train/images/00001.png").read_bytes()
    assert (again / "train/images/00001.png").read_bytes() == first
    assert (other / "train/images/00001.png").read_bytes() != first


def test_mirrored_and_numbered_files_stay_together():
    paths = [Path(n) for n in ("cat.png", "cat-2.png", "cat_mirror.png", "dog.png")]
    assert stampscenes._groups(paths) == [paths[:3], paths[3:]]


def test_missing_packages_name_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit):
        stampscenes.main(["--output", str(tmp_path / "o"), "--packages", str(tmp_path)])
    assert "apt-get install tuxpaint-stamps-default" in capsys.readouterr().err
