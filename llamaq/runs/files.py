"""Files that are whole or not there: SHA-256, writing beside and renaming, and full disks named as such."""

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import stat
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from llamaq.errors import UserError

UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
LARGE = 2**30  # bytes; reading or hashing as much takes seconds, and minutes on a network file system
DATA_ENDINGS = (".jsonl", ".json", ".ndjson", ".parquet", ".jsonl.gz", ".json.gz", ".ndjson.gz")
OF_FILE_SYSTEMS = ("lost+found", ".DS_Store")  # what a disk or a file browser puts into any folder


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hex digits; a large one shows a bar."""
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size < LARGE:
            return hashlib.file_digest(f, "sha256").hexdigest()
        from llamaq.runs.tracking import progress  # which writes files itself

        digest = hashlib.sha256()
        mib, chunks = 2**20, iter(lambda: f.read(16 * 2**20), b"")
        title = f"hashing {path.parent.name}/{path.name}"
        for chunk in progress(chunks, title, math.ceil(size / 16 / mib), unit="MiB", unit_scale=16):
            digest.update(chunk)
        return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a value written as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def data_files_named(name: str | Path) -> list[Path]:
    """Return the data files that a path names: a file, the files of rows in a folder, or what a pattern matches."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(DATA_ENDINGS))
    return sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())


def bytes_in(folder: Path, seen: set[tuple[int, int]] | None = None) -> int:
    """Return the bytes of a folder's files, each once however many hard links it has; 0 without a folder.

    Args:
        folder: with all that is below it; what symbolic links lead to does not count.
        seen: files that were counted before, as (device, inode); those found are added.
    """
    seen, total = set() if seen is None else seen, 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            s = path.lstat()
            if stat.S_ISREG(s.st_mode) and (s.st_dev, s.st_ino) not in seen:
                seen.add((s.st_dev, s.st_ino))
                total += s.st_size
    return total


def size_of(count: float) -> str:
    """Return a number of bytes as a user reads it: 512 bytes, 3.2 MiB, 28.0 GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


@contextlib.contextmanager
def naming_full_disk(what: str) -> Iterator[None]:
    """Turn "no space left on device" into an error that names what was being written and what to do."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left while writing {what}; nothing finished is lost: free some space (superseded/ "
            "can go) and run the same command again"
        ) from e


@contextlib.contextmanager
def naming_unusable_folder(setting: str) -> Iterator[None]:
    """Turn a folder that is read-only, someone else's or impossible into an error that names its setting.

    Other errors of a disk or network pass, since another try may succeed.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in UNUSABLE:
            raise
        raise UserError(
            f"{setting} cannot be used ({e.strerror}: {e.filename}); choose a folder that you may write to"
        ) from e


def is_bare(folder: Path, ignored: Container[str], without_files: Sequence[str] = ()) -> bool:
    """Tell whether a folder is not there, or holds nothing of value.

    Args:
        folder: it.
        ignored: names of entries that do not count.
        without_files: patterns of the names of folders that do not count as long as no file is in them.
    """

    def counts(path: Path) -> bool:
        if path.name in ignored or path.name in OF_FILE_SYSTEMS:
            return False
        if not path.is_dir() or path.is_symlink() or not any(path.match(pattern) for pattern in without_files):
            return True
        return any(not p.is_dir() for p in path.rglob("*"))

    return not folder.is_dir() or not any(map(counts, folder.iterdir()))


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's object; None without the file, and an empty one if the file is torn."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside the file and rename it, so that a reader sees the old file or the new one."""
    with naming_full_disk(str(path)):
        tmp = path.with_name(path.name + ".tmp")
        with tmp.open("w") as f:
            json.dump(value, f, indent=1, default=str)
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)
