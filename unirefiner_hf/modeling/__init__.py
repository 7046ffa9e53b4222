"""The published model. Importing this registers it with transformers' Auto classes."""

from transformers import AutoBackbone, AutoConfig, AutoModel

from .configuration_unirefiner import UniRefinerConfig
from .modeling_unirefiner import UniRefinerBackbone, UniRefinerModel, UniRefinerOutput

AutoConfig.register(UniRefinerConfig.model_type, UniRefinerConfig)
AutoModel.register(UniRefinerConfig, UniRefinerModel)
AutoBackbone.register(UniRefinerConfig, UniRefinerBackbone)

__all__ = [
    "UniRefinerBackbone",
    "UniRefinerConfig",
    "UniRefinerModel",
    "UniRefinerOutput",
]
