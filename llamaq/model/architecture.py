"""The numbers of a decoder, read off its modules, to be compared with what a checkpoint folder says."""

from typing import Any

from llamaq.families.architecture import DEFAULT, Architecture, Scaling
from llamaq.model.shape import Shape


def architecture_of(decoder: Any) -> Architecture:
    """Return the numbers of a torchtune decoder that is not prepared yet, on any device."""
    shape, rope = Shape.of(decoder), decoder.layers[0].attn.pos_embeddings
    return Architecture(
        family="qwen3" if shape.qk_norm else "qwen2" if shape.qkv_bias else "llama",
        vocab_size=shape.vocab,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        embed_dim=shape.dim,
        intermediate_dim=shape.hidden,
        max_seq_len=decoder.max_seq_len,
        rope_base=rope.base,
        norm_eps=decoder.norm.eps,
        tie_word_embeddings=shape.tied,
        rope_scaling=_scaling(rope),
    )


def _scaling(rope: Any) -> Scaling:
    """Return RoPE's scaling as a config.json writes it; a factor of 1 is none."""
    factor = getattr(rope, "scale_factor", getattr(rope, "factor", 1))
    if factor == 1:
        return dict(DEFAULT)
    if not hasattr(rope, "scale_factor"):
        return {"rope_type": "linear", "factor": factor}
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.old_context_len,
    }
