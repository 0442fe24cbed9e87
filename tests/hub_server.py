"""A Hub on loopback: what huggingface_hub asks of it, redirects to a "CDN" on another port, and faults.

Behaviour and headers are those that huggingface_hub's client documents and reads. Files are generated
while they are served, so that a checkpoint of hundreds of megabytes takes neither memory nor disk.
"""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"
TOKEN = "hf_right" + 20 * "x"
SIGNATURE = "signed-with-a-secret"
NO_TOKEN = "Invalid username or password."
BAD_TOKEN = "Invalid credentials in Authorization header"


class Blob:
    """Parts one after the other: bytes, or a number of bytes that all are 7."""

    def __init__(self, *parts):
        self.parts = parts
        self.size = sum(part if isinstance(part, int) else len(part) for part in parts)

    def read(self, start, stop):
        pieces = []
        for part in self.parts:
            size = part if isinstance(part, int) else len(part)
            begin, end = max(0, start), min(size, stop)
            if begin < end:
                pieces.append(b"\x07" * (end - begin) if isinstance(part, int) else part[begin:end])
            start, stop = start - size, stop - size
        return b"".join(pieces)


@dataclass
class Repo:
    """A repository; `renamed` is its present name, `readers` the tokens that may read its files."""

    files: dict = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    renamed: str | None = None
    forbidden: bool = False


class Hub:
    """What it serves, what goes wrong, and what it was asked."""

    def __init__(self):
        self.repos = {}
        self.ranges = True
        self.cuts = []
        """Of the next requests to the CDN: after how many bytes the connection is cut; None: not."""
        self.stall_after = None
        self.status = None
        """What the CDN answers to everything."""
        self.sent = []
        """(path, bytes of the body that were sent) of each request."""
        self.cdn_headers = []
        self.lock = threading.Lock()
        self.released = threading.Event()

    def bytes_sent(self, containing=""):
        return sum(size for path, size in self.sent if containing in path)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        headers.setdefault("Content_Length", len(body))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.send(body)

    def send(self, body):
        hub = self.server.hub
        with hub.lock:
            hub.sent.append((self.path, len(body)))
        self.wfile.write(body)

    def refuse(self, status, code=None, message="no"):
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.answer(status, b'{"error": "no"}', Content_Type="application/json", **headers)


class HubHandler(Handler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, TOKEN, "hf_other"):
            return self.refuse(401, message=BAD_TOKEN)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not api and not file:
            return self.refuse(404)
        name = (api or file)[1]
        repo = self.server.hub.repos.get(name)
        if repo is None or (repo.private and token is None):
            return self.refuse(401 if token is None else 404, "RepoNotFound", NO_TOKEN)
        if repo.renamed:
            target = self.path.replace(name, repo.renamed, 1)
            return self.answer(307, Location=target)
        if repo.forbidden:
            return self.refuse(403, message="insufficient permissions")
        return self.describe(name, repo, api[2]) if api else self.resolve(repo, token, file[2], file[3], name)

    def describe(self, name, repo, revision):
        if revision not in (None, "main", COMMIT, "v1"):
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": file, "size": blob.size} for file, blob in repo.files.items()]
        info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}
        info |= {
            "private": repo.private,
            "downloads": 0,
            "likes": 0,
            "gated": "auto" if repo.gated else False,
        }
        return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def resolve(self, repo, token, revision, file, name):
        if repo.gated and token != TOKEN:
            return self.refuse(401 if token is None else 403, "GatedRepo")
        if revision not in ("main", COMMIT, "v1"):
            return self.refuse(404, "RevisionNotFound")
        if file not in repo.files:
            return self.refuse(404, "EntryNotFound")
        size, etag = repo.files[file].size, f'"{hashlib.sha1(f"{name}/{file}".encode()).hexdigest()}"'
        headers = {"X_Repo_Commit": COMMIT, "X_Linked_Size": size, "X_Linked_Etag": etag, "ETag": etag}
        if file.endswith(".json"):
            body = repo.files[file].read(0, size)
            return self.answer(200, body, **headers, Accept_Ranges="bytes")
        location = f"{self.server.cdn_url}/blobs/{name}/{file}?Signature={SIGNATURE}"
        return self.answer(302, Location=location, **headers)


class CdnHandler(Handler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server.hub
        hub.cdn_headers.append(dict(self.headers))
        owner, repo, file = unquote(urlsplit(self.path).path).removeprefix("/blobs/").split("/", 2)
        if urlsplit(self.path).query != f"Signature={SIGNATURE}":
            return self.refuse(403)
        if hub.status:
            return self.refuse(hub.status)
        blob = hub.repos[f"{owner}/{repo}"].files[file]
        start, stop, status, headers = 0, blob.size, 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and hub.ranges:
            start, stop, status = int(asked[1]), min(blob.size, int(asked[2] or blob.size) + 1), 206
            headers = {"Content_Range": f"bytes {start}-{stop - 1}/{blob.size}"}
        self.send_response(status)
        for name, value in {**headers, "Content_Length": stop - start, "ETag": '"blob"'}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.stream(hub, blob, start, stop)

    def stream(self, hub, blob, start, stop):
        with hub.lock:
            cut = hub.cuts.pop(0) if hub.cuts else None
        end = stop if cut is None else min(stop, start + cut)
        try:
            for begin in range(start, end, 2**16):
                self.send(blob.read(begin, min(end, begin + 2**16)))
                if hub.stall_after is not None and hub.bytes_sent("/blobs/") > hub.stall_after:
                    hub.released.wait(30)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        self.close_connection = self.close_connection or end < stop


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        pass


@contextmanager
def serving():
    """A `Hub` and its address; nothing but loopback is used."""
    hub = Hub()
    cdn, front = Server(("127.0.0.1", 0), CdnHandler), Server(("127.0.0.1", 0), HubHandler)
    front.cdn_url = f"http://127.0.0.1:{cdn.server_port}"
    for server in (cdn, front):
        server.hub = hub
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{front.server_port}"
    finally:
        hub.released.set()
        for server in (cdn, front):
            server.shutdown()
            server.server_close()
