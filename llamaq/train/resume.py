"""Checkpoints inside a training stage: `checkpoints/step_000100/`, a tensor file of every rank and their hashes.

A checkpoint is a set of *pieces*: ranges of parameters, and of what the optimizer keeps for them, under the
parameter's name. Every rank writes the pieces it holds, and whoever continues reads the ranges it needs, so a run
goes on with another number of ranks, another ZeRO stage or another engine. DeepSpeed's own universal checkpoint does
this by converting pickles in a second pass, between ZeRO engines only; here nothing is converted.

Written beside and renamed, so a folder that exists was written whole; SHA-256 tells if it still is. The newest whole
one is taken; a damaged one is named and the one before it used.
"""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llamaq.checkpoints.tensors import save_tensors
from llamaq.errors import UserError
from llamaq.runs.files import naming_full_disk, sha256_file, write_json
from llamaq.runs.ranks import everywhere, from_rank_zero, rank, say, world_size

Pieces = dict[tuple[str, int], Tensor]  # (key, first element) → a flat range; keys are e.g. "exp_avg:norm.scale"


def save(folder: Path, step: int, pieces: Pieces, scalars: dict[str, Any], keep: int) -> None:
    """Write the checkpoint of a step and drop all but the newest `keep`. Every rank calls it.

    Args:
        folder: `<stage>.partial/checkpoints`, seen by every rank.
        step: optimizer steps done.
        pieces: what this rank holds; together the ranks hold everything once.
        scalars: the rest, as JSON; rank 0's are kept.
        keep: how many checkpoints to keep.
    """
    final = folder / f"step_{step:06d}"
    partial = folder / f".{final.name}"

    def begin() -> None:
        with naming_full_disk(str(final)):
            for torn in folder.glob(".step_*"):  # of writes that were cut short
                shutil.rmtree(torn, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> tuple[str, str]:
        path = partial / f"rank_{rank():05d}.safetensors"
        save_tensors(path, {f"{key}:{start}": piece for (key, start), piece in pieces.items()})
        return path.name, sha256_file(path)

    def finish() -> None:
        with naming_full_disk(str(final)):
            write_json(partial / "state.json", {"step": step, "files": dict(files), **scalars})
            for damaged in [p for p in _steps(folder) if _step(p) >= step]:  # this run went back behind them
                shutil.rmtree(damaged, ignore_errors=True)
            partial.rename(final)
        for old in _steps(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    from_rank_zero(begin)
    files = everywhere(write)
    from_rank_zero(finish)


class Checkpoint:
    """A whole checkpoint, open for reading; tensors are read when asked for, range by range."""

    def __init__(self, path: Path):
        self.scalars: dict[str, Any] = json.loads((path / "state.json").read_text())
        self.step: int = self.scalars["step"]
        self._pieces: dict[str, list[tuple[int, Any]]] = defaultdict(list)
        for name in self.scalars["files"]:
            file = safe_open(path / name, framework="pt")
            for piece in file.keys():  # noqa: SIM118  (a safetensors file, not a dict)
                key, _, start = piece.rpartition(":")
                self._pieces[key].append((int(start), file.get_slice(piece)))

    def read(self, key: str, start: int, size: int) -> Tensor:
        """Return elements [start, start + size) of a flattened tensor.

        Raises:
            UserError: the checkpoint does not hold all of them: it is of another model or optimizer.
        """
        out, found = torch.empty(size), torch.zeros(size, dtype=torch.bool)
        for first, piece in self._pieces.get(key, []):
            length = piece.get_shape()[0]
            a, b = max(start, first), min(start + size, first + length)
            if a < b:
                out[a - start : b - start] = piece[a - first : b - first]
                found[a - start : b - start] = True
        if not found.all():
            raise UserError(
                f"the checkpoint of step {self.step} has {int(found.sum())} of {size} elements of {key}: it is of "
                "another model or optimizer; delete the stage's .partial folder to train the stage from its beginning"
            )
        return out


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None. Every rank calls it, and they share the hashing."""
    for path in reversed(from_rank_zero(lambda: _steps(folder))):
        if all(everywhere(lambda path=path: _my_files_are_whole(path))):
            return Checkpoint(path)
        say(f"checkpoint {path} is damaged (its SHA-256 does not match); going back to the one before")
    return None


def _my_files_are_whole(path: Path) -> bool:
    try:
        files = json.loads((path / "state.json").read_text())["files"]
        mine = sorted(files)[rank() :: world_size()]
        return bool(files) and all(sha256_file(path / name) == files[name] for name in mine)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
