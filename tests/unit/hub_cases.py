"""A hub on loopback: the few calls that `huggingface_hub` makes, served from memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


def commit_of(number: int) -> str:
    """A commit hash."""
    return f"{number:040x}"


class FakeHub:
    """Repositories by name, each with commits of files; told which to break, it does."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        """Names of files that are answered with an error."""
        self.asked: list[str] = []
        """`METHOD path` of every request."""
        self.endpoint = ""

    def add(self, repo: str, files: Mapping[str, bytes], *refs: str) -> str:
        """Add a commit, which `refs` (default: main) then point at."""
        commits = self.commits.setdefault(repo, {})
        commit = commit_of(len(commits) + 1)
        commits[commit] = dict(files)
        self.refs.setdefault(repo, {}).update(dict.fromkeys(refs or ("main",), commit))
        return commit

    def downloads(self) -> list[str]:
        """Names of the files that were sent, in the order of the requests."""
        return [one.rpartition("/")[2] for one in self.asked if one.startswith("GET /org/")]

    def commit(self, repo: str, revision: str) -> str | None:
        """The commit that a revision is."""
        commit = self.refs.get(repo, {}).get(revision, revision)
        return commit if commit in self.commits.get(repo, {}) else None


def files_of(directory: Path) -> dict[str, bytes]:
    """A saved model as a repository's files."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer at `hub.endpoint` while the block runs."""

    class Handler(_Handler):
        served = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def _answer(self, *, is_head: bool) -> None:
        self.served.asked.append(f"{self.command} {self.path}")
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo, rest = "/".join(parts[:2]), parts[2:]
        revision = "main" if len(rest) < 2 else rest[1]
        if rest[1:2] == ["refs"]:
            revision, rest = "/".join(rest[1:4]), [rest[0], "", *rest[4:]]
        commit = self.served.commit(repo, revision)
        if repo not in self.served.commits:
            self._fail(401, "RepoNotFound", commit)
        elif commit is None:
            self._fail(404, "RevisionNotFound", commit)
        elif rest[:1] == ["resolve"]:
            self._file(repo, commit, "/".join(rest[2:]), is_head)
        else:
            files = self.served.commits[repo][commit]
            rows = [
                {"type": "file", "path": n, "size": len(d), "oid": _oid(d)}
                for n, d in files.items()
            ]
            siblings = [{"rfilename": row["path"], "size": row["size"]} for row in rows]
            info = {"id": repo, "sha": commit, "siblings": siblings, "private": False}
            self._send(200, json.dumps(rows if rest[:1] == ["tree"] else info).encode(), commit)

    def _file(self, repo: str, commit: str, name: str, is_head: bool) -> None:
        data = self.served.commits[repo][commit].get(name)
        if repo in self.served.gated:
            self._fail(403, "GatedRepo", commit)
        elif data is None:
            self._fail(404, "EntryNotFound", commit)
        elif name in self.served.broken and not is_head:
            self._fail(500, "", commit)
        else:
            self._send(200, data, commit, is_head=is_head)

    def _fail(self, status: int, code: str, commit: str | None) -> None:
        self._send(status, b"", commit, code=code)

    def _send(
        self, status: int, data: bytes, commit: str | None, *, is_head: bool = False, code: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{_oid(data)}"')
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if not is_head:
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
