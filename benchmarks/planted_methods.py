"""What each method wins back of the mIoU that planted spurious tokens cost.

    python -m benchmarks.planted_methods --output planted --planter ADAPTER --packages DIR

Builds StampScenes, merges the adapter that plants the dirt into the tower, trains every method
and ablation on the dirty tower with the same unlabelled images, steps, batch and learning rate
(rows that say otherwise, and PH-Reg, have their own), and measures all by linear probes on
cached tokens. Every finished cell (a method and a training seed) is a file of its own in
``cells/``: run again, and only what is missing is computed. The table is written anew after each.

The share recovered is ``(method - dirty) / (clean - dirty)``. Standard deviations are those of
the training seeds, each the mean of its probes; of towers that were not trained, of the probes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from examples.stampscenes.build import APT, build
from unirefiner_hf import UniRefinerError, load_recipe, refine
from unirefiner_hf.cli.options import positive
from unirefiner_hf.data.labelled import class_labels
from unirefiner_hf.evaluation.arguments import EvaluationArguments
from unirefiner_hf.evaluation.checkpoints import Checkpoint, load_checkpoint
from unirefiner_hf.evaluation.segmentation import (
    SegmentationSettings,
    evaluate_segmentation,
)
from unirefiner_hf.evaluation.tasks import open_splits
from unirefiner_hf.loading.starter import NAME, starter_tower
from unirefiner_hf.methods.registry import method_named, setting_names

from .planting.planted import ADAPTER_WEIGHTS, dirty_checkpoint, load_rule

CLEAN, DIRTY = "clean", "dirty"
COUNTS = ("scenes", "val", "size", "steps", "batch", "probes", "probe_steps")
"""Options of the plan that are 1 or more."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        options: keys of a recipe and their words; None for a tower that is measured as it is.
        tower: that is trained or measured.
        frame: in patches, put round the images where the tower has none of its own.
    """

    options: dict[str, str] | None = field(default_factory=dict)
    tower: str = DIRTY
    frame: int = 0

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


CONSTANT_RATE = {"lr_scheduler_type": "constant"}
PUBLISHED_RATE = {"learning_rate": "1e-4", **CONSTANT_RATE}
PH_REG = {
    "method": "ph_reg",
    "learning_rate": "1e-4",
    "weight_decay": "0.01",
    "final_lr_share": "0.05",
    "max_grad_norm": "0",
    **CONSTANT_RATE,
}
"""Rate, decays and no clipping as published: it trains embeddings, not an adapter."""
OWN_TARGETS = {
    "match_to_full_image": "false",
    "negatives": "image",
    "scd_weight": "0",
}
"""Crop tokens are pulled to the teacher's at their own place, away from the image's."""
CROP_TARGETS = {"target_view": "crop", **OWN_TARGETS}
"""The same of the teacher's tokens without the strip: the recipe of that name."""
PLAIN = {"method": "distillation"}
CONTROL = {**PLAIN, **OWN_TARGETS}
"""The same views, targets and negatives without frame and filters."""
ABLATIONS = {
    "learnable registers": {"register_fill": "learnable"},
    "no L_uni": {"uni_weight": "0"},
    "no L_spu": {"spurious_weight": "0"},
    "no AH": {"ah_layers": "null"},
    "no FP-GP": {"fpgp_filter": "false"},
    "no detectors": {"detector_filter": "false"},
    "paper's attention flow": {"ah_form": "paper"},
}
NO_FILTERS = {
    name: value
    for ablation in ("no AH", "no FP-GP", "no detectors")
    for name, value in ABLATIONS[ablation].items()
}
ROWS = {
    "clean tower": Row(None, CLEAN),
    "clean tower in the frame": Row(None, CLEAN, frame=1),
    "dirty tower": Row(None),
    "dirty tower in the frame": Row(None, frame=1),
    "unirefiner": Row(),
    "unirefiner, constant rate": Row(CONSTANT_RATE),
    "unirefiner, published rate": Row(PUBLISHED_RATE),
    "crop targets": Row(CROP_TARGETS),
    "crop targets, constant rate": Row({**CROP_TARGETS, **CONSTANT_RATE}),
    "crop targets, published rate": Row({**CROP_TARGETS, **PUBLISHED_RATE}),
    "crop targets, with L_scd": Row({**CROP_TARGETS, "scd_weight": "0.4"}),
    "crop targets, crop's negatives": Row({**CROP_TARGETS, "negatives": "crop"}),
    "crop targets, of composites": Row({**CROP_TARGETS, "target_view": "composite"}),
    "crop targets, no filters": Row({**CROP_TARGETS, **NO_FILTERS}),
    "plain": Row(PLAIN),
    "plain, constant rate": Row({**PLAIN, **CONSTANT_RATE}),
    "plain, crop targets": Row(CONTROL),
    "plain, crop targets, in the frame": Row(CONTROL, frame=1),
    "plain, crop targets, constant rate": Row({**CONTROL, **CONSTANT_RATE}),
    "ph_reg": Row(PH_REG),
    "ph_reg without registers": Row({**PH_REG, "register_tokens": "0"}),
    "ph_reg at 3e-5": Row({**PH_REG, "learning_rate": "3e-5"}),
    "ph_reg, clipped": Row({**PH_REG, "max_grad_norm": "1"}),
    **{name: Row(option) for name, option in ABLATIONS.items()},
    **{
        f"crop targets, {name}": Row({**CROP_TARGETS, **option})
        for name, option in ABLATIONS.items()
    },
    "unirefiner on the clean tower": Row(tower=CLEAN),
    "crop targets on the clean tower": Row(CROP_TARGETS, CLEAN),
    "plain, crop targets, on the clean tower": Row(CONTROL, CLEAN),
    "plain on the clean tower": Row(PLAIN, CLEAN),
    "ph_reg on the clean tower": Row(PH_REG, CLEAN),
}
"""Name -> row; the ablations are of UniRefiner and of its crop targets."""


@dataclass(frozen=True)
class Plan:
    """What all cells share; a cell of another plan is not mixed in.

    Attributes:
        planter: folder of the adapter, as of `dirty_checkpoint`.
        scenes: unlabelled, the probe's training scenes; `val` of them are measured on.
        schedule: of the learning rate; the published one is constant.
        ah_layers: first and last layer of the attention flow.
        common: further keys of every training's recipe, as ``--key`` and word by turns.
        planter_sha256: of the adapter and its rule, see `planter_digest`.
    """

    model: str
    planter: str
    scenes: int = 200
    val: int = 160
    size: int = 224
    scene_seed: int = 0
    steps: int = 75
    batch: int = 4
    learning_rate: float = 1e-3
    schedule: str = "linear"
    ah_layers: tuple[int, int] = (5, 6)
    register_factor: int = 32
    probes: int = 3
    probe_steps: int = 500
    common: tuple[str, ...] = ()
    planter_sha256: str = ""

    def record(self) -> dict[str, Any]:
        """For JSON; folders by their last part."""
        own = dict(vars(self))
        own.update(model=Path(self.model).name, planter=Path(self.planter).name)
        return json.loads(json.dumps(own))


class Bench:
    """The folder of one plan: scenes, towers, finished cells, the table.

    Raises:
        ValueError: the folder holds cells of another plan; names what differs.
    """

    def __init__(self, folder: Path, plan: Plan, packages: Path = Path("/")) -> None:
        self.folder, self.plan, self.packages = folder, plan, packages
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "plan.json"
        if file.is_file():
            before, now = json.loads(file.read_text()), plan.record()
            wrong = [key for key in now if now[key] != before.get(key)]
            if wrong:
                raise ValueError(
                    f"{folder} holds cells with {wrong[0]} {before.get(wrong[0])}, this "
                    f"plan has {now[wrong[0]]}: name another --output."
                )
        _write(file, plan.record())

    @classmethod
    def opened(cls, folder: Path, model: str) -> Bench:
        """The bench of a folder as it was planned.

        Args:
            model: the clean tower, of which the plan keeps the name only.

        Raises:
            FileNotFoundError: there is no ``plan.json``.
            ValueError: the model is another.
        """
        record = json.loads((folder / "plan.json").read_text())
        record = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(folder, Plan(**{**record, "model": model}))

    @property
    def scenes(self) -> Path:
        """The data set, built if it is not there."""
        scenes, plan = self.folder / "scenes", self.plan
        if not (scenes / "dataset.json").is_file():
            build(
                scenes,
                self.packages,
                train=plan.scenes,
                val=plan.val,
                size=plan.size,
                seed=plan.scene_seed,
            )
        return scenes

    def tower(self, kind: str) -> str:
        """The clean tower as it was named, or the folder of the dirty one."""
        if kind == CLEAN:
            return self.plan.model
        folder = self.folder / DIRTY
        if not (folder / "config.json").is_file():
            clean = load_checkpoint(self.plan.model)
            source = self.plan.model
            source = str(starter_tower()) if source in ("starter", NAME) else source
            dirty = dirty_checkpoint(clean, self.plan.planter)
            draft = self.folder / f".{DIRTY}.unfinished"
            shutil.rmtree(draft, ignore_errors=True)
            dirty.model.tower.save_pretrained(draft)
            AutoImageProcessor.from_pretrained(source).save_pretrained(draft)
            os.replace(draft, folder)
        return str(folder)

    def cell(self, name: str, seed: int) -> Path:
        """File of a finished cell."""
        return self.folder / "cells" / f"{_file_name(name, seed)}.json"

    def run(self, name: str, seed: int) -> Path:
        """Folder of its training."""
        return self.folder / "runs" / _file_name(name, seed)

    def finish(self, name: str, seed: int, keep_runs: bool = False) -> dict[str, Any]:
        """Train and measure one cell, or read what is there.

        Raises:
            RuntimeError: the training failed; it said why.
            ValueError: what is there was made of other options.
        """
        file, row, run = self.cell(name, seed), ROWS[name], self.run(name, seed)
        start = run.with_name(f"{run.name}.json")
        self._made(start, name, run)
        if finished := self._made(file, name, run):
            return finished
        started = time.monotonic()
        if row.options is None:
            source = self.tower(row.tower)
        else:
            start.parent.mkdir(exist_ok=True)
            _write(start, {"made_of": row.record()})
            self._train(name, seed)
            source = str(run)
        trained = time.monotonic()
        checkpoint = load_checkpoint(source, name=name)
        if row.frame:
            checkpoint = checkpoint.framed(row.frame)
        cell = {
            "row": name,
            "seed": seed,
            "made_of": row.record(),
            "mean_iou": self._measure(checkpoint),
            "frame": checkpoint.register_width,
            "training_seconds": round(trained - started, 1),
            "probe_seconds": round(time.monotonic() - trained, 1),
        }
        file.parent.mkdir(exist_ok=True)
        _write(file, cell)
        if not keep_runs:
            shutil.rmtree(run, ignore_errors=True)
            start.unlink(missing_ok=True)
        return cell

    def _made(self, file: Path, name: str, run: Path) -> dict[str, Any] | None:
        """What a file holds, None where there is none; of other options it is refused."""
        if not file.is_file():
            return None
        content, now = json.loads(file.read_text()), ROWS[name].record()
        if content.get("made_of") != now:
            raise ValueError(
                f"{file} was made of {content.get('made_of')}, row {name!r} is now {now}: "
                f"delete the file and {run}."
            )
        return content

    def options(self, name: str, seed: int) -> dict[str, Any]:
        """What `load_recipe` is given for a cell, `Plan.common` aside."""
        plan, row, run = self.plan, ROWS[name], self.run(name, seed)
        own = row.options or {}
        method = method_named(own.get("method", "unirefiner"))
        of_method: dict[str, Any] = {}
        if method.has_border:
            of_method["register_factor"] = plan.register_factor
        if "ah_layers" in setting_names(method):
            of_method["ah_layers"] = list(plan.ah_layers)
        # A row's own value takes the place of a common one.
        return {
            "model": self.tower(row.tower),
            "data": str(self.scenes / "train" / "images"),
            "output_dir": str(run),
            "image_size": plan.size,
            "max_steps": plan.steps,
            "per_device_train_batch_size": plan.batch,
            "learning_rate": plan.learning_rate,
            "lr_scheduler_type": plan.schedule,
            "scale_learning_rate": False,
            "seed": seed,
            "report_images": 0,
            "save_total_limit": 1,
            "resume": True,
            **of_method,
            **own,
        }

    def _train(self, name: str, seed: int) -> None:
        given = self.options(name, seed)
        words = self.plan.common
        common = {o.removeprefix("--"): v for o, v in zip(words[::2], words[1::2])}
        if taken := [option for option in common if option in given]:
            raise ValueError(
                f"{taken[0]} is the bench's own; it cannot be among the common options."
            )
        print(f"refining: {common | given}", file=sys.stderr, flush=True)
        try:
            refine(recipe=load_recipe(**common, **given))
        except UniRefinerError as problem:
            run = self.run(name, seed).name
            raise RuntimeError(f"{run} failed: {problem}") from problem

    def _measure(self, checkpoint: Checkpoint) -> list[float]:
        """mIoU in percent, one a probe."""
        plan = self.plan
        train, val = open_splits(EvaluationArguments(data=str(self.scenes)))
        settings = SegmentationSettings(
            crop=plan.size, fast=True, flip=0.0, fast_iterations=plan.probe_steps
        )
        classes = class_labels(str(self.scenes))
        result = evaluate_segmentation(
            checkpoint, train, val, classes, settings, seeds=plan.probes, pictures=0
        )
        return [100 * score.mean_iou for score in result.scores]

    def cells(self) -> dict[str, list[dict[str, Any]]]:
        """Row -> its finished cells, in the order of `ROWS`.

        Raises:
            ValueError: a cell of a row that there is not.
        """
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
        for file in sorted((self.folder / "cells").glob("*.json")):
            cell = json.loads(file.read_text())
            if cell["row"] not in found:
                raise ValueError(f"{file} is of {cell['row']!r}, which is no row.")
            found[cell["row"]].append(cell)
        return {name: cells for name, cells in found.items() if cells}

    def write_table(self) -> str:
        """``table.md`` and ``table.json`` of what is finished; returns the first."""
        rows = summary(self.cells())
        _write(self.folder / "table.json", {"plan": self.plan.record(), "rows": rows})
        text = table(rows)
        (self.folder / "table.md").write_text(text + "\n")
        return text


def summary(cells: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean, standard deviation and share recovered of each row."""
    rows: list[dict[str, Any]] = []
    for name, of_row in cells.items():
        means = [statistics.fmean(cell["mean_iou"]) for cell in of_row]
        spread = means if ROWS[name].options is not None else of_row[0]["mean_iou"]
        rows.append(
            {
                "row": name,
                "seeds": len(means) if ROWS[name].options is not None else 0,
                "mean_iou": statistics.fmean(means),
                "std": statistics.stdev(spread) if len(spread) > 1 else None,
                "recovered": None,
                "training_seconds": statistics.fmean(
                    cell["training_seconds"] for cell in of_row
                ),
            }
        )
    known = {row["row"]: row["mean_iou"] for row in rows}
    if {"clean tower", "dirty tower"} <= known.keys():
        dirty = known["dirty tower"]
        lost = known["clean tower"] - dirty
        for row in rows:
            if ROWS[row["row"]].tower == DIRTY and lost:
                row["recovered"] = (row["mean_iou"] - dirty) / lost
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| | seeds | mIoU (%) | lost mIoU recovered |", "|---|---|---|---|"]
    for row in rows:
        spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
        won = "" if row["recovered"] is None else f"{row['recovered']:.0%}"
        seeds = row["seeds"] or ""
        lines.append(
            f"| {row['row']} | {seeds} | {row['mean_iou']:.2f}{spread} | {won} |"
        )
    return "\n".join(lines)


def planter_digest(folder: str | Path) -> str:
    """sha256 of an adapter's weights and its rule.

    Raises:
        FileNotFoundError: there are no weights.
        TruthError: the rule is damaged.
    """
    digest = hashlib.sha256((Path(folder) / ADAPTER_WEIGHTS).read_bytes())
    digest.update(repr(load_rule(folder)).encode())
    return digest.hexdigest()


def _file_name(name: str, seed: int) -> str:
    return "".join(c if c.isalnum() else "-" for c in name) + f".{seed}"


def _write(file: Path, content: Any) -> None:
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(draft, file)


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    plan = Plan("starter", "")
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="rows: " + "; ".join(ROWS),
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--planter", required=True, metavar="DIR", help="adapter that plants the dirt"
    )
    parser.add_argument("--model", default="starter", help="the clean tower")
    parser.add_argument(
        "--packages",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help=f"folder with the scenes' packages (default: the system's; {APT})",
    )
    parser.add_argument(
        "--seeds", type=positive, default=3, help="trainings of each row"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(ROWS), metavar="ROW", help="these rows"
    )
    parser.add_argument("--keep_runs", action="store_true", help="keep trained models")
    for name in COUNTS:
        default = getattr(plan, name)
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N")
    parser.add_argument("--scene_seed", type=int, default=0, metavar="N")
    parser.add_argument("--learning_rate", type=float, default=plan.learning_rate)
    parser.add_argument(
        "--schedule", default=plan.schedule, help="of the learning rate: %(default)s"
    )
    parser.add_argument("--ah_layers", type=int, nargs=2, default=plan.ah_layers)
    parser.add_argument(
        "--common",
        nargs="+",
        default=[],
        metavar="WORD",
        help="options of every training, without dashes: bf16 true",
    )
    given = vars(parser.parse_args(argv))
    output, packages = given.pop("output"), given.pop("packages")
    seeds, only = given.pop("seeds"), given.pop("only")
    keep, common = given.pop("keep_runs"), given.pop("common")
    if len(common) % 2:
        parser.error(f"--common has no value for {common[-1]!r}.")
    words = [w for n, v in zip(common[::2], common[1::2]) for w in (f"--{n}", v)]
    given["ah_layers"] = tuple(given["ah_layers"])
    try:
        digest = planter_digest(given["planter"])
        plan = Plan(**given, common=tuple(words), planter_sha256=digest)
        bench = Bench(output, plan, packages)
        for seed in range(seeds):
            for name in only or ROWS:
                if seed == 0 or ROWS[name].options is not None:
                    bench.finish(name, seed, keep)
                    bench.write_table()
    except (ValueError, RuntimeError, OSError) as problem:
        parser.error(str(problem))
    print(bench.write_table())


if __name__ == "__main__":
    main()
