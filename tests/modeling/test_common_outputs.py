"""What transformers asks of every model's hidden states and attentions, asked of ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conftest import make_tiny_tower
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.families import family_of, layers_of
from unirefiner_hf.modeling.modeling_pyramid import UniRefinerPyramid
from unirefiner_hf.modeling.modeling_unirefiner import (
    UniRefinerBackbone,
    UniRefinerModel,
)

FAMILIES = ("dinov2", "unirefiner_eva_clip_vision")
PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def make(kind: str, family: str = "dinov2") -> torch.nn.Module:
    tower = make_tiny_tower(family)
    if kind == "tower":
        return tower
    if kind == "model":
        return UniRefinerModel.from_tower(tower).eval()
    backbone = UniRefinerBackbone.from_tower(tower).eval()
    if kind == "backbone":
        return backbone
    return UniRefinerPyramid.from_refined(backbone, pyramid_size=8)


@pytest.mark.parametrize("kind", ["model", "backbone", "pyramid"])
def test_attentions_under_sdpa_are_refused(kind):
    """transformers 5.24 gives nothing there, so an error with the way out costs nothing.

    Up to version 4 a model fell back to eager attention for the call. Now its own towers
    log a warning and return an empty tuple, and a config refuses the flag with a
    ValueError. A user who indexes the empty tuple has an IndexError without a cause, so
    ours refuse at the call, in the words of the config. If the towers give maps again,
    the first assertion fails and ours should give them too.
    """
    tower = make("tower")
    assert not tower(PIXELS, output_attentions=True).attentions
    with pytest.raises(ValueError, match="eager"):
        tower.config.output_attentions = True
    model = make(kind)
    with pytest.raises(ValueError, match="eager"):
        model.config.output_attentions = True
    with pytest.raises(UniRefinerError, match=r"'sdpa'.*set_attn_implementation"):
        model(PIXELS, output_attentions=True)
    model.set_attn_implementation("eager")
    assert len(model(PIXELS, output_attentions=True).attentions) == 2


def test_attentions_under_sdpa_are_refused_by_a_tower_of_ours():
    tower = make("tower", "unirefiner_eva_clip_vision")
    with pytest.raises(UniRefinerError, match=r"'sdpa'.*set_attn_implementation"):
        tower(PIXELS, output_attentions=True)
    tower.set_attn_implementation("eager")
    maps = tower(PIXELS, output_attentions=True).attentions
    assert [each.shape for each in maps] == [(1, 2, 17, 17)] * 2


@pytest.mark.parametrize("kind", ["tower", "model", "backbone", "pyramid"])
def test_the_config_asks_and_the_call_overrules(kind, tmp_path):
    make(kind, "unirefiner_eva_clip_vision").save_pretrained(tmp_path)
    model = type(make(kind, "unirefiner_eva_clip_vision")).from_pretrained(
        tmp_path, output_attentions=True, output_hidden_states=True
    )
    assert model.config._attn_implementation == "eager"
    asked = model(PIXELS)
    assert len(asked.attentions) == 2 and len(asked.hidden_states) == 3
    plain = model(PIXELS, output_attentions=False, output_hidden_states=False)
    assert plain.attentions is None and plain.hidden_states is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["model", "backbone", "pyramid"])
def test_every_output_passes_gradients_back(family, kind):
    model = make(kind, family)
    model.set_attn_implementation("eager")
    output = model(PIXELS, output_hidden_states=True, output_attentions=True)
    weight = next(model.get_input_embeddings().parameters())
    for each in (*output.hidden_states, *output.attentions):
        (gradient,) = torch.autograd.grad(
            each.square().sum(), weight, retain_graph=True
        )
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_the_tokens_of_a_layer(family):
    """``retain_grad`` on our hidden states stays None, unlike on those of transformers.

    Its suite (``test_retain_grad_hidden_states_attentions``) wants a gradient of the
    output at ``hidden_states[0]`` and ``attentions[0]``. There these are the very
    tensors the next layer reads. Ours are the image's part of them: the frame and the
    prefix tokens are cut off, and the next layer needs those as well. To have it read
    the cropped tensor each layer would have to be given a sequence sewn together again,
    another graph and a copy a layer for a use that a hook serves. So this is not
    mended, it is said in `UniRefinerOutput`, and shown here: a hook has the whole
    sequence, and what follows the last crop is computed from it.
    """
    model = make("model", family)
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, output: Tensor | tuple) -> None:
        tokens = output[0] if isinstance(output, tuple) else output
        tokens.retain_grad()
        kept.append(tokens)

    layer = layers_of(model.tower, family_of(model.tower.config))[0]
    with layer.register_forward_hook(keep):
        output = model(PIXELS, output_hidden_states=True)
    output.hidden_states[1].retain_grad()
    output.last_hidden_state.retain_grad()
    output.feature_map.square().sum().backward()
    assert output.last_hidden_state.grad.abs().sum() > 0
    assert output.hidden_states[1].grad is None
    (tokens,) = kept
    assert tokens.grad.shape == (1, 37, 32)  # CLS and 6 x 6 patches
    assert (tokens.grad.abs().sum(-1) > 0).all()
