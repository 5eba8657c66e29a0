"""Meta's layout in full precision: `consolidated.00.pth` with the weights, `params.json` with the architecture."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor
from torchtune.models.convert_weights import meta_to_tune, tune_to_meta

from llamaq.checkpoints.tensors import load_pth, save_pth
from llamaq.errors import UserError
from llamaq.model.build import StateDict
from llamaq.model.shape import Shape
from llamaq.runs.files import write_json

WEIGHTS = "consolidated.00.pth"
PARAMS = "params.json"


def read_meta(folder: Path) -> StateDict:
    """Read Meta's float weights into torchtune names; `output.weight` may be there or not.

    Raises:
        UserError: the file is torn.
    """
    return meta_to_tune(load_pth(folder / WEIGHTS))


def save_float(folder: Path, weights: dict[str, Tensor], params: dict[str, Any]) -> None:
    """Write full-precision weights (torchtune names) in Meta's layout and bf16, as Meta's checkpoints are."""
    tensors = tune_to_meta({k: v.detach().bfloat16() for k, v in weights.items()})
    folder.mkdir(parents=True, exist_ok=True)
    save_pth(folder / WEIGHTS, {**tensors, "output.weight": tensors["tok_embeddings.weight"]})
    write_json(folder / PARAMS, params)


def model_params(decoder: Any) -> dict[str, Any]:
    """State the architecture of a torchtune Llama as Meta's params.json does.

    Raises:
        UserError: a RoPE scaling ExecuTorch's `llama3_2` does not know.
    """
    shape, rope = Shape.of(decoder), decoder.layers[0].attn.pos_embeddings
    if rope.scale_factor not in (1, 32):
        raise UserError(
            f"model.scale_factor={rope.scale_factor}: ExecuTorch's llama3_2 knows 32 (Llama 3.2) and 1 (unscaled)"
        )
    multiplier, multiple_of = ffn_params(shape.dim, shape.hidden)
    return {
        "dim": shape.dim,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "norm_eps": decoder.norm.eps,
        "rope_theta": float(rope.base),
        "use_scaled_rope": rope.scale_factor != 1,
    }


def ffn_params(dim: int, hidden: int) -> tuple[float, int]:
    """Return the (ffn_dim_multiplier, multiple_of) from which Meta's formula makes exactly `hidden`.

    Raises:
        UserError: there is none.
    """
    for multiple_of in (256, 128, 64, 32):
        for multiplier in (1.5, 1.0, 1.3, hidden / int(2 * 4 * dim / 3)):
            if _hidden(dim, multiplier, multiple_of) == hidden:
                return multiplier, multiple_of
    raise UserError(f"a feed-forward width of {hidden} cannot be written in params.json: make it a multiple of 32")


def feed_forward_width(params: dict[str, Any]) -> int:
    """Return the feed-forward width that params.json stands for."""
    return _hidden(params["dim"], params["ffn_dim_multiplier"], params["multiple_of"])


def _hidden(dim: int, multiplier: float, multiple_of: int) -> int:
    """Compute Meta's formula (llama-models, `FeedForward`): int(multiplier · int(8 dim / 3)), rounded up to a multiple.

    1B: 1.5 · int(8 · 2048 / 3) = 1.5 · 5461 = 8191, rounded up to a multiple of 256: 8192.
    """
    return multiple_of * math.ceil(int(multiplier * int(2 * 4 * dim / 3)) / multiple_of)
