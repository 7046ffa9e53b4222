"""Whose a keyword is: the arguments', the method's, or nobody's."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ..errors import UniRefinerError
from ..methods.registry import check_setting, method_kind, methods_with, setting_names
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
