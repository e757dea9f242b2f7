"""A server on this machine that answers as Google Cloud Storage does, as far as the clients of a run ask.

gcsfs and google-cloud-storage find it by STORAGE_EMULATOR_HOST, tensorstore by TENSORSTORE_GCS_HTTP_URL. An object is
there when all its bytes are, and has a generation that a request may demand: tensorstore, which writes the parts of a
checkpoint, relies on that. What an emulator does not offer: objects can be lost, refused and damaged at a given moment.
"""

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"


class ObjectStore(ThreadingHTTPServer):
    """One bucket.

    Attributes:
        objects: generation and bytes of each object, by its name.
        writes: names of what was written, one after another.
        is_denied: whether writing is forbidden.
        is_refused: told the name of an object that is asked for; true where the question is answered with an error.
        is_lost: told the name of an object before it is there; true where it never will be.
    """

    daemon_threads = True
    request_queue_size = 256  # clients open many connections at once

    def __init__(self):
        super().__init__(("localhost", 0), _Request)
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.writes: list[str] = []
        self.is_denied = False
        self.is_refused: Callable[[str], bool] = lambda name: False
        self.is_lost: Callable[[str], bool] = lambda name: False
        self.uploads: dict[str, tuple[dict, bytearray]] = {}  # resumable ones, not complete
        self.lock, self.numbers = threading.Lock(), itertools.count(1)

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server_port}"

    def handle_error(self, request: object, address: object) -> None:
        """A client that was killed is no error of the server's."""


@contextlib.contextmanager
def serving() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        thread = threading.Thread(target=store.serve_forever, daemon=True)
        thread.start()
        try:
            yield store
        finally:
            store.shutdown()
            thread.join()


class _Refused(Exception):
    """A status that ends a request."""


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for a client's acknowledgement
    server: ObjectStore

    def log_message(self, *arguments: object) -> None:
        pass

    def do(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:  # the client was killed
            self.close_connection = True
            return
        path = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/(o)(?:/(.+))?)?", url.path)
        try:
            if path is None or path[2] != BUCKET:
                raise _Refused(404)
            with self.server.lock:
                self.answer(body, upload=path[1] == "/upload", objects=path[3], name=unquote(path[4] or ""))
        except _Refused as refused:
            self.send(refused.args[0], {"error": {"code": refused.args[0], "message": "refused"}})

    do_GET = do_POST = do_PUT = do_DELETE = do

    def answer(self, body: bytes, *, upload: bool, objects: str | None, name: str) -> None:
        if self.server.is_denied and self.command != "GET":
            raise _Refused(403)
        if upload:
            self.upload(body)
        elif not objects:
            self.send(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET})
        elif not name:
            self.list()
        else:
            self.check_generation(name)
            if self.server.is_refused(name):
                raise _Refused(400)
            if name not in self.server.objects:
                raise _Refused(404)
            if self.command == "DELETE":
                del self.server.objects[name]
                self.send(204)
            elif self.query.get("alt") == "media":
                self.media(*self.server.objects[name])
            else:
                self.send(200, self.described(name))

    def check_generation(self, name: str) -> None:
        generation = self.server.objects.get(name, (0, b""))[0]
        if int(self.query.get("ifGenerationMatch", generation)) != generation:
            raise _Refused(412)
        if int(self.query.get("ifGenerationNotMatch", -1)) == generation:
            raise _Refused(304)

    def described(self, name: str) -> dict:
        generation, content = self.server.objects[name]
        time = "2026-01-01T00:00:00.000Z"
        about = {"bucket": BUCKET, "generation": str(generation), "metageneration": "1", "updated": time}
        return about | {"name": name, "size": str(len(content)), "timeCreated": time, "kind": "storage#object"}

    def list(self) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        names, folders = [], set()
        for name in sorted(self.server.objects):
            inside, found, _ = name.removeprefix(prefix).partition(delimiter) if delimiter else (name, "", "")
            if not name.startswith(prefix):
                continue
            if found:
                folders.add(prefix + inside + found)
            elif self.query.get("startOffset", "") <= name < self.query.get("endOffset", "\U0010ffff"):
                names.append(name)
        self.send(200, {"items": [self.described(name) for name in names], "prefixes": sorted(folders)})

    def media(self, generation: int, content: bytes) -> None:
        headers = {"x-goog-generation": str(generation)}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
            if start >= len(content):
                raise _Refused(416)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            self.send(206, content[start:end], headers)
        else:
            self.send(200, content, headers)

    def upload(self, body: bytes) -> None:
        kind = self.query.get("uploadType")
        if kind == "media":
            self.write(self.query["name"], body)
        elif kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\"]+)", self.headers["Content-Type"])[1].encode()
            _, about, content = body.split(b"--" + boundary, 2)
            about, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, content))
            self.write(json.loads(about)["name"], re.sub(rb"\r?\n--" + re.escape(boundary) + rb"--\s*$", b"", content))
        elif "upload_id" not in self.query:
            number = str(next(self.server.numbers))
            self.server.uploads[number] = (json.loads(body), bytearray())
            self.send(200, {}, {"Location": f"{self.server.url}{self.path}&upload_id={number}"})
        else:
            about, content = self.server.uploads[self.query["upload_id"]]
            content += body
            if self.headers.get("Content-Range", "").endswith(f"/{len(content)}"):
                self.write(about["name"], bytes(content))
            else:
                self.send(308, headers={"Range": f"bytes=0-{len(content) - 1}"})

    def write(self, name: str, content: bytes) -> None:
        self.check_generation(name)
        if self.server.is_lost(name):
            self.close_connection = True
            return
        self.server.objects[name] = next(self.server.numbers), content
        self.server.writes.append(name)
        self.send(200, self.described(name))

    def send(self, status: int, content: bytes | dict = b"", headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        kind = "application/json" if isinstance(content, dict) else "application/octet-stream"
        self.send_response(status)
        length = {} if status in (204, 304) else {"Content-Type": kind, "Content-Length": str(len(body))}
        for header, value in {**length, **(headers or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if length:
            self.wfile.write(body)
