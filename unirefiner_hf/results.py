"""What functions of the API return: values that print, and save themselves as a page.

A table is built once as data; Markdown and the page are both made of it.
"""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from .outputs import write_whole

PAGE = "page.html.jinja"
CELL = 200
"""Width of a picture on the page in pixels; it is stored up to twice as large."""
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Table:
    """A table in words.

    Attributes:
        caption: a sentence above it; empty for none.
        notes: sentences below it.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    notes: Sequence[str] = ()

    def to_markdown(self) -> str:
        """As Markdown whose columns are aligned, so that it reads as it stands."""
        lines = [
            [cell.replace("|", "\\|") for cell in row]
            for row in (self.heads, *self.rows)
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        drawn = []
        for line in lines:
            cells = [cell.ljust(w) for cell, w in zip(line, widths, strict=True)]
            drawn.append(f"| {' | '.join(cells)} |")
        drawn.insert(1, "".join(f"|{'-' * (width + 2)}" for width in widths) + "|")
        caption = [self.caption] if self.caption else []
        return "\n\n".join([*caption, "\n".join(drawn), *self.notes])


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
    """A part of the page below the tables; what is empty is left out.

    Attributes:
        key: what colours stand for.
        rows: pictures beside each other.
    """

    title: str
    text: str = ""
    bars: Bars | None = None
    key: Sequence[tuple[Colour, str]] = ()
    rows: Sequence[Sequence[Figure]] = ()


class Result(ABC):
    """A result of the API; a subclass gives `tables` and `to_dict`, and may add pictures.

    Attributes:
        sections: of the page, below the tables.
    """

    sections: Sequence[Section] = ()

    @property
    def title(self) -> str:
        """What the result is, in a line."""
        return type(self).__name__

    @abstractmethod
    def tables(self) -> list[Table]:
        """What is shown of it."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""

    def to_markdown(self) -> str:
        """Its tables, as Markdown."""
        return "\n\n".join(table.to_markdown() for table in self.tables())

    def __str__(self) -> str:
        return self.to_markdown()

    def to_html(self) -> str:
        """One page that needs no other file and no network."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("unirefiner_hf", "assets"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True,
        )
        return environment.get_template(PAGE).render(
            title=self.title, tables=self.tables(), sections=self.sections
        )

    def save_html(self, path: str | Path) -> Path:
        """Write the page; returns the file.

        Raises:
            OutputError: the file cannot be written.
        """
        return write_whole(path, self.to_html())
