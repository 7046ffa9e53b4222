"""What a run was asked to do: kept in its folder, read back, and compared when it goes on.

Two records are kept, and both are whole:

- ``asked.json`` in the run's folder says everything as it was given, places on this machine
  among it, so that ``--resume RUN`` needs no other option. It is never published.
- `identity` says what the weights follow from, without a path: every argument and setting
  that is not `HARMLESS`, and digests of the base's weights, the images and the reference.
  It stands in ``run.json`` and in every checkpoint, beside the weights it is true of.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..data.samples import RefinementImages
from ..data.streams import RefinementStream
from ..export.digests import sha256
from ..export.run_folder import (
    ASKED,
    ASKED_FORMAT,
    RunFolderError,
    as_path,
    is_run,
    read_record,
    read_refiner_state,
)
from ..loading.starter import NAME as STARTER
from ..methods.registry import current_name, method_named
from ..methods.settings import MethodSettings
from ..modeling.errors import UniRefinerError
from ..resources import find_recipe
from .arguments import UniRefinerArguments
from .distributed import announced_processes
from .fields import Values, read_recipe, to_words
from .keywords import ARGUMENTS
from .recipe import Recipe, recipe_of_words
from .refused import REFUSED
from .split import accumulation_for

logger = logging.get_logger(__name__)

PARTS = {
    "model": (str, type(None)),
    "data": (str, type(None)),
    "method": str,
    "settings": dict,
    "args": dict,
}
"""Of ``asked.json``, and what each is; no model or data where it was in memory."""
PLACES = ("model", "data", "revision", "reference_image")
"""Where something lies, which may change: what lies there is compared by its digest."""
SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Compared together with the number of processes, which is no argument."""
NOT_KEPT = ("hub_token", "trust_remote_code", "allow_pickled_checkpoint")
"""A secret, and consents: they are given anew, never read from a folder."""
OF_THE_MACHINE = ("output_dir", "resume", "ddp_backend")
"""Found out anew."""
NEWER_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Of arguments that transformers takes under two; the newer goes over the older."""
HARMLESS = frozenset(
    {
        # What is said, and when.
        "disable_tqdm",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_steps",
        "logging_strategy",
        "project",
        "report_images",
        "report_to",
        "run_name",
        "skip_memory_metrics",
        "snapshot_steps",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
        "debug",
        # What is kept, and when.
        "save_on_each_node",
        "save_only_model",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        # What is published, and as what.
        "hub_always_push",
        "hub_model_id",
        "hub_private_repo",
        "hub_strategy",
        "inference_register_width",
        "keep_text",
        "model_license",
        "publish_pictures",
        "push_to_hub",
        # Who reads the images, and how far ahead; a stream keeps its order, see `streams`.
        "dataloader_multiprocessing_context",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        # Where it is computed, and in how much memory.
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "ddp_timeout",
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_empty_cache_steps",
        "use_cpu",
    }
)
"""Arguments that may differ when a run goes on: the weights do not follow from them."""


class OtherRunError(UniRefinerError):
    """The run cannot go on as asked: its weights follow from something else."""


def identity(args: UniRefinerArguments, settings: MethodSettings) -> dict[str, Any]:
    """What the weights follow from, of arguments and settings; see `found_out`."""
    left = {*HARMLESS, *PLACES, *SPLIT, *NOT_KEPT, *OF_THE_MACHINE}
    told = {**_plain(args), **dataclasses.asdict(settings)}
    kept = {name: value for name, value in told.items() if name not in left}
    return _as_json({"method": settings.name, **kept})


def found_out(
    base: str,
    images: RefinementImages | RefinementStream,
    reference_image: str | None,
) -> dict[str, str]:
    """The rest of the identity: what lies at the places that were given.

    Args:
        base: digest of the backbone's weights.
    """
    seen = f"{images.report.source}, a stream"
    if isinstance(images, RefinementImages):
        names = hashlib.sha256("\n".join(images.names).encode()).hexdigest()
        seen = f"{len(images.names)}, sha256 of their names {names[:16]}"
    reference = "the package's"
    if reference_image is not None:
        reference = f"sha256 {sha256(Path(reference_image).expanduser())[:16]}"
    return {
        "base weights": f"sha256 {base}",
        "images": seen,
        "reference image": reference,
    }


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Name -> (recorded, asked for), of all that differs between two identities.

    Of another method, that alone is told. What an earlier version did not know has to be
    as it is where nobody asks for it.
    """
    if before.get("method") != now.get("method"):
        return {"method": (before.get("method"), now.get("method"))}
    unasked: Mapping[str, Any] = {}
    if not before.keys() >= now.keys() and "method" in now:
        kind = method_named(now["method"])
        unasked = identity(UniRefinerArguments("."), kind())
    found = {}
    for name, value in now.items():
        recorded = before.get(name, unasked.get(name, value))
        if recorded != value:
            found[name] = (recorded, value)
    return found


def check_same(checkpoint: Path, now: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint whose weights follow from something else.

    Args:
        now: the identity, or the part of it that is known so far.

    Raises:
        OtherRunError: names what differs, as it was and as it is asked for.
    """
    before = read_refiner_state(checkpoint).get("asked")
    if not isinstance(before, dict):
        logger.warning_once(
            f"{checkpoint.name} was written by an earlier version, which did not note what "
            "it was asked: that the options are the same cannot be checked."
        )
        return
    found = differences(before, now)
    if found:
        raise other_run(checkpoint.parent, found)


def other_run(run: Path, found: Mapping[str, tuple[Any, Any]]) -> OtherRunError:
    """What to say of a run that is asked to go on as another."""
    told = "; ".join(
        f"{name} was {_shown(old)}, now {_shown(new)}"
        for name, (old, new) in found.items()
    )
    return OtherRunError(
        f"{run} cannot go on as another run: {told}. Leave that out (--resume and the "
        "folder need no other option), or name another output_dir for a new run."
    )


def all_asked(
    model: Any, data: Any, args: UniRefinerArguments, settings: MethodSettings
) -> dict[str, Any]:
    """The content of ``asked.json``: everything that was given, so that the run goes on.

    Args:
        args: before a trainer works on them.
    """
    left = {*NOT_KEPT, *OF_THE_MACHINE}
    told = {name: value for name, value in _plain(args).items() if name not in left}
    if args.reference_image is not None:
        told["reference_image"] = _place(args.reference_image)
    content = {
        "format": ASKED_FORMAT,
        "model": _place(model),
        "data": _place(data),
        "method": settings.name,
        "settings": dataclasses.asdict(settings),
        "args": told,
    }
    return _as_json(content)


def read_asked(run: Path) -> dict[str, Any]:
    """What `all_asked` gave.

    Raises:
        RunFolderError: no run, one of an earlier version, or a file that is damaged.
    """
    file = run / ASKED
    if not file.is_file():
        if is_run(run):
            raise RunFolderError(
                f"{run} holds no {ASKED}: it was started by an earlier version. Give the "
                "options it was started with, and --resume without a folder."
            )
        raise RunFolderError(
            f"{run} holds no run that could be continued: there is no {file}. Name the "
            "output_dir of a refinement."
        )
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from error
    told = told if isinstance(told, dict) else {}
    found = told.get("format")
    problem = f"is of format {found!r}, expected {ASKED_FORMAT}"
    if found == ASKED_FORMAT:
        lacking = [name for name, kind in PARTS.items() if not _is(told, name, kind)]
        if not lacking:
            return told
        problem = f"does not tell {', '.join(lacking)}"
    raise RunFolderError(
        f"{file} {problem}: put back what the run wrote, or give the options it was started "
        "with, and --resume without a folder."
    )


def recipe_of_run(
    run: str | Path,
    given: Mapping[str, Values] | None = None,
    config: str | Path | None = None,
) -> Recipe:
    """The recipe a run was started with, ready to go on.

    Args:
        given: options beside it, as words; the trainer refuses those that would make it
            another run.
        config: a recipe beside it, read in the same way.

    Raises:
        RunFolderError: as `read_asked`.
        OtherRunError: another method or output_dir is asked for.
        RecipeError: as `recipe_of_words`.
    """
    folder = as_path(run, "resume")
    told = read_asked(folder)
    method = current_name(told["method"])
    words = {} if config is None else read_recipe(find_recipe(str(config)))
    words.update(given or {})
    words.pop("resume", None)
    asked = " ".join(words.pop("method", None) or [method])
    if current_name(asked) != method:
        raise other_run(folder, {"method": (method, asked)})
    target = " ".join(words.pop("output_dir", None) or [str(folder)])
    if Path(target).expanduser().resolve() != folder.resolve():
        raise other_run(folder, {"output_dir": (str(folder), target)})
    place = {"method": [method], "output_dir": [str(folder)], "resume": ["true"]}
    recorded = _recorded_words(told)
    for old, new in NEWER_NAMES.items():
        if old in words:
            recorded.pop(new, None)
    if not any(name in words for name in SPLIT):
        recorded |= _same_batches(folder, told)
    return recipe_of_words(None, {**recorded, **words, **place})


def _is(told: Mapping[str, Any], name: str, kind: Any) -> bool:
    return name in told and isinstance(told[name], kind)


def _recorded_words(told: Mapping[str, Any]) -> dict[str, Values]:
    """What was kept as a recipe has it; what is as it would be anyway is left out."""
    kind = method_named(current_name(told["method"]))
    known = {**_defaults(UniRefinerArguments), **_defaults(kind)}
    values = {**told["args"], **told["settings"]}
    values = {n: v for n, v in values.items() if n in known and v != known[n]}
    places = {name: told[name] for name in ("model", "data") if told[name] is not None}
    return {
        name: to_words(value)
        for name, value in {**places, **values}.items()
        if value not in ([], {})
    }


def _same_batches(run: Path, told: Mapping[str, Any]) -> dict[str, Values]:
    """The accumulation that makes as many images a step on as many processes as there are.

    Nothing where none does: `check_split` says then what would.
    """
    if not is_run(run):
        return {}
    total = int(read_record(run)["training"]["total_batch"])
    batch = int(told["args"]["per_device_train_batch_size"])
    accumulation = accumulation_for(total, batch, announced_processes())
    if accumulation is None:
        return {}
    return {"gradient_accumulation_steps": [str(accumulation)]}


def _defaults(kind: type) -> dict[str, Any]:
    """Of a dataclass's fields; None of one that makes its own."""
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(kind)
    }


def _plain(args: UniRefinerArguments) -> dict[str, Any]:
    """Fields as plain values."""
    told = args.to_dict()
    return {n: told[n] for n in ARGUMENTS if n in told and n not in REFUSED}


def _place(given: Any) -> str | None:
    """A name, or a path from the root; None of an object in memory."""
    if not isinstance(given, (str, Path)):
        return None
    path = Path(given).expanduser()
    known = str(given) in ("starter", STARTER)
    return str(path.absolute()) if path.exists() and not known else str(given)


def _as_json(content: Any) -> Any:
    """As it will be read: tuples as lists, anything strange as its words."""
    return json.loads(json.dumps(content, default=str))


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
