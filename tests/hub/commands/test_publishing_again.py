"""What is published is exactly what was built, and nothing of it is private."""

import io
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.dual_encoders import save_dual_run
from tests.hub.commands.verbs import ALICE, BOB, REPO, refused, succeed
from unirefiner_hf.hub.access import check_tag
from unirefiner_hf.hub.client import HubError

CARD = b"---\nunirefiner:\n  base: example-lab/tiny-tower\n---\n# Ours\n"

STALE = (
    "evaluation.json",
    "before_after.png",
    "run.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "modeling_intern_vit.py",
    "configuration_eva_clip.py",
    "adapter/register_tokens.safetensors",
    "text/tokenizer.json",
    "last-checkpoint/refiner_state.json",
    "last-checkpoint/optimizer.safetensors",
    "checkpoint-20/refiner_state.json",
)
READERS = (
    "LICENSE",
    "notes.md",
    "figure.png",
    "assets/teaser.webp",
    "checkpoint-9/notes.txt",
)
LOADED = (
    "pytorch_model.bin",
    "tf_model.h5",
    "other.safetensors",
    "adapter_config.json",
    "processor_config.json",
    "custom.py",
    "lib/helper.py",
)


def files(*names):
    return {"README.md": CARD, **{name: name.encode() for name in names}}


def test_what_we_left_goes_and_what_readers_see_stays(hub, push, verbs):
    hub.create(REPO, files(*STALE, *READERS))
    said = succeed(push())
    left = hub.files(REPO).keys()
    assert not left & set(STALE)
    assert set(READERS) < left and "model.safetensors" in left
    assert len(hub.commits(REPO)) == 3
    (removed,) = [line for line in said.splitlines() if line.startswith("Removed: ")]
    assert set(removed.removeprefix("Removed: ").rstrip(".").split(", ")) == set(STALE)
    assert f"Of another hand, kept: {', '.join(sorted(READERS))}." in said
    assert "Nothing to upload" in succeed(push())
    verified = succeed(verbs("verify", REPO))
    for name in set(READERS) - {"checkpoint-9/notes.txt"}:
        assert f"other     {name}: no part of the model" in verified


def test_nothing_is_published_beside_what_would_be_loaded(hub, push, run, verbs):
    hub.create(REPO, files(*LOADED, "LICENSE"))
    before = hub.files(REPO)
    for words in ((), ("--create-pr",)):
        line = refused(push(*words))
        assert "may be loaded or run" in line and "and 3 more" in line
        assert "--force" in line
    assert hub.files(REPO) == before and not Path(run[0], "published").exists()
    said = succeed(push("--force"))
    assert set(LOADED) & hub.files(REPO).keys() == set()
    assert "pytorch_model.bin" in said and "LICENSE" in hub.files(REPO)
    assert "as published" in succeed(verbs("verify", REPO))


def test_a_strangers_file_that_comes_meanwhile_is_not_removed(hub, verbs, push, run):
    hub.create(REPO, files())
    hold = hub.hold("/validate-yaml", "POST")
    running = verbs.start("push", *run, token=ALICE)
    hold.wait(120)
    hub.commit(REPO, {"pytorch_model.bin": b"mine"})
    hub.release()
    assert "changed by somebody else" in refused(running.wait())
    assert hub.files(REPO)["pytorch_model.bin"] == b"mine"
    assert "model.safetensors" not in hub.files(REPO)


# Before the work


@pytest.mark.parametrize("exists", [True, False])
def test_a_token_that_only_reads_is_found_out_first(hub, push, run, exists):
    if exists:
        hub.create(REPO, files())
    hub.add_user("alice", "hf_reader", role="read")
    line = refused(push(token="hf_reader"))
    assert f"may not write to {REPO}: it is alice's, for reading" in line
    assert not Path(run[0], "published").exists()


def test_a_repository_of_another_user_is_found_out_first(hub, push, run):
    hub.create(REPO, files())
    line = refused(push(token=BOB))
    assert "may not write to" in line and "403: You don't have the rights" in line
    assert not Path(run[0], "published").exists()


def test_a_bad_tag_is_found_out_first(hub, push, run):
    assert "tag is 'v1..2', which git refuses" in refused(push("--tag=v1..2"))
    assert REPO not in hub.repos and not Path(run[0], "published").exists()


@pytest.mark.parametrize(
    "tag", ["a b", "-v", "v.lock", "x~1", "/v", "v/", "", "@", "."]
)
def test_tags_that_git_refuses(tag):
    with pytest.raises(HubError, match="which git refuses"):
        check_tag(tag)


@pytest.mark.parametrize("tag", ["v1", "v0.1.0", "release/2", "v1@2", "größer"])
def test_tags_that_git_takes(tag):
    check_tag(tag)


def test_a_taken_tag_is_found_out_first(hub, push, run):
    hub.create(REPO, files())
    refs = hub.repos[REPO].refs
    refs["refs/tags/v0.1.0"] = hub.commits(REPO)[1].oid
    refs["refs/heads/draft"] = hub.commits(REPO)[0].oid
    assert "The tag v0.1.0 of" in refused(push())
    assert "the name of a branch" in refused(push("--tag=draft"))
    assert "the name of a branch" in refused(push("--tag=main"))
    assert not Path(run[0], "published").exists() and not hub.count("PUT", "")


# The cause


@pytest.mark.parametrize(
    "method, path, status", [("PUT", "", 413), ("POST", "/commit/", 400)]
)
def test_the_cause_of_a_failed_upload_is_told(hub, push, method, path, status):
    body = b'{"error": "the quota is used up"}'
    hub.fail(method, path, status, times=99, body=body)
    line = refused(push(sleepless=True))
    assert f"The Hub answered {status}: the quota is used up" in line


def test_an_upload_that_stays_cut_is_told(hub, push):
    hub.fail("PUT", "", 0, times=9999)
    assert "connection to the Hub failed" in refused(push(sleepless=True))


# Pull requests


def test_a_tag_is_refused_in_a_pull_request(hub, push):
    hub.create(REPO, files())
    assert "a pull request has none" in refused(push("--create-pr", "--tag=v2"))


def test_a_lost_answer_does_not_propose_twice(hub, push):
    hub.create(REPO, files())
    hub.fail("POST", "/commit/", 503, after=True)
    hub.fail("GET", "/discussions", 503, times=2)
    assert "/discussions/1" in succeed(push("--create-pr", sleepless=True))
    assert len(hub.repos[REPO].discussions) == 1
    assert hub.count("GET", "/discussions", 503) == 2


# Secrets


def everything(hub):
    """Name -> content of every file of every commit of every branch."""
    for ref in list(hub.repos[REPO].refs):
        for commit in hub.commits(REPO, ref):
            yield f"{ref}: message", (commit.title + commit.message).encode()
            for name, content in hub.files(REPO, commit.oid).items():
                yield f"{ref}: {name}", content


def assert_nothing_private(hub, secrets):
    seen = 0
    for name, content in everything(hub):
        seen += 1
        for secret in secrets:
            assert secret.encode() not in content, (name, secret)
        if name.endswith(".png"):
            assert not Image.open(io.BytesIO(content)).info, name
    assert seen > 10


@pytest.mark.parametrize("kind", ["vision", "dual"])
def test_no_path_and_no_name_is_given_away(kind, hub, verbs, run, tmp_path):
    words = run
    if kind == "dual":
        _, folder, base = save_dual_run(tmp_path / "dual", "clip")
        words = [str(folder), REPO, "--model", str(base)]
    info = PngInfo()
    info.add_text("Author", "mallory at secret-host")
    picture = Path(words[0], "before_after.png")
    Image.new("RGB", (8, 8)).save(picture, pnginfo=info)
    who = "mallory-of-secret-host"
    done = verbs("push", *words, "--pictures", token=ALICE, who=who)
    said = succeed(done)
    assert "before_after.png" in hub.files(REPO) and "Not published" not in said
    assert_nothing_private(hub, [ALICE, str(tmp_path), who, "/home/", "secret-host"])


def test_pictures_of_training_images_stay_here_unless_asked_for(hub, push, run):
    said = succeed(push())
    assert "Not published: before_after.png, which shows training images" in said
    files = hub.files(REPO)
    assert "before_after.png" not in files
    assert b"before_after" not in files["README.md"]
    assert Path(run[0], "before_after.png").is_file()
    succeed(push("--pictures", "--tag=v2"))
    assert b"](before_after.png)" in hub.files(REPO)["README.md"]
    said = succeed(push("--tag=v3"))
    assert "Removed: before_after.png." in said
    assert b"before_after" not in hub.files(REPO)["README.md"]


def test_a_published_model_states_every_file_that_counts(hub, push, verbs, tmp_path):
    succeed(push())
    told = ModelCard(hub.files(REPO)["README.md"].decode()).data["unirefiner"]
    stated = told["weights"].keys() | told["files"].keys()
    assert hub.files(REPO).keys() - stated == {"README.md", ".gitattributes"}
    code = "modeling_unirefiner.py"
    hub.commit(
        REPO, {code: b"import os", "evil.py": b"", "preprocessor_config.json": None}
    )
    done = verbs("verify", REPO)
    assert done.returncode == 1
    for line in (
        f"WRONG     {code}",
        "UNLISTED  evil.py",
        "MISSING   preprocessor_config.json",
    ):
        assert line in done.stdout
    assert "as published" in succeed(verbs("verify", REPO, "--revision", "v0.1.0"))
