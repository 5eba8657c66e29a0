"""Where numbers go: Weights & Biases, `metrics.jsonl` in the stage's folder, and one progress bar. Rank 0 only.

The file is the source of truth: one JSON object a step, the same keys as in W&B. A run nobody is logged in for is
kept offline under `output_dir/wandb` and can be sent later with `wandb sync`. W&B runs of one output folder share a
group; each stage is a run of its own with the stage as its job type. Steps are plotted against our own `step`, since
an offline run that is resumed starts a new segment at step 0.
"""

import io
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llamaq.config import Config
from llamaq.runs.run import METRICS, naming_full_disk, rank


def progress(iterable: Iterable[Any], title: str, total: int | None = None, initial: int = 0, unit: str = "it") -> tqdm:
    """The progress bar of all long work: rate and ETA, quiet on ranks other than 0, sparse in log files."""
    return tqdm(
        iterable,
        desc=title,
        total=total,
        initial=initial,
        unit=unit,
        disable=rank() != 0,
        file=sys.stderr if sys.stderr.isatty() else _Lines(),
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        dynamic_ncols=True,
    )


class _Lines(io.TextIOBase):
    """Standard error for a log: every state of the bar on a line of its own, since Ray and others forward lines."""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        return sys.stderr.write(f"{line}\n") if line else len(text)

    def flush(self) -> None:
        sys.stderr.flush()


class Tracker:
    """Metrics of one stage. Use as a context manager; `log` each step, `summary` and `image` at the end."""

    def __init__(self, config: Config, run_id: str, stage: str, folder: Path, start_step: int = 0):
        self.file, self._wandb = None, None
        if rank() != 0:
            return
        self.path = folder / METRICS
        rows = [r for r in read_metrics(self.path) if r["step"] <= start_step]
        with naming_full_disk(str(self.path)):  # what a killed run logged after its last checkpoint is logged again
            folder.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(r) + "\n" for r in rows))
            self.file = self.path.open("a")
        self._wandb = _init_wandb(config, run_id, stage)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row: `step` counts optimizer steps from 1."""
        if self.file is None:
            return
        row = {"step": step, **{k: _finite(v) for k, v in metrics.items()}}
        with naming_full_disk(str(self.path)):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self._wandb:
            self._wandb.log(row)

    def summary(self, values: dict[str, Any]) -> None:
        if self._wandb:
            self._wandb.summary.update(values)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Table(columns=list[Any](columns), data=list[Any](rows))})

    def image(self, name: str, path: Path) -> None:
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))})

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, exc_type, exc, tb) -> None:
        if self.file is not None:
            self.file.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if exc_type is None else 1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line torn by a kill is dropped."""
    return list(_rows(path)) if path.is_file() else []


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _finite(value: float) -> float | None:
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _init_wandb(config: Config, run_id: str, stage: str) -> Any:
    mode = config.wandb.mode or os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    if mode == "disabled":
        return None
    import wandb

    folder = Path(config.output_dir) / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        os.environ.setdefault(variable, str(folder.absolute() / ".cache"))
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
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _logged_in() -> bool:
    """Whether W&B would find a key: in the environment or in the user's netrc. The key itself is never read by us."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
