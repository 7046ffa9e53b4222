"""Loading a model of ours: whole, finite and of its own kind, or an error that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedModel

from .files import check_finite_weights, check_model, refuse_report
from .towers import translated
from .weight_files import PLACE, check_weights

Model = TypeVar("Model", bound="CheckedModel")


class CheckedModel(PreTrainedModel):
    """A model that does not load with weights missing, as transformers' do with a warning."""

    asked_fresh: ClassVar[dict[str, str]] = {}
    """Weight -> argument of `from_pretrained` that asks for a fresh one."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[Model],
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Model:
        """As `PreTrainedModel.from_pretrained`.

        Weights are read from safetensors alone; ``use_safetensors=False`` asks for a pickle.

        Args:
            output_loading_info: return ``(model, report)``; what is missing is then for the
                caller to judge.

        Raises:
            UniRefinerError: no such checkpoint, a damaged file (names it), weights that are
                pickled (see `check_weights`), a checkpoint of another model, or weights that
                are missing, unknown, of another shape or not finite.
        """
        name = pretrained_model_name_or_path
        check_model(name)
        fresh = {key for key, asked in cls.asked_fresh.items() if asked in kwargs}
        kwargs.setdefault(
            "ignore_mismatched_sizes", True
        )  # reported, and refused below
        with translated(f"{name} cannot be loaded", Exception):
            if name is not None and kwargs.setdefault("use_safetensors", True):
                place = {key: kwargs[key] for key in PLACE if kwargs.get(key)}
                check_weights(str(name), **place)
            loaded: Any = super().from_pretrained(
                name, *args, output_loading_info=True, **kwargs
            )
        model, report = loaded
        if output_loading_info:
            return loaded
        report["missing_keys"] = set(report["missing_keys"]) - fresh
        refuse_report(report, str(name), cls.__name__)
        check_finite_weights(model, str(name))
        return model


__all__ = ["CheckedModel"]
