"""The vision families: one table that says how each tower is called and read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from .errors import UniRefinerError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EMBEDDINGS = "embeddings"
"""Path of the module, in every family, whose output goes to the layers."""


@dataclass(frozen=True)
class TowerFamily:
    """How one vision family is called and where its parts are.

    Attributes:
        checkpoints: where such towers are published, for the table of support.
        layers: path of the list of transformer layers.
        query: path, inside a layer, of the module whose output is the queries before
            any rotary embedding: the projection, or the norm after it.
        key: the same for the keys.
        prefix_tokens: tokens in front of the patch tokens, always there.
        prefix_fields: config fields that count further prefix tokens.
        rotary: queries and keys are rotated by the ``position_embeddings`` (cosines and
            sines, halves paired) that the attention module is given.
        interpolate: the tower takes ``interpolate_pos_encoding=True`` (and needs it
            for every grid but its own); False: it resizes its positions unasked.
        final_norm: path of the tower's last layer norm; None if it has none.
        norm_in_output: ``last_hidden_state`` went through `final_norm`.
        norm_unless: config field that, when true, takes the last norm out.
        pooling_head: path of a head that attends over all patch tokens, so that the
            pooled output has to be taken again without the frame. None: the pooled
            output is read from a prefix token, as the tower returns it.
        pooling_head_field: config field that says whether the tower has that head; a
            config without the field (SigLIP before transformers 5.23) has it.
        without_pooler: the tower is built without its pooler, whose weights most
            published checkpoints lack.
        settings: config fields and the value that takes chance out of a pass in
            training mode; set on every tower.
        requires: config fields and the value that is needed, then why.
        takes_patches: the tower is given patches and their grid, not an image (NaFlex).
        shuffles: the tower orders its patches by ``noise``, which is given in order.
        positions: the learned absolute position embedding, a parameter's path; None: the
            tower has none.
        no_register_tokens: why learned tokens cannot join its sequence.
        projection: path of the patch embedding, of a tower whose
            ``get_input_embeddings`` does not give it.
        normalises: config fields of the mean and deviation the tower normalises pixels
            by itself, which it takes in [0, 1]; None: it takes them normalised.
        dual_encoder: ``model_type`` of image-text checkpoints that hold this tower.
        other_parts: first parts of the weight names in a published checkpoint that
            belong to no part of the tower: the other half, or heads of its training.
        text_reading: how patch tokens reach the space of the text (`dense_text`):
            ``block``, the last layer computed again, the last norm and the visual
            projection; ``head``, the value path of the pooling head. None: no text, or
            no published reading.
        note: what a user should know, for the table of support.
    """

    checkpoints: str
    layers: str
    query: str
    key: str
    prefix_tokens: int
    final_norm: str | None
    norm_in_output: bool
    norm_unless: str | None = None
    interpolate: bool = False
    prefix_fields: tuple[str, ...] = ()
    rotary: bool = False
    pooling_head: str | None = None
    pooling_head_field: str | None = None
    without_pooler: bool = False
    settings: tuple[tuple[str, float | None], ...] = ()
    requires: tuple[tuple[str, bool, str], ...] = ()
    takes_patches: bool = False
    shuffles: bool = False
    positions: str | None = None
    no_register_tokens: str = ""
    projection: str | None = None
    normalises: tuple[str, str] | None = None
    dual_encoder: str | None = None
    other_parts: tuple[str, ...] = ()
    text_reading: str | None = None
    note: str = ""

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        """Tokens in front of the patch tokens of a tower with this config."""
        return self.prefix_tokens + sum(getattr(config, f) for f in self.prefix_fields)

    def check_register_tokens(self, config: PreTrainedConfig) -> None:
        """Refuse a tower that takes no learned register tokens.

        Raises:
            UniRefinerError: names the reason.
        """
        if self.positions is None:
            raise UniRefinerError(
                f"A {config.model_type} tower takes no register tokens (PH-Reg): "
                f"{self.no_register_tokens}. UniRefiner's frame goes with every tower."
            )

    def norm_path(self, config: PreTrainedConfig) -> str | None:
        """Path of the last layer norm of a tower with this config, None without one."""
        if self.norm_unless is not None and getattr(config, self.norm_unless):
            return None
        return self.final_norm

    def norms_output(self, config: PreTrainedConfig) -> bool:
        """Whether ``last_hidden_state`` went through the last layer norm."""
        return self.norm_in_output and self.norm_path(config) is not None

    def pools_over_patches(self, config: PreTrainedConfig) -> bool:
        """Whether a tower with this config has the head at `pooling_head`."""
        if self.pooling_head is None:
            return False
        field = self.pooling_head_field
        return field is None or not hasattr(config, field) or getattr(config, field)


_ROTARY = "its positions are rotary: there is no position embedding to train"
_TABLE, _EMBEDDING = (
    "embeddings.position_embeddings",
    "embeddings.position_embedding.weight",
)
_DUAL_REST = ("text_model", "text_projection", "visual_projection", "logit_scale")

FAMILIES: dict[str, TowerFamily] = {
    "dinov2": TowerFamily(
        checkpoints="facebook/dinov2-*",
        layers="encoder.layer",
        query="attention.q_proj",
        key="attention.k_proj",
        positions=_TABLE,
        prefix_tokens=1,
        final_norm="layernorm",
        norm_in_output=True,
        settings=(("drop_path_rate", 0.0),),
    ),
    "dinov2_with_registers": TowerFamily(
        checkpoints="facebook/dinov2-with-registers-*",
        layers="encoder.layer",
        query="attention.q_proj",
        key="attention.k_proj",
        positions=_TABLE,
        prefix_tokens=1,
        prefix_fields=("num_register_tokens",),
        final_norm="layernorm",
        norm_in_output=True,
        settings=(("drop_path_rate", 0.0),),
    ),
    "dinov3_vit": TowerFamily(
        checkpoints="facebook/dinov3-vit*",
        layers="model.layer",
        query="attention.q_proj",
        key="attention.k_proj",
        rotary=True,
        no_register_tokens=_ROTARY,
        prefix_tokens=1,
        prefix_fields=("num_register_tokens",),
        final_norm="norm",
        norm_in_output=True,
        settings=(
            ("pos_embed_shift", None),
            ("pos_embed_jitter", None),
            ("pos_embed_rescale", None),
            ("drop_path_rate", 0.0),
        ),
        note="positions are relative to the framed grid",
    ),
    "clip_vision_model": TowerFamily(
        checkpoints="openai/clip-vit-*, laion/CLIP-*",
        layers="encoder.layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        positions=_EMBEDDING,
        prefix_tokens=1,
        final_norm="post_layernorm",
        norm_in_output=False,
        interpolate=True,
        dual_encoder="clip",
        other_parts=_DUAL_REST,
        text_reading="block",
    ),
    "metaclip_2_vision_model": TowerFamily(
        checkpoints="facebook/metaclip-2-*",
        layers="encoder.layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        positions=_EMBEDDING,
        prefix_tokens=1,
        final_norm="post_layernorm",
        norm_in_output=False,
        interpolate=True,
        dual_encoder="metaclip_2",
        other_parts=_DUAL_REST,
        text_reading="block",
    ),
    "siglip_vision_model": TowerFamily(
        checkpoints="google/siglip-*, fixed-size google/siglip2-*",
        layers="encoder.layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        positions=_EMBEDDING,
        prefix_tokens=0,
        final_norm="post_layernorm",
        norm_in_output=True,
        interpolate=True,
        pooling_head="head",
        pooling_head_field="vision_use_head",
        dual_encoder="siglip",
        other_parts=("text_model", "logit_scale", "logit_bias"),
        text_reading="head",
    ),
    "siglip2_vision_model": TowerFamily(
        checkpoints="google/siglip2-*-naflex",
        layers="encoder.layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        positions=_EMBEDDING,
        prefix_tokens=0,
        final_norm="post_layernorm",
        norm_in_output=True,
        takes_patches=True,
        pooling_head="head",
        pooling_head_field="vision_use_head",
        dual_encoder="siglip2",
        other_parts=("text_model", "logit_scale", "logit_bias"),
        text_reading="head",
        note="given images of one size a batch; cut into patches inside",
    ),
    "vit": TowerFamily(
        checkpoints="google/vit-*, facebook/dino-vit*",
        layers="layers",
        query="attention.q_proj",
        key="attention.k_proj",
        positions=_TABLE,
        prefix_tokens=1,
        final_norm="layernorm",
        norm_in_output=True,
        interpolate=True,
        without_pooler=True,
        other_parts=("pooler", "classifier", "decoder"),
        note="without its pooler",
    ),
    "deit": TowerFamily(
        checkpoints="facebook/deit-*",
        layers="layers",
        query="attention.q_proj",
        key="attention.k_proj",
        positions=_TABLE,
        prefix_tokens=2,
        final_norm="layernorm",
        norm_in_output=True,
        interpolate=True,
        without_pooler=True,
        other_parts=(
            "pooler",
            "classifier",
            "cls_classifier",
            "distillation_classifier",
            "decoder",
        ),
        note="distilled checkpoints; without its pooler",
    ),
    "vit_mae": TowerFamily(
        checkpoints="facebook/vit-mae-*",
        layers="layers",
        query="attention.q_proj",
        key="attention.k_proj",
        positions=_TABLE,
        prefix_tokens=1,
        final_norm="layernorm",
        norm_in_output=True,
        interpolate=True,
        shuffles=True,
        settings=(("mask_ratio", 0.0),),
        other_parts=("decoder",),
        note="its random masking is off",
    ),
    "vit_msn": TowerFamily(
        checkpoints="facebook/vit-msn-*",
        layers="layers",
        query="attention.q_proj",
        key="attention.k_proj",
        positions=_TABLE,
        prefix_tokens=1,
        final_norm="layernorm",
        norm_in_output=True,
        interpolate=True,
        other_parts=("classifier",),
    ),
    "ijepa": TowerFamily(
        checkpoints="facebook/ijepa_*",
        layers="layers",
        query="attention.q_proj",
        key="attention.k_proj",
        positions=_TABLE,
        prefix_tokens=0,
        final_norm="layernorm",
        norm_in_output=True,
        interpolate=True,
        without_pooler=True,
        other_parts=("pooler", "classifier"),
        note="without its pooler",
    ),
    "mlcd_vision_model": TowerFamily(
        checkpoints="DeepGlint-AI/mlcd-vit-*, DeepGlint-AI/rice-vit-*",
        layers="encoder.layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        rotary=True,
        no_register_tokens=_ROTARY,
        prefix_tokens=1,
        final_norm="post_layernorm",
        norm_in_output=False,
    ),
    "internvl_vision": TowerFamily(
        checkpoints="OpenGVLab/InternViT-6B-*, InternViT-300M-*, "
        "the vision tower of OpenGVLab/InternVL*-hf",
        layers="encoder.layer",
        query="attention.q_norm",
        key="attention.k_norm",
        positions=_TABLE,
        prefix_tokens=1,
        final_norm="layernorm",
        norm_in_output=True,
        norm_unless="use_mean_pooling",
        note="reads InternViT as published; 45 layers of its 48",
    ),
    "aimv2_vision_model": TowerFamily(
        checkpoints="apple/aimv2-large-patch14-native",
        layers="encoder.layers",
        query="attention.q_proj",
        key="attention.k_proj",
        no_register_tokens="its positions are computed: there is no embedding to train",
        prefix_tokens=0,
        final_norm="rms_norm",
        norm_in_output=True,
        pooling_head="head",
        pooling_head_field="use_head",
        requires=(
            (
                "is_native",
                True,
                "its learned positions fit one grid only, and a frame makes another: "
                "use a native-resolution AIMv2",
            ),
        ),
        dual_encoder="aimv2",
        other_parts=_DUAL_REST,
        note="native resolution only; its text side is not kept: no published reading of "
        "its patch tokens as words",
    ),
    "tipsv2_vision_model": TowerFamily(
        checkpoints="google/tipsv2-*",
        layers="encoder.layer",
        query="attention.q_proj",
        key="attention.k_proj",
        positions=_TABLE,
        prefix_tokens=1,
        prefix_fields=("num_register_tokens",),
        final_norm="layernorm",
        norm_in_output=True,
        settings=(("drop_path_rate", 0.0),),
        dual_encoder="tipsv2",
        other_parts=("text_model", "temperature"),
        note="its text side is not kept: its reading of patch tokens is not checked here",
    ),
    "beit": TowerFamily(
        checkpoints="microsoft/beit-*",
        layers="layers",
        query="attention.q_proj",
        key="attention.k_proj",
        no_register_tokens="its relative position bias has a place for patches and CLS only",
        prefix_tokens=1,
        final_norm="layernorm",
        norm_in_output=True,
        norm_unless="use_mean_pooling",
        interpolate=True,
        without_pooler=True,
        settings=(("drop_path_rate", 0.0),),
        other_parts=("pooler", "classifier", "lm_head", "layernorm"),
        note="without its pooler",
    ),
    "radio": TowerFamily(
        checkpoints="nvidia/C-RADIO* converted to transformers",
        layers="encoder.layer",
        query="attention.q_proj",
        key="attention.k_proj",
        positions="embeddings.position_embedding",
        projection="embeddings.patch_projection",
        normalises=("norm_mean", "norm_std"),
        prefix_tokens=0,
        prefix_fields=("num_cls_tokens", "num_registers"),
        final_norm=None,
        norm_in_output=False,
        settings=(("drop_path_rate", 0.0),),
        note="takes pixels in [0, 1], a zero frame is black; no reentrant checkpointing",
    ),
    "pixio": TowerFamily(
        checkpoints="facebook/pixio-*",
        layers="layers",
        query="attention.q_proj",
        key="attention.k_proj",
        positions=_TABLE,
        prefix_tokens=0,
        prefix_fields=("n_cls_tokens",),
        final_norm="layernorm",
        norm_in_output=True,
        settings=(("drop_path_rate", 0.0),),
    ),
    "unirefiner_eva_clip_vision": TowerFamily(
        checkpoints="BAAI/EVA-CLIP-8B, EVA-CLIP-8B-448, EVA-CLIP-18B",
        layers="encoder.layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        positions=_EMBEDDING,
        prefix_tokens=1,
        final_norm="post_layernorm",
        norm_in_output=False,
        other_parts=_DUAL_REST,
        text_reading="block",
        note="our own module; reads the published layout as safetensors",
    ),
}
"""Model type of the vision config -> family."""

_NOT_PLAIN = (
    "its layers work at several resolutions, so it has no token per patch to refine"
)

REFUSED: dict[str, str] = {
    "sam3_vit_model": (
        "its attention runs in windows over a square grid: a frame would move every "
        "window, and oblong images are not taken"
    ),
    "sam3": "see sam3_vit_model",
    "sam3_vision_model": "see sam3_vit_model",
    "timm_wrapper": (
        "timm needs torchvision, which breaks beside a PyTorch of another build and is "
        "no dependency of this package, so no test here could prove such a tower "
        "(EVA-02, PE)"
    ),
    "timm_backbone": "see timm_wrapper",
    "data2vec-vision": (
        "its attention in transformers does not go through the attention interface, so "
        "eager attention cannot be chosen and reentrant checkpointing loses gradients"
    ),
    "swin": _NOT_PLAIN,
    "swinv2": _NOT_PLAIN,
    "hiera": _NOT_PLAIN,
    "convnext": _NOT_PLAIN,
    "convnextv2": _NOT_PLAIN,
    "dinov3_convnext": _NOT_PLAIN,
    "resnet": _NOT_PLAIN,
}
"""Model type -> why such a tower is refused."""

DUAL_ENCODERS: dict[str, str] = {
    family.dual_encoder: model_type
    for model_type, family in FAMILIES.items()
    if family.dual_encoder is not None
}
"""Model type of an image-text config -> model type of its vision config."""


def family_of(config: PreTrainedConfig) -> TowerFamily:
    """The family of a vision config, or of the vision half of an image-text config.

    Raises:
        UniRefinerError: the model type is not in the table; names it and the table.
    """
    model_type = DUAL_ENCODERS.get(config.model_type, config.model_type)
    if model_type not in FAMILIES:
        supported = ", ".join(sorted([*FAMILIES, *DUAL_ENCODERS]))
        reason = REFUSED.get(model_type)
        raise UniRefinerError(
            f"model_type {config.model_type!r} is not a supported vision tower"
            f"{f': {reason}' if reason else ''}. Supported: {supported}."
        )
    return FAMILIES[model_type]


def patch_size_of(config: PreTrainedConfig) -> int:
    """Side of a patch in pixels.

    Raises:
        UniRefinerError: patches that are not square.
    """
    size = config.patch_size
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UniRefinerError(
            f"patch_size is {size}; only square patches are supported."
        )
    return size[0]


def image_size_of(config: PreTrainedConfig) -> int:
    """Side in pixels of the images a tower was pretrained on.

    A NaFlex config counts patches; the side is that of as many in a square.
    """
    if family_of(config).takes_patches:
        return math.isqrt(config.num_patches) * patch_size_of(config)
    size = config.image_size
    return size if isinstance(size, int) else size[0]


def layers_of(tower: nn.Module, family: TowerFamily) -> nn.ModuleList:
    """The list of a tower's transformer layers.

    Args:
        tower: it may be wrapped by a Peft adapter.

    Raises:
        UniRefinerError: the tower has no such list; says what is there.
    """
    # An adapter round the tower has a part named "model" of its own.
    unwrapped = getattr(tower, "get_base_model", lambda: tower)()
    layers = part_of(unwrapped, family.layers)
    if not isinstance(layers, nn.ModuleList):
        raise UniRefinerError(
            f"{family.layers!r} of {type(tower).__name__} is a "
            f"{type(layers).__name__}, expected a list of layers."
        )
    return layers


def part_of(module: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`, or a UniRefinerError that says what was looked for."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise UniRefinerError(
            f"{type(module).__name__} has no module {path!r}, which the table of "
            f"families expects ({error})."
        ) from error


__all__ = [
    "DUAL_ENCODERS",
    "EMBEDDINGS",
    "FAMILIES",
    "REFUSED",
    "TowerFamily",
    "family_of",
    "image_size_of",
    "layers_of",
    "part_of",
    "patch_size_of",
]
