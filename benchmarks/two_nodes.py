"""Two machines, rehearsed on one: the commands of docs/distributed.md as they stand there.

    python -m benchmarks.two_nodes [--mode ddp zero2] [--cut 20] [--timeout 40]

Two network namespaces, joined by a veth pair, have the addresses and the interface that the
document names. Of its commands only values are changed: a tiny model and a few images in place of
the user's, two processes in place of sixteen. On a machine without GPUs DDP starts with
ACCELERATE_USE_CPU=true, as the document says.

What is tried, and compared with one machine of two processes:

- whole: both machines train to the end;
- killed: every process of a machine gets SIGKILL in mid-run;
- gone: it loses its link first, so that not even the end of its connections is told;
- cut: the link is down for some seconds.

What ends is continued, as the document says. Needs Linux, root (or rights to make network
namespaces) and `ip`; says so and exits with 3 where it cannot.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "distributed.md"
LINK = "eth0"
"""The interface that the document names."""
ADDRESSES = ("10.0.0.1", "10.0.0.2")
NOT_ALLOWED = 3
RUN = {
    "image_size": 24,
    "max_steps": 40,
    "save_steps": 5,
    "save_total_limit": None,
    "logging_steps": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "report_images": 0,
    "disable_tqdm": True,
}
"""Long enough to be disturbed in the middle; the rest is as small as can be."""


class Unavailable(RuntimeError):
    """This machine does not let us make namespaces; the message says why."""


def commands(document: Path = DOCUMENT) -> dict[str, str]:
    """The document's commands for several machines: name of the accelerate file -> text."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL)
    found = [block for block in blocks if "--machine_rank" in block]
    return {re.findall(r"accelerate/(\w+)\.yaml", block)[0]: block for block in found}


def filled_in(command: str, machine: int, values: dict[str, str]) -> str:
    """A command of the document for one machine, with the reader's values.

    Raises:
        ValueError: the command lacks one of the options, or has it twice.
    """
    places = {r"^(export MACHINE)=0\b": rf"\g<1>={machine}"}
    for option, value in values.items():
        places[rf"(--{option}) \S+"] = rf"\g<1> {value}"
    for place, value in places.items():
        command, count = re.subn(place, value, command, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(
                f"{count} places in the command are like {place}: expected 1."
            )
    return command


def ip(*words: str) -> None:
    """`ip`, quietly.

    Raises:
        Unavailable: it cannot; with its words.
    """
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise Unavailable("There is no `ip` command (package iproute2).") from None
    except subprocess.CalledProcessError as problem:
        reason = problem.stderr.strip()
        raise Unavailable(f"`ip {' '.join(words)}` failed: {reason}") from problem


@dataclass(frozen=True)
class Machine:
    """A network namespace that stands for a machine."""

    name: str

    def start(
        self, text: str, log: Path, environment: dict[str, str]
    ) -> subprocess.Popen:
        """Run a shell's text on the machine."""
        with log.open("w") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, "bash", "-c", text],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def link(self, up: bool) -> None:
        """Take the machine off the network, or put it back."""
        ip("-n", self.name, "link", "set", LINK, "up" if up else "down")

    def kill(self) -> None:
        """SIGKILL to all that runs on it."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.name],
            check=False,
            capture_output=True,
            text=True,
        )
        for number in map(int, found.stdout.split()):
            try:
                psutil.Process(number).kill()
            except psutil.NoSuchProcess:
                pass


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two namespaces joined by a link; nothing of them is left afterwards.

    Raises:
        Unavailable: they cannot be made.
    """
    first, second = (Machine(f"unirefiner-{os.getpid()}-{n}") for n in range(2))
    made: list[Machine] = []
    try:
        for machine in (first, second):
            ip("netns", "add", machine.name)
            made.append(machine)
        ends = f"{LINK} netns {first.name}", f"{LINK} netns {second.name}"
        ip("link", "add", *ends[0].split(), "type", "veth", "peer", *ends[1].split())
        for machine, address in zip((first, second), ADDRESSES, strict=True):
            ip("-n", machine.name, "address", "add", f"{address}/24", "dev", LINK)
            machine.link(True)
            ip("-n", machine.name, "link", "set", "lo", "up")
        yield first, second
    finally:
        for machine in made:
            machine.kill()
            subprocess.run(["ip", "netns", "del", machine.name], check=False)


def make_inputs(folder: Path, timeout: int) -> dict[str, str]:
    """A tiny model, images and a recipe -> values of the document's options."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=24,
        patch_size=4,
    )
    Dinov2Model(config).save_pretrained(folder / "model")
    BitImageProcessorPil(size={"shortest_edge": 24}).save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(12):
        small = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((40, 30))
        image.save(folder / "images" / f"{number:02}.png")
    recipe = {
        "model": str(folder / "model"),
        "output_dir": "unset",
        "ddp_timeout": timeout,
        **RUN,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return {
        "num_processes": "2",
        "config": str(folder / "recipe.yaml"),
        "data": str(folder / "images"),
    }


@dataclass
class Rehearsal:
    """Runs of one accelerate file on two machines.

    Attributes:
        mode: name of the accelerate file.
        limit: seconds after which a run that has not ended is killed.
    """

    mode: str
    machines: tuple[Machine, Machine]
    folder: Path
    values: dict[str, str]
    limit: float = 300

    def environment(self) -> dict[str, str]:
        """As on a machine of its own; DDP on CPUs as the document says."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        fresh = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if self.mode == "ddp" and not torch.cuda.is_available():
            fresh["ACCELERATE_USE_CPU"] = "true"
        return {**os.environ, **fresh}

    def start(self, run: str, resume: bool = False) -> list[subprocess.Popen]:
        """The document's command on both machines; to resume, as it says below them."""
        folder = self.folder / run
        values = {**self.values, "output_dir": str(folder)}
        started = []
        for number, machine in enumerate(self.machines):
            text = filled_in(commands()[self.mode], number, values)
            if resume:
                text = re.sub(r"refine --.*", f"refine --resume {folder}", text)
            log = self.log(run, number)
            started.append(machine.start(text, log, self.environment()))
        return started

    def log(self, run: str, machine: int) -> Path:
        """What a machine said; a continued run starts it anew."""
        return self.folder / f"{run}-{machine}.txt"

    def wait(self, processes: list[subprocess.Popen]) -> list[int]:
        """Exit statuses; kills what is still running at the limit.

        Raises:
            TimeoutError: something was.
        """
        until = time.monotonic() + self.limit
        try:
            return [
                process.wait(max(0.1, until - time.monotonic()))
                for process in processes
            ]
        except subprocess.TimeoutExpired:
            for machine in self.machines:
                machine.kill()
            raise TimeoutError(f"Still running after {self.limit:.0f} s.") from None

    def wait_for(
        self, run: str, checkpoint: str, started: list[subprocess.Popen]
    ) -> None:
        """Until a checkpoint is there.

        Raises:
            TimeoutError: it never came.
            RuntimeError: the run ended before.
        """
        until = time.monotonic() + self.limit
        while not (self.folder / run / checkpoint).is_dir():
            if any(process.poll() is not None for process in started):
                raise RuntimeError(self.said(run))
            if time.monotonic() > until:
                raise TimeoutError(self.said(run))
            time.sleep(0.02)

    def said(self, run: str) -> str:
        """The end of what both machines said."""
        logs = (self.log(run, n) for n in range(2))
        return "\n".join(log.read_text()[-3000:] for log in logs if log.is_file())

    def message(self, run: str, machine: int = 0) -> str:
        """The line with which a machine's run ended."""
        lines = self.log(run, machine).read_text().splitlines()
        found = [line for line in lines if line.startswith("unirefiner: error:")]
        return found[-1] if found else "(no message)"

    def adapter(self, run: str) -> dict[str, torch.Tensor]:
        """The trained weights of a finished run."""
        return load_file(self.folder / run / "adapter" / "adapter_model.safetensors")

    def difference(self, one: str, other: str) -> float:
        """The greatest between the weights of two runs."""
        first, second = self.adapter(one), self.adapter(other)
        assert first.keys() == second.keys()
        return max(float((first[n] - second[n]).abs().max()) for n in first)

    # What is tried

    def one_machine(self, run: str = "one-machine") -> None:
        """Two processes on one machine."""
        words = [
            "--num_machines 2 ",
            "--machine_rank $MACHINE ",
            "--main_process_ip 10.0.0.1 ",
        ]
        values = {**self.values, "output_dir": str(self.folder / run)}
        text = filled_in(commands()[self.mode], 0, values)
        for word in words:
            assert word in text, word
            text = text.replace(word, "")
        text = text.replace(f"_IFNAME={LINK}", "_IFNAME=lo")
        process = self.machines[0].start(text, self.log(run, 0), self.environment())
        self.succeeded(run, self.wait([process]))

    def whole(self, run: str = "whole") -> None:
        """Both machines to the end."""
        self.succeeded(run, self.wait(self.start(run)))

    def resumed(self, run: str) -> None:
        """Go on with it on both machines."""
        self.succeeded(run, self.wait(self.start(run, resume=True)))

    def lost(
        self, run: str, checkpoint: str, silently: bool, machine: int = 1
    ) -> float:
        """Take a machine away; seconds until the other has ended."""
        gone = self.machines[machine]
        started = self.start(run)
        self.wait_for(run, checkpoint, started)
        if silently:
            gone.link(False)
        gone.kill()
        since = time.monotonic()
        status = self.wait([started[1 - machine]])
        seconds = time.monotonic() - since
        gone.link(True)
        if status == [0]:
            raise RuntimeError("The run was over before the machine was lost.")
        return seconds

    def cut(self, run: str, checkpoint: str, seconds: float) -> bool:
        """Cut the link for some seconds; whether the run survived."""
        started = self.start(run)
        self.wait_for(run, checkpoint, started)
        self.machines[1].link(False)
        try:
            time.sleep(seconds)
            if all(process.poll() == 0 for process in started):
                raise RuntimeError("The run was over before the link was cut.")
        finally:
            self.machines[1].link(True)
        return self.wait(started) == [0, 0]

    def succeeded(self, run: str, statuses: list[int]) -> None:
        """
        Raises:
            RuntimeError: a status is not 0; with what was said.
        """
        if any(statuses):
            raise RuntimeError(f"{run} ended with {statuses}:\n{self.said(run)}")


def rehearse(
    mode: str, folder: Path, values: dict[str, str], cut_for: float
) -> list[tuple[str, str, str]]:
    """Everything that is tried; rows of what, what came of it, difference of weights."""
    rows = []
    checkpoint = f"checkpoint-{RUN['save_steps']}"
    with two_machines() as machines:
        it = Rehearsal(mode, machines, folder, values)
        it.one_machine()

        def row(what: str, outcome: str, run: str) -> None:
            rows.append((what, outcome, f"{it.difference('one-machine', run):.1e}"))
            print(f"{mode}: {what}: {outcome}; {rows[-1][2]}", flush=True)

        it.whole()
        row("both to the end", "trained", "whole")
        for run, what, silently, machine in (
            ("killed", "second machine killed", False, 1),
            ("gone", "second machine off the network, then killed", True, 1),
            ("killed-first", "first machine killed", False, 0),
            ("gone-first", "first machine off the network, then killed", True, 0),
        ):
            seconds = it.lost(run, checkpoint, silently, machine)
            print(it.message(run, 1 - machine), flush=True)
            it.resumed(run)
            row(what, f"ended after {seconds:.0f} s, continued", run)
        survived = it.cut("cut", checkpoint, cut_for)
        if not survived:
            print(it.message("cut"), flush=True)
            it.resumed("cut")
        row(
            f"link down for {cut_for:g} s",
            "survived" if survived else "ended, continued",
            "cut",
        )
    return rows


def main() -> int:
    """Rehearse, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", nargs="+", default=list(commands()))
    parser.add_argument("--cut", type=float, default=20, help="seconds")
    parser.add_argument("--timeout", type=int, default=60, help="ddp_timeout, seconds")
    given = parser.parse_args()
    rows = []
    for mode in given.mode:
        folder = Path(tempfile.mkdtemp(prefix="two-nodes-"))
        try:
            values = make_inputs(folder, given.timeout)
            found = rehearse(mode, folder, values, given.cut)
            rows += [(mode, *row) for row in found]
        except Unavailable as problem:
            print(f"Network namespaces cannot be made here: {problem}", file=sys.stderr)
            return NOT_ALLOWED
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n| launch | what happened | what came of it | weights off by at most |")
    print("|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
