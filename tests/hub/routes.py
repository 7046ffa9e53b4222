"""What the loopback Hub answers to each call of the protocol."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import secrets
import time
from math import ceil
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import yaml

from .card_rules import REPO_ID, read_metadata, validate_card
from .server import Commit, File, HubError, Reply, Repo, Request, json_reply, now

if TYPE_CHECKING:
    from .server import LoopbackHub

MODEL = r"/api/models/([^/]+/[^/]+)"
ROUTES: list[tuple[str, re.Pattern, str]] = []


def route(method: str, pattern: str):
    def keep(function):
        ROUTES.append((method, re.compile(pattern), function.__name__))
        return function

    return keep


class Call:
    """One request while it is carried out; the server's lock is held."""

    def __init__(self, hub: LoopbackHub, request: Request, body: bytes):
        self.hub, self.request, self.body = hub, request, body
        self.query = parse_qs(request.query)
        self.user = hub.users.get(request.token) if request.token else None

    def run(self) -> Reply:
        method = "GET" if self.request.method == "HEAD" else self.request.method
        if self.request.token and self.user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        for verb, pattern, name in ROUTES:
            if verb == method and (found := pattern.fullmatch(self.request.path)):
                return getattr(self, name)(
                    *(unquote(g) if g else g for g in found.groups())
                )
        raise HubError(404, f"Sorry, we can't find {method} {self.request.path}")

    def data(self) -> dict[str, Any]:
        try:
            data = json.loads(self.body or b"{}")
        except ValueError:
            raise HubError(400, "The body is not JSON") from None
        if not isinstance(data, dict):
            raise HubError(400, "The body is not a JSON object")
        return data

    def signed_in(self) -> str:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return self.user

    @property
    def may_write(self) -> bool:
        """Whether the token is for more than reading."""
        return self.hub.roles.get(str(self.request.token)) == "write"

    def owns(self, namespace: str) -> bool:
        return self.user is not None and namespace in {
            self.user,
            *self.hub.orgs[self.user],
        }

    def repo(self, repo_id: str, *, write: bool = False, content: bool = False) -> Repo:
        """The repo if this user may see it, write to it, read its content."""
        repo = self.hub.repos.get(repo_id)
        owner = self.owns(repo_id.split("/")[0])
        if repo is None or (repo.private and not owner):
            if self.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and not (owner and self.may_write):
            self.signed_in()
            raise HubError(403, f"You don't have the rights to write to {repo_id}")
        if content and repo.gated and not owner and self.user not in repo.granted:
            text = f"Access to model {repo_id} is restricted."
            raise HubError(401 if self.user is None else 403, text, "GatedRepo")
        return repo

    # Users, repos, cards

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Reply:
        user = self.signed_in()
        role = self.hub.roles[str(self.request.token)]
        token = {"displayName": "test", "role": role, "createdAt": now()}
        return json_reply(
            {
                "type": "user",
                "id": user,
                "name": user,
                "fullname": user,
                "email": f"{user}@example.org",
                "isPro": False,
                "orgs": [
                    {"type": "org", "name": o} for o in sorted(self.hub.orgs[user])
                ],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    def named(self, data: dict) -> str:
        user = self.signed_in()
        if data.get("type", "model") not in ("model", None):
            raise HubError(
                400, f"This server has model repos only, not {data['type']!r}"
            )
        repo_id = f"{data.get('organization') or user}/{data.get('name')}"
        if not REPO_ID.fullmatch(repo_id):
            raise HubError(400, f"Invalid repo name: {repo_id}")
        if not (self.owns(repo_id.split("/")[0]) and self.may_write):
            raise HubError(
                403, f"You don't have the rights to do this in {repo_id.split('/')[0]}"
            )
        return repo_id

    @route("POST", "/api/repos/create")
    def create(self) -> Reply:
        data = self.data()
        repo_id = self.named(data)
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise HubError(
                409, "You already created this model repo", url=url, name=repo_id
            )
        private = data.get("visibility") == "private" or bool(data.get("private"))
        self.hub.create(repo_id, private=private)
        return json_reply({"url": url, "name": repo_id, "id": repo_id})

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> Reply:
        repo_id = self.named(self.data())
        self.repo(repo_id, write=True)
        del self.hub.repos[repo_id]
        return json_reply({})

    @route("PUT", f"{MODEL}/settings")
    def settings(self, repo_id: str) -> Reply:
        repo, data = self.repo(repo_id, write=True), self.data()
        if "visibility" in data or "private" in data:
            repo.private = data.get("visibility") == "private" or bool(
                data.get("private")
            )
        if "gated" in data:
            repo.gated = data["gated"]
        return json_reply({"private": repo.private, "gated": repo.gated})

    @route("GET", f"{MODEL}/auth-check(/write)?")
    def auth_check(self, repo_id: str, write: str | None) -> Reply:
        self.repo(repo_id, write=bool(write), content=True)
        return json_reply({})

    @route("POST", "/api/validate-yaml")
    def validate(self) -> Reply:
        errors, warnings = validate_card(str(self.data().get("content", "")))
        reply = {
            "errors": [{"message": text} for text in errors],
            "warnings": [{"message": text} for text in warnings],
        }
        return json_reply(reply, 400 if errors else 200)

    # Reading

    @route("GET", f"{MODEL}(?:/revision/([^/]+))?")
    def info(self, repo_id: str, revision: str | None) -> Reply:
        repo = self.repo(repo_id)
        head = repo.resolve(revision or "main")
        blobs = "blobs" in self.query
        siblings = []
        for path, file in head.tree.items():
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                sibling.update(size=file.size, blobId=file.blob_id)
                if file.lfs:
                    sibling["lfs"] = {
                        "size": file.size,
                        "sha256": file.oid,
                        "pointerSize": len(file.pointer),
                    }
            siblings.append(sibling)
        metadata = self.card(repo, head)
        tags = metadata.get("tags")
        return json_reply(
            {
                "_id": hashlib.sha1(repo_id.encode()).hexdigest()[:24],
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": head.oid,
                "lastModified": head.date,
                "createdAt": self.hub.commits(repo_id)[-1].date,
                "private": repo.private,
                "gated": repo.gated,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "library_name": metadata.get("library_name"),
                "pipeline_tag": metadata.get("pipeline_tag"),
                "tags": tags if isinstance(tags, list) else [],
                "cardData": metadata,
                "model-index": metadata.get("model-index"),
                "siblings": siblings,
            }
        )

    def card(self, repo: Repo, head: Commit) -> dict:
        if "README.md" not in head.tree:
            return {}
        try:
            text = self.hub.content(repo, head.tree["README.md"]).decode(
                errors="replace"
            )
            metadata = read_metadata(text)
        except yaml.YAMLError:
            return {}
        return (
            json.loads(json.dumps(metadata, default=str))
            if isinstance(metadata, dict)
            else {}
        )

    def entry(self, path: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path}
        entry.update(size=file.size, oid=file.blob_id)
        if file.lfs:
            size = len(file.pointer)
            entry["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": size}
        if file.xet:
            entry["xetHash"] = file.xet
        return entry

    @staticmethod
    def folders(tree) -> list[str]:
        names = {path.rsplit("/", 1)[0] for path in tree if "/" in path}
        parents = {name[:i] for name in names for i, c in enumerate(name) if c == "/"}
        return sorted(names | parents)

    def folder_entry(self, path: str) -> dict[str, Any]:
        oid = hashlib.sha1(path.encode()).hexdigest()
        return {"type": "directory", "path": path, "oid": oid, "size": 0}

    @route("GET", f"{MODEL}/tree/([^/]+)(?:/(.+))?")
    def tree(self, repo_id: str, revision: str, folder: str | None) -> Reply:
        head = self.repo(repo_id).resolve(revision)
        commit = {"X_Repo_Commit": head.oid}
        folders = self.folders(head.tree)
        prefix = f"{folder.strip('/')}/" if folder else ""
        if folder and folder.strip("/") not in folders:
            text = f"{folder} does not exist on {revision}"
            raise HubError(404, text, "EntryNotFound", {"X-Repo-Commit": head.oid})
        entries = [self.folder_entry(path) for path in folders]
        entries += [self.entry(path, file) for path, file in head.tree.items()]
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = [
            e
            for e in entries
            if e["path"].startswith(prefix)
            and (deep or "/" not in e["path"][len(prefix) :])
        ]
        limit = int(self.query.get("limit", ["1000"])[0])
        start = int(self.query.get("cursor", ["0"])[0])
        if start + limit < len(entries):
            more = f"recursive={deep}&limit={limit}&cursor={start + limit}"
            commit["Link"] = f'<{self.hub.url}{self.request.path}?{more}>; rel="next"'
        return json_reply(entries[start : start + limit], **commit)

    @route("POST", f"{MODEL}/paths-info/([^/]+)")
    def paths_info(self, repo_id: str, revision: str) -> Reply:
        head = self.repo(repo_id).resolve(revision)
        if self.request.headers.get("Content-Type", "").startswith("application/json"):
            paths = self.data().get("paths", [])
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        folders = self.folders(head.tree)
        found = [self.entry(p, head.tree[p]) for p in paths if p in head.tree]
        return json_reply(found + [self.folder_entry(p) for p in paths if p in folders])

    @route("GET", f"{MODEL}/commits/([^/]+)")
    def history(self, repo_id: str, revision: str) -> Reply:
        self.repo(repo_id).resolve(revision)
        return json_reply(
            [
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": commit.message,
                    "date": commit.date,
                    "authors": [{"user": commit.author}],
                }
                for commit in self.hub.commits(repo_id, revision)
            ]
        )

    @route("GET", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
    def resolve(self, repo_id: str, revision: str, path: str) -> Reply:
        repo = self.repo(repo_id, content=True)
        head = repo.resolve(revision)
        headers = {"X-Repo-Commit": head.oid, "Accept-Ranges": "bytes"}
        if path not in head.tree:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        file = head.tree[path]
        headers.update(
            {"ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"}
        )
        if file.lfs:
            headers.update(
                {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
            )
        if file.xet:
            token = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{head.oid}"
            headers.update(
                {"X-Xet-Hash": file.xet, "Link": f'<{token}>; rel="xet-auth"'}
            )
        if self.request.method == "HEAD":
            return Reply(200, b"", {**headers, "Content-Length": str(file.size)})
        return self.ranged(self.hub.content(repo, file), headers)

    def ranged(self, data: bytes, headers: dict[str, str]) -> Reply:
        asked = (
            self.request.headers.get("Range") or self.request.headers.get("range") or ""
        )
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
        if not found or found.groups() == ("", ""):
            return Reply(200, data, headers)
        first, last = found.groups()
        size = len(data)
        start = int(first) if first else max(0, size - int(last))
        end = min(int(last), size - 1) if first and last else size - 1
        if start > end:
            error = {"Content-Range": f"bytes */{size}"}
            raise HubError(416, "Range not satisfiable", headers=error)
        headers = {**headers, "Content-Range": f"bytes {start}-{end}/{size}"}
        return Reply(206, data[start : end + 1], headers)

    # Uploading

    def target(self, repo_id: str, revision: str) -> Repo:
        """The repo to write to. Any reader may open a pull request and add to one of their own."""
        repo = self.repo(repo_id, content=True)
        user = self.signed_in()
        number = re.fullmatch(r"refs/pr/(\d+)", revision)
        if number and int(number[1]) <= len(repo.discussions):
            if self.discussion_of(repo, number[1])["author"]["name"] == user:
                return repo
        pull_request = self.query.get("create_pr", ["0"])[0] == "1"
        return repo if pull_request else self.repo(repo_id, write=True)

    @route("POST", f"{MODEL}/preupload/([^/]+)")
    def preupload(self, repo_id: str, revision: str) -> Reply:
        repo = self.target(repo_id, revision)
        tree = repo.resolve(revision).tree
        files = []
        for asked in self.data().get("files", []):
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            lfs = self.hub.is_lfs(path, asked["size"], sample)
            present = tree.get(path)
            files.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": present.oid if present else None,
                }
            )
        return json_reply({"files": files, "commitOid": repo.resolve(revision).oid})

    @route("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def batch(self, repo_id: str) -> Reply:
        self.signed_in()
        # As on the Hub, a reader may upload: a pull request needs it. The commit checks the rest.
        repo, data = self.repo(repo_id, content=True), self.data()
        if (
            data.get("operation") != "upload"
            or data.get("hash_algo", "sha256") != "sha256"
        ):
            raise HubError(422, "Only uploads with sha256 are served")
        objects, used = [], "basic"
        for asked in data.get("objects", []):
            oid, size = asked["oid"], asked["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
            if oid not in repo.blobs:
                verify = {
                    "href": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"
                }
                parts = size > self.hub.multipart_threshold
                if parts and "multipart" not in data.get("transfers", []):
                    raise HubError(422, f"{oid} needs the multipart transfer")
                used = "multipart" if parts else used
                answer["actions"] = {"upload": self.upload(repo, oid, size, parts)}
                answer["actions"]["verify"] = verify
            objects.append(answer)
        return json_reply({"transfer": used, "objects": objects})

    def upload(self, repo: Repo, oid: str, size: int, parts: bool) -> dict[str, Any]:
        """A signed place to upload to: no token is needed there."""
        key = secrets.token_hex(12)
        self.hub.uploads[key] = {"repo": repo.id, "oid": oid, "size": size, "parts": {}}
        if not parts:
            return {"href": f"{self.hub.url}/storage/{key}", "header": {}}
        header = {"chunk_size": str(self.hub.part_size)}
        for number in range(1, ceil(size / self.hub.part_size) + 1):
            header[str(number)] = f"{self.hub.url}/storage/{key}?part={number}"
        return {"href": f"{self.hub.url}/storage/{key}/complete", "header": header}

    def pending(self, key: str) -> dict[str, Any]:
        if key not in self.hub.uploads:
            raise HubError(403, "Request has expired")
        return self.hub.uploads[key]

    @route("PUT", "/storage/([0-9a-f]+)")
    def put(self, key: str) -> Reply:
        upload = self.pending(key)
        etag = f'"{hashlib.md5(self.body).hexdigest()}"'
        if "part" in self.query:
            upload["parts"][int(self.query["part"][0])] = (etag, self.body)
        else:
            self.store(upload, self.body)
        return Reply(200, b"", {"ETag": etag})

    @route("POST", "/storage/([0-9a-f]+)/complete")
    def complete(self, key: str) -> Reply:
        upload, parts = self.pending(key), self.data()["parts"]
        stored = upload["parts"]
        wanted = [(number, stored[number][0]) for number in sorted(stored)]
        if [(part["partNumber"], part["etag"]) for part in parts] != wanted:
            raise HubError(400, "One or more of the specified parts could not be found")
        self.store(upload, b"".join(stored[number][1] for number in sorted(stored)))
        return json_reply({})

    def store(self, upload: dict[str, Any], data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != upload["oid"]:
            raise HubError(400, f"The content is not {upload['oid']}")
        self.hub.repos[upload["repo"]].blobs[upload["oid"]] = data

    @route("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/verify")
    def verify(self, repo_id: str) -> Reply:
        self.signed_in()
        repo, data = self.repo(repo_id, content=True), self.data()
        if len(repo.blobs.get(data["oid"], b"")) != data["size"]:
            raise HubError(404, f"Object {data['oid']} is not here or has another size")
        return json_reply({})

    def operations(self) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
        try:
            lines = [
                json.loads(line) for line in self.body.splitlines() if line.strip()
            ]
            pairs = [(line["key"], line["value"]) for line in lines]
        except (ValueError, KeyError, TypeError):
            raise HubError(400, "The commit is not valid ndjson") from None
        if not pairs or pairs[0][0] != "header" or not pairs[0][1].get("summary"):
            raise HubError(400, "The first line must be a header with a summary")
        return pairs[0][1], pairs[1:]

    @route("POST", f"{MODEL}/commit/([^/]+)")
    def commit(self, repo_id: str, revision: str) -> Reply:
        repo = self.target(repo_id, revision)
        header, operations = self.operations()
        head, ref = repo.resolve(revision), repo.ref(revision)
        pull_request = self.query.get("create_pr", ["0"])[0] == "1"
        if not pull_request and (ref is None or ref.startswith("refs/tags/")):
            raise HubError(400, f"{revision} is not a branch")
        parent = header.get("parentCommit")
        if parent is not None and not head.oid.startswith(parent):
            raise HubError(
                412, "A commit has happened since. Please refresh and try again."
            )
        tree = dict(head.tree)
        for key, value in operations:
            self.apply(repo, tree, key, value)
        self.check_card(repo, tree, head)
        number = None
        if pull_request:
            number = self.open_discussion(
                repo, header["summary"], header.get("description"), True
            )
            ref = f"refs/pr/{number}"
        assert ref is not None
        made = repo.commit(
            ref,
            head,
            tree,
            self.signed_in(),
            header["summary"],
            header.get("description") or "",
        )
        reply = {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{self.hub.url}/{repo_id}/commit/{made.oid}",
            "hookOutput": "",
        }
        if number is not None:
            reply["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        return json_reply(reply)

    def apply(
        self, repo: Repo, tree: dict[str, File], key: str, value: dict[str, Any]
    ) -> None:
        path = value.get("path", "")
        if (
            not path
            or path.startswith("/")
            or {"", ".", ".."} & set(path.rstrip("/").split("/"))
        ):
            raise HubError(400, f"Invalid path: {path!r}")
        if key == "file":
            try:
                data = base64.b64decode(value["content"], validate=True)
            except binascii.Error:
                raise HubError(400, f"{path}: the content is not base64") from None
            if self.hub.is_lfs(path, len(data), data[:512]):
                raise HubError(400, f"{path} must be uploaded as an LFS file")
            tree[path] = repo.add(data, lfs=False)
        elif key == "lfsFile":
            oid = value["oid"]
            stored = self.hub.xet_store.find(oid) if self.hub.xet_store else None
            if oid in repo.blobs:
                tree[path] = File(oid, len(repo.blobs[oid]), True)
            elif stored is not None:
                tree[path] = File(oid, stored.size, True, stored.hash)
            else:
                raise HubError(
                    400, f"LFS pointer pointed to a file that does not exist: {path}"
                )
        elif key in ("deletedFile", "deletedFolder"):
            prefix = path.rstrip("/") + "/"
            gone = (
                [path]
                if key == "deletedFile"
                else [p for p in tree if p.startswith(prefix)]
            )
            if not gone or not set(gone) <= set(tree):
                text = f"A file with this name doesn't exist: {path}"
                raise HubError(404, text, "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise HubError(400, f"Unknown operation {key!r}")

    def check_card(self, repo: Repo, tree: dict[str, File], head: Commit) -> None:
        card = tree.get("README.md")
        if card is None or card == head.tree.get("README.md"):
            return
        errors, _ = validate_card(self.hub.content(repo, card).decode(errors="replace"))
        if errors:
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))

    # Refs and discussions

    @route("GET", f"{MODEL}/refs")
    def refs(self, repo_id: str) -> Reply:
        repo = self.repo(repo_id)

        def listed(prefix: str, names: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(names), "ref": ref, "targetCommit": oid}
                for ref, oid in repo.refs.items()
                if ref.startswith(prefix)
            ]

        return json_reply(
            {
                "branches": listed("refs/heads/", "refs/heads/"),
                "tags": listed("refs/tags/", "refs/tags/"),
                "converts": [],
                "pullRequests": listed("refs/pr/", "refs/pr/"),
            }
        )

    def make_ref(self, repo: Repo, ref: str, revision: str) -> Reply:
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.resolve(revision).oid
        return json_reply({})

    def drop_ref(self, repo: Repo, ref: str) -> Reply:
        if ref not in repo.refs or ref == "refs/heads/main":
            raise HubError(404, f"Invalid reference: {ref}", "RevisionNotFound")
        del repo.refs[ref]
        return json_reply({})

    @route("POST", f"{MODEL}/branch/([^/]+)")
    def make_branch(self, repo_id: str, branch: str) -> Reply:
        start = self.data().get("startingPoint", "main")
        return self.make_ref(
            self.repo(repo_id, write=True), f"refs/heads/{branch}", start
        )

    @route("DELETE", f"{MODEL}/branch/([^/]+)")
    def drop_branch(self, repo_id: str, branch: str) -> Reply:
        return self.drop_ref(self.repo(repo_id, write=True), f"refs/heads/{branch}")

    @route("POST", f"{MODEL}/tag/([^/]+)")
    def make_tag(self, repo_id: str, revision: str) -> Reply:
        ref = f"refs/tags/{self.data()['tag']}"
        if re.search(r"[\s~^:?*\[\\]|\.\.|//|/$|\.$", ref):
            raise HubError(400, f"Invalid reference name: {ref}")
        return self.make_ref(self.repo(repo_id, write=True), ref, revision)

    @route("DELETE", f"{MODEL}/tag/([^/]+)")
    def drop_tag(self, repo_id: str, tag: str) -> Reply:
        return self.drop_ref(self.repo(repo_id, write=True), f"refs/tags/{tag}")

    def open_discussion(
        self, repo: Repo, title: str, text: str | None, pull_request: bool
    ) -> int:
        number = len(repo.discussions) + 1
        repo.discussions.append(
            {
                "num": number,
                "title": title,
                "description": text or "",
                "author": {"name": self.signed_in()},
                "createdAt": now(),
                "status": "open",
                "isPullRequest": pull_request,
                "repo": {"name": repo.id, "type": "model"},
                "events": [],
                "diff": "",
                "filesWithConflicts": [],
                "changes": {"base": "refs/heads/main"},
            }
        )
        return number

    @route("GET", f"{MODEL}/discussions")
    def discussions(self, repo_id: str) -> Reply:
        found = self.repo(repo_id).discussions
        return json_reply({"count": len(found), "start": 0, "discussions": found})

    @route("POST", f"{MODEL}/discussions")
    def discuss(self, repo_id: str) -> Reply:
        self.signed_in()
        repo, data = self.repo(repo_id), self.data()
        pull_request = bool(data.get("pullRequest"))
        number = self.open_discussion(
            repo, data["title"], data.get("description"), pull_request
        )
        if pull_request:
            repo.discussions[-1]["status"] = "draft"
            repo.refs[f"refs/pr/{number}"] = repo.refs["refs/heads/main"]
        return json_reply({"num": number, "pullRequest": pull_request})

    def discussion_of(self, repo: Repo, number: str) -> dict[str, Any]:
        if not 1 <= int(number) <= len(repo.discussions):
            raise HubError(404, f"No discussion {number}")
        return repo.discussions[int(number) - 1]

    @route("GET", rf"{MODEL}/discussions/(\d+)")
    def discussion(self, repo_id: str, number: str) -> Reply:
        return json_reply(self.discussion_of(self.repo(repo_id), number))

    @route("POST", rf"{MODEL}/discussions/(\d+)/merge")
    def merge(self, repo_id: str, number: str) -> Reply:
        """Merge the files that the pull request changed since it left main."""
        repo = self.repo(repo_id, write=True)
        talk, main = self.discussion_of(repo, number), repo.resolve("main")
        if not talk["isPullRequest"] or talk["status"] == "merged":
            raise HubError(400, f"{number} is not an open pull request")
        ref = f"refs/pr/{number}"
        mine = {commit.oid for commit in self.hub.commits(repo_id)}
        start = next(
            commit for commit in self.hub.commits(repo_id, ref) if commit.oid in mine
        )
        theirs, tree = repo.resolve(ref).tree, dict(main.tree)
        for path in {*theirs, *start.tree}:
            if theirs.get(path) == start.tree.get(path):
                continue
            if main.tree.get(path) != start.tree.get(path):
                raise HubError(409, f"{path} has changed on main as well")
            tree.pop(path, None)
            if path in theirs:
                tree[path] = theirs[path]
        made = repo.commit(
            "refs/heads/main", main, tree, self.signed_in(), talk["title"], ""
        )
        talk["status"], talk["changes"]["mergeCommitId"] = "merged", made.oid
        return json_reply({})

    # Xet

    @route("GET", f"{MODEL}/xet-(read|write)-token/([^/]+)")
    def xet_token(self, repo_id: str, kind: str, revision: str) -> Reply:
        if self.hub.xet_store is None:
            raise HubError(404, "This server has no Xet storage")
        if kind == "write":
            self.target(repo_id, revision)
        else:
            self.repo(repo_id, content=True)
        url, key, end = (
            self.hub.xet_store.url,
            secrets.token_hex(8),
            int(time.time()) + 3600,
        )
        headers = {
            "X_Xet_Cas_Url": url,
            "X_Xet_Access_Token": key,
            "X_Xet_Token_Expiration": str(end),
        }
        return json_reply({"casUrl": url, "accessToken": key, "exp": end}, **headers)
