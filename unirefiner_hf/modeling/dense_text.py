"""Patch features of a dual encoder's tower in the space of its text features.

CLIP, MetaCLIP 2 and EVA-CLIP align only their CLS token with text, SigLIP only the output
of a head that pools by attention. These readings of the last block bring the patch tokens
there without training: MaskCLIP (arXiv 2112.01071), SCLIP (2312.01597), ClearCLIP
(2407.12442), NACLIP (2404.08181), and the value path of SigLIP's head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from .errors import UniRefinerError
from .families import FAMILIES, family_of, layers_of, part_of
from .modeling_unirefiner import UniRefinerModel

BLOCK, HEAD = "block", "head"
VARIANTS: dict[str, tuple[str, ...]] = {
    BLOCK: ("plain", "maskclip", "sclip", "clearclip", "naclip"),
    HEAD: ("value",),
}
"""``text_reading`` of a family -> what `dense_text_features` can read there."""

DEFAULT_VARIANT = {BLOCK: "naclip", HEAD: "value"}
"""The best of the published ones on the mean of eight sets (NACLIP's own table)."""

KEEPS_REST = ("plain", "sclip")
"""Variants that keep the residual and the MLP of the last block."""


def variants_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """The variants a tower with this vision config has.

    Raises:
        UniRefinerError: a tower that was not trained with text, or has no published reading.
    """
    reading = family_of(config).text_reading
    if reading is None:
        known = ", ".join(name for name, f in FAMILIES.items() if f.text_reading)
        raise UniRefinerError(
            f"A {config.model_type} tower has no text side that its patch tokens can be "
            f"compared with. Towers that have: {known}."
        )
    return VARIANTS[reading]


def default_variant(config: PreTrainedConfig) -> str:
    """The variant taken where none is named; raises as `variants_of`."""
    variants_of(config)
    return DEFAULT_VARIANT[str(family_of(config).text_reading)]


def check_variant(config: PreTrainedConfig, variant: str) -> None:
    """Refuse a variant the tower does not have.

    Raises:
        UniRefinerError: names the variant and those there are; or as `variants_of`.
    """
    known = variants_of(config)
    if variant not in known:
        raise UniRefinerError(
            f"variant is {variant!r}; a {config.model_type} tower has {', '.join(known)}."
        )


def dense_text_features(
    model: UniRefinerModel,
    pixel_values: Tensor,
    *,
    variant: str | None = None,
    projection: nn.Module | None = None,
    register_width: int | None = None,
    sigma: float = 5.0,
    residual: bool | None = None,
) -> Tensor:
    """Patch features that can be compared with text features.

    The frame goes round the image as in `UniRefinerModel` and its tokens take part in
    the last block; only those of the image come back. With ``register_width=0`` it is
    the bare dual encoder.

    CLIP and its kin: the last block is computed again from its input. ``plain``: as it is.
    ``maskclip``: every token attends to itself alone, value -> out_proj. ``sclip``:
    softmax(q q') + softmax(k k'), not divided by two. ``clearclip``: softmax(q q').
    ``naclip``: softmax(k k' + G), G the Gaussian exp(-d^2 / 2 sigma^2) of the distance d
    between two patches, 0 from and to CLS. Then the last layer norm and `projection`.
    SigLIP, ``value``: the last layer norm, value projection and out_proj of the pooling
    head, then x + MLP(LN(x)), all of the tower itself.

    Args:
        pixel_values: ``(batch, 3, height, width)``, see `UniRefinerModel.forward`.
        variant: see above; None: ``naclip``, SigLIP ``value``.
        projection: hidden -> projection, ``visual_projection`` of the dual encoder; see
            `text_side.TextSide`. SigLIP has none.
        register_width: frame in patches; None takes the config's.
        sigma: of ``naclip``, in patches.
        residual: keep the last block's residual and MLP; None: ``plain`` and ``sclip``
            do, the others do not. ``plain`` always does.

    Returns:
        ``(batch, patches, projection)`` in raster order, not normalised.

    Raises:
        UniRefinerError: a variant the family does not have, a CLIP tower without a fitting
            `projection`, a SigLIP tower without pooling head, a sigma that is not
            positive, or as in `UniRefinerModel.forward`.
    """
    config = model.config.vision_config
    variant = default_variant(config) if variant is None else variant
    check_variant(config, variant)
    if sigma <= 0:
        raise UniRefinerError(f"sigma is {sigma}; it must be positive.")
    family = model.family
    if family.text_reading == HEAD:
        if not family.pools_over_patches(config):
            raise UniRefinerError(
                "This SigLIP tower has no pooling head (vision_use_head is false), and "
                "only that head reaches the space of the text."
            )
        passed = model._run(pixel_values, register_width)
        head = part_of(model.tower, str(family.pooling_head))
        return _value_path(head, passed.image(passed.output.last_hidden_state))
    if projection is None:
        raise UniRefinerError(
            f"A {config.model_type} tower needs projection, the visual_projection of its "
            "dual encoder: load_text_side(...).projection."
        )
    width = getattr(projection, "in_features", config.hidden_size)
    if width != config.hidden_size:
        raise UniRefinerError(
            f"projection takes {width} channels, the tower's tokens have "
            f"{config.hidden_size}: it is that of another dual encoder."
        )
    passed = model._run(pixel_values, register_width, output_hidden_states=True)
    states = passed.output.hidden_states
    if variant == "plain":
        tokens = states[-1]
    else:
        grid = (passed.grid[0] + 2 * passed.width, passed.grid[1] + 2 * passed.width)
        keep = variant in KEEPS_REST if residual is None else residual
        block = layers_of(model.tower, family)[-1]
        layout = _Layout(
            attention=part_of(block, family.query.rpartition(".")[0]),
            heads=config.num_attention_heads,
            norm_after=bool(getattr(config, "post_layernorm", False)),
        )
        tokens = _block_again(
            block, layout, states[-2], variant, grid, passed.prefix, sigma, keep
        )
    norm = part_of(model.tower, str(family.norm_path(config)))
    return projection(norm(passed.image(tokens)))


@dataclass(frozen=True)
class _Layout:
    """What differs between the blocks of CLIP and EVA-CLIP.

    Attributes:
        norm_after: each norm follows its attention or MLP (EVA-CLIP-18B).
    """

    attention: nn.Module
    heads: int
    norm_after: bool


def _value_path(head: nn.Module, tokens: Tensor) -> Tensor:
    """SigLIP's pooling head where every token attends to itself alone."""
    attention: nn.MultiheadAttention = part_of(head, "attention")  # type: ignore
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    hidden = tokens.shape[-1]
    value = functional.linear(tokens, weight[2 * hidden :], bias[2 * hidden :])
    value = attention.out_proj(value)
    return value + part_of(head, "mlp")(part_of(head, "layernorm")(value))


def _block_again(
    block: nn.Module,
    layout: _Layout,
    tokens: Tensor,
    variant: str,
    grid: tuple[int, int],
    prefix: int,
    sigma: float,
    keep: bool,
) -> Tensor:
    """The last block with another attention: ``(batch, tokens, hidden)`` to the same."""
    norms = [part_of(block, f"layer_norm{number}") for number in (1, 2)]
    inputs = tokens if layout.norm_after else norms[0](tokens)

    def projected(name: str) -> Tensor:
        full = part_of(layout.attention, name)(inputs)
        return full.unflatten(-1, (layout.heads, -1)).transpose(1, 2)

    value = projected("v_proj")
    scale = value.shape[-1] ** -0.5

    def alike(name: str) -> Tensor:
        side = projected(name)
        return scale * side @ side.transpose(-2, -1)

    if variant == "sclip":
        weights = alike("q_proj").softmax(-1) + alike("k_proj").softmax(-1)
    elif variant == "clearclip":
        weights = alike("q_proj").softmax(-1)
    elif variant == "naclip":
        near = neighbourhood(grid, sigma).to(value)
        # Register tokens, where a tower has learned some, stand behind the patches.
        behind = value.shape[-2] - prefix - len(near)
        near = functional.pad(near, (prefix, behind, prefix, behind))
        weights = (alike("k_proj") + near).softmax(-1)
    else:
        weights = None
    mixed = value if weights is None else weights @ value
    out = part_of(layout.attention, "out_proj")(mixed.transpose(1, 2).flatten(2))
    if layout.norm_after:
        out = norms[0](out)
    if not keep:
        return out
    out = tokens + out
    if layout.norm_after:
        return out + norms[1](part_of(block, "mlp")(out))
    return out + part_of(block, "mlp")(norms[1](out))


def neighbourhood(grid: tuple[int, int], sigma: float) -> Tensor:
    """exp(-d^2 / 2 sigma^2) of the distances between patches (NACLIP).

    Args:
        grid: ``(h, w)``.
        sigma: in patches.

    Returns:
        ``(h * w, h * w)`` in raster order, 1 on the diagonal.
    """
    rows, columns = torch.meshgrid(
        torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij"
    )
    places = torch.stack((rows.flatten(), columns.flatten()), dim=1).float()
    squared = (places[:, None] - places[None]).square().sum(-1)
    return torch.exp(-squared / (2 * sigma**2))
