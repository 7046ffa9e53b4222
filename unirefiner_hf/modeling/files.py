"""Reading JSON and weights: what is wrong with a file is said of that file, in a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import UniRefinerError

CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
PATIENCE = 5
"""Seconds to wait for the Hub's first word."""
_POINTER = b"version https://git-lfs"


class FileError(UniRefinerError):
    """A file cannot be read, or does not hold what it should; the message names it."""


def read_json(file: str | Path, kind: type = dict) -> Any:
    """The content of a JSON file.

    Args:
        kind: that it has to be of, ``dict`` or ``list``.

    Raises:
        FileError: no such file, not readable, not JSON, or of another kind.
    """
    file = Path(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise _unreadable(file, problem) from problem
    except (ValueError, RecursionError) as problem:
        kind_of = _described(file) or f"not JSON ({problem})"
        raise FileError(
            f"{file} is {kind_of}: put back the one there was."
        ) from problem
    if not isinstance(content, kind):
        needed = "a JSON object, {...}" if kind is dict else "a JSON list, [...]"
        raise FileError(
            f"{file} holds {_short(content)}; it must be {needed}: put back the one "
            "there was."
        )
    return content


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """Name -> tensor of a safetensors file, on the CPU.

    Raises:
        FileError: see `check_tensors`.
    """
    check_tensors(file)
    return load_file(file)


def check_tensors(file: str | Path) -> None:
    """Refuse a safetensors file that is not whole; only its header is read.

    Raises:
        FileError: no such file, not readable, empty, cut short, a pointer of git-LFS, or
            something else.
    """
    file = Path(file)
    try:
        with file.open("rb"):
            pass
        with safe_open(str(file), framework="pt"):
            pass
    except SafetensorError as problem:
        kind_of = _described(file) or f"damaged or cut short ({problem})"
        raise FileError(
            f"{file} is {kind_of}: fetch or copy it once more."
        ) from problem
    except OSError as problem:
        raise _unreadable(file, problem) from problem


def check_model(folder: str | Path | None) -> None:
    """Refuse a folder whose config, processor or weights cannot be read; a Hub id passes.

    Weights that are not there as safetensors are left to who loads them.

    Raises:
        FileError: names the file; or no folder where a path is named, or one of timm.
    """
    if folder is None:
        return
    name, folder = str(folder), Path(folder)
    if folder.is_file():
        raise FileError(
            f"{name} is a file: name the folder that holds config.json and weights as "
            "safetensors."
        )
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise FileError(f"{name}: there is no such folder.")
        return
    if not (folder / ADAPTER).exists():
        config = read_json(folder / CONFIG)
        if "model_type" not in config and "architecture" in config:
            raise FileError(
                f"{folder / CONFIG} is of timm ({config['architecture']!r}), whose models "
                "are not supported: name the same backbone as transformers has it, such as "
                "facebook/dinov2-base."
            )
    for processor in PROCESSORS:
        if (folder / processor).exists():
            read_json(folder / processor)
    names = {WEIGHTS} if (folder / WEIGHTS).exists() else set()
    if not names and (folder / INDEX).exists():
        table = read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise FileError(
                f"{folder / INDEX} has no weight_map: put back the whole one."
            )
        names = set(map(str, table.values()))
    for name in sorted(names):
        if name.endswith(".safetensors"):
            check_tensors(folder / name)


def check_reachable(name: str, revision: str | None = None) -> None:
    """Refuse a Hub id that is not in the cache while the Hub cannot be reached.

    It takes seconds; the Hub's own client tries for half a minute.

    Raises:
        FileError: names the id.
    """
    if Path(name).is_dir() or constants.is_offline_mode():
        return
    if isinstance(try_to_load_from_cache(name, CONFIG, revision=revision), str):
        return
    for attempt in range(2):
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        except Exception as problem:
            if attempt:
                raise FileError(
                    f"{name} is no folder here and not in the cache, and the Hub "
                    f"({constants.ENDPOINT}) cannot be reached: {problem}. Check the name "
                    "and the connection."
                ) from problem
        else:
            return


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str, remedy: str) -> None:
    """Refuse numbers that are NaN or infinite.

    Args:
        tensors: names and values; integers and those without data pass.
        what: whose they are, as the sentence begins.
        remedy: what to do, a sentence.

    Raises:
        UniRefinerError: tells how many tensors hold some, and the first by name.
    """
    broken = [name for name, value in tensors if not _is_finite(value)]
    if broken:
        raise UniRefinerError(
            f"{what} hold NaN or infinite numbers: {len(broken)} tensors, the first is "
            f"{broken[0]}. {remedy}"
        )


def check_finite_weights(model: nn.Module, name: str) -> None:
    """Refuse a loaded model whose weights are not finite.

    Raises:
        UniRefinerError: names the checkpoint and the first such weight.
    """
    check_finite(
        model.state_dict().items(),
        f"The weights of {name}",
        "Nothing can be learnt or measured with them: take another copy of the checkpoint.",
    )


def refuse_report(
    report: Mapping[str, Any], name: str, kind: str, known: Iterable[str] = ()
) -> None:
    """Refuse what transformers' report of a loading says was amiss.

    Args:
        kind: class of the model.
        known: first parts of the names of weights that may be left over.

    Raises:
        UniRefinerError: counts what is missing, of another shape or unknown, and names the
            first of each.
    """
    known = set(known)
    problems = {
        "missing": sorted(report["missing_keys"]),
        "of another shape": sorted(
            f"{key}: {tuple(given)}, not {tuple(needed)}"
            for key, given, needed in report["mismatched_keys"]
        ),
        "unknown": sorted(
            key
            for key in map(str, report["unexpected_keys"])
            if key.split(".")[0] not in known
        ),
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])})"
            for what, keys in problems.items()
            if keys
        )
        raise UniRefinerError(
            f"{name} does not fit {kind}: {listed}. Use the checkpoint whole, as it was "
            "published."
        )


def _is_finite(value: Tensor) -> bool:
    # Of the types of one byte none can be tested, and few can be infinite.
    told = value.is_floating_point() and value.itemsize > 1 and not value.is_meta
    return not told or bool(torch.isfinite(value.detach()).all())


def _unreadable(file: Path, problem: OSError) -> FileError:
    if isinstance(problem, FileNotFoundError):
        return FileError(f"{file} is missing: there is no such file.")
    if isinstance(problem, IsADirectoryError) or file.is_dir():
        return FileError(f"{file} is a folder; a file is needed.")
    reason = problem.strerror or problem
    return FileError(f"{file} cannot be read ({reason}): may this user read it?")


def _described(file: Path) -> str | None:
    """What a file is that holds none of what it should; None where it does not show."""
    with file.open("rb") as opened:
        start = opened.read(len(_POINTER))
    if not start:
        return "empty"
    if start == _POINTER:
        return "a pointer of git-LFS, not the file itself (git lfs pull fetches it)"
    return None


def _short(content: Any) -> str:
    text = json.dumps(content)
    return text if len(text) <= 20 else f"{text[:20]}..."


__all__ = [
    "FileError",
    "check_finite",
    "check_finite_weights",
    "check_model",
    "check_reachable",
    "check_tensors",
    "read_json",
    "read_tensors",
    "refuse_report",
]
