"""A loopback Hugging Face Hub that the unmodified huggingface_hub client pushes to and loads from.

Model repos only, all in memory, one thread per connection, on 127.0.0.1 and a free port:

    hub = LoopbackHub().start()
    hub.add_user("alice", "hf_alice")
    ... run clients with HF_ENDPOINT=hub.url in other processes ...
    hub.stop()

Tests steer it from their own process: `fail` and `hold` disturb requests to come, `flip_byte`
spoils a stored file, `requests` tells what was asked for.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import secrets
import select
import socket
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.npz", "*.npy")
LFS_PATTERNS += (
    "*.parquet",
    "*.arrow",
    "*.zip",
    "*.gz",
    "*.tar",
    "*.msgpack",
    "*.h5",
    "*.model",
)
GIT_ATTRIBUTES = "".join(
    f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LFS_PATTERNS
)


class HubError(Exception):
    """An error reply: status, text, X-Error-Code, further headers and fields of the body."""

    def __init__(self, status, message, code=None, headers=None, **fields):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.fields = headers or {}, fields


@dataclass(frozen=True)
class File:
    """One file of a tree. `oid`: the sha256 of an LFS file, the git sha1 of a regular one."""

    oid: str
    size: int
    lfs: bool
    xet: str | None = None

    @property
    def pointer(self) -> bytes:
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.oid}\nsize {self.size}\n".encode()

    @property
    def blob_id(self) -> str:
        return git_sha1(self.pointer) if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One commit: its files by path, and what the client said about it."""

    oid: str
    parent: str | None
    author: str
    title: str
    message: str
    date: str
    tree: Mapping[str, File]


@dataclass
class Repo:
    """One model repo. `blobs` holds the content by oid, `refs` full git names to commit oids."""

    id: str
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request, or None."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def resolve(self, revision: str) -> Commit:
        name = self.ref(revision)
        if name is not None:
            return self.commits[self.refs[name]]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            for oid, commit in self.commits.items():
                if oid.startswith(revision):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add(self, data: bytes, lfs: bool) -> File:
        oid = hashlib.sha256(data).hexdigest() if lfs else git_sha1(data)
        self.blobs[oid] = data
        return File(oid, len(data), lfs)

    def commit(
        self,
        ref: str,
        parent: Commit | None,
        tree: dict,
        author: str,
        title: str,
        message: str,
    ) -> Commit:
        """A new commit at the head of `ref`; the parent itself where the tree is the same."""
        if parent is not None and dict(parent.tree) == tree:
            self.refs[ref] = parent.oid
            return parent
        commit = Commit(
            oid=secrets.token_hex(20),
            parent=parent.oid if parent else None,
            author=author,
            title=title,
            message=message,
            date=now(),
            tree=dict(sorted(tree.items())),
        )
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit


@dataclass
class Request:
    """What one request was and how it was answered.

    `path` keeps its percent signs. `token` is the bearer token, None without one. `body` is the
    first 4096 bytes, `size` the length of all. `status` is 0 where no reply was sent. `done` is set
    when the server is through with it.
    """

    method: str
    path: str
    query: str
    token: str | None
    body: bytes
    size: int
    headers: dict[str, str]
    status: int = 0
    done: threading.Event = field(default_factory=threading.Event, repr=False)


@dataclass
class _Failure:
    method: str
    path: re.Pattern
    status: int
    left: int
    headers: dict[str, str]
    after: bool
    body: bytes


class Hold:
    """Requests standing still until `release`. A client that has gone by then is not served."""

    def __init__(self, path: re.Pattern, method: str | None, after: bool):
        self.path, self.method, self.after = path, method, after
        self._reached, self._open = threading.Event(), threading.Event()
        self._standing: list[Request] = []

    def wait(self, timeout: float = 30) -> None:
        """Until one request stands here; TimeoutError after `timeout` seconds."""
        if not self._reached.wait(timeout):
            raise TimeoutError(f"no request for {self.path.pattern} within {timeout} s")

    def release(self) -> None:
        self._open.set()

    def _stop_here(self, request: Request) -> None:
        self._standing.append(request)
        self._reached.set()
        self._open.wait()


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class LoopbackHub:
    """The server and its state; see the module's text.

    `lfs_threshold`: files of that many bytes are LFS whatever their name. `multipart_threshold`:
    LFS files above it are uploaded in parts of `part_size` bytes. `xet=True` offers Xet storage too
    (see `xet_store`); clients then must not set HF_HUB_DISABLE_XET. `port` 0 is a free one.
    """

    def __init__(
        self,
        *,
        lfs_threshold: int = 10_000_000,
        multipart_threshold: int = 5_000_000_000,
        part_size: int = 20_000_000,
        xet: bool = False,
        port: int = 0,
    ):
        self.lfs_threshold = lfs_threshold
        self.multipart_threshold = multipart_threshold
        self.part_size = part_size
        self.users: dict[str, str] = {}
        self.roles: dict[str, str] = {}
        self.orgs: dict[str, set[str]] = {}
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self.uploads: dict[str, dict[str, Any]] = {}
        self._failures: list[_Failure] = []
        self._holds: list[Hold] = []
        self._folder = tempfile.TemporaryDirectory() if xet else None
        self.xet_store = None
        if self._folder is not None:
            from .xet_store import XetStore

            self.xet_store = XetStore(Path(self._folder.name))
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> LoopbackHub:
        threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        ).start()
        return self

    def stop(self) -> None:
        """End the server; standing requests are let go first."""
        self.release()
        self._server.shutdown()
        self._server.server_close()
        if self._folder is not None:
            self._folder.cleanup()

    def add_user(
        self, name: str, token: str, orgs: tuple[str, ...] = (), role: str = "write"
    ) -> None:
        """A user and a token; `role` is what the token may do: ``write`` or ``read``."""
        self.users[token] = name
        self.roles[token] = role
        self.orgs[name] = set(orgs)

    def create(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        private: bool = False,
        gated: str | bool = False,
    ) -> Repo:
        """A repo made on the server's side, with one more commit if `files` are given."""
        with self.lock:
            repo = self.repos[repo_id] = Repo(repo_id, private, gated)
            owner = repo_id.split("/")[0]
            attributes = {
                ".gitattributes": repo.add(GIT_ATTRIBUTES.encode(), lfs=False)
            }
            repo.commit(
                "refs/heads/main", None, attributes, owner, "initial commit", ""
            )
        if files:
            self.commit(repo_id, files)
        return repo

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        message: str = "Change on the server's side",
        revision: str = "main",
    ) -> str:
        """Commit as somebody else would; None deletes a file. Returns the commit's oid."""
        with self.lock:
            repo = self.repos[repo_id]
            head = repo.resolve(revision)
            tree = dict(head.tree)
            for path, data in files.items():
                if data is None:
                    del tree[path]
                else:
                    tree[path] = repo.add(
                        data, self.is_lfs(path, len(data), data[:512])
                    )
            ref = repo.ref(revision) or f"refs/heads/{revision}"
            return repo.commit(ref, head, tree, repo_id.split("/")[0], message, "").oid

    def grant(self, repo_id: str, user: str) -> None:
        """Let `user` into a gated repo."""
        self.repos[repo_id].granted.add(user)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content by path at a revision."""
        repo = self.repos[repo_id]
        return {
            p: self.content(repo, f) for p, f in repo.resolve(revision).tree.items()
        }

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first."""
        repo = self.repos[repo_id]
        found: list[Commit] = []
        commit: Commit | None = repo.resolve(revision)
        while commit is not None:
            found.append(commit)
            commit = repo.commits[commit.parent] if commit.parent else None
        return found

    def flip_byte(
        self, repo_id: str, path: str, position: int = -1, revision: str = "main"
    ):
        """Change one stored byte and nothing that is said about the file.

        Size, oid and ETag stay. Every revision with the same content is hit.
        """
        repo = self.repos[repo_id]
        file = repo.resolve(revision).tree[path]
        if file.xet is not None:
            raise ValueError(f"{path} is in Xet storage, which checks its own content")
        data = bytearray(repo.blobs[file.oid])
        data[position] ^= 1
        repo.blobs[file.oid] = bytes(data)

    def fail(
        self,
        method: str,
        path_regex: str,
        status: int,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        *,
        after: bool = False,
        body: bytes = b'{"error": "injected failure"}',
    ) -> None:
        """Answer the next `times` matching requests with `status`; 0 cuts the connection.

        `after=True` carries the request out first, so that only the reply is lost. `path_regex` is
        searched in path and query. A gateway in front of a Hub need not answer in JSON: see `body`.
        """
        pattern, headers = re.compile(path_regex), dict(headers or {})
        self._failures.append(
            _Failure(method, pattern, status, times, headers, after, body)
        )

    def hold(
        self, path_regex: str, method: str | None = None, *, after: bool = False
    ) -> Hold:
        """Let matching requests stand, body read, before (or after) they are carried out.

        ``hold.wait()`` returns when one stands. A client killed while it stands is not served.
        """
        hold = Hold(re.compile(path_regex), method, after)
        self._holds.append(hold)
        return hold

    def release(self) -> None:
        """End all holds; when this returns, the server is through with what stood there."""
        holds, self._holds = self._holds, []
        for hold in holds:
            hold.release()
        for hold in holds:
            for request in hold._standing:
                request.done.wait(30)

    def count(self, method: str, path_regex: str, status: int | None = None) -> int:
        """How many requests so far match."""
        return len(self.matching(method, path_regex, status))

    def matching(
        self, method: str, path_regex: str, status: int | None = None
    ) -> list[Request]:
        return [
            r
            for r in list(self.requests)
            if r.method == method
            and re.search(path_regex, r.path + "?" + r.query)
            and status in (None, r.status)
        ]

    def is_lfs(self, path: str, size: int, sample: bytes) -> bool:
        name = path.rsplit("/", 1)[-1]
        known = any(fnmatch.fnmatch(name, pattern) for pattern in LFS_PATTERNS)
        return size > 0 and (known or size >= self.lfs_threshold or b"\0" in sample)

    def content(self, repo: Repo, file: File) -> bytes:
        if file.xet is not None and self.xet_store is not None:
            return self.xet_store.read(file.xet, file.size)
        return repo.blobs[file.oid]

    def _failure(self, request: Request, after: bool) -> _Failure | None:
        with self.lock:
            for failure in self._failures:
                if (
                    failure.left > 0
                    and failure.after == after
                    and failure.method == request.method
                    and failure.path.search(request.path + "?" + request.query)
                ):
                    failure.left -= 1
                    return failure
        return None

    def _hold(self, request: Request, after: bool) -> None:
        for hold in list(self._holds):
            if hold.method in (None, request.method) and hold.after == after:
                if hold.path.search(request.path + "?" + request.query):
                    hold._stop_here(request)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: LoopbackHub

    def handle_error(self, request, client_address):
        """Clients are killed in tests: a broken connection is no news."""


@dataclass
class Reply:
    status: int
    body: bytes
    headers: dict[str, str]


class _Cut(Exception):
    """Close the connection without a reply."""


def json_reply(data: Any, status: int = 200, **headers: str) -> Reply:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps(data).encode()
    return Reply(
        status, body, {"Content-Type": "application/json; charset=utf-8", **headers}
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = 120
    server: _Server

    def log_message(self, format, *args):
        pass

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if len(body) != size:
            raise _Cut
        return body

    def _client_left(self) -> bool:
        if not select.select([self.connection], [], [], 0)[0]:
            return False
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def _serve(self) -> None:
        hub = self.server.hub
        url = urlsplit(self.path)
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        bearer = token if scheme == "Bearer" else None
        request = Request(
            self.command,
            url.path,
            url.query,
            bearer,
            b"",
            0,
            dict(self.headers.items()),
        )
        try:
            body = self._read_body()
            request.body, request.size = body[:4096], len(body)
            hub.requests.append(request)
            reply = self._answer(request, body)
            request.status = reply.status
            self._send(reply)
        except (_Cut, ValueError, OSError):
            self.close_connection = True
            self.connection.close()
        finally:
            request.done.set()

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(reply.body)))
        self.send_header("X-Request-Id", secrets.token_hex(8))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)
        self.wfile.flush()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, request: Request, body: bytes) -> Reply:
        hub = self.server.hub
        reply = None
        for after in (False, True):
            hub._hold(request, after)
            if self._client_left():
                raise _Cut
            if failure := hub._failure(request, after):
                if failure.status == 0:
                    raise _Cut
                return Reply(failure.status, failure.body, failure.headers)
            if not after:
                reply = self._carry_out(request, body)
        assert reply is not None
        return reply

    def _carry_out(self, request: Request, body: bytes) -> Reply:
        from .routes import Call

        try:
            with self.server.hub.lock:
                return Call(self.server.hub, request, body).run()
        except HubError as error:
            headers = {**error.headers, "X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            reply = json_reply({"error": error.message, **error.fields}, error.status)
            reply.headers.update(headers)
            return reply
        except (
            Exception
        ) as error:  # the test sees what broke instead of a closed connection
            return json_reply({"error": f"loopback hub: {error!r}"}, 501)


__all__ = ["Commit", "File", "Hold", "HubError", "LoopbackHub", "Repo", "Request"]
