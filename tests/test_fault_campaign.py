"""The script of the fault campaign works: three kills of a small run, which then ends with the same weights."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "faults.py"


@pytest.mark.long
def test_a_run_that_is_killed_three_times_ends_with_the_same_weights(tmp_path):
    asked = ["--kills", "3", "--lives", "qat", "--kinds", "SIGKILL", "SIGTERM", "--seed", "2"]
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path / "faults"), *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "3 faults, 0 runs lost, 0 with other codes" in done.stdout and done.stdout.startswith("| fault | times |")
