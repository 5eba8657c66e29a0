"""Run a recipe on every Ray Train worker, tell Ray of checkpoints, and ask it which nodes will be taken away.

Ray makes the process group; the recipe is the same function that one process runs. Ray restarts all workers when one is
lost, or when the number of workers changes. The run then resumes from its own folder, as it does when a user runs the
command again.
"""

import importlib
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train

from llamaq.cluster.options import LAUNCHER
from llamaq.config import Config
from llamaq.errors import UserError
from llamaq.families import complete
from llamaq.runs.files import write_json
from llamaq.runs.manifest import CHECKPOINTS
from llamaq.runs.ranks import from_rank_zero, rank
from llamaq.runs.run import Hooks, Run
from llamaq.runs.workers import check_workers

LOCK_SECONDS = 120.0  # a network file system frees a dead process's lock only after it has noticed the death
POLL_SECONDS = 5.0  # Ray itself looks this often for nodes that will be taken away
SHOWN = ("loss", "lr", "grad_norm", "tokens_per_second")  # metrics for Ray's dashboard


class RayHooks(Hooks):
    """Tells Ray of checkpoints, and the training loop of nodes that will be taken away.

    A checkpoint stays in the run's folder, and Ray gets a small file that names it. Ray hears of checkpoints only, not
    of steps: `ray.train.report` returns when the controller polls it, which is every two seconds.
    """

    folder = LAUNCHER

    def __init__(self, config: Config):
        self._config = config
        self._asked = time.monotonic()
        self._reported: set[str] = set()  # ids of nodes

    def due(self) -> bool:
        """Tell whether `preempted` was not called for POLL_SECONDS."""
        return time.monotonic() - self._asked > POLL_SECONDS

    def preempted(self) -> bool:
        """Tell whether a node will be taken away that no earlier call has reported."""
        info = ray.train.get_preemption_info()
        self._asked = time.monotonic()
        nodes = set(info.preempted_node_ids) if info is not None else set()
        if not nodes - self._reported:
            return False
        self._reported |= nodes
        if rank() == 0:
            print(f"a node is about to be taken away ({', '.join(sorted(nodes))}): writing a checkpoint", flush=True)
        return True

    def checkpointed(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Report the checkpoint's path and a few metrics to Ray."""
        shown = {k: v for k, v in metrics.items() if k in SHOWN} | {"stage": stage, "step": step}
        with tempfile.TemporaryDirectory() as folder:
            pointer = None
            if rank() == 0:
                where = f"{self._config.output_dir}/{stage}.partial/{CHECKPOINTS}/step_{step:06d}"
                write_json(Path(folder) / "checkpoint.json", {"checkpoint": where, **shown})
                pointer = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(shown, checkpoint=pointer)


def on_worker(task: dict[str, Any]) -> None:
    """Run the recipe `task["recipe"]` with the settings `task["config"]` as one rank."""
    config: Config = complete(task["config"])
    logging.getLogger().setLevel(logging.WARNING)  # Ray sets it to INFO, and its own modules repeat every report
    run = Run(config, RayHooks(config), patience=LOCK_SECONDS)
    try:
        check_workers(config, from_rank_zero(lambda: run.id))
        find_recipe(task["recipe"])(run)
    finally:
        run.close()


def find_recipe(name: str) -> Callable[[Run], None]:
    """Return llamaq's recipe of this name, or the function `recipe` of the user's module of this name.

    Raises:
        UserError: there is neither.
    """
    for module in (f"llamaq.recipes.{name}", name):
        try:
            found: Any = getattr(importlib.import_module(module), "recipe", None)
        except ModuleNotFoundError as e:
            if e.name is None or not module.startswith(e.name):
                raise  # the module exists, and something that it imports does not
            continue
        if found is not None:
            return found
    raise UserError(f"'{name}' is neither a recipe of llamaq nor a module with a function recipe(run); see tune ls")
