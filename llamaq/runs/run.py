"""Stages, their folders and manifests: what makes running the same command again the way to resume.

A stage takes folders and settings and gives one folder, `output_dir/<stage>/`, with a `manifest.json` beside its
files: inputs by content hash, resolved settings, scheme, package versions, metrics, and the SHA-256 of every file. It
is written as `<stage>.partial/` and renamed into place, so a folder that exists is whole. Its *identity* is the hash
of its settings (paths replaced by the content they lead to) and its inputs; a stage runs again only when that changes,
and the folder it replaces is kept under `superseded/`.

Every rank calls the same functions; rank 0 decides and writes, the others wait and read.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from llamaq.config import NOT_IDENTITY, Config
from llamaq.errors import UserError
from llamaq.quant.scheme import Scheme

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
STARTED = "started.json"  # in a stage's partial folder: the identity it was begun with
CHECKPOINTS = "checkpoints"
LAUNCHER = "ray"  # what Ray Train keeps in the run's folder; made before the run is opened
PACKAGES = ("llamaq", "torch", "torchao", "torchtune", "executorch", "wandb", "ray", "deepspeed")


# --- ranks -----------------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    """Print on rank 0, at once: what a run tells its user."""
    if rank() == 0:
        print(text, flush=True)


def from_rank_zero(make: Callable[[], Any]) -> Any:
    """Rank 0 computes, every rank gets the result; an exception on rank 0 is raised on all of them."""
    if world_size() == 1:
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except Exception as e:
            box[1] = _sendable(e)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def on_rank_zero(build: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    """A stage's work that is one process's, such as conversion and export; the other ranks wait."""
    return lambda folder: from_rank_zero(lambda: build(folder))


def everywhere(make: Callable[[], Any]) -> list[Any]:
    """Every rank computes, every rank gets all results in rank order; an exception on one is raised on all of them."""
    if world_size() == 1:
        return [make()]
    boxes: list[Any] = [None] * world_size()
    mine: tuple[Any, Exception | None] = (None, None)
    try:
        mine = (make(), None)
    except Exception as e:
        mine = (None, _sendable(e))
    dist.all_gather_object(boxes, mine)
    for who, (_, error) in enumerate(boxes):
        if isinstance(error, UserError) and who != rank():
            raise UserError(f"rank {who}: {error}")
        if error is not None:
            raise error
    return [result for result, _ in boxes]


def _sendable(e: Exception) -> Exception:
    """The exception, or its words if it cannot be pickled: the other ranks are waiting for it."""
    try:
        pickle.loads(pickle.dumps(e))
        return e
    except Exception:
        return RuntimeError(f"{type(e).__name__}: {e}")


# --- hashing ---------------------------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """Hash of a file's bytes, or of a folder's files and their names; a stage folder's is in its manifest."""
    if path.is_file():
        return sha256_file(path)
    if (path / MANIFEST).is_file():
        return read_manifest(path)["content"]
    return sha256_json({p.relative_to(path).as_posix(): sha256_file(p) for p in _files(path)})


def identity_of(settings: Any) -> Any:
    """Settings as they enter a stage's identity: without what changes speed only, and with paths by content."""
    if is_dataclass(settings) and not isinstance(settings, type):
        settings = asdict(settings)
    if isinstance(settings, dict):
        return {k: identity_of(v) for k, v in settings.items() if k not in NOT_IDENTITY}
    if isinstance(settings, (list, tuple)):
        return [identity_of(v) for v in settings]
    if isinstance(settings, str) and os.sep in settings and os.path.exists(settings):
        return f"sha256:{content_hash(Path(settings))}"
    return settings


def _files(folder: Path) -> list[Path]:
    """A stage's own files: not the manifest, nor what only an unfinished stage has."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in paths if p.relative_to(folder).parts[0] not in (MANIFEST, STARTED, CHECKPOINTS))


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming_full_disk(what: str) -> Iterator[None]:
    """Turn "no space left on device" into an error that names what was being written and what to do."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left while writing {what}; nothing finished is lost: free some space (superseded/ and *.partial "
            "folders can go) and run the same command again"
        ) from e


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename, so that a reader sees the old file or the new one."""
    with naming_full_disk(str(path)):
        tmp = path.with_name(path.name + ".tmp")
        with tmp.open("w") as f:
            json.dump(value, f, indent=1, default=str)
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text())
    except json.JSONDecodeError as e:
        raise UserError(f"{folder / MANIFEST} is torn ({e}); delete {folder} to run its stage again") from e


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a finished stage against its manifest and return the manifest.

    Raises:
        UserError: a file is missing, truncated or altered; the message names it.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != expected["bytes"]:
            problem = f"has {path.stat().st_size} bytes instead of {expected['bytes']}"
        elif sha256_file(path) != expected["sha256"]:
            problem = "does not match its SHA-256"
        else:
            continue
        raise UserError(f"{path} {problem}: the file is damaged; delete {folder} to run its stage again")
    return manifest


# --- the launcher ---------------------------------------------------------------------------------------------------


class Hooks:
    """What a training run asks of whoever launched it. Nothing, unless the launcher can take its machines away."""

    def due(self) -> bool:
        """Whether it is time to ask `preempted`; quick, each rank for itself."""
        return False

    def preempted(self) -> bool:
        """Whether a machine is about to be taken away and a checkpoint should be written now. All ranks call it."""
        return False

    def checkpointed(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """A checkpoint was written. All ranks call it."""


# --- the run ---------------------------------------------------------------------------------------------------------


class Run:
    """One output folder and what is in it. Opening it takes a lock; two processes cannot write the same run."""

    def __init__(self, config: Config, hooks: Hooks | None = None, patience: float = 0.0):
        """Open the run.

        Args:
            config: the run's settings.
            hooks: who to talk to while training.
            patience: seconds to wait for the lock; where processes are restarted, the one before may still be dying.
        """
        self.config = config
        self.hooks = hooks or Hooks()
        self._patience = patience
        self.scheme = Scheme(group_size=config.scheme.group_size)
        self.folder = Path(config.output_dir)
        self.executed: list[str] = []  # stages that ran in this process, for tests and the closing line
        self._verified: dict[str, dict[str, Any]] = {}
        self._lock: IO[str] | None = None
        from_rank_zero(self._open)

    def _open(self) -> None:
        marker = self.folder / "run.json"
        identity = {"model": self.config.model, "starts_from": self._start()}
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"output_dir={self.folder} is a file; choose a folder")
        if marker.is_file():
            before = json.loads(marker.read_text())
            for key, value in identity.items():
                if before.get(key) != value:
                    raise UserError(
                        f"output_dir={self.folder} holds another run ({key} was {before.get(key)}, now {value}); "
                        "choose another output_dir"
                    )
        elif self.folder.is_dir() and any(p.name != LAUNCHER for p in self.folder.iterdir()):
            raise UserError(f"output_dir={self.folder} is not empty and is not a llamaq run; choose another folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"output_dir={self.folder} cannot be created: {e.strerror}") from e
        self._lock = self._take_lock()
        if not marker.is_file():
            run_id = hashlib.sha256(f"{self.folder.absolute()}{time.time()}".encode()).hexdigest()[:8]
            write_json(marker, {**identity, "id": run_id, "created": time.strftime("%Y-%m-%d %H:%M:%S")})

    def _take_lock(self) -> IO[str]:
        lock, deadline = (self.folder / ".lock").open("w"), time.monotonic() + self._patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except OSError as e:
                if time.monotonic() >= deadline:
                    message = f"another process is running in output_dir={self.folder}; wait for it or stop it"
                    # where processes are restarted it is the one before, and another try may find it gone
                    raise OSError(message) if self._patience else UserError(message) from e
            time.sleep(0.5)

    def _start(self) -> str:
        return "a model trained here" if self.config.base else str(Path(self.config.checkpoint_dir).absolute())

    def close(self) -> None:
        """Let another process use the folder; leaving the process does the same."""
        if self._lock is not None:
            self._lock.close()

    @property
    def id(self) -> str:
        """Eight hex digits that name this run in W&B."""
        return json.loads((self.folder / "run.json").read_text())["id"]

    def path(self, stage: str) -> Path:
        return self.folder / stage

    def metrics(self, stage: str) -> dict[str, Any]:
        """The metrics a finished stage left in its manifest."""
        return read_manifest(self.path(stage))["metrics"]

    def need(self, stage: str, made_from: list[Path] | None = None) -> Path:
        """The folder of a stage that must have been run already, checked file by file.

        Args:
            stage: its name.
            made_from: the stages of this run it must have been made from, and as they are now; unset: whatever it was.

        Raises:
            UserError: it has not been run, a file is damaged, or it was made from something else.
        """
        folder = self.path(stage)
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"stage '{stage}' has not been run in {self.folder}; run it first, or the whole chain: "
                "tune run qat_lora_dpo --config … (same settings)"
            )
        from_rank_zero(lambda: self._check_origin(self._verify_once(folder), made_from))
        return folder

    def _check_origin(self, manifest: dict[str, Any], made_from: list[Path] | None) -> None:
        if made_from is None:
            return
        then = {n: h for n, h in manifest["identity"]["inputs"].items() if (self.path(n) / MANIFEST).is_file()}
        now = {p.name: self._input_hash(p) for p in made_from}
        if then != now:
            raise UserError(
                f"{self.path(manifest['stage'])} was not made from {', '.join(now)} as now in {self.folder}, but from "
                f"{', '.join(then)}{' of before' if then.keys() == now.keys() else ''}; "
                "run `tune run export_executorch` (of a SpinQuant run: `tune run spinquant`) with these settings, or "
                "give the ones it was made with"
            )

    def stage(
        self,
        name: str,
        build: Callable[[Path], dict[str, Any] | None],
        settings: Any = None,
        inputs: list[Path] | None = None,
    ) -> Path:
        """Run `build(folder)` unless this very stage is already there; return the stage's folder.

        `build` writes its files into the folder it is given and returns metrics for the manifest; what it finds there
        already is what an interrupted attempt left. Every rank calls it.

        Args:
            name: stage and folder name.
            build: does the work.
            settings: whatever else decides the result; dataclasses, dicts, strings, numbers; paths enter by content.
            inputs: stage folders or files read; by content.

        Raises:
            UserError: a damaged file, a full disk, or whatever `build` finds wrong.
        """
        folder, partial = self.path(name), self.folder / f"{name}.partial"
        identity, up_to_date = from_rank_zero(lambda: self._begin(name, settings, inputs or [], folder, partial))
        if up_to_date:
            return folder
        with naming_full_disk(str(partial)):
            metrics = build(partial) or {}
        from_rank_zero(lambda: self._finish(name, identity, settings, metrics, folder, partial))
        self.executed.append(name)
        return folder

    def _begin(
        self, name: str, settings: Any, inputs: list[Path], folder: Path, partial: Path
    ) -> tuple[dict[str, Any], bool]:
        identity = {
            "stage": name,
            "settings": identity_of(settings),
            "scheme": asdict(self.scheme),
            "inputs": {p.name: self._input_hash(p) for p in inputs},
        }
        key = sha256_json(identity)
        if (partial / MANIFEST).is_file() and read_manifest(partial)["key"] == key:
            self._publish(partial, folder)  # killed after the work was done, before it was renamed
        if folder.exists():
            if not (folder / MANIFEST).is_file():
                raise UserError(f"{folder} has no {MANIFEST}: it is not a finished stage; move it away")
            manifest = self._verify_once(folder)
            if manifest["key"] == key:
                say(f"{name}: up to date ({folder})")
                return identity, True
            say(f"{name}: {_what_changed(manifest['identity'], identity)} changed; running it again")
        started = partial / STARTED
        if partial.exists() and not (started.is_file() and json.loads(started.read_text())["key"] == key):
            self._supersede(partial)
        partial.mkdir(parents=True, exist_ok=True)
        if not started.is_file():
            write_json(started, {"key": key})
        return identity, False

    def _finish(
        self, name: str, identity: Any, settings: Any, metrics: dict[str, Any], folder: Path, partial: Path
    ) -> None:
        files = {
            p.relative_to(partial).as_posix(): {"sha256": sha256_file(p), "bytes": p.stat().st_size}
            for p in _files(partial)
        }
        manifest = {
            "stage": name,
            "key": sha256_json(identity),
            # what stages that read this one depend on: not on how long its steps took
            "content": sha256_json({name: f for name, f in files.items() if name != METRICS}),
            "identity": identity,
            "settings": asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings,
            "packages": package_versions(),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "metrics": metrics,
            "files": files,
        }
        write_json(partial / MANIFEST, manifest)
        self._publish(partial, folder)
        self._verified[str(folder)] = manifest

    def _publish(self, partial: Path, folder: Path) -> None:
        """Rename a finished stage into place; what stood there is kept elsewhere."""
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
        (partial / STARTED).unlink(missing_ok=True)
        if folder.exists():
            self._supersede(folder)
        partial.rename(folder)

    def _supersede(self, folder: Path) -> None:
        """Move a folder that no longer fits its settings out of the way; nothing is deleted."""
        target = self.folder / "superseded" / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        target.parent.mkdir(exist_ok=True)
        while target.exists():
            target = target.with_name(target.name + "-1")
        folder.rename(target)
        self._verified.pop(str(folder), None)

    def _verify_once(self, folder: Path) -> dict[str, Any]:
        if str(folder) not in self._verified:
            self._verified[str(folder)] = verify(folder)
        return self._verified[str(folder)]

    def _input_hash(self, path: Path) -> str:
        if (path / MANIFEST).is_file():
            return self._verify_once(path)["content"]
        return content_hash(path)


def package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _what_changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings or inputs that differ, by their dotted names; of many, the first."""

    def walk(a: Any, b: Any, path: str) -> Iterator[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            for k in sorted({*a, *b}):
                yield from walk(a.get(k), b.get(k), f"{path}.{k}" if path else str(k))
        elif a != b:
            yield path.removeprefix("settings.")

    names = list(walk(before, now, ""))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "something") + more
