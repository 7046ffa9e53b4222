"""The throughput benchmark on a tiny tower: it runs, and its counts are the estimate's."""

import json
import sys

from benchmarks import inference_overhead, refine_throughput
from benchmarks.shapes import SHAPES
from tests.conftest import make_tiny_tower
from unirefiner_hf.modeling.families import family_of
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.resources import find_recipe


def test_a_recipe_is_timed(tmp_path, monkeypatch, capsys):
    make_tiny_tower("dinov2").config.save_pretrained(tmp_path / "tiny")
    words = ["--config", "dinov2/small", "--model", str(tmp_path / "tiny")]
    words += ["--image_size", "32", "--per_device_train_batch_size", "2"]
    words += ["--steps", "1", "--warmup", "0", "--device", "cpu"]
    words += ["--json", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", ["refine_throughput", *words])
    refine_throughput.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert "images_a_second" in capsys.readouterr().out
    seconds, images = result["seconds_a_step"], result["images_a_second"]
    assert abs(seconds * images - 2) < 1e-6
    minutes = result["minutes_for_5000_images_twice"]
    assert abs(minutes - 10000 / images / 60) < 1e-3 * minutes
    per_second = result["tflop_an_image"] * images
    assert abs(per_second - result["tflops"]) < 1e-6 * per_second


def test_shapes_are_of_supported_families_and_shipped_recipes():
    for name, config in SHAPES.items():
        assert family_of(config).layers
        family, model = name.split("/")[1].split("-", 1)
        if family in ("dinov2", "siglip2"):
            assert find_recipe(f"{family}/{model}").is_file()


def test_the_frame_at_inference(tmp_path, monkeypatch, capsys):
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    model.save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--sizes", "32", "--rounds", "1"]
    words += ["--register_width", "2", "--json", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", ["inference_overhead", *words])
    inference_overhead.main()
    assert "wrapper_time_ratio" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "result.json").read_text())
    assert result["tokens"] == 1 + 8 * 8
    assert result["tokens_ratio"] == (1 + 12 * 12) / (1 + 8 * 8)
    assert result["operations_ratio"] > result["tokens_ratio"]
    assert result["memory_ratio"] > 1
