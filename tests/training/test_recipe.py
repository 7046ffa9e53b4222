"""Recipes are flat YAML; types come from the dataclasses; errors say what to do."""

import dataclasses
import re
import shlex

import pytest
import yaml

from unirefiner_hf.errors import UniRefinerError
from unirefiner_hf.methods.registry import METHODS, method_named
from unirefiner_hf.resources import find_recipe, recipe_names, resource_folder
from unirefiner_hf.training.arguments import UniRefinerArguments
from unirefiner_hf.training.fields import (
    RecipeError,
    build_arguments,
    expected_values,
    field_types,
    read_recipe,
)
from unirefiner_hf.training.recipe import load_recipe, recipe_of_words

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


def build(text, tmp_path, **options):
    """A recipe of YAML text and the words of options."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    needed = {} if "output_dir" in text else {"output_dir": ["run"]}
    return recipe_of_words(path, {**needed, **options})


def value_of(recipe, name):
    """A field of the arguments or of the method."""
    return getattr(recipe.args if hasattr(recipe.args, name) else recipe.method, name)


def refusal(text, tmp_path, **options):
    with pytest.raises(UniRefinerError) as caught:
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
    recipe = load_recipe(name, data="path/to/images")
    assert recipe.train_dataset == "path/to/images" and recipe.name == name
    assert recipe.args.output_dir.startswith("runs/")
    patch = re.search(r"patch-?(\d+)|-g-(14)|dinov3-vit[a-z](\d+)", recipe.model)
    side = int(next(filter(None, patch.groups()))) if patch else 14
    assert recipe.args.image_size % side == 0
    assert recipe.left_out == ()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    recipe = load_recipe(name)
    args, method = recipe.args, recipe.method
    assert PUBLISHED[name] == (
        args.image_size,
        args.register_factor,
        args.register_fill,
        method.ah_layers,
        method.uniformity,
        args.per_device_train_batch_size,
        args.final_norm,
    )
    assert (args.lora_rank, args.lora_alpha, args.lora_dropout) == (8, 16, 0.1)
    assert (args.learning_rate, args.weight_decay) == (1e-4, 0.1)
    assert (args.num_train_epochs, args.lr_scheduler_type) == (2, "constant")


def test_ph_reg_has_its_own_published_numbers():
    recipe = load_recipe("dinov2/small_ph_reg")
    args, method = recipe.args, recipe.method
    assert (method.name, args.image_size) == ("ph_reg", 518)
    assert (method.register_tokens, method.teacher_views) == (16, 10)
    assert (method.teacher_offsets, method.teacher_shift) == (100, 0.15)
    assert (method.teacher_flip, method.mse_weight) == (0.5, 1.0)
    assert (args.learning_rate, args.weight_decay) == (1e-4, 1e-2)
    assert not args.scale_learning_rate and args.final_lr_share == 0.05
    assert args.per_device_train_batch_size == 8


def test_only_eva_clip_keeps_the_crop_as_its_target():
    for name in PUBLISHED:
        matched = load_recipe(name).method.match_to_full_image
        assert matched == (name != "eva-clip/8b-448")


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
    for kind in (FileNotFoundError, UniRefinerError):
        with pytest.raises(kind, match="Near: dinov2/small"):
            load_recipe("dinov2/smal")


# Fields


METHOD_TYPES = [method_named(name) for name in METHODS]


@pytest.mark.parametrize("method", METHOD_TYPES)
def test_no_field_stands_in_two_dataclasses(method):
    fields = field_types((UniRefinerArguments, method))
    own = {"config", "json", "quiet", "traceback", "help", "words", "parser"}
    assert not {*own, "model", "data", "method"} & fields.keys()

    @dataclasses.dataclass
    class Again:
        image_size: int = 1

    with pytest.raises(RecipeError, match="'image_size'"):
        field_types((UniRefinerArguments, method, Again))


def test_what_a_field_takes_is_told_in_words():
    for kind in (UniRefinerArguments, *METHOD_TYPES):
        for field in dataclasses.fields(kind):
            assert field.metadata.get("help") or not field.init, field.name
    expected = expected_values([method_named("unirefiner")])
    assert expected["ah_layers"] == "list[int] or null"
    assert expected["ah_form"] == "'release' or 'paper'"


# Types


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 3", "learning_rate", 3.0),
        ("max_steps: 7", "max_steps", 7),
        ("lazy_channels: false", "lazy_channels", False),
        ("lazy_channels: no", "lazy_channels", False),
        ("resume: yes", "resume", True),
        ("save_strategy: no", "save_strategy", "no"),
        ("revision: 0123", "revision", "0123"),
        ("revision: 1e3", "revision", "1e3"),
        ("revision: 2024-01-01", "revision", "2024-01-01"),
        ("final_norm: null", "final_norm", None),
        ("final_norm: false", "final_norm", False),
        ("save_total_limit: null", "save_total_limit", None),
        ("save_total_limit: ~", "save_total_limit", None),
        ("ah_layers: [10, 15]", "ah_layers", [10, 15]),
        ("ah_layers:\n- 10\n- 15", "ah_layers", [10, 15]),
        ("ah_layers:", "ah_layers", None),
        ("report_to: tensorboard", "report_to", ["tensorboard"]),
        ("report_to: [tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("report_to: none", "report_to", []),
        (
            "lr_scheduler_kwargs: {min_lr: 1e-5, flag: true}",
            "lr_scheduler_kwargs",
            {"min_lr": 1e-5, "flag": True},
        ),
        ("data_split: '--odd'", "data_split", "--odd"),
        ("bf16: null", "bf16", False),
        ("", "learning_rate", 1e-4),
    ],
)
def test_types_come_from_the_fields(text, name, value, tmp_path):
    got = value_of(build(text, tmp_path), name)
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
    recipe = build(text, tmp_path, **options)
    assert recipe.args.learning_rate == 2e-3
    assert recipe.method.ah_layers is None
    assert recipe.method.lazy_channels is False
    assert recipe.args.lora_rank == 4
    assert recipe.args.resume is True


def test_python_values_and_words_are_the_same_recipe():
    values = {"learning_rate": 2e-3, "ah_layers": [1, 2], "final_norm": None}
    values |= {"lazy_channels": False, "lr_scheduler_kwargs": {"num_cycles": 2}}
    recipe = load_recipe("dinov2/small", data="x", **values)
    words = {"learning_rate": ["2e-3"], "ah_layers": ["1", "2"], "final_norm": ["null"]}
    words |= {"lazy_channels": [], "lr_scheduler_kwargs": ['{"num_cycles": 2}']}
    words |= {"data": ["x"], "lazy_channels": ["no"]}
    assert recipe.to_dict() == recipe_of_words("dinov2/small", words).to_dict()
    assert {name: recipe.to_dict()[name] for name in values} == values
    assert "uniformity" in recipe.to_markdown()


def test_keys_are_spelled_with_dashes_too(tmp_path):
    assert build("lora-rank: 4", tmp_path).args.lora_rank == 4
    message = refusal("lora-rank: 4\nlora_rank: 4", tmp_path)
    assert "line 2: 'lora_rank' stands there twice" in message


def test_another_method_leaves_out_what_it_does_not_read():
    recipe = load_recipe("dinov2/small", method="ph_reg")
    assert recipe.method.name == "ph_reg"
    assert {"ah_layers", "register_factor"} <= set(recipe.left_out)
    with pytest.raises(RecipeError, match="ah_layers is no setting of method ph_reg"):
        load_recipe("dinov2/small", method="ph_reg", ah_layers=[1, 2])
    with pytest.raises(RecipeError, match="ah_layers is no setting of method ph_reg"):
        load_recipe("dinov2/small_ph_reg", ah_layers=[1, 2])


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
        ("temperature: -1", "temperature is -1.0; it must be finite and positive."),
        ("lora_dropout: 1", "lora_dropout is 1.0; it must be in [0, 1)."),
        ("max_images: 0", "max_images is 0; it must be at least 1, or unset."),
        ("remove_unused_columns: true", "remove_unused_columns is True"),
        ("fp16: true", "fp16 is True, which is not supported: use bf16"),
        ("output_dir: null", "output_dir is not set"),
        ("model: [x, y]", "model is x y; expected one word."),
        ("model: x\nmodel: y", "line 2: 'model' stands there twice"),
        ("- model", "has to be a mapping"),
        ("model: [", "not valid YAML"),
        ("model: &a [x, *a]", "the value of 'model' has more than 1000 parts"),
        (
            "fsdp_config: &a {x: *a}",
            "the value of 'fsdp_config' has more than 1000 parts",
        ),
        ("model: " + "[" * 5000, "nested too deeply"),
        ("fsdp_config: {a: 2020-01-01}", "fsdp_config cannot be read"),
        ("? [a, b]\n: c", "line 1: a key has to be a word"),
        ("lora_dropout: .nan", "lora_dropout is '.nan'; expected float."),
    ],
)
def test_errors_name_key_value_and_what_was_expected(text, message, tmp_path):
    assert message in refusal(text, tmp_path)


def test_a_missing_required_key_is_named():
    @dataclasses.dataclass
    class Needing:
        side: int

    with pytest.raises(RecipeError, match="^side is missing .int.: .*--side"):
        build_arguments({}, (Needing,))


def test_aliases_that_multiply_end_at_once(tmp_path):
    lines = ["a: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"b{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match="'b2' has more than 1000 parts"):
        read_recipe(tmp_path / "recipe.yaml")


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
