"""Compare the ranks before a run on more than one: their GPUs, packages, code, and the output folder they see.

A run on nodes that differ does not fail; it trains something else. Another version of a package may quantize
differently, and a folder that is not shared splits the checkpoints. So any difference stops the run with a table of all
ranks.
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
from llamaq.runs.manifest import package_versions
from llamaq.runs.ranks import everywhere, rank, say

# NFS caches a folder's attributes, so a file that another node has just written may stay invisible for some seconds
ATTRIBUTE_CACHE_SECONDS = 10
SAME = ("gpu", "driver", "packages", "code", "output_dir")  # columns in which all ranks have to agree
HINTS = {"code": "send the same code to every node", "gpu": "use one kind of GPU"}


def check_workers(config: Config, run_id: str) -> None:
    """Compare all ranks and print them as a table. Without a process group there is nothing to compare.

    Args:
        config: the run's settings.
        run_id: the id that rank 0 found in `output_dir/run.json`; every rank has to find the same one.

    Raises:
        UserError: the ranks differ; the message contains the table.
    """
    if not dist.is_initialized():
        return
    workers = everywhere(lambda: describe_worker(config, run_id))
    table = as_table(workers)
    if problem := difference(workers):
        raise UserError(f"the workers are not alike: {problem}\n{table}")
    say(table)


def describe_worker(c: Config, run_id: str) -> dict[str, Any]:
    """Describe this rank: its row of the table."""
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


def difference(workers: list[dict[str, Any]]) -> str | None:
    """Return the first difference between ranks, as a sentence for the user; None if they are alike."""
    for w in workers:
        if w["output_dir"] != "seen":
            return (
                f"rank {w['rank']} on {w['host']} does not see the output_dir that rank 0 writes to; mount one shared "
                "file system at the same path on every node and put output_dir on it"
            )
    first = workers[0]
    for key in SAME:
        for w in workers:
            if w[key] != first[key]:
                return _package_difference(first, w) if key == "packages" else _other_difference(key, first, w)
    return None


def _package_difference(first: dict[str, Any], other: dict[str, Any]) -> str:
    here, there = first["packages"], other["packages"]
    name = next(n for n in sorted({*here, *there}) if here.get(n) != there.get(n))
    return (
        f"{name} is {here.get(name, 'none')} on rank 0 and {there.get(name, 'none')} on rank {other['rank']}; "
        "install the same on every node"
    )


def _other_difference(key: str, first: dict[str, Any], other: dict[str, Any]) -> str:
    hint = HINTS.get(key, "make them alike")
    return f"{key} is {first[key]} on rank 0 and {other[key]} on rank {other['rank']}; {hint}"


def as_table(workers: list[dict[str, Any]]) -> str:
    """Return the workers as a table, one line per rank."""
    columns = ["rank", "host", "gpu", "driver", "torch", "deepspeed", "code", "output_dir", "free GiB"]
    lines = [columns]
    for w in workers:
        versions = [w["packages"].get(name, "none") for name in ("torch", "deepspeed")]
        row = [w["rank"], w["host"], w["gpu"], w["driver"], *versions, w["code"][:8], w["output_dir"], w["free_gib"]]
        lines.append([str(cell) for cell in row])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def code_hash() -> str:
    """Return a SHA-256 of llamaq's own source files: their names and contents."""
    package, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    inside = [p for p in package.rglob("*.py") if p.relative_to(package).parts[0] not in ("recipes", "cluster")]
    for path in [*sorted(inside), *sorted(recipes_dir().rglob("*.py")), *sorted(cluster_dir().rglob("*.py"))]:
        digest.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _sees(folder: Path, run_id: str) -> str:
    """Return "seen" if this run's `run.json` appears in the folder, "NOT SEEN" if it does not within the wait."""
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
