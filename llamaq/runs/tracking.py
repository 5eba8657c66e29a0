"""Log numbers to `metrics.jsonl` and Weights & Biases, and show progress bars. Only rank 0 does either.

The file in the stage's folder is the source of truth: one JSON object per step, with the same keys as in W&B. Each
stage is a W&B run with the stage as its job type, and all stages of an output folder share a W&B group. Without a W&B
login or a server the run is kept offline in `output_dir/wandb`, and `wandb sync` sends it later. Plots use our own
`step` as their x axis, because W&B counts the steps of a resumed offline run from 0 again.
"""

import io
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from llamaq.config import Config
from llamaq.quiet import visible_stderr
from llamaq.runs.files import naming_full_disk
from llamaq.runs.ranks import rank
from llamaq.runs.wandb_run import open_wandb

METRICS = "metrics.jsonl"


def progress(
    iterable: Iterable[Any],
    title: str,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    unit_scale: float = 1,
) -> tqdm:
    """Wrap an iterable in a progress bar with rate and ETA; only rank 0 shows it.

    A terminal is redrawn twice a second at most. A log file gets a line every 15 seconds. An item may stand for
    `unit_scale` units.
    """
    stderr = visible_stderr()
    return tqdm(
        iterable,
        desc=title,
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=False if unit_scale == 1 else unit_scale,
        disable=rank() != 0,
        file=stderr if stderr.isatty() else _Lines(stderr),
        mininterval=0.5 if stderr.isatty() else 15.0,
        dynamic_ncols=True,
    )


class _Lines(io.TextIOBase):
    """Standard error with each state of the bar on its own line, since Ray forwards whole lines."""

    def __init__(self, stderr: TextIO):
        self.stderr = stderr

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        return self.stderr.write(f"{line}\n") if line else len(text)

    def flush(self) -> None:
        self.stderr.flush()


class Tracker:
    """The metrics of one stage, to be used as a context manager. On ranks other than 0 it does nothing."""

    def __init__(self, config: Config, run_id: str, stage: str, folder: Path, start_step: int = 0):
        """Open the stage's file and W&B run.

        Args:
            config: the run's settings.
            run_id: eight hex digits that name the run in W&B.
            stage: becomes the W&B job type.
            folder: the stage's folder.
            start_step: the step to resume after; later rows of a run that was killed are dropped, and logged again.
        """
        self.file, self._wandb = None, None
        if rank() != 0:
            return
        self.path = folder / METRICS
        rows = [r for r in read_metrics(self.path) if r["step"] <= start_step]
        with naming_full_disk(str(self.path)):
            folder.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(r) + "\n" for r in rows))
            self.file = self.path.open("a")
        self._wandb = open_wandb(config, run_id, stage)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log one row; `step` counts optimizer steps from 1."""
        if self.file is None:
            return
        row = {"step": step, **{k: _finite(v) for k, v in metrics.items()}}
        with naming_full_disk(str(self.path)):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self._wandb:
            self._wandb.log(row)

    def summary(self, values: dict[str, Any]) -> None:
        """Set values of the W&B run's summary."""
        if self._wandb:
            self._wandb.summary(values)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Log a table to W&B."""
        if self._wandb:
            self._wandb.table(name, columns, rows)

    def image(self, name: str, path: Path) -> None:
        """Log an image file to W&B."""
        if self._wandb:
            self._wandb.image(name, path)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, exc_type, exc, tb) -> None:
        if self.file is not None:
            self.file.close()
        if self._wandb:
            self._wandb.finish(failed=exc_type is not None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`, without a last line that a kill cut off."""
    return list(_rows(path)) if path.is_file() else []


def loss_curve(folder: Path, key: str = "loss") -> tuple[list[int], list[float]]:
    """Return the steps and values of one metric that a training stage logged."""
    rows = [r for r in read_metrics(folder / METRICS) if r.get(key) is not None]
    return [r["step"] for r in rows], [r[key] for r in rows]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _finite(value: float) -> float | None:
    """Return the value, or None for NaN and infinities, which are not JSON."""
    return value if not isinstance(value, float) or math.isfinite(value) else None
