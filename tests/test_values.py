"""Any value of any setting is honoured or refused by name: never dropped, never a traceback."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from unirefiner_hf.data.arguments import DataArguments
from unirefiner_hf.errors import UniRefinerError
from unirefiner_hf.evaluation.arguments import EvaluationArguments
from unirefiner_hf.evaluation.settings import (
    DepthSettings,
    SegmentationSettings,
    ZeroShotSettings,
)
from unirefiner_hf.loading.arguments import BackboneArguments, both_sides
from unirefiner_hf.methods.registry import METHODS, method_named
from unirefiner_hf.training.arguments import UniRefinerArguments
from unirefiner_hf.training.fields import build_arguments, to_words
from unirefiner_hf.training.options import TrainingOptions
from unirefiner_hf.training.recipe import load_recipe, recipe_of_words
from unirefiner_hf.training.refused import BOUNDS, REFUSED
from unirefiner_hf.values import check_number, check_values, declared, in_words, within

SETTINGS = (
    *(method_named(name) for name in METHODS),
    BackboneArguments,
    DataArguments,
    EvaluationArguments,
    SegmentationSettings,
    DepthSettings,
    ZeroShotSettings,
)
OWN = (*SETTINGS, TrainingOptions)
FIELDS = [
    pytest.param(kind, field.name, id=f"{kind.__name__}.{field.name}")
    for kind in SETTINGS
    for field, *_ in declared(kind)
]
ODD = [math.nan, math.inf, -math.inf, 1e20, -1e20, 1e300, 0, -1, 10**20, -(10**20)]
ANY = st.one_of(
    st.sampled_from(ODD),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.booleans(),
    st.none(),
    st.lists(st.one_of(st.integers(), st.floats(), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=1),
)
QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def is_number(parts: tuple[Any, ...]) -> bool:
    return bool({int, float} & set(parts)) or list[int] in parts


@pytest.mark.parametrize("kind", OWN)
def test_every_number_says_its_bounds(kind):
    """A setting of tomorrow is not forgotten."""
    bare = [
        f.name for f, parts, rule in declared(kind) if is_number(parts) and not rule
    ]
    assert not bare


def test_every_number_of_the_trainer_has_bounds():
    ours = {field.name for kind in OWN for field, *_ in declared(kind)}
    numbers = {
        f.name for f, parts, _ in declared(TrainingArguments) if is_number(parts)
    }
    assert numbers - REFUSED.keys() - ours == BOUNDS.keys()


@pytest.mark.parametrize(("kind", "name"), FIELDS)
@QUICK
@given(value=ANY)
def test_a_value_is_kept_or_refused_by_name(kind, name, value):
    try:
        kept = getattr(kind(**{name: value}), name)
    except UniRefinerError as problem:
        # A field that goes with another may be the one that is named.
        first = str(problem).split(" is ")[0]
        assert first in {field.name for field, *_ in declared(kind)}, problem
        return
    if name == "image_size" and value is not None:
        sides = value if isinstance(value, list) else [value]
        assert both_sides(kept) == (sides[0], sides[-1])
    else:
        assert kept is value
    numbers = kept if isinstance(kept, list) else [kept]
    assert all(math.isfinite(n) for n in numbers if isinstance(n, float))


@QUICK
@given(name=st.sampled_from(sorted({*BOUNDS, "weight_decay", "bf16"})), value=ANY)
def test_so_is_one_of_the_trainer(name, value):
    try:
        args = UniRefinerArguments("run", use_cpu=True, **{name: value})
    except UniRefinerError as problem:
        assert name in str(problem)
        return
    assert getattr(args, name) == value or value is None


WORDS = st.one_of(
    st.sampled_from(
        ["nan", "inf", "-inf", "1e20", "-1", "0", "", "null", "true", "1_0"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.integers().map(str),
    st.floats().map(str),
)
OPTIONS = sorted(
    {
        field.name
        for kind in (method_named("unirefiner"), BackboneArguments, DataArguments)
        for field, *_ in declared(kind)
    }
    | BOUNDS.keys()
    | {field.name for field, *_ in declared(TrainingOptions)} - REFUSED.keys()
)


@settings(parent=QUICK, max_examples=120)
@given(name=st.sampled_from(OPTIONS), words=st.lists(WORDS, min_size=1, max_size=2))
def test_words_of_a_command_line_are_read_or_refused(name, words):
    places = {"output_dir": ["run"], "use_cpu": ["true"]}
    try:
        recipe = recipe_of_words(None, {**places, name: words})
    except UniRefinerError:
        return
    holder = recipe.method if hasattr(recipe.method, name) else recipe.args
    meant = build_arguments({name: words}, [_only(type(holder), name)])[0]
    kept, meant = getattr(holder, name), getattr(meant, name)
    assert kept == meant or name in ("bf16", "dataloader_num_workers")


def _only(kind: type, name: str) -> type:
    """A dataclass with one field of another, and without its checks."""
    (field, _, _) = next(entry for entry in declared(kind) if entry[0].name == name)
    from typing import get_type_hints

    default = dataclasses.field(default=None, metadata=field.metadata)
    return dataclasses.make_dataclass(
        "Only", [(name, get_type_hints(kind)[name], default)]
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fpgp_sigma", math.nan, "fpgp_sigma is nan; it must be a finite number"),
        (
            "detector_cosine",
            math.nan,
            r"detector_cosine is nan; it must be in \[-1, 1\]",
        ),
        ("ah_sigma", math.inf, "ah_sigma is inf; it must be a finite number"),
        ("uni_weight", -1.0, "uni_weight is -1.0; it must be 0 or more"),
        ("scd_weight", -0.1, "scd_weight is -0.1; it must be 0 or more"),
        ("uniformity", math.inf, "uniformity is inf; it must be 0 or more, and finite"),
        ("num_crops", 1.5, "num_crops is '1.5'; expected int"),
        ("ah_layers", [-1, 2], "it must be 0 or more, or unset"),
        ("inference_register_width", 10**20, r"it must be in \[0, 256\], or unset"),
        ("lora_alpha", math.nan, "lora_alpha is 'nan'; expected int"),
        ("per_device_train_batch_size", 0, "it must be at least 1"),
        ("gradient_accumulation_steps", 0, "it must be at least 1"),
        ("weight_decay", math.nan, "weight_decay is nan"),
        ("max_grad_norm", math.nan, "max_grad_norm is nan"),
        ("learning_rate", math.inf, "learning_rate is inf"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "measures nothing"),
        ("accelerator_config", {"foo": 1}, "unexpected keyword argument 'foo'"),
    ],
)
def test_what_means_nothing_is_refused(name, value, message):
    with pytest.raises(UniRefinerError, match=message):
        load_recipe(output_dir="run", use_cpu=True, **{name: value})


def test_load_recipe_takes_values_as_they_are():
    told = load_recipe(
        output_dir=Path("run"), use_cpu=True, fpgp_sigma=np.float32(0.25)
    )
    assert (told.args.output_dir, told.method.fpgp_sigma) == ("run", 0.25)


@dataclasses.dataclass
class Odd:
    size: Annotated[int | None, "[1, 8)"] = None
    share: float = 0.5
    sizes: Annotated[list[int] | None, "(0, inf)"] = None
    where: str | None = None


def test_numpy_and_paths_become_plain():
    odd = Odd(np.int64(3), np.float32(0.5), where=Path("a/b"))  # type: ignore[arg-type]
    check_values(odd)
    assert [type(v) for v in vars(odd).values()] == [int, float, type(None), str]
    assert odd == Odd(3, 0.5, None, "a/b")


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": 8},
        {"size": 2.0},
        {"size": True},
        {"share": math.nan},
        {"share": "0.5"},
        {"sizes": [1, 0]},
        {"sizes": (1, 2)},
        {"sizes": [1, True]},
        {"where": 3},
    ],
)
def test_kinds_and_bounds_hold(wrong):
    (name,) = wrong
    with pytest.raises(UniRefinerError, match=f"^{name} is "):
        check_values(Odd(**wrong))


def test_intervals():
    assert within(0, "[0, 1)") and not within(1, "[0, 1)") and within(1, "(0, 1]")
    assert not within(math.nan, "(-inf, inf)") and not within(math.inf, "(-inf, inf)")
    assert in_words("[1, inf)") == "at least 1" and in_words("(0, 1]") == "in (0, 1]"
    check_number("batch", 3, "[1, inf)")
    with pytest.raises(UniRefinerError, match="batch is True; it must be int"):
        check_number("batch", True, "[1, inf)")
    with pytest.raises(UniRefinerError, match="share is nan; it must be in"):
        check_number("share", math.nan, "[0, 1]", float)
    assert to_words(None) is None
