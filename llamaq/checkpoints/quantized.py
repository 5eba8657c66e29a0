"""The quantized checkpoint in Meta's layout, as ExecuTorch and llama-models load it.

`consolidated.00.pth`, a flat dict in this order:
    layers.N.attention_norm.weight …             bf16 [dim]; a norm is first because ExecuTorch takes the first
                                                 tensor's dtype for the checkpoint's
    layers.N.{attention.w[qkvo],feed_forward.w[123]}.weight           int8 [out, in], one int4 code a byte
                                                    .scales           float32 [out, in / group_size]
                                                    .adaptor.A.weight bf16 [rank, in]     (spelled so)
                                                    .adaptor.B.weight bf16 [out, rank]
    tok_embeddings.{weight,scales}               int8 [vocab, dim], float32 [vocab, 1]
    output.{weight,scales}                       the same again: tied, written twice

`params.json` carries what both loaders need: `quantization_args` {scheme, group_size, spinquant; rotation {r1, r2, r4}
for a rotated model, whose two matrices at the ends differ} and `lora_args`
{rank, scale}. ExecuTorch ignores the latter's scale and multiplies by 2.0
(examples/models/llama/source_transformation/lora.py), so any other alpha/rank is folded into B here.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.errors import UserError
from llamaq.quant.modules import Adapter, FrozenEmbedding, FrozenLinear, UntiedHead
from llamaq.quant.prepare import add_adapters, freeze, quantized_linears
from llamaq.quant.scheme import Scheme
from llamaq.runs.run import naming_full_disk, write_json
from llamaq.spinquant.rotations import attach_online, check_contract

EXECUTORCH_LORA_SCALE = 2.0
BACKBONE = "backbone.json"  # beside a set of adapters: the hash of what they were trained on
_META_LINEARS = {
    "attn.q_proj": "attention.wq",
    "attn.k_proj": "attention.wk",
    "attn.v_proj": "attention.wv",
    "attn.output_proj": "attention.wo",
    "mlp.w1": "feed_forward.w1",
    "mlp.w2": "feed_forward.w2",
    "mlp.w3": "feed_forward.w3",
}
_META_NORMS = {"sa_norm.scale": "attention_norm.weight", "mlp_norm.scale": "ffn_norm.weight"}
_PEFT_LINEARS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}


def quantized_state_dict(decoder: nn.Module, head: nn.Module | None = None) -> dict[str, Tensor]:
    """Meta-layout tensors of a frozen decoder (torchtune names), codes and scales as they are.

    `head` is needed where it is not tied to the embedding (`UntiedHead`).

    Norms are stored in float32 if bf16 would change them, else in bf16.
    """
    norms, tensors = {}, {}
    for name, linear in quantized_linears(decoder).items():
        assert isinstance(linear, FrozenLinear), f"{name} is not frozen"
        key = _meta_name(name)
        tensors[f"{key}.weight"], tensors[f"{key}.scales"] = linear.codes, linear.scales
        if linear.adapter is not None:
            a, b = shipped_adapter(linear.adapter)
            tensors[f"{key}.adaptor.A.weight"], tensors[f"{key}.adaptor.B.weight"] = a, b
    for name, p in decoder.named_parameters():
        layer, _, tail = name.partition(".")[2].partition(".")
        if name.startswith("layers.") and tail in _META_NORMS:
            norms[f"layers.{layer}.{_META_NORMS[tail]}"] = _bf16_if_exact(p)
        elif name == "norm.scale":
            norms["norm.weight"] = _bf16_if_exact(p)
    embedding = decoder.get_submodule("tok_embeddings")
    assert isinstance(embedding, FrozenEmbedding), "the embedding is not frozen"
    rows = {"tok_embeddings": embedding, "output": head.matrix if isinstance(head, UntiedHead) else embedding}
    for key, matrix in rows.items():
        assert isinstance(matrix, FrozenEmbedding), f"{key} is not frozen"
        tensors[f"{key}.weight"], tensors[f"{key}.scales"] = matrix.codes, matrix.scales
    return {k: v.detach().contiguous() for k, v in (norms | tensors).items()}


def load_quantized(folder: Path, decoder: Any) -> Any:
    """Read a checkpoint of `save_quantized` into a prepared decoder, as frozen codes; returns the decoder.

    Raises:
        UserError: its rotation contract contradicts itself or the model.
    """
    params = json.loads((folder / "params.json").read_text())
    tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
    contract = params["quantization_args"].get("rotation")
    block = rotation_block(params, decoder.layers[0].mlp.w2.in_features, str(folder))
    lora = params.get("lora_args")
    if lora:
        add_adapters(decoder, lora["rank"], lora["rank"] * lora["scale"])
    freeze(decoder)
    state = {}
    for name, linear in quantized_linears(decoder).items():
        key = _meta_name(name)
        state |= {f"{name}.codes": tensors[f"{key}.weight"], f"{name}.scales": tensors[f"{key}.scales"]}
        if linear.adapter is not None:
            state |= {f"{name}.adapter.{x.lower()}": tensors[f"{key}.adaptor.{x}.weight"].float() for x in "AB"}
    for layer in range(params["n_layers"]):
        state |= {f"layers.{layer}.{ours}": tensors[f"layers.{layer}.{meta}"] for ours, meta in _META_NORMS.items()}
    state["norm.scale"] = tensors["norm.weight"]
    state |= {
        "tok_embeddings.codes": tensors["tok_embeddings.weight"],
        "tok_embeddings.scales": tensors["tok_embeddings.scales"],
    }
    if contract and contract["r1"]:
        rows = decoder.tok_embeddings.fmt
        decoder.output = UntiedHead(FrozenEmbedding(tensors["output.weight"], tensors["output.scales"], rows))
        state |= {f"output.matrix.{k}": tensors[f"output.{v}"] for k, v in (("codes", "weight"), ("scales", "scales"))}
    decoder.load_state_dict(state)
    attach_online(decoder, block)
    return decoder


def rotation_block(params: dict[str, Any], hidden: int, where: str) -> int:
    """Width of the online transform a checkpoint's params.json asks for, 0 for none.

    Raises:
        UserError: the params contradict themselves or the model's feed-forward width.
    """
    quantization = params["quantization_args"]
    return check_contract(quantization.get("rotation"), bool(quantization.get("spinquant")), hidden, where)


def shipped_adapter(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A and B as bf16, with B holding what ExecuTorch's fixed 2.0 leaves out of the scale, a power of two."""
    left_over = adapter.scale / EXECUTORCH_LORA_SCALE
    assert math.frexp(left_over)[0] == 0.5, "llamaq.config refuses scales that would round B a second time"
    return adapter.a.detach().bfloat16(), adapter.b.detach().bfloat16() * left_over


def _bf16_if_exact(p: Tensor) -> Tensor:
    rounded = p.detach().bfloat16()
    return rounded if p.is_meta or torch.equal(rounded.float(), p.detach().float()) else p.detach().float()


def _meta_name(name: str) -> str:
    prefix, layer, tail = name.split(".", 2)
    return f"{prefix}.{layer}.{_META_LINEARS[tail]}"


def model_params(decoder: Any) -> dict[str, Any]:
    """Architecture of a torchtune Llama as Meta's params.json states it.

    Raises:
        UserError: a RoPE scaling ExecuTorch's `llama3_2` does not know.
    """
    attn, mlp = decoder.layers[0].attn, decoder.layers[0].mlp
    dim, hidden = attn.embed_dim, mlp.w1.out_features
    rope = attn.pos_embeddings
    if rope.scale_factor not in (1, 32):
        raise UserError(
            f"model.scale_factor={rope.scale_factor}: ExecuTorch's llama3_2 knows 32 (Llama 3.2) and 1 (unscaled)"
        )
    multiplier, multiple_of = ffn_params(dim, hidden)
    return {
        "dim": dim,
        "n_layers": len(decoder.layers),
        "n_heads": attn.num_heads,
        "n_kv_heads": attn.num_kv_heads,
        "vocab_size": _vocab(decoder),
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "norm_eps": decoder.norm.eps,
        "rope_theta": float(rope.base),
        "use_scaled_rope": rope.scale_factor != 1,
    }


def _vocab(decoder: Any) -> int:
    e = decoder.tok_embeddings
    return (e.codes if isinstance(e, FrozenEmbedding) else e.weight).shape[0]


def ffn_params(dim: int, hidden: int) -> tuple[float, int]:
    """(ffn_dim_multiplier, multiple_of) from which Meta's formula makes exactly `hidden`.

    The formula (llama-models, `FeedForward`): int(multiplier · int(8 dim / 3)) rounded up to a multiple.
    """
    for multiple_of in (256, 128, 64, 32):
        for multiplier in (1.5, 1.0, 1.3, hidden / int(2 * 4 * dim / 3)):
            if _formula(dim, multiplier, multiple_of) == hidden:
                return multiplier, multiple_of
    raise UserError(f"a feed-forward width of {hidden} cannot be written in params.json: make it a multiple of 32")


def feed_forward_width(params: dict[str, Any]) -> int:
    """The width that params.json stands for."""
    return _formula(params["dim"], params["ffn_dim_multiplier"], params["multiple_of"])


def _formula(dim: int, multiplier: float, multiple_of: int) -> int:
    return multiple_of * math.ceil(int(multiplier * int(2 * 4 * dim / 3)) / multiple_of)


def save_quantized(
    folder: Path, decoder: Any, scheme: Scheme, rotation: dict[str, Any] | None = None, head: nn.Module | None = None
) -> dict[str, Any]:
    """Write `consolidated.00.pth` and `params.json` of a frozen decoder; returns the params.

    Args:
        folder: made if it is not there.
        decoder: frozen, torchtune names.
        scheme: the numerics.
        rotation: the contract of a rotated model (`Rotations.contract`).
        head: of a model whose head is not tied.
    """
    quantization = {"scheme": scheme.name, "group_size": scheme.group_size}
    quantization["spinquant"] = bool(rotation and rotation["r4"])  # loaders read: does R4 have to be computed?
    if rotation:
        quantization["rotation"] = rotation
    params = model_params(decoder) | {"quantization_args": quantization}
    adapters = [q.adapter for q in quantized_linears(decoder).values() if q.adapter is not None]
    if adapters:
        params["lora_args"] = {"rank": adapters[0].rank, "scale": EXECUTORCH_LORA_SCALE}
    folder.mkdir(parents=True, exist_ok=True)
    save_pth(folder / "consolidated.00.pth", quantized_state_dict(decoder, head))
    write_json(folder / "params.json", params)
    return params


def save_float(folder: Path, weights: dict[str, Tensor], params: dict[str, Any]) -> None:
    """Write full-precision weights (torchtune names) in Meta's layout and bf16, as Meta's checkpoints are."""
    from torchtune.models.convert_weights import tune_to_meta

    tensors = tune_to_meta({k: v.detach().bfloat16() for k, v in weights.items()})
    folder.mkdir(parents=True, exist_ok=True)
    save_pth(folder / "consolidated.00.pth", {**tensors, "output.weight": tensors["tok_embeddings.weight"]})
    write_json(folder / "params.json", params)


def save_pth(path: Path, tensors: dict[str, Tensor]) -> None:
    with naming_full_disk(str(path)):
        try:
            torch.save({k: v.cpu() for k, v in tensors.items()}, path)
        except RuntimeError as e:  # torch's zip writer hides the operating system's error
            raise OSError(28, f"{path}: {e}") if "write" in str(e) else e from e


def save_peft(folder: Path, decoder: Any, rank: int, alpha: float) -> None:
    """Adapters as PEFT reads them (`adapter_model.safetensors`, `adapter_config.json`), in Hugging Face's q/k order."""
    from llamaq.train.resume import save_tensors

    tensors = {}
    for name, linear in quantized_linears(decoder).items():
        assert linear.adapter is not None
        prefix, layer, tail = name.split(".", 2)
        key = f"base_model.model.model.{prefix}.{layer}.{_PEFT_LINEARS[tail]}"
        attn = decoder.layers[int(layer)].attn
        b = linear.adapter.b.detach().bfloat16()
        heads = {"attn.q_proj": attn.num_heads, "attn.k_proj": attn.num_kv_heads}.get(tail)
        tensors[f"{key}.lora_A.weight"] = linear.adapter.a.detach().bfloat16()
        tensors[f"{key}.lora_B.weight"] = b if heads is None else hf_rows(b, heads)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [n.rsplit(".", 1)[-1] for n in _PEFT_LINEARS.values()],
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def load_peft(folder: Path, params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapters of a PEFT folder as Meta-layout tensors, in the form of a checkpoint's own.

    Args:
        folder: with `adapter_model.safetensors` and `adapter_config.json`.
        params: of the checkpoint they go into.
        tensors: its tensors, for names and shapes.

    Raises:
        UserError: rank, alpha, names or shapes are not the checkpoint's.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    rank = params.get("lora_args", {}).get("rank")
    if config["r"] != rank:
        raise UserError(f"{folder}: rank {config['r']}, but the checkpoint's adapters have {rank}; they must be equal")
    left_over = config["lora_alpha"] / config["r"] / EXECUTORCH_LORA_SCALE
    if math.frexp(left_over)[0] != 0.5:
        raise UserError(f"{folder}: lora_alpha / r is no power of two, which bf16 weights cannot hold exactly")
    found, result = load_file(folder / "adapter_model.safetensors"), {}
    for ours, meta in _META_LINEARS.items():
        heads = {"attn.q_proj": params["n_heads"], "attn.k_proj": params["n_kv_heads"]}.get(ours)
        for layer in range(params["n_layers"]):
            prefix = f"base_model.model.model.layers.{layer}.{_PEFT_LINEARS[ours]}"
            for part in "AB":
                key, target = f"{prefix}.lora_{part}.weight", f"layers.{layer}.{meta}.adaptor.{part}.weight"
                if key not in found or found[key].shape != tensors[target].shape:
                    shape = list(found[key].shape) if key in found else "missing"
                    raise UserError(f"{folder}: {key} is {shape}, needed is {list(tensors[target].shape)}")
                t = found[key].bfloat16()
                if part == "B":
                    t = (t if heads is None else meta_rows(t, heads)) * left_over
                result[target] = t
    return result


def backbone_hash(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's tensors but its adapters': what a set of adapters was trained on."""
    digest = hashlib.sha256()
    for name, t in sorted(torch.load(checkpoint / "consolidated.00.pth", mmap=True, weights_only=True).items()):
        if ".adaptor." not in name:
            digest.update(name.encode())
            digest.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def meta_rows(b: Tensor, heads: int) -> Tensor:
    """The way back from `hf_rows`."""
    d = b.shape[0] // heads
    return b.view(heads, 2, d // 2, b.shape[1]).transpose(1, 2).reshape(b.shape)


def hf_rows(b: Tensor, heads: int) -> Tensor:
    """Rows of a q or k matrix from Meta's interleaved RoPE order to Hugging Face's halves. [heads · d, n] → same."""
    d = b.shape[0] // heads
    return b.view(heads, d // 2, 2, b.shape[1]).transpose(1, 2).reshape(b.shape)
