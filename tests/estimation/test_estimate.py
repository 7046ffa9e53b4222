"""`estimate`: from a config alone, for devices that are not here."""

import copy
import json

import pytest
import torch

from tests.conftest import make_tiny_tower
from unirefiner_hf import (
    DistillationSettings,
    PHRegSettings,
    UniRefinerArguments,
    UniRefinerError,
    UniRefinerModel,
    UniRefinerSettings,
    estimate,
    load_recipe,
)
from unirefiner_hf.estimation.devices import GPUS, Device, find_device
from unirefiner_hf.estimation.estimate import recipe_elsewhere
from unirefiner_hf.loading.lora import add_adapter


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory):
    """A config and no weights."""
    folder = tmp_path_factory.mktemp("tower") / "tiny"
    make_tiny_tower("dinov2").config.save_pretrained(folder)
    return folder


@pytest.fixture
def estimated(config_folder):
    """The estimate of a small recipe, as words and numbers."""

    def run(**options):
        options = {"recipe": "dinov2/small", "image_size": 32, **options}
        found = estimate(config_folder, **options)
        return found.to_dict(), str(found)

    return run


def test_it_tells_parameters_passes_memory_and_time(estimated):
    numbers, out = estimated(gpu="h200", images=160)
    assert numbers["parameters"]["trained"] > 0
    assert f"{numbers['flops']['losses and filters'] / 1e12:.3f}" in out
    assert numbers["steps"] == 20 and "for 20 steps (2 of them before L_scd)" in out
    for part in ("teacher, composites", "relation crops", "backward"):
        assert part in out
    assert "tiny: dinov2, 2 layers of 32, 32 px, bf16" in out
    assert "batch 16 on one h200" in out and "of 141" in out
    json.dumps(numbers)


def test_it_saves_itself_as_a_page(config_folder, tmp_path):
    found = estimate(config_folder, recipe="dinov2/small", image_size=32)
    page = found.save_html(tmp_path / "estimate.html").read_text()
    assert "relation crops" in page and "626 steps" in page


def test_several_devices_part_what_the_strategy_says(estimated):
    alone, _ = estimated()
    ddp, out = estimated(gpus=4)
    assert "4 x h100, ddp" in out and "exchanged" in out
    assert ddp["memory"]["frozen base"] == alone["memory"]["frozen base"]
    assert (alone["steps"], ddp["steps"]) == (626, 158)
    zero2, _ = estimated(gpus=4, strategy="zero2")
    trained = alone["parameters"]["trained"]
    assert zero2["memory"]["optimiser"] == 3 * trained
    zero3, _ = estimated(gpus=4, strategy="zero3")
    base = alone["memory"]["frozen base"]
    assert zero3["memory"]["frozen base"] == pytest.approx(base / 4, abs=1)
    assert zero3["memory"]["gathered layers"] == base


def test_the_method_that_is_asked_for_is_estimated(estimated):
    refined, _ = estimated()
    plain, out = estimated(method="distillation")
    assert "teacher, crops" in out and "teacher, composites" not in out
    assert sum(plain["flops"].values()) < sum(refined["flops"].values())
    assert plain == estimated(method=DistillationSettings(uniformity=1.0))[0]
    assert plain == estimated(method=DistillationSettings)[0]
    _, out = estimated(recipe=None, method="ph_reg", teacher_views=3)
    assert "teacher, shifted views" in out and "before L_scd" not in out


def test_accumulation_takes_as_many_steps_of_the_tower(estimated):
    plain, _ = estimated(images=320)
    more, _ = estimated(images=320, gradient_accumulation_steps=2)
    assert more["steps"] == plain["steps"] / 2
    assert more["run_seconds"] == pytest.approx(plain["run_seconds"], rel=0.05)


def test_before_the_last_term_there_is_no_relation_pass(estimated):
    first, _ = estimated(max_steps=10, scd_start=1.0)
    whole, _ = estimated(max_steps=10, scd_start=0.0)
    assert whole["run_seconds"] == pytest.approx(10 * whole["seconds_a_step"])
    assert first["run_seconds"] < 0.8 * whole["run_seconds"]


def test_recomputation_keeps_less(estimated):
    batch = {"per_device_train_batch_size": 64}
    kept, _ = estimated(**batch)
    freed, out = estimated(**batch, gradient_checkpointing=True)
    assert freed["peak_bytes"] < kept["peak_bytes"]
    assert "recomputation" in out


def test_what_does_not_fit_is_said_with_a_remedy(estimated, monkeypatch):
    small = Device("l4", 1e12, 1e12, 1e12, 1e12, 1e6, 1e9)
    monkeypatch.setitem(GPUS, "l4", small)
    _, out = estimated(gpu="l4")
    assert "does not fit: --gradient_checkpointing true" in out
    _, out = estimated(gpu="l4", gradient_checkpointing=True)
    assert "does not fit: --no_grad_batch 1" in out
    assert "does not fit" not in estimated()[1]


def test_float8_speeds_up_what_has_no_gradient(estimated):
    plain, _ = estimated(gpu="h200")
    faster, out = estimated(gpu="h200", teacher_float8=True)
    assert 0.6 < faster["seconds_a_step"] / plain["seconds_a_step"] < 1
    assert faster["flops"] == plain["flops"]
    assert faster["memory"]["float8 copy of the frozen layers"] > 0


def test_a_quantised_base_is_smaller(estimated):
    sizes = [estimated(base_quantization=kind)[0] for kind in ("nf4", "int8", None)]
    sizes = [size["memory"]["frozen base"] for size in sizes]
    assert sizes == sorted(sizes) and sizes[0] < 0.6 * sizes[2]


def test_this_machine_counts_in_float32_and_its_own_rate(estimated):
    _, out = estimated(gpu="cpu", per_device_train_batch_size=2)
    assert "float32;" in out.splitlines()[0] and "measured rates" in out
    assert find_device("cpu").float32 > 1e8


def test_mixed_precision_is_what_was_set_else_that_of_the_device(config_folder):
    options = {"image_size": 32, "per_device_train_batch_size": 2}

    def precision(**more):
        return estimate(config_folder, **more).precision

    assert precision(**options) == "bf16"
    assert precision(**options, bf16=False) == "float32"
    assert precision(recipe=load_recipe(**options, **FOLDER)) == "bf16"
    assert precision(recipe=load_recipe(**options, **FOLDER, bf16=False)) == "float32"
    assert precision(args=UniRefinerArguments(**options, **FOLDER)) == "float32"
    args = UniRefinerArguments(**options, **FOLDER, bf16=True)
    assert precision(args=args) == "bf16"


FOLDER = {"output_dir": "unused", "use_cpu": True}


def test_tensor_cores_for_float32_shorten_the_losses(config_folder, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {config_folder}\nimage_size: 32\ntf32: true\n")
    enabled = torch.backends.cuda.matmul.allow_tf32
    told = estimate(recipe=file)
    assert told.seconds < estimate(recipe=file, tf32=False).seconds
    assert told.seconds == estimate(recipe=recipe_elsewhere(file, {})).seconds
    assert torch.backends.cuda.matmul.allow_tf32 == enabled
    with pytest.raises(UniRefinerError, match="tf32 is 'perhaps'"):
        recipe_elsewhere(file, {"tf32": ["perhaps"]})


def test_the_machine_of_the_run_is_not_needed(config_folder, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("image_size: 32\nbf16: true\ndeepspeed: nowhere.json\nfsdp: x\n")
    assert estimate(config_folder, recipe=file).precision == "bf16"


def test_arguments_are_never_changed(config_folder):
    args = UniRefinerArguments(
        **FOLDER, image_size=32, max_steps=7, per_device_train_batch_size=2
    )
    settings = UniRefinerSettings(num_crops=2)
    before = copy.deepcopy(args.to_dict()), copy.deepcopy(settings)
    found = estimate(config_folder, args, settings)
    assert (args.to_dict(), settings) == before
    assert found.steps == 7 and found.batch == 2
    assert found.cost.images["teacher, composites"] == 2 * 2
    assert estimate(config_folder, args, num_crops=2).to_dict() == found.to_dict()
    recipe = load_recipe(**FOLDER, image_size=32, max_images=64)
    before = copy.deepcopy(recipe.args.to_dict())
    assert estimate(config_folder, recipe=recipe).steps == 8
    assert recipe.args.to_dict() == before


def test_the_images_of_the_run_are_those_it_would_take(estimated):
    assert estimated(max_images=64)[0]["steps"] == 8
    assert estimated(max_images=64, images=32)[0]["steps"] == 4


@pytest.mark.parametrize("family", ["dinov2", "clip_vision_model"])
def test_a_model_in_memory_is_its_config(family, tmp_path):
    tower = make_tiny_tower(family)
    tower.config.save_pretrained(tmp_path / family)
    options = {"image_size": 32, "per_device_train_batch_size": 2}
    there = estimate(tmp_path / family, **options).to_dict()
    there["model"] = f"{family}-in-memory"
    assert estimate(tower, **options).to_dict() == there
    normed = family == "clip_vision_model"
    model = UniRefinerModel.from_tower(tower, final_norm=normed)
    there["model"] = "unirefiner-in-memory"
    assert estimate(model, **options).to_dict() == there
    assert all(p.device.type == "cpu" for p in tower.parameters())
    tower.set_attn_implementation("eager")
    eager = estimate(tower, **options).to_dict()
    assert eager["peak_bytes"] > there["peak_bytes"]


def test_a_model_in_memory_that_cannot_be_refined_is_refused():
    tower = make_tiny_tower("dinov2")
    with pytest.raises(UniRefinerError, match="keep_text .* model is in memory"):
        estimate(tower, keep_text=True)
    model = UniRefinerModel.from_tower(tower, num_register_tokens=2)
    with pytest.raises(UniRefinerError, match="2 register tokens"):
        estimate(model)
    model = UniRefinerModel.from_tower(tower)
    model.tower = add_adapter(tower)
    with pytest.raises(UniRefinerError, match="merge its adapter"):
        estimate(model)
    with pytest.raises(UniRefinerError, match="model is a dict"):
        estimate({})


LOADED = load_recipe(**FOLDER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h1000"}, "gpu is 'h1000'; known are b200, h200"),
        ({"gpus": 0}, "gpus is 0"),
        ({"images": 0}, "images is 0"),
        ({"strategy": "fsdp"}, "strategy is 'fsdp'; use ddp, zero2, zero3"),
        ({"teacher_float8": True, "gpu": "a100"}, "a100 has no float8 products"),
        (
            {"teacher_float8": True, "base_quantization": "nf4"},
            "must be false where base_quantization is set",
        ),
        (
            {"base_quantization": "nf4", "gpus": 2, "strategy": "zero3"},
            "does not go with zero3",
        ),
        ({"efficiency": 40.0}, "efficiency is 40.0"),
        ({"image_size": 33}, "does not divide into patches of 4"),
        ({"lora_rnk": 4}, "did you mean 'lora_rank'"),
        ({"method": "unirefine"}, "Did you mean 'unirefiner'"),
        (
            {"method": "ph_reg", "num_crops": 2},
            "num_crops is no setting of method ph_r",
        ),
        ({"method": "ph_reg", "lora_rank": 4}, "does not go with method ph_reg"),
        (
            {"method": PHRegSettings(), "teacher_views": 2},
            "teacher_views is given twice",
        ),
        ({"recipe": LOADED, "lora_rank": 4}, "lora_rank is given twice"),
        ({"recipe": LOADED, "method": "ph_reg"}, "method is given twice"),
        ({"args": LOADED.args, "lora_rank": 4}, "lora_rank is given twice"),
        ({"args": LOADED.args, "recipe": LOADED}, "args and recipe both"),
        ({"args": {"lora_rank": 4}}, "args is a dict"),
        ({"model": None}, "model is missing"),
    ],
)
def test_bad_values_are_said(options, message, config_folder):
    with pytest.raises(UniRefinerError, match=message):
        estimate(**{"model": config_folder, **options})


@pytest.mark.parametrize("name", GPUS)
def test_rates_of_the_table_are_ordered(name):
    device = GPUS[name]
    assert device.float8 == 0 or device.float8 >= 1.9 * device.bfloat16
    assert device.bfloat16 >= device.tf32 >= device.float32
    assert 20e9 < device.memory < 200e9
