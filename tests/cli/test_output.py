"""``--json`` and ``--quiet``: what reaches stdout, and what is left out."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import pytest
from tqdm.auto import tqdm

from tests.cli.conftest import Made
from tests.export.conftest import make_record
from unirefiner_hf.cli import main
from unirefiner_hf.cli.output import glued
from unirefiner_hf.resources import recipe_names
from unirefiner_hf.training import refine as refine_module
from unirefiner_hf.training.refine import Refined

RUN = ["refine", "--model", "a", "--data", "b", "--output-dir", "c"]


@pytest.fixture
def loud(monkeypatch):
    """A refinement that shows, warns and prints."""

    def refine(**_):
        for _ in tqdm(range(2), desc="a bar"):
            pass
        print("a print")
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("unirefiner_hf.training").warning("a logged warning")
        logging.getLogger("unirefiner_hf.training").error("a logged error")
        return Made()

    monkeypatch.setattr(refine_module, "refine", refine)


def test_a_result_is_printed(refined, capsys):
    assert main(RUN) == 0
    assert capsys.readouterr().out == f"{Made()}\n"


@pytest.mark.filterwarnings("default")
def test_json_alone_is_all_that_stdout_gets(loud, capsys):
    for words in ([*RUN, "--json"], ["--json", *RUN]):
        assert main(words) == 0
        out, err = capsys.readouterr()
        assert json.loads(out) == Made().to_dict()
        assert "a bar" in err and "a print" in err


def test_json_goes_to_a_file_beside_the_text(refined, tmp_path, capsys):
    for number, words in enumerate((["--json", "{}"], ["--json={}"])):
        file = tmp_path / f"{number}.json"
        assert main([*RUN, *(word.format(file) for word in words)]) == 0
        assert json.loads(file.read_text()) == Made().to_dict()
        assert capsys.readouterr().out == f"{Made()}\n"


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    refined, capsys, option
):
    assert main([*RUN, option, "/nowhere/result.json"]) == 2
    assert "there is no folder /nowhere" in capsys.readouterr().err
    assert refined == []


def test_every_result_is_a_page_where_one_is_asked_for(tmp_path, monkeypatch, capsys):
    refined = Refined(Path("runs/mine"), make_record())
    monkeypatch.setattr("unirefiner_hf.cli.refine.run", lambda _: refined)
    file = tmp_path / "page.html"
    assert main([*RUN, "--html", str(file)]) == 0
    assert refined.title in file.read_text() and "loss_uni" in file.read_text()
    assert main(["recipes", "--html", str(tmp_path / "none.html")]) == 2
    assert "makes no page" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_quiet_leaves_errors_and_where_the_result_is(loud, capsys, caplog):
    level, shown = logging.root.manager.disable, tqdm.__init__
    assert main([*RUN, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out == "runs/mine\n"
    assert "a bar" not in err and "warning" not in err
    assert [record.message for record in caplog.records] == ["a logged error"]
    assert (logging.root.manager.disable, tqdm.__init__) == (level, shown)


def test_quiet_and_json_give_json_and_nothing_else(loud, capsys):
    assert main([*RUN, "--quiet", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == Made().to_dict()
    assert "a bar" not in err


def test_quiet_still_tells_errors(capsys):
    assert main(["merge", "/nowhere", "--output", "y", "--quiet"]) == 2
    assert "/nowhere is not a run" in capsys.readouterr().err


def test_processes_that_do_not_write_tell_nothing(monkeypatch, capsys):
    monkeypatch.setattr(refine_module, "refine", lambda **_: None)
    for words in (RUN, [*RUN, "--json"]):
        assert main(words) == 0
        assert capsys.readouterr().out == ""


def test_recipes_give_json(capsys):
    assert main(["recipes", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)
    assert sorted(models) == recipe_names()
    assert models["dinov2/giant"] == "facebook/dinov2-giant"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("verify --json user/name", "verify --json=- user/name"),
        ("evaluate --json out.json base", "evaluate --json=out.json base"),
        ("evaluate base --json", "evaluate base --json=-"),
        ("evaluate --json --fast", "evaluate --json=- --fast"),
        ("evaluate --json=numbers base", "evaluate --json=numbers base"),
    ],
)
def test_only_a_json_file_belongs_to_the_option(words, expected):
    assert glued(words.split()) == expected.split()


def test_a_verdict_is_the_exit_status(monkeypatch, capsys):
    from unirefiner_hf.hub import verify as verify_module

    class Verdict(Made):
        passed = False

    monkeypatch.setattr(verify_module, "verify", lambda *_, **__: Verdict())
    assert main(["verify", "user/name"]) == 1
    monkeypatch.setattr(Verdict, "passed", True)
    assert main(["verify", "user/name"]) == 0
    assert sys.stdout is not None and "runs/mine" in capsys.readouterr().out
