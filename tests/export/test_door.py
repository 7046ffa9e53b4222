"""`unirefiner_hf.merge` as a user calls it: what it returns, and what it refuses."""

import json
import os
from pathlib import Path

import pytest
import torch

import unirefiner_hf
from tests.export.conftest import make_refined
from tests.export.test_merge import contents, export
from unirefiner_hf import Merged, UniRefinerError
from unirefiner_hf.export.checkpoint import DTYPES, weight_dtype
from unirefiner_hf.export.result_folder import is_ours
from unirefiner_hf.export.reload_check import MERGE_LIMITS
from unirefiner_hf.modeling.errors import WrongKindError


def test_what_was_merged_tells_itself(save_run, tmp_path):
    _, run, base = save_run()
    merged = unirefiner_hf.merge(run, tmp_path / "out", model=base, dtype="bfloat16")
    assert isinstance(merged, Merged) and merged.folder == tmp_path / "out"
    told = json.loads(json.dumps(merged.to_dict()))
    files = {name: len(content) for name, content in contents(merged.folder).items()}
    assert told == {
        "folder": str(tmp_path / "out"),
        "base": "tiny-tower",
        "method": "unirefiner",
        "register_width": 2,
        "files": files,
    }
    assert str(merged) == f"The merged model is in {tmp_path / 'out'}."
    table = merged.to_markdown()
    assert "model.safetensors" in table and f"{files['model.safetensors']:,}" in table
    page = merged.save_html(tmp_path / "page.html").read_text()
    assert "model.safetensors" in page and "tiny-tower, merged (unirefiner)" in page
    assert os.fspath(merged) == str(merged.folder)
    assert unirefiner_hf.verify(merged).passed
    saved = json.loads((merged.folder / "config.json").read_text())
    assert saved["dtype"] == "bfloat16"


def test_native_has_no_border(save_run, tmp_path):
    _, run, base = save_run()
    merged = unirefiner_hf.merge(run, tmp_path / "out", model=base, native=True)
    assert merged.register_width == 0 and merged.to_dict()["method"] == "unirefiner"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float8"}, "dtype is 'float8'.*float32, float16, bfloat16"),
        ({"dtype": torch.int64}, "dtype is 'int64'"),
        ({"dtype": "tensor"}, "dtype is 'tensor'"),
        ({"register_width": -1}, "register_width is -1.*0 or more"),
        ({"register_width": "two"}, "register_width is 'two'"),
        ({"keep_text": True, "native": True}, "keep_text is true.*native"),
        ({"keep_text": True}, "keep_text is true"),
        ({"max_shard_size": "large"}, "max_shard_size is 'large'.*5GB"),
        ({"max_shard_size": -5}, "max_shard_size is -5"),
    ],
)
def test_values_that_are_not_are_refused(options, message, save_run, tmp_path):
    _, run, base = save_run()
    with pytest.raises(UniRefinerError, match=message):
        unirefiner_hf.merge(run, tmp_path / "out", model=str(base), **options)
    assert not (tmp_path / "out").exists()


def test_objects_that_are_no_folders_are_refused(save_run, tmp_path):
    _, run, base = save_run()
    with pytest.raises(WrongKindError, match="run is a int"):
        unirefiner_hf.merge(3, tmp_path / "out")
    with pytest.raises(WrongKindError, match="output is a NoneType"):
        unirefiner_hf.merge(run, None, model=base)
    with pytest.raises(UniRefinerError, match="is not a run"):
        unirefiner_hf.merge(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("where", ["run", "run/adapter", "."])
def test_a_run_is_not_replaced_by_what_is_merged_of_it(where, save_run, tmp_path):
    _, run, base = save_run()
    before = contents(tmp_path)
    with pytest.raises(UniRefinerError, match="holds the run itself"):
        unirefiner_hf.merge(run, tmp_path / where, model=base, overwrite=True)
    assert contents(tmp_path) == before


def test_types_of_weights_are_those_the_check_knows():
    assert set(DTYPES.values()) == MERGE_LIMITS.keys()
    assert weight_dtype(torch.float16) == weight_dtype("float16") == torch.float16


def test_whose_a_folder_is(tmp_path):
    folder = export(make_refined("dinov2"), tmp_path / "merged")
    assert is_ours(folder)
    for card in ("# A thesis", "---\nlicense: mit\n---\n", "---\na: [1\n---\n"):
        (folder / "README.md").write_text(card)
        assert not is_ours(folder), card
    assert not is_ours(tmp_path) and not is_ours(Path("nowhere"))
