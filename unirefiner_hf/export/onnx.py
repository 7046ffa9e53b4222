"""A refined model as a graph for other runtimes: `torch.export` and ONNX.

The graph takes ``pixel_values`` (batch, 3, height, width) of any height and width that
are multiples of the patch size and gives ``feature_map`` (batch, hidden, h, w). The
register width is fixed in it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..modeling.errors import MissingLibraryError, UniRefinerError
from ..modeling.modeling_unirefiner import UniRefinerModel
from ..outputs import UNFINISHED, OutputError, check_file, flush

ONE_SHAPE = {
    "radio": "its position embeddings are cropped by whichever side is longer",
}
"""Model type of a tower -> why its graph cannot take images of every shape."""

ONE_BATCH = ("siglip2_vision_model",)
"""Model types of towers that loop over the images of a batch: its size is fixed."""


class FeatureMap(nn.Module):
    """The model as a function of one tensor that returns one: its feature map."""

    def __init__(self, model: UniRefinerModel, register_width: int | None = None):
        super().__init__()
        self.model = model
        self.register_width = register_width

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values, self.register_width).feature_map


class _FirstToken(nn.Module):
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return tokens[:, 0]


@contextmanager
def _without_pooling(model: UniRefinerModel) -> Iterator[None]:
    """Take out a head that pools over tokens: its output is not wanted here.

    `nn.MultiheadAttention` in it would also tell a batch of one from others.
    """
    path = model.family.pooling_head
    if path is None or not model.family.pools_over_patches(model.config.vision_config):
        yield
        return
    head = model.tower.get_submodule(path)
    model.tower.set_submodule(path, _FirstToken())
    try:
        yield
    finally:
        model.tower.set_submodule(path, head)


def export_program(
    model: UniRefinerModel,
    *,
    register_width: int | None = None,
    batch: int | None = None,
    max_patches: int = 256,
) -> ExportedProgram:
    """The model as one graph, for any height and width.

    Args:
        model: in eval mode, on the device and in the dtype that the graph shall have.
        register_width: border in patches; None takes the config's.
        batch: the only size of batch that the graph takes; None: any, except for
            SigLIP 2 NaFlex, which needs a number.
        max_patches: longest side in patches, without the border.

    Raises:
        UniRefinerError: a model in training mode, a tower whose graph depends on the shape of
            the image, one that needs `batch`, or a border that is drawn.
    """
    kind = model.config.vision_config.model_type
    if model.training:
        raise UniRefinerError("the model is in training mode: call model.eval() first.")
    if kind in ONE_SHAPE:
        raise UniRefinerError(
            f"a {kind} tower cannot be exported for any height and width: "
            f"{ONE_SHAPE[kind]}. torch.export.export(FeatureMap(model), (pixels,)) gives "
            "a graph for the one size of `pixels`."
        )
    if kind in ONE_BATCH and batch is None:
        raise UniRefinerError(
            f"a {kind} tower loops over the images of a batch: give the one size that "
            "the graph shall take, for instance batch=1."
        )
    width = model.config.register_width if register_width is None else register_width
    if width > 0 and model.config.register_fill in ("randn", "rand"):
        raise UniRefinerError(
            f"register_fill={model.config.register_fill!r} is drawn for the size of each "
            "image, which a graph cannot do from a fixed seed. Export a model with a "
            "'zero' or 'learnable' border, or register_width=0."
        )
    patch = model.patch_size
    sides = {
        2: patch * Dim("rows", min=2, max=max_patches),
        3: patch * Dim("columns", min=2, max=max_patches),
    }
    shapes: dict[int, Any] = dict(sides)
    if batch is None:
        shapes[0] = Dim("batch", min=1, max=4096)
    # Neither square nor the tower's own grid, so that no size is taken for granted.
    example = torch.zeros(
        2 if batch is None else batch,
        3,
        6 * patch,
        5 * patch,
        dtype=model.dtype,
        device=model.device,
    )
    with torch.no_grad(), _without_pooling(model):
        # Strict: Python's int() of a size, which towers use, would fix the size.
        return torch.export.export(
            FeatureMap(model, register_width),
            (example,),
            dynamic_shapes={"pixel_values": shapes},
            strict=True,
        )


def export_onnx(model: UniRefinerModel, file: str | Path, **options: Any) -> Path:
    """Write the model as ONNX; needs ``pip install "unirefiner_hf[onnx]"``.

    Args:
        file: to write, its name ending in ``.onnx``; weights of more than 2 GB need a second
            file beside it, which `torch.onnx` writes. Graphs of these names are replaced,
            each of the two files whole.
        options: see `export_program`.

    Raises:
        MissingLibraryError: without onnx and onnxscript.
        OutputError: another ending, or a file that cannot be written.
        UniRefinerError: as in `export_program`.
    """
    target = check_file(file)
    if target.suffix != ".onnx":
        raise OutputError(f"{file} does not end in .onnx: name it so.")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingLibraryError(
            f'ONNX export needs {error.name}: pip install "unirefiner_hf[onnx]"'
        ) from error
    program = export_program(model, **options)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f".{target.name}.", suffix=UNFINISHED
    ) as scratch:
        torch.onnx.export(
            program,
            (),
            str(Path(scratch, target.name)),
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["feature_map"],
            external_data=size > 1_900_000_000,
            verbose=False,
        )
        # The graph last: it names the file of the weights.
        for written in sorted(
            Path(scratch).iterdir(), key=lambda f: f.name == target.name
        ):
            flush(written)
            os.replace(written, target.with_name(written.name))
    return target


__all__ = ["ONE_BATCH", "ONE_SHAPE", "FeatureMap", "export_onnx", "export_program"]
