"""A run goes on by its own record, as the run it was, from what is whole of it."""

import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_tiny_tower
from tests.training.conftest import save_images, save_tiny_tower
from unirefiner_hf import (
    UniRefinerError,
    UniRefinerSettings,
    UniRefinerTrainer,
    load_recipe,
    merge,
    refine,
)
from unirefiner_hf.cli import main
from unirefiner_hf.export import merge as merge_module
from unirefiner_hf.export.holding import HeldError, holding
from unirefiner_hf.export.run_folder import ASKED
from unirefiner_hf.export.whole import MANIFEST, damage, newest_whole
from unirefiner_hf.loading.adapter import CheckpointError
from unirefiner_hf.loading.backbone import load_backbone
from unirefiner_hf.loading.base_digest import base_sha256
from unirefiner_hf.methods.base import load_trainable
from unirefiner_hf.methods.registry import method_settings
from unirefiner_hf.training import asked_of_run
from unirefiner_hf.training.arguments import UniRefinerArguments
from unirefiner_hf.training.asked_of_run import (
    HARMLESS,
    OtherRunError,
    differences,
    identity,
    recipe_of_run,
)
from unirefiner_hf.training.keywords import ARGUMENTS
from unirefiner_hf.training.start import RunError

FIELDS = {
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "use_cpu": True,
    "disable_tqdm": True,
    "image_size": 24,
    "report_images": 0,
    "ah_layers": [0, 1],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A backbone and images that tests may change."""
    root = tmp_path_factory.mktemp("places")
    return save_tiny_tower(root / "tiny-dinov2"), save_images(root / "photos")


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    """The run that nothing disturbed."""
    model, data = places
    run = tmp_path_factory.mktemp("whole") / "run"
    refine(str(model), str(data), output_dir=str(run), **FIELDS)
    return run


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, to go on with."""
    return shutil.copytree(whole, tmp_path / "run")


def weights(run):
    files = ("adapter/adapter_model.safetensors", "merged/model.safetensors")
    return [(run / name).read_bytes() for name in files]


def contents(run):
    return {
        path.relative_to(run): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file()
    }


def cut(run, step=4):
    """Take the run's end away: what is left is a run that was stopped after step 2."""
    for name in (f"checkpoint-{step}", "merged", "adapter"):
        shutil.rmtree(run / name)
    for name in ("metrics.json", ".lock"):
        (run / name).unlink()


# By its own record


def test_the_folder_is_all_it_needs(run, whole, capsys):
    cut(run)
    assert main(["refine", "--resume", str(run)]) == 0, capsys.readouterr().err
    assert weights(run) == weights(whole)
    record = json.loads((run / "run.json").read_text())
    assert record["finished"] and record["training"]["resumed"]
    assert record["asked"] == json.loads((whole / "run.json").read_text())["asked"]


def test_from_python_too(run, whole):
    cut(run)
    assert weights(refine(resume=run).folder) == weights(whole)
    trainer = UniRefinerTrainer.from_run(run, logging_steps=2)
    assert trainer.args.logging_steps == 2 and trainer.args.max_steps == 4
    assert trainer.settings == UniRefinerSettings(ah_layers=[0, 1])


def test_what_is_the_same_may_be_said_again(run, whole, places, tmp_path, capsys):
    cut(run)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {places[0]}\nlearning_rate: 1e-2\nmax_steps: 4\n")
    words = ["--config", str(recipe), "--ah-layers", "0", "1", "--seed=42"]
    words += ["--output_dir", str(run), "--data", str(places[1])]
    assert main(["refine", "--resume", str(run), *words]) == 0, capsys.readouterr().err
    assert weights(run) == weights(whole)


def test_the_old_spelling_goes_on_too(run, whole, places):
    cut(run)
    model, data = map(str, places)
    refine(model, data, output_dir=str(run), resume=True, **FIELDS)
    assert weights(run) == weights(whole)


def test_what_changes_no_weight_is_honoured(run, whole):
    cut(run)
    options = {"logging_steps": 2, "save_steps": 1, "report_images": 1}
    options |= {"dataloader_num_workers": 1}
    refined = refine(resume=run, gradient_checkpointing=True, **options)
    assert refined.picture is not None
    assert weights(run) == weights(whole)
    args = json.loads((run / ASKED).read_text())["args"]
    assert {name: args[name] for name in options} == options
    names = ("gradient_checkpointing", "activation_checkpointing")  # the newer name
    assert any(args.get(name) for name in names)
    assert (run / "checkpoint-3").is_dir()


OTHER = {
    "learning_rate": (0.01, 0.02),
    "weight_decay": (0.1, 0.2),
    "optim": ("adamw_torch_fused", "sgd"),
    "lr_scheduler_type": ("cosine", "linear"),
    "adam_beta2": (0.999, 0.95),
    "max_grad_norm": (1.0, 0.5),
    "max_steps": (4, 6),
    "seed": (42, 1),
    "image_size": (24, 32),
    "bf16": (False, True),
    "register_factor": (32, 8),
    "register_fill": ("zero", "randn"),
    "lora_rank": (8, 2),
    "lora_alpha": (16, 64),
    "lora_dropout": (0.1, 0.0),
    "max_images": (None, 8),
    "data_split": ("train", "test"),
    "final_norm": (None, True),
    "uni_weight": (1.0, 0.5),
    "fpgp_cosine": (None, 0.5),
    "ah_layers": ([0, 1], [1, 1]),
    "lazy_channels": (True, False),
    "method": ("unirefiner", "distillation"),
}
"""Option -> what the run had, and what is asked for."""


@pytest.mark.parametrize("name", OTHER)
def test_what_changes_weights_is_refused_by_name(run, name):
    """On a finished run, where the adapter stays and the merge would be another."""
    before = contents(run)
    recorded, asked = OTHER[name]
    had = "unset" if recorded is None else str(recorded)
    with pytest.raises(OtherRunError) as problem:
        refine(resume=run, **{name: asked})
    assert f"{name} was {had}, now {asked}" in str(problem.value)
    assert contents(run) == before


def test_the_command_says_so_in_a_line(run, capsys):
    for words in (["--lora_alpha", "64"], ["--method", "ph_reg"]):
        assert main(["refine", "--resume", str(run), *words]) == 2
        name = words[0].removeprefix("--")
        assert f"run: {name} was " in capsys.readouterr().err


def test_the_old_spelling_is_refused_likewise(run, places):
    model, data = map(str, places)
    options = {**FIELDS, "learning_rate": 1e-3, "output_dir": str(run)}
    with pytest.raises(OtherRunError, match="learning_rate was 0.01, now 0.001"):
        refine(model, data, resume=True, **options)


def test_another_output_dir_is_refused(run, tmp_path):
    with pytest.raises(OtherRunError, match="output_dir was .*run, now .*elsewhere"):
        refine(resume=run, output_dir=str(tmp_path / "elsewhere"))


@pytest.fixture
def moved(run, places, tmp_path):
    """The backbone and the images of the run, at another place."""
    return [shutil.copytree(place, tmp_path / place.name) for place in places]


def test_the_backbone_and_the_images_may_have_moved(run, whole, moved):
    cut(run)
    model, data = moved
    refine(str(model), str(data), resume=run)
    assert weights(run) == weights(whole)
    told = json.loads((run / ASKED).read_text())
    assert (told["model"], told["data"]) == (str(model), str(data))


def test_other_base_weights_of_the_same_shape_are_refused(run, moved, tmp_path):
    make_tiny_tower("dinov2")
    file = moved[0] / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("mlp.fc1.weight"))
    tensors[name] *= 1.05
    save_file(tensors, file, metadata={"format": "pt"})
    before = contents(run)
    with pytest.raises(OtherRunError, match="base weights was sha256 .*, now sha256"):
        refine(str(moved[0]), resume=run)
    assert contents(run) == before
    with pytest.raises(UniRefinerError, match="is not the base of this run.*sha256"):
        merge(run, tmp_path / "merged", model=str(moved[0]))


@pytest.mark.parametrize("count", [11, 13])
def test_other_images_are_refused(run, moved, count):
    (moved[1] / "zz.png").write_bytes((moved[1] / "00.png").read_bytes())
    if count == 11:
        (moved[1] / "00.png").unlink()
        (moved[1] / "zz.png").unlink()
    with pytest.raises(OtherRunError, match=rf"images was 12, .*now {count}, sha256"):
        refine(train_dataset=str(moved[1]), resume=run)


def test_another_reference_image_is_refused(run, moved):
    with pytest.raises(OtherRunError, match="reference image was the package's, now"):
        refine(resume=run, reference_image=str(moved[1] / "00.png"))


def test_a_model_in_memory_is_given_again(tmp_path, places):
    from transformers import AutoImageProcessor

    model, data = places
    given = {"processing_class": AutoImageProcessor.from_pretrained(model)}
    tower = make_tiny_tower("dinov2")
    run = tmp_path / "run"
    refine(tower, str(data), output_dir=str(run), **FIELDS, **given)
    expected = weights(run)
    cut(run)
    with pytest.raises(RunError, match="model is missing"):
        refine(resume=run)
    refine(tower, resume=run, **given)
    assert weights(run) == expected
    with torch.no_grad():
        next(tower.parameters()).add_(0.1)
    with pytest.raises(OtherRunError, match="base weights was"):
        refine(tower, resume=run, **given)


def test_what_needs_a_word_or_is_secret_is_not_kept(tmp_path):
    args = UniRefinerArguments(
        str(tmp_path), trust_remote_code=True, hub_token="hf_secret", use_cpu=True
    )
    told = asked_of_run.all_asked("a/b", "c/d", args, UniRefinerSettings())
    assert "secret" not in json.dumps(told)
    assert not told["args"].keys() & {"trust_remote_code", "hub_token", "output_dir"}
    assert (told["model"], told["data"]) == ("a/b", "c/d")


def test_the_identity_has_no_path_and_misses_no_field(tmp_path):
    """A field that transformers adds counts as one that weights follow from."""
    args = UniRefinerArguments(str(tmp_path), reference_image="x.png", use_cpu=True)
    told = identity(args, UniRefinerSettings())
    assert str(tmp_path) not in json.dumps(told) and "x.png" not in json.dumps(told)
    given = {*HARMLESS, *asked_of_run.PLACES, *asked_of_run.SPLIT}
    given |= {*asked_of_run.NOT_KEPT, *asked_of_run.OF_THE_MACHINE}
    left = set(ARGUMENTS) - given - told.keys()
    assert left <= set(asked_of_run.REFUSED)
    unknown = HARMLESS - set(ARGUMENTS)
    assert not unknown, "no argument has this name"


@pytest.mark.parametrize("processes,expected", [(1, 4), (2, 2), (4, 1), (3, 1)])
def test_other_processes_make_the_same_batches(run, monkeypatch, processes, expected):
    """By another accumulation where there is one, unless it was given."""
    monkeypatch.setattr(asked_of_run, "announced_processes", lambda: processes)
    record = json.loads((run / "run.json").read_text())
    record["training"]["total_batch"] = 8  # four processes took two images each
    (run / "run.json").write_text(json.dumps(record))
    assert recipe_of_run(run).args.gradient_accumulation_steps == expected
    words = {"gradient_accumulation_steps": ["5"]}
    assert recipe_of_run(run, words).args.gradient_accumulation_steps == 5


def test_a_checkpoint_of_an_earlier_version_is_told(run, caplog):
    for folder in run.glob("checkpoint-*"):
        state = json.loads((folder / "refiner_state.json").read_text())
        del state["asked"]
        (folder / "refiner_state.json").write_text(json.dumps(state))
        (folder / MANIFEST).unlink()
    UniRefinerTrainer.from_run(run, seed=1)
    (run / ASKED).unlink()
    with pytest.raises(UniRefinerError, match="started by an earlier version"):
        refine(resume=run)
    with pytest.raises(UniRefinerError, match="holds no run that could be continued"):
        refine(resume=run.parent)


def test_what_an_earlier_version_did_not_know_is_as_nobody_asks(tmp_path):
    args = UniRefinerArguments(str(tmp_path), use_cpu=True, weight_decay=0.2)
    now = identity(args, UniRefinerSettings())
    lacking = ("accelerator_config", "weight_decay", "lazy_channels")
    before = {name: value for name, value in now.items() if name not in lacking}
    assert differences(before, now) == {"weight_decay": (0.1, 0.2)}
    assert differences({**now, "gone": 1}, now) == {}


def test_args_and_a_run_both_say_how(run, tmp_path):
    args = UniRefinerArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(RunError, match="args is a UniRefinerArguments, and resume="):
        refine(resume=run, args=args)
    recipe = load_recipe("demo", output_dir=str(tmp_path))
    with pytest.raises(RunError, match="recipe is a Recipe, and resume="):
        refine(resume=run, recipe=recipe)


def test_one_digest_in_every_precision_and_with_an_adapter(places):
    args = UniRefinerArguments("x", use_cpu=True, image_size=24)
    digests = set()
    for dtype in (torch.float32, torch.bfloat16):
        base = load_backbone(str(places[0]), args, dtype=dtype)
        digests.add(base_sha256(base.model))
    for method in ("unirefiner", "ph_reg"):
        settings = method_settings(method)
        digests.add(base_sha256(load_trainable(str(places[0]), args, settings).model))
    assert len(digests) == 1
    with torch.no_grad():
        next(base.model.tower.parameters()).mul_(1.01)
    assert base_sha256(base.model) not in digests


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "cannot be read"),
        ("[]", "is of format None, expected 1"),
        ('{"format": 2}', "is of format 2"),
        (
            '{"format": 1, "model": 3, "data": null}',
            "does not tell model, method, settings, args",
        ),
    ],
)
def test_a_damaged_record_is_told(run, content, told):
    (run / ASKED).write_text(content)
    with pytest.raises(UniRefinerError, match=f"asked.json {told}"):
        refine(resume=run)


# What is whole of it

HARM = {
    "emptied": lambda file: file.write_bytes(b""),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "a byte changed": lambda file: file.write_bytes(
        file.read_bytes()[:-3] + b"#" + file.read_bytes()[-2:]
    ),
    "overwritten": lambda file: file.write_bytes(b"version https://git-lfs"),
    "gone": lambda file: file.unlink(),
}
FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    MANIFEST,
    "optimizer.safetensors",
    "random_state_0.safetensors",
    "refiner_state.json",
    "scheduler.safetensors",
    "trainer_state.json",
)


def test_these_are_the_files_of_a_checkpoint(run):
    assert {file.name for file in (run / "checkpoint-4").iterdir()} == set(FILES)


@pytest.mark.parametrize("harm", HARM)
def test_damage_to_any_file_is_found(run, harm):
    for name in FILES:
        newest = shutil.copytree(run / "checkpoint-4", run / "checkpoint-6")
        HARM[harm](newest / name)
        whole, passed = newest_whole(run)
        if (harm, name) == ("gone", MANIFEST):
            # The others are looked at one by one, and they are whole.
            assert passed == {
                "checkpoint-6": "trainer_state.json does not tell its step"
            }
        else:
            assert name in passed["checkpoint-6"]
        assert whole == run / "checkpoint-4"
        shutil.rmtree(newest)


@pytest.mark.parametrize("harm", ["emptied", "cut short", "overwritten", "gone"])
def test_a_checkpoint_without_a_list_of_its_files_is_looked_through(run, harm):
    (run / "checkpoint-4" / MANIFEST).unlink()
    assert damage(run / "checkpoint-4") is None
    for name in set(FILES) - {MANIFEST}:
        broken = shutil.copytree(run / "checkpoint-4", run / "checkpoint-6")
        HARM[harm](broken / name)
        needed = ("adapter_model.safetensors", "refiner_state.json")
        if harm == "gone" and name not in (*needed, "trainer_state.json"):
            name = "trainer_state.json"  # what is not needed is not missed
        assert name in (damage(broken) or "")
        shutil.rmtree(broken)


def test_the_newest_whole_one_goes_on_and_the_other_is_named(run, whole, caplog):
    cut(run, 4)
    shutil.copytree(whole / "checkpoint-4", run / "checkpoint-4")
    HARM["emptied"](run / "checkpoint-4" / "optimizer.safetensors")
    assert main(["refine", "--resume", str(run)]) == 0
    assert "checkpoint-4 is passed over: optimizer.safetensors has 0 b" in caplog.text
    assert "Going on from checkpoint-2" in caplog.text
    assert weights(run) == weights(whole)
    assert damage(run / "checkpoint-4") is None
    assert (run / "damaged-checkpoint-4" / "optimizer.safetensors").exists()


def test_none_whole_is_said(run):
    for step in (2, 4):
        HARM["gone"](run / f"checkpoint-{step}" / "trainer_state.json")
    before = contents(run)
    with pytest.raises(
        CheckpointError, match="no whole checkpoint.*checkpoint-4: train"
    ):
        refine(resume=run)
    assert contents(run) == before


def test_a_damaged_checkpoint_is_not_merged(run, tmp_path, places):
    HARM["cut short"](run / "checkpoint-2" / "adapter_model.safetensors")
    with pytest.raises(UniRefinerError, match="not whole: adapter_model.safetensors"):
        merge(run / "checkpoint-2", tmp_path / "m", model=str(places[0]))


def test_a_damaged_one_that_is_named_is_refused(run):
    HARM["cut short"](run / "checkpoint-2" / "scheduler.safetensors")
    trainer = UniRefinerTrainer.from_run(run)
    with pytest.raises(CheckpointError, match="checkpoint-2 is not whole: scheduler"):
        trainer.train(resume_from_checkpoint=run / "checkpoint-2")


def test_a_checkpoint_of_the_adapter_alone_is_no_end(places, tmp_path):
    model, data = map(str, places)
    options = {**FIELDS, "output_dir": str(tmp_path / "run"), "save_only_model": True}
    run = refine(model, data, **options).folder
    expected = weights(run)
    refine(resume=run)  # it was finished
    assert weights(run) == expected
    shutil.rmtree(run / "checkpoint-4")
    with pytest.raises(CheckpointError, match="checkpoint-2 holds the adapter alone"):
        refine(resume=run)


# Nobody's work is lost


@pytest.mark.parametrize("name", ["merged", "adapter", "published", "metrics.json"])
@pytest.mark.parametrize("resume", [False, True])
def test_what_no_run_left_is_not_replaced(places, tmp_path, name, resume):
    run = tmp_path / "run"
    (run / name).mkdir(parents=True)
    (run / name / "model.safetensors").write_bytes(b"years of work")
    model, data = map(str, places)
    with pytest.raises(RunError, match=f"holds {name}, which a run would replace"):
        refine(model, data, output_dir=str(run), resume=resume, **FIELDS)
    assert (run / name / "model.safetensors").read_bytes() == b"years of work"


def test_a_start_that_failed_is_not_in_the_way(places, tmp_path, monkeypatch, whole):
    model, data = map(str, places)
    options = {**FIELDS, "output_dir": str(tmp_path / "run")}

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(UniRefinerTrainer, "compute_loss", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            refine(model, data, **{**options, "image_size": 32})
    assert (tmp_path / "run" / "run.json").is_file()
    refined = refine(model, data, **options)
    assert weights(refined.folder) == weights(whole)


def test_finished_is_said_when_the_merged_model_is_there(
    run, whole, places, monkeypatch
):
    cut(run)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "export_run", full)
        with pytest.raises(OSError, match="No space"):
            refine(resume=run)
    record = json.loads((run / "run.json").read_text())
    assert record["trained"] and not record["finished"]
    model, data = map(str, places)
    with pytest.raises(RunError, match="already holds a run"):
        refine(model, data, output_dir=str(run), **FIELDS)
    refine(resume=run)
    assert json.loads((run / "run.json").read_text())["finished"]
    assert weights(run) == weights(whole)


@pytest.fixture
def held(run):
    """Another command at work in the run."""
    begun, ended = threading.Event(), threading.Event()

    def work():
        with holding(run, "push"):
            begun.set()
            ended.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(60)
    yield
    ended.set()
    thread.join()


def test_one_command_at_a_time(run, held, places, tmp_path):
    before = contents(run)
    model, data = map(str, places)
    for call in (
        lambda: refine(resume=run),
        lambda: refine(model, data, output_dir=str(run), **FIELDS),
        lambda: merge(run, tmp_path / "merged", model=model),
    ):
        with pytest.raises(HeldError, match="is in use by push .process"):
            call()
    assert contents(run) == before


def test_a_run_that_went_on_meanwhile_is_not_mixed(run, places):
    """Both look before either trains: the second finds the first one's work."""
    cut(run)
    late = UniRefinerTrainer.from_run(run)
    refine(resume=run)
    before = contents(run)
    with pytest.raises(RunError, match="already holds a run, at checkpoint-4"):
        late.train()
    assert contents(run) == before
