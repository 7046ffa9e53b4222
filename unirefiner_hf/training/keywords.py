"""Whose a keyword is: the arguments', the method's, or nobody's."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ..errors import UniRefinerError
from ..methods.registry import (
    check_setting,
    method_kind,
    method_settings,
    methods_with,
    setting_names,
)
from ..methods.settings import MethodSettings
from .arguments import UniRefinerArguments

ARGUMENTS = tuple(
    field.name for field in dataclasses.fields(UniRefinerArguments) if field.init
)


def split_keywords(
    method: str | MethodSettings | type[MethodSettings], fields: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `UniRefinerArguments`, and those of the method's settings.

    Raises:
        UniRefinerError: no method, or a keyword of neither; names whose it is, or the
            nearest.
    """
    own: dict[str, Any] = {}
    of_method: dict[str, Any] = {}
    kind = method_kind(method)
    for name, value in fields.items():
        if name in ARGUMENTS:
            own[name] = value
        elif name in setting_names(kind):
            of_method[name] = value
        elif methods_with(name):
            check_setting(kind, name)
        else:
            known = [*ARGUMENTS, *setting_names(kind)]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UniRefinerError(f"There is no argument or setting {name!r}{hint}")
    return own, of_method


def settle(
    args: UniRefinerArguments | None,
    method: str | MethodSettings | type[MethodSettings],
    fields: Mapping[str, Any],
) -> tuple[UniRefinerArguments, MethodSettings]:
    """Own copies of the arguments and settings, the keywords among them.

    Raises:
        UniRefinerError: a field that is given twice, or what is no arguments; as
            `split_keywords` and `method_settings`.
    """
    own, of_method = split_keywords(method, fields)
    if args is None:
        args = UniRefinerArguments(**own)
    elif not isinstance(args, UniRefinerArguments):
        raise UniRefinerError(
            f"args is a {type(args).__name__}: give UniRefinerArguments(...), which takes "
            "the fields of TrainingArguments too."
        )
    elif own:
        name = next(iter(own))
        raise UniRefinerError(
            f"{name} is given twice: in args and as a keyword. Set it in args."
        )
    return copy.copy(args), method_settings(method, of_method)
