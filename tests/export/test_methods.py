"""What a checkpoint says of its method, in its config and in its card, wherever it lies."""

import dataclasses
import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel

from tests.export.conftest import (
    TRAINED,
    WIDTHS,
    make_record,
    make_refined,
    merge,
    pixels,
)
from tests.export.test_merge import export
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.export.card import card_from_record, render_card
from unirefiner_hf.export.checkpoint import ExportError
from unirefiner_hf.export.run_folder import RunFolderError, recorded_settings
from unirefiner_hf.methods.registry import METHODS, method_named

NUMBERS = {
    "unirefiner": "2605.19622",
    "distillation": "2605.19622",
    "ph_reg": "2505.21501",
}


def test_every_method_is_here():
    assert TRAINED.keys() == WIDTHS.keys() == NUMBERS.keys() == METHODS.keys()


def tokens(model, **options):
    with torch.no_grad():
        return model(pixels(), **options).last_hidden_state


@pytest.mark.parametrize("method", METHODS)
def test_a_moved_checkpoint_is_still_known_as_its_method(
    method, save_method_run, tmp_path
):
    model, run, base = save_method_run(method)
    expected = tokens(model)
    merged = merge(run, run / "merged", model=str(base))
    config = json.loads((merged / "config.json").read_text())
    assert config["method"] == method
    moved = merged.rename(tmp_path / "elsewhere")
    assert ModelCard.load(moved / "README.md").data["unirefiner"]["method"] == method
    loaded = AutoModel.from_pretrained(moved)
    assert loaded.config.method == method
    torch.testing.assert_close(tokens(loaded), expected, atol=1e-4, rtol=0)
    known = load_checkpoint(str(moved))
    assert (known.method, known.is_control) == (method, method == "distillation")
    assert known.register_width == WIDTHS[method]


def test_the_writer_itself_says_the_method(tmp_path):
    model = make_refined("dinov2")
    assert model.config.method is None
    folder = export(model, tmp_path / "merged")
    assert AutoModel.from_pretrained(folder).config.method == "unirefiner"


@pytest.mark.parametrize("method", ["unirefiner", "distillation"])
def test_a_native_export_tells_its_method_in_its_card(
    method, save_method_run, tmp_path
):
    _, run, base = save_method_run(method)
    folder = merge(run, tmp_path / "native", model=str(base), native=True)
    assert "method" not in json.loads((folder / "config.json").read_text())
    assert ModelCard.load(folder / "README.md").data["unirefiner"]["method"] == method
    known = load_checkpoint(str(folder))
    assert (known.method, known.is_control) == (method, method == "distillation")
    (folder / "README.md").write_text("# Another card\n")
    assert load_checkpoint(str(folder)).method is None


def test_ph_reg_has_no_native_export(save_method_run, tmp_path):
    _, run, base = save_method_run("ph_reg")
    with pytest.raises(ExportError, match="4 register tokens.*without --native"):
        merge(run, tmp_path / "native", model=str(base), native=True)


@pytest.mark.parametrize("method", ["ph_reg", "distillation"])
def test_a_border_is_refused_where_none_was_trained(method, save_method_run, tmp_path):
    _, run, base = save_method_run(method)
    with pytest.raises(ExportError, match=f"register_width is 2.*method {method}"):
        merge(run, tmp_path / "m", model=str(base), register_width=2)
    folder = merge(run, tmp_path / "m", model=str(base), register_width=0)
    assert json.loads((folder / "config.json").read_text())["register_width"] == 0


# The card


def card_of(method, *, native=False, **settings):
    kind = method_named(method)
    record = {"name": method, **dataclasses.asdict(kind(**settings))}
    changes = {"method": record, "model__register_width": WIDTHS[method]}
    card = card_from_record(make_record(**changes))
    return render_card(card, native=native, files={"model.safetensors": "01" * 32})


@pytest.mark.parametrize("method", METHODS)
def test_the_card_cites_its_own_method_alone(method):
    text = card_of(method)
    assert re.findall(r"eprint = {(.*)}", text) == [NUMBERS[method]]
    others = set(NUMBERS.values()) - {NUMBERS[method]}
    assert not any(number in text for number in others)
    assert text.rstrip().endswith("}\n```")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("native", [False, True])
def test_the_card_speaks_the_words_of_the_field(method, native):
    text = card_of(method, native=native)
    ours = (
        r"\bframe|(?<!-)\btower|dirt|yardstick|\bplain\b|\bstrip\b|unframed|text side"
    )
    prose = re.sub(r"```.*?```", "", text.split("---\n", 2)[2], flags=re.DOTALL)
    assert not re.search(ours, prose)
    assert not re.search(r"\{\{|\{%|\n\n\n", text) and "None" not in prose
    assert all(len(line) <= 130 for line in prose.splitlines() if "|" not in line)


def test_the_card_does_not_say_that_filters_trained_where_they_did_not():
    trained = "the filters the training itself uses"
    assert trained in " ".join(card_of("unirefiner").split())
    for method in ("distillation", "ph_reg"):
        text = " ".join(card_of(method).split())
        assert trained not in text and "The training did not use these filters" in text


def test_the_card_tells_the_settings_of_the_run():
    text = card_of("ph_reg", register_tokens=3, teacher_views=7)
    said = " ".join(text.split())
    assert "averaged over 7 moved and mirrored views" in said
    assert "**Registers:** 3 learned register tokens" in said
    assert "Border of registers" not in said


# Records of earlier versions


def old_record(name, **model):
    """As version 0.1.0 wrote it: the settings of all methods in one class."""
    settings = {}
    for method in METHODS:
        settings |= dataclasses.asdict(method_named(method)())
    return make_record(method={"name": name, **settings, "gone_since": 1}, **model)


@pytest.mark.parametrize("name, now", [("plain", "distillation"), ("ph_reg", "ph_reg")])
def test_an_old_record_is_merged_and_told(name, now, save_method_run, tmp_path):
    model, run, base = save_method_run(now)
    record = old_record(name, model__register_width=0)
    record["method"]["register_tokens"] = 4
    (run / "run.json").write_text(json.dumps(record))
    folder = merge(run, tmp_path / "m", model=str(base))
    config = json.loads((folder / "config.json").read_text())
    assert (config["method"], config["register_width"]) == (now, 0)
    torch.testing.assert_close(
        tokens(AutoModel.from_pretrained(folder)), tokens(model), atol=1e-4, rtol=0
    )
    text = (folder / "README.md").read_text()
    assert f"| method | {now} |" in text and "gone_since" not in text
    other = {"ph_reg": "num_crops", "distillation": "teacher_views"}[now]
    assert f"| {other} |" not in text and "| register_factor |" not in text


def test_an_old_record_may_lack_settings_of_today():
    record = make_record(method={"name": "ph_reg"}, model__register_width=0)
    text = render_card(card_from_record(record))
    assert "averaged over 10 moved" in " ".join(text.split())
    assert "| teacher_views |" not in text  # not recorded
    assert recorded_settings(record).teacher_views == 10
    plain = make_record(method={"name": "plain", "num_crops": 5, "ah_layers": [1]})
    assert recorded_settings(plain).num_crops == 5


@pytest.mark.parametrize("section", ["model", "data", "method", "training", "versions"])
def test_a_record_that_lacks_a_part_is_refused(section, save_run, tmp_path):
    _, run, base = save_run()
    record = make_record()
    del record[section]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match=f"run.json lacks {section}"):
        merge(run, tmp_path / "m", model=str(base))


def test_a_record_that_does_not_tell_the_adapter_is_refused(save_run, tmp_path):
    _, run, base = save_run()
    record = make_record()
    del record["model"]["lora_alpha"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match="does not tell lora_alpha"):
        merge(run, tmp_path / "m", model=str(base))
