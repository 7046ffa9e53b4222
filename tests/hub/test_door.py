"""`unirefiner_hf.push` and `verify` as a user calls them: results, and what is refused."""

import json
import shutil
import sys

import pytest
from huggingface_hub import constants

import unirefiner_hf
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
    assert found.passed and str(found).endswith("2 weight files are as published.")
    (merged / "model.safetensors").write_bytes(b"other")
    (merged / "adapter" / "adapter_model.safetensors").unlink()
    (merged / "extra.bin").write_bytes(b"pickled")
    found = unirefiner_hf.verify(str(merged))
    told = json.loads(json.dumps(found.to_dict()))
    assert (told["passed"], told["right"], told["unlisted"]) == (
        False,
        [],
        ["extra.bin"],
    )
    assert told["wrong"].keys() == {"model.safetensors"}
    assert told["missing"] == ["adapter/adapter_model.safetensors"]
    page = found.save_html(tmp_path / "v.html").read_text()
    for text in (str(found), found.to_markdown(), page):
        for part in ("WRONG", "MISSING", "UNLISTED", "extra.bin"):
            assert part in text, part
    assert "Do not use this checkpoint" in str(found)
    assert found.title == "Not as published"


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


def test_a_folder_of_another_hand_is_not_built_over(save_run, monkeypatch):  # noqa: F811
    _, run, base = save_run()
    module = sys.modules["unirefiner_hf.hub.push"]
    monkeypatch.setattr(module, "_log_in", lambda api, repo_id: None)
    monkeypatch.setattr(module, "remote_state", lambda api, repo_id: None)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    assert "config.json" in before
    with pytest.raises(UniRefinerError, match="tiny-tower is not empty"):
        unirefiner_hf.push(run, REPO, model=base, output=base)
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
