"""Recipes are flat YAML; types come from the dataclasses; errors say what to do."""

import dataclasses
import re
import shlex

import pytest
import yaml

from unirefiner_hf.cli.refine import DATACLASSES
from unirefiner_hf.resources import find_recipe, recipe_names, resource_folder
from unirefiner_hf.training.arguments import (
    DataArguments,
    ModelArguments,
    RefineTrainingArguments,
    scaled_learning_rate,
)
from unirefiner_hf.training.recipe import (
    RecipeError,
    build_arguments,
    expected_values,
    field_types,
    load_recipe,
    read_recipe,
)

TRAINING_RECIPES = [n for n in recipe_names() if not n.startswith("accelerate/")]

# Section 4 of UniRefiner: size, r_reg, fill, AH layers, u, batch, last norm.
PUBLISHED = {
    "dinov2/giant": (518, 37, "zero", None, 0.3, 8, None),
    "siglip2/so400m-patch16-512": (512, 32, "zero", [10, 15], 0.3, 16, None),
    "siglip2/giant-opt-patch16-384": (512, 32, "zero", [20, 25], 1.0, 8, None),
    "clip/vit-g-14-laion2b": (448, 32, "randn", None, 0.3, 8, True),
    "eva-clip/8b-448": (448, 32, "zero", [10, 15], 1.0, 2, False),
    "internvit/6b-224": (448, 32, "zero", [29, 31], 1.0, 2, None),
    "rice-vit/large-patch14-560": (560, 32, "zero", [9, 11], 0.3, 16, None),
}
NEEDED = {"model": ["tower"], "data": ["photos"], "output_dir": ["run"]}


def build(text, tmp_path, **options):
    """Instances from YAML text and options, with the required keys given."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    values = load_recipe(path, options, DATACLASSES)
    return build_arguments({**NEEDED, **values}, DATACLASSES)


def refusal(text, tmp_path, **options):
    with pytest.raises(ValueError) as caught:
        build(text, tmp_path, **options)
    return str(caught.value)


# Every shipped recipe


@pytest.mark.parametrize("name", TRAINING_RECIPES)
def test_every_recipe_is_valid_and_its_launch_command_runs_it(name):
    path = find_recipe(name)
    command = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    launch = ["unirefiner", "refine", "--config", name, "--data", "path/to/images"]
    demo = ["unirefiner", "demo", "--output", "demo_out"]
    assert command == (demo if name == "demo" else launch)
    assert "# memory: " in path.read_text()
    values = load_recipe(path, {"data": ["path/to/images"]}, DATACLASSES)
    model, data, method, training = build_arguments(values, DATACLASSES)
    assert data.data == "path/to/images"
    assert training.output_dir.startswith("runs/")
    patch = re.search(r"patch-?(\d+)|-g-(14)|dinov3-vit[a-z](\d+)", model.model)
    side = int(next(filter(None, patch.groups()))) if patch else 14
    assert model.image_size % side == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    values = load_recipe(find_recipe(name), {"data": ["x"]}, DATACLASSES)
    model, _, method, training = build_arguments(values, DATACLASSES)
    assert PUBLISHED[name] == (
        model.image_size,
        model.register_factor,
        model.register_fill,
        method.ah_layers,
        method.uniformity,
        training.per_device_train_batch_size,
        model.final_norm,
    )
    assert (model.lora_rank, model.lora_alpha, model.lora_dropout) == (8, 16, 0.1)
    assert (training.learning_rate, training.weight_decay) == (1e-4, 0.1)
    assert (training.num_train_epochs, training.lr_scheduler_type) == (2, "constant")


def test_ph_reg_has_its_own_published_numbers():
    path = find_recipe("dinov2/small_ph_reg")
    values = load_recipe(path, {"data": ["x"]}, DATACLASSES)
    model, _, method, training = build_arguments(values, DATACLASSES)
    assert (method.method, model.image_size) == ("ph_reg", 518)
    assert (method.register_tokens, method.teacher_views) == (16, 10)
    assert (method.teacher_offsets, method.teacher_shift) == (100, 0.15)
    assert (method.teacher_flip, method.mse_weight) == (0.5, 1.0)
    assert (training.learning_rate, training.weight_decay) == (1e-4, 1e-2)
    assert not training.scale_learning_rate and training.final_lr_share == 0.05
    assert training.per_device_train_batch_size == 8


def test_only_eva_clip_keeps_the_crop_as_its_target():
    for name in PUBLISHED:
        values = load_recipe(find_recipe(name), {"data": ["x"]}, DATACLASSES)
        _, _, method, _ = build_arguments(values, DATACLASSES)
        assert method.match_to_full_image == (name != "eva-clip/8b-448")


@pytest.mark.parametrize("name", ["accelerate/single", "accelerate/ddp"])
def test_accelerate_configs_load(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = find_recipe(name)
    config = load_config_from_file(str(path))
    processes = {"accelerate/single": 1, "accelerate/ddp": 2}
    assert config.num_processes == processes[name]
    command = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    assert command[:3] == ["accelerate", "launch", "--config_file"]
    assert command[3] == path.relative_to(resource_folder("recipes").parent).as_posix()


def test_a_recipe_is_found_by_path_and_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: x")
    assert find_recipe(str(path)) == path
    assert find_recipe("dinov2/small") == find_recipe("dinov2/small.yaml")
    with pytest.raises(FileNotFoundError, match="Near: dinov2/small"):
        find_recipe("dinov2/smal")


# Fields


def test_no_field_stands_in_two_dataclasses():
    fields = field_types(DATACLASSES)
    assert len(fields) > 150
    assert not {"config", "verb", "traceback", "help"} & fields.keys()

    @dataclasses.dataclass
    class Again:
        model: str = "x"

    with pytest.raises(RecipeError, match="'model'"):
        field_types((*DATACLASSES, Again))


def test_every_own_field_is_explained():
    for dataclass_type in DATACLASSES:
        for field in dataclasses.fields(dataclass_type):
            assert field.metadata.get("help") or not field.init, field.name
    assert expected_values(DATACLASSES)["ah_layers"] == "list[int] or null"
    assert expected_values(DATACLASSES)["ah_form"] == "'release' or 'paper'"


# Types


@pytest.mark.parametrize(
    ("text", "part", "name", "value"),
    [
        ("learning_rate: 1e-4", 3, "learning_rate", 1e-4),
        ("learning_rate: 3", 3, "learning_rate", 3.0),
        ("max_steps: 7", 3, "max_steps", 7),
        ("lazy_channels: false", 2, "lazy_channels", False),
        ("lazy_channels: no", 2, "lazy_channels", False),
        ("resume: yes", 3, "resume", True),
        ("save_strategy: no", 3, "save_strategy", "no"),
        ("revision: 0123", 0, "revision", "0123"),
        ("revision: 1e3", 0, "revision", "1e3"),
        ("revision: 2024-01-01", 0, "revision", "2024-01-01"),
        ("final_norm: null", 0, "final_norm", None),
        ("final_norm: false", 0, "final_norm", False),
        ("save_total_limit: null", 3, "save_total_limit", None),
        ("save_total_limit: ~", 3, "save_total_limit", None),
        ("ah_layers: [10, 15]", 2, "ah_layers", [10, 15]),
        ("ah_layers:\n- 10\n- 15", 2, "ah_layers", [10, 15]),
        ("ah_layers:", 2, "ah_layers", None),
        ("report_to: tensorboard", 3, "report_to", ["tensorboard"]),
        ("report_to: [tensorboard, wandb]", 3, "report_to", ["tensorboard", "wandb"]),
        ("report_to: none", 3, "report_to", []),
        (
            "lr_scheduler_kwargs: {min_lr: 1e-5, flag: true}",
            3,
            "lr_scheduler_kwargs",
            {"min_lr": 1e-5, "flag": True},
        ),
        ("data_split: '--odd'", 1, "data_split", "--odd"),
        ("bf16: null", 3, "bf16", False),
        ("", 3, "learning_rate", 1e-4),
    ],
)
def test_types_come_from_the_fields(text, part, name, value, tmp_path):
    got = getattr(build(text, tmp_path)[part], name)
    assert got == value
    assert type(got) is type(value) or isinstance(got, str)


def test_options_go_over_the_recipe(tmp_path):
    text = "learning_rate: 1e-3\nah_layers: [1, 2]\nlora_rank: 4\nlazy_channels: true"
    options = {
        "learning_rate": ["2e-3"],
        "ah_layers": ["null"],
        "lazy_channels": ["false"],
        "resume": [],
    }
    model, _, method, training = build(text, tmp_path, **options)
    assert training.learning_rate == 2e-3
    assert method.ah_layers is None
    assert method.lazy_channels is False
    assert model.lora_rank == 4
    assert training.resume is True


# Refusals


def test_unknown_keys_are_refused_with_the_nearest(tmp_path):
    message = refusal("lora_rnk: 4", tmp_path)
    assert "recipe.yaml: unknown key 'lora_rnk'; did you mean 'lora_rank'?" in message
    message = refusal("lora_rank: 4", tmp_path, learnin_rate=["1"])
    assert "unknown key 'learnin_rate'; did you mean 'learning_rate'?" in message
    assert "recipe.yaml" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rank: four", "lora_rank is 'four'; expected int."),
        ("lora_rank: 4.0", "lora_rank is '4.0'; expected int."),
        ("lora_rank: null", "lora_rank is null; expected int."),
        ("lora_rank: [1, 2]", "lora_rank is 1 2; expected int."),
        ("lazy_channels: perhaps", "lazy_channels is 'perhaps'; expected bool."),
        ("ah_layers: [1, x]", "ah_layers is '1 x'; expected list[int] or null."),
        ("ah_layers: []", "ah_layers is without a value; expected list[int] or null."),
        ("ah_form: both", "ah_form is 'both'; expected 'release' or 'paper'."),
        ("register_fill: red", "register_fill is 'red'; expected 'zero' or 'randn'"),
        ("temperature: -1", "temperature is -1.0; it must be positive."),
        ("lora_dropout: 1", "lora_dropout is 1.0; it must be in [0, 1)."),
        ("max_images: 0", "max_images is 0; it must be at least 1, or unset."),
        ("remove_unused_columns: true", "remove_unused_columns is True"),
        ("fp16: true", "fp16 is not supported"),
        ("output_dir: null", "output_dir is not set"),
        ("model: x\nmodel: y", "line 2: 'model' stands there twice"),
        ("- model", "has to be a mapping"),
        ("model: [", "not valid YAML"),
    ],
)
def test_errors_name_key_value_and_what_was_expected(text, message, tmp_path):
    assert message in refusal(text, tmp_path)


def test_a_missing_required_key_is_named():
    with pytest.raises(RecipeError, match="^data is missing .str.: .*--data"):
        build_arguments({"model": ["x"], "output_dir": ["y"]}, DATACLASSES)


def test_reading_leaves_words_alone(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("a: 1e-4\nb: no\nc:\nd: [1, null]\ne: {f: 010}\n")
    expected = {
        "a": ["1e-4"],
        "b": ["no"],
        "c": None,
        "d": ["1", "null"],
        "e": ['{"f": 8}'],
    }
    assert read_recipe(path) == expected
    assert yaml.safe_load(path.read_text())["a"] == "1e-4"


# Arguments


def test_learning_rate_is_linear_in_the_batch():
    assert scaled_learning_rate(1e-4, 16) == 1e-4
    assert scaled_learning_rate(1e-4, 8) == 5e-5
    assert scaled_learning_rate(2e-4, 64) == pytest.approx(8e-4)


def test_defaults_are_safe():
    training = RefineTrainingArguments(output_dir="run", use_cpu=True)
    assert training.bf16 is False
    assert training.report_to == []
    assert training.remove_unused_columns is False
    assert ModelArguments(model="x").trust_remote_code is False
    assert DataArguments(data="x").data_split == "train"
