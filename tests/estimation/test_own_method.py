"""A method of one's own, as in one file: the estimate tells its parts by its scopes."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional
from torch.profiler import record_function

from tests.conftest import make_tiny_tower
from unirefiner_hf import estimate
from unirefiner_hf.estimation import dry_run
from unirefiner_hf.methods.objective import STUDENT, Objective
from unirefiner_hf.methods.registry import METHODS
from unirefiner_hf.methods.settings import MethodSettings

OLD, COMPARING, UNDER = "teacher, mirrored", "comparing", "what the target is made of"


@dataclass
class ToySettings(MethodSettings):
    """The student follows the mean of the teacher and its mirrored self."""

    name = "toy"
    title = "toy"
    ending = "toyed"
    mirrors: int = 1

    @classmethod
    def objective(cls):
        return Toy


class Toy(Objective):
    LOSS_TERMS = METRICS = ("loss_toy",)

    def forward(self, pixel_values, progress=1.0):
        views = [pixel_values.flip(-1)] * self.settings.mirrors
        with self.teaching(), record_function(OLD):
            target = self.encode(torch.cat(views), 0)
            with record_function(UNDER):
                target = target @ target.transpose(1, 2)
            target = self.unit(self.encode(pixel_values, 0) + target.mean())
        student = self.unit(self.model.encode(pixel_values, 0).image)
        with record_function(COMPARING):
            pairs = student @ target.transpose(1, 2)
        loss = functional.mse_loss(student, target) + pairs.mean()
        return {"loss": loss, "loss_toy": loss.detach()}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", f"{__name__}:ToySettings")


@pytest.fixture(scope="module")
def tower():
    return make_tiny_tower("dinov2")


def estimated(tower, **options):
    options = {"image_size": 32, "per_device_train_batch_size": 2, **options}
    return estimate(tower, method="toy", **options)


def test_its_parts_have_its_names(tower, toy):
    found = estimated(tower, mirrors=3)
    cost, other = found.cost, dry_run.OTHER
    # 8 x 8 patches and a class token; the student's pass is in no scope.
    assert cost.images == {OLD: 8, other: 2}
    assert cost.tokens == {OLD: 8 * 65, other: 2 * 65}
    assert cost.tokens_without_gradient == {OLD: 8 * 65}
    assert cost.parts == [OLD, UNDER, COMPARING, dry_run.BACKWARD, other]
    # An inner scope counts apart, and the outer one goes on behind it.
    assert sum(cost.flops[UNDER].values()) == 2 * 6 * 64 * 64 * 32
    assert sum(cost.flops[COMPARING].values()) == 2 * 2 * 64 * 64 * 32
    assert sum(cost.flops[OLD].values()) == 4 * sum(cost.flops[other].values()) - (
        4 * adapter_flops(tower)
    )
    assert STUDENT not in str(found)
    for part in (OLD, UNDER, COMPARING, other):
        assert part in str(found)
    assert "before L_scd" not in str(found)


def adapter_flops(tower):
    """Of two images: what the adapter, off in the teacher, costs the student."""
    linears = [m for m in tower.encoder.modules() if isinstance(m, torch.nn.Linear)]
    return sum(2 * 2 * 65 * 8 * (m.in_features + m.out_features) for m in linears)


def test_its_passes_without_gradient_gain_by_float8(tower, toy):
    plain, faster = estimated(tower), estimated(tower, teacher_float8=True)
    assert faster.seconds < plain.seconds
    assert faster.cost.flops == plain.cost.flops


def test_a_pass_that_is_repeated_is_no_part_of_its_own(tower, toy):
    kept = estimated(tower)
    freed = estimated(tower, gradient_checkpointing=True)
    assert freed.cost.images == kept.cost.images
    assert dry_run.RECOMPUTATION in freed.cost.parts
    del freed.cost.flops[dry_run.RECOMPUTATION]
    assert freed.cost.flops == kept.cost.flops
