"""The quantized checkpoint in Meta's layout, as ExecuTorch and llama-models load it.

`consolidated.00.pth`, a flat dict in this order:
    layers.N.attention_norm.weight …             bf16 [dim]; a norm is first because ExecuTorch takes the first
                                                 tensor's dtype for the checkpoint's
    layers.N.attention.{q,k}_norm_fn.weight      bf16 [head_dim], of models that have them (Qwen3)
    layers.N.{attention.w[qkvo],feed_forward.w[123]}.weight           int8 [out, in], one int4 code a byte
                                                    .scales           float32 [out, in / group_size]
                                                    .bias             bf16 [out], of q, k and v if they have one
                                                    .adaptor.A.weight bf16 [rank, in]     (spelled so)
                                                    .adaptor.B.weight bf16 [out, rank]
    tok_embeddings.{weight,scales}               int8 [vocab, dim], float32 [vocab, 1]
    output.{weight,scales}                       the same again if the head is tied, else its own

Norms and biases are float32 where bf16 would change them.

`params.json` carries what both loaders need:
    quantization_args   scheme, group_size, spinquant; rotation {r1, r2, r4} for a rotated model. With r1, embedding
                        and head differ
    lora_args           rank, scale. ExecuTorch ignores this scale and multiplies by 2.0
                        (examples/models/llama/source_transformation/lora.py), so any other alpha / rank goes into B.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.checkpoints.meta import PARAMS, WEIGHTS, model_params
from llamaq.checkpoints.tensors import save_pth
from llamaq.model.names import meta_key, meta_name
from llamaq.model.online import attach_online, check_contract
from llamaq.model.shape import Shape
from llamaq.quant.modules import Adapter, FrozenEmbedding, FrozenLinear, UntiedHead, head_of
from llamaq.quant.prepare import add_adapters, freeze, quantized_linears
from llamaq.quant.scheme import Scheme
from llamaq.runs.files import LARGE, write_json
from llamaq.runs.tracking import progress

EXECUTORCH_LORA_SCALE = 2.0


def quantized_state_dict(decoder: nn.Module) -> dict[str, Tensor]:
    """Return a frozen decoder (torchtune names) as Meta-layout tensors, codes and scales as they are.

    Norms and biases are stored in bf16, or in float32 where bf16 would change them.
    """
    norms, tensors = {}, {}
    for name, linear in quantized_linears(decoder).items():
        assert isinstance(linear, FrozenLinear), f"{name} is not frozen"
        key = meta_name(name)
        tensors[f"{key}.weight"], tensors[f"{key}.scales"] = linear.codes, linear.scales
        if linear.bias is not None:
            tensors[f"{key}.bias"] = _bf16_if_exact(linear.bias)
        if linear.adapter is not None:
            a, b = shipped_adapter(linear.adapter)
            tensors[f"{key}.adaptor.A.weight"], tensors[f"{key}.adaptor.B.weight"] = a, b
    for name, p in decoder.named_parameters():
        if name.endswith("norm.scale"):
            norms[meta_key(name)] = _bf16_if_exact(p)
    embedding, head = decoder.get_submodule("tok_embeddings"), head_of(decoder)
    rows = {"tok_embeddings": embedding, "output": head.matrix if isinstance(head, UntiedHead) else embedding}
    for key, matrix in rows.items():
        assert isinstance(matrix, FrozenEmbedding), f"{key} is not frozen"
        tensors[f"{key}.weight"], tensors[f"{key}.scales"] = matrix.codes, matrix.scales
    return {k: v.detach().contiguous() for k, v in (norms | tensors).items()}


def load_quantized(folder: Path, decoder: Any) -> Any:
    """Read a checkpoint of `save_quantized` into a prepared decoder, as frozen codes; return the decoder.

    Raises:
        UserError: its rotation contract contradicts itself or the model.
    """
    params = json.loads((folder / PARAMS).read_text())
    tensors = torch.load(folder / WEIGHTS, weights_only=True)
    contract = params["quantization_args"].get("rotation")
    block = rotation_block(params, decoder.layers[0].mlp.w2.in_features, str(folder))
    untied = not Shape.of(decoder).tied or bool(contract and contract["r1"])
    lora = params.get("lora_args")
    if lora:
        add_adapters(decoder, lora["rank"], lora["rank"] * lora["scale"])
    freeze(decoder)
    state = {}
    for name, linear in quantized_linears(decoder).items():
        key = meta_name(name)
        state |= {f"{name}.codes": tensors[f"{key}.weight"], f"{name}.scales": tensors[f"{key}.scales"]}
        if linear.adapter is not None:
            state |= {f"{name}.adapter.{x.lower()}": tensors[f"{key}.adaptor.{x}.weight"].float() for x in "AB"}
    names = [name for name, _ in decoder.named_parameters() if name.endswith(("norm.scale", ".bias"))]
    state |= {name: tensors[meta_key(name)] for name in names}
    state |= {
        "tok_embeddings.codes": tensors["tok_embeddings.weight"],
        "tok_embeddings.scales": tensors["tok_embeddings.scales"],
    }
    if untied:
        rows = decoder.tok_embeddings.fmt
        decoder.output = UntiedHead(FrozenEmbedding(tensors["output.weight"], tensors["output.scales"], rows))
        state |= {f"output.matrix.{k}": tensors[f"output.{v}"] for k, v in (("codes", "weight"), ("scales", "scales"))}
    decoder.load_state_dict(state)
    attach_online(decoder, block)
    return decoder


def rotation_block(params: dict[str, Any], hidden: int, where: str) -> int:
    """Return the width of the online transform that a checkpoint's params.json asks for, 0 for none.

    Raises:
        UserError: the params contradict themselves or the model's feed-forward width.
    """
    quantization = params["quantization_args"]
    return check_contract(quantization.get("rotation"), bool(quantization.get("spinquant")), hidden, where)


def shipped_adapter(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return A and B in bf16 for ExecuTorch, which multiplies by 2.0 whatever the scale.

    The rest of the scale goes into B. It is a power of two, so B is not rounded again: alpha / rank = 1 halves B.
    """
    left_over = adapter.scale / EXECUTORCH_LORA_SCALE
    assert math.frexp(left_over)[0] == 0.5, "llamaq.config refuses scales that would round B a second time"
    return adapter.a.detach().bfloat16(), adapter.b.detach().bfloat16() * left_over


def _bf16_if_exact(p: Tensor) -> Tensor:
    rounded = p.detach().bfloat16()
    return rounded if p.is_meta or torch.equal(rounded.float(), p.detach().float()) else p.detach().float()


def save_quantized(
    folder: str | Path,
    decoder: Any,
    scheme: Scheme,
    rotation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `consolidated.00.pth` and `params.json` of a frozen decoder; return the params.

    Args:
        folder: made if it is not there.
        decoder: frozen, torchtune names.
        scheme: the numerics.
        rotation: the contract of a rotated model (`Rotations.contract`).
    """
    quantization = {"scheme": scheme.name, "group_size": scheme.group_size}
    quantization["spinquant"] = bool(rotation and rotation["r4"])  # loaders read: does R4 have to be computed?
    if rotation:
        quantization["rotation"] = rotation
    params = model_params(decoder) | {"quantization_args": quantization}
    adapters = [q.adapter for q in quantized_linears(decoder).values() if q.adapter is not None]
    if adapters:
        params["lora_args"] = {"rank": adapters[0].rank, "scale": EXECUTORCH_LORA_SCALE}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_pth(folder / WEIGHTS, quantized_state_dict(decoder))
    write_json(folder / PARAMS, params)
    return params


def backbone_hash(checkpoint: Path) -> str:
    """Return the SHA-256 of a checkpoint's tensors without its adapters: what a set of adapters was trained on."""
    digest, tensors = hashlib.sha256(), sorted(torch.load(checkpoint / WEIGHTS, mmap=True, weights_only=True).items())
    large = (checkpoint / WEIGHTS).stat().st_size >= LARGE
    for name, t in progress(tensors, "hashing the backbone", unit="tensor") if large else tensors:
        if ".adaptor." not in name:
            digest.update(name.encode())
            digest.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
