"""Drive a recipe on a Ray cluster: wait for free places, start Ray Train's workers, restart them after losses.

    python -m llamaq.cluster.job RECIPE --config C --num-workers N [key=value …]

`tune submit` sends this command as a Ray job, and a KubeRay RayJob has it as its entrypoint. It runs on the cluster. It
exits with 0, or with 1 and one line that says what went wrong.

What happens after an error
---------------------------
    a worker raises                                       then
    wrong settings or data, a bug, too little memory      the job ends at once with that error
    a lost peer, disk or network                          all workers restart, --max-failures times at most
    the error of a node that was drained (preempted)      all workers restart, and it is not counted

    there are too few free places                         the job waits --wait-minutes, then ends

A restart resumes from the last checkpoint. Example: 16 workers on 2 nodes, and one node loses power. Its 8 workers are
gone; the other 8 raise RuntimeError ("connection closed by peer"). None of these errors is permanent, so Ray Train
starts again, with 16 workers if there is another node, or with 8 if --num-workers 8:16 allows it. Had rank 3 raised a
KeyError instead, another try would raise it again, so the job would end with it.
"""

import argparse
import os
import sys
import threading
import time
from dataclasses import replace
from typing import Any

from llamaq import torchao_compat  # noqa: F401
from llamaq.cluster.options import LAUNCHER, Options, add_options, parse_options, split_settings
from llamaq.config import Config, check_sections, load
from llamaq.errors import UserError
from llamaq.runs.main import PATIENCE, backend

# Errors of workers that come back however often one tries: wrong settings or data (UserError is a ValueError) and bugs.
# Lost peers, disks and networks raise RuntimeError, OSError or Ray's own errors.
PERMANENT = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    ImportError,
    AssertionError,
    ArithmeticError,
    NotImplementedError,  # a RuntimeError
)
RESUME = "the same command goes on from the last checkpoint"
# Time for one attempt at placing the workers; Ray Train's default is 60 s. After a node is lost, its first attempt
# still counts on that node and takes all of this time.
START_SECONDS = 30.0
# Ray Train's own messages about a failure are stack traces of its controller. The callback below prints what happened.
RAY_LOG_LEVEL = "CRITICAL"


def main() -> None:
    """Run the command line; exit with 1 and one line on an error that another try would not change."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # the patch prints every line of a worker twice
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # Ray would drop lines of a progress bar as repetitions
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        drive(*parse(sys.argv[1:]))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(1)


def parse(argv: list[str]) -> tuple[str, Config, Options]:
    """Parse the command line and check all that can be checked before a worker starts.

    Raises:
        UserError: a setting or an option is wrong, or there is no such recipe.
    """
    from llamaq.cluster.worker import find_recipe

    parser = argparse.ArgumentParser(
        prog="python -m llamaq.cluster.job",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    words, settings = split_settings(argv)
    arguments = parser.parse_args(words)
    c = load(arguments.config, settings)
    options = parse_options(arguments, c)
    options.check(c)
    recipe: Any = find_recipe(arguments.recipe)
    check_sections(c, recipe.__globals__.get("NEEDS", ()), arguments.config)
    return arguments.recipe, c, options


def drive(recipe: str, c: Config, options: Options) -> None:
    """Run the recipe on the cluster that this process is part of.

    Raises:
        UserError: too few places came free in time, or the run ended with an error.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_SECONDS))
    import ray
    from ray.train import TrainingFailedError

    if not ray.is_initialized():
        ray.init()
    wait_for_places(options)
    trainer = make_trainer(recipe, c, options)
    watch = Watch(options)
    watch.start()
    try:
        trainer.fit()
    except TrainingFailedError as e:
        raise UserError(describe_failure(e, options)) from e
    finally:
        watch.stopped.set()


def make_trainer(recipe: str, c: Config, options: Options) -> Any:
    """Return a Ray Train trainer that runs the recipe on its workers."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from llamaq.cluster.worker import on_worker

    on_gpu = options.gpus_per_worker > 0
    if not on_gpu:
        c = replace(c, device="cpu")  # Ray does not hide a node's GPUs from workers that asked for none
    return TorchTrainer(
        on_worker,
        train_loop_config={"recipe": recipe, "config": c},
        torch_config=TorchConfig(backend=backend(on_gpu), timeout_s=int(PATIENCE.total_seconds())),
        scaling_config=ray.train.ScalingConfig(
            num_workers=options.workers,
            use_gpu=on_gpu,
            resources_per_worker=options.bundle,
            placement_strategy=options.placement.upper(),
            elastic_resize_monitor_interval_s=options.resize_seconds,
        ),
        run_config=ray.train.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=os.path.join(c.output_dir, LAUNCHER),
            failure_config=ray.train.FailureConfig(
                max_failures=options.max_failures,
                controller_failure_limit=-1,  # attempts at starting: unlimited, since `Watch` limits their time
            ),
            callbacks=[stop_at_permanent_errors()],
            logging_config=LoggingConfig(log_level=RAY_LOG_LEVEL),
        ),
    )


# --- errors -----------------------------------------------------------------------------------------------------------


class PermanentError(Exception):
    """An error of the run that another try would raise again."""


def is_permanent(error: BaseException) -> bool:
    """Tell whether the same command would end with the same error."""
    import torch

    return isinstance(error, (*PERMANENT, torch.OutOfMemoryError))


def stop_at_permanent_errors() -> Any:
    """Return a callback for Ray Train that ends the run at a permanent error instead of retrying."""
    from ray.train import UserCallback

    class StopAtPermanentErrors(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for who, error in sorted(worker_exceptions.items()):
                error = getattr(error, "cause", None) or error
                if is_permanent(error):
                    raise PermanentError(f"{error}" if isinstance(error, UserError) else f"rank {who}: {error!r}")
            lost = ", ".join(f"rank {who} ({first_line(error)})" for who, error in sorted(worker_exceptions.items()))
            print(f"lost {lost}: starting again from the last checkpoint", flush=True)

    return StopAtPermanentErrors()


def describe_failure(error: Exception, options: Options) -> str:
    """Return Ray Train's error as one line for the user."""
    from ray.train import ControllerError, WorkerGroupError

    if isinstance(error, ControllerError):
        cause = error.controller_failure
        if isinstance(cause, PermanentError):  # raised by the callback above
            return str(cause)
        return f"Ray Train's controller failed: {cause!r}"
    if isinstance(error, WorkerGroupError):
        first = next(iter(sorted(error.worker_failures.items())), (0, error))
        return (
            f"workers failed more than --max-failures={options.max_failures} times; rank {first[0]}: "
            f"{first_line(first[1])}; {RESUME}"
        )
    return repr(error)


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


# --- places -----------------------------------------------------------------------------------------------------------


def wait_for_places(options: Options) -> None:
    """Wait until the smallest number of workers could start. On an autoscaling cluster this makes nodes start.

    Raises:
        UserError: `--wait-minutes` are over; the message says what was asked for and what the cluster has.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    # reserving the places asks the autoscaler for them; Ray Train reserves its own afterwards
    group = placement_group([options.bundle] * options.min_workers, strategy=options.placement.upper())
    deadline = time.monotonic() + options.wait_seconds
    try:
        while not group.wait(max(0.1, min(15.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise UserError(f"waited {options.wait_minutes:g} minutes for places: {describe_places(options)}")
            print(f"waiting for places: {describe_places(options)}", flush=True)
    finally:
        remove_placement_group(group)
        while ray.util.placement_group_table(group).get("state") not in (None, "REMOVED"):
            time.sleep(0.1)


def describe_places(options: Options) -> str:
    """Say what the job asks for and what the cluster has."""
    import ray

    there, free = ray.cluster_resources(), ray.available_resources()
    named = {k: v for k, v in options.bundle.items() if v}
    asked = " and ".join(f"{v:g} {k}" for k, v in named.items())
    what = ", ".join(f"{there.get(k, 0):g} {k} ({free.get(k, 0):g} free)" for k in named)
    hint = ""
    if options.gpus_per_worker and not there.get("GPU"):
        hint = "; there is no GPU: add GPU nodes, or train on CPUs with device=cpu"
    return f"asked for {options.min_workers} workers with {asked} each, the cluster has {what}{hint}"


class Watch(threading.Thread):
    """Ends the job when it has been without its workers for `--wait-minutes`. Ray Train would wait for ever."""

    def __init__(self, options: Options):
        super().__init__(daemon=True)
        self.options, self.stopped = options, threading.Event()

    def run(self) -> None:
        """Look every few seconds whether the workers run and their nodes are there."""
        last_well = time.monotonic()
        while not self.stopped.wait(min(5.0, self.options.wait_seconds / 4)):
            try:
                if count_places(self.options) >= self.options.min_workers and count_workers():
                    last_well = time.monotonic()
            except Exception:  # the cluster does not answer; look again later
                continue
            if time.monotonic() - last_well > self.options.wait_seconds:
                message = (
                    f"no {self.options.min_workers} workers for {self.options.wait_minutes:g} minutes: "
                    f"{describe_places(self.options)}; {RESUME}, with fewer workers if --num-workers MIN:MAX says so"
                )
                print(f"error: {message}", file=sys.stderr, flush=True)
                os._exit(1)  # an interrupt would end fit() without a message


def count_places(options: Options) -> int:
    """Return how many workers the living nodes could hold if they did nothing else."""
    import ray

    return sum(
        int(min(node["Resources"].get(k, 0) // v for k, v in options.bundle.items()))
        for node in ray.nodes()
        if node["Alive"]
    )


def count_workers() -> int:
    """Return the number of Ray Train's workers of this job that are alive."""
    import ray
    from ray.util.state import list_actors

    wanted = {"class_name": "RayTrainWorker", "state": "ALIVE", "job_id": ray.get_runtime_context().get_job_id()}
    return len(list_actors(filters=[(key, "=", value) for key, value in wanted.items()]))


if __name__ == "__main__":
    main()
