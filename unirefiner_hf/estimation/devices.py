"""What the devices a run may use can do, as their makers publish it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from ..errors import UniRefinerError

TERA, GIGA = 1e12, 1e9
GPU_EFFICIENCY, CPU_EFFICIENCY = 0.4, 0.7


@dataclass(frozen=True)
class Device:
    """One GPU, or the processor of this machine.

    Attributes:
        float8, bfloat16, tf32, float32: floating point operations a second of dense matrix
            products with float32 accumulation; tf32: float32 products on tensor cores;
            float8: 0 where there are none.
        memory: bytes.
        link: bytes a second to another device of the machine, one way.
        efficiency: share of these rates a training step reaches, unless told.
    """

    name: str
    float8: float
    bfloat16: float
    tf32: float
    float32: float
    memory: float
    link: float
    efficiency: float = GPU_EFFICIENCY

    def rate(self, dtype: torch.dtype, allow_tf32: bool = False) -> float:
        """Operations a second of products of this type."""
        if dtype in (torch.bfloat16, torch.float16):
            return self.bfloat16
        return self.tf32 if allow_tf32 else self.float32


def _gpu(
    name: str,
    float8: float,
    bfloat16: float,
    tf32: float,
    float32: float,
    memory: float,
    link: float,
) -> Device:
    rates = float8 * TERA, bfloat16 * TERA, tf32 * TERA, float32 * TERA
    return Device(name, *rates, memory * GIGA, link * GIGA)


# Dense TFLOP/s in float8, bfloat16, TF32 and float32, memory in GB, link in GB/s one way. Sources:
# NVIDIA's data sheets of each product (where a sheet gives rates "with sparsity", half of
# them; NVLink and PCIe halved where both directions are added up). RTX: NVIDIA's "Ada GPU
# architecture", "GA102" and "RTX Blackwell" white papers, rates with float32 accumulation.
GPUS = {
    device.name: device
    for device in (
        _gpu("b200", 4500, 2250, 1125, 75, 180, 900),
        _gpu("h200", 1979, 989, 494, 67, 141, 450),
        _gpu("h100", 1979, 989, 494, 67, 80, 450),
        _gpu("h100-pcie", 1513, 756, 378, 51, 80, 64),
        _gpu("a100", 0, 312, 156, 19.5, 80, 300),
        _gpu("a100-40gb", 0, 312, 156, 19.5, 40, 300),
        _gpu("l40s", 733, 362, 183, 91.6, 48, 32),
        _gpu("a6000", 0, 155, 77, 38.7, 48, 32),
        _gpu("a10", 0, 125, 62.5, 31.2, 24, 32),
        _gpu("l4", 242, 121, 60, 30.3, 24, 32),
        _gpu("5090", 419, 209, 105, 105, 32, 64),
        _gpu("4090", 330, 165, 82.6, 82.6, 24, 32),
        _gpu("3090", 0, 71, 35.6, 35.6, 24, 32),
    )
}


def find_device(name: str) -> Device:
    """The device of this name; ``cpu`` is the processor of this machine, measured.

    Raises:
        UniRefinerError: an unknown name; lists those there are.
    """
    if name == "cpu":
        return this_processor()
    if name not in GPUS:
        known = ", ".join([*GPUS, "cpu"])
        raise UniRefinerError(f"gpu is {name!r}; known are {known}.")
    return GPUS[name]


def this_processor() -> Device:
    """This machine's processor: its rate from a matrix product, its memory as built in."""
    half, full = _product_rate(torch.bfloat16), _product_rate(torch.float32)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", 0, half, full, full, memory, 10 * GIGA, CPU_EFFICIENCY)


def _product_rate(dtype: torch.dtype, side: int = 1024) -> float:
    left, right = torch.ones(2, side, side, dtype=dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)
