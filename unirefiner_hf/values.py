"""One check of the values of settings: kind, choices and bounds, as their fields declare.

A field says what it takes in its annotation, and which words in its metadata::

    scale: Annotated[float, "(0, 1]"] = field(default=0.5, metadata={"help": "..."})
    form: str = field(default="a", metadata={"choices": ["a", "b"], "help": "..."})

Without bounds a float has to be finite. Those of a list are of each member.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import re
from collections.abc import Mapping
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from .errors import UniRefinerError

FINITE = "(-inf, inf)"


def check_values(
    settings: Any, *kinds: type, bounds: Mapping[str, str] | None = None
) -> None:
    """Refuse values that the fields of settings do not take.

    Paths in place of words and numbers of NumPy become those of Python; nothing else is
    changed.

    Args:
        kinds: dataclasses whose fields are looked at; none: that of the settings.
        bounds: of fields whose class is not ours; only those it names are looked at.

    Raises:
        UniRefinerError: names the field, its value and what it takes.
    """
    for kind in kinds or (type(settings),):
        for field, parts, own in declared(kind):
            if bounds is not None and field.name not in bounds:
                continue
            rule = own if bounds is None else bounds[field.name]
            value = _plain(getattr(settings, field.name), parts)
            _check(field, value, parts, rule)
            setattr(settings, field.name, value)


def check_number(name: str, value: Any, bounds: str, kind: type = int) -> None:
    """Refuse a number that is no field of settings: an argument of a function.

    Args:
        kind: ``int``, or ``float``, which takes whole numbers too.

    Raises:
        UniRefinerError: names the argument, its value and what it takes.
    """
    if not _is_of(value, kind):
        raise UniRefinerError(f"{name} is {value!r}; it must be {kind.__name__}.")
    if not within(value, bounds):
        words = _words_for(value, bounds)
        raise UniRefinerError(f"{name} is {value!r}; it must be {words}.")


def within(value: float, bounds: str) -> bool:
    """Whether a number lies in an interval such as ``[0, 1)``; NaN lies in none."""
    low, high, takes_low, takes_high = _interval(bounds)
    above = value >= low if takes_low else value > low
    below = value <= high if takes_high else value < high
    return bool(above and below)


def _words_for(value: float, bounds: str) -> str:
    words = in_words(bounds)
    if math.isfinite(value) or "finite" in words:
        return words
    return f"{words}, and finite"


def in_words(bounds: str) -> str:
    """An interval as errors say it."""
    low, high, takes_low, _ = _interval(bounds)
    if math.isinf(high):
        if math.isinf(low):
            return "a finite number"
        if low == 0:
            return "0 or more" if takes_low else "finite and positive"
        return f"at least {low:g}" if takes_low else f"above {low:g}"
    return f"in {bounds}"


@functools.cache
def _interval(bounds: str) -> tuple[float, float, bool, bool]:
    found = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", bounds)
    assert found is not None, f"{bounds!r} is no interval"
    return float(found[2]), float(found[3]), found[1] == "[", found[4] == "]"


@functools.cache
def declared(kind: type) -> list[tuple[dataclasses.Field, tuple[Any, ...], str | None]]:
    """Fields that can be given, the kinds each takes (none: it cannot be told), its bounds."""
    try:
        hints = get_type_hints(kind, include_extras=True)
    except NameError:  # a class inside a function
        hints = {}
    found = []
    for field in dataclasses.fields(kind):
        if field.init:
            hint = hints.get(field.name, Any)
            bounds = None
            if get_origin(hint) is Annotated:
                hint, bounds = get_args(hint)[:2]
            found.append((field, _parts(hint), bounds))
    return found


def _parts(hint: Any) -> tuple[Any, ...]:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    every = {member for part in parts for member in (part, *get_args(part))}
    # Words for an enumeration are turned into its members by who declared it.
    untold = any(
        not isinstance(get_origin(part) or part, type)
        or (isinstance(part, type) and issubclass(part, Enum))
        for part in every
    )
    return () if untold or Any in every else parts


def _plain(value: Any, parts: tuple[Any, ...]) -> Any:
    if isinstance(value, os.PathLike) and str in parts:
        return os.fspath(value)
    of_numpy = type(value).__module__ == "numpy" and hasattr(value, "item")
    return value.item() if of_numpy else value


def _check(
    field: dataclasses.Field, value: Any, parts: tuple[Any, ...], bounds: str | None
) -> None:
    unset = ", or unset" if type(None) in parts else ""

    def refuse(rule: str) -> UniRefinerError:
        return UniRefinerError(f"{field.name} is {value!r}; it must be {rule}.")

    if parts and not any(_is_of(value, part) for part in parts):
        raise refuse(" or ".join(_name(part) for part in parts))
    if value is None:
        return
    choices = field.metadata.get("choices")
    if choices is not None and value not in choices:
        raise refuse(f"one of {', '.join(map(repr, choices))}{unset}")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        rule = bounds or (FINITE if isinstance(number, float) else None)
        if rule is not None and not within(number, rule):
            raise refuse(_words_for(number, rule) + unset)


def _is_of(value: Any, part: Any) -> bool:
    kind = get_origin(part) or part
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is list and get_args(part):
        (member,) = get_args(part)
        words = member is str and isinstance(value, str)
        each = isinstance(value, list) and all(_is_of(v, member) for v in value)
        return words or each
    return isinstance(value, kind)


def _name(part: Any) -> str:
    if part is type(None):
        return "None"
    return str(part) if get_args(part) else part.__name__
