"""Patch features in the space of text, against a plain reading of each method."""

import math

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    MetaClip2VisionConfig,
    MetaClip2VisionModel,
    SiglipConfig,
    SiglipModel,
)

from tests.training.conftest import make_tiny_tower
from unirefiner_hf.loading.lora import add_adapter
from unirefiner_hf.modeling.configuration_eva_clip import EvaClipVisionConfig
from unirefiner_hf.modeling.dense_text import dense_text_features, neighbourhood
from unirefiner_hf.modeling.modeling_eva_clip import EvaClipVisionModel
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel

VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {**VISION, "vocab_size": 32}
TEXT = {k: v for k, v in TEXT.items() if k not in ("image_size", "patch_size")}


def shaken(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=20)
    dual = CLIPModel(config).eval()
    shaken(dual.vision_model)
    return dual


def tower_of(kind):
    """A tower and a visual projection; both EVA-CLIPs have one with a bias."""
    torch.manual_seed(0)
    if kind == "clip":
        tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
    elif kind == "metaclip_2":
        tower = MetaClip2VisionModel(MetaClip2VisionConfig(**VISION))
    else:
        after = {"use_rms_norm": True, "post_layernorm": True, "q_bias": False}
        options = after if kind == "eva 18B" else {}
        tower = EvaClipVisionModel(EvaClipVisionConfig(**VISION, **options))
    projection = torch.nn.Linear(24, 20, bias=kind.startswith("eva"))
    return shaken(tower).eval(), projection


@pytest.fixture(scope="module")
def siglip():
    torch.manual_seed(0)
    dual = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)).eval()
    shaken(dual.vision_model.head)
    return dual


@pytest.fixture(scope="module")
def pixels():
    torch.manual_seed(1)
    return torch.randn(2, 3, 12, 20)


def read_again(tower, projection, framed, variant, columns, residual, after):
    """Token by token and head by head: features of every patch of a bare CLIP."""
    eva = isinstance(tower, EvaClipVisionModel)
    options = {} if eva else {"interpolate_pos_encoding": True}
    out = tower(framed, output_hidden_states=True, **options)
    tokens = out.hidden_states[-2]
    block = tower.encoder.layers[-1]
    x = tokens if after else block.layer_norm1(tokens)
    q, k, v = (getattr(block.self_attn, f"{n}_proj")(x) for n in "qkv")
    mixed = torch.zeros_like(v)
    for image in range(len(x)):
        for head in range(3):
            part = slice(8 * head, 8 * head + 8)
            for i in range(x.shape[1]):
                qq, kk = (
                    t[image, :, part] @ t[image, i, part] / math.sqrt(8) for t in (q, k)
                )
                if variant == "naclip":
                    for j in range(1, x.shape[1]):
                        if i > 0:
                            dy = (i - 1) // columns - (j - 1) // columns
                            dx = (i - 1) % columns - (j - 1) % columns
                            kk[j] += math.exp(-(dx**2 + dy**2) / (2 * 5.0**2))
                alone = torch.zeros(x.shape[1])
                alone[i] = 1
                weights = {
                    "maskclip": alone,
                    "clearclip": qq.softmax(0),
                    "sclip": qq.softmax(0) + kk.softmax(0),
                    "naclip": kk.softmax(0),
                }[variant]
                mixed[image, i, part] = weights @ v[image, :, part]
    y = block.self_attn.out_proj(mixed)
    y = block.layer_norm1(y) if after else y
    if residual:
        y = tokens + y
        y = y + (
            block.layer_norm2(block.mlp(y))
            if after
            else block.mlp(block.layer_norm2(y))
        )
    return projection(tower.post_layernorm(y))[:, 1:]


@pytest.mark.parametrize("kind", ["clip", "metaclip_2", "eva 8B", "eva 18B"])
@pytest.mark.parametrize("variant", ["maskclip", "sclip", "clearclip", "naclip"])
@torch.no_grad()
def test_each_variant_reads_clip_as_published(kind, pixels, variant):
    tower, projection = tower_of(kind)
    model = UniRefinerModel.from_tower(tower, register_width=1)
    for width in (0, 1):
        found = dense_text_features(
            model,
            pixels,
            variant=variant,
            projection=projection,
            register_width=width,
        )
        assert found.shape == (2, 15, 20)
        framed = torch.nn.functional.pad(pixels, [4 * width] * 4)
        every = read_again(
            tower,
            projection,
            framed,
            variant,
            columns=5 + 2 * width,
            residual=variant == "sclip",
            after=kind == "eva 18B",
        )
        cells = every.unflatten(1, (3 + 2 * width, 5 + 2 * width))
        inside = cells[:, width : 3 + width, width : 5 + width].flatten(1, 2)
        assert torch.allclose(found, inside, atol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "eva 8B", "eva 18B"])
@torch.no_grad()
def test_the_last_block_again_is_the_last_block(kind, pixels):
    """With q in the place of k, softmax(q q') is the attention of the tower itself."""
    tower, projection = tower_of(kind)
    attention = tower.encoder.layers[-1].self_attn
    attention.k_proj = attention.q_proj
    model = UniRefinerModel.from_tower(tower, register_width=1)
    options = {"projection": projection}
    plain = dense_text_features(model, pixels, variant="plain", **options)
    again = dense_text_features(
        model, pixels, variant="clearclip", residual=True, **options
    )
    assert torch.allclose(again, plain, atol=1e-4)


@torch.no_grad()
def test_learned_register_tokens_take_part_in_the_last_block(pixels):
    tower, projection = tower_of("clip")
    attention = tower.encoder.layers[-1].self_attn
    attention.k_proj = attention.q_proj
    model = UniRefinerModel.from_tower(tower, register_width=0, num_register_tokens=2)

    def read(variant, **options):
        options = {"projection": projection, "variant": variant, **options}
        return dense_text_features(model, pixels, **options)

    plain = read("plain")
    assert torch.allclose(read("clearclip", residual=True), plain, atol=1e-4)
    near = read("naclip")
    assert near.shape == plain.shape
    with model.without_register_tokens():
        assert not torch.allclose(read("plain"), plain)
        assert not torch.allclose(read("naclip"), near)


@torch.no_grad()
def test_an_adapter_is_part_of_the_reading(pixels):
    tower, projection = tower_of("clip")
    bare = UniRefinerModel.from_tower(tower, register_width=1)
    options = {"variant": "sclip", "projection": projection}
    before = dense_text_features(bare, pixels, **options)
    bare.tower = add_adapter(tower, name="tower")
    assert torch.equal(dense_text_features(bare, pixels, **options), before)
    for name, parameter in bare.named_parameters():
        if "lora_B" in name and "v_proj" in name:
            parameter.normal_()
    assert not torch.allclose(dense_text_features(bare, pixels, **options), before)


@torch.no_grad()
def test_plain_is_the_tower_through_its_projection(clip, pixels):
    model = UniRefinerModel.from_tower(clip, register_width=0)
    tower, projection = clip.vision_model, clip.visual_projection
    last = tower(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    expected = projection(tower.post_layernorm(last))
    for final_norm in (False, True):
        model.config.final_norm = final_norm
        found = dense_text_features(
            model, pixels, variant="plain", projection=projection
        )
        assert torch.equal(found, expected)


@torch.no_grad()
def test_variants_meet_the_plain_block(pixels):
    """Where all values are alike the attention cannot matter; where q = k, qq is qk."""
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=20)
    dual = CLIPModel(config).eval()
    model = UniRefinerModel.from_tower(dual, register_width=1)
    attention = dual.vision_model.encoder.layers[-1].self_attn
    for parameter in attention.parameters():
        parameter.normal_()

    def read(variant, **options):
        projection = dual.visual_projection
        options["projection"] = projection
        return dense_text_features(model, pixels, variant=variant, **options)

    attention.k_proj.load_state_dict(attention.q_proj.state_dict())
    plain = read("plain")
    assert torch.allclose(read("clearclip", residual=True), plain, atol=1e-4)
    assert not torch.allclose(read("clearclip"), plain, atol=1e-2)
    assert not torch.allclose(read("maskclip", residual=True), plain, atol=1e-2)
    wide = read("naclip", residual=True, sigma=1e6)
    assert not torch.allclose(wide, read("naclip", residual=True), atol=1e-4)
    attention.v_proj.weight.zero_()
    plain = read("plain")
    for variant in ("maskclip", "clearclip", "naclip"):
        assert torch.allclose(read(variant, residual=True), plain, atol=1e-4)


@pytest.mark.parametrize("width", [0, 1])
@pytest.mark.parametrize("family", ["siglip_vision_model", "siglip2_vision_model"])
@torch.no_grad()
def test_the_value_path_of_siglip(family, pixels, width):
    """A head that sees one token alone pools that token's value."""
    tower = make_tiny_tower(family)
    model = UniRefinerModel.from_tower(tower, register_width=width)
    found = dense_text_features(model, pixels)
    tokens = model(pixels).last_hidden_state
    head = tower.head
    expected = [[head(token[None, None])[0] for token in image] for image in tokens]
    expected = torch.stack([torch.stack(image) for image in expected])
    assert found.shape == (2, 15, 32)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_neighbourhood_falls_with_distance():
    near = neighbourhood((2, 3), 5.0)
    assert near.shape == (6, 6) and torch.equal(near.diagonal(), torch.ones(6))
    assert near[0, 5].item() == pytest.approx(math.exp(-5 / 50))
    assert torch.equal(near, near.T)


def test_what_cannot_be_read(clip, siglip, pixels):
    of_clip, of_siglip = (UniRefinerModel.from_tower(x) for x in (clip, siglip))
    with pytest.raises(ValueError, match="variant is 'value'; a clip_vision_model"):
        dense_text_features(of_clip, pixels, variant="value")
    with pytest.raises(ValueError, match="'sclip'; a siglip_vision_model.*has value"):
        dense_text_features(of_siglip, pixels, variant="sclip")
    with pytest.raises(ValueError, match="needs projection"):
        dense_text_features(of_clip, pixels, variant="sclip")
    with pytest.raises(ValueError, match="sigma is 0"):
        dense_text_features(of_clip, pixels, variant="naclip", sigma=0)
    with pytest.raises(ValueError, match="projection takes 8 channels.* have 24"):
        dense_text_features(of_clip, pixels, projection=torch.nn.Linear(8, 20))
    dino = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    with pytest.raises(ValueError, match="dinov2 tower has no text side"):
        dense_text_features(dino, pixels, variant="maskclip")
    vision = {**VISION, "vision_use_head": False}
    headless = SiglipModel(SiglipConfig(vision_config=vision, text_config=TEXT))
    with pytest.raises(ValueError, match="no pooling head"):
        dense_text_features(
            UniRefinerModel.from_tower(headless), pixels, variant="value"
        )
