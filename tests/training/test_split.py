"""What another split over processes may go on with, told before anything is loaded."""

import json
from types import SimpleNamespace

import pytest

from unirefiner_hf.training.split import (
    CheckpointError,
    Split,
    accumulation_for,
    check_split,
    logger,
)
from unirefiner_hf.training.zero_state import without_empty_groups

# One image at once, twice, on two processes: a total batch of 4.
SAVED = {**Split(1, 2, 2).to_dict(), "state": "whole"}


@pytest.fixture
def checkpoint(tmp_path):
    def make(*files, **state):
        folder = tmp_path / "checkpoint-2"
        folder.mkdir()
        saved = {"skipped": {}, "lazy_channels": [], **SAVED, **state}
        (folder / "refiner_state.json").write_text(json.dumps(saved))
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(b"")
        return folder

    return make


def run_of(batch, accumulation, processes, **fields):
    values = {
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "world_size": processes,
        "dataloader_drop_last": False,
        "allow_pickled_checkpoint": False,
        "fsdp": None,
        "deepspeed_plugin": None,
    }
    return SimpleNamespace(**{**values, **fields})


ZERO2 = {"deepspeed_plugin": SimpleNamespace(zero_stage=2)}
ZERO3 = {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}


@pytest.mark.parametrize(
    "total,batch,processes,expected",
    [(4, 1, 2, 2), (4, 1, 4, 1), (4, 1, 3, None), (4, 8, 1, None), (64, 2, 8, 4)],
)
def test_the_accumulation_that_keeps_the_total_batch(total, batch, processes, expected):
    assert accumulation_for(total, batch, processes) == expected


@pytest.mark.parametrize(
    "split", [(1, 2, 2), (1, 4, 1), (1, 1, 4), (2, 1, 2), (4, 1, 1)]
)
@pytest.mark.parametrize("engine", [{}, ZERO2, ZERO3])
def test_the_same_total_batch_goes_on(checkpoint, split, engine):
    check_split(checkpoint(), run_of(*split, **engine))


@pytest.mark.parametrize(
    "split,message",
    [
        (
            (1, 2, 4),
            r"4 images a step \(1 at once x 2 accumulated x 2 processes\), this run has 8 "
            r"images a step \(1 .* 2 .* 4 processes\)\. Set gradient_accumulation_steps to 1",
        ),
        ((1, 2, 3), "4 images a step.*6 images a step.*1 or 2 or 4 processes"),
        ((8, 1, 1), "has 8 images.*per_device_train_batch_size to a divisor of 4"),
    ],
)
def test_another_total_batch_is_refused_by_both_numbers(checkpoint, split, message):
    with pytest.raises(CheckpointError, match=message):
        check_split(checkpoint(), run_of(*split))


def test_more_images_at_once_are_told_of(checkpoint, caplog):
    logger.addHandler(caplog.handler)
    try:
        check_split(checkpoint(), run_of(2, 1, 2))
    finally:
        logger.removeHandler(caplog.handler)
    assert "took 1 images at once, this run takes 2" in caplog.text


@pytest.mark.parametrize(
    "files,fields,message",
    [
        (
            [],
            {"dataloader_drop_last": True},
            "dataloader_drop_last.*Continue as before",
        ),
        (["stream_position_0.json"], {}, "per_device_train_batch_size to 1"),
    ],
)
def test_what_would_lose_images_is_refused(checkpoint, files, fields, message):
    with pytest.raises(CheckpointError, match=message):
        check_split(checkpoint(*files), run_of(2, 1, 2, **fields))


@pytest.mark.parametrize(
    "state,split,fields,message",
    [
        ("DEEPSPEED ZeRO-2", (1, 4, 1), ZERO2, "2 processes .DEEPSPEED ZeRO-2.*has 1"),
        ("DEEPSPEED ZeRO-2", (1, 2, 2), ZERO3, "ZeRO-2.*ZeRO-3.*launch as before"),
        ("DEEPSPEED ZeRO-2", (1, 2, 2), ZERO2, "anything.*allow_pickled_checkpoint"),
        ("FSDP", (1, 2, 2), {}, "2 processes .FSDP.*2 .whole"),
        ("FSDP", (1, 2, 2), {"fsdp": "full_shard"}, "allow_pickled_checkpoint"),
    ],
)
def test_an_engines_own_state_is_for_the_same_launch_and_asked_for(
    checkpoint, state, split, fields, message
):
    folder = checkpoint("global_step2/zero_pp_rank_0_optim_states.pt", state=state)
    with pytest.raises(CheckpointError, match=message):
        check_split(folder, run_of(*split, **fields))
    if "allow" in message:
        check_split(folder, run_of(*split, **fields, allow_pickled_checkpoint=True))


def test_an_engines_own_state_that_is_missing_is_told(checkpoint):
    folder = checkpoint(state="DEEPSPEED ZeRO-2")
    with pytest.raises(CheckpointError, match="missing from checkpoint-2"):
        check_split(folder, run_of(1, 2, 2, **ZERO2))


def test_fsdp_does_not_go_on_with_the_state_of_others(checkpoint):
    with pytest.raises(CheckpointError, match="whole.*FSDP.*launch as before"):
        check_split(checkpoint(), run_of(1, 2, 2, fsdp="full_shard"))


def test_a_pickle_among_safe_files_is_asked_for(checkpoint):
    folder = checkpoint("global_step2/mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="global_step2.*reading a pickle"):
        check_split(folder, run_of(1, 2, 2))


def test_groups_without_a_parameter_are_left_out():
    groups = [{"lr": 1.0, "params": [0, 1]}, {"lr": 2.0, "params": []}]
    tree = {"state": {0: {}, 1: {}}, "param_groups": groups}
    schedule = {"base_lrs": [1.0, 2.0], "_last_lr": [0.5, 1.0], "last_epoch": 3}
    without_empty_groups(tree, schedule)
    assert tree["param_groups"] == [{"lr": 1.0, "params": [0, 1]}]
    assert schedule == {"base_lrs": [1.0], "_last_lr": [0.5], "last_epoch": 3}
