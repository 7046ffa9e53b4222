"""Configuration of the register model."""

import copy
import dataclasses
import difflib
import functools
import math
from typing import Any, TypeVar

import transformers
from transformers.utils import logging

from .errors import MissingLibraryError, UniRefinerError

try:
    from huggingface_hub.dataclasses import strict
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.backbone_utils import BackboneConfigMixin
    from transformers.configuration_utils import SubConfigSpec
except ImportError as error:
    raise MissingLibraryError(
        f"This model needs transformers 5.20 or newer, here is {transformers.__version__}: "
        "pip install -U transformers"
    ) from error

from .families import DUAL_ENCODERS, family_of
from .own_towers import published_config
from .registers import FILLS, check_width

FORMAT_VERSION = 2
"""Version 2 has register tokens; without them files stay version 1."""

# Written to config files by transformers or known to it, without being an attribute of
# a fresh configuration.
_STANDARD_KEYS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "gradient_checkpointing",
    "per_layer_config",
    "quantization_config",
    "stage_names",
    "task_specific_params",
    "torchscript",
}

logger = logging.get_logger(__name__)

Config = TypeVar("Config", bound=PreTrainedConfig)


def own_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """What a config class takes beyond transformers' own fields."""
    own = {field.name for field in dataclasses.fields(config_class)}
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {name for name in own if not name.startswith("_")}
    return own | {"out_features", "out_indices"}


def nearest_field(config_class: type[PreTrainedConfig], name: str) -> str | None:
    """The own field of a config class that `name` may be meant for, if any."""
    own = own_fields(config_class)
    nearest = difflib.get_close_matches(name, own, n=1, cutoff=0.75)
    return nearest[0] if nearest else None


def refuse_unknown(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """Refuse arguments that neither the class of `config` nor transformers knows.

    A file saved by a later transformers may carry a standard field unknown here: that is
    kept and logged, unless it looks like a misspelt field of the class.

    Raises:
        UniRefinerError: names the nearest field, or all of them; for a value that follows
            from the fields, such as ``patch_size``, says so.
    """
    kind = type(config)
    fields = ", ".join(sorted(own_fields(kind)))
    for name in kwargs:
        standard = name in _STANDARD_KEYS or hasattr(PreTrainedConfig, name)
        if standard or name.startswith("_"):
            continue
        if isinstance(getattr(kind, name, None), property):
            raise UniRefinerError(
                f"{name!r} of a {kind.__name__} follows from its fields and cannot be "
                f"given; its fields are {fields}."
            )
        nearest = nearest_field(kind, name)
        if nearest is not None:
            raise UniRefinerError(
                f"{kind.__name__} has no field {name!r}; did you mean {nearest!r}?"
            )
        if config.transformers_version is None:
            raise UniRefinerError(
                f"{kind.__name__} has no field {name!r}; its fields are {fields}."
            )
        logger.warning("%s keeps the unknown field %r.", kind.__name__, name)


def without_places(values: dict[str, Any]) -> dict[str, Any]:
    """A config's dict with the places it was loaded from, local paths, left empty."""
    for name, value in values.items():
        if name == "_name_or_path":
            values[name] = ""
        elif isinstance(value, dict):
            without_places(value)
    return values


def refusing(config_class: type[Config]) -> type[Config]:
    """Have all that a config refuses be a `UniRefinerError`, whoever found it.

    transformers checks types, stages and the model type of a part with errors of its own.
    """
    build = config_class.__init__

    @functools.wraps(build)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            build(self, *args, **kwargs)
        except UniRefinerError:
            raise
        except (ValueError, StrictDataclassError) as problem:
            raise UniRefinerError(f"{config_class.__name__}: {problem}") from problem

    config_class.__init__ = checked  # type: ignore[method-assign]
    return config_class


@refusing
@strict
class UniRefinerConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of `UniRefinerModel` and `UniRefinerBackbone`.

    Args:
        vision_config: config of the vision tower (it is copied), or its dict with
            ``model_type``; None for a DINOv2 of default size.
        register_width: width in patches of the frame put round each image
            (UniRefiner, arXiv 2605.19622: register regions). 0: no frame.
        register_fill: pixels of the frame in normalised space: ``zero``, ``randn``
            N(0, 1), ``rand`` uniform in [0, 1), or ``learnable``: one patch of pixels,
            a parameter of the model, tiled.
        register_seed: seed of the ``randn`` and ``rand`` frames in eval mode.
        final_norm: apply the tower's own last layer norm to the patch tokens in
            families whose ``last_hidden_state`` lacks it (CLIP). False: the tower's
            tokens as they are.
        apply_layernorm: backbone only. Put every stage through the layer norm that
            ``last_hidden_state`` went through, if it went through one. False: every
            stage as the layer returns it.
        reshape_hidden_states: backbone only. Feature maps ``(batch, hidden, h, w)``;
            False: ``(batch, 1 + h * w, hidden)`` with a readout token first, which
            DPT heads want.
        num_register_tokens: learned tokens that join the sequence inside the tower and
            are thrown away with the frame (PH-Reg, arXiv 2505.21501).
        method: name of the refinement method that made the weights (``unirefiner``,
            ``ph_reg``, ``distillation``, ...); None: a bare backbone, or a file of a
            version that did not say.
        format_version: version of this file format; 2 at least with register tokens.

    ``out_features`` (or ``out_indices``) names the stages a backbone returns: ``stem``,
    ``stage1``, ... one per layer; the last one if none is named.

    Raises:
        UniRefinerError: an unknown argument (names the nearest valid one), a register
            setting out of range, an unsupported tower, or a file written by a later
            format.
    """

    model_type = "unirefiner"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov2")
    }

    vision_config: Any = None
    register_width: int = 1
    register_fill: str = "zero"
    register_seed: int = 0
    final_norm: bool = False
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    num_register_tokens: int = 0
    method: str | None = None
    format_version: int = 1
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        out_features = kwargs.pop("out_features", None)
        out_indices = kwargs.pop("out_indices", None)
        kwargs.pop("stage_names", None)
        kind = kwargs.pop("model_type", self.model_type)
        if kind != self.model_type:
            raise UniRefinerError(
                f"This is the config of a {kind!r}, not of a refined checkpoint. Of a "
                "bare backbone make one by UniRefinerModel.from_tower(name_or_folder)."
            )
        refuse_unknown(self, kwargs)
        if isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = copy.deepcopy(self.vision_config)
        elif not isinstance(self.vision_config or {}, dict):
            raise UniRefinerError(
                f"vision_config is a {type(self.vision_config).__name__}; give the config "
                "of a vision tower, or its dict."
            )
        elif self.vision_config:
            self.vision_config = published_config(self.vision_config) or (
                self.vision_config
            )
        super().__post_init__(**kwargs)
        self._check_tower()
        self._check_settings()
        if self.num_register_tokens:
            self.format_version = max(self.format_version, 2)
        layers = self.num_hidden_layers
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, layers + 1))]
        self.set_output_features_output_indices(
            out_features=out_features, out_indices=out_indices
        )

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.vision_config.hidden_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        size = self.vision_config.patch_size
        return size if isinstance(size, int) else size[0]

    @property
    def num_hidden_layers(self) -> int:
        """Transformer layers of the tower."""
        return self.vision_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Attention heads of each layer."""
        return self.vision_config.num_attention_heads

    @property
    def image_size(self) -> int:
        """Side in pixels of the images the tower was pretrained on."""
        if not hasattr(self.vision_config, "image_size"):  # NaFlex counts patches
            return math.isqrt(self.vision_config.num_patches) * self.patch_size
        size = self.vision_config.image_size
        return size if isinstance(size, int) else size[0]

    def to_dict(self) -> dict[str, Any]:
        """As a dict, without the places that it and the tower were loaded from."""
        return without_places(super().to_dict())

    def _check_tower(self) -> None:
        family_of(self.vision_config)
        model_type = self.vision_config.model_type
        if model_type in DUAL_ENCODERS:
            raise UniRefinerError(
                f"vision_config is that of a whole {model_type}; give the vision_config "
                "in it."
            )

    def _check_settings(self) -> None:
        check_width(self.register_width)
        if self.num_register_tokens < 0:
            raise UniRefinerError(
                f"num_register_tokens is {self.num_register_tokens}; it must be 0 or more."
            )
        if self.register_fill not in FILLS:
            raise UniRefinerError(
                f"register_fill is {self.register_fill!r}; "
                f"choose one of {', '.join(FILLS)}."
            )
        if self.format_version > FORMAT_VERSION:
            raise UniRefinerError(
                f"format_version is {self.format_version}, this version of the code "
                f"reads up to {FORMAT_VERSION}: pip install -U unirefiner_hf."
            )


__all__ = ["UniRefinerConfig"]

UniRefinerConfig.register_for_auto_class()
