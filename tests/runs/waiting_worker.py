"""A rank of tests/runs/test_pulse.py: rank 0 works, hangs, dies or raises while the others wait for it."""

import os
import signal
import sys
import threading
import time

import torch.distributed as dist

from llamaq.config import load
from llamaq.errors import UserError
from llamaq.runs.main import join_process_group, leave_process_group
from llamaq.runs.pulse import LostRankError
from llamaq.runs.ranks import everywhere, from_rank_zero, rank


def work(how: str) -> str:
    """Do what rank 0 does while rank 1 waits."""
    if how == "raises":
        time.sleep(3)
        raise UserError("the export failed after three seconds")
    if how in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, how))
    time.sleep(float(how))
    return f"worked {how} seconds"


def main() -> None:
    how, part = sys.argv[1:]
    join_process_group(load("tiny", ["device=cpu", "output_dir=/tmp/none"]))
    from_rank_zero(time.time)  # a first turn, in which rank 1 hears of rank 0
    began = time.monotonic()
    try:
        if part == "from_rank_zero":
            print(f"rank {rank()} got {from_rank_zero(lambda: work(how))}", flush=True)
        else:  # the last rank is the slow one
            last = rank() == dist.get_world_size() - 1
            print(f"rank {rank()} got {everywhere(lambda: work(how) if last else 'nothing to do')}", flush=True)
    except (UserError, LostRankError) as e:
        print(f"rank {rank()} ended after {time.monotonic() - began:.1f} s: {type(e).__name__}: {e}", flush=True)
        leave_process_group(1)
    assert sum(t.name == "pulse" for t in threading.enumerate()) == 1
    leave_process_group()


if __name__ == "__main__":
    main()
