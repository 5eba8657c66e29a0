"""The `main` of every recipe: read settings, join the process group, run, print user errors on one line."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

from llamaq.config import Config, check_sections, load, parse_arguments
from llamaq.errors import UserError
from llamaq.families import complete
from llamaq.runs import signals
from llamaq.runs.pulse import COLLECTIVE_SECONDS, LostRankError
from llamaq.runs.ranks import everywhere, from_rank_zero, rank, say
from llamaq.runs.run import Hooks, Run
from llamaq.runs.workers import check_workers

PATIENCE = timedelta(seconds=COLLECTIVE_SECONDS)  # of collectives; for rank 0's long work ranks wait outside of them


def main(
    recipe: Callable[[Run], None],
    usage: str | None,
    needs: Sequence[str] = (),
    read: Callable[[str, list[str]], Config] = load,
) -> None:
    """Run a recipe with the settings on the command line; exit with 1 and one line on a user's error.

    Args:
        recipe: gets the opened run; every rank calls it.
        usage: the recipe's docstring, shown by --help.
        needs: the sections of the config that it cannot do without.
        read: makes the settings of what stands behind `--config` and of the overrides.
    """
    with signals.handled(), errors_on_one_line():
        name, overrides = parse_arguments(sys.argv[1:], usage or "")
        config = read(name, overrides)
        check_sections(config, needs, name)
        config = complete(config)
        join_process_group(config)
        run = Run(config, SignalHooks())
        check_workers(config, from_rank_zero(lambda: run.id))
        recipe(run)
    leave_process_group()


@contextlib.contextmanager
def errors_on_one_line() -> Iterator[None]:
    """Turn a user's error into one line on standard error and exit status 1; leave as a signal asks."""
    try:
        yield
    except signals.Stopped as e:
        leave_process_group(128 + e.signum)
        raise
    except (UserError, LostRankError) as e:
        _leave_if_another_rank_was_stopped(e)
        who = f"[rank {rank()}] " if rank() else ""
        print(f"{who}error: {e}", file=sys.stderr, flush=True)
        if os.environ.get("LLAMAQ_TRACEBACK"):
            traceback.print_exc()
        leave_process_group(1)
        sys.exit(1)
    except RuntimeError as e:  # of a collective whose other end is gone
        _leave_if_another_rank_was_stopped(e)
        raise


def _leave_if_another_rank_was_stopped(e: Exception) -> None:
    """End this process if the error is what a rank sees when a signal has ended another: torchrun signals it next."""
    import torch.distributed as dist

    if not isinstance(e, UserError) and dist.is_initialized() and dist.get_world_size() > 1:
        with contextlib.suppress(signals.Stopped):
            signals.wait_for_signal(2.0)
        if (signum := signals.received()) is not None:
            leave_process_group(128 + signum)


class SignalHooks(Hooks):
    """Lets the training loop write a checkpoint when any rank got a signal, and ends the run on all ranks after it."""

    def __init__(self):
        self._stop: int | None = None

    def due(self) -> bool:
        """Tell whether this rank got a signal."""
        return signals.received() is not None

    def preempted(self) -> bool:
        """Tell whether any rank got a signal."""
        self._stop = next((s for s in everywhere(signals.received) if s is not None), None)
        return self._stop is not None

    def checkpointed(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """End the run after the checkpoint that a signal asked for."""
        if self._stop is not None:
            name = signals.name_of(self._stop)
            say(f"{stage}: stopped by {name} after step {step}; run the same command again to go on from there")
            raise signals.Stopped(self._stop)


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
