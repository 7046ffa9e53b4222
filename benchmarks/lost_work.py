"""Kill a refinement, cut its power, start two at once: is anything lost?

    python -m benchmarks.lost_work --kills 200 --cuts 30 --pairs 20

A tiny random backbone is refined on noise; loading, training, saving and merging are the real
ones. Every run is a process of its own, forked from one that has done the imports.

- **kills**: SIGKILL, half of them at a random time, half at a random write below the run's
  folder. After each, every checkpoint is whole and the record is true; then the run goes on
  (and may be killed again), by ``resume`` alone where it has left its record.
- **cuts**: the run's disk, a loop-mounted ext4 file system, is copied at a random time or
  write (`benchmarks.loop_disk`), mounted, checked in the same way, and the run goes on there. Of
  the checkpoints that were there at that time, no more than the newest may be missing.
- **pairs**: two runs of different seeds start in one folder, a random time apart. One ends,
  the other says who is there.

What ends has the adapter, the merged model and the losses of the run that nothing disturbed,
bit for bit. Exits with 1 where something is lost; ``--keep`` leaves that folder.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from unirefiner_hf import refine
from unirefiner_hf.errors import UniRefinerError
from unirefiner_hf.export.run_folder import (
    ASKED,
    MERGED,
    METRICS,
    RECORD,
    checkpoint_step,
    is_run,
    is_trained,
    read_record,
)
from unirefiner_hf.export.whole import newest_whole

from .loop_disk import copy_of_a_moment, mounted, why_not

STEPS = 5
FIELDS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "use_cpu": True,
    "disable_tqdm": True,
    "image_size": 24,
    "report_images": 1,
    "ah_layers": [0, 1],
}
WRITES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
"""Events of Python before it changes a file or a folder."""
TIMEOUT = 300.0


@dataclass
class Tally:
    """What was tried, in what state it was found, and what was lost."""

    tried: int = 0
    found: collections.Counter[str] = field(default_factory=collections.Counter)
    lost: list[str] = field(default_factory=list)

    def lines(self, name: str) -> list[str]:
        """In words."""
        states = ", ".join(f"{n} {state}" for state, n in self.found.most_common())
        return [f"{name}: {self.tried}, lost: {len(self.lost)} ({states})", *self.lost]


@dataclass(frozen=True)
class Work:
    """What is refined, and what an undisturbed run of it leaves.

    Attributes:
        ends: seed -> what `end_of` tells of the run.
        seconds: an undisturbed run takes.
        writes: below the run's folder, of an undisturbed run.
    """

    folder: Path
    ends: dict[int, dict[str, Any]]
    seconds: float
    writes: int

    def go_on(self, run: Path, seed: int = 0) -> None:
        """Start the run, or go on by what it says of itself."""
        if (run / ASKED).is_file():
            refine(resume=run)
            return
        model, data = str(self.folder / "tiny"), str(self.folder / "images")
        refine(model, data, output_dir=str(run), seed=seed, **FIELDS)


def make_inputs(folder: Path) -> None:
    """A random backbone and some noise."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    Dinov2Model(config).save_pretrained(folder / "tiny")
    processor = BitImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}
    )
    processor.save_pretrained(folder / "tiny")
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    for number in range(8):
        pixels = noise.integers(0, 255, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")


def start(work: Callable[[], Any], log: Path) -> int:
    """Fork a process that works; gives its number.

    It ends with 0, 2 at an error of the user's, or 1.
    """
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with log.open("w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        work()
        status = 0
    except UniRefinerError as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def end(process: int, seconds: float = TIMEOUT) -> int | None:
    """Wait for a process; its exit status, negative for a signal.

    None where it stops itself, or the time is over.
    """
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG | os.WUNTRACED)
        if done and os.WIFSTOPPED(status):
            return None
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def prepare(folder: Path) -> Work:
    """Make the inputs, and the runs that nothing disturbs."""
    make_inputs(folder)
    work = Work(folder, {}, 0.0, 0)
    counts = folder / "writes"
    for seed in (0, 1):
        run = folder / f"lone-{seed}"

        def alone(run: Path = run, seed: int = seed) -> None:
            writes = watch_writes(run, None)
            work.go_on(run, seed)
            counts.write_text(str(writes[0]))

        log = folder / "lone.log"
        before = time.monotonic()
        if end(start(alone, log)) != 0:
            raise RuntimeError(f"An undisturbed run fails:\n{log.read_text()}")
        seconds = time.monotonic() - before
        work.ends[seed] = end_of(run)
    return Work(folder, work.ends, seconds, int(counts.read_text()))


def watch_writes(run: Path, last: int | None, blow: int = signal.SIGKILL) -> list[int]:
    """Count what this process is about to write below a folder; at one, send a signal."""
    count = [0]
    below = str(run)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event not in WRITES or not given or below not in str(given[0]):
            return
        if event == "open" and not int(given[2]) & (os.O_WRONLY | os.O_RDWR):
            return
        count[0] += 1
        if count[0] == last:
            os.kill(os.getpid(), blow)

    sys.addaudithook(hook)
    return count


def end_of(run: Path) -> dict[str, Any]:
    """What a finished run is compared by."""
    names = sorted(path for path in (run / MERGED).rglob("*") if path.is_file())
    files = {str(p.relative_to(run)): p for p in names if p.suffix != ".md"}
    adapter = run / "adapter" / "adapter_model.safetensors"
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in {**files, "adapter": adapter}.items()
    }
    history = json.loads((run / METRICS).read_text())["history"]
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    return {"files": digests, "losses": losses}


def state_of(run: Path) -> str:
    """How far a run was when it was stopped."""
    if not (run / ASKED).is_file() or not is_run(run):
        return "before its record"
    record = read_record(run)
    if record["finished"]:
        return "finished"
    if is_trained(record):
        return "in the merge"
    if newest_whole(run)[0] is None:
        return "before a checkpoint"
    drafts = (*run.glob(".unfinished/*"), *run.glob(".*.unfinished"))
    return "while writing" if drafts else "between checkpoints"


def step_of(run: Path) -> int:
    """Step of the newest whole checkpoint, 0 without one."""
    newest = newest_whole(run)[0]
    return 0 if newest is None else checkpoint_step(newest) or 0


def check_left(run: Path, expected: dict[str, Any]) -> str | None:
    """What is wrong with what a run left when it was stopped; None where nothing is."""
    newest, passed = newest_whole(run)
    if passed:
        return f"{next(iter(passed.items()))}"
    if not is_run(run):
        return None if newest is None else f"{newest.name} and no {RECORD}"
    record = read_record(run)
    if record["finished"] and end_of(run) != expected:
        return "finished, and not with the weights of the undisturbed run"
    return None


def check_end(work: Work, run: Path, seed: int, status: int | None) -> str | None:
    """What is wrong with a run that nothing stopped; None where nothing is."""
    if status != 0:
        return f"ended with {status}"
    if not read_record(run)["finished"]:
        return "ended, and is not finished"
    if end_of(run) != work.ends[seed]:
        return "other weights or losses than the undisturbed run"
    return None


def kill_runs(work: Work, count: int, chance: random.Random) -> Tally:
    """Kill runs, up to five times each, and let each end."""
    tally = Tally()
    while tally.tried < count:
        run = work.folder / f"kill-{tally.tried}"
        log, problem, deaths = run.with_suffix(".log"), None, 0
        while problem is None:
            strike = tally.tried < count and deaths < 5 and chance.random() < 0.8
            at_write = (
                chance.randrange(1, work.writes) if chance.random() < 0.5 else None
            )
            after = chance.uniform(0, work.seconds)

            def life(run: Path = run, last: int | None = at_write) -> None:
                watch_writes(run, last)
                work.go_on(run)

            if not strike:
                status = end(start(partial(work.go_on, run), log))
                problem = check_end(work, run, 0, status)
                break
            process = start(life, log)
            status = end(process, TIMEOUT if at_write else after)
            if status is None:
                os.kill(process, signal.SIGKILL)
                status = end(process)
            if status == 0:  # it was done before
                problem = check_end(work, run, 0, status)
                break
            if status != -signal.SIGKILL:
                problem = f"ended with {status}"
                break
            deaths += 1
            tally.tried += 1
            tally.found[state_of(run)] += 1
            problem = check_left(run, work.ends[0])
        settle(tally, run, log, problem)
    return tally


def cut_power(work: Work, count: int, chance: random.Random) -> Tally:
    """Copy the disk of a run at a random time, and go on from the copy."""
    tally = Tally()
    disk, copy = work.folder / "disk.img", work.folder / "copy.img"
    log = work.folder / "cut.log"
    while tally.tried < count:
        with mounted(disk, work.folder / "disk") as place:
            run = place / "run"
            at_write = (
                chance.randrange(1, work.writes) if chance.random() < 0.5 else None
            )
            after = chance.uniform(0.1, 1.1) * work.seconds

            def life(run: Path = run, last: int | None = at_write) -> None:
                watch_writes(run, last, signal.SIGSTOP)
                work.go_on(run)

            process = start(life, log)
            status = end(process, TIMEOUT if at_write else after)
            if status is None:
                os.kill(process, signal.SIGSTOP)
            copy_of_a_moment(disk, copy)
            seen = step_of(run)
            if status is None:
                os.kill(process, signal.SIGKILL)
                end(process)
        disk.unlink()
        tally.tried += 1
        with mounted(copy, work.folder / "copy") as place:
            run = place / "run"
            tally.found[state_of(run)] += 1
            problem = check_left(run, work.ends[0])
            # The newest may have got its name, and not been flushed under it yet.
            if step_of(run) < seen - 1:
                problem = f"checkpoint-{seen} was there, {step_of(run)} is on the disk"
            if status == 0 and not (is_run(run) and read_record(run)["finished"]):
                problem = "the run had ended, and is not finished on the disk"
            if problem is None:
                status = end(start(partial(work.go_on, run), log))
                problem = check_end(work, run, 0, status)
            kept = work.folder / f"cut-{tally.tried}"
            if problem is not None and run.exists():
                shutil.copytree(run, kept)
        copy.unlink()
        settle(tally, kept, log, problem)
    return tally


def run_pairs(work: Work, count: int, chance: random.Random) -> Tally:
    """Start two runs in one folder; one ends, the other says why it does not."""
    tally = Tally()
    while tally.tried < count:
        run = work.folder / f"pair-{tally.tried}"
        logs = [work.folder / f"pair-{seed}.log" for seed in (0, 1)]
        apart = chance.uniform(0, work.seconds) if chance.random() < 0.5 else 0.0
        processes = []
        for seed in (0, 1):
            # Never by resume: each starts a run of its own.
            def life(run: Path = run, seed: int = seed) -> None:
                model, data = str(work.folder / "tiny"), str(work.folder / "images")
                refine(model, data, output_dir=str(run), seed=seed, **FIELDS)

            processes.append(start(life, logs[seed]))
            time.sleep(apart)
        statuses = [end(process) for process in processes]
        tally.tried += 1
        words = [log.read_text() for log in logs]
        problem: str | None = None
        if sorted(statuses, key=str) != [0, 2]:
            problem = f"ended with {statuses}"
        else:
            winner = statuses.index(0)
            told = words[1 - winner].strip().splitlines()[-1]
            in_use, taken = "is in use by refine" in told, "already holds a run" in told
            tally.found["the other found it in use" if in_use else "found a run"] += 1
            problem = None if in_use or taken else f"the other said: {told}"
            problem = problem or check_end(work, run, winner, 0)
        settle(tally, run, logs[0], problem)
    return tally


def settle(tally: Tally, run: Path, log: Path, problem: str | None) -> None:
    """Note a loss with the run's last words, or clear up."""
    if problem is None:
        shutil.rmtree(run, ignore_errors=True)
        return
    words = log.read_text().strip().splitlines() if log.exists() else []
    tally.lost.append(f"{run.name}: {problem}; last words: {words[-1:]}")


def main(words: list[str] | None = None) -> int:
    """Run the three, print what they say, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--cuts", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="FOLDER", help="work here, and leave it")
    given = parser.parse_args(words)
    torch.set_num_threads(1)  # forked processes have no others
    # Progress bars share a lock between processes, which a killed one never gives back.
    tqdm.set_lock(threading.RLock())
    folder = Path(given.keep or tempfile.mkdtemp(prefix="lost-work-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(given.seed)
    losses = 0
    try:
        work = prepare(folder)
        print(f"A run takes {work.seconds:.2f} s and {work.writes} writes.", flush=True)
        missing = why_not(folder) if given.cuts else None
        if missing is not None:
            print(f"cuts: left out, this machine has no loop devices ({missing})")
        for name, trial, count in (
            ("kills", kill_runs, given.kills),
            ("cuts", cut_power, 0 if missing else given.cuts),
            ("pairs", run_pairs, given.pairs),
        ):
            if not count:
                continue
            before = time.monotonic()
            tally = trial(work, count, chance)
            print("\n".join(tally.lines(name)), flush=True)
            print(f"  {time.monotonic() - before:.0f} s", flush=True)
            losses += len(tally.lost)
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return min(losses, 1)


if __name__ == "__main__":
    sys.exit(main())
