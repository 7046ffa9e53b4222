"""The vision families: one table that says how each tower is called and read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

QueriesKeys = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TowerFamily:
    """How one vision family is called and where its parts are.

    Attributes:
        layers: path of the list of transformer layers.
        query: path of the query projection inside a layer.
        key: path of the key projection inside a layer.
        prefix_tokens: tokens in front of the patch tokens, always there.
        prefix_field: config field that counts further prefix tokens.
        interpolate: the tower takes ``interpolate_pos_encoding=True`` (and needs it
            for every grid but its own); False: it resizes its positions unasked.
        final_norm: path of the tower's last layer norm.
        norm_in_output: ``last_hidden_state`` went through `final_norm`.
        pooling_head: path of a head that attends over all patch tokens, so that the
            pooled output has to be taken again without the frame. None: the pooled
            output is read from a prefix token, as the tower returns it.
        pooling_head_field: config field that says whether the tower has that head; a
            config without the field (SigLIP before transformers 5.23) has it.
        dual_encoder: ``model_type`` of image-text checkpoints that hold this tower.
        dual_encoder_rest: first parts of the weight names in such a checkpoint that
            belong to its other half.
    """

    layers: str
    query: str
    key: str
    prefix_tokens: int
    final_norm: str
    norm_in_output: bool
    interpolate: bool = False
    prefix_field: str | None = None
    pooling_head: str | None = None
    pooling_head_field: str | None = None
    dual_encoder: str | None = None
    dual_encoder_rest: tuple[str, ...] = ()

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        """Tokens in front of the patch tokens of a tower with this config."""
        if self.prefix_field is None:
            return self.prefix_tokens
        return self.prefix_tokens + getattr(config, self.prefix_field)

    def pools_over_patches(self, config: PreTrainedConfig) -> bool:
        """Whether a tower with this config has the head at `pooling_head`."""
        if self.pooling_head is None:
            return False
        field = self.pooling_head_field
        return field is None or not hasattr(config, field) or getattr(config, field)


FAMILIES: dict[str, TowerFamily] = {
    "dinov2": TowerFamily(
        layers="encoder.layer",
        query="attention.q_proj",
        key="attention.k_proj",
        prefix_tokens=1,
        final_norm="layernorm",
        norm_in_output=True,
    ),
    "dinov2_with_registers": TowerFamily(
        layers="encoder.layer",
        query="attention.q_proj",
        key="attention.k_proj",
        prefix_tokens=1,
        prefix_field="num_register_tokens",
        final_norm="layernorm",
        norm_in_output=True,
    ),
    "clip_vision_model": TowerFamily(
        layers="encoder.layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        prefix_tokens=1,
        final_norm="post_layernorm",
        norm_in_output=False,
        interpolate=True,
        dual_encoder="clip",
        dual_encoder_rest=(
            "text_model",
            "text_projection",
            "visual_projection",
            "logit_scale",
        ),
    ),
    "siglip_vision_model": TowerFamily(
        layers="encoder.layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        prefix_tokens=0,
        final_norm="post_layernorm",
        norm_in_output=True,
        interpolate=True,
        pooling_head="head",
        pooling_head_field="vision_use_head",
        dual_encoder="siglip",
        dual_encoder_rest=("text_model", "logit_scale", "logit_bias"),
    ),
}
"""Model type of the vision config -> family."""

DUAL_ENCODERS: dict[str, str] = {
    family.dual_encoder: model_type
    for model_type, family in FAMILIES.items()
    if family.dual_encoder is not None
}
"""Model type of an image-text config -> model type of its vision config."""


def family_of(config: PreTrainedConfig) -> TowerFamily:
    """The family of a vision config, or of the vision half of an image-text config.

    Raises:
        ValueError: the model type is not in the table; names it and the table.
    """
    model_type = DUAL_ENCODERS.get(config.model_type, config.model_type)
    if model_type not in FAMILIES:
        supported = ", ".join(sorted([*FAMILIES, *DUAL_ENCODERS]))
        raise ValueError(
            f"model_type {config.model_type!r} is not a supported vision tower. "
            f"Supported: {supported}."
        )
    return FAMILIES[model_type]


def patch_size_of(config: PreTrainedConfig) -> int:
    """Side of a patch in pixels.

    Raises:
        ValueError: patches that are not square.
    """
    size = config.patch_size
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ValueError(f"patch_size is {size}; only square patches are supported.")
    return size[0]


def load_tower(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a vision tower; an image-text checkpoint gives its vision half.

    Args:
        name_or_path: Hub name or folder of a checkpoint.
        revision: branch, tag or commit on the Hub.
        dtype: dtype of the weights; None keeps that of the checkpoint.
        attn_implementation: ``sdpa``, ``eager``, ...; None leaves it to transformers.
        quantization_config: of transformers, for weights in fewer bits; None: none.
        trust_remote_code: run code that the checkpoint brings along.

    Raises:
        ValueError: an unsupported family, or weights that are missing from the
            checkpoint, have another shape, or belong to no known part.
    """
    config = AutoConfig.from_pretrained(
        name_or_path, revision=revision, trust_remote_code=trust_remote_code
    )
    family = family_of(config)
    dual = config.model_type in DUAL_ENCODERS
    verbosity = logging.get_verbosity()
    if dual:
        # The other half is left out on purpose; the check below replaces the report.
        logging.set_verbosity_error()
    try:
        tower, report = AutoModel.from_pretrained(
            name_or_path,
            config=config.vision_config if dual else config,
            revision=revision,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OSError as error:
        if "use_safetensors" not in str(error) and "model.bin" not in str(error):
            raise
        raise ValueError(
            f"{name_or_path} holds no model.safetensors, and pickled weights, which can "
            "run code, are not read. If you trust them, "
            "AutoModel.from_pretrained(...).save_pretrained(folder) writes "
            "safetensors; name that folder."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    expected = family.dual_encoder_rest if dual else ()
    problems = {
        "missing": sorted(report["missing_keys"]),
        "of another shape": sorted(str(key) for key in report["mismatched_keys"]),
        "unknown": sorted(
            key
            for key in report["unexpected_keys"]
            if key.split(".")[0] not in expected
        ),
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])})"
            for what, keys in problems.items()
            if keys
        )
        raise ValueError(
            f"{name_or_path} does not fit {type(tower).__name__}: {listed}. "
            "Use the checkpoint of a vision tower as it was published."
        )
    check_tower(tower)
    return tower


def check_tower(tower: PreTrainedModel) -> None:
    """Probe that a live tower is built as its family's table entry says.

    Raises:
        ValueError: a part is not where the table says; names what was looked for.
    """
    config = tower.config
    family = family_of(config)
    patch_size_of(config)
    layers = _layers(tower, family)
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"{type(tower).__name__} has {len(layers)} layers at {family.layers!r}, "
            f"its config says num_hidden_layers={config.num_hidden_layers}."
        )
    for layer in layers:
        _part(layer, family.query)
        _part(layer, family.key)
    _part(tower, family.final_norm)
    if family.pooling_head is not None and family.pools_over_patches(config):
        _part(tower, family.pooling_head)


@contextmanager
def record_queries_keys(
    tower: PreTrainedModel, layers: Sequence[int]
) -> Iterator[QueriesKeys]:
    """Record the query and key projections of the forward passes made inside.

    Args:
        tower: a tower of a supported family; it may be wrapped by an adapter that
            forwards attributes.
        layers: layers to record, counted from 0.

    Yields:
        A dict, filled by each forward pass: layer -> (queries, keys), each
        ``(batch, prefix + patches, channels)``, all heads side by side, as projected
        (before a rotary embedding, where the tower has one). The hooks are gone on
        exit. Layers compiled with `nn.Module.compile` run uncompiled inside: a
        compiled layer would not call the hooks.

    Raises:
        ValueError: a layer the tower does not have.
    """
    family = family_of(tower.config)
    blocks = _layers(tower, family)
    wrong = [layer for layer in layers if not 0 <= layer < len(blocks)]
    if wrong:
        raise ValueError(
            f"no layer {wrong[0]} in a tower of {len(blocks)} layers "
            f"(0 to {len(blocks) - 1})."
        )
    queries: dict[int, Tensor] = {}
    recorded: QueriesKeys = {}
    handles = []
    compiled = {layer: blocks[layer]._compiled_call_impl for layer in layers}

    def keep_query(layer: int):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            queries[layer] = output

        return hook

    def keep_key(layer: int):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            recorded[layer] = (queries.pop(layer), output)

        return hook

    try:
        for layer in layers:
            blocks[layer]._compiled_call_impl = None
            query = _part(blocks[layer], family.query)
            key = _part(blocks[layer], family.key)
            handles.append(query.register_forward_hook(keep_query(layer)))
            handles.append(key.register_forward_hook(keep_key(layer)))
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
        for layer, call in compiled.items():
            blocks[layer]._compiled_call_impl = call


def _layers(tower: PreTrainedModel, family: TowerFamily) -> nn.ModuleList:
    """The list of transformer layers, or a ValueError that says what is there."""
    layers = _part(tower, family.layers)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{family.layers!r} of {type(tower).__name__} is a "
            f"{type(layers).__name__}, expected a list of layers."
        )
    return layers


def _part(module: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`, or a ValueError that says what was looked for."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"{type(module).__name__} has no module {path!r}, which the table of "
            f"families expects ({error})."
        ) from error
