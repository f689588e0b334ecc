"""A stand-in for the Hugging Face Hub on localhost: the routes huggingface_hub uses, a request log, and faults."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

LFS_BYTES = 1000  # larger files are served from another address, as on the Hub


@dataclass
class Repo:
    """One repository: its files, the name of its branch, and the faults it has."""

    files: Mapping[str, bytes]
    revision: str = "main"
    gated: bool = False
    cut_after: dict[str, int] = field(default_factory=dict)  # file -> bytes after which its next GET is cut off

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.files)).encode()).hexdigest()

    def has_revision(self, revision: str) -> bool:
        return revision in (self.revision, self.sha)


@dataclass
class Request:
    method: str
    path: str  # decoded
    range: str | None
    status: int = 0


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, repos: Mapping[str, Repo]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = dict(repos)
        self.log: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> list[str]:
        """The files whose contents were asked for, in order."""
        return [
            r.path for r in self.log if r.method == "GET" and r.status in (200, 206) and not r.path.startswith("api/")
        ]


@contextmanager
def serve(repos: Mapping[str, Repo]) -> Iterator[HubServer]:
    server = HubServer(repos)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        # %2F inside a revision must not be taken for a separator, so split first.
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        self.request_log = Request(self.command, "/".join(parts), self.headers.get("Range"))
        self.server.log.append(self.request_log)
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            repo = self.server.repos.get("/".join(parts[2:4]))
            if repo is None:
                self._error(401, "RepoNotFound")
            elif len(parts) == 4 or parts[4] == "revision":
                self._info(repo, parts[5] if len(parts) > 5 else repo.revision)
            elif parts[4] == "tree":
                self._tree(repo, parts[5], "/".join(parts[6:]))
            else:
                self._error(404, "")
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._resolve(self.server.repos.get("/".join(parts[:2])), parts[3], "/".join(parts[4:]))
        elif parts[0] == "lfs":
            self._lfs("/".join(parts[1:3]), "/".join(parts[3:]))
        else:
            self._error(404, "")

    def _info(self, repo: Repo, revision: str) -> None:
        if not repo.has_revision(revision):
            return self._error(404, "RevisionNotFound")
        name = self.request_log.path.split("/", 2)[2].split("/revision/")[0]
        siblings = [{"rfilename": path} for path in repo.files]
        self._send(200, json.dumps({"id": name, "modelId": name, "sha": repo.sha, "siblings": siblings}).encode())

    def _tree(self, repo: Repo, revision: str, folder: str) -> None:
        if not repo.has_revision(revision):
            return self._error(404, "RevisionNotFound")
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
            for path, data in repo.files.items()
            if not folder or path.startswith(folder + "/")
        ]
        self._send(200, json.dumps(entries).encode())

    def _resolve(self, repo: Repo | None, revision: str, path: str) -> None:
        if repo is None:
            return self._error(401, "RepoNotFound")
        if repo.gated:
            return self._error(401, "GatedRepo")
        if not repo.has_revision(revision):
            return self._error(404, "RevisionNotFound")
        if path not in repo.files:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": repo.sha})
        data = repo.files[path]
        headers = {"X-Repo-Commit": repo.sha}
        if len(data) <= LFS_BYTES:
            return self._file(repo, path, headers)
        name = self.request_log.path.split("/resolve/")[0]
        headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        # Another host name, as the Hub's storage has: the client must read these headers before it follows.
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")
        self._send(302, b"", headers | {"Location": f"{elsewhere}/lfs/{name}/{quote(path)}"})

    def _lfs(self, name: str, path: str) -> None:
        self._file(self.server.repos[name], path, {})

    def _file(self, repo: Repo, path: str, headers: dict[str, str]) -> None:
        data, start, status = repo.files[path], 0, 200
        headers |= {"ETag": f'"{_oid(data)}"', "Accept-Ranges": "bytes"}
        if self.request_log.range:
            start, status = int(self.request_log.range.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = repo.cut_after.pop(path, None) if self.command == "GET" else None
        self._send(status, data[start:], headers, cut)

    def _error(self, status: int, code: str, headers: Mapping[str, str] = {}) -> None:
        self._send(status, b'{"error": "no"}', {"X-Error-Code": code, **headers})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}, cut: int | None = None) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
