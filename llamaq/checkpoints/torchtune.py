"""Checkpoints with torchtune's names: folders that torchtune wrote, and what llamaq's own training stages leave.

A stage's folder holds `model.safetensors` (latent float32 backbone) and `adapters.safetensors`, each if it was trained.
"""

from pathlib import Path

from llamaq.checkpoints.tensors import load_pth, load_safetensors, save_tensors
from llamaq.errors import UserError
from llamaq.model.build import StateDict
from llamaq.quant.prepare import is_adapter

BACKBONE_FILE, ADAPTERS_FILE = "model.safetensors", "adapters.safetensors"


def torchtune_files(folder: Path) -> list[Path]:
    """List the weight files of a folder that torchtune wrote."""
    return [p for pattern in ("*.pt", "*.bin", "*.safetensors") for p in sorted(folder.glob(pattern))]


def read_torchtune(folder: Path) -> StateDict:
    """Read a folder that torchtune wrote; names are right already.

    Raises:
        UserError: nothing to read, or a torn file.
    """
    files = torchtune_files(folder)
    if not files:
        raise UserError(
            f"checkpoint_dir={folder} has no checkpoint: expected consolidated.00.pth (Meta), config.json with "
            "*.safetensors (Hugging Face), or a .pt/.bin/.safetensors file (torchtune)"
        )
    tensors: StateDict = {}
    for path in files:
        tensors |= load_safetensors(path) if path.suffix == ".safetensors" else load_pth(path)
    return tensors


def weights_of(*folders: Path) -> StateDict:
    """Read the backbone and adapters that a chain of stage folders left; later folders win."""
    files = [folder / name for folder in folders for name in (BACKBONE_FILE, ADAPTERS_FILE)]
    weights: StateDict = {}
    for path in files:
        if path.is_file():
            weights |= load_safetensors(path)
    return weights


def save_weights(folder: Path, weights: StateDict) -> None:
    """Write what a stage trained: backbone and adapters, each if it was. Ranks without weights write nothing."""
    for name, adapters in ((BACKBONE_FILE, False), (ADAPTERS_FILE, True)):
        part = {k: v for k, v in weights.items() if is_adapter(k) is adapters}
        if part:
            save_tensors(folder / name, part)
