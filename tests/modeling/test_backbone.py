"""UniRefinerBackbone: its stages, and the heads that take them."""

import pytest
import torch
from transformers import (
    AutoBackbone,
    DPTConfig,
    DPTForDepthEstimation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from tests.conftest import make_tiny_tower
from unirefiner_hf.modeling.modeling_unirefiner import (
    UniRefinerBackbone,
    UniRefinerModel,
)
from unirefiner_hf.modeling.towers import tower_inputs

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def images(height=24, width=20, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, height, width, generator=generator)


def both(family, tmp_path, layers=4, final_norm=False, **options):
    """The model and the backbone of one checkpoint."""
    tower = make_tiny_tower(family, layers=layers)
    model = UniRefinerModel.from_tower(tower, register_width=2, final_norm=final_norm)
    model.save_pretrained(tmp_path)
    backbone, report = UniRefinerBackbone.from_pretrained(
        tmp_path, output_loading_info=True, **options
    )
    assert not any(report.values())
    return model, backbone


def test_last_stage_is_the_model(family, tmp_path):
    model, backbone = both(family, tmp_path)
    with torch.no_grad():
        expected = model(images()).feature_map
        output = backbone(images())
        plain = backbone(images(), register_width=0).feature_maps[-1]
        assert torch.equal(plain, model(images(), register_width=0).feature_map)
    assert backbone.out_features == ["stage4"] and backbone.channels == [32]
    assert len(output.feature_maps) == 1
    assert torch.equal(output.feature_maps[-1], expected)
    assert output.hidden_states is None


def test_last_stage_with_final_norm(tmp_path):
    model, backbone = both("clip_vision_model", tmp_path, final_norm=True)
    with torch.no_grad():
        expected = model(images()).feature_map
        assert torch.equal(backbone(images()).feature_maps[-1], expected)


@pytest.mark.parametrize("apply_layernorm", [True, False])
def test_every_stage(family, apply_layernorm, tmp_path):
    stages = ["stem", "stage2", "stage4"]
    model, backbone = both(
        family, tmp_path, out_features=stages, apply_layernorm=apply_layernorm
    )
    with torch.no_grad():
        output = backbone(images(), output_hidden_states=True)
        states = model(images(), output_hidden_states=True).hidden_states
        norm = torch.nn.Identity()
        if apply_layernorm and model.family.norms_output(model.tower.config):
            norm = model.tower.get_submodule(model.family.final_norm)
        expected = [norm(states[i]) for i in (0, 2, 4)]
    for ours, tokens in zip(output.feature_maps, expected, strict=True):
        assert ours.shape == (2, 32, 6, 5)
        torch.testing.assert_close(ours.flatten(2).transpose(1, 2), tokens)
    for ours, theirs in zip(output.hidden_states, states, strict=True):
        assert torch.equal(ours, theirs)


def test_sequences_with_a_readout_token(family, tmp_path):
    model, backbone = both(family, tmp_path, reshape_hidden_states=False)
    with torch.no_grad():
        (sequence,) = backbone(images()).feature_maps
        output = model(images())
        tokens = output.last_hidden_state
        framed = torch.nn.functional.pad(images(), (8, 8, 8, 8))
        whole = model.tower(**tower_inputs(model.family, framed, 4)).last_hidden_state
    assert sequence.shape == (2, 31, 32)
    assert torch.equal(sequence[:, 1:], tokens)
    prefix = model.family.num_prefix_tokens(model.tower.config)
    readout = whole[:, 0] if prefix else tokens.mean(1)
    torch.testing.assert_close(sequence[:, 0], readout)


def test_attentions_of_the_backbone(family, tmp_path):
    _, backbone = both(family, tmp_path, attn_implementation="eager")
    with torch.no_grad():
        maps = backbone(images(), output_attentions=True).attentions
    assert len(maps) == 4 and maps[0].shape == (2, 2, 30, 30)


def test_upernet_trains_on_it(family, tmp_path):
    _, backbone = both(family, tmp_path, out_features=STAGES)
    head = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone.config,
            hidden_size=16,
            num_labels=3,
            auxiliary_in_channels=32,
            auxiliary_channels=16,
            pool_scales=[1, 2],
        )
    )
    assert isinstance(head.backbone, UniRefinerBackbone)
    head.backbone.load_state_dict(backbone.state_dict())
    labels = torch.randint(0, 3, (2, 24, 20))
    output = head(images(), labels=labels)
    assert output.logits.shape == (2, 3, 24, 20)
    output.loss.backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for name, parameter in head.backbone.named_parameters()
        if ".q_proj" in name or "patch_embed" in name
    )
    head.save_pretrained(tmp_path / "head")
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "head").eval()
    with torch.no_grad():
        maps = loaded.backbone(images()).feature_maps
        for ours, theirs in zip(maps, head.eval().backbone(images()).feature_maps):
            assert torch.equal(ours, theirs)
        # Convolutions round differently with the place of the weights in memory.
        torch.testing.assert_close(loaded(images()).logits, head(images()).logits)


def test_dpt_trains_on_it(family, tmp_path):
    _, backbone = both(
        family, tmp_path, out_features=STAGES, reshape_hidden_states=False
    )
    head = DPTForDepthEstimation(
        DPTConfig(
            backbone_config=backbone.config,
            is_hybrid=False,
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=8,
            reassemble_factors=[4, 2, 1, 0.5],
            readout_type="project",
        )
    )
    assert isinstance(head.backbone, UniRefinerBackbone)
    depth = head(images(32, 24)).predicted_depth
    assert depth.shape[0] == 2 and depth.ndim == 3
    depth.mean().backward()
    assert any(p.grad is not None for p in head.backbone.parameters())


def test_auto_backbone_from_config(family, tmp_path):
    _, backbone = both(family, tmp_path)
    assert isinstance(AutoBackbone.from_config(backbone.config), UniRefinerBackbone)


def test_from_tower(family):
    backbone = UniRefinerBackbone.from_tower(make_tiny_tower(family))
    with torch.no_grad():
        assert backbone(images()).feature_maps[0].shape == (2, 32, 6, 5)
