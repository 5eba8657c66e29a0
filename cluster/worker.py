"""What every Ray Train worker runs: the recipe, as under torchrun, with Ray told of checkpoints and asked of its plans.

The process group is Ray's; the chain is the same function that one process runs. Ray restarts all workers when one is
lost or when it resizes the group, and the run goes on from its own folder, as it does when a user runs it again.
"""

import importlib
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train

from llamaq.config import Config
from llamaq.errors import UserError
from llamaq.runs.run import CHECKPOINTS, Hooks, Run, rank, write_json
from llamaq.runs.workers import check_workers

LOCK_SECONDS = 120.0  # a network file system frees a lock only when it has noticed that its holder is gone
POLL_SECONDS = 5.0  # how often Ray itself looks for nodes about to be taken away
FEW = ("loss", "lr", "grad_norm", "tokens_per_second")  # what Ray's dashboard is shown


class RayHooks(Hooks):
    """Tells Ray of checkpoints by a file that names them, since they lie in the run's folder already.

    Nothing is said between checkpoints: `ray.train.report` waits for the controller's next look, two seconds apart.
    """

    def __init__(self, config: Config):
        self._config = config
        self._asked = time.monotonic()
        self._answered: set[str] = set()

    def due(self) -> bool:
        return time.monotonic() - self._asked > POLL_SECONDS

    def preempted(self) -> bool:
        """True once for every node that is about to be taken away."""
        info = ray.train.get_preemption_info()
        self._asked = time.monotonic()
        nodes = set(info.preempted_node_ids) if info is not None else set()
        if not nodes - self._answered:
            return False
        self._answered |= nodes
        if rank() == 0:
            print(f"a node is about to be taken away ({', '.join(sorted(nodes))}): writing a checkpoint", flush=True)
        return True

    def checkpointed(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        few = {k: v for k, v in metrics.items() if k in FEW} | {"stage": stage, "step": step}
        with tempfile.TemporaryDirectory() as folder:
            pointer = None
            if rank() == 0:
                where = f"{self._config.output_dir}/{stage}.partial/{CHECKPOINTS}/step_{step:06d}"
                write_json(Path(folder) / "checkpoint.json", {"checkpoint": where, **few})
                pointer = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(few, checkpoint=pointer)


def on_worker(task: dict[str, Any]) -> None:
    """Run `task["recipe"]` with `task["config"]` as one rank."""
    config: Config = task["config"]
    logging.getLogger().setLevel(logging.WARNING)  # Ray sets it to INFO, and its own modules repeat every report
    run = Run(config, RayHooks(config), patience=LOCK_SECONDS)
    try:
        check_workers(run)
        recipe_of(task["recipe"])(run)
    finally:
        run.close()


def recipe_of(name: str) -> Callable[[Run], None]:
    """A recipe by its name, or a module of yours with a function `recipe(run)`.

    Raises:
        UserError: there is none.
    """
    for module in (f"llamaq.recipes.{name}", name):
        try:
            found: Any = getattr(importlib.import_module(module), "recipe", None)
        except ModuleNotFoundError as e:
            if e.name is None or not module.startswith(e.name):
                raise
            continue
        if found is not None:
            return found
    raise UserError(f"'{name}' is neither a recipe of llamaq nor a module with a function recipe(run); see tune ls")
