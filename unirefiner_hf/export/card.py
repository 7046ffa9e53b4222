"""The model card, filled from the run's own record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..loading.arguments import both_sides
from ..methods.registry import method_named, setting_names
from ..methods.settings import ADAPTER, MethodSettings
from ..modeling.errors import UniRefinerError
from ..resources import resource_folder
from ..spurious.settings import FilterSettings
from .digests import is_weights
from .run_folder import ADAPTER as ADAPTER_FOLDER
from .run_folder import CARD, RECORD, check_record

TEMPLATE = "card.md.jinja"
METADATA = "unirefiner"
"""Key of the card's metadata that says what wrote it and what its files must be.

``weights`` and ``files``: name -> sha256 of the weight files, and of every other file that can
change what the model gives; cards of earlier versions lack the second.
"""
SHARES = {
    "fpgp": "fixed pattern or global proxy (FP-GP)",
    "ah": "attention hijackee (AH)",
    "spurious": "either",
}
TRAINING = ("optimizer", "learning_rate", "weight_decay", "schedule")
"""What a card's table tells of the training, beside batch and precision."""


@dataclass(frozen=True)
class CardData:
    """What a card says; every field comes from the record of a run.

    Attributes:
        base: Hub id or name of the base model.
        license: the base's; None says so in the card and leaves the metadata out.
        family: `model_type` of the backbone.
        layers: of the backbone.
        image_size: height and width in pixels.
        register_width: border of the published model, in patches.
        data: the images, in words.
        recipe: setting -> value, as run.
        steps, seconds, hardware: of the training; seconds is None for a checkpoint.
        losses: last logged values; empty for a checkpoint.
        shares: spurious shares before and after; None where they were not measured.
        repo_id: where the model is on the Hub, for the code a reader pastes.
        version: of this package, which is that of its recipes.
        evaluations: entries of ``evaluation.json``, see `unirefiner_hf.evaluation.results`.
    """

    base: str
    license: str | None
    family: str
    layers: int
    image_size: tuple[int, int]
    register_width: int
    data: str
    recipe: Mapping[str, Any]
    steps: int
    seconds: float | None
    hardware: str
    losses: Mapping[str, float]
    shares: Mapping[str, Any] | None
    version: str
    evaluations: Sequence[Mapping[str, Any]] = ()
    repo_id: str | None = None

    @property
    def name(self) -> str:
        """Name of the refined model."""
        return f"{self.base.split('/')[-1]}-{self.method.ending}"

    @property
    def method(self) -> type[MethodSettings]:
        """What made the model."""
        return method_named(self.recipe["method"])

    @property
    def summary(self) -> str:
        """The model in a paragraph, in the words of its method."""
        return self._told(self.method.summary)

    @property
    def registers(self) -> str:
        """Its learned register tokens in a line; empty without."""
        return self._told(self.method.registers)

    def _told(self, words: str) -> str:
        defaults = {field.name: field.default for field in fields(self.method)}
        return words.format_map({**defaults, **self.recipe, "base": self.base})

    @property
    def trained_with_filters(self) -> bool:
        """Whether the filters that measure the spurious shares had a say in the training."""
        return issubclass(self.method, FilterSettings)

    @property
    def path(self) -> str:
        """What the card's code loads: the Hub id, or the name as a stand-in."""
        return self.repo_id or self.name

    @property
    def base_on_hub(self) -> bool:
        """Whether the base is a Hub id, which alone may stand in the metadata."""
        return self.base.count("/") == 1

    @property
    def stages(self) -> tuple[int, int]:
        """Stages the card's backbone example asks for: half-way and last."""
        return max(1, self.layers // 2), self.layers

    def share_rows(self) -> list[tuple[str, float, float]]:
        """Kind, share before, share after."""
        if self.shares is None:
            return []
        before, after = self.shares["before"], self.shares["after"]
        return [(text, before[kind], after[kind]) for kind, text in SHARES.items()]


def card_from_record(
    record: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]] = (),
    repo_id: str | None = None,
) -> CardData:
    """Read a card's data off a run's record and its evaluations.

    Raises:
        UniRefinerError: the record is of an unfinished run or of a later format.
    """
    check_record(record)
    model, data, training = record["model"], record["data"], record["training"]
    if "steps" not in training:
        raise UniRefinerError("The run is not finished: continue it with --resume.")
    method = dict(record["method"])
    kind = method_named(method.pop("name"))
    own = ("register_factor", "register_fill", "final_norm", *ADAPTER)
    known = setting_names(kind)
    recipe = {
        "method": kind.name,
        **{k: model[k] for k in own if k in model and k not in kind.unread},
        **{k: training[k] for k in (*TRAINING, "total_batch", "precision")},
        **{k: v for k, v in method.items() if k in known},
    }
    count = data.get("images")
    used = f"{count - len(data['skipped'])} unlabelled images" if count else "images"
    return CardData(
        base=model["base"],
        license=model["license"],
        family=model["family"],
        layers=model["layers"],
        image_size=both_sides(model["image_size"]),
        register_width=model["register_width"],
        data=f"{used} of {data['source']}",
        recipe=recipe,
        steps=training["steps"],
        seconds=training["seconds"],
        hardware=training["hardware"],
        losses={k: v for k, v in record["losses"].items() if k.startswith("loss")},
        shares=record.get("spurious_shares"),
        version=record["versions"]["unirefiner_hf"],
        evaluations=tuple(evaluations),
        repo_id=repo_id,
    )


def render_card(
    card: CardData,
    pictures: Sequence[str] = (),
    *,
    native: bool = False,
    files: Mapping[str, str] | None = None,
) -> str:
    """The card's text, YAML header included.

    Args:
        pictures: file names beside the card.
        native: the checkpoint is the bare backbone, without the border of registers.
        files: file beside the card -> its sha256, which `unirefiner verify` compares.
    """
    files = files or {}
    weights = {name: digest for name, digest in files.items() if is_weights(name)}
    others = {name: digest for name, digest in files.items() if name not in weights}
    own = {
        "base": card.base,
        "method": card.method.name,
        "version": card.version,
        "weights": weights,
        "files": others,
    }
    results = [_eval_result(entry) for entry in card.evaluations]
    metadata = ModelCardData(
        base_model=card.base if card.base_on_hub else None,
        base_model_relation="finetune" if card.base_on_hub else None,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        license=card.license,
        tags=["unirefiner", "dense-features", "vision-transformer", card.family],
        model_name=card.name if results else None,
        eval_results=results or None,
    )
    metadata[METADATA] = own
    rendered = ModelCard.from_template(
        metadata,
        template_path=str(resource_folder("model_cards") / TEMPLATE),
        card=card,
        pictures=list(pictures),
        native=native,
        weights=weights,
        adapter=any(name.startswith(f"{ADAPTER_FOLDER}/") for name in weights),
        text=any(name.startswith("text/") for name in weights),
    )
    return str(rendered).rstrip() + "\n"


def render_unfinished_card(base: str, step: int) -> str:
    """The card of a run that is going on: what it is, and that it is not finished."""
    metadata = ModelCardData(library_name="peft", tags=["unirefiner"])
    metadata[METADATA] = {"base": base, "version": __version__, "weights": {}}
    return (
        f"---\n{metadata}\n---\n\n# {base.split('/')[-1]}, being refined\n\n"
        f"The adapter in `{ADAPTER_FOLDER}/` is that of step {step} of a run that is not "
        f"finished: `{RECORD}` tells its settings. Do not use it yet.\n"
    )


def card_metadata(text: str) -> dict[str, Any]:
    """The header of a card, whoever wrote it; empty without one.

    Raises:
        UniRefinerError: it does not parse.
    """
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (yaml.YAMLError, ValueError) as problem:
        raise UniRefinerError(f"{CARD} does not parse: {problem}") from problem


def own_metadata(folder: Path) -> dict[str, Any] | None:
    """What this package wrote into the card of a folder; None if it did not write one.

    Raises:
        UniRefinerError: the card does not parse.
    """
    if not (folder / CARD).is_file():
        return None
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    own = card_metadata(text).get(METADATA)
    return own if isinstance(own, dict) else None


def written_method(folder: Path) -> str | None:
    """The method that a folder's card names, None where it names none."""
    try:
        own = own_metadata(folder)
    except UniRefinerError:
        return None
    name = None if own is None else own.get("method")
    return name if isinstance(name, str) else None


def _eval_result(entry: Mapping[str, Any]) -> EvalResult:
    """An entry of the model-index; the controls stand in the metric's arguments."""
    arguments = ("unit", "std", "seeds", "n", "register_width", "controls")
    return EvalResult(
        task_type=entry["task"],
        dataset_type=entry["dataset"].lower().replace(" ", "-"),
        dataset_name=entry["dataset"],
        dataset_split=entry["split"],
        metric_type=entry["metric"],
        metric_value=entry["value"],
        metric_name=f"{entry['metric']} ({entry['protocol']})",
        metric_args={name: entry[name] for name in arguments},
    )
