"""InternViT (arXiv 2312.14238), InternViT-6B and InternViT-300M.

Modules are named as in the published checkpoints, queries, keys and values packed, so
those load without conversion. Attention goes through transformers' attention interface
(SDPA, flash attention), layers can be checkpointed, and positions are resized to the grid
of the image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_intern_vit import InternViTConfig
from .vit_parts import MLP, RMSNorm, eager_attention, resized_positions, run_layers


class InternViTEmbeddings(nn.Module):
    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.native = config.image_size // patch
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, size))
        self.patch_embedding = nn.Conv2d(config.num_channels, size, patch, patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, self.native**2 + 1, size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixel_values)
        grid = (patches.shape[2], patches.shape[3])
        patches = patches.flatten(2).transpose(1, 2)
        start = self.class_embedding.expand(patches.shape[0], 1, -1)
        positions = resized_positions(self.position_embedding[0], grid, self.native)
        return torch.cat([start, patches], dim=1) + positions


class InternViTAttention(nn.Module):
    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(size, 3 * size, bias=config.qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_normalization:
            self.q_norm = RMSNorm(size, config.layer_norm_eps)
            self.k_norm = RMSNorm(size, config.layer_norm_eps)
        self.proj = nn.Linear(size, size)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_norm(query), self.k_norm(key), value)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        read, weights = attend(
            self, query, key, value, None, scaling=self.scaling, dropout=dropout
        )
        return self.proj(read.flatten(2)), weights


class InternViTLayer(nn.Module):
    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        norm = RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
        size, scale = config.hidden_size, config.initializer_factor
        self.attn = InternViTAttention(config)
        self.mlp = MLP(config)
        self.norm1 = norm(size, eps=config.layer_norm_eps)
        self.norm2 = norm(size, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(scale * torch.ones(size))
        self.ls2 = nn.Parameter(scale * torch.ones(size))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        read, weights = self.attn(self.norm1(tokens))
        tokens = tokens + read * self.ls1
        return tokens + self.mlp(self.norm2(tokens)) * self.ls2, weights


class InternViTEncoder(nn.Module):
    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        layers = (InternViTLayer(config) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.gradient_checkpointing = False


class InternViTModel(PreTrainedModel):
    """InternViT without the layers that its authors leave out for dense use.

    ``last_hidden_state`` is ``(batch, 1 + h * w, hidden)`` without a last norm, CLS
    first; ``pooler_output`` ``(batch, hidden)`` is CLS.
    """

    config: InternViTConfig
    config_class = InternViTConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternViTEmbeddings", "InternViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__(config)
        self.embeddings = InternViTEmbeddings(config)
        self.encoder = InternViTEncoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, InternViTEmbeddings):
            initialization.normal_(module.class_embedding, std=std)
            initialization.normal_(module.position_embedding, std=std)
        if isinstance(module, InternViTLayer):
            initialization.constant_(module.ls1, self.config.initializer_factor)
            initialization.constant_(module.ls2, self.config.initializer_factor)

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
        """Tokens of ``pixel_values`` (batch, 3, height, width), multiples of a patch."""
        output = run_layers(
            self.encoder,
            self.embeddings(pixel_values),
            bool(output_hidden_states or self.config.output_hidden_states),
            bool(output_attentions or self.config.output_attentions),
        )
        output.pooler_output = output.last_hidden_state[:, 0]  # type: ignore[index]
        return output


__all__ = ["InternViTModel"]
