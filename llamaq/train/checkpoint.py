"""Checkpoints inside a training stage: `checkpoints/step_000100/` with one tensor file and its hash.

Written beside and renamed, so a folder that exists was written whole; its SHA-256 tells if it still is. The newest
whole one is taken; a damaged one is named and the one before it used.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamaq.pipeline import from_rank_zero, naming_full_disk, rank, say, sha256_file, world_size, write_json


def save(folder: Path, step: int, tensors: dict[str, Tensor], scalars: dict[str, Any], keep: int) -> None:
    """Write the checkpoint of a step (rank 0) and drop all but the newest `keep`."""
    if rank() == 0:
        final = folder / f"step_{step:06d}"
        partial = folder / f".{final.name}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that this run went back behind
        with naming_full_disk(str(final)):
            partial.mkdir(parents=True)
            save_tensors(partial / "state.safetensors", tensors)
            digest = sha256_file(partial / "state.safetensors")
            write_json(partial / "state.json", {"step": step, "sha256": digest, **scalars})
            partial.rename(final)
        for old in _steps(folder)[:-keep]:
            shutil.rmtree(old)
    if world_size() > 1:
        dist.barrier()


def newest(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """Step, tensors and scalars of the newest whole checkpoint; None if there is none."""
    path = from_rank_zero(lambda: _newest_whole(folder))
    if path is None:
        return None
    scalars = json.loads((path / "state.json").read_text())
    return scalars["step"], load_file(path / "state.safetensors"), scalars


def _newest_whole(folder: Path) -> Path | None:
    for path in reversed(_steps(folder)):
        try:
            expected = json.loads((path / "state.json").read_text())["sha256"]
            if sha256_file(path / "state.safetensors") == expected:
                return path
        except (OSError, ValueError, KeyError):
            pass
        say(f"checkpoint {path} is damaged (its SHA-256 does not match); going back to the one before")
    return None


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"))


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, from any device and any memory layout."""
    with naming_full_disk(str(path)):
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
        except Exception as e:  # safetensors wraps the operating system's error
            if "No space left" in str(e) or "os error 28" in str(e):
                raise OSError(28, str(e)) from e
            raise
