"""Training images from folders, tables and streams."""

import json
import time

import datasets
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from unirefiner_hf.data.images import ImageError
from unirefiner_hf.data.pixels import PixelReading
from unirefiner_hf.data.samples import collate
from unirefiner_hf.data.sources import InputError, open_images
from unirefiner_hf.data.streams import StreamStateError
from unirefiner_hf.data.unlabelled import open_training_images, sample_images

PIXELS = {"image_size": (16, 24), "reading": PixelReading((0.5,) * 3, (0.5,) * 3)}


def grey(value):
    return Image.new("RGB", (32, 20), (value,) * 3)


def value_of(sample):
    """The grey value an image was made with."""
    return round(
        (torch.as_tensor(sample["pixel_values"]).mean().item() / 2 + 0.5) * 255
    )


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        grey(10 * number).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def table():
    images = [grey(10 * number) for number in range(6)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int8")}
    )
    return datasets.Dataset.from_dict(
        {"image": images, "label": [0] * 6}, features=features
    )


@pytest.mark.parametrize("data", ["", "  "])
def test_an_unset_variable_is_not_the_current_folder(folder, monkeypatch, data):
    monkeypatch.chdir(folder)
    with pytest.raises(ImageError, match="data is empty"):
        open_training_images(data, **PIXELS)
    with pytest.raises(InputError, match="images is empty"):
        open_images(data)


def test_the_pictures_of_a_run_are_not_trained_on(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "runs" / "mine").mkdir(parents=True)
    grey(250).save(folder / "runs" / "mine" / "before_after.png")
    (folder / "runs" / "mine" / "run.json").write_text("{}")
    images = open_training_images(".", **PIXELS)
    assert [value_of(s) for s in images] == [0, 10, 20, 30, 40, 50]
    assert list(images.report.passed_over) == ["runs/mine"]
    assert "Did not look into runs/mine" in images.report.lines()[0]


def test_a_folder(folder):
    images = open_training_images(str(folder), **PIXELS)
    assert [value_of(images[n]) for n in range(len(images))] == [0, 10, 20, 30, 40, 50]
    assert images[0]["pixel_values"].shape == (3, 16, 24)
    assert images.report.total == images.report.used == 6


def test_bad_headers_are_left_out_and_listed(folder):
    (folder / "x.png").write_text("no image")
    Image.new("RGB", (4, 4)).save(folder / "tiny.png")
    images = open_training_images(str(folder), **PIXELS)
    assert len(images) == images.report.used == 6
    assert images.report.total == 8
    assert set(images.report.skipped) == {"x.png", "tiny.png"}
    assert "4x4" in images.report.skipped["tiny.png"]


def test_a_truncated_image_is_replaced_by_the_next_and_named(folder):
    whole = (folder / "5.png").read_bytes()
    (folder / "2.png").write_bytes(whole[:-30])
    images = open_training_images(str(folder), **PIXELS)
    sample = images[2]
    assert value_of(sample) == 30
    assert [name for name, _ in sample["skipped"]] == ["2.png"]
    batch = collate([images[1], sample])
    assert batch["pixel_values"].shape == (2, 3, 16, 24)
    assert batch["skipped"] == sample["skipped"]


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(ImageError, match="none of 1 images.*x.png"):
        open_training_images(str(tmp_path), **PIXELS)


def test_a_random_subset_follows_the_seed(folder):
    def names(seed):
        return open_training_images(
            str(folder), **PIXELS, max_images=3, seed=seed
        ).names

    assert names(0) == names(0) and len(names(0)) == 3
    assert any(names(seed) != names(0) for seed in range(1, 5))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file(tmp_path, table, streaming):
    table.to_parquet(tmp_path / "images.parquet")
    images = open_training_images(
        str(tmp_path / "images.parquet"), **PIXELS, streaming=streaming
    )
    assert sorted(map(value_of, images)) == [0, 10, 20, 30, 40, 50]


def test_a_folder_of_parquet_files(tmp_path, table):
    for part in range(2):
        table.shard(2, part).to_parquet(tmp_path / f"part-{part}.parquet")
    images = open_training_images(str(tmp_path), **PIXELS)
    assert sorted(map(value_of, images)) == [0, 10, 20, 30, 40, 50]


def test_a_saved_data_set_and_its_splits(tmp_path, table):
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(
        tmp_path
    )
    assert len(open_training_images(str(tmp_path), **PIXELS)) == 6
    assert (
        value_of(open_training_images(str(tmp_path), **PIXELS, split="test")[0]) == 10
    )
    with pytest.raises(ImageError, match="'val'.*train, test"):
        open_training_images(str(tmp_path), **PIXELS, split="val")


def test_a_missing_column_names_those_there_are(tmp_path, table):
    table.to_parquet(tmp_path / "images.parquet")
    with pytest.raises(ImageError, match="'photo'.*image, label.*image_column"):
        open_training_images(
            str(tmp_path / "images.parquet"), **PIXELS, image_column="photo"
        )


@pytest.mark.parametrize("streaming", [False, True])
def test_an_undecodable_cell_is_counted(tmp_path, table, streaming):
    rows = [{"image": {"bytes": b"broken", "path": None}, "label": 0}]
    bad = datasets.Dataset.from_list(rows, features=table.features)
    datasets.concatenate_datasets([bad, table]).to_parquet(tmp_path / "images.parquet")
    images = open_training_images(
        str(tmp_path / "images.parquet"), **PIXELS, streaming=streaming
    )
    samples = list(images)
    skipped = [entry for sample in samples for entry in sample["skipped"]]
    assert len(skipped) == 1 and "images.parquet" in skipped[0][0]
    assert len(samples) == (6 if streaming else 7)


def test_every_empty_cell_counts(tmp_path, table):
    rows = [{"image": None, "label": 0}] * 3
    empty = datasets.Dataset.from_list(rows, features=table.features)
    datasets.concatenate_datasets([empty, table]).to_parquet(tmp_path / "x.parquet")
    images = open_training_images(str(tmp_path / "x.parquet"), **PIXELS)
    skipped = dict(entry for _ in range(2) for s in images for entry in s["skipped"])
    assert skipped == {f"x.parquet[{n}]": "an empty cell." for n in range(3)}


def test_a_subset_names_the_rows_of_the_whole(tmp_path, table):
    table.to_parquet(tmp_path / "x.parquet")
    images = open_training_images(
        str(tmp_path / "x.parquet"), **PIXELS, max_images=2, seed=3
    )
    for number, name in enumerate(images.names):
        assert name == f"x.parquet[{value_of(images[number]) // 10}]"


@pytest.mark.parametrize("streaming", [False, True])
def test_one_split_of_a_folder_of_tables(tmp_path, table, streaming):
    for file, rows in {
        "data/train-00000-of-00002.parquet": [0, 1],
        "data/train-00001-of-00002.parquet": [2],
        "data/validation-00000-of-00001.parquet": [3, 4],
        "test/0.parquet": [5],
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        table.select(rows).to_parquet(tmp_path / file)
    grey(200).save(tmp_path / "beside.png")
    (tmp_path / "old.heic").write_bytes(b"x")
    read = {}
    for split in ("train", "validation", "val", "test"):
        images = open_training_images(
            str(tmp_path), **PIXELS, split=split, streaming=streaming
        )
        read[split] = sorted(map(value_of, images))
        left_out = images.report.skipped
        assert sorted(left_out) == ["beside.png", "old.heic"]
        assert "beside .parquet files" in left_out["beside.png"]
        assert images.report.used == (None if streaming else len(read[split]))
    assert read == {
        "train": [0, 10, 20],
        "validation": [30, 40],
        "val": [30, 40],
        "test": [50],
    }
    assert set(images.report.passed_over) == {
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet",
    }
    with pytest.raises(ImageError, match="no split 'dev2'; it has test, train, valid"):
        open_training_images(str(tmp_path), **PIXELS, split="dev2")


def test_tables_of_two_kinds_are_not_mixed(tmp_path, table):
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.arrow").write_bytes(b"x")
    with pytest.raises(ImageError, match=".arrow and .parquet files"):
        open_training_images(str(tmp_path), **PIXELS)


def test_one_split_of_a_folder_of_images(tmp_path):
    for name, value in {"train/a": 0, "train/b": 10, "val/a": 20}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        grey(value).save(tmp_path / f"{name}.png")
    images = open_training_images(str(tmp_path), **PIXELS)
    assert images.names == ["train/a.png", "train/b.png"]
    assert list(images.report.passed_over) == ["val"]
    images = open_training_images(str(tmp_path), **PIXELS, split="validation")
    assert images.names == ["val/a.png"]
    with pytest.raises(ImageError, match="no split 'test'; it has train, validation"):
        open_training_images(str(tmp_path), **PIXELS, split="test")
    # Folders of classes, one of which is called train, are no splits.
    (tmp_path / "plane").mkdir()
    grey(0).save(tmp_path / "plane" / "a.png")
    assert len(open_training_images(str(tmp_path), **PIXELS)) == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_counts_each_unusable_image_once(tmp_path, table, workers, processes):
    rows = [{"image": None, "label": 0}] * 2 + [
        {"image": {"bytes": b"broken", "path": "b.jpg"}, "label": 0}
    ]
    bad = datasets.Dataset.from_list(rows, features=table.features)
    data = split_into_files(
        tmp_path, datasets.concatenate_datasets([bad, table] * 2), 4
    )
    found = {}
    for process in range(processes):
        stream = stream_of(data, process=process, processes=processes)
        stream.endless = True
        loader = DataLoader(
            stream, batch_size=2, collate_fn=collate, num_workers=workers
        )
        for batch, _ in zip(loader, range(20), strict=False):
            for name, reason in batch["skipped"]:
                assert name not in found, "counted twice"
                found[name] = reason
    assert sorted(found.values()).count("an empty cell.") == 4
    assert len(found) == 6
    assert sum("(b.jpg, row" in name for name in found) == 2


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "a b"])
def test_a_missing_path_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ImageError, match="no such folder or file"):
        open_training_images(name, **PIXELS)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "images.csv").write_text("x")
    with pytest.raises(ImageError, match="images.csv.*parquet"):
        open_training_images(str(tmp_path / "images.csv"), **PIXELS)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_pass_through_accelerate(folder, workers):
    (folder / "2.png").write_bytes((folder / "5.png").read_bytes()[:-30])
    images = open_training_images(str(folder), **PIXELS)
    loader = DataLoader(images, batch_size=3, collate_fn=collate, num_workers=workers)
    batches = list(Accelerator(cpu=True).prepare(loader))
    assert [batch["pixel_values"].shape[0] for batch in batches] == [3, 3]
    assert sum(len(batch["skipped"]) for batch in batches) == 1


@pytest.fixture(autouse=True)
def no_pause_after_a_pass(monkeypatch):
    """`datasets` sleeps when the threads that read a file end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.0)


def split_into_files(folder, table, files):
    for part in range(files):
        table.shard(files, part).to_parquet(folder / f"part-{part}.parquet")
    return str(folder)


def stream_of(data, **options):
    return open_training_images(data, **PIXELS, streaming=True, **options)


@pytest.mark.parametrize("files,picked", [(2, None), (3, None), (2, 4), (1, 6)])
def test_a_stream_is_shared_out_without_duplicates(tmp_path, table, files, picked):
    data = split_into_files(tmp_path, table, files)
    alone = sorted(map(value_of, stream_of(data, max_images=picked)))
    shares = [
        list(map(value_of, stream_of(data, max_images=picked, process=n, processes=2)))
        for n in range(2)
    ]
    assert sorted(shares[0] + shares[1]) == alone
    assert len(set(alone)) == len(alone) == (picked or 6)
    assert len(shares[0]) == len(shares[1])


def test_the_images_picked_of_a_stream_follow_the_seed(tmp_path, table):
    data = split_into_files(tmp_path, table, 2)

    def picked(seed):
        return sorted(map(value_of, stream_of(data, max_images=3, seed=seed)))

    assert picked(0) == picked(0)
    assert any(picked(seed) != picked(0) for seed in range(1, 6))


def test_every_process_sees_the_same_first_images(tmp_path, table):
    data = split_into_files(tmp_path, table, 2)
    first = [
        torch.stack(sample_images(stream_of(data, process=n, processes=2), 3))
        for n in range(2)
    ]
    assert torch.equal(*first)


@pytest.mark.parametrize("picked", [None, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_in_the_middle(tmp_path, table, workers, picked):
    """From any batch, over the end of a pass, with what workers read ahead not lost."""
    rows = [{"image": {"bytes": b"broken", "path": None}, "label": 0}]
    bad = datasets.Dataset.from_list(rows, features=table.features)
    data = split_into_files(
        tmp_path, datasets.concatenate_datasets([table, bad, table]), 2
    )

    def read(stream, batches):
        stream.endless = True
        loader = DataLoader(
            stream, batch_size=stream.batch, collate_fn=collate, num_workers=workers
        )
        seen = []
        for batch, _ in zip(loader, range(batches), strict=False):
            stream.note(batch["position"])
            seen.append(batch["pixel_values"])
        return torch.stack(seen)

    def opened():
        stream = stream_of(data, max_images=picked)
        stream.batch = 2
        return stream

    whole = read(opened(), 11)
    for stop in (1, 5, 8):
        before, after = opened(), opened()
        read(before, stop)
        after.resume([json.loads(json.dumps(before.state()))])
        assert torch.equal(read(after, 11 - stop), whole[stop:]), stop


def with_a_bad_row(tmp_path, table):
    """Thirteen rows in four files, one of them no image."""
    rows = [{"image": {"bytes": b"broken", "path": None}, "label": 0}]
    bad = datasets.Dataset.from_list(rows, features=table.features)
    parts = [table, bad, table.map(lambda row: {"image": grey(200 + row["label"])})]
    return split_into_files(tmp_path, datasets.concatenate_datasets(parts), 4)


def batches_of(streams, workers, number):
    """Batches as `streams`, one a process, take them together, and where they then are."""
    loaders = []
    for stream in streams:
        stream.endless = True
        loader = DataLoader(
            stream, batch_size=2, collate_fn=collate, num_workers=workers
        )
        loaders.append(iter(loader))
    seen = []
    for _ in range(number // len(streams)):
        for stream, loader in zip(streams, loaders, strict=True):
            batch = next(loader)
            stream.note(batch["position"])
            seen.append(batch["pixel_values"])
    return torch.stack(seen), json.loads(json.dumps([s.state() for s in streams]))


@pytest.mark.parametrize("picked", [None, 9])
@pytest.mark.parametrize(
    "before,between,after",
    [
        ((1, 0), (2, 0), (1, 2)),
        ((2, 0), (1, 0), (3, 0)),
        ((3, 0), (2, 0), (1, 0)),
        ((1, 2), (1, 0), (2, 2)),
    ],
)
def test_a_stream_goes_on_in_other_hands(
    tmp_path, table, picked, before, between, after
):
    """The same batches for other numbers of processes and of workers, twice changed."""
    data = with_a_bad_row(tmp_path, table)

    def opened(processes, states=None):
        streams = [
            stream_of(data, max_images=picked, process=n, processes=processes)
            for n in range(processes)
        ]
        for stream in streams:
            stream.batch = 2
            if states is not None:
                stream.resume(states)
        return streams

    whole, _ = batches_of(opened(before[0]), before[1], 18)
    first, states = batches_of(opened(before[0]), before[1], 6)
    second, states = batches_of(opened(between[0], states), between[1], 6)
    third, _ = batches_of(opened(after[0], states), after[1], 6)
    assert torch.equal(torch.cat([first, second, third]), whole)
    with pytest.raises(StreamStateError, match="2 images at once, this run takes 1"):
        stream_of(data, max_images=picked).resume(states)


def test_readers_of_a_stream_keep_their_passes_apart(tmp_path, table, monkeypatch):
    """One is in its second pass before the other starts its first."""
    data = split_into_files(tmp_path, table, 2)
    announce = datasets.IterableDataset.set_epoch

    def slowly(self, epoch):
        announce(self, epoch)
        if get_worker_info() is not None and get_worker_info().id == 1:
            time.sleep(0.5)

    def read(seen):
        stream = stream_of(data)
        stream.endless = True
        stream.resume([{"taken": 0, "rows": {"0": [0, 2], "1": [0, 0]}}])
        loader = DataLoader(stream, batch_size=1, collate_fn=collate, num_workers=2)
        batches = [batch for batch, _ in zip(loader, range(seen), strict=False)]
        return [(value_of(b), b["position"].reader) for b in batches]

    expected = read(12)
    monkeypatch.setattr(datasets.IterableDataset, "set_epoch", slowly)
    assert read(12) == expected


def test_an_endless_stream_without_a_usable_image_ends(tmp_path, table):
    rows = [{"image": {"bytes": b"broken", "path": None}, "label": 0}] * 2
    datasets.Dataset.from_list(rows, features=table.features).to_parquet(
        tmp_path / "bad.parquet"
    )
    stream = stream_of(str(tmp_path / "bad.parquet"))
    stream.endless = True
    with pytest.raises(ImageError, match="no image of the stream can be used.*row 1"):
        next(iter(stream))


def test_samples_are_spread_over_the_data(folder):
    images = open_training_images(str(folder), **PIXELS)
    values = [value_of({"pixel_values": pixels}) for pixels in sample_images(images, 3)]
    assert values == [0, 20, 40]
    assert len(sample_images(images, 100)) == 6
