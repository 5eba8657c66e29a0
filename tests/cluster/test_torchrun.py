"""Test several nodes under torchrun: two agents that meet at a rendezvous, as on two machines."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import SMALL
from ray_cluster import BIN, free_port

from llamaq.runs.tracking import read_metrics

pytestmark = pytest.mark.cluster
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def both(folders: tuple[Path, Path], output_dir: str) -> list[subprocess.CompletedProcess]:
    """Run the same command on two nodes, each with its own current folder."""
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--local_addr", "127.0.0.1"]
    torchrun = ["--nnodes", "2", "--nproc_per_node", "1", *rendezvous]
    command = [BIN / "tune", "run", *torchrun, "qat", "--config", "tiny", *SMALL, f"output_dir={output_dir}"]
    nodes = [
        subprocess.Popen(command, cwd=f, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for f in folders
    ]
    said = [node.communicate(timeout=200) for node in nodes]
    return [
        subprocess.CompletedProcess(command, node.returncode, *streams)
        for node, streams in zip(nodes, said, strict=True)
    ]


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    return tmp_path / "a", tmp_path / "b"


def test_two_nodes_train_like_one_process(tmp_path, folders):
    nodes = both(folders, str(tmp_path / "two"))
    assert [n.returncode for n in nodes] == [0, 0], nodes[0].stderr[-3000:]
    command = [BIN / "tune", "run", "qat", "--config", "tiny", *SMALL, f"output_dir={tmp_path}/one"]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=200)
    losses = [[r["loss"] for r in read_metrics(tmp_path / f / "qat/metrics.jsonl")] for f in ("two", "one")]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_nodes_that_do_not_see_one_output_dir_are_told_so(folders):
    nodes = both(folders, "run")  # relative: another folder on each
    assert all(n.returncode for n in nodes)
    said = "".join(n.stderr for n in nodes)
    assert "the workers are not alike: rank 1 on " in said
    assert "does not see the output_dir that rank 0 writes to; mount one shared file system" in said
    assert "NOT SEEN" in said and "Traceback" not in said.split("error:")[0]
