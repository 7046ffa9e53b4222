"""Two processes count, train and measure as one."""

import json
import os
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.distributed.conftest import free_port
from unirefiner_hf.evaluation.metrics import ConfusionMatrix

PREDICTIONS = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 2]])
LABELS = torch.tensor([[0, 1, 1, 255], [1, 0, 0, 2]])


def count(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    confusion = ConfusionMatrix(3)
    confusion.update(PREDICTIONS[rank], LABELS[rank])
    confusion.all_reduce()
    torch.save(confusion.matrix, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


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
    whole = ConfusionMatrix(3)
    whole.update(PREDICTIONS, LABELS)
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), whole.matrix)
