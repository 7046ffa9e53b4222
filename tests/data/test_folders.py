"""Exactly the images asked for; whatever is not used is named once, with its reason."""

import os

import pytest
from PIL import Image

from unirefiner_hf.data import folders
from unirefiner_hf.data.folders import list_images, look_through
from unirefiner_hf.data.images import ImageError
from unirefiner_hf.data.labelled import LabelError, pair_folders
from unirefiner_hf.data.left_out import left_out_lines
from unirefiner_hf.data.sources import open_images


def picture(path, value=99):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (value,) * 3).save(path, "png")
    return path


def names(folder):
    return [path.relative_to(folder).as_posix() for path in list_images(folder)]


def test_pictures_of_runs_models_and_hidden_folders_are_not_data(tmp_path):
    picture(tmp_path / "photo.png")
    picture(tmp_path / "runs" / "mine" / "before_after.png")
    picture(tmp_path / "runs" / "mine" / "snapshots" / "1.png")
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    picture(tmp_path / "model" / "before_after.png")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    picture(tmp_path / ".cache" / "thumb.png")
    picture(tmp_path / "config" / "kept.png")
    (tmp_path / "config" / "config.json").write_text("{}")
    (tmp_path / "._photo.png").write_bytes(b"mac")
    found = look_through(tmp_path)
    assert names(tmp_path) == ["config/kept.png", "photo.png"]
    assert found.passed_over == {
        ".cache": folders.HIDDEN,
        "model": "the folder of a model (it holds config.json and weights)",
        "runs/mine": "the folder of a run (it holds run.json)",
    }
    assert found.left_out == {"._photo.png": folders.HIDDEN}


@pytest.mark.parametrize("file", ["run.json", "config.json"])
def test_the_folder_of_a_run_or_model_is_refused(tmp_path, file):
    picture(tmp_path / "mine" / "before_after.png")
    (tmp_path / "mine" / file).write_text("{}")
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ImageError, match=f"mine is the folder of a .*{file}"):
        list_images(tmp_path / "mine")


def test_links_are_followed_once(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    picture(data / "sub" / "1.png")
    picture(elsewhere / "2.png")
    for name, target in {
        "a": elsewhere,
        "again": elsewhere,
        "below": data / "sub",
        "loop": data,
        "sub/up": tmp_path,
        "gone": tmp_path / "nowhere",
        "gone.jpg": tmp_path / "nowhere.jpg",
        "3.png": elsewhere / "2.png",
        "self": data / "self",
        "note.txt": tmp_path / "nothing.txt",
    }.items():
        os.symlink(target, data / name)
    os.symlink(data, elsewhere / "back")
    found = look_through(data)
    assert names(data) == ["3.png", "a/2.png", "sub/1.png"]
    assert found.passed_over == {
        "a/back": "a link to a folder that is read",
        "again": "a link to a folder that is read",
        "below": "a link to a folder that is read",
        "loop": "a link to a folder that is read",
        "sub/up": "a link to a folder around this one",
    }
    assert found.left_out == dict.fromkeys(
        ("gone", "gone.jpg", "self"), "a link to nothing"
    )


def test_an_unreadable_folder_is_told(tmp_path, monkeypatch):
    picture(tmp_path / "1.png")
    picture(tmp_path / "locked" / "2.png")
    scan = os.scandir

    def denied(place):
        if os.path.basename(place) == "locked":
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(folders.os, "scandir", denied)
    assert look_through(tmp_path).passed_over == {
        "locked": "cannot be read (Permission denied)"
    }
    (tmp_path / "labels").mkdir()
    with pytest.raises(LabelError, match="locked cannot be used: cannot be read"):
        pair_folders(tmp_path, tmp_path / "labels")


def test_suffixes_of_one_format_and_formats_that_are_not_read(tmp_path):
    for suffix in ("jfif", "jpe", "avif", "PGM", "heic", "dng", "svg", "txt"):
        picture(tmp_path / f"x.{suffix}")
    assert names(tmp_path) == ["x.PGM", "x.avif", "x.jfif", "x.jpe"]
    left_out = open_images(tmp_path).left_out
    assert sorted(left_out) == ["x.dng", "x.heic", "x.svg"]
    assert "convert them to JPEG" in left_out["x.heic"]
    with pytest.raises(LabelError, match="x.dng cannot be used|x.heic|x.svg"):
        pair_folders(tmp_path, tmp_path)


def test_two_files_of_one_name_are_not_paired_in_silence(tmp_path):
    picture(tmp_path / "images" / "1.png")
    picture(tmp_path / "images" / "1.jpg")
    picture(tmp_path / "labels" / "1.png")
    with pytest.raises(LabelError, match="both 1.jpg and 1.png"):
        pair_folders(tmp_path / "images", tmp_path / "labels")


def test_a_folder_without_usable_images_tells_why(tmp_path):
    picture(tmp_path / "run" / "x.png")
    (tmp_path / "run" / "run.json").write_text("{}")
    picture(tmp_path / "y.heic")
    with pytest.raises(ImageError, match=r"only files with \.heic.*y\.heic.*run\.json"):
        list_images(tmp_path)


def test_reasons_are_told_in_few_lines():
    left_out = {f"{n}.png": f"shorter than 16 pixels ({n}x9)." for n in range(5)}
    left_out["a.jpg"] = "an empty file."
    assert left_out_lines(left_out, {"runs/1": "the folder of a run"}) == [
        "Left out 5 images: shorter than 16 pixels (0.png, 1.png, 2.png and 2 more).",
        "Left out a.jpg: an empty file.",
        "Did not look into runs/1: the folder of a run",
    ]
