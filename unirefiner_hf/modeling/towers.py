"""The table of vision towers: how each family is called and where its parts lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class TowerFamily:
    """What a family of vision towers needs to be known.

    Attributes:
        model_type: `model_type` of the tower's config.
        layers: path of the list of transformer layers.
        query: path of the query projection inside a layer.
        key: path of the key projection inside a layer.
        norm: path of the last layer norm.
        norm_in_output: whether `last_hidden_state` went through that norm.
        class_tokens: tokens before the patch tokens, without register tokens.
        register_field: config field that counts the tower's own register tokens.
        interpolate: whether the call takes ``interpolate_pos_encoding=True``.
        pooling_head: path of a head that pools over all tokens; None where the pooled
            output is that of the class token.
        pooling_switch: config field that says whether the head is there.
        parent: `model_type` of the dual encoder this tower is the image side of.
    """

    model_type: str
    layers: str
    query: str
    key: str
    norm: str
    norm_in_output: bool
    class_tokens: int = 1
    register_field: str | None = None
    interpolate: bool = False
    pooling_head: str | None = None
    pooling_switch: str | None = None
    parent: str | None = None

    def prefix_tokens(self, config: PreTrainedConfig) -> int:
        """Tokens before the patch tokens."""
        registers = 0
        if self.register_field is not None:
            registers = getattr(config, self.register_field)
        return self.class_tokens + registers

    def call_arguments(self) -> dict[str, Any]:
        """Arguments the tower's forward needs beside the pixels."""
        return {"interpolate_pos_encoding": True} if self.interpolate else {}

    def has_pooling_head(self, config: PreTrainedConfig) -> bool:
        """Whether the pooled output has to be taken again without the frame."""
        if self.pooling_head is None:
            return False
        return self.pooling_switch is None or getattr(config, self.pooling_switch)


FAMILIES: dict[str, TowerFamily] = {
    family.model_type: family
    for family in (
        TowerFamily(
            model_type="dinov2",
            layers="encoder.layer",
            query="attention.q_proj",
            key="attention.k_proj",
            norm="layernorm",
            norm_in_output=True,
        ),
        TowerFamily(
            model_type="dinov2_with_registers",
            layers="encoder.layer",
            query="attention.q_proj",
            key="attention.k_proj",
            norm="layernorm",
            norm_in_output=True,
            register_field="num_register_tokens",
        ),
        TowerFamily(
            model_type="clip_vision_model",
            layers="encoder.layers",
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            norm="post_layernorm",
            norm_in_output=False,
            interpolate=True,
            parent="clip",
        ),
        TowerFamily(
            model_type="siglip_vision_model",
            layers="encoder.layers",
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            norm="post_layernorm",
            norm_in_output=True,
            class_tokens=0,
            interpolate=True,
            pooling_head="head",
            pooling_switch="vision_use_head",
            parent="siglip",
        ),
    )
}


def family_of(config: PreTrainedConfig) -> TowerFamily:
    """The family of a tower's config.

    Raises:
        ValueError: the family is not in the table.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"Towers of type {config.model_type!r} are not supported. Supported are: "
            f"{', '.join(sorted(FAMILIES))}, and the image side of "
            f"{', '.join(sorted(f.parent for f in FAMILIES.values() if f.parent))} "
            "checkpoints."
        )
    return FAMILIES[config.model_type]


def tower_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision tower's config of a checkpoint, be it a tower or a dual encoder."""
    if config.model_type in {family.parent for family in FAMILIES.values()}:
        return config.vision_config
    family_of(config)
    return config


def load_tower(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a pre-trained vision tower; of a dual encoder, its image side.

    Args:
        name_or_path: Hub id or folder.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        ValueError: the family is not supported, or weights of the tower are missing.
    """
    config = AutoConfig.from_pretrained(
        name_or_path, revision=revision, trust_remote_code=trust_remote_code
    )
    tower, loading = AutoModel.from_pretrained(
        name_or_path,
        config=tower_config(config),
        revision=revision,
        dtype="auto" if dtype is None else dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} weights of its tower, the first is "
            f"{missing[0]}."
        )
    check_tower(tower)
    return tower


def check_tower(tower: nn.Module) -> TowerFamily:
    """Check the table against a live tower, without running it.

    Raises:
        ValueError: a part is not where the table says, or the layers are not as many
            as the config says.
    """
    family = family_of(tower.config)

    def part(path: str) -> nn.Module:
        try:
            return tower.get_submodule(path)
        except AttributeError:
            raise ValueError(
                f"{type(tower).__name__} has no {path}, where the table of towers expects "
                "it: this version of transformers lays the tower out differently. Use "
                "transformers 5.20 or newer, or report it."
            ) from None

    layers = part(family.layers)
    expected = tower.config.num_hidden_layers
    if len(layers) != expected:
        raise ValueError(
            f"{type(tower).__name__} has {len(layers)} layers, its config says {expected}."
        )
    for path in (family.query, family.key):
        part(f"{family.layers}.0.{path}")
    part(family.norm)
    if family.has_pooling_head(tower.config):
        part(family.pooling_head)
    return family


@contextmanager
def record_queries_keys(
    tower: nn.Module, layers: Sequence[int]
) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Record the query and key projections of some layers while the context lasts.

    Args:
        tower: the tower, or a PEFT model around it.
        layers: layer numbers from 0.

    Yields:
        A dict filled by each forward: layer -> queries and keys, each
        ``(batch, prefix + patches, heads * head_size)``.
    """
    family = family_of(tower.config)
    recorded: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def recorder(layer: int, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            recorded[layer][name] = output
            if len(recorded[layer]) == 2:
                pairs[layer] = recorded[layer]["query"], recorded[layer]["key"]

        return record

    handles = []
    try:
        for layer in layers:
            block = tower.get_submodule(f"{family.layers}.{layer}")
            for name, path in (("query", family.query), ("key", family.key)):
                module = block.get_submodule(path)
                handles.append(module.register_forward_hook(recorder(layer, name)))
        yield pairs
    finally:
        for handle in handles:
            handle.remove()
