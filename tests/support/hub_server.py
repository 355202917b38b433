"""A small server that speaks the hub's protocol, as far as ``huggingface_hub`` needs it; tests only.

Metadata of a repository, files with their headers, and the commit endpoints with large-file upload. Repositories are
folders in memory: ``{repo: [{path: bytes}, ...]}``, one entry a commit.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

SMALL = 5_000
"""Larger files go by the large-file protocol, as .safetensors do on the hub."""


class Hub(ThreadingHTTPServer):
    """``with Hub() as hub: hub.add("org/repo", {...})``; ``hub.url`` is what HF_ENDPOINT is set to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.served: list[str] = []
        """Paths of files that were sent, in order."""
        self.tokens: set[str] = set()
        self.sizes: dict[str, int] = {}
        """Claimed sizes, where they are not the real ones."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        super().__exit__(*args)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        self.repos.setdefault(repo, []).append(files)
        return self.commit(repo)

    def commit(self, repo: str, number: int = -1) -> str:
        number %= len(self.repos[repo])
        return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.repos:
            return None
        if revision == "main":
            return self.commit(repo), self.repos[repo][-1]
        hits = [n for n in range(len(self.repos[repo])) if self.commit(repo, n) == revision]
        return (revision, self.repos[repo][hits[0]]) if hits else None


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def send(self, status: int, body: bytes | Any = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        told = {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str) -> None:
        self.send(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        url = urlparse(self.path)
        parts = [unquote(p) for p in url.path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            revision = parts[5] if len(parts) > 5 and parts[4] == "revision" else "main"
            return self.metadata("/".join(parts[2:4]), revision, "blobs" in parse_qs(url.query))
        if len(parts) > 4 and parts[2] == "resolve":
            return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self.missing("RepoNotFound")

    do_HEAD = do_GET

    def metadata(self, repo: str, revision: str, blobs: bool) -> None:
        found = self.server.files(repo, revision)
        if found is None:
            return self.missing("RepoNotFound" if repo not in self.server.repos else "RevisionNotFound")
        commit, files = found
        siblings = [
            {"rfilename": name, **({"size": self.server.sizes.get(name, len(data)), "blobId": "0"} if blobs else {})}
            for name, data in files.items()
        ]
        self.send(200, {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def file(self, repo: str, revision: str, name: str) -> None:
        found = self.server.files(repo, revision)
        if found is None or name not in found[1]:
            return self.missing("EntryNotFound" if found else "RepoNotFound")
        data = found[1][name]
        if self.command == "GET":
            self.server.served.append(name)
        etag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        told = {"ETag": f'"{etag}"', "X-Repo-Commit": found[0], "Content-Type": "application/octet-stream"}
        self.send(200, data, told)

    def do_POST(self) -> None:
        data, path = self.body(), unquote(urlparse(self.path).path).strip("/")
        self.server.tokens.add(self.headers.get("Authorization") or "")
        parts = path.split("/")
        if path == "api/repos/create":
            asked = json.loads(data)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.private[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.server.repos.setdefault(repo, [{}])
            return self.send(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})
        if path == "api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if parts[:2] == ["api", "models"] and parts[4] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > SMALL else "regular", "shouldIgnore": False}
                for f in json.loads(data)["files"]
            ]
            return self.send(200, {"files": files, "commitOid": self.server.commit("/".join(parts[2:4]))})
        if path.endswith("info/lfs/objects/batch"):
            objects = [
                {k: o[k] for k in ("oid", "size")}
                | {"actions": {"upload": {"href": f"{self.server.url}/blob/{o['oid']}"}}}
                for o in json.loads(data)["objects"]
            ]
            kind = {"Content-Type": "application/vnd.git-lfs+json"}
            return self.send(200, {"objects": objects, "transfer": "basic"}, kind)
        if parts[:2] == ["api", "models"] and parts[4] == "commit":
            return self.commit("/".join(parts[2:4]), data)
        self.missing("RepoNotFound")

    def do_PUT(self) -> None:
        data, oid = self.body(), self.path.rsplit("/", 1)[-1]
        if hashlib.sha256(data).hexdigest() != oid:
            return self.send(400, {"error": "wrong hash"})
        self.server.blobs[oid] = data
        self.send(200)

    def commit(self, repo: str, data: bytes) -> None:
        files = dict(self.server.repos[repo][-1])
        for line in data.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        oid = self.server.add(repo, files)
        url = f"{self.server.url}/{repo}/commit/{oid}"
        self.send(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
