"""Configuration of InternViT (arXiv 2312.14238)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

DENSE_LAYERS = 45


@strict
class InternViTConfig(PreTrainedConfig):
    r"""Configuration of `InternViTModel`; the defaults are InternViT-6B.

    Args:
        num_hidden_layers: layers that run. InternViT-6B was trained with 48; the last
            three suit contrast with text and are left out for dense use, as its authors
            do from InternViT-6B-448px-V1-2 on.
        published_layers: layers of the checkpoint it was read from.
        qk_normalization: root-mean-square norm of queries and of keys, over all heads.
        norm_type: ``rms_norm`` (6B) or ``layer_norm`` (300M).
        initializer_factor: initial layer scale.

    Raises:
        ValueError: an unknown `norm_type`.
    """

    model_type = "unirefiner_intern_vit"

    hidden_size: int = 3200
    intermediate_size: int = 12800
    num_hidden_layers: int = DENSE_LAYERS
    published_layers: int | None = None
    num_attention_heads: int = 25
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    norm_type: str = "rms_norm"
    qkv_bias: bool = False
    qk_normalization: bool = True
    attention_dropout: float = 0.0
    initializer_factor: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.norm_type not in ("rms_norm", "layer_norm"):
            raise ValueError(
                f"norm_type is {self.norm_type!r}; it must be rms_norm or layer_norm."
            )

    @staticmethod
    def describes(published: dict[str, Any]) -> bool:
        """Whether a ``config.json`` is that of a published InternViT."""
        return published.get("model_type") == "intern_vit_6b"

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> "InternViTConfig":
        """A published ``config.json`` for dense use: 45 layers at most.

        Raises:
            ValueError: a field this tower needs is missing.
        """
        needed: tuple[str, ...] = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
        )
        needed += ("num_attention_heads", "image_size", "patch_size")
        missing = [field for field in needed if field not in published]
        if missing:
            raise ValueError(f"the config of InternViT lacks {', '.join(missing)}.")
        kept = {
            field: published[field]
            for field in cls.__dataclass_fields__
            if field in cls.__annotations__ and published.get(field) is not None
        }
        layers = kept["num_hidden_layers"]
        kept |= {
            "num_hidden_layers": min(layers, DENSE_LAYERS),
            "published_layers": layers,
        }
        return cls(**kept, dtype=published.get("torch_dtype", published.get("dtype")))


__all__ = ["InternViTConfig"]
