"""UniRefiner for transformers: clean dense features from vision towers.

Importing the package is cheap; names load on first use, and the Auto classes of
transformers know ``unirefiner`` checkpoints as soon as both are imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .auto_registration import register

if TYPE_CHECKING:
    from .evaluation.compare import compare
    from .evaluation.diagnose import diagnose
    from .evaluation.evaluate import evaluate
    from .evaluation.extract import Features, extract_features
    from .modeling.configuration_pyramid import UniRefinerPyramidConfig
    from .modeling.configuration_unirefiner import UniRefinerConfig
    from .modeling.dense_text import dense_text_features
    from .modeling.modeling_pyramid import UniRefinerPyramid
    from .modeling.modeling_unirefiner import UniRefinerBackbone, UniRefinerModel
    from .modeling.remote_code import save_remote_code
    from .modeling.text_side import load_text_side
    from .modeling.towers import load_tower

__version__ = "0.1.0"

_HOMES = {
    "Features": ".evaluation.extract",
    "compare": ".evaluation.compare",
    "diagnose": ".evaluation.diagnose",
    "evaluate": ".evaluation.evaluate",
    "extract_features": ".evaluation.extract",
    "UniRefinerConfig": ".modeling.configuration_unirefiner",
    "UniRefinerModel": ".modeling.modeling_unirefiner",
    "UniRefinerBackbone": ".modeling.modeling_unirefiner",
    "dense_text_features": ".modeling.dense_text",
    "load_text_side": ".modeling.text_side",
    "UniRefinerPyramid": ".modeling.modeling_pyramid",
    "UniRefinerPyramidConfig": ".modeling.configuration_pyramid",
    "load_tower": ".modeling.towers",
    "save_remote_code": ".modeling.remote_code",
}

__all__ = [
    "Features",
    "UniRefinerBackbone",
    "UniRefinerConfig",
    "UniRefinerModel",
    "UniRefinerPyramid",
    "UniRefinerPyramidConfig",
    "compare",
    "dense_text_features",
    "diagnose",
    "evaluate",
    "extract_features",
    "load_text_side",
    "load_tower",
    "save_remote_code",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register()
