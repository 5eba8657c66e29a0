"""Meta's params.json, also with the keys that ExecuTorch adds; where it is silent, the weights' header decides."""

from pathlib import Path
from typing import Any

from llamaq.errors import UserError
from llamaq.families.architecture import DEFAULT, Architecture, Scaling
from llamaq.families.headers import Entry
from llamaq.families.rope import number

NORM_EPS, THETA = 1e-5, 500_000.0  # llama-models' defaults
POSITIONS, SCALED_POSITIONS = 8192, 131_072  # of Llama 3, and of Llama 3.1 and later; params.json does not say
LLAMA_3_VOCABULARY = 128_000  # Llama 2's is 32,000, and its params.json leaves out that its rope_theta is 10,000
LLAMA_3_1_WIDTH = 4096  # 8B and larger are Llama 3.1, whose RoPE is scaled by 8; 1B and 3B are 3.2, scaled by 32


def read(path: Path, params: dict[str, Any], header: dict[str, Entry]) -> Architecture:
    """Return the numbers of a params.json.

    Args:
        path: of the file, for errors.
        params: its content.
        header: of consolidated.00.pth.

    Raises:
        UserError: a number is missing or wrong, or something makes another model.
    """
    if params.get("moe") or params.get("moe_args") or params.get("vision_chunk_size"):
        raise UserError(f"{path}: experts or vision (Llama 4, Llama 3.2 Vision) are not supported, only text models")
    dim = _integer(path, params, "dim", _rows(header, "tok_embeddings.weight", axis=1))
    heads = _integer(path, params, "n_heads")
    query_rows = _rows(header, "layers.0.attention.wq.weight") or dim
    head_dim = _integer(path, params, "head_dim", query_rows // heads)
    key_rows = _rows(header, "layers.0.attention.wk.weight") or dim
    layers = {key.split(".")[1] for key in header if key.startswith("layers.")}
    vocab = params.get("vocab_size")  # -1: as many as the tokenizer has
    scaled = bool(params.get("use_scaled_rope"))
    return Architecture(
        family=_family(params, header),
        vocab_size=vocab if vocab and vocab > 0 else _rows(header, "tok_embeddings.weight") or 0,
        num_layers=_integer(path, params, "n_layers", len(layers)),
        num_heads=heads,
        num_kv_heads=_integer(path, params, "n_kv_heads", key_rows // head_dim),
        head_dim=head_dim,
        embed_dim=dim,
        intermediate_dim=_integer(path, params, "hidden_dim", _rows(header, "layers.0.feed_forward.w1.weight")),
        max_seq_len=_integer(path, params, "max_seq_len", SCALED_POSITIONS if scaled else POSITIONS),
        rope_base=_theta(path, params, header),
        norm_eps=float(params.get("norm_eps") or NORM_EPS),
        tie_word_embeddings=_is_tied(params, header),
        rope_scaling=_scaling(params, dim),
    )


def _is_tied(params: dict[str, Any], header: dict[str, Entry]) -> bool:
    """Tell whether the head is the embedding: it is not there, or has the same bytes.

    A quantized model that was rotated by R1 has two matrices; what it was made of was tied, and so is the model that
    the codes go into.
    """
    embedding, head = header.get("tok_embeddings.weight"), header.get("output.weight")
    if ((params.get("quantization_args") or {}).get("rotation") or {}).get("r1"):
        return True
    return head is None or (embedding is not None and head.crc is not None and head == embedding)


def _family(params: dict[str, Any], header: dict[str, Entry]) -> str:
    if params.get("use_qk_norm") or "layers.0.attention.q_norm_fn.weight" in header:
        return "qwen3"
    biased = params.get("attention_qkv_bias") or "layers.0.attention.wq.bias" in header
    return "qwen2" if biased else "llama"


def _theta(path: Path, params: dict[str, Any], header: dict[str, Entry]) -> float:
    theta = params.get("rope_theta") or params.get("rope_freq_base")
    if theta is None:
        if (_rows(header, "tok_embeddings.weight") or 0) < LLAMA_3_VOCABULARY:
            raise UserError(f"{path}: has no rope_theta; add it (Llama 3 has 500000.0, Llama 2 10000.0)")
        theta = THETA
    return number(path, "rope_theta", theta)


def _scaling(params: dict[str, Any], dim: int) -> Scaling:
    """Return RoPE's scaling. Meta says only that there is one; its factor follows from the model's width."""
    if stretched := params.get("rope_scaling_short_factor"):  # how llamaq writes linear scaling for ExecuTorch
        return {"rope_type": "linear", "factor": stretched[0]}
    if not params.get("use_scaled_rope"):
        return dict(DEFAULT)
    factor = params.get("rope_scale_factor") or params.get("rope_scaling_factor")
    return {
        "rope_type": "llama3",
        "factor": factor or (8 if dim >= LLAMA_3_1_WIDTH else 32),
        "low_freq_factor": 1,
        "high_freq_factor": params.get("high_freq_factor") or params.get("rope_high_freq_factor") or 4,
        "original_max_position_embeddings": 8192,
    }


def _rows(header: dict[str, Entry], key: str, axis: int = 0) -> int | None:
    return header[key].shape[axis] if key in header and len(header[key].shape) == 2 else None


def _integer(path: Path, params: dict[str, Any], key: str, default: int | None = None) -> int:
    value = params.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise UserError(f"{path}: {key} is {'missing' if value is None else value}; it has to be a positive integer")
    return value
