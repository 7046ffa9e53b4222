"""The one writer: the old or the new, on the disk before it has its name."""

import os

import pytest

from unirefiner_hf import outputs
from unirefiner_hf.outputs import put_in_place, whole_folder, write_whole


@pytest.fixture
def order(monkeypatch):
    """What is flushed and renamed, in order, by name."""
    seen = []
    flush, replace = outputs.flush, os.replace

    def noted(path):
        seen.append(f"flush {path.name}")
        flush(path)

    def renamed(source, target):
        seen.append(f"rename to {target.name}")
        replace(source, target)

    monkeypatch.setattr(outputs, "flush", noted)
    monkeypatch.setattr(outputs.os, "replace", renamed)
    return seen


def test_flushing_syncs(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        outputs.os, "fsync", lambda d: synced.append(os.fstat(d).st_ino)
    )
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        outputs.flush(path)
    assert synced == [tmp_path.stat().st_ino, (tmp_path / "file").stat().st_ino]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, order):
    write_whole(tmp_path / "a.json", b"new")
    assert order[0].startswith("flush .a.json.")
    assert order[1:] == ["rename to a.json", f"flush {tmp_path.name}"]
    assert (tmp_path / "a.json").read_bytes() == b"new"


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, order):
    with whole_folder(tmp_path / "merged") as draft:
        (draft / "below").mkdir()
        for name in ("one", "below/two"):
            (draft / name).write_text(name)
    named = order.index("rename to merged")
    assert set(order[:named]) == {
        f"flush {name}" for name in ("one", "two", "below", draft.name)
    }
    assert order[named + 1] == f"flush {tmp_path.name}"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_takes_the_place_of_the_old_one(tmp_path, monkeypatch, swaps):
    if not swaps:  # as on a file system that cannot
        monkeypatch.setattr(outputs, "_exchange", lambda *_: False)
    for text in ("old", "new"):
        with whole_folder(tmp_path / "merged") as draft:
            (draft / text).write_text(text)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_after_an_error_the_old_stands(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "merged") as draft:
        (draft / "old").touch()
    write_whole(tmp_path / "file", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        with whole_folder(tmp_path / "merged") as draft:
            (draft / "new").touch()
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "file", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "merged"]
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["old"]
    assert (tmp_path / "file").read_text() == "old"


def test_what_killed_processes_left_goes_and_that_of_others_stays(tmp_path):
    dead, alive = 2**22 + 1, os.getppid()
    for name in (f".a.{dead}.unfinished", f".a.{alive}.unfinished", ".a.unfinished"):
        (tmp_path / name).mkdir()
    with whole_folder(tmp_path / "a"):
        pass
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f".a.{alive}.unfinished", "a"]


def test_a_swap_is_one_step(tmp_path, monkeypatch):
    """With renameat2 the name is never without a folder: no rename of the old one away."""
    for name in ("draft", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not outputs._exchange(tmp_path / "draft", tmp_path / "folder"):
        pytest.skip("this file system cannot swap two names")
    assert (tmp_path / "folder" / "draft").is_file()
    put_in_place(tmp_path / "draft", tmp_path / "folder")
    assert (tmp_path / "folder" / "folder").is_file()
