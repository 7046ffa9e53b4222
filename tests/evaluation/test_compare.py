"""`compare`: what it says of two models is what their tokens say."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from unirefiner_hf import compare
from unirefiner_hf.cli import main
from unirefiner_hf.data.images import load_rgb
from unirefiner_hf.data.sources import InputError
from unirefiner_hf.evaluation.checkpoints import (
    Checkpoint,
    CheckpointMismatchError,
    load_checkpoint,
)
from unirefiner_hf.evaluation.cleanliness import measure_cleanliness
from unirefiner_hf.evaluation.compare import ClickError
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel


@torch.no_grad()
def unit_tokens(checkpoint, files):
    """``(images, patches, hidden)`` at 24 px, by hand."""
    pixels = [checkpoint.reading(load_rgb(f), (24, 24)) for f in files]
    outputs = checkpoint.model(torch.stack(pixels))
    return functional.normalize(outputs.last_hidden_state, dim=-1)


def test_numbers_are_those_of_the_tokens(tower_folder, refined, photos):
    found = compare(tower_folder, refined, photos, size=24, click=(13, 2))
    files = sorted(photos.rglob("*.png"))
    pair = [load_checkpoint(path) for path in (tower_folder, refined)]
    pair[0].model.config.register_width = 0
    first, second = (unit_tokens(checkpoint, files) for checkpoint in pair)
    assert found.images == ["0.png", "1.png", "2.png", "more/3.png", "more/4.png"]
    assert found.cosines.shape == (5, 6, 6) and found.click == (0, 3)
    between = (first * second).sum(dim=-1)
    assert np.allclose(found.cosines.reshape(5, 36), between, atol=1e-4)
    assert found.cosine == pytest.approx(between.mean().item(), abs=1e-5)
    for tokens, clicked, across in zip(
        (first, second), found.click_cosines, found.cross_image, strict=True
    ):
        cosines = torch.einsum("bpc,bc->bp", tokens, tokens[:, 3])
        assert np.allclose(clicked.reshape(5, 36), cosines, atol=1e-4)
        pairs = torch.einsum("ipc,jqc->ijpq", tokens, tokens).mean(dim=(2, 3))
        apart = pairs[~torch.eye(5, dtype=torch.bool)].mean().item()
        assert across == pytest.approx(apart, abs=1e-5)


def test_a_model_is_like_itself(tower_folder, photo_set):
    found = compare(tower_folder, tower_folder, photo_set, size=24)
    assert found.cosine == pytest.approx(1) and found.offset == pytest.approx(0)
    assert found.spurious[0] == found.spurious[1]
    for words, (first, second) in found.measures().items():
        assert first == second, words
    assert found.names[0] != found.names[1] and list(found.skipped) == ["row-5"]


def test_an_offset_shows(tower_folder, refined, photos, monkeypatch):
    """The same direction added to every token of the second model."""
    plain = compare(tower_folder, refined, photos, size=24)
    whole = Checkpoint.feature_map

    def shifted(self, pixels):
        return whole(self, pixels) + (100.0 if self.register_width else 0)

    monkeypatch.setattr(Checkpoint, "feature_map", shifted)
    found = compare(tower_folder, refined, photos, size=24)
    assert found.cross_image[0] == plain.cross_image[0]
    assert found.cross_image[1] > 0.99 > plain.cross_image[1]
    assert found.offset > 20 * plain.offset


def test_spurious_shares_are_by_the_base(tower_folder, refined, photos):
    found = compare(tower_folder, refined, [photos / "0.png"], size=24)
    assert found.cross_image is None
    images = [load_rgb(photos / "0.png")] * 2
    base, other = (load_checkpoint(path) for path in (tower_folder, refined))
    measured = measure_cleanliness(base, images, 24)
    by_base = measure_cleanliness(other, images, 24, base=measured)
    for ours, theirs in zip(found.spurious, (measured, by_base), strict=True):
        for name, share in ours.items():
            assert share == pytest.approx(theirs.values[name]), name


def test_it_prints_and_saves(tower_folder, refined, photos, tmp_path):
    found = compare(tower_folder, refined, photos, size=22, max_images=4)
    text = str(found)
    assert "Left out broken.jpg" in text and "3 images at 24 px" in text
    assert "| cosine between images " in text and "| more/3.png " in text
    content = json.loads(json.dumps(found.to_dict()))
    assert content["models"] == [tower_folder.name, "mine"]
    measure = content["measures"]["cosine between images"]
    gap = measure["mine"] - measure[tower_folder.name]
    assert measure["difference"] == pytest.approx(gap)
    page = found.save_html(tmp_path / "page.html").read_text()
    assert page.count("<img") == 3 * (3 + 3 + 2 + 3) and "http" not in page


@pytest.mark.parametrize(
    ("click", "patch"),
    [
        (None, (3, 3)),
        ((0, 0), (0, 0)),
        ((23, 4), (1, 5)),
        ((0.0, 1.0), (5, 0)),
        ((0.34, 0.16), (0, 2)),
    ],
)
def test_the_chosen_patch(click, patch, tower_folder, refined, photos):
    found = compare(tower_folder, refined, photos / "0.png", size=24, click=click)
    assert found.click == patch


@pytest.mark.parametrize(
    "click", [(24, 0), (-1, 0), (0.5, 1.5), (0.5, 1), (1,), "ab", (float("nan"), 0.5)]
)
def test_places_outside_are_refused(click, tower_folder, photos, monkeypatch):
    monkeypatch.setattr("unirefiner_hf.evaluation.checkpoints.load_tower", None)
    with pytest.raises(ClickError, match="click is .*whole pixels from 0 to 23"):
        compare(tower_folder, tower_folder, photos, size=24, click=click)


def test_what_cannot_be_compared(tower_folder, refined, photos, tmp_path):
    with pytest.raises(InputError, match="images is a dict"):
        compare(tower_folder, refined, {})
    model = UniRefinerModel.from_pretrained(refined)
    with torch.no_grad():
        for parameter in model.get_input_embeddings().parameters():
            parameter.normal_()
    with pytest.raises(CheckpointMismatchError, match="was not made from"):
        compare(tower_folder, model, photos)


def test_the_command(tower_folder, refined, photos, tmp_path, capsys):
    words = ["compare", str(tower_folder), str(refined), "--images", str(photos)]
    words += ["--size", "24", "--html", str(tmp_path / "a.html")]
    assert main([*words, "--click", "0.1,0.9", "--json", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    assert "Mean cosine between the two models' tokens" in out
    assert json.loads((tmp_path / "a.json").read_text())["click"] == [5, 0]
    assert "Principal components, one basis" in (tmp_path / "a.html").read_text()
    assert main([*words, "--click", "8,5", "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["click"] == [1, 2]
    for click, message in (("5", "not x,y"), ("a,b", "not x,y"), ("99,1", "click is")):
        assert main([*words, "--click", click]) == 2
        assert message in capsys.readouterr().err
