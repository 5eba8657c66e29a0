"""The seven linears of a Llama block, once: by torchtune's names, in the order they compute, and in other layouts.

Every table of linears in this code base is made from these.
"""

# torchtune → (Meta, Hugging Face), in the order a block computes them
LAYOUTS = {
    "attn.q_proj": ("attention.wq", "self_attn.q_proj"),
    "attn.k_proj": ("attention.wk", "self_attn.k_proj"),
    "attn.v_proj": ("attention.wv", "self_attn.v_proj"),
    "attn.output_proj": ("attention.wo", "self_attn.o_proj"),
    "mlp.w1": ("feed_forward.w1", "mlp.gate_proj"),
    "mlp.w3": ("feed_forward.w3", "mlp.up_proj"),
    "mlp.w2": ("feed_forward.w2", "mlp.down_proj"),
}
LINEARS = tuple(LAYOUTS)
META = {name: meta for name, (meta, _) in LAYOUTS.items()}
HUGGING_FACE = {name: hf for name, (_, hf) in LAYOUTS.items()}

# linears that read the residual stream → the norm in front of them; linears that write into it
READS = {
    "attn.q_proj": "sa_norm",
    "attn.k_proj": "sa_norm",
    "attn.v_proj": "sa_norm",
    "mlp.w1": "mlp_norm",
    "mlp.w3": "mlp_norm",
}
WRITES = ("attn.output_proj", "mlp.w2")
# linears that read the same input, in the order a block computes them
SAME_INPUT = (("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("attn.output_proj",), ("mlp.w1", "mlp.w3"), ("mlp.w2",))

EMBEDDING, HEAD, FINAL_NORM = "tok_embeddings.weight", "output.weight", "norm.scale"
# a block's norms: torchtune → Meta; Qwen3's norms of queries and keys as ExecuTorch calls them
META_NORMS = {
    "sa_norm.scale": "attention_norm.weight",
    "mlp_norm.scale": "ffn_norm.weight",
    "attn.q_norm.scale": "attention.q_norm_fn.weight",
    "attn.k_norm.scale": "attention.k_norm_fn.weight",
}
_TORCHTUNE = {meta: ours for ours, meta in (META | META_NORMS).items()}


def split(name: str) -> tuple[int, str]:
    """Return (layer, name within the layer) of a parameter or module called `layers.N.…`."""
    _, layer, tail = name.split(".", 2)
    return int(layer), tail


def meta_name(name: str) -> str:
    """Return Meta's name of a block linear: `layers.3.mlp.w1` → `layers.3.feed_forward.w1`."""
    layer, tail = split(name)
    return f"layers.{layer}.{META[tail]}"


def meta_key(name: str) -> str:
    """Return Meta's name of a parameter: `layers.3.attn.q_proj.bias` → `layers.3.attention.wq.bias`."""
    if not name.startswith("layers."):
        return "norm.weight" if name == FINAL_NORM else name
    layer, tail = split(name)
    linear, _, kind = tail.rpartition(".")
    return f"layers.{layer}.{META_NORMS.get(tail) or f'{META[linear]}.{kind}'}"


def torchtune_key(key: str) -> str:
    """Undo `meta_key`; a key that is none of Meta's comes back as it is."""
    if not key.startswith("layers."):
        return FINAL_NORM if key == "norm.weight" else key
    layer, tail = split(key)
    linear, _, kind = tail.rpartition(".")
    ours = _TORCHTUNE.get(tail) or (f"{_TORCHTUNE[linear]}.{kind}" if linear in _TORCHTUNE else tail)
    return f"layers.{layer}.{ours}"


def hugging_face_name(name: str) -> str:
    """Return Hugging Face's name of a block linear: `layers.3.mlp.w1` → `layers.3.mlp.gate_proj`."""
    layer, tail = split(name)
    return f"layers.{layer}.{HUGGING_FACE[tail]}"
