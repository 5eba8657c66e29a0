"""What llamaq's own training stages leave, under torchtune's names.

A stage's folder holds `model.safetensors` (latent float32 backbone) and `adapters.safetensors`, each if it was trained.
"""

from pathlib import Path

from llamaq.checkpoints.tensors import load_safetensors, save_tensors
from llamaq.model.build import StateDict
from llamaq.quant.prepare import is_adapter

BACKBONE_FILE, ADAPTERS_FILE = "model.safetensors", "adapters.safetensors"


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
