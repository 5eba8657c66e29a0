"""Builders of decoders: the forms of the Llama family that llamaq trains and ExecuTorch runs.

    llama     Llama 1 to 3 and derivatives: tied or untied head, any head width, RoPE plain or scaled (llama3, linear)
    qwen2     Qwen2 and Qwen2.5: biases on q, k and v
    qwen3     Qwen3: each head's queries and keys are normalized before RoPE

All are torchtune's modules with torchtune's names. torchtune's own builders (`torchtune.models.llama3_2.llama3_2`,
`torchtune.models.qwen2.qwen2`) make the same models where they can.

RoPE turns pairs of channels of a head, and checkpoints differ in which channels are a pair: neighbours (Meta's order),
or channels i and i + d/2 (Hugging Face's, `HalfSplitRoPE`). Rows of q and k of a checkpoint have to be in the order of
the decoder; `in_halves()` tells it. Hugging Face's files keep their order for Qwen and for linearly scaled Llamas, and
are reordered for other Llamas.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from llamaq.errors import UserError
from llamaq.families.rope import SCALINGS


class HalfSplitRoPE(Qwen2RotaryPositionalEmbeddings):
    """RoPE on channels i and i + d/2 of a head, computed in float32 also under autocast; linear scaling by `factor`.

    A scaled table is computed in float64 and rounded once, as ExecuTorch does (`hf_precompute_freqs_cis` in
    examples/models/llama/rope.py): position p of a model stretched by 4 is turned like position p / 4.
    """

    def __init__(self, dim: int, max_seq_len: int, base: float, factor: float = 1.0):
        self.factor = factor
        super().__init__(dim, max_seq_len, base)

    def rope_init(self) -> None:
        """Make the tables, on the device of the moment."""
        if self.factor == 1:
            super().rope_init()
            return
        theta = 1 / self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim) / self.factor  # [d/2]
        angles = torch.outer(torch.arange(self.max_seq_len, dtype=torch.float64), theta).repeat(1, 2)  # [s, d]
        self.register_buffer("cache", torch.cat([angles.cos(), angles.sin()], -1).float(), persistent=False)

    def forward(self, x: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """Turn x [b, s, heads, d] by its positions, 0 … s − 1 or `input_pos` [b, s]."""
        return super().forward(x.float(), input_pos).type_as(x)


class NormedAttention(MultiHeadAttention):
    """Attention that normalizes each head's queries and keys before RoPE; torchtune's norms come after it."""

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, mask: Any = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """Attend within x [b, s, dim]; the arguments are torchtune's, and y is x.

        With a key/value cache, keys and values of earlier calls are attended to as well, as `mask` allows.
        """
        b, s, _ = x.shape
        q, k, v = (proj(x).view(b, s, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        assert self.q_norm is not None and self.k_norm is not None and self.pos_embeddings is not None
        q = self.pos_embeddings(self.q_norm(q), input_pos=input_pos).transpose(1, 2)  # [b, heads, s, d]
        k = self.pos_embeddings(self.k_norm(k), input_pos=input_pos).transpose(1, 2)
        v = v.transpose(1, 2)
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)
        k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for t in (k, v))
        causal = self.kv_cache is None and mask is None and self.is_causal
        dropout = self.attn_dropout if self.training else 0.0
        out = self._attention_call(q, k, v, mask=mask, dropout_p=dropout, is_causal=causal)  # [b, heads, s, d]
        return self.output_proj(out.transpose(1, 2).reshape(b, s, -1))


def llama(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    max_seq_len: int,
    intermediate_dim: int,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-5,
    rope_base: float = 500_000,
    head_dim: int | None = None,
    tie_word_embeddings: bool = True,
    rope_scaling: Mapping[str, Any] | None = None,
) -> TransformerDecoder:
    """Build a Llama.

    Args:
        vocab_size: rows of embedding and head.
        num_layers: how many blocks.
        num_heads: of queries.
        num_kv_heads: of keys and values.
        embed_dim: width of the residual stream.
        max_seq_len: positions.
        intermediate_dim: width between the three linears of the MLP.
        attn_dropout: in training.
        norm_eps: of all norms.
        rope_base: RoPE's θ.
        head_dim: width of a head; embed_dim / num_heads if None.
        tie_word_embeddings: whether the head is the embedding's matrix.
        rope_scaling: as in a config.json: `rope_type` and its numbers (`SCALINGS`); None for no scaling.

    Raises:
        UserError: a scaling that is not known, or one without its numbers.
    """
    return _decoder(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        max_seq_len=max_seq_len,
        intermediate_dim=intermediate_dim,
        attn_dropout=attn_dropout,
        norm_eps=norm_eps,
        rope_base=rope_base,
        head_dim=head_dim,
        tie_word_embeddings=tie_word_embeddings,
        rope_scaling=rope_scaling,
    )


def qwen2(*, norm_eps: float = 1e-6, rope_base: float = 1_000_000, **arguments: Any) -> TransformerDecoder:
    """Build a Qwen2 or Qwen2.5: q, k and v have biases. Arguments and errors are those of `llama`."""
    return _decoder(norm_eps=norm_eps, rope_base=rope_base, **arguments, halves=True, qkv_bias=True)


def qwen3(
    *, norm_eps: float = 1e-6, rope_base: float = 1_000_000, head_dim: int | None = 128, **arguments: Any
) -> TransformerDecoder:
    """Build a Qwen3: queries and keys are normalized head by head. Arguments and errors are those of `llama`."""
    return _decoder(norm_eps=norm_eps, rope_base=rope_base, head_dim=head_dim, **arguments, halves=True, qk_norm=True)


def rope_of(
    head_dim: int, max_seq_len: int, base: float, scaling: Mapping[str, Any] | None, halves: bool = False
) -> nn.Module:
    """Return RoPE with the scaling of a config.json.

    Args:
        head_dim: width of a head.
        max_seq_len: positions.
        base: θ.
        scaling: `rope_type` and its numbers, or None.
        halves: of the unscaled one: pairs are channels i and i + d/2. Llama 3's scaling has neighbours, linear halves.

    Raises:
        UserError: a scaling that is not known, one without its numbers, or Llama 3's on halves.
    """
    scaling = dict(scaling or {})
    kind = scaling.pop("rope_type", "default")
    if kind not in SCALINGS:
        raise UserError(f"model.rope_scaling.rope_type={kind} is not supported; known are {', '.join(SCALINGS)}")
    missing = [name for name in SCALINGS[kind] if not isinstance(scaling.get(name), (int, float))]
    unknown = [name for name in scaling if name not in SCALINGS[kind]]
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"does not take {', '.join(unknown)}"
        raise UserError(f"model.rope_scaling: rope_type {kind} {wrong}")
    if kind == "llama3":
        if halves:
            raise UserError("model.rope_scaling.rope_type=llama3 is known for Llama only; use default or linear")
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        length = scaling["original_max_position_embeddings"]
        return Llama3ScaledRoPE(head_dim, max_seq_len, base, scaling["factor"], low, high, length)  # pyright: ignore[reportArgumentType]  (annotated int, takes float)
    if kind == "linear" or halves:
        return HalfSplitRoPE(head_dim, max_seq_len, base, scaling.get("factor", 1.0))
    return RotaryPositionalEmbeddings(head_dim, max_seq_len, base)  # pyright: ignore[reportArgumentType]


def in_halves(decoder: Any) -> bool:
    """Tell whether RoPE's pairs are channels i and i + d/2 of a head, Hugging Face's order; else neighbours, Meta's."""
    return isinstance(decoder.layers[0].attn.pos_embeddings, Qwen2RotaryPositionalEmbeddings)


def _decoder(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    max_seq_len: int,
    intermediate_dim: int,
    norm_eps: float,
    rope_base: float,
    attn_dropout: float = 0.0,
    head_dim: int | None = None,
    tie_word_embeddings: bool = True,
    rope_scaling: Mapping[str, Any] | None = None,
    halves: bool = False,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> TransformerDecoder:
    """Put torchtune's modules together; RoPE has no weights, and all blocks share it."""
    head_dim = head_dim or embed_dim // num_heads
    rope: Any = rope_of(head_dim, max_seq_len, rope_base, rope_scaling, halves)

    def attention() -> MultiHeadAttention:
        norms: dict[str, Any] = {f"{x}_norm": RMSNorm(head_dim, norm_eps) for x in "qk"} if qk_norm else {}
        return (NormedAttention if qk_norm else MultiHeadAttention)(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=nn.Linear(embed_dim, num_heads * head_dim, bias=qkv_bias),
            k_proj=nn.Linear(embed_dim, num_kv_heads * head_dim, bias=qkv_bias),
            v_proj=nn.Linear(embed_dim, num_kv_heads * head_dim, bias=qkv_bias),
            output_proj=nn.Linear(num_heads * head_dim, embed_dim, bias=False),
            pos_embeddings=rope,
            max_seq_len=max_seq_len,
            attn_dropout=attn_dropout,
            **norms,
        )

    def mlp() -> FeedForward:
        gate, up = (nn.Linear(embed_dim, intermediate_dim, bias=False) for _ in range(2))
        return FeedForward(gate_proj=gate, down_proj=nn.Linear(intermediate_dim, embed_dim, bias=False), up_proj=up)

    blocks = [
        TransformerSelfAttentionLayer(
            attention(), mlp(), sa_norm=RMSNorm(embed_dim, norm_eps), mlp_norm=RMSNorm(embed_dim, norm_eps)
        )
        for _ in range(num_layers)
    ]
    embedding = nn.Embedding(vocab_size, embed_dim)
    return TransformerDecoder(
        tok_embeddings=embedding,
        layers=nn.ModuleList(blocks),
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, norm_eps),
        output=TiedLinear(embedding) if tie_word_embeddings else nn.Linear(embed_dim, vocab_size, bias=False),  # pyright: ignore[reportArgumentType]  (a callable)
    )
