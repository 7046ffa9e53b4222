"""The loopback Hub carries the unmodified client: what is proved here the other tests rely on."""

import hashlib
import json
from urllib.request import ProxyHandler, Request, build_opener

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
        from huggingface_hub import HfApi, ModelCard, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
        api = HfApi()
        me = api.whoami()
        assert me["name"] == "alice" and [o["name"] for o in me["orgs"]] == ["lab"]
        url = api.create_repo("alice/tiny", private=True)
        assert str(url) == api.endpoint + "/alice/tiny" and url.repo_id == "alice/tiny"
        def error_of(function, *args):
            try:
                function(*args)
            except HfHubHTTPError as error:
                return type(error).__name__, error.response.status_code
        assert error_of(api.create_repo, "alice/tiny") == ("HfHubHTTPError", 409)
        assert api.create_repo("alice/tiny", exist_ok=True).repo_id == "alice/tiny"
        first = api.upload_folder(repo_id="alice/tiny", folder_path={str(folder)!r},
                                  commit_message="First", commit_description="Why")
        again = api.upload_folder(repo_id="alice/tiny", folder_path={str(folder)!r})
        assert again.oid == first.oid and first.commit_url.endswith(first.oid)
        api.create_tag("alice/tiny", tag="v1.0", revision=first.oid)
        api.create_tag("alice/tiny", tag="v1.0", exist_ok=True)
        def tag_again():
            api.create_tag("alice/tiny", tag="v1.0")
        assert error_of(tag_again) == ("HfHubHTTPError", 409)
        api.create_branch("alice/tiny", branch="next/one")
        more = api.upload_file(repo_id="alice/tiny", path_or_fileobj=b"new words",
                               path_in_repo="onnx/notes.txt", revision="next/one")
        assert more.oid != first.oid
        api.delete_file("config.json", "alice/tiny")
        gone = error_of(api.delete_file, "config.json", "alice/tiny")
        assert gone == ("RemoteEntryNotFoundError", 404)
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
        assert {{e.path for e in tree}} - {{e.path for e in flat}} == {{"onnx/notes.txt"}}
        assert [e.path for e in api.list_repo_tree("alice/tiny", "onnx")] == ["onnx/notes.txt"]
        assert api.get_paths_info("alice/tiny", ["README.md", "onnx", "no"])[0].size == {len(CARD)}
        for revision, folder in (("v1.0", "v1"), ("next/one", "next")):
            folder = {str(tmp_path)!r} + "/" + folder
            snapshot_download("alice/tiny", revision=revision, local_dir=folder)
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
    # One push, one file on the branch, two deletions; the second push had nothing to commit.
    assert hub.count("POST", "/commit/") == 4
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


# Prints, for every line of `steps`, the line's error as "type status" or "ok".
TRIED = """
import json
from huggingface_hub import HfApi, ModelCard, CommitOperationAdd, hf_hub_download
api, told = HfApi(), []
for step in {steps!r}:
    try:
        eval(step)
        told.append("ok")
    except Exception as error:
        response = getattr(error, "response", None)
        status = "" if response is None else " " + str(response.status_code)
        told.append(type(error).__name__ + status)
print(json.dumps(told))
"""


def tried(steps, env):
    result = run_python(TRIED.format(steps=steps), env)
    return json.loads(result.stdout.splitlines()[-1])


def test_private_and_gated_repos_are_refused_as_the_hub_does(hub, client_env):
    files = {"config.json": b"{}", "model.safetensors": bytes(range(100))}
    hub.create("alice/secret", files, private=True)
    hub.create("alice/gate", files, gated="auto")
    hub.create("alice/open", files)
    steps = [
        "api.whoami()",
        "api.model_info('alice/secret')",
        "hf_hub_download('alice/secret', 'config.json')",
        "api.model_info('alice/gate')",
        "hf_hub_download('alice/gate', 'config.json')",
        "hf_hub_download('alice/open', 'config.json')",
        "hf_hub_download('alice/open', 'missing.json')",
        "hf_hub_download('alice/open', 'config.json', revision='v9')",
        "hf_hub_download('alice/none', 'config.json')",
        "api.upload_file(repo_id='alice/open', path_or_fileobj=b'x', path_in_repo='a.txt')",
        "api.create_repo('alice/more')",
    ]
    repo, gate = "RepositoryNotFoundError", "GatedRepoError"
    entry, revision = "RemoteEntryNotFoundError 404", "RevisionNotFoundError 404"
    http = "HfHubHTTPError"
    reading = ["ok", entry, revision]
    absent = [f"{repo} 404"] * 2
    assert tried(steps, client_env(token=BOB)) == (
        [
            "ok",
            *absent,
            "ok",
            f"{gate} 403",
            *reading,
            f"{repo} 404",
            f"{http} 403",
            f"{http} 403",
        ]
    )
    absent = [f"{repo} 401"] * 2
    told = tried(steps, client_env(token=None))
    assert told[0] == "LocalTokenNotFoundError"
    assert told[1:9] == [*absent, "ok", f"{gate} 401", *reading, f"{repo} 401"]
    assert {t.split()[1] for t in told[9:]} == {"401"}
    assert {t.split()[-1] for t in tried(steps, client_env(token="hf_wrong"))} == {
        "401"
    }
    hub.grant("alice/gate", "bob")
    assert tried(steps[4:5], client_env(token=BOB)) == ["ok"]
    assert set(tried(steps[:6], client_env(token=ALICE))) == {"ok"}


def test_pull_requests_and_stale_parents(hub, client_env, tmp_path):
    hub.create("lab/open", {"README.md": CARD.encode(), "a.txt": b"a"})
    old = hub.commits("lab/open")[0].oid
    new = hub.commit("lab/open", {"b.txt": b"b"})
    upload = "api.upload_file(repo_id='lab/open', path_or_fileobj={0!r}, path_in_repo={1!r}, {2})"
    steps = [
        upload.format(b"c", "c.txt", f"parent_commit={old!r}"),
        upload.format(b"c", "c.txt", f"parent_commit={new!r}"),
    ]
    assert tried(steps, client_env()) == ["HfHubHTTPError 412", "ok"]
    assert hub.commits("lab/open")[0].parent == new
    run_python(
        """
        from huggingface_hub import HfApi
        api = HfApi()
        made = api.upload_file(repo_id="lab/open", path_or_fileobj=bytes(400), create_pr=True,
                               path_in_repo="model.safetensors", commit_message="Add weights")
        assert made.pr_num == 1 and made.pr_revision == "refs/pr/1", made
        assert api.file_exists("lab/open", "model.safetensors", revision="refs/pr/1")
        assert not api.file_exists("lab/open", "model.safetensors")
        assert api.model_info("lab/open", revision="refs/pr/1").sha == made.oid
        refs = api.list_repo_refs("lab/open", include_pull_requests=True)
        assert [r.ref for r in refs.pull_requests] == ["refs/pr/1"]
        empty = api.create_pull_request("lab/open", title="Later")
        assert empty.num == 2 and empty.status == "draft" and empty.is_pull_request
        api.upload_file(repo_id="lab/open", path_or_fileobj=b"d", path_in_repo="d.txt",
                        revision="refs/pr/2")
        assert [d.title for d in api.get_repo_discussions("lab/open")] == ["Add weights", "Later"]
        """,
        client_env(token=BOB),
    )
    assert hub.files("lab/open", "refs/pr/1")["model.safetensors"] == bytes(400)
    merge = ["api.merge_pull_request('lab/open', 1)"]
    assert tried(merge, client_env(token=BOB)) == ["HfHubHTTPError 403"]
    assert tried(merge, client_env()) == ["ok"]
    assert hub.files("lab/open")["model.safetensors"] == bytes(400)
    assert hub.files("lab/open")["c.txt"] == b"c"


def test_what_the_client_retries_itself(hub, client_env, tmp_path):
    """429 and 503 at every step: the client gets over some by itself, the others raise."""
    hub.create("alice/tiny", {"config.json": b"{}"})
    again = [
        ("POST", "/preupload/", 429),
        ("POST", "/objects/batch", 503),
        ("PUT", "/storage/", 503),
        ("POST", "/objects/verify", 429),
        ("GET", "/tree/", 503),
        ("GET", "/resolve/.*/config.json", 429),
    ]
    for method, path, status in again:
        hub.fail(
            method, path, status, headers={"Retry-After": "0"} if status == 429 else {}
        )
    card = f"CommitOperationAdd('README.md', {CARD.encode()!r})"
    weights = "CommitOperationAdd('model.safetensors', bytes(500))"
    push = "api.create_commit('alice/tiny', [{0}], commit_message='Push')"
    steps = [
        push.format(weights),
        "list(api.list_repo_tree('alice/tiny'))",
        "hf_hub_download('alice/tiny', 'config.json')",
    ]
    assert tried(steps, client_env()) == ["ok", "ok", "ok"]
    for method, path, status in again:
        assert hub.count(method, path, status) == 1, path
        assert hub.count(method, path, 200) == 1, path

    hub.fail("POST", "/repos/create", 429)
    hub.fail("POST", "/validate-yaml", 503)
    hub.fail("POST", "/validate-yaml", 502, body=b"<html>Bad gateway</html>")
    hub.fail("POST", "/validate-yaml", 429)
    hub.fail("POST", "/commit/", 503)
    hub.fail("POST", "/tag/", 503)
    hub.fail("POST", "/branch/", 503)
    hub.fail("GET", "/revision/main", 503)
    hub.fail("GET", "/whoami", 429)
    hub.fail("GET", "/refs", 0)
    steps = [
        "api.create_repo('alice/new')",
        push.format(card),
        push.format(card),
        f"ModelCard({CARD!r}).validate()",
        push.format(card),
        "api.create_tag('alice/tiny', tag='v1')",
        "api.create_branch('alice/tiny', branch='b')",
        "api.model_info('alice/tiny', revision='main')",
        "api.whoami()",
        "api.list_repo_refs('alice/tiny')",
    ]
    http = "HfHubHTTPError"
    # A gateway's page instead of JSON makes validate-yaml a JSONDecodeError, which is a ValueError.
    told = [
        f"{http} 429",
        f"{http} 503",
        "JSONDecodeError",
        f"{http} 429",
        *[f"{http} 503"] * 4,
    ]
    assert tried(steps, client_env()) == [*told, f"{http} 429", "RemoteProtocolError"]
    assert "alice/new" not in hub.repos and "README.md" not in hub.files("alice/tiny")

    # A commit that changes nothing, which the client itself never sends, makes no new one.
    lines = [("header", {"summary": "Same"})]
    lines += [
        ("file", {"path": "config.json", "content": "e30=", "encoding": "base64"})
    ]
    body = "".join(json.dumps({"key": k, "value": v}) + "\n" for k, v in lines)
    head = hub.commits("alice/tiny")[0].oid
    request = Request(
        f"{hub.url}/api/models/alice/tiny/commit/main",
        data=body.encode(),
        headers={"Authorization": f"Bearer {ALICE}"},
    )
    opener = build_opener(ProxyHandler({}))
    assert json.load(opener.open(request))["commitOid"] == head
    assert hub.commits("alice/tiny")[0].oid == head

    # The reply to a commit is lost: a second push finds everything there.
    hub.fail("POST", "/commit/", 503, after=True)
    before = len(hub.commits("alice/tiny"))
    sent = hub.count("POST", "/commit/")
    assert tried([push.format(card)] * 2, client_env()) == [f"{http} 503", "ok"]
    assert len(hub.commits("alice/tiny")) == before + 1
    assert hub.count("POST", "/commit/") == sent + 1


def test_multipart_and_a_client_killed_in_the_middle(hub, client_env, tmp_path):
    hub.multipart_threshold, hub.part_size = 10_000, 4_000
    files = write_model(tmp_path / "model", shards=3, size=16_000)
    hub.create("alice/tiny", private=True)
    code = f"""
    from huggingface_hub import HfApi
    HfApi().upload_folder(repo_id="alice/tiny", folder_path={str(tmp_path / "model")!r})
    """
    hold = hub.hold(r"/storage/\w+\?part=3", "PUT")
    client = start_python(code, client_env())
    hold.wait()
    client.kill()
    client.communicate()
    hub.release()
    assert len(hub.commits("alice/tiny")) == 1
    assert all(3 not in upload["parts"] for upload in hub.uploads.values())
    assert {r.status for r in hub.matching("PUT", "part=3")} == {0}
    assert hub.count("PUT", "part=1", 200) > 0
    run_python(code, client_env())
    assert without_attributes(hub.files("alice/tiny")) == files
    assert hub.count("POST", "/complete") == 3
    assert all(r.token is None for r in hub.matching("PUT", "/storage/"))

    # The same once the commit is through and only its reply is missing.
    hold = hub.hold("/commit/", after=True)
    (tmp_path / "model/onnx/notes.txt").write_bytes(b"other words")
    client = start_python(code, client_env())
    hold.wait()
    client.kill()
    client.communicate()
    hub.release()
    assert [r.status for r in hub.matching("POST", "/commit/")] == [200, 0]
    puts = hub.count("PUT", "/storage/")
    run_python(code, client_env())
    assert len(hub.commits("alice/tiny")) == 3 and hub.count("PUT", "/storage/") == puts
    assert hub.files("alice/tiny")["onnx/notes.txt"] == b"other words"


def test_a_flipped_byte_is_accepted_by_downloads(hub, client_env, tmp_path):
    data = bytes(range(200))
    hub.create("alice/tiny", {"model.safetensors": data, "config.json": b'{"a": 1}'})
    hub.flip_byte("alice/tiny", "model.safetensors", 7)
    hub.flip_byte("alice/tiny", "config.json")
    result = run_python(
        f"""
        from huggingface_hub import HfApi, snapshot_download
        snapshot_download("alice/tiny", local_dir={str(tmp_path / "got")!r})
        checked = HfApi().verify_repo_checksums("alice/tiny", local_dir={str(tmp_path / "got")!r})
        print(sorted(m["path"] for m in checked.mismatches))
        """,
        client_env(),
    )
    assert result.stdout.split() == ["['config.json',", "'model.safetensors']"]
    got = (tmp_path / "got/model.safetensors").read_bytes()
    assert len(got) == 200 and got != data


BAD_CARDS = {
    "license": CARD.replace("mit", "mine"),
    "base_model": CARD.replace("facebook/dinov2-small", "/tmp/tower"),
    "value": CARD.replace(", value: 0.1", ""),
    "dataset.name": CARD.replace(", name: demo", ""),
    "metrics": CARD.replace("metrics:", "scores:"),
    "parsed": CARD.replace("[vision]", "[vision"),
    "tags": CARD.replace("[vision]", "[1]"),
}


def test_cards_are_validated_before_anything_is_uploaded(hub, client_env):
    hub.create("alice/tiny")
    result = run_python(
        f"""
        import json, warnings
        from huggingface_hub import HfApi, ModelCard
        ModelCard({CARD!r}).validate()
        warnings.simplefilter("ignore")
        ModelCard("# No head", ignore_metadata_errors=True).validate()
        told = {{}}
        for word, text in {BAD_CARDS!r}.items():
            try:
                HfApi().upload_file(repo_id="alice/tiny", path_or_fileobj=text.encode(),
                                    path_in_repo="README.md")
            except ValueError as error:
                told[word] = str(error)
        print(json.dumps(told))
        """,
        client_env(),
    )
    told = json.loads(result.stdout)
    assert list(told) == list(BAD_CARDS)
    assert all(word in text for word, text in told.items()), told
    assert hub.count("POST", "/preupload/") == 0 and len(hub.commits("alice/tiny")) == 1
    assert [r.token for r in hub.matching("POST", "/validate-yaml", 200)] == [
        None,
        None,
    ]


@pytest.fixture
def xet_hub():
    pytest.importorskip("hf_xet")
    hub = make_hub(xet=True)
    yield hub
    hub.stop()


def test_xet_upload_and_download(xet_hub, client_env, tmp_path):
    """Undocumented: see `xet_store`. The LFS tests above are the ones to rely on."""
    hub, folder = xet_hub, tmp_path / "model"
    files = write_model(folder, size=100_000)
    code = f"""
    from huggingface_hub import HfApi, snapshot_download
    HfApi().create_repo("alice/tiny", private=True, exist_ok=True)
    made = HfApi().upload_folder(repo_id="alice/tiny", folder_path={str(folder)!r})
    again = HfApi().upload_folder(repo_id="alice/tiny", folder_path={str(folder)!r})
    assert again.oid == made.oid
    snapshot_download("alice/tiny", local_dir={str(tmp_path / "got")!r})
    """
    run_python(code, client_env(xet=True, url=hub.url))
    assert hub.count("PUT", "/storage/") == hub.count("POST", "/objects/batch") == 0
    assert hub.count("GET", "/xet-write-token/", 200) > 0
    assert hub.count("GET", "/xet-read-token/", 200) > 0
    assert hub.count("GET", "/resolve/.*safetensors") == 0
    assert without_attributes(hub.files("alice/tiny")) == files
    run_python(
        """
        from huggingface_hub import hf_hub_download
        hf_hub_download("alice/tiny", "model-00001-of-00002.safetensors")
        """,
        client_env(xet=True, url=hub.url),
    )
    assert hub.count("HEAD", "/resolve/.*safetensors") == 1
    assert hub.count("GET", "/resolve/.*safetensors") == 0
    # A client without Xet reads the same files, and adds one by LFS.
    other = tmp_path / "other"
    run_python(
        f"""
        from huggingface_hub import HfApi, snapshot_download
        snapshot_download("alice/tiny", local_dir={str(other)!r})
        HfApi().upload_file(repo_id="alice/tiny", path_or_fileobj=bytes(99),
                            path_in_repo="extra.safetensors")
        """,
        client_env(url=hub.url),
    )
    for path, data in files.items():
        assert (tmp_path / "got" / path).read_bytes() == data
        assert (other / path).read_bytes() == data
    assert hub.files("alice/tiny")["extra.safetensors"] == bytes(99)
