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
def as_users(about: str = "", *kinds: type[Exception]) -> Iterator[None]:
    """What another library raises in here is about what the user gave.

    Put round calls of libraries that check the user's own input, never round arithmetic.

    Args:
        about: what was given, said before the library's words.
        kinds: of errors; none: `ValueError`.

    Raises:
        UniRefinerError: in place of any other error of these kinds.
    """
    try:
        yield
    except UniRefinerError:
        raise
    except kinds or ValueError as problem:
        start = f"{about}: " if about else ""
        words = str(problem) or type(problem).__name__
        raise UniRefinerError(f"{start}{words}") from problem
