"""What was measured is on the terminal, even where it cannot be written."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Made
from tests.evaluation.conftest import save_pairs
from tests.training.conftest import save_tiny_tower
from unirefiner_hf import evaluate
from unirefiner_hf.cli import main
from unirefiner_hf.cli import output as output_module
from unirefiner_hf.evaluation import evaluate as evaluate_module
from unirefiner_hf.outputs import UnwrittenError

RUN = ["refine", "--model", "a", "--data", "b", "--output-dir", "c"]


@pytest.fixture
def scenes(tmp_path):
    save_pairs(tmp_path / "scenes" / "train", 3)
    save_pairs(tmp_path / "scenes" / "val", 2)
    return tmp_path / "scenes"


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_evaluate_prints_before_it_fails_to_write(
    scenes, tmp_path, monkeypatch, capsys
):
    base = save_tiny_tower(tmp_path / "base")
    options = {"num_classes": 3, "fast": True, "crop": 16, "fast_iterations": 2}
    options |= {"seeds": 1, "pictures": 0, "evaluation_output": str(tmp_path / "out")}
    monkeypatch.setattr(evaluate_module, "write_results", full)
    with pytest.raises(UnwrittenError, match="was measured.*No space left") as caught:
        evaluate(base, scenes, **options)
    assert "mIoU" in str(caught.value.result)
    words = ["evaluate", str(base), "--data", str(scenes), "--json"]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    capsys.readouterr()
    assert main(words) == 2
    out, err = capsys.readouterr()
    value = json.loads(out)["checkpoints"]["base"][0]["value"]
    assert 0 <= value <= 100 and "No space left" in err.splitlines()[-1]


def test_any_command_prints_before_it_writes(refined, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output_module, "write_json", full)
    assert main([*RUN, "--json", str(tmp_path / "result.json")]) == 2
    out, err = capsys.readouterr()
    assert out == f"{Made()}\n" and "No space left" in err


@pytest.mark.parametrize("option", ["--json={}/no/file.json", "--html={}/no/page.html"])
def test_a_place_that_is_not_there_is_told_before_the_work(
    option, refined, tmp_path, capsys
):
    assert main([*RUN, option.format(tmp_path)]) == 2
    assert "there is no folder" in capsys.readouterr().err and not refined
