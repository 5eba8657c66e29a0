"""Keep the W&B run of a stage, and never let W&B end or stall the training.

Before the W&B service starts, a request of a few seconds at most asks whether the server can be reached and takes the
key. If not, one line says why and how to send the run later, and the runs of this process are kept offline.

Every call of W&B runs on a thread of its own, in order. Its errors become one warning, and nobody waits for it longer
than the limits below. What W&B misses is in `metrics.jsonl` all the same.
"""

import configparser
import netrc
import os
import queue
import re
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from llamaq.config import Config

PROBE_SECONDS = 5.0
INIT_SECONDS = 30.0  # for W&B to open the run on the server; training goes on after START_SECONDS
START_SECONDS = 10.0
FINISH_SECONDS = 30.0  # to send what is left at the end of a stage
FAILED_FINISH_SECONDS = 5.0  # the same after an error or a signal, when the process is about to be killed
MAX_WAITING = 100_000  # calls that W&B may be behind


class _Process:
    """What this process has learned about W&B."""

    offline: bool = False  # the server was asked, and runs are kept offline
    broken: bool = False  # the W&B service hangs or is gone


class WandbRun:
    """The W&B run of one stage. Its methods return at once and raise nothing."""

    def __init__(self, config: Config, run_id: str, stage: str, mode: str):
        self._folder = Path(config.output_dir) / "wandb"
        self._stage, self._failed = stage, False
        self._run: Any = None
        self._jobs: queue.Queue[Callable[[], Any] | None] = queue.Queue(MAX_WAITING)
        self._started, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, args=(config, run_id, mode), name="wandb", daemon=True)
        self._thread.start()
        self._started.wait(START_SECONDS)

    def log(self, row: dict[str, Any]) -> None:
        """Log one row of numbers."""
        self._put(lambda: self._run.log(row))

    def summary(self, values: dict[str, Any]) -> None:
        """Set values of the run's summary."""
        self._put(lambda: self._run.summary.update(values))

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Log a table."""

        def job() -> None:
            import wandb

            self._run.log({name: wandb.Table(columns=list[Any](columns), data=list[Any](rows))})

        self._put(job)

    def image(self, name: str, path: Path) -> None:
        """Log an image file."""

        def job() -> None:
            import wandb

            self._run.log({name: wandb.Image(str(path))})

        self._put(job)

    def finish(self, failed: bool) -> None:
        """Close the run and wait, for a limited time, until W&B has everything."""

        def job() -> None:
            try:
                self._run.finish(exit_code=int(failed))
            except BaseException as e:
                self._give_up(_text(e))

        self._put(job)
        self._put(None)
        seconds = FAILED_FINISH_SECONDS if failed else FINISH_SECONDS + FAILED_FINISH_SECONDS
        if not self._done.wait(seconds):
            self._give_up(f"it is not done after {seconds:.0f} s")

    def _put(self, job: Callable[[], Any] | None) -> None:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._give_up("it does not take what it is given")

    def _work(self, config: Config, run_id: str, mode: str) -> None:
        """Open the run, then do the jobs in order; once W&B is given up, take them and do nothing."""
        self._open(config, run_id, mode)
        self._started.set()
        while (job := self._jobs.get()) is not None:
            if self._run is not None and not _Process.broken:
                try:
                    job()
                except BaseException as e:  # W&B raises Exit, which is no Exception
                    self._missed(_text(e))
        self._done.set()

    def _open(self, config: Config, run_id: str, mode: str) -> None:
        try:
            if mode == "online":
                self._run = self._open_online(config, run_id)
            if self._run is None:
                self._run = _init(config, run_id, self._stage, "offline")
        except BaseException as e:
            self._give_up(_text(e))

    def _open_online(self, config: Config, run_id: str) -> Any:
        """Return the run, or None if the server does not let it begin."""
        try:
            return _init(config, run_id, self._stage, "online")
        except BaseException as e:
            _go_offline(f"{_without_password(base_url())} did not open the run ({_text(e)})", self._folder)
        import wandb

        wandb.teardown()  # the service still holds the run's id
        return None

    def _missed(self, what: str) -> None:
        """Warn, once a stage, that W&B did not take something."""
        if not (self._failed or _Process.broken):
            self._failed = True
            _warn(f"W&B did not take some of stage {self._stage} ({what}); the numbers are in metrics.jsonl")

    def _give_up(self, what: str) -> None:
        """Do without W&B for the rest of this process, with one line that says why."""
        if _Process.broken:
            return
        _Process.broken = True
        where = self._run.settings.sync_dir if self._run is not None else f"{self._folder}/offline-run-*"
        _warn(
            f"W&B stopped in stage {self._stage} ({what}); the run goes on without it, and the numbers are in "
            f"metrics.jsonl; send what W&B has with: wandb sync {where}"
        )
        _end_service()


def open_wandb(config: Config, run_id: str, stage: str) -> WandbRun | None:
    """Return the W&B run of a stage: online if the server answers and takes the key, else offline.

    Args:
        config: the run's settings.
        run_id: eight hex digits that name the run in W&B.
        stage: becomes the W&B job type.

    Returns:
        The run, or None if W&B is disabled or has failed in this process.
    """
    mode = config.wandb.mode or os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    if mode == "disabled" or _Process.broken:
        return None
    if mode in ("offline", "dryrun") or _Process.offline:
        return WandbRun(config, run_id, stage, "offline")
    if problem := _within(PROBE_SECONDS, why_not_online):
        _go_offline(problem, Path(config.output_dir) / "wandb")
    return WandbRun(config, run_id, stage, "offline" if problem else "online")


def why_not_online() -> str | None:
    """Ask the server who the key belongs to; return what stands in the way of an online run, or None."""
    import requests

    url, key = base_url(), api_key()
    host = _without_password(url)
    if not logged_in():
        return f"nobody is logged in to {host}: run `wandb login` or set WANDB_API_KEY"
    if key and not re.fullmatch(r"[\w.-]{40,}", key, re.ASCII):
        return "the API key does not have the form of a W&B key (40 letters and digits or more): run `wandb login`"
    try:
        query = {"query": "query Viewer { viewer { id } }"}
        auth = ("api", key) if key else None
        reply = requests.post(f"{url}/graphql", json=query, auth=auth, timeout=PROBE_SECONDS)
        if reply.status_code in (401, 403):
            return f"{host} refuses the API key (HTTP {reply.status_code}): run `wandb login --relogin`"
        if not reply.ok:
            return f"{host} answers with HTTP {reply.status_code}"
        viewer = reply.json()["data"]["viewer"]
    except requests.exceptions.Timeout:
        return f"{host} does not answer"
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema):
        os.environ.pop("WANDB_BASE_URL", None)  # W&B would refuse an offline run because of it
        return f"WANDB_BASE_URL={host} is not an address such as https://api.wandb.ai"
    except requests.exceptions.SSLError:
        return f"{host} has no certificate that this machine trusts"
    except (KeyError, TypeError, ValueError):
        return f"{host} does not answer as a W&B server does"
    except requests.exceptions.RequestException:
        return f"{host} cannot be reached"
    if viewer is None and key:
        return f"{host} does not know the API key: run `wandb login --relogin`"
    return None


def logged_in() -> bool:
    """Tell whether W&B would find credentials for its server."""
    return bool(api_key() or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))


def api_key() -> str | None:
    """Return the key that W&B would use, from the environment or from `~/.netrc`. It must not be printed."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    file = os.environ.get("NETRC")
    try:
        found = netrc.netrc(os.path.expanduser(file) if file else None).authenticators(urlsplit(base_url()).netloc)
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None


def base_url() -> str:
    """Return the server's address: `WANDB_BASE_URL`, what `wandb login --host` wrote, or W&B's own."""
    return (os.environ.get("WANDB_BASE_URL") or _configured_url() or _default_url()).rstrip("/")


def _configured_url() -> str | None:
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(configparser.Error, OSError):
        settings.read(Path(folder).expanduser() / "settings")
    return settings.get("default", "base_url", fallback=None)


def _default_url() -> str:
    import wandb

    return wandb.Settings().base_url


def _within(seconds: float, ask: Callable[[], str | None]) -> str | None:
    """Return what `ask` returns, or a line that says it took too long: not every wait has a timeout of its own."""
    answer: list[str | None] = []

    def work() -> None:
        try:
            answer.append(ask())
        except Exception as e:
            answer.append(_text(e))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else f"{_without_password(base_url())} does not answer"


def _init(config: Config, run_id: str, stage: str, mode: str) -> Any:
    import wandb

    folder = Path(config.output_dir) / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_SILENT", "true")  # what W&B says before it reads its settings
    # W&B would keep these in the user's home, which the nodes of a cluster need not share
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(variable, str(folder.absolute() / ".cache"))
    limits = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
    run = wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        dir=str(folder.parent),
        mode=mode,  # pyright: ignore[reportArgumentType]
        group=f"{folder.parent.name}-{run_id}",
        job_type=stage,
        name=f"{folder.parent.name}/{stage}",
        id=f"{run_id}-{stage}",
        resume="allow",
        config=asdict(config),
        settings=wandb.Settings(silent=True, console="off", **limits),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _end_service() -> None:
    """End W&B's service, and keep W&B's exit handler from waiting for it or printing that it is gone."""
    from wandb.sdk import wandb_setup

    with suppress(Exception):  # W&B has no public way, and another version may have none at all
        connection: Any = wandb_setup.singleton()._connection
        connection._cleanup()
        connection._proc._process.kill()
    shown = threading.excepthook
    threading.excepthook = lambda e: None if _is_wandbs(e.exc_traceback) else shown(e)


def _is_wandbs(trace: TracebackType | None) -> bool:
    """Tell whether an error comes from W&B's code: its threads notice that the service is gone."""
    return any("/wandb/" in frame.filename for frame in traceback.extract_tb(trace))


def _go_offline(why: str, folder: Path) -> None:
    _Process.offline = True
    _warn(f"W&B: {why}; the run is kept offline; send it later with: wandb sync {folder}/offline-run-*")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _text(e: BaseException) -> str:
    """Return an exception as part of a line, without the API key."""
    said = " ".join(str(e).split()) or "no message"
    if key := api_key():
        said = said.replace(key, "***")
    return f"{type(e).__name__}: {said[:200]}"


def _without_password(url: str) -> str:
    """Return an address without the user and password that it may hold."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
