"""Configuration of the register model."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import SubConfigSpec

from .registers import FILLS

FORMAT_VERSION = 1


@strict
class UniRefinerConfig(BackboneConfigMixin, PreTrainedConfig):
    """A vision tower and the register frame put round its images.

    Args:
        vision_config: config of the tower.
        register_width: frame in patches; 0 is the bare tower.
        register_fill: ``"zero"``, ``"randn"``, ``"rand"`` or ``"learnable"``.
        register_seed: seed of a random frame in eval mode.
        final_norm: apply the tower's last layer norm to the patch tokens of a family
            whose `last_hidden_state` lacks it (CLIP). False gives the bare tower's tokens.
        apply_layernorm: apply the norm of `last_hidden_state` to the feature maps of
            intermediate stages too, where the model is a backbone.
        reshape_hidden_states: feature maps ``(batch, hidden, height, width)``; False:
            ``(batch, 1 + patches, hidden)`` with the class token first.
        format_version: version of the checkpoint's layout.

    Raises:
        ValueError: a value is outside its range, a key is a misspelt field, or the
            checkpoint is of a later format.
    """

    model_type = "unirefiner"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov2")
    }

    vision_config: dict | PreTrainedConfig | None = None
    register_width: int = 1
    register_fill: str = "zero"
    register_seed: int = 0
    final_norm: bool = False
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    format_version: int = FORMAT_VERSION
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        out_features = kwargs.pop("out_features", None)
        out_indices = kwargs.pop("out_indices", None)
        names = [f.name for f in fields(self) if not f.name.startswith("_")]
        for key in kwargs:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.85)
            if near:
                raise ValueError(f"UniRefinerConfig has no {key!r}: did you mean {near[0]!r}?")
        if self.register_width < 0:
            raise ValueError(
                f"register_width is {self.register_width}; it must be 0 or more patches."
            )
        if self.register_fill not in FILLS:
            raise ValueError(
                f"register_fill is {self.register_fill!r}; use one of {', '.join(FILLS)}."
            )
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint is of format {self.format_version}, this version of "
                f"unirefiner_hf reads up to {FORMAT_VERSION}: upgrade unirefiner_hf."
            )
        super().__post_init__(**kwargs)
        layers = self.vision_config.num_hidden_layers
        self.stage_names = ["stem", *(f"stage{n}" for n in range(1, layers + 1))]
        self.set_output_features_output_indices(
            out_features=out_features, out_indices=out_indices
        )

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""
        return self.vision_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Transformer layers of the tower."""
        return self.vision_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Attention heads of the tower."""
        return self.vision_config.num_attention_heads


__all__ = ["UniRefinerConfig"]
