"""Hugging Face's config.json, read with errors that name the key."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaq.errors import UserError
from llamaq.families.architecture import Architecture
from llamaq.families.rope import read_rope


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: it is missing, empty, torn or no object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e
    except ValueError as e:
        state = "is empty" if not path.stat().st_size else f"is not valid JSON ({e})"
        raise UserError(f"{path} {state}; download or copy the file again") from e
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__} instead of an object; download the file again")
    return values


@dataclass(frozen=True)
class ConfigJson:
    """A config.json of a family that is known."""

    path: Path
    values: dict[str, Any]
    has_head: bool | None  # whether the weights have lm_head.weight; None if their headers do not tell

    @property
    def model_type(self) -> str:
        """Return the family as transformers names it."""
        return self.values["model_type"]

    def refuse_if(self, key: str, why: str) -> None:
        """Refuse a feature that changes what the model computes.

        Raises:
            UserError: the key is there and says that the feature is on.
        """
        if self.values.get(key):
            raise UserError(f"{self.path}: {self.model_type} with {key}={self.values[key]}: {why}")

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer.

        Raises:
            UserError: it is missing without a default, or not a positive integer.
        """
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            state = "is missing" if value is None else f"is {value!r}"
            raise UserError(f"{self.path}: {key} {state}; it has to be a positive integer")
        return value

    def architecture(self, family: str, norm_eps: float, positions: int, head_dim: int | None = None) -> Architecture:
        """Return the numbers that all families have.

        Args:
            family: of the result.
            norm_eps: transformers' default.
            positions: transformers' default of max_position_embeddings.
            head_dim: transformers' default, if it does not follow from the sizes.

        Raises:
            UserError: a number is missing, wrong or not supported.
        """
        heads, dim = self.integer("num_attention_heads"), self.integer("hidden_size")
        if self.values.get("head_dim") is None and head_dim is None and dim % heads:
            raise UserError(f"{self.path}: hidden_size {dim} is no multiple of num_attention_heads {heads}")
        kv_heads = self.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError(
                f"{self.path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        self._check_activation()
        self._check_layers()
        max_seq_len = self.integer("max_position_embeddings", positions)
        base, scaling = read_rope(self.path, self.values, max_seq_len)
        eps = self.values.get("rms_norm_eps", norm_eps)
        if isinstance(eps, bool) or not isinstance(eps, float) or not 0 < eps < 1:
            raise UserError(f"{self.path}: rms_norm_eps is {eps!r}; it has to be a number such as 1e-05")
        return Architecture(
            family=family,
            vocab_size=self.integer("vocab_size"),
            num_layers=self.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=self.integer("head_dim", head_dim or max(1, dim // heads)),
            embed_dim=dim,
            intermediate_dim=self.integer("intermediate_size"),
            max_seq_len=max_seq_len,
            rope_base=base,
            norm_eps=float(f"{eps:.6g}"),  # files made from GGUF hold float32's nearest number to 1e-5
            tie_word_embeddings=self._is_tied(),
            rope_scaling=scaling,
        )

    def _check_activation(self) -> None:
        activation = self.values.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UserError(f"{self.path}: hidden_act is {activation}; ExecuTorch's Llama computes silu only")

    def _check_layers(self) -> None:
        """Check that all layers are alike."""
        others = {t for t in self.values.get("layer_types") or [] if t != "full_attention"}
        if others:
            raise UserError(f"{self.path}: layer_types has {', '.join(sorted(map(str, others)))}: only full attention")

    def _is_tied(self) -> bool:
        """Tell whether the head is the embedding. Without the key, it is if the weights have no head."""
        tied = self.values.get("tie_word_embeddings")
        if tied is False and self.has_head is False:
            raise UserError(
                f"{self.path}: tie_word_embeddings is false, but no weights have lm_head.weight; a file is missing, "
                "or the key has to be true"
            )
        return self.has_head is False if tied is None else bool(tied)
