"""Parse the options that `tune submit` and the job it sends have in common."""

import argparse
import os
from dataclasses import dataclass

from llamaq.config import Config
from llamaq.errors import UserError

FLAGS = ("--detach", "--help")  # options without a value
PATHS = ("output_dir", "checkpoint_dir", "data_dir")  # settings that have to be full paths on a shared file system
LAUNCHER = "ray"  # folder in output_dir for Ray Train's own files


@dataclass(frozen=True)
class Options:
    """Where workers run, and how long to wait for them. See `add_options` for the meaning of each."""

    min_workers: int
    max_workers: int
    gpus_per_worker: int  # 0 or 1
    cpus_per_worker: int
    placement: str  # pack or spread
    wait_minutes: float
    max_failures: int
    resize_seconds: float

    @property
    def workers(self) -> int | tuple[int, int]:
        """Return the number of workers as Ray Train takes it: a number, or a range."""
        return self.min_workers if self.min_workers == self.max_workers else (self.min_workers, self.max_workers)

    @property
    def bundle(self) -> dict[str, float]:
        """Return the resources of one worker, e.g. {"CPU": 1.0, "GPU": 1.0}."""
        return {"CPU": float(self.cpus_per_worker)} | ({"GPU": 1.0} if self.gpus_per_worker else {})

    @property
    def wait_seconds(self) -> float:
        """Return the time to wait for free places."""
        return self.wait_minutes * 60

    def check(self, c: Config) -> None:
        """Check that the options fit the run's settings.

        Raises:
            UserError: they do not fit; the message names the option and the setting.
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
        """Return the command line that gives these options again."""
        values = {
            "--num-workers": f"{self.min_workers}:{self.max_workers}",
            "--gpus-per-worker": str(self.gpus_per_worker),
            "--cpus-per-worker": str(self.cpus_per_worker),
            "--placement": self.placement,
            "--wait-minutes": f"{self.wait_minutes:g}",
            "--max-failures": str(self.max_failures),
            "--resize-seconds": f"{self.resize_seconds:g}",
        }
        return [word for option in values.items() for word in option]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add recipe, config and the options above to a parser. `split_settings` takes the settings off beforehand."""
    parser.add_argument("recipe", help="a recipe of llamaq (tune ls), or a module with a function recipe(run)")
    parser.add_argument("--config", required=True, help="a packaged config or a YAML file")
    parser.add_argument(
        "--num-workers",
        default="1",
        metavar="N|MIN:MAX",
        help="number of ranks; MIN:MAX uses as many as there is room for, as nodes come and go (default 1)",
    )
    parser.add_argument(
        "--gpus-per-worker",
        type=int,
        choices=(0, 1),
        help="1: a rank trains on one GPU; 0: on CPUs (default 1; 0 with device=cpu)",
    )
    parser.add_argument("--cpus-per-worker", type=int, default=1, help="CPU cores of a rank (default 1)")
    parser.add_argument(
        "--placement",
        choices=("pack", "spread"),
        default="pack",
        help="pack: fill one node after the other; spread: use many nodes (default pack)",
    )
    parser.add_argument(
        "--wait-minutes",
        type=float,
        default=15.0,
        help="how long to wait for free places, at the start and after a loss of nodes (default 15)",
    )
    parser.add_argument(
        "--max-failures",
        type=int,
        default=5,
        help="how often to restart after lost workers; preempted nodes do not count (default 5)",
    )
    parser.add_argument(
        "--resize-seconds",
        type=float,
        default=300.0,
        help="with MIN:MAX, how often to look for more room; growing repeats the steps since the last checkpoint "
        "(default 300)",
    )


def split_settings(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into options and settings (`key=value` and `~key`), which may come in any order.

    Example: `qat seed=1 --config tiny ~base` gives `qat --config tiny` and `seed=1 ~base`. A word after an option that
    takes a value is that value: `--env A=B` is an option.
    """
    settings: list[str] = []
    options: list[str] = []
    for i, word in enumerate(argv):
        before = argv[i - 1] if i else ""
        is_value = before.startswith("--") and "=" not in before and before not in FLAGS
        is_setting = not word.startswith("-") and ("=" in word or word.startswith("~")) and not is_value
        (settings if is_setting else options).append(word)
    return options, settings


def parse_options(arguments: argparse.Namespace, c: Config) -> Options:
    """Check the parsed arguments and return them as `Options`.

    Raises:
        UserError: the number of workers is not a number or a range, or another option is out of range.
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
        min_workers=smallest,
        max_workers=largest,
        gpus_per_worker=int(c.device != "cpu") if gpus is None else gpus,
        cpus_per_worker=arguments.cpus_per_worker,
        placement=arguments.placement,
        wait_minutes=arguments.wait_minutes,
        max_failures=arguments.max_failures,
        resize_seconds=arguments.resize_seconds,
    )
