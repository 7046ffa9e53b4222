"""Images that are not used: each with its reason, told in few lines."""

from __future__ import annotations

from collections.abc import Mapping

NAMED = 3
"""Names that a line gives of the images with one reason."""


def reason_of(problem: Exception, name: str) -> str:
    """Why an image is left out, of the error that names it."""
    return str(problem).removeprefix(f"{name}: ")


def left_out_lines(
    left_out: Mapping[str, str], passed_over: Mapping[str, str] | None = None
) -> list[str]:
    """A line for each reason: how many images, and the first names.

    Args:
        left_out: image -> reason; what differs from image to image stands in brackets.
        passed_over: folder or table that was not read -> reason.
    """
    return _lines("Left out", "images", left_out) + _lines(
        "Did not look into", "places", passed_over or {}
    )


def _lines(verb: str, what: str, reasons: Mapping[str, str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason.split(" (")[0].rstrip("."), []).append(name)
    lines = []
    for reason, names in groups.items():
        if len(names) == 1:
            lines.append(f"{verb} {names[0]}: {reasons[names[0]]}")
            continue
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        first = ", ".join(names[:NAMED])
        lines.append(f"{verb} {len(names)} {what}: {reason} ({first}{more}).")
    return lines
