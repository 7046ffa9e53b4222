"""What a result looks like: one table as data, printed as Markdown or as an HTML page."""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from .outputs import write_whole

CELL = 200
"""Width of a picture on the page in pixels; it is stored up to twice as large."""
TEMPLATE = "report.html.jinja"
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Table:
    """Heads of the columns, and the cells of each row."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_markdown(self) -> str:
        """Markdown whose columns are aligned, so that it reads as it stands."""
        lines = [
            [cell.replace("|", "\\|") for cell in row]
            for row in (self.heads, *self.rows)
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = []
        for line in lines:
            cells = [cell.ljust(w) for cell, w in zip(line, widths, strict=True)]
            text.append(f"| {' | '.join(cells)} |")
        text.insert(1, "".join(f"|{'-' * (width + 2)}" for width in widths) + "|")
        return "\n".join(text)


@dataclass(frozen=True)
class Figure:
    """A picture and the words below it.

    Attributes:
        data: a PNG file in base64.
    """

    caption: str
    data: str

    @classmethod
    def of(cls, pixels: np.ndarray | Image.Image, caption: str) -> Figure:
        """From an image or ``(height, width, 3)``; a large one is scaled down."""
        image = pixels
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.ascontiguousarray(image.astype(np.uint8)))
        if max(image.size) > 2 * CELL:
            image = image.copy()
            image.thumbnail((2 * CELL, 2 * CELL), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return cls(caption, base64.b64encode(stream.getvalue()).decode())


@dataclass(frozen=True)
class Bars:
    """Shares drawn as bars: for each row a name and its shares, None for never seen."""

    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]


@dataclass(frozen=True)
class Section:
    """A part of the page below the table; what is empty is left out.

    Attributes:
        key: what colours stand for.
        rows: pictures beside each other.
    """

    title: str
    text: str = ""
    bars: Bars | None = None
    key: Sequence[tuple[Colour, str]] = ()
    rows: Sequence[Sequence[Figure]] = ()


@dataclass(frozen=True)
class Page:
    """Everything a result says; Markdown has no title and no sections.

    Attributes:
        lead: paragraphs before the table.
        notes: paragraphs after it.
    """

    title: str
    table: Table
    lead: Sequence[str] = ()
    notes: Sequence[str] = ()
    sections: Sequence[Section] = field(default=(), repr=False)

    def to_markdown(self) -> str:
        """Lead, table and notes."""
        return "\n\n".join([*self.lead, self.table.to_markdown(), *self.notes])

    def to_html(self) -> str:
        """One file that needs no other and no network."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True,
        )
        return environment.get_template(TEMPLATE).render(page=self)


class Result(ABC):
    """What a public function returns: it prints as a table."""

    @abstractmethod
    def page(self) -> Page:
        """What it says, as data."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Its numbers, ready for JSON."""

    def to_markdown(self) -> str:
        """Its table as Markdown, with what has to be said before and after."""
        return self.page().to_markdown()

    def save_html(self, path: str | Path) -> Path:
        """Write one self-contained page, with the pictures there are.

        Raises:
            OutputError: the file cannot be written.
        """
        return write_whole(path, self.page().to_html())

    def __str__(self) -> str:
        return self.to_markdown()
