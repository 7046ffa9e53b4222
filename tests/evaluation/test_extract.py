"""`extract_features` and reading its folder back."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unirefiner_hf import Features, __version__, extract_features
from unirefiner_hf.cli import main
from unirefiner_hf.data.images import load_rgb
from unirefiner_hf.data.sources import InputError
from unirefiner_hf.errors import UniRefinerError
from unirefiner_hf.evaluation import extract
from unirefiner_hf.evaluation.checkpoints import Checkpoint, load_checkpoint
from unirefiner_hf.evaluation.extract import FeaturesError, weights_sha256
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.outputs import OutputError


def expected_map(checkpoint, file, size):
    pixels = checkpoint.reading(load_rgb(file), size)
    with torch.no_grad():
        return checkpoint.model(pixels[None]).feature_map[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_features_are_the_models(dtype, refined, photos, tmp_path):
    options = {"size": (22, 32), "dtype": dtype, "batch": 2}
    found = extract_features(refined, photos, tmp_path / "f", **options)
    checkpoint = load_checkpoint(refined)
    assert len(found) == 5 and "broken.jpg" not in found
    for name, features in found.items():
        expected = expected_map(checkpoint, photos / name, (24, 32))
        assert features.shape == (32, 6, 8)
        assert features.dtype == getattr(torch, dtype)
        close = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-5}[dtype]
        assert torch.allclose(features.float(), expected, atol=close)
    index = json.loads((tmp_path / "f" / "index.json").read_text())
    assert index == found.to_dict()
    first, *_ = index["images"]
    assert first == {
        "name": "0.png",
        "shard": "features-00001.safetensors",
        "key": "0",
        "grid": [6, 8],
        "original_size": [30, 40],
    }
    assert (index["size"], index["register_width"]) == ([24, 32], 1)
    assert index["version"] == __version__ and index["mean"] == list(
        checkpoint.reading.mean
    )
    assert index["weights_sha256"] == weights_sha256(checkpoint.model)
    assert list(index["skipped"]) == ["broken.jpg"]
    shard = load_file(tmp_path / "f" / first["shard"])
    assert torch.equal(shard["0"], found["0.png"])
    assert sorted(os.listdir(tmp_path / "f")) == [first["shard"], "index.json"]


def test_shards_are_as_small_as_asked(refined, photo_set, tmp_path):
    one = 32 * 4 * 4 * 2
    options = {"size": 16, "batch": 3}
    whole = extract_features(refined, photo_set, tmp_path / "whole", **options)
    split = extract_features(
        refined, photo_set, tmp_path / "split", shard_size=2 * one, **options
    )
    assert [e["shard"][9:14] for e in split.index["images"]] == [
        "00001",
        "00001",
        "00002",
        "00002",
        "00003",
    ]
    assert list(split) == list(whole) == [f"row-{n}" for n in range(5)]
    for name in whole:
        assert torch.equal(whole[name], split[name])
    assert "in 3 files" in str(split) and "Left out row-5" in str(split)


def test_models_in_memory_and_their_border(refined, photos, tmp_path):
    model = UniRefinerModel.from_pretrained(refined).train()
    options = {"register_width": 0, "dtype": "float32"}
    found = extract_features(model, photos / "0.png", tmp_path / "f", **options)
    assert model.training and model.config.register_width == 1
    assert found.index["register_width"] == 0 and found.index["size"] == [16, 16]
    checkpoint = load_checkpoint(refined)
    framed = expected_map(checkpoint, photos / "0.png", (16, 16))
    checkpoint.model.config.register_width = 0
    bare = expected_map(checkpoint, photos / "0.png", (16, 16))
    assert torch.allclose(found["0.png"], bare, atol=1e-4)
    assert not torch.allclose(bare, framed, atol=1e-2)


def test_the_digest_follows_every_weight():
    layer = torch.nn.Linear(3, 2)
    before = weights_sha256(layer)
    assert before == weights_sha256(layer) and len(before) == 64
    with torch.no_grad():
        layer.bias[1] += 1e-3
    assert weights_sha256(layer) != before
    assert weights_sha256(torch.nn.Linear(3, 2).bfloat16())


def test_folders_of_others_are_never_touched(refined, photos, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "features-00001.safetensors").write_text("precious")
    for content in (None, "{", "{}", '{"format": "another"}'):
        if content is not None:
            (tmp_path / "mine" / "index.json").write_text(content)
        with pytest.raises(OutputError, match="holds no features of this package"):
            extract_features(refined, photos, tmp_path / "mine", overwrite=True)
    file = tmp_path / "mine" / "features-00001.safetensors"
    assert file.read_text() == "precious"
    with pytest.raises(OutputError, match="is a file"):
        extract_features(refined, photos, file)


def test_features_are_replaced_only_if_asked(refined, photos, tmp_path):
    folder = tmp_path / "f"
    extract_features(refined, photos, folder, shard_size=1)
    assert len(list(folder.glob("*.safetensors"))) == 5
    with pytest.raises(OutputError, match="holds features, .*allow overwrite"):
        extract_features(refined, photos, folder)
    assert len(Features(folder)) == 5
    again = extract_features(refined, photos / "1.png", folder, overwrite=True)
    assert list(again) == ["1.png"] and len(list(folder.glob("*.safetensors"))) == 1


def test_a_stop_leaves_nothing_that_reads(refined, photos, tmp_path, monkeypatch):
    folder = tmp_path / "f"
    extract_features(refined, photos, folder)
    whole, calls = extract.save_file, []

    def stopped(tensors, file, **options):
        calls.append(file)
        whole(tensors, file, **options)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(extract, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        extract_features(refined, photos, folder, overwrite=True, shard_size=1)
    assert len(list(folder.glob("features-*.safetensors"))) == 2
    with pytest.raises(FeaturesError, match="was not finished"):
        Features(folder)
    monkeypatch.setattr(extract, "save_file", whole)
    assert len(extract_features(refined, photos, folder, overwrite=True)) == 5
    assert not list(folder.glob(".*"))


def test_damage_is_named(refined, photos, tmp_path):
    found = extract_features(refined, photos, tmp_path / "f")
    with pytest.raises(KeyError):
        found["nothing"]
    (tmp_path / "f" / "features-00001.safetensors").write_bytes(b"short")
    with pytest.raises(FeaturesError, match="00001.safetensors cannot be read"):
        found["0.png"]
    with pytest.raises(FeaturesError, match="holds no features: no index.json"):
        Features(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": (1, 2, 3)}, r"size is \(1, 2, 3\)"),
        ({"size": 16.0}, "size is 16.0"),
        ({"register_width": -1}, "register_width is -1"),
        ({"batch": 0}, "batch is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float16"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
        ({"shard_size": "big"}, "shard_size is 'big'"),
        ({"shard_size": 0}, "shard_size is 0"),
    ],
)
def test_options_out_of_range(options, message, refined, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "load_checkpoints", None)
    with pytest.raises(UniRefinerError, match=message):
        extract_features(refined, photos, tmp_path / "f", **options)
    assert not (tmp_path / "f").exists()


def test_what_cannot_be_extracted(refined, photos, tmp_path, monkeypatch):
    with pytest.raises(FeaturesError, match="model is 2 models"):
        extract_features([refined, refined], photos, tmp_path / "a")
    with pytest.raises(
        InputError, match="None of the 1 images can be read: broken.jpg"
    ):
        extract_features(refined, photos / "broken.jpg", tmp_path / "b")
    with pytest.raises(InputError, match="images is a ndarray"):
        extract_features(refined, np.zeros((3, 8, 8)), tmp_path / "c")

    whole = Checkpoint.feature_map
    monkeypatch.setattr(Checkpoint, "feature_map", lambda *a: 1e6 * whole(*a))
    with pytest.raises(FeaturesError, match="0.png: features up to .*take bfloat16"):
        extract_features(refined, photos, tmp_path / "d")
    assert len(extract_features(refined, photos, tmp_path / "e", dtype="bfloat16")) == 5


def test_the_command(refined, photos, tmp_path, capsys):
    words = ["extract", str(refined), "--images", str(photos)]
    words += ["--output", str(tmp_path / "f"), "--size", "24", "32"]
    assert main([*words, "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "24 x 32 px" in out and "Left out broken.jpg" in out
    assert (
        json.loads((tmp_path / "out.json").read_text())
        == Features(tmp_path / "f").to_dict()
    )
    assert main(words) == 2
    assert "allow overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--dtype", "bfloat16"]) == 0
    assert main([*words, "--overwrite", "--size", "1", "2", "3"]) == 2
