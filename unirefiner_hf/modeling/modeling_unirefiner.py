"""A vision tower inside a register frame, as a `PreTrainedModel`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ModelOutput
from transformers.utils import can_return_tuple

from .configuration_unirefiner import UniRefinerConfig
from .registers import frame_pixels, split_frame
from .towers import check_tower, family_of, load_tower, record_queries_keys


@dataclass
class UniRefinerOutput(ModelOutput):
    """Tokens of the image, without the frame.

    Attributes:
        last_hidden_state: ``(batch, height/p * width/p, hidden)`` in raster order.
        pooler_output: ``(batch, hidden)`` where the tower pools. A head that attends to
            all tokens (SigLIP) sees the image's only; a class token comes from the framed
            pass.
        hidden_states: each layer's ``(batch, patches, hidden)``; None where unselected.
        attentions: each layer's ``(batch, heads, patches, patches)``, cut down to the
            image: rows do not add up to 1.
        feature_map: ``(batch, hidden, height/p, width/p)``, a view of the tokens.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor | None, ...] | None = None
    feature_map: Tensor | None = None


@dataclass
class TowerTokens:
    """One pass of the tower, its tokens by where they lie.

    Attributes:
        image: ``(batch, patches, hidden)`` in raster order.
        registers: ``(batch, registers, hidden)`` in raster order of the framed grid.
        grid: rows and columns of the image, in patches.
        queries_keys: layer -> queries and keys of the image tokens,
            ``(batch, patches, heads * head_size)``.
    """

    image: Tensor
    registers: Tensor
    grid: tuple[int, int]
    queries_keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class _Pass:
    """Outputs of one framed pass and how its tokens divide."""

    output: Any
    sequence: Tensor
    image: Tensor
    registers: Tensor
    grid: tuple[int, int]
    width: int
    prefix: int

    def crop(self, tokens: Tensor) -> Tensor:
        """Image tokens of any ``(batch, prefix + framed patches, channels)``."""
        return split_frame(tokens[:, self.prefix :], self.grid, self.width)[0]


class UniRefinerPreTrainedModel(PreTrainedModel):
    """The tower, the frame and how a pass divides; base of the public classes."""

    config_class = UniRefinerConfig
    config: UniRefinerConfig
    base_model_prefix = "unirefiner"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: UniRefinerConfig) -> None:
        super().__init__(config)
        self.family = family_of(config.vision_config)
        if config.final_norm and self.family.norm_in_output:
            raise ValueError(
                f"final_norm is on, but the tokens of a {self.family.model_type} tower have "
                "been through its last norm already: leave final_norm off."
            )
        self.tower = AutoModel.from_config(config.vision_config)
        check_tower(self.tower)
        if config.register_fill == "learnable":
            patch = self.patch_size
            self.register_patch = nn.Parameter(torch.zeros(3, patch, patch))
        self.post_init()

    @property
    def patch_size(self) -> int:
        """Pixels a patch."""
        size = self.config.vision_config.patch_size
        return size if isinstance(size, int) else size[0]

    def get_input_embeddings(self) -> nn.Module:
        return self.tower.get_input_embeddings()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, UniRefinerPreTrainedModel):
            if self.config.register_fill == "learnable":
                module.register_patch.zero_()
        else:
            super()._init_weights(module)

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                "pixel_values must be (batch, 3, height, width); got "
                f"{tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[-2:]
        patch = self.patch_size
        if height % patch or width % patch or height < patch or width < patch:
            nearest = tuple(max(1, round(side / patch)) * patch for side in (height, width))
            raise ValueError(
                f"Images of {height}x{width} pixels do not divide into patches of {patch}: "
                f"resize them to multiples of {patch}, such as {nearest[0]}x{nearest[1]}."
            )
        return height // patch, width // patch

    def _run(
        self, pixel_values: Tensor, register_width: int | None, **call: Any
    ) -> _Pass:
        """Frame the images, run the tower, divide its tokens."""
        grid = self._grid(pixel_values)
        width = self.config.register_width if register_width is None else register_width
        generator = None
        if not self.training and self.config.register_fill in ("rand", "randn"):
            generator = torch.Generator().manual_seed(self.config.register_seed)
        framed = frame_pixels(
            pixel_values,
            width,
            self.patch_size,
            self.config.register_fill,
            generator=generator,
            patch=(
                self.register_patch if self.config.register_fill == "learnable" else None
            ),
        )
        output = self.tower(framed, **self.family.call_arguments(), **call)
        sequence = output.last_hidden_state
        prefix = self.family.prefix_tokens(self.config.vision_config)
        expected = prefix + (grid[0] + 2 * width) * (grid[1] + 2 * width)
        if sequence.shape[1] != expected:
            raise ValueError(
                f"The {self.family.model_type} tower gave {sequence.shape[1]} tokens where "
                f"{expected} were expected: {prefix} before the patches and a grid of "
                f"{grid[0] + 2 * width}x{grid[1] + 2 * width}."
            )
        tokens = sequence[:, prefix:]
        if self.config.final_norm:
            tokens = self._norm(tokens)
        image, registers = split_frame(tokens, grid, width)
        return _Pass(output, sequence, image, registers, grid, width, prefix)

    def _norm(self, tokens: Tensor) -> Tensor:
        return self.tower.get_submodule(self.family.norm)(tokens)

    def _attention_arguments(
        self, output_hidden_states: Any, output_attentions: bool | None
    ) -> dict[str, Any]:
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        implementation = self.tower.config._attn_implementation
        if output_attentions and implementation != "eager":
            raise ValueError(
                f"Attention maps are not computed by the {implementation!r} attention: load "
                'the model with attn_implementation="eager".'
            )
        return {
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }

    def _crop_attention(self, run: _Pass, attention: Tensor | None) -> Tensor | None:
        if attention is None:
            return None
        batch, heads, queries, keys = attention.shape
        rows = run.crop(attention.flatten(0, 1))
        both = run.crop(rows.transpose(1, 2)).transpose(1, 2)
        return both.unflatten(0, (batch, heads))


class UniRefinerModel(UniRefinerPreTrainedModel):
    """A vision tower that reads its image inside a register frame (arXiv 2605.19622).

    The frame takes part in the pass and its tokens are thrown away. The tower stays
    reachable as `tower`.
    """

    @classmethod
    def from_tower(
        cls,
        tower: PreTrainedModel | str,
        *,
        register_width: int = 1,
        register_fill: str = "zero",
        register_seed: int = 0,
        final_norm: bool = False,
        **load: Any,
    ) -> UniRefinerModel:
        """Put a pre-trained tower into a frame.

        Args:
            tower: a vision model, or the Hub id or folder to load one from.
            load: arguments of `load_tower` where `tower` is a name.

        Raises:
            ValueError: the tower's family is not supported.
        """
        if isinstance(tower, str):
            tower = load_tower(tower, **load)
        elif load:
            raise TypeError(f"{', '.join(load)}: only for a tower given by name.")
        check_tower(tower)
        config = UniRefinerConfig(
            vision_config=tower.config,
            register_width=register_width,
            register_fill=register_fill,
            register_seed=register_seed,
            final_norm=final_norm,
        )
        with torch.device("meta"):
            model = cls(config)
        model.tower = tower
        if register_fill == "learnable":
            weight = next(tower.parameters())
            shape = model.register_patch.shape
            model.register_patch = nn.Parameter(torch.zeros(shape, device=weight.device))
        return model.train(tower.training)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        register_width: int | None = None,
        output_hidden_states: bool | Sequence[int] | None = None,
        output_attentions: bool | None = None,
    ) -> UniRefinerOutput:
        """Tokens of the images.

        Args:
            pixel_values: ``(batch, 3, height, width)``, normalised; both sides multiples
                of the patch size.
            register_width: frame in patches; None takes the config's, 0 the bare tower.

        Raises:
            ValueError: sizes off the patch grid, or attention maps asked of an attention
                that does not compute them.
        """
        call = self._attention_arguments(output_hidden_states, output_attentions)
        run = self._run(pixel_values, register_width, **call)
        hidden_states, attentions = run.output.hidden_states, run.output.attentions
        if hidden_states is not None:
            hidden_states = tuple(
                None if state is None else run.crop(state) for state in hidden_states
            )
        if attentions is not None:
            attentions = tuple(self._crop_attention(run, maps) for maps in attentions)
        return UniRefinerOutput(
            last_hidden_state=run.image,
            pooler_output=self._pool(run),
            hidden_states=hidden_states,
            attentions=attentions,
            feature_map=run.image.transpose(1, 2).unflatten(2, run.grid),
        )

    def encode(
        self,
        pixel_values: Tensor,
        register_width: int = 0,
        query_key_layers: Sequence[int] = (),
    ) -> TowerTokens:
        """Image and register tokens, and queries and keys of the layers asked for.

        Works with a PEFT model as tower. Gradients follow the caller's grad mode.

        Args:
            pixel_values: ``(batch, 3, height, width)``.
            register_width: frame in patches.
            query_key_layers: layer numbers from 0.
        """
        if not query_key_layers:
            run = self._run(pixel_values, register_width)
            return TowerTokens(run.image, run.registers, run.grid)
        with record_queries_keys(self.tower, query_key_layers) as recorded:
            run = self._run(pixel_values, register_width)
        return TowerTokens(
            image=run.image,
            registers=run.registers,
            grid=run.grid,
            queries_keys={
                layer: (run.crop(queries), run.crop(keys))
                for layer, (queries, keys) in sorted(recorded.items())
            },
        )

    def _pool(self, run: _Pass) -> Tensor | None:
        if run.width and self.family.has_pooling_head(self.config.vision_config):
            return self.tower.get_submodule(self.family.pooling_head)(run.image)
        return run.output.pooler_output


class UniRefinerBackbone(BackboneMixin, UniRefinerPreTrainedModel):
    """Feature maps of the refined tower for segmentation and depth heads.

    The last stage is `UniRefinerModel`'s `last_hidden_state`. Where transformers'
    `AutoBackbone.from_pretrained` does not take a local folder, this class's own
    `from_pretrained` does.
    """

    def __init__(self, config: UniRefinerConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        register_width: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BackboneOutput:
        """Feature maps of the stages in `out_features`.

        Returns:
            Maps ``(batch, hidden, height/p, width/p)``, or with `reshape_hidden_states`
            off ``(batch, 1 + patches, hidden)`` with the class token first (the mean of
            the patch tokens for a tower without one).
        """
        call = self._attention_arguments(output_hidden_states, output_attentions)
        run = self._run(
            pixel_values,
            register_width,
            output_hidden_states=True,
            output_attentions=call["output_attentions"],
        )
        states = run.output.hidden_states
        maps = []
        for stage, state in zip(self.stage_names, states, strict=True):
            if stage not in self.out_features:
                continue
            if stage == self.stage_names[-1]:
                image, state = run.image, run.sequence
            else:
                if self._norm_stages:
                    state = self._norm(state)
                image = run.crop(state)
            if self.config.reshape_hidden_states:
                maps.append(image.transpose(1, 2).unflatten(2, run.grid).contiguous())
            else:
                first = image.mean(dim=1, keepdim=True) if not run.prefix else state[:, :1]
                maps.append(torch.cat((first, image), dim=1))
        hidden_states = tuple(run.crop(s) for s in states) if output_hidden_states else None
        attentions = run.output.attentions
        if attentions is not None:
            attentions = tuple(self._crop_attention(run, maps_) for maps_ in attentions)
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=hidden_states, attentions=attentions
        )

    @property
    def _norm_stages(self) -> bool:
        normed = self.family.norm_in_output or self.config.final_norm
        return normed and self.config.apply_layernorm


UniRefinerConfig.register_for_auto_class()
UniRefinerModel.register_for_auto_class("AutoModel")

__all__ = ["UniRefinerBackbone", "UniRefinerModel", "UniRefinerOutput", "TowerTokens"]
