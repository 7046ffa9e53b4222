"""The table and the plot of filters against planted truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from unirefiner_hf.modeling.errors import UniRefinerError

from .agreement import FilterReport, TruthReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def truth_table(report: TruthReport) -> str:
    """Markdown: a filter a row, at its limit, with the best limit of the sweep."""
    lines = [
        "| filter | rejects | precision | recall | of proxies | of patterns | F1 | AUC | "
        "best F1 | at limit |",
        "|---" * 10 + "|",
    ]
    for name, found in report.filters.items():
        at, best = found.default, found.best
        auc = "" if found.auc is None else f"{found.auc:.3f}"
        precision = "" if at.precision is None else f"{at.precision:.3f}"
        lines.append(
            f"| {name} | {at.marked:.3f} | {precision} | {at.recall:.3f} | "
            f"{at.proxy_recall:.3f} | {at.pattern_recall:.3f} | {at.f1:.3f} | {auc} | "
            f"{best.f1:.3f} | {best.limit:g} |"
        )
    share = report.planted
    lines.append(
        f"| every token | 1.000 | {share:.3f} | 1.000 | 1.000 | 1.000 | "
        f"{2 * share / (1 + share):.3f} | 0.500 | | |"
    )
    return "\n".join(lines)


def plot_truth(reports: Mapping[str, FilterReport], planted: float) -> Figure:
    """Precision over recall of each filter; a dot marks the limit of training.

    A filter that rejects nothing at any limit has no line.

    Args:
        planted: share of planted tokens, drawn as the precision of blind rejection.

    Raises:
        UniRefinerError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UniRefinerError(
            "The plot needs matplotlib: pip install matplotlib."
        ) from error
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, report in reports.items():
        points = [
            (at.recall, at.precision) for at in report.sweep if at.precision is not None
        ]
        if not points:
            continue
        (line,) = axes.plot(*zip(*points), label=name)
        if report.default.precision is not None:
            axes.plot(
                report.default.recall,
                report.default.precision,
                "o",
                color=line.get_color(),
            )
    axes.axhline(planted, color="grey", linestyle=":", label="blind")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend()
    return figure
