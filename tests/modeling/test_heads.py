"""Heads of transformers learn on the backbone and the pyramid, save and reload."""

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoBackbone,
    AutoConfig,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from tests.conftest import make_tiny_tower
from unirefiner_hf import (
    UniRefinerBackbone,
    UniRefinerModel,
    UniRefinerPyramid,
    UniRefinerPyramidConfig,
)

FAMILIES = (
    "dinov2",
    "clip_vision_model",
    "siglip_vision_model",
    "dinov3_vit",
    "unirefiner_eva_clip_vision",
    "internvl_vision",
)
STAGES = ["stage1", "stage2", "stage3", "stage4"]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def images(rows=6, columns=5, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 4 * rows, 4 * columns, generator=generator)


def checkpoint(family, folder, layers=4):
    model = UniRefinerModel.from_tower(make_tiny_tower(family, layers=layers))
    model.save_pretrained(folder)
    return model


def upernet(folder):
    backbone = UniRefinerBackbone.from_pretrained(folder, out_features=STAGES)
    return backbone, UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone.config,
            hidden_size=16,
            num_labels=3,
            use_auxiliary_head=False,
            pool_scales=[1, 2],
        )
    )


def upernet_on_pyramid(folder):
    backbone = UniRefinerPyramid.from_refined(folder, pyramid_size=16)
    return backbone, UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone.config,
            hidden_size=16,
            num_labels=3,
            use_auxiliary_head=False,
            pool_scales=[1, 2],
        )
    )


def mask2former(folder):
    pytest.importorskip("scipy")
    backbone = UniRefinerPyramid.from_refined(folder, pyramid_size=16)
    return backbone, Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=backbone.config,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=5,
            num_labels=3,
            train_num_points=64,
        )
    )


def dpt(folder):
    backbone = UniRefinerBackbone.from_pretrained(
        folder, out_features=STAGES, reshape_hidden_states=False
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
    # It ends in a ReLU: off zero, or a tiny head may have no gradient at all.
    torch.nn.init.ones_(head.head.head[4].bias)
    return backbone, head


def segmentation_loss(head, pixels):
    labels = (pixels.mean(1) > 0).long()
    return head(pixels, labels=labels).loss


def mask_loss(head, pixels):
    bright = (pixels.mean(1) > 0).float()
    masks = [torch.stack([mask, 1 - mask]) for mask in bright]
    classes = [torch.tensor([0, 2])] * len(masks)
    return head(pixels, mask_labels=masks, class_labels=classes).loss


def depth_loss(head, pixels):
    depth = head(pixels).predicted_depth
    target = functional.interpolate(pixels.mean(1, keepdim=True), depth.shape[1:])
    return functional.l1_loss(depth, target[:, 0])


HEADS = {
    "upernet": (upernet, segmentation_loss, lambda out: (out.logits,)),
    "upernet on the pyramid": (
        upernet_on_pyramid,
        segmentation_loss,
        lambda out: (out.logits,),
    ),
    "mask2former": (
        mask2former,
        mask_loss,
        lambda out: (out.class_queries_logits, out.masks_queries_logits),
    ),
    "dpt": (dpt, depth_loss, lambda out: (out.predicted_depth,)),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_learns_saves_and_reloads(kind, family, tmp_path):
    build, loss_of, predictions = HEADS[kind]
    checkpoint(family, tmp_path / "refined")
    torch.manual_seed(0)
    backbone, head = build(tmp_path / "refined")
    place = "model.pixel_level_module.encoder" if kind == "mask2former" else "backbone"
    assert type(head.get_submodule(place)) is type(backbone)
    head.set_submodule(place, backbone)
    head.train()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    loss_of(head, images()).backward()
    optimizer.step()
    moved = {n for n, p in head.named_parameters() if not torch.equal(p, before[n])}
    first = next(backbone.get_input_embeddings().parameters())
    assert first.grad is not None and first.grad.abs().sum() > 0
    assert any(not name.startswith(place) for name in moved)
    assert all(p.isfinite().all() for p in head.parameters())

    head.eval().save_pretrained(tmp_path / "head")
    loaded, report = type(head).from_pretrained(
        tmp_path / "head", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(loaded.get_submodule(place)) is type(backbone)
    for name, weight in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    for size in ((6, 5), (4, 7)):
        with torch.no_grad():
            expected = predictions(head(images(*size)))
            for ours, theirs in zip(
                predictions(loaded(images(*size))), expected, strict=True
            ):
                # Convolutions round with the place of their weights in memory.
                torch.testing.assert_close(ours, theirs)


def test_levels_of_the_pyramid(family, tmp_path):
    model = checkpoint(family, tmp_path / "refined", layers=2)
    pyramid = UniRefinerPyramid.from_refined(tmp_path / "refined", pyramid_size=12)
    with torch.no_grad():
        maps = pyramid(images(6, 5)).feature_maps
        last = model(images(6, 5)).feature_map
        direct = pyramid.levels["level3"](last)
        wider = pyramid(images(6, 5), register_width=2).feature_maps
    sides = [(24, 20), (12, 10), (6, 5), (3, 3)]
    assert [tuple(level.shape) for level in maps] == [(2, 12, *side) for side in sides]
    torch.testing.assert_close(maps[2], direct)
    assert not torch.allclose(maps[2], wider[2])
    assert pyramid.channels == [12] * 4


def test_the_pyramid_saves_and_reloads(tmp_path):
    checkpoint("dinov2", tmp_path / "refined", layers=2)
    pyramid = UniRefinerPyramid.from_refined(
        tmp_path / "refined",
        pyramid_size=12,
        out_features=["level1", "level3"],
        register_width=2,
        dtype=torch.float64,
    )
    assert list(pyramid.levels) == ["level1", "level3"]
    assert pyramid.config.refined_config.register_width == 2
    assert {p.dtype for p in pyramid.parameters()} == {torch.float64}
    pyramid.save_pretrained(tmp_path / "pyramid")
    config = AutoConfig.from_pretrained(tmp_path / "pyramid")
    assert isinstance(config, UniRefinerPyramidConfig)
    assert isinstance(AutoBackbone.from_config(config), UniRefinerPyramid)
    loaded, report = UniRefinerPyramid.from_pretrained(
        tmp_path / "pyramid", output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        expected = pyramid(images().double()).feature_maps
        for ours, theirs in zip(loaded(images().double()).feature_maps, expected):
            torch.testing.assert_close(ours, theirs)


def test_a_backbone_in_memory_is_taken_as_it_is():
    backbone = UniRefinerBackbone.from_tower(
        make_tiny_tower("dinov2"), attn_implementation="eager"
    )
    backbone.config.out_features = ["stem", "stage1"]
    pyramid = UniRefinerPyramid.from_refined(backbone, pyramid_size=8)
    assert pyramid.refined is backbone and not pyramid.training
    assert not any(p.is_meta for p in pyramid.parameters())
    assert pyramid.config.refined_config is backbone.config
    assert backbone.out_features == ["stage2"]
    with torch.no_grad():
        output = pyramid(images(), output_attentions=True, output_hidden_states=True)
        expected = backbone(images()).feature_maps[0]
        torch.testing.assert_close(
            output.feature_maps[2], pyramid.levels["level3"](expected)
        )
    assert len(output.attentions) == 2 and len(output.hidden_states) == 3


def test_what_a_pyramid_refuses():
    tower = make_tiny_tower("dinov2")
    with pytest.raises(TypeError, match="from_tower"):
        UniRefinerPyramid.from_refined(tower)
    backbone = UniRefinerBackbone.from_tower(tower)
    with pytest.raises(TypeError, match="register_width"):
        UniRefinerPyramid.from_refined(backbone, register_width=2)
    with pytest.raises(ValueError, match="did you mean 'pyramid_size'"):
        UniRefinerPyramidConfig(refined_config=backbone.config, pyramid_sise=3)
    with pytest.raises(ValueError, match="pyramid_size is 0"):
        UniRefinerPyramidConfig(refined_config=backbone.config, pyramid_size=0)
    with pytest.raises(ValueError, match="'dinov2'"):
        UniRefinerPyramidConfig(refined_config=tower.config)


def test_a_wrapper_that_hooks_the_layers_again_is_noticed(tmp_path):
    """transformers 5.23 records twice what a BackboneMixin holds; states would shift."""
    checkpoint("dinov2", tmp_path)
    refined = UniRefinerBackbone.from_pretrained(tmp_path)

    class Hooked(UniRefinerPyramid):
        def post_init(self):
            super(UniRefinerPyramid, self).post_init()

    pyramid = Hooked(UniRefinerPyramidConfig(refined_config=refined.config))
    with pytest.raises(
        RuntimeError, match="9 hidden states of 4 layers.*BackboneMixin"
    ):
        pyramid(images(), output_hidden_states=True)
