"""Each file of a base, a run and a merged folder damaged, each command run over it.

A command ends with 0 only where its result is what it is without the damage; else with one
line that names the file. Nothing ends in a traceback, whatever the damage.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import save_pairs
from tests.training.conftest import save_images, save_tiny_tower
from unirefiner_hf.cli import main

DAMAGES: dict[str, Callable[[Path], Any]] = {
    "delete": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "truncate": lambda file: file.write_bytes(
        file.read_bytes()[: file.stat().st_size // 2]
    ),
    "junk": lambda file: file.write_bytes(b"\x00\xffjunk" * 50),
}
JSON_DAMAGES: dict[str, Callable[[Path], Any]] = {
    "list": lambda file: file.write_text("[]"),
    "object": lambda file: file.write_text("{}"),
}


@dataclass(frozen=True)
class Place:
    """A folder that commands are told of, among what they need beside it."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    def diagnose(self, model: Path) -> list[str]:
        return f"diagnose {model} --images {self.photos} --size 16 --json".split()

    def compare(self, model: Path) -> list[str]:
        words = f"compare {self.base} {model} --images {self.photos} --size 16 --json"
        return words.split()

    def extract(self, model: Path) -> list[str]:
        words = f"extract {model} --images {self.photos} --size 16 --output {self.out}"
        return [*words.split(), "--json"]

    def evaluate(self, model: Path) -> list[str]:
        words = f"evaluate {self.base} {model} --data {self.scenes} --fast --crop 16"
        words += " --fast-iterations 2 --seeds 1 --pictures 0 --framed-base no --json"
        return words.split()

    def refine(self, model: Path) -> list[str]:
        words = f"refine --model {model} --data {self.photos} --output_dir {self.out}"
        words += " --max_steps 1 --per_device_train_batch_size 2 --image_size 16"
        words += " --use_cpu true --report_images 0 --disable_tqdm true --quiet"
        return words.split()

    def merge(self, run: Path) -> list[str]:
        return f"merge {run} --model {self.base} --output {self.out} --json".split()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A base, a finished run of it with a merged folder, photographs and labelled scenes."""
    place = Place(tmp_path_factory.mktemp("sound"))
    save_tiny_tower(place.base)
    save_images(place.photos, 3)
    save_pairs(place.scenes / "train", 3)
    save_pairs(place.scenes / "val", 2)
    (place.scenes / "dataset.json").write_text(
        '{"classes": ["nothing", "red", "blue"]}'
    )
    words = place.refine(place.base)
    words[words.index(str(place.out))] = str(place.run)
    assert main([*words, "--save_steps", "1"]) == 0
    assert main(place.evaluate(place.run)) == 0
    return place


def told(capsys, words: list[str], place: Place) -> tuple[int, str, str]:
    """Exit status, result in plain words, and what was said on stderr."""
    shutil.rmtree(place.out, ignore_errors=True)
    capsys.readouterr()
    status = main(words)
    out, err = capsys.readouterr()
    if words[0] == "refine" and status == 0:
        weights = place.out / "merged" / "model.safetensors"
        out = str(hash(weights.read_bytes()))
    if words[0] == "merge" and status == 0:
        out = json.dumps([json.loads(out)["files"]["model.safetensors"]])
        out += str(hash((place.out / "model.safetensors").read_bytes()))
    return status, out.replace(str(place.root), ""), err


RIGHT: dict[str, tuple[int, str]] = {}
"""Command -> what it gives where nothing is damaged."""


def undamaged(sound: Place, capsys, words: list[str], place: Place) -> tuple[int, str]:
    """What a command gives where nothing is damaged, run once."""
    moved = [word.replace(str(place.root), str(sound.root)) for word in words]
    key = " ".join(moved)
    if key not in RIGHT:
        RIGHT[key] = told(capsys, moved, sound)[:2]
    return RIGHT[key]


def check(sound: Place, capsys, tmp_path: Path, damaged: str, commands: Any) -> None:
    """Run commands over every damage of one file.

    Args:
        damaged: the file, relative to the root.
        commands: place -> lists of words.
    """
    kinds = dict(DAMAGES)
    if damaged.endswith(".json"):
        kinds |= JSON_DAMAGES
    place = Place(tmp_path / "place")
    for name, damage in kinds.items():
        shutil.rmtree(place.root, ignore_errors=True)
        shutil.copytree(sound.root, place.root)
        damage(place.root / damaged)
        for words in commands(place):
            now, result, err = told(capsys, words, place)
            what = f"{words[0]} with {damaged} {name}: {now}, {err[-500:]!r}"
            if now == 2:
                last = err.splitlines()[-1]
                assert last.startswith("unirefiner: error: "), what
                folder = Path(damaged).parent.name
                assert Path(damaged).name in last or f"/{folder}" in last, what
                assert "Traceback" not in err, what
            elif now != 1 or words[0] != "verify":
                assert (now, result) == undamaged(sound, capsys, words, place), what


BASE = ("config.json", "model.safetensors", "preprocessor_config.json")


@pytest.mark.parametrize("file", BASE)
def test_a_base(file, sound, capsys, tmp_path):
    def commands(place: Place) -> list[list[str]]:
        base = place.base
        return [
            place.diagnose(base),
            place.extract(base),
            place.evaluate(base),
            place.refine(base),
            place.merge(place.run),
        ]

    check(sound, capsys, tmp_path, f"base/{file}", commands)


@pytest.mark.parametrize("file", [*BASE, "README.md", "modeling_unirefiner.py"])
def test_a_merged_folder(file, sound, capsys, tmp_path):
    def commands(place: Place) -> list[list[str]]:
        merged = place.run / "merged"
        if file not in BASE:  # for readers, and for those without this package
            return [place.compare(merged)]
        return [place.diagnose(merged), place.evaluate(merged), place.refine(merged)]

    check(sound, capsys, tmp_path, f"run/merged/{file}", commands)


@pytest.mark.parametrize("file", ["README.md", "model.safetensors"])
def test_verify_of_a_merged_folder(file, sound, capsys, tmp_path):
    def commands(place: Place) -> list[list[str]]:
        return [["verify", str(place.run / "merged")]]

    check(sound, capsys, tmp_path, f"run/merged/{file}", commands)


@pytest.mark.parametrize(
    "file",
    [
        "run.json",
        "merged/evaluation.json",
        "metrics.json",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    ],
)
def test_a_run(file, sound, capsys, tmp_path):
    def commands(place: Place) -> list[list[str]]:
        if file.startswith("adapter"):
            return [place.merge(place.run)]
        return [place.merge(place.run), place.evaluate(place.run)]

    check(sound, capsys, tmp_path, f"run/{file}", commands)


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "refiner_state.json", "trainer_state.json"]
)
def test_a_checkpoint_that_is_merged(file, sound, capsys, tmp_path):
    def commands(place: Place) -> list[list[str]]:
        return [place.merge(place.run / "checkpoint-1")]

    check(sound, capsys, tmp_path, f"run/checkpoint-1/{file}", commands)


def test_the_classes_of_a_data_set(sound, capsys, tmp_path):
    def commands(place: Place) -> list[list[str]]:
        return [place.evaluate(place.base)]

    check(sound, capsys, tmp_path, "scenes/dataset.json", commands)
