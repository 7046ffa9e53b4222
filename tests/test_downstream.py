"""Forms a refined model takes downstream: graphs, compiled, half precision, split."""

import numpy
import pytest
import torch
from transformers import BitsAndBytesConfig

from tests.conftest import ALL_FAMILIES, make_tiny_tower
from unirefiner_hf import UniRefinerBackbone, UniRefinerError, UniRefinerModel
from unirefiner_hf.export.onnx import ONE_BATCH, ONE_SHAPE, export_onnx, export_program

# One of each kind of position: bicubic, antialiased, rotary, resized by the tower, by us.
KINDS = (
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "clip_vision_model",
    "siglip_vision_model",
    "siglip2_vision_model",
    "unirefiner_eva_clip_vision",
    "internvl_vision",
)
UNSEEN = ((7, 9), (12, 4), (4, 4))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def refined(family, **options):
    tower = make_tiny_tower(family, layers=options.pop("layers", 1))
    return UniRefinerModel.from_tower(tower, **options)


def images(rows, columns, batch=2):
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randn(batch, 3, 4 * rows, 4 * columns, generator=generator)


def test_a_graph_takes_every_size(kind):
    fixed = 2 if kind in ONE_BATCH else None
    model = refined(kind)
    modules = list(model.modules())
    graph = export_program(model, batch=fixed).module()
    assert list(model.modules()) == modules
    for index, size in enumerate(UNSEEN):
        pixels = images(*size, batch=fixed or index + 1)
        with torch.no_grad():
            expected = model(pixels).feature_map
            torch.testing.assert_close(graph(pixels), expected)


@pytest.mark.parametrize("family", ["dinov2", "siglip_vision_model"])
def test_onnx_takes_every_size(family, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = refined(family, register_fill="learnable", register_width=2)
    torch.nn.init.normal_(model.register_patch)
    file = export_onnx(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for index, size in enumerate(UNSEEN):
        pixels = images(*size, batch=index + 1)
        with torch.no_grad():
            expected = model(pixels).feature_map.numpy()
        (ours,) = session.run(["feature_map"], {"pixel_values": pixels.numpy()})
        numpy.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported():
    with pytest.raises(UniRefinerError, match="training mode"):
        export_program(refined("dinov2").train())
    with pytest.raises(UniRefinerError, match="batch=1"):
        export_program(refined("siglip2_vision_model"))
    with pytest.raises(UniRefinerError, match="randn"):
        export_program(refined("dinov2", register_fill="randn"))
    assert set(ONE_SHAPE) == {"radio"}
    with pytest.raises(UniRefinerError, match="longer"):
        export_program(refined("radio"))


def test_compiles_as_one_graph(kind):
    model = refined(kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for size in ((6, 5), (7, 9)):
            ours, theirs = compiled(images(*size)), model(images(*size))
            torch.testing.assert_close(ours.feature_map, theirs.feature_map)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_half_precision(family, dtype, tmp_path):
    model = refined(family, layers=2)
    model.save_pretrained(tmp_path)
    half = UniRefinerModel.from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        ours = half(images(6, 5)).last_hidden_state
        theirs = model(images(6, 5)).last_hidden_state
    assert ours.dtype == dtype
    off = (ours.float() - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert off.max() < (0.05 if dtype == torch.bfloat16 else 0.01)


# accelerate cannot put SigLIP's pooling head, an nn.MultiheadAttention, on disk.
@pytest.mark.parametrize("family", [kind for kind in KINDS if "siglip" not in kind])
@pytest.mark.parametrize("kind_of_model", [UniRefinerModel, UniRefinerBackbone])
def test_split_over_memory_and_disk(family, kind_of_model, tmp_path):
    model = refined(family, layers=4)
    model.save_pretrained(tmp_path / "model")
    layer = type(model.tower.get_submodule(model.family.layers)[0]).__name__
    assert layer in model._no_split_modules
    whole = kind_of_model.from_pretrained(tmp_path / "model")
    total = sum(p.numel() * p.element_size() for p in whole.parameters())
    split = kind_of_model.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": total // 2},
        offload_folder=tmp_path / "disk",
    )
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}, split.hf_device_map
    with torch.no_grad():
        ours, theirs = split(images(6, 5)), whole(images(6, 5))
    for name in ("last_hidden_state", "feature_map", "feature_maps"):
        if name in theirs:
            torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("bits", [8, 4])
def test_loads_in_fewer_bits(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    tower = make_tiny_tower("unirefiner_eva_clip_vision", hidden_size=64)
    model = UniRefinerModel.from_tower(tower)
    model.save_pretrained(tmp_path)
    small = UniRefinerModel.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_8bit=bits == 8,
            load_in_4bit=bits == 4,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    with torch.no_grad():
        ours = small(images(6, 5)).last_hidden_state
        theirs = model(images(6, 5)).last_hidden_state
    off = (ours - theirs).norm() / theirs.norm()
    assert 0 < off < (0.05 if bits == 8 else 0.3)
