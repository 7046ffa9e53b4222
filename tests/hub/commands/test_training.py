"""A run in progress on the Hub: what is uploaded, what is lost with the machine, and what not."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load

from tests.hub.commands.verbs import ALICE, BOB, refused, succeed
from tests.training.conftest import save_images, save_tiny_tower
from unirefiner_hf.export.whole import MANIFEST, damage

REPO = "alice/tiny-in-training"
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def refine(verbs, tmp_path):
    """Start a run of six steps, a checkpoint every second."""
    save_tiny_tower(tmp_path / "tiny-tower")
    save_images(tmp_path / "photos", count=6)
    values = {"model": "tiny-tower", "data": "photos", "output_dir": "run"}
    values |= {"image_size": 24, "max_steps": 6, "save_steps": 2, "use_cpu": "true"}
    values |= {"per_device_train_batch_size": 2, "report_images": 0}
    values |= {"push_to_hub": "true", "hub_model_id": REPO, "hub_always_push": "true"}
    values |= {"lr_scheduler_type": "cosine", "model_license": "mit"}

    def refine(*options, token=ALICE, who=None, **changes):
        words = [f"--{k}={v}" for k, v in (values | changes).items() if v is not None]
        how = {"token": token, "cwd": str(tmp_path), "who": who}
        return verbs.start("refine", *words, *options, **how)

    return refine


def adapter(hub, revision="main"):
    return load(hub.files(REPO, revision)[ADAPTER])


def same(one, other):
    return one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_the_strategies_of_transformers(hub, refine, strategy):
    succeed(refine(hub_strategy=strategy).wait())
    *saves, _ = hub.commits(REPO, "training")
    assert [c.title for c in reversed(saves)] == [
        f"Training in progress, step {step}" for step in (2, 4, 6)
    ]
    # The main branch never held anything but the finished model.
    final, first = hub.commits(REPO)
    assert hub.files(REPO, first.oid).keys() == {".gitattributes"}
    unfinished = hub.files(REPO, saves[-1].oid)
    assert not ModelCard(unfinished["README.md"].decode()).data["unirefiner"]["weights"]
    assert json.loads(unfinished["run.json"])["finished"] is False
    assert not same(adapter(hub, saves[-1].oid), adapter(hub, saves[0].oid))
    kept = {n.split("/")[0] for n in hub.files(REPO, "training") if "/" in n}
    assert {n.split("/")[0] for n in hub.files(REPO) if "/" in n} == {"adapter"}
    assert (
        kept - {"adapter"}
        == {
            "every_save": set(),
            "checkpoint": {"last-checkpoint"},
            "all_checkpoints": {"checkpoint-2", "checkpoint-4", "checkpoint-6"},
        }[strategy]
    )
    assert not [n for n in hub.files(REPO) if n.endswith((".bin", ".pt", ".pth"))]
    assert "model.safetensors" in hub.files(REPO)
    assert same(adapter(hub), adapter(hub, saves[0].oid))


def test_a_run_survives_the_loss_of_its_machine(hub, refine, tmp_path):
    whole = {"push_to_hub": "false", "hub_model_id": None, "output_dir": "whole"}
    succeed(refine(**whole).wait())
    undisturbed = (tmp_path / "whole" / ADAPTER).read_bytes()

    hold = hub.hold("/commit/", "POST", after=True)
    running = refine(hub_strategy="checkpoint")
    hold.wait(120)
    running.kill()
    hub.release()
    shutil.rmtree(tmp_path / "run")
    kept = hub.files(REPO, "training")
    state = json.loads(kept["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 2
    planted = {"last-checkpoint/global_step2/optim_states.pt": b"a pickle"}
    hub.commit(REPO, planted, revision="training")

    done = refine("--resume", hub_strategy="checkpoint").wait()
    succeed(done)
    assert "Fetched checkpoint-2" in done.stderr
    assert not list((tmp_path / "run").rglob("*.pt"))
    assert hub.files(REPO)[ADAPTER] == undisturbed


def test_a_failed_upload_does_not_stop_the_run(hub, refine):
    hub.fail("POST", "/commit/", 403, times=2)
    done = refine(hub_strategy="checkpoint").wait()
    succeed(done)
    assert f"Not uploaded to {REPO}, step 2" in done.stderr
    assert f"Not uploaded to {REPO}, step 4" in done.stderr
    assert "(403: injected failure)" in done.stderr
    titles = [commit.title for commit in hub.commits(REPO, "training")]
    assert titles[:-1] == ["Training in progress, step 6"]
    assert "model.safetensors" in hub.files(REPO)


def test_a_slow_upload_leaves_steps_out_but_not_the_last(hub, refine):
    hold = hub.hold("/commit/", "POST")
    running = refine(hub_strategy="checkpoint", hub_always_push="false")
    hold.wait(120)
    for _ in range(600):
        if (running.folder / "err").read_text().count("6/6"):
            break
        running.process.join(0.1)
    hub.release()
    done = running.wait()
    succeed(done)
    titles = [commit.title for commit in hub.commits(REPO, "training")]
    assert titles[:-1] == [
        "Training in progress, step 6",
        "Training in progress, step 2",
    ]
    assert "Steps [4] were not uploaded" in done.stderr


def test_another_hands_repository_stops_the_run_at_its_start(
    hub,
    refine,
    tmp_path,
):
    hub.create(REPO, {"README.md": b"# Years of work\n"})
    assert "did not write" in refused(refine().wait())
    assert not list(tmp_path.glob("run/checkpoint-*"))


OWN_CARD = b"""---
unirefiner:
  base: tiny-tower
  weights:
    model.safetensors: "01"
---
# A finished model
"""
FINISHED = {"README.md": OWN_CARD, "model.safetensors": b"\0weights"}


@pytest.fixture
def refused_at_once(hub, refine, tmp_path):
    """Start a run that is refused before anything is loaded or changed; what it said."""

    def start(*words, **options):
        before = hub.files(REPO) if REPO in hub.repos else None
        refs = dict(hub.repos[REPO].refs) if before is not None else None
        shutil.rmtree(tmp_path / "tiny-tower", ignore_errors=True)
        line = refused(refine(*words, **options).wait())
        assert not (tmp_path / "run").exists() and not hub.count("POST", "/commit/")
        assert (hub.files(REPO) if REPO in hub.repos else None) == before
        assert refs is None or hub.repos[REPO].refs == refs
        return line

    return start


def test_a_finished_model_is_not_trained_over(hub, refused_at_once):
    hub.create(REPO, FINISHED)
    hub.repos[REPO].refs["refs/tags/v0.1.0"] = hub.commits(REPO)[0].oid
    line = refused_at_once()
    assert "The tag v0.1.0" in line and f"unirefiner push run {REPO}" in line


def test_a_finished_model_stays_until_the_next_is_finished(hub, refine):
    hub.create(REPO, FINISHED)
    hold = hub.hold("/commit/main", "POST")
    running = refine(hub_strategy="checkpoint")
    hold.wait(120)
    assert len(hub.commits(REPO, "training")) == 5
    assert FINISHED.items() <= hub.files(REPO).items()
    hub.release()
    succeed(running.wait())
    assert hub.files(REPO)["model.safetensors"] != b"\0weights"
    assert len(hub.commits(REPO)) == 3


def test_what_is_private_is_not_trained_into_a_public_repository(hub, refused_at_once):
    hub.create(REPO)
    assert "is public, and a private one" in refused_at_once(hub_private_repo="true")


@pytest.mark.parametrize("exists", [True, False])
def test_a_token_that_only_reads_does_not_train_first(hub, refused_at_once, exists):
    if exists:
        hub.create(REPO)
    hub.add_user("alice", "hf_reader", role="read")
    for token in ("hf_reader", BOB):
        assert "may not write to alice/" in refused_at_once(token=token)
    assert "Not logged in" in refused_at_once(token=None)


def test_checkpoints_of_another_run_are_not_written_over(hub, refused_at_once):
    hub.create(REPO, {"README.md": OWN_CARD})
    hub.repos[REPO].refs["refs/heads/training"] = hub.commits(REPO)[0].oid
    assert "holds the checkpoints of a run" in refused_at_once()


def test_a_repository_made_public_meanwhile_gets_nothing_more(hub, refine):
    hold = hub.hold("/commit/training", "POST", after=True)
    running = refine(hub_private_repo="true", hub_strategy="every_save")
    hold.wait(120)
    hub.repos[REPO].private = False
    hub.release()
    done = running.wait()
    assert f"Not uploaded to {REPO}, step 4" in done.stderr
    assert "is public, and a private one" in refused(done)
    assert len(hub.commits(REPO, "training")) == 2 and len(hub.commits(REPO)) == 1


def test_what_it_needs_is_asked_for_before_the_first_step(
    hub,
    refine,
    tmp_path,
):
    assert "set model_license" in refused(refine(model_license=None).wait())
    assert "hub_model_id" in refused(refine(hub_model_id=None).wait())
    assert "user/name" in refused(refine(hub_model_id="no-owner").wait())
    assert not (tmp_path / "run").exists() and REPO not in hub.repos


def test_a_token_in_the_recipe_is_written_nowhere(hub, refine, tmp_path):
    done = refine(hub_token=ALICE, report_to="tensorboard", token=None).wait()
    succeed(done)
    assert ALICE not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or ALICE.encode() not in path.read_bytes(), path
    for commit in (*hub.commits(REPO)[:-1], *hub.commits(REPO, "training")[:-1]):
        for name, content in hub.files(REPO, commit.oid).items():
            for secret in (ALICE, str(tmp_path)):
                assert secret.encode() not in content, (name, secret)


@pytest.mark.parametrize("private", ["true", "false"])
def test_names_of_images_are_not_made_public(hub, refine, tmp_path, private):
    image = tmp_path / "photos" / "mallorys-passport.png"
    image.write_bytes((tmp_path / "photos" / "00.png").read_bytes()[:-200])
    who = "user-of-secret-host"
    done = refine(
        hub_strategy="checkpoint",
        hub_private_repo=private,
        report_images="2",
        max_steps="8",
        save_steps="8",
        who=who,
    ).wait()
    succeed(done)
    assert "Not published: before_after.png" in done.stderr
    assert "mallorys-passport" in (tmp_path / "run" / "run.json").read_text()
    told = []
    for ref in list(hub.repos[REPO].refs):
        for commit in hub.commits(REPO, ref):
            for name, content in hub.files(REPO, commit.oid).items():
                for secret in (str(tmp_path), who, "/home/", ALICE):
                    assert secret.encode() not in content, (name, secret)
                told += [name] * (b"mallorys" in content)
                assert not name.endswith(".png")
    kept = {"last-checkpoint/refiner_state.json"}
    assert set(told) == (kept if private == "true" else set())
    # What is left out is no damage.
    folder = tmp_path / "fetched"
    for name, content in hub.files(REPO, "training").items():
        if name.startswith("last-checkpoint/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    assert (folder / "last-checkpoint" / MANIFEST).is_file()
    assert damage(folder / "last-checkpoint") is None


def test_ph_reg_carries_its_register_tokens(hub, refine):
    options = {"method": "ph_reg", "register_tokens": "4", "teacher_views": "2"}
    succeed(refine(hub_strategy="every_save", **options).wait())
    final, _ = hub.commits(REPO)
    *saves, _ = hub.commits(REPO, "training")
    tokens = "adapter/register_tokens.safetensors"
    assert len(saves) == 3
    for commit in (final, *saves):
        files = hub.files(REPO, commit.oid)
        assert load(files[tokens])["register_tokens"].shape == (4, 32)
        assert "adapter/adapter_config.json" not in files
    config = json.loads(hub.files(REPO)["config.json"])
    assert config["num_register_tokens"] == 4
