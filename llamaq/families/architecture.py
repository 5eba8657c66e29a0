"""The numbers that make a decoder of a supported family, whichever file or model they are read from."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

Scaling = dict[str, Any]  # of RoPE: rope_type and its numbers
DEFAULT: Scaling = {"rope_type": "default"}

# field → (key of Hugging Face's config.json, key of Meta's params.json), where they are spelled otherwise
SPELLINGS = {
    "family": ("model_type", "the family"),
    "num_layers": ("num_hidden_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_heads"),
    "num_kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "embed_dim": ("hidden_size", "dim"),
    "intermediate_dim": ("intermediate_size", "the feed-forward width"),
    "max_seq_len": ("max_position_embeddings", "max_seq_len"),
    "rope_base": ("rope_theta", "rope_theta"),
    "rope_scaling": ("RoPE's scaling", "use_scaled_rope"),
    "norm_eps": ("rms_norm_eps", "norm_eps"),
    "tie_word_embeddings": ("tie_word_embeddings", "tying of output.weight"),
}


@dataclass(frozen=True)
class Architecture:
    """A Llama, Qwen2 or Qwen3 in numbers, named as torchtune's builders name them."""

    family: str  # llama, qwen2 (biases on q, k and v) or qwen3 (norms on q and k)
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    rope_base: float
    norm_eps: float
    tie_word_embeddings: bool
    rope_scaling: Scaling = field(default_factory=lambda: dict(DEFAULT))

    def differences(self, other: "Architecture") -> list[tuple[str, Any, Any]]:
        """Return (field, this value, the other's) wherever the two differ by more than float32's rounding."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [(name, mine, its) for name, mine, its in pairs if not _same(mine, its)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and isinstance(b, (int, float)) else a == b


def whole(value: float) -> float:
    """Return 32 for 32.0: files write either, and the two would give a stage different identities."""
    return int(value) if float(value).is_integer() else value


def sizes(a: Architecture) -> dict[str, Any]:
    """Return the arguments that all builders take."""
    names = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "embed_dim", "intermediate_dim", "max_seq_len")
    return {name: getattr(a, name) for name in names} | {"rope_base": whole(a.rope_base)}


def every_argument(a: Architecture) -> dict[str, Any]:
    """Return the arguments of the builders in llamaq.model.builders."""
    own: dict[str, Any] = {
        "norm_eps": a.norm_eps,
        "head_dim": a.head_dim,
        "tie_word_embeddings": a.tie_word_embeddings,
        "rope_scaling": {k: v if isinstance(v, str) else whole(v) for k, v in a.rope_scaling.items()},
    }
    return sizes(a) | own
