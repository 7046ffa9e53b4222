"""A refinement from start to finish, interrupted and continued, and with bad input."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel

from tests.conftest import make_tiny_tower
from tests.dual_encoders import save_dual_encoder
from tests.training.conftest import refine, save_images
from unirefiner_hf.data.images import ImageError
from unirefiner_hf.export.merge import merge
from unirefiner_hf.export.run_folder import ASKED, STAGING
from unirefiner_hf.loading.backbone import BackboneError
from unirefiner_hf.loading.processor import ProcessorError
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.text_side import load_text_side
from unirefiner_hf.training import checkpoints
from unirefiner_hf.training import trainer as trainer_module
from unirefiner_hf.training.asked_of_run import OtherRunError
from unirefiner_hf.training.trainer import (
    CheckpointError,
    Interrupted,
    NonFiniteLossError,
    RunError,
)

# Dropout on, a schedule that moves, accumulation: what a resume must bring back.
DEMANDING = {
    "lr_scheduler_type": "cosine",
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "max_steps": 7,
    "save_steps": 2,
    "save_total_limit": None,
}


def losses(run):
    history = json.loads((Path(run) / "metrics.json").read_text())["history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def adapter(run):
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "frame", [{"register_fill": "learnable"}, {"inference_register_width": 1}]
)
def test_the_baseline_takes_no_border(arguments, frame):
    with pytest.raises(UniRefinerError, match="method distillation: it trains without"):
        refine(*arguments(model=frame, method={"method": "distillation"}))


def test_the_baseline_leaves_a_model_without_a_border(arguments, tower_folder):
    run = refine(*arguments(method={"method": "distillation"}, max_steps=2))
    record = json.loads((run / "run.json").read_text())
    assert record["method"]["name"] == "distillation"
    assert record["model"]["register_width"] == 0
    assert AutoModel.from_pretrained(run / "merged").config.register_width == 0
    assert "loss_uni" not in record["losses"]
    for folder in (run, run / "checkpoint-2"):
        output = run / f"again-{folder.name}"
        merged = merge(folder, output, model=str(tower_folder)).folder
        assert AutoModel.from_pretrained(merged).config.register_width == 0


def test_a_run_leaves_what_it_promises(arguments, tower_folder):
    run = refine(*arguments(snapshot_steps=3))
    names = {path.name for path in run.iterdir()}
    assert {
        "merged",
        "adapter",
        "before_after.png",
        "metrics.json",
        "run.json",
    } <= names
    assert {p.name for p in (run / "snapshots").iterdir()} == {
        "step-000000.png",
        "step-000003.png",
        "step-000006.png",
    }
    model = AutoModel.from_pretrained(run / "merged")
    pixels = torch.randn(1, 3, 24, 16)
    assert model(pixels).last_hidden_state.shape == (1, 24, 32)
    bare = AutoModel.from_pretrained(tower_folder)(pixels).last_hidden_state[:, 1:]
    assert not torch.allclose(model(pixels, register_width=0).last_hidden_state, bare)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 6 and metrics["seconds"] > 0
    for when in ("before", "after"):
        shares = metrics["spurious_shares"][when]
        assert 0 <= shares["fpgp"] <= shares["spurious"] <= 1
        assert shares["spurious"] == pytest.approx(shares["fpgp"] + shares["ah"])
    assert {"loss_regu", "loss_scd", "clean_ratio", "rejected_ah"} <= set(
        metrics["losses"]
    )
    assert Image.open(run / "before_after.png").width > 1000


def test_no_path_of_this_machine_is_written(
    arguments, tmp_path, image_folder, tower_folder
):
    run = refine(*arguments(max_steps=2))
    private = (str(tmp_path), str(image_folder.parent), str(tower_folder.parent))
    for file in run.rglob("*"):
        if file.is_file() and file.name != ASKED:  # which is never published
            content = file.read_bytes()
            for path in private:
                assert path.encode() not in content, f"{path} stands in {file.name}"


def test_nothing_is_pickled(arguments):
    run = refine(*arguments(max_steps=2))
    files = [path for path in run.rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in files if path.name != ".lock"}
    assert suffixes == {".safetensors", ".json", ".md", ".py", ".png"}


def test_a_continued_run_equals_an_undisturbed_one(arguments, tmp_path):
    whole = refine(*arguments(**DEMANDING, output_dir=str(tmp_path / "whole")))
    run = str(tmp_path / "halves")
    refine(*arguments(**{**DEMANDING, "output_dir": run}))
    for later in ("checkpoint-6", "checkpoint-7"):
        (Path(run) / later).rename(tmp_path / later)
    again = refine(*arguments(**DEMANDING, output_dir=run, resume=True))
    assert losses(again) == losses(whole)
    for name, value in adapter(whole).items():
        assert torch.equal(adapter(again)[name], value), name


def test_a_run_killed_after_its_last_step_trains_no_more(arguments, tmp_path):
    """Whether its length was given in steps or in epochs."""
    for length in ({"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 1}):
        options = {"output_dir": str(tmp_path / str(len(length))), **length}
        run = refine(*arguments(**options))
        weights, expected = adapter(run), losses(run)
        (run / "adapter" / "adapter_model.safetensors").unlink()
        again = refine(*arguments(**options, resume=True))
        assert losses(again) == expected
        for name, value in weights.items():
            assert torch.equal(adapter(again)[name], value), name


KILLED = """
    import json, os, signal, sys
    from unirefiner_hf import refine
    from unirefiner_hf.training import checkpoints

    save = checkpoints.save_tree

    def save_and_die(tree, path):
        save(tree, path)
        if "checkpoint-4" in str(path):  # in the middle of writing it
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save_tree = save_and_die
    refine(**json.loads(sys.argv[1]))
"""


def test_kill_9_while_saving_loses_nothing(
    arguments, tmp_path, tower_folder, image_folder
):
    whole = refine(*arguments(**DEMANDING, output_dir=str(tmp_path / "whole")))
    run = tmp_path / "killed"
    options = {
        **DEMANDING,
        "model": str(tower_folder),
        "data": str(image_folder),
        "image_size": 24,
        "report_images": 2,
        "ah_layers": [0, 1],
        "output_dir": str(run),
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), json.dumps(options)],
        capture_output=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert (run / "checkpoint-2").is_dir() and not (run / "checkpoint-4").exists()
    again = refine(*arguments(**DEMANDING, output_dir=str(run), resume=True))
    assert losses(again) == losses(whole)
    for name, value in adapter(whole).items():
        assert torch.equal(adapter(again)[name], value), name
    assert not (run / STAGING).exists()


def test_ctrl_c_leaves_a_checkpoint(arguments, tmp_path, monkeypatch):
    compute = trainer_module.UniRefinerTrainer.compute_loss

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.UniRefinerTrainer, "compute_loss", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="checkpoint-3.*--resume"):
        refine(*arguments(save_steps=100))
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    assert not (tmp_path / "run" / "merged").exists()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("term", ["loss_regu", "loss_uni"])
def test_a_nan_stops_the_run_and_names_the_term(arguments, tmp_path, monkeypatch, term):
    function = {"loss_regu": "refinement_loss", "loss_uni": "register_uniformity_loss"}[
        term
    ]
    from unirefiner_hf.methods import losses as loss_terms

    calls = []
    original = getattr(loss_terms, function)

    def break_fourth(*args, **kwargs):
        calls.append(1)
        value = original(*args, **kwargs)
        return value * float("nan") if len(calls) == 4 else value

    monkeypatch.setattr(loss_terms, function, break_fourth)
    with pytest.raises(
        NonFiniteLossError, match=rf"Step 4.*{term} = nan.*checkpoint-2"
    ):
        refine(*arguments())
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_a_full_disk_keeps_the_checkpoint_before(arguments, tmp_path, monkeypatch):
    """A real failing write: the process may write no file larger than 40 kB."""
    save = checkpoints.save_tree
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def small_disk(tree, path):
        if "checkpoint-4" in str(path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        save(tree, path)

    monkeypatch.setattr(checkpoints, "save_tree", small_disk)
    try:
        with pytest.raises(
            CheckpointError, match=r"checkpoint-4 .*checkpoint-2.*--resume"
        ):
            refine(*arguments())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "checkpoint-2" in names and "checkpoint-4" not in names
    assert STAGING not in names
    monkeypatch.setattr(checkpoints, "save_tree", save)
    assert (refine(*arguments(resume=True)) / "merged").is_dir()


def test_a_folder_that_holds_a_run_is_refused(arguments):
    refine(*arguments(max_steps=2))
    with pytest.raises(RunError, match="already holds a run.*--resume"):
        refine(*arguments())


def test_resume_without_a_checkpoint_starts_at_the_beginning(arguments):
    run = refine(*arguments(max_steps=1, resume=True))
    assert json.loads((run / "run.json").read_text())["training"]["resumed"] is False


def test_a_checkpoint_of_another_adapter_is_refused(arguments):
    refine(*arguments(max_steps=2))
    with pytest.raises(OtherRunError, match="lora_rank was 8, now 2"):
        refine(*arguments(model={"lora_rank": 2}, max_steps=2, resume=True))


def test_a_checkpoint_of_another_total_batch_is_refused(arguments):
    refine(*arguments(max_steps=2))
    message = "checkpoint-2.* 2 images a step.* has 4 images a step"
    # Before the backbone is loaded, which could not be.
    options = arguments(max_steps=2, gradient_accumulation_steps=2, resume=True)
    with pytest.raises(CheckpointError, match=message):
        refine("/no/such/model", *options[1:])


def test_a_stream_of_unknown_length_needs_max_steps(arguments, image_folder, tmp_path):
    rows = [{"image": {"bytes": p.read_bytes()}} for p in image_folder.iterdir()]
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(tmp_path / "x.parquet")
    stream = {"data": str(tmp_path / "x.parquet"), "streaming": True}
    with pytest.raises(RunError, match="max_images.*or max_steps"):
        refine(*arguments(data=stream, max_steps=-1))


def test_accumulation_takes_the_mean_over_its_batches(arguments, tmp_path):
    """Two half batches step the optimiser once; the run has half as many steps."""
    common = {"max_steps": -1, "num_train_epochs": 1}
    run = refine(*arguments(**common, gradient_accumulation_steps=3))
    assert json.loads((run / "metrics.json").read_text())["steps"] == 2
    record = json.loads((run / "run.json").read_text())
    assert record["training"]["total_batch"] == 6


def test_the_learning_rate_follows_the_total_batch(arguments, tmp_path):
    run = refine(*arguments(max_steps=1, gradient_accumulation_steps=4))
    record = json.loads((run / "run.json").read_text())
    assert record["training"]["learning_rate"] == pytest.approx(1e-4 * 8 / 16)


def test_gradient_checkpointing_gives_the_same_losses(arguments, tmp_path):
    plain = refine(*arguments(output_dir=str(tmp_path / "a"), max_steps=3))
    recomputed = refine(
        *arguments(
            output_dir=str(tmp_path / "b"), max_steps=3, gradient_checkpointing=True
        )
    )
    assert losses(recomputed) == pytest.approx(losses(plain), abs=1e-5)


def test_bfloat16_keeps_the_adapter_in_float32(arguments):
    run = refine(*arguments(max_steps=2, bf16=True))
    assert all(value.dtype == torch.float32 for value in adapter(run).values())
    record = json.loads((run / "run.json").read_text())
    assert record["training"]["precision"] == "bfloat16"


def test_a_stream_is_trained_on(arguments, image_folder, tmp_path):
    rows = [
        {"image": {"bytes": p.read_bytes(), "path": None}}
        for p in image_folder.iterdir()
    ]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(
        tmp_path / "x.parquet"
    )
    stream = {"data": str(tmp_path / "x.parquet"), "streaming": True}
    run = refine(*arguments(data=stream, max_steps=3))
    assert json.loads((run / "metrics.json").read_text())["steps"] == 3


def test_metrics_reach_tensorboard(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    refine(*arguments(max_steps=2, report_to=["tensorboard"]))
    events = EventAccumulator(str(next((tmp_path / "events").rglob("*tfevents*"))))
    tags = events.Reload().Tags()["scalars"]
    for name in ("loss", "loss_regu", "clean_ratio", "rejected_ah"):
        assert f"train/{name}" in tags


@pytest.mark.parametrize("fill", ["randn", "learnable"])
def test_other_frames_survive_publishing(arguments, fill):
    run = refine(*arguments(model={"register_fill": fill}, max_steps=2))
    model = AutoModel.from_pretrained(run / "merged")
    assert model.config.register_fill == fill
    if fill == "learnable":
        assert model.register_patch.abs().sum() > 0


def test_an_unreadable_image_is_counted_and_named(arguments, image_folder, tmp_path):
    folder = tmp_path / "some-bad"
    folder.mkdir()
    for path in image_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "text.png").write_text("not an image")
    whole = (folder / "00.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    run = refine(
        *arguments(data={"data": str(folder)}, max_steps=-1, num_train_epochs=1)
    )
    skipped = json.loads((run / "run.json").read_text())["data"]["skipped"]
    assert set(skipped) == {"text.png", "cut.png"}


@pytest.mark.parametrize("size,message", [(25, "24 or 28"), (3, "8 or 12")])
def test_a_size_off_the_patch_grid_is_refused(arguments, size, message):
    with pytest.raises(BackboneError, match=message):
        refine(*arguments(model={"image_size": size}))


def test_an_empty_folder_is_refused(arguments, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="no image, no files"):
        refine(*arguments(data={"data": str(tmp_path / "empty")}))


def test_a_tower_not_in_the_table_is_refused(arguments, tmp_path, tower_folder):
    from transformers import SwinConfig, SwinModel

    tiny = SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=16)
    SwinModel(tiny).save_pretrained(tmp_path / "swin")
    with pytest.raises(ValueError, match="'?swin'?.*Supported: .*dinov2"):
        refine(*arguments(model={"model": str(tmp_path / "swin")}))


def test_a_run_does_not_lie_among_its_images(arguments, tmp_path):
    folder = save_images(tmp_path / "photos", 2)
    with pytest.raises(RunError, match="photos, the folder of the images"):
        refine(*arguments(data={"data": str(folder)}, output_dir=str(folder)))
    assert not (folder / "run.json").exists()


def test_a_tower_without_its_processor_is_refused(arguments, tmp_path):
    make_tiny_tower("vit").save_pretrained(tmp_path / "private-vit")
    with pytest.raises(
        ProcessorError, match="private-vit has no usable preprocessor_config"
    ):
        refine(*arguments(model={"model": str(tmp_path / "private-vit")}))


def test_the_base_is_not_touched(arguments, tower_folder):
    refine(*arguments(max_steps=2, learning_rate=1.0))
    pixels = torch.randn(1, 3, 16, 16)
    reloaded = AutoModel.from_pretrained(tower_folder)(pixels).last_hidden_state
    expected = make_tiny_tower("dinov2")(pixels).last_hidden_state
    assert torch.equal(reloaded, expected)


def test_a_dual_encoder_stays_whole(arguments, tmp_path):
    dual = save_dual_encoder(tmp_path / "dual", "clip")
    run = refine(
        *arguments(
            model={"model": str(tmp_path / "dual")},
            data={"report_images": 0},
            max_steps=1,
            save_strategy="no",
        )
    )
    assert json.loads((run / "run.json").read_text())["model"]["keep_text"] is True
    side = load_text_side(run / "merged")
    words = side.tokens(["a photo of the cat"])
    with torch.no_grad():
        expected = dual.get_text_features(**words).pooler_output
    assert torch.equal(side.encode(["a photo of the cat"]), expected)
