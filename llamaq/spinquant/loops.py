"""Shared by every loop here: a progress bar that the caller chooses, and a learning rate that falls along a cosine.

A loop over batches, layers or steps takes `progress`, which wraps what it iterates over:

    polish(decoder, loss, batches, steps, lr)                                       in a notebook or a test: no bar
    polish(decoder, loss, batches, steps, lr, bar("r4: polish", "step"))            r4: polish:  25%|██▌  | 25/100 …
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from llamaq.runs.tracking import progress

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def bar(title: str, unit: str) -> Progress:
    """Return what wraps a loop in a progress bar with this title, counting in `unit`."""
    return partial(progress, title=title, unit=unit)


def no_bar(items: Iterable[Any]) -> Iterable[Any]:
    """Return the items as they are: a loop without a progress bar."""
    return items


def cosine(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: 1 at the first, 0 after the last.

    Of 4 steps: 1, 0.85, 0.5, 0.15.
    """
    return 0.5 + 0.5 * math.cos(math.pi * step / steps)


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule that takes the optimizer's learning rates to 0 along `cosine`."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
