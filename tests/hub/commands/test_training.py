"""A run in progress on the Hub: what is uploaded, what is lost with the machine, and what not."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load

from tests.hub.commands.verbs import ALICE, refused, succeed
from tests.training.conftest import save_images, save_tiny_tower

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

    def refine(*options, token=ALICE, **changes):
        words = [f"--{k}={v}" for k, v in (values | changes).items() if v is not None]
        return verbs.start("refine", *words, *options, token=token, cwd=str(tmp_path))

    return refine


def adapter(hub, revision="main"):
    return load(hub.files(REPO, revision)[ADAPTER])


def same(one, other):
    return one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_the_strategies_of_transformers(hub, refine, strategy):
    succeed(refine(hub_strategy=strategy).wait())
    final, *saves, _ = hub.commits(REPO)
    assert [c.title for c in reversed(saves)] == [
        f"Training in progress, step {step}" for step in (2, 4, 6)
    ]
    unfinished = hub.files(REPO, saves[-1].oid)
    assert not ModelCard(unfinished["README.md"].decode()).data["unirefiner"]["weights"]
    assert json.loads(unfinished["run.json"])["finished"] is False
    assert not same(adapter(hub, saves[-1].oid), adapter(hub, saves[0].oid))
    folders = {name.split("/")[0] for name in hub.files(REPO) if "/" in name}
    assert (
        folders - {"adapter"}
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
    state = json.loads(hub.files(REPO)["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 2
    hub.commit(REPO, {"last-checkpoint/global_step2/optim_states.pt": b"a pickle"})

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
    titles = [commit.title for commit in hub.commits(REPO)]
    assert titles[1:-1] == ["Training in progress, step 6"]
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
    titles = [commit.title for commit in hub.commits(REPO)]
    assert titles[1:-1] == [
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
    for commit in hub.commits(REPO)[:-1]:
        for name, content in hub.files(REPO, commit.oid).items():
            for secret in (ALICE, str(tmp_path)):
                assert secret.encode() not in content, (name, secret)


def test_ph_reg_carries_its_register_tokens(hub, refine):
    options = {"method": "ph_reg", "register_tokens": "4", "teacher_views": "2"}
    succeed(refine(hub_strategy="every_save", **options).wait())
    final, *saves, _ = hub.commits(REPO)
    tokens = "adapter/register_tokens.safetensors"
    for commit in (final, *saves):
        files = hub.files(REPO, commit.oid)
        assert load(files[tokens])["register_tokens"].shape == (4, 32)
        assert "adapter/adapter_config.json" not in files
    config = json.loads(hub.files(REPO)["config.json"])
    assert config["num_register_tokens"] == 4
