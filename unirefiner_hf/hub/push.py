"""Publish a run: build, prove, upload in one commit, tag."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..export.checkpoint import SHARD_SIZE, weight_dtype
from ..export.holding import holding
from ..export.merge import check_output, export_run, keeps_text, load_refined
from ..export.reload_check import ReloadReport, check_reload, encode, example_pixels
from ..export.run_folder import CARD, PUBLISHED, as_path, read_run
from ..loading.backbone import Model
from ..results import Result, Table
from .access import check_access, check_private, tag_taken
from .client import (
    HubError,
    RemoteState,
    cause_of,
    check_repo_id,
    explained,
    remote_state,
    with_retries,
)
from .plan import plan, send

logger = logging.get_logger(__name__)

CONFLICTS = (409, 412)


@dataclass(frozen=True)
class Pushed(Result):
    """What a push did.

    Attributes:
        folder: what was built, and is on the Hub now.
        commit: that holds it; of the pull request, if one was made.
        uploaded, removed: files; both empty if the repository held it all.
        kept: files of another hand that stay beside the model; no loader takes them.
        left_out: pictures of training images that stay in the run's folder.
        tag: that marks the commit; None in a pull request.
        pull_request: its address, if one was made.
        check: how near the reloaded folder is to the trained model.
    """

    repo_id: str
    folder: Path
    commit: str
    url: str
    uploaded: tuple[str, ...]
    removed: tuple[str, ...]
    private: bool
    tag: str | None
    pull_request: str | None
    check: ReloadReport
    kept: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            **dataclasses.asdict(self),
            "folder": str(self.folder),
            "uploaded": list(self.uploaded),
            "removed": list(self.removed),
            "kept": list(self.kept),
            "left_out": list(self.left_out),
        }

    @property
    def title(self) -> str:
        """Where it is."""
        return f"{self.repo_id} at {self.url}"

    @property
    def notes(self) -> list[str]:
        """What stayed in the run's folder, and why."""
        return [
            f"Not published: {name}, which shows training images (--pictures does)."
            for name in self.left_out
        ]

    @property
    def _place(self) -> str:
        if self.tag is None:
            proposed = self.pull_request or "none needed"
            return f"Pull request: {proposed}"
        visibility = "private" if self.private else "public"
        return f"{self.url} ({visibility}), commit {self.commit[:7]}, tag {self.tag}"

    def tables(self) -> list[Table]:
        """The files that changed."""
        rows = [("uploaded", name) for name in self.uploaded]
        rows += [("removed", name) for name in self.removed]
        rows = rows or [("unchanged", "all files")]
        rows += [("of another hand, kept", name) for name in self.kept]
        rows += [("not published", name) for name in self.left_out]
        return [Table(("", "file"), rows, f"{self._place}.")]

    def __str__(self) -> str:
        ways = ", ".join(
            f"{way} {error:.1e}" for way, error in self.check.reloaded.items()
        )
        lines = [
            f"Tokens: merged {self.check.merged:.1e} from the trained model; reloaded in "
            f"a fresh process: {ways} (relative)."
        ]
        if self.uploaded or self.removed:
            removed = f", removed {len(self.removed)}" if self.removed else ""
            lines.append(f"Uploaded {len(self.uploaded)} files{removed} in one commit.")
        else:
            lines.append("Nothing to upload: the repository holds it all.")
        if self.removed:
            lines.append(f"Removed: {', '.join(self.removed)}.")
        if self.kept:
            lines.append(f"Of another hand, kept: {', '.join(self.kept)}.")
        lines += self.notes
        return "\n".join([*lines, self._place])


def push(
    run: str | os.PathLike[str],
    repo_id: str,
    *,
    output: str | os.PathLike[str] | None = None,
    private: bool = False,
    create_pr: bool = False,
    force: bool = False,
    tag: str | None = None,
    model: Model | None = None,
    processing_class: BaseImageProcessor | None = None,
    model_license: str | None = None,
    register_width: int | None = None,
    keep_text: bool | None = None,
    dtype: torch.dtype | str = torch.float32,
    native: bool = False,
    max_shard_size: str = SHARD_SIZE,
    pictures: bool = False,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Pushed:
    """Publish a run; a push that was cut short is finished by doing it again.

    The complete folder is built, loaded in fresh processes with and without this
    package, and compared with the trained model; its card is validated; then everything
    goes up in one commit, and a tag marks it. The same commit removes what an earlier
    version left and this one has not; files that are written for readers stay.

    Args:
        run: a finished run, or a ``checkpoint-N`` inside one.
        repo_id: ``user/name``.
        output: folder to build in; None: ``published`` in the run. What a push or merge
            left there is replaced, anything else is not.
        private: create a private repository.
        create_pr: propose the commit as a pull request.
        force: replace the model of a repository that is not ours, and remove files of
            another hand that a loader would take in its place.
        tag: None: ``v`` and the version of the recipe's package. A pull request has none.
        model, processing_class, model_license, register_width, keep_text, dtype, native,
            max_shard_size, pictures: see `merge`.
        token: None: the one of the environment or of ``hf auth login``.
        trust_remote_code: run the base repository's own code.

    Raises:
        HubError: see `check_access`; an unknown licence, a card the Hub refuses, or a
            change by somebody else meanwhile.
        RunFolderError, ExportError, ReloadError: see there; nothing was uploaded.
        HeldError: another command is at work in the run.
    """
    check_repo_id(repo_id)
    if create_pr and tag is not None:
        raise HubError(
            f"tag is {tag!r}, and a pull request has none: leave --tag or --create-pr out."
        )
    dtype = weight_dtype(dtype)
    kept = keeps_text(keep_text, native=native)
    found = read_run(run)
    folder = Path(run) / PUBLISHED if output is None else as_path(output, "output")
    check_output(found, folder, model, overwrite=True)
    tag = tag or f"v{found.record['versions']['unirefiner_hf']}"
    api = HfApi(token=token, library_name="unirefiner_hf")
    state = check_access(
        api,
        repo_id,
        found.record["model"]["base"],
        tag=None if create_pr else tag,
        private=private,
        create_pr=create_pr,
        force=force,
    )

    with holding(found.folder, "push"):
        found = read_run(run)
        base = load_refined(
            found,
            model,
            model_license,
            register_width,
            kept,
            processing_class,
            trust_remote_code,
        )
        if base.license is None:
            raise HubError(
                f"The licence of {base.name} is unknown, and a published model needs one: "
                "look it up and name it, such as --license apache-2.0."
            )
        pixels = example_pixels(base)
        trained = encode(base.model, pixels, native=native)
        folder = export_run(
            found,
            base,
            folder,
            repo_id=repo_id,
            dtype=dtype,
            native=native,
            overwrite=True,
            max_shard_size=max_shard_size,
            pictures=pictures,
        )
        check = check_reload(folder, base, trained, pixels, dtype=dtype, native=native)
        del base
        _validate_card(folder)

        if state is None:
            create = partial(api.create_repo, repo_id, private=private, exist_ok=True)
            explained(lambda: with_retries(create), repo_id)
            state = explained(lambda: _there(api, repo_id), repo_id)
            if not state.is_empty:
                raise _changed(repo_id, state)
        head = state.head
        left_out = () if pictures else tuple(file.name for file in found.pictures)

        def upload() -> Pushed:
            if create_pr:
                return _propose(api, repo_id, folder, check)
            return _commit(api, repo_id, folder, tag, check, private, head)

        return dataclasses.replace(explained(upload, repo_id), left_out=left_out)


def _commit(
    api: HfApi,
    repo_id: str,
    folder: Path,
    tag: str,
    check: ReloadReport,
    private: bool,
    head: str,
) -> Pushed:
    """One commit on main, unless it holds everything; then the tag.

    A commit whose answer was lost, or that met another one, is looked at again: if the
    repository holds everything by then, all is well.

    Args:
        head: commit that was looked at before the folder was built.
    """
    uploaded: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    sent = False
    while True:
        state = _there(api, repo_id)
        check_private(repo_id, state, private)
        wanted = plan(api, repo_id, folder, state)
        tagged = _tags(api, repo_id).get(tag)
        if wanted.is_empty:
            break
        if sent or state.head != head:
            raise _changed(repo_id, state)
        if tagged is not None:
            break
        sent, uploaded, removed = True, wanted.add, wanted.remove
        try:
            with_retries(
                partial(send, api, repo_id, folder, wanted, parent_commit=wanted.head)
            )
        except (HfHubHTTPError, RuntimeError) as problem:
            cause = cause_of(problem)
            if not isinstance(cause, HfHubHTTPError):
                raise
            if cause.response.status_code not in CONFLICTS:
                raise
    if tagged is not None and (tagged != wanted.head or not wanted.is_empty):
        raise tag_taken(repo_id, tag, tagged)
    if tagged is None:
        mark = partial(api.create_tag, tag=tag, revision=wanted.head, exist_ok=True)
        with_retries(lambda: mark(repo_id))
    return Pushed(
        repo_id=repo_id,
        folder=folder,
        commit=wanted.head,
        url=f"{api.endpoint}/{repo_id}",
        uploaded=uploaded,
        removed=removed,
        private=state.private,
        tag=tag,
        pull_request=None,
        check=check,
        kept=wanted.keep,
    )


def _propose(api: HfApi, repo_id: str, folder: Path, check: ReloadReport) -> Pushed:
    """A pull request, or the open one that proposes the same already.

    Before it is tried again the open ones are looked at: one whose answer was lost is there.
    """
    state = _there(api, repo_id)
    wanted = plan(api, repo_id, folder, state)
    url: str | None = None
    commit = state.head
    uploaded: tuple[str, ...] = ()
    if not wanted.is_empty:
        proposal = _proposal(api, repo_id, folder)
        if proposal is None:
            uploaded = wanted.add
            proposal = with_retries(
                lambda: (
                    _proposal(api, repo_id, folder)
                    or _opened(send(api, repo_id, folder, wanted, create_pr=True))
                )
            )
        url, commit = proposal
    return Pushed(
        repo_id=repo_id,
        folder=folder,
        commit=commit,
        url=f"{api.endpoint}/{repo_id}",
        uploaded=uploaded,
        removed=wanted.remove if uploaded else (),
        private=state.private,
        tag=None,
        pull_request=url,
        check=check,
        kept=wanted.keep,
    )


def _opened(info: CommitInfo) -> tuple[str, str]:
    return str(info.pr_url), info.oid


def _proposal(api: HfApi, repo_id: str, folder: Path) -> tuple[str, str] | None:
    """Address and commit of an open pull request that proposes the folder."""
    discussions = with_retries(
        lambda: list(
            api.get_repo_discussions(
                repo_id, discussion_type="pull_request", discussion_status="open"
            )
        )
    )
    for discussion in discussions:
        proposed = remote_state(api, repo_id, f"refs/pr/{discussion.num}")
        if proposed is None:
            continue
        if plan(api, repo_id, folder, proposed).is_empty:
            return discussion.url, proposed.head
    return None


def _changed(repo_id: str, state: RemoteState) -> HubError:
    return HubError(
        f"{repo_id} was changed by somebody else meanwhile (now at {state.head[:7]}): look "
        "at it, then push again."
    )


def _there(api: HfApi, repo_id: str) -> RemoteState:
    state = remote_state(api, repo_id)
    if state is None:
        raise HubError(f"{repo_id} is gone: it was deleted meanwhile.")
    return state


def _tags(api: HfApi, repo_id: str) -> dict[str, str]:
    refs = with_retries(lambda: api.list_repo_refs(repo_id))
    return {tag.name: tag.target_commit for tag in refs.tags}


def _validate_card(folder: Path) -> None:
    """The Hub's own validation, before anything is uploaded."""
    card = ModelCard((folder / CARD).read_text(encoding="utf-8"))
    try:
        with_retries(card.validate)
    except HfHubHTTPError:
        raise
    except ValueError as problem:
        raise HubError(f"The Hub refuses the card's metadata: {problem}") from problem
