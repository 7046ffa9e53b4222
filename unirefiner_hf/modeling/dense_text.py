"""Patch features of a dual encoder's tower in the space of its text features.

CLIP aligns only its CLS token with text, SigLIP only the output of a head that pools by
attention. These readings of the last block bring the patch tokens there without training:
MaskCLIP (arXiv 2112.01071), SCLIP (2312.01597), ClearCLIP (2407.12442), NACLIP
(2404.08181), and the value path of SigLIP's head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .modeling_unirefiner import UniRefinerModel

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
VARIANTS: dict[str, tuple[str, ...]] = {
    CLIP: ("plain", "maskclip", "sclip", "clearclip", "naclip"),
    SIGLIP: ("value",),
}
"""Model type of the vision config -> what `dense_text_features` can read there."""

KEEPS_REST = ("plain", "sclip")
"""Variants that keep the residual and the MLP of CLIP's last block."""


def variants_of(model: UniRefinerModel) -> tuple[str, ...]:
    """The variants a tower has.

    Raises:
        ValueError: a tower that was not trained with text.
    """
    model_type = model.config.vision_config.model_type
    if model_type not in VARIANTS:
        raise ValueError(
            f"A {model_type} tower has no text side: its features cannot be compared "
            f"with words. Towers that can: {', '.join(VARIANTS)}."
        )
    return VARIANTS[model_type]


def check_variant(model: UniRefinerModel, variant: str) -> None:
    """Refuse a variant the tower does not have.

    Raises:
        ValueError: names the variant and those there are; or as `variants_of`.
    """
    known = variants_of(model)
    if variant not in known:
        family = model.config.vision_config.model_type
        raise ValueError(
            f"variant is {variant!r}; a {family} tower has {', '.join(known)}."
        )


def dense_text_features(
    model: UniRefinerModel,
    pixel_values: Tensor,
    *,
    variant: str,
    projection: nn.Module | None = None,
    register_width: int | None = None,
    sigma: float = 5.0,
    residual: bool | None = None,
) -> Tensor:
    """Patch features that can be compared with text features.

    The frame goes round the image as in `UniRefinerModel` and its tokens take part in
    the last block; only those of the image come back. With ``register_width=0`` it is
    the bare dual encoder.

    CLIP: the last block is computed again from its input. ``plain``: as it is.
    ``maskclip``: every token attends to itself alone, value -> out_proj. ``sclip``:
    softmax(q q') + softmax(k k'), not divided by two. ``clearclip``: softmax(q q').
    ``naclip``: softmax(k k' + G), G the Gaussian exp(-d^2 / 2 sigma^2) of the distance d
    between two patches, 0 from and to CLS. Then the last layer norm and `projection`.
    SigLIP, ``value``: the last layer norm, value projection and out_proj of the pooling
    head, then x + MLP(LN(x)), all of the tower itself.

    Args:
        pixel_values: ``(batch, 3, height, width)``, see `UniRefinerModel.forward`.
        variant: see above.
        projection: hidden -> projection, ``visual_projection`` of the base CLIP; a
            refined checkpoint holds the tower only. SigLIP has none.
        register_width: frame in patches; None takes the config's.
        sigma: of ``naclip``, in patches.
        residual: keep the last block's residual and MLP; None: ``plain`` and ``sclip``
            do, the others do not. ``plain`` always does.

    Returns:
        ``(batch, patches, projection)`` in raster order, not normalised.

    Raises:
        ValueError: a variant the family does not have, a CLIP tower without
            `projection`, a SigLIP tower without pooling head, a sigma that is not
            positive, or as in `UniRefinerModel.forward`.
    """
    check_variant(model, variant)
    if sigma <= 0:
        raise ValueError(f"sigma is {sigma}; it must be positive.")
    passed = model._run(pixel_values, register_width, output_hidden_states=True)
    family, tower = model.family, model.tower
    if model.config.vision_config.model_type == SIGLIP:
        if not family.pools_over_patches(model.config.vision_config):
            raise ValueError(
                "This SigLIP tower has no pooling head (vision_use_head is false), and "
                "only that head reaches the space of the text."
            )
        head = tower.get_submodule(str(family.pooling_head))
        return _value_path(head, passed.image(passed.output.last_hidden_state))
    if projection is None:
        raise ValueError(
            "A CLIP tower needs projection, the visual_projection of its dual encoder."
        )
    states = passed.output.hidden_states
    if variant == "plain":
        tokens = states[-1]
    else:
        layers = tower.get_submodule(family.layers)
        block = list(layers.children())[-1]
        grid = (passed.grid[0] + 2 * passed.width, passed.grid[1] + 2 * passed.width)
        keep = variant in KEEPS_REST if residual is None else residual
        tokens = _block_again(
            block, states[-2], variant, grid, passed.prefix, sigma, keep
        )
    normed = tower.get_submodule(family.final_norm)(passed.image(tokens))
    return projection(normed)


def _value_path(head: nn.Module, tokens: Tensor) -> Tensor:
    """SigLIP's pooling head where every token attends to itself alone."""
    attention: nn.MultiheadAttention = head.get_submodule("attention")  # type: ignore
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    hidden = tokens.shape[-1]
    value = functional.linear(tokens, weight[2 * hidden :], bias[2 * hidden :])
    value = attention.out_proj(value)
    return value + head.get_submodule("mlp")(head.get_submodule("layernorm")(value))


def _block_again(
    block: nn.Module,
    tokens: Tensor,
    variant: str,
    grid: tuple[int, int],
    prefix: int,
    sigma: float,
    keep: bool,
) -> Tensor:
    """CLIP's last block with another attention: ``(batch, tokens, hidden)`` to the same."""
    attention = block.get_submodule("self_attn")
    normed = block.get_submodule("layer_norm1")(tokens)
    heads = int(attention.num_heads)  # type: ignore[arg-type]

    def projected(name: str) -> Tensor:
        full = attention.get_submodule(name)(normed)
        return full.unflatten(-1, (heads, -1)).transpose(1, 2)

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
        near = functional.pad(near, (prefix, 0, prefix, 0))
        weights = (alike("k_proj") + near).softmax(-1)
    else:
        weights = None
    mixed = value if weights is None else weights @ value
    out = attention.get_submodule("out_proj")(mixed.transpose(1, 2).flatten(2))
    if not keep:
        return out
    out = tokens + out
    rest = block.get_submodule("mlp")(block.get_submodule("layer_norm2")(out))
    return out + rest


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
