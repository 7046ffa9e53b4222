"""What loads as a checkpoint, what it counts as, and what is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from tests.evaluation.conftest import save_refined
from tests.modeling.test_published_layouts import (
    eva_config,
    eva_weights,
    intern_config,
    intern_weights,
    write,
)
from tests.training.conftest import save_tiny_tower
from unirefiner_hf.evaluation.checkpoints import (
    CheckpointMismatchError,
    check_same_tower,
    load_checkpoint,
    load_checkpoints,
    measuring,
)
from unirefiner_hf.export.run_folder import RunFolderError
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel


@pytest.fixture(scope="module")
def tiny(tower_folder):
    return load_checkpoint(str(tower_folder))


def test_another_tower_is_refused(tmp_path, tower_folder, tiny):
    other = save_tiny_tower(tmp_path / "clip", "clip_vision_model")
    with pytest.raises(CheckpointMismatchError, match="its model_type is clip"):
        check_same_tower(tiny, load_checkpoint(str(other)))
    torch.manual_seed(7)
    model = UniRefinerModel.from_pretrained(save_refined(tmp_path / "r", tower_folder))
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "r")
    with pytest.raises(CheckpointMismatchError, match="cosine of their patch"):
        check_same_tower(tiny, load_checkpoint(str(tmp_path / "r")))
    with pytest.raises(CheckpointMismatchError, match="holds no model"):
        load_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointMismatchError, match="no such folder"):
        load_checkpoint("./nowhere")


def test_methods_of_checkpoints(tower_folder, tmp_path):
    bare = save_refined(tmp_path / "bare", tower_folder)
    other = save_refined(tmp_path / "run", tower_folder, "ph_reg")
    old = save_refined(tmp_path / "old", tower_folder, "plain")
    new = save_refined(tmp_path / "new", tower_folder, "distillation")
    paths = (tower_folder, bare, other.parent, other, old, new)
    found = [load_checkpoint(path) for path in paths]
    methods = [None, "unirefiner", "ph_reg", "ph_reg", "distillation", "distillation"]
    assert [c.method for c in found] == methods
    baseline = "self-distillation baseline"
    names = [tower_folder.name, "bare", "PH-Reg", "PH-Reg", baseline, baseline]
    assert [c.name for c in found] == names
    assert [c.needs_controls for c in found] == [False, True, True, True, False, False]
    assert [c.register_width for c in found] == [0, 1, 1, 1, 0, 0]
    unique = [c.name for c in load_checkpoints([str(path) for path in paths])]
    assert unique[3:] == ["PH-Reg (merged)", baseline, f"{baseline} (merged)"]


def test_a_moved_baseline_is_still_the_baseline(tower_folder, tmp_path):
    """Its own config says so, whatever a record beside it says."""
    merged = save_refined(tmp_path / "run", tower_folder, "unirefiner")
    config = json.loads((merged / "config.json").read_text())
    for method, needs in (("distillation", False), ("ph_reg", True)):
        content = json.dumps({**config, "method": method})
        (merged / "config.json").write_text(content)
        moved = shutil.copytree(merged, tmp_path / method / "elsewhere")
        for folder in (merged, moved):
            found = load_checkpoint(folder)
            assert (found.method, found.needs_controls) == (method, needs)
            assert found.name in ("self-distillation baseline", "PH-Reg")
        in_memory = load_checkpoint(UniRefinerModel.from_pretrained(moved))
        assert in_memory.method == method


def test_a_broken_record_is_named(tower_folder, tmp_path):
    merged = save_refined(tmp_path / "run", tower_folder, "unirefiner")
    for text, message in (
        ("{", "run.json cannot be read"),
        ("{}", "run.json is of format None"),
        ('{"format": 1}', "run.json names no method"),
    ):
        (tmp_path / "run" / "run.json").write_text(text)
        with pytest.raises(RunFolderError, match=message):
            load_checkpoint(merged)


def test_published_layouts_load(tmp_path):
    """EVA-CLIP, whose config transformers takes for a CLIP, and InternViT, unknown to it."""
    save_tiny_tower(tmp_path / "other")
    name = "preprocessor_config.json"
    eva, intern = eva_config(), intern_config()
    for kind, config, weights in (
        ("eva", eva, eva_weights(eva["vision_config"])),
        ("intern", intern, intern_weights(intern)),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        write(folder, config, weights)
        (folder / name).write_text((tmp_path / "other" / name).read_text())
        found = load_checkpoint(folder)
        pixels = torch.randn(1, 3, 16, 24)
        tower = UniRefinerModel.from_tower(folder, register_width=0).eval()
        with torch.no_grad():
            expected = tower(pixels).feature_map
        assert torch.equal(found.feature_map(pixels), expected)
        assert (found.method, found.name) == (None, kind)


def test_models_in_memory(refined, tower_folder, tmp_path):
    model = UniRefinerModel.from_pretrained(refined)
    from_disk = load_checkpoint(refined)
    found = load_checkpoint(model)
    assert found.model is model and found.folder is None
    assert (found.name, found.method) == (from_disk.name, from_disk.method)
    assert (found.reading, found.register_width) == (from_disk.reading, 1)
    bare = UniRefinerModel.from_tower(
        AutoModel.from_pretrained(tower_folder), register_width=0
    )
    with pytest.raises(CheckpointMismatchError, match="give processing_class"):
        load_checkpoint(bare)
    with pytest.raises(CheckpointMismatchError, match="no image processor at"):
        load_checkpoint(bare, processing_class=str(tmp_path / "nowhere"))
    for processor in (
        AutoImageProcessor.from_pretrained(tower_folder),
        str(tower_folder),
    ):
        found = load_checkpoint(bare, processing_class=processor)
        assert (found.method, found.reading) == (None, from_disk.reading)
    assert load_checkpoint(found) is found


def test_modes_are_put_back(refined):
    model = UniRefinerModel.from_pretrained(refined).train()
    model.tower.embeddings.eval()
    checkpoint = load_checkpoint(model)
    with pytest.raises(KeyError), measuring([checkpoint]):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert model.training and not model.tower.embeddings.training


def test_what_is_no_checkpoint(tower_folder, refined, tmp_path, monkeypatch):
    tower = AutoModel.from_pretrained(tower_folder)
    with pytest.raises(CheckpointMismatchError, match="Dinov2Model.*from_tower"):
        load_checkpoints(tower)
    with pytest.raises(CheckpointMismatchError, match="is a int"):
        load_checkpoints([str(tower_folder), 3])
    with pytest.raises(CheckpointMismatchError, match="no checkpoint"):
        load_checkpoints([])
    with pytest.raises(UniRefinerError, match="someone/nothing-here cannot be loaded"):
        load_checkpoint("someone/nothing-here")
    with pytest.raises(UniRefinerError, match="device is 'gpu'"):
        load_checkpoints(str(tower_folder), device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UniRefinerError, match="finds no GPU"):
        load_checkpoints(str(tower_folder), device="cuda")
    model = UniRefinerModel.from_pretrained(refined)
    with pytest.raises(CheckpointMismatchError, match="lies on cpu: move it"):
        load_checkpoints([model], device="meta")
    file = tmp_path / "r" / "preprocessor_config.json"
    shutil.copytree(tower_folder, tmp_path / "r")
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "image_mean": None}))
    with pytest.raises(UniRefinerError, match="states no image_mean"):
        load_checkpoint(tmp_path / "r")


def test_a_published_intern_vit_folder_loads_without_its_code(tmp_path):
    config = intern_config()
    config["auto_map"] = {
        "AutoConfig": "configuration_intern_vit.InternVisionConfig",
        "AutoModel": "modeling_intern_vit.InternVisionModel",
    }
    write(tmp_path, config, intern_weights(intern_config()))
    settings = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 8}
    settings |= {"crop_size": 8, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    checkpoint = load_checkpoint(tmp_path)
    pixels = torch.zeros(1, 3, 2 * checkpoint.patch_size, 2 * checkpoint.patch_size)
    assert checkpoint.feature_map(pixels).shape[2:] == (2, 2)
