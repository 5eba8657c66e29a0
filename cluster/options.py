"""The options that `tune submit` and the job it sends have in common."""

import argparse
import os
from dataclasses import dataclass

from llamaq.config import Config
from llamaq.errors import UserError

FLAGS = ("--detach", "--help")  # options without a value
PATHS = ("output_dir", "checkpoint_dir", "data_dir")


@dataclass(frozen=True)
class Options:
    """Where workers run and how long to wait for them."""

    min_workers: int
    max_workers: int
    gpus_per_worker: int
    cpus_per_worker: int
    placement: str  # pack or spread
    wait_minutes: float
    max_failures: int
    resize_seconds: float

    @property
    def workers(self) -> int | tuple[int, int]:
        """As Ray Train takes it: a number, or a range."""
        return self.min_workers if self.min_workers == self.max_workers else (self.min_workers, self.max_workers)

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker takes."""
        return {"CPU": float(self.cpus_per_worker)} | ({"GPU": 1.0} if self.gpus_per_worker else {})

    @property
    def wait_seconds(self) -> float:
        return self.wait_minutes * 60

    def check(self, c: Config) -> None:
        """Hold the options against the run's settings.

        Raises:
            UserError: they do not fit; names both.
        """
        for key in PATHS:
            path = getattr(c, key)
            if path and not os.path.isabs(path):
                raise UserError(
                    f"{key}={path} is relative, and every worker has another current folder; give its full path on the "
                    "file system that all nodes share"
                )
        if self.gpus_per_worker and c.device == "cpu":
            raise UserError("device=cpu trains on CPUs; add --gpus-per-worker 0, or choose device=auto")
        if not self.gpus_per_worker and c.device.startswith("cuda"):
            raise UserError(f"device={c.device} needs GPUs; leave --gpus-per-worker 0 out, or choose device=cpu")
        for name in ("base", "qat", "qat_lora", "qat_dpo"):
            t = getattr(c, name)
            if t is not None and self.max_workers > t.global_batch_size:
                raise UserError(
                    f"--num-workers {self.max_workers}: with {name}.global_batch_size={t.global_batch_size} some would "
                    "have nothing to do; raise it, or use fewer workers"
                )

    def arguments(self) -> list[str]:
        """The command line that gives these options again."""
        return [
            "--num-workers", f"{self.min_workers}:{self.max_workers}",
            "--gpus-per-worker", str(self.gpus_per_worker),
            "--cpus-per-worker", str(self.cpus_per_worker),
            "--placement", self.placement,
            "--wait-minutes", f"{self.wait_minutes:g}",
            "--max-failures", str(self.max_failures),
            "--resize-seconds", f"{self.resize_seconds:g}",
        ]  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Recipe, config and the options above; settings (key=value) are taken apart before."""
    parser.add_argument("recipe", help="a recipe of llamaq (tune ls), or a module with a function recipe(run)")
    parser.add_argument("--config", required=True, help="a packaged config or a YAML file")
    parser.add_argument(
        "--num-workers", default="1", metavar="N|MIN:MAX",
        help="ranks; with MIN:MAX as many as there is room for, more and fewer as nodes come and go (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--gpus-per-worker", type=int, choices=(0, 1), default=None,
        help="a rank trains on one GPU, or with 0 on CPUs (default 1; 0 with device=cpu)",
    )  # fmt: skip
    parser.add_argument("--cpus-per-worker", type=int, default=1, help="CPU cores of a rank (default 1)")
    parser.add_argument(
        "--placement", choices=("pack", "spread"), default="pack", help="fill nodes, or spread over them (default pack)"
    )
    parser.add_argument(
        "--wait-minutes", type=float, default=15.0,
        help="how long to wait for places, at the start and after nodes were lost (default 15)",
    )  # fmt: skip
    parser.add_argument(
        "--max-failures", type=int, default=5,
        help="restarts after lost workers; preempted nodes are not counted (default 5)",
    )  # fmt: skip
    parser.add_argument(
        "--resize-seconds", type=float, default=300.0,
        help="with MIN:MAX, how often to look for more room; growing goes back to the last checkpoint (default 300)",
    )  # fmt: skip


def split_settings(argv: list[str]) -> tuple[list[str], list[str]]:
    """Options and settings, which may stand anywhere among them: `key=value` and `~key`."""
    settings: list[str] = []
    options: list[str] = []
    for i, word in enumerate(argv):
        before = argv[i - 1] if i else ""
        is_value = before.startswith("--") and "=" not in before and before not in FLAGS
        is_setting = not word.startswith("-") and ("=" in word or word.startswith("~")) and not is_value
        (settings if is_setting else options).append(word)
    return options, settings


def options_of(arguments: argparse.Namespace, c: Config) -> Options:
    """Check and collect the options.

    Raises:
        UserError: a number of workers that is none.
    """
    low, _, high = str(arguments.num_workers).partition(":")
    try:
        smallest, largest = int(low), int(high or low)
    except ValueError:
        smallest, largest = 0, 0
    if not 1 <= smallest <= largest:
        raise UserError(f"--num-workers {arguments.num_workers}: give a number, or MIN:MAX with 1 ≤ MIN ≤ MAX")
    if arguments.cpus_per_worker < 1:
        raise UserError(f"--cpus-per-worker {arguments.cpus_per_worker}: at least 1")
    if arguments.wait_minutes <= 0 or arguments.max_failures < 0 or arguments.resize_seconds <= 0:
        raise UserError("--wait-minutes and --resize-seconds must be above 0, --max-failures 0 or more")
    gpus = arguments.gpus_per_worker
    return Options(
        smallest, largest, gpus if gpus is not None else int(c.device != "cpu"), arguments.cpus_per_worker,
        arguments.placement, arguments.wait_minutes, arguments.max_failures, arguments.resize_seconds,
    )  # fmt: skip
