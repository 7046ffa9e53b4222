"""The list of mended faults names tests that are there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests/FAULTS.md"


def named() -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", LIST.read_text("utf-8"))


def test_every_fault_has_a_test_that_is_there():
    tests = named()
    assert len(tests) > 100
    missing = []
    for test in tests:
        file, _, name = test.partition("::")
        source = ROOT / file
        there = source.is_file() and {
            node.name
            for node in ast.walk(ast.parse(source.read_text("utf-8")))
            if isinstance(node, ast.FunctionDef)
        }
        if not there or (name and name not in there):
            missing.append(test)
    assert not missing


def test_every_line_names_one():
    rows = [r for r in LIST.read_text("utf-8").splitlines() if r.startswith("| ")]
    rows = [row for row in rows if row != "| fault | test |"]
    assert rows and all("`tests/" in row for row in rows)
