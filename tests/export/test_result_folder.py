"""A result takes the place of what this package wrote, and of nothing else."""

import os
from pathlib import Path

import pytest

import unirefiner_hf
from tests.conftest import make_tiny_tower
from tests.export.conftest import make_processor
from tests.export.test_merge import contents, export
from unirefiner_hf.cli import main
from unirefiner_hf.export.merge import check_output
from unirefiner_hf.export.result_folder import (
    ExportError,
    check_card,
    check_results,
    check_run_folder,
    check_target,
    is_ours,
)
from unirefiner_hf.export.run_folder import read_run
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.outputs import OutputError

CARD = "---\nunirefiner:\n  weights:\n    model.safetensors: 0123\n---\n# Mine\n"


@pytest.fixture
def model(tmp_path):
    """The least that counts as a model of ours."""
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_model_of_ours_is_replaced_where_that_is_asked_for(model):
    assert is_ours(model)
    with pytest.raises(ExportError, match="not empty, it holds a model.*--overwrite"):
        check_target(model)
    assert check_target(model, overwrite=True) == model


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "optimizer.pt",
        "my.py",
        "assets/figure.png",
        "adapter/README.md",
        ".git/HEAD",
        ".cache/huggingface/download/model.metadata",
    ],
)
def test_a_strangers_file_beside_it_is_not_lost(model, name):
    (model / name).parent.mkdir(exist_ok=True, parents=True)
    (model / name).write_text("years of work")
    with pytest.raises(ExportError, match=f"holds {name}, which unirefiner did not"):
        check_target(model, overwrite=True)
    assert (model / name).read_text() == "years of work"


@pytest.mark.parametrize(
    "name",
    [
        "evaluation.json",
        "before_after.png",
        "config.json",
        "model-00001-of-00002.safetensors",
        "adapter/adapter_model.safetensors",
        "text/tokenizer.json",
        "modeling_intern_vit.py",
    ],
)
def test_files_that_every_version_writes_are_ours(model, name):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).touch()
    assert is_ours(model)


def test_a_link_among_the_files_is_somebodys(model, tmp_path):
    (model / "images").symlink_to(tmp_path)
    with pytest.raises(ExportError, match="holds images, which unirefiner did not"):
        check_target(model, overwrite=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"config.json": "{}", "model.safetensors": ""}, "no card"),
        ({"README.md": "# A thesis\n"}, "no card"),
        ({"README.md": CARD}, "names model.safetensors, which is not there"),
        ({"README.md": "---\na: [\n---\n"}, "a card that does not parse"),
        ({"README.md": CARD, "model.safetensors": "", "run.json": "{}"}, "a run"),
    ],
)
def test_other_folders_are_not_replaced(content, message, tmp_path):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ExportError, match=f"is not empty and holds .*{message}"):
        check_target(tmp_path, overwrite=True)


def test_the_folder_we_are_in_stays(model, monkeypatch):
    monkeypatch.chdir(model)
    for spelled in (".", str(model), "../mine"):
        with pytest.raises(ExportError, match="the folder this command runs in"):
            check_target(spelled, overwrite=True)


def test_links_are_followed(model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    assert check_target(tmp_path / "link", overwrite=True) == model
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="a link to nothing"):
        check_target(tmp_path / "dangling")
    (model / "notes.txt").touch()
    with pytest.raises(ExportError, match=r"notes\.txt"):
        check_target(tmp_path / "link", overwrite=True)


def test_a_model_is_written_where_a_link_points(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    for overwrite in (False, True):
        assert export(model, tmp_path / "link", overwrite=overwrite) == (
            tmp_path / "real"
        )
    assert (tmp_path / "link").is_symlink()
    assert is_ours(tmp_path / "real")
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


# A run, its base, their parents: however they are spelled


def spellings(folder: Path, tmp_path: Path):
    link = tmp_path / "a-link"
    if not link.is_symlink():
        link.symlink_to(folder)
    return [
        folder,
        folder / ".." / folder.name,
        Path(os.path.relpath(folder)),
        link,
        str(folder) + "/",
    ]


@pytest.mark.parametrize("place", ["run", "adapter", "parent", "base"])
def test_merge_and_push_leave_the_run_and_its_base(place, save_run, tmp_path, capsys):
    _, run, base = save_run()
    folder = {
        "run": run,
        "adapter": run / "adapter",
        "parent": tmp_path,
        "base": base,
    }[place]
    before = contents(tmp_path)
    words = [str(run), "--model", str(base), "--output"]
    for spelled in spellings(folder, tmp_path):
        with pytest.raises(ExportError, match="holds the (run itself|base of the run)"):
            check_output(read_run(run), spelled, base, overwrite=True)
    assert main(["merge", *words, str(folder), "--overwrite"]) == 2
    assert main(["push", words[0], "alice/tiny", *words[1:], str(folder)]) == 2
    assert capsys.readouterr().err.count("name another folder") == 2
    (tmp_path / "a-link").unlink()
    assert contents(tmp_path) == before


def test_a_refined_base_is_not_replaced_by_what_was_made_of_it(save_run, tmp_path):
    """The base is a model of ours: alone, it might be replaced."""
    _, run, _ = save_run()
    base = export(UniRefinerModel.from_tower(make_tiny_tower("dinov2")), tmp_path / "b")
    assert is_ours(base)
    in_memory = UniRefinerModel.from_pretrained(base)
    for model in (str(base), base, in_memory):
        with pytest.raises(ExportError, match="holds the base of the run"):
            check_output(read_run(run), base, model, overwrite=True)


# A run's own folder


@pytest.mark.parametrize(
    "name",
    [
        "merged/thesis.txt",
        "adapter/adapter_model.safetensors",
        "published/index.html",
        "metrics.json",
        "before_after.png",
    ],
)
def test_a_run_does_not_write_over_a_strangers_files(name, tmp_path):
    folder = tmp_path / "project"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("years of work")
    (tmp_path / "photos").mkdir()
    with pytest.raises(UniRefinerError, match=f"holds {name.split('/')[0]}|not empty"):
        unirefiner_hf.refine(
            "nowhere/at-all", tmp_path / "photos", output_dir=str(folder), max_steps=1
        )
    assert contents(folder) == {name: b"years of work"}


def test_a_run_is_not_started_in_the_folder_of_its_base(tmp_path):
    base = tmp_path / "tower"
    make_tiny_tower("dinov2").save_pretrained(base)
    make_processor("dinov2").save_pretrained(base)
    before = contents(base)
    (tmp_path / "link").symlink_to(base)
    for spelled in (base, base / ".." / "tower", tmp_path / "link"):
        with pytest.raises(ExportError, match="the folder of the base itself"):
            unirefiner_hf.refine(str(base), [], output_dir=str(spelled), max_steps=1)
    assert contents(base) == before


def test_other_files_in_the_folder_of_a_run_are_no_matter(model, tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "notes.txt").touch()
    check_run_folder(folder, None)
    check_run_folder(tmp_path / "new", None)
    # What a run left is its own, but not what somebody put into it.
    model.rename(folder / "merged")
    (folder / "run.json").write_text("{}")
    check_run_folder(folder, None)
    (folder / "merged" / "thesis.txt").touch()
    with pytest.raises(ExportError, match=r"thesis\.txt"):
        check_run_folder(folder, None)


# Other results


@pytest.mark.parametrize("name", ["evaluation.json", "table.md", "report.html"])
def test_an_evaluation_does_not_write_over_a_strangers_files(name, tmp_path):
    (tmp_path / name).write_text("years of work")
    with pytest.raises(ExportError, match=f"holds {name}, which unirefiner did not"):
        unirefiner_hf.evaluate("nowhere/x", "data", evaluation_output=str(tmp_path))
    assert contents(tmp_path) == {name: b"years of work"}
    if name != "evaluation.json":
        (tmp_path / "evaluation.json").write_text('{"format": 1, "checkpoints": {}}')
        assert check_results(tmp_path, "evaluation.json", [name]) == tmp_path


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_an_evaluation_does_not_go_into_a_model_or_a_run(name, model):
    (model / name).write_text("{}")
    (model / "evaluation.json").write_text('{"format": 1, "entries": []}')
    with pytest.raises(ExportError, match="name a folder of its own"):
        unirefiner_hf.evaluate("nowhere/x", "data", evaluation_output=str(model))
    assert (model / "evaluation.json").read_text() == '{"format": 1, "entries": []}'


@pytest.mark.parametrize("option", ["--json={}", "--html={}"])
@pytest.mark.parametrize("name", ["run.json", "config.json", "trainer_state.json"])
def test_a_result_does_not_replace_a_file_of_a_run(name, option, tmp_path, capsys):
    file = tmp_path / name
    file.write_text("{}")
    assert main(["recipes", option.format(file)]) == 2
    assert f"{name} is part of a run or a model" in capsys.readouterr().err
    assert file.read_text() == "{}"
    assert main(["recipes", f"--json={tmp_path}/recipes.json"]) == 0
    assert main(["recipes", f"--json={tmp_path}/recipes.json"]) == 0


def test_a_card_of_another_hand_stays(tmp_path):
    card = tmp_path / "README.md"
    assert check_card(card) == card
    card.write_text("# Years of work")
    with pytest.raises(ExportError, match="a card that unirefiner did not write"):
        check_card(card)
    card.write_text(CARD)
    assert check_card(card) == card


def test_a_graph_takes_the_place_of_graphs_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("years of work")
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    with pytest.raises(OutputError, match="does not end in .onnx"):
        unirefiner_hf.export_onnx(model, tmp_path / "notes.txt")
    with pytest.raises(OutputError, match="there is no folder"):
        unirefiner_hf.export_onnx(model, tmp_path / "nowhere" / "model.onnx")
    assert contents(tmp_path) == {"notes.txt": b"years of work"}


def test_a_recipe_is_not_copied_through_a_link_to_nothing(tmp_path, capsys):
    (tmp_path / "link.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    words = ["recipes", "copy", "dinov2/small", str(tmp_path / "link.yaml")]
    assert main(words) == 2
    assert not (tmp_path / "elsewhere.yaml").exists()
