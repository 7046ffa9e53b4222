"""One self-contained HTML page of an evaluation."""

from __future__ import annotations

import base64
import colorsys
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..data.images import preprocess
from ..data.labelled import ClassLabels, LabelledImages
from ..visualize import fit_pca, pca_rgb
from .checkpoints import Checkpoint
from .metrics import IGNORE
from .results import Comparison
from .segmentation import SegmentationResult

CELL = 200
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
       padding: 0 1rem; color: #1e1e1e; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; }
.row { display: flex; gap: .5rem; flex-wrap: wrap; margin-bottom: .5rem; }
figure { margin: 0; } figcaption { font-size: 12px; }
img { width: 200px; display: block; image-rendering: pixelated; }
.bar { height: .7rem; background: #2878e6; }
.key span { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem; }
"""


@dataclass(frozen=True)
class SegmentationRow:
    """A checkpoint and what was measured of it."""

    checkpoint: Checkpoint
    result: SegmentationResult


def palette(classes: int) -> np.ndarray:
    """Colours ``(256, 3)`` uint8: class 0 dark, the others round the wheel; 255 white."""
    colours = np.full((256, 3), 128, dtype=np.uint8)
    colours[0] = (40, 40, 40)
    for number in range(1, min(classes, IGNORE)):
        hue = (number * 0.381966) % 1
        rgb = colorsys.hsv_to_rgb(hue, 0.75, 0.9)
        colours[number] = [round(255 * part) for part in rgb]
    colours[IGNORE] = 255
    return colours


def segmentation_report(
    comparison: Comparison,
    images: LabelledImages,
    classes: ClassLabels,
    rows: Sequence[SegmentationRow],
    size: int,
    count: int = 4,
) -> str:
    """Table, IoU of each class, predictions beside the truth, principal components.

    Args:
        images: the measured pairs; the first `count` are shown.
        size: side in pixels at which components are drawn.
    """
    parts = [
        f"<h1>{html.escape(comparison.dataset)}: {html.escape(comparison.task)}</h1>",
        _table(comparison),
        f"<h2>IoU of each class{', mean over seeds' if comparison.probes else ''}</h2>",
        _bars(rows, classes),
        f"<h2>Predictions{' of the first probe seed' if comparison.probes else ''}</h2>",
        _key(classes),
        *_predictions(images, classes, rows, count),
        "<h2>Principal components of the tokens</h2>",
        "<p>Each checkpoint has its own basis, fitted on the images shown.</p>",
        *_components(images, [row.checkpoint for row in rows], size, count),
    ]
    title = html.escape(f"{comparison.dataset}, {comparison.protocol}")
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}"
        f"</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _table(comparison: Comparison) -> str:
    out: list[str] = []
    rows: list[str] = []
    for line in comparison.table().splitlines():
        if line.startswith("|---"):
            continue
        if line.startswith("|"):
            cells = [html.escape(cell.strip()) for cell in line.strip("|").split("|")]
            tag = "td" if rows else "th"
            rows.append("".join(f"<{tag}>{cell}</{tag}>" for cell in cells))
        elif line:
            if rows:
                out.append(_rows(rows))
                rows = []
            out.append(f"<p>{html.escape(line)}</p>")
    if rows:
        out.append(_rows(rows))
    return "".join(out)


def _rows(rows: Sequence[str]) -> str:
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _bars(rows: Sequence[SegmentationRow], classes: ClassLabels) -> str:
    heads = "".join(f"<th>{html.escape(row.checkpoint.name)}</th>" for row in rows)
    lines = [f"<th></th>{heads}"]
    means = [
        np.mean([scores.iou for scores in row.result.scores], axis=0) for row in rows
    ]
    for number, name in enumerate(classes.names):
        cells = []
        for mean in means:
            share = float(mean[number])
            if np.isnan(share):
                cells.append("<td>never seen</td>")
                continue
            bar = f"<div class='bar' style='width:{120 * share:.0f}px'></div>"
            cells.append(f"<td>{100 * share:.1f} %{bar}</td>")
        lines.append(f"<td>{html.escape(name)}</td>{''.join(cells)}")
    return _rows(lines)


def _key(classes: ClassLabels) -> str:
    colours = palette(len(classes))
    spans = [
        f"<span style='background:rgb{tuple(int(x) for x in colours[number])}'></span>"
        f"{html.escape(name)}"
        for number, name in enumerate(classes.names)
    ]
    return f"<p class='key'>{''.join(spans)}</p>"


def _predictions(
    images: LabelledImages,
    classes: ClassLabels,
    rows: Sequence[SegmentationRow],
    count: int,
) -> list[str]:
    colours = palette(len(classes))
    lines = []
    for number in range(min(count, len(images))):
        image, values = images.pair(number)
        label = classes.read(values, images.names[number])
        cells = [
            _figure(np.asarray(image), images.names[number]),
            _figure(colours[label], "truth"),
        ]
        for row in rows:
            prediction = row.result.predictions[number]
            cells.append(_figure(colours[prediction], row.checkpoint.name))
        lines.append(f"<div class='row'>{''.join(cells)}</div>")
    return lines


def _components(
    images: LabelledImages, checkpoints: Sequence[Checkpoint], size: int, count: int
) -> list[str]:
    count = min(count, len(images))
    pictures = [images.pair(number)[0] for number in range(count)]
    columns = [[_figure(np.asarray(p), "image") for p in pictures]]
    for checkpoint in checkpoints:
        side = checkpoint.side(size)
        pixels = [
            preprocess(p, (side, side), checkpoint.mean, checkpoint.std)
            for p in pictures
        ]
        device = checkpoint.model.device
        maps = checkpoint.feature_map(torch.stack(pixels).to(device)).cpu()
        grid = (maps.shape[2], maps.shape[3])
        tokens = maps.flatten(2).transpose(1, 2)
        drawn = pca_rgb(tokens, grid, fit_pca(tokens))
        columns.append([_figure(cell, checkpoint.name) for cell in drawn])
    return [
        f"<div class='row'>{''.join(column[number] for column in columns)}</div>"
        for number in range(count)
    ]


def _figure(pixels: np.ndarray, caption: str) -> str:
    image = Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)))
    if max(image.size) > 2 * CELL:
        image.thumbnail((2 * CELL, 2 * CELL), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    text = html.escape(caption)
    return (
        f"<figure><img alt='{text}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{text}</figcaption></figure>"
    )
