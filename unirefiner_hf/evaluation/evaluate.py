"""`evaluate`: the base, its controls and refined models in one table."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from ..export.result_folder import check_results
from ..export.run_folder import EVALUATION, read_evaluation
from ..modeling.errors import UniRefinerError
from ..outputs import UnwrittenError, check_folder, write_whole
from .arguments import EvaluationArguments
from .checkpoints import Source, load_checkpoints, measuring, with_borders
from .results import Evaluation, write_results
from .settings import DepthSettings, SegmentationSettings, ZeroShotSettings
from .tasks import TASKS, is_main

TABLE, REPORT = "table.md", "report.html"
Protocol: TypeAlias = SegmentationSettings | DepthSettings | ZeroShotSettings


class ArgumentError(UniRefinerError):
    """Something `evaluate` was told does not fit; the message names it."""


def evaluate(
    checkpoints: Source | Sequence[Source],
    data: Any = None,
    *,
    args: EvaluationArguments | None = None,
    protocol: Protocol | None = None,
    processing_class: Any = None,
    **fields: Any,
) -> Evaluation:
    """Compare checkpoints of one backbone on a task.

    The base with each border of register patches that the others have is measured, too
    (`framed_base`). ``evaluation.json`` is written beside every refined checkpoint, and
    table, report and one JSON of all into `evaluation_output`.

    Args:
        checkpoints: one, or several with the base first: ``starter``, a Hub id, a folder
            of a backbone, a run or a merged checkpoint, or a `UniRefinerModel`.
        data: folder of the labelled images, a set saved by `datasets`, a Hub id, or a
            `datasets.DatasetDict` with both splits.
        args: data, seeds and outputs; None: made of `fields`.
        protocol: settings of the task; None: made of `fields`.
        processing_class: of the models in memory.
        fields: those of `EvaluationArguments` and of the task's settings.

    Raises:
        ArgumentError: an unknown field, one of another task, one given twice, or a value
            of another type.
        CheckpointMismatchError: see `load_checkpoints`.
        LabelError: data that are not there, or labels that do not fit.
        OutputError: results cannot be written where they should be.
        UnwrittenError: that shows at the end; its ``result`` is what this would return.
        ExportError: they would take the place of other files there.
    """
    arguments, settings, data = _settle(data, args, protocol, fields)
    output = arguments.evaluation_output
    folder = None
    if output is not None:
        folder = check_results(check_folder(output), EVALUATION, (TABLE, REPORT))
    measure = TASKS[arguments.task][1](arguments, settings, data)
    loaded = load_checkpoints(
        checkpoints,
        device=arguments.device,
        processing_class=processing_class,
        trust_remote_code=arguments.trust_remote_code,
    )
    for checkpoint in loaded:
        if checkpoint.folder is not None and checkpoint.method is not None:
            check_folder(checkpoint.folder)
            read_evaluation(checkpoint.folder / EVALUATION)
    measured = with_borders(loaded) if arguments.framed_base else loaded
    with measuring(loaded):
        evaluation = measure(measured)
    if is_main():
        try:
            _write(evaluation, folder)
        except (OSError, UniRefinerError) as problem:
            raise UnwrittenError(
                f"It was measured, and could not be written: {problem}", evaluation
            ) from problem
    return evaluation


def _write(evaluation: Evaluation, folder: Path | None) -> None:
    write_results(evaluation, folder)
    if folder is not None:
        write_whole(folder / TABLE, evaluation.to_markdown() + "\n")
    if folder is not None and evaluation.sections:
        evaluation.save_html(folder / REPORT)


def _settle(
    data: Any,
    args: EvaluationArguments | None,
    protocol: Protocol | None,
    fields: Mapping[str, Any],
) -> tuple[EvaluationArguments, Protocol, Any]:
    """Arguments, settings of the task, and the data."""
    kinds = [EvaluationArguments, *(kind for kind, _ in TASKS.values())]
    owners = {field.name: kind for kind in kinds for field in dataclasses.fields(kind)}
    _check_kind("args", args, EvaluationArguments)
    for name in fields:
        if name not in owners:
            close = difflib.get_close_matches(name, owners, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ArgumentError(f"evaluate has no field {name!r}{hint}")
    own = {k: v for k, v in fields.items() if owners[k] is EvaluationArguments}
    if args is None:
        if "task" not in own and protocol is not None:
            own["task"] = _task_of(protocol)
        args = _build(EvaluationArguments, own)
    elif own:
        raise _twice(next(iter(own)), "args")
    if data is None:
        data = args.data
    elif args.data is not None:
        raise _twice("data", "args")
    if data is None:
        raise ArgumentError("data is missing: name the labelled images to measure on.")
    if isinstance(data, Path):
        data = str(data)
    if not isinstance(data, (str, Mapping)):
        raise ArgumentError(
            f"data is a {type(data).__name__}; it must be a folder, a Hub id, or a "
            "datasets.DatasetDict with the splits."
        )
    kind = TASKS[args.task][0]
    _check_kind("protocol", protocol, kind, f" of task {args.task!r}")
    for name in fields:
        if owners[name] not in (EvaluationArguments, kind):
            raise ArgumentError(
                f"{name} is a field of {owners[name].__name__}, and the task is "
                f"{args.task!r}, whose settings are {kind.__name__}."
            )
    rest = {name: value for name, value in fields.items() if name not in own}
    if protocol is not None and rest:
        raise _twice(next(iter(rest)), "protocol")
    return args, protocol or _build(kind, rest), data


def _task_of(protocol: Any) -> str:
    for task, (kind, _) in TASKS.items():
        if isinstance(protocol, kind):
            return task
    kinds = ", ".join(kind.__name__ for kind, _ in TASKS.values())
    raise ArgumentError(
        f"protocol is a {type(protocol).__name__}; it must be one of {kinds}."
    )


def _check_kind(name: str, value: Any, kind: type, of: str = "") -> None:
    if value is not None and not isinstance(value, kind):
        raise ArgumentError(
            f"{name} is a {type(value).__name__}; it must be a {kind.__name__}{of}."
        )


def _twice(name: str, holder: str) -> ArgumentError:
    return ArgumentError(
        f"{name} is given twice, in {holder} and as keyword: say it in one of them, such "
        f"as dataclasses.replace({holder}, {name}=...)."
    )


def _build(kind: type, fields: Mapping[str, Any]) -> Any:
    """An instance of a settings class, its values of the types it declares."""
    hints = get_type_hints(kind)
    values = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in fields.items()
    }
    for name, value in values.items():
        hint = hints[name]
        union = get_origin(hint) in (Union, UnionType)
        allowed = get_args(hint) if union else (hint,)
        fits = type(value) in allowed or (float in allowed and type(value) is int)
        if not fits:
            expected = " or ".join(
                "None" if part is type(None) else part.__name__ for part in allowed
            )
            raise ArgumentError(f"{name} is {value!r}; it must be {expected}.")
    return kind(**values)
