"""The control: no frame, no filter, everything else of the objective."""

import pytest
import torch

from tests.methods.conftest import make_objective
from unirefiner_hf.methods.distillation.objective import Distillation
from unirefiner_hf.methods.distillation.settings import DistillationSettings
from unirefiner_hf.methods.registry import setting_names


@pytest.fixture
def plain():
    """A baseline objective on the tiny tower, in place of the refining one."""

    def make(**settings):
        model = make_objective().model
        return Distillation(model, DistillationSettings(**settings)).train()

    return make


def test_gradients_reach_the_adapter_alone(plain):
    objective = plain()
    torch.manual_seed(0)
    outputs = objective(torch.randn(2, 3, 24, 24))
    assert set(outputs) == {"loss", "loss_regu", "loss_scd", "theta", "clean_ratio"}
    assert outputs["clean_ratio"] == 1
    outputs["loss"].backward()
    reached = {n for n, p in objective.named_parameters() if p.grad is not None}
    assert reached and all("lora_" in name for name in reached)


def test_the_loss_is_the_sum_of_its_terms(plain):
    objective = plain()
    torch.manual_seed(0)
    outputs = objective(torch.randn(2, 3, 24, 24))
    total = outputs["loss_regu"] + 0.4 * outputs["loss_scd"]
    assert outputs["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    early = objective(torch.randn(2, 3, 24, 24), progress=0.0)
    assert "loss_scd" not in early


def test_every_setting_is_read(plain):
    objective = plain()
    read = set()

    class Watched(DistillationSettings):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    objective.settings = Watched(**vars(objective.settings))
    read.clear()
    objective(torch.randn(1, 3, 24, 24))
    assert objective.looks_for_lazy_channels
    names = set(setting_names(DistillationSettings))
    assert read & names == names


def test_no_pass_has_a_frame_or_reads_the_attention(plain, monkeypatch):
    objective = plain()
    calls = []
    encode = objective.model.encode

    def watched(pixel_values, register_width=0, query_key_layers=()):
        calls.append((register_width, tuple(query_key_layers), pixel_values.shape[-2:]))
        return encode(pixel_values, register_width, query_key_layers)

    monkeypatch.setattr(objective.model, "encode", watched)
    objective(torch.randn(2, 3, 24, 24))
    # Full images and 6 crops of the teacher (2 at a time), student, 6 crops again.
    assert calls == [(0, (), (24, 24))] * (1 + 3 + 1 + 3)
    assert objective.register_width(512, 512) == 0


def test_an_unchanged_student_meets_its_teacher(plain):
    """With the adapter neutral and every target its own token, the pull is at its best."""
    objective = plain(match_to_full_image=False, uniformity=0.0, scd_weight=0.0)
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    crop_all = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]).expand(2, 3, 4)
    from unirefiner_hf.methods.distillation import objective as module

    original = module.views.propose_crops
    module.views.propose_crops = lambda *_: crop_all
    try:
        outputs = objective(torch.randn(2, 3, 24, 24))
    finally:
        module.views.propose_crops = original
    assert outputs["loss"].item() == pytest.approx(-1 / 0.2, abs=1e-3)
