"""A vision tower with a frame of register patches round its image.

UniRefiner (arXiv 2605.19622): the tower sees the framed image, the tokens of the frame
are thrown away, those of the image are returned. Positions follow the framed grid:
absolute position embeddings are interpolated to it, so the same image gets other
positions at another register width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .checked import CheckedModel
from .configuration_unirefiner import UniRefinerConfig
from .errors import UniRefinerError, WrongKindError
from .families import (
    DUAL_ENCODERS,
    EMBEDDINGS,
    TowerFamily,
    family_of,
    patch_size_of,
)
from .recording import QueriesKeys, check_forms_maps, record_queries_keys
from .registers import JoiningTokens, frame_pixels, split_frame
from .towers import (
    build_tower,
    check_tower,
    load_tower,
    settle_tower,
    tower_inputs,
    translated,
)

Model = TypeVar("Model", bound="UniRefinerPreTrainedModel")


@dataclass
class UniRefinerOutput(ModelOutput):
    """Output of `UniRefinerModel`, without prefix tokens and without the frame.

    Attributes:
        last_hidden_state: ``(batch, h * w, hidden)``, image tokens in raster order.
        pooler_output: ``(batch, hidden)`` where the tower pools, else None. The tower's
            own where it is read from a prefix token (which saw the frame); a head that
            attends over all tokens pools the image tokens only.
        hidden_states: one ``(batch, h * w, hidden)`` for the embeddings and one for
            each layer, before the last layer norm; None in place of those that
            `output_hidden_states` as an int or list did not select.
        attentions: one ``(batch, heads, h * w, h * w)`` a layer, from image tokens to
            image tokens; attention paid to the frame and to prefix tokens is cut off,
            so rows do not sum to one.
        feature_map: ``(batch, hidden, h, w)``, `last_hidden_state` as a map.

    Gradients flow from all of them to the pixels and weights. `hidden_states` and
    `attentions` are cut out of what the tower goes on with, so nothing later is computed
    from them and ``retain_grad()`` on them stays None: put a forward hook on a layer of
    ``model.tower`` for the gradient at its tokens.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    feature_map: Tensor | None = None


@dataclass
class TowerTokens:
    """Tokens of one pass through the framed tower; see `UniRefinerModel.encode`.

    Attributes:
        image: ``(batch, h * w, hidden)``, raster order.
        registers: ``(batch, registers, hidden)``, raster order of the framed grid.
        grid: ``(h, w)``, the image in patches.
        queries_keys: layer -> (queries, keys) of the image tokens, each
            ``(batch, h * w, channels)`` with all heads side by side.
    """

    image: Tensor
    registers: Tensor
    grid: tuple[int, int]
    queries_keys: QueriesKeys


@dataclass
class _Pass:
    """One pass through the tower and what is needed to take the frame off it."""

    output: Any
    grid: tuple[int, int]
    width: int
    prefix: int
    wanted_states: tuple[int, ...] | None  # None: every one that was recorded

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Image and register tokens of a full sequence ``(batch, tokens, channels)``.

        Learned register tokens, which are at the end, fall away.
        """
        (h, w), frame = self.grid, 2 * self.width
        end = self.prefix + (h + frame) * (w + frame)
        patches = tokens[:, self.prefix : end]
        return split_frame(patches, self.grid, self.width)

    def image(self, tokens: Tensor) -> Tensor:
        return self.split(tokens)[0]

    def hidden_states(self) -> tuple[Any, ...] | None:
        states = self.output.hidden_states
        if states is None:
            return None
        wanted = set(range(len(states)))
        if self.wanted_states is not None:
            wanted = {index % len(states) for index in self.wanted_states}
        return tuple(
            self.image(state) if index in wanted else None
            for index, state in enumerate(states)
        )

    def attentions(self) -> tuple[Tensor, ...] | None:
        maps = self.output.attentions
        if not maps:
            return None
        places = torch.arange(maps[0].shape[-1], device=maps[0].device)
        kept = self.image(places[None, :, None]).flatten()
        return tuple(m.index_select(-1, kept).index_select(-2, kept) for m in maps)


class UniRefinerPreTrainedModel(CheckedModel, PreTrainedModel):
    """A framed tower; what `UniRefinerModel` and `UniRefinerBackbone` share.

    Attributes:
        tower: the vision tower of transformers, its weights untouched.
        register_patch: ``(3, patch, patch)``, the pixels tiled over a ``learnable``
            frame (zeros at first); None with any other fill.
        register_tokens: ``(num_register_tokens, hidden)``, which join the sequence inside
            the tower, N(0, 1) / sqrt(hidden) at first; None without.

    Raises:
        UniRefinerError: an unsupported tower, one that takes no register tokens, or `final_norm`
            where there is none to apply.
    """

    config: UniRefinerConfig
    config_class = UniRefinerConfig
    base_model_prefix = "unirefiner"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    begun_by = {
        "register_patch": "register_fill",
        "register_tokens": "num_register_tokens",
    }
    tower: Any  # a PreTrainedModel, or an adapter round one that forwards attributes
    register_patch: nn.Parameter | None
    register_tokens: nn.Parameter | None
    _is_bare = False

    def __init__(self, config: UniRefinerConfig) -> None:
        super().__init__(config)
        self.family: TowerFamily = family_of(config.vision_config)
        if config.final_norm:
            self._check_final_norm(config)
        if config.num_register_tokens:
            self.family.check_register_tokens(config.vision_config)
        self.tower = build_tower(config.vision_config)
        check_tower(self.tower)
        patch = None
        if config.register_fill == "learnable":
            side = self.patch_size
            patch = nn.Parameter(torch.zeros(3, side, side))
        self.register_parameter("register_patch", patch)
        tokens = None
        if config.num_register_tokens:
            shape = config.num_register_tokens, self.hidden_size
            tokens = nn.Parameter(torch.zeros(shape))
        self.register_parameter("register_tokens", tokens)
        self.post_init()

    def _check_final_norm(self, config: UniRefinerConfig) -> None:
        vision = config.vision_config
        if self.family.norms_output(vision):
            raise UniRefinerError(
                f"final_norm=True, but last_hidden_state of a {vision.model_type} tower "
                f"already went through its last layer norm ({self.family.final_norm}). "
                "Leave final_norm=False."
            )
        if self.family.norm_path(vision) is None:
            raise UniRefinerError(
                f"final_norm=True, but a {vision.model_type} tower with this config has "
                "no last layer norm. Leave final_norm=False."
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.register_patch is not None:
            initialization.zeros_(self.register_patch)
        if module is self and self.register_tokens is not None:
            initialization.normal_(self.register_tokens, std=self.hidden_size**-0.5)

    @classmethod
    def from_tower(
        cls: type[Model],
        tower: PreTrainedModel | str | Path,
        *,
        register_width: int = 1,
        register_fill: str = "zero",
        register_seed: int = 0,
        final_norm: bool = False,
        num_register_tokens: int = 0,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> Model:
        """Put a frame round an existing tower; its weights are kept and not copied.

        What a tower draws by chance in training mode (masked patches, moved positions,
        dropped layers) is turned off, and a pooler that published checkpoints lack is
        taken out: see ``settings`` and ``without_pooler`` of its family.

        Args:
            tower: a vision tower or image-text model in memory (the vision half is
                taken), or the Hub name or folder of one.
            register_width: see `UniRefinerConfig`, as are the next four.
            revision: branch, tag or commit on the Hub, for a name.
            dtype: dtype of the weights; None keeps it.
            attn_implementation: ``sdpa``, ``eager``, ...; None keeps it.
            trust_remote_code: run code that the checkpoint brings along.

        Raises:
            WrongKindError: `tower` is neither a model of transformers nor a name.
            UniRefinerError: an unsupported tower.
        """
        inner: Any
        if isinstance(tower, (str, Path)):
            inner = load_tower(
                str(tower),
                revision=revision,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
        elif isinstance(tower, PreTrainedModel):
            dual = tower.config.model_type in DUAL_ENCODERS
            inner = tower.vision_model if dual else tower
            check_tower(inner)
            settle_tower(inner)
            if dtype is not None:
                inner.to(dtype=dtype)
            if attn_implementation is not None:
                with translated(f"{type(inner).__name__} cannot be set to it"):
                    inner.set_attn_implementation(attn_implementation)
        else:
            raise WrongKindError(
                f"tower is a {type(tower).__name__}, not a transformers model or a "
                "name. An adapter goes on afterwards: model.tower = "
                "get_peft_model(model.tower, ...)."
            )
        config = UniRefinerConfig(
            vision_config=inner.config,
            register_width=register_width,
            register_fill=register_fill,
            register_seed=register_seed,
            final_norm=final_norm,
            num_register_tokens=num_register_tokens,
            dtype=inner.dtype,
        )
        config._attn_implementation = inner.config._attn_implementation
        with torch.device("meta"):
            model = cls(config)
        model.tower = inner
        model.config.vision_config = inner.config
        if model.register_patch is not None:
            pixels = torch.zeros(
                model.register_patch.shape, dtype=inner.dtype, device=inner.device
            )
            model.register_patch = nn.Parameter(pixels)
        if model.register_tokens is not None:
            tokens = torch.empty(
                model.register_tokens.shape, dtype=inner.dtype, device=inner.device
            )
            nn.init.normal_(tokens, std=model.hidden_size**-0.5)
            model.register_tokens = nn.Parameter(tokens)
        return model.train(inner.training)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return patch_size_of(self.config.vision_config)

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.config.vision_config.hidden_size

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding of the tower."""
        if self.family.projection is not None:
            return self.tower.get_submodule(self.family.projection)
        return self.tower.get_input_embeddings()

    @contextmanager
    def without_register_tokens(self) -> Iterator[None]:
        """The tower's own sequence, as before PH-Reg, for the passes made inside."""
        before, self._is_bare = self._is_bare, True
        try:
            yield
        finally:
            self._is_bare = before

    def __setattr__(self, name: str, value: Any) -> None:
        """As every module's; on a tower, register tokens join the sequence from now on."""
        super().__setattr__(name, value)
        if name == "tower" and self.config.num_register_tokens:
            JoiningTokens.put_on(value.get_submodule(EMBEDDINGS), self)

    def joining_tokens(self) -> Tensor | None:
        """``(registers, hidden)`` that join the sequence now; None where none do."""
        return None if self._is_bare else self.register_tokens

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """The image in patches; refuses what the tower cannot take."""
        shape = tuple(pixel_values.shape)
        if self.family.takes_patches and len(shape) == 3:
            raise UniRefinerError(
                f"pixel_values has shape {shape}: patches without their grid, as a "
                "NaFlex image processor gives them. Give images (batch, 3, height, "
                "width) of one size; the model cuts them into patches itself."
            )
        if len(shape) != 4 or shape[1] != 3:
            raise UniRefinerError(
                f"pixel_values has shape {shape}; expected (batch, 3, height, width)."
            )
        if not pixel_values.is_floating_point():
            raise UniRefinerError(
                f"pixel_values is {pixel_values.dtype}; expected normalised floating "
                "point images, as the image processor of the tower gives them."
            )
        height, width = shape[2:]
        patch = self.patch_size
        if height % patch or width % patch or not height or not width:
            raise UniRefinerError(
                f"image size {height} x {width} is not a multiple of the patch size "
                f"{patch}: resize or crop it to one, for instance "
                f"{max(1, height // patch) * patch} x {max(1, width // patch) * patch}."
            )
        return height // patch, width // patch

    def _unpatched(self, patches: Tensor, spatial_shapes: Tensor) -> Tensor:
        """Images ``(batch, 3, height, width)`` of what a NaFlex image processor gives."""
        if not self.family.takes_patches:
            raise UniRefinerError(
                "spatial_shapes is of NaFlex towers; this one takes images alone: leave it "
                "out."
            )
        shapes = {
            (int(rows), int(columns)) for rows, columns in spatial_shapes.tolist()
        }
        if len(shapes) != 1:
            raise UniRefinerError(
                f"spatial_shapes holds {len(shapes)} shapes: images of one call have to be "
                "of one shape, since each has a frame. Resize them alike, or call the model "
                "once a shape."
            )
        ((rows, columns),) = shapes
        side = self.patch_size
        if patches.ndim != 3 or patches.shape[2] != 3 * side**2:
            raise UniRefinerError(
                f"pixel_values has shape {tuple(patches.shape)}; with spatial_shapes it is "
                f"(batch, patches, {3 * side**2})."
            )
        cells = patches[:, : rows * columns].unflatten(1, (rows, columns))
        cells = cells.unflatten(3, (side, side, 3))
        # (batch, rows, columns, patch, patch, 3) -> channels first, patches beside another
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def _frame(self, pixel_values: Tensor, width: int) -> Tensor:
        """The framed image; drawn fills are fixed in eval mode, fresh in training."""
        generator = None
        drawn = self.config.register_fill in ("randn", "rand")
        if drawn and width > 0 and not self.training:
            generator = torch.Generator().manual_seed(self.config.register_seed)
        return frame_pixels(
            pixel_values,
            width,
            self.patch_size,
            self.config.register_fill,
            generator=generator,
            patch=self.register_patch,
        )

    def _run(
        self,
        pixel_values: Tensor,
        register_width: int | None,
        output_hidden_states: bool | int | list[int] | None = False,
        output_attentions: bool | None = False,
    ) -> _Pass:
        """One pass of the framed image through the tower."""
        grid = self._grid(pixel_values)
        width = self.config.register_width if register_width is None else register_width
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:
            check_forms_maps(self.config.vision_config._attn_implementation)
        # Picked here: towers select states themselves from transformers 5.23 on only.
        wanted = self._wanted_states(output_hidden_states)
        # Most towers cast pixels themselves; ViT-MAE and RADIO do not.
        framed = self._frame(pixel_values, width).to(self.tower.dtype)
        joining = self.joining_tokens()
        joined = 0 if joining is None else len(joining)
        output = self.tower(
            **tower_inputs(self.family, framed, self.patch_size, joined),
            return_dict=True,
            output_hidden_states=wanted is not None or bool(output_hidden_states),
            output_attentions=output_attentions,
        )
        prefix = self.family.num_prefix_tokens(self.config.vision_config)
        tokens = output.last_hidden_state.shape[1]
        rows, columns = grid[0] + 2 * width, grid[1] + 2 * width
        expected = prefix + rows * columns + joined
        if tokens != expected:
            raise RuntimeError(
                f"the tower returned {tokens} tokens for a framed grid of {rows} x "
                f"{columns} patches, {prefix} prefix tokens and {joined} register tokens; "
                f"expected {expected}."
            )
        states = output.get("hidden_states")
        layers = self.config.vision_config.num_hidden_layers
        if states is not None and len(states) != layers + 1:
            raise RuntimeError(
                f"the tower recorded {len(states)} hidden states of {layers} layers. A "
                "model of transformers' BackboneMixin round this one hooks the layers a "
                "second time: hold it in a PreTrainedModel, or see UniRefinerPyramid."
            )
        return _Pass(output, grid, width, prefix, wanted)

    def _wanted_states(self, request: Any) -> tuple[int, ...] | None:
        """The hidden states that an int or list asks for; None for a flag."""
        if request is None or isinstance(request, bool):
            return None
        wanted = (request,) if isinstance(request, int) else tuple(request)
        count = self.config.num_hidden_layers + 1
        wrong = [index for index in wanted if not -count <= index < count]
        if wrong:
            raise UniRefinerError(
                f"output_hidden_states asks for {wrong[0]}, but there are {count}: the "
                f"embeddings and {count - 1} layers, 0 to {count - 1} or from -1 down."
            )
        return wanted

    def _split(self, passed: _Pass) -> tuple[Tensor, Tensor]:
        """Image and register tokens, through the last layer norm if configured."""
        image, registers = passed.split(passed.output.last_hidden_state)
        if self.config.final_norm:
            return self._last_norm(image), self._last_norm(registers)
        return image, registers

    def _last_norm(self, tokens: Tensor) -> Tensor:
        path = self.family.norm_path(self.config.vision_config)
        assert path is not None
        return self.tower.get_submodule(path)(tokens)

    def _pool(self, passed: _Pass) -> Tensor | None:
        """The tower's pooled output, without the frame where it pools over tokens."""
        pools = self.family.pools_over_patches(self.config.vision_config)
        if pools and (passed.width > 0 or self.joining_tokens() is not None):
            assert self.family.pooling_head is not None
            head = self.tower.get_submodule(self.family.pooling_head)
            return head(passed.image(passed.output.last_hidden_state))
        return passed.output.get("pooler_output")


class UniRefinerModel(UniRefinerPreTrainedModel):
    """A vision tower that returns the tokens of the image inside a register frame.

    With ``register_width=0`` and ``final_norm=False`` it returns the bare tower's patch
    tokens, bit for bit.
    """

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        register_width: int | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        spatial_shapes: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
    ) -> UniRefinerOutput:
        """Image tokens of a batch.

        Args:
            pixel_values: ``(batch, 3, height, width)``, normalised; height and width
                are multiples of the patch size, square or not.
            register_width: frame in patches; None takes the config's, 0 puts none.
            output_hidden_states: True, or the index (indices) of those wanted.
            output_attentions: needs ``attn_implementation="eager"``.
            spatial_shapes: ``(batch, 2)``, rows and columns of patches, all alike, where
                `pixel_values` are the ``(batch, patches, 3 * patch * patch)`` of a NaFlex
                image processor.
            pixel_attention_mask: what such a processor gives beside; the shapes say it all.

        Raises:
            UniRefinerError: a size off the patch grid, another shape or dtype than above, a
                negative register width, or attentions without eager attention.
            RuntimeError: the tower returned another number of tokens than its family
                should.
        """
        if spatial_shapes is not None:
            pixel_values = self._unpatched(pixel_values, spatial_shapes)
        passed = self._run(
            pixel_values, register_width, output_hidden_states, output_attentions
        )
        image, _ = self._split(passed)
        return UniRefinerOutput(
            last_hidden_state=image,
            pooler_output=self._pool(passed),
            hidden_states=passed.hidden_states(),
            attentions=passed.attentions(),
            feature_map=image.transpose(1, 2).unflatten(2, passed.grid),
        )

    def encode(
        self,
        pixel_values: Tensor,
        register_width: int = 0,
        query_key_layers: Sequence[int] = (),
    ) -> TowerTokens:
        """Image tokens, register tokens and attention projections of a batch.

        What training and diagnosis call. Gradients follow the caller's grad mode; with
        reentrant activation checkpointing the projections carry none.

        Args:
            pixel_values: as in `forward`.
            register_width: frame in patches.
            query_key_layers: layers whose queries and keys are wanted, from 0.

        Raises:
            UniRefinerError: as in `forward`, or a layer the tower does not have.
        """
        with record_queries_keys(self.tower, query_key_layers) as recorded:
            passed = self._run(pixel_values, register_width)
        image, registers = self._split(passed)
        projections = {
            layer: (passed.image(queries), passed.image(keys))
            for layer, (queries, keys) in recorded.items()
        }
        return TowerTokens(image, registers, passed.grid, projections)


class UniRefinerBackbone(BackboneMixin, UniRefinerPreTrainedModel):
    """Feature maps of a framed tower for dense heads; same checkpoint as the model.

    The last stage equals `UniRefinerModel`'s ``feature_map`` with
    ``apply_layernorm=True``. UperNet and Mask2Former take the maps; DPT takes
    ``reshape_hidden_states=False``: ``(batch, 1 + h * w, hidden)`` with a readout token
    first, the tower's CLS token or, in towers without one, the mean image token.

    Load with ``UniRefinerBackbone.from_pretrained(folder_or_name)``.
    ``AutoBackbone.from_pretrained`` works for names on the Hub; transformers 5.23 asks
    the Hub for folders too and fails. ``AutoBackbone.from_config`` works.
    """

    def __init__(self, config: UniRefinerConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: Tensor,
        register_width: int | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        spatial_shapes: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
    ) -> BackboneOutput:
        """Feature maps of the stages in ``out_features``.

        Args:
            pixel_values: as in `UniRefinerModel.forward`, as are the others.

        Raises:
            UniRefinerError: as in `UniRefinerModel.forward`.
        """
        if spatial_shapes is not None:
            pixel_values = self._unpatched(pixel_values, spatial_shapes)
        passed = self._run(
            pixel_values, register_width, output_hidden_states, output_attentions
        )
        states = passed.output.hidden_states
        maps: Any = tuple(
            self._map(passed, state, last=index == len(states) - 1)
            for index, (stage, state) in enumerate(zip(self.stage_names, states))
            if stage in self.out_features
        )
        return BackboneOutput(
            feature_maps=maps,
            hidden_states=passed.hidden_states(),
            attentions=passed.attentions(),
        )

    def _map(self, passed: _Pass, state: Tensor, last: bool) -> Tensor:
        """One stage: the full token sequence of a layer -> its feature map."""
        in_output = self.family.norms_output(self.config.vision_config)
        normed = in_output or self.config.final_norm
        if self.config.apply_layernorm and last and in_output:
            state = passed.output.last_hidden_state
        elif self.config.apply_layernorm and normed:
            state = self._last_norm(state)
        image = passed.image(state)
        if self.config.reshape_hidden_states:
            return image.transpose(1, 2).unflatten(2, passed.grid)
        readout = state[:, :1] if passed.prefix else image.mean(dim=1, keepdim=True)
        return torch.cat([readout, image], dim=1)


__all__ = ["UniRefinerBackbone", "UniRefinerModel", "UniRefinerPreTrainedModel"]

# Saving a model saves the files of this folder's flat modules beside the weights.
UniRefinerModel.register_for_auto_class("AutoModel")
UniRefinerBackbone.register_for_auto_class("AutoBackbone")
