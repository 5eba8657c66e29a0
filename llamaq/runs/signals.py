"""SIGTERM (Slurm, Kubernetes, Docker) and Ctrl-C: end between two training steps, or at once where nothing is lost.

    handled()     for a command: the first signal ends it with one line and the exit status 143 or 130
    deferred()    for training steps: the signal is only noted, and the run ends after a checkpoint (`SignalHooks`)
    patient()     for torchrun's own process, which waits for its ranks

A second Ctrl-C ends the process at once. Python runs a handler only between two bytecodes, and a process in a long C++
call executes none, so a thread reads the signals too (`signal.set_wakeup_fd`) and ends a process that does not end.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 10.0  # for Python to leave what it is in, where nothing has to be finished first
ONE_PRESS_SECONDS = 0.3  # torchrun may hand a Ctrl-C to a rank that has it from the terminal already


class Stopped(SystemExit):
    """Ends the process because of a signal. Uncaught, it gives the exit status and no traceback."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


class _State:
    """What this process knows of signals. One per process, as handlers are."""

    handling: bool = False
    first: int | None = None  # the first signal
    first_time: float = 0.0
    deferring: int = 0
    patient: int = 0
    impatient_since: float = 0.0


def received() -> int | None:
    """Return the signal that this process got first, None before it gets one."""
    return _State.first


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle the signals in this block, if this is the main thread. Inside another such block it does nothing."""
    if _State.handling or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, (read, write) = {s: signal.getsignal(s) for s in SIGNALS}, os.pipe()
    os.set_blocking(write, False)

    def give_back() -> None:
        signal.set_wakeup_fd(-1)
        for s, handler in before.items():
            signal.signal(s, handler)
        _State.handling = False

    os.register_at_fork(after_in_child=lambda: give_back() if _State.handling else None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read, os.getppid()), name="signals", daemon=True).start()
    for s in SIGNALS:
        signal.signal(s, _on_signal)
    _State.handling = True
    try:
        yield
    finally:
        if _State.first is None:  # else the thread has to see the process end
            give_back()
            os.close(write)


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Give what runs in this block any time to end after a signal."""
    _State.patient += 1
    try:
        yield
    finally:
        _State.patient -= 1
        _State.impatient_since = time.monotonic()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Note signals in this block and end the process after it; a second Ctrl-C still ends it at once."""
    with patient():
        _State.deferring += 1
        try:
            yield
        finally:
            _State.deferring -= 1
    if _State.first is not None and not _State.deferring:
        _tell(f"stopped by {name_of(_State.first)}; run the same command again to resume")
        raise Stopped(_State.first)


def wait_for_signal(seconds: float) -> bool:
    """Tell whether this process has got a signal, after waiting for one: torchrun sends it when another rank ends."""
    deadline = time.monotonic() + seconds
    while _State.first is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return _State.first is not None


def name_of(signum: int) -> str:
    """Return what a user calls the signal."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def _on_signal(signum: int, frame: Any) -> None:
    if _State.first is not None:
        return  # torchrun repeats a signal, and the thread counts Ctrl-C
    _State.first, _State.first_time = signum, time.monotonic()
    _State.impatient_since = _State.first_time
    if _State.deferring:
        _tell(f"{name_of(signum)}: finishing the step and writing a checkpoint; Ctrl-C ends the run at once")
    else:
        _tell(f"stopped by {name_of(signum)}; run the same command again to resume")
        raise Stopped(signum)


def _watch(read: int, parent: int) -> None:
    """Read the signals as they come; end the process at a second Ctrl-C, or if it does not end by itself."""
    first: tuple[int, float] | None = None
    while True:
        ready, _, _ = select.select([read], [], [], None if first is None else 0.5)
        got = [s for s in os.read(read, 64) if s in SIGNALS] if ready else []
        if ready and not got and first is None and not _State.handling:
            os.close(read)
            return
        now = time.monotonic()
        for signum in got:
            if first is not None and signum == signal.SIGINT and now - first[1] > ONE_PRESS_SECONDS:
                os._exit(128 + signum)
            first = first or (signum, now)
        if first is None:
            continue
        late = not _State.patient and now - max(first[1], _State.impatient_since) > GRACE_SECONDS
        if late or os.getppid() != parent:  # torchrun is gone
            os._exit(128 + first[0])


def _tell(text: str) -> None:
    """Write a line on rank 0. A handler may interrupt a print, so it does not print."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{os.linesep if sys.stderr.isatty() else ''}{text}\n".encode())
