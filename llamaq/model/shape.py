"""The sizes of a decoder and the counts that follow from them: no memory, no weights."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from llamaq.config import Component
from llamaq.model.build import meta_decoder


@dataclass(frozen=True)
class Shape:
    """Sizes and forms of a decoder."""

    layers: int
    dim: int  # width of the residual stream
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  # width between w1, w3 and w2
    vocab: int = 0
    tied: bool = True  # whether the head is the embedding's matrix
    qkv_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def of(cls, decoder: Any) -> "Shape":
        """Read the sizes off a torchtune decoder, prepared or not, on any device."""
        attn, mlp, embedding = decoder.layers[0].attn, decoder.layers[0].mlp, decoder.tok_embeddings
        return cls(
            layers=len(decoder.layers),
            dim=attn.embed_dim,
            heads=attn.num_heads,
            kv_heads=attn.num_kv_heads,
            head_dim=attn.head_dim,
            hidden=mlp.w1.out_features,
            vocab=(embedding.weight if hasattr(embedding, "weight") else embedding.codes).shape[0],
            tied=getattr(decoder.output, "tied", not isinstance(decoder.output, nn.Linear)),
            qkv_bias=attn.q_proj.bias is not None,
            qk_norm=attn.q_norm is not None,
        )

    @property
    def kv_dim(self) -> int:
        """Return the width of the keys, and of the values, of all heads together."""
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Count the weights of the embedding; a head has as many, which are the same ones if it is tied."""
        return self.vocab * self.dim

    @property
    def ends(self) -> int:
        """Count the weights of embedding and head together."""
        return self.embedding * (1 if self.tied else 2)

    @property
    def linears(self) -> int:
        """Count the weights of the blocks' linears."""
        return self.layers * sum(a * b for a, b in self._linears())

    @property
    def weights(self) -> int:
        """Count all weights: linears, embedding, head, norms and biases."""
        norms = (2 * self.layers + 1) * self.dim + self.layers * 2 * self.head_dim * self.qk_norm
        biases = self.layers * (self.heads * self.head_dim + 2 * self.kv_dim) * self.qkv_bias
        return self.linears + self.ends + norms + biases

    @property
    def adapters_per_rank(self) -> int:
        """Count the weights of adapters of rank 1 on all linears of the blocks."""
        return self.layers * sum(a + b for a, b in self._linears())

    def _linears(self) -> list[tuple[int, int]]:
        """Return (out, in) of the seven linears of a block."""
        q = self.heads * self.head_dim
        attention = [(q, self.dim), (self.kv_dim, self.dim), (self.kv_dim, self.dim), (self.dim, q)]
        return [*attention, (self.hidden, self.dim), (self.hidden, self.dim), (self.dim, self.hidden)]


def shape_of(model: Component) -> Shape:
    """Return the sizes of the model that a config's `model` section names."""
    return Shape.of(meta_decoder(model))
