"""Compiled layers: the same losses, few graphs, no break."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.methods.conftest import make_objective
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.training.arguments import UniRefinerArguments
from unirefiner_hf.training.compiled import compile_layers


def losses(step, count=2):
    """Loss and gradient of a few steps, each with its own draws."""
    found = []
    for number in range(count):
        torch.manual_seed(number)
        loss = step(torch.randn(2 + number, 3, 24, 24), progress=1.0)["loss"]
        loss.backward()
        gradient = sum(p.grad.abs().sum() for p in step.parameters() if p.requires_grad)
        found += [loss.item(), gradient.item()]
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_give_the_same_losses_from_few_graphs(checkpointing):
    def build():
        step = make_objective("dinov2", ah_layers=[0, 1])
        if checkpointing:
            step.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        return step

    expected = losses(build())
    torch._dynamo.reset()
    counters.clear()
    step = build()
    compile_layers(step.model, backend="aot_eager")
    assert losses(step) == pytest.approx(expected, rel=1e-5)
    assert not counters["graph_break"]
    # Adapter on or off, with gradient or without, one size or any: far from 2 layers x
    # passes x steps, and nothing fell back.
    assert counters["frames"]["ok"] == counters["frames"]["total"] <= 6
    assert counters["stats"]["unique_graphs"] <= 6


def test_torch_compile_of_the_whole_is_refused(tmp_path):
    for option in ({"torch_compile": True}, {"torch_compile_backend": "inductor"}):
        with pytest.raises(UniRefinerError, match="use compile_layers"):
            UniRefinerArguments(output_dir=str(tmp_path), **option)
