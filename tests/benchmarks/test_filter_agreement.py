"""The filters held against planted truth, and the command that tells it."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks import filter_agreement
from benchmarks.planting.agreement import (
    Step,
    agreement,
    compare_filters,
    detection_auc,
    filter_step,
    measure_truth,
)
from benchmarks.planting.planted import PlantedTruth, planted_truth
from benchmarks.planting.report import plot_truth, truth_table
from tests.training.conftest import save_images
from unirefiner_hf.data.images import load_rgb
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.methods.unirefiner.objective import UniRefiner
from unirefiner_hf.methods.unirefiner.settings import UniRefinerSettings
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.spurious import filters, similarity


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


def test_auc_is_sklearns():
    torch.manual_seed(0)
    scores = torch.randint(0, 20, (4, 30)).float()
    truth = torch.rand(4, 30) < 0.3
    expected = roc_auc_score(truth.flatten(), scores.flatten())
    assert detection_auc(scores, truth) == pytest.approx(expected)
    with pytest.raises(ValueError, match="both dirty and clean"):
        detection_auc(scores, torch.ones(4, 30, dtype=torch.bool))


def test_the_command_writes_table_numbers_and_plot(
    tower_folder, planter, tmp_path, capsys
):
    folder, _ = planter
    photos = save_images(tmp_path / "photos", 5)
    (photos / "notes.png").write_text("no image")
    words = [str(tower_folder), "--images", str(photos), "--size", "24"]
    words += ["--truth", str(folder), "--device", "cpu"]
    words += ["--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png")]
    filter_agreement.main(words)
    out = capsys.readouterr().out
    assert "5 images at 24 px" in out and "| union |" in out
    assert "Left out notes.png: not an image" in out
    told = json.loads((tmp_path / "t.json").read_text())
    assert told["images"] == 5 and len(told["skipped"]) == 1
    assert list(told["filters"]) == [*filters.NAMES, "union"]
    # 36 patches: ranks k/35, of which 11 reach 0.70 and 5 stay below 0.12
    assert told["shares"]["proxies"] == pytest.approx(11 / 36)
    assert told["shares"]["patterns"] == pytest.approx(5 / 36)
    assert Image.open(tmp_path / "t.png").size[0] > 300
    assert np.asarray(Image.open(tmp_path / "t.png").convert("L")).std() > 1

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ah_layers: null\nfpgp_cosine: 0.3\nlearning_rate: 1e-3\n")
    filter_agreement.main([*words, "--recipe", str(recipe), "--max_images", "2"])
    other = json.loads((tmp_path / "t.json").read_text())
    assert other["images"] == 2
    assert list(other["filters"]) == [*filters.FPGP, "detectors", "union"]
    assert other["filters"]["fpgp_strip"]["default"]["limit"] == 0.3


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
        (["--recipe", "demo", "--size", "0"], "--size: 0 is not 1 or more"),
        (["--recipe", "dinov2/small_ph_reg"], "method ph_reg, which has no filters"),
        (["--recipe", "nosuch"], "nosuch"),
        (["--images", "nowhere"], "nowhere"),
        (["--truth", "nowhere"], "nowhere holds no adapter_model.safetensors"),
        (["--labels", "y"], "unrecognized arguments: --labels y"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tower_folder, planter, tmp_path, extra, message, capsys
):
    folder, _ = planter
    photos = save_images(tmp_path / "photos", 2)
    words = [str(tower_folder), "--images", str(photos), "--truth", str(folder)]
    with pytest.raises(SystemExit) as stop:
        filter_agreement.main([*words, "--size", "24", *extra])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(tower_folder, planter, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(filter_agreement, "measure_truth", broken)
    photos = save_images(tmp_path / "photos", 2)
    words = [str(tower_folder), "--images", str(photos), "--truth", str(planter[0])]
    with pytest.raises(ZeroDivisionError, match="ours"):
        filter_agreement.main(words)


def test_a_plot_without_matplotlib_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UniRefinerError, match="pip install matplotlib"):
        plot_truth({}, 0.3)
