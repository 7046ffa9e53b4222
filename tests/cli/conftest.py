"""Commands in a process of their own, and results that need no refinement."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from unirefiner_hf.resources import PACKAGE
from unirefiner_hf.results import Result, Table
from unirefiner_hf.training import refine as refine_module


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with this checkout."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


@dataclass(frozen=True)
class Made(Result):
    """A result with a folder."""

    folder: Path = Path("runs/mine")

    def __fspath__(self) -> str:
        return str(self.folder)

    def tables(self) -> list[Table]:
        return [Table(("run", ""), [("folder", str(self.folder))])]

    def to_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder)}


@pytest.fixture
def refined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `refine` was called with, in place of a refinement."""
    calls: list[dict[str, Any]] = []

    def record(**keywords: Any) -> Made:
        calls.append(keywords)
        return Made()

    monkeypatch.setattr(refine_module, "refine", record)
    return calls
