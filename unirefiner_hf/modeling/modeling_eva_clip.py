"""EVA-CLIP's vision tower (arXiv 2402.04252), EVA-CLIP-8B and EVA-CLIP-18B.

Modules are named as in the published checkpoints, so those load without conversion.
Attention goes through transformers' attention interface (SDPA, flash attention), layers
can be checkpointed, and positions are resized to the grid of the image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_eva_clip import EvaClipVisionConfig
from .recording import check_forms_maps
from .vit_parts import MLP, RMSNorm, eager_attention, resized_positions, run_layers


def _norm(config: EvaClipVisionConfig) -> nn.Module:
    kind = RMSNorm if config.use_rms_norm else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)


class EvaClipEmbeddings(nn.Module):
    def __init__(self, config: EvaClipVisionConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.native = config.image_size // patch
        self.class_embedding = nn.Parameter(torch.zeros(size))
        self.patch_embedding = nn.Conv2d(config.num_channels, size, patch, patch)
        self.position_embedding = nn.Embedding(self.native**2 + 1, size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixel_values)
        grid = (patches.shape[2], patches.shape[3])
        patches = patches.flatten(2).transpose(1, 2)
        start = self.class_embedding.expand(patches.shape[0], 1, -1)
        positions = resized_positions(self.position_embedding.weight, grid, self.native)
        return torch.cat([start, patches], dim=1) + positions


class EvaClipAttention(nn.Module):
    def __init__(self, config: EvaClipVisionConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(size, size, bias=config.q_bias)
        self.k_proj = nn.Linear(size, size, bias=config.k_bias)
        self.v_proj = nn.Linear(size, size, bias=config.v_bias)
        self.out_proj = nn.Linear(size, size)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            part(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        read, weights = attend(
            self, query, key, value, None, scaling=self.scaling, dropout=dropout
        )
        return self.out_proj(read.flatten(2)), weights


class EvaClipLayer(nn.Module):
    def __init__(self, config: EvaClipVisionConfig) -> None:
        super().__init__()
        self.norm_after = config.post_layernorm
        self.self_attn = EvaClipAttention(config)
        self.layer_norm1 = _norm(config)
        self.mlp = MLP(config)
        self.layer_norm2 = _norm(config)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.norm_after:
            read, weights = self.self_attn(tokens)
            tokens = tokens + self.layer_norm1(read)
            return tokens + self.layer_norm2(self.mlp(tokens)), weights
        read, weights = self.self_attn(self.layer_norm1(tokens))
        tokens = tokens + read
        return tokens + self.mlp(self.layer_norm2(tokens)), weights


class EvaClipEncoder(nn.Module):
    def __init__(self, config: EvaClipVisionConfig) -> None:
        super().__init__()
        layers = (EvaClipLayer(config) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.gradient_checkpointing = False


class EvaClipVisionModel(PreTrainedModel):
    """EVA-CLIP's vision tower.

    ``last_hidden_state`` is ``(batch, 1 + h * w, hidden)`` without a last norm, CLS
    first; ``pooler_output`` ``(batch, hidden)`` is CLS through `post_layernorm`.
    """

    config: EvaClipVisionConfig
    config_class = EvaClipVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["EvaClipEmbeddings", "EvaClipLayer"]
    _keys_to_ignore_on_load_unexpected = [r"position_ids"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: EvaClipVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = EvaClipEmbeddings(config)
        self.encoder = EvaClipEncoder(config)
        self.post_layernorm = _norm(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EvaClipEmbeddings):
            std = self.config.initializer_range
            initialization.normal_(module.class_embedding, std=std)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Tokens of ``pixel_values`` (batch, 3, height, width), multiples of a patch.

        Raises:
            UniRefinerError: attentions without eager attention.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:
            check_forms_maps(self.config._attn_implementation)
        output = run_layers(
            self.encoder,
            self.embeddings(pixel_values),
            bool(output_hidden_states),
            bool(output_attentions),
        )
        start = output.last_hidden_state[:, 0]  # type: ignore[index]
        output.pooler_output = self.post_layernorm(start)
        return output


__all__ = ["EvaClipVisionModel"]
