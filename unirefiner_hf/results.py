"""What every function of the API returns: values that print, and save themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

PAGE = "page.html.jinja"


@dataclass(frozen=True)
class Table:
    """A table in words.

    Attributes:
        caption: a sentence above it; empty for none.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def to_markdown(self) -> str:
        """As Markdown."""
        lines = [self.heads, ["---"] * len(self.heads), *self.rows]
        drawn = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([*([self.caption, ""] if self.caption else []), *drawn])


class Result:
    """A result of the API; a subclass gives `title`, `tables` and `to_dict`."""

    @property
    def title(self) -> str:
        """What the result is, in a line."""
        return type(self).__name__

    def tables(self) -> list[Table]:
        """What is shown of it."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        raise NotImplementedError

    def to_markdown(self) -> str:
        """Its tables, as Markdown."""
        return "\n\n".join(table.to_markdown() for table in self.tables())

    def __str__(self) -> str:
        return self.to_markdown()

    def save_html(self, path: str | Path) -> Path:
        """Write it as one page that needs no other file; returns the file."""
        environment = Environment(
            loader=PackageLoader("unirefiner_hf", "assets"), autoescape=True
        )
        page = environment.get_template(PAGE).render(
            title=self.title, tables=self.tables()
        )
        target = Path(path)
        target.write_text(page, encoding="utf-8")
        return target
