"""A simple feature pyramid on a refined tower, for heads that want several scales.

ViTDet (arXiv 2203.16527, section 3): all levels are made from the last map alone, by
transposed convolutions upwards and a pooling downwards. Heads that predict masks, such
as Mask2Former, then work finer than the grid of patches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .checked import CheckedModel
from .configuration_pyramid import LEVELS, UniRefinerPyramidConfig
from .errors import WrongKindError
from .modeling_unirefiner import UniRefinerBackbone


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of ``(batch, channels, height, width)``."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


def _twice(channels: int) -> nn.Module:
    """Twice the side, half the channels."""
    return nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)


def _level(name: str, hidden: int, size: int, eps: float) -> nn.Sequential:
    """One level: ``(batch, hidden, h, w)`` -> ``(batch, size, rows, columns)``."""
    layers: list[nn.Module] = []
    channels = hidden
    if name == "level1":
        norm = ChannelLayerNorm(hidden // 2, eps=eps)
        layers = [_twice(hidden), norm, nn.GELU(), _twice(hidden // 2)]
        channels = hidden // 2 // 2
    elif name == "level2":
        layers = [_twice(hidden)]
        channels = hidden // 2
    elif name == "level4":
        # An odd last row or column makes cells of its own.
        layers = [nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)]
    return nn.Sequential(
        *layers,
        nn.Conv2d(channels, size, kernel_size=1, bias=False),
        ChannelLayerNorm(size, eps=eps),
        nn.Conv2d(size, size, kernel_size=3, padding=1, bias=False),
        ChannelLayerNorm(size, eps=eps),
    )


class UniRefinerPyramid(BackboneMixin, CheckedModel, PreTrainedModel):
    """Feature maps of a refined tower at 4, 2, 1 and 1/2 cells along a patch.

    With patches of 16 pixels these are the strides 4, 8, 16 and 32, with 14 pixels 3.5,
    7, 14 and 28. A saved pyramid, alone or inside a head, loads where this package is
    imported.

    Attributes:
        refined: the refined tower, whose last stage feeds the pyramid.
        levels: name of a level -> its layers.
    """

    config: UniRefinerPyramidConfig
    config_class = UniRefinerPyramidConfig
    base_model_prefix = "pyramid"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: UniRefinerPyramidConfig) -> None:
        super().__init__(config)
        self.num_features = [config.pyramid_size] * len(LEVELS)
        self.refined = UniRefinerBackbone(config.refined_config)
        hidden, size = config.refined_config.hidden_size, config.pyramid_size
        self.levels = nn.ModuleDict(
            {
                name: _level(name, hidden, size, config.layer_norm_eps)
                for name in self.out_features
            }
        )
        self.post_init()

    def post_init(self) -> None:
        """As every model's, without the recorder of hidden states of a backbone.

        transformers 5.23 would hook the layers of the refined tower, which has its
        recorder, a second time, and every state would be recorded twice.
        """
        PreTrainedModel.post_init(self)

    @classmethod
    def from_refined(
        cls,
        refined: UniRefinerBackbone | str | Path,
        *,
        pyramid_size: int = 256,
        out_features: list[str] | None = None,
        **options: Any,
    ) -> UniRefinerPyramid:
        """A new pyramid on a refined tower, whose weights are kept and not copied.

        Args:
            refined: the Hub name or folder of a refined checkpoint, or a backbone in
                memory, which is set to return its last stage as a map.
            pyramid_size: see `UniRefinerPyramidConfig`, as is `out_features`.
            options: with a name, for ``UniRefinerBackbone.from_pretrained``: `dtype`,
                `revision`, `attn_implementation`, `register_width` and so on.

        Raises:
            WrongKindError: `refined` is neither, or options for a backbone in memory.
        """
        if isinstance(refined, (str, Path)):
            refined = UniRefinerBackbone.from_pretrained(refined, **options)
        elif not isinstance(refined, UniRefinerBackbone):
            raise WrongKindError(
                f"refined is a {type(refined).__name__}, not a UniRefinerBackbone or a "
                "name. Of a bare tower make UniRefinerBackbone.from_tower(tower)."
            )
        elif options:
            raise WrongKindError(
                f"{', '.join(options)} can be given with a name only; here the backbone "
                "is in memory: set them there."
            )
        wanted: dict[str, Any] = {"out_features": out_features}
        config = UniRefinerPyramidConfig(
            refined_config=refined.config,
            pyramid_size=pyramid_size,
            dtype=refined.dtype,
            **wanted,
        )
        with torch.device("meta"):
            model = cls(config)
        settled = model.config.refined_config
        refined.config.reshape_hidden_states = settled.reshape_hidden_states
        refined.config.out_features = settled.out_features
        model.config.refined_config = refined.config
        model.config._attn_implementation = refined.config._attn_implementation
        model.refined = refined
        model.levels.to_empty(device=refined.device).to(refined.dtype)
        model.levels.apply(model._init_weights)
        return model.train(refined.training)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding of the tower."""
        return self.refined.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        register_width: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BackboneOutput:
        """Feature maps of the levels in ``out_features``.

        Args:
            pixel_values: as in `UniRefinerModel.forward`, as are the others; hidden
                states and attentions are the tower's.

        Returns:
            ``feature_maps``: for an image of ``h x w`` patches ``(batch, pyramid_size,
            4h, 4w)``, ``2h, 2w``, ``h, w`` and ``ceil(h / 2), ceil(w / 2)``.

        Raises:
            UniRefinerError: as in `UniRefinerModel.forward`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        output = self.refined(
            pixel_values,
            register_width=register_width,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        last = output.feature_maps[-1]
        return BackboneOutput(
            feature_maps=tuple(self.levels[name](last) for name in self.out_features),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


AutoBackbone.register(UniRefinerPyramidConfig, UniRefinerPyramid, exist_ok=True)

__all__ = ["UniRefinerPyramid"]
