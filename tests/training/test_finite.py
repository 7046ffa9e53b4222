"""A run stops where its numbers mean nothing, before they are saved."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.conftest import refine
from unirefiner_hf import UniRefinerTrainer, merge
from unirefiner_hf.cli import main
from unirefiner_hf.errors import UniRefinerError
from unirefiner_hf.training import finite
from unirefiner_hf.training.finite import AllRejectedError, NonFiniteError, Rejections


def make_trainer(arguments):
    model, data, args, method = arguments()
    return UniRefinerTrainer(model, args, data, method)


def test_base_weights_that_are_nan_are_named(arguments, tower_folder, tmp_path):
    base = shutil.copytree(tower_folder, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["layernorm.weight"][0] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UniRefinerError, match="base hold NaN.*layernorm.weight"
    ) as said:
        refine(*arguments(model={"model": str(base)}))
    assert "learning rate" not in str(said.value)
    assert not (tmp_path / "run").exists()


def test_gradients_that_are_infinite_stop_before_the_weights_change(arguments):
    trainer = make_trainer(arguments)
    parameters = dict(trainer.model.named_parameters())
    name = next(n for n, p in parameters.items() if "lora_B" in n)
    before = parameters[name].detach().clone()

    def explode(gradient):
        return gradient * torch.inf if trainer.state.global_step == 1 else gradient

    parameters[name].register_hook(explode)
    changed = []
    step = trainer.create_optimizer().step
    trainer.optimizer.step = lambda *a, **k: changed.append(1) or step(*a, **k)
    with pytest.raises(NonFiniteError, match=r"^Step 2: the gradients.*not updated"):
        trainer.train()
    assert len(changed) == 1 and not torch.equal(before, parameters[name].detach())
    assert torch.isfinite(parameters[name]).all()
    assert not (trainer.folder / "checkpoint-2").exists()


def test_weights_that_are_not_finite_are_not_saved(arguments):
    trainer = make_trainer(arguments)
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    step = trainer.create_optimizer().step

    def broken(*args, **kwargs):
        step(*args, **kwargs)
        with torch.no_grad():
            parameter.fill_(torch.nan)

    trainer.optimizer.step = broken
    with pytest.raises(
        UniRefinerError, match="They were not saved|The weights were not"
    ):
        trainer.train()
    assert not list(trainer.folder.glob("checkpoint-*"))
    assert not (trainer.folder / "adapter").exists()


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ({"fpgp_cosine": -1.0}, "raise fpgp_sigma .or fpgp_cosine"),
        ({"detector_cosine": -1.0, "fpgp_filter": False}, "raise detector_cosine"),
    ],
)
def test_filters_that_reject_everything_stop_the_run(
    method, remedy, arguments, monkeypatch
):
    monkeypatch.setattr(finite, "REJECTED", 3)
    with pytest.raises(AllRejectedError, match=f"^Step 3: .*100%.*{remedy}"):
        refine(*arguments(method=method))


def test_only_batches_in_a_row_count(monkeypatch):
    monkeypatch.setattr(finite, "REJECTED", 3)
    count = Rejections()
    zero, some = {"clean_ratio": torch.zeros(())}, {"clean_ratio": torch.tensor(0.1)}
    said = [
        count.too_many(o) for o in (zero, zero, some, zero, zero, {}, zero, zero, zero)
    ]
    assert said == [False] * 8 + [True]


def test_a_run_of_weights_that_are_nan_is_not_merged(arguments, tower_folder, tmp_path):
    run = refine(*arguments(max_steps=1))
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({k: v * torch.nan for k, v in weights.items()}, file)
    with pytest.raises(UniRefinerError, match="adapter_model.safetensors hold NaN"):
        merge(run, tmp_path / "out", model=tower_folder)
    assert not (tmp_path / "out").exists()
    save_file({k: v + 300 for k, v in weights.items()}, file)  # 300 * 300 * 8 > 65504
    with pytest.raises(UniRefinerError, match="merged weights in float16 hold NaN"):
        merge(run, tmp_path / "out", model=tower_folder, dtype="float16")
    assert not (tmp_path / "out").exists()
    assert json.loads((run / "run.json").read_text())["finished"]


def test_one_patch_a_side_is_refused_at_once(
    tower_folder, image_folder, tmp_path, capsys
):
    words = ["refine", "--model", str(tower_folder), "--data", str(image_folder)]
    words += ["--image_size", "4", "--use_cpu", "true", "--output_dir"]
    assert main([*words, str(tmp_path / "run")]) == 2
    assert "image_size is 4, a single patch: use 8" in capsys.readouterr().err
