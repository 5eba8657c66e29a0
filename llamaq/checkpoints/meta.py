"""Meta's layout in full precision: `consolidated.00.pth` with the weights, `params.json` with the architecture."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings

from llamaq.checkpoints.tensors import save_pth
from llamaq.errors import UserError
from llamaq.families.weight_files import META_PARAMS as PARAMS
from llamaq.families.weight_files import META_WEIGHTS as WEIGHTS
from llamaq.model.builders import in_halves
from llamaq.model.names import EMBEDDING, HEAD, meta_key, split
from llamaq.model.shape import Shape
from llamaq.runs.files import write_json


def save_float(folder: Path, weights: dict[str, Tensor], params: dict[str, Any]) -> None:
    """Write full-precision weights (torchtune names) in Meta's layout and bf16, as Meta's checkpoints are."""
    tensors = {meta_key(k): v.detach().bfloat16() for k, v in weights.items()}
    tensors.setdefault(HEAD, tensors[EMBEDDING])
    folder.mkdir(parents=True, exist_ok=True)
    save_pth(folder / WEIGHTS, tensors)
    write_json(folder / PARAMS, params)


def model_params(decoder: Any) -> dict[str, Any]:
    """State the architecture of a decoder as params.json does: Meta's keys, and ExecuTorch's for what Meta has none.

    Raises:
        UserError: something that ExecuTorch's Llama cannot compute.
    """
    shape = Shape.of(decoder)
    _check_biases(decoder)
    sizes = {
        "dim": shape.dim,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        **_width_params(shape, meta=not in_halves(decoder)),
        "norm_eps": decoder.norm.eps,
        **_rope_params(decoder.layers[0].attn.pos_embeddings),
    }
    if shape.head_dim * shape.heads != shape.dim:
        sizes["head_dim"] = shape.head_dim
    forms = {"attention_qkv_bias": shape.qkv_bias, "use_qk_norm": shape.qk_norm, "qk_norm_before_rope": shape.qk_norm}
    return sizes | {key: True for key, value in forms.items() if value}


def _rope_params(rope: Any) -> dict[str, Any]:
    """State RoPE as ExecuTorch's `Rope` (examples/models/llama/rope.py) computes it.

    Of Llama 3's scaling it takes factor and high_freq_factor. Its Llama 3.2 has a factor of 32 built in; any other is
    written down, and goes with `--model llama3_1` (`executorch_arguments`).

    Raises:
        UserError: a scaling that it cannot compute.
    """
    base = {"rope_theta": float(rope.base), "use_scaled_rope": False}
    if isinstance(rope, Qwen2RotaryPositionalEmbeddings):
        factor = getattr(rope, "factor", 1)  # each pair's frequency over its own factor, in a form made for Phi
        factors = {"rope_scaling_short_factor": [factor] * (rope.dim // 2), "rope_scaling_attention_factor": 1.0}
        return base | {"use_hf_rope": True} | (factors if factor != 1 else {})
    if getattr(rope, "scale_factor", 1) == 1:
        return base
    built_in = {
        "low_freq_factor": (rope.low_freq_factor, 1),
        "original_max_position_embeddings": (rope.old_context_len, 8192),
    }
    for name, (value, fixed) in built_in.items():
        if value != fixed:
            raise UserError(f"model.rope_scaling.{name}={value}: ExecuTorch's Llama has {fixed} built in")
    params = base | {"use_scaled_rope": True}
    params |= {"rope_scale_factor": rope.scale_factor} if rope.scale_factor != 32 else {}
    return params | ({"high_freq_factor": rope.high_freq_factor} if rope.high_freq_factor != 4 else {})


def _check_biases(decoder: Any) -> None:
    """Check that biases are where ExecuTorch's Llama has them: on q, k and v, or nowhere."""
    names = {split(name)[1] for name, m in decoder.named_modules() if name.startswith("layers.") and _has_bias(m)}
    if names not in (set(), {"attn.q_proj", "attn.k_proj", "attn.v_proj"}):
        raise UserError(
            f"model: {', '.join(sorted(names))} have biases; ExecuTorch's Llama knows them on q, k and v together only"
        )


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _width_params(shape: Shape, meta: bool) -> dict[str, Any]:
    """State the feed-forward width by Meta's formula if it can, and as ExecuTorch's `hidden_dim` if not.

    Args:
        shape: the model's sizes.
        meta: whether Meta's own code can read the model at all.
    """
    formula = ffn_params(shape.dim, shape.hidden) if meta else None
    if formula is None:
        return {"hidden_dim": shape.hidden}
    return {"ffn_dim_multiplier": formula[0], "multiple_of": formula[1]}


def ffn_params(dim: int, hidden: int) -> tuple[float, int] | None:
    """Return the (ffn_dim_multiplier, multiple_of) from which Meta's formula makes `hidden`; None if none does."""
    for multiple_of in (256, 128, 64, 32):
        for multiplier in (1.5, 1.0, 1.3, hidden / int(2 * 4 * dim / 3)):
            if _hidden(dim, multiplier, multiple_of) == hidden:
                return multiplier, multiple_of
    return None


def feed_forward_width(params: dict[str, Any]) -> int:
    """Return the feed-forward width that params.json stands for."""
    if "hidden_dim" in params:
        return params["hidden_dim"]
    return _hidden(params["dim"], params["ffn_dim_multiplier"], params["multiple_of"])


def _hidden(dim: int, multiplier: float, multiple_of: int) -> int:
    """Compute Meta's formula (llama-models, `FeedForward`): int(multiplier · int(8 dim / 3)), rounded up to a multiple.

    1B: 1.5 · int(8 · 2048 / 3) = 1.5 · 5461 = 8191, rounded up to a multiple of 256: 8192.
    """
    return multiple_of * math.ceil(int(multiplier * int(2 * 4 * dim / 3)) / multiple_of)
