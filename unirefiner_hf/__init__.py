"""UniRefiner for transformers: clean dense features from vision backbones.

Importing the package is cheap; names load on first use, and the Auto classes of
transformers know ``unirefiner`` checkpoints as soon as both are imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .auto_registration import register

if TYPE_CHECKING:
    from .estimation.estimate import Estimate, estimate
    from .evaluation.arguments import EvaluationArguments
    from .export.merge import Merged, merge
    from .export.onnx import export_onnx, export_program
    from .hub.push import Pushed, push
    from .hub.verify import Verified, verify
    from .loading.backbone import load_backbone
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

_HOMES = {
    "DistillationSettings": ".methods.distillation.settings",
    "Estimate": ".estimation.estimate",
    "EvaluationArguments": ".evaluation.arguments",
    "Merged": ".export.merge",
    "PHRegSettings": ".methods.ph_reg.settings",
    "Pushed": ".hub.push",
    "Recipe": ".training.recipe",
    "Refined": ".training.refine",
    "UniRefinerArguments": ".training.arguments",
    "UniRefinerBackbone": ".modeling.modeling_unirefiner",
    "UniRefinerConfig": ".modeling.configuration_unirefiner",
    "UniRefinerError": ".modeling.errors",
    "UniRefinerModel": ".modeling.modeling_unirefiner",
    "UniRefinerPyramid": ".modeling.modeling_pyramid",
    "UniRefinerPyramidConfig": ".modeling.configuration_pyramid",
    "UniRefinerSettings": ".methods.unirefiner.settings",
    "UniRefinerTrainer": ".training.trainer",
    "Verified": ".hub.verify",
    "dense_text_features": ".modeling.dense_text",
    "estimate": ".estimation.estimate",
    "export_onnx": ".export.onnx",
    "export_program": ".export.onnx",
    "load_backbone": ".loading.backbone",
    "load_recipe": ".training.recipe",
    "load_text_side": ".modeling.text_side",
    "load_tower": ".modeling.towers",
    "merge": ".export.merge",
    "push": ".hub.push",
    "refine": ".training.refine",
    "save_remote_code": ".modeling.remote_code",
    "verify": ".hub.verify",
}
"""Public name -> the module that holds it, imported at its first use."""

__all__ = [
    "DistillationSettings",
    "Estimate",
    "EvaluationArguments",
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
    "dense_text_features",
    "estimate",
    "export_onnx",
    "export_program",
    "load_backbone",
    "load_recipe",
    "load_text_side",
    "load_tower",
    "merge",
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
