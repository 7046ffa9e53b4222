"""A run in progress on the Hub, so that it survives the loss of its machine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    snapshot_download,
)
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from .. import __version__
from ..export.card import render_unfinished_card
from ..export.model_files import is_of_training
from ..export.run_folder import (
    ADAPTER,
    CARD,
    FETCHING,
    LAST,
    OPTIMIZER_STATE,
    RECORD,
    REFINER_STATE,
    TRAINER_STATE,
    UPLOADING,
    checkpoint_name,
    checkpoint_step,
    is_run,
    is_trained,
    read_record,
    read_refiner_state,
)
from ..export.whole import note_change
from ..loading import adapter as adapter_files
from ..outputs import write_json
from .access import check_access, check_private
from .client import MAIN, HubError, explained, explanation, remote_state, with_retries

logger = logging.get_logger(__name__)

BRANCH = "training"
"""Where checkpoints go: the main branch holds finished models alone."""


def check_publication(args: TrainingArguments, base: str, *, resume: bool) -> None:
    """Refuse what a run that publishes would be refused at its end; nothing is made.

    Args:
        args: of the training.
        base: name of the base.
        resume: whether the run goes on from a checkpoint.

    Raises:
        HubError: as `check_access`; or the repository holds the checkpoints of a run, and
            this one is new.
    """
    run, repo_id = Path(str(args.output_dir)), str(args.hub_model_id)
    api = HfApi(token=args.hub_token, library_name="unirefiner_hf")
    finished = resume and is_run(run) and is_trained(read_record(run))
    try:
        state = check_access(
            api,
            repo_id,
            base,
            # The tag of a finished run may mark its own model; `push` looks at that.
            tag=None if finished else f"v{__version__}",
            private=bool(args.hub_private_repo),
            new=not finished,
        )
    except HubError as problem:
        if "--tag" in str(problem) or "--force" in str(problem):
            raise HubError(
                f"{problem} Or train without push_to_hub, and then unirefiner push {run} "
                f"{repo_id} with that option."
            ) from problem
        raise
    if resume or state is None or args.hub_strategy == HubStrategy.END:
        return
    if explained(lambda: _branch_exists(api, repo_id), repo_id):
        raise HubError(
            f"{repo_id} holds the checkpoints of a run in its branch {BRANCH!r}: continue "
            "that run with --resume, name another hub_model_id, or delete the branch on "
            "the repository's page."
        )


def _branch_exists(api: HfApi, repo_id: str) -> bool:
    refs = with_retries(lambda: api.list_repo_refs(repo_id))
    return BRANCH in {branch.name for branch in refs.branches}


class HubSync(TrainerCallback):
    """Uploads the checkpoints of a run while it goes on.

    Each upload is one commit to the branch `BRANCH`: the adapter in ``adapter/``, the run's
    record, a card that says the run is not finished, and, as the strategy asks, the whole
    checkpoint in ``last-checkpoint/`` or under its own name. It runs in the background on
    hard links or copies, so that the run may delete the checkpoint meanwhile. An upload that
    fails is reported and does not stop the run; the next one carries everything again. Unless
    ``hub_private_repo`` is set, names of images that could not be used stay here.

    The main branch stays as it is until the run is finished and `push` publishes it.

    Args:
        args: of the training; all its fields for the Hub are respected.
        base: name of the base, for the card.

    Attributes:
        failures: reasons of the uploads that failed.
        left_out: steps that were not uploaded because the last upload was under way
            (``hub_always_push`` waits instead).

    Raises:
        HubError: the Hub refuses; see `check_publication` for what is found out before.
    """

    def __init__(self, args: TrainingArguments, base: str) -> None:
        self.run = Path(str(args.output_dir))
        self.repo_id = str(args.hub_model_id)
        self.base = base
        self.strategy = HubStrategy(args.hub_strategy)
        self.always = args.hub_always_push
        self.api = HfApi(token=args.hub_token, library_name="unirefiner_hf")
        self.failures: list[str] = []
        self.left_out: list[int] = []
        self._upload: tuple[int, Future[CommitInfo]] | None = None
        self._waiting: tuple[Path, int] | None = None
        self.private = bool(args.hub_private_repo)
        if not args.process_index:
            explained(self._make, self.repo_id)

    def _make(self) -> None:
        """The repository and its branch, where they are missing."""
        with_retries(
            lambda: self.api.create_repo(
                self.repo_id, private=self.private or None, exist_ok=True
            )
        )
        if self.strategy != HubStrategy.END:
            with_retries(
                lambda: self.api.create_branch(
                    self.repo_id, branch=BRANCH, exist_ok=True
                )
            )

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            step = state.global_step
            self.push(self.run / checkpoint_name(step), step)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.finish()
        if self._waiting is not None:
            self.left_out.remove(self._waiting[1])
            self.push(*self._waiting)
            self.finish()
        if self.left_out:
            logger.warning(
                f"Steps {self.left_out} were not uploaded to {self.repo_id}: the upload "
                "before was still under way. Save less often, or set hub_always_push."
            )

    def push(self, checkpoint: Path, step: int) -> None:
        """Start the upload of a checkpoint."""
        if self.strategy == HubStrategy.END:
            return
        if self._upload is not None and not self._upload[1].done() and not self.always:
            self.left_out.append(step)
            self._waiting = (checkpoint, step)
            return
        self.finish()
        self._waiting = None
        staging = self.run / UPLOADING
        shutil.rmtree(staging, ignore_errors=True)
        try:
            folder = self._stage(checkpoint, staging, step)
        except OSError as problem:
            self._failed(step, str(problem))
            return
        future = self.api.run_as_future(self._commit, staging, folder, step)
        self._upload = (step, future)

    def finish(self) -> None:
        """Wait for the upload under way, and report it if it failed."""
        if self._upload is None:
            return
        step, future = self._upload
        self._upload = None
        problem = future.exception()
        shutil.rmtree(self.run / UPLOADING, ignore_errors=True)
        if isinstance(problem, HubError):
            self._failed(step, str(problem))
        elif problem is not None:
            self._failed(step, explanation(problem, self.repo_id))

    def _failed(self, step: int, said: str) -> None:
        reason = f"step {step}: {said}"
        self.failures.append(reason)
        logger.warning(f"Not uploaded to {self.repo_id}, {reason}. The run goes on.")

    def _stage(self, checkpoint: Path, staging: Path, step: int) -> str | None:
        """Lay out the commit's files; returns the checkpoint's folder among them."""
        for name in adapter_files.FILES:
            if (checkpoint / name).is_file():
                _link(checkpoint / name, staging / ADAPTER / name)
        shutil.copyfile(self.run / RECORD, staging / RECORD)
        card = render_unfinished_card(self.base, step)
        (staging / CARD).write_text(card, encoding="utf-8")
        if self.strategy == HubStrategy.EVERY_SAVE:
            return None
        last = self.strategy == HubStrategy.CHECKPOINT
        folder = LAST if last else checkpoint.name
        for file in _files(checkpoint):
            _link(checkpoint / file, staging / folder / file)
        told = read_refiner_state(checkpoint)
        if told["skipped"] and not self.private:
            # Names of the user's own files, which a resumed run finds again.
            write_json(staging / folder / REFINER_STATE, {**told, "skipped": {}})
            note_change(staging / folder, REFINER_STATE)
        return folder

    def _commit(self, staging: Path, folder: str | None, step: int) -> CommitInfo:
        files = [file.as_posix() for file in _files(staging)]
        state = remote_state(self.api, self.repo_id, BRANCH)
        if state is not None:
            check_private(self.repo_id, state, self.private)
        there = state.files if state is not None and folder is not None else ()
        below = [name for name in there if name.startswith(f"{folder}/")]
        stale = [name for name in below if name not in files]

        def send() -> CommitInfo:
            add = [CommitOperationAdd(name, staging / name) for name in files]
            remove = [CommitOperationDelete(name) for name in stale]
            return self.api.create_commit(
                self.repo_id,
                [*add, *remove],
                commit_message=f"Training in progress, step {step}",
                revision=BRANCH,
            )

        return with_retries(send)


def fetch_last_checkpoint(
    repo_id: str, run: Path, token: str | None = None
) -> Path | None:
    """Download the newest checkpoint a run left on the Hub into its folder.

    Returns:
        ``checkpoint-N`` in the run's folder, None where the repository holds none.

    Raises:
        HubError: the Hub refuses; or the optimiser's state there is a pickle, which is not
            fetched.
    """
    api = HfApi(token=token, library_name="unirefiner_hf")
    found = _last_checkpoint(api, repo_id)
    if found is None:
        return None
    head, chosen, whole = found
    if not whole:
        raise HubError(
            f"{chosen} of {repo_id} holds no {OPTIMIZER_STATE}: its optimiser's state is a "
            "pickle, which can run anything and is not fetched. If it is yours, download "
            f"the folder to checkpoint-N in {run.name} and set allow_pickled_checkpoint; "
            "or start in another output_dir."
        )
    staging = run / FETCHING
    shutil.rmtree(staging, ignore_errors=True)
    download = partial(
        snapshot_download,
        repo_id,
        revision=head,
        # What a checkpoint of ours is made of; a pickle is not fetched.
        allow_patterns=[f"{chosen}/*.json", f"{chosen}/*.safetensors"],
        local_dir=staging,
        token=token,
    )
    explained(lambda: with_retries(download), repo_id)
    step = _step(staging / chosen)
    target = run / checkpoint_name(step)
    os.replace(staging / chosen, target)
    shutil.rmtree(staging, ignore_errors=True)
    logger.warning(f"Fetched {checkpoint_name(step)} from {repo_id}.")
    return target


def _last_checkpoint(api: HfApi, repo_id: str) -> tuple[str, str, bool] | None:
    """Commit and folder of the newest one, and whether its state is there without a pickle.

    Earlier versions left it on the main branch.
    """

    def look() -> tuple[str, str, bool] | None:
        if remote_state(api, repo_id) is None:
            return None
        for revision in (BRANCH, MAIN):
            if revision == BRANCH and not _branch_exists(api, repo_id):
                continue
            state = remote_state(api, repo_id, revision)
            files = state.files if state is not None else ()
            folders = {name.split("/")[0] for name in files if is_of_training(name)}
            steps = [step for step in map(checkpoint_step, folders) if step is not None]
            chosen = checkpoint_name(max(steps)) if steps else None
            chosen = LAST if LAST in folders else chosen
            if chosen is not None and state is not None:
                return state.head, chosen, f"{chosen}/{OPTIMIZER_STATE}" in files
        return None

    return explained(look, repo_id)


def _step(checkpoint: Path) -> int:
    state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE).read_text())
    return int(state["global_step"])


def _files(folder: Path) -> Iterable[Path]:
    """Every file below a folder, relative to it."""
    return sorted(
        file.relative_to(folder) for file in folder.rglob("*") if file.is_file()
    )


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system knows none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
