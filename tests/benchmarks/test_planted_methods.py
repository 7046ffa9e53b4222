"""The bench of methods on a planted tower: its cells, its table, and going on."""

import dataclasses
import json
import shutil

import pytest
from PIL import Image

from benchmarks import planted_methods, planted_pictures
from benchmarks.planted_methods import (
    ABLATIONS,
    CROP_TARGETS,
    ROWS,
    Bench,
    Plan,
    summary,
    table,
)
from unirefiner_hf import UniRefinerArguments, load_recipe
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.methods.registry import METHODS, method_named

WORDS = ["--steps", "1", "--size", "24", "--batch", "2", "--probes", "2"]
WORDS += ["--probe_steps", "2", "--ah_layers", "0", "1", "--seeds", "1"]


@pytest.fixture
def command(tower_folder, planter, scenes, tmp_path):
    folder, _ = planter
    output = tmp_path / "bench"
    output.mkdir()
    (output / "scenes").symlink_to(scenes)
    words = ["--output", str(output), "--planter", str(folder)]
    words += ["--model", str(tower_folder), *WORDS]
    return output, words + ["--common", "use_cpu", "true", "disable_tqdm", "true"]


def test_cells_are_kept_and_the_table_tells_them(command, planter, capsys, monkeypatch):
    output, words = command
    rows = ["clean tower", "dirty tower", "dirty tower in the frame", "ph_reg"]
    planted_methods.main([*words, "--only", *rows])
    text = (output / "table.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == [
        f"| {name}" for name in rows
    ]
    cells = {p.name: json.loads(p.read_text()) for p in (output / "cells").iterdir()}
    assert {cell["row"] for cell in cells.values()} == set(rows)
    assert all(len(cell["mean_iou"]) == 2 for cell in cells.values())
    assert cells["dirty-tower-in-the-frame.0.json"]["frame"] == 1
    assert not list((output / "runs").iterdir())
    _, model = planter
    dirty = load_checkpoint(str(output / "dirty")).model.tower.state_dict()
    merged = model.tower.merge_and_unload().state_dict()
    assert all(value.allclose(merged[name]) for name, value in dirty.items())

    monkeypatch.setattr(Bench, "_measure", lambda *_: pytest.fail("measured again"))
    planted_methods.main([*words, "--only", *rows])
    assert capsys.readouterr().out == text
    told = json.loads((output / "table.json").read_text())
    assert told["plan"]["planter"] == "planter" and told["plan"]["steps"] == 1
    with pytest.raises(SystemExit):
        planted_methods.main([*words, "--learning_rate", "2e-3"])
    assert "holds cells with learning_rate 0.001" in capsys.readouterr().err


def test_kept_runs_are_drawn_beside_the_clean_and_the_dirty_tower(
    command, tower_folder, capsys
):
    output, words = command
    picture = output / "methods.png"
    draw = ["--bench", str(output), "--output", str(picture), "--images", "0"]
    draw += ["--model", str(tower_folder)]
    planted_methods.main([*words, "--only", "dirty tower"])
    with pytest.raises(SystemExit):
        planted_pictures.main(draw)
    assert "--keep_runs" in capsys.readouterr().err
    planted_methods.main([*words, "--only", "plain", "--keep_runs"])
    bench = Bench.opened(output, str(tower_folder))
    columns = planted_pictures.towers(bench)
    assert list(columns) == ["clean tower", "dirty tower", "plain"]
    planted_pictures.main(draw)
    with Image.open(picture) as drawn:
        assert drawn.width > 3 * drawn.height
    with pytest.raises(SystemExit):
        planted_pictures.main([*draw, "--only", "plain", "ph_reg"])
    assert "no model of 'ph_reg'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        planted_pictures.main([*draw, "--model", "starter"])
    assert "plan has" in capsys.readouterr().err


def test_a_failed_training_ends_the_bench(command, capsys):
    output, words = command
    with pytest.raises(SystemExit):
        planted_methods.main([*words, "lora_rank", "0", "--only", "plain"])
    assert "plain.0 failed" in capsys.readouterr().err
    assert not (output / "cells").exists()


def test_the_share_recovered_by_hand():
    def cell(row, values, seed=0):
        return {"row": row, "seed": seed, "mean_iou": values, "training_seconds": 1.0}

    rows = summary(
        {
            "clean tower": [cell("clean tower", [53.0, 55.0])],
            "dirty tower": [cell("dirty tower", [44.0])],
            "unirefiner": [
                cell("unirefiner", [48.0, 50.0]),
                cell("unirefiner", [51.0], 1),
            ],
            "plain on the clean tower": [cell("plain on the clean tower", [54.0])],
        }
    )
    found = {row["row"]: row for row in rows}
    assert found["unirefiner"]["mean_iou"] == 50
    assert found["unirefiner"]["recovered"] == pytest.approx(0.6)
    assert found["unirefiner"]["std"] == pytest.approx(2**0.5)
    assert found["clean tower"]["std"] == pytest.approx(2**0.5)
    assert found["clean tower"]["recovered"] is None
    assert found["plain on the clean tower"]["recovered"] is None
    text = table(rows)
    assert "| unirefiner | 2 | 50.00 ± 1.41 | 60% |" in text
    assert "| dirty tower |  | 44.00 | 0% |" in text


def test_every_option_of_every_row_is_one_of_refine(tmp_path):
    methods = set()
    for name, row in ROWS.items():
        built = load_recipe(output_dir=str(tmp_path), **(row.options or {}))
        asked = (row.options or {}).get("method", "unirefiner")
        assert isinstance(built.args, UniRefinerArguments), name
        assert isinstance(built.method, method_named(asked)), name
        methods.add(built.method.name)
    assert methods == set(METHODS)


def test_rows_differ_from_the_method_by_one_option():
    for name, option in ABLATIONS.items():
        assert len(option) == 1
        assert ROWS[name].options == option
        assert ROWS[f"crop targets, {name}"].options == {**CROP_TARGETS, **option}
    assert Plan("m", "p").record()["ah_layers"] == [5, 6]


def test_the_recipe_is_what_was_measured(scenes, tmp_path):
    """Model, method and training alike, but for paths and what only tells of a run."""
    (tmp_path / "scenes").symlink_to(scenes)
    same = {"data": "x", "model": "x", "output_dir": str(tmp_path)}
    recipe = load_recipe("dinov2/small_crop_targets", **same)
    row = "crop targets on the clean tower"
    given = Bench(tmp_path, Plan("m", "p")).options(row, 0)
    measured = load_recipe(**{**given, **same})
    told = ("seed", "data_seed", "report_images", "save_total_limit", "resume")
    assert type(recipe.method) is type(measured.method)
    for part in ("args", "method"):
        ours, theirs = vars(getattr(recipe, part)), vars(getattr(measured, part))
        wrong = [name for name in ours if str(ours[name]) != str(theirs[name])]
        assert [name for name in wrong if name not in told] == []


def test_what_was_made_of_other_options_is_not_taken(command, monkeypatch, capsys):
    output, words = command
    row = ["--only", "dirty tower"]
    planted_methods.main([*words, *row])
    changed = dataclasses.replace(ROWS["dirty tower"], frame=1)
    monkeypatch.setitem(ROWS, "dirty tower", changed)
    with pytest.raises(SystemExit):
        planted_methods.main([*words, *row])
    assert "'frame': 1}: delete the file and" in capsys.readouterr().err
    monkeypatch.delitem(ROWS, "dirty tower")
    with pytest.raises(ValueError, match="'dirty tower', which is no row"):
        Bench.opened(output, words[words.index("--model") + 1]).cells()


def test_an_unfinished_training_of_other_options_is_not_taken_up(command, capsys):
    output, words = command
    plan = Plan(words[words.index("--model") + 1], words[words.index("--planter") + 1])
    bench = Bench(output / "own", plan)
    start = bench.run("plain", 0).with_name("plain.0.json")
    start.parent.mkdir()
    start.write_text(json.dumps({"made_of": {"options": {}}}))
    with pytest.raises(ValueError, match="plain.0.json was made of"):
        bench.finish("plain", 0)


def test_another_planter_of_the_same_name_is_another_plan(
    command, planter, tmp_path, capsys
):
    output, words = command
    row = ["--only", "dirty tower"]
    planted_methods.main([*words, *row])
    other = tmp_path / "elsewhere" / "planter"
    shutil.copytree(planter[0], other)
    (other / "planting.json").write_text('{"measure": "brightness"}')
    with pytest.raises(SystemExit):
        planted_methods.main([*words, *row, "--planter", str(other)])
    assert "holds cells with planter_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["oops"], "--common has no value for 'oops'"),
        (["learning_rate", "1e-2"], "learning_rate is the bench's own"),
        (["bf16", "false", "--steps", "0"], "--steps: 0 is not 1 or more"),
    ],
)
def test_words_that_would_be_lost_are_refused(command, more, message, capsys):
    _, words = command
    with pytest.raises(SystemExit):
        planted_methods.main([*words, *more, "--only", "plain"])
    assert message in capsys.readouterr().err
