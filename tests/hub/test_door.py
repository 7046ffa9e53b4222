"""`unirefiner_hf.push` and `verify` as a user calls them: results, and what is refused."""

import json
import shutil
import sys

import pytest
from huggingface_hub import ModelCard, constants

import unirefiner_hf
from tests.dual_encoders import save_dual_run
from tests.export.conftest import merge, save_run  # noqa: F401
from tests.hub.conftest import run_python
from unirefiner_hf import Pushed, UniRefinerError
from unirefiner_hf.export.reload_check import ReloadReport
from unirefiner_hf.modeling.errors import WrongKindError

REPO = "alice/tiny-tower-unirefined"


@pytest.fixture
def merged(save_run, tmp_path):  # noqa: F811
    _, run, base = save_run()
    return merge(run, tmp_path / "merged", model=base)


def pushed(**changes):
    values = {
        "repo_id": REPO,
        "folder": "published",
        "commit": "0123456789abcdef",
        "url": f"https://huggingface.co/{REPO}",
        "uploaded": ("README.md", "model.safetensors"),
        "removed": ("old.safetensors",),
        "private": False,
        "tag": "v0.1.0",
        "pull_request": None,
        "check": ReloadReport(1e-7, {"package": 0.0, "remote": 2e-7}),
    }
    return Pushed(**{**values, **changes})


# What is returned


def test_a_push_from_python_and_its_verification(
    hub,
    client_env,
    save_run,  # noqa: F811
    tmp_path,
):
    _, run, base = save_run()
    code = f"""
    import json, unirefiner_hf
    done = unirefiner_hf.push({str(run)!r}, {REPO!r}, model={str(base)!r}, tag="v7")
    found = unirefiner_hf.verify({REPO!r}, revision="v7")
    print(json.dumps([done.to_dict(), str(done), found.to_dict()]))
    for mistake in ({{"revision": "v8"}}, {{}}):
        try:
            unirefiner_hf.verify({REPO!r} if mistake else "alice/nothing", **mistake)
        except unirefiner_hf.UniRefinerError as problem:
            print(json.dumps(str(problem)))
    """
    lines = run_python(code, client_env(), timeout=300).stdout.splitlines()
    (done, said, found), revision, nothing = map(json.loads, lines[-3:])
    head = hub.commits(REPO)[0].oid
    assert (done["repo_id"], done["commit"], done["tag"]) == (REPO, head, "v7")
    assert done["folder"] == str(run / "published") and done["removed"] == []
    assert set(done["uploaded"]) == hub.files(REPO).keys() - {".gitattributes"}
    assert done["check"]["reloaded"].keys() == {"package", "remote"}
    assert done["check"]["merged"] < 1e-3
    assert f"/{REPO} (public), commit {head[:7]}, tag v7" in said
    assert found["passed"] and "model.safetensors" in found["right"]
    assert revision == f"{REPO} has no revision 'v8'."
    assert "no repository alice/nothing" in nothing


def test_a_push_tells_itself(tmp_path):
    done = pushed()
    assert json.loads(json.dumps(done.to_dict()))["check"]["reloaded"]["remote"] == 2e-7
    for text in (done.to_markdown(), done.save_html(tmp_path / "p.html").read_text()):
        for part in ("model.safetensors", "removed", "old.safetensors", "tag v0.1.0"):
            assert part in text, part
    assert "Uploaded 2 files, removed 1 in one commit." in str(done)
    assert "(public), commit 0123456, tag v0.1.0" in str(done)


def test_a_proposal_and_an_empty_push_tell_themselves():
    address = f"https://huggingface.co/{REPO}/discussions/1"
    proposed = pushed(tag=None, pull_request=address)
    assert address in str(proposed) and address in proposed.to_markdown()
    empty = pushed(uploaded=(), removed=())
    assert "unchanged" in empty.to_markdown()
    assert "Nothing to upload" in str(empty)
    same = pushed(uploaded=(), removed=(), tag=None, pull_request=None)
    for text in (str(same), same.to_markdown(), str(proposed)):
        assert "None" not in text


def test_a_verification_tells_itself(merged, tmp_path):
    found = unirefiner_hf.verify(merged)
    assert found.passed and str(found).endswith(" files are as published.")
    there = {path.name for path in merged.rglob("*") if path.is_file()}
    assert {name.split("/")[-1] for name in found.right} == there - {"README.md"}
    (merged / "model.safetensors").write_bytes(b"other")
    (merged / "adapter" / "adapter_model.safetensors").unlink()
    (merged / "extra.bin").write_bytes(b"pickled")
    found = unirefiner_hf.verify(str(merged))
    told = json.loads(json.dumps(found.to_dict()))
    assert (told["passed"], told["unlisted"]) == (False, ["extra.bin"])
    assert not {"extra.bin", "model.safetensors"} & set(told["right"])
    assert told["wrong"].keys() == {"model.safetensors"}
    assert told["missing"] == ["adapter/adapter_model.safetensors"]
    page = found.save_html(tmp_path / "v.html").read_text()
    for text in (str(found), found.to_markdown(), page):
        for part in ("WRONG", "MISSING", "UNLISTED", "extra.bin"):
            assert part in text, part
    assert "Do not use this checkpoint" in str(found)
    assert found.title == "Not as published"


def change(file):
    file.write_bytes(file.read_bytes() + b" ")


FILES = [
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "modeling_unirefiner.py",
    "towers.py",
    "weight_files.py",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
]


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_counts_is_verified(name, merged):
    change(merged / name)
    assert unirefiner_hf.verify(merged).wrong.keys() == {name}
    (merged / name).unlink()
    assert unirefiner_hf.verify(merged).missing == (name,)


UNLISTED = [
    "pytorch_model.bin",
    "other.py",
    "lib/other.py",
    "processor_config.json",
    "adapter_config.json",
    "text/vocab.txt",
    "model-00001-of-00002.safetensors",
    "adapter/extra.json",
    "native.so",
]


@pytest.mark.parametrize("name", UNLISTED)
def test_a_file_that_a_loader_may_take_is_not_passed_over(name, merged):
    (merged / name).parent.mkdir(exist_ok=True)
    (merged / name).touch()
    found = unirefiner_hf.verify(merged)
    assert not found.passed and found.unlisted == (name,)


def test_files_for_readers_are_reported_and_no_fault(merged):
    for name in ("LICENSE", "figure.png", "assets/notes.txt", ".gitattributes"):
        (merged / name).parent.mkdir(exist_ok=True)
        (merged / name).touch()
    (merged / "evaluation.json").write_text("{}")
    (merged / ".cache").mkdir()
    (merged / ".cache" / "x.json").touch()
    found = unirefiner_hf.verify(merged)
    assert found.passed
    assert found.other == ("LICENSE", "assets/notes.txt", "figure.png")
    assert "other     LICENSE: no part of the model" in str(found)


def test_a_text_encoder_and_its_tokenizer_are_verified(tmp_path):
    _, run, base = save_dual_run(tmp_path, "clip")
    folder = merge(run, tmp_path / "merged", model=base)
    for name in ("text/tokenizer.json", "text/config.json", "text/model.safetensors"):
        before = (folder / name).read_bytes()
        change(folder / name)
        assert unirefiner_hf.verify(folder).wrong.keys() == {name}
        (folder / name).write_bytes(before)
    assert unirefiner_hf.verify(folder).passed


def test_a_card_of_an_earlier_version_says_what_it_leaves_out(merged):
    """0.1.0 stated the weights alone."""
    card = ModelCard.load(merged / "README.md")
    del card.data["unirefiner"]["files"]
    card.save(merged / "README.md")
    change(merged / "modeling_unirefiner.py")
    found = unirefiner_hf.verify(merged)
    assert found.passed and len(found.right) == 2
    assert {"modeling_unirefiner.py", "config.json"} < set(found.unchecked)
    assert f"{len(found.unchecked)} files that can change the result were" in str(found)
    (merged / "other.py").touch()
    assert unirefiner_hf.verify(merged).unlisted == ("other.py",)
    change(merged / "model.safetensors")
    assert unirefiner_hf.verify(merged).wrong.keys() == {"model.safetensors"}


@pytest.mark.parametrize("name", ["../secret.json", "/etc/hostname"])
def test_a_card_does_not_lead_out_of_its_folder(name, merged):
    (merged.parent / "secret.json").write_text("{}")
    card = ModelCard.load(merged / "README.md")
    card.data["unirefiner"]["files"][name] = "00"
    card.save(merged / "README.md")
    found = unirefiner_hf.verify(merged)
    assert found.missing == (name,) and not found.wrong


# What is refused, before the Hub is asked


@pytest.mark.parametrize(
    "options, message",
    [
        ({"repo_id": "no-owner"}, "'no-owner' names no owner"),
        ({"repo_id": "alice/na me"}, "is not a repository's name"),
        ({"repo_id": 3}, "3 is not a repository's name"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"keep_text": True, "native": True}, "keep_text is true.*native"),
        ({"output": 3}, "output is a int"),
        ({"run": None}, "run is a NoneType"),
        ({"run": "nowhere"}, "is not a run"),
        ({"tag": "a b"}, "tag is 'a b', which git refuses"),
        ({"tag": "v2", "create_pr": True}, "a pull request has none"),
        ({}, "Not logged in"),
    ],
)
def test_bad_pushes_are_refused(options, message, save_run, monkeypatch):  # noqa: F811
    _, run, base = save_run()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run / "no-token"))
    given = {"run": run, "repo_id": REPO, "model": base, **options}
    with pytest.raises(UniRefinerError, match=message):
        unirefiner_hf.push(given.pop("run"), given.pop("repo_id"), **given)
    assert not (run / "published").exists()


def test_a_folder_that_holds_the_run_is_not_built_in(save_run):  # noqa: F811
    _, run, base = save_run()
    with pytest.raises(UniRefinerError, match="holds the run itself"):
        unirefiner_hf.push(run, REPO, model=base, output=run)
    assert (run / "run.json").is_file()


def test_a_folder_of_another_hand_is_not_built_over(
    save_run,  # noqa: F811
    monkeypatch,
    tmp_path,
):
    _, run, source = save_run()
    base = shutil.copytree(source, tmp_path / "copied" / "tiny-tower")
    module = sys.modules["unirefiner_hf.hub.push"]
    monkeypatch.setattr(module, "check_access", lambda *words, **options: None)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    assert "config.json" in before
    with pytest.raises(UniRefinerError, match="tiny-tower is not empty"):
        unirefiner_hf.push(run, REPO, model=source, output=base)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


@pytest.mark.parametrize(
    "given, message",
    [
        ("nowhere", "neither a folder here nor user/name"),
        ("./runs/nowhere", "neither a folder here nor user/name"),
        ("", "checkpoint is empty"),
        ("alice/na me", "is not a repository's name"),
        (REPO, "connection to the Hub failed"),
    ],
)
def test_what_cannot_be_verified_is_refused(given, message, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UniRefinerError, match=message):
        unirefiner_hf.verify(given)


def test_the_folder_of_a_run_names_its_model_for_verify(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(
        UniRefinerError, match=r"is a run, .*: verify its model, .*merged"
    ):
        unirefiner_hf.verify(tmp_path)


def test_a_folder_takes_no_options_of_the_hub(merged):
    with pytest.raises(UniRefinerError, match="is a folder here: revision"):
        unirefiner_hf.verify(merged, revision="main")
    with pytest.raises(UniRefinerError, match="is a folder here: force_download"):
        unirefiner_hf.verify(merged, force_download=True)
    with pytest.raises(WrongKindError, match="checkpoint is a float"):
        unirefiner_hf.verify(1.5)


@pytest.mark.parametrize(
    "card, message",
    [
        (None, "states no checksums"),
        ("# A thesis\n", "states no checksums"),
        ("---\nunirefiner:\n  weights: all of them\n---\n", "states no checksums"),
        ("---\nunirefiner: ours\n---\n", "states no checksums"),
        ("---\nlicense: [mit\n---\n", "does not parse"),
    ],
)
def test_cards_of_others_state_nothing(card, message, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UniRefinerError, match=message):
        unirefiner_hf.verify(tmp_path)


def test_a_checkpoint_of_training_is_no_part_of_the_model(merged):
    shutil.copytree(merged / "adapter", merged / "last-checkpoint")
    assert unirefiner_hf.verify(merged).passed
