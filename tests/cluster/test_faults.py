"""Test losses in the middle of a stage, on a real Ray cluster of two nodes: killed workers, lost and drained nodes."""

import re
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import SMALL
from ray_cluster import BIN, Cluster, Job, wait_for

from llamaq.runs.tracking import read_metrics

pytestmark = pytest.mark.cluster
HERE = Path(__file__).parent
NODES = ("127.0.0.2", "127.0.0.3")
STEPS, EVERY = 60, 5


def settings(folder: Path, *overrides: str) -> list[str]:
    sizes = [f"qat.max_steps={STEPS}", "qat.epochs=20", f"qat.checkpoint_every_n_steps={EVERY}"]
    sizes += ["qat.lr_scheduler.num_warmup_steps=10"]
    return ["--config", "tiny", *SMALL, *sizes, "qat.optimizer.lr=1e-4", f"output_dir={folder}", *overrides]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run([BIN / "tune", "run", "qat", *settings(folder)], check=True, capture_output=True, timeout=300)
    return losses(folder)


@pytest.fixture
def cluster():
    cluster = Cluster(0, several_nodes=True)
    try:
        for ip in NODES:
            cluster.add_node(ip)
        yield cluster
    finally:
        cluster.stop()


def losses(folder: Path) -> list[float]:
    rows = read_metrics(folder / "qat/metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    return [r["loss"] for r in rows]


def submit(cluster: Cluster, folder: Path, workers: str, *more: str) -> Job:
    own = ["--working-dir", str(HERE)]
    size = ["--num-workers", workers, "--placement", "spread", "--resize-seconds", "8"]
    return Job(cluster, "slow_qat", *settings(folder), *own, *size, *more)


def step(folder: Path) -> int:
    """Return the last step done."""
    for stage in ("qat.partial", "qat"):
        if rows := read_metrics(folder / stage / "metrics.jsonl"):
            return rows[-1]["step"]
    return 0


def resumed(job: Job) -> list[int]:
    """Return the steps after which the run resumed. (All nodes log into one folder, so Ray shows lines twice.)"""
    return list(dict.fromkeys(int(n) for n in re.findall(r"qat: resuming after step (\d+)", job.said)))


def sizes(folder: Path) -> list[int]:
    """Return the numbers of ranks that trained, one after the other."""
    ranks = [r["ranks"] for r in read_metrics(folder / "qat/metrics.jsonl")]
    return [n for i, n in enumerate(ranks) if i == 0 or ranks[i - 1] != n]


def test_a_killed_worker_is_replaced_and_the_losses_are_those_of_an_uninterrupted_run(cluster, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    job = submit(cluster, folder, "2")
    wait_for(lambda: step(folder) >= EVERY + 2, 150, "the first checkpoint")
    before = step(folder)
    cluster.workers(NODES[1])[0].send_signal(signal.SIGKILL)
    assert job.wait() == 0, job.said[-4000:]
    assert losses(folder) == pytest.approx(uninterrupted, rel=5e-5)
    assert sizes(folder) == [2]
    assert len(resumed(job)) == 1 and before - EVERY < resumed(job)[0]
    assert "starting again from the last checkpoint" in job.said


def test_a_lost_node_shrinks_the_run_a_new_one_grows_it_and_a_preempted_one_is_warned_of(
    cluster, tmp_path, uninterrupted
):
    folder = tmp_path / "run"
    job = submit(cluster, folder, "1:2", "--env", "STEP_SECONDS=0.8")
    wait_for(lambda: step(folder) >= EVERY + 2, 150, "the first checkpoint")
    before = step(folder)
    cluster.kill_node(NODES[0])
    job.expect("qat: resuming after step")  # one worker goes on
    assert before - EVERY < resumed(job)[0]
    cluster.add_node("127.0.0.4")
    wait_for(lambda: len(resumed(job)) >= 2 or job.process.poll() is not None, 90, "growth")
    assert len(resumed(job)) == 2, job.said[-4000:]
    wait_for(lambda: step(folder) > resumed(job)[1] + 1, 60, "steps of two workers again")
    cluster.drain_node("127.0.0.4", seconds=10)
    job.expect("written just in time")
    in_time = int(re.findall(r"qat: checkpoint of step (\d+) written just in time", job.said)[0])
    assert job.wait() == 0, job.said[-4000:]
    assert len(resumed(job)) == 3 and resumed(job)[2] >= in_time
    assert losses(folder) == pytest.approx(uninterrupted, rel=5e-5)
    assert sizes(folder) == [2, 1, 2, 1]


def test_a_lost_node_ends_a_run_of_fixed_size_after_the_time_it_was_given(cluster, tmp_path):
    folder = tmp_path / "run"
    job = submit(cluster, folder, "2", "--wait-minutes", "0.75")
    wait_for(lambda: step(folder) >= EVERY + 2, 150, "the first checkpoint")
    cluster.kill_node(NODES[1])
    assert job.wait(180) == 1
    assert "no 2 workers for 0.75 minutes: asked for 2 workers with 1 CPU each, the cluster has 1 CPU" in job.said
    assert "the same command goes on from the last checkpoint" in job.said
