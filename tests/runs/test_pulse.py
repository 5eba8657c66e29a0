"""Ranks wait for rank 0's long work outside of collectives, and notice within a limit that it is gone or hangs."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("waiting_worker.py")
# collectives fail after 4 s and a rank that is silent for 3 s is lost; the real limits are minutes
SHORT = {"LLAMAQ_COLLECTIVE_SECONDS": "4", "LLAMAQ_SILENCE_SECONDS": "3"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"} | SHORT


def torchrun(how: str, part: str = "from_rank_zero") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run([*command, WORKER, how, part], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


def by_hand(how: str, part: str = "from_rank_zero") -> tuple[subprocess.Popen, subprocess.Popen]:
    """Start two ranks without an agent: rank 0 holds the store, as in Ray's workers, and nobody ends the other."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, how, part],
            env=ENVIRONMENT | place | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    return ranks[0], ranks[1]


@pytest.mark.slow
def test_rank_zero_may_work_longer_than_a_collective_may_take():
    done = torchrun("9")
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in (0, 1):  # not line by line: torchrun's ranks are unbuffered, and their lines may run into each other
        assert done.stdout.count(f"rank {rank} got worked 9 seconds") == 1, done.stdout


@pytest.mark.slow
def test_another_rank_may_also_be_the_slow_one():
    done = torchrun("9", "everywhere")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("got ['nothing to do', 'worked 9 seconds']") == 2


@pytest.mark.slow
def test_what_rank_zero_raises_reaches_those_who_wait():
    done = torchrun("raises")
    assert done.returncode != 0
    assert "rank 1 ended after" in done.stdout and done.stdout.count("UserError: the export failed after three") == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_dies_or_hangs_is_named_within_the_limit(how):
    zero, one = by_hand(how)
    try:
        said, errors = one.communicate(timeout=60)
    finally:
        zero.kill()
        zero.communicate()
        one.kill()
    assert one.returncode == 1, errors[-2000:]
    host = re.escape(socket.gethostname())
    found = re.search(
        rf"rank 1 ended after ([\d.]+) s: LostRankError: rank 0 on {host} has given no sign of life", said
    )
    assert found, (said, errors[-2000:])
    assert float(found[1]) < 10


@pytest.mark.slow
def test_under_torchrun_a_rank_that_hangs_ends_the_run():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", WORKER]
    began = time.monotonic()
    agent = subprocess.Popen(
        [*command, "SIGSTOP", "from_rank_zero"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert agent.stdout is not None and agent.stderr is not None
    said = agent.stdout.readline() or agent.stderr.read()
    assert "LostRankError: rank 0 on " in said and time.monotonic() - began < 60
    stopped = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    for pid in stopped:  # torchrun sends SIGTERM, which a stopped process does not see, and SIGKILL 30 s later
        os.kill(int(pid), signal.SIGKILL)
    agent.communicate(timeout=60)
    assert agent.returncode != 0


@pytest.mark.slow
def test_under_torchrun_a_rank_that_is_killed_ends_the_run():
    done = torchrun("SIGKILL")
    assert done.returncode != 0
    assert "rank      : 0" in done.stderr and "Signal 9 (SIGKILL)" in done.stderr
