"""Small Hugging Face folders, written as others write them: config.json and safetensors, random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# the numbers of conftest's MODEL
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 768,
}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_scaling": None, "head_dim": 32}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_scaling": None}


def write_config(folder: Path, **changes: Any) -> Path:
    """Write a config.json; a key that is given as `...` is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {k: v for k, v in (CONFIG | changes).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def tensors_of(head: bool = False, **changes: Any) -> dict[str, Tensor]:
    """Random weights under Hugging Face's names for a config.json with these changes."""
    c = CONFIG | changes
    dim, hidden, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    width = c.get("head_dim") or dim // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * width, c["num_key_value_heads"] * width
    found = {"model.embed_tokens.weight": torch.randn(vocab, dim) * 0.02, "model.norm.weight": torch.rand(dim) + 0.5}
    shapes = {"q_proj": (q, dim), "k_proj": (kv, dim), "v_proj": (kv, dim), "o_proj": (dim, q)}
    mlp = {"gate_proj": (hidden, dim), "up_proj": (hidden, dim), "down_proj": (dim, hidden)}
    for layer in (f"model.layers.{i}" for i in range(c["num_hidden_layers"])):
        found |= {f"{layer}.self_attn.{k}.weight": torch.randn(s) * 0.1 for k, s in shapes.items()}
        found |= {f"{layer}.mlp.{k}.weight": torch.randn(s) * 0.1 for k, s in mlp.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        found |= {f"{layer}.{k}.weight": torch.rand(dim) + 0.5 for k in norms}
        if c["model_type"] == "qwen2":
            found |= {f"{layer}.self_attn.{k}.bias": torch.randn(shapes[k][0]) for k in ("q_proj", "k_proj", "v_proj")}
        if c["model_type"] == "qwen3":
            found |= {f"{layer}.self_attn.{k}_norm.weight": torch.rand(width) + 0.5 for k in "qk"}
    return found | ({"lm_head.weight": torch.randn(vocab, dim) * 0.1} if head else {})


def write_folder(folder: Path, head: bool = False, **changes: Any) -> dict[str, Tensor]:
    """Write config.json and model.safetensors; return the tensors."""
    write_config(folder, **changes)
    tensors = tensors_of(head, **{k: v for k, v in changes.items() if v is not ...})
    save_file(tensors, folder / "model.safetensors")
    return tensors
