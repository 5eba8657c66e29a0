"""Measure what Ray costs: step times of stage 1 on Ray and under torchrun, both with DeepSpeed, at the same time.

    python tests/benchmarks/ray_overhead.py [--rounds 6] [--steps 150]

A machine's speed drifts by more than the difference, so the two run side by side: Ray's two ranks on one core,
torchrun's two on another, and they swap cores every round. Ray's daemons may use both cores, so they slow down both
alike; their CPU time is printed. Only steps count that were taken while both were running. The config is `tiny`, in
float32. Prints the median step of each, and the ratio with a bootstrap interval over pairs of rounds.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parent.parent / "cluster")]
from ray_cluster import BIN, Cluster, Job, wait_for  # noqa: E402

from llamaq.runs.tracking import read_metrics  # noqa: E402

# settings of the tests' clusters that a user's cluster does not have: it has Ray's defaults
TEST_SETTINGS = (
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S",
    "RAY_health_check_initial_delay_ms",
    "RAY_health_check_period_ms",
    "RAY_health_check_failure_threshold",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S",
)
WARM = 20  # first steps, which do not count


def main() -> None:
    """Run the rounds and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150, help="steps of torchrun; Ray trains as long")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    ratios = []
    for i in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            ray, torchrun, daemons = side_by_side(Path(folder), options.steps, *(cores if i % 2 else cores[::-1]))
        a, b = statistics.median(ray), statistics.median(torchrun)
        ratios.append(a / b)
        both = f"Ray {1e3 * a:6.1f} ms ({len(ray)} steps), torchrun {1e3 * b:6.1f} ms ({len(torchrun)})"
        print(f"round {i}: {both}, ratio {a / b:.3f}; Ray's daemons took {daemons:.0%} of a core", flush=True)
    # The geometric mean of two rounds with swapped cores cancels a difference between the cores.
    pairs = [(a * b) ** 0.5 for a, b in zip(ratios[::2], ratios[1::2], strict=True)]
    low, high = interval(pairs)
    print(f"\nRay / torchrun, median step: {statistics.mean(pairs):.3f} [{low:.3f}, {high:.3f}] (95 %)")


def side_by_side(folder: Path, steps: int, ray_core: int, torchrun_core: int) -> tuple[list[float], list[float], float]:
    """Train on Ray and under torchrun at the same time.

    Returns:
        Ray's step times in seconds, torchrun's, and how many cores Ray's daemons used meanwhile.
    """
    common = ["--config", "tiny", "wandb.mode=disabled", "base.max_steps=4", "base.batch_size=8", "~base.lr_scheduler"]
    common += ["qat.batch_size=8", "qat.epochs=99", "qat.checkpoint_every_n_steps=50"]
    ours, theirs = folder / "ray", folder / "torchrun"
    cluster = Cluster(2, {name: "" for name in TEST_SETTINGS})
    try:
        job = Job(cluster, "qat", *common, f"output_dir={ours}", "qat.max_steps=9999", "--num-workers", "2")
        wait_for(lambda: len(times(ours)) > 1, 120, f"Ray's first steps:\n{job.said}")
        ranks = cluster.workers("127.0.0.1")
        for thread in (int(t.name) for rank in ranks for t in Path(f"/proc/{rank.pid}/task").iterdir()):
            os.sched_setaffinity(thread, {ray_core})
        with on_core(torchrun_core):
            command = [BIN / "tune", "run", "--nproc_per_node", "2", "qat", *common]
            command += [f"output_dir={theirs}", f"qat.max_steps={steps + WARM}"]
            silent = subprocess.DEVNULL
            process = subprocess.Popen(command, env=cluster.client(), stdout=silent, stderr=silent)
        wait_for(lambda: len(times(theirs)) > WARM, 120, "torchrun's first steps")
        start, clock = len(times(ours)), time.monotonic()
        daemons = cpu_seconds(cluster, ranks)
        while len(times(theirs)) < steps + WARM:
            time.sleep(0.2)
            assert process.poll() in (None, 0), "torchrun failed"
        ray, torchrun = times(ours)[start:], times(theirs)[WARM:]
        daemons = (cpu_seconds(cluster, ranks) - daemons) / (time.monotonic() - clock)
        process.wait()
        job.process.kill()
    finally:
        cluster.stop()
    return ray, torchrun, daemons


def cpu_seconds(cluster: Cluster, ranks: list[psutil.Process]) -> float:
    """Return the CPU time so far of all of Ray's processes except the ranks."""
    root, total = psutil.Process(cluster.nodes["127.0.0.1"].pid), 0.0
    for process in [root, *root.children(recursive=True)]:
        if process not in ranks:
            with suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:2])
    return total


def times(folder: Path) -> list[float]:
    """Return the step times of the stage `qat` so far."""
    stages = [folder / s for s in ("qat", "qat.partial")]
    return [r["step_seconds"] for s in stages for r in read_metrics(s / "metrics.jsonl")]


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Keep processes that are started inside on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean."""
    rng = random.Random(0)
    means = sorted(statistics.mean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


if __name__ == "__main__":
    main()
