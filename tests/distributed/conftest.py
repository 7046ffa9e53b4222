"""Launching runs as a user does, with the shipped accelerate files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import BitImageProcessorPil

from tests.conftest import make_tiny_tower
from tests.training.conftest import save_images

ROOT = Path(__file__).parents[2]
SECONDS = 300

# Dropout on, shuffled data, a schedule that moves, accumulation: what must come out alike
# on one process and on two, and after a kill. Total batch 4.
RUN: dict[str, Any] = {
    "image_size": 24,
    "max_steps": 7,
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": "null",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "learning_rate": 1e-2,
    "report_images": 1,
    "disable_tqdm": "true",
}


@dataclass
class Run:
    """A launched command."""

    process: subprocess.Popen
    folder: Path
    log: Path

    def wait(self) -> int:
        try:
            return self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running:\n{self.text()}") from None

    def kill(self) -> None:
        """End the launcher and every process it started, at once."""
        launcher = psutil.Process(self.process.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # one may just have ended
                process.kill()
        self.process.wait(30)

    def text(self) -> str:
        return self.log.read_text()[-6000:]

    def kill_at(self, checkpoint: str, seconds: float = 0.0) -> None:
        """Kill everything some time after a checkpoint appears."""
        limit = time.monotonic() + SECONDS
        while not (self.folder / checkpoint).is_dir():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < limit, self.text()
            time.sleep(0.02)
        time.sleep(seconds)
        assert self.process.poll() is None, "the run was over before it was killed"
        self.kill()

    def finished(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The record and the metrics of a run that must succeed."""
        assert self.wait() == 0, self.text()
        record = json.loads((self.folder / "run.json").read_text())
        return record, json.loads((self.folder / "metrics.json").read_text())


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tower whose matrices are wide enough for ZeRO-3 to split, and 12 images."""
    folder = tmp_path_factory.mktemp("launch")
    tower = make_tiny_tower("dinov2", hidden_size=320)
    tower.save_pretrained(folder / "tower")
    BitImageProcessorPil(size={"shortest_edge": 20}).save_pretrained(folder / "tower")
    return folder / "tower", save_images(folder / "images")


@pytest.fixture(scope="session")
def launch(
    inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """Start ``accelerate launch`` with a shipped file; fields go over `RUN`."""
    tower, images = inputs
    logs = tmp_path_factory.mktemp("logs")

    def start(
        mode: str, folder: Path, fault: str = "", processes: int = 0, **fields: Any
    ) -> Run:
        config = ROOT / "recipes" / "accelerate" / f"{mode}.yaml"
        values = {"model": tower, "data": images, "output_dir": folder, **RUN, **fields}
        words = [w for k, v in values.items() for w in (f"--{k}", str(v))]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "FAULT": fault,
        }
        if mode in ("single", "ddp"):
            environment["ACCELERATE_USE_CPU"] = "true"
        module = "tests.distributed.faulty" if fault else "unirefiner_hf"
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(config), "--main_process_port", free_port()]
        if processes:
            command += ["--num_processes", str(processes)]
        command += ["-m", module, "refine", *words]
        log = logs / f"{len(list(logs.iterdir()))}.txt"
        with log.open("w") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                cwd=ROOT,
            )
        return Run(process, folder, log)

    return start


@pytest.fixture(scope="session")
def alone(
    launch: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, dict[str, Any], dict[str, Any]]:
    """One process at the same total batch."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run = launch("single", folder, gradient_accumulation_steps=4)
    return run, *run.finished()


@pytest.fixture(scope="session")
def together(
    launch: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Run, dict[str, Any], dict[str, Any]]]:
    """An undisturbed run of two processes in each mode, started when asked for."""
    runs: dict[str, Any] = {}

    def of(mode: str) -> tuple[Run, dict[str, Any], dict[str, Any]]:
        if mode not in runs:
            run = launch(mode, tmp_path_factory.mktemp(mode) / "run")
            runs[mode] = run, *run.finished()
        return runs[mode]

    return of


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def history(metrics: dict[str, Any], name: str) -> list[float]:
    """Logged values of a metric, a step each."""
    return [entry[name] for entry in metrics["history"] if name in entry]


def adapter(run: Run) -> dict[str, Tensor]:
    """The trained weights a run left."""
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")
