"""What the frame costs at inference: the refined model beside its bare tower, by image size.

    python -m benchmarks.inference_overhead
    python -m benchmarks.inference_overhead --model user/name-unirefined --device cuda \
        --dtype bfloat16 --batch 16

Without --model the tower is a DINOv2-small with random weights. Each round runs, in turn, the
bare tower, the tower on images that already have the frame's size, and the refined model; the
ratios are taken within a round, and their median over the rounds is reported. `refined / tower`
is what a user pays; `refined / framed tower` is what our code adds to the larger image. Beside
them what to expect: the ratio of tokens, and that of operations (matrix products and attention,
counted by PyTorch). With --threads 1 seconds are CPU time, which other load on the machine
disturbs less. Memory is the most the allocator held during a pass above the weights and
the images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.modeling.towers import tower_inputs

from . import allocator

TOWER, FRAMED, REFINED = "tower", "framed tower", "refined"


def build(options: argparse.Namespace) -> UniRefinerModel:
    """The refined model the options name, on their device."""
    dtype = getattr(torch, options.dtype)
    if options.model:
        model = UniRefinerModel.from_pretrained(options.model, dtype=dtype)
    else:
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14
        )
        model = UniRefinerModel.from_tower(Dinov2Model(config), dtype=dtype)
    return model.to(options.device).eval()


def passes(
    model: UniRefinerModel, size: int, options: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """One function for each reading, on images of `size` pixels."""
    margin = 2 * options.register_width * model.patch_size

    def images(side: int) -> Tensor:
        return torch.randn(
            options.batch, 3, side, side, device=options.device, dtype=model.dtype
        )

    def tower(pixels: Tensor) -> Any:
        return model.tower(**tower_inputs(model.family, pixels, model.patch_size))

    plain, framed = images(size), images(size + margin)
    return {
        TOWER: lambda: tower(plain),
        FRAMED: lambda: tower(framed),
        REFINED: lambda: model(plain, register_width=options.register_width),
    }


def seconds(run: Callable[[], Any], device: str) -> float:
    """Seconds of a pass: of CPU time on a CPU with one thread, else by the clock."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def operations(run: Callable[[], Any]) -> int:
    """Floating point operations of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most bytes the allocator held during a pass above those before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    return allocator.peak_bytes(run)


@torch.inference_mode()
def measure(
    model: UniRefinerModel, size: int, options: argparse.Namespace
) -> dict[str, float]:
    """Ratios of one image size."""
    readings = passes(model, size, options)
    for run in readings.values():
        run()
    rounds = [
        {name: seconds(run, options.device) for name, run in readings.items()}
        for _ in range(options.rounds)
    ]
    counted = {name: operations(run) for name, run in readings.items()}
    peaks = {name: peak_bytes(run, options.device) for name, run in readings.items()}

    def middle(over: str, under: str) -> float:
        return statistics.median(times[over] / times[under] for times in rounds)

    prefix = model.family.num_prefix_tokens(model.config.vision_config)
    side = size // model.patch_size
    framed = side + 2 * options.register_width
    return {
        "size": size,
        "tokens": prefix + side**2,
        "tower_seconds": statistics.median(times[TOWER] for times in rounds),
        "tokens_ratio": (prefix + framed**2) / (prefix + side**2),
        "operations_ratio": counted[REFINED] / counted[TOWER],
        "time_ratio": middle(REFINED, TOWER),
        "framed_time_ratio": middle(FRAMED, TOWER),
        "wrapper_time_ratio": middle(REFINED, FRAMED),
        "tower_peak_mb": peaks[TOWER] / 1e6,
        "memory_ratio": peaks[REFINED] / peaks[TOWER],
        "wrapper_memory_ratio": peaks[REFINED] / peaks[FRAMED],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="Hub id or folder of a refined model")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[224, 336, 448, 560, 672],
        help="sides of the images, pixels; multiples of the patch size",
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--register_width", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", help="also write the result to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = build(options)
    results = []
    for size in options.sizes:
        results.append(measure(model, size, options))
        print({key: round(value, 3) for key, value in results[-1].items()}, flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
