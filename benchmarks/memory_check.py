"""The estimate's memory figure beside the memory of real steps, on the CPU.

    python -m benchmarks.memory_check

Each tower has random weights and runs two real steps (forward, backward, AdamW) in a process
of its own. Measured are the most bytes PyTorch's allocator held at once (its own events, read
with torch.profiler: exact, the same at every run) and the resident memory of the process at
its highest, above the same process after a tiny step (the C library is told to give freed
blocks back at once, else they count too). The estimate is `dry_step` plus AdamW's two moments.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import multiprocessing
import os
import resource
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from unirefiner_hf.estimation.dry_run import dry_step
from unirefiner_hf.loading.lora import add_adapter
from unirefiner_hf.methods.unirefiner.objective import UniRefiner
from unirefiner_hf.methods.unirefiner.settings import UniRefinerSettings
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel

from .allocator import peak_bytes

ALLOCATED, RESIDENT, ESTIMATED = "allocated", "resident", "estimated"


@dataclasses.dataclass(frozen=True)
class Case:
    """One tower and how it is trained."""

    config: PreTrainedConfig
    size: int
    batch: int
    ah_layers: list[int] | None = None
    checkpointing: bool = False
    no_grad_batch: int | None = None
    attention: str = "sdpa"


SMALL = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224)
CLIP = CLIPVisionConfig(
    hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_hidden_layers=8
)
SIGLIP_B = SiglipVisionConfig(image_size=512, patch_size=16)
CASES = {
    "DINOv2-small, 224 px, batch 4": Case(SMALL, 224, 4, [5, 6]),
    "the same, checkpointing": Case(SMALL, 224, 4, [5, 6], True),
    "the same, eager attention": Case(SMALL, 224, 2, None, attention="eager"),
    "CLIP, 8 layers of 512, 224 px, batch 4": Case(CLIP, 224, 4, None, no_grad_batch=8),
    "SigLIP-B, 256 px, batch 2": Case(SIGLIP_B, 256, 2),
    "SigLIP-B, 384 px, batch 1, checkpointing": Case(SIGLIP_B, 384, 1, [6, 8], True),
}


def build(case: Case) -> UniRefinerModel:
    """The tower with random weights, its adapter on, on the default device."""
    tower = AutoModel.from_config(case.config, attn_implementation=case.attention)
    model = UniRefinerModel.from_tower(tower)
    model.tower = add_adapter(tower)
    return model


def settings_of(case: Case) -> UniRefinerSettings:
    return UniRefinerSettings(
        ah_layers=case.ah_layers, no_grad_batch=case.no_grad_batch
    )


def estimated_bytes(case: Case) -> int:
    """The peak `unirefiner estimate` would give."""
    with torch.device("meta"):
        model = build(case)
    cost = dry_step(
        model,
        settings_of(case),
        image_size=case.size,
        batch=case.batch,
        as_on_gpu=False,
        checkpointing=case.checkpointing,
    )
    return cost.peak_bytes + 8 * cost.trainable


def real_steps(case: Case) -> tuple[Callable[[], None], int]:
    """A function that makes one step, and the bytes held before it."""
    torch.manual_seed(0)
    model = build(case)
    reference = torch.randn(1, 3, case.size, case.size)
    objective = UniRefiner(model, settings_of(case), reference).train()
    if case.checkpointing:
        objective.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    pixels = torch.randn(case.batch, 3, case.size, case.size)

    def step() -> None:
        objective(pixels, 1.0)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    moments = 8 * sum(p.numel() for p in trained)
    kept = {t.data_ptr(): t.nbytes for t in (*objective.parameters(), pixels)}
    kept |= {t.data_ptr(): t.nbytes for t in objective.buffers()}
    tokens = objective.reference_views(case.size, case.size)[1]
    return step, sum(kept.values()) + tokens.nbytes + moments


def allocated_bytes(case: Case) -> int:
    """The most bytes PyTorch's allocator holds during a step."""
    step, before = real_steps(case)
    return peak_bytes(step, before)


def resident_bytes(case: Case) -> int:
    """Highest resident memory above that of a process that made a tiny step before."""
    tiny = dataclasses.replace(case, config=copy.deepcopy(case.config), batch=1)
    tiny.config.update({"num_hidden_layers": 2, "hidden_size": 24})
    tiny.config.update({"num_attention_heads": 2, "intermediate_size": 48})
    tiny = dataclasses.replace(tiny, size=64, ah_layers=case.ah_layers and [0, 1])
    tiny.config.patch_size = 16
    real_steps(tiny)[0]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, _ = real_steps(case)
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


MEASURES: dict[str, Callable[[Case], int]] = {
    ALLOCATED: allocated_bytes,
    RESIDENT: resident_bytes,
    ESTIMATED: estimated_bytes,
}


def _serve(measure: str, name: str, pipe: Any) -> None:
    pipe.send(MEASURES[measure](CASES[name]))


def measure_apart(measure: str, name: str) -> int:
    """The measure in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(measure, name, theirs))
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    process.start()
    value = ours.recv()
    process.join()
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(f"{'MB':42} {'estimated':>9} {'allocated':>9} {'resident':>9}   ratios")
    for name in CASES:
        values = {key: measure_apart(key, name) / 1e6 for key in MEASURES}
        estimated = values[ESTIMATED]
        ratios = [estimated / values[key] for key in (ALLOCATED, RESIDENT)]
        print(
            f"{name:42} {estimated:9.0f} {values[ALLOCATED]:9.0f} "
            f"{values[RESIDENT]:9.0f}   {ratios[0]:.3f} {ratios[1]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
