"""Planted truth: the rule, the adapter that plants, and the filters held against it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.conftest import save_images
from unirefiner_hf.data.images import load_rgb
from unirefiner_hf.evaluation.agreement_report import plot_truth, truth_table
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.evaluation.filter_agreement import (
    Step,
    agreement,
    compare_filters,
    filter_step,
    measure_truth,
)
from unirefiner_hf.evaluation.planted import (
    PlantedTruth,
    PlantingRule,
    TruthError,
    dirty_checkpoint,
    load_rule,
    planted_truth,
)
from unirefiner_hf.methods.unirefiner.objective import UniRefiner
from unirefiner_hf.methods.unirefiner.settings import UniRefinerSettings
from unirefiner_hf.spurious import filters, similarity

SHARED = Path(__file__).parents[2].parent / "shared" / "dirty"
DIRTY = next(
    (p for p in (SHARED, SHARED.parents[2] / "shared" / "dirty") if p.is_dir()), SHARED
)


def image_of_spreads(order):
    """A row of 4-pixel patches whose values spread more, the higher their number."""
    patch = torch.randn(3, 4, 4)
    return torch.cat([patch * (1 + number) for number in order], dim=2).unsqueeze(0)


def test_the_busiest_patches_are_proxies_and_the_flattest_patterns():
    torch.manual_seed(0)
    order = torch.randperm(20)
    truth = planted_truth(image_of_spreads(order), 4)
    rank = order / 19
    assert truth.proxies[0].equal(rank >= 0.70)
    assert truth.patterns[0].equal(rank < 0.12)
    assert truth.spurious.equal(truth.proxies | truth.patterns)
    scaled = image_of_spreads(order) * 0.01
    assert planted_truth(scaled, 4).proxies.equal(truth.proxies)


def test_images_without_ranks_are_refused():
    with pytest.raises(ValueError, match="30 x 28.*multiples of the patch size 4"):
        planted_truth(torch.zeros(1, 3, 30, 28), 4)
    with pytest.raises(ValueError, match="One patch has no rank"):
        planted_truth(torch.zeros(1, 3, 4, 4), 4)


@pytest.mark.skipif(not DIRTY.is_dir(), reason="the planted adapter is not here")
def test_the_rule_is_the_one_written_beside_the_adapter():
    text = (DIRTY / "README.md").read_text()
    rule = load_rule(DIRTY)
    assert f"rank >= {rule.proxy_rank:.2f}" in text
    assert f"rank < {rule.pattern_rank:.2f}" in text


def test_an_adapter_may_name_another_rule(tmp_path):
    assert load_rule(tmp_path) == PlantingRule()
    rule = PlantingRule("brightness", 0.75, 0.15)
    (tmp_path / "planting.json").write_text(json.dumps(vars(rule)))
    assert load_rule(tmp_path) == rule
    # Brighter and flatter to the right: both measures, opposite orders.
    columns = torch.arange(20).repeat_interleave(4)
    spread = torch.randn(3, 4, 4).repeat(1, 1, 20)
    pixels = (columns + spread * (20 - columns) / 20).unsqueeze(0)
    truth = planted_truth(pixels, 4, rule)
    assert truth.proxies[0].equal(torch.arange(20) / 19 >= 0.75)
    assert truth.patterns[0].equal(torch.arange(20) / 19 < 0.15)
    assert (
        planted_truth(pixels, 4).proxies[0].equal(torch.arange(20).flip(0) / 19 >= 0.7)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"measure": "smell"}', "measure is 'smell'.*contrast, brightness"),
        ('{"proxy_rank": 0.1}', "pattern_rank is 0.12 and proxy_rank 0.1"),
        ('{"proxy_rank": 1}', "proxy_rank 1; they must lie between 0 and 1"),
        ('{"pattern_rank": 0}', "pattern_rank is 0 and"),
        ('{"proxies": 0.1}', "proxies"),
        ("{", "planting.json is not a planting rule"),
    ],
)
def test_a_damaged_rule_is_refused(tmp_path, text, said):
    (tmp_path / "planting.json").write_text(text)
    with pytest.raises(TruthError, match=said):
        load_rule(tmp_path)


def test_agreement_by_hand():
    truth = PlantedTruth(
        proxies=torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]]).bool(),
        patterns=torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0]]).bool(),
    )
    found = agreement(torch.tensor([[1, 1, 0, 0, 1, 0, 0, 0]]).bool(), truth, 0.5)
    assert found.limit == 0.5
    assert found.marked == 3 / 8
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == 2 / 4
    assert found.f1 == pytest.approx(4 / 7)
    assert found.proxy_recall == pytest.approx(2 / 3)
    assert found.pattern_recall == 0
    none = agreement(torch.zeros(1, 8).bool(), truth, 0.5)
    assert none.precision is None and none.f1 == 0
    clean = torch.zeros(1, 8).bool()
    with pytest.raises(ValueError, match="nothing to find"):
        agreement(clean, PlantedTruth(clean, clean), 0.5)


def test_filters_that_see_the_truth_find_it():
    """Cosines that are 1 at planted tokens and 0 elsewhere: F1 is 1 at training's limits."""
    planted = torch.zeros(2, 20, dtype=torch.bool)
    planted[:, :6] = True
    truth = PlantedTruth(planted, torch.zeros_like(planted))
    axes = torch.eye(4)
    target = torch.where(planted.unsqueeze(-1), axes[0], axes[1])
    step = Step(
        scores={name: planted.float() for name in filters.FPGP},
        target=target,
        found=axes[None, :1].expand(2, -1, -1),
        flow=[],
        num_heads=1,
        truth=truth,
    )
    reports = compare_filters([step, step], UniRefinerSettings())
    assert set(reports) == {"fpgp_reference", "fpgp_strip", "detectors", "union"}
    for name, report in reports.items():
        assert report.default.f1 == 1, name
        assert report.best.f1 == 1
        assert report.auc == (None if name == "union" else 1)
    assert reports["detectors"].default.limit == 0.55
    assert reports["detectors"].sweep[0].marked == 1
    assert reports["fpgp_strip"].sweep[-1].marked == 0
    with pytest.raises(ValueError, match="planted and other tokens"):
        whole = PlantedTruth(torch.ones_like(planted), truth.patterns)
        compare_filters([replace(step, truth=whole)], UniRefinerSettings())


def test_a_fixed_cosine_is_swept_by_cosines():
    planted = torch.arange(20).expand(2, -1) >= 14
    truth = PlantedTruth(planted, torch.zeros_like(planted))
    axes = torch.eye(4)
    scores = torch.linspace(0, 1, 20).expand(2, -1)
    step = Step(
        scores={name: scores for name in filters.FPGP},
        target=axes[1].expand(2, 20, -1),
        found=axes[None, :1].expand(2, -1, -1),
        flow=[],
        num_heads=1,
        truth=truth,
    )
    reports = compare_filters([step], UniRefinerSettings(fpgp_cosine=0.7))
    # No detector is near any token: no precision, no line.
    assert all(at.precision is None for at in reports["detectors"].sweep[1:])
    nothing = replace(reports["detectors"], sweep=reports["detectors"].sweep[1:])
    drawn = plot_truth({"detectors": nothing, "union": reports["union"]}, 0.3).axes[0]
    assert [t.get_text() for t in drawn.get_legend().get_texts()] == ["union", "blind"]
    for name in (*filters.FPGP, "union"):
        report = reports[name]
        assert report.default.limit == 0.7
        assert report.default in report.sweep
        shares = [at.marked for at in report.sweep]
        assert shares == sorted(shares, reverse=True) and len(set(shares)) > 10
        assert report.best.f1 == 1


def test_what_is_told_is_what_training_rejects(planter, monkeypatch):
    """The shares of a training step on the same views are those of the report."""
    _, model = planter
    settings = UniRefinerSettings(
        ah_layers=[0, 1],
        detector_cosine=0.5,
        target_view="crop",
        match_to_full_image=False,
    )
    torch.manual_seed(1)
    objective = UniRefiner(model, settings, torch.randn(1, 3, 24, 24)).eval()
    pixels = torch.randn(2, 3, 24, 24)
    truth = planted_truth(pixels, 4)
    step = filter_step(objective, pixels, 1, truth)
    reports = compare_filters([step], settings)

    teacher = objective.teacher_views(pixels, pixels, "right")
    registers = objective.model.encode(pixels, 1).registers
    registers = torch.nn.functional.normalize(registers, dim=-1)
    # Training draws its candidates first; here the detectors have the seed to themselves.
    monkeypatch.setattr(similarity, "draw_most_similar", lambda tokens, *_: tokens)
    torch.manual_seed(0)
    with torch.no_grad():
        target = objective.targets(teacher.source, teacher.image)
        reference = objective.reference_views(24, 24)[1]
        _, _, shares = objective._filter(teacher, target, registers, reference)
    for name in filters.NAMES:
        assert 0 < reports[name].default.marked < 1
        assert reports[name].default.marked == pytest.approx(
            shares[f"rejected_{name}"].item()
        )
    assert reports["union"].default.marked == pytest.approx(
        1 - shares["clean_ratio"].item()
    )


def test_the_planted_tower_is_the_adapter_on_the_clean_one(tower_folder, planter):
    folder, model = planter
    clean = load_checkpoint(str(tower_folder))
    dirty = dirty_checkpoint(clean, folder)
    assert dirty.name.endswith("+ planter")
    pixels = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        expected = model.encode(pixels, 0).image
        torch.testing.assert_close(
            dirty.model.encode(pixels, 0).image, expected, atol=1e-5, rtol=1e-5
        )


def test_adapters_that_do_not_fit_are_refused(tower_folder, planter, tmp_path):
    folder, _ = planter

    def clean():
        return load_checkpoint(str(tower_folder))

    def copy(name):
        return Path(shutil.copytree(folder, tmp_path / name))

    with pytest.raises(TruthError, match="nowhere holds no adapter_model.safetensors"):
        dirty_checkpoint(clean(), tmp_path / "nowhere")
    (bare := copy("bare")).joinpath("adapter_config.json").unlink()
    with pytest.raises(TruthError, match="bare holds no adapter_config.json"):
        dirty_checkpoint(clean(), bare)
    weights = (cut := copy("cut")) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(TruthError, match="adapter_model.safetensors is damaged"):
        dirty_checkpoint(clean(), cut)
    (garbled := copy("garbled")).joinpath("adapter_config.json").write_text("{")
    with pytest.raises(TruthError, match="adapter_config.json is damaged"):
        dirty_checkpoint(clean(), garbled)
    config = (other := copy("other")) / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "r": 2}))
    with pytest.raises(TruthError, match="not one of tiny-dinov2: .* another shape"):
        dirty_checkpoint(clean(), other)
    config.write_text(json.dumps({**settings, "target_modules": ["nothing"]}))
    with pytest.raises(TruthError, match="does not fit.*nothing"):
        dirty_checkpoint(clean(), other)


def test_the_command_writes_table_numbers_and_plot(
    tower_folder, planter, tmp_path, capsys
):
    from unirefiner_hf.cli import main

    folder, _ = planter
    photos = save_images(tmp_path / "photos", 5)
    words = ["diagnose", str(tower_folder), "--images", str(photos), "--size", "24"]
    words += ["--truth", str(folder), "--device", "cpu"]
    words += ["--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png")]
    main(words)
    out = capsys.readouterr().out
    assert "5 images at 24 px" in out and "| union |" in out
    told = json.loads((tmp_path / "t.json").read_text())
    assert list(told["filters"]) == [*filters.NAMES, "union"]
    # 36 patches: ranks k/35, of which 11 reach 0.70 and 5 stay below 0.12
    assert told["shares"]["proxies"] == pytest.approx(11 / 36)
    assert told["shares"]["patterns"] == pytest.approx(5 / 36)
    assert Image.open(tmp_path / "t.png").size[0] > 300
    assert np.asarray(Image.open(tmp_path / "t.png").convert("L")).std() > 1

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ah_layers: null\nfpgp_cosine: 0.3\nlearning_rate: 1e-3\n")
    main([*words, "--config", str(recipe)])
    other = json.loads((tmp_path / "t.json").read_text())
    assert list(other["filters"]) == [*filters.FPGP, "detectors", "union"]
    assert other["filters"]["fpgp_strip"]["default"]["limit"] == 0.3
    recipe.write_text("method: plain\n")
    assert main([*words, "--config", str(recipe)]) != 0
    assert "method plain, which has no filters" in capsys.readouterr().err


def test_settings_move_the_limits(tower_folder, planter, tmp_path):
    folder, _ = planter
    photos = [load_rgb(p) for p in save_images(tmp_path / "photos", 2).iterdir()]
    settings = UniRefinerSettings(ah_layers=[1, 1])
    told = {}
    for sigma in (0.5, 3.0):
        changed = replace(settings, fpgp_sigma=sigma)
        clean = load_checkpoint(str(tower_folder))
        told[sigma] = measure_truth(clean, folder, photos, 24, changed)
    low, high = (t.filters["fpgp_strip"] for t in told.values())
    assert high.default.marked < low.default.marked
    assert high.sweep == low.sweep
    assert high.default in [replace(a, limit=3.0) for a in low.sweep]
    report = told[0.5]
    assert truth_table(report).count("\n") == 7
    lines = plot_truth(report.filters, report.planted).axes[0].get_legend().get_texts()
    assert [line.get_text() for line in lines] == [*report.filters, "blind"]
    with pytest.raises(ValueError, match="no images"):
        measure_truth(load_checkpoint(str(tower_folder)), folder, [], 24)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--plot", "x.png"], "--plot draws what --truth measures"),
        (["--config", "dinov2/small"], "--config is of the filters that --truth"),
        (["--truth", "x", "--labels", "y"], "--labels has no meaning with --truth"),
    ],
)
def test_options_that_do_not_go_together(
    tower_folder, tmp_path, extra, message, capsys
):
    from unirefiner_hf.cli import main

    words = ["diagnose", str(tower_folder), "--images", str(tmp_path), *extra]
    assert main(words) != 0
    assert message in capsys.readouterr().err
