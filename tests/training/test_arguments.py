"""Every field of a run's arguments is honoured or refused."""

from __future__ import annotations

import dataclasses
import math

import pytest

from unirefiner_hf.errors import UniRefinerError
from unirefiner_hf.training.arguments import UniRefinerArguments
from unirefiner_hf.training.refused import REFUSED

FIELDS = {field.name: field for field in dataclasses.fields(UniRefinerArguments)}


def arguments(**fields):
    return UniRefinerArguments("run", use_cpu=True, **fields)


def another(field):
    """A value that is not the default."""
    default = field.default
    if isinstance(default, bool):
        return not default
    return {"eval_strategy": "steps", "include_for_metrics": ["loss"]}.get(
        field.name, 3
    )


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_run_reads_is_refused_with_a_reason(name):
    value = another(FIELDS[name])
    with pytest.raises(UniRefinerError) as caught:
        arguments(**{name: value})
    start = f"{name} is {value!r}, which is not supported: "
    assert str(caught.value) == f"{start}{REFUSED[name]}."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1, or -1"),
        ({"max_steps": -2}, "max_steps is -2"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0; it must be finite and pos"),
        ({"num_train_epochs": -1}, "num_train_epochs is -1"),
        ({"num_train_epochs": math.inf}, "num_train_epochs is inf"),
        ({"learning_rate": 0}, "learning_rate is 0; it must be finite and positive"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001"),
        ({"save_strategy": "best"}, "save_strategy is 'best'; it must be no, steps or"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is"),
        ({"final_lr_share": 0}, "final_lr_share is 0"),
        ({"snapshot_steps": -1}, "snapshot_steps is -1"),
        ({"push_to_hub": True}, "push_to_hub needs hub_model_id"),
        ({"warmup_steps": -1}, "warmup_steps is -1; it must be 0 or more"),
        ({"lr_scheduler_type": "wild"}, "arguments of the run: wild is not a valid"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(UniRefinerError) as caught:
        arguments(**fields)
    assert str(caught.value).startswith(message)


def test_no_folder_is_refused():
    with pytest.raises(UniRefinerError, match="output_dir is not set"):
        UniRefinerArguments(use_cpu=True)


def test_defaults_are_safe_and_pass_again():
    made = arguments(lr_scheduler_type="linear", report_to="tensorboard")
    again = dataclasses.replace(made)
    assert again.to_dict() == made.to_dict()
    assert made.bf16 is False and arguments().report_to == []
    assert made.remove_unused_columns is False and made.trust_remote_code is False
    assert arguments(max_steps=-1, save_strategy="no").max_steps == -1
    assert arguments(train_sampling_strategy="sequential").max_steps == -1


def test_learning_rate_is_linear_in_the_batch():
    made = arguments(learning_rate=2e-4)
    assert made.scaled_learning_rate(16) == 2e-4
    assert made.scaled_learning_rate(8) == 1e-4
    assert made.scaled_learning_rate(64) == pytest.approx(8e-4)
    assert arguments(scale_learning_rate=False).scaled_learning_rate(64) == 1e-4
