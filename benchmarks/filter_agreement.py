"""How well each filter of training finds artifacts that were injected by a known rule.

    python -m benchmarks.filter_agreement starter --truth ADAPTER --images FOLDER --plot truth.png

ADAPTER is the folder of a LoRA adapter that plants spurious tokens in the backbone, with its rule
(`benchmarks.plant_tokens` trains one; `benchmarks.planting.planted` tells what a rule is). It is
merged, the filters of a training step run on whole images, and what they reject is held against
the rule. `benchmarks.planting.agreement` says what this cannot show. Printed is a table of the
filters at their limits; ``--plot`` draws precision over recall as each limit moves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from unirefiner_hf import UniRefinerError, UniRefinerSettings, load_recipe
from unirefiner_hf.cli.options import positive
from unirefiner_hf.data.left_out import left_out_lines
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.evaluation.inputs import load_pictures

from .planting.agreement import measure_truth
from .planting.report import plot_truth, truth_table


def filters_of(recipe: str) -> UniRefinerSettings:
    """The method's part of a recipe.

    Args:
        recipe: a file, or the name of a shipped one.

    Raises:
        UniRefinerError: a method without filters.
        RecipeError: a recipe that is none.
    """
    # Nothing is trained, so the folder of the run is not made.
    settings = load_recipe(recipe, output_dir="run").method
    if not isinstance(settings, UniRefinerSettings):
        raise UniRefinerError(
            f"{recipe} is of method {settings.name}, which has no filters."
        )
    return settings


def run(options: argparse.Namespace) -> None:
    """Measure, print, write and draw.

    Raises:
        UniRefinerError: the adapter, its rule, the recipe or the images do not fit.
        ValueError, OSError: a backbone or a file that cannot be read.
    """
    settings = None if options.recipe is None else filters_of(options.recipe)
    pictures = load_pictures(options.images, options.max_images)
    images, skipped = pictures.images, pictures.skipped
    backbone = load_checkpoint(
        options.backbone,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        trust_remote_code=options.trust_remote_code,
    )
    report = measure_truth(backbone, options.truth, images, options.size, settings)
    print(truth_table(report))
    cosines = ", ".join(f"{k} {v:.3f}" for k, v in report.cosine_to_clean.items())
    print(
        f"\n{report.images} images at {report.size} px; {report.planted:.1%} of the tokens "
        f"are planted. Mean cosine to the clean tower: {cosines}."
    )
    for line in left_out_lines(skipped, pictures.passed_over):
        print(line)
    if options.json is not None:
        content = {**report.to_dict(), "skipped": skipped}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.plot is not None:
        plot_truth(report.filters, report.planted).savefig(options.plot, dpi=150)


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.filter_agreement",
        description=__doc__.split("\n\n")[0],
    )
    parser.add_argument(
        "backbone",
        metavar="BACKBONE",
        help="that the adapter was trained on: starter, a Hub id, or a folder of a "
        "backbone, a run or a merged checkpoint",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="adapter that plants the artifacts, and its rule",
    )
    parser.add_argument(
        "--images", type=Path, required=True, metavar="FOLDER", help="of any kind"
    )
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="the filters' settings are this recipe's (default: the published ones)",
    )
    parser.add_argument(
        "--size",
        type=positive,
        default=224,
        metavar="PIXELS",
        help="side of the images, rounded up to patches (default: 224)",
    )
    parser.add_argument(
        "--max_images",
        type=positive,
        default=32,
        metavar="N",
        help="images to measure, evenly spaced in the folder (default: 32)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers there, too"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw precision over recall there, .png, .svg or .pdf",
    )
    parser.add_argument("--device", metavar="NAME", help="such as cuda or cpu")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run a model repository's own code",
    )
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main()
