"""Adapters as PEFT reads and writes them: `adapter_model.safetensors` and `adapter_config.json`."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaq.checkpoints.hugging_face import hf_rows, meta_rows
from llamaq.checkpoints.meta import PARAMS, WEIGHTS
from llamaq.checkpoints.quantized import EXECUTORCH_LORA_SCALE, backbone_hash
from llamaq.checkpoints.tensors import load_safetensors, save_pth, save_tensors
from llamaq.errors import UserError
from llamaq.model.builders import in_halves
from llamaq.model.names import HUGGING_FACE, LINEARS, hugging_face_name, meta_name, split
from llamaq.quant.prepare import quantized_linears

BACKBONE = "backbone.json"  # beside a set of adapters: the hash of what they were trained on


def save_peft(folder: Path, decoder: Any, rank: int, alpha: float) -> None:
    """Write a decoder's adapters as PEFT reads them, rows of q and k in Hugging Face's RoPE order."""
    tensors = {}
    for name, linear in quantized_linears(decoder).items():
        assert linear.adapter is not None
        layer, tail = split(name)
        key = f"base_model.model.model.{hugging_face_name(name)}"
        attn = decoder.layers[layer].attn
        b = linear.adapter.b.detach().bfloat16()
        heads = {} if in_halves(decoder) else {"attn.q_proj": attn.num_heads, "attn.k_proj": attn.num_kv_heads}
        tensors[f"{key}.lora_A.weight"] = linear.adapter.a.detach().bfloat16()
        tensors[f"{key}.lora_B.weight"] = hf_rows(b, heads[tail]) if tail in heads else b
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "adapter_model.safetensors", tensors)
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
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def load_peft(folder: Path, params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read a PEFT folder's adapters into Meta-layout tensors, in the form of a checkpoint's own.

    Args:
        folder: with `adapter_model.safetensors` and `adapter_config.json`.
        params: of the checkpoint they go into.
        tensors: its tensors, for names and shapes.

    Raises:
        UserError: rank, alpha, names or shapes are not the checkpoint's.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = params.get("lora_args", {}).get("rank")
    if config["r"] != rank:
        raise UserError(f"{folder}: rank {config['r']}, but the checkpoint's adapters have {rank}; they must be equal")
    left_over = config["lora_alpha"] / config["r"] / EXECUTORCH_LORA_SCALE
    if math.frexp(left_over)[0] != 0.5:
        raise UserError(f"{folder}: lora_alpha / r is no power of two, which bf16 weights cannot hold exactly")
    found, result = load_safetensors(folder / "adapter_model.safetensors"), {}
    for ours in LINEARS:
        halves = params.get("use_hf_rope", False)
        heads = None if halves else {"attn.q_proj": params["n_heads"], "attn.k_proj": params["n_kv_heads"]}.get(ours)
        for layer in range(params["n_layers"]):
            name = f"layers.{layer}.{ours}"
            for part in "AB":
                key = f"base_model.model.model.{hugging_face_name(name)}.lora_{part}.weight"
                target = f"{meta_name(name)}.adaptor.{part}.weight"
                if key not in found or found[key].shape != tensors[target].shape:
                    shape = list(found[key].shape) if key in found else "missing"
                    raise UserError(f"{folder}: {key} is {shape}, needed is {list(tensors[target].shape)}")
                t = found[key].bfloat16()
                if part == "B":
                    t = (t if heads is None else meta_rows(t, heads)) * left_over
                result[target] = t
    return result


def with_adapters(checkpoint: Path, adapter: Path, folder: Path) -> Path:
    """Write a checkpoint with the codes of another one and the adapters of a PEFT folder; return its folder.

    Raises:
        UserError: the adapters do not fit, or were trained on another backbone.
    """
    backbone = json.loads((adapter / BACKBONE).read_text())["sha256"] if (adapter / BACKBONE).is_file() else None
    if backbone is not None and backbone != backbone_hash(checkpoint):
        raise UserError(f"{adapter} was trained on another quantized backbone than {checkpoint}: it would not fit")
    tensors = torch.load(checkpoint / WEIGHTS, weights_only=True)
    params = json.loads((checkpoint / PARAMS).read_text())
    tensors |= load_peft(adapter, params, tensors)
    folder.mkdir(parents=True, exist_ok=True)  # an interrupted attempt may have left it
    save_pth(folder / WEIGHTS, tensors)
    shutil.copyfile(checkpoint / PARAMS, folder / PARAMS)
    return folder
