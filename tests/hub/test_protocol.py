"""The loopback Hub carries the unmodified client: what is proved here the other tests rely on."""

import hashlib
import time

import pytest

from .conftest import ALICE, BOB, make_hub, run_python, start_python

CARD = """---
license: mit
base_model: facebook/dinov2-small
tags: [vision]
library_name: transformers
model-index:
- name: tiny
  results:
  - task: {type: image-feature-extraction}
    dataset: {type: imagefolder, name: demo}
    metrics: [{type: spurious, value: 0.1}]
---
# Tiny
"""


def write_model(folder, shards=2, size=3000):
    """A folder as a sharded model has it; the content by path."""
    files = {"README.md": CARD.encode(), "config.json": b'{"model_type": "tiny"}'}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        files[name] = hashlib.sha256(bytes([i])).digest() * (size // 32)
    files["onnx/notes.txt"] = b"words"
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return files


def without_attributes(files):
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def test_push_again_tag_and_download(hub, client_env, tmp_path):
    folder = tmp_path / "model"
    files = write_model(folder)
    run_python(
        f"""
        from huggingface_hub import HfApi, snapshot_download, hf_hub_download, ModelCard
        api = HfApi()
        me = api.whoami()
        assert me["name"] == "alice" and [o["name"] for o in me["orgs"]] == ["lab"]
        url = api.create_repo("alice/tiny", private=True)
        assert str(url) == api.endpoint + "/alice/tiny" and url.repo_id == "alice/tiny"
        try:
            api.create_repo("alice/tiny")
        except Exception as error:
            assert error.response.status_code == 409
        assert api.create_repo("alice/tiny", exist_ok=True).repo_id == "alice/tiny"
        first = api.upload_folder(repo_id="alice/tiny", folder_path={str(folder)!r},
                                  commit_message="First", commit_description="Why")
        again = api.upload_folder(repo_id="alice/tiny", folder_path={str(folder)!r})
        assert again.oid == first.oid and first.commit_url.endswith(first.oid)
        api.create_tag("alice/tiny", tag="v1.0", revision=first.oid)
        api.create_tag("alice/tiny", tag="v1.0", exist_ok=True)
        api.create_branch("alice/tiny", branch="next/one")
        more = api.upload_file(repo_id="alice/tiny", path_or_fileobj=b"new words",
                               path_in_repo="onnx/notes.txt", revision="next/one")
        assert more.oid != first.oid
        api.delete_file("config.json", "alice/tiny")
        try:
            api.delete_file("config.json", "alice/tiny")
        except Exception as error:
            assert "EntryNotFound" in type(error).__name__, error
        refs = api.list_repo_refs("alice/tiny")
        assert [b.name for b in refs.branches] == ["main", "next/one"], refs
        assert refs.tags[0].target_commit == first.oid
        titles = [c.title for c in api.list_repo_commits("alice/tiny", revision="v1.0")]
        assert titles == ["First", "initial commit"]
        info = api.model_info("alice/tiny", revision="v1.0", files_metadata=True)
        assert info.private and info.sha == first.oid and info.card_data.license == "mit"
        assert info.card_data.eval_results[0].metric_value == 0.1
        weights = [s for s in info.siblings if s.lfs]
        assert len(weights) == 2 and all(s.size == s.lfs.size == 2976 for s in weights)
        tree = list(api.list_repo_tree("alice/tiny", recursive=True, revision="v1.0"))
        assert {{e.path for e in tree}} == {{s.rfilename for s in info.siblings}} | {{"onnx"}}
        flat = list(api.list_repo_tree("alice/tiny", revision="v1.0"))
        assert {{"onnx"}} == {{e.path for e in tree}} - {{e.path for e in flat}} - {{"onnx/notes.txt"}} \\
            or "onnx" in [e.path for e in flat]
        assert [e.path for e in api.list_repo_tree("alice/tiny", "onnx")] == ["onnx/notes.txt"]
        assert api.get_paths_info("alice/tiny", ["README.md", "onnx", "no"])[0].size == {len(CARD)}
        local = snapshot_download("alice/tiny", revision="v1.0", local_dir={str(tmp_path / "v1")!r})
        snapshot_download("alice/tiny", revision="next/one", local_dir={str(tmp_path / "next")!r})
        assert api.file_exists("alice/tiny", "config.json", revision="v1.0")
        assert not api.file_exists("alice/tiny", "config.json")
        snapshot_download("alice/tiny", revision="v1.0")
        api.verify_repo_checksums("alice/tiny", revision="v1.0")
        assert ModelCard.load("alice/tiny").data.license == "mit"
        api.update_repo_settings("alice/tiny", private=False)
        assert not api.model_info("alice/tiny").private
        api.delete_tag("alice/tiny", tag="v1.0")
        api.delete_branch("alice/tiny", branch="next/one")
        """,
        client_env(),
    )
    assert without_attributes(hub.files("alice/tiny")) == {
        path: data for path, data in files.items() if path != "config.json"
    }
    for path, data in files.items():
        assert (tmp_path / "v1" / path).read_bytes() == data
    assert (tmp_path / "next/onnx/notes.txt").read_bytes() == b"new words"
    assert hub.count("PUT", "/storage/") == 2
    assert [c.title for c in hub.commits("alice/tiny")][1:] == [
        "First",
        "initial commit",
    ]
    assert hub.commits("alice/tiny")[1].message == "Why"
    # The card is checked before anything is uploaded.
    paths = [r.path for r in hub.requests]
    assert paths.index("/api/validate-yaml") < next(
        i for i, path in enumerate(paths) if "/preupload/" in path
    )
