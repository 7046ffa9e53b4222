"""Checkpoints in a process without the package, and through a pipeline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, pipeline

import unirefiner_hf
from tests.conftest import make_tiny_tower
from unirefiner_hf import UniRefinerModel, save_remote_code
from unirefiner_hf.modeling.remote_code import AUTO_MAP

FRESH = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "unirefiner_hf":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import torch
from transformers import AutoConfig, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folder = sys.argv[1]
saved = torch.load(folder + "/expected.pt", weights_only=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__ == "UniRefinerModel", type(model)
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert model.config.method == "distillation", model.config.method
with torch.no_grad():
    assert torch.equal(model(saved["pixels"]).last_hidden_state, saved["tokens"])
name = AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map["AutoBackbone"]
Backbone = get_class_from_dynamic_module(name, folder)
backbone = Backbone.from_pretrained(folder)
with torch.no_grad():
    assert torch.equal(backbone(saved["pixels"]).feature_maps[-1], saved["map"])
model.save_pretrained(folder + "/again")
print("fresh process ok")
"""


def publish(folder, family="dinov2", **options):
    model = UniRefinerModel.from_tower(make_tiny_tower(family), **options)
    model.config.method = "distillation"
    model.save_pretrained(folder)
    save_remote_code(folder)
    return model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("dinov2", {"register_fill": "randn", "register_width": 2}),
        ("clip_vision_model", {"final_norm": True}),
        ("unirefiner_eva_clip_vision", {}),
        ("internvl_vision", {}),
    ],
)
def test_fresh_process_without_the_package(family, options, tmp_path):
    folder = tmp_path / "checkpoint"
    model = publish(folder, family, **options)
    pixels = torch.randn(2, 3, 24, 20)
    with torch.no_grad():
        output = model(pixels)
    expected = {
        "pixels": pixels,
        "tokens": output.last_hidden_state,
        "map": output.feature_map.contiguous(),
    }
    torch.save(expected, folder / "expected.pt")
    (tmp_path / "elsewhere").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder)],
        cwd=tmp_path / "elsewhere",
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fresh process ok" in done.stdout
    again = {path.name for path in (folder / "again").glob("*.py")}
    assert again == {path.name for path in folder.glob("*.py")}


def test_flat_files_and_auto_map(tmp_path):
    publish(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert set(AUTO_MAP) == {"AutoConfig", "AutoModel", "AutoBackbone"}
    for target in AUTO_MAP.values():
        module, name = target.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()
    assert not list(tmp_path.glob("*.bin"))


CORE = {
    "checked",
    "files",
    "configuration_unirefiner",
    "errors",
    "families",
    "modeling_unirefiner",
    "own_towers",
    "recording",
    "registers",
    "towers",
    "weight_files",
}
EVA_CLIP = {"configuration_eva_clip", "modeling_eva_clip", "vit_parts"}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("dinov2", set()),
        ("internvl_vision", set()),
        ("unirefiner_eva_clip_vision", EVA_CLIP),
    ],
)
def test_the_folder_holds_the_code_of_its_family_alone(family, more, tmp_path):
    publish(tmp_path, family)
    assert {path.stem for path in tmp_path.glob("*.py")} == CORE | more


def test_saving_alone_copies_the_code_too(tmp_path):
    UniRefinerModel.from_tower(make_tiny_tower("dinov2")).save_pretrained(tmp_path)
    here = Path(unirefiner_hf.__file__).parent / "modeling"
    for name in CORE | EVA_CLIP:
        source = (here / f"{name}.py").read_text()
        assert (tmp_path / f"{name}.py").read_text() == source
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel"}


def test_wrong_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        save_remote_code(tmp_path)
    make_tiny_tower("dinov2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'dinov2'.*'unirefiner'"):
        save_remote_code(tmp_path)


def test_pipeline_reads_the_folder(tmp_path):
    model = publish(tmp_path)
    processor = BitImageProcessor(
        size={"height": 24, "width": 20}, do_center_crop=False, resample=3
    )
    processor.save_pretrained(tmp_path)
    extract = pipeline("image-feature-extraction", model=str(tmp_path), device="cpu")
    noise = numpy.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=numpy.uint8)
    image = Image.fromarray(noise)
    features = extract(image, return_tensors=True)
    pooled = extract(image, return_tensors=True, pool=True)
    with torch.no_grad():
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        expected = model(pixels)
    assert features.shape == (1, 30, 32)
    torch.testing.assert_close(features, expected.last_hidden_state)
    torch.testing.assert_close(pooled, expected.pooler_output)


def test_an_old_transformers_is_told_what_to_install(monkeypatch):
    source = Path(unirefiner_hf.__file__).parent / "modeling"
    source = source / "configuration_unirefiner.py"
    monkeypatch.delattr("transformers.configuration_utils.SubConfigSpec")
    code = compile(source.read_text(), str(source), "exec")
    names = {"__name__": "old", "__package__": "unirefiner_hf.modeling"}
    with pytest.raises(ImportError, match="pip install -U transformers"):
        exec(code, names)
