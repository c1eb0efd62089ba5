"""A Hub on 127.0.0.1: what huggingface_hub's client needs to create repositories, upload and download, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Repo:
    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, changes: dict[str, bytes]) -> str:
        files = {**self.commits.get(self.branches.get(branch, ""), {}), **changes}
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class HubServer(ThreadingHTTPServer):
    """Serves until it is closed.

    Attributes:
        fail: `[method, regex of the path, status, how often]`; an entry is used up as it fires. Status 0 closes the
            connection without an answer. With the method "CUT" a download is cut off half-way.
        token: the one that may write and read what is private.
        requests: method, path and range of every request.
    """

    daemon_threads = True

    def __init__(self, token: str = "hf_test"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.repos, self.objects = token, {}, {}
        self.fail: list[list] = []
        self.requests: list[str] = []
        self.received = 0  # bytes of objects
        self.uploads = 0
        self.cut_after: int | None = None  # uploads of objects, after which every one is cut off
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no error here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    def dispatch(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".rstrip())
            for rule in self.server.fail:
                method, pattern, status, times = rule
                if times and method == self.command and re.search(pattern, path):
                    rule[3] -= 1
                    self.read_body()
                    if not status:
                        return self.cut_off()
                    return self.answer(status, {"error": f"asked to answer {status}"})
            if path.startswith("/lfs/"):
                self.server.uploads += 1
                if self.server.cut_after is not None and self.server.uploads > self.server.cut_after:
                    return self.cut_off()
        for method, pattern, respond in ROUTES:
            if method in (self.command, "GET" if self.command == "HEAD" else None) and (
                match := re.fullmatch(pattern, path)
            ):
                return respond(self, *match.groups())
        self.read_body()
        return self.answer(404, {"error": f"no such route: {self.command} {path}"})

    def cut_off(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, content: dict | list | bytes = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def may_write(self) -> bool:
        if not self.headers.get("Authorization"):
            self.answer(401, {"error": "Invalid username or password."})
        elif not self.is_known:
            self.answer(403, {"error": "You have no write access."})
        return self.is_known

    def open(self, repo_id: str, revision: str = "main") -> Repo | None:
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and not self.is_known):
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if repo.branches.get(revision, revision) not in repo.commits:
            self.answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repo

    # --- writing ---

    def create_repo(self) -> None:
        asked = json.loads(self.read_body())
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self.may_write():
            return
        if repo_id in self.server.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.server.url}/{repo_id}"})
        self.server.repos[repo_id] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.answer(200, {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": "1"})

    def create_branch(self, repo_id: str, branch: str) -> None:
        self.read_body()
        if self.may_write() and (repo := self.open(repo_id)):
            if branch in repo.branches:
                return self.answer(409, {"error": "exists"})
            repo.branches[branch] = repo.branches["main"]
            self.answer(200, {})

    def check_write_access(self, repo_id: str) -> None:
        if self.may_write() and self.open(repo_id):
            self.answer(200, {})

    def preupload(self, repo_id: str, revision: str) -> None:
        files = json.loads(self.read_body())["files"]
        if self.may_write() and self.open(repo_id, revision):
            mode = {True: "lfs", False: "regular"}
            self.answer(200, {"files": [
                {"path": f["path"], "uploadMode": mode[f["path"].endswith((".safetensors", ".png"))], "shouldIgnore": False}
                for f in files
            ]})  # fmt: skip

    def lfs_batch(self, repo_id: str) -> None:
        objects = json.loads(self.read_body())["objects"]
        if self.may_write() and self.open(repo_id):
            for item in objects:
                if item["oid"] not in self.server.objects:
                    item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
            self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        body = self.read_body()
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "wrong checksum"})
        self.server.objects[oid] = body
        self.server.received += len(body)
        self.answer(200)

    def commit(self, repo_id: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.read_body().splitlines()]
        if not (self.may_write() and (repo := self.open(repo_id, revision))):
            return
        changes = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self.answer(400, {"error": f"{value['path']} was never uploaded"})
                changes[value["path"]] = self.server.objects[value["oid"]]
        is_pr = "create_pr" in self.query
        if is_pr:
            repo.branches["refs/pr/1"] = repo.branches[revision]
        sha = repo.commit("refs/pr/1" if is_pr else revision, changes)
        url = f"{self.server.url}/{repo_id}"
        pull_request = f"{url}/discussions/1" if is_pr else None
        self.answer(200, {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "pullRequestUrl": pull_request})

    # --- reading ---

    def info(self, repo_id: str, revision: str | None = None) -> None:
        if repo := self.open(repo_id, revision or "main"):
            sha = repo.branches.get(revision or "main", revision)
            siblings = [{"rfilename": name} for name in repo.commits[sha]]
            card = {}
            readme = repo.commits[sha].get("README.md", b"").decode()
            if match := re.match(r"---\n.*?^license: (\S+)", readme, re.DOTALL | re.MULTILINE):
                card = {"cardData": {"license": match[1]}}
            self.answer(200, {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, **card})

    def tree(self, repo_id: str, revision: str) -> None:
        if repo := self.open(repo_id, revision):
            self.answer(200, [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in repo.files(revision).items()
            ])  # fmt: skip

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        if not (repo := self.open(repo_id, revision)):
            return
        sha = repo.branches.get(revision, revision)
        if (content := repo.commits[sha].get(name)) is None:
            return self.answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        status, size = 200, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or size - 1)
            content, status = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        if self.command == "HEAD":
            headers["Content-Length"] = str(size)
        with self.server.lock:
            for rule in self.server.fail:
                if rule[0] == "CUT" and rule[3] and self.command == "GET" and re.search(rule[1], name):
                    rule[3] -= 1
                    self.send_response(status)
                    for key, value in {**headers, "Content-Length": str(len(content))}.items():
                        self.send_header(key, value)
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2])
                    self.wfile.flush()
                    return self.cut_off()
        self.answer(status, content, headers)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("POST", r"/api/repos/create", Handler.create_repo),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", Handler.create_branch),
    ("GET", rf"/api/models/{NAME}/auth-check/write", Handler.check_write_access),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", Handler.lfs_upload),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("POST", r"/api/validate-yaml", lambda self: (self.read_body(), self.answer(200, {"errors": [], "warnings": []}))),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)/?", Handler.tree),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
