"""Loading a model of ours: whole, finite and of its own kind, or an error that says why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from .files import check_finite_weights, check_model, refuse_report
from .weight_files import PLACE, check_weights, translated

Loaded = TypeVar("Loaded", bound="CheckedModel")


class CheckedModel:
    """A model that does not load with weights missing, as transformers' do with a warning.

    Put it before `PreTrainedModel`. Weights are read from safetensors;
    ``use_safetensors=False`` asks for a pickle, and gets it.

    Attributes:
        begun_by: weight -> field of the config: one that is given to `from_pretrained`
            begins the weight afresh where the checkpoint has none.
    """

    begun_by: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_pretrained(
        cls: type[Loaded], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Loaded:
        """As `PreTrainedModel.from_pretrained`.

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
        begun = {weight for weight, field in cls.begun_by.items() if field in kwargs}
        reported = kwargs.pop("output_loading_info", False)
        # Reported, and refused below.
        kwargs.setdefault("ignore_mismatched_sizes", True)
        with translated(f"{name} cannot be loaded", Exception):
            if name is not None and kwargs.setdefault("use_safetensors", True):
                place = {key: kwargs[key] for key in PLACE if kwargs.get(key)}
                check_weights(str(name), **place)
            parent: Any = super(CheckedModel, cls)  # type: ignore[arg-type, misc]
            loaded = parent.from_pretrained(
                name, *args, output_loading_info=True, **kwargs
            )
        model, report = loaded
        if reported:
            return loaded
        missing = set(report["missing_keys"]) - begun
        refuse_report({**report, "missing_keys": missing}, str(name), cls.__name__)
        check_finite_weights(model, str(name))
        return model


__all__ = ["CheckedModel"]
