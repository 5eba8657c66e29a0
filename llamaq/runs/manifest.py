"""A stage's `manifest.json`: what the stage was made from, what it left, and whether its files are still whole.

The *identity* of a stage is what decides its result: the settings it reads, with paths replaced by the content they
lead to, its inputs by content, and the version of its code. A stage runs again when its identity changes.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from llamaq.errors import UserError
from llamaq.runs.files import data_files_named, sha256_file, sha256_json

MANIFEST = "manifest.json"
STARTED = "started.json"  # in an unfinished stage's folder: the identity it was begun with
PREPARED = "prepared"  # in a run: tokenized datasets, which can be made again
CHECKPOINTS = "checkpoints"  # in an unfinished stage's folder: what it resumes from
PACKAGES = ("llamaq", "torch", "torchao", "torchtune", "executorch", "wandb", "ray", "deepspeed")
MOST_CHANGES_NAMED = 5


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a stage folder's manifest.

    Raises:
        UserError: the file is torn.
    """
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


def list_files(folder: Path) -> list[Path]:
    """Return a stage's own files: not the manifest, nor what only an unfinished stage has."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    not_its_own = (MANIFEST, STARTED, CHECKPOINTS)  # nor the first two half written, when that was cut short
    return sorted(p for p in paths if p.relative_to(folder).parts[0].removesuffix(".tmp") not in not_its_own)


def content_hash(path: Path) -> str:
    """Return a hash of a file's bytes, or of a folder's files and their names; a stage folder's is in its manifest."""
    if path.is_file():
        return sha256_file(path)
    if (path / MANIFEST).is_file():
        return read_manifest(path)["content"]
    return sha256_json({p.relative_to(path).as_posix(): sha256_file(p) for p in list_files(path)})


def identity_of(settings: Any) -> Any:
    """Return settings as they enter an identity: paths that exist are replaced by the hash of what they lead to.

    A bare word such as `json` counts as a path only if a file of that name is in the current folder; then its content
    enters, which is what a dataset given as `data_files=train.jsonl` needs.
    """
    if is_dataclass(settings) and not isinstance(settings, type):
        settings = asdict(settings)
    if isinstance(settings, dict):
        return {k: _identity_of_files(v) if k == "data_files" else identity_of(v) for k, v in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [identity_of(v) for v in settings]
    if isinstance(settings, (str, Path)) and _is_path(str(settings)):
        return f"sha256:{content_hash(Path(settings))}"
    return settings


def _identity_of_files(named: Any) -> Any:
    """Return the identity of a dataset's files, which may be named by folders and patterns such as `data/*.jsonl`."""
    if isinstance(named, str) and not os.path.isfile(named):
        return [f"sha256:{sha256_file(file)}" for file in data_files_named(named)] or named
    if isinstance(named, dict):
        return {k: _identity_of_files(v) for k, v in named.items()}
    return [_identity_of_files(v) for v in named] if isinstance(named, list) else identity_of(named)


def _is_path(text: str) -> bool:
    return os.path.isfile(text) or (os.sep in text and os.path.isdir(text))


def name_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the settings or inputs that differ between two identities by their dotted names; of many, the first few."""

    def walk(a: Any, b: Any, path: str) -> Iterator[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            for k in sorted({*a, *b}):
                yield from walk(a.get(k), b.get(k), f"{path}.{k}" if path else str(k))
        elif a != b:
            yield path.removeprefix("settings.").removeprefix("arguments.")

    names = list(walk(before, now, ""))
    more = f" and {len(names) - MOST_CHANGES_NAMED} more" if len(names) > MOST_CHANGES_NAMED else ""
    return (", ".join(names[:MOST_CHANGES_NAMED]) or "something") + more


def package_versions() -> dict[str, str]:
    """Return the installed version of each package that can change a result."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
