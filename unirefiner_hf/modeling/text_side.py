"""The other half of a dual encoder: text tower, projections and tokenizer.

A refined checkpoint holds the vision tower. Beside it, in ``text/``, it can keep what
makes it a dual encoder: the base's own weights under their own names, its config and its
tokenizer, so that ``CLIPTextModelWithProjection.from_pretrained(path, subfolder="text")``
works as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoTokenizer,
    CLIPConfig,
    CLIPTextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .configuration_eva_clip import EvaClipVisionConfig
from .configuration_unirefiner import UniRefinerConfig
from .dense_text import BLOCK
from .errors import UniRefinerError
from .families import DUAL_ENCODERS, FAMILIES
from .files import check_model
from .towers import translated
from .weight_files import check_weights, find_file

TEXT = "text"
"""Folder of a refined checkpoint that keeps the text side."""
VISION = "vision_model"
VISUAL = "visual_projection"

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)

_EVA_TEXT = {
    "use_rms_norm": False,
    "post_layernorm": False,
    "q_bias": True,
    "k_bias": True,
    "v_bias": True,
}
"""What the text tower of a published EVA-CLIP has in common with CLIP's."""


class TextSideError(UniRefinerError):
    """There is no text side, or it cannot be read; the message says what to do."""


class NoTextSideError(TextSideError):
    """No dual encoder: there never was a text side."""


@dataclass(frozen=True)
class TextSide:
    """Text tower, projections and tokenizer of a dual encoder.

    Attributes:
        model: the dual encoder of transformers without its vision tower.
        vision_type: ``model_type`` of the vision tower it belongs to.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    vision_type: str

    @property
    def projection(self) -> nn.Module | None:
        """Vision hidden -> common space; None where the pooling head ends there."""
        return getattr(self.model, VISUAL, None)

    def to(self, device: str | torch.device) -> TextSide:
        """The same, moved."""
        self.model.to(device)
        return self

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the text tower is called with.

        CLIP: padded to the longest. SigLIP as it was trained: in lower case, padded to
        its full length, pad tokens attended to. Longer texts are cut.
        """
        longest = self.model.config.text_config.max_position_embeddings
        siglip = FAMILIES[self.vision_type].text_reading != BLOCK
        given = self.tokenizer(
            [text.lower() for text in texts] if siglip else list(texts),
            padding="max_length" if siglip else True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
        return {name: given[name].to(self.model.device) for name in names}

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Text features ``(texts, projection)``, not normalised."""
        return self.model.get_text_features(**self.tokens(texts)).pooler_output

    def save(self, folder: str | Path, *, max_shard_size: str = "5GB") -> Path:
        """Write ``folder/text``, which `load_text_side` reads.

        Returns:
            The folder written.
        """
        target = Path(folder) / TEXT
        self.model.config._name_or_path = ""
        self.model.save_pretrained(target, max_shard_size=max_shard_size)
        self.tokenizer.name_or_path = ""
        self.tokenizer.save_pretrained(target)
        return target


def find_text_side(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Make sure that a text side can be loaded; reads config and tokenizer, no weights.

    Raises:
        NoTextSideError: a vision tower alone.
        UniRefinerError: no such checkpoint, or a config that cannot be read.
        TextSideError: as `load_text_side`.
    """
    with translated(f"{name_or_path} cannot be loaded"):
        source = _source(str(name_or_path), revision, trust_remote_code)
    _tokenizer(source)


def load_text_side(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> TextSide:
    """The text side of a dual encoder, or of a refined checkpoint that kept it.

    Args:
        name_or_path: Hub name or folder, weights as safetensors.
        revision: branch, tag or commit on the Hub.
        dtype: of the weights; None keeps that of the checkpoint.
        trust_remote_code: let the tokenizer run code that the checkpoint brings along.

    Raises:
        TextSideError: no dual encoder, none whose patch tokens can be compared with
            words, a refined checkpoint without ``text/``, no tokenizer, or weights that
            are missing.
    """
    with translated(f"{name_or_path} cannot be loaded"):
        source = _source(str(name_or_path), revision, trust_remote_code)
    tokenizer = _tokenizer(source)
    check_weights(source.name, **source.place)
    parent: Any = MODEL_MAPPING[type(source.config)]
    verbosity = logging.get_verbosity()
    # The vision tower is left out on purpose; the check below replaces the report.
    logging.set_verbosity_error()
    try:
        loaded: Any = _without_vision(parent).from_pretrained(
            source.name,
            config=source.config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
            **source.place,
        )
    except OSError as problem:
        raise TextSideError(
            f"{source.name} holds no text side as safetensors: {problem}"
        ) from problem
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    missing = set(report["missing_keys"])
    if f"{VISUAL}.bias" in missing:
        missing.remove(f"{VISUAL}.bias")
        model.visual_projection.bias = None
    wrong = sorted(missing) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if wrong:
        raise TextSideError(
            f"The text side of {source.name} lacks {len(wrong)} weights, or they have "
            f"another shape ({', '.join(wrong[:3])}): use the whole dual encoder as it "
            "was published."
        )
    # A file's weights may lie unaligned in memory, which moves the last bit of a product:
    # copied, the same weights give the same bits whichever file they come from.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return TextSide(model.eval(), tokenizer, source.vision_type)


@dataclass(frozen=True)
class _Source:
    name: str
    config: Any
    vision_type: str
    place: dict[str, Any]
    trust_remote_code: bool


def _source(name: str, revision: str | None, trust_remote_code: bool) -> _Source:
    """Where the text side is and what it is, from configs alone."""
    place: dict[str, Any] = {"revision": revision}
    published = _published(name, place)
    if published is None:
        raise NoTextSideError(f"{name} holds no model: there is no config.json.")
    check_model(name)
    refined_type = None
    if published.get("model_type") == UniRefinerConfig.model_type:
        place["subfolder"] = TEXT
        refined_type = (published.get("vision_config") or {}).get("model_type")
        if refined_type not in FAMILIES:
            raise TextSideError(
                f"{name} is no whole refined checkpoint: its config names no backbone "
                f"(vision_config.model_type is {refined_type!r})."
            )
        published = _published(name, place)
        if published is None:
            raise TextSideError(
                f"{name} has no text side: there is no {TEXT}/config.json. It was "
                "refined from a vision tower alone, or merged without its text "
                "(keep_text: false). Name the dual encoder it was refined from."
            )
    if EvaClipVisionConfig.describes(published):
        config = _eva_config(published, name)
        vision_type = EvaClipVisionConfig.model_type
    else:
        model_type = published.get("model_type")
        if model_type not in DUAL_ENCODERS:
            raise NoTextSideError(
                f"{name} has no text side: it is a {model_type}. Name a dual encoder "
                f"({', '.join(DUAL_ENCODERS)}, EVA-CLIP) with its text tower."
            )
        config = AutoConfig.from_pretrained(
            name, trust_remote_code=trust_remote_code, **place
        )
        vision_type = refined_type or DUAL_ENCODERS[model_type]
    family = FAMILIES[vision_type]
    if family.text_reading is None:
        raise TextSideError(f"{name} is a {published['model_type']}: {family.note}.")
    return _Source(name, config, vision_type, place, trust_remote_code)


def _published(name: str, place: dict[str, Any]) -> dict[str, Any] | None:
    """The content of ``config.json``; None where there is none."""
    if find_file(name, "config.json", **place) is None:
        return None
    return PreTrainedConfig.get_config_dict(name, **place)[0]


def _eva_config(published: dict[str, Any], name: str) -> CLIPConfig:
    """EVA-CLIP's text tower as a CLIP without vision layers.

    EVA-CLIP pools the token with the largest id, as CLIP does where ``eos_token_id``
    is 2; its visual projection has a bias, which is kept where the weights have it.
    """
    text, vision = published.get("text_config") or {}, published.get("vision_config")
    other = [f for f, value in _EVA_TEXT.items() if text.get(f, value) != value]
    if vision is None or "vocab_size" not in text or other:
        said = f"{other[0]}={text[other[0]]}" if other else "no text_config"
        raise TextSideError(
            f"The text side of {name} is not kept: its config has {said}, and only text "
            "towers built as CLIP's are supported (EVA-CLIP-8B)."
        )
    size = published["projection_dim"]
    fields = [f for f in CLIPTextConfig.__dataclass_fields__ if f in text]
    sizes = ("hidden_size", "num_attention_heads", "intermediate_size")
    return CLIPConfig(
        text_config={
            **{f: text[f] for f in fields},
            "eos_token_id": 2,
            "projection_dim": size,
        },
        vision_config={**{f: vision[f] for f in sizes}, "num_hidden_layers": 0},
        projection_dim=size,
    )


def _tokenizer(source: _Source) -> PreTrainedTokenizerBase:
    # Without files, transformers makes an empty tokenizer of the model's kind.
    if not any(find_file(source.name, f, **source.place) for f in _VOCABULARIES):
        raise TextSideError(
            f"{source.name} has no tokenizer (none of {', '.join(_VOCABULARIES)}): put "
            "the tokenizer files of the dual encoder beside its weights, or name its "
            "Hub id."
        )
    try:
        return AutoTokenizer.from_pretrained(
            source.name, trust_remote_code=source.trust_remote_code, **source.place
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise TextSideError(
            f"The tokenizer of {source.name} does not load: "
            f"{' '.join(str(problem).split())[:200]}"
        ) from problem


def _without_vision(parent: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of a dual encoder whose instances have no vision tower.

    It keeps its name, which goes into the saved config.
    """

    def build(self: Any, config: Any) -> None:
        parent.__init__(self, config)
        setattr(self, VISION, None)
        if hasattr(self, VISUAL):
            old = getattr(self, VISUAL)
            setattr(self, VISUAL, nn.Linear(old.in_features, old.out_features))

    return type(parent.__name__, (parent,), {"__init__": build})


__all__ = [
    "NoTextSideError",
    "TextSide",
    "TextSideError",
    "find_text_side",
    "load_text_side",
]
