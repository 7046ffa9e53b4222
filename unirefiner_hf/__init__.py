"""UniRefiner for transformers: clean dense features from vision backbones.

Importing the package is cheap; names load on first use, and the Auto classes of
transformers know ``unirefiner`` checkpoints as soon as both are imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .auto_registration import register

if TYPE_CHECKING:
    from .data.images import load_rgb
    from .estimation.estimate import Estimate, estimate
    from .evaluation.arguments import EvaluationArguments
    from .evaluation.compare import FeatureComparison, compare
    from .evaluation.diagnose import Diagnoses, diagnose
    from .evaluation.evaluate import Evaluation, evaluate
    from .evaluation.extract import Features, extract_features
    from .evaluation.metric_modules import load_metric, metric_path
    from .export.merge import Merged, merge
    from .export.onnx import export_onnx, export_program
    from .hub.push import Pushed, push
    from .hub.verify import Verified, verify
    from .methods.distillation.settings import DistillationSettings
    from .methods.ph_reg.settings import PHRegSettings
    from .methods.unirefiner.settings import UniRefinerSettings
    from .modeling.configuration_pyramid import UniRefinerPyramidConfig
    from .modeling.configuration_unirefiner import UniRefinerConfig
    from .modeling.dense_text import dense_text_features
    from .modeling.errors import UniRefinerError
    from .modeling.modeling_pyramid import UniRefinerPyramid
    from .modeling.modeling_unirefiner import UniRefinerBackbone, UniRefinerModel
    from .modeling.remote_code import save_remote_code
    from .modeling.text_side import load_text_side
    from .modeling.towers import load_tower
    from .training.arguments import UniRefinerArguments
    from .training.recipe import Recipe, load_recipe
    from .training.refine import Refined, refine
    from .training.trainer import UniRefinerTrainer

__version__ = "0.1.0"

_PUBLIC = {
    ".data.images": ("load_rgb",),
    ".estimation.estimate": ("Estimate", "estimate"),
    ".evaluation.arguments": ("EvaluationArguments",),
    ".evaluation.compare": ("FeatureComparison", "compare"),
    ".evaluation.diagnose": ("Diagnoses", "diagnose"),
    ".evaluation.evaluate": ("Evaluation", "evaluate"),
    ".evaluation.extract": ("Features", "extract_features"),
    ".evaluation.metric_modules": ("load_metric", "metric_path"),
    ".export.merge": ("Merged", "merge"),
    ".export.onnx": ("export_onnx", "export_program"),
    ".hub.push": ("Pushed", "push"),
    ".hub.verify": ("Verified", "verify"),
    ".methods.distillation.settings": ("DistillationSettings",),
    ".methods.ph_reg.settings": ("PHRegSettings",),
    ".methods.unirefiner.settings": ("UniRefinerSettings",),
    ".modeling.configuration_pyramid": ("UniRefinerPyramidConfig",),
    ".modeling.configuration_unirefiner": ("UniRefinerConfig",),
    ".modeling.dense_text": ("dense_text_features",),
    ".modeling.errors": ("UniRefinerError",),
    ".modeling.modeling_pyramid": ("UniRefinerPyramid",),
    ".modeling.modeling_unirefiner": ("UniRefinerBackbone", "UniRefinerModel"),
    ".modeling.remote_code": ("save_remote_code",),
    ".modeling.text_side": ("load_text_side",),
    ".modeling.towers": ("load_tower",),
    ".training.arguments": ("UniRefinerArguments",),
    ".training.recipe": ("Recipe", "load_recipe"),
    ".training.refine": ("Refined", "refine"),
    ".training.trainer": ("UniRefinerTrainer",),
}
"""Module -> its public names; a module is imported when a name of it is used first."""
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [
    "Diagnoses",
    "DistillationSettings",
    "Estimate",
    "Evaluation",
    "EvaluationArguments",
    "FeatureComparison",
    "Features",
    "Merged",
    "PHRegSettings",
    "Pushed",
    "Recipe",
    "Refined",
    "UniRefinerArguments",
    "UniRefinerBackbone",
    "UniRefinerConfig",
    "UniRefinerError",
    "UniRefinerModel",
    "UniRefinerPyramid",
    "UniRefinerPyramidConfig",
    "UniRefinerSettings",
    "UniRefinerTrainer",
    "Verified",
    "compare",
    "dense_text_features",
    "diagnose",
    "estimate",
    "evaluate",
    "export_onnx",
    "export_program",
    "extract_features",
    "load_metric",
    "load_recipe",
    "load_rgb",
    "load_text_side",
    "load_tower",
    "merge",
    "metric_path",
    "push",
    "refine",
    "save_remote_code",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register()
