"""Two processes count, train and measure as one."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.distributed.conftest import free_port
from unirefiner_hf.evaluation.segmentation import Validation

PREDICTIONS = torch.tensor([[[0, 1, 2, 2]], [[1, 1, 0, 2]]])
LABELS = np.array([[[0, 1, 1, 255]], [[1, 0, 0, 2]]])


def count(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    scores, areas, shown = counted([rank])
    found = {**dataclasses.asdict(scores), "areas": areas, "shown": np.stack(shown)}
    np.savez(f"{folder}/{rank}.npz", **found)
    dist.destroy_process_group()


def counted(numbers):
    validation = Validation(3, pictures=2)
    for number in numbers:
        validation.count(number, PREDICTIONS[number], LABELS[number])
    return validation.finish()


def test_evaluate_under_a_launcher(tower_folder, scenes, tmp_path):
    """One table, every image measured once, one head on both processes."""
    words = ["evaluate", str(tower_folder), "--data", str(scenes), "--fast"]
    words += ["--crop", "24", "--fast_iterations", "40", "--probe_lr", "0.05"]
    words += ["--seeds", "1", "--evaluation_output", str(tmp_path), "--device", "cpu"]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--main_process_port", free_port()]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launch, "-m", "unirefiner_hf", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| mIoU (%) ") == 1
    content = json.loads((tmp_path / "evaluation.json").read_text())
    ((entry, _),) = content["checkpoints"].values()
    assert (entry["n"], entry["settings"]["processes"]) == (4, 2)
    assert entry["value"] > 40


def test_two_processes_count_as_one(tmp_path):
    multiprocessing.spawn(count, args=(str(tmp_path),), nprocs=2)
    scores, areas, shown = counted([0, 1])
    for rank in (0, 1):
        found = np.load(tmp_path / f"{rank}.npz")
        for name, value in dataclasses.asdict(scores).items():
            np.testing.assert_array_equal(found[name], value)
        np.testing.assert_array_equal(found["areas"], areas)
        np.testing.assert_array_equal(found["shown"], np.stack(shown))
