"""Hold back what other libraries print on every start and at every token, and nothing else.

drop_known_messages()    once, by `import llamaq`: log messages known by their first words
filtered_stderr()        lines that C++ code writes straight to standard error, known by their form
quiet_logging()          everything logged below an error, while a library sets itself up
quiet()                  all of these and standard output, while ExecuTorch exports
visible_stderr()         where to write what the user shall see meanwhile
"""

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import TextIO

_LOGGED = {
    "torchao": "Failed to load ",  # CUDA-only extension libraries, absent or unloadable on a CPU
    "torch.utils._pytree": "<enum 'KernelPreference'>",  # torchao registers an enum torch now knows by itself
}
_NATIVE = re.compile(  # ExecuTorch's C++, straight to standard error; the last twice a layer and token of an int8 cache
    r"\[cpuinfo_utils\.cpp:|I tokenizers:regex\.cpp:|"
    r"E [\d:.]+ executorch:kernel_runtime_context\.h:\d+\] No temp allocator provided"
)


_visible: list[TextIO] = []  # where standard error led before it was held back, innermost last


def visible_stderr() -> TextIO:
    """Return standard error as the user sees it, also while `filtered_stderr` holds it back."""
    return _visible[0] if _visible else sys.stderr


class _PrefixFilter(logging.Filter):
    def __init__(self, prefix: str):
        super().__init__()
        self.prefix = prefix

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.prefix)


def drop_known_messages() -> None:
    """Add filters to the loggers of `_LOGGED`. The package calls it once."""
    # DeepSpeed's collectives on torch 2.13
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    for name, prefix in _LOGGED.items():
        logging.getLogger(name).addFilter(_PrefixFilter(prefix))


@contextlib.contextmanager
def filtered_stderr() -> Iterator[None]:
    """Hold back what C++ code writes to standard error; at the end print all of it but the lines of `_NATIVE`."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        _visible.append(os.fdopen(kept, "w", buffering=1, errors="replace"))
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            _visible.pop().close()
            file.seek(0)
            sys.stderr.write("".join(line for line in file if not _NATIVE.match(line)))


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Hold back everything that is logged as a warning or less."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Hold back a library's standard output, warnings, logs and known C++ lines; yield what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(), filtered_stderr(), quiet_logging():
        warnings.simplefilter("ignore")
        yield printed
