"""Tiny random dual encoders with a tokenizer, on disk as on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor

from tests.export.conftest import make_record
from unirefiner_hf.loading.adapter import save_adapter
from unirefiner_hf.loading.backbone import takes_final_norm
from unirefiner_hf.loading.lora import add_adapter
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.modeling.towers import load_tower

WORDS = "[PAD] [UNK] a photo of the cat dog sky . animal plant thing background <end>"
VOCABULARY = {word: number for number, word in enumerate(WORDS.split())}
END = VOCABULARY["<end>"]
"""The largest id, as in CLIP."""
WIDTH, TEXT_WIDTH, COMMON = 24, 16, 20
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 12,
    "projection_dim": COMMON,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": 0,
}
KINDS = {
    "clip": "CLIP",
    "metaclip_2": "MetaClip2",
    "siglip": "Siglip",
    "siglip2 NaFlex": "Siglip2",
}
TEXTS = ["a photo of the cat", "sky", "a photo of a dog . dog . dog . dog . dog . dog"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, an end token behind."""
    inner = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="<end>"
    )


def make_processor(kind: str) -> BaseImageProcessor:
    """The image processor of such a dual encoder."""
    if kind.startswith("siglip"):
        size = {"height": 16, "width": 16}
        return transformers.SiglipImageProcessorPil(size=size)
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)


def make_dual_encoder(kind: str, seed: int = 0) -> PreTrainedModel:
    """Of one of `KINDS`, every weight moved off its initial value."""
    vision: dict[str, Any] = dict(VISION)
    text = {**TEXT, "hidden_size": WIDTH} if kind.startswith("siglip") else TEXT
    options: dict[str, Any] = {"projection_dim": COMMON}
    if kind.startswith("siglip"):
        text = {k: v for k, v in text.items() if k != "projection_dim"}
        options = {}
    if kind == "siglip2 NaFlex":
        vision["num_patches"] = (vision.pop("image_size") // 4) ** 2
    name = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, text_config=text, **options
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}Model")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_dual_encoder(folder: Path, kind: str, seed: int = 0) -> PreTrainedModel:
    """Weights, tokenizer and image processor of a dual encoder -> the model."""
    model = make_dual_encoder(kind, seed)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    make_processor(kind).save_pretrained(folder)
    return model


def save_eva_clip(folder: Path, **text_changes: Any) -> dict[str, torch.Tensor]:
    """An EVA-CLIP in its published layout, from fresh weights -> those weights."""
    bias = {"q_bias": True, "k_bias": True, "v_bias": True}
    flat = {"use_rms_norm": False, "post_layernorm": False, "hidden_act": "gelu"}
    vision = {**VISION, **bias, **flat, "layer_norm_eps": 1e-6}
    text = {**TEXT, **bias, **flat, "layer_norm_eps": 1e-5, "eos_token_id": 2}
    config = {
        "architectures": ["EvaCLIPModel"],
        "auto_map": {"AutoConfig": "configuration_evaclip.EvaCLIPConfig"},
        "model_type": "clip",
        "torch_dtype": "float32",
        "projection_dim": COMMON,
        "text_config": {**text, **text_changes},
        "vision_config": vision,
    }
    like = make_dual_encoder("clip", seed=3).state_dict()
    weights = {name: weight for name, weight in like.items() if "pre_layr" not in name}
    generator = torch.Generator().manual_seed(4)
    weights["visual_projection.bias"] = torch.randn(COMMON, generator=generator)
    at = "vision_model.embeddings.patch_embedding.bias"
    weights[at] = torch.randn(WIDTH, generator=generator)
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(folder)
    make_processor("clip").save_pretrained(folder)
    return weights


def save_dual_run(
    folder: Path, kind: str, seed: int = 0
) -> tuple[UniRefinerModel, Path, Path]:
    """A finished run on a dual encoder -> its model, its folder, its base's folder."""
    base, run = folder / "tiny-dual", folder / "run"
    if kind == "eva":
        save_eva_clip(base)
    else:
        save_dual_encoder(base, kind)
    tower = load_tower(str(base))
    norm = takes_final_norm(tower.config)
    model = UniRefinerModel.from_tower(tower, register_width=2, final_norm=norm)
    model.tower = add_adapter(tower, name="example-lab/tiny-dual")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    (run / "adapter").mkdir(parents=True)
    save_adapter(model, run / "adapter")
    record = make_record(
        model__base="example-lab/tiny-dual",
        model__family=tower.config.model_type,
        model__final_norm=norm,
    )
    (run / "run.json").write_text(json.dumps(record))
    Image.new("RGB", (8, 8)).save(run / "before_after.png")
    return model.eval(), run, base
