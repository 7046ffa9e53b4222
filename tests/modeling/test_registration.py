"""`import unirefiner_hf` is cheap and makes the Auto classes know the model."""

import subprocess
import sys

import pytest

import unirefiner_hf
from tests.conftest import make_tiny_tower
from unirefiner_hf import UniRefinerModel


def python(code, *args):
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_loads_no_heavy_library():
    loaded = python(
        "import sys, unirefiner_hf, unirefiner_hf.modeling;"
        "print([n for n in ('torch', 'transformers', 'peft', 'numpy') if n in sys.modules])"
    )
    assert loaded.strip() == "[]"


ORDERS = {
    "ours first": "import unirefiner_hf\nfrom transformers import AutoConfig, AutoModel",
    "theirs first": "from transformers import AutoConfig, AutoModel\nimport unirefiner_hf",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_auto_classes_know_the_model(order, tmp_path):
    UniRefinerModel.from_tower(make_tiny_tower("dinov2")).save_pretrained(tmp_path)
    out = python(
        f"import sys\n{order}\n"
        "from transformers import AutoBackbone\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "model = AutoModel.from_pretrained(sys.argv[1])\n"
        "for made in (config, model, AutoBackbone.from_config(config)):\n"
        "    print(type(made).__module__, type(made).__name__)\n"
        "assert not any(type(f).__name__ == '_AfterImport' for f in sys.meta_path)\n",
        str(tmp_path),
    )
    home = "unirefiner_hf.modeling."
    assert out.splitlines() == [
        f"{home}configuration_unirefiner UniRefinerConfig",
        f"{home}modeling_unirefiner UniRefinerModel",
        f"{home}modeling_unirefiner UniRefinerBackbone",
    ]


def test_public_names():
    for name in unirefiner_hf.__all__:
        assert getattr(unirefiner_hf, name).__name__ == name
    assert set(unirefiner_hf.__all__) <= set(dir(unirefiner_hf))
    with pytest.raises(AttributeError, match="teapot"):
        getattr(unirefiner_hf, "teapot")


@pytest.mark.parametrize(
    "first",
    [
        "from unirefiner_hf import UniRefinerModel",
        "from unirefiner_hf import UniRefinerConfig",
        "from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerBackbone",
        "from transformers import AutoConfig; import unirefiner_hf",
        "from unirefiner_hf.modeling.towers import load_tower",
        "from unirefiner_hf.modeling.families import FAMILIES",
        "from unirefiner_hf.modeling.recording import record_queries_keys",
        "from unirefiner_hf.modeling.published_intern_vit import PublishedInternViT",
        "from unirefiner_hf.modeling.modeling_eva_clip import EvaClipVisionModel",
        "from unirefiner_hf.modeling.modeling_pyramid import UniRefinerPyramid",
        "from unirefiner_hf import UniRefinerPyramidConfig",
        "import unirefiner_hf; from transformers import Dinov2Model",
        "import unirefiner_hf; from transformers import InternVLVisionModel",
        "import unirefiner_hf; from transformers import MetaClip2VisionModel",
    ],
)
def test_any_first_import_in_a_fresh_process_registers(first):
    code = f"""{first}
from transformers import AutoBackbone, AutoConfig, AutoModel
tower = dict(model_type="dinov2", hidden_size=32, num_hidden_layers=1,
             num_attention_heads=2, image_size=16, patch_size=4)
config = AutoConfig.for_model("unirefiner", vision_config=tower)
print(type(AutoModel.from_config(config)).__name__)
print(type(AutoBackbone.from_config(config)).__name__)
config = AutoConfig.for_model("unirefiner_pyramid", refined_config=config)
print(type(AutoBackbone.from_config(config)).__name__)
"""
    names = ["UniRefinerModel", "UniRefinerBackbone", "UniRefinerPyramid"]
    assert python(code).split() == names
