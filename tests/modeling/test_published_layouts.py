"""Published EVA-CLIP and InternViT folders, read against the published architectures."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModel, InternVLVisionConfig, InternVLVisionModel

from unirefiner_hf import UniRefinerBackbone, UniRefinerModel
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.towers import load_tower, tower_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIZE, HIDDEN, LAYERS, HEADS, GRID = 16, 32, 2, 2, 4


def draw(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.2 * torch.randn(s, generator=generator) for n, s in shapes.items()}


def write(folder, config, weights, shards=2):
    """A published folder: config.json and sharded safetensors with their index."""
    (folder / "config.json").write_text(json.dumps(config))
    names, index = sorted(weights), {}
    for shard in range(shards):
        part = {n: weights[n].contiguous() for n in names[shard::shards]}
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def linear(prefix, out, into, bias=True):
    shapes = {f"{prefix}.weight": (out, into)}
    return {**shapes, f"{prefix}.bias": (out,)} if bias else shapes


def norm_shapes(prefix, rms):
    shapes = {f"{prefix}.weight": (HIDDEN,)}
    return shapes if rms else {**shapes, f"{prefix}.bias": (HIDDEN,)}


# EVA-CLIP


def eva_config(**changed):
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIZE,
        "patch_size": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "q_bias": True,
        "k_bias": False,
        "v_bias": True,
        "use_rope": False,
        "use_sub_ln": False,
        "use_swiglu_mlp": False,
        "use_rms_norm": False,
        "post_layernorm": False,
        **changed,
    }
    return {
        "architectures": ["EvaCLIPModel"],
        "auto_map": {"AutoConfig": "configuration_evaclip.EvaCLIPConfig"},
        "model_type": "clip",
        "torch_dtype": "float32",
        "text_config": {"hidden_size": 8},
        "vision_config": vision,
    }


def eva_weights(vision):
    rms = vision["use_rms_norm"]
    shapes = {
        "embeddings.class_embedding": (HIDDEN,),
        "embeddings.patch_embedding.weight": (HIDDEN, 3, 4, 4),
        "embeddings.patch_embedding.bias": (HIDDEN,),
        "embeddings.position_embedding.weight": (GRID**2 + 1, HIDDEN),
        **norm_shapes("post_layernorm", rms),
    }
    for i in range(LAYERS):
        at = f"encoder.layers.{i}"
        for part in "qkv":
            bias = vision[f"{part}_bias"]
            shapes |= linear(f"{at}.self_attn.{part}_proj", HIDDEN, HIDDEN, bias)
        shapes |= linear(f"{at}.self_attn.out_proj", HIDDEN, HIDDEN)
        shapes |= linear(f"{at}.mlp.fc1", 64, HIDDEN) | linear(
            f"{at}.mlp.fc2", HIDDEN, 64
        )
        for n in (1, 2):
            shapes |= norm_shapes(f"{at}.layer_norm{n}", rms)
    shapes = {f"vision_model.{name}": shape for name, shape in shapes.items()}
    shapes |= {"text_model.x.weight": (2, 2), "logit_scale": (1,)}
    shapes |= {
        "text_projection.weight": (2, 2),
        "visual_projection.weight": (2, HIDDEN),
    }
    return draw(shapes)


def plain_norm(tokens, weights, name):
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if bias is None:
        return weight * tokens / (tokens.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    return functional.layer_norm(tokens, (HIDDEN,), weight, bias, 1e-6)


def plain_linear(tokens, weights, name):
    return functional.linear(
        tokens, weights[f"{name}.weight"], weights.get(f"{name}.bias")
    )


def plain_attention(query, key, value):
    """One head after another, in loops."""
    out = []
    for q, k, v in zip(*(part.chunk(HEADS, dim=-1) for part in (query, key, value))):
        scores = torch.einsum("bid,bjd->bij", q, k) / (HIDDEN // HEADS) ** 0.5
        out.append(torch.softmax(scores, dim=-1) @ v)
    return torch.cat(out, dim=-1)


def plain_patches(pixels, weights, positions):
    """Patch embedding as a matrix product, CLS in front, positions of the own grid."""
    cells = functional.unfold(pixels, 4, stride=4).transpose(1, 2)
    kernel = weights["embeddings.patch_embedding.weight"].flatten(1)
    tokens = cells @ kernel.T + weights["embeddings.patch_embedding.bias"]
    start = weights["embeddings.class_embedding"].view(1, 1, -1)
    tokens = torch.cat([start.expand(len(pixels), -1, -1), tokens], dim=1)
    return tokens + positions


def plain_eva(pixels, weights, vision):
    weights = {n.removeprefix("vision_model."): w for n, w in weights.items()}
    tokens = plain_patches(
        pixels, weights, weights["embeddings.position_embedding.weight"]
    )
    after = vision["post_layernorm"]
    for i in range(LAYERS):
        at = f"encoder.layers.{i}"
        inputs = tokens if after else plain_norm(tokens, weights, f"{at}.layer_norm1")
        parts = [
            plain_linear(inputs, weights, f"{at}.self_attn.{p}_proj") for p in "qkv"
        ]
        read = plain_attention(*parts)
        read = plain_linear(read, weights, f"{at}.self_attn.out_proj")
        tokens = tokens + (
            plain_norm(read, weights, f"{at}.layer_norm1") if after else read
        )
        inputs = tokens if after else plain_norm(tokens, weights, f"{at}.layer_norm2")
        wide = functional.gelu(plain_linear(inputs, weights, f"{at}.mlp.fc1"))
        out = plain_linear(wide, weights, f"{at}.mlp.fc2")
        tokens = tokens + (
            plain_norm(out, weights, f"{at}.layer_norm2") if after else out
        )
    return tokens, plain_norm(tokens[:, 0], weights, "post_layernorm")


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {
            "use_rms_norm": True,
            "post_layernorm": True,
            "q_bias": False,
            "v_bias": False,
        },
    ],
    ids=["8B", "18B"],
)
def test_eva_clip_equals_a_plain_reading(changed, kind, tmp_path):
    config = eva_config(**changed)
    weights = eva_weights(config["vision_config"])
    write(tmp_path, config, weights)
    tower = load_tower(str(tmp_path), attn_implementation=kind)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        output = tower(pixels)
    tokens, pooled = plain_eva(pixels, weights, config["vision_config"])
    torch.testing.assert_close(output.last_hidden_state, tokens, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(output.pooler_output, pooled, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("field", ["use_rope", "use_sub_ln", "use_swiglu_mlp"])
def test_other_eva_clips_are_refused(field, tmp_path):
    config = eva_config(**{field: True})
    write(tmp_path, config, eva_weights(config["vision_config"]))
    with pytest.raises(ValueError, match=f"{field}=true.*EVA-CLIP-8B"):
        load_tower(str(tmp_path))


# InternViT


def intern_config(layers=LAYERS, **changed):
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "torch_dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "image_size": SIZE,
        "patch_size": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qk_normalization": True,
        "qkv_bias": False,
        "norm_type": "rms_norm",
        "drop_path_rate": 0.1,
        "use_flash_attn": True,
        **changed,
    }


def intern_weights(config):
    rms = config["norm_type"] == "rms_norm"
    shapes = {
        "embeddings.class_embedding": (1, 1, HIDDEN),
        "embeddings.patch_embedding.weight": (HIDDEN, 3, 4, 4),
        "embeddings.patch_embedding.bias": (HIDDEN,),
        "embeddings.position_embedding": (1, GRID**2 + 1, HIDDEN),
    }
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layers.{i}"
        shapes |= linear(f"{at}.attn.qkv", 3 * HIDDEN, HIDDEN, config["qkv_bias"])
        shapes |= linear(f"{at}.attn.proj", HIDDEN, HIDDEN)
        shapes |= linear(f"{at}.mlp.fc1", 64, HIDDEN) | linear(
            f"{at}.mlp.fc2", HIDDEN, 64
        )
        shapes |= {f"{at}.ls1": (HIDDEN,), f"{at}.ls2": (HIDDEN,)}
        shapes |= norm_shapes(f"{at}.norm1", rms) | norm_shapes(f"{at}.norm2", rms)
        if config["qk_normalization"]:
            for part in "qk":
                shapes |= norm_shapes(f"{at}.attn.{part}_norm", True)
    return draw(shapes)


def intern_norm(tokens, weights, name):
    """Norm as published: LayerNorm, or root mean square in float32."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if bias is not None:
        return functional.layer_norm(tokens, (HIDDEN,), weight, bias, 1e-6)
    wide = tokens.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6))


def intern_positions(weights, grid):
    """Positions of a grid in patches, resized bicubically as published."""
    table = weights["embeddings.position_embedding"]
    patches = table[:, 1:].reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
    patches = functional.interpolate(
        patches.float(), size=grid, mode="bicubic", align_corners=False
    )
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def published_intern(pixels, weights, layers):
    """InternViT as published, queries, keys and values packed: `InternVisionModel`.

    Operations in the order of transformers' `InternVLVisionModel`, so that the same
    numbers come out to the last bit.
    """
    patches = functional.conv2d(
        pixels,
        weights["embeddings.patch_embedding.weight"],
        weights["embeddings.patch_embedding.bias"],
        stride=4,
    )
    grid = tuple(patches.shape[2:])
    start = weights["embeddings.class_embedding"].expand(len(pixels), -1, -1)
    tokens = torch.cat([start, patches.flatten(2).transpose(1, 2)], dim=1)
    tokens = tokens + intern_positions(weights, grid)
    for i in range(layers):
        at = f"encoder.layers.{i}"
        inputs = intern_norm(tokens, weights, f"{at}.norm1")
        packed = plain_linear(inputs, weights, f"{at}.attn.qkv")
        query, key, value = packed.chunk(3, dim=-1)
        if f"{at}.attn.q_norm.weight" in weights:
            query = intern_norm(query, weights, f"{at}.attn.q_norm")
            key = intern_norm(key, weights, f"{at}.attn.k_norm")
        heads = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (query, key, value)
        )
        read = functional.scaled_dot_product_attention(*heads)
        read = read.transpose(1, 2).flatten(2)
        read = plain_linear(read, weights, f"{at}.attn.proj")
        tokens = tokens + weights[f"{at}.ls1"] * read
        inputs = intern_norm(tokens, weights, f"{at}.norm2")
        wide = functional.gelu(plain_linear(inputs, weights, f"{at}.mlp.fc1"))
        out = plain_linear(wide, weights, f"{at}.mlp.fc2")
        tokens = tokens + weights[f"{at}.ls2"] * out
    return tokens


def difference(tower, weights, layers, rows=GRID, columns=GRID):
    """Largest difference from the published architecture, on random pixels."""
    pixels = torch.randn(2, 3, 4 * rows, 4 * columns)
    with torch.no_grad():
        tokens = tower(pixels).last_hidden_state
    return (tokens - published_intern(pixels, weights, layers)).abs().max().item()


SMALLER = {"qk_normalization": False, "qkv_bias": True, "norm_type": "layer_norm"}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("changed", [{}, SMALLER], ids=["6B", "300M"])
def test_intern_vit_equals_the_published_architecture(changed, shards, tmp_path):
    config = intern_config(**changed)
    weights = intern_weights(config)
    write(tmp_path, config, weights, shards)
    tower = load_tower(str(tmp_path))
    assert isinstance(tower, InternVLVisionModel)
    assert isinstance(tower.config, InternVLVisionConfig)
    assert difference(tower, weights, LAYERS) == 0
    assert difference(tower, weights, LAYERS, rows=3, columns=6) == 0


def test_the_last_three_of_48_layers_are_left_out(tmp_path):
    config = intern_config(layers=48)
    weights = intern_weights(config)
    write(tmp_path, config, weights)
    tower = load_tower(str(tmp_path))
    assert tower.config.num_hidden_layers == 45
    assert difference(tower, weights, 45) == 0
    assert difference(tower, weights, 48) > 1e-2


def test_intern_vit_is_saved_under_transformers_names(tmp_path):
    config = intern_config()
    weights = intern_weights(config)
    write(tmp_path, config, weights)
    load_tower(str(tmp_path)).save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert type(again) is InternVLVisionModel
    assert type(load_tower(str(tmp_path / "saved"))) is InternVLVisionModel
    assert difference(again, weights, LAYERS) == 0


def test_intern_vit_in_another_type_and_attention(tmp_path):
    config = intern_config()
    weights = intern_weights(config)
    write(tmp_path, config, weights)
    tower = load_tower(str(tmp_path), dtype=torch.bfloat16, attn_implementation="eager")
    assert {weight.dtype for weight in tower.state_dict().values()} == {torch.bfloat16}
    assert tower.config._attn_implementation == "eager"
    packed = weights["encoder.layers.1.attn.qkv.weight"]
    layer = tower.encoder.layer[1].attention
    split = torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight])
    assert torch.equal(split, packed.bfloat16())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"norm_type": "batch_norm"}, "norm_type is 'batch_norm'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05; with qk_normalization"),
    ],
)
def test_other_intern_vits_are_refused(changed, said, tmp_path):
    config = intern_config(**changed)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UniRefinerError, match=said):
        tower_config(str(tmp_path))


def test_refined_intern_vit_of_an_earlier_version_loads(tmp_path):
    """Its model type was our own, its weights had the published names."""
    config = intern_config(model_type="unirefiner_intern_vit", published_layers=2)
    weights = intern_weights(config)
    refined = {"model_type": "unirefiner", "dtype": "float32", "format_version": 1}
    write(
        tmp_path,
        {**refined, "vision_config": config},
        {f"tower.{name}": weight for name, weight in weights.items()},
    )
    model, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is UniRefinerModel and not any(report.values())
    assert difference(model.tower, weights, LAYERS) == 0
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["vision_config"]["model_type"] == "internvl_vision"
    for kind in (UniRefinerModel, UniRefinerBackbone):
        again, report = kind.from_pretrained(
            tmp_path / "again", output_loading_info=True
        )
        assert not any(report.values())
        assert type(again.tower) is InternVLVisionModel
        assert difference(again.tower, weights, LAYERS) == 0


# Both


FOLDERS = {
    "eva": lambda: (eva_config(), eva_weights(eva_config()["vision_config"])),
    "intern": lambda: (intern_config(), intern_weights(intern_config())),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_half_converted_keys_are_listed(kind, tmp_path):
    config, weights = FOLDERS[kind]()
    name = next(n for n in sorted(weights) if "layers.1.mlp.fc1.weight" in n)
    weights["encoder.layers.1.mlp.w1.weight"] = weights.pop(name)
    write(tmp_path, config, weights)
    named = re.compile(r"1 missing \(.*fc1\.weight\); 1 unknown \(.*w1\.weight\)")
    with pytest.raises(ValueError, match=named):
        load_tower(str(tmp_path))


@pytest.mark.parametrize("kind", FOLDERS)
def test_pickled_weights_are_refused_with_the_way_out(kind, tmp_path):
    config, weights = FOLDERS[kind]()
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors.*weights_only=True"):
        load_tower(str(tmp_path))


@pytest.mark.parametrize("kind", FOLDERS)
def test_missing_config_field_is_named(kind, tmp_path):
    config, _ = FOLDERS[kind]()
    del config.get("vision_config", config)["patch_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks patch_size"):
        tower_config(str(tmp_path))


@pytest.mark.parametrize("kind", FOLDERS)
def test_framed_model_round_trip(kind, tmp_path):
    config, weights = FOLDERS[kind]()
    write(tmp_path, config, weights)
    model = UniRefinerModel.from_tower(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    loaded = UniRefinerModel.from_pretrained(tmp_path / "saved")
    pixels = torch.randn(1, 3, 24, 20)
    with torch.no_grad():
        assert torch.equal(loaded(pixels)[0], model(pixels)[0])
