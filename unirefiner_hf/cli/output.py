"""What a command says: its result as text, as JSON, or only where it is."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, Protocol

from ..outputs import OutputError, check_file, write_json
from .parser import UsageError

STDOUT = "-"


class Told(Protocol):
    """What a command may return: a `Result`, or anything that does as much."""

    def to_dict(self) -> Any:
        """As plain values."""


def add_output_options(
    parser: argparse.ArgumentParser, *, traceback: bool = False
) -> None:
    """Give a command the options that all have; the help of few shows ``--traceback``."""
    group = parser.add_argument_group("all commands")
    group.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE.json",
        help="print the result as JSON alone, or write it to this file, too",
    )
    group.add_argument(
        "--html", metavar="FILE", help="write the result as a page there, too"
    )
    group.add_argument(
        "--quiet",
        action="store_true",
        help="print errors and where the result is, no warnings or progress",
    )
    group.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error comes from" if traceback else argparse.SUPPRESS,
    )
    group.add_argument("-h", "--help", action="help", help="show this help")


def glued(words: Sequence[str]) -> list[str]:
    """The words with the file behind ``--json`` tied to it.

    A word behind it that does not end in ``.json`` is not its file, so that
    ``--json runs/mine`` leaves the run to the command.
    """
    tied: list[str] = []
    for word in words:
        if tied and tied[-1] == "--json" and not word.startswith("-"):
            if word.endswith(".json"):
                tied[-1] = f"--json={word}"
                continue
        tied.append(word)
    return [f"--json={STDOUT}" if word == "--json" else word for word in tied]


@contextmanager
def as_asked(arguments: argparse.Namespace) -> Iterator[None]:
    """Run a command: only its result may reach stdout where JSON or quiet is asked for.

    Raises:
        OutputError: a file that is asked for cannot be written, or is part of a run.
    """
    for asked in (arguments.html, arguments.json):
        if asked not in (None, STDOUT):
            _check_result(asked)
    if arguments.quiet:
        with _silence():
            yield
    elif arguments.json == STDOUT:
        with redirect_stdout(sys.stderr):
            yield
    else:
        yield


def _check_result(asked: str) -> None:
    """Refuse a file that cannot be written, or that a run or a model is made of."""
    file = check_file(asked)
    if not file.exists():
        return
    from ..export.model_files import is_part  # imports torch

    if is_part(file):
        raise OutputError(f"{file} is part of a run or a model: name another file.")


@contextmanager
def _silence() -> Iterator[None]:
    """No progress bars, no prints, and nothing logged below an error."""
    from tqdm.std import tqdm

    shown, level = tqdm.__init__, logging.root.manager.disable

    def hidden(self: tqdm, *words: Any, **options: Any) -> None:
        shown(self, *words, **{**options, "disable": True})

    tqdm.__init__ = hidden  # type: ignore[method-assign]
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            redirect_stdout(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = shown  # type: ignore[method-assign]
        logging.disable(level)


def tell(result: Told, arguments: argparse.Namespace) -> None:
    """Print a result, or where it is; then write its page and its JSON.

    In this order: what cannot be written is on the terminal.
    """
    show(result, arguments)
    if arguments.json not in (None, STDOUT):
        write_json(arguments.json, result.to_dict())
    if arguments.html is not None:
        if not hasattr(result, "save_html"):
            raise UsageError("--html: the result of this command makes no page.")
        result.save_html(arguments.html)


def show(result: Told, arguments: argparse.Namespace) -> None:
    """Print a result as JSON, as text, or only where it is."""
    if arguments.json == STDOUT:
        print(json.dumps(result.to_dict(), indent=2), flush=True)
    elif not arguments.quiet:
        print(result, flush=True)
    elif isinstance(result, os.PathLike):
        print(os.fspath(result), flush=True)
    elif hasattr(result, "url"):
        print(result.url, flush=True)


def note(text: str, arguments: argparse.Namespace) -> None:
    """Say something beside the result, once in a launch of several processes."""
    if not arguments.quiet and os.environ.get("RANK", "0") == "0":
        print(f"unirefiner: {text}", file=sys.stderr)
