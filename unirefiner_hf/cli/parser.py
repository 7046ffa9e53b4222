"""What all commands read alike: options with '-' or '_', errors in a line, short help."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UniRefinerError

WIDTH, OPTIONS = 100, 38
"""Columns of the help, and of its part that names the options."""


class UsageError(UniRefinerError):
    """The command line itself is wrong."""


class Formatter(argparse.HelpFormatter):
    """A help whose texts keep their lines where they are short enough."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=OPTIONS, width=WIDTH)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        fill = super()._fill_text
        return "\n".join(
            fill(line, width, indent) if len(line) > width else indent + line
            for line in lines
        )

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "*":
            return str(action.metavar)
        return super()._format_args(action, default_metavar)


class Parser(argparse.ArgumentParser):
    """Takes ``--some-name`` and ``--some_name``, and no abbreviations; raises its errors.

    Args:
        any_option: take options that are not declared, too, each with its words; who runs
            the command has to look at them (`check_names`).
    """

    def __init__(self, *, any_option: bool = False, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, add_help=False, formatter_class=Formatter, **options
        )
        self.any_option = any_option
        self.undeclared: list[str] = []

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ('{self.prog} --help' shows what there is)")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Read the words of a command; ``words`` of the result are those that were typed.

        Raises:
            UsageError: an option or a word that is not taken.
        """
        spelled = [dashed(word) for word in words]
        if self.any_option:
            for option in dict.fromkeys(word.partition("=")[0] for word in spelled):
                if option[2:] and option[:2] == "--" and not self.knows(option):
                    self.undeclared.append(option)
                    self.add_argument(
                        option,
                        nargs="*",
                        default=argparse.SUPPRESS,
                        help=argparse.SUPPRESS,
                    )
        arguments, unknown = self.parse_known_args(spelled)
        if unknown:
            word = unknown[0]
            if not word.startswith("-"):
                self.error(f"unexpected argument {word!r}")
            raise self._unknown(word.partition("=")[0], (), words)
        arguments.words = list(words)
        return arguments

    def knows(self, option: str) -> bool:
        """Whether an option is declared."""
        return option in self._option_string_actions

    def check_names(
        self, names: Iterable[str], known: Sequence[str], words: Sequence[str]
    ) -> None:
        """Refuse names of undeclared options that are none.

        Args:
            names: of the options that were given.
            known: those there are beside the declared ones.
            words: as they were typed.

        Raises:
            UsageError: names the nearest in the spelling that was typed.
        """
        options = [as_option(name) for name in known]
        for name in names:
            if as_option(name) not in options:
                raise self._unknown(as_option(name), options, words)

    def _unknown(
        self, option: str, known: Sequence[str], words: Sequence[str]
    ) -> UsageError:
        """The error on an option, as it was typed."""
        declared = [name for name in self._option_string_actions if name[:2] == "--"]
        known = [name for name in (*declared, *known) if name not in self.undeclared]
        names = [word.partition("=")[0] for word in words]
        typed = next((name for name in names if dashed(name) == option), option)
        hint = ""
        for near in difflib.get_close_matches(option, known, n=1, cutoff=0.5):
            spelled = near[2:].replace("-", "_") if "_" in typed[2:] else near[2:]
            hint = f"; did you mean --{spelled}?"
        return UsageError(
            f"unknown option {typed}{hint} ('{self.prog} --help-all' lists them)"
        )


def as_option(name: str) -> str:
    """The option of a field."""
    return f"--{name.replace('_', '-')}"


def dashed(word: str) -> str:
    """A word whose name of an option is spelled with dashes."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def place(word: str) -> Path:
    """The type of an option that names a file or folder.

    Raises:
        argparse.ArgumentTypeError: nothing, which a path takes for the current folder.
    """
    if not word.strip():
        raise argparse.ArgumentTypeError("it is empty: name a file or folder")
    return Path(word)
