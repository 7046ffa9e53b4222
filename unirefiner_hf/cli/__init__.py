"""The command ``unirefiner``: one command, one file, imported when it is called."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from ..errors import UniRefinerError
from ..outputs import UnwrittenError
from .output import add_output_options, as_asked, glued, show, tell
from .parser import Parser, UsageError, dashed

COMMANDS = {
    "refine": "Refine a vision backbone on unlabelled images.",
    "estimate": "Tell memory, operations and time of a refinement, without weights.",
    "evaluate": "Compare refined backbones with their base and controls on a task.",
    "diagnose": "Measure how clean a backbone's tokens are, without labels.",
    "compare": "Show what changed between two models on the same images.",
    "extract": "Write dense features of images to disk.",
    "merge": "Merge a run's adapter into a checkpoint ready to load or publish.",
    "push": "Publish a run on the Hub, proved before it is uploaded.",
    "verify": "Compare a model's files with the checksums in its card.",
    "demo": "See it work: refine a small backbone on a few photographs.",
    "recipes": "List the shipped recipes, or copy one to edit.",
}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``unirefiner`` and return its exit status.

    0: done. 1: what was verified did not pass. 2: an error of the user's, told in one line.
    130: Ctrl-C. Other errors are defects: they are raised, and the interpreter shows their
    traceback and exits with 1.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(glued(words))
    except KeyboardInterrupt as stop:
        print(f"unirefiner: {str(stop) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except (UniRefinerError, OSError) as error:
        if "--traceback" in words:
            traceback.print_exc()
        message = " ".join(str(error).split())
        print(f"unirefiner: error: {message}", file=sys.stderr)
        return 2


def _run(words: list[str]) -> int:
    place = next((i for i, word in enumerate(words) if not word.startswith("-")), None)
    if place is None:
        parser = _overview()
        parser.parse(words)
        parser.print_help()
        return 2
    name = words.pop(place)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"unknown command {name!r}{hint} ('unirefiner --help' lists them)"
        )
    module = importlib.import_module(f"{__name__}.{name}")
    parser = Parser(
        prog=f"unirefiner {name}",
        description=COMMANDS[name],
        any_option=getattr(module, "ANY_OPTION", False),
    )
    if "--help-all" in map(dashed, words):
        getattr(module, "add_all_arguments", module.add_arguments)(parser)
        add_output_options(parser, traceback=True)
        parser.print_help()
        return 0
    module.add_arguments(parser)
    add_output_options(parser)
    arguments = parser.parse(words)
    arguments.parser = parser
    try:
        with as_asked(arguments):
            result = module.run(arguments)
    except UnwrittenError as problem:
        show(problem.result, arguments)
        raise
    if result is None:
        return 0
    tell(result, arguments)
    return 0 if getattr(result, "passed", True) else 1


def _overview() -> Parser:
    """The parser without a command."""
    lines = [f"  {name:10} {text}" for name, text in COMMANDS.items()]
    parser = Parser(
        prog="unirefiner",
        usage="unirefiner COMMAND [option ...]",
        description="\n".join(
            ["Clean features from vision backbones.", "", "commands:", *lines]
        ),
        epilog="'unirefiner COMMAND --help' shows the options of a command.",
    )
    parser.add_argument(
        "--version", action="version", version=__version__, help="print the version"
    )
    add_output_options(parser, traceback=True)
    return parser
