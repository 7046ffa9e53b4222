"""The text side of dual encoders: as transformers has it, and as it is kept."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import CLIPTextModelWithProjection

from tests.conftest import make_tiny_tower
from tests.dual_encoders import (
    COMMON,
    END,
    KINDS,
    TEXT_WIDTH,
    TEXTS,
    WIDTH,
    make_dual_encoder,
    make_tokenizer,
    save_dual_encoder,
    save_eva_clip,
)
from unirefiner_hf.modeling.dense_text import dense_text_features
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.modeling.text_side import (
    NoTextSideError,
    TextSideError,
    find_text_side,
    load_text_side,
)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_texts_are_encoded_as_by_the_whole_model(kind, tmp_path):
    dual = save_dual_encoder(tmp_path / "base", kind)
    side = load_text_side(tmp_path / "base")
    features = side.encode(TEXTS)
    given = side.tokens(TEXTS)
    assert given["input_ids"].shape[1] == 12  # the longest is cut there
    expected = dual.get_text_features(**given).pooler_output
    assert torch.equal(features, expected)
    assert features.shape == (3, WIDTH if "siglip" in kind else COMMON)
    assert side.model.vision_model is None
    if "siglip" in kind:
        # Trained at full length, pad tokens attended to.
        assert side.tokens(["sky"])["input_ids"].shape[1] == 12
        assert given.keys() == {"input_ids"} and side.projection is None
        one = side.encode(["sky"])
        assert torch.allclose(one, features[1:2], atol=1e-6)
        assert torch.equal(side.encode(["Sky"]), one)
    else:
        assert side.tokens(["sky"])["input_ids"].shape[1] == 2
        hidden = torch.randn(5, WIDTH)
        assert torch.equal(side.projection(hidden), dual.visual_projection(hidden))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_refined_checkpoint_keeps_it(kind, tmp_path):
    dual = save_dual_encoder(tmp_path / "base", kind)
    merged = tmp_path / "merged"
    UniRefinerModel.from_tower(str(tmp_path / "base")).save_pretrained(merged)
    load_text_side(tmp_path / "base").save(merged)
    weights = load_file(merged / "text" / "model.safetensors")
    own = {n: w for n, w in dual.state_dict().items() if "vision_model" not in n}
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[name], own[name]) for name in own)
    saved = (merged / "text" / "config.json").read_text()
    assert str(tmp_path) not in saved
    again = load_text_side(merged)
    given = again.tokens(TEXTS)
    expected = dual.get_text_features(**given).pooler_output
    assert torch.equal(again.encode(TEXTS), expected)
    assert again.vision_type == dual.vision_model.config.model_type
    again.save(tmp_path / "twice")
    assert (tmp_path / "twice" / "text" / "config.json").read_text() == saved


@torch.no_grad()
def test_transformers_reads_the_kept_folder_itself(tmp_path):
    dual = save_dual_encoder(tmp_path / "base", "clip")
    side = load_text_side(tmp_path / "base")
    side.save(tmp_path)
    theirs = CLIPTextModelWithProjection.from_pretrained(tmp_path, subfolder="text")
    given = side.tokens(TEXTS)
    expected = dual.get_text_features(**given).pooler_output
    assert torch.equal(theirs.eval()(**given).text_embeds, expected)


def test_weights_stay_in_their_own_precision(tmp_path):
    make_dual_encoder("clip").half().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert load_text_side(tmp_path).model.dtype == torch.float16
    assert load_text_side(tmp_path, dtype=torch.float32).model.dtype == torch.float32


def plain_eva_text(ids, weights):
    """EVA-CLIP's text tower, one text after another, without padding."""

    def norm(x, name):
        return functional.layer_norm(
            x, (TEXT_WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5
        )

    def linear(x, name):
        bias = weights.get(f"{name}.bias")
        return functional.linear(x, weights[f"{name}.weight"], bias)

    at = "text_model.embeddings"
    x = weights[f"{at}.token_embedding.weight"][ids]
    x = x + weights[f"{at}.position_embedding.weight"][: len(ids)]
    for layer in range(2):
        at = f"text_model.encoder.layers.{layer}"
        y = norm(x, f"{at}.layer_norm1")
        q, k, v = (linear(y, f"{at}.self_attn.{n}_proj") for n in "qkv")
        read = []
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            scores = q[:, part] @ k[:, part].T / 8**0.5
            causal = torch.full_like(scores, float("-inf")).triu(1)
            read.append((scores + causal).softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(read, -1), f"{at}.self_attn.out_proj")
        y = functional.gelu(linear(norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1"))
        x = x + linear(y, f"{at}.mlp.fc2")
    x = norm(x, "text_model.final_layer_norm")
    return linear(x[int(torch.tensor(ids).argmax())], "text_projection")


@torch.no_grad()
def test_eva_clip_from_its_published_layout(tmp_path):
    weights = save_eva_clip(tmp_path / "base")
    side = load_text_side(tmp_path / "base")
    rows = make_tokenizer()(TEXTS, truncation=True, max_length=12)["input_ids"]
    expected = torch.stack([plain_eva_text(row, weights) for row in rows])
    assert END in rows[0] and torch.allclose(side.encode(TEXTS), expected, atol=1e-4)
    side.save(tmp_path / "merged")
    model = UniRefinerModel.from_tower(str(tmp_path / "base"), register_width=1)
    model.save_pretrained(tmp_path / "merged")
    again = load_text_side(tmp_path / "merged")
    assert torch.equal(again.encode(TEXTS), side.encode(TEXTS))
    assert again.vision_type == "unirefiner_eva_clip_vision"
    assert torch.equal(again.projection.bias, weights["visual_projection.bias"])
    pixels = torch.randn(1, 3, 16, 16)
    found = dense_text_features(
        model, pixels, variant="plain", projection=again.projection
    )
    tower = model.tower
    states = model(pixels, output_hidden_states=True).hidden_states
    hidden = tower.post_layernorm(states[-1])
    expected = functional.linear(
        hidden, weights["visual_projection.weight"], weights["visual_projection.bias"]
    )
    assert torch.allclose(found, expected, atol=1e-4)


def test_what_has_no_text_side(tmp_path):
    make_tiny_tower("dinov2").save_pretrained(tmp_path / "dino")
    with pytest.raises(NoTextSideError, match="dino has no text side: it is a dinov2"):
        find_text_side(tmp_path / "dino")
    UniRefinerModel.from_tower(str(tmp_path / "dino")).save_pretrained(tmp_path / "out")
    with pytest.raises(TextSideError, match="no text/config.json.*keep_text: false"):
        load_text_side(tmp_path / "out")
    make_dual_encoder("clip").save_pretrained(tmp_path / "clip")
    with pytest.raises(TextSideError, match="clip has no tokenizer .none of tokenizer"):
        load_text_side(tmp_path / "clip")
    make_tokenizer().save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "tokenizer.json").write_text("{")
    with pytest.raises(TextSideError, match="tokenizer of .*clip does not load"):
        find_text_side(tmp_path / "clip")
    config = {"model_type": "tipsv2", "vision_config": {}, "text_config": {}}
    (tmp_path / "tips").mkdir()
    (tmp_path / "tips" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TextSideError, match="is a tipsv2: its text side is not kept"):
        find_text_side(tmp_path / "tips")


def test_weights_that_are_missing_are_named(tmp_path):
    save_dual_encoder(tmp_path, "clip")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TextSideError, match="lacks 1 weights.*text_projection.weight"):
        load_text_side(tmp_path)


@pytest.mark.parametrize("change", [{"use_rms_norm": True}, {"q_bias": False}])
def test_another_text_tower_of_eva_clip_is_refused(change, tmp_path):
    save_eva_clip(tmp_path / "base", **change)
    (field,) = change
    with pytest.raises(TextSideError, match=f"its config has {field}={change[field]}"):
        find_text_side(tmp_path / "base")
