"""Configuration of the simple feature pyramid."""

from __future__ import annotations

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import SubConfigSpec

from .configuration_unirefiner import (
    UniRefinerConfig,
    refuse_unknown,
    refusing,
    without_places,
)
from .errors import UniRefinerError

LEVELS = ("level1", "level2", "level3", "level4")


@refusing
@strict
class UniRefinerPyramidConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of `UniRefinerPyramid`.

    Args:
        refined_config: config of the refined tower, a `UniRefinerConfig` (it is
            copied) or its dict; None for the default one. Its last stage alone feeds
            the pyramid.
        pyramid_size: channels of every level.
        layer_norm_eps: of the norms after the pyramid's convolutions.

    ``out_features`` (or ``out_indices``) names the levels that are returned, all four
    unless said otherwise: ``level1`` to ``level4``, 4, 2, 1 and 1/2 cells a patch.

    Raises:
        UniRefinerError: an unknown argument, another kind of `refined_config`, or a size
            that is not positive.
    """

    model_type = "unirefiner_pyramid"
    sub_configs_defaults = {
        "refined_config": SubConfigSpec(
            config_class=AutoConfig, model_type="unirefiner"
        )
    }

    refined_config: Any = None
    pyramid_size: int = 256
    layer_norm_eps: float = 1e-6
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        out_features = kwargs.pop("out_features", None)
        out_indices = kwargs.pop("out_indices", None)
        kwargs.pop("stage_names", None)
        kwargs.pop("model_type", None)
        refuse_unknown(self, kwargs)
        if isinstance(self.refined_config, PreTrainedConfig):
            self.refined_config = copy.deepcopy(self.refined_config)
        super().__post_init__(**kwargs)
        if self.refined_config.model_type != UniRefinerConfig.model_type:
            raise UniRefinerError(
                f"refined_config is of a {self.refined_config.model_type!r}, expected "
                f"{UniRefinerConfig.model_type!r}: put a frame round a bare tower "
                "first, UniRefinerBackbone.from_tower(tower, register_width=0)."
            )
        if self.pyramid_size < 1:
            raise UniRefinerError(
                f"pyramid_size is {self.pyramid_size}; it must be positive."
            )
        self.refined_config.reshape_hidden_states = True
        last = self.refined_config.stage_names[-1]
        self.refined_config.set_output_features_output_indices(
            out_features=[last], out_indices=None
        )
        self.stage_names = list(LEVELS)
        if out_features is None and out_indices is None:
            out_features = list(LEVELS)
        self.set_output_features_output_indices(
            out_features=out_features, out_indices=out_indices
        )

    @property
    def hidden_size(self) -> int:
        """Channels of every level."""
        return self.pyramid_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.refined_config.patch_size

    def to_dict(self) -> dict[str, Any]:
        """As a dict, without the places that it and the tower were loaded from."""
        return without_places(super().to_dict())


AutoConfig.register(
    UniRefinerPyramidConfig.model_type, UniRefinerPyramidConfig, exist_ok=True
)

__all__ = ["UniRefinerPyramidConfig"]
