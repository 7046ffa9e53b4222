"""The StampScenes table: base, base with a border, self-distillation, refined model.

Builds the scenes, refines the starter tower on the unlabelled training scenes, distils it
plainly for as many steps, and measures all four with linear probes.

    python -m examples.stampscenes.run --output stampscenes
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from unirefiner_hf import UniRefinerError, evaluate, load_recipe, refine

from .build import APT, SourceError, build

RECIPE = Path(__file__).with_name("recipe.yaml")


def run(
    output: Path,
    packages: Path = Path("/"),
    *,
    model: str = "starter",
    steps: int | None = None,
    train: int = 240,
    val: int = 160,
    size: int = 224,
    seed: int = 0,
) -> Path:
    """Build, train and measure; what is there already is kept.

    Args:
        output: gets ``scenes/``, ``refined/``, ``plain/`` and ``evaluation/``.
        model: the base; see `unirefiner refine --help`.
        steps: of both trainings; None takes the recipe's.
        train, val, size, seed: see `build`.

    Returns:
        The folder with ``table.md``, ``report.html`` and ``evaluation.json``.

    Raises:
        SourceError: the packages' files are not there.
        UniRefinerError: see `unirefiner_hf.refine` and `unirefiner_hf.evaluate`.
    """
    scenes = output / "scenes"
    if not (scenes / "dataset.json").is_file():
        build(scenes, packages, train=train, val=val, size=size, seed=seed)
    length: dict[str, Any] = {} if steps is None else {"max_steps": steps}
    for method, name in (("distillation", "plain"), ("unirefiner", "refined")):
        folder = output / name
        if (folder / "merged").is_dir():
            continue
        recipe = load_recipe(
            RECIPE,
            method=method,
            model=model,
            data=str(scenes / "train" / "images"),
            output_dir=str(folder),
            image_size=size,
            resume=True,
            **length,
        )
        refine(recipe=recipe)
    evaluate(
        [model, output / "plain", output / "refined"],
        scenes,
        dataset_name="StampScenes",
        fast=True,
        crop=size,
        flip=0.0,
        fast_iterations=500,
        evaluation_output=str(output / "evaluation"),
    )
    return output / "evaluation"


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--packages",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help=f"folder with the extracted packages (default: the system's; {APT})",
    )
    parser.add_argument(
        "--model", default="starter", help="the base (default: starter)"
    )
    parser.add_argument("--steps", type=int, help="training steps (default: recipe's)")
    parser.add_argument("--train", type=int, default=240, help="scenes to train on")
    parser.add_argument("--val", type=int, default=160, help="scenes to measure on")
    parser.add_argument("--size", type=int, default=224, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    try:
        print(f"The table is in {run(**vars(parser.parse_args(argv)))}.")
    except (SourceError, UniRefinerError) as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main()
