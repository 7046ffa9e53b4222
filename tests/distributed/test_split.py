"""A run goes on with another number of processes, and by other means, as if undisturbed."""

import json
import shutil

import pytest
import torch

from tests.distributed.conftest import adapter, history

# Total batch 4, one image at once: what each takes of it.
ACCUMULATION = {1: 4, 2: 2}


def taken_over(run, folder, checkpoint="checkpoint-2"):
    """A run's folder as a kill after that checkpoint would have left it."""
    shutil.copytree(run.folder / checkpoint, folder / checkpoint)
    record = json.loads((run.folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "finished": False}))
    return folder


@pytest.mark.parametrize(
    "before,mode,processes",
    [
        ("single", "ddp", 2),
        ("ddp", "single", 1),
        ("single", "zero2", 2),
        ("zero2", "zero3", 2),
        ("zero2", "zero2", 1),
        ("zero3", "ddp", 2),
    ],
)
def test_another_split_sees_the_same_batches(
    launch, alone, together, tmp_path, before, mode, processes
):
    """Losses and rates as if undisturbed, weights within float tolerance."""
    run, _, expected = alone if before == "single" else together(before)
    folder = taken_over(run, tmp_path / "run")
    again = launch(
        mode,
        folder,
        processes=processes,
        resume="true",
        gradient_accumulation_steps=ACCUMULATION[processes],
    )
    record, metrics = again.finished()
    training = record["training"]
    assert training["resumed"] and training["processes"] == processes
    assert training["total_batch"] == 4
    for name in ("loss", "learning_rate", "clean_ratio"):
        assert len(history(metrics, name)) == 7
        assert history(metrics, name) == pytest.approx(
            history(expected, name), abs=1e-5
        ), name
    undisturbed = adapter(run)
    for name, value in adapter(again).items():
        assert torch.allclose(value, undisturbed[name], atol=1e-3), name


def test_a_pickled_state_goes_on_where_it_is_allowed(launch, together, tmp_path):
    """As earlier versions wrote it under ZeRO; what is refused is in tests/training."""
    run = launch("zero2", tmp_path / "whole", fault="pickle:0:0")
    run.finished()
    assert list(run.folder.rglob("*optim_states.pt"))
    folder = taken_over(run, tmp_path / "run")
    allowed = {"resume": "true", "allow_pickled_checkpoint": "true"}
    again = launch("zero2", folder, **allowed)
    again.finished()
    undisturbed = adapter(together("zero2")[0])
    for name, value in adapter(again).items():
        assert torch.equal(value, undisturbed[name]), name
