"""A run: one output folder, its stages, and why running the same command again is the way to resume.

A stage takes folders and settings and gives one folder, `output_dir/<stage>/`, with a `manifest.json` beside its files
(see `llamaq.runs.manifest`). It is written as `<stage>.partial/` and renamed into place, so a folder that exists is
whole. A stage runs again only when its identity changes, and the folder it replaces is kept under `superseded/`.

Every rank calls the same functions; rank 0 decides and writes, the others wait and read.
"""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from llamaq.config import Config
from llamaq.config.view import View, disagreement
from llamaq.errors import UserError
from llamaq.runs.files import (
    bytes_in,
    is_bare,
    naming_full_disk,
    naming_unusable_folder,
    read_json,
    sha256_file,
    sha256_json,
    size_of,
    write_json,
)
from llamaq.runs.manifest import (
    CHECKPOINTS,
    MANIFEST,
    PREPARED,
    STARTED,
    content_hash,
    identity_of,
    list_files,
    name_changes,
    package_versions,
    read_manifest,
    verify,
)
from llamaq.runs.ranks import from_rank_zero, say
from llamaq.runs.tracking import METRICS, Tracker

OF_EVERY_RUN = (".lock", "run.json", "run.json.tmp", PREPARED)  # in its folder before any stage has made something
Build = Callable[[Path], "dict[str, Any] | None"]


class Hooks:
    """What a training run asks of whoever launched it. Nothing, unless the launcher can take its machines away."""

    folder: str | None = None  # what the launcher keeps in `output_dir`, made before the run is opened

    def due(self) -> bool:
        """Tell whether it is time to ask `preempted`; quick, each rank for itself."""
        return False

    def preempted(self) -> bool:
        """Tell whether a machine is about to be taken away, so that a checkpoint is due now. All ranks call it."""
        return False

    def checkpointed(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Take note that a checkpoint was written. All ranks call it."""


@dataclass
class Session:
    """Where a training stage keeps its checkpoints and numbers, and whom it tells of them."""

    stage: str
    folder: Path
    tracker: Callable[[int], Tracker]  # opens the stage's log after so many steps
    hooks: Hooks = field(default_factory=Hooks)


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
        self.folder = Path(config.output_dir)
        self.executed: list[str] = []  # stages that ran in this process
        self._verified: dict[str, dict[str, Any]] = {}
        self._lock: IO[str] | None = None
        from_rank_zero(self._open)

    def _open(self) -> None:
        identity = {"model": self.config.model, "starts_from": self._start()}
        with naming_unusable_folder(f"output_dir={self.folder}"):
            if self.folder.exists() and not self.folder.is_dir():
                raise UserError(f"output_dir={self.folder} is a file; choose a folder")
            begun = self._holds_run(identity)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            if not begun:
                run_id = hashlib.sha256(f"{self.folder.absolute()}{time.time()}".encode()).hexdigest()[:8]
                created = time.strftime("%Y-%m-%d %H:%M:%S")
                write_json(self.folder / "run.json", {**identity, "id": run_id, "created": created})

    def _holds_run(self, identity: dict[str, Any]) -> bool:
        """Tell whether the folder holds this run already. One in which nothing was finished is as good as a new one.

        Raises:
            UserError: it holds another run, or something else.
        """
        before = read_json(self.folder / "run.json")
        whole, same = "id" in (before or {}), all((before or {}).get(k) == v for k, v in identity.items())
        if (whole and same) or is_bare(self.folder, (self.hooks.folder or "", *OF_EVERY_RUN), ("wandb", "*.partial")):
            return whole and same
        if before is None:
            raise UserError(f"output_dir={self.folder} is not empty and is not a llamaq run; choose another folder")
        if not whole:
            raise UserError(f"{self.folder}/run.json is torn, so this run cannot go on; choose another output_dir")
        key = next(k for k, v in identity.items() if before.get(k) != v)
        raise UserError(
            f"output_dir={self.folder} holds another run ({key} was {before.get(key)}, now {identity[key]}); "
            "choose another output_dir"
        )

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
        """Return the eight hex digits that name this run in W&B."""
        return json.loads((self.folder / "run.json").read_text())["id"]

    def path(self, stage: str) -> Path:
        """Return a stage's folder, whether or not it has been run."""
        return self.folder / stage

    def metrics(self, stage: str) -> dict[str, Any]:
        """Return the metrics that a finished stage left in its manifest."""
        return read_manifest(self.path(stage))["metrics"]

    def tracker(self, stage: str, folder: Path, start_step: int = 0) -> Tracker:
        """Return the tracker of a stage's numbers: W&B and `metrics.jsonl` in the stage's folder."""
        return Tracker(self.config, self.id, stage, folder, start_step)

    def session(self, stage: str, folder: Path) -> Session:
        """Return what a training stage needs of the run, for `llamaq.train.loop.train`."""
        return Session(stage, folder, partial(self.tracker, stage, folder), self.hooks)

    def need(self, stage: str, made_from: Sequence[Path] | None = None, made_by: str | None = None) -> Path:
        """Return the folder of a stage that must have been run already, checked file by file.

        Args:
            stage: its name.
            made_from: the stages of this run it must have been made from, as they are now; None: whatever it was.
            made_by: the command that makes it, for the error.

        Raises:
            UserError: it has not been run, a file is damaged, or it was made from something else.
        """
        folder, command = self.path(stage), f"`{made_by}`" if made_by else "its recipe"
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"stage '{stage}' has not been run in {self.folder}; run it first ({command}), or the whole chain, "
                "with the same settings"
            )
        from_rank_zero(lambda: self._check_origin(self._verify_once(folder), made_from, command))
        return folder

    def _check_origin(self, manifest: dict[str, Any], made_from: Sequence[Path] | None, command: str) -> None:
        if made_from is None:
            return
        then = {n: h for n, h in manifest["identity"]["inputs"].items() if (self.path(n) / MANIFEST).is_file()}
        now = {p.name: self._input_hash(p) for p in made_from}
        if then != now:
            raise UserError(
                f"{self.path(manifest['stage'])} was not made from {', '.join(now)} as now in {self.folder}, but from "
                f"{', '.join(then)}{' of before' if then.keys() == now.keys() else ''}; "
                f"run {command} with these settings, or give the ones it was made with"
            )

    def stage(
        self,
        name: str,
        build: Build,
        settings: Config | Mapping[str, Any] | None = None,
        inputs: Sequence[Path] = (),
        arguments: Mapping[str, Any] | None = None,
        version: int = 1,
    ) -> Path:
        """Run `build(folder)` unless this very stage is already there; return the stage's folder.

        `build` writes its files into the folder it is given and returns metrics for the manifest; what it finds there
        already is what an interrupted attempt left. Every rank calls it.

        Args:
            name: stage and folder name.
            build: does the work.
            settings: the view of the config that `build` reads (`llamaq.config.view.only`), or plain values.
            inputs: stage folders or files read; they enter by content.
            arguments: what else decides the result and is not in the config, e.g. the names of the models to score.
            version: of the stage's code; raise it when a change makes the same settings give another result.

        Raises:
            UserError: a damaged file, a full disk, or whatever `build` finds wrong.
        """
        read = settings.settings() if isinstance(settings, View) else settings
        made_of = {"version": version, "settings": read or {}, "arguments": arguments or {}}
        folder, partial = self.path(name), self.folder / f"{name}.partial"
        identity, up_to_date = from_rank_zero(lambda: self._begin(name, made_of, inputs, folder, partial))
        if up_to_date:
            return folder
        began = time.monotonic()
        with naming_full_disk(str(partial)):
            metrics = build(partial) or {}
        seconds = round(time.monotonic() - began, 1)
        from_rank_zero(lambda: self._finish(name, identity, made_of, metrics, seconds, folder, partial))
        self.executed.append(name)
        return folder

    def _begin(
        self, name: str, made_of: dict[str, Any], inputs: Sequence[Path], folder: Path, partial: Path
    ) -> tuple[dict[str, Any], bool]:
        identity = {"stage": name, **identity_of(made_of), "inputs": {p.name: self._input_hash(p) for p in inputs}}
        for path in inputs:
            self._check_agreement(name, identity["settings"], path)
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
            say(f"{name}: {_why_again(manifest['identity'], identity)}; running it again")
        started = partial / STARTED
        if partial.exists() and not (started.is_file() and json.loads(started.read_text())["key"] == key):
            self._drop_attempt(partial)
        partial.mkdir(parents=True, exist_ok=True)
        if not started.is_file():
            write_json(started, {"key": key})
        return identity, False

    def _check_agreement(self, name: str, settings: dict[str, Any], path: Path) -> None:
        """Check that a stage of this run, of which another is made, was made with the same model, scheme and so on."""
        if path != self.path(path.name) or not (path / MANIFEST).is_file():
            return
        made_with = self._verify_once(path)["identity"]
        if "version" not in made_with:  # of llamaq 0.1.0, which recorded settings in another way
            return
        if found := disagreement(made_with["settings"], settings):
            setting, before, now = found
            is_file = any(str(value).startswith("sha256:") for value in (before, now))
            now, before = ("(another file)", "the file of before") if is_file else (now, f"{setting}={before}")
            raise UserError(
                f"{name}: {setting}={now}, but stage '{path.name}' in {self.folder} was made with {before}; run "
                f"'{path.name}' again with this one, or give the one of before"
            )

    def _finish(
        self,
        name: str,
        identity: Any,
        made_of: dict[str, Any],
        metrics: dict[str, Any],
        seconds: float,
        folder: Path,
        partial: Path,
    ) -> None:
        files = {
            p.relative_to(partial).as_posix(): {"sha256": sha256_file(p), "bytes": p.stat().st_size}
            for p in list_files(partial)
        }
        manifest = {
            "stage": name,
            "key": sha256_json(identity),
            # what stages that read this one depend on: not on how long its steps took
            "content": sha256_json({name: f for name, f in files.items() if name != METRICS}),
            "identity": identity,
            "settings": made_of["settings"],
            "packages": package_versions(),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "seconds": seconds,  # in the process that finished it; a resumed stage took longer in all
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

    def _drop_attempt(self, partial: Path) -> None:
        """Give up an interrupted attempt at other settings. Its checkpoints, which only they could resume, are deleted.

        A training stage of 1B keeps 28 GiB of them, and the new attempt needs the same again.
        """
        checkpoints = partial / CHECKPOINTS
        if (partial / STARTED).is_file() and (freed := bytes_in(checkpoints)):
            say(f"{partial.name}: begun with other settings; deleting its checkpoints ({size_of(freed)})")
            shutil.rmtree(checkpoints, ignore_errors=True)  # before it moves, so that a kill here leaves none behind
        if list_files(partial) or checkpoints.is_dir():
            self._supersede(partial)
        else:
            shutil.rmtree(partial)

    def _supersede(self, folder: Path) -> None:
        """Move a folder that no longer fits its settings out of the way, and say what such folders hold."""
        target = self.folder / "superseded" / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        target.parent.mkdir(exist_ok=True)
        while target.exists():
            target = target.with_name(target.name + "-1")
        folder.rename(target)
        self._verified.pop(str(folder), None)
        held = size_of(bytes_in(target.parent))
        say(f"{folder.name}: the old folder is now {target}; nothing reads superseded/ ({held}), and you can delete it")

    def _verify_once(self, folder: Path) -> dict[str, Any]:
        if str(folder) not in self._verified:
            self._verified[str(folder)] = verify(folder)
        return self._verified[str(folder)]

    def _input_hash(self, path: Path) -> str:
        if (path / MANIFEST).is_file():
            return self._verify_once(path)["content"]
        return content_hash(path)


def _why_again(before: dict[str, Any], now: dict[str, Any]) -> str:
    if "version" not in before:  # manifests of llamaq 0.1.0
        return "made by an older llamaq, which recorded less of what it depends on (the old one stays in superseded/)"
    return f"{name_changes(before, now)} changed"
