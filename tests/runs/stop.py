"""Start real `tune run` commands, and send them signals when they have come far enough."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import SMALL

from llamaq.runs.tracking import METRICS, read_metrics

TUNE = Path(sys.executable).parent / "tune"
# more steps than a test waits for, and no checkpoint before the last one but for a signal's
LONG = ["qat.max_steps=300", "qat.epochs=100", "qat.checkpoint_every_n_steps=1000"]


class Command:
    """A `tune run` in a session of its own, with what it says in a file, so that no pipe keeps it."""

    def __init__(self, folder: Path, *overrides: str, recipe: str = "qat", torchrun: tuple[str, ...] = ()):
        self.folder, self.said = folder, folder.with_suffix(f".{time.monotonic_ns()}")
        settings = [*SMALL, f"output_dir={folder}", *overrides]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with self.said.open("w") as file:
            self.process = subprocess.Popen(
                [TUNE, "run", *torchrun, recipe, "--config", "tiny", *settings],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def when(self, reached) -> None:
        """Wait until `reached()` is true."""
        deadline = time.monotonic() + 120
        while not reached():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def in_training(self, stage: str = "qat", steps: int = 3) -> None:
        self.when(lambda: len(read_metrics(self.folder / f"{stage}.partial" / METRICS)) >= steps)

    def end(self, seconds: float = 60) -> int:
        """Wait for the exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(self.text()) from None

    def text(self) -> str:
        return self.said.read_text()
