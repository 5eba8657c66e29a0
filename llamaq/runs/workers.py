"""What the ranks tell each other before a run on more than one: who they are, what they run, and what they see.

A cluster whose nodes differ does not fail, it trains something else: another package version quantizes differently,
another folder of the same name takes the checkpoints. So differences stop the run, with a table.
"""

import contextlib
import hashlib
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llamaq.config import Config, cluster_dir, recipes_dir
from llamaq.errors import UserError
from llamaq.runs.run import Run, everywhere, from_rank_zero, package_versions, rank, say

ATTRIBUTE_CACHE_SECONDS = 10  # for so long a network file system may not show what another node has just written
SAME = ("gpu", "driver", "packages", "code", "output_dir")


def check_workers(run: Run) -> None:
    """Compare all ranks, and print them; without a process group there is nothing to compare.

    Raises:
        UserError: they differ; the message holds the table.
    """
    if not dist.is_initialized():
        return
    run_id = from_rank_zero(lambda: run.id)
    reports = everywhere(lambda: report(run.config, run_id))
    table = as_table(reports)
    if problem := difference(reports):
        raise UserError(f"the workers are not alike: {problem}\n{table}")
    say(table)


def report(c: Config, run_id: str) -> dict[str, Any]:
    """This rank's line of the table."""
    gpu, driver = "none", "none"
    if c.device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu, driver = f"{properties.name} {properties.total_memory / 2**30:.0f} GiB", _driver()
    return {
        "rank": rank(),
        "host": socket.gethostname(),
        "gpu": gpu,
        "driver": driver,
        "packages": package_versions(),
        "code": code_hash(),
        "output_dir": _sees(Path(c.output_dir), run_id),
        "free_gib": _free_gib(Path(c.output_dir)),
    }


def difference(reports: list[dict[str, Any]]) -> str | None:
    """What stops the run: the first thing that is not the same on all ranks, in words."""
    for r in reports:
        if r["output_dir"] != "seen":
            return (
                f"rank {r['rank']} on {r['host']} does not see the output_dir that rank 0 writes to; mount one shared "
                "file system at the same path on every node and put output_dir on it"
            )
    for key in SAME:
        for r in reports:
            if r[key] == reports[0][key]:
                continue
            if key == "packages":
                names = sorted({*r[key], *reports[0][key]})
                name = next(n for n in names if r[key].get(n) != reports[0][key].get(n))
                here, there = reports[0][key].get(name, "none"), r[key].get(name, "none")
                return f"{name} is {here} on rank 0 and {there} on rank {r['rank']}; install the same on every node"
            hint = {"code": "send the same code to every node", "gpu": "use one kind of GPU"}.get(
                key, "make them alike"
            )
            return f"{key} is {reports[0][key]} on rank 0 and {r[key]} on rank {r['rank']}; {hint}"
    return None


def as_table(reports: list[dict[str, Any]]) -> str:
    """One line a rank."""
    columns = ["rank", "host", "gpu", "driver", "torch", "deepspeed", "code", "output_dir", "free GiB"]
    rows = [
        [
            r["rank"], r["host"], r["gpu"], r["driver"], r["packages"].get("torch", "none"),
            r["packages"].get("deepspeed", "none"), r["code"][:8], r["output_dir"], r["free_gib"],
        ]
        for r in reports
    ]  # fmt: skip
    lines = [columns, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def code_hash() -> str:
    """SHA-256 over llamaq's own source files, by name and content."""
    package, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    inside = [p for p in package.rglob("*.py") if p.relative_to(package).parts[0] not in ("recipes", "cluster")]
    for path in [*sorted(inside), *sorted(recipes_dir().rglob("*.py")), *sorted(cluster_dir().rglob("*.py"))]:
        digest.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _sees(folder: Path, run_id: str) -> str:
    deadline = time.monotonic() + ATTRIBUTE_CACHE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if f'"{run_id}"' in (folder / "run.json").read_text():
                return "seen"
        if time.monotonic() > deadline:
            return "NOT SEEN"
        time.sleep(0.5)


def _free_gib(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**30:.1f}"
    except OSError:
        return "?"


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.check_output(command, text=True, timeout=30).splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "?"
