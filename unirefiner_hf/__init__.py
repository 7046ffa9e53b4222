"""Refine the dense features of pre-trained Vision Transformers.

Importing the package registers its model with `AutoConfig`, `AutoModel` and
`AutoBackbone`.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "UniRefinerBackbone": "modeling",
    "UniRefinerConfig": "modeling",
    "UniRefinerModel": "modeling",
    "UniRefinerOutput": "modeling",
    "UniRefinerObjective": "refinement.objective",
    "UniRefinerSettings": "refinement.settings",
    "diagnose": "spurious.diagnose",
}
__all__ = sorted(_PUBLIC)

# The command line answers --help without loading torch; its verbs import what they need.
if Path(sys.argv[0] if sys.argv else "").stem != "unirefiner":
    import_module(".modeling", __name__)

if TYPE_CHECKING:
    from .modeling import (
        UniRefinerBackbone,
        UniRefinerConfig,
        UniRefinerModel,
        UniRefinerOutput,
    )
    from .refinement.objective import UniRefinerObjective
    from .refinement.settings import UniRefinerSettings
    from .spurious.diagnose import diagnose


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
