"""Say that something long goes on, where no loop of ours could show a bar."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from llamaq.quiet import visible_stderr
from llamaq.runs.ranks import rank

TICK_SECONDS = 30.0


@contextlib.contextmanager
def ticker(what: str, phase: Callable[[], str] = str) -> Iterator[None]:
    """Print a line every 30 seconds while the block runs: what, for how long, in which phase. Only rank 0 does.

    A block that takes less prints nothing. Standard error shows the lines also while a library's is held back.
    """
    over, began = threading.Event(), time.monotonic()

    def tick() -> None:
        while not over.wait(TICK_SECONDS):
            now = f": {phase()}" if phase() else ""
            print(f"{what}, {time.monotonic() - began:.0f} s{now} …", file=visible_stderr(), flush=True)

    thread = threading.Thread(target=tick, name="ticker", daemon=True)
    if rank() == 0:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()
