"""One process and two, in every mode: the same losses, and what a kill leaves.

Everything here starts `accelerate launch` with the files that ship. ZeRO needs DeepSpeed
and a C++ compiler, which the tests do not do without.
"""

import random
import shutil

import datasets
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.conftest import adapter, history

MODES = ("ddp", "zero2", "zero3")
WRAPPERS = {
    "ddp": ("MULTI_CPU", "DistributedDataParallel"),
    "zero2": ("DEEPSPEED", "DeepSpeedEngine"),
    "zero3": ("DEEPSPEED", "DeepSpeedEngine"),
}


def merged(run):
    return load_file(run.folder / "merged" / "model.safetensors")


def test_one_process_says_so(alone):
    _, record, metrics = alone
    training = record["training"]
    assert training["processes"] == 1 and training["distributed_type"] == "NO"
    assert training["wrapper"] == "UniRefiner" and metrics["steps"] == 7


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_give_the_losses_of_one(alone, together, mode):
    lone, lone_record, expected = alone
    run, record, metrics = together(mode)
    training = record["training"]
    assert training["processes"] == 2
    assert (training["distributed_type"], training["wrapper"]) == WRAPPERS[mode]
    assert training["total_batch"] == lone_record["training"]["total_batch"] == 4
    assert training["learning_rate"] == pytest.approx(1e-2 * 4 / 16)
    for name in ("loss", "learning_rate", "loss_scd", "clean_ratio", "rejected_ah"):
        assert history(metrics, name) == pytest.approx(
            history(expected, name), abs=1e-5
        ), name
    assert metrics["spurious_shares"]["before"] == pytest.approx(
        expected["spurious_shares"]["before"]
    )
    weights, lone_weights = merged(run), merged(lone)
    assert weights.keys() == lone_weights.keys()
    for name, value in weights.items():
        assert torch.allclose(value, lone_weights[name], atol=1e-3), name
    assert {value.dtype for value in adapter(run).values()} == {torch.float32}


@pytest.mark.parametrize("mode", MODES)
def test_kill_9_at_any_moment_changes_nothing(launch, together, tmp_path, mode):
    whole, _, _ = together(mode)
    run = launch(mode, tmp_path / "run")
    run.kill_at("checkpoint-2", random.random())
    run = launch(mode, tmp_path / "run", resume="true")
    record, _ = run.finished()
    assert record["training"]["resumed"] and record["training"]["processes"] == 2
    for name, value in adapter(whole).items():
        assert torch.equal(adapter(run)[name], value), name


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_kill_9_while_a_checkpoint_is_written_loses_nothing(
    launch, together, tmp_path, mode
):
    run = launch(mode, tmp_path / "run", fault="cut:1:4")
    assert run.wait() != 0
    assert "checkpoint-2 is left" in run.text()
    assert not (run.folder / "checkpoint-4").exists()
    run = launch(mode, tmp_path / "run", resume="true")
    record, _ = run.finished()
    assert record["training"]["resumed"]
    for name, value in adapter(together(mode)[0]).items():
        assert torch.equal(adapter(run)[name], value), name


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(
    launch, together, tmp_path
):
    run = launch("ddp", tmp_path / "run", fault="term:1:2")
    assert run.wait() != 0
    assert "Stopped by SIGTERM; checkpoint-3 was left" in run.text()
    run = launch("ddp", tmp_path / "run", resume="true")
    run.finished()
    for name, value in adapter(together("ddp")[0]).items():
        assert torch.equal(adapter(run)[name], value), name


def test_a_dead_process_ends_the_run_and_says_how_to_go_on(launch, tmp_path):
    run = launch("ddp", tmp_path / "run", fault="kill:1:3")
    assert run.wait() != 0
    assert "lost contact" in run.text() and "checkpoint-2 is left" in run.text()
    assert not (tmp_path / "run" / "merged").exists()


@pytest.mark.parametrize("fault", ["nan:1:2", "full:1:4"])
def test_what_stops_one_process_stops_all(launch, tmp_path, fault):
    run = launch("ddp", tmp_path / "run", fault=fault)
    assert run.wait() != 0
    text = run.log.read_text()
    assert "checkpoint-2" in text
    if fault.startswith("nan"):
        assert "a loss of another process is not finite" in text
    else:
        assert "No space left" in text and "another process failed" in text
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"checkpoint-2", "run.json", "asked.json", ".lock"}


def test_bad_images_of_every_process_are_named(launch, inputs, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(inputs[1], images)
    for number in (1, 4, 7, 10):
        path = images / f"{number:02}.png"
        path.write_bytes(path.read_bytes()[:-30])
    run = launch("ddp", tmp_path / "run", data=images, max_steps=3)
    record, _ = run.finished()
    assert set(record["data"]["skipped"]) == {"01.png", "04.png", "07.png", "10.png"}


def test_a_copy_that_runs_alone_is_refused(launch, tmp_path, monkeypatch):
    """Two processes that do not know of each other must not train side by side."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    from unirefiner_hf.training.distributed import LaunchError, check_launch

    with pytest.raises(LaunchError, match="started 2 processes.*of 1.*train alone"):
        check_launch(1)
    check_launch(2)


def test_a_stream_is_shared_out_and_goes_on_after_a_kill(launch, inputs, tmp_path):
    """Eight images picked of twelve: the losses of one process, killed or not."""
    rows = [{"image": {"bytes": p.read_bytes()}} for p in sorted(inputs[1].iterdir())]
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_list(rows, features=features)
    for part in range(3):
        table.shard(3, part).to_parquet(tmp_path / "data" / f"{part}.parquet")
    stream = {"data": tmp_path / "data", "streaming": "true", "max_images": 8}
    stream |= {
        "fault": "none:0:0",
        "max_steps": -1,
        "num_train_epochs": 3,
        "save_steps": 1,
    }
    lone = launch("single", tmp_path / "a", gradient_accumulation_steps=4, **stream)
    killed = launch("ddp", tmp_path / "b", **stream)
    killed.kill_at("checkpoint-3")
    _, expected = lone.finished()
    assert expected["steps"] == 6
    record, metrics = launch("ddp", tmp_path / "b", **stream, resume="true").finished()
    assert record["training"]["processes"] == 2 and record["training"]["resumed"]
    assert history(metrics, "loss") == pytest.approx(
        history(expected, "loss"), abs=1e-5
    )
