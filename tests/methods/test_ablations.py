"""Each ablation of the paper is one option and changes what it names, nothing else."""

import pytest
import torch

from tests.methods.conftest import make_objective
from unirefiner_hf.methods.unirefiner.objective import FILTERS, UniRefiner

TERMS = set(UniRefiner.LOSS_TERMS)
REST = {"theta", "clean_ratio", *FILTERS}


def step(**settings):
    """One step at fixed draws; the settings split the tokens of random images.

    The last part of the outputs is the gradient of every adapter weight.
    """
    settings = {"fpgp_sigma": 0.5, "detector_cosine": 0.3, **settings}
    objective = make_objective(**settings)
    torch.manual_seed(2)
    pixels = torch.randn(2, 3, 24, 24)
    outputs = objective(pixels)
    outputs["loss"].backward()
    gradients = {
        n: p.grad.clone() for n, p in objective.named_parameters() if p.requires_grad
    }
    return {n: v.item() for n, v in outputs.items()}, gradients


@pytest.fixture(scope="module")
def full():
    return step()


def changed(outputs, other):
    assert outputs.keys() == other.keys()
    return {n for n, value in outputs.items() if value != other[n]}


@pytest.mark.parametrize(
    ("option", "term", "weight"),
    [("uni_weight", "loss_uni", 1.0), ("spurious_weight", "loss_spu", 0.1)],
)
def test_a_loss_without_weight_changes_the_sum_and_the_gradient_only(
    full, option, term, weight
):
    outputs, gradients = step(**{option: 0.0})
    assert changed(full[0], outputs) == {"loss"}
    gone = full[0]["loss"] - outputs["loss"]
    assert gone == pytest.approx(weight * full[0][term], abs=1e-5)
    assert any(not gradients[name].equal(full[1][name]) for name in gradients)
    alone, _ = step(uni_weight=0.0, spurious_weight=0.0, scd_weight=0.0)
    assert alone["loss"] == pytest.approx(alone["loss_regu"], abs=1e-6)


def test_without_the_fpgp_filter_only_its_shares_are_missing(full):
    outputs, _ = step(fpgp_filter=False)
    gone = {"rejected_fpgp_reference", "rejected_fpgp_strip"}
    assert full[0].keys() - outputs.keys() == gone
    assert outputs["rejected_detectors"] == full[0]["rejected_detectors"] > 0
    assert outputs["clean_ratio"] > full[0]["clean_ratio"]
    # What does not read the mask: the draws, and with them the views, stayed the same.
    assert outputs["loss_uni"] == full[0]["loss_uni"]
    assert outputs["loss_scd"] == full[0]["loss_scd"]


def test_without_the_detectors_only_their_share_is_missing(full):
    outputs, _ = step(detector_filter=False)
    assert full[0].keys() - outputs.keys() == {"rejected_detectors"}
    for name in ("rejected_fpgp_reference", "rejected_fpgp_strip"):
        assert outputs[name] == full[0][name] > 0
    assert outputs["clean_ratio"] > full[0]["clean_ratio"]
    assert outputs["loss_uni"] == full[0]["loss_uni"]
    assert outputs["loss_scd"] == full[0]["loss_scd"]


def test_without_attention_flow_only_its_share_is_missing(full):
    outputs, _ = step(ah_layers=None)
    assert full[0].keys() - outputs.keys() == {"rejected_ah"}
    others = {n for n in FILTERS if n in outputs}
    assert all(outputs[name] == full[0][name] for name in others)
    assert full[0]["rejected_ah"] > 0
    assert outputs["clean_ratio"] - full[0]["clean_ratio"] == pytest.approx(
        full[0]["rejected_ah"], abs=1e-6
    )


def test_the_papers_attention_flow_changes_its_own_filter_only(full):
    outputs, _ = step(ah_form="paper")
    different = changed(full[0], outputs)
    # As many tokens may fall as before; which ones shows in theta.
    assert "theta" in different
    assert not different & {"loss_uni", "loss_scd", *FILTERS} - {"rejected_ah"}


def test_without_any_filter_every_token_is_a_target(full):
    outputs, _ = step(fpgp_filter=False, detector_filter=False, ah_layers=None)
    assert outputs["clean_ratio"] == 1
    assert not outputs.keys() & set(FILTERS)
    assert outputs.keys() >= TERMS


def test_a_learnable_frame_adds_one_patch_of_pixels_and_starts_as_the_zero_frame(full):
    outputs, gradients = step(fill="learnable")
    assert changed(full[0], outputs) == set()
    added = gradients.keys() - full[1].keys()
    assert added == {"model.register_patch"}
    assert gradients["model.register_patch"].abs().sum() > 0
