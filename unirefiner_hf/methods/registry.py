"""Every method by its name; the only place that tells methods apart."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from ..errors import UniRefinerError
from .settings import MethodSettings

METHODS: dict[str, str] = {
    "unirefiner": "unirefiner_hf.methods.unirefiner.settings:UniRefinerSettings",
    "ph_reg": "unirefiner_hf.methods.ph_reg.settings:PHRegSettings",
    "distillation": "unirefiner_hf.methods.distillation.settings:DistillationSettings",
}
"""Name -> where its settings class is; a method of your own is one more line."""

DEFAULT = "unirefiner"
OLD_NAMES = {"plain": "distillation"}
"""Names in records and recipes of earlier versions."""


def method_named(name: str) -> type[MethodSettings]:
    """The settings class of a method.

    Raises:
        UniRefinerError: no such method; names those there are.
    """
    current = current_name(name)
    if current not in METHODS:
        known = ", ".join(map(repr, METHODS))
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UniRefinerError(f"method is {name!r}; it must be one of {known}.{hint}")
    module, _, class_name = METHODS[current].partition(":")
    return getattr(importlib.import_module(module), class_name)


def setting_names(method: type[MethodSettings]) -> tuple[str, ...]:
    """The settings of a method."""
    return tuple(field.name for field in dataclasses.fields(method))


def methods_with(setting: str) -> list[str]:
    """Names of the methods that have a setting."""
    return [name for name in METHODS if setting in setting_names(method_named(name))]


def method_settings(
    method: str | MethodSettings | type[MethodSettings] = "unirefiner",
    fields: Mapping[str, Any] | None = None,
) -> MethodSettings:
    """Settings of a method by name, with some fields set; given settings are copied.

    Raises:
        UniRefinerError: no such method, a setting it does not have (says whose it is), or
            one that stands in the given settings already.
    """
    fields = fields or {}
    if isinstance(method, MethodSettings):
        if fields:
            name = next(iter(fields))
            raise UniRefinerError(
                f"{name} is given twice: in the settings of {method.name} and as a keyword. "
                "Set it in the settings."
            )
        return dataclasses.replace(method)
    kind = method_kind(method)
    for name in fields:
        check_setting(kind, name)
    return kind(**fields)


def method_kind(
    method: str | MethodSettings | type[MethodSettings],
) -> type[MethodSettings]:
    """The settings class of a method, given by its name, by settings or by the class.

    Raises:
        UniRefinerError: something else, or no such method.
    """
    if isinstance(method, str):
        return method_named(method)
    if isinstance(method, MethodSettings):
        return type(method)
    if isinstance(method, type) and issubclass(method, MethodSettings):
        return method
    raise UniRefinerError(
        f"method is a {type(method).__name__}: give a name ({', '.join(METHODS)}) or "
        "settings such as UniRefinerSettings(...)."
    )


def check_setting(method: type[MethodSettings], name: str) -> None:
    """Refuse a setting that a method does not have.

    Raises:
        UniRefinerError: says of which method it is, or which one is near.
    """
    own = setting_names(method)
    if name in own:
        return
    owners = methods_with(name)
    if owners:
        raise UniRefinerError(
            f"{name} is no setting of method {method.name}, but of {', '.join(owners)}: "
            "leave it out, or take that method."
        )
    near = difflib.get_close_matches(name, own, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UniRefinerError(f"{name} is no setting of method {method.name}.{hint}")


def current_name(name: str) -> str:
    """What a method of a checkpoint or record is called today; others stay as they are."""
    return OLD_NAMES.get(name, name)


def guessed_name(num_register_tokens: int) -> str:
    """The method of a refined checkpoint of a version whose config did not say it."""
    return "ph_reg" if num_register_tokens else DEFAULT


def title_of(name: str) -> str:
    """What tables call a method; of one that is not installed here, its name."""
    return method_named(name).title if name in METHODS else name


def is_control(name: str) -> bool:
    """Whether other methods are compared with it."""
    return name in METHODS and method_named(name).is_control


def control_titles() -> list[str]:
    """What tables call the methods that others are compared with."""
    return [title_of(name) for name in METHODS if is_control(name)]
