"""Test `tune submit` with a real Ray cluster on one machine: the whole chain, and every message about a failure."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import SMALL
from ray_cluster import BIN, Cluster, Job, free_port

from llamaq.runs.tracking import read_metrics

pytestmark = pytest.mark.cluster
HERE = Path(__file__).parent
SECRET = "marked-1f0e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c"  # as long as a W&B key
STAGES = ("base", "qat", "qat_lora", "qat_dpo", "control_qat", "control_lora")


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(4, {"WANDB_API_KEY": SECRET})
    yield cluster
    cluster.stop()


def settings(folder: Path, *overrides: str) -> list[str]:
    sizes = ["--config", "tiny", *SMALL, "qat_dpo.optimizer.lr=1e-4"]
    return [*sizes, "wandb.mode=offline", f"output_dir={folder}", *overrides]


def submit(cluster: Cluster, folder: Path, *more: str, recipe: str = "qat_lora_dpo") -> Job:
    job = Job(cluster, recipe, *settings(folder), *more)
    job.wait()
    return job


def test_a_submitted_chain_ends_with_the_report_of_a_run_on_one_process(cluster, tmp_path):
    ours = tmp_path / "ours"
    size = ["--num-workers", "2", "--wait-minutes", "1"]
    job = Job(cluster, "qat_lora_dpo", *settings(ours), *size, environment={"WANDB_API_KEY": SECRET})
    assert job.wait(400) == 0, job.said[-4000:]
    assert f"report: {ours}/report/report.md" in job.said
    assert "rank  host" in job.said and "qat: 100%" in job.said  # who takes part, and progress

    theirs = tmp_path / "theirs"
    command = [BIN / "tune", "run", "qat_lora_dpo", *settings(theirs)]
    subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True, capture_output=True, timeout=400)
    for stage in STAGES:
        losses = [[r["loss"] for r in read_metrics(f / stage / "metrics.jsonl")] for f in (ours, theirs)]
        # stages start from the weights of the stage before, which are not equal to the last bit
        assert losses[0] == pytest.approx(losses[1], rel=1e-3 if stage == "qat_dpo" else 1e-4), stage
    scores = [json.loads((f / "evaluate/manifest.json").read_text())["metrics"]["scores"] for f in (ours, theirs)]
    for model, values in scores[1].items():
        assert scores[0][model] == pytest.approx(values, rel=1e-3, abs=1e-4), model
    assert headings(ours) == headings(theirs)

    # one W&B run a stage, of rank 0
    runs = [p.name.split("-", 3)[-1] for p in (ours / "wandb").glob("offline-run-*")]
    assert len(runs) == len(set(runs)) >= len(STAGES)

    # the key was in the nodes' environment and in the submitter's; it is nowhere in what was written
    assert SECRET not in job.said
    listed = subprocess.check_output(
        [BIN / "ray", "job", "list", "--address", cluster.address], env=cluster.client(), text=True
    )
    assert "llamaq-qat_lora_dpo" in listed and SECRET not in listed
    written = [p for top in (ours, cluster.folder) for p in top.rglob("*") if p.is_file() and p.stat().st_size < 2**26]
    assert len(written) > 100
    telling = [str(p) for p in written if SECRET.encode() in p.read_bytes()]
    assert not telling


def headings(folder: Path) -> list[str]:
    lines = (folder / "report/report.md").read_text().splitlines()[1:]
    return [line for line in lines if line.startswith(("#", "| model |"))]


def test_no_cluster_at_the_address(tmp_path):
    address = f"http://127.0.0.1:{free_port()}"
    command = [BIN / "tune", "submit", "qat", *settings(tmp_path / "a"), "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"no Ray cluster answers at {address}" in done.stderr and "Traceback" not in done.stderr


def test_a_cluster_without_the_gpus_asked_for_says_what_is_there_and_what_was_asked(cluster, tmp_path):
    job = submit(cluster, tmp_path / "a", "device=auto", "--num-workers", "2", "--wait-minutes", "0.05")
    assert job.process.returncode == 1
    assert "asked for 2 workers with 1 CPU and 1 GPU each, the cluster has 4 CPU (4 free), 0 GPU (0 free)" in job.said
    assert "there is no GPU: add GPU nodes, or train on CPUs with device=cpu" in job.said


def test_a_busy_cluster_is_waited_for_and_named(cluster, tmp_path):
    job = submit(cluster, tmp_path / "a", "--num-workers", "2", "--cpus-per-worker", "3", "--wait-minutes", "0.05")
    assert job.process.returncode == 1
    assert "waited 0.05 minutes for places: asked for 2 workers with 3 CPU each, the cluster has 4 CPU" in job.said


def test_wrong_data_fails_once_with_its_own_message(cluster, tmp_path):
    missing = f"qat_dpo.dataset.data_files={tmp_path}/nowhere.jsonl"
    job = submit(cluster, tmp_path / "a", missing, "--num-workers", "2", recipe="qat")
    assert job.process.returncode == 1
    assert "error: " in job.said and "nowhere.jsonl" in job.said and "starting again" not in job.said


def test_a_bug_in_a_recipe_of_ones_own_is_not_retried(cluster, tmp_path):
    job = submit(cluster, tmp_path / "a", "--working-dir", str(HERE), recipe="broken")
    assert job.process.returncode == 1
    assert "KeyError" in job.said and "a bug of rank 0's" in job.said and "starting again" not in job.said


def test_detach_returns_at_once_and_rays_own_commands_find_the_job(cluster, tmp_path):
    job = submit(cluster, tmp_path / "a", "--detach", "--submission-id", "mine", recipe="qat")
    assert job.process.returncode == 0 and "submitted mine" in job.said
    command = [BIN / "ray", "job", "stop", "mine", "--address", cluster.address]
    assert "stopped" in subprocess.run(command, env=cluster.client(), capture_output=True, text=True).stdout.lower()


def test_every_socket_of_a_one_node_cluster_is_on_loopback(cluster):
    import psutil

    root = psutil.Process(cluster.nodes["127.0.0.1"].pid)
    listening = {
        c.laddr.ip.removeprefix("::ffff:")
        for p in [root, *root.children(recursive=True)]
        for c in p.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_token_authentication(tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    cluster = Cluster(2, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})
    try:
        without = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
        arguments = ["broken", *settings(tmp_path / "a"), "--working-dir", str(HERE)]
        refused = Job(cluster, *arguments, environment=without | {"HOME": str(tmp_path)})
        assert refused.wait() == 1 and "wants a token: --token-file FILE" in refused.said
        let_in = Job(cluster, *arguments, "--token-file", str(token), environment={"RAY_AUTH_MODE": "disabled"})
        assert let_in.wait() == 1 and "a bug of rank 0's" in let_in.said
        assert token.read_text() not in let_in.said
    finally:
        cluster.stop()
