"""The models an evaluation compares."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedConfig

from ..data.pixels import PixelReading
from ..export.card import written_method
from ..export.run_folder import MERGED, is_run, recorded_method
from ..loading.backbone import takes_final_norm
from ..loading.processor import load_processor, pixel_reading
from ..loading.starter import NAME as STARTER
from ..loading.starter import starter_tower
from ..methods.registry import current_name, guessed_name, is_control, title_of
from ..modeling.configuration_unirefiner import UniRefinerConfig
from ..modeling.errors import UniRefinerError
from ..modeling.files import check_finite
from ..modeling.modeling_unirefiner import UniRefinerModel
from ..modeling.towers import load_tower, tower_config

SAME_EMBEDDING = 0.99
"""Cosine of two backbones' patch embeddings (with PH-Reg, or first layers) from which they
count as one base."""


class CheckpointMismatchError(UniRefinerError):
    """A checkpoint cannot be loaded, or is not of the backbone it is compared with."""


@dataclass(frozen=True)
class Checkpoint:
    """A model to measure.

    Attributes:
        name: how tables call it.
        model: in eval mode while it is measured.
        reading: of pixels, as its image processor says.
        register_width: border of register patches it is measured with.
        folder: where its ``evaluation.json`` goes; None for a Hub id or a model in memory.
        method: that made it, as its config or its run says, such as ``unirefiner`` or
            ``distillation``; None for a backbone as it was published. A refined
            checkpoint that says nothing counts as ``unirefiner``, with register tokens
            as ``ph_reg``.
        source: folder or Hub id it was loaded from; empty for a model in memory.
    """

    name: str
    model: UniRefinerModel
    reading: PixelReading
    register_width: int
    folder: Path | None = None
    method: str | None = None
    source: str = ""

    @property
    def needs_controls(self) -> bool:
        """Whether it is a result, neither a base nor a control."""
        return self.method is not None and not self.is_control

    @property
    def is_control(self) -> bool:
        """Whether it is what results are compared with."""
        return self.method is not None and is_control(self.method)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.model.patch_size

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""
        return self.model.hidden_size

    def framed(self, register_width: int) -> Checkpoint:
        """The same weights with another border of register patches."""
        name = f"{self.name} + border of {register_width}"
        return replace(self, name=name, register_width=register_width, folder=None)

    def side(self, pixels: int) -> int:
        """`pixels`, rounded up to whole patches."""
        return -(-pixels // self.patch_size) * self.patch_size

    def check_grid(self, pixels: int) -> None:
        """Refuse a side too short for measures that compare neighbours.

        Raises:
            UniRefinerError: it is of a single patch.
        """
        if self.side(pixels) < 2 * self.patch_size:
            raise UniRefinerError(
                f"size is {pixels}, one patch of {self.patch_size} pixels a side: two are "
                f"needed to compare, from {self.patch_size + 1} pixels on."
            )

    def _finite(self, tokens: Tensor) -> Tensor:
        """Float32 tokens; refuses what is NaN or infinite."""
        tokens = tokens.float()
        check_finite(
            [("tokens", tokens)],
            f"The tokens of {self.name}",
            "Nothing can be measured: load it in float32, or look at its weights.",
        )
        return tokens

    @torch.no_grad()
    def feature_map(self, pixel_values: Tensor) -> Tensor:
        """Patch tokens ``(batch, hidden, rows, columns)`` of the last layer, float32."""
        outputs = self.model(pixel_values, register_width=self.register_width)
        return self._finite(outputs.feature_map)

    @torch.no_grad()
    def tokens_and_summary(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """The feature map, and the pooled token ``(batch, hidden)`` where there is one."""
        outputs = self.model(pixel_values, register_width=self.register_width)
        pooled = outputs.pooler_output
        features = self._finite(outputs.feature_map)
        return features, None if pooled is None else self._finite(pooled)


Source: TypeAlias = str | Path | Checkpoint | UniRefinerModel
"""What is measured: ``starter``, a Hub id, a folder, or a model in memory."""


def load_checkpoints(
    sources: Source | Sequence[Source],
    *,
    device: str | None = None,
    processing_class: Any = None,
    trust_remote_code: bool = False,
) -> list[Checkpoint]:
    """Checkpoints of one base in order, the base first, each under its own name.

    Args:
        sources: one, or several; see `load_checkpoint`.
        device: where they are measured. None: where a model in memory lies, else a GPU if
            there is one; under a launcher, the process's own.
        processing_class: of the models in memory.

    Raises:
        CheckpointMismatchError: no checkpoint, models in memory on several devices, a
            checkpoint of another backbone than the first, or see `load_checkpoint`.
    """
    if isinstance(sources, (str, Path, Checkpoint, UniRefinerModel)):
        sources = [sources]
    elif not isinstance(sources, Sequence):
        raise _not_a_source(sources)
    if not sources:
        raise CheckpointMismatchError(
            "There is no checkpoint: name one, the base first."
        )
    place = _device(device, sources)
    loaded: list[Checkpoint] = []
    for source in sources:
        checkpoint = load_checkpoint(
            source,
            final_norm=loaded[0].model.config.final_norm if loaded else None,
            device=place,
            processing_class=processing_class,
            trust_remote_code=trust_remote_code,
        )
        if loaded:
            check_same_tower(loaded[0], checkpoint)
        names = [known.name for known in loaded]
        loaded.append(replace(checkpoint, name=_unique(checkpoint, source, names)))
    return loaded


def with_borders(loaded: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The base, the base with each border of register patches met, then the others."""
    base, others = loaded[0], loaded[1:]
    widths = sorted({c.register_width for c in others} - {base.register_width, 0})
    return [base, *(base.framed(width) for width in widths), *others]


def _unique(checkpoint: Checkpoint, source: Source, taken: Sequence[str]) -> str:
    name = checkpoint.name
    if name in taken and isinstance(source, (str, Path)):
        place = Path(source).expanduser().resolve().name
        name = f"{checkpoint.name} ({place})"
        name = f"{checkpoint.name} ({source})" if name in taken else name
    number = 2
    while name in taken:
        name, number = f"{checkpoint.name} ({number})", number + 1
    return name


def _device(asked: str | None, sources: Sequence[Source]) -> torch.device:
    held = {
        source.device if isinstance(source, UniRefinerModel) else source.model.device
        for source in sources
        if isinstance(source, (Checkpoint, UniRefinerModel))
    }
    if len(held) > 1:
        raise CheckpointMismatchError(
            f"The models in memory lie on {' and '.join(sorted(map(str, held)))}: move "
            "them to one device."
        )
    if held and asked is None:
        return held.pop()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        place = PartialState(cpu=asked == "cpu").device
    elif asked is None:
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            place = torch.device(asked)
        except RuntimeError as problem:
            raise UniRefinerError(
                f"device is {asked!r}; it must be a name such as cuda or cpu."
            ) from problem
        if place.type == "cuda" and not torch.cuda.is_available():
            raise UniRefinerError(
                f"device is {asked!r}, but PyTorch finds no GPU here."
            )
    if held and held != {place}:
        raise CheckpointMismatchError(
            f"device is {place}, but a model in memory lies on {held.pop()}: move it "
            "there, or leave device out."
        )
    return place


@contextmanager
def measuring(checkpoints: Sequence[Checkpoint]) -> Iterator[None]:
    """Put models into eval mode, and back into the modes they were in."""
    modules = {m for checkpoint in checkpoints for m in checkpoint.model.modules()}
    modes = {module: module.training for module in modules}
    for checkpoint in checkpoints:
        checkpoint.model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def load_checkpoint(
    source: Source,
    *,
    name: str | None = None,
    final_norm: bool | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    processing_class: Any = None,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Load a refined checkpoint, a run's folder, or a backbone as it was published.

    Args:
        source: ``starter``, a Hub id, or a folder: of a backbone, of a merged checkpoint,
            or of a finished run (its ``merged/`` is taken). A `UniRefinerModel` in memory
            is taken as it is, as a `Checkpoint` is.
        name: what tables call it; None: from its method, or the source.
        final_norm: of a published backbone, see `UniRefinerConfig`; None as in training:
            on for CLIP.
        device, dtype: of what is loaded.
        processing_class: of a model in memory: an image processor, or the name or folder
            of one. None: that of where the model was loaded from.

    Raises:
        CheckpointMismatchError: a folder without a model, or an object of another kind.
        RunFolderError: the record of a run beside the model cannot be read.
        ProcessorError: no image processor, or one that cannot be followed.
        UniRefinerError: a name that is neither here nor on the Hub, or an unsupported
            backbone.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, UniRefinerModel):
        return _in_memory(source, name, processing_class)
    if not isinstance(source, (str, Path)):
        raise _not_a_source(source)
    location, folder, recorded = _locate(str(source))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = tower_config(location, **options)
    method = _method(config, recorded)
    if config.model_type == UniRefinerConfig.model_type:
        model = UniRefinerModel.from_pretrained(location, dtype=dtype)
        width = model.config.register_width
    else:
        tower = load_tower(location, dtype=dtype, **options)
        if final_norm is None:
            final_norm = takes_final_norm(tower.config)
        model = UniRefinerModel.from_tower(
            tower, register_width=0, final_norm=final_norm
        )
        width = 0
    short = Path(location).resolve().name if folder else location.split("/")[-1]
    if str(source) in ("starter", STARTER):
        short = "base"
    elif folder is not None and method is not None:
        short = title_of(method)
    if method is None and config.model_type == UniRefinerConfig.model_type:
        method = guessed_name(model.config.num_register_tokens)
    reading = pixel_reading(
        load_processor(location, **options), model.config.vision_config, name or short
    )
    return Checkpoint(
        name=name or short,
        model=_moved(model, device),
        reading=reading,
        register_width=width,
        folder=folder,
        method=method,
        source=location,
    )


def _not_a_source(given: Any) -> CheckpointMismatchError:
    hint = ""
    if isinstance(given, torch.nn.Module):
        hint = " Wrap a backbone: UniRefinerModel.from_tower(model, register_width=0)."
    return CheckpointMismatchError(
        f"A checkpoint is a {type(given).__name__}; it must be a name, a folder or a "
        f"UniRefinerModel.{hint}"
    )


def _locate(source: str) -> tuple[str, Path | None, str | None]:
    """Where the model lies, its folder if it is a user's own, and its run's method."""
    if source in ("starter", STARTER):
        return str(starter_tower()), None, None
    if not source.strip():
        raise CheckpointMismatchError(
            "A checkpoint is empty: name a model or a folder."
        )
    path = Path(source).expanduser()
    if path.is_dir():
        run = path if is_run(path) else path.absolute().parent
        path = path / MERGED if path == run else path
        if not (path / "config.json").is_file():
            raise CheckpointMismatchError(
                f"{path} holds no model: there is no config.json. Name a finished run, a "
                "merged checkpoint or a backbone."
            )
        return str(path), path, written_method(path) or recorded_method(run)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise CheckpointMismatchError(f"{source}: there is no such folder.")
    return source, None, None


def _method(config: PreTrainedConfig, recorded: str | None) -> str | None:
    """What made a model: as its own config says, else the record of its run."""
    name = getattr(config, "method", None) or recorded
    return None if name is None else current_name(name)


def _in_memory(model: UniRefinerModel, name: str | None, processor: Any) -> Checkpoint:
    origin = model.name_or_path or ""
    if processor is None and not origin:
        raise CheckpointMismatchError(
            "A model in memory does not tell how its images are normalised: give "
            "processing_class, an image processor or the name of a model that has it."
        )
    if not hasattr(processor, "to_dict"):
        try:
            processor = load_processor(str(processor or origin))
        except OSError as problem:
            raise CheckpointMismatchError(
                f"There is no image processor at {processor or origin}: give "
                f"processing_class. ({problem})"
            ) from problem
    config = model.config
    reading = pixel_reading(processor, config.vision_config, "the model in memory")
    method = _method(config, None)
    if method is None and (config.num_register_tokens or config.register_width):
        method = guessed_name(config.num_register_tokens)
    return Checkpoint(
        name=name
        or Path(origin).name
        or ("base" if method is None else title_of(method)),
        model=model,
        reading=reading,
        register_width=config.register_width,
        method=method,
    )


def _moved(model: UniRefinerModel, device: str | torch.device) -> UniRefinerModel:
    model.to(device=torch.device(device))  # type: ignore[call-arg]
    return model.eval()


def check_same_tower(base: Checkpoint, other: Checkpoint) -> None:
    """Refuse a comparison of two different backbones.

    Adapters leave the patch embedding as it is, and PH-Reg, which trains it, every layer but
    the last, so models of one base share one of them.

    Raises:
        CheckpointMismatchError: another family, size or patch embedding; names both.
    """
    for field in ("model_type", "hidden_size", "num_hidden_layers", "patch_size"):
        ours = getattr(base.model.config.vision_config, field)
        theirs = getattr(other.model.config.vision_config, field)
        if ours != theirs:
            raise CheckpointMismatchError(
                f"{other.name} is of another backbone than {base.name}: its {field} is "
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
