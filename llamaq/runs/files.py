"""Files that are whole or not there: SHA-256, writing beside and renaming, and full disks named as such."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamaq.errors import UserError


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hex digits."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a value written as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


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


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside the file and rename it, so that a reader sees the old file or the new one."""
    with naming_full_disk(str(path)):
        tmp = path.with_name(path.name + ".tmp")
        with tmp.open("w") as f:
            json.dump(value, f, indent=1, default=str)
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)
