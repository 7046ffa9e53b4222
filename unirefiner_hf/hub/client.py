"""Calls to the Hub that outlive a bad moment, and what a repository holds."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)
from transformers.utils import logging

from ..errors import UniRefinerError
from ..export.card import METADATA
from ..export.digests import is_of_training

if importlib.util.find_spec("httpx2") is not None:
    from httpx2 import TransportError
else:  # huggingface_hub before it moved to httpx2
    from httpx import TransportError  # type: ignore[no-redef, assignment]

logger = logging.get_logger(__name__)

Result = TypeVar("Result")

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try."""
LONGEST_WAIT = 300.0
MAIN = "main"


class HubError(UniRefinerError):
    """The Hub refused, and the message says what to do."""


def with_retries(
    call: Callable[[], Result], waits: tuple[float, ...] = WAITS
) -> Result:
    """Call again after 429, 5xx and broken connections.

    The client itself retries uploads of files, but neither the creation of a
    repository, nor a commit, nor the validation of a card. A ``Retry-After`` of the
    server is respected up to five minutes.

    Raises:
        HfHubHTTPError, TransportError: the last one, when every try failed, or one
            that trying again cannot mend.
    """
    for wait in waits:
        try:
            return call()
        except HfHubHTTPError as problem:
            status = problem.response.status_code
            if status != 429 and status < 500:
                raise
            asked = problem.response.headers.get("Retry-After", "")
            wait = float(asked) if asked.isdigit() else wait
            reason = f"the Hub answered {status}"
        except TransportError as problem:
            reason = f"the connection failed ({type(problem).__name__})"
        except json.JSONDecodeError:
            # The client reads the answer of the card's validation before its status.
            reason = "the Hub answered with no JSON"
        logger.warning(f"{reason}: trying again in {wait:.0f} s.")
        time.sleep(min(wait, LONGEST_WAIT))
    return call()


@dataclass(frozen=True)
class RemoteState:
    """A model repository as it stands at one revision.

    Attributes:
        head: commit.
        private: whether only its owners see it.
        files: every file, that of running trainings included.
        metadata: header of its card; empty without a card.
    """

    head: str
    private: bool
    files: tuple[str, ...]
    metadata: dict[str, Any]

    @property
    def own(self) -> dict[str, Any] | None:
        """What this package wrote into the card, None if it did not write the card."""
        own = self.metadata.get(METADATA)
        return own if isinstance(own, dict) else None

    @property
    def is_empty(self) -> bool:
        """Nothing but what the Hub itself puts into a new repository."""
        return set(self.files) <= {".gitattributes"}


def remote_state(api: HfApi, repo_id: str, revision: str = MAIN) -> RemoteState | None:
    """What a repository holds; None where there is none that this token may see.

    Raises:
        HubError: its card does not parse.
    """
    try:
        info = with_retries(lambda: api.model_info(repo_id, revision=revision))
    except RepositoryNotFoundError:
        return None
    files = tuple(sibling.rfilename for sibling in info.siblings or ())
    metadata: dict[str, Any] = {}
    if "README.md" in files:
        try:
            path = with_retries(
                lambda: api.hf_hub_download(repo_id, "README.md", revision=info.sha)
            )
            text = Path(path).read_text(encoding="utf-8")
            metadata = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
        except EntryNotFoundError:
            metadata = {}
        except (yaml.YAMLError, ValueError) as problem:
            raise HubError(
                f"The card of {repo_id} does not parse: {problem}. Repair it on the Hub, or "
                "name another repository."
            ) from problem
    return RemoteState(str(info.sha), bool(info.private), files, metadata)


def check_ours(repo_id: str, state: RemoteState | None, base: str) -> None:
    """Refuse a repository that another hand filled.

    Ours is an empty one, or one whose card this package wrote for the same base.

    Raises:
        HubError: says whose it seems to be.
    """
    if state is None or state.is_empty:
        return
    advice = "Name another repository, or replace its content with --force."
    if state.own is None:
        shown = ", ".join(state.files[:4])
        raise HubError(
            f"{repo_id} holds {len(state.files)} files that unirefiner did not write "
            f"({shown}). {advice}"
        )
    if state.own.get("base") != base:
        raise HubError(
            f"{repo_id} holds a model refined from {state.own.get('base')}, this one is "
            f"refined from {base}. {advice}"
        )


def model_files(state: RemoteState) -> list[str]:
    """The repository's files without checkpoints of training."""
    return [name for name in state.files if not is_of_training(name)]
