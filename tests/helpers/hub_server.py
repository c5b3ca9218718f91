"""A stand-in for the Hugging Face hub: models in directories, over the part of its HTTP that clients use."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits by their hash, each a directory; branches and tags lead to them."""

    commits: dict[str, Path]
    refs: dict[str, str]
    is_gated: bool = False

    def commit_of(self, revision):
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Hub:
    """Repositories by name, and what was asked of them: files, and lists of files."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    num_requests: int = 0
    num_listings: int = 0
    url: str = ""
    # Answer everything with this status, as a hub does that has trouble.
    broken_status: int | None = None

    def add(self, name, directory, *, commit="a" * 40, refs=("main",), **facts):
        known = self.repositories.setdefault(name, Repository({}, {}, **facts))
        known.commits[commit] = Path(directory)
        known.refs |= dict.fromkeys(refs, commit)
        return commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *_):
        pass

    def _answer(self):
        hub = self.server.hub
        hub.num_requests += 1
        path = unquote(urlsplit(self.path).path)
        if hub.broken_status is not None:
            return self._refuse(hub.broken_status, "")
        names = "|".join(map(re.escape, sorted(hub.repositories, key=len, reverse=True))) or "$^"
        if match := re.fullmatch(rf"/({names})/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            name, revision, file = match.groups()
        elif match := re.fullmatch(rf"/api/models/({names})(?:/(revision|tree)/([^?]+))?", path):
            name, kind, revision = match[1], match[2], match[3] or "main"
            file = None
        else:
            return self._refuse(401, "RepoNotFound")
        repository = hub.repositories[name]
        commit = repository.commit_of(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        directory = repository.commits[commit]
        hub.num_listings += file is None
        if file is not None:
            if repository.is_gated:
                return self._refuse(403, "GatedRepo")
            if not (directory / file).is_file():
                return self._refuse(404, "EntryNotFound", commit)
            return self._send_file(directory / file, file, commit)
        files = sorted(p for p in directory.rglob("*") if p.is_file())
        entries = [
            {
                "type": "file",
                "path": p.relative_to(directory).as_posix(),
                "size": p.stat().st_size,
                "oid": _etag(p),
            }
            for p in files
        ]
        siblings = [{"rfilename": each["path"]} for each in entries]
        found = entries if kind == "tree" else {"id": name, "sha": commit, "siblings": siblings}
        return self._send(json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _send_file(self, path, name, commit):
        content, status = path.read_bytes(), 200
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.command == "GET":
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            self.server.hub.fetched.append(name + (" in part" if wanted else ""))
            if wanted:
                first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
        self._send(content, headers, status)

    def _send(self, content, headers, status=200):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _refuse(self, status, code, commit=None):
        headers = {"X-Error-Code": code} | ({"X-Repo-Commit": commit} if commit else {})
        self._send(b"{}", headers, status)


def _etag(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


def use_hub(url, cache, *, set_value=setattr):
    """Has the client in this process ask another hub, and keep what it fetches in another cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    set_value(constants, "ENDPOINT", url)
    set_value(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    set_value(constants, "HF_HUB_CACHE", str(cache))
    # It would try again after some seconds.
    set_value(_http, "time", SimpleNamespace(sleep=lambda _: None))


@contextmanager
def hub_server():
    """Serves a ``Hub`` on a port of its own while the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
