"""InternViT (arXiv 2312.14238) as published, read as transformers' `InternVLVisionModel`.

The same architecture under other names, with queries, keys and values packed: the weights
are renamed and split as they are loaded, and saved under transformers' names.
"""

from __future__ import annotations

from transformers import InternVLVisionModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from .configuration_intern_vit import PublishedInternViTConfig

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

__all__ = ["PublishedInternViT"]
