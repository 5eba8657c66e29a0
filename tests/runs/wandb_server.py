"""Small HTTP servers that behave as a W&B server may: well, badly, or not at all."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "0123456789abcdef" * 3


class Server(ThreadingHTTPServer):
    """Answers GraphQL well enough for a real W&B run, or with `status`, or after `delay` seconds.

    `breaks` says what goes wrong after the key was accepted: "create" refuses the run, "stall" never answers when it is
    to be created, "crash" answers an upload so that W&B's service crashes.
    """

    daemon_threads = True

    def __init__(self, status: int = 200, delay: float = 0.0, known: bool = True, breaks: str = "", body: str = ""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.delay, self.known, self.breaks, self.body = status, delay, known, breaks, body
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args) -> None:
        pass

    def do_POST(self) -> None:
        request = self.rfile.read(int(self.headers.get("content-length") or 0)).decode(errors="replace")
        self.server.asked.append(f"{self.path} {request}")
        time.sleep(self.server.delay)
        status = self.server.status
        if "UpsertBucket" in request and self.server.breaks == "stall":
            time.sleep(60)
        if "UpsertBucket" in request and self.server.breaks == "create":
            status = 403
        reply = (self.server.body or json.dumps({"data": self.data(request)})).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_PUT = do_POST  # noqa: N815

    def data(self, request: str) -> dict:
        project = {"id": "p", "name": "llamaq", "entity": {"id": "e", "name": "me"}}
        if "UpsertBucket" in request:
            return {"upsertBucket": {"bucket": {"id": "1", "name": "r", "project": project}, "inserted": True}}
        if "CreateRunFiles" in request and self.server.breaks != "crash":
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}
        return {"viewer": {"id": "v"} if self.server.known else None}


@contextmanager
def serving(**behaviour) -> Iterator[Server]:
    server = Server(**behaviour)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def closed_port() -> str:
    """An address of this machine that nobody listens on."""
    server = Server()
    server.server_close()
    return server.url
