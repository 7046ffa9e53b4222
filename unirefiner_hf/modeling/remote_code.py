"""Put the code of the model beside its weights, for users without this package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from . import (
    checked,
    configuration_eva_clip,
    configuration_unirefiner,
    errors,
    families,
    files,
    modeling_eva_clip,
    modeling_unirefiner,
    own_towers,
    recording,
    registers,
    towers,
    vit_parts,
    weight_files,
)
from .configuration_eva_clip import EvaClipVisionConfig
from .configuration_unirefiner import UniRefinerConfig
from .errors import UniRefinerError

AUTO_MAP = {
    "AutoConfig": "configuration_unirefiner.UniRefinerConfig",
    "AutoModel": "modeling_unirefiner.UniRefinerModel",
    "AutoBackbone": "modeling_unirefiner.UniRefinerBackbone",
}

FLAT_MODULES = (
    checked,
    configuration_unirefiner,
    errors,
    families,
    files,
    modeling_unirefiner,
    own_towers,
    recording,
    registers,
    towers,
    weight_files,
)
"""What every checkpoint needs."""

EVA_CLIP_MODULES = (configuration_eva_clip, modeling_eva_clip, vit_parts)
"""What `own_towers` imports, and only a checkpoint of EVA-CLIP needs."""

CODE_FILES = tuple(
    f"{module.__name__.rpartition('.')[2]}.py"
    for module in FLAT_MODULES + EVA_CLIP_MODULES
)
"""Names of the files that are put beside weights."""

NO_OWN_TOWERS = '''"""This checkpoint's tower is one of transformers: none has to be added."""


def published_config(published):
    return None


def own_models():
    return {}
'''
"""`own_towers` in every other checkpoint."""


def save_remote_code(folder: str | Path) -> list[Path]:
    """Put the code its model needs into a saved checkpoint and point its config at it.

    After this ``AutoModel.from_pretrained(folder, trust_remote_code=True)`` works in a
    process without this package, as does ``AutoBackbone`` once the folder is on the
    Hub. (`save_pretrained` copies the code too, EVA-CLIP's as well, but maps
    `AutoBackbone` to nothing.) The code of EVA-CLIP goes where the tower is another.

    Args:
        folder: folder written by ``save_pretrained``.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        UniRefinerError: the config is not that of a register model.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{config_file} does not exist; save the model there first."
        )
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("model_type") != UniRefinerConfig.model_type:
        raise UniRefinerError(
            f"{config_file} has model_type {config.get('model_type')!r}, "
            f"expected {UniRefinerConfig.model_type!r}."
        )
    config["auto_map"] = AUTO_MAP
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    config_file.write_text(text, encoding="utf-8")
    written = [config_file]
    eva_clip = config["vision_config"]["model_type"] == EvaClipVisionConfig.model_type
    for module in FLAT_MODULES + (EVA_CLIP_MODULES if eva_clip else ()):
        source = Path(str(module.__file__))
        written.append(Path(shutil.copyfile(source, folder / source.name)))
    if not eva_clip:
        for module in EVA_CLIP_MODULES:
            (folder / Path(str(module.__file__)).name).unlink(missing_ok=True)
        (folder / "own_towers.py").write_text(NO_OWN_TOWERS, encoding="utf-8")
    return written
