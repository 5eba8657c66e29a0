"""Adapters as PEFT reads and writes them: `adapter_model.safetensors` and `adapter_config.json`."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaq.checkpoints.hugging_face import hf_rows, meta_rows, reordered_heads
from llamaq.checkpoints.load import check_finite
from llamaq.checkpoints.meta import PARAMS, WEIGHTS
from llamaq.checkpoints.peft_config import (
    CONFIG,
    TENSORS,
    check_backbone,
    check_rank,
    check_tensors,
    read_peft_config,
    scale_left_over,
)
from llamaq.checkpoints.tensors import load_safetensors, save_pth, save_tensors
from llamaq.errors import UserError
from llamaq.model.names import HUGGING_FACE, LINEARS, hugging_face_name, meta_name, split
from llamaq.quant.prepare import quantized_linears


def save_peft(folder: Path, decoder: Any, rank: int, alpha: float) -> None:
    """Write a decoder's adapters as PEFT reads them, rows of q and k in Hugging Face's RoPE order."""
    tensors, heads = {}, reordered_heads(decoder)
    for name, linear in quantized_linears(decoder).items():
        assert linear.adapter is not None
        _, tail = split(name)
        key = f"base_model.model.model.{hugging_face_name(name)}"
        b = linear.adapter.b.detach().bfloat16()
        tensors[f"{key}.lora_A.weight"] = linear.adapter.a.detach().bfloat16()
        tensors[f"{key}.lora_B.weight"] = hf_rows(b, heads[tail]) if tail in heads else b
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / TENSORS, tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [n.rsplit(".", 1)[-1] for n in HUGGING_FACE.values()],
        "base_model_name_or_path": None,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def load_peft(folder: Path, params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read a PEFT folder's adapters into Meta-layout tensors, in the form of a checkpoint's own.

    A linear that the adapters do not sit on gets adapters of zeros, which compute the same.

    Args:
        folder: with `adapter_model.safetensors` and `adapter_config.json`.
        params: of the checkpoint they go into.
        tensors: its tensors, for names and shapes.

    Raises:
        UserError: something in the folder cannot be applied, or rank, names or shapes are not the checkpoint's.
    """
    config = read_peft_config(folder)
    check_rank(config, params.get("lora_args", {}).get("rank"))
    left_over = scale_left_over(config)
    check_tensors(folder)
    found, result = load_safetensors(folder / TENSORS), {}
    for name in (f"layers.{layer}.{ours}" for layer in range(params["n_layers"]) for ours in LINEARS):
        for part in "AB":
            target = f"{meta_name(name)}.adaptor.{part}.weight"
            if not config.has(name):
                result[target] = torch.zeros_like(tensors[target], dtype=torch.bfloat16)
                continue
            key = f"base_model.model.model.{hugging_face_name(name)}.lora_{part}.weight"
            t = found.pop(key, None)
            if t is None or t.shape != tensors[target].shape:
                shape = "missing" if t is None else list(t.shape)
                raise UserError(f"{folder}: {key} is {shape}, needed is {list(tensors[target].shape)}")
            check_finite(f"{folder / TENSORS}: {key}", t)
            result[target] = t.bfloat16() if part == "A" else _rows(t.bfloat16(), name, params) * left_over
    if found:
        raise UserError(
            f"{folder / TENSORS} has {len(found)} tensors that are not applied (first: {min(found)}); train the "
            "adapters on linears of the blocks only"
        )
    return result


def _rows(b: Tensor, name: str, params: dict[str, Any]) -> Tensor:
    """Return B with rows of q and k in the order of the checkpoint's RoPE."""
    heads = {"attn.q_proj": params["n_heads"], "attn.k_proj": params["n_kv_heads"]}.get(split(name)[1])
    return b if heads is None or params.get("use_hf_rope") else meta_rows(b, heads)


def with_adapters(checkpoint: Path, adapter: Path, folder: Path, trusted: bool = False) -> Path:
    """Write a checkpoint with the codes of another one and the adapters of a PEFT folder; return its folder.

    Args:
        checkpoint: with the codes.
        adapter: the PEFT folder.
        folder: to write to.
        trusted: whether adapters that do not say what they were trained on are taken.

    Raises:
        UserError: the adapters do not fit, or were trained on another backbone.
    """
    check_backbone(adapter, checkpoint, trusted)
    tensors = torch.load(checkpoint / WEIGHTS, weights_only=True)
    params = json.loads((checkpoint / PARAMS).read_text())
    tensors |= load_peft(adapter, params, tensors)
    folder.mkdir(parents=True, exist_ok=True)  # an interrupted attempt may have left it
    save_pth(folder / WEIGHTS, tensors)
    shutil.copyfile(checkpoint / PARAMS, folder / PARAMS)
    return folder
