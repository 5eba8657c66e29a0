"""`tune publish`: what would go, what is refused, and an upload by the Hub's own client to a Hub on this machine."""

import base64
import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llamaq.report import hub
from llamaq.runs.files import sha256_file
from llamaq.runs.manifest import MANIFEST

TUNE = Path(sys.executable).parent / "tune"
FILES = {
    "model.pte": b"\0program" * 999,
    "README.md": b"---\nlicense: llama3.2\n---\n# card\n",
    "tokenizer.json": b"{}",
}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with an export and a bundle of it."""
    folder = tmp_path / "run"
    (folder / "bundle").mkdir(parents=True)
    (folder / "export").mkdir()
    (folder / "run.json").write_text("{}")
    for name, data in FILES.items():
        (folder / "bundle" / name).write_bytes(data)
    files = {n: {"sha256": sha256_file(folder / "bundle" / n), "bytes": len(data)} for n, data in FILES.items()}
    sha256 = files["model.pte"]["sha256"]
    (folder / "bundle" / MANIFEST).write_text(json.dumps({"metrics": {"model": sha256}, "files": files}))
    (folder / "export" / MANIFEST).write_text(json.dumps({"metrics": {"sha256": sha256}}))
    return folder


def test_a_dry_run_lists_what_would_go(run, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)  # nothing may be sent
    assert hub.main([str(run), "--repo", "me/Llama-mine", "--dry-run"]) == 0
    said = capsys.readouterr()
    names = [line.split()[-1] for line in said.out.splitlines() if " MiB  " in line]
    assert names == sorted(FILES) and "3 files, 0.0 MiB would go to me/Llama-mine; nothing was sent" in said.out
    assert said.err == ""
    assert hub.main([str(run), "--repo", "me/mine", "--dry-run"]) == 0
    assert "a name that begins with “Llama”" in capsys.readouterr().err


def test_what_is_wrong_is_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))

    def refused(folder: Path, *options: str) -> str:
        assert hub.main([str(folder), *options]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: ")
        return said

    ok = ("--repo", "Llama-mine")
    assert "no run.json" in refused(tmp_path, *ok)
    assert "must be in the form" in refused(run, "--repo", "a/b/c", "--dry-run")
    assert "no token for the Hub; log in with `hf auth login`" in refused(run, *ok)
    for secret in (["--token", "hf_abc"], ["--token=hf_abc"], ["hf_abc"]):
        said = refused(run, *ok, *secret)
        assert "a token does not belong on the command line" in said and "hf_abc" not in said
    (run / "bundle" / "tokenizer.json").write_text("[]")
    assert "tokenizer.json does not match its SHA-256" in refused(run, *ok, "--dry-run")
    (run / "bundle" / "tokenizer.json").write_bytes(FILES["tokenizer.json"])
    (run / "export" / MANIFEST).write_text(json.dumps({"metrics": {"sha256": "0" * 64}}))
    assert "holds an earlier export" in refused(run, *ok, "--dry-run")
    (run / "bundle" / MANIFEST).unlink()
    assert "has no bundle yet" in refused(run, *ok, "--dry-run")


class Hub(http.server.BaseHTTPRequestHandler):
    """The calls of an upload, as the Hub answers them; what arrives is kept."""

    protocol_version = "HTTP/1.1"
    received: dict[str, bytes]
    tokens: set[str | None]
    refuses = False

    def log_message(self, format, *args):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.path.startswith("/api/") and "agent-harnesses" not in self.path:  # a list asked for beside the upload
            self.tokens.add(self.headers.get("authorization"))
        status = 403 if self.refuses else 200
        data = json.dumps({"error": "you may not"} if self.refuses else self.made_of(body)).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def made_of(self, body: bytes) -> dict:
        home = f"http://{self.headers['host']}"
        if self.path == "/api/repos/create":
            return {"url": f"{home}/me/{json.loads(body)['name']}", "name": "me/Llama-mine", "id": "1"}
        if "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": modes[p.endswith(".pte")], "shouldIgnore": False} for p in paths]
            return {"files": files}
        if self.path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            objects = [w | {"actions": {"upload": {"href": f"{home}/lfs/{w['oid']}"}}} for w in wanted]
            return {"transfer": "basic", "objects": objects}
        if self.path.startswith("/lfs/"):
            self.received[self.path.removeprefix("/lfs/")] = body
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "lfsFile":
                    self.received[line["value"]["path"]] = self.received.pop(line["value"]["oid"])
            return {"success": True, "commitUrl": f"{home}/me/Llama-mine/commit/1", "commitOid": "1"}
        return {"errors": [], "warnings": [], "id": "me/Llama-mine", "sha": "0" * 40, "siblings": []}

    do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815


@contextlib.contextmanager
def hub_here(refuses: bool = False):
    """Run a Hub on this machine; give its address and its handler, which has what it received."""
    handler = type("H", (Hub,), {"received": {}, "tokens": set(), "refuses": refuses})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        server.server_close()


def tune_publish(run: Path, address: str) -> subprocess.CompletedProcess:
    settings = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_mine", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [TUNE, "publish", run, "--repo", "Llama-mine", "--private"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, timeout=100)


def test_the_files_arrive_as_they_are(run):
    with hub_here() as (address, handler):
        done = tune_publish(run, address)
    assert done.returncode == 0, done.stderr
    assert handler.received == FILES and handler.tokens == {"Bearer hf_mine"}
    assert f"3 files, 0.0 MiB → {address}/me/Llama-mine" in done.stdout


def test_a_refusal_is_one_line(run):
    with hub_here(refuses=True) as (address, handler):
        done = tune_publish(run, address)
    assert done.returncode == 1 and handler.received == {}
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert said.startswith("error: the Hub did not take it: ") and "403" in said and "Traceback" not in done.stderr
