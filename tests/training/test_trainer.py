"""The trainer and `refine` as a user calls them from Python."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset
from transformers import (
    AutoModel,
    BitImageProcessorPil,
    TrainerCallback,
    TrainingArguments,
)

from tests.conftest import make_tiny_tower
from unirefiner_hf import (
    DistillationSettings,
    PHRegSettings,
    UniRefinerArguments,
    UniRefinerError,
    UniRefinerModel,
    UniRefinerSettings,
    UniRefinerTrainer,
    load_recipe,
    merge,
    refine,
)
from unirefiner_hf.methods.registry import METHODS
from unirefiner_hf.training.trainer import Interrupted

SETTINGS = UniRefinerSettings(ah_layers=[0, 1])
WEIGHTS = "model.safetensors"


@pytest.fixture
def args(tmp_path):
    """Factory of the arguments of a short run; its folder is ``run``."""

    def make(**options):
        return UniRefinerArguments(
            **{
                "output_dir": str(tmp_path / "run"),
                "max_steps": 2,
                "save_steps": 1,
                "logging_steps": 1,
                "per_device_train_batch_size": 2,
                "use_cpu": True,
                "disable_tqdm": True,
                "image_size": 24,
                "report_images": 0,
                **options,
            }
        )

    return make


@pytest.fixture
def trainer(args, tower_folder, image_folder):
    """Factory of a trainer; what is given takes the place of the tiny backbone and images."""

    def make(**given):
        options = {
            "model": str(tower_folder),
            "train_dataset": str(image_folder),
            "method": SETTINGS,
            **given,
        }
        if "args" not in options:
            options["args"] = args()
        return UniRefinerTrainer(**options)

    return make


@pytest.fixture(scope="session")
def pictures(image_folder):
    return [Image.open(path).convert("RGB") for path in sorted(image_folder.iterdir())]


@pytest.fixture(scope="session")
def table(pictures):
    features = datasets.Features(
        {"photo": datasets.Image(), "label": datasets.Value("int8")}
    )
    columns = {"photo": pictures, "label": [0] * len(pictures)}
    return datasets.Dataset.from_dict(columns, features=features)


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def trained(made):
    made.train()
    return made


class Items(torch.utils.data.Dataset):
    """A torch data set whose items are made of images."""

    def __init__(self, images, item):
        self.images, self.item = images, item

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.item(self.images[number])


# Images


@pytest.fixture(scope="module")
def of_a_folder(tower_folder, image_folder, tmp_path_factory):
    """Losses of the run on the folder of images, which every other form has to give."""
    run = tmp_path_factory.mktemp("folder") / "run"
    made = UniRefinerTrainer(
        str(tower_folder),
        UniRefinerArguments(
            str(run),
            max_steps=2,
            logging_steps=1,
            per_device_train_batch_size=2,
            use_cpu=True,
            disable_tqdm=True,
            image_size=24,
            report_images=0,
        ),
        image_folder,
        SETTINGS,
    )
    made.train()
    assert len(losses(made)) == 2
    return losses(made)


@pytest.mark.parametrize(
    "item",
    [
        lambda image: image,
        lambda image: (image, 3),
        lambda image: {"image": image, "label": 3},
    ],
    ids=["images", "pairs", "dicts"],
)
def test_a_torch_data_set_trains_as_the_folder_does(
    trainer, pictures, of_a_folder, item
):
    made = trained(trainer(train_dataset=Items(pictures, item)))
    assert losses(made) == of_a_folder
    assert made.record["data"]["images"] == len(pictures)


def test_a_list_of_images_trains_as_the_folder_does(trainer, pictures, of_a_folder):
    assert losses(trained(trainer(train_dataset=pictures))) == of_a_folder


def test_a_column_of_a_data_set_trains_as_the_folder_does(
    trainer, args, table, of_a_folder
):
    for number, given in enumerate((table, table.with_format("torch"))):
        run = args(image_column="photo", output_dir=args().output_dir + str(number))
        assert losses(trained(trainer(args=run, train_dataset=given))) == of_a_folder
    assert given.format["type"] == "torch"


def test_a_data_set_with_a_transform_gives_what_it_says(
    trainer, table, pictures, of_a_folder
):
    given = table.with_transform(lambda rows: {"image": rows["photo"]})
    assert losses(trained(trainer(train_dataset=given))) == of_a_folder


@pytest.mark.parametrize(
    "length", [{"max_steps": 2}, {"max_steps": -1, "max_images": 4}]
)
def test_an_iterable_data_set_trains(trainer, args, table, length):
    run = args(image_column="photo", num_train_epochs=1, **length)
    made = trained(trainer(args=run, train_dataset=table.to_iterable_dataset()))
    assert made.state.global_step == 2 and len(losses(made)) == 2
    assert made.record["data"]["skipped"] == {}


def test_max_images_picks_of_a_data_set_in_memory(trainer, args, table, pictures):
    run = args(max_images=4, max_steps=-1, num_train_epochs=1)
    made = trained(trainer(args=run, train_dataset=pictures))
    assert made.record["data"]["images"] == 4 and made.state.global_step == 2


ARRAYS = np.zeros((4, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "list holds no images"),
        (ARRAYS, "An item of ndarray holds a ndarray. Images are taken as PIL images"),
        (list(ARRAYS), "holds a ndarray.*PIL.Image.fromarray"),
        (torch.zeros(4, 3, 32, 32), "holds a Tensor"),
        (TensorDataset(torch.zeros(4, 3, 32, 32)), "TensorDataset holds a Tensor"),
        (["a.png", "b.png"], "An item of list holds a str: open it"),
        ([{"photo": 1}], "has no 'image'; it has photo. Name one with image_column"),
        (iter([1]), "list_iterator, which gives no image by its number"),
        (3, "is a int.*datasets.Dataset"),
        (datasets.Dataset.from_dict({"image": []}), "has no rows|holds"),
        (
            datasets.Dataset.from_dict({"image": ARRAYS.tolist()}),
            "'image' of .* holds List.*PIL.Image.fromarray",
        ),
        (
            datasets.Dataset.from_dict(
                {"image": list(ARRAYS)},
                features=datasets.Features(
                    {"image": datasets.Array3D((32, 32, 3), "uint8")}
                ),
            ),
            "'image' of .* holds Array3D",
        ),
        (
            datasets.Dataset.from_dict({"image": ARRAYS.tolist()}).with_format("numpy"),
            "'image' of .* holds List",
        ),
        (
            datasets.Dataset.from_dict({"image": [1, 2]}).to_iterable_dataset(),
            "'image' of .* holds Value",
        ),
        (
            datasets.Dataset.from_dict({"label": [1, 2]}),
            "no column 'image'; it has label",
        ),
        (
            datasets.DatasetDict({"test": datasets.Dataset.from_dict({"image": [""]})}),
            r"DatasetDict of test: give one of them, such as data\['test'\]",
        ),
    ],
)
def test_what_holds_no_images_is_refused(trainer, tmp_path, given, message):
    with pytest.raises(UniRefinerError, match=message):
        trainer(train_dataset=given)
    assert not (tmp_path / "run").exists()


def test_an_iterable_data_set_of_arrays_ends_with_the_reason(trainer):
    def rows():
        yield from ({"image": array} for array in ARRAYS)

    given = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(UniRefinerError, match="Arrays and tensors do not tell"):
        trained(trainer(train_dataset=given))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"data_split": "val"}, "data_split is 'val'"),
        ({"data_config": "big"}, "data_config is 'big'"),
        ({"streaming": True}, "stream"),
        ({"image_column": "photo"}, "image_column is 'photo'"),
    ],
)
def test_options_that_the_images_have_no_use_for_are_refused(
    trainer, args, pictures, tmp_path, table, option, message
):
    run = args(**option)
    with pytest.raises(UniRefinerError, match=message):
        trainer(args=run)
    with pytest.raises(UniRefinerError, match=message):
        trainer(args=run, train_dataset=pictures)
    if option.keys() & {"data_split", "data_config"}:
        with pytest.raises(UniRefinerError, match=message):
            trainer(args=run, train_dataset=table)
        table.to_parquet(tmp_path / "photos.parquet")
        table.save_to_disk(tmp_path / "photos")
        for name in ("photos.parquet", "photos"):
            with pytest.raises(UniRefinerError, match=message):
                trainer(args=run, train_dataset=tmp_path / name)


@pytest.mark.parametrize(
    "option",
    [{"dataloader_drop_last": True}, {"train_sampling_strategy": "sequential"}],
)
def test_options_that_a_stream_has_no_use_for_are_refused(trainer, args, table, option):
    with pytest.raises(UniRefinerError, match=f"{next(iter(option))} is .*stream"):
        trainer(
            args=args(image_column="photo", **option),
            train_dataset=table.to_iterable_dataset(),
        )


# Models


def test_a_model_in_memory_is_left_as_it_is(args, image_folder, tmp_path):
    model = make_tiny_tower("dinov2").train()
    before = copy.deepcopy(model.state_dict())
    processor = BitImageProcessorPil(size={"shortest_edge": 20})
    described = processor.to_dict()
    made = UniRefinerTrainer(
        model,
        args(learning_rate=0.3, scale_learning_rate=False),
        image_folder,
        processing_class=processor,
        ah_layers=[0, 1],
    )
    made.train()
    merged = made.save_model(tmp_path / "merged")
    assert merged.base == made.backbone.name == "dinov2-in-memory"
    assert model.training and model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert processor.to_dict() == described
    saved = AutoModel.from_pretrained(tmp_path / "merged")
    assert not torch.equal(
        saved.tower.state_dict()["encoder.layer.0.mlp.fc1.weight"],
        before["encoder.layer.0.mlp.fc1.weight"],
    )
    with pytest.raises(UniRefinerError, match="local model called 'dinov2-in-memory'"):
        merge(made.folder, tmp_path / "again")
    again = merge(
        made.folder, tmp_path / "again", model=model, processing_class=processor
    )
    assert weights_of(again.folder) == weights_of(merged.folder)


def weights_of(folder):
    return (folder / WEIGHTS).read_bytes()


def test_a_refiner_model_keeps_its_fill_and_norm(trainer, tower_folder, tmp_path):
    tower = make_tiny_tower("clip_vision_model")
    model = UniRefinerModel.from_tower(tower, register_fill="rand", final_norm=False)
    before = copy.deepcopy(model.state_dict())
    processor = BitImageProcessorPil(size={"shortest_edge": 20})
    made = trained(trainer(model=model, processing_class=processor))
    for config in (
        made.refined.config,
        AutoModel.from_pretrained(made.save_model().folder).config,
    ):
        assert config.register_fill == "rand" and config.final_norm is False
    assert made.record["model"]["register_fill"] == "rand"
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_refined_model_of_a_folder_in_memory_knows_its_name(trainer, tower_folder):
    made = trainer(model=AutoModel.from_pretrained(tower_folder))
    assert made.backbone.name == tower_folder.name
    assert made.backbone.processor.size == {"shortest_edge": 20}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "model is a Linear: give a Hub id, a folder, a vision model"),
        (3, "model is a int: give"),
        (None, "model is missing"),
        ("", "model is empty"),
        ("/nowhere", "there is no such folder"),
    ],
)
def test_another_kind_of_model_is_refused(trainer, tmp_path, model, message):
    with pytest.raises(UniRefinerError, match=message):
        trainer(model=model)
    assert not (tmp_path / "run").exists()


def test_what_a_model_in_memory_has_no_use_for_is_refused(trainer, args):
    model = make_tiny_tower("dinov2")
    with pytest.raises(UniRefinerError, match="image processor as processing_class"):
        trainer(model=model)
    for option in ({"revision": "v1"}, {"keep_text": True}):
        with pytest.raises(UniRefinerError, match="and the model is in memory"):
            trainer(model=model, args=args(**option))


def test_a_revision_of_a_folder_is_refused(trainer, args):
    with pytest.raises(UniRefinerError, match="revision is 'v1', and .* is a folder"):
        trainer(args=args(revision="v1"))


# Arguments and methods


def test_settings_and_keywords_train_alike(trainer, args, tower_folder, image_folder):
    run = args().output_dir
    by_object = trained(
        trainer(args=args(output_dir=run + "a"), method=PHRegSettings(teacher_views=2))
    )
    by_name = trained(
        trainer(args=args(output_dir=run + "b"), method="ph_reg", teacher_views=2)
    )
    flat = {**vars_of(args(output_dir=run + "c")), "method": "ph_reg"}
    by_keywords = UniRefinerTrainer(
        str(tower_folder), train_dataset=image_folder, teacher_views=2, **flat
    )
    by_keywords.train()
    assert losses(by_object) == losses(by_name) == losses(by_keywords)
    assert by_object.record["method"] == by_name.record["method"]


def vars_of(args):
    """What `args` of this module sets."""
    names = "max_steps logging_steps per_device_train_batch_size use_cpu disable_tqdm "
    names += "image_size report_images output_dir"
    return {name: getattr(args, name) for name in names.split()}


def test_one_arguments_object_trains_twice_alike(trainer, args, tmp_path):
    given = args(gradient_accumulation_steps=2, learning_rate=1e-2)
    settings = UniRefinerSettings(ah_layers=[0, 1])
    before = copy.deepcopy(given), copy.deepcopy(settings)
    first = trained(trainer(args=given, method=settings))
    assert (given, settings) == before
    assert given.learning_rate == 1e-2
    assert first.args.learning_rate == pytest.approx(1e-2 * 4 / 16)
    replaced = dataclasses.replace(given, output_dir=given.output_dir + "-b")
    second = trained(trainer(args=replaced, method=settings))
    given.output_dir += "-c"
    third, other = (
        trainer(args=given, method=settings),
        trainer(args=args(seed=1, output_dir=str(tmp_path / "d"))),
    )
    trained(other)  # what one trainer draws is not another's matter
    third.train()
    assert losses(first) == losses(second) == losses(third)
    assert second.args.learning_rate == third.args.learning_rate
    given.output_dir = before[0].output_dir
    assert (given, settings) == before


def test_callbacks_are_called(trainer):
    class Noting(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_train_begin(self, *_, **__):
            self.seen.append("begin")

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.append(state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen += ["loss_regu"] if "loss_regu" in (logs or {}) else []

        def on_train_end(self, *_, **__):
            self.seen.append("end")

    noting = Noting()
    trained(trainer(callbacks=[noting]))
    assert noting.seen == ["begin", 1, "loss_regu", 2, "loss_regu", "end"]


BAD = [
    ({"method": "ph_reg", "num_crops": 3}, "num_crops is no setting of method ph_reg"),
    ({"method": PHRegSettings(), "num_crops": 3}, "num_crops is no setting of"),
    ({"method": PHRegSettings(), "teacher_views": 2}, "teacher_views is given twice"),
    ({"max_steps": 3}, "max_steps is given twice: in args and as a keyword"),
    ({"max_step": 3}, "'max_step'; did you mean 'max_steps'"),
    ({"method": "uni_refiner"}, "uni_refiner.*Did you mean 'unirefiner'"),
    ({"method": 3}, "method is a int: give a name"),
    ({"method": 3, "max_steps": 3}, "method is a int: give a name"),
    ({"method": None}, "method is a NoneType"),
    ({"train_dataset": None}, "train_dataset is missing"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_arguments_are_refused(trainer, tmp_path, given, message):
    with pytest.raises(UniRefinerError, match=message):
        trainer(**given)
    assert not (tmp_path / "run").exists()


def test_other_arguments_are_refused(trainer, args, tmp_path, tower_folder):
    with pytest.raises(UniRefinerError, match="args is a TrainingArguments: give Uni"):
        trainer(args=TrainingArguments(str(tmp_path / "run"), use_cpu=True))
    with pytest.raises(UniRefinerError, match="output_dir is not set"):
        UniRefinerTrainer(str(tower_folder), train_dataset="x", use_cpu=True)
    with pytest.raises(UniRefinerError, match="output_dir is not set"):
        refine(str(tower_folder), "x", max_steps=1)
    with pytest.raises(UniRefinerError, match="snapshot_steps is 1, and report_images"):
        trainer(args=args(snapshot_steps=1))
    with pytest.raises(UniRefinerError, match="warmup_steps.*final_lr_share"):
        trainer(args=args(final_lr_share=0.1, warmup_steps=1))


def test_recipe_and_arguments_are_refused_together(args, tower_folder):
    recipe = load_recipe("demo", **vars_of(args()))
    for given, message in [
        ({"recipe": "demo", "args": args()}, "args and recipe both say"),
        ({"recipe": recipe, "max_steps": 1}, "max_steps is given twice"),
        ({"recipe": recipe, "method": "ph_reg"}, "method is given twice"),
        ({"data": "x", "train_dataset": "x"}, "given twice, as|given twice: as"),
        (
            {"recipe": "demo", "method": UniRefinerSettings(), "num_crops": 2},
            "num_crops is given twice",
        ),
        ({"recipe": "demo", "method": "ph_reg", "num_crops": 2}, "no setting of"),
        ({"recipe": "demo", "max_step": 2}, "max_step"),
        ({"recipe": "dem"}, "neither a file nor a shipped recipe. Near: demo"),
    ]:
        with pytest.raises(UniRefinerError, match=message):
            refine(**given)
    with pytest.raises(UniRefinerError, match="model is missing"):
        refine(train_dataset="x", args=args())
    with pytest.raises(UniRefinerError, match="data is missing"):
        refine(str(tower_folder), args=args())


# What is left


AFRESH = """
    import sys, torch, unirefiner_hf
    from transformers import AutoModel
    model = AutoModel.from_pretrained(sys.argv[1]).eval()
    pixels = torch.randn(1, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state
    torch.save(tokens, sys.argv[2])
"""


def test_save_model_leaves_what_refine_leaves(trainer, args, tmp_path, image_folder):
    made = trained(trainer())
    merged = made.save_model(tmp_path / "merged")
    assert merged.method == "unirefiner" and merged.register_width == 1
    refined = refine(
        made._given[0], image_folder, args(output_dir=str(tmp_path / "other")), SETTINGS
    )
    assert not (made.folder / "merged").exists()
    names = {p.relative_to(merged.folder) for p in merged.folder.rglob("*")}
    assert names == {p.relative_to(refined.merged) for p in refined.merged.rglob("*")}
    assert weights_of(merged.folder) == weights_of(refined.merged)
    assert json.loads((merged.folder / "config.json").read_text())["method"] == (
        "unirefiner"
    )
    code = [sys.executable, "-c", textwrap.dedent(AFRESH)]
    subprocess.run([*code, merged.folder, tmp_path / "x.pt"], check=True, timeout=300)
    pixels = torch.randn(1, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = made.refined.eval()(pixels).last_hidden_state
    tokens = torch.load(tmp_path / "x.pt", weights_only=True)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-5)


def test_save_model_twice_and_into_two_folders(trainer, tmp_path):
    made = trained(trainer())
    first = made.save_model(tmp_path / "a").folder
    weights = weights_of(first)
    (first / "before_after.png").write_text("x")
    assert weights_of(made.save_model(first).folder) == weights
    assert not (first / "before_after.png").exists()
    (first / "mark").write_text("x")
    with pytest.raises(UniRefinerError, match="holds mark, which unirefiner did not"):
        made.save_model(first)
    assert weights_of(made.save_model(tmp_path / "b").folder) == weights
    assert made.save_model().folder == made.folder / "merged"
    assert weights_of(made.folder / "merged") == weights


def test_save_model_replaces_nobodys_folder(trainer, tmp_path):
    made = trained(trainer())
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.txt").write_text("x")
    made.create_model_card(strange)  # our card does not make the folder ours
    for folder, message in (
        (strange, "is not empty"),
        (made.folder, "holds the run itself"),
        (made.folder / "checkpoint-1", "is not empty"),
    ):
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        with pytest.raises(UniRefinerError, match=message):
            made.save_model(folder)
        assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (tmp_path / "file").write_text("x")
    with pytest.raises(UniRefinerError, match="is a file"):
        made.save_model(tmp_path / "file")


def test_the_card_of_a_run(trainer, args, tmp_path):
    made = trained(trainer(args=args(report_images=2)))
    card = made.create_model_card(repo_id="me/mine")
    assert card == made.folder / "README.md"
    assert "me/mine" in card.read_text() and "before_after.png" in card.read_text()
    elsewhere = made.create_model_card(tmp_path / "cards" / "one").read_text()
    assert "before_after.png" not in elsewhere and "tiny-dinov2" in elsewhere
    again = trainer(args=args(report_images=2, resume=True))
    assert again.create_model_card(tmp_path / "two").read_text() == elsewhere


def test_nothing_is_saved_before_it_is_trained(trainer, tmp_path):
    made = trainer()
    for call in (made.save_model, made.create_model_card, made.push_to_hub):
        with pytest.raises(UniRefinerError, match="nothing is trained yet"):
            call()
    assert list((tmp_path / "run").iterdir()) == []


# Going on


def test_train_twice_is_refused(trainer, args):
    for resume in (False, True):
        made = trainer(args=args(output_dir=args().output_dir + str(resume)))
        made.args.resume = resume
        made.train()
        record = (made.folder / "run.json").read_bytes()
        with pytest.raises(UniRefinerError, match="another trainer.*output_dir"):
            made.train()
        assert (made.folder / "run.json").read_bytes() == record


def test_two_trainers_of_one_folder_do_not_mix(trainer, args):
    first, second = trainer(), trainer()
    first.train()
    with pytest.raises(UniRefinerError, match="already holds a run"):
        second.train()
    with pytest.raises(UniRefinerError, match="already holds a run"):
        trainer()
    shutil.rmtree(first.folder / "checkpoint-2")
    third = trainer(args=args(resume=True))
    trained(trainer(args=args(resume=True)))
    with pytest.raises(UniRefinerError, match="already holds a run, at checkpoint-2"):
        third.train()


def test_a_trainer_that_was_interrupted_goes_on(trainer, args, tmp_path):
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    options["lr_scheduler_type"] = "cosine"
    whole = trained(trainer(args=args(**options, output_dir=str(tmp_path / "whole"))))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    made = trainer(args=args(**options))
    stop = Stop()
    made.add_callback(stop)
    with pytest.raises(Interrupted, match="checkpoint-"):
        made.train()
    made.remove_callback(stop)
    with pytest.raises(UniRefinerError, match="resume_from_checkpoint=True"):
        made.train()
    made.train(resume_from_checkpoint=True)
    assert losses(made) == losses(whole)
    ours, theirs = (
        load_file(t.folder / "adapter" / "adapter_model.safetensors")
        for t in (made, whole)
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_checkpoint_to_resume_is_one_of_the_run(trainer, args, tmp_path):
    first = trained(trainer(args=args(save_total_limit=None)))
    made = trainer(args=args(resume=True))
    for wrong in (tmp_path, made.folder, made.folder / "checkpoint-9", "checkpoint-1"):
        with pytest.raises(UniRefinerError, match="no checkpoint-N of this run"):
            made.train(resume_from_checkpoint=wrong)
    with pytest.raises(UniRefinerError, match="leave one of them out"):
        made.train(resume_from_checkpoint=False)
    with pytest.raises(UniRefinerError, match="train.. takes no trial"):
        made.train(trial=1)
    made.train(resume_from_checkpoint=str(made.folder / "checkpoint-1"))
    assert losses(made) == losses(first)


def test_another_method_does_not_go_on_with_a_run(trainer, args):
    trained(trainer())
    with pytest.raises(
        UniRefinerError, match="method was unirefiner, now distillation"
    ):
        trainer(args=args(resume=True), method=DistillationSettings())


def test_what_was_measured_of_an_earlier_end_is_dropped(trainer, args):
    made = trained(trainer())
    merged = made.save_model().folder
    file = merged / "evaluation.json"
    file.write_text(json.dumps({"format": 1, "entries": []}))
    same = trained(trainer(args=args(resume=True)))
    assert same.save_model().folder == merged and file.is_file()
    shutil.rmtree(made.folder / "checkpoint-2")
    again = trained(trainer(args=args(resume=True)))
    assert again.save_model().folder == merged and not file.exists()


# A method of one's own


def test_a_fourth_method_is_one_file_and_one_line(
    trainer, args, tower_folder, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setitem(METHODS, "toy", "tests.training.toy_method:ToySettings")
    made = trained(trainer(args=args(learning_rate=0.1), method="toy", pull=2.0))
    assert made.record["method"] == {
        "name": "toy",
        "no_grad_batch": None,
        "pull": 2.0,
        "lazy_channels": [],
    }
    last = made.state.log_history[-2]
    assert last["loss"] == pytest.approx(2 * last["loss_toy"], rel=1e-3)
    merged = made.save_model(tmp_path / "merged").folder
    config = json.loads((merged / "config.json").read_text())
    assert config["method"] == "toy" and config["register_width"] == 0
    card = (merged / "README.md").read_text()
    assert "pulled to their mean with weight 2.0" in card and "Do not use it" in card
    assert made.create_model_card().is_file()
    again = merge(made.folder, tmp_path / "again", model=str(tower_folder))
    assert again.method == "toy" and weights_of(again.folder) == weights_of(merged)
    refined = refine(
        str(tower_folder),
        image_folder,
        args(output_dir=str(tmp_path / "other"), learning_rate=0.1),
        "toy",
        pull=2.0,
    )
    assert weights_of(refined.merged) == weights_of(merged)
    with pytest.raises(UniRefinerError, match="register_fill is .*method toy"):
        trainer(args=args(register_fill="randn"), method="toy")
    with pytest.raises(UniRefinerError, match="pull is no setting.*but of toy"):
        trainer(method="unirefiner", pull=1.0)
