"""The merged checkpoint equals the adapter, appears whole, and loads anywhere."""

import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, Siglip2ImageProcessorPil

from tests.conftest import make_tiny_tower
from tests.export.conftest import (
    SIZE,
    make_processor,
    make_record,
    make_refined,
    merge,
    pixels,
)
from tests.export.test_card import EVALUATION
from tests.training.conftest import save_images, save_tiny_tower
from unirefiner_hf.cli import main
from unirefiner_hf.data.pixels import PixelReading
from unirefiner_hf.export import checkpoint
from unirefiner_hf.export.card import card_from_record
from unirefiner_hf.export.checkpoint import (
    ExportError,
    export_refined,
)
from unirefiner_hf.export.run_folder import RunFolderError
from unirefiner_hf.loading.adapter import merge_adapter
from unirefiner_hf.loading.processor import resized_processor
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.modeling.towers import load_tower

FRESH = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "unirefiner_hf":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
from safetensors.torch import load_file, save_file
from transformers import AutoModel

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = model(load_file("pixels.safetensors")["pixels"]).last_hidden_state
save_file({"tokens": tokens.detach().contiguous()}, "tokens.safetensors")
"""


def export(model, folder, family="dinov2", **options):
    return export_refined(
        model,
        folder,
        image_processor=make_processor(family),
        image_size=options.pop("image_size", SIZE),
        card=card_from_record(make_record()),
        **options,
    )


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tokens(model, **options):
    with torch.no_grad():
        return model(pixels(), **options).last_hidden_state


# Equality


@pytest.mark.parametrize("fill", ["zero", "randn", "learnable"])
def test_merged_equals_the_active_adapter(family, fill, tmp_path):
    model = make_refined(
        family,
        register_width=2,
        register_fill=fill,
        final_norm=family == "clip_vision_model",
    )
    expected = tokens(model)
    with model.tower.disable_adapter():
        assert not torch.allclose(tokens(model), expected, atol=1e-2)
    folder = export(model, tmp_path / "merged", family)
    loaded = AutoModel.from_pretrained(folder)
    assert isinstance(loaded, UniRefinerModel)
    torch.testing.assert_close(tokens(loaded), expected, atol=1e-4, rtol=0)
    assert loaded.config.register_fill == fill
    assert "lora" not in " ".join(load_file(folder / "model.safetensors"))


def test_lower_precision_is_cast_after_the_merge(tmp_path):
    exact = make_refined("dinov2")
    merge_adapter(exact)
    export(make_refined("dinov2"), tmp_path / "merged", dtype=torch.bfloat16)
    saved = AutoModel.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    for name, value in exact.state_dict().items():
        assert torch.equal(saved[name], value.to(torch.bfloat16)), name


def test_every_file_is_readable_by_whom_the_others_are(save_run, tmp_path):
    _, run, base = save_run("dinov2")
    folder = merge(run, tmp_path / "merged", model=str(base))
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_a_model_without_adapter_can_be_exported(tmp_path):
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    expected = tokens(model)
    loaded = AutoModel.from_pretrained(export(model, tmp_path / "merged"))
    assert torch.equal(tokens(loaded), expected)


def test_native_is_the_plain_tower(family, tmp_path):
    model = make_refined(family)
    expected = tokens(model, register_width=0)
    folder = export(model, tmp_path / "native", family, native=True)
    assert not list(folder.glob("*.py"))
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is type(make_tiny_tower(family))
    framed = UniRefinerModel.from_tower(loaded)
    torch.testing.assert_close(
        tokens(framed, register_width=0), expected, atol=1e-4, rtol=0
    )
    assert "pad the normalised pixels" in (folder / "README.md").read_text()


def test_a_fresh_process_does_not_need_the_package(family, tmp_path):
    from safetensors.torch import save_file

    model = make_refined(family, register_fill="randn", register_width=1)
    expected = tokens(model)
    folder = export(model, tmp_path / "merged", family)
    save_file({"pixels": pixels()}, tmp_path / "pixels.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", FRESH, str(folder)],
        cwd=tmp_path,
        env={**environment, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        check=True,
        timeout=300,
    )
    got = load_file(tmp_path / "tokens.safetensors")["tokens"]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


# The image processor


def test_the_processor_resizes_whole_images_to_the_refined_size(family, tmp_path):
    folder = export(make_refined(family), tmp_path / "merged", family)
    processor = AutoImageProcessor.from_pretrained(folder)
    image = Image.linear_gradient("L").convert("RGB").resize((64, 40))
    got = processor(image, return_tensors="pt")["pixel_values"][0]
    wanted = PixelReading(tuple(processor.image_mean), tuple(processor.image_std))(
        image, (SIZE, SIZE)
    )
    assert got.shape == (3, SIZE, SIZE)
    assert not processor.do_center_crop
    assert (got - wanted).abs().max() < 0.05


def test_the_base_processor_is_left_alone():
    base = make_processor("clip_vision_model")
    before = base.to_dict()
    resized_processor(base, (SIZE, SIZE))
    assert base.to_dict() == before


def test_a_size_off_the_patch_grid_is_refused(tmp_path):
    with pytest.raises(ValueError, match="image_size is 25.*patch size 4"):
        export(make_refined("dinov2"), tmp_path / "merged", image_size=25)
    assert not list(tmp_path.iterdir())


# All or nothing


def test_a_folder_in_use_is_left_alone(tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ExportError, match="merged is not empty.*is not replaced"):
            export(make_refined("dinov2"), folder, overwrite=overwrite)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    export(make_refined("dinov2"), folder)
    with pytest.raises(ExportError, match="merged is not empty.*--overwrite"):
        export(make_refined("dinov2"), folder)
    export(make_refined("dinov2"), folder, overwrite=True)
    with pytest.raises(ExportError, match="is a file"):
        export(make_refined("dinov2"), folder / "config.json")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, overwrite):
    folder = tmp_path / "merged"
    if overwrite:
        export(make_refined("dinov2", seed=1), folder)
        before = (folder / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_remote_code", full)
    with pytest.raises(ExportError, match="merged could not be written: .*No space"):
        export(make_refined("dinov2"), folder, overwrite=overwrite)
    if overwrite:
        assert (folder / "model.safetensors").read_bytes() == before
        assert (folder / "README.md").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"] * overwrite


def test_remains_of_a_killed_export_do_not_stay(tmp_path):
    gone = 2**22 + 1  # more than any process's number
    left = tmp_path / f".merged.{gone}.unfinished"
    left.mkdir()
    (left / "junk").touch()
    folder = export(make_refined("dinov2"), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert not (folder / "junk").exists()


# From a run


def test_merging_a_run_twice_gives_the_same_bytes(family, save_run, tmp_path):
    model, run, base = save_run(family)
    expected = tokens(model)
    for name in ("one", "two"):
        merge(run, tmp_path / name, model=str(base), pictures=True)
    one, two = tmp_path / "one", tmp_path / "two"
    assert contents(one) == contents(two)
    assert (one / "before_after.png").is_file()
    loaded = AutoModel.from_pretrained(one)
    torch.testing.assert_close(tokens(loaded), expected, atol=1e-4, rtol=0)
    assert loaded.config.register_width == 2


def test_peft_loads_the_adapter_on_the_base(family, save_run, tmp_path):
    model, run, base = save_run(family)
    folder = merge(run, tmp_path / "m", model=str(base))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "example-lab/tiny-tower"
    tower = PeftModel.from_pretrained(load_tower(base), folder, subfolder="adapter")
    with torch.no_grad():
        expected = model.tower(pixels((4, 4))).last_hidden_state
        assert torch.equal(tower(pixels((4, 4))).last_hidden_state, expected)


def test_the_card_states_the_sha256_of_every_weight_file(save_run, tmp_path):
    _, run, base = save_run()
    folder = merge(run, tmp_path / "m", model=str(base), max_shard_size="20KB")
    stated = ModelCard.load(folder / "README.md").data["unirefiner"]["weights"]
    files = {f.relative_to(folder).as_posix() for f in folder.rglob("*.safetensors")}
    assert stated.keys() == files and len(files) > 3
    for name, digest in stated.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_a_sharded_model_loads(save_run, tmp_path):
    model, run, base = save_run()
    folder = merge(run, tmp_path / "m", model=str(base), max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    loaded = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(tokens(loaded), tokens(model), atol=1e-4, rtol=0)


def test_the_learnable_frame_comes_along(save_run, tmp_path):
    model, run, base = save_run(model__register_fill="learnable")
    loaded = AutoModel.from_pretrained(merge(run, tmp_path / "m", model=str(base)))
    assert torch.equal(loaded.register_patch, model.register_patch)
    torch.testing.assert_close(tokens(loaded), tokens(model), atol=1e-4, rtol=0)


def test_a_processor_that_cuts_patches_gives_way():
    naflex = Siglip2ImageProcessorPil(image_mean=[0.1, 0.2, 0.3], patch_size=4)
    image = Image.new("RGB", (40, 30), "white")
    assert naflex(image, return_tensors="pt")["pixel_values"].ndim == 3
    pixels = resized_processor(naflex, (SIZE, SIZE))(image, return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, SIZE, SIZE)
    expected = PixelReading((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))(image, (SIZE, SIZE))
    torch.testing.assert_close(pixels["pixel_values"][0], expected)


def test_an_evaluation_comes_along_where_it_fits(save_run, tmp_path):
    _, run, base = save_run()
    (run / "merged").mkdir()
    content = json.dumps({"format": 1, "entries": [EVALUATION]})
    (run / "merged" / "evaluation.json").write_text(content)
    folder = merge(run, tmp_path / "same", model=str(base))
    assert (folder / "evaluation.json").read_text() == content
    assert "Stamp Scenes" in (folder / "README.md").read_text()
    wider = merge(run, tmp_path / "wide", model=str(base), register_width=3)
    assert "Stamp Scenes" not in (wider / "README.md").read_text()
    early = merge(run / "checkpoint-20", tmp_path / "early", model=str(base))
    assert "Stamp Scenes" not in (early / "README.md").read_text()


def test_a_checkpoint_tells_its_own_step_and_no_final_numbers(save_run, tmp_path):
    _, run, base = save_run()
    folder = merge(run / "checkpoint-20", tmp_path / "m", model=str(base))
    card = (folder / "README.md").read_text()
    assert "**Steps:** 20 on 2 CPU cores" in card
    assert "Nothing was measured." in card and "Last losses" not in card
    assert not (folder / "before_after.png").exists()


def test_a_checkpoint_of_an_unfinished_run_takes_the_training_frame(save_run, tmp_path):
    _, run, base = save_run()
    record = make_record(finished=False, model__register_factor=3)
    for section, names in {
        "model": ["register_width"],
        "training": ["steps", "epochs", "seconds", "resumed"],
        "data": ["skipped"],
    }.items():
        for name in names:
            del record[section][name]
    del record["losses"], record["spurious_shares"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match="not finished.*checkpoint-20"):
        merge(run, tmp_path / "m", model=str(base))
    folder = merge(run / "checkpoint-20", tmp_path / "m", model=str(base))
    config = json.loads((folder / "config.json").read_text())
    assert config["register_width"] == 2  # 24 px / patch 4 / factor 3
    folder = merge(
        run / "checkpoint-20", tmp_path / "wide", model=str(base), register_width=4
    )
    assert json.loads((folder / "config.json").read_text())["register_width"] == 4


def test_the_wrong_base_is_refused_by_name(save_run, tmp_path):
    _, run, base = save_run()
    other = tmp_path / "other-tower"
    make_tiny_tower("dinov2", layers=3).save_pretrained(other)
    make_processor("dinov2").save_pretrained(other)
    with pytest.raises(RunFolderError) as caught:
        merge(run, tmp_path / "m", model=str(other))
    for part in ("other-tower", "example-lab/tiny-tower", "adapter", "differ"):
        assert part in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_a_local_base_has_to_be_named(save_run, tmp_path):
    _, run, base = save_run(model__base="tiny-tower")
    with pytest.raises(
        RunFolderError, match="local model called 'tiny-tower'.*--model"
    ):
        merge(run, tmp_path / "m")


def test_what_is_no_run_is_refused(save_run, tmp_path):
    _, run, base = save_run()
    with pytest.raises(RunFolderError, match="is not a run"):
        merge(tmp_path, tmp_path / "m", model=str(base))
    with pytest.raises(RunFolderError, match="checkpoint-99 holds no adapter"):
        merge(run / "checkpoint-99", tmp_path / "m", model=str(base))
    with pytest.raises(RunFolderError, match=r"Checkpoints of \S+: checkpoint-20\.$"):
        merge(run / "checkpoint-99", tmp_path / "m", model=str(base))


def test_the_verb(save_run, tmp_path, capsys):
    _, run, base = save_run()
    command = ["merge", str(run), "--output", str(tmp_path / "out")]
    command += ["--model", str(base)]
    assert main([*command, "--dtype", "bfloat16", "--native"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("dinov2", "bfloat16")
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("unirefiner", "float32")


def test_a_real_run_merges_into_what_it_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_tower(tmp_path / "tiny-tower")
    save_images(tmp_path / "photos", count=6)
    recipe = {"model": "tiny-tower", "data": "photos", "output_dir": "run"}
    recipe |= {"image_size": 24, "max_steps": 2, "save_steps": 1, "use_cpu": "true"}
    recipe |= {"per_device_train_batch_size": 2, "report_images": 2}
    options = [f"--{name}={value}" for name, value in recipe.items()]
    assert main(["refine", *options]) == 0
    merge = ["merge", "--model", "tiny-tower", "--output"]
    assert main([*merge, "again", "run"]) == 0
    assert main([*merge, "early", "run/checkpoint-1"]) == 0
    left, again = tmp_path / "run" / "merged", tmp_path / "again"
    assert contents(left).keys() == contents(again).keys()
    for name, content in contents(left).items():
        if not name.endswith(".png"):
            assert content == contents(again)[name], name
    early = (tmp_path / "early" / "model.safetensors").read_bytes()
    assert early != (left / "model.safetensors").read_bytes()
