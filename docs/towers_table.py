"""The table of supported and refused towers, from the table the code reads.

``python -m docs.towers_table docs/towers.md`` writes the committed one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from unirefiner_hf.modeling.dense_text import VARIANTS
from unirefiner_hf.modeling.families import FAMILIES, REFUSED, TowerFamily


def support_table() -> str:
    """Markdown: one row for each family, then the refused ones and why."""
    lines = [
        "# Towers",
        "",
        "Written by `python -m docs.towers_table docs/towers.md`.",
        "",
        "| model type | checkpoints | tokens before the patches | last norm on patch tokens "
        "| patch tokens as words | PH-Reg | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for model_type, family in FAMILIES.items():
        names = f"`{model_type}`"
        if family.dual_encoder is not None:
            names += f", half of `{family.dual_encoder}`"
        words = ", ".join(VARIANTS.get(family.text_reading or "", ()))
        cells = (
            names,
            family.checkpoints,
            _prefix(family),
            _norm(family),
            words,
            "yes" if family.positions is not None else "no",
            family.note,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Refused, and why:", "", "| model type | reason |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in REFUSED.items()]
    for model_type, family in FAMILIES.items():
        for field, value, reason in family.requires:
            lines.append(f"| `{model_type}` with `{field}={not value}` | {reason} |")
    lines += ["", "No register tokens (PH-Reg), and why:", ""]
    lines += ["| model type | reason |", "|---|---|"]
    for model_type, family in FAMILIES.items():
        if family.positions is None:
            lines.append(f"| `{model_type}` | {family.no_register_tokens} |")
    return "\n".join(lines) + "\n"


def _prefix(family: TowerFamily) -> str:
    parts = [f"`{field}`" for field in family.prefix_fields]
    if family.prefix_tokens or not parts:
        parts.insert(0, str(family.prefix_tokens))
    return " + ".join(parts)


def _norm(family: TowerFamily) -> str:
    if family.final_norm is None:
        return "none"
    if not family.norm_in_output:
        return "with `final_norm`"
    if family.norm_unless is not None:
        return f"in the output, none with `{family.norm_unless}`"
    return "in the output"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(support_table(), encoding="utf-8")
