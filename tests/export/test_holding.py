"""The lock on a run's folder: who holds it, and that a dead process does not."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from unirefiner_hf.export import holding as locks
from unirefiner_hf.export.holding import HeldError, check_free, holding

HOLD = """
import sys, time
from unirefiner_hf.export.holding import holding
with holding(sys.argv[1], "refine"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_who_holds_a_run_is_named_and_a_killed_one_lets_go(tmp_path, held):
    told = rf"in use by refine \(process {held.pid} on {socket.gethostname()}, since 20"
    with pytest.raises(HeldError, match=told):
        with holding(tmp_path, "push"):
            pass
    with pytest.raises(HeldError, match=told):
        check_free(tmp_path, "push")
    held.send_signal(signal.SIGKILL)
    held.wait()
    with holding(tmp_path, "push"):
        holder = json.loads((tmp_path / locks.HOLDER).read_text())
        assert (holder["command"], holder["pid"]) == ("push", os.getpid())
    assert not (tmp_path / locks.HOLDER).exists()


def test_a_holder_that_has_not_said_its_name_yet_is_waited_for(tmp_path, held):
    """It has the lock, and is about to write who it is; a dead one's name is still there."""
    said = (tmp_path / locks.HOLDER).read_text()
    dead = {**json.loads(said), "pid": 2**22 + 1}
    for before in (None, json.dumps(dead)):
        (tmp_path / locks.HOLDER).unlink()
        if before is not None:
            (tmp_path / locks.HOLDER).write_text(before)
        late = threading.Timer(0.3, (tmp_path / locks.HOLDER).write_text, [said])
        late.start()
        with pytest.raises(HeldError, match=rf"refine \(process {held.pid} on"):
            check_free(tmp_path, "push")
        late.join()


def test_a_lock_is_its_threads(tmp_path):
    refused = []

    def another():
        try:
            with holding(tmp_path, "merge"):
                pass
        except HeldError as problem:
            refused.append(str(problem))

    with holding(tmp_path, "refine"), holding(tmp_path, "merge"):
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
        assert "in use by refine" in refused[0]
    check_free(tmp_path, "push")


def test_asking_leaves_no_trace(tmp_path):
    check_free(tmp_path / "none", "refine")
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_to_is_not_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.os, "access", lambda *_: False)
    with holding(tmp_path, "merge"):
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "problem",
    [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("flock")],
)
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog, problem):
    def acquire(*_, **__):
        raise problem

    monkeypatch.setattr(locks.FileLock, "acquire", acquire)
    with holding(tmp_path, "merge"):
        assert "without locks" in caplog.text


def test_another_error_of_the_disk_is_not_swallowed(tmp_path, monkeypatch):
    def acquire(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(locks.FileLock, "acquire", acquire)
    with pytest.raises(OSError, match="Input/output"), holding(tmp_path, "merge"):
        pass
