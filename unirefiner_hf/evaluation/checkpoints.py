"""The towers an evaluation compares."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from ..loading.base import load_processor, takes_final_norm
from ..loading.starter import NAME as STARTER
from ..loading.starter import starter_tower
from ..modeling.configuration_unirefiner import UniRefinerConfig
from ..modeling.modeling_unirefiner import UniRefinerModel
from ..modeling.towers import load_tower

RECORD, MERGED = "run.json", "merged"
METHOD_NAMES = {
    "plain": "plain distillation",
    "ph_reg": "PH-Reg",
    "unirefiner": "refined",
}
SAME_EMBEDDING = 0.99
"""Cosine of two towers' patch embeddings (with PH-Reg, or first layers) from which they
count as one base."""


class CheckpointMismatchError(ValueError):
    """A checkpoint cannot be loaded, or is not of the tower it is compared with."""


@dataclass(frozen=True)
class Checkpoint:
    """A tower to measure.

    Attributes:
        name: how tables call it.
        model: in eval mode.
        mean, std: of each channel, as its image processor normalises.
        register_width: frame in patches it is measured with.
        folder: where its ``evaluation.json`` goes; None for a Hub id.
        method: of the run that made it, such as ``unirefiner`` or ``plain``; None for a
            tower as it was published. A checkpoint without a record counts as
            ``unirefiner``, with register tokens as ``ph_reg``.
        source: folder or Hub id it was loaded from; empty for a model in memory.
    """

    name: str
    model: UniRefinerModel
    mean: tuple[float, ...]
    std: tuple[float, ...]
    register_width: int
    folder: Path | None = None
    method: str | None = None
    source: str = ""

    @property
    def needs_controls(self) -> bool:
        """Whether it is a result, neither a base nor a control."""
        return self.method not in (None, "plain")

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.model.patch_size

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""
        return self.model.hidden_size

    def framed(self, register_width: int) -> Checkpoint:
        """The same weights with another frame."""
        name = f"{self.name} + frame of {register_width}"
        return replace(self, name=name, register_width=register_width, folder=None)

    def side(self, pixels: int) -> int:
        """`pixels`, rounded up to whole patches."""
        return -(-pixels // self.patch_size) * self.patch_size

    @torch.no_grad()
    def feature_map(self, pixel_values: Tensor) -> Tensor:
        """Patch tokens ``(batch, hidden, rows, columns)`` of the last layer, float32."""
        outputs = self.model(pixel_values, register_width=self.register_width)
        return outputs.feature_map.float()

    @torch.no_grad()
    def tokens_and_summary(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """The feature map, and the pooled token ``(batch, hidden)`` where there is one."""
        outputs = self.model(pixel_values, register_width=self.register_width)
        pooled = outputs.pooler_output
        return outputs.feature_map.float(), None if pooled is None else pooled.float()


def load_checkpoint(
    source: str,
    *,
    name: str | None = None,
    final_norm: bool | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Load a refined checkpoint, a run's folder, or a tower as it was published.

    Args:
        source: ``starter``, a Hub id, or a folder: of a tower, of a merged checkpoint, or
            of a finished run (its ``merged/`` is taken).
        name: what tables call it; None: from the run's method, or the source.
        final_norm: of a plain tower, see `UniRefinerConfig`; None as in training: on for
            CLIP.

    Raises:
        CheckpointMismatchError: a folder without a model.
        ValueError: an unsupported tower.
    """
    path = Path(source).expanduser()
    folder: Path | None = None
    method = None
    if source in ("starter", STARTER):
        location, short = str(starter_tower()), "base"
    elif path.is_dir():
        run = path if (path / RECORD).is_file() else path.absolute().parent
        if path == run:
            path = path / MERGED
        if not (path / "config.json").is_file():
            raise CheckpointMismatchError(
                f"{path} holds no model: there is no config.json. Name a finished run, a "
                "merged checkpoint or a tower."
            )
        if (run / RECORD).is_file():
            record = json.loads((run / RECORD).read_text(encoding="utf-8"))
            method = record["method"]["name"]
        location, folder = str(path), path
        short = METHOD_NAMES.get(method or "", method or path.resolve().name)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise CheckpointMismatchError(f"{source}: there is no such folder.")
    else:
        location, short = source, source.split("/")[-1]
    options = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(location, **options)
    if config.model_type == UniRefinerConfig.model_type:
        model = UniRefinerModel.from_pretrained(location, dtype=dtype)
        width = model.config.register_width
        kind = "ph_reg" if model.config.num_register_tokens else "unirefiner"
        method = method or kind
    else:
        tower = load_tower(location, dtype=dtype, trust_remote_code=trust_remote_code)
        if final_norm is None:
            final_norm = takes_final_norm(tower.config)
        model = UniRefinerModel.from_tower(
            tower, register_width=0, final_norm=final_norm
        )
        width = 0
    processor = load_processor(location, **options).to_dict()
    if not processor.get("image_mean") or not processor.get("image_std"):
        raise CheckpointMismatchError(
            f"The image processor of {source} states no image_mean and image_std."
        )
    return Checkpoint(
        name=name or short,
        model=_moved(model, device),
        mean=tuple(processor["image_mean"]),
        std=tuple(processor["image_std"]),
        register_width=width,
        folder=folder,
        method=method,
        source=location,
    )


def _moved(model: UniRefinerModel, device: str | torch.device) -> UniRefinerModel:
    model.to(device=torch.device(device))  # type: ignore[call-arg]
    return model.eval()


def check_same_tower(base: Checkpoint, other: Checkpoint) -> None:
    """Refuse a comparison of two different towers.

    Adapters leave the patch embedding as it is, and PH-Reg, which trains it, every layer but
    the last, so towers of one base share one of them.

    Raises:
        CheckpointMismatchError: another family, size or patch embedding; names both.
    """
    for field in ("model_type", "hidden_size", "num_hidden_layers", "patch_size"):
        ours = getattr(base.model.config.vision_config, field)
        theirs = getattr(other.model.config.vision_config, field)
        if ours != theirs:
            raise CheckpointMismatchError(
                f"{other.name} is of another tower than {base.name}: its {field} is "
                f"{theirs}, that of the base {ours}. Compare checkpoints of one base."
            )
    shared = [_patch_embedding]
    if other.model.config.num_register_tokens:
        shared.append(_first_layer)
    cosine = max(
        torch.cosine_similarity(part(base), part(other), dim=0) for part in shared
    )
    if cosine < SAME_EMBEDDING:
        raise CheckpointMismatchError(
            f"{other.name} was not made from {base.name}: the cosine of their patch "
            f"embeddings is {cosine:.2f}. Name the base it was refined from first."
        )


def _patch_embedding(checkpoint: Checkpoint) -> Tensor:
    parameters = checkpoint.model.get_input_embeddings().parameters()
    return torch.cat([p.detach().flatten().double().cpu() for p in parameters])


def _first_layer(checkpoint: Checkpoint) -> Tensor:
    layers = checkpoint.model.tower.get_submodule(checkpoint.model.family.layers)
    parameters = next(layers.children()).parameters()
    return torch.cat([p.detach().flatten().double().cpu() for p in parameters])
