"""A repository of somebody else's runs no code here unless asked to."""

import json
import pickle

import pytest

from tests.hub.commands.verbs import refused
from tests.training.conftest import save_images, save_tiny_tower

EVIL = "bob/evil"


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.fixture
def tower(tmp_path):
    folder = save_tiny_tower(tmp_path / "tower")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def refine(verbs, tmp_path):
    save_images(tmp_path / "photos", count=4)
    values = {"model": EVIL, "data": "photos", "output_dir": "run", "max_steps": 1}
    values |= {"image_size": 24, "use_cpu": "true", "report_images": 0}
    words = [f"--{name}={value}" for name, value in values.items()]

    def refine(*options):
        return verbs("refine", *words, *options, cwd=str(tmp_path))

    return refine


def code(mark):
    return f"open({str(mark)!r}, 'w')\nclass EvilConfig: pass\n".encode()


def test_code_of_a_repository_does_not_run(hub, refine, tower, tmp_path):
    mark = tmp_path / "mark"
    config = json.loads(tower["config.json"])
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}
    files = {"config.json": json.dumps(config).encode(), "evil.py": code(mark)}
    hub.create(EVIL, {**tower, **files})
    refine()
    assert not mark.exists()
    # Asked to, it does: the test can fail.
    refine("--trust_remote_code", "true")
    assert mark.exists()


def test_pickled_weights_are_not_read(hub, refine, tower, tmp_path):
    mark = tmp_path / "mark"
    weights = pickle.dumps({"weights": Payload(mark)})
    del tower["model.safetensors"]
    hub.create(EVIL, {**tower, "pytorch_model.bin": weights})
    line = refused(refine())
    assert (
        f"{EVIL} holds no safetensors, and pickled weights (pytorch_model.bin)" in line
    )
    assert not mark.exists()
    pickle.loads(weights)
    assert mark.exists()


def test_a_pickled_adapter_is_not_read(hub, verbs, run, tmp_path):
    adapter = tmp_path / "run" / "adapter"
    (adapter / "adapter_model.safetensors").unlink()
    weights = pickle.dumps({"weights": Payload(tmp_path / "mark")})
    (adapter / "adapter_model.bin").write_bytes(weights)
    line = refused(verbs("merge", run[0], "--output", str(tmp_path / "out"), *run[2:]))
    assert "holds no adapter_model.safetensors" in line
    assert not (tmp_path / "mark").exists()


def test_the_image_processor_of_a_repository_does_not_run(hub, refine, tower, tmp_path):
    mark = tmp_path / "mark"
    processor = json.loads(tower["preprocessor_config.json"])
    processor["image_processor_type"] = "EvilProcessor"
    processor["auto_map"] = {"AutoImageProcessor": "evil.EvilProcessor"}
    files = {"preprocessor_config.json": json.dumps(processor).encode()}
    hub.create(EVIL, {**tower, **files, "evil.py": code(mark)})
    refine()
    assert not mark.exists()


def test_a_card_is_text_and_no_template(hub, verbs, run, tmp_path):
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["data"]["source"] = "{{ 6 * 7 }}{% include 'x' %}"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    out = tmp_path / "out"
    done = verbs("merge", run[0], "--output", str(out), *run[2:])
    assert done.returncode == 0
    assert "{{ 6 * 7 }}" in (out / "README.md").read_text()


def shards(mark):
    index = {"weight_map": {"w": "pytorch_model.bin"}, "metadata": {}}
    return {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "pytorch_model.bin": pickle.dumps({"weights": Payload(mark)}),
    }


def beside(mark):
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["query"]}
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.bin": pickle.dumps({"weights": Payload(mark)}),
    }


@pytest.mark.parametrize(
    "door, told",
    [(shards, "names 'pytorch_model.bin'"), (beside, "holds an adapter")],
)
def test_no_pickle_of_a_repository_is_fetched(hub, refine, tower, tmp_path, door, told):
    del tower["model.safetensors"]
    hub.create(EVIL, {**tower, **door(tmp_path / "mark")})
    assert told in refused(refine())
    assert (
        not hub.count("GET", r"/resolve/.*\.bin") and not (tmp_path / "mark").exists()
    )
