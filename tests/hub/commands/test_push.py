"""`unirefiner push` and `verify` over the Hub's protocol, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from tests.dual_encoders import save_dual_run
from tests.export.conftest import make_record, make_refined, pixels
from tests.hub.commands.verbs import ALICE, BOB, REPO, refused, succeed
from tests.hub.conftest import make_hub
from unirefiner_hf.loading.adapter import save_adapter
from unirefiner_hf.resources import PACKAGE

LOAD = """
import sys
from safetensors.torch import load_file, save_file
if sys.argv[3] == "remote":
    sys.modules["unirefiner_hf"] = None
else:
    import unirefiner_hf
from transformers import AutoModel
model = AutoModel.from_pretrained(
    sys.argv[1],
    revision=sys.argv[4],
    trust_remote_code=sys.argv[3] == "remote",
)
tokens = model(load_file("pixels")["pixels"]).last_hidden_state
save_file({"tokens": tokens.detach().contiguous()}, sys.argv[2])
"""


def script(code, environment, *words, cwd=None):
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def change(folder, seed=1):
    """Another training's result in the same run folder."""
    save_adapter(make_refined("dinov2", seed=seed), Path(folder) / "adapter")


def load(environment, repo, cwd, code="package", revision="main"):
    save_file({"pixels": pixels()}, cwd / "pixels")
    done = script(LOAD, environment, repo, f"tokens-{code}", code, revision, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(cwd / f"tokens-{code}")["tokens"]


# The whole way


def test_a_run_is_published_and_used(hub, push, client_env, tmp_path):
    said = succeed(push(proved=True))
    assert "reloaded in a fresh process: package" in said and "remote" in said
    assert f"/{REPO} (public), commit" in said and "tag v0.1.0" in said

    files = hub.files(REPO)
    expected = {"README.md", "config.json", "model.safetensors"}
    expected |= {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"}
    expected |= {"preprocessor_config.json", "modeling_unirefiner.py", ".gitattributes"}
    assert expected <= files.keys()
    published, initial = hub.commits(REPO)
    assert hub.commits(REPO, "v0.1.0")[0].oid == published.oid
    card = ModelCard(files["README.md"].decode()).data
    assert card.base_model == "example-lab/tiny-tower"
    assert card["unirefiner"]["weights"].keys() == {
        name for name in files if name.endswith(".safetensors")
    }

    model = make_refined("dinov2", register_width=2)
    with torch.no_grad():
        trained = model(pixels()).last_hidden_state
    for code in ("package", "remote"):
        anybody = client_env(token=None)
        tokens = load(anybody, REPO, tmp_path, code)
        torch.testing.assert_close(tokens, trained, atol=1e-4, rtol=0)

    (tmp_path / "example-lab").mkdir()
    (tmp_path / "tiny-tower").rename(tmp_path / "example-lab" / "tiny-tower")
    text = files["README.md"].decode()
    snippets = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(snippets) == 5
    pasted = "\n".join(snippets)
    anybody = client_env(token=None)
    succeed(script(pasted, anybody, cwd=tmp_path))
    example = (PACKAGE.parent / "examples" / "segmentation_backbone.py").read_text()
    assert "step 2: loss" in succeed(script(example, anybody, REPO, "2"))


def test_a_dual_encoder_is_published_whole(hub, verbs, client_env, tmp_path):
    _, run, base = save_dual_run(tmp_path, "clip")
    words = ["push", str(run), REPO, "--model", str(base)]
    succeed(verbs(*words, token=ALICE, proved=True))
    files = hub.files(REPO)
    kept = {name for name in files if name.startswith("text/")}
    own = ("config.json", "model.safetensors", "tokenizer.json")
    assert {f"text/{name}" for name in own} <= kept
    assert "as published" in succeed(verbs("verify", REPO))
    text = files["README.md"].decode()
    stated = ModelCard(text).data["unirefiner"]["weights"]
    assert "text/model.safetensors" in stated
    (example,) = [
        part.split("```")[0]
        for part in text.split("```python\n")[1:]
        if "load_text_side" in part.split("```")[0]
    ]
    done = script(example, client_env(token=None), cwd=tmp_path)
    assert "torch.Size([36, 2])" in succeed(done)
    succeed(verbs(*words, "--no_text", "--tag", "v2", token=ALICE))
    assert not [name for name in hub.files(REPO) if name.startswith("text/")]
    assert hub.files(REPO, "v0.1.0").keys() == files.keys()


def test_pushing_again_uploads_nothing(hub, push, run):
    succeed(push())
    head = hub.commits(REPO)[0].oid
    hub.requests.clear()
    assert "Nothing to upload" in succeed(push())
    assert hub.commits(REPO)[0].oid == head
    assert not hub.count("PUT", "") and not hub.count("POST", "/commit/")


def test_a_new_model_needs_a_new_tag(hub, push, run, client_env, tmp_path):
    succeed(push())
    before = hub.files(REPO)
    change(run[0])
    assert "tag v0.1.0" in refused(push())
    assert hub.files(REPO) == before
    assert "Uploaded 3 files" in succeed(push("--tag", "v2"))
    after = hub.files(REPO, "v2")
    assert after["model.safetensors"] != before["model.safetensors"]
    assert hub.files(REPO, "v0.1.0") == before
    old = load(client_env(token=None), REPO, tmp_path, revision="v0.1.0")
    new = load(client_env(token=None), REPO, tmp_path, revision="v2")
    assert not torch.allclose(old, new, atol=1e-3)


def test_shards_replace_one_file_and_the_other_way_round(
    hub, push, verbs, client_env, tmp_path
):
    succeed(push())
    said = succeed(push("--max_shard_size", "20KB", "--tag", "shards"))
    assert "removed 1" in said
    names = hub.files(REPO).keys()
    assert "model.safetensors" not in names
    assert "model.safetensors.index.json" in names
    tokens = load(client_env(token=None), REPO, tmp_path)
    with torch.no_grad():
        trained = make_refined("dinov2", register_width=2)(pixels()).last_hidden_state
    torch.testing.assert_close(tokens, trained, atol=1e-4, rtol=0)
    assert "as published" in succeed(verbs("verify", REPO))
    succeed(push("--tag", "whole"))
    assert not [name for name in hub.files(REPO) if "-of-" in name]


def test_the_native_tower_needs_no_package(hub, push, verbs, client_env):
    succeed(push("--native", proved=True))
    assert not [name for name in hub.files(REPO) if name.endswith(".py")]
    code = "from transformers import AutoModel\n"
    code += f"print(type(AutoModel.from_pretrained('{REPO}')).__name__)"
    assert "Dinov2Model" in succeed(script(code, client_env(token=None)))


def test_the_same_over_xet(client_env, run, tmp_path):
    pytest.importorskip("hf_xet")
    with_xet = make_hub(xet=True)
    try:
        alice = client_env(token="hf_alice", url=with_xet.url, xet=True)
        command = "import sys; from unirefiner_hf.cli import main; sys.exit(main())"
        said = script(command, alice, "push", *run)
        assert said.returncode == 0, said.stderr[-3000:]
        file = with_xet.repos[REPO].resolve("main").tree["model.safetensors"]
        assert file.xet is not None
        anybody = client_env(token=None, url=with_xet.url, xet=True)
        load(anybody, REPO, tmp_path)
    finally:
        with_xet.stop()


# Who may, and whose it is


def test_a_private_repository_stays_private(hub, push, verbs, client_env, tmp_path):
    assert "(private)" in succeed(push("--private"))
    assert hub.repos[REPO].private
    for token in (None, BOB, "hf_wrong"):
        done = verbs("verify", REPO, token=token)
        assert done.returncode == 2 and "as published" not in done.stdout
    assert "as published" in succeed(verbs("verify", REPO, token=ALICE))
    load(client_env(token=ALICE), REPO, tmp_path)


def test_private_weights_do_not_go_into_a_public_repository(hub, push, run):
    hub.create(REPO)
    assert "is public" in refused(push("--private"))
    assert hub.files(REPO).keys() == {".gitattributes"}


@pytest.mark.parametrize(
    "token, message",
    [
        (None, "Not logged in"),
        ("hf_wrong", "does not accept the token"),
        (BOB, "may not write to alice/"),
    ],
)
def test_without_the_right_token_nothing_is_made(hub, push, token, message):
    assert message in refused(push(token=token))
    assert REPO not in hub.repos


def test_what_another_hand_made_is_not_overwritten(hub, push, verbs):
    thesis = {"README.md": b"# Years of work\n", "pytorch_model.bin": b"\0weights"}
    hub.create(REPO, thesis)
    line = refused(push())
    assert "2 files" in line or "3 files" in line
    assert "--force" in line
    assert thesis.items() <= hub.files(REPO).items()
    assert "Removed: pytorch_model.bin." in succeed(push("--force"))
    assert "pytorch_model.bin" not in hub.files(REPO)
    assert "as published" in succeed(verbs("verify", REPO, token=ALICE))


def test_a_model_of_another_base_is_not_overwritten(hub, push, run):
    succeed(push())
    record = make_record(model__base="example-lab/other-tower")
    (Path(run[0]) / "run.json").write_text(json.dumps(record))
    line = refused(push())
    assert "example-lab/tiny-tower" in line and "example-lab/other-tower" in line


def test_a_gated_repository_opens_to_whom_it_grants(hub, push, verbs, client_env):
    succeed(push())
    hub.repos[REPO].gated = "manual"
    done = verbs("verify", REPO, token=BOB)
    assert done.returncode == 2 and "as published" not in done.stdout
    hub.grant(REPO, "bob")
    assert "as published" in succeed(verbs("verify", REPO, token=BOB))


def test_an_unknown_licence_is_asked_for(hub, push, run):
    record = make_record(model__license=None)
    (Path(run[0]) / "run.json").write_text(json.dumps(record))
    assert "--license" in refused(push())
    assert REPO not in hub.repos
    succeed(push("--license", "mit"))
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.license == "mit"


@pytest.mark.parametrize("name", ["no-owner", "alice/na me", "alice/a/b"])
def test_odd_names_are_refused(verbs, run, name):
    assert repr(name) in refused(verbs("push", run[0], name, *run[2:], token=ALICE))


# Pull requests


def test_a_pull_request_is_proposed_once(hub, push, run):
    hub.create(REPO, {"README.md": b"# Mine\n"})
    said = succeed(push("--create-pr"))
    assert "/discussions/1" in said
    assert "model.safetensors" not in hub.files(REPO)
    assert "model.safetensors" in hub.files(REPO, "refs/pr/1")
    said = succeed(push("--create-pr"))
    assert "Nothing to upload" in said and "/discussions/1" in said
    assert "refs/pr/2" not in hub.repos[REPO].refs


# Bad moments

STEPS = [
    ("GET", "/whoami-v2"),
    ("GET", "/api/models/[^?]*"),
    ("POST", "/validate-yaml"),
    ("POST", "/repos/create"),
    ("POST", "/preupload/"),
    ("POST", "/info/lfs/objects/batch"),
    ("PUT", ""),
    ("POST", "/commit/"),
    ("POST", "/tag/"),
]


@pytest.mark.parametrize("status", [429, 503])
def test_every_step_outlives_two_refusals(hub, push, status):
    for method, path in STEPS:
        hub.fail(method, path, status, times=2)
    succeed(push(sleepless=True))
    for method, path in STEPS:
        assert hub.count(method, path, status) == 2, path
    assert len(hub.commits(REPO)) == 2
    assert "v0.1.0" in str(hub.repos[REPO].refs)


def test_a_connection_that_stays_cut_is_told(hub, push):
    hub.fail("POST", "/commit/", 0, times=1000)
    line = refused(push(sleepless=True))
    assert "connection to the Hub failed" in line and "run the same command" in line


def test_a_cut_connection_is_tried_again(hub, push):
    hub.fail("POST", "/commit/", 0)
    hub.fail("POST", "/tag/", 0)
    succeed(push(sleepless=True))
    assert len(hub.commits(REPO)) == 2


def test_the_server_says_how_long_to_wait(hub, push, run):
    hub.fail("POST", "/commit/", 429, headers={"Retry-After": "3"})
    done = push(sleepless=True)
    succeed(done)
    assert "trying again in 3 s" in done.stderr


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, push, run):
    hub.fail("POST", "/commit/", 503, after=True)
    succeed(push(sleepless=True))
    assert len(hub.commits(REPO)) == 2


def test_refusals_without_end_leave_nothing_and_say_so(hub, push, run):
    hub.fail("POST", "/commit/", 503, times=1000)
    assert "run the same command again" in refused(push(sleepless=True))
    assert hub.files(REPO).keys() == {".gitattributes"}
    hub._failures.clear()
    succeed(push())
    assert "model.safetensors" in hub.files(REPO)


@pytest.mark.parametrize("method, path", [("PUT", ""), ("POST", "/commit/")])
def test_a_killed_push_is_finished_by_pushing_again(
    hub, verbs, push, run, method, path
):
    hold = hub.hold(path, method)
    running = verbs.start("push", *run, token=ALICE)
    hold.wait(120)
    running.kill()
    hub.release()
    assert hub.files(REPO).keys() == {".gitattributes"}
    succeed(push())
    assert "model.safetensors" in hub.files(REPO)
    assert len(hub.commits(REPO)) == 2


def test_a_change_by_somebody_else_is_not_buried(hub, verbs, run):
    hold = hub.hold("", "PUT")
    running = verbs.start("push", *run, token=ALICE)
    hold.wait(120)
    hub.commit(REPO, {"notes.txt": b"mine"})
    hub.release()
    assert "changed by somebody else" in refused(running.wait())
    assert hub.files(REPO)["notes.txt"] == b"mine"
    assert "model.safetensors" not in hub.files(REPO)


# Verification


def test_a_flipped_byte_is_found(hub, push, verbs):
    succeed(push())
    assert " files are as published" in succeed(verbs("verify", REPO))
    hub.flip_byte(REPO, "model.safetensors")
    # What was downloaded before is right, until it is fetched anew.
    succeed(verbs("verify", REPO))
    done = verbs("verify", REPO, "--force-download")
    assert done.returncode == 1 and "WRONG     model.safetensors" in done.stdout


def test_two_pushes_of_one_run_do_not_meet(hub, verbs, push, run):
    hold = hub.hold("", "PUT")
    first = verbs.start("push", *run, token=ALICE)
    hold.wait(120)
    built = {f: f.read_bytes() for f in Path(run[0], "published").rglob("*.*")}
    line = refused(push("--tag=v2"))
    assert "is in use by push (process" in line
    assert built == {f: f.read_bytes() for f in built}
    hub.release()
    succeed(first.wait())
    assert "Nothing to upload" in succeed(push())
    assert len(hub.commits(REPO)) == 2


def test_a_missing_weight_file_is_found(hub, push, verbs, client_env):
    succeed(push())
    hub.commit(REPO, {"adapter/adapter_model.safetensors": None})
    done = verbs("verify", REPO)
    assert done.returncode == 1
    assert "MISSING   adapter/adapter_model.safetensors" in done.stdout


def test_a_foreign_model_cannot_be_verified(hub, verbs):
    hub.create("bob/other", {"README.md": b"# Other\n", "model.safetensors": b"\0"})
    assert "states no checksums" in refused(verbs("verify", "bob/other"))


# Secrets


def test_no_token_and_no_path_is_given_away(hub, push, tmp_path):
    done = push(proved=True)
    succeed(done)
    secrets = [ALICE, str(tmp_path), os.path.expanduser("~")]
    for name, content in hub.files(REPO).items():
        for secret in secrets:
            assert secret.encode() not in content, (name, secret)
    for commit in hub.commits(REPO):
        assert not [s for s in secrets if s in commit.title + commit.message]
    assert ALICE not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        if path.is_file() and "HF_HOME" not in str(path):
            assert ALICE.encode() not in path.read_bytes(), path
