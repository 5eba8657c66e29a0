"""Hugging Face's names and row order: rows of q and k are in the order of RoPE's halves, Meta's are in pairs."""

from typing import Any

from torch import Tensor

from llamaq.model.build import StateDict
from llamaq.model.builders import in_halves
from llamaq.model.names import EMBEDDING, FINAL_NORM, HEAD, HUGGING_FACE

OUTSIDE = {"model.embed_tokens.weight": EMBEDDING, "model.norm.weight": FINAL_NORM, "lm_head.weight": HEAD}
INSIDE = {
    "input_layernorm.weight": "sa_norm.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
    "self_attn.q_norm.weight": "attn.q_norm.scale",
    "self_attn.k_norm.weight": "attn.k_norm.scale",
    **{f"{hf}.{kind}": f"{ours}.{kind}" for ours, hf in HUGGING_FACE.items() for kind in ("weight", "bias")},
}


def torchtune_name(key: str) -> str | None:
    """Return torchtune's name of a Hugging Face tensor, None for a table of RoPE; an unknown one stays as it is."""
    if key.endswith("rotary_emb.inv_freq"):
        return None
    if key.startswith("model.layers."):
        layer, _, tail = key.removeprefix("model.layers.").partition(".")
        return f"layers.{layer}.{INSIDE[tail]}" if tail in INSIDE else key
    return OUTSIDE.get(key, key)


def reordered_heads(decoder: Any) -> dict[str, int]:
    """Return the linears whose rows Hugging Face has in another order than the decoder, with their number of heads."""
    if in_halves(decoder):
        return {}
    attn = decoder.layers[0].attn
    return {"attn.q_proj": attn.num_heads, "attn.k_proj": attn.num_kv_heads}


def in_row_order(tensors: StateDict, decoder: Any) -> StateDict:
    """Put rows of q and k of Hugging Face's tensors, under torchtune's names, into the order of a decoder's RoPE."""
    heads = reordered_heads(decoder)

    def rows(name: str, t: Tensor) -> Tensor:
        found = next((n for linear, n in heads.items() if f".{linear}." in name), None)
        return t if found is None else meta_rows(t, found)

    return {name: rows(name, t) for name, t in tensors.items()}


def hf_rows(b: Tensor, heads: int) -> Tensor:
    """Reorder rows of a q or k matrix (or bias) from Meta's pairs of RoPE to Hugging Face's halves. [heads · d, …]."""
    return b.view(heads, -1, 2, *b.shape[1:]).transpose(1, 2).reshape(b.shape)


def meta_rows(b: Tensor, heads: int) -> Tensor:
    """Undo `hf_rows`."""
    d = b.shape[0] // heads
    return b.view(heads, 2, d // 2, *b.shape[1:]).transpose(1, 2).reshape(b.shape)
