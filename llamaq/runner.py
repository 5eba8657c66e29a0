"""What every recipe's `main` does: read settings, join the process group, run, print user errors on one line."""

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta

from llamaq.config import load, parse_arguments
from llamaq.errors import UserError
from llamaq.pipeline import Run, rank


def main(recipe: Callable[[Run], None], usage: str | None) -> None:
    """Run a recipe with the settings on the command line; exits with 1 and one line on a user's error.

    Args:
        recipe: gets the opened run; every rank calls it.
        usage: the recipe's docstring, shown by --help.
    """
    try:
        config = load(*parse_arguments(sys.argv[1:], usage or ""))
        _join_process_group(config.device)
        recipe(Run(config))
    except UserError as e:
        who = f"[rank {rank()}] " if rank() else ""
        print(f"{who}error: {e}", file=sys.stderr, flush=True)
        if os.environ.get("LLAMAQ_TRACEBACK"):
            traceback.print_exc()
        sys.exit(1)
    finally:
        _leave_process_group()


def _join_process_group(device: str) -> None:
    """Under torchrun, join the group; in one process there is none. Ray's workers have joined already."""
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # the other ranks wait while rank 0 converts, exports and evaluates: an hour for 3B
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(hours=6))


def _leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
