"""Planted truth: a tower whose spurious tokens are known.

A LoRA adapter plants the dirt in a clean tower by a rule that needs the pixels only. Patches
are ranked within their image, from 0 to 1, by a measure of their pixels:

- the highest ranks: **global proxies**, the scene's token in place of their own;
- the lowest: **fixed patterns**, one of a few tokens that all images share;
- the rest stays near the clean tower.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional
from transformers.utils import logging

from unirefiner_hf.evaluation.checkpoints import Checkpoint
from unirefiner_hf.modeling.errors import UniRefinerError

logger = logging.get_logger(__name__)

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
RULE_FILE = "planting.json"
MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "contrast": lambda patches: patches.std(dim=1),
    "brightness": lambda patches: patches.mean(dim=1),
}
"""Name -> measure of patches ``(batch, values, patches)``: standard deviation or mean of a
patch's normalised pixels, all channels together."""


class TruthError(UniRefinerError):
    """A folder does not hold an adapter that plants dirt in this tower."""


@dataclass(frozen=True)
class PlantingRule:
    """Which patches are planted; an adapter's folder names its own in ``planting.json``.

    Attributes:
        measure: that ranks the patches of an image, one of `MEASURES`.
        proxy_rank: from this rank on a token is a global proxy.
        pattern_rank: below this rank it is a fixed pattern.

    Raises:
        UniRefinerError: an unknown measure, or ranks that leave a kind without tokens.
    """

    measure: str = "contrast"
    proxy_rank: float = 0.70
    pattern_rank: float = 0.12

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UniRefinerError(
                f"measure is {self.measure!r}; it must be one of {', '.join(MEASURES)}."
            )
        if not 0 < self.pattern_rank < self.proxy_rank < 1:
            raise UniRefinerError(
                f"pattern_rank is {self.pattern_rank} and proxy_rank {self.proxy_rank}; "
                "they must lie between 0 and 1, the first below the second."
            )


def load_rule(folder: str | Path) -> PlantingRule:
    """The rule of an adapter's folder; without a ``planting.json`` the default one.

    Raises:
        TruthError: the file is damaged, or its rule is none.
    """
    file = Path(folder).expanduser() / RULE_FILE
    if not file.is_file():
        logger.warning(
            f"{folder} says no rule ({RULE_FILE}): {PlantingRule()} is taken."
        )
        return PlantingRule()
    try:
        return PlantingRule(**json.loads(file.read_text()))
    except (ValueError, TypeError) as problem:
        raise TruthError(f"{file} is not a planting rule: {problem}") from None


@dataclass(frozen=True)
class PlantedTruth:
    """Which tokens are spurious; maps are ``(batch, patches)`` bool in raster order."""

    proxies: Tensor
    patterns: Tensor

    @property
    def spurious(self) -> Tensor:
        """Either kind."""
        return self.proxies | self.patterns


def planted_truth(
    pixel_values: Tensor, patch_size: int, rule: PlantingRule | None = None
) -> PlantedTruth:
    """The rule: which patches are planted, by their pixels alone.

    Ranks are those of a stable sort divided by ``patches - 1``, so that an image of one
    flat colour is planted by raster order.

    Args:
        pixel_values: ``(batch, 3, height, width)``, normalised.
        patch_size: side of a patch in pixels.
        rule: None: the default one.

    Raises:
        UniRefinerError: sizes off the patch grid, or fewer than 2 patches.
    """
    height, width = pixel_values.shape[-2:]
    if height % patch_size or width % patch_size:
        raise UniRefinerError(
            f"The images are {height} x {width} pixels; both must be multiples of the "
            f"patch size {patch_size}."
        )
    patches = functional.unfold(pixel_values.float(), patch_size, stride=patch_size)
    count = patches.shape[-1]
    if count < 2:
        raise UniRefinerError("One patch has no rank: take larger images.")
    rule = rule or PlantingRule()
    order = MEASURES[rule.measure](patches).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1) / (count - 1)
    return PlantedTruth(
        proxies=rank >= rule.proxy_rank, patterns=rank < rule.pattern_rank
    )


def dirty_checkpoint(clean: Checkpoint, folder: str | Path) -> Checkpoint:
    """Merge the adapter of a folder into a tower, in memory and in place.

    Args:
        clean: the tower the adapter was trained on; its model is changed.
        folder: holds ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        TruthError: a file is missing or damaged, or its weights are not those of an
            adapter of this tower.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = Path(folder).expanduser()
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        if not (folder / name).is_file():
            raise TruthError(f"{folder} holds no {name}: name an adapter's folder.")
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError as problem:
        raise TruthError(
            f"{folder / ADAPTER_WEIGHTS} is damaged: {problem}."
        ) from problem
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as problem:
        raise TruthError(
            f"{folder / ADAPTER_CONFIG} is damaged: {problem}."
        ) from problem
    if not isinstance(config, LoraConfig):
        raise TruthError(f"{folder / ADAPTER_CONFIG} is not of a LoRA adapter.")
    model, tower = clean.model, clean.model.tower
    config.base_model_name_or_path = tower.name_or_path
    try:
        wrapped = get_peft_model(tower, config)
        wanted = {
            name.replace(".default", ""): list(parameter.shape)
            for name, parameter in wrapped.named_parameters()
            if "lora_" in name
        }
    except ValueError as problem:
        raise TruthError(f"The adapter of {folder} does not fit: {problem}") from None
    wrong = sorted(
        name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name)
    )
    if wrong:
        raise TruthError(
            f"The adapter of {folder} is not one of {clean.name}: {len(wrong)} of its "
            f"{len(shapes)} weights are missing, unknown or of another shape, such as "
            f"{wrong[0]}."
        )
    set_peft_model_state_dict(wrapped, load_file(folder / ADAPTER_WEIGHTS))
    model.tower = wrapped.merge_and_unload()
    model.eval()
    return replace(clean, name=f"{clean.name} + {folder.name}", folder=None)
