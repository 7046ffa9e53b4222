"""The folder of a run: what its files are called, and how they are read and written."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..loading import adapter as adapter_files
from ..methods.registry import current_name, method_named, setting_names
from ..methods.settings import MethodSettings
from ..modeling.errors import UniRefinerError, WrongKindError
from ..modeling.files import read_json
from ..outputs import RECORD

METRICS, PICTURE = "metrics.json", "before_after.png"
ADAPTER, MERGED, PUBLISHED, SNAPSHOTS = "adapter", "merged", "published", "snapshots"
EVALUATION, EVALUATION_FORMAT = "evaluation.json", 1
"""Beside a merged checkpoint."""
CARD = "README.md"
CHECKPOINT, STAGING = "checkpoint-", ".unfinished"
UPLOADING, FETCHING = ".pushing", ".fetching"
"""Where a checkpoint lies on its way to the Hub, and from it."""
TRAINER_STATE, REFINER_STATE = "trainer_state.json", "refiner_state.json"
OPTIMIZER_STATE, SCHEDULER_STATE = "optimizer.safetensors", "scheduler.safetensors"
"""In a checkpoint; `random_state_file` and `stream_file` are there for each process."""
LAST = "last-checkpoint"
"""On the Hub, the newest checkpoint of a run in progress."""
FORMAT = 1
"""Of the record."""
ASKED, ASKED_FORMAT = "asked.json", 1
"""What a run goes on by: paths of this machine are in it, so it is never published."""
RESULTS = (MERGED, ADAPTER, PUBLISHED, METRICS, PICTURE)
"""What a run leaves at its end, and replaces without asking where it left it itself."""
SECTIONS = ("model", "data", "method", "training", "versions")
"""What every record has."""


class RunFolderError(UniRefinerError):
    """The folder holds no run that could be merged, or not of this base."""


@dataclass(frozen=True)
class RunFolder:
    """An adapter on disk and the record of the run it belongs to.

    Attributes:
        record: the content of ``run.json``; of a checkpoint, without what was only
            known or measured at the end.
        adapter: folder of the adapter.
        pictures: files the card shows.
        evaluation: results of `unirefiner evaluate` on the run's merged model, if any.
    """

    record: dict[str, Any]
    adapter: Path
    pictures: tuple[Path, ...]
    evaluation: Path | None = None

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.adapter.parent

    @property
    def settings(self) -> MethodSettings:
        """The method of the run as it was set; older records lack some of it."""
        return recorded_settings(self.record)


def random_state_file(process: int) -> str:
    """Random states of a process, in a checkpoint."""
    return f"random_state_{process}.safetensors"


def stream_file(process: int) -> str:
    """Where a process is in its stream, in a checkpoint."""
    return f"stream_position_{process}.json"


def checkpoint_name(step: int) -> str:
    """The folder of a checkpoint in its run."""
    return f"{CHECKPOINT}{step}"


def checkpoint_step(folder: Path | str) -> int | None:
    """The step a checkpoint's folder is named for, None of another folder."""
    number = Path(folder).name.removeprefix(CHECKPOINT)
    named = Path(folder).name.startswith(CHECKPOINT) and number.isdigit()
    return int(number) if named else None


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the checkpoints of a run, the newest last."""
    found = [(checkpoint_step(folder), folder) for folder in run.glob(f"{CHECKPOINT}*")]
    return sorted(
        step
        for step, folder in found
        if step is not None and (folder / TRAINER_STATE).is_file()
    )


def last_checkpoint_step(run: Path) -> int | None:
    """Step of the newest checkpoint of a run, None without one."""
    return max(checkpoint_steps(run), default=None)


def is_run(folder: Path) -> bool:
    """Whether a run left its record there."""
    return (folder / RECORD).is_file()


def read_record(run: Path) -> dict[str, Any]:
    """The record of a run.

    Raises:
        RunFolderError: none there, or not one this version reads.
    """
    file = run / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise RunFolderError(f"{file} cannot be read: {problem}") from problem
    return check_record(record, file)


def is_trained(record: dict[str, Any]) -> bool:
    """Whether the last step is done; ``finished`` says that the merged model is there."""
    return bool(record.get("finished") or record.get("trained"))


def check_record(record: Any, file: str | Path = RECORD) -> dict[str, Any]:
    """The record itself, if it is of the format this version reads.

    Raises:
        RunFolderError: it is not.
    """
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise RunFolderError(f"{file} is of format {found!r}, expected {FORMAT}.")
    return record


def recorded_method(run: Path) -> str | None:
    """Name of the method that made a run's model, None where no record says."""
    if not is_run(run):
        return None
    method = read_record(run).get("method")
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        raise RunFolderError(
            f"{run / RECORD} names no method: put the record of the run back, or move the "
            "model out of its folder."
        )
    return current_name(method["name"])


def recorded_settings(record: dict[str, Any]) -> MethodSettings:
    """The method of a record, with those of its settings that it has today."""
    values = dict(record["method"])
    kind = method_named(values.pop("name"))
    known = setting_names(kind)
    if isinstance(values.get("lazy_channels"), list):
        del values["lazy_channels"]  # those that were found, under the setting's name
    return kind(**{name: value for name, value in values.items() if name in known})


def read_evaluation(file: Path) -> list[dict[str, Any]]:
    """Entries of an ``evaluation.json`` beside a checkpoint; none where there is no file.

    Raises:
        UniRefinerError: a later format.
    """
    if not file.is_file():
        return []
    content = read_json(file)
    if content.get("format") != EVALUATION_FORMAT:
        raise UniRefinerError(
            f"{file} is of format {content.get('format')!r}, expected "
            f"{EVALUATION_FORMAT}: move it away, or use the version of unirefiner_hf that "
            "wrote it."
        )
    entries = content.get("entries")
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise UniRefinerError(f"{file} has no list of entries: move it away.")
    return entries


def read_refiner_state(checkpoint: Path) -> dict[str, Any]:
    """Lazy channels and skipped images a checkpoint recorded."""
    state = read_json(checkpoint / REFINER_STATE)
    kinds = {"lazy_channels": list, "skipped": dict}
    lacking = [k for k, kind in kinds.items() if not isinstance(state.get(k), kind)]
    if lacking:
        raise RunFolderError(
            f"{checkpoint / REFINER_STATE} lacks {', '.join(lacking)}: go back to another "
            "checkpoint."
        )
    return state


def as_path(given: str | os.PathLike[str], name: str) -> Path:
    """A path, ``~`` spelt out.

    Raises:
        UniRefinerError: an object of another kind, or nothing; says which argument.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise WrongKindError(f"{name} is a {type(given).__name__}: give a folder.")
    if given == "":
        raise RunFolderError(f"{name} is empty: give a folder.")
    return Path(given).expanduser()


def folder_of_run(folder: str | os.PathLike[str]) -> Path:
    """The run itself, of its folder or of a ``checkpoint-N`` inside it.

    Raises:
        RunFolderError: there is no run.
    """
    folder = as_path(folder, "run").absolute()
    run = folder if checkpoint_step(folder) is None else folder.parent
    if not is_run(run):
        raise RunFolderError(
            f"{folder} is not a run: there is no {run / RECORD}. Name the output_dir of "
            "a refinement, or a checkpoint-N inside it."
        )
    return run


def read_run(folder: str | os.PathLike[str]) -> RunFolder:
    """Find the adapter and the record of a run.

    Args:
        folder: a finished run, or a ``checkpoint-N`` inside a run.

    Raises:
        RunFolderError: no record or not a whole one, no adapter, or a run that is not
            finished (names its checkpoints).
    """
    folder = as_path(folder, "run").absolute()
    step = checkpoint_step(folder)
    run = folder_of_run(folder)
    record = read_record(run)
    lacking = [name for name in SECTIONS if not isinstance(record.get(name), dict)]
    if lacking:
        raise RunFolderError(
            f"{run / RECORD} lacks {', '.join(lacking)}: put back the record that the run "
            "wrote."
        )
    adapter = run / ADAPTER if step is None else folder
    if step is None and not is_trained(record):
        there = ", ".join(map(checkpoint_name, checkpoint_steps(run)))
        raise RunFolderError(
            f"{run} is not finished: continue it with --resume {run}, or merge one of its "
            f"checkpoints ({there or 'it has none yet'})."
        )
    if not (adapter / adapter_files.WEIGHTS).is_file():
        there = ", ".join(map(checkpoint_name, checkpoint_steps(run)))
        raise RunFolderError(
            f"{adapter} holds no {adapter_files.WEIGHTS}. Checkpoints of {run}: "
            f"{there or 'none'}."
        )
    if step is not None:
        record = _at_checkpoint(record, step)
        skipped = read_refiner_state(folder)["skipped"]
        record["data"].setdefault("skipped", skipped)
        return RunFolder(record, adapter, ())
    picture, measured = run / PICTURE, run / MERGED / EVALUATION
    return RunFolder(
        record,
        adapter,
        (picture,) if picture.is_file() else (),
        measured if measured.is_file() else None,
    )


def _at_checkpoint(record: dict[str, Any], step: int) -> dict[str, Any]:
    """The record as of a checkpoint: nothing that was measured at another step."""
    record = copy.deepcopy(record)
    record["training"].update(steps=step, seconds=None)
    record.update(losses={}, spurious_shares=None)
    return record
