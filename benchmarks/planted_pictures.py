"""Principal components of the towers that `benchmarks.planted_methods --keep_runs` left.

    python -m benchmarks.planted_pictures --bench planted --output methods.png

A row an image of the bench's val split, a column a tower: the clean one, the dirty one, then
every run of the first seed that was kept (``--only`` takes some). All maps of a row share the
clean tower's components, so the same colour means the same direction of features.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from unirefiner_hf.data.folders import list_images
from unirefiner_hf.data.images import load_rgb
from unirefiner_hf.evaluation.checkpoints import Checkpoint, load_checkpoint
from unirefiner_hf.visualize import fit_pca, pca_rgb

from .planted_methods import CLEAN, DIRTY, ROWS, Bench

TOWERS = (CLEAN, DIRTY)


def towers(bench: Bench, only: list[str] | None = None) -> dict[str, Checkpoint]:
    """Title -> tower, in the order of the columns.

    Args:
        only: rows of the bench; None: all whose run was kept.

    Raises:
        FileNotFoundError: the bench kept no runs.
    """
    kept = {row: bench.run(row, 0) for row in ROWS if bench.run(row, 0).is_dir()}
    missing = [row for row in only or () if row not in kept]
    if missing or not kept:
        what = f"no model of {missing[0]!r}" if missing else "no trained models"
        raise FileNotFoundError(
            f"{bench.folder} holds {what}: run the bench with --keep_runs."
        )
    kept = {row: kept[row] for row in only or kept}
    found = {f"{kind} tower": load_checkpoint(bench.tower(kind)) for kind in TOWERS}
    return found | {row: load_checkpoint(str(run)) for row, run in kept.items()}


def figure(columns: dict[str, Checkpoint], paths: list[Path], size: int) -> Figure:
    """The picture, a row for each image."""
    drawn = Figure(figsize=(2 * (len(columns) + 1), 2.1 * len(paths)), layout="tight")
    axes = drawn.subplots(len(paths), len(columns) + 1, squeeze=False)
    for row, path in zip(axes, paths, strict=True):
        image = load_rgb(path)
        row[0].imshow(image.resize((size, size)))
        basis = None
        for place, (title, tower) in zip(row[1:], columns.items(), strict=True):
            side = tower.side(size)
            pixels = tower.reading(image, (side, side))[None]
            with torch.no_grad():
                tokens = tower.feature_map(pixels).flatten(2).transpose(1, 2)
            tokens = torch.nn.functional.normalize(tokens, dim=-1)
            basis = basis or fit_pca(tokens)
            grid = (side // tower.patch_size,) * 2
            place.imshow(pca_rgb(tokens, grid, basis)[0], interpolation="nearest")
            place.set_title(title, fontsize=9)
    for place in axes.flat:
        place.set_axis_off()
    return drawn


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bench", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", default="starter", help="the bench's clean tower")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="ROW")
    parser.add_argument("--images", type=int, nargs="+", default=[0, 1, 2, 3])
    options = parser.parse_args(argv)
    try:
        bench = Bench.opened(options.bench, options.model)
        paths = list_images(str(bench.scenes / "val" / "images"))
        chosen = [paths[number] for number in options.images]
        drawn = figure(towers(bench, options.only), chosen, bench.plan.size)
        drawn.savefig(options.output, dpi=110)
    except (OSError, ValueError, IndexError) as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main()
