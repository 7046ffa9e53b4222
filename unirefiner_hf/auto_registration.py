"""Make transformers' Auto classes know the register model, without loading them.

Importing transformers' Auto classes costs seconds, so registration waits for whoever
imports them: at once if they are loaded, else right after they load.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

CONFIGURATION_AUTO = "transformers.models.auto.configuration_auto"
MODELING_AUTO = "transformers.models.auto.modeling_auto"
CONFIGURATION = f"{__package__}.modeling.configuration_unirefiner"
MODELING = f"{__package__}.modeling.modeling_unirefiner"
TOWERS = f"{__package__}.modeling.towers"
CONFIGURATION_PYRAMID = f"{__package__}.modeling.configuration_pyramid"
MODELING_PYRAMID = f"{__package__}.modeling.modeling_pyramid"


def register_config() -> None:
    """Register `UniRefinerConfig` with `AutoConfig`."""
    from transformers import AutoConfig

    from .modeling.configuration_unirefiner import UniRefinerConfig

    AutoConfig.register(UniRefinerConfig.model_type, UniRefinerConfig, exist_ok=True)


def register_models() -> None:
    """Register the model with `AutoModel` and the backbone with `AutoBackbone`."""
    from transformers import AutoBackbone, AutoModel

    from .modeling.configuration_unirefiner import UniRefinerConfig
    from .modeling.modeling_unirefiner import UniRefinerBackbone, UniRefinerModel

    AutoModel.register(UniRefinerConfig, UniRefinerModel, exist_ok=True)
    AutoBackbone.register(UniRefinerConfig, UniRefinerBackbone, exist_ok=True)


def register() -> None:
    """Have our classes registered whichever side is imported first.

    Once transformers' Auto classes are loaded, our module is imported; once our module
    is imported, its classes are registered. A module that is already being imported is
    left to finish, and registered then. What loads towers imports the Auto classes
    itself; where it is imported first, the model follows it. The feature pyramid follows
    the model, and registers itself.
    """
    _after_import(CONFIGURATION, partial(_import_unless_started, CONFIGURATION_PYRAMID))
    _after_import(MODELING, partial(_import_unless_started, MODELING_PYRAMID))
    _after_import(TOWERS, partial(_import_unless_started, MODELING))
    for auto, ours, action in (
        (CONFIGURATION_AUTO, CONFIGURATION, register_config),
        (MODELING_AUTO, MODELING, register_models),
    ):
        _after_import(ours, action)
        _after_import(auto, partial(_import_unless_started, ours))


def _import_unless_started(name: str) -> None:
    if name in sys.modules:
        return
    if name == MODELING and _unfinished(TOWERS):
        return
    importlib.import_module(name)


def _unfinished(name: str) -> bool:
    """Whether a module is being imported: its last definition is not there yet."""
    return name in sys.modules and not hasattr(sys.modules[name], "__all__")


def _after_import(name: str, action: Callable[[], None]) -> None:
    """Run an action now if the module is loaded, else right after it loads."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))


class _AfterImport(MetaPathFinder):
    """Runs an action once, right after a module's first import."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAct(spec.loader, self.action)
        return spec


class _ThenAct(Loader):
    """A loader followed by an action."""

    def __init__(self, loader: Loader, action: Callable[[], None]) -> None:
        self.loader = loader
        self.action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.action()
