"""What separates a repository from the folder that was built, and the commit that closes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
)

from ..export.model_files import can_change, is_of_training, is_written
from ..export.run_folder import REFINER_STATE
from .client import RemoteState, with_retries

ATTRIBUTES = ".gitattributes"
"""The Hub's own file."""


@dataclass(frozen=True)
class Plan:
    """What separates a repository from a folder.

    Attributes:
        add: files of the folder that the repository lacks or holds otherwise.
        remove: files of the repository that are no part of what was built.
        keep: other files of the repository, which no loader takes: they stay.
    """

    head: str
    add: tuple[str, ...]
    remove: tuple[str, ...]
    keep: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the repository holds the folder, and nothing to remove."""
        return not self.add and not self.remove


def plan(api: HfApi, repo_id: str, folder: Path, state: RemoteState) -> Plan:
    """Compare by the Hub's own checksums.

    What we once wrote and did not build now goes, with the checkpoints that earlier versions
    left on the main branch, and so does whatever a loader may take in its place (which is
    there with ``force`` alone, see `check_access`). What is written for readers stays.
    """
    difference = with_retries(
        lambda: api.verify_repo_checksums(
            repo_id, revision=state.head, local_dir=folder
        )
    )
    changed = [mismatch["path"] for mismatch in difference.mismatches]
    others = sorted(n for n in difference.missing_paths if n != ATTRIBUTES)
    remove = [
        name
        for name in others
        if is_written(name) or can_change(name) or _is_of_a_run(name, state)
    ]
    return Plan(
        head=state.head,
        add=tuple(sorted([*changed, *difference.extra_paths])),
        remove=tuple(remove),
        keep=tuple(name for name in others if name not in remove),
    )


def _is_of_a_run(name: str, state: RemoteState) -> bool:
    """Whether a file is of a checkpoint that `HubSync` of an earlier version left."""
    folder = name.partition("/")[0]
    return is_of_training(name) and f"{folder}/{REFINER_STATE}" in state.files


def send(
    api: HfApi, repo_id: str, folder: Path, wanted: Plan, **options: Any
) -> CommitInfo:
    """One commit with everything of the plan, tried once."""
    add = [CommitOperationAdd(name, folder / name) for name in wanted.add]
    remove = [CommitOperationDelete(name, is_folder=False) for name in wanted.remove]
    return api.create_commit(
        repo_id,
        [*add, *remove],
        commit_message="Publish the refined model",
        **options,
    )
