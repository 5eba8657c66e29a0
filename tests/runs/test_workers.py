"""Test the comparison of ranks before a run: a difference stops it, and the message names it and what to do."""

import re
import subprocess
import sys

import pytest
from conftest import small

from llamaq.runs.manifest import package_versions
from llamaq.runs.run import Run
from llamaq.runs.workers import as_table, code_hash, describe_worker, difference

WORKER = {
    "rank": 0,
    "host": "a",
    "gpu": "NVIDIA H200 141 GiB",
    "driver": "570.1",
    "packages": {"torch": "2.13.0", "ray": "2.60.0"},
    "code": "c0de" * 16,
    "output_dir": "seen",
    "free_gib": "99.0",
}


def test_ranks_that_are_alike_but_for_host_and_free_disk_may_train():
    assert difference([WORKER, WORKER | {"rank": 1, "host": "b", "free_gib": "1.0"}]) is None


@pytest.mark.parametrize(
    "other, message",
    [
        ({"output_dir": "NOT SEEN"}, r"rank 1 on b does not see the output_dir .* mount one shared file system"),
        ({"gpu": "NVIDIA A10G 24 GiB"}, r"gpu is NVIDIA H200 141 GiB on rank 0 and NVIDIA A10G 24 GiB on rank 1"),
        ({"driver": "550.2"}, r"driver is 570\.1 on rank 0 and 550\.2 on rank 1"),
        ({"code": "beef" * 16}, r"code is c0dec0de.* on rank 0 .*; send the same code to every node"),
        ({"packages": {"torch": "2.12.0", "ray": "2.60.0"}}, r"torch is 2\.13\.0 on rank 0 and 2\.12\.0 on rank 1"),
        ({"packages": {"torch": "2.13.0"}}, r"ray is 2\.60\.0 on rank 0 and none on rank 1"),
    ],
)
def test_a_difference_is_named(other, message):
    assert re.search(message, difference([WORKER, WORKER | {"rank": 1, "host": "b"} | other]) or "")


def test_the_table_has_a_line_a_rank():
    lines = as_table([WORKER, WORKER | {"rank": 1, "host": "a-longer-name"}]).splitlines()
    assert " ".join(lines[0].split()) == "rank host gpu driver torch deepspeed code output_dir free GiB"
    assert len(lines) == 3 and lines[2].startswith("1     a-longer-name  NVIDIA H200 141 GiB  570.1")


def test_a_rank_sees_its_run_and_not_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr("llamaq.runs.workers.ATTRIBUTE_CACHE_SECONDS", 0.0)
    run = Run(small(tmp_path / "a"))
    mine = describe_worker(run.config, run.id)
    assert mine["output_dir"] == "seen" and mine["packages"] == package_versions() and len(mine["code"]) == 64
    assert describe_worker(run.config, "another!")["output_dir"] == "NOT SEEN"
    assert code_hash() == mine["code"]


LEAVING = """
import atexit, os
import torch.distributed as dist
from llamaq.runs.main import leave_process_group
atexit.register(os.abort)  # what a thread of gloo may do while Python shuts down
leave_process_group()  # without a group it returns
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print("said", end="")
leave_process_group({code})
"""


@pytest.mark.parametrize("code", [0, 1])
def test_a_rank_ends_with_its_code_and_all_it_said_before_python_shuts_down(code):
    done = subprocess.run([sys.executable, "-c", LEAVING.format(code=code)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "said")
