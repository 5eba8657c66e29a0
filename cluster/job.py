"""Drives a recipe on a Ray cluster: `python -m llamaq.cluster.job RECIPE --config C --num-workers N [key=value …]`.

`tune submit` sends this as a Ray job; a KubeRay RayJob has it as its entrypoint. It runs where Ray is: it waits for
the workers' places, starts Ray Train on them, and ends with the run's own error, or 0.
"""

import argparse
import os
import sys
import threading
import time
from dataclasses import replace
from typing import Any

from llamaq import torchao_compat  # noqa: F401
from llamaq.cluster.options import Options, add_options, options_of, split_settings
from llamaq.config import Config, load
from llamaq.errors import UserError
from llamaq.runs.main import PATIENCE, backend
from llamaq.runs.run import LAUNCHER

# Of the errors that workers raise, those that come back however often one tries: wrong settings or data (UserError is
# a ValueError) and bugs. Lost peers, disks and networks make RuntimeErrors, OSErrors and Ray's own.
LASTING = (ValueError, TypeError, LookupError, AttributeError, NameError, ImportError, AssertionError, ArithmeticError)
RESUME = "the same command goes on from the last checkpoint"
# One attempt at placing the workers. After a node is lost, Ray Train's first attempt still counts on it and takes all
# of this time; its default is 60.
START_SECONDS = 30.0


def main() -> None:
    """Entry point; exits with 1 and one line on anything that another try would not change."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # with it, all that workers print shows twice
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # progress is not a repetition
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        drive(*parse(sys.argv[1:]))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(1)


def parse(argv: list[str]) -> tuple[str, Config, Options]:
    """The command line, held against everything that can be known to be wrong before a worker is started.

    Raises:
        UserError: the first thing that is.
    """
    from llamaq.cluster.worker import recipe_of

    parser = argparse.ArgumentParser(prog="python -m llamaq.cluster.job", description=__doc__)
    add_options(parser)
    words, settings = split_settings(argv)
    arguments = parser.parse_args(words)
    c = load(arguments.config, settings)
    options = options_of(arguments, c)
    options.check(c)
    recipe_of(arguments.recipe)
    return arguments.recipe, c, options


def drive(recipe: str, c: Config, options: Options) -> None:
    """Run the recipe on the cluster this process is part of.

    Raises:
        UserError: the places do not come free in time, or the run's own error.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_SECONDS))
    import ray
    import ray.train
    from ray.train import TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from llamaq.cluster.worker import on_worker

    if not ray.is_initialized():
        ray.init()
    wait_for_places(options)
    on_gpu = options.gpus_per_worker > 0
    if not on_gpu:
        c = replace(c, device="cpu")  # Ray does not hide a node's GPUs from workers that asked for none
    trainer = TorchTrainer(
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
                controller_failure_limit=-1,  # attempts at starting; how long they may go on is the watch's
            ),
            callbacks=[stop_at_lasting_errors()],
            # what Ray logs of a failure are the controller's own stack traces; the callback says what happened
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    watch = Watch(options)
    watch.start()
    try:
        trainer.fit()
    except TrainingFailedError as e:
        raise UserError(reason(e, options)) from e
    finally:
        watch.stopped.set()


def stop_at_lasting_errors() -> Any:
    """A callback that ends the run at an error which another try would meet again, instead of retrying it."""
    from ray.train import UserCallback

    class StopAtLastingErrors(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for who, error in sorted(worker_exceptions.items()):
                error = getattr(error, "cause", None) or error
                if lasting(error):
                    raise LastingError(f"{error}" if isinstance(error, UserError) else f"rank {who}: {error!r}")
            lost = ", ".join(f"rank {who} ({first_line(error)})" for who, error in sorted(worker_exceptions.items()))
            print(f"lost {lost}: starting again from the last checkpoint", flush=True)

    return StopAtLastingErrors()


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


class LastingError(Exception):
    """An error of the run that is not worth another try."""


def lasting(error: BaseException) -> bool:
    """Whether the same command would end in the same error."""
    import torch

    return isinstance(error, (*LASTING, NotImplementedError, torch.OutOfMemoryError))


def reason(error: Exception, options: Options) -> str:
    """Ray Train's error as one line for the user."""
    from ray.train import ControllerError, WorkerGroupError

    if isinstance(error, ControllerError):
        cause = error.controller_failure
        if isinstance(cause, LastingError):
            return str(cause)
        return f"Ray Train's controller failed: {cause!r}"
    if isinstance(error, WorkerGroupError):
        first = next(iter(sorted(error.worker_failures.items())), (0, error))
        return (
            f"workers failed more than --max-failures={options.max_failures} times; rank {first[0]}: "
            f"{first_line(first[1])}; {RESUME}"
        )
    return repr(error)


# --- places ----------------------------------------------------------------------------------------------------------


def wait_for_places(options: Options) -> None:
    """Wait until the smallest number of workers could start; on an autoscaling cluster this makes nodes come.

    Raises:
        UserError: not within `--wait-minutes`; says what was asked for and what is there.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    group = placement_group([options.bundle] * options.min_workers, strategy=options.placement.upper())
    deadline = time.monotonic() + options.wait_seconds
    try:
        while not group.wait(max(0.1, min(15.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise UserError(f"waited {options.wait_minutes:g} minutes for places: {places(options)}")
            print(f"waiting for places: {places(options)}", flush=True)
    finally:
        remove_placement_group(group)
        while ray.util.placement_group_table(group).get("state") not in (None, "REMOVED"):
            time.sleep(0.1)


def places(options: Options) -> str:
    """What is asked for and what there is."""
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
    """Ends the job when it has not had its workers for `--wait-minutes`; Ray Train would wait for ever."""

    def __init__(self, options: Options):
        super().__init__(daemon=True)
        self.options, self.stopped = options, threading.Event()

    def run(self) -> None:
        well = time.monotonic()
        while not self.stopped.wait(min(5.0, self.options.wait_seconds / 4)):
            try:
                if capacity(self.options) >= self.options.min_workers and workers_alive():
                    well = time.monotonic()
            except Exception:  # the cluster is busy with itself: this look tells nothing
                continue
            if time.monotonic() - well > self.options.wait_seconds:
                message = (
                    f"no {self.options.min_workers} workers for {self.options.wait_minutes:g} minutes: "
                    f"{places(self.options)}; {RESUME}, with fewer workers if --num-workers MIN:MAX says so"
                )
                print(f"error: {message}", file=sys.stderr, flush=True)
                os._exit(1)  # fit() takes an interrupt for its own and would end without a word


def capacity(options: Options) -> int:
    """How many workers the living nodes could hold if they did nothing else."""
    import ray

    return sum(
        int(min(node["Resources"].get(k, 0) // v for k, v in options.bundle.items()))
        for node in ray.nodes()
        if node["Alive"]
    )


def workers_alive() -> int:
    """Ray Train's workers of this job."""
    import ray
    from ray.util.state import list_actors

    wanted = {"class_name": "RayTrainWorker", "state": "ALIVE", "job_id": ray.get_runtime_context().get_job_id()}
    return len(list_actors(filters=[(key, "=", value) for key, value in wanted.items()]))


if __name__ == "__main__":
    main()
