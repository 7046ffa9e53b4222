"""Compare a checkpoint's files with the sha256 its card states."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RevisionNotFoundError

from ..export.card import own_metadata
from ..export.digests import is_weights, sha256
from ..export.model_files import can_change, files_of, is_of_training, is_written
from ..export.run_folder import CHECKPOINT, LAST, MERGED, as_path, is_run
from ..results import Result, Table
from .client import HubError, check_repo_id, explained, with_retries
from .plan import ATTRIBUTES


@dataclass(frozen=True)
class Verified(Result):
    """What a verification found.

    Attributes:
        right: files whose sha256 is the card's.
        wrong: name -> (sha256 of the card, of the file).
        missing: files the card names and the checkpoint lacks.
        unlisted: files that could run or change the result, and the card does not name.
        unchecked: those a card of an earlier version, which states weights alone, leaves out.
        other: files of another hand that no loader takes.
    """

    folder: Path
    right: tuple[str, ...]
    wrong: dict[str, tuple[str, str]]
    missing: tuple[str, ...]
    unlisted: tuple[str, ...]
    unchecked: tuple[str, ...] = ()
    other: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every file that the card states is the one that was published."""
        return not (self.wrong or self.missing or self.unlisted)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "passed": self.passed,
            "folder": str(self.folder),
            "right": list(self.right),
            "wrong": {n: {"card": c, "file": f} for n, (c, f) in self.wrong.items()},
            "missing": list(self.missing),
            "unlisted": list(self.unlisted),
            "unchecked": list(self.unchecked),
            "other": list(self.other),
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """Verdict, file and what is the matter, file by file."""
        return [
            *(("right", name, "") for name in self.right),
            *(
                ("WRONG", name, f"the card says {card}, the file is {file}")
                for name, (card, file) in self.wrong.items()
            ),
            *(("MISSING", name, "") for name in self.missing),
            *(
                ("UNLISTED", name, "the card does not name it")
                for name in self.unlisted
            ),
            *(
                ("UNCHECKED", name, "the card is of an earlier version")
                for name in self.unchecked
            ),
            *(("other", name, "no part of the model") for name in self.other),
        ]

    @property
    def title(self) -> str:
        """The verdict."""
        return "As published" if self.passed else "Not as published"

    def tables(self) -> list[Table]:
        """The files."""
        return [Table(("", "file", ""), self.rows())]

    def __str__(self) -> str:
        lines = [
            f"{verdict:9} {name}{': ' if why else ''}{why}"
            for verdict, name, why in self.rows()
        ]
        if self.passed and self.unchecked:
            lines.append(
                f"{len(self.right)} weight files are as published. The card is of an earlier "
                f"version, which states no others: {len(self.unchecked)} files that can "
                "change the result were not checked. Its owner's next push states them."
            )
        elif self.passed:
            lines.append(f"{len(self.right)} files are as published.")
        else:
            lines.append(
                "Do not use this checkpoint. If a download went wrong, --force-download "
                "mends it; otherwise tell its owner."
            )
        return "\n".join(lines)


def verify(
    checkpoint: str | os.PathLike[str],
    *,
    revision: str | None = None,
    force_download: bool = False,
) -> Verified:
    """Compare every file that can run or change the result with the card's sha256.

    Weights, configs, image processor, the code that ``trust_remote_code`` runs, adapter and
    text encoder. The card itself is what they are compared with. The Hub's client checks the
    size of what it downloads and nothing else.

    Args:
        checkpoint: a folder, or a Hub id, which is downloaded to the cache.
        revision: branch, tag or commit on the Hub; for a Hub id alone.
        force_download: do not use what the cache holds; for a Hub id alone.

    Raises:
        HubError: neither a folder nor a repository that may be read; or its card states no
            checksums.
    """
    folder = as_path(checkpoint, "checkpoint")
    if not folder.is_dir():
        folder = _download(checkpoint, revision, force_download)
    elif revision is not None or force_download:
        name = "force_download" if revision is None else "revision"
        raise HubError(f"{folder} is a folder here: {name} is for models on the Hub.")
    told = own_metadata(folder) or {}
    stated, others = told.get("weights"), told.get("files")
    if not isinstance(stated, dict) or not stated:
        if is_run(folder) and (folder / MERGED).is_dir():
            raise HubError(
                f"{folder} is a run, which states no checksums: verify its model, "
                f"{folder / MERGED}."
            )
        raise HubError(
            f"The card of {checkpoint} states no checksums: only a model that unirefiner "
            "published can be verified."
        )
    if isinstance(others, dict):
        stated = {**stated, **others}
    there = {n for n in files_of(folder) if not is_of_training(n)}
    digests = {n: sha256(folder / n) for n in sorted(stated.keys() & there)}
    unstated = sorted(there - stated.keys())
    changing = [name for name in unstated if can_change(name)]
    unchecked = [
        name
        for name in changing
        if others is None and is_written(name) and not is_weights(name)
    ]
    return Verified(
        folder=folder,
        right=tuple(n for n, digest in digests.items() if digest == stated[n]),
        wrong={n: (str(stated[n]), d) for n, d in digests.items() if d != stated[n]},
        missing=tuple(sorted(stated.keys() - there)),
        unlisted=tuple(name for name in changing if name not in unchecked),
        unchecked=tuple(unchecked),
        other=tuple(
            name
            for name in unstated
            if name not in changing and not is_written(name) and name != ATTRIBUTES
        ),
    )


def _download(
    checkpoint: str | os.PathLike[str], revision: str | None, force: bool
) -> Path:
    """The repository's model in the cache.

    The commit is asked for first: the download alone would be content with an old copy
    of a repository that is gone or closed by now.
    """
    repo_id = os.fspath(checkpoint)
    if isinstance(checkpoint, Path) or repo_id.count("/") != 1 or repo_id[0] in "./~":
        raise HubError(
            f"{repo_id} is neither a folder here nor user/name, a repository on the Hub."
        )
    check_repo_id(repo_id)

    def download() -> str:
        try:
            info = with_retries(lambda: HfApi().model_info(repo_id, revision=revision))
        except RevisionNotFoundError as problem:
            raise HubError(f"{repo_id} has no revision {revision!r}.") from problem
        return with_retries(
            lambda: snapshot_download(
                repo_id,
                revision=info.sha,
                force_download=force,
                ignore_patterns=[f"{LAST}/*", f"{CHECKPOINT}*/*"],
            )
        )

    return Path(explained(download, repo_id))
