"""The StampScenes table: base, framed base, plain distillation and refined model.

Builds the scenes, refines the starter tower on the unlabelled training scenes, distils it
plainly for as many steps, and measures all four with linear probes.

    python -m examples.stampscenes.run --output stampscenes
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from unirefiner_hf.cli import main as unirefiner

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
        RuntimeError: a verb failed; it said why.
    """
    scenes = output / "scenes"
    if not (scenes / "dataset.json").is_file():
        build(scenes, packages, train=train, val=val, size=size, seed=seed)
    for method, name in (("plain", "plain"), ("unirefiner", "refined")):
        folder = output / name
        if (folder / "merged").is_dir():
            continue
        words = ["refine", "--config", str(RECIPE), "--method", method]
        words += ["--model", model, "--data", str(scenes / "train" / "images")]
        words += ["--output_dir", str(folder), "--image_size", str(size), "--resume"]
        if steps is not None:
            words += ["--max_steps", str(steps)]
        _call(words)
    words = ["evaluate", model, str(output / "plain"), str(output / "refined")]
    words += ["--data", str(scenes), "--dataset_name", "StampScenes", "--fast"]
    words += ["--crop", str(size), "--flip", "0", "--fast_iterations", "500"]
    words += ["--evaluation_output", str(output / "evaluation")]
    _call(words)
    return output / "evaluation"


def _call(words: list[str]) -> None:
    print("$ unirefiner " + " ".join(words), file=sys.stderr, flush=True)
    if unirefiner(words):
        raise RuntimeError(f"unirefiner {words[0]} failed; see above.")


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
    except (SourceError, RuntimeError) as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main()
