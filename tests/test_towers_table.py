"""The committed table of backbones is the one the code would write."""

from pathlib import Path

from docs.towers_table import support_table


def test_committed_table_of_support_is_the_generated_one():
    committed = Path(__file__).parents[1] / "docs" / "towers.md"
    assert committed.read_text(encoding="utf-8") == support_table(), (
        "run: python -m docs.towers_table docs/towers.md"
    )
