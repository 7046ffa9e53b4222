"""A loopback Hub for each test, and environments for client processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from .server import LoopbackHub

ROOT = Path(__file__).parents[2]
ALICE, BOB = "hf_alice", "hf_bob"


def make_hub(**options) -> LoopbackHub:
    """A started Hub with the users alice (also of the organization `lab`) and bob."""
    hub = LoopbackHub(**options).start()
    hub.add_user("alice", ALICE, orgs=("lab",))
    hub.add_user("bob", BOB)
    return hub


@pytest.fixture
def hub():
    """A Hub of this test's own; see `make_hub`."""
    hub = make_hub()
    yield hub
    hub.stop()


@pytest.fixture
def client_env(hub, tmp_path):
    """Factory: ``client_env(token=ALICE)`` is the environment of a client with an empty cache.

    HF_ENDPOINT is read when huggingface_hub is imported, so clients run in other processes.
    `token=None` leaves the client without one. `xet=True` lets it use Xet. Every call has a new
    HF_HOME; `home` names one to share.
    """
    count = 0

    def make(token: str | None = ALICE, *, home=None, xet: bool = False, url=None):
        nonlocal count
        count += 1
        env = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        env.update(
            HF_ENDPOINT=url or hub.url,
            HF_HOME=str(home or tmp_path / f"hf_home_{count}"),
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            NO_PROXY="127.0.0.1",
            no_proxy="127.0.0.1",
            OMP_NUM_THREADS="1",
            PYTHONPATH=str(ROOT),
        )
        if token is not None:
            env["HF_TOKEN"] = token
        if not xet:
            env["HF_HUB_DISABLE_XET"] = "1"
        return env

    return make


def start_python(code: str, env: dict[str, str]) -> subprocess.Popen:
    """Start a client and come back at once, for tests that kill it."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(
    code: str, env: dict[str, str], *, check: bool = True, timeout: float = 120
):
    """Run a client to its end; `check` asserts that it came through. Has stdout and stderr."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return result
