"""The example that builds scenes, refines, distils and measures."""

import pytest
from transformers import BitImageProcessorPil

from examples.stampscenes import run as example
from tests.conftest import make_tiny_tower


def test_the_example_leaves_its_table(scenes, tmp_path, monkeypatch):
    tower, output = tmp_path / "tower", tmp_path / "out"
    make_tiny_tower("dinov2", layers=8).save_pretrained(tower)
    BitImageProcessorPil(size={"shortest_edge": 20}).save_pretrained(tower)
    output.mkdir()
    (output / "scenes").symlink_to(scenes)
    folder = example.run(output, model=str(tower), steps=1, size=24)
    table = (folder / "table.md").read_text()
    assert "self-distillation baseline" in table and "refined" in table
    assert (folder / "report.html").is_file()
    # What is there is not trained again.
    monkeypatch.setattr(example, "refine", lambda **_: pytest.fail("trained again"))
    monkeypatch.setattr(example, "evaluate", lambda *_, **__: None)
    assert example.run(output, model=str(tower), steps=1, size=24) == folder
