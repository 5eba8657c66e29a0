"""The ranks of a run: who they are, and how one tells the others what it found.

Without a process group there is one rank, 0, and every function here is a plain call.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llamaq.errors import UserError
from llamaq.runs.pulse import Pulse

_pulse: Pulse | None = None


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    """Print a line for the user, on rank 0 and at once."""
    if rank() == 0:
        print(text, flush=True)


def pulse_of_group() -> Pulse:
    """Return this rank's pulse in the process group, which begins with the first call."""
    global _pulse
    store = dist.distributed_c10d._get_default_store()
    if _pulse is None or _pulse.store is not store:
        _pulse = Pulse(store, rank())
    return _pulse


def from_rank_zero(make: Callable[[], Any]) -> Any:
    """Compute on rank 0 and return the result on every rank; an exception on rank 0 is raised on all of them.

    It may take hours. The others wait as long as rank 0 lives (`llamaq.runs.pulse`), and then all meet.
    """
    if world_size() == 1:
        return make()
    pulse = pulse_of_group()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except Exception as e:
            box[1] = _sendable(e)
    pulse.finish_turn()
    if rank() != 0:
        pulse.wait_for([0])
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def on_rank_zero(build: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    """Wrap a stage's work that one process does, such as conversion and export; the other ranks wait for it."""
    return lambda folder: from_rank_zero(lambda: build(folder))


def everywhere(make: Callable[[], Any]) -> list[Any]:
    """Compute on every rank and return all results in rank order; an exception on one rank is raised on all."""
    if world_size() == 1:
        return [make()]
    pulse = pulse_of_group()
    boxes: list[Any] = [None] * world_size()
    mine: tuple[Any, Exception | None] = (None, None)
    try:
        mine = (make(), None)
    except Exception as e:
        mine = (None, _sendable(e))
    pulse.finish_turn()
    pulse.wait_for(range(world_size()))  # one may have a larger file to write, or a slower disk
    dist.all_gather_object(boxes, mine)
    for who, (_, error) in enumerate(boxes):
        if isinstance(error, UserError) and who != rank():
            raise UserError(f"rank {who}: {error}")
        if error is not None:
            raise error
    return [result for result, _ in boxes]


def _sendable(e: Exception) -> Exception:
    """Return the exception, or its text where it cannot be pickled: the other ranks wait for one or the other."""
    try:
        pickle.loads(pickle.dumps(e))
        return e
    except Exception:
        return RuntimeError(f"{type(e).__name__}: {e}")
