"""`accelerate launch -m unirefiner_hf refine`, one process and two."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import save_images, save_tiny_tower

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(options, run, tower, images, batch):
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    command += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command += ["--main_process_port", free_port()]
    fields = {
        "model": tower,
        "data": images,
        "output_dir": run,
        "image_size": 24,
        "max_steps": 3,
        "logging_steps": 2,
        "per_device_train_batch_size": batch,
        "report_images": 1,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    words = [word for key, value in fields.items() for word in (f"--{key}", str(value))]
    result = subprocess.run(
        [*command, "-m", "unirefiner_hf", "refine", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert result.returncode == 0, result.stderr[-3000:]
    record = json.loads((run / "run.json").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    return record, metrics


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    return save_tiny_tower(folder / "tower"), save_images(folder / "images")


def test_one_process(inputs, tmp_path):
    record, metrics = launch(["--num_processes", "1"], tmp_path / "run", *inputs, 2)
    assert record["training"]["processes"] == 1 and metrics["steps"] == 3


def test_two_processes_share_one_run(inputs, tmp_path):
    options = ["--multi_gpu", "--num_processes", "2"]
    record, metrics = launch(options, tmp_path / "run", *inputs, 1)
    assert record["training"]["processes"] == 2
    assert record["training"]["total_batch"] == 2
    assert record["training"]["learning_rate"] == pytest.approx(1e-4 * 2 / 16)
    assert metrics["steps"] == 3 and metrics["losses"]["loss_uni"] > 0
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    states = sorted(
        p.name for p in (tmp_path / "run" / "checkpoint-3").glob("random_*")
    )
    assert states == ["random_state_0.safetensors", "random_state_1.safetensors"]
