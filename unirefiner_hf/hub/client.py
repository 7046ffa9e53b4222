"""Calls to the Hub that outlive a bad moment, and what a repository holds."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..errors import UniRefinerError
from ..export.card import METADATA, card_metadata
from ..export.model_files import is_of_training
from ..export.run_folder import CARD

if importlib.util.find_spec("httpx2") is not None:
    from httpx2 import TransportError
else:  # huggingface_hub before it moved to httpx2
    from httpx import TransportError  # type: ignore[no-redef, assignment]

logger = logging.get_logger(__name__)

Answer = TypeVar("Answer")

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try."""
LONGEST_WAIT = 300.0
MAIN = "main"


class HubError(UniRefinerError):
    """The Hub refused, and the message says what to do."""


def with_retries(
    call: Callable[[], Answer], waits: tuple[float, ...] = WAITS
) -> Answer:
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
        except (HfHubHTTPError, TransportError, RuntimeError, ValueError) as problem:
            reason, wait = _passing(problem, wait)
            if reason is None:
                raise
        logger.warning(f"{reason}: trying again in {wait:.0f} s.")
        time.sleep(min(wait, LONGEST_WAIT))
    return call()


def _passing(problem: Exception, wait: float) -> tuple[str | None, float]:
    """Why a call failed that may be tried again, and after how long; None: it may not."""
    cause = cause_of(problem)
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status != 429 and status < 500:
            return None, wait
        asked = cause.response.headers.get("Retry-After", "")
        return (
            f"the Hub answered {status}",
            float(asked) if asked.isdigit() else wait,
        )
    if isinstance(cause, TransportError):
        return f"the connection failed ({type(cause).__name__})", wait
    if isinstance(cause, json.JSONDecodeError):
        # The client reads the answer of the card's validation before its status.
        return "the Hub answered with no JSON", wait
    return None, wait


def cause_of(problem: BaseException) -> BaseException:
    """What the Hub or the connection said; the client wraps it where it uploads files."""
    cause: BaseException | None = problem
    while cause is not None:
        if isinstance(cause, (HfHubHTTPError, TransportError, json.JSONDecodeError)):
            return cause
        cause = cause.__cause__
    return problem


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
    if CARD in files:
        try:
            path = with_retries(
                lambda: api.hf_hub_download(repo_id, CARD, revision=info.sha)
            )
            metadata = card_metadata(Path(path).read_text(encoding="utf-8"))
        except EntryNotFoundError:
            metadata = {}
        except UniRefinerError as problem:
            raise HubError(
                f"The card of {repo_id} is broken: {problem}. Repair it on the Hub, or name "
                "another repository."
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


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no ``user/name``.

    Raises:
        HubError: says what is wrong with it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as problem:
        raise HubError(f"{repo_id!r} is not a repository's name: {problem}") from None
    if repo_id.count("/") != 1:
        raise HubError(f"{repo_id!r} names no owner: write user/{repo_id}.")


def explained(call: Callable[[], Answer], repo_id: str) -> Answer:
    """Run `call`; say what a refusal of the Hub means.

    Raises:
        HubError: in place of every error of the Hub and of the connection.
    """
    try:
        return call()
    except UniRefinerError:
        raise
    except (HfHubHTTPError, TransportError, OSError, RuntimeError) as problem:
        raise HubError(explanation(problem, repo_id)) from problem


def explanation(problem: BaseException, repo_id: str) -> str:
    """What an error of the Hub or of the connection means, with the Hub's own words."""
    cause = cause_of(problem)
    if isinstance(cause, GatedRepoError):
        return (
            f"{repo_id} is gated: ask for access on its page, then log in with "
            "'hf auth login' or set HF_TOKEN."
        )
    if isinstance(cause, RepositoryNotFoundError):
        return (
            f"There is no repository {repo_id} that may be seen from here: check the name; "
            "a private one needs a token that may read it ('hf auth login', or HF_TOKEN)."
        )
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        said = f"{status}: {cause.server_message or _first_line(cause)}"
        if status == 401:
            return (
                f"The Hub does not accept the token ({said}): make one with write access, "
                "then run 'hf auth login' or set HF_TOKEN."
            )
        if status == 403:
            return (
                f"This token may not write to {repo_id} ({said}): use one with write "
                "access, or a repository of your own."
            )
        mend = "run" if status == 429 or status >= 500 else "mend that, then run"
        return (
            f"The Hub answered {said}. Nothing is lost: {mend} the same command again."
        )
    if isinstance(cause, (TransportError, OSError)):
        return (
            f"The connection to the Hub failed ({_first_line(cause)}). Nothing is lost: "
            "run the same command again."
        )
    return (
        f"The Hub's client failed ({type(cause).__name__}: {_first_line(cause)}). Nothing is "
        "lost: run the same command again."
    )


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
