"""A Hub, command lines that talk to it, and a run to publish."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.export.conftest import save_run  # noqa: F401
from tests.hub.commands.verbs import ALICE, BOB, REPO, Verbs
from tests.hub.server import LoopbackHub


@pytest.fixture(scope="session")
def verbs(tmp_path_factory: pytest.TempPathFactory) -> Verbs:
    """Runs ``unirefiner`` command lines: ``verbs("verify", "user/name", token=ALICE)``."""
    return Verbs(tmp_path_factory.mktemp("verbs"))


@pytest.fixture
def hub(verbs: Verbs) -> Iterator[LoopbackHub]:
    """The Hub those command lines talk to, empty, with the users alice and bob."""
    hub = LoopbackHub(port=verbs.port).start()
    hub.add_user("alice", ALICE)
    hub.add_user("bob", BOB)
    yield hub
    hub.stop()


@pytest.fixture
def push(hub, verbs, run):
    """Push the run as alice, or another."""

    def push(*options, token=ALICE, **how):
        return verbs("push", *run, *options, token=token, **how)

    return push


@pytest.fixture
def run(save_run):  # noqa: F811
    """A finished run whose base is a local folder: the words of a push."""
    _, folder, base = save_run()
    return [str(folder), REPO, "--model", str(base)]
