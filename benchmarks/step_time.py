"""Seconds a step, tower passes a step and peak memory of the UniRefiner objective.

Beside it, in the same run and each in a process of its own, a plain reading of the method:
two copies of the tower, the reference image encoded at every step, queries and keys of every
layer recorded in every pass, whole batches, the relation pass like any other student pass.
A third reading is ours with gradient checkpointing.
Both take the same views, filters and losses, so the difference is in the passes. The ratio
is the result; seconds depend on the machine.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --model facebook/dinov2-base --size 518 --batch 8 \
        --device cuda --dtype bfloat16

Without --model the tower is a DINOv2-small with random weights (weights do not change
speed). Memory is the peak above the interpreter with its imports: resident memory on a CPU,
allocated memory on a GPU. A step is forward, backward and AdamW; rounds of the readings
alternate, and the fastest round of each counts, since other load only slows.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from unirefiner_hf.loading.lora import lora_targets
from unirefiner_hf.methods.unirefiner.objective import TeacherViews, UniRefiner
from unirefiner_hf.methods.unirefiner.settings import UniRefinerSettings
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.modeling.towers import load_tower
from unirefiner_hf.spurious import composites
from unirefiner_hf.spurious.diagnose import middle_layers

PLAIN, OURS, RECOMPUTING = "plain", "ours", "ours with gradient checkpointing"
COMPARED = ("seconds_a_step", "peak_memory_mb")


class PlainObjective(UniRefiner):
    """The same step, read plainly: nothing shared, nothing cached, everything recorded."""

    def __init__(self, model: UniRefinerModel, teacher: UniRefinerModel, *args: Any):
        super().__init__(model, *args)
        self.teacher = teacher.requires_grad_(False).eval()
        self.all_layers = tuple(range(model.config.num_hidden_layers))

    def teacher_views(
        self, pixel_values: Tensor, crops: Tensor, side: str
    ) -> TeacherViews:
        height, width = pixel_values.shape[-2:]
        patch = self.model.patch_size
        grid = (height // patch, width // patch)
        ratio = self.settings.strip_ratio
        reference, _ = self.reference_views(height, width)
        with torch.no_grad():
            images = composites.add_strip(crops, reference, side, patch, ratio)
            composite = self.teacher.encode(images, 0, self.all_layers)
            full = self.teacher.encode(pixel_values, 0, self.all_layers)
        crop, strip = composites.split_strip(composite.image, grid, side, ratio)
        flow = [
            tuple(composites.split_strip(x, grid, side, ratio)[0] for x in pair)
            for layer, pair in composite.queries_keys.items()
            if layer in self.settings.flow_layers
        ]
        crop = self.unit(crop)
        return TeacherViews(
            image=self.unit(full.image),
            crop=crop,
            source=crop,
            strip=self.unit(strip),
            flow=[(queries, keys) for queries, keys in flow],
        )

    def reference_views(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            tokens = self.teacher.encode(self.reference, 0, self.all_layers).image
        return self.reference, self.unit(tokens)

    def encode(self, images: Tensor, register_width: int) -> Tensor:
        return self.model.encode(images, register_width, self.all_layers).image

    def without_gradient(self) -> Any:
        return torch.no_grad()


def build(reading: str, options: argparse.Namespace) -> UniRefiner:
    """The objective on the tower the options name, on its device."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    if options.model:
        tower = load_tower(options.model, dtype=dtype)
    else:
        config = Dinov2Config(
            hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14
        )
        tower = Dinov2Model(config).to(dtype)
    model = UniRefinerModel.from_tower(tower)
    teacher = copy.deepcopy(model) if reading == PLAIN else None
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.1, target_modules=lora_targets(tower)
    )
    model.tower = get_peft_model(tower, lora)
    if reading == RECOMPUTING:
        model.tower.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    settings = UniRefinerSettings(
        ah_layers=middle_layers(tower.config.num_hidden_layers),
        no_grad_batch=options.no_grad_batch,
    )
    reference = torch.randn(1, 3, options.size, options.size)
    objective: UniRefiner
    if teacher is not None:
        objective = PlainObjective(model, teacher, settings, reference)
    else:
        objective = UniRefiner(model, settings, reference)
    return objective.to(options.device).train()


def count_passes(objective: UniRefiner, step: Callable[[], None]) -> dict[str, float]:
    """Tower forwards of one step: calls, and images and patch tokens they carried."""
    counts = {"calls": 0.0, "images": 0.0, "tokens": 0.0}

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        counts["calls"] += 1
        counts["images"] += output.shape[0]
        counts["tokens"] += output.shape[0] * output.shape[1]

    handles = [
        module.register_forward_hook(count)
        for name, module in objective.named_modules()
        if name.endswith(f"{objective.model.family.layers}.0")
    ]
    step()
    for handle in handles:
        handle.remove()
    return counts


def peak_memory(device: str) -> float:
    """Peak so far in MB: resident on a CPU, allocated on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def serve(reading: str, options: argparse.Namespace, pipe: Any) -> None:
    """Build one reading, then run a round of steps whenever asked."""
    base = peak_memory(options.device)
    objective = build(reading, options)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    images = torch.randn(options.batch, 3, options.size, options.size)
    images = images.to(options.device)
    dtype = getattr(torch, options.dtype)

    def step() -> None:
        mixed = torch.autocast(options.device, dtype)
        with mixed if dtype != torch.float32 else nullcontext():
            loss = objective(images, 1.0)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    step()
    passes = count_passes(objective, step)
    pipe.send(passes)
    while pipe.recv() == "round":
        times = []
        for _ in range(options.steps):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        pipe.send(statistics.mean(times))
    pipe.send(peak_memory(options.device) - base)


def matrix_rate(device: str, dtype: torch.dtype, side: int = 2048) -> float:
    """GFLOP/s of one large matrix product: what the machine could do at best."""
    left, right = torch.randn(2, side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds) / 1e9


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Every reading, rounds alternating."""
    context = multiprocessing.get_context("spawn")
    readings: dict[str, tuple[Any, Any, dict[str, float], list[float]]] = {}
    for name in (PLAIN, OURS, RECOMPUTING):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(name, options, theirs))
        process.start()
        readings[name] = (ours, process, ours.recv(), [])
    for _ in range(options.rounds):
        for pipe, _, _, times in readings.values():
            pipe.send("round")
            times.append(pipe.recv())
    results = {}
    for name, (pipe, process, passes, times) in readings.items():
        pipe.send("stop")
        results[name] = {
            "seconds_a_step": min(times),
            "peak_memory_mb": pipe.recv(),
            **{f"tower_{key}_a_step": value for key, value in passes.items()},
        }
        process.join()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="Hub id or folder of a tower")
    parser.add_argument(
        "--size", type=int, default=224, help="side of the images, pixels"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--no-grad-batch", type=int, help="see UniRefinerSettings")
    parser.add_argument("--json", help="also write the result to this file")
    options = parser.parse_args()
    rate = matrix_rate(options.device, getattr(torch, options.dtype))
    print(f"matrix products: {rate:.0f} GFLOP/s")
    results = measure(options)
    for name, result in results.items():
        print(name, {key: round(value, 3) for key, value in result.items()})
    ratios = {
        name: {key: results[name][key] / results[PLAIN][key] for key in COMPARED}
        for name in (OURS, RECOMPUTING)
    }
    for name, ratio in ratios.items():
        print(
            f"{name} / {PLAIN}", {key: round(value, 3) for key, value in ratio.items()}
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"options": vars(options), **results, "ratios": ratios}, file, indent=2
            )


if __name__ == "__main__":
    main()
