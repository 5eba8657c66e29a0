"""Ray clusters of the tests' own: real `ray start` processes on loopback, several nodes of different addresses.

Nothing here stops a Ray it did not start: nodes are process trees, ended one by one.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.25)
    raise TimeoutError(f"waited {seconds:g} s for {what}")


class Cluster:
    """A head and further nodes. With several nodes, Ray's listeners bind to every interface (Ray allows no other)."""

    def __init__(self, head_cpus: int, environment: dict[str, str] | None = None, several_nodes: bool = False):
        # Ray's sockets lie in it, and their paths must be short
        self.folder = Path(tempfile.mkdtemp(prefix="lq", dir="/tmp"))
        self.port, self.dashboard = free_port(), free_port()
        self.address, self.nodes = f"http://127.0.0.1:{self.dashboard}", {}
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_"))},
            "PATH": f"{BIN}:{os.environ['PATH']}",  # as when the environment is activated
            "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline",
            # notice a dead node in seconds
            "RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        } | (environment or {})  # fmt: skip
        self.environment = {k: v for k, v in self.environment.items() if v}  # "" takes a setting back
        if not several_nodes:
            self.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # every socket on 127.0.0.1
        self.start("127.0.0.1", head_cpus, "--head", f"--port={self.port}", "--dashboard-host=127.0.0.1",
                   f"--dashboard-port={self.dashboard}", f"--temp-dir={self.folder}/ray")  # fmt: skip
        wait_for(self._answers, 60, f"the dashboard\n{self.log('127.0.0.1')}")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.dashboard), 1):
            return (
                subprocess.run(
                    [BIN / "ray", "job", "list", "--address", self.address], env=self.client(), capture_output=True
                ).returncode
                == 0
            )
        return False

    def client(self) -> dict[str, str]:
        """The environment of a user of this cluster."""
        return {**self.environment, "COLUMNS": "120"}

    def start(self, ip: str, cpus: int, *options: str) -> None:
        command = [BIN / "ray", "start", "--block", f"--node-ip-address={ip}", f"--num-cpus={cpus}", "--num-gpus=0",
                   f"--dashboard-agent-listen-port={free_port()}",  # two clusters at once would share the default
                   "--disable-usage-stats", "--object-store-memory=100000000", *options]  # fmt: skip
        with (self.folder / f"{ip}.log").open("w") as log:
            self.nodes[ip] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip

    def add_node(self, ip: str, cpus: int = 1) -> None:
        self.start(ip, cpus, f"--address=127.0.0.1:{self.port}")
        wait_for(lambda: ip in self.alive(), 60, f"node {ip}\n{self.log(ip)}")

    def log(self, ip: str) -> str:
        return (self.folder / f"{ip}.log").read_text()[-2000:]

    def alive(self) -> dict[str, str]:
        """Address → id of the living nodes."""
        said = subprocess.run(
            [BIN / "ray", "list", "nodes", "--address", self.address, "--format", "json"],
            env=self.client(), capture_output=True, text=True,
        )  # fmt: skip
        rows = json.loads(said.stdout) if said.returncode == 0 and said.stdout.strip().startswith("[") else []
        return {r["node_ip"]: r["node_id"] for r in rows if r["state"] == "ALIVE"}

    def kill_node(self, ip: str) -> None:
        """What a power cut does: every process of the node, at once."""
        root = psutil.Process(self.nodes.pop(ip).pid)
        for process in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def drain_node(self, ip: str, seconds: int) -> None:
        """What a cloud does before it takes a spot machine away."""
        subprocess.run(
            [BIN / "ray", "drain-node", "--address", f"127.0.0.1:{self.port}", "--node-id", self.alive()[ip],
             "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
             "--deadline-remaining-seconds", str(seconds)],
            env=self.client(), check=True, capture_output=True,
        )  # fmt: skip

    def workers(self, ip: str) -> list[psutil.Process]:
        """Ray Train's worker processes on a node."""
        found = []
        for process in psutil.Process(self.nodes[ip].pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def stop(self) -> None:
        for ip in list(self.nodes):
            self.kill_node(ip)
        shutil.rmtree(self.folder, ignore_errors=True)


class Job:
    """A `tune submit` that is followed, in a process of its own."""

    def __init__(self, cluster: Cluster, *arguments: str, environment: dict[str, str] | None = None):
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115  (read until the object goes)
        self.process = subprocess.Popen(
            [BIN / "tune", "submit", "--address", cluster.address, *arguments],
            env=cluster.client() | (environment or {}), stdout=self.file, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    @property
    def said(self) -> str:
        self.file.seek(0)
        return self.file.read()

    def wait(self, seconds: float = 300) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise TimeoutError(f"not over after {seconds:g} s:\n{self.said[-5000:]}") from None

    def expect(self, text: str, seconds: float = 120) -> None:
        """Wait until the log says something."""
        wait_for(lambda: text in self.said or self.process.poll() is not None, seconds, f"'{text}' in\n{self.said}")
        assert text in self.said, self.said[-5000:]
