"""Publish a run: build, prove, upload in one commit, tag."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..export.checkpoint import SHARD_SIZE, is_ours, weight_dtype
from ..export.merge import check_output, export_run, keeps_text, load_refined
from ..export.reload_check import ReloadReport, check_reload, encode, example_pixels
from ..export.run_folder import CARD, PUBLISHED, as_path, read_run
from ..loading.backbone import Model
from ..modeling.text_side import TEXT
from ..results import Result, Table
from .client import (
    HubError,
    RemoteState,
    check_ours,
    check_repo_id,
    explained,
    model_files,
    remote_state,
    with_retries,
)

logger = logging.get_logger(__name__)

STALE = (".safetensors", ".safetensors.index.json", ".py", ".png")
"""Endings of files of ours that a push removes when the new model has none of the name."""
CONFLICTS = (409, 412)


@dataclass(frozen=True)
class Pushed(Result):
    """What a push did.

    Attributes:
        folder: what was built, and is on the Hub now.
        commit: that holds it; of the pull request, if one was made.
        uploaded, removed: files; both empty if the repository held it all.
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

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            **dataclasses.asdict(self),
            "folder": str(self.folder),
            "uploaded": list(self.uploaded),
            "removed": list(self.removed),
        }

    @property
    def title(self) -> str:
        """Where it is."""
        return f"{self.repo_id} at {self.url}"

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
        return "\n".join([*lines, self._place])


@dataclass(frozen=True)
class Plan:
    """What separates a repository from a folder."""

    head: str
    add: tuple[str, ...]
    remove: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the repository holds the folder."""
        return not self.add and not self.remove


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
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Pushed:
    """Publish a run; a push that was cut short is finished by doing it again.

    The complete folder is built, loaded in fresh processes with and without this
    package, and compared with the trained model; its card is validated; then everything
    goes up in one commit, and a tag marks it.

    Args:
        run: a finished run, or a ``checkpoint-N`` inside one.
        repo_id: ``user/name``.
        output: folder to build in; None: ``published`` in the run. What a push or merge
            left there is replaced, anything else is not.
        private: create a private repository.
        create_pr: propose the commit as a pull request.
        force: replace the model of a repository that is not ours.
        tag: None: ``v`` and the version of the recipe's package.
        model, processing_class, model_license, register_width, keep_text, dtype, native,
            max_shard_size: see `merge`.
        token: None: the one of the environment or of ``hf auth login``.
        trust_remote_code: run the base repository's own code.

    Raises:
        HubError: not logged in, not allowed, not our repository, public where
            `private` was asked, an unknown licence, a tag that marks another commit, a
            card the Hub refuses, or a change by somebody else meanwhile.
        RunFolderError, ExportError, ReloadError: see there; nothing was uploaded.
    """
    check_repo_id(repo_id)
    dtype = weight_dtype(dtype)
    kept = keeps_text(keep_text, native=native)
    found = read_run(run)
    folder = Path(run) / PUBLISHED if output is None else as_path(output, "output")
    check_output(found, folder)
    api = HfApi(token=token, library_name="unirefiner_hf")
    _log_in(api, repo_id)
    state = explained(lambda: remote_state(api, repo_id), repo_id)
    if not (force or create_pr):
        check_ours(repo_id, state, found.record["model"]["base"])
    if create_pr and state is None:
        raise HubError(f"{repo_id} does not exist: push it without --create-pr first.")
    if state is not None and private and not state.private:
        raise HubError(
            f"{repo_id} is public: change that in its settings on the Hub, or leave "
            "--private out."
        )

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
        overwrite=output is None or is_ours(folder),
        max_shard_size=max_shard_size,
    )
    check = check_reload(folder, base, trained, pixels, dtype=dtype, native=native)
    del base
    _validate_card(folder)

    if state is None:
        create = partial(api.create_repo, repo_id, private=private, exist_ok=True)
        explained(lambda: with_retries(create), repo_id)
    tag = tag or f"v{found.record['versions']['unirefiner_hf']}"
    upload = _propose if create_pr else _commit
    return explained(lambda: upload(api, repo_id, folder, tag, check), repo_id)


def _commit(
    api: HfApi, repo_id: str, folder: Path, tag: str, check: ReloadReport
) -> Pushed:
    """One commit on main, unless it holds everything; then the tag.

    A commit whose answer was lost, or that met another one, is looked at again: if the
    repository holds everything by then, all is well.
    """
    uploaded: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    sent_onto = None
    while True:
        state = remote_state(api, repo_id)
        if state is None:
            raise HubError(f"{repo_id} is gone: it was deleted meanwhile.")
        plan = _plan(api, repo_id, folder, state)
        tagged = _tags(api, repo_id).get(tag)
        if plan.is_empty:
            break
        if sent_onto is not None:
            raise HubError(
                f"{repo_id} was changed by somebody else during the upload (now at "
                f"{state.head[:7]}): look at it, then push again."
            )
        if tagged is not None:
            break
        sent_onto, uploaded, removed = plan.head, plan.add, plan.remove
        try:
            _send(api, repo_id, folder, plan, parent_commit=plan.head)
        except HfHubHTTPError as problem:
            if problem.response.status_code not in CONFLICTS:
                raise
    if tagged is not None and (tagged != plan.head or not plan.is_empty):
        raise HubError(
            f"The tag {tag} of {repo_id} marks another commit ({tagged[:7]}): name another "
            "one with --tag."
        )
    if tagged is None:
        with_retries(
            lambda: api.create_tag(repo_id, tag=tag, revision=plan.head, exist_ok=True)
        )
    return Pushed(
        repo_id=repo_id,
        folder=folder,
        commit=plan.head,
        url=f"{api.endpoint}/{repo_id}",
        uploaded=uploaded,
        removed=removed,
        private=state.private,
        tag=tag,
        pull_request=None,
        check=check,
    )


def _propose(
    api: HfApi, repo_id: str, folder: Path, tag: str, check: ReloadReport
) -> Pushed:
    """A pull request, or the open one that proposes the same already."""
    state = remote_state(api, repo_id)
    if state is None:
        raise HubError(f"{repo_id} is gone: it was deleted meanwhile.")
    plan = _plan(api, repo_id, folder, state)
    url: str | None = None
    commit, uploaded = state.head, plan.add
    if not plan.is_empty:
        for discussion in api.get_repo_discussions(
            repo_id, discussion_type="pull_request", discussion_status="open"
        ):
            revision = f"refs/pr/{discussion.num}"
            proposed = remote_state(api, repo_id, revision)
            if proposed is not None and _plan(api, repo_id, folder, proposed).is_empty:
                url, commit, uploaded = discussion.url, proposed.head, ()
                break
        else:
            info = _send(api, repo_id, folder, plan, create_pr=True)
            url, commit = info.pr_url, info.oid
    return Pushed(
        repo_id=repo_id,
        folder=folder,
        commit=commit,
        url=f"{api.endpoint}/{repo_id}",
        uploaded=uploaded,
        removed=plan.remove if uploaded else (),
        private=state.private,
        tag=None,
        pull_request=url,
        check=check,
    )


def _plan(api: HfApi, repo_id: str, folder: Path, state: RemoteState) -> Plan:
    """Files that differ, by the Hub's own checksums, and files of ours that must go."""
    difference = with_retries(
        lambda: api.verify_repo_checksums(
            repo_id, revision=state.head, local_dir=folder
        )
    )
    changed = [mismatch["path"] for mismatch in difference.mismatches]
    ours = set(model_files(state))
    stale = [
        name
        for name in difference.missing_paths
        if name in ours and (name.endswith(STALE) or name.startswith(f"{TEXT}/"))
    ]
    return Plan(
        state.head, tuple(sorted([*changed, *difference.extra_paths])), tuple(stale)
    )


def _send(
    api: HfApi, repo_id: str, folder: Path, plan: Plan, **options: Any
) -> CommitInfo:
    """One commit with everything of the plan."""

    def send() -> CommitInfo:
        add = [CommitOperationAdd(name, folder / name) for name in plan.add]
        remove = [CommitOperationDelete(name) for name in plan.remove]
        return api.create_commit(
            repo_id,
            [*add, *remove],
            commit_message="Publish the refined model",
            **options,
        )

    return with_retries(send)


def _tags(api: HfApi, repo_id: str) -> dict[str, str]:
    refs = with_retries(lambda: api.list_repo_refs(repo_id))
    return {tag.name: tag.target_commit for tag in refs.tags}


def _log_in(api: HfApi, repo_id: str) -> None:
    if (api.token or get_token()) is None:
        raise HubError(
            "Not logged in to the Hub: run 'hf auth login', or set HF_TOKEN."
        )
    explained(lambda: with_retries(api.whoami), repo_id)


def _validate_card(folder: Path) -> None:
    """The Hub's own validation, before anything is uploaded."""
    card = ModelCard((folder / CARD).read_text(encoding="utf-8"))
    try:
        with_retries(card.validate)
    except HfHubHTTPError:
        raise
    except ValueError as problem:
        raise HubError(f"The Hub refuses the card's metadata: {problem}") from problem
