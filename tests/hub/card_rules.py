"""The part of the Hub's metadata validation that a model card of this package can break."""

from __future__ import annotations

import re
from typing import Any

import yaml

LICENSES = set(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
    c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
    ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0
    odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 grok2-community gemma unknown other""".split()
)
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(\r?\n|\Z)", re.DOTALL)


def read_metadata(content: str) -> Any:
    """The YAML head of a card, None without one; yaml.YAMLError where it does not parse."""
    found = FRONT.match(content)
    return yaml.safe_load(found.group(1)) if found else None


def _texts(metadata: dict, key: str, errors: list[str]) -> list[str]:
    value = metadata.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(item, str) for item in values):
        errors.append(f'"{key}" must be a string or a list of strings')
        return []
    return values


def _check_model_index(index: Any, errors: list[str]) -> None:
    if not isinstance(index, list) or not index:
        errors.append('"model-index" must be an array')
        return
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'"{where}.name" is required')
            continue
        results = model.get("results")
        if not isinstance(results, list):
            errors.append(f'"{where}.results" is required')
            continue
        for j, result in enumerate(results):
            _check_result(result, f"{where}.results[{j}]", errors)


def _check_result(result: Any, where: str, errors: list[str]) -> None:
    if not isinstance(result, dict):
        errors.append(f'"{where}" must be of type object')
        return
    for key, needed in (("task", ("type",)), ("dataset", ("type", "name"))):
        for name in needed:
            part = result.get(key)
            if not isinstance(part, dict) or not isinstance(part.get(name), str):
                errors.append(f'"{where}.{key}.{name}" is required')
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        errors.append(f'"{where}.metrics" is required')
        return
    for k, metric in enumerate(metrics):
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            errors.append(f'"{where}.metrics[{k}].type" is required')
        elif metric.get("value") is None:
            errors.append(f'"{where}.metrics[{k}].value" is required')


def validate_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a model card.

    Stricter than the Hub in one point: base_model must be ``user/name``, old names without a user
    are refused.
    """
    try:
        metadata = read_metadata(content)
    except yaml.YAMLError as error:
        return [f"YAML metadata cannot be parsed: {error}"], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["YAML metadata must be a mapping"], []
    errors: list[str] = []
    for name in _texts(metadata, "license", errors):
        if name not in LICENSES:
            errors.append(
                f'"license" must be one of the known identifiers, not "{name}"'
            )
    for key in ("base_model", "datasets"):
        for name in _texts(metadata, key, errors):
            good = REPO_ID.fullmatch(name) or (key == "datasets" and "/" not in name)
            if not good or ".." in name or "--" in name or name.endswith(".git"):
                errors.append(
                    f'"{key}" with value "{name}" is not valid. Use an id from the Hub.'
                )
    for key in ("tags", "metrics", "language"):
        _texts(metadata, key, errors)
    for key in ("pipeline_tag", "library_name", "license_name", "license_link"):
        if not isinstance(metadata.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    if "model-index" in metadata:
        _check_model_index(metadata["model-index"], errors)
    return errors, []
