"""Caches of other packages that have to be writable."""

import atexit
import getpass
import os
import shutil
import tempfile


def usable_compiler_cache() -> None:
    """Give torch's compiler a cache of this process where its own cannot be written: importing torchao would fail.

    That is the case with a folder on a read-only disk, and with one in /tmp that belongs to another user.
    """
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        # torch's default; asking torch for it would import torch, and make the folder
        folder = named or os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    except (KeyError, OSError):  # a user without a name, for whom torch has a folder by number
        folder = os.path.join(tempfile.gettempdir(), f"torchinductor_uid_{os.getuid()}")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError:
        own = tempfile.mkdtemp(prefix="torchinductor_")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = own  # processes that this one starts use it too
    atexit.register(shutil.rmtree, own, ignore_errors=True)
