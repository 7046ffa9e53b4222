"""Results: one table as data, as Markdown and as a page."""

import numpy as np
import pytest

from unirefiner_hf.outputs import OutputError, check_folder, write_whole
from unirefiner_hf.results import Bars, Figure, Result, Section, Table


class Told(Result):
    """A result of everything there is."""

    title = "<b>a & b</b>"
    sections = (
        Section("Bars", bars=Bars(["", "a"], [("cat", [0.256]), ("<dog>", [None])])),
        Section("Pictures", "in words", key=[((1, 2, 3), "one")]),
        Section("More", rows=[[Figure.of(np.zeros((900, 30, 3)), "x < y")]]),
    )

    def tables(self):
        rows = [["<script>", "1"], ["b|c", "12.5"]]
        return [Table(["name", "value"], rows, "Before.", ["After <this>."])]

    def to_dict(self):
        return {}


def test_markdown_is_aligned():
    assert str(Told()).splitlines() == [
        "Before.",
        "",
        "| name     | value |",
        "|----------|-------|",
        "| <script> | 1     |",
        "| b\\|c     | 12.5  |",
        "",
        "After <this>.",
    ]
    assert Told().to_markdown() == str(Told())


def test_the_page_escapes_what_it_is_given(tmp_path):
    page = Told().save_html(str(tmp_path / "page.html")).read_text()
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
    for tag in ("<script>", "<b>", "<dog>", "<this>", "x < y"):
        assert tag not in page
    assert "&lt;script&gt;" in page and "<td>b|c</td>" in page
    assert "25.6 %" in page and "width: 31px" in page and "never seen" in page
    assert "rgb(1, 2, 3)" in page and 'src="data:image/png;base64,iVBOR' in page


def test_a_result_has_to_say_something():
    with pytest.raises(TypeError, match="abstract"):
        Result()


def test_where_nothing_can_be_written(tmp_path):
    file = write_whole(tmp_path / "a.txt", "old")
    with pytest.raises(OutputError, match="is a folder"):
        Told().save_html(tmp_path)
    with pytest.raises(OutputError, match="there is no folder"):
        Told().save_html(tmp_path / "no" / "page.html")
    with pytest.raises(OutputError, match="is a file"):
        check_folder(file)
    assert check_folder(tmp_path / "b" / "c") == tmp_path / "b" / "c"
    write_whole(file, "new")
    assert file.read_text() == "new" and not list(tmp_path.glob(".*"))
