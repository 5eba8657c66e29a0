"""Tensor files: safetensors and torch's own, read safely and written with a full disk named as such."""

import errno
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamaq.errors import UserError
from llamaq.families.headers import nested
from llamaq.model.build import StateDict
from llamaq.runs.files import LARGE, naming_full_disk
from llamaq.runs.ticker import ticker
from llamaq.runs.tracking import progress


def load_safetensors(path: Path) -> StateDict:
    """Read a safetensors file.

    Raises:
        UserError: the file is torn.
    """
    try:
        if path.stat().st_size < LARGE:
            return load_file(path)
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in progress(list(f.keys()), f"reading {path.name}", unit="tensor")}
    except SafetensorError as e:
        raise UserError(f"{path} cannot be read ({e}); is the file whole?") from e


def load_pth(path: Path) -> StateDict:
    """Read a state dict that torch wrote, memory-mapped and without running any code of the pickle's.

    Raises:
        UserError: the file is torn, or holds something else.
    """
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({str(e).splitlines()[0]}); is the file whole?") from e
    found = nested(loaded)
    if not isinstance(found, dict) or not found:
        what = "an empty dict" if isinstance(found, dict) else f"a {type(loaded).__name__}"
        raise UserError(f"{path} holds {what} instead of a model's weights by name (a state dict)")
    other = next((k for k, v in found.items() if not isinstance(v, Tensor)), None)
    if other is not None:
        kind = type(found[other]).__name__
        raise UserError(
            f"{path} holds more than tensors ('{other}' is a {kind}); save the model's state_dict() alone, or give the "
            "folder of the model"
        )
    return found


def read_tensors(path: Path) -> StateDict:
    """Read a file of weights, by its suffix.

    Raises:
        UserError: the file is torn, or holds something else.
    """
    return load_safetensors(path) if path.suffix == ".safetensors" else load_pth(path)


def save_tensors(path: Path, tensors: StateDict) -> None:
    """Write a safetensors file, from any device and any memory layout."""
    with naming_full_disk(str(path)), ticker(f"writing {path}"):
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
        except Exception as e:  # safetensors wraps the operating system's error
            if "No space left" in str(e) or "os error 28" in str(e):
                raise OSError(errno.ENOSPC, str(e)) from e
            raise


def save_pth(path: Path, tensors: StateDict) -> None:
    """Write a state dict as torch does, the form that Meta's loaders read."""
    with naming_full_disk(str(path)), ticker(f"writing {path}"):
        try:
            torch.save({k: v.cpu() for k, v in tensors.items()}, path)
        except RuntimeError as e:  # torch's zip writer hides the operating system's error
            raise OSError(errno.ENOSPC, f"{path}: {e}") if "write" in str(e) else e from e
