"""Hugging Face checkpoints: `config.json` and safetensors. Rows of q and k are put into Meta's RoPE order."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from torchtune.models.convert_weights import hf_to_tune

from llamaq.checkpoints.tensors import load_safetensors
from llamaq.errors import UserError
from llamaq.model.build import StateDict


def read_hugging_face(folder: Path, attention: Any) -> StateDict:
    """Read a Hugging Face folder into torchtune names.

    Args:
        folder: with `config.json` and `*.safetensors`.
        attention: torchtune's attention module of the model to load into; its sizes must be the folder's.

    Raises:
        UserError: a size that differs, or a file that is missing or torn.
    """
    _check_config(folder / "config.json", attention)
    return hf_to_tune(
        _read_weights(folder), attention.num_heads, attention.num_kv_heads, attention.embed_dim, attention.head_dim
    )


def _check_config(path: Path, attention: Any) -> None:
    hf = json.loads(path.read_text())
    expected = {
        "hidden_size": attention.embed_dim,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
    }
    for key, value in expected.items():
        if key in hf and hf[key] != value:
            raise UserError(f"{path}: {key} is {hf[key]}, but the model of this config has {value}; choose its config")


def _read_weights(folder: Path) -> StateDict:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
    if not names:
        raise UserError(f"{folder} has a config.json but no *.safetensors; download the weights too")
    tensors: StateDict = {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, though {index.name} names it")
        tensors |= load_safetensors(folder / name)
    return tensors


def hf_rows(b: Tensor, heads: int) -> Tensor:
    """Reorder rows of a q or k matrix from Meta's interleaved RoPE order to Hugging Face's halves. [heads · d, n]."""
    d = b.shape[0] // heads
    return b.view(heads, d // 2, 2, b.shape[1]).transpose(1, 2).reshape(b.shape)


def meta_rows(b: Tensor, heads: int) -> Tensor:
    """Undo `hf_rows`."""
    d = b.shape[0] // heads
    return b.view(heads, 2, d // 2, b.shape[1]).transpose(1, 2).reshape(b.shape)
