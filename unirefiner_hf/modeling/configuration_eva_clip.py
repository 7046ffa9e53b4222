"""Configuration of EVA-CLIP's vision tower (arXiv 2402.04252)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .errors import UniRefinerError

# Parts of other EVA-CLIP towers that EVA-CLIP-8B and EVA-CLIP-18B do not have.
_ABSENT = ("use_rope", "use_sub_ln", "use_swiglu_mlp")


@strict
class EvaClipVisionConfig(PreTrainedConfig):
    r"""Configuration of `EvaClipVisionModel`; the defaults are EVA-CLIP-8B.

    Args:
        use_rms_norm: root-mean-square norms in place of layer norms.
        post_layernorm: each norm after its attention or MLP instead of before it.
        q_bias, k_bias, v_bias: bias of the projections.
    """

    model_type = "unirefiner_eva_clip_vision"
    base_config_key = "vision_config"

    hidden_size: int = 4096
    intermediate_size: int = 20480
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    use_rms_norm: bool = False
    post_layernorm: bool = False
    initializer_range: float = 0.02

    @staticmethod
    def describes(published: dict[str, Any]) -> bool:
        """Whether a ``config.json`` is that of a published EVA-CLIP."""
        if published.get("model_type") == EvaClipVisionConfig.model_type:
            return False
        names = [*(published.get("architectures") or [])]
        names += [str(value) for value in (published.get("auto_map") or {}).values()]
        return any("evaclip" in name.lower() for name in names)

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> "EvaClipVisionConfig":
        """The vision half of a published ``config.json``.

        Raises:
            UniRefinerError: a field this tower needs is missing, or the checkpoint has a
                part that EVA-CLIP-8B and 18B do not have (rotary positions, SwiGLU,
                norms inside attention and MLP).
        """
        vision = published.get("vision_config") or published
        for field in _ABSENT:
            if vision.get(field):
                raise UniRefinerError(
                    f"this EVA-CLIP has {field}=true, which is not supported: EVA-CLIP-8B "
                    "and EVA-CLIP-18B are."
                )
        needed: tuple[str, ...] = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
        )
        needed += ("num_attention_heads", "image_size", "patch_size")
        missing = [field for field in needed if field not in vision]
        if missing:
            raise UniRefinerError(
                f"the vision config of EVA-CLIP lacks {', '.join(missing)}."
            )
        kept = {
            field: vision[field]
            for field in cls.__dataclass_fields__
            if field in cls.__annotations__ and vision.get(field) is not None
        }
        return cls(**kept, dtype=published.get("torch_dtype", published.get("dtype")))


__all__ = ["EvaClipVisionConfig"]
