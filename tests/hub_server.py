"""A real HTTP server on this machine that speaks the Hub's protocol for files, both ways: revisions, trees, files with
redirects and ranges; and new repositories, with preupload, LFS and commits.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_test"


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(b"")

    do_HEAD = do_GET

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    do_PUT = do_POST

    def answer(self, body):
        self.path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append((self.command, self.path, body))
        if self.server.refuses:
            return self.refuse(*self.server.refuses)
        for pattern, call in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {self.path}"):
                return call(self, *match.groups(), body)
        return self.refuse(404, "")

    def send(self, content=b"", status=200, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code):
        self.send({"error": "no"}, status, {"X-Error-Code": code} if code else {})

    def model(self, model, revision):
        """The files of a model at a revision, by commit; answers itself where there are none."""
        commits = self.server.models.get(model)
        if commits is None:
            return self.refuse(401, "RepoNotFound")
        commit = self.server.refs[model].get(revision, revision)
        if commit not in commits:
            return self.refuse(404, "RevisionNotFound")
        return commit, commits[commit]

    def info(self, model, revision, body):
        if found := self.model(model, revision or "main"):
            self.send({"id": model, "sha": found[0], "siblings": []})

    def tree(self, model, revision, body):
        if found := self.model(model, revision):
            self.send([entry(path, content) for path, content in found[1].items()])

    def resolve(self, model, revision, path, body):
        if model in self.server.gated:
            return self.refuse(403, "GatedRepo")
        if found := self.model(model, revision):
            content = found[1][path]
            headers = {"X-Repo-Commit": found[0], "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            if not path.endswith(".safetensors"):
                return self.send(content, headers=headers)
            oid = hashlib.sha256(content).hexdigest()
            self.server.blobs[oid] = content
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{oid}"'}
            return self.send(b"", 302, headers | {"Location": f"{self.server.elsewhere}/cdn/{oid}"})
        return None

    def cdn(self, oid, body):
        content = self.server.blobs[oid]
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(match[1]) if match else 0
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if match else {}
        if self.server.cuts and self.command == "GET":
            self.server.cuts -= 1
            self.send_response(206 if match else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : len(content) // 2])
            self.close_connection = True
            return
        self.send(content[start:], 206 if match else 200, headers)

    def create(self, body):
        asked = json.loads(body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "")
        model = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        if model in self.server.models:
            return self.send({"error": "exists", "url": f"{self.server.url}/{model}"}, 409)
        self.server.models[model], self.server.refs[model] = {}, {}
        self.server.private[model] = asked.get("private", asked.get("visibility") == "private")
        return self.send({"url": f"{self.server.url}/{model}", "id": model, "name": model})

    def preupload(self, model, revision, body):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.send({"files": files})

    def batch(self, model, body):
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}}
            for asked in json.loads(body)["objects"]
        ]
        self.send({"transfer": "basic", "objects": objects})

    def upload(self, oid, body):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.send()

    def commit(self, model, revision, body):
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        commit = self.server.add(model, files, summary=lines[0]["value"]["summary"])
        self.send({"commitUrl": f"{self.server.url}/{model}/commit/{commit}", "commitOid": commit, "success": True})


def entry(path, content):
    listed = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(".safetensors"):
        oid = hashlib.sha256(content).hexdigest()
        listed["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
    return listed


_ID, _REST = r"([^/]+/[^/]+)", r"(.+)"
ROUTES = {
    rf"GET /api/models/{_ID}(?:/revision/{_REST})?": Request.info,
    rf"GET /api/models/{_ID}/tree/([0-9a-f]+)": Request.tree,
    rf"(?:GET|HEAD) /{_ID}/resolve/([0-9a-f]+)/{_REST}": Request.resolve,
    r"(?:GET|HEAD) /cdn/([0-9a-f]+)": Request.cdn,
    r"POST /api/repos/create": Request.create,
    r"POST /api/validate-yaml": lambda request, body: request.send({"errors": [], "warnings": []}),
    rf"POST /api/models/{_ID}/preupload/{_REST}": Request.preupload,
    rf"POST /{_ID}\.git/info/lfs/objects/batch": Request.batch,
    r"PUT /lfs/([0-9a-f]+)": Request.upload,
    rf"POST /api/models/{_ID}/commit/{_REST}": Request.commit,
}


class Server(ThreadingHTTPServer):
    """models: name -> commit -> path -> bytes. requests: what was asked. refuses: (status, code) for everything.
    gated: names. cuts: so many downloads of weights break off in the middle of the file. private: of the pushed ones.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.lock = threading.Lock()
        self.models, self.refs, self.requests, self.blobs, self.private = {}, {}, [], {}, {}
        self.refuses, self.gated, self.cuts, self.summaries = None, set(), 0, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.elsewhere = f"http://localhost:{self.server_address[1]}"  # as the Hub, files come from another host

    def add(self, model, files, summary="a commit"):
        """A new commit on main, with what main had before."""
        refs = self.refs.setdefault(model, {})
        files = {**self.models.get(model, {}).get(refs.get("main"), {}), **files}
        whole = repr((summary, len(self.summaries), sorted((path, len(text)) for path, text in files.items())))
        commit = hashlib.sha1(whole.encode()).hexdigest()
        self.models.setdefault(model, {})[commit] = files
        refs["main"] = commit
        self.summaries.append(summary)
        return commit

    def count(self, command, *ends):
        return sum(each[0] == command and each[1].endswith(ends) for each in self.requests)

    def handle_error(self, request, client_address):
        """A client that breaks off is no news."""


Request.log_message = lambda self, *unused: None


@contextlib.contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def pointed_at(monkeypatch, url, cache):
    """`huggingface_hub` of this process, which has read its environment, takes this server for the Hub."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    close_session()
