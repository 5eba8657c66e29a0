"""Notice a rank that is lost or hangs within minutes, also while ranks work apart for hours.

Conversion, export and evaluation are rank 0's work, and for 3B they take hours. If the other ranks waited for it in a
collective, the collective's timeout would have to be as long, and a lost rank would be noticed as late. So they wait
outside. Every rank has a thread that writes a line to the process group's store every few seconds, and a rank that
waits for another one reads its line: the host, the turns finished, and a count that goes on while the rank lives.
"""

import itertools
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

# For collectives, which all ranks enter at about the same time. The slowest that is well: another rank reads a 3B
# checkpoint from a network file system or compiles its first step, some minutes.
COLLECTIVE_SECONDS = float(os.environ.get("LLAMAQ_COLLECTIVE_SECONDS", "600"))
# Without a sign of life. A rank that works can be silent for a while: C++ code may keep Python's threads from running.
SILENCE_SECONDS = float(os.environ.get("LLAMAQ_SILENCE_SECONDS", "180"))
BEAT_SECONDS = min(5.0, SILENCE_SECONDS / 10)
FIRST_LOOK, SLOWEST_LOOK = 0.005, 1.0  # seconds between two looks at the store: most work is short


class LostRankError(RuntimeError):
    """A rank that others wait for is gone or hangs. Another try may succeed, so it is no `UserError`."""


class Pulse:
    """This rank's line in the store, and what it reads of others. Its thread alone talks to the store, which may hang.

    A turn is one call of `from_rank_zero` or `everywhere`; all ranks make the same calls in the same order. Example:
    rank 0 exports in turn 7. Rank 1 has nothing to do in it, so its line says 7 at once, and it reads "host-a 6 …"
    until rank 0 is done and its line begins with "host-a 7".
    """

    def __init__(self, store: Any, rank: int):
        """Begin to write.

        Args:
            store: of the process group.
            rank: this one.
        """
        self.store, self.rank, self.turn = store, rank, 0
        self._beats = itertools.count()
        self._lines: dict[int, str] = {}  # rank → the last line read
        self._watched: Sequence[int] = ()
        self._wake, self._news = threading.Event(), threading.Event()
        threading.Thread(target=self._live, name="pulse", daemon=True).start()

    def finish_turn(self) -> None:
        """Say that this rank has done its part of the turn."""
        self.turn += 1
        self._wake.set()

    def wait_for(self, ranks: Sequence[int]) -> None:
        """Wait until these ranks have done their part of this rank's turn.

        Raises:
            LostRankError: one of them gives no sign of life; the message names it and its host.
        """
        tick = min(1.0, SILENCE_SECONDS / 10)
        ranks = [r for r in ranks if r != self.rank]
        silent, before = dict.fromkeys(ranks, 0.0), {r: self._lines.get(r) for r in ranks}
        self._watched, last = ranks, time.monotonic()
        self._wake.set()
        while late := [r for r in ranks if self._turn_of(r) < self.turn]:
            self._news.wait(tick)
            self._news.clear()
            now = time.monotonic()
            passed, last = min(now - last, 2 * tick), now  # a process that was stopped itself has heard nothing either
            for r in late:
                line = self._lines.get(r)
                silent[r], before[r] = (0.0 if line != before[r] else silent[r] + passed), line
                if silent[r] > SILENCE_SECONDS:
                    raise LostRankError(self._describe(r))
        self._watched = ()

    def _turn_of(self, rank: int) -> int:
        return int(self._lines[rank].split()[1]) if rank in self._lines else 0

    def _describe(self, rank: int) -> str:
        host = f"on {self._lines[rank].split()[0]} " if rank in self._lines else ""
        return (
            f"rank {rank} {host}has given no sign of life for {SILENCE_SECONDS:g} seconds while rank {self.rank} on "
            f"{socket.gethostname()} waited for it: it was killed, it hangs, or its machine cannot be reached; the "
            "same command goes on from what is done"
        )

    def _live(self) -> None:
        written, beat, pause = -1, 0.0, BEAT_SECONDS
        while dist.is_initialized():
            try:
                if self.turn != written or time.monotonic() - beat >= BEAT_SECONDS:
                    written, beat = self.turn, time.monotonic()
                    self._write(written)
                self._read()
            except Exception:  # the store's host is gone: who waits hears nothing more, and says so
                pause = SLOWEST_LOOK
            if self._wake.wait(pause):
                self._wake.clear()
                pause = FIRST_LOOK
            else:
                pause = min(2 * pause, SLOWEST_LOOK) if self._watched else BEAT_SECONDS

    def _write(self, turn: int) -> None:
        self.store.set(_key(self.rank), f"{socket.gethostname()} {turn} {next(self._beats)}")

    def _read(self) -> None:
        for r in self._watched:
            if self.store.check([_key(r)]):
                line = self.store.get(_key(r)).decode()
                if line != self._lines.get(r):
                    self._lines[r] = line
                    self._news.set()


def _key(rank: int) -> str:
    return f"llamaq/pulse/{rank}"
