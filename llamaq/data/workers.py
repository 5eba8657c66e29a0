"""Spread work over all cores, in order and with few pieces in flight."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from llamaq.errors import UserError

_work: Callable[[Any], Any] | None = None  # of a worker process
_PR_SET_PDEATHSIG = 1


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Generator[Any, None, None]:
    """Yield `work(item)` for each item, in the items' order, computed by so many processes; 0 or 1: by this one.

    The processes are forks of this one, so `work` need not be picklable. Two items for each process are in flight.

    Raises:
        UserError: the system has killed a process.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work, os.getpid()))
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_do, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as e:
        raise UserError(
            "a process that reads and tokenizes rows was killed, most likely because memory ran out; free some and run "
            "the same command again"
        ) from e
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    """Prepare a worker: signals are the parent's to handle, and no worker outlives it."""
    global _work
    _work = work
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it is gone already
        os._exit(1)


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)
