"""The command ``unirefiner``: one verb, one file, imported when it is called."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__

VERBS = {
    "refine": "Refine a vision tower on unlabelled images.",
    "estimate": "Tell memory, operations and time of a refinement, without weights.",
    "evaluate": "Compare refined towers with their base and controls on a task.",
    "diagnose": "Measure how clean a model's tokens are, without labels.",
    "compare": "Compare the tokens of two models on the same images.",
    "extract": "Write a model's dense features of images to disk.",
    "merge": "Merge a run's adapter into a checkpoint ready to load or publish.",
    "push": "Publish a run on the Hub, proved before it is uploaded.",
    "verify": "Compare a model's weight files with the checksums in its card.",
    "demo": "See it work: refine a small tower on a few photographs.",
    "recipes": "List the shipped recipes, or copy one to edit.",
}

INTERRUPTED = 130


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises its errors and takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ('{self.prog} --help' shows what there is)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``unirefiner`` and return its exit status.

    0: done. 2: an error of the user's, told in one line. 130: Ctrl-C. Other errors are
    defects and keep their traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in words
    try:
        return _run([word for word in words if word != "--traceback"])
    except KeyboardInterrupt as stop:
        print(f"unirefiner: {str(stop) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not _is_users(error):
            raise
        if show_traceback:
            traceback.print_exc()
        message = " ".join(str(error).split())
        print(f"unirefiner: error: {message}", file=sys.stderr)
        return 2


def _is_users(error: Exception) -> bool:
    """Bad values, files and the package's own errors; anything else is a defect."""
    own = type(error).__module__.split(".")[0] == __name__.split(".")[0]
    return own or isinstance(error, (ValueError, OSError))


def _run(words: list[str]) -> int:
    verb = next((word for word in words if not word.startswith("-")), None)
    parser = Parser(prog="unirefiner", description="Clean features from vision towers.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error comes from"
    )
    verbs = parser.add_subparsers(dest="verb", metavar="verb", title="verbs")
    parsers = {name: verbs.add_parser(name, help=VERBS[name]) for name in VERBS}
    if verb not in VERBS:
        parser.parse_args(words)
        parser.print_help()
        return 2
    chosen = parsers[verb]
    chosen.description = VERBS[verb]
    module = importlib.import_module(f"{__name__}.{verb}")
    module.add_arguments(chosen)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        raise UsageError(_unknown(unknown[0], chosen))
    return module.run(arguments) or 0


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r} ('{parser.prog} --help' shows them)"
    option = word.split("=")[0]
    known = sorted(set(re.findall(r"--\w[\w-]*", parser.format_help())))
    close = difflib.get_close_matches(option.replace("-", "_"), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown option {option}{hint} ('{parser.prog} --help' lists them)"
