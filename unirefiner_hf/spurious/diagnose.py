"""How many of a model's tokens are spurious, and where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..modeling.modeling_unirefiner import UniRefinerModel
from . import attention_flow, similarity
from .composites import add_strip, split_strip
from .settings import FilterSettings


@dataclass(frozen=True)
class Yardstick:
    """What a model's tokens were measured against, to measure another model's alike.

    Attributes:
        reference: ``(1, others, hidden)``, L2-normalised tokens of the reference image.
        strip: ``(batch, others, hidden)``, those of its strip in the composites.
        reference_limit: ``(batch, 1)``, cosine from which a token resembles `reference`.
        strip_limit: ``(batch, 1)``, cosine from which it resembles `strip`.
        inflow_limit: scalar, attention inflow below which a token is hijacked, where 1 is
            the mean of the tokens that are neither fixed patterns nor global proxies.
    """

    reference: Tensor
    strip: Tensor
    reference_limit: Tensor
    strip_limit: Tensor
    inflow_limit: Tensor


@dataclass(frozen=True)
class Diagnosis:
    """Spurious tokens of a batch; maps are ``(batch, patches)`` in raster order.

    Attributes:
        fpgp: bool, fixed patterns and global proxies.
        ah: bool, attention hijackees among the rest.
        similarity: highest cosine to an unrelated token (reference or strip).
        inflow: attention received, 1 for the mean of the tokens not in `fpgp`.
        yardstick: what the tokens were measured against.
        grid: rows and columns of patches.
    """

    fpgp: Tensor
    ah: Tensor
    similarity: Tensor
    inflow: Tensor
    yardstick: Yardstick
    grid: tuple[int, int]

    @property
    def spurious(self) -> Tensor:
        """``(batch, patches)`` bool, found by either filter."""
        return self.fpgp | self.ah

    def shares(self) -> dict[str, float]:
        """Share of all tokens: ``fpgp``, ``ah`` and ``spurious`` (either)."""
        maps = {"fpgp": self.fpgp, "ah": self.ah, "spurious": self.spurious}
        return {name: found.float().mean().item() for name, found in maps.items()}


def middle_layers(num_layers: int) -> list[int]:
    """First and last layer of the attention-flow filter where none are published.

    The published choices lie between 0.31 and 0.64 of the depth (method, table of
    section 4); this takes the layers from 0.4 to 0.55.
    """
    first = round(0.4 * num_layers)
    return [first, max(first, round(0.55 * num_layers) - 1)]


@torch.no_grad()
def diagnose(
    model: UniRefinerModel,
    pixel_values: Tensor,
    reference: Tensor,
    settings: FilterSettings | None = None,
    *,
    register_width: int | None = None,
    yardstick: Yardstick | None = None,
    channel_mask: Tensor | None = None,
    side: str = "right",
) -> Diagnosis:
    """Find a model's spurious tokens by the filters of training, on whole images.

    The image is compared with the reference image alone and, as a composite, with a
    strip of it glued to one side; the attention flow is read inside the composite.

    Args:
        pixel_values: ``(batch, 3, height, width)``, normalised.
        reference: ``(1, 3, any height, any width)``, normalised.
        settings: settings of the filters; where `ah_layers` is unset, `middle_layers`.
        register_width: frame in patches; None takes the model's own, 0 its bare tower.
        yardstick: measure by another model's, on the same images, instead of by this
            model's own tokens and statistics. A refined tower's tokens are trained to lie
            among its base's, so the base's yardstick tells what changed; a model's own
            limits follow the mean of each image and reject a similar share of any model.
        channel_mask: ``(hidden,)``, 0 for lazy channels, which no cosine takes in.

    Raises:
        ValueError: sizes off the patch grid.
    """
    settings = settings or FilterSettings()
    config = model.config.vision_config
    layers = settings.flow_layers
    if not layers:
        first, last = middle_layers(config.num_hidden_layers)
        layers = tuple(range(first, last + 1))
    if register_width is None:
        register_width = model.config.register_width
    size = pixel_values.shape[-2:]
    if reference.shape[-2:] != size:
        reference = functional.interpolate(
            reference, size, mode="bicubic", antialias=True
        )
    patch, ratio = model.patch_size, settings.strip_ratio
    grid = (size[0] // patch, size[1] // patch)

    def unit(tokens: Tensor) -> Tensor:
        return similarity.unit_tokens(tokens, channel_mask)

    composites = add_strip(pixel_values, reference, side, patch, ratio)
    encoded = model.encode(composites, register_width, query_key_layers=layers)
    image, strip = split_strip(unit(encoded.image), grid, side, ratio)
    if yardstick is not None:
        unrelated, strip = yardstick.reference, yardstick.strip
    else:
        unrelated = unit(model.encode(reference, register_width).image)
    to_reference = similarity.highest_cosine(image, unrelated)
    to_strip = similarity.highest_cosine(image, strip)
    if yardstick is not None:
        reference_limit, strip_limit = yardstick.reference_limit, yardstick.strip_limit
    elif settings.fpgp_cosine is not None:
        reference_limit = to_reference.new_full((len(image), 1), settings.fpgp_cosine)
        strip_limit = reference_limit
    else:
        sigma = settings.fpgp_sigma
        reference_limit = similarity.similarity_threshold(to_reference, sigma)
        strip_limit = similarity.similarity_threshold(to_strip, sigma)
    fpgp = (to_reference >= reference_limit) | (to_strip >= strip_limit)

    flow = [
        tuple(split_strip(projection, grid, side, ratio)[0] for projection in pair)
        for pair in encoded.queries_keys.values()
    ]
    inflow = attention_flow.attention_inflow(
        [(queries, keys) for queries, keys in flow],
        fpgp,
        settings.ah_form,
        config.num_attention_heads,
    )
    if not fpgp.all():
        inflow = inflow / inflow[~fpgp].mean()
    if yardstick is None:
        limit = attention_flow.inflow_threshold(inflow, fpgp, settings.ah_sigma)
        yardstick = Yardstick(unrelated, strip, reference_limit, strip_limit, limit)
    return Diagnosis(
        fpgp=fpgp,
        ah=(inflow < yardstick.inflow_limit) & ~fpgp,
        similarity=torch.maximum(to_reference, to_strip),
        inflow=inflow,
        yardstick=yardstick,
        grid=grid,
    )
