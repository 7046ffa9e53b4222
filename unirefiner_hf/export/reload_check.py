"""The folder about to be published gives the tokens of the trained model."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.images import default_reference
from ..errors import UniRefinerError
from ..loading.backbone import Backbone
from ..modeling.modeling_unirefiner import UniRefinerModel
from ..resources import PACKAGE
from . import fresh_process

RELOAD_LIMIT = 1e-3
"""Relative error allowed between the saved weights in memory and reloaded."""
MERGE_LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative error allowed between the adapter on the base and the saved weights.

In float32 the two differ by the order of the additions alone; below that, each weight is
rounded once (relative 2^-11 and 2^-9) and the layers add it up.
"""


class ReloadError(UniRefinerError, RuntimeError):
    """The written checkpoint does not give the tokens of the trained model."""


@dataclass(frozen=True)
class ReloadReport:
    """Relative errors of the tokens, ``|a - b| / |b|`` over all of them.

    Attributes:
        merged: saved weights against the adapter on the base.
        reloaded: way of loading -> folder in a fresh process against saved weights.
    """

    merged: float
    reloaded: dict[str, float]


def example_pixels(base: Backbone) -> Tensor:
    """The reference photograph as the backbone takes it, ``(1, 3, height, width)``."""
    return base.reading(default_reference(), base.image_size).unsqueeze(0)


def encode(model: UniRefinerModel, pixels: Tensor, *, native: bool) -> Tensor:
    """Patch tokens ``(1, patches, hidden)``; without the border for a native export."""
    width = 0 if native else None
    with torch.no_grad():
        return model.eval()(pixels, register_width=width).last_hidden_state.float()


def check_reload(
    folder: Path,
    base: Backbone,
    trained: Tensor,
    pixels: Tensor,
    *,
    dtype: torch.dtype,
    native: bool,
) -> ReloadReport:
    """Compare the written folder with the trained model.

    Args:
        folder: as `export_refined` wrote it.
        base: whose model is merged by now, in `dtype`.
        trained: tokens of the adapter on the base, before the merge.
        pixels: what they were computed from.

    Raises:
        ReloadError: the folder does not load in a fresh process, or an error is above
            its limit.
    """
    saved = encode(base.model.float(), pixels, native=native)
    merged = relative_error(saved, trained)
    if not merged <= MERGE_LIMITS[dtype]:
        raise ReloadError(
            f"The merged weights give tokens {merged:.1e} away from the trained model's "
            f"(allowed in {str(dtype).removeprefix('torch.')}: {MERGE_LIMITS[dtype]:.0e}). "
            "Nothing was uploaded."
        )
    reloaded = {}
    for code in ("package",) if native else ("package", "remote"):
        again = _encode_in_fresh_process(folder, pixels, code, base)
        reloaded[code] = relative_error(again, saved)
        if not reloaded[code] <= RELOAD_LIMIT:
            raise ReloadError(
                f"{folder.name} reloaded in a fresh process ({code} code) gives tokens "
                f"{reloaded[code]:.1e} away from what was saved (allowed: "
                f"{RELOAD_LIMIT:.0e}). Nothing was uploaded."
            )
    return ReloadReport(merged, reloaded)


def relative_error(tokens: Tensor, expected: Tensor) -> float:
    """``|tokens - expected| / |expected|``; NaN where either holds one."""
    if tokens.shape != expected.shape:
        return float("inf")
    return ((tokens - expected).norm() / expected.norm()).item()


def _encode_in_fresh_process(
    folder: Path, pixels: Tensor, code: str, base: Backbone
) -> Tensor:
    """Raises `ReloadError` with the end of what the process said, if it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        given, result = Path(scratch, "pixels"), Path(scratch, "tokens")
        save_file({"pixels": pixels.contiguous()}, given)
        norm = str(base.model.config.final_norm)
        script = str(fresh_process.__file__)
        path = os.pathsep.join(
            filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])
        )
        done = subprocess.run(
            [sys.executable, script, str(folder), str(given), str(result), code, norm],
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "HF_MODULES_CACHE": str(Path(scratch, "modules")),
                "PYTHONPATH": path,
            },
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise ReloadError(
                f"{folder.name} does not load in a fresh process ({code} code): "
                f"{lines[-1]} Nothing was uploaded."
            )
        return load_file(result)["tokens"]
