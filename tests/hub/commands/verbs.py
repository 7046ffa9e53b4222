"""Command lines in processes of their own that need not import everything anew.

A process with the imports done is forked for each command, so its HF_ENDPOINT is the same
for the whole session: the Hub of these tests listens on one port.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = "alice/tiny-tower-unirefined"
ALICE, BOB = "hf_PlantedAliceToken", "hf_PlantedBobToken"
PRELOADED = [
    "unirefiner_hf.cli.push",
    "unirefiner_hf.cli.verify",
    "unirefiner_hf.cli.refine",
    "unirefiner_hf.hub.push",
    "unirefiner_hf.hub.verify",
    "unirefiner_hf.training.refine",
    "tests.hub.commands.verbs",
]


@dataclass(frozen=True)
class Done:
    """How a command ended; the names are those of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Running:
    """A command under way."""

    process: Any
    folder: Path

    def wait(self, timeout: float = 240) -> Done:
        """Raises TimeoutError, after killing it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(self._read("err")[-3000:])
        return Done(self.process.exitcode, self._read("out"), self._read("err"))

    def kill(self) -> None:
        """As ``kill -9``."""
        self.process.kill()
        self.process.join()

    def _read(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8", errors="replace")


class Verbs:
    """Starts commands; one for the session, stopped with it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.count = 0
        before = dict(os.environ)
        os.environ.update(
            HF_ENDPOINT=f"http://127.0.0.1:{self.port}",
            HF_HOME=str(folder / "hf_home"),
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            NO_PROXY="127.0.0.1",
            no_proxy="127.0.0.1",
            OMP_NUM_THREADS="1",
            PYTHONPATH=str(Path(__file__).parents[3]),
        )
        os.environ.pop("HF_TOKEN", None)
        try:
            started = self.context.Process(target=int)
            started.start()
            started.join()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def start(self, *words: str, token: str | None = None, **options: Any) -> Running:
        """Start ``unirefiner *words``; options as of `command`."""
        self.count += 1
        folder = self.folder / f"command-{self.count}"
        folder.mkdir()
        process = self.context.Process(
            target=command, args=(words, token, str(folder)), kwargs=options
        )
        process.start()
        return Running(process, folder)

    def __call__(self, *words: str, token: str | None = None, **options: Any) -> Done:
        """Run ``unirefiner *words`` to its end."""
        return self.start(*words, token=token, **options).wait()


def command(
    words: tuple[str, ...],
    token: str | None,
    folder: str,
    *,
    proved: bool = False,
    sleepless: bool = False,
    cwd: str | None = None,
    who: str | None = None,
) -> None:
    """One command line, in the forked process.

    Args:
        proved: do compare the reloaded folder with the trained model (costs seconds).
        sleepless: waits are cut to 10 ms.
        who: a name for the user, the home folder and the machine.
    """
    for name, number in (("out", 1), ("err", 2)):
        stream = open(Path(folder) / name, "wb", buffering=0)
        os.dup2(stream.fileno(), number)
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    os.environ.pop("HF_HUB_OFFLINE", None)
    if cwd is not None:
        os.chdir(cwd)
    if who is not None:
        named = dict.fromkeys(("USER", "LOGNAME", "USERNAME", "HOSTNAME"), who)
        os.environ.update(named, HOME=f"/home/{who}")
        socket.gethostname = lambda: who
    from unirefiner_hf.cli import main
    from unirefiner_hf.export.reload_check import ReloadReport
    from unirefiner_hf.hub import push

    if not proved:
        push.check_reload = lambda *args, **options: ReloadReport(0.0, {})
    if sleepless:
        sleep = time.sleep
        time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # type: ignore[assignment]
    status = main(list(words))
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def succeed(done: Done) -> str:
    """What a command said that came through."""
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def refused(done: Done) -> str:
    """The one line of a command's error."""
    assert done.returncode == 2, (done.stdout, done.stderr[-3000:])
    errors = [
        line
        for line in done.stderr.splitlines()
        if line.startswith("unirefiner: error:")
    ]
    assert len(errors) == 1, done.stderr[-3000:]
    return errors[0]
