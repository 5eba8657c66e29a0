"""The checkpoint a run starts from: Hugging Face, Meta or torchtune layout → torchtune names, float32.

The files in the folder tell the layout:
    config.json and *.safetensors          Hugging Face (llamaq.checkpoints.hugging_face)
    consolidated.00.pth                    Meta (llamaq.checkpoints.meta)
    *.pt, *.bin or *.safetensors alone     torchtune (llamaq.checkpoints.torchtune)

Where the model ties its head to the embedding, a separate head is accepted only if it equals the embedding.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llamaq.checkpoints.hugging_face import read_hugging_face
from llamaq.checkpoints.meta import WEIGHTS, read_meta
from llamaq.checkpoints.torchtune import read_torchtune, torchtune_files
from llamaq.config import Config
from llamaq.errors import UserError
from llamaq.model.build import StateDict, meta_decoder
from llamaq.runs.files import LARGE
from llamaq.runs.manifest import MANIFEST
from llamaq.runs.tracking import progress


def start_weights(c: Config) -> StateDict:
    """Read the BF16 model that a run starts from, as float32 weights with torchtune names."""
    return load_checkpoint(c.checkpoint_dir, meta_decoder(c.model))


def start_inputs(c: Config) -> list[Path]:
    """List what a run starts from, as inputs of a stage: the base stage's folder, or the checkpoint's files."""
    folder = Path(c.checkpoint_dir)
    stage = folder.parent
    return [stage] if (stage / MANIFEST).is_file() else checkpoint_files(folder)


def load_checkpoint(folder: str | Path, decoder: nn.Module) -> StateDict:
    """Read a checkpoint folder into weights for `decoder` (a torchtune Llama): float32, keys as the decoder's.

    Raises:
        UserError: folder or file missing or torn, an unknown layout, keys missing or left over, a wrong shape, or a
            head that differs from the embedding where the model ties them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint_dir={folder} is not a folder; give the folder that holds the checkpoint's files")
    return _checked(_read(folder, decoder.get_submodule("layers.0.attn")), decoder, folder)


def checkpoint_files(folder: str | Path) -> list[Path]:
    """List the files whose content decides what `load_checkpoint` returns; a folder may hold much else."""
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / "config.json").is_file():
        return [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return torchtune_files(folder)


def _read(folder: Path, attention: Any) -> StateDict:
    try:
        if (folder / WEIGHTS).is_file():
            return read_meta(folder)
        if (folder / "config.json").is_file():
            return read_hugging_face(folder, attention)
    except UserError:
        raise
    except Exception as e:  # torchtune raises a plain Exception for an unknown key, a RuntimeError for a wrong shape
        raise UserError(f"{folder} is not a Llama checkpoint of this model's shape: {e}") from e
    return read_torchtune(folder)


def _checked(tensors: StateDict, decoder: nn.Module, folder: Path) -> StateDict:
    expected = {k: v.shape for k, v in decoder.state_dict().items()}
    head = None if "output.weight" in expected else tensors.pop("output.weight", None)
    if head is not None and not torch.equal(head, tensors.get("tok_embeddings.weight", torch.empty(0))):
        raise UserError(
            f"{folder}: the head (lm_head / output.weight) differs from the embedding, and the model of this config "
            "ties them; choose one with model.tie_word_embeddings=false"
        )
    wrong = {k: (tuple(v.shape), tuple(expected[k])) for k, v in tensors.items() if expected.get(k, v.shape) != v.shape}
    if wrong:
        key, (got, want) = next(iter(wrong.items()))
        hint = "; the vocabulary was resized" if key.startswith("tok_embeddings") and got[1] == want[1] else ""
        raise UserError(f"{folder}: {key} has shape {got}, the model of this config {want}{hint}; choose its config")
    missing, left_over = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or left_over:
        parts = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("keys missing", missing), ("keys not of this model", left_over))
            if keys
        ]
        raise UserError(f"{folder} does not fit the model of this config: {', '.join(parts)}; choose its config")
    named = tensors.items()
    if sum(v.nbytes for v in tensors.values()) >= LARGE:  # files that are mapped are read here
        named = progress(list(named), f"reading {folder.name}", unit="tensor")
    return {k: v.float() for k, v in named}
