"""W&B never ends or stalls a run: real servers that fail in every way, and W&B's real service."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import small
from wandb_server import KEY, closed_port, serving

from llamaq.config.schema import WandbConfig
from llamaq.errors import UserError
from llamaq.runs import wandb_run
from llamaq.runs.tracking import METRICS, Tracker, read_metrics


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(wandb_run._Process, "offline", False)
    monkeypatch.setattr(wandb_run._Process, "broken", False)
    monkeypatch.setattr(wandb_run, "PROBE_SECONDS", 1.0)


def track(tmp_path: Path, mode: str | None = "online", stage: str = "qat") -> list[str]:
    """Log a stage; return what W&B keeps on disk."""
    config = small(tmp_path / "run", *([f"wandb.mode={mode}"] if mode else ["~wandb.mode"]))
    with Tracker(config, "abcd1234", stage, tmp_path / stage) as tracker:
        for step in range(1, 4):
            tracker.log(step, {"loss": 1.0 / step})
        tracker.summary({"final_loss": 1.0})
    assert len(read_metrics(tmp_path / stage / METRICS)) == 3
    return [p.name for p in (tmp_path / "run" / "wandb").glob("*run-*")]


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({"status": 500}, "answers with HTTP 500"),
        ({"status": 401}, "refuses the API key (HTTP 401)"),
        ({"known": False}, "does not know the API key"),
        ({"delay": 30.0}, "does not answer"),
        ({"body": "<html>a proxy</html>"}, "does not answer as a W&B server does"),
    ],
)
def test_a_server_that_fails_gives_an_offline_run_and_one_line(tmp_path, monkeypatch, capfd, server, said):
    with serving(**server) as it:
        monkeypatch.setenv("WANDB_BASE_URL", it.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        begin = time.monotonic()
        (kept,) = track(tmp_path)
        assert len(track(tmp_path, stage="second")) == 2 and time.monotonic() - begin < 20
        assert len(it.asked) == 1  # the second stage knows
    error = capfd.readouterr().err
    assert kept.startswith("offline-run-") and kept.endswith("abcd1234-qat")
    assert error.count("\n") == 1 and f"warning: W&B: {it.url} {said}" in error and KEY not in error
    assert f"wandb sync {tmp_path}/run/wandb/offline-run-*" in error


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("closed", KEY, "cannot be reached"),
        ("nonsense", KEY, "WANDB_BASE_URL=nonsense is not an address"),
        ("http://me:secret@127.0.0.1:1", KEY, "http://127.0.0.1:1 cannot be reached"),
        ("closed", "abc", "the API key does not have the form of a W&B key"),
        ("closed", KEY + "\n", "the API key does not have the form of a W&B key"),
        ("closed", None, "nobody is logged in to http://127.0.0.1:"),
    ],
)
def test_no_server_or_no_login_gives_an_offline_run(tmp_path, monkeypatch, capfd, url, key, said):
    monkeypatch.setenv("WANDB_BASE_URL", closed_port() if url == "closed" else url)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    (kept,) = track(tmp_path)
    error = capfd.readouterr().err
    assert kept.startswith("offline-run-") and error.count("\n") == 1 and said in error
    assert "secret" not in error and (key is None or key.strip() not in error)


def test_without_a_login_and_a_mode_the_run_is_offline_without_a_warning(tmp_path, capfd):
    assert track(tmp_path, mode=None)[0].startswith("offline-run-")
    assert capfd.readouterr().err == ""


def test_a_key_in_netrc_is_that_of_the_servers_host(tmp_path, monkeypatch):
    with serving() as it:
        monkeypatch.setenv("WANDB_BASE_URL", it.url)
        (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
        assert not wandb_run.logged_in()
        host = it.url.removeprefix("http://")
        (tmp_path / "netrc").write_text(f"machine {host} login user password {KEY}\n")
        assert wandb_run.logged_in() and wandb_run.why_not_online() is None


SCRIPT = """
import sys, psutil
from conftest import small
from pathlib import Path
from llamaq.runs import wandb_run
from llamaq.runs.tracking import Tracker
folder, does = Path(sys.argv[1]), sys.argv[2]
wandb_run.INIT_SECONDS = wandb_run.FINISH_SECONDS = 4.0
for stage in ("qat", "second"):
    with Tracker(small(folder / "run", "wandb.mode=online"), "abcd1234", stage, folder / stage) as tracker:
        tracker.log(1, {"loss": 1.0})
        for service in [p for p in psutil.Process().children() if "wandb-core" in p.name()]:
            getattr(service, does, int)()
        if does == "table":
            tracker.table("t", ["a"], [[1]])
        for step in range(2, 5000):
            tracker.log(step, {"loss": 1.0})
"""


def in_a_process(tmp_path: Path, url: str, does: str = "nothing") -> str:
    """Track two stages in a process of its own, which must end well and soon; return its standard error."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": KEY,
        "PYTHONPATH": f"{here.parents[1]}:{here.parent}",
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), does]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0 and KEY not in done.stdout + done.stderr, done.stderr
    for stage in ("qat", "second"):
        assert len(read_metrics(tmp_path / stage / METRICS)) == 4999
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("breaks", "does", "said"),
    [
        ("", "nothing", []),
        ("create", "nothing", ["did not open the run", "wandb sync"]),
        ("stall", "nothing", ["did not open the run", "wandb sync"]),
        ("crash", "nothing", ["W&B stopped in stage qat", "wandb sync"]),
        ("", "kill", ["W&B stopped in stage qat", "wandb sync"]),
        ("", "suspend", ["W&B stopped in stage qat (it is not done after", "wandb sync"]),
        ("", "table", ["W&B did not take some of stage qat"]),
    ],
)
def test_what_fails_after_the_key_was_accepted_does_not_end_or_stall_the_run(tmp_path, breaks, does, said):
    with serving(breaks=breaks) as it:
        error = in_a_process(tmp_path, it.url, does)
    lines = [line for line in error.splitlines() if line.startswith("warning: ")]
    assert "Traceback" not in error
    if not said:
        assert lines == [] and any("/file_stream" in request for request in it.asked)
    else:
        assert all(text in error for text in said), error


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("project", "a/b", "wandb.project=a/b: W&B takes no"),
        ("project", "50%", "wandb.project=50%: W&B takes no"),
        ("project", "x" * 129, "129 characters; W&B takes 1 to 128"),
        ("project", "", "0 characters; W&B takes 1 to 128"),
        ("entity", "my team", "wandb.entity=my team: W&B takes"),
        ("entity", "me/llamaq", "wandb.entity=me/llamaq: W&B takes"),
    ],
)
def test_names_that_wandb_refuses_are_refused_before_the_run(field, value, said):
    with pytest.raises(UserError) as refused:
        WandbConfig(**{field: value}).check("wandb")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_names_that_wandb_takes_are_taken():
    WandbConfig(project="Llama 3.2 (QAT)_v1-x" + "y" * 100, entity="my-team_2").check("wandb")
