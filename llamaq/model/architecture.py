"""The numbers of a decoder, read off its modules, to be compared with what a checkpoint folder says."""

from typing import Any

from torch import nn

from llamaq.families.architecture import DEFAULT, Architecture, Scaling


def architecture_of(decoder: Any) -> Architecture:
    """Return the numbers of a torchtune decoder that is not prepared yet, on any device."""
    attn, mlp = decoder.layers[0].attn, decoder.layers[0].mlp
    rope = attn.pos_embeddings
    return Architecture(
        family=_family(attn),
        vocab_size=decoder.tok_embeddings.num_embeddings,
        num_layers=len(decoder.layers),
        num_heads=attn.num_heads,
        num_kv_heads=attn.num_kv_heads,
        head_dim=attn.head_dim,
        embed_dim=attn.embed_dim,
        intermediate_dim=mlp.w1.out_features,
        max_seq_len=decoder.max_seq_len,
        rope_base=rope.base,
        norm_eps=decoder.norm.eps,
        tie_word_embeddings=not isinstance(decoder.output, nn.Module),
        rope_scaling=_scaling(rope),
    )


def _family(attn: Any) -> str:
    if attn.q_norm is not None:
        return "qwen3"
    return "qwen2" if attn.q_proj.bias is not None else "llama"


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
