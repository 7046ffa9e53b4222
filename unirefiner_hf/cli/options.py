"""Fields of dataclasses as options of a command: in a line for --help, whole for --help-all."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from ..training.fields import expected_values
from .parser import as_option

VALUES = {
    "int": "N",
    "float": "X",
    "bool": "BOOL",
    "list[int]": "N ...",
    "folder of a run": "[RUN]",
}
"""Type of a field -> what the help calls its value."""


@dataclass(frozen=True)
class Option:
    """An option that stands for a field.

    Attributes:
        name: of the field.
        expected: what it takes, in words.
        default: in words; None of one that is needed.
        help: sentences, the first one enough to know what it is for.
    """

    name: str
    expected: str
    default: str | None
    help: str

    @classmethod
    def of(cls, field: dataclasses.Field, expected: str) -> Option:
        """Of a field whose metadata holds the help."""
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if isinstance(default, list):
            default = " ".join(map(str, default))
        text = field.metadata.get("help", "")
        needed = default is dataclasses.MISSING or text.endswith("Needed.")
        return cls(field.name, expected, None if needed else str(default), text)

    @property
    def flag(self) -> str:
        """As it is written."""
        return as_option(self.name)

    @property
    def value(self) -> str:
        """What the help calls its value."""
        word = self.name.rpartition("_")[2].upper()
        return VALUES.get(self.expected.removesuffix(" or null"), word)

    def brief(self) -> str:
        """First clause, choices and default."""
        clause = re.split(r"(?<!\.)[.:;](?:\s|$)| \(", self.help, maxsplit=1)[0]
        if self.expected.startswith("'"):
            names = self.expected.removesuffix(" or null").replace("'", "")
            clause += f": {names.replace(' or ', ', ')}"
        if self.default is None:
            return clause
        default = self.default
        if self.value == "BOOL" and default != "None":
            default = default.lower()
        if default == "None":
            unset = re.search(r"Unset: (.{1,36}?)[.;](?:\s|$)", self.help)
            default = unset[1] if unset else "unset"
        return f"{clause} [{default}]"

    def whole(self) -> str:
        """All of the help, type and default."""
        default = "needed" if self.default is None else f"default: {self.default}"
        return f"{self.help} [{self.expected}; {default}]"


def options_of(*dataclass_types: type) -> dict[str, Option]:
    """Name of a field -> its option."""
    expected = expected_values(dataclass_types)
    return {
        field.name: Option.of(field, expected[field.name])
        for dataclass_type in dataclass_types
        for field in dataclasses.fields(dataclass_type)
        if field.init
    }


def add_options(
    group: argparse._ArgumentGroup,
    options: Iterable[Option],
    brief: Container[str] | None = None,
    *,
    one_word: bool = False,
) -> None:
    """Give a group options; only those that are given have a value.

    Args:
        brief: names that the help shows, in a line each; None: all, whole.
        one_word: an option takes one word (of a bool: or none); else any number.
    """
    for option in options:
        text = option.whole() if brief is None else option.brief()
        hidden = brief is not None and option.name not in brief
        kind: dict[str, Any] = {"nargs": "*"}
        if one_word:
            is_bool = option.value == "BOOL"
            kind = {"nargs": "?", "const": "true"} if is_bool else {}
        group.add_argument(
            option.flag,
            metavar=option.value,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS if hidden else text.replace("%", "%%"),
            **kind,
        )


def add_place(parser: argparse.ArgumentParser) -> None:
    """Give a command the options of where and how its models run."""
    parser.add_argument("--device", metavar="NAME", help="such as cuda or cpu")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run a model repository's own code",
    )


def positive(word: str) -> int:
    """The type of an option that is 1 or more.

    Raises:
        argparse.ArgumentTypeError: another number.
        ValueError: no whole number.
    """
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not 1 or more")
    return number
