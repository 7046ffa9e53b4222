"""PH-Reg from a recipe's arguments to a published checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.conftest import make_tiny_tower
from tests.training.conftest import refine, save_tiny_tower
from tests.training.test_run import DEMANDING, adapter, losses
from unirefiner_hf.evaluation.checkpoints import check_same_tower, load_checkpoint
from unirefiner_hf.export.checkpoint import ExportError
from unirefiner_hf.export.merge import load_refined, merge
from unirefiner_hf.export.reload_check import check_reload, encode, example_pixels
from unirefiner_hf.export.run_folder import read_run
from unirefiner_hf.loading.adapter import load_adapter
from unirefiner_hf.methods.ph_reg.settings import PHRegSettings
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.training.trainer import (
    CheckpointError,
    RunError,
    UniRefinerTrainer,
)

METHOD = {"method": "ph_reg", "register_tokens": 4, "teacher_views": 3}


def students_tokens(run, tower, pixels):
    """Tokens of the training's student, built from the run's own weights by hand."""
    model = UniRefinerModel.from_tower(
        AutoModel.from_pretrained(tower), register_width=0, num_register_tokens=4
    )
    missing = dict(model.tower.named_parameters())
    with torch.no_grad():
        for name, value in adapter(run).items():
            missing[name].copy_(value)
        tokens = load_file(run / "adapter" / "register_tokens.safetensors")
        model.register_tokens.copy_(tokens["register_tokens"])
        return model.eval()(pixels).last_hidden_state


def test_a_run_leaves_a_checkpoint_with_its_registers_inside(arguments, tower_folder):
    run = refine(
        *arguments(method=METHOD, max_steps=4, learning_rate=1e-2, snapshot_steps=4)
    )
    record = json.loads((run / "run.json").read_text())
    assert record["method"]["name"] == "ph_reg"
    assert record["model"]["register_width"] == 0
    assert set(record["losses"]) == {"loss", "loss_cosine", "loss_mse"}
    assert (
        json.loads((run / "merged" / "config.json").read_text())["format_version"] == 2
    )
    model = AutoModel.from_pretrained(run / "merged").eval()
    assert model.config.num_register_tokens == 4
    assert model.register_tokens.shape == (4, 32)
    pixels = torch.randn(1, 3, 24, 16)
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state
    expected = students_tokens(run, tower_folder, pixels)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-5)
    with torch.no_grad(), model.without_register_tokens():
        assert not torch.allclose(model(pixels).last_hidden_state, tokens, atol=1e-3)
    base = make_tiny_tower("dinov2").state_dict()
    changed = {n for n, v in model.tower.state_dict().items() if not v.equal(base[n])}
    assert changed == set(adapter(run))
    assert (run / "before_after.png").is_file()
    card = (run / "merged" / "README.md").read_text()
    assert "PH-Reg" in card and "4 learned register tokens" in card
    for word in ("lora_rank", "LoRA", "peft", "Register frame", "strip_ratio"):
        assert word not in card, word


def test_other_processes_load_it_with_and_without_the_package(arguments, tmp_path):
    tower = save_tiny_tower(tmp_path / "tower", "siglip_vision_model")
    run = refine(
        *arguments(
            model={"model": str(tower)},
            data={"report_images": 0},
            method=METHOD,
            max_steps=2,
            learning_rate=1e-2,
        )
    )
    base = load_refined(read_run(run), str(tower))
    pixels = example_pixels(base)
    trained = encode(base.model, pixels, native=False)
    base.model.tower = base.model.tower.merge_and_unload()
    merged = merge(run, tmp_path / "merged", model=str(tower)).folder
    report = check_reload(
        merged, base, trained, pixels, dtype=torch.float32, native=False
    )
    assert set(report.reloaded) == {"package", "remote"}
    assert max(report.merged, *report.reloaded.values()) < 1e-5


def test_a_continued_run_equals_an_undisturbed_one(arguments, tmp_path):
    options = {**DEMANDING, "final_lr_share": 0.05, "max_steps": 5}
    options["lr_scheduler_type"] = "constant"
    method = {**METHOD, "teacher_views": 2}
    whole = refine(
        *arguments(method=method, **options, output_dir=str(tmp_path / "whole"))
    )
    history = json.loads((whole / "metrics.json").read_text())["history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    start = 1e-2 * 4 / 16
    # The rate logged at a step is the one it was taken with.
    assert rates == pytest.approx([start * 0.05 ** (n / 5) for n in range(5)])
    run = tmp_path / "halves"
    refine(*arguments(method=method, **options, output_dir=str(run)))
    for later in ("checkpoint-4", "checkpoint-5"):
        (run / later).rename(tmp_path / later)
    again = refine(
        *arguments(method=method, **options, output_dir=str(run), resume=True)
    )
    assert losses(again) == losses(whole)
    for name, value in adapter(whole).items():
        assert value.equal(adapter(again)[name]), name
    one, two = (
        load_file(r / "adapter" / "register_tokens.safetensors")["register_tokens"]
        for r in (whole, again)
    )
    assert one.equal(two)


def test_runs_and_checkpoints_merge_again_but_not_natively(
    arguments, tower_folder, tmp_path
):
    run = refine(
        *arguments(method=METHOD, data={"report_images": 0}, max_steps=2, save_steps=1)
    )
    pixels = torch.randn(1, 3, 24, 24)
    outputs = []
    for folder in (run, run / "checkpoint-2", run / "checkpoint-1"):
        merged = merge(folder, tmp_path / f"m-{folder.name}", model=str(tower_folder))
        model = AutoModel.from_pretrained(merged.folder).eval()
        outputs.append(model(pixels).last_hidden_state)
    assert outputs[0].equal(outputs[1]) and not outputs[0].equal(outputs[2])
    with pytest.raises(ExportError, match="4 register tokens.*without --native"):
        merge(run, tmp_path / "native", model=str(tower_folder), native=True)
    file = run / "checkpoint-1" / "register_tokens.safetensors"
    file.unlink()
    with pytest.raises(Exception, match="not whole: register_tokens.saf"):
        merge(run / "checkpoint-1", tmp_path / "cut", model=str(tower_folder))


def test_an_adapter_of_another_method_does_not_fit(arguments, tower_folder, tmp_path):
    run = refine(*arguments(method=METHOD, data={"report_images": 0}, max_steps=1))
    base = load_refined(read_run(run), str(tower_folder))
    weights = adapter(run)
    weights.popitem()
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit this tower.*method"):
        load_adapter(base.model, tmp_path)


def test_evaluation_knows_it_as_a_result_of_its_base(arguments, tower_folder):
    run = refine(
        *arguments(
            method=METHOD,
            data={"report_images": 0},
            max_steps=4,
            learning_rate=0.3,
            scale_learning_rate=False,
        )
    )
    base, found = load_checkpoint(str(tower_folder)), load_checkpoint(str(run))
    assert found.name == "PH-Reg" and found.register_width == 0
    assert found.method == "ph_reg" and found.needs_controls
    check_same_tower(base, found)
    embeddings = [
        torch.cat([p.flatten() for p in c.model.get_input_embeddings().parameters()])
        for c in (base, found)
    ]
    assert torch.cosine_similarity(*embeddings, dim=0) < 0.99
    bare = load_checkpoint(str(run / "merged"))
    assert bare.method == "ph_reg"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"base_dtype": "bfloat16"}, "base_dtype"),
        ({"teacher_float8": True}, "teacher_float8"),
        ({"register_fill": "learnable"}, "register_fill"),
        ({"inference_register_width": 4}, "inference_register_width"),
    ],
)
def test_what_does_not_go_with_it_is_refused(arguments, monkeypatch, model, name):
    checked = "unirefiner_hf.training.trainer.check_float8"
    monkeypatch.setattr(checked, lambda device: None)
    with pytest.raises(UniRefinerError, match=f"{name} is .*method ph_reg"):
        refine(*arguments(model=model, method=METHOD))


def test_towers_without_positions_are_refused_before_anything_is_written(
    arguments, tmp_path
):
    tower = save_tiny_tower(tmp_path / "tower", "dinov3_vit")
    with pytest.raises(ValueError, match="dinov3_vit tower takes no register tokens"):
        refine(*arguments(model={"model": str(tower)}, method=METHOD))
    assert not (tmp_path / "run").exists()


def test_parted_weights_are_refused(arguments, monkeypatch):
    monkeypatch.setattr(UniRefinerTrainer, "parts_weights", True)
    with pytest.raises(RunError, match="ZeRO-3 or FSDP"):
        refine(*arguments(method=METHOD))


def test_a_checkpoint_of_an_unfinished_run_has_no_frame(
    arguments, tower_folder, tmp_path
):
    run = refine(*arguments(method=METHOD, data={"report_images": 0}, max_steps=1))
    record = json.loads((run / "run.json").read_text())
    del record["model"]["register_width"]
    (run / "run.json").write_text(json.dumps({**record, "finished": False}))
    merged = tmp_path / "merged"
    merge(run / "checkpoint-1", merged, model=str(tower_folder))
    assert AutoModel.from_pretrained(merged).config.register_width == 0


def test_defaults_are_the_published_ones():
    settings = PHRegSettings()
    assert settings.register_tokens == 16 and settings.teacher_views == 10
    assert settings.teacher_offsets == 100 and settings.teacher_shift == 0.15
