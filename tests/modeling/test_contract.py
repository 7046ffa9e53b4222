"""The contract every family keeps, on tiny random towers."""

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface, CLIPConfig, CLIPModel

from tests.conftest import ALL_FAMILIES, make_tiny_tower
from tests.modeling.test_towers import TEXT, VISION
from unirefiner_hf.export.checkpoint import merge_adapter
from unirefiner_hf.loading.lora import add_adapter
from unirefiner_hf.modeling.configuration_unirefiner import UniRefinerConfig
from unirefiner_hf.modeling.modeling_unirefiner import (
    UniRefinerBackbone,
    UniRefinerModel,
)
from unirefiner_hf.modeling.registers import frame_pixels, register_mask

# The name that every supported transformers has; 5.23 warns of a newer one.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

GRIDS = {"square": (4, 4), "oblong": (6, 5)}


@pytest.fixture(params=GRIDS.values(), ids=GRIDS)
def grid(request):
    return request.param


def make_model(family, **options):
    tower_options = {
        name: options.pop(name) for name in ("layers", "seed") if name in options
    }
    return UniRefinerModel.from_tower(
        make_tiny_tower(family, **tower_options), **options
    )


def images(grid=(6, 5), batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, grid[0] * 4, grid[1] * 4, generator=generator)


INTERPOLATING = {
    "clip_vision_model",
    "metaclip_2_vision_model",
    "siglip_vision_model",
    "vit",
    "deit",
    "vit_mae",
    "vit_msn",
    "ijepa",
    "beit",
}
PREFIX = {
    "siglip_vision_model": 0,
    "siglip2_vision_model": 0,
    "ijepa": 0,
    "aimv2_vision_model": 0,
    "deit": 2,
    "tipsv2_vision_model": 2,
    "dinov2_with_registers": 5,
    "dinov3_vit": 5,
    "pixio": 8,
    "radio": 10,
}  # the others: 1
NO_POOLING = {
    "radio",
    "vit",
    "deit",
    "vit_mae",
    "vit_msn",
    "ijepa",
    "internvl_vision",
    "beit",
}
LATE_NORM = {
    "clip_vision_model",
    "metaclip_2_vision_model",
    "mlcd_vision_model",
    "unirefiner_eva_clip_vision",
}
NO_NORM = {
    "internvl_vision",
    "beit",
    "radio",
}


def bare(model, pixel_values, **options):
    """The tower of `model`, called by itself."""
    family = model.config.vision_config.model_type
    if family in INTERPOLATING:
        options["interpolate_pos_encoding"] = True
    rows, columns = (side // 4 for side in pixel_values.shape[2:])
    count = len(pixel_values)
    if family == "vit_mae":
        options["noise"] = torch.arange(rows * columns).float().repeat(count, 1)
    if family == "siglip2_vision_model":
        cells = patches(pixel_values).permute(0, 1, 3, 4, 2)
        pixel_values = cells.flatten(2)
        options["pixel_attention_mask"] = torch.ones(count, rows * columns)
        options["spatial_shapes"] = torch.tensor([[rows, columns]] * count)
    with torch.no_grad():
        return model.tower(pixel_values, **options)


def same(ours, theirs):
    """Equal tensors, or both None."""
    return ours is theirs if theirs is None else torch.equal(ours, theirs)


def prefix(model):
    return PREFIX.get(model.config.vision_config.model_type, 1)


def without_mixing(family):
    """A tower whose tokens depend on their own patch alone, not on its position."""
    tower = make_tiny_tower(family)
    mixing = ("o_proj", "out_proj", "fc2", "position", "projection_layer", "attn.proj")
    mixing += ("attention.output.dense", "pos_embed")
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if any(part in name for part in mixing):
                parameter.zero_()
        if family == "aimv2_vision_model":  # its positions are no parameter: drown them
            tower.embeddings.rms_norm.weight.mul_(1e5)
    return tower


def patches(pixel_values):
    """``(batch, 3, h * 4, w * 4)`` -> ``(batch, h * w, 3, 4, 4)``, raster order."""
    cells = functional.unfold(pixel_values, 4, stride=4).transpose(1, 2)
    return cells.unflatten(2, (3, 4, 4))


# Shape


@pytest.mark.parametrize("width", [0, 1, 3])
def test_shapes(family, grid, width):
    h, w = grid
    model = make_model(family, register_width=width)
    with torch.no_grad():
        output = model(images(grid))
    assert output.last_hidden_state.shape == (2, h * w, 32)
    assert output.feature_map.shape == (2, 32, h, w)
    if family in NO_POOLING:
        assert output.pooler_output is None
    else:
        pooled = 96 if family == "radio" else 32
        assert output.pooler_output.shape == (2, pooled)
    assert output.hidden_states is None and output.attentions is None
    tokens = output.last_hidden_state.view(2, h, w, 32).permute(0, 3, 1, 2)
    assert torch.equal(output.feature_map, tokens)


def test_tuple_output(family):
    model = make_model(family)
    with torch.no_grad():
        output = model(images(), return_dict=False)
        assert isinstance(output, tuple)
        assert torch.equal(output[0], model(images()).last_hidden_state)


def test_single_patch_image(family):
    with torch.no_grad():
        output = make_model(family)(images((1, 1)))
    assert output.last_hidden_state.shape == (2, 1, 32)


# Order


@pytest.mark.parametrize("width", [0, 1, 2])
def test_tokens_come_in_raster_order(family, grid, width):
    model = UniRefinerModel.from_tower(without_mixing(family), register_fill="randn")
    pixel_values = images(grid)
    generator = torch.Generator().manual_seed(model.config.register_seed)
    framed = frame_pixels(pixel_values, width, 4, "randn", generator=generator)
    cells = patches(framed)
    with torch.no_grad():
        encoded = model.encode(pixel_values, width)
        alone = model.encode(cells.flatten(0, 1), 0).image.view(2, -1, 32)
        returned = model(pixel_values, register_width=width).last_hidden_state
    mask = register_mask(grid, width)
    assert encoded.grid == grid
    near = {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(encoded.image, alone[:, ~mask], **near)
    torch.testing.assert_close(encoded.registers, alone[:, mask], **near)
    assert torch.equal(returned, encoded.image)
    assert alone.std(dim=1).mean() > 0.1


# No frame


def test_without_frame_it_is_the_bare_tower(family, grid):
    model = make_model(family, register_width=0)
    pixel_values = images(grid)
    expected = bare(model, pixel_values, output_hidden_states=True)
    with torch.no_grad():
        output = model(pixel_values, output_hidden_states=True)
        encoded = model.encode(pixel_values)
    start = prefix(model)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state[:, start:])
    assert same(output.pooler_output, expected.get("pooler_output"))
    assert torch.equal(encoded.image, output.last_hidden_state)
    assert encoded.registers.shape == (2, 0, 32)
    assert len(output.hidden_states) == len(expected.hidden_states) == 3
    for ours, theirs in zip(output.hidden_states, expected.hidden_states):
        assert torch.equal(ours, theirs[:, start:])


def test_native_size_needs_no_interpolation(family):
    if family in ("siglip2_vision_model", "vit_mae"):
        pytest.skip("needs more than pixels")
    model = make_model(family)
    start = prefix(model)
    with torch.no_grad():
        expected = model.tower(images((4, 4))).last_hidden_state
        expected = expected[:, start:]
        output = model(images((4, 4)), register_width=0)
    assert torch.equal(output.last_hidden_state, expected)


def test_frame_changes_tokens_and_is_the_framed_tower(family):
    model = make_model(family, register_width=2)
    pixel_values = images()
    expected = bare(model, functional.pad(pixel_values, (8, 8, 8, 8)))
    start = prefix(model)
    cells = expected.last_hidden_state[:, start:].view(2, 10, 9, 32)
    with torch.no_grad():
        framed = model(pixel_values).last_hidden_state
        assert torch.equal(framed, cells[:, 2:8, 2:7].flatten(1, 2))
        plain = model(pixel_values, register_width=0).last_hidden_state
    assert not torch.allclose(framed, plain, atol=1e-3)


def test_register_width_per_call_wins(family):
    wide, narrow = make_model(family, register_width=2), make_model(family)
    with torch.no_grad():
        expected = wide(images()).last_hidden_state
        assert torch.equal(narrow(images(), register_width=2)[0], expected)
        assert not torch.equal(narrow(images())[0], expected)


# Final norm


@pytest.mark.parametrize("family", sorted(LATE_NORM))
def test_final_norm_is_post_layernorm_on_patches(family):
    pixel_values = images()
    model = make_model(family, final_norm=True)
    model.tower.post_layernorm.weight.data.add_(1.0)
    tower = model.tower
    expected = bare(model, pixel_values).last_hidden_state[:, 1:]
    with torch.no_grad():
        expected = tower.post_layernorm(expected)
        output = model(pixel_values, register_width=0)
        encoded = model.encode(pixel_values, 1)
        framed = model(pixel_values, register_width=1)
    assert torch.equal(output.last_hidden_state, expected)
    assert torch.equal(encoded.image, framed.last_hidden_state)
    assert torch.equal(output.pooler_output, bare(model, pixel_values).pooler_output)
    rows = (encoded.registers - tower.post_layernorm.bias) / tower.post_layernorm.weight
    torch.testing.assert_close(rows.mean(-1), torch.zeros(2, 26), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", sorted(set(ALL_FAMILIES) - LATE_NORM))
def test_final_norm_twice_or_without_one_is_refused(family):
    reason = "no last layer norm" if family in NO_NORM else "already"
    with pytest.raises(ValueError, match=f"final_norm.*{family}.*{reason}"):
        make_model(family, final_norm=True)


def test_final_norm_of_a_tower_that_pools_without_means():
    for family in ("internvl_vision", "beit"):
        config = make_tiny_tower(family).config
        config.use_mean_pooling = False
        model = UniRefinerModel(UniRefinerConfig(vision_config=config))
        assert model.family.norms_output(config)
        backbone = UniRefinerBackbone(model.config).eval()
        backbone.load_state_dict(model.state_dict())
        with torch.no_grad():
            expected = model.eval()(images()).feature_map
            assert torch.equal(backbone(images()).feature_maps[-1], expected)


# Pooling


def test_attention_pooling_leaves_the_frame_out():
    model = make_model("siglip_vision_model", register_width=2)
    with torch.no_grad():
        output = model(images())
        expected = model.tower.head(output.last_hidden_state)
    assert torch.equal(output.pooler_output, expected)
    framed = bare(model, functional.pad(images(), (8, 8, 8, 8)))
    assert not torch.allclose(output.pooler_output, framed.pooler_output, atol=1e-3)


def test_tower_without_head_pools_nothing():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**VISION, vision_use_head=False)
    model = UniRefinerModel.from_tower(SiglipVisionModel(config).eval())
    assert model(images()).pooler_output is None


# Hidden states and attentions


def test_hidden_states_are_cropped(family):
    model = make_model(family, layers=3, register_width=1)
    pixel_values = images()
    expected = bare(
        model, functional.pad(pixel_values, (4, 4, 4, 4)), output_hidden_states=True
    )
    with torch.no_grad():
        states = model(pixel_values, output_hidden_states=True).hidden_states
    assert len(states) == 4
    start = prefix(model)
    for ours, theirs in zip(states, expected.hidden_states):
        cells = theirs[:, start:].view(2, 8, 7, 32)
        assert torch.equal(ours, cells[:, 1:7, 1:6].flatten(1, 2))


@pytest.mark.parametrize(("wanted", "kept"), [(2, {2}), (0, {0}), ([0, -1], {0, 3})])
def test_selected_hidden_states(family, wanted, kept):
    model = make_model(family, layers=3)
    with torch.no_grad():
        every = model(images(), output_hidden_states=True).hidden_states
        states = model(images(), output_hidden_states=wanted).hidden_states
    assert len(states) == 4
    for index, state in enumerate(states):
        if index in kept:
            assert torch.equal(state, every[index])
        else:
            assert state is None


def test_hidden_state_out_of_range_is_named():
    with pytest.raises(ValueError, match="asks for 3, but there are 3"):
        make_model("dinov2")(images(), output_hidden_states=[0, 3])


def test_attentions_are_cropped(family):
    model = make_model(family, attn_implementation="eager")
    pixel_values = images()
    expected = bare(
        model, functional.pad(pixel_values, (4, 4, 4, 4)), output_attentions=True
    )
    with torch.no_grad():
        maps = model(pixel_values, output_attentions=True).attentions
    assert len(maps) == 2
    inside = torch.zeros(8, 7, dtype=torch.bool)
    inside[1:7, 1:6] = True
    inside = torch.cat([torch.zeros(prefix(model), dtype=torch.bool), inside.flatten()])
    for ours, theirs in zip(maps, expected.attentions):
        assert ours.shape == (2, 2, 30, 30)
        assert torch.equal(ours, theirs[:, :, inside][:, :, :, inside])
        assert (ours.sum(-1) < 1).all()


def test_attentions_need_eager(family):
    model = make_model(family)
    with pytest.raises(ValueError, match="sdpa.*eager"):
        model(images(), output_attentions=True)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert len(model(images(), output_attentions=True).attentions) == 2


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_attn_implementation_reaches_the_tower(family, kind, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    model = UniRefinerModel.from_pretrained(tmp_path, attn_implementation=kind)
    assert model.tower.config._attn_implementation == kind
    assert make_model(
        family, attn_implementation=kind
    ).tower.config._attn_implementation == (kind)


def test_attention_of_a_tower_in_memory_is_kept(family):
    tower = make_tiny_tower(family)
    tower.set_attn_implementation("eager")
    model = UniRefinerModel.from_tower(tower)
    assert model.config._attn_implementation == "eager"
    assert tower.config._attn_implementation == "eager"


# What is refused


@pytest.mark.parametrize(
    ("pixel_values", "named"),
    [
        (torch.zeros(1, 3, 17, 16), r"17 x 16.*patch size 4"),
        (torch.zeros(1, 3, 16, 30), r"16 x 30.*patch size 4"),
        (torch.zeros(1, 3, 0, 16), r"0 x 16.*patch size 4"),
        (torch.zeros(1, 1, 16, 16), r"\(1, 1, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"\(3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
    ],
)
def test_bad_input_is_named(family, pixel_values, named):
    with pytest.raises(ValueError, match=named):
        make_model(family)(pixel_values)


def test_negative_width_is_refused(family):
    with pytest.raises(ValueError, match="-1"):
        make_model(family)(images(), register_width=-1)


def test_wrong_token_count_fails_loudly(family):
    model = make_model(family)
    whole = model.tower.forward

    def shortened(*args, **kwargs):
        output = whole(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state[:, :-1]
        return output

    model.tower.forward = shortened
    with pytest.raises(RuntimeError, match="8 x 7 patches"):
        model(images())


def test_unsupported_tower_and_wrong_type():
    from transformers import ResNetConfig, ResNetModel

    tiny = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    with pytest.raises(ValueError, match="resnet.*dinov2"):
        UniRefinerModel.from_tower(ResNetModel(tiny))
    with pytest.raises(TypeError, match="Linear"):
        UniRefinerModel.from_tower(torch.nn.Linear(1, 1))


# Fills


@pytest.mark.parametrize("fill", ["randn", "rand"])
def test_drawn_frames_are_fixed_in_eval(family, fill):
    model = make_model(family, register_fill=fill)
    pixel_values = images()
    with torch.no_grad():
        first = model(pixel_values).last_hidden_state
        torch.manual_seed(99)
        assert torch.equal(model(pixel_values).last_hidden_state, first)
        alone = model(pixel_values[1:]).last_hidden_state
        twice = model(pixel_values[[1, 1]]).last_hidden_state
        assert torch.equal(twice[0], twice[1])
        torch.testing.assert_close(alone[0], first[1])
        model.config.register_seed = 1
        assert not torch.equal(model(pixel_values).last_hidden_state, first)


@pytest.mark.parametrize("fill", ["randn", "rand"])
def test_eval_leaves_the_global_generator_alone(fill):
    model = make_model("dinov2", register_fill=fill)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model(images())
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("fill", ["randn", "rand"])
def test_drawn_frames_are_fresh_in_training(family, fill):
    model = make_model(family, register_fill=fill).train()
    with torch.no_grad():
        torch.manual_seed(0)
        first = model(images()).last_hidden_state
        second = model(images()).last_hidden_state
        torch.manual_seed(0)
        again = model(images()).last_hidden_state
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_learnable_patch_is_a_parameter_that_trains(family, tmp_path):
    zero = make_model(family)
    model = make_model(family, register_fill="learnable")
    assert "register_patch" not in zero.state_dict() and zero.register_patch is None
    with torch.no_grad():
        assert torch.equal(model(images())[0], zero(images())[0])
    model(images()).last_hidden_state.square().sum().backward()
    assert model.register_patch.grad.abs().sum() > 0
    model.register_patch.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = UniRefinerModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.register_patch, model.register_patch)
    with torch.no_grad():
        assert torch.equal(loaded(images())[0], model(images())[0])
        assert not torch.equal(loaded(images())[0], zero(images())[0])


def test_fresh_learnable_patch_is_zero(tmp_path):
    make_model("dinov2").save_pretrained(tmp_path)
    model = UniRefinerModel.from_pretrained(tmp_path, register_fill="learnable")
    assert torch.equal(model.register_patch, torch.zeros(3, 4, 4))


# Files and dtypes


@pytest.mark.parametrize("fill", ["zero", "randn"])
def test_save_and_reload_are_equal(family, fill, tmp_path):
    model = make_model(family, register_width=2, register_fill=fill, register_seed=4)
    model.save_pretrained(tmp_path)
    loaded, report = UniRefinerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert not loaded.training
    with torch.no_grad():
        ours, theirs = model(images()), loaded(images())
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert same(ours.pooler_output, theirs.pooler_output)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "configuration_unirefiner.py",
        "modeling_unirefiner.py",
        "registers.py",
        "towers.py",
    }


def test_final_norm_is_saved(tmp_path):
    model = make_model("clip_vision_model", final_norm=True)
    model.save_pretrained(tmp_path)
    loaded = UniRefinerModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images())[0], model(images())[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", ["zero", "randn", "learnable"])
def test_half_precision(family, dtype, fill, tmp_path):
    model = make_model(family, register_fill=fill, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        output = model(images().to(dtype)).last_hidden_state
        assert torch.equal(model(images()).last_hidden_state.isnan(), output.isnan())
    assert output.dtype == dtype and output.isfinite().all()
    model.save_pretrained(tmp_path)
    for wanted in (dtype, torch.float32):
        loaded = UniRefinerModel.from_pretrained(tmp_path, dtype=wanted)
        assert {p.dtype for p in loaded.parameters()} == {wanted}
    exact = make_model(family, register_fill=fill)(images()).last_hidden_state
    torch.testing.assert_close(output.float(), exact, atol=0.15, rtol=0.1)


def test_tower_stays_reachable_and_shared(family):
    tower = make_tiny_tower(family)
    model = UniRefinerModel.from_tower(tower)
    assert model.tower is tower
    assert model.config.vision_config is tower.config
    assert tower.config._attn_implementation == "sdpa"
    assert model.patch_size == 4 and model.hidden_size == 32
    assert model._no_split_modules >= tower._no_split_modules


def test_image_text_model_in_memory_gives_its_vision_half():
    dual = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION))
    model = UniRefinerModel.from_tower(dual)
    assert model.tower is dual.vision_model


def test_from_tower_takes_a_folder(family, tmp_path):
    tower = make_tiny_tower(family)
    tower.save_pretrained(tmp_path)
    model = UniRefinerModel.from_tower(tmp_path, register_width=2)
    with torch.no_grad():
        expected = UniRefinerModel.from_tower(tower, register_width=2)(images())
        assert torch.equal(model(images())[0], expected[0])


# Encode, with adapters


def wrap(model):
    """Put a LoRA adapter with nonzero weights on every Linear of the tower's layers."""
    model.tower = add_adapter(model.tower, rank=2, alpha=2, dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def spy_on_attention(tower):
    """Have every call of the tower's attention recorded, as it multiplies."""
    seen = []

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        seen.append([part.transpose(1, 2).flatten(2) for part in (query, key)])
        weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("spy", attend)
    tower.set_attn_implementation("spy")
    return seen


@pytest.mark.parametrize("width", [0, 2])
def test_encode_gives_what_the_attention_multiplies(family, width):
    model = make_model(family, layers=3, register_width=5)
    pixel_values = images()
    seen = spy_on_attention(model.tower)
    with torch.no_grad():
        encoded = model.encode(pixel_values, width, query_key_layers=(0, 2))
    assert set(encoded.queries_keys) == {0, 2}
    inside = torch.zeros(6 + 2 * width, 5 + 2 * width, dtype=torch.bool)
    inside[width : width + 6, width : width + 5] = True
    inside = torch.cat([torch.zeros(prefix(model), dtype=torch.bool), inside.flatten()])
    queries, keys = encoded.queries_keys[2]
    torch.testing.assert_close(queries, seen[2][0][:, inside])
    torch.testing.assert_close(keys, seen[2][1][:, inside])
    assert not torch.allclose(queries, keys, atol=1e-3)
    assert encoded.registers.shape == (2, (6 + 2 * width) * (5 + 2 * width) - 30, 32)


def test_encode_through_an_adapter(family):
    plain = make_model(family)
    model = wrap(make_model(family)).eval()
    pixel_values = images()
    with torch.no_grad():
        base = plain.encode(pixel_values, 1, query_key_layers=(1,))
        adapted = model.encode(pixel_values, 1, query_key_layers=(1,))
        with model.tower.disable_adapter():
            teacher = model.encode(pixel_values, 1, query_key_layers=(1,))
        output = model(pixel_values, output_hidden_states=True)
    assert not torch.allclose(adapted.image, base.image, atol=1e-4)
    assert torch.equal(teacher.image, base.image)
    assert torch.equal(teacher.registers, base.registers)
    for ours, theirs in zip(teacher.queries_keys[1], base.queries_keys[1]):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(adapted.queries_keys[1], base.queries_keys[1]):
        assert not torch.allclose(ours, theirs, atol=1e-4)
    assert torch.equal(output.last_hidden_state, adapted.image)
    assert not adapted.image.requires_grad


def test_merge_equals_the_adapter_and_twice_is_once(family, tmp_path):
    model = wrap(make_model(family)).eval()
    with torch.no_grad():
        expected = model(images()).last_hidden_state
        merge_adapter(model)
        merged = model(images()).last_hidden_state
        merge_adapter(model)
        assert torch.equal(model(images()).last_hidden_state, merged)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = UniRefinerModel.from_pretrained(tmp_path)(images())
    assert torch.equal(loaded.last_hidden_state, merged)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_only_adapters(family, checkpointing):
    model = wrap(make_model(family)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    encoded = model.encode(images(), 1, query_key_layers=(1,))
    queries, keys = encoded.queries_keys[1]
    loss = encoded.image.square().sum() + encoded.registers.square().sum()
    (loss + (queries * keys).sum()).backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


def test_checkpointing_changes_no_gradient(family):
    gradients = []
    for checkpointing in (False, True):
        model = wrap(make_model(family)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.encode(images(), 1).image.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


def test_input_gradient_hook_for_reentrant_checkpointing(family):
    if family == "radio":
        pytest.skip("its embeddings are a tuple, which the hook cannot mark")
    model = wrap(make_model(family)).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.encode(images(), 1).image.square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


# Compilation


COMPILED = ("dinov2", "clip_vision_model", "unirefiner_eva_clip_vision")


@pytest.mark.parametrize("family", [*COMPILED, "internvl_vision", "dinov3_vit"])
def test_compiles_without_a_graph_break(family):
    model = make_model(family)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(images()).last_hidden_state
        torch.testing.assert_close(compiled(images()).last_hidden_state, expected)


@pytest.mark.parametrize("family", COMPILED)
def test_drawn_frame_compiles(family):
    model = make_model(family, register_fill="randn")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(images()).last_hidden_state
        torch.testing.assert_close(compiled(images()).last_hidden_state, expected)
