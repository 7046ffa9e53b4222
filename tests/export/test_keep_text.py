"""Dual encoders stay whole: the merged checkpoint carries its text side."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModel
from transformers.utils import logging

from tests.dual_encoders import KINDS, TEXTS, save_dual_run, save_eva_clip
from tests.export.conftest import merge
from tests.training.conftest import save_tiny_tower
from unirefiner_hf import dense_text_features, load_text_side
from unirefiner_hf.cli import main
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.export.digests import digests, is_weights
from unirefiner_hf.hub.verify import verify
from unirefiner_hf.loading.arguments import BackboneArguments
from unirefiner_hf.loading.backbone import BackboneError, load_backbone
from unirefiner_hf.resources import PACKAGE

ALL = [*KINDS, "eva"]
FRESH = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
import unirefiner_hf
from transformers import AutoModel
from unirefiner_hf import dense_text_features, load_text_side
folders, texts, pixels, output = sys.argv[1:]
found = {}
for kind, folder in json.loads(folders).items():
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), (kind, report)
    text = load_text_side(folder)
    with torch.no_grad():
        found[kind + " words"] = words = text.encode(json.loads(texts))
        found[kind + " patches"] = patches = dense_text_features(
            model.eval(), load_file(pixels)["pixels"], projection=text.projection
        )
        cosines = torch.cosine_similarity(patches[0].unsqueeze(1), words, dim=-1)
    found[kind + " cosines"] = cosines
save_file({name: tensor.contiguous() for name, tensor in found.items()}, output)
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Kind -> refined model in memory, folder of its base and of the merged model."""
    root = tmp_path_factory.mktemp("runs")
    made = {}
    for kind in ALL:
        model, run, base = save_dual_run(root / kind.replace(" ", "-"), kind)
        made[kind] = model, base, merge(run, run / "merged", model=str(base))
    return made


@pytest.fixture(scope="module")
def fresh(merged, tmp_path_factory):
    """What a fresh process reads from the merged folders alone."""
    scratch = tmp_path_factory.mktemp("fresh")
    pixels = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(5))
    save_file({"pixels": pixels}, scratch / "pixels")
    away = {}
    for kind, (_, base, _) in merged.items():
        away[kind] = base.rename(base.parent / "away")
    folders = json.dumps({kind: str(folder) for kind, (_, _, folder) in merged.items()})
    words = [folders, json.dumps(TEXTS), str(scratch / "pixels"), str(scratch / "out")]
    try:
        done = subprocess.run(
            [sys.executable, "-c", FRESH, *words],
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(PACKAGE.parent),
            },
            capture_output=True,
            text=True,
        )
    finally:
        for kind, (_, base, _) in merged.items():
            away[kind].rename(base)
    assert done.returncode == 0, done.stderr[-3000:]
    return pixels, load_file(scratch / "out")


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_a_fresh_process_has_both_sides(kind, merged, fresh):
    model, base, _ = merged[kind]
    pixels, found = fresh
    side = load_text_side(base)
    if kind == "eva":  # transformers has no EVA-CLIP: tests/modeling/test_text_side.py
        expected = side.encode(TEXTS)
        projection = side.projection
    else:
        # A copy, for its weights lie aligned in memory: see `load_text_side`.
        dual = copy.deepcopy(AutoModel.from_pretrained(base).eval())
        expected = dual.get_text_features(**side.tokens(TEXTS)).pooler_output
        projection = getattr(dual, "visual_projection", None)
    words, patches = found[f"{kind} words"], found[f"{kind} patches"]
    assert torch.equal(words, expected)
    tuned = dense_text_features(model, pixels, projection=projection)
    assert torch.allclose(patches, tuned, atol=1e-4)
    cosines = functional.normalize(tuned[0], dim=-1) @ functional.normalize(words).T
    assert torch.allclose(found[f"{kind} cosines"], cosines, atol=1e-4)
    bare = dense_text_features(
        load_checkpoint(str(base)).model, pixels, projection=projection
    )
    assert not torch.allclose(bare, tuned, atol=1e-3)


@pytest.mark.parametrize("kind", ["clip", "eva"])
def test_digests_and_card_know_the_text(kind, merged):
    folder = merged[kind][2]
    names = digests(folder).keys()
    assert {name for name in names if is_weights(name)} == {
        "adapter/adapter_model.safetensors",
        "model.safetensors",
        "text/model.safetensors",
    }
    assert {"text/config.json", "text/tokenizer.json"} < names
    assert verify(folder).passed
    card = (folder / "README.md").read_text()
    assert card.count("load_text_side(path)") == 1
    assert "were not part of the training" in card and "not included" not in card
    file = folder / "text" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert verify(folder).wrong.keys() == {"text/model.safetensors"}
    file.write_bytes(whole)


def test_the_card_s_example_runs(merged, tmp_path, monkeypatch, capsys):
    folder = merged["clip"][2]
    card = (folder / "README.md").read_text()
    (example,) = [
        part.split("```")[0]
        for part in card.split("```python\n")[1:]
        if "load_text_side" in part.split("```")[0]
    ]
    (tmp_path / "tiny-dual-unirefined").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "card", "exec"), {})
    assert "torch.Size([36, 2])" in capsys.readouterr().out


def test_it_can_be_left_out(tmp_path):
    _, run, base = save_dual_run(tmp_path, "clip")
    words = ["merge", str(run), "--model", str(base), "--output"]
    assert main([*words, str(tmp_path / "out"), "--no_text"]) == 0
    assert not (tmp_path / "out" / "text").exists()
    assert "is not included" in (tmp_path / "out" / "README.md").read_text()
    assert main([*words, str(tmp_path / "plain"), "--native"]) == 0
    assert not (tmp_path / "plain" / "text").exists()
    # What the run recorded counts where nothing is said.
    record = json.loads((run / "run.json").read_text())
    record["model"]["keep_text"] = False
    (run / "run.json").write_text(json.dumps(record))
    assert main([*words, str(tmp_path / "quiet")]) == 0
    assert not (tmp_path / "quiet" / "text").exists()


def test_a_missing_tokenizer_is_told_at_the_start(tmp_path, monkeypatch, capsys):
    _, run, base = save_dual_run(tmp_path, "clip")
    for file in base.glob("tokenizer*"):
        file.unlink()
    said = []
    monkeypatch.setattr(
        logging.get_logger("unirefiner_hf.loading.backbone"), "warning", said.append
    )
    assert load_backbone(str(base), BackboneArguments()).text_side is None
    assert len(said) == 1 and "without text" in said[0] and "no tokenizer" in said[0]
    with pytest.raises(BackboneError, match="keep_text is true.*has no tokenizer"):
        load_backbone(str(base), BackboneArguments(keep_text=True))
    record = json.loads((run / "run.json").read_text())
    record["model"]["keep_text"] = True
    (run / "run.json").write_text(json.dumps(record))
    words = ["merge", str(run), "--model", str(base), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "no tokenizer" in capsys.readouterr().err
    assert main([*words, "--no_text"]) == 0


def test_towers_without_text_are_as_before(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        logging.get_logger("unirefiner_hf.loading.backbone"), "warning", said.append
    )
    folder = save_tiny_tower(tmp_path / "dino")
    assert (
        load_backbone(str(folder), BackboneArguments()).text_side is None and not said
    )
    with pytest.raises(BackboneError, match="keep_text is true.*it is a dinov2"):
        load_backbone(str(folder), BackboneArguments(keep_text=True))
    save_eva_clip(tmp_path / "eva", use_rms_norm=True)
    assert load_backbone(str(tmp_path / "eva"), BackboneArguments()).text_side is None
    assert len(said) == 1 and "use_rms_norm=True" in said[0]
    assert load_backbone(
        str(tmp_path / "eva"), BackboneArguments(keep_text=False)
    ) and (len(said) == 1)
