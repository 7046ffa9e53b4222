"""The card says what is known, parses, gives nothing away, and its code runs."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.export.conftest import make_record, merge
from tests.hub.card_rules import validate_card
from unirefiner_hf.export.card import card_from_record, render_card
from unirefiner_hf.modeling.families import FAMILIES
from unirefiner_hf.resources import PACKAGE, resource_folder

TOKEN = "hf_PlantedTokenThatMustNotAppear"


WEIGHTS = {
    "adapter/adapter_model.safetensors": "ab" * 32,
    "model.safetensors": "01" * 32,
}
OTHERS = {"config.json": "cd" * 32, "modeling_unirefiner.py": "ef" * 32}
EVALUATION = {
    "task": "image-segmentation",
    "dataset": "Stamp Scenes",
    "split": "val",
    "metric": "mean_iou",
    "unit": "%",
    "higher_is_better": True,
    "value": 49.625,
    "std": 0.5,
    "seeds": 3,
    "n": 160,
    "register_width": 2,
    "protocol": "linear probe on frozen tokens",
    "settings": {"iterations": 100},
    "controls": {
        "base": {
            "value": 44.0,
            "std": 0.25,
            "register_width": 0,
            "difference": 5.625,
            "interval": [4.5, 6.75],
        },
        "self-distillation baseline": {
            "value": 45.5,
            "std": None,
            "register_width": 0,
            "difference": 4.125,
            "interval": None,
        },
    },
    "missing_controls": [],
}


def render(
    pictures=(), native=False, weights=WEIGHTS | OTHERS, evaluations=(), **changes
):
    card = card_from_record(make_record(**changes), evaluations)
    return render_card(card, pictures, native=native, files=weights)


def header(text):
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_metadata_parses_exactly():
    text = render()
    expected = {
        "base_model": "example-lab/tiny-tower",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["unirefiner", "dense-features", "vision-transformer", "dinov2"],
        "unirefiner": {
            "base": "example-lab/tiny-tower",
            "method": "unirefiner",
            "version": "0.1.0",
            "weights": WEIGHTS,
            "files": OTHERS,
        },
    }
    assert header(text) == expected
    assert ModelCard(text).data.to_dict() == expected


@pytest.mark.parametrize("model_type", list(FAMILIES))
@pytest.mark.parametrize("native", [False, True])
def test_every_family_has_a_card(model_type, native):
    text = render(model__family=model_type, native=native, evaluations=[EVALUATION])
    assert header(text)["tags"][-1] == model_type
    assert f"({model_type})" in text
    assert validate_card(text) == ([], [])


def test_evaluations_become_a_model_index_with_their_controls():
    text = render(evaluations=[EVALUATION])
    expected = {
        "name": "tiny-tower-unirefined",
        "results": [
            {
                "task": {"type": "image-segmentation"},
                "dataset": {
                    "name": "Stamp Scenes",
                    "type": "stamp-scenes",
                    "split": "val",
                },
                "metrics": [
                    {
                        "type": "mean_iou",
                        "value": 49.625,
                        "name": "mean_iou (linear probe on frozen tokens)",
                        "args": {
                            "unit": "%",
                            "std": 0.5,
                            "seeds": 3,
                            "n": 160,
                            "register_width": 2,
                            "controls": {
                                "base": EVALUATION["controls"]["base"],
                                "self-distillation baseline": {
                                    "value": 45.5,
                                    "register_width": 0,
                                    "difference": 4.125,
                                },
                            },
                        },
                    }
                ],
            }
        ],
    }
    assert header(text)["model-index"] == [expected]
    (result,) = ModelCard(text).data.eval_results
    assert result.metric_value == 49.625 and result.metric_args["std"] == 0.5
    assert (
        "Stamp Scenes, val, 160 images: mean_iou in %, linear probe on frozen tokens"
        in text
    )
    assert "| base | 44.00 ± 0.25 | +5.62 [+4.50, +6.75] |" in text
    assert "| self-distillation baseline | 45.50 | +4.12 |" in text
    assert "| **this model** | **49.62 ± 0.50** | |" in text
    assert "Not compared with" not in text
    lacking = {**EVALUATION, "missing_controls": ["self-distillation baseline"]}
    text = render(evaluations=[lacking])
    assert "Not compared with: self-distillation baseline." in text
    assert "Nothing was measured" not in render(
        evaluations=[EVALUATION], spurious_shares=None
    )


def test_an_unknown_licence_is_not_invented():
    text = render(model__license=None)
    assert "license" not in header(text)
    assert "**Licence:** unknown" in text
    assert "ask its owner" in text


def test_a_local_base_stands_in_no_metadata_and_no_link():
    text = render(model__base="tiny-tower")
    assert not {"base_model", "base_model_relation"} & header(text).keys()
    assert 'load_tower("tiny-tower")  # the folder of the base' in text
    assert "huggingface.co" not in text
    assert "# tiny-tower-unirefined" in text


@pytest.mark.parametrize("license_name", ["yes", "1.0", "a: b", "- x", "'"])
def test_odd_licences_survive_yaml(license_name):
    assert header(render(model__license=license_name))["license"] == license_name


def test_the_run_is_told():
    text = render(pictures=["before_after.png"])
    for part in (
        "11 unlabelled images of made-up photos",
        "**Steps:** 30 in 62 s on 2 CPU cores (x86_64)",
        "loss 1.25, loss_uni 0.5\n",
        "| learning_rate | 0.0001 |",
        "| num_crops | 3 |",
        "| fpgp_cosine | unset |",
        "| fixed pattern or global proxy (FP-GP) | 25.0 % | 12.5 % |",
        "on 8\nimages",
        "](before_after.png)",
        "2 patches",
        "24 x 24 pixels",
        "2605.19622",
    ):
        assert part in text, part
    assert "clean_ratio" not in text
    assert not re.search(r"\{\{|\{%|None", text)


def test_the_control_is_not_called_refined():
    text = render(method__name="plain", model__register_width=0)
    assert "# tiny-tower-distilled" in text
    assert "after self-distillation alone" in text and "It is the control" in text
    assert "refined by UniRefiner" not in text and "unirefined" not in text
    assert "| num_crops | 3 |" in text and "| lora_rank |" in text
    assert not re.search(r"\| (fpgp_|ah_|uni_weight|register_)", text)
    assert "Border of registers" not in text and "needs none" in text
    native = render(native=True, method__name="plain", model__register_width=0)
    assert "This is the backbone alone" in native and "pad the" not in native


def test_without_measurement_it_says_so():
    text = render(spurious_shares=None, losses={}, training__seconds=None)
    assert "Nothing was measured." in text
    assert "Last losses" not in text
    assert "**Steps:** 30 on 2 CPU cores" in text
    assert not re.search(r"\{\{|\{%|\n\n\n", text)


def test_streamed_data_has_no_count():
    assert "**Data:** images of made-up photos" in render(data__images=None)


def test_other_records_are_refused():
    with pytest.raises(ValueError, match="format 2, expected 1"):
        render(format=2)
    record = make_record()
    del record["training"]["steps"]
    with pytest.raises(ValueError, match="not finished"):
        card_from_record(record)


def test_the_example_is_what_the_template_gives():
    example = resource_folder("model_cards") / "example.md"
    assert example.read_text(encoding="utf-8") == render(
        ["before_after.png"], evaluations=[EVALUATION]
    )


# The exported folder


@pytest.fixture
def published(save_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    _, run, base = save_run()
    return merge(run, tmp_path / "tiny-tower-unirefined", model=str(base))


def test_no_path_and_no_token_is_given_away(published, tmp_path):
    files = [path for path in published.rglob("*") if path.suffix != ".py"]
    files = [path for path in files if path.is_file()]
    assert {"README.md", "config.json", "adapter_config.json"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content, path.name
        assert TOKEN.encode() not in content, path.name
        if path.suffix == ".json":
            text = json.dumps(json.loads(content))
            assert not re.search(r'"/\w|"~|[A-Z]:\\\\', text), path.name


@pytest.mark.parametrize("native", [False, True])
def test_the_code_runs_as_pasted(published, save_run, native, tmp_path):
    if native:
        name = published.name
        _, run, base = (None, tmp_path / "run", tmp_path / "tiny-tower")
        published = merge(
            run, tmp_path / name, model=str(base), native=True, overwrite=True
        )
    card = (published / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == (2 if native else 5)
    # The adapter's snippet names the base by its Hub id; a folder of that name serves.
    (tmp_path / "example-lab").mkdir()
    (tmp_path / "tiny-tower").rename(tmp_path / "example-lab" / "tiny-tower")
    for snippet in snippets:
        assert f'path = "{published.name}"' in snippet
        done = subprocess.run(
            [sys.executable, "-c", snippet],
            cwd=published.parent,
            env={
                **os.environ,
                "PYTHONPATH": str(PACKAGE.parent),
                "HF_MODULES_CACHE": str(tmp_path / "modules"),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if "feature_map" in snippet:
            assert "[1, 36, 32]" in done.stdout and "[1, 32, 6, 6]" in done.stdout
        if "pipeline" in snippet:
            assert done.stdout.split() == ["36", "32"]
