"""The `main` of every recipe: read settings, join the process group, run, print user errors on one line."""

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta

from llamaq.config import Config, load, parse_arguments
from llamaq.errors import UserError
from llamaq.runs.ranks import from_rank_zero, rank
from llamaq.runs.run import Run
from llamaq.runs.workers import check_workers

# the other ranks wait while rank 0 converts, exports and evaluates: an hour for 3B
PATIENCE = timedelta(hours=6)


def main(recipe: Callable[[Run], None], usage: str | None) -> None:
    """Run a recipe with the settings on the command line; exit with 1 and one line on a user's error.

    Args:
        recipe: gets the opened run; every rank calls it.
        usage: the recipe's docstring, shown by --help.
    """
    try:
        config = load(*parse_arguments(sys.argv[1:], usage or ""))
        join_process_group(config)
        run = Run(config)
        check_workers(config, from_rank_zero(lambda: run.id))
        recipe(run)
    except UserError as e:
        who = f"[rank {rank()}] " if rank() else ""
        print(f"{who}error: {e}", file=sys.stderr, flush=True)
        if os.environ.get("LLAMAQ_TRACEBACK"):
            traceback.print_exc()
        leave_process_group(1)
        sys.exit(1)
    leave_process_group()


def join_process_group(c: Config) -> None:
    """Join the process group under torchrun; in one process there is one only if DeepSpeed is asked for by name."""
    import torch
    import torch.distributed as dist

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized() or (ranks == 1 and c.engine != "deepspeed"):
        return
    on_gpu = c.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ranks == 1:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):  # DeepSpeed reads them
            os.environ.setdefault(name, value)
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend(on_gpu), store=store, rank=0, world_size=1, timeout=PATIENCE)
    else:
        dist.init_process_group(backend(on_gpu), timeout=PATIENCE)


def backend(on_gpu: bool) -> str:
    """Return the backend: NCCL for tensors on GPUs, gloo for Python objects and everything on a CPU."""
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def leave_process_group(code: int = 0) -> None:
    """Destroy the process group and end the process; do nothing without a group.

    The process ends here and not with the interpreter: gloo's threads may still hold a tensor of the last collective,
    and one that asks for the GIL while Python shuts down aborts a run that is done (torch 2.13, pytorch issue 190489;
    DeepSpeed keeps the threads alive past `destroy_process_group`). After an error the group is not taken down: NCCL
    would wait for ranks that wait for this one.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        if code == 0:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
