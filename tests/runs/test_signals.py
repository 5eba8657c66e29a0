"""SIGTERM and Ctrl-C end a run with its exit status, one line, no traceback, and a checkpoint where one is due."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from stop import LONG, Command

from llamaq.runs.manifest import CHECKPOINTS
from llamaq.runs.tracking import METRICS, read_metrics


def python(code: str, *signals_: int, lead: float = 0.0, pause: float = 0.6) -> tuple[int, str, float]:
    """Run code that prints "ready", send it signals; return status, output and the seconds from the first to the end.

    Args:
        code: to run.
        signals_: to send.
        lead: seconds between "ready" and the first signal.
        pause: seconds between two signals.
    """
    code = f"import os, time\nfrom llamaq.runs import signals\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(lead)
    begin = time.monotonic()
    for i, s in enumerate(signals_):
        time.sleep(pause if i else 0)
        process.send_signal(s)
    said = process.stdout.read()  # not communicate, which would miss what readline has read ahead
    process.wait(20)
    return process.returncode, said, time.monotonic() - begin


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_outside_of_steps_the_first_signal_ends_the_process_and_cleans_up(signum, status):
    code = """
with signals.handled():
    try:
        print('ready'); time.sleep(20)
    except Exception: print('caught')
    finally: print('cleaned')
"""
    got, said, _ = python(code, signum)
    assert got == status and "Traceback" not in said and "cleaned" in said and "caught" not in said
    name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
    assert f"stopped by {name}; run the same command again to resume\n" in said and said.count("\n") == 2


STEPS = "with signals.handled(), signals.deferred():\n    print('ready'); end = time.time() + {seconds}\n"


def test_in_steps_a_signal_waits_for_their_end_and_a_repeated_sigterm_changes_nothing():
    code = STEPS.format(seconds=1.5) + "    while time.time() < end: time.sleep(0.1)\n    print(signals.received())\n"
    status, said, seconds = python(code, signal.SIGTERM, signal.SIGTERM, pause=0.4)
    assert status == 143 and "15\n" in said and "Traceback" not in said and seconds > 1


def test_a_second_ctrl_c_ends_steps_at_once():
    code = STEPS.format(seconds=15) + "    while time.time() < end: time.sleep(0.1)\n"
    status, said, seconds = python(code, signal.SIGINT, signal.SIGINT)
    assert status == 130 and seconds < 4 and "Ctrl-C ends the run at once" in said and "Traceback" not in said


# C code that lets no handler run: Python's signal handlers wait for the next bytecode
STUCK = "import hashlib; print('ready'); hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)\n"


def test_a_process_that_is_stuck_in_c_code_ends_too():
    status, _, seconds = python(f"signals.GRACE_SECONDS = 1\nwith signals.handled(): {STUCK}", signal.SIGTERM, lead=0.5)
    assert status == 143 and 0.9 < seconds < 4
    status, _, seconds = python(
        f"with signals.handled(), signals.deferred(): {STUCK}", signal.SIGINT, signal.SIGINT, lead=0.5
    )
    assert status == 130 and seconds < 3


def test_a_signal_to_a_forked_process_is_not_the_parents():
    code = """
import multiprocessing, signal
def child(): time.sleep(20)
with signals.handled():
    process = multiprocessing.get_context('fork').Process(target=child); process.start()
    time.sleep(0.3); process.terminate(); process.join()
    print('ready'); print(process.exitcode, signals.received()); time.sleep(1)
"""
    status, said, _ = python(code)
    assert status == 0 and said == "-15 None\n"


def test_handlers_are_given_back():
    code = "before = __import__('signal').getsignal(2)\nwith signals.handled(): pass\n"
    code += "print('ready'); print(before == __import__('signal').getsignal(2), signals._State.handling)"
    assert python(code)[1] == "True False\n"


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "qat" / METRICS)]


SHORT = ["qat.max_steps=14", "qat.epochs=100", "qat.checkpoint_every_n_steps=1000"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_losses(tmp_path):
    whole = Command(tmp_path / "whole", *SHORT)
    assert whole.end(120) == 0, whole.text()
    status = {signal.SIGTERM: 143, signal.SIGINT: 130}
    for signum, expected in status.items():
        stopped = Command(tmp_path / f"stopped{signum}", *SHORT)
        stopped.in_training()
        stopped.process.send_signal(signum)
        assert stopped.end() == expected, stopped.text()
        said = stopped.text()
        assert "Traceback" not in said and "run the same command again to go on from there" in said
        rows = read_metrics(stopped.folder / "qat.partial" / METRICS)
        kept = [p.name for p in (stopped.folder / "qat.partial" / CHECKPOINTS).iterdir()]
        assert kept == [f"step_{len(rows):06d}"] and len(rows) < 14
        again = Command(stopped.folder, *SHORT)
        assert again.end(120) == 0 and f"qat: resuming after step {len(rows)}" in again.text()
        assert len(losses(again.folder)) == 14 and losses(again.folder) == losses(whole.folder)


@pytest.mark.slow
def test_a_signal_before_training_ends_the_command_soon(tmp_path):
    command = Command(tmp_path / "run", *LONG)
    command.when(lambda: (command.folder / "run.json").is_file())
    command.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert command.end() == 143 and time.monotonic() - begin < 15
    assert "Traceback" not in command.text() and command.text().count("run the same command again") == 1


@pytest.mark.cluster
@pytest.mark.parametrize("who", ["torchrun", "one rank"])
def test_ranks_stop_together(tmp_path, who):
    two = ("--nproc_per_node", "2")
    whole = Command(tmp_path / "whole", *SHORT, torchrun=two)
    assert whole.end(120) == 0, whole.text()
    command = Command(tmp_path / "run", *SHORT, torchrun=two)
    command.in_training()
    pid = command.process.pid
    if who == "one rank":
        ranks = [p for p in psutil.Process(pid).children() if "llamaq.launch" in p.cmdline()]
        pid = next(p.pid for p in ranks if p.environ()["RANK"] == "1")
    os.kill(pid, signal.SIGTERM)
    assert command.end() == 143, command.text()
    assert "Traceback" not in command.text() and "qat: stopped by SIGTERM after step" in command.text()
    rows = read_metrics(command.folder / "qat.partial" / METRICS)
    files = list((command.folder / "qat.partial" / CHECKPOINTS / f"step_{len(rows):06d}").glob("rank_*"))
    assert len(files) == 2
    again = Command(command.folder, *SHORT, torchrun=two)
    assert again.end(120) == 0, again.text()
    assert losses(again.folder) == losses(whole.folder)
