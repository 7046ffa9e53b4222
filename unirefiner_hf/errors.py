"""What went wrong on the user's side, and the checks that say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .modeling.errors import UniRefinerError

__all__ = ["UniRefinerError", "as_users", "require"]


def require(settings: Any, name: str, ok: bool, rule: str) -> None:
    """Refuse a field of settings.

    Raises:
        UniRefinerError: names the field, its value and the rule it breaks.
    """
    if not ok:
        raise UniRefinerError(
            f"{name} is {getattr(settings, name)!r}; it must be {rule}."
        )


@contextmanager
def as_users(about: str = "") -> Iterator[None]:
    """A ValueError that another library raises in here is about what the user gave.

    Put round calls of libraries that check the user's own input, never round arithmetic.

    Args:
        about: what was given, said before the library's words.

    Raises:
        UniRefinerError: in place of any other ValueError.
    """
    try:
        yield
    except UniRefinerError:
        raise
    except ValueError as problem:
        start = f"{about}: " if about else ""
        raise UniRefinerError(f"{start}{problem}") from problem
