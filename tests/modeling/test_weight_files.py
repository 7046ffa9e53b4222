"""No pickle is read, by whichever way a model is loaded, and the reason is told rightly."""

import json
import pickle
import shutil

import pytest
from transformers import AutoModel

from tests.conftest import make_tiny_tower
from tests.dual_encoders import save_dual_run
from tests.training.conftest import save_images, save_tiny_tower
from unirefiner_hf import UniRefinerBackbone, UniRefinerError, UniRefinerModel
from unirefiner_hf.cli import main
from unirefiner_hf.loading.adapter import load_adapter
from unirefiner_hf.modeling.files import FileError
from unirefiner_hf.modeling.text_side import load_text_side
from unirefiner_hf.modeling.towers import load_tower
from unirefiner_hf.modeling.weight_files import WeightFilesError


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "mark"


@pytest.fixture
def plant(mark):
    """Write a pickle that leaves the mark."""

    def plant(file):
        file.write_bytes(pickle.dumps({"weights": Payload(mark)}))

    plant(mark.parent / "trial")
    pickle.loads((mark.parent / "trial").read_bytes())
    assert mark.exists()
    mark.unlink()
    return plant


def save_refined(folder):
    UniRefinerModel.from_tower(
        make_tiny_tower("dinov2"), register_width=1
    ).save_pretrained(folder)
    shutil.copy(folder.parent / "tower" / "preprocessor_config.json", folder)
    return folder


@pytest.fixture(params=["backbone", "refined"])
def model(request, tmp_path):
    """A folder of weights that loads."""
    tower = save_tiny_tower(tmp_path / "tower")
    return tower if request.param == "backbone" else save_refined(tmp_path / "refined")


def only_pickled(folder, plant):
    (folder / "model.safetensors").unlink()
    plant(folder / "pytorch_model.bin")


def pickled_shards(folder, plant):
    only_pickled(folder, plant)
    index = {"weight_map": {"w": "pytorch_model.bin"}, "metadata": {}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").rename(folder / "model-1.bin")


def index_of_pickles(folder, plant):
    only_pickled(folder, plant)
    index = {"weight_map": {"w": "pytorch_model.bin"}, "metadata": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_that_leaves_the_folder(folder, plant):
    shutil.copy(folder / "model.safetensors", folder.parent / "x.safetensors")
    only_pickled(folder, plant)
    index = {"weight_map": {"w": "../x.safetensors"}, "metadata": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def named_by_the_config(folder, plant):
    plant(folder / "adapter_model.bin")
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "adapter_model.bin"
    (folder / "config.json").write_text(json.dumps(config))


def named_by_a_part_of_the_config(folder, plant):
    plant(folder / "adapter_model.bin")
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("vision_config", {})["transformers_weights"] = "adapter_model.bin"
    (folder / "config.json").write_text(json.dumps(config))


def adapter_beside(folder, plant):
    plant(folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


DOORS = {
    only_pickled: r"holds no safetensors, and pickled weights \(pytorch_model.bin\)",
    pickled_shards: r"holds no safetensors, and pickled weights \(model-1.bin",
    index_of_pickles: "names 'pytorch_model.bin', which is no safetensors file",
    index_that_leaves_the_folder: "names '../x.safetensors', which is no safetensors",
    named_by_the_config: "names 'adapter_model.bin' as its weights",
    named_by_a_part_of_the_config: "names 'adapter_model.bin' as its weights",
    adapter_beside: r"holds an adapter \(adapter_config.json\)",
}


@pytest.mark.parametrize("door", DOORS)
def test_no_loader_reads_a_pickle(door, model, plant, mark):
    door(model, plant)
    is_refined = model.name == "refined"
    loaders = [load_tower, UniRefinerModel.from_tower]
    if is_refined:
        loaders = [UniRefinerModel.from_pretrained, UniRefinerBackbone.from_pretrained]
        loaders += [AutoModel.from_pretrained]
    for load in loaders:
        with pytest.raises(WeightFilesError, match=DOORS[door]):
            load(str(model))
        assert not mark.exists()


@pytest.mark.parametrize("door", DOORS)
def test_no_command_reads_a_pickle(door, model, plant, mark, tmp_path, capsys):
    door(model, plant)
    photos = save_images(tmp_path / "photos", count=3)
    words = {
        "refine": ["--model", str(model), "--data", str(photos), "--image_size=24"],
        "diagnose": [str(model), "--images", str(photos)],
        "compare": [str(model), str(model), "--images", str(photos)],
        "extract": [
            str(model),
            "--images",
            str(photos),
            "--output",
            str(tmp_path / "f"),
        ],
    }
    words["refine"] += ["--output_dir", str(tmp_path / "run"), "--max_steps=1"]
    for command, given in words.items():
        assert main([command, *given]) == 2, command
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("unirefiner: error:"), said
        told = DOORS[door].replace("\\", "").replace("pytorch_model.bin)", "")
        assert told.split("(")[0] in said, (command, said)
        assert not mark.exists(), command


def test_the_text_encoder_is_not_unpickled(plant, mark, tmp_path):
    _, _, base = save_dual_run(tmp_path, "clip")
    assert load_text_side(base) is not None
    index_of_pickles(base, plant)
    with pytest.raises(WeightFilesError, match="names 'pytorch_model.bin'"):
        load_text_side(base)
    assert not mark.exists()


def test_asked_for_by_name_a_pickle_is_read(model, plant, mark):
    """transformers' own word; the test above could not fail otherwise."""
    only_pickled(model, plant)
    if model.name == "refined":
        with pytest.raises(Exception, match="(?i)weights_only|unpickl"):
            UniRefinerModel.from_pretrained(model, use_safetensors=False)


def test_weights_that_are_not_there_are_not_called_pickled(model):
    (model / "model.safetensors").unlink()
    load = UniRefinerModel.from_pretrained if model.name == "refined" else load_tower
    with pytest.raises(
        UniRefinerError, match="holds no weights: there is no model.safe"
    ):
        load(str(model))


def test_what_is_whole_loads(model):
    load = UniRefinerModel.from_pretrained if model.name == "refined" else load_tower
    assert load(str(model)) is not None


def test_estimate_gives_the_same_answer_of_an_adapter(plant, tmp_path, capsys):
    tower = save_tiny_tower(tmp_path / "tower")
    adapter_beside(tower, plant)
    assert main(["estimate", "--model", str(tower), "--image_size", "24"]) == 2
    assert "holds an adapter (adapter_config.json)" in capsys.readouterr().err


def test_a_damaged_adapter_is_named(tmp_path):
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    (tmp_path / "adapter_model.safetensors").write_bytes(pickle.dumps({}))
    with pytest.raises(FileError, match="adapter_model.safetensors is damaged"):
        load_adapter(model, tmp_path)
