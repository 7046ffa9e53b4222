"""What was found in a data set, and what of it is not used."""

from __future__ import annotations

from dataclasses import dataclass, field

from .left_out import left_out_lines


@dataclass
class DataReport:
    """What was found and what was left out.

    Attributes:
        source: the folder's name or the data set's id, never a whole path.
        total: images found; None where a stream does not tell.
        skipped: name -> reason of the images left out so far; part of `total`.
        passed_over: folder or table that was not read -> reason.
    """

    source: str
    total: int | None
    skipped: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)

    @property
    def used(self) -> int | None:
        """Images that are trained on."""
        return None if self.total is None else self.total - len(self.skipped)

    def lines(self) -> list[str]:
        """What was left out, in a few lines."""
        return left_out_lines(self.skipped, self.passed_over)
