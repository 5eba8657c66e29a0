"""Start Ray clusters for the tests: real `ray start` processes on loopback, with an address for each node.

A node is a process tree, and only trees that were started here are ended, so other Ray clusters on the machine go on.
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
ENVIRONMENT = {
    "PATH": f"{BIN}:{os.environ['PATH']}",  # as in an activated environment
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    # notice a dead node in seconds
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until the condition returns something true, and return that.

    Raises:
        TimeoutError: it did not within these seconds.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.25)
    raise TimeoutError(f"waited {seconds:g} s for {what}")


class Cluster:
    """A head node and further nodes.

    A cluster of one node listens on 127.0.0.1 only. With several nodes, Ray's listeners bind to every interface; Ray
    has no setting for it.
    """

    def __init__(self, head_cpus: int, environment: dict[str, str] | None = None, several_nodes: bool = False):
        # Ray's sockets are in this folder; the path of a Unix socket has 107 characters at most
        self.folder = Path(tempfile.mkdtemp(prefix="lq", dir="/tmp"))
        self.port, self.dashboard = free_port(), free_port()
        self.address, self.nodes = f"http://127.0.0.1:{self.dashboard}", {}
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_"))}
        settings = outside | ENVIRONMENT | (environment or {})
        self.environment = {k: v for k, v in settings.items() if v}  # "" removes a setting
        if not several_nodes:
            self.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # every socket on 127.0.0.1
        dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}"]
        temp_dir = f"--temp-dir={self.folder}/ray"
        self.start("127.0.0.1", head_cpus, "--head", f"--port={self.port}", *dashboard, temp_dir)
        wait_for(self._answers, 60, f"the dashboard\n{self.log('127.0.0.1')}")

    def _answers(self) -> bool:
        command = [BIN / "ray", "job", "list", "--address", self.address]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.dashboard), 1):
            return subprocess.run(command, env=self.client(), capture_output=True).returncode == 0
        return False

    def client(self) -> dict[str, str]:
        """Return the environment of a user of this cluster."""
        return {**self.environment, "COLUMNS": "120"}

    def start(self, ip: str, cpus: int, *options: str) -> None:
        """Start a node; it may take some seconds until it has joined."""
        agent = f"--dashboard-agent-listen-port={free_port()}"  # two clusters at once would share the default
        size = [f"--num-cpus={cpus}", "--num-gpus=0", "--object-store-memory=100000000"]
        command = [BIN / "ray", "start", "--block", f"--node-ip-address={ip}", agent, *size, "--disable-usage-stats"]
        with (self.folder / f"{ip}.log").open("w") as log:
            self.nodes[ip] = subprocess.Popen(
                [*command, *options],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )

    def add_node(self, ip: str, cpus: int = 1) -> None:
        """Start a node and wait until it has joined."""
        self.start(ip, cpus, f"--address=127.0.0.1:{self.port}")
        wait_for(lambda: ip in self.alive(), 60, f"node {ip}\n{self.log(ip)}")

    def log(self, ip: str) -> str:
        """Return the end of what a node's `ray start` printed."""
        return (self.folder / f"{ip}.log").read_text()[-2000:]

    def alive(self) -> dict[str, str]:
        """Return the ids of the living nodes by address."""
        command = [BIN / "ray", "list", "nodes", "--address", self.address, "--format", "json"]
        said = subprocess.run(command, env=self.client(), capture_output=True, text=True)
        rows = json.loads(said.stdout) if said.returncode == 0 and said.stdout.strip().startswith("[") else []
        return {r["node_ip"]: r["node_id"] for r in rows if r["state"] == "ALIVE"}

    def kill_node(self, ip: str) -> None:
        """Kill every process of a node at once, as a power cut does."""
        root = psutil.Process(self.nodes.pop(ip).pid)
        for process in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def drain_node(self, ip: str, seconds: int) -> None:
        """Announce that a node will be taken away, as a cloud does with a spot machine."""
        command = [BIN / "ray", "drain-node", "--address", f"127.0.0.1:{self.port}", "--node-id", self.alive()[ip]]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        deadline = ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run([*command, *reason, *deadline], env=self.client(), check=True, capture_output=True)

    def workers(self, ip: str) -> list[psutil.Process]:
        """Return Ray Train's worker processes on a node."""
        found = []
        for process in psutil.Process(self.nodes[ip].pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def stop(self) -> None:
        """Kill every node and delete the cluster's folder."""
        for ip in list(self.nodes):
            self.kill_node(ip)
        shutil.rmtree(self.folder, ignore_errors=True)


class Job:
    """A `tune submit` that follows its job, in its own process."""

    def __init__(self, cluster: Cluster, *arguments: str, environment: dict[str, str] | None = None):
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as this object lives)
        command = [BIN / "tune", "submit", "--address", cluster.address, *arguments]
        environment = cluster.client() | (environment or {})
        self.process = subprocess.Popen(command, env=environment, stdout=self.file, stderr=subprocess.STDOUT, text=True)

    @property
    def said(self) -> str:
        """Return all that the command has printed so far."""
        self.file.seek(0)
        return self.file.read()

    def wait(self, seconds: float = 300) -> int:
        """Wait until the command ends, and return its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise TimeoutError(f"not over after {seconds:g} s:\n{self.said[-5000:]}") from None

    def expect(self, text: str, seconds: float = 120) -> None:
        """Wait until the text is in the log."""
        wait_for(lambda: text in self.said or self.process.poll() is not None, seconds, f"'{text}' in\n{self.said}")
        assert text in self.said, self.said[-5000:]
