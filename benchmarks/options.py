"""Types of options that several benchmarks take."""

from __future__ import annotations

import argparse


def positive(word: str) -> int:
    """A whole number, 1 or more.

    Raises:
        argparse.ArgumentTypeError: another one.
        ValueError: no whole number.
    """
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not 1 or more")
    return number
