"""InternViT (arXiv 2312.14238) as published, read as transformers' `InternVLVisionModel`.

The same architecture under other names, with queries, keys and values packed: the weights
are renamed and split as they are loaded, and saved under transformers' names.

Imported where it is needed: this module imports a model of transformers, which may be
what is importing us.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoModel, InternVLVisionConfig, InternVLVisionModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from .errors import UniRefinerError

DENSE_LAYERS = 45
"""Layers that run. InternViT-6B was trained with 48; the last three suit contrast with text
and are left out for dense use, as its authors do from InternViT-6B-448px-V1-2 on."""

_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)

# Published field -> ours, and the value where a config lacks it.
_FIELDS: dict[str, tuple[str, Any]] = {
    "num_channels": ("num_channels", 3),
    "hidden_act": ("hidden_act", "gelu"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "norm_type": ("norm_type", "rms_norm"),
    "qkv_bias": ("attention_bias", False),
    "qk_normalization": ("use_qk_norm", True),
    "attention_dropout": ("attention_dropout", 0.0),
    "initializer_factor": ("layer_scale_init_value", 0.1),
    "initializer_range": ("initializer_range", 0.02),
}

_RENAMED = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "encoder.layers.": "encoder.layer.",
    ".attn.proj": ".attention.projection_layer",
    ".attn.": ".attention.",
    ".norm1": ".layernorm_before",
    ".norm2": ".layernorm_after",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
}


@strict
class PublishedInternViTConfig(InternVLVisionConfig):
    """An `InternVLVisionConfig` whose weights are still to be read as published.

    It is saved, and loads again, as an `InternVLVisionConfig`.
    """

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> PublishedInternViTConfig:
        """A published ``config.json`` for dense use: 45 layers at most.

        Raises:
            UniRefinerError: a field this tower needs is missing, an unknown norm, or one
                of queries and keys with an epsilon of its own.
        """
        missing = [field for field in _NEEDED if field not in published]
        if missing:
            raise UniRefinerError(
                f"the config of InternViT lacks {', '.join(missing)}."
            )
        kept = {field: published[field] for field in _NEEDED}
        kept["num_hidden_layers"] = min(kept["num_hidden_layers"], DENSE_LAYERS)
        for field, (ours, usual) in _FIELDS.items():
            value = published.get(field)
            kept[ours] = usual if value is None else value
        if kept["norm_type"] not in ("rms_norm", "layer_norm"):
            raise UniRefinerError(
                f"norm_type is {kept['norm_type']!r}; it must be rms_norm or layer_norm."
            )
        if kept["use_qk_norm"] and kept["layer_norm_eps"] != 1e-6:
            raise UniRefinerError(
                f"layer_norm_eps is {kept['layer_norm_eps']}; with qk_normalization it "
                "must be 1e-06, which InternVLVisionModel norms queries and keys with."
            )
        dtype = published.get("torch_dtype", published.get("dtype"))
        # Mean pooling: no last norm, as published.
        return cls(**kept, use_mean_pooling=True, dtype=dtype)


class PublishedInternViT(InternVLVisionModel):
    """An `InternVLVisionModel` that reads the published layout."""

    config_class = PublishedInternViTConfig
    _keys_to_ignore_on_load_unexpected = [r"encoder\.layer\.(45|46|47)\."]


class _Renamed(WeightRenaming):
    """A renaming that saving does not undo."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return self  # as in transformers' LayerPairCollapse: no name of ours matches


class _Split(WeightConverter):
    """A split that saving does not undo."""

    __slots__ = ()

    def reverse_transform(self) -> WeightConverter:
        return self


register_checkpoint_conversion_mapping(
    PublishedInternViT.__name__,
    [
        *(_Renamed(published, ours) for published, ours in _RENAMED.items()),
        _Split(
            "attention.qkv",
            ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
            operations=[Chunk(dim=0)],
        ),
    ],
    overwrite=True,
)
AutoModel.register(PublishedInternViTConfig, PublishedInternViT, exist_ok=True)

__all__ = ["PublishedInternViT", "PublishedInternViTConfig"]
