"""Tables of an evaluation, and the ``evaluation.json`` beside a checkpoint.

The file of a checkpoint, format 1::

    {
      "format": 1,
      "entries": [                       one for each metric of each data set and protocol
        {
          "task": "image-segmentation",  as the Hub names tasks
          "dataset": "StampScenes",      in words, or a Hub id
          "split": "val",
          "metric": "mean_iou",          as the Hub names metrics
          "unit": "%",                   behind every number; empty for none
          "higher_is_better": true,
          "value": 55.1,                 of this checkpoint, mean over probe seeds
          "std": 0.3,                    over probe seeds (n - 1); null for one seed
          "seeds": 3,                    0 where nothing was trained
          "n": 160,                      images it was measured on
          "register_width": 1,           border it was measured with, in patches
          "protocol": "linear probe, ...",
          "settings": {...},             every number of the protocol
          "controls": {                  what it is compared with, by name
            "base": {
              "value": 53.9, "std": 0.2, "register_width": 0,
              "difference": 1.2,         this checkpoint minus the control
              "interval": [0.4, 2.1]     95 %, paired bootstrap over images
            }
          },
          "missing_controls": [],        those a comparison needs and this one lacks
          "absent_classes": []           those no label has, see `Evaluation.absent_note`
        }
      ]
    }

Measuring again replaces the entry of the same task, data set, split, metric and protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..export.run_folder import EVALUATION, EVALUATION_FORMAT, read_evaluation
from ..methods.registry import control_titles
from ..outputs import write_json
from ..results import Result, Section, Table
from .checkpoints import Checkpoint
from .metrics import Statistic, check_measures, paired_bootstrap

NAMED = 8
"""Absent classes that a table names."""
KEY = ("task", "dataset", "split", "metric", "protocol")


@dataclass(frozen=True)
class Metric:
    """A number of a task.

    Attributes:
        name: as the Hub names metrics.
        title: head of its column.
        unit: behind every number.
        scale: from what is measured to what is shown (100 for per cent).
        higher_is_better: which way is good.
    """

    name: str
    title: str
    unit: str = "%"
    scale: float = 100.0
    higher_is_better: bool = True


@dataclass(frozen=True)
class Measured:
    """One checkpoint's values of one metric.

    Attributes:
        values: of each seed, unscaled.
        statistic: for the bootstrap; None where there is none.
    """

    values: Sequence[float]
    statistic: Statistic | None = None


@dataclass(frozen=True)
class EvaluatedCheckpoint:
    """A row of the table.

    Attributes:
        name, method, register_width, folder, needs_controls, is_control: see
            `Checkpoint`.
        measured: metric name -> what was measured.
    """

    name: str
    method: str | None
    register_width: int
    folder: Path | None
    needs_controls: bool
    is_control: bool
    measured: Mapping[str, Measured]

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, measured: Mapping[str, Measured]
    ) -> EvaluatedCheckpoint:
        """What the table says of a checkpoint; its weights are not kept.

        Raises:
            UniRefinerError: a measure is not a finite number.
        """
        for name, found in measured.items():
            for value in found.values:
                check_measures(checkpoint.name, {name: value})
        return cls(
            checkpoint.name,
            checkpoint.method,
            checkpoint.register_width,
            checkpoint.folder,
            checkpoint.needs_controls,
            checkpoint.is_control,
            measured,
        )


@dataclass
class Evaluation(Result):
    """Several checkpoints under one protocol; the first is the base.

    Attributes:
        images: their number.
        probes: a head was trained for each seed; without, there is one value.
        absent: names of the classes that no label has.
        sections: of the page, with its pictures.
    """

    task: str
    dataset: str
    split: str
    protocol: str
    metrics: Sequence[Metric]
    images: int
    settings: Mapping[str, Any]
    rows: list[EvaluatedCheckpoint] = field(default_factory=list)
    probes: bool = True
    absent: Sequence[str] = ()
    sections: Sequence[Section] = field(default=(), repr=False)

    def value(self, row: int, metric: Metric) -> tuple[float, float | None, int]:
        """Mean and standard deviation over seeds, and their number, as shown."""
        values = np.asarray(self.rows[row].measured[metric.name].values) * metric.scale
        std = float(values.std(ddof=1)) if len(values) > 1 else None
        return float(values.mean()), std, len(values)

    def difference(
        self, row: int, control: int, metric: Metric
    ) -> tuple[float, tuple[float, float] | None]:
        """A row minus a control, and its 95 % interval where there is one."""
        ours = self.rows[row].measured[metric.name]
        theirs = self.rows[control].measured[metric.name]
        gap = self.value(row, metric)[0] - self.value(control, metric)[0]
        if ours.statistic is None or theirs.statistic is None:
            return gap, None
        low, high = paired_bootstrap(ours.statistic, theirs.statistic, self.images)
        return gap, (low * metric.scale, high * metric.scale)

    def missing_controls(self) -> list[str]:
        """Controls without which a gain of a refined model says little."""
        refined = [row for row in self.rows if row.needs_controls]
        controls = [row for row in self.rows if row.is_control]
        framed = [row for row in self.rows if row.method is None and row.register_width]
        missing = []
        if refined and not controls:
            missing += control_titles()
        if any(row.register_width for row in refined) and not framed:
            missing.append("base with the border of register patches")
        return missing

    def entries(self, row: int) -> list[dict[str, Any]]:
        """The entries of ``evaluation.json`` of one checkpoint."""
        checkpoint = self.rows[row]
        entries = []
        for metric in self.metrics:
            value, std, seeds = self.value(row, metric)
            controls = {}
            for other, control in enumerate(self.rows):
                if other == row:
                    continue
                mean, spread, _ = self.value(other, metric)
                gap, interval = self.difference(row, other, metric)
                controls[control.name] = {
                    "value": round(mean, 4),
                    "std": _rounded(spread),
                    "register_width": control.register_width,
                    "difference": round(gap, 4),
                    "interval": [round(x, 4) for x in interval] if interval else None,
                }
            entries.append(
                {
                    "task": self.task,
                    "dataset": self.dataset,
                    "split": self.split,
                    "metric": metric.name,
                    "unit": metric.unit,
                    "higher_is_better": metric.higher_is_better,
                    "value": round(value, 4),
                    "std": _rounded(std),
                    "seeds": seeds if self.probes else 0,
                    "n": self.images,
                    "register_width": checkpoint.register_width,
                    "protocol": self.protocol,
                    "settings": dict(self.settings),
                    "controls": controls,
                    "missing_controls": self.missing_controls(),
                    "absent_classes": list(self.absent),
                }
            )
        return entries

    def to_dict(self) -> dict[str, Any]:
        """What ``evaluation.json`` of all checkpoints holds."""
        every = {row.name: self.entries(i) for i, row in enumerate(self.rows)}
        return {"format": EVALUATION_FORMAT, "checkpoints": every}

    @property
    def title(self) -> str:
        """What was measured on what."""
        return f"{self.dataset}: {self.task}"

    def tables(self) -> list[Table]:
        """A row a checkpoint, then each difference with its interval."""
        main = self.metrics[0]
        heads = [f"{m.title}{f' ({m.unit})' if m.unit else ''}" for m in self.metrics]
        heads.append(f"{main.title} against {self.rows[0].name}, 95 % interval")
        rows, gaps = [], []
        for number, row in enumerate(self.rows):
            cells = [self._cell(number, metric) for metric in self.metrics]
            gap = self._gap(number, 0, main) if number else ""
            rows.append([row.name, *cells, gap])
            if row.needs_controls:
                gaps += [
                    f"{row.name} against {control.name}, {main.title}: "
                    f"{self._gap(number, other, main)}"
                    for other, control in enumerate(self.rows)
                    if other not in (0, number)
                ]
        seeds = (
            f"mean and standard deviation over {self.value(0, main)[2]} probe seeds; "
        )
        lead = (
            f"{self.dataset}, {self.split}, {self.images} images: {self.protocol}; "
            f"{seeds if self.probes else ''}paired bootstrap over images."
        )
        missing = [
            f"Missing control: {name}. Without it a gain says little."
            for name in self.missing_controls()
        ]
        absent = [self.absent_note()] if self.absent else []
        return [Table(["", *heads], rows, lead, [*gaps, *absent, *missing])]

    def absent_note(self) -> str:
        """What is said of classes that no label has."""
        names = ", ".join(self.absent[:NAMED])
        more = len(self.absent) - NAMED
        rest = f" and {more} more" if more > 0 else ""
        return (
            f"{len(self.absent)} classes have no label in {self.split} and are left out of "
            f"the means, unless they are predicted, which counts as 0 in mIoU: {names}{rest}."
        )

    def _cell(self, row: int, metric: Metric) -> str:
        value, std, _ = self.value(row, metric)
        digits = 1 if metric.scale == 100 else 3
        spread = "" if std is None else f" ± {std:.{digits}f}"
        return f"{value:.{digits}f}{spread}"

    def _gap(self, row: int, control: int, metric: Metric) -> str:
        gap, interval = self.difference(row, control, metric)
        digits = 1 if metric.scale == 100 else 3
        if interval is None:
            return f"{gap:+.{digits}f}"
        low, high = interval
        return f"{gap:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def write_results(evaluation: Evaluation, output: Path | None = None) -> list[Path]:
    """Put each checkpoint's entries into the ``evaluation.json`` beside it.

    Args:
        output: a folder for one file of all checkpoints, ``{"format": 1, "checkpoints":
            {name: [entries]}}``; None writes only the files beside the checkpoints.

    Returns:
        The files written. Checkpoints without a folder (Hub ids, the base with another
        border) and published backbones get none.

    Raises:
        UniRefinerError: a file there is of a later format.
    """
    written = []
    for number, row in enumerate(evaluation.rows):
        if row.folder is not None and row.method is not None:
            entries = evaluation.entries(number)
            kept = _kept(row.folder / EVALUATION, entries)
            content = {"format": EVALUATION_FORMAT, "entries": [*kept, *entries]}
            written.append(write_json(row.folder / EVALUATION, content))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        written.append(write_json(output / EVALUATION, evaluation.to_dict()))
    return written


def _kept(file: Path, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    new = {tuple(entry[key] for key in KEY) for entry in entries}
    kept = read_evaluation(file)
    return [entry for entry in kept if tuple(entry[key] for key in KEY) not in new]
