"""Messages of our dependencies that appear on every start and mean nothing: dropped by their first words.

Everything else they say still comes through.
"""

import contextlib
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator

_LOGGED = {
    "torchao": "Failed to load ",  # CUDA-only extension libraries, absent or unloadable on a CPU
    "torch.utils._pytree": "<enum 'KernelPreference'>",  # torchao registers an enum torch now knows by itself
}
_NATIVE = re.compile(  # ExecuTorch's C++, straight to standard error; the last twice a layer and token of an int8 cache
    r"\[cpuinfo_utils\.cpp:|I tokenizers:regex\.cpp:|"
    r"E [\d:.]+ executorch:kernel_runtime_context\.h:\d+\] No temp allocator provided"
)


class _PrefixFilter(logging.Filter):
    def __init__(self, prefix: str):
        super().__init__()
        self.prefix = prefix

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.prefix)


def quiet_known_messages() -> None:
    """Add the filters to the loggers of `_LOGGED`. Called once, by the package."""
    # DeepSpeed's collectives on torch 2.13
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    for name, prefix in _LOGGED.items():
        logging.getLogger(name).addFilter(_PrefixFilter(prefix))


@contextlib.contextmanager
def without_native_noise() -> Iterator[None]:
    """Hold back what C++ code writes to standard error; at the end print all of it but the lines of `_NATIVE`."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            sys.stderr.write("".join(line for line in file if not _NATIVE.match(line)))
