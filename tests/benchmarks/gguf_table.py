"""Measure how much of a quantized model llama.cpp's formats can hold, and how far its logits are from llamaq's.

    python tests/benchmarks/gguf_table.py --start /models/SmolLM2-135M-Instruct --text README.md --folder /tmp/gguf
    python tests/benchmarks/gguf_table.py --start FOLDER --checkpoint runs/x/convert/model --text FILE --folder DIR

Needs `pip install '.[bench]'`. Without --checkpoint the Hugging Face folder --start (Llama form, tied head) is rounded
to nearest. The codes are written as GGUF files that differ in the head only, and one more holds what llama.cpp makes of
the float weights by itself. Two tables: which numbers are exact, and the logits of one text against llamaq's. llama.cpp
reads Meta's order of q and k as it is.
"""

import argparse
import ctypes
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamaq import torchao_compat  # noqa: F401
from llamaq.checkpoints.load import load_checkpoint
from llamaq.checkpoints.meta import PARAMS, WEIGHTS, feed_forward_width, model_params, save_float
from llamaq.checkpoints.quantized import rotation_block, save_quantized
from llamaq.errors import UserError
from llamaq.export.exporter import load_eager
from llamaq.families import describe
from llamaq.model.build import build_model, meta_decoder
from llamaq.model.compare import agreement
from llamaq.quant.scheme import Scheme
from llamaq.runs.files import write_json

BLOCK = 32  # weights that share a scale in Q4_0 and Q8_0
NAMES = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
HEADS = ("F32", "F16", "BF16", "Q8_0")


def main() -> None:
    """Write the files, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="Hugging Face folder of the float model")
    parser.add_argument("--checkpoint", type=Path, help="folder with llamaq's codes, e.g. runs/x/convert/model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--folder", type=Path, required=True)
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    codes = a.checkpoint or rounded_to_nearest(a.start, a.folder / "codes")
    print(exactness(codes), flush=True)
    different = wrong_blocks(write_gguf(a.folder / "F32.gguf", codes, "F32"), codes)
    print(f"\nmatrices that the GGUF file with head F32 does not give back bit for bit: {different}", flush=True)
    tokens = tokens_of(a.start, a.text, a.tokens)
    print(f"\n{len(tokens)} tokens of {a.text.name}\n\n{logits_table(a.start, codes, a.folder, tokens)}")


# --- the model -------------------------------------------------------------------------------------------------------


def described(start: Path) -> dict[str, Any]:
    """Return the `model` section of a Hugging Face folder, with positions enough for the texts here."""
    model = describe(start).model
    assert model is not None, start
    return model | {"max_seq_len": 2048}


def rounded_to_nearest(start: Path, folder: Path) -> Path:
    """Write the codes of the model rounded to nearest (PTQ), and return the folder."""
    if not (folder / WEIGHTS).is_file():
        component = described(start)
        weights = load_checkpoint(start, meta_decoder(component))
        model = build_model(component, weights, Scheme(), frozen=True)
        save_quantized(folder, model.decoder, Scheme())
    return folder


def tokens_of(start: Path, text: Path, count: int) -> list[int]:
    """Return the first tokens of a text."""
    tokenizers: Any = importlib.import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(start / "tokenizer.json"))
    return tokenizer.encode(text.read_text(encoding="utf-8")).ids[:count]


def float_copy(codes: Path, folder: Path) -> Path:
    """Write the weights that codes and scales represent, adapters merged, as a float checkpoint; return its folder."""
    stored = torch.load(codes / WEIGHTS, weights_only=True)
    params = json.loads((codes / PARAMS).read_text())
    lora, tensors = params.pop("lora_args", None), {}
    params.pop("quantization_args")
    for name, t in stored.items():
        base = name.removesuffix(".weight")
        if f"{base}.scales" in stored and name.endswith(".weight"):
            scales = stored[f"{base}.scales"]
            tensors[name] = (t.float().view(*scales.shape, -1) * scales[..., None]).view(t.shape)
            if lora and f"{base}.adaptor.A.weight" in stored:
                a, b = (stored[f"{base}.adaptor.{x}.weight"].float() for x in "AB")
                tensors[name] += lora["scale"] * b @ a
        elif "norm" in name:
            tensors[name] = t.float()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / WEIGHTS)
    write_json(folder / PARAMS, params)
    return folder


# --- what is exact ---------------------------------------------------------------------------------------------------


def exactness(codes: Path) -> str:
    """Return a table: which numbers of the checkpoint llama.cpp's blocks hold exactly."""
    tensors = torch.load(codes / WEIGHTS, weights_only=True)
    groups = torch.cat([t.flatten() for n, t in tensors.items() if n.startswith("layers.") and n.endswith(".scales")])
    rows, head = tensors["output.scales"], tensors["output.weight"].float() * tensors["output.scales"]
    inexact, relative = difference(groups, groups.half())
    lines = ["| numbers | GGUF | not exact | largest relative error |", "| --- | --- | ---: | ---: |"]
    lines.append(
        f"| {groups.numel():,} group scales, {groups.min():.3g} to {groups.max():.3g} | Q4_0's f16 | "
        f"{inexact} | {relative:.2g} |"
    )
    inexact, relative = difference(rows, rows.half())
    lines.append(
        f"| {rows.numel():,} row scales, {rows.min():.3g} to {rows.max():.3g} | Q8_0's f16 | {inexact} | "
        f"{relative:.2g} |"
    )
    for name, kept in (("F16", head.half()), ("BF16", head.bfloat16()), ("F32", head)):
        inexact, relative = difference(head, kept)
        lines.append(f"| {head.numel():,} weights of the head | {name} | {inexact} | {relative:.2g} |")
    return "\n".join(lines)


def wrong_blocks(path: Path, codes: Path) -> int:
    """Count the matrices of a GGUF file that do not dequantize to codes times scales, bit for bit."""
    gguf: Any = importlib.import_module("gguf")
    stored, wrong = torch.load(codes / WEIGHTS, weights_only=True), 0
    names = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, c in stored.items():
        if c.dtype != torch.int8 or (name == "output.weight" and "output.weight" not in names):
            continue
        parts = name.removesuffix(".weight").split(".", 2)
        outside = {"tok_embeddings": "token_embd", "output": "output"}.get(parts[0])
        theirs = names[f"{outside or f'blk.{parts[1]}.{NAMES[parts[2]]}'}.weight"]
        scales = stored[name.replace(".weight", ".scales")]
        ours = (c.float().view(*scales.shape, -1) * scales[..., None]).view(c.shape)
        wrong += not np.array_equal(gguf.quants.dequantize(theirs.data, theirs.tensor_type), ours.numpy())
    return wrong


def difference(exact: Tensor, kept: Tensor) -> tuple[str, float]:
    """Return the share of numbers that changed, and the largest relative change."""
    changed = kept.float() != exact.float()
    relative = ((kept.float() - exact.float()).abs() / exact.float().abs().clamp(min=1e-30)).max()
    return f"{changed.float().mean().item():.1%}", float(relative)


# --- GGUF ------------------------------------------------------------------------------------------------------------


def q4_0(codes: Tensor, scales: Tensor) -> np.ndarray:
    """Pack int4 codes [out, in] and scales [out, in / 32] as Q4_0: an f16 scale, then weight i and i + 16 in a byte."""
    blocks = (codes.view(*scales.shape, BLOCK) + 8).to(torch.uint8)
    packed = blocks[..., :16] | blocks[..., 16:] << 4
    return with_scales(scales, packed)


def q8_0(codes: Tensor, scales: Tensor) -> np.ndarray:
    """Pack int8 codes [rows, dim] and scales [rows, 1] as Q8_0: the row's scale as f16 in each of its blocks."""
    blocks = codes.view(len(codes), -1, BLOCK)
    return with_scales(scales.expand(-1, blocks.shape[1]), blocks.view(torch.uint8))


def with_scales(scales: Tensor, packed: Tensor) -> np.ndarray:
    """Put the bytes of each f16 scale in front of its block's."""
    d = scales.contiguous().half()[..., None].view(torch.uint8)
    return torch.cat([d, packed], dim=-1).flatten(1).numpy()


def write_gguf(path: Path, codes: Path, head: str) -> Path:
    """Write the codes as Q4_0 with the embedding, which is the head too, in one of `HEADS`.

    Raises:
        UserError: llama.cpp has no operator or block for what the checkpoint holds.
    """
    gguf: Any = importlib.import_module("gguf")
    tensors = torch.load(codes / WEIGHTS, weights_only=True)
    params = json.loads((codes / PARAMS).read_text())
    q = params["quantization_args"]
    if rotation_block(params, feed_forward_width(params), str(codes)):
        raise UserError(f"{codes}: llama.cpp has no operator for the online rotation R4")
    if q["group_size"] != BLOCK or "lora_args" in params:
        raise UserError(f"{codes}: Q4_0 has blocks of 32 and adapters are files of their own; give a plain checkpoint")
    writer = gguf.GGUFWriter(path, "llama")
    header(writer, params)
    kinds = gguf.GGMLQuantizationType
    for name, ours in (("token_embd", "tok_embeddings"), ("output", "output")):
        if name == "output" and torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"]):
            continue
        c, s = tensors[f"{ours}.weight"], tensors[f"{ours}.scales"]
        if head == "Q8_0":
            writer.add_tensor(f"{name}.weight", q8_0(c, s), raw_dtype=kinds.Q8_0)
        else:
            add_float(writer, f"{name}.weight", c.float() * s, head)
    writer.add_tensor("output_norm.weight", tensors["norm.weight"].float().numpy())
    for name, t in tensors.items():
        if not name.startswith("layers.") or not name.endswith(".weight"):
            continue
        _, layer, part = name.removesuffix(".weight").split(".", 2)
        target = f"blk.{layer}.{NAMES[part]}.weight"
        if "norm" in part:
            writer.add_tensor(target, t.float().numpy())
        else:
            scales = tensors[name.replace(".weight", ".scales")]
            writer.add_tensor(target, q4_0(t, scales), raw_dtype=kinds.Q4_0)
    return finished(writer, path)


def write_own(path: Path, start: Path) -> Path:
    """Write what llama.cpp's own rule makes of the float weights: Q4_0 blocks, the embedding as Q8_0."""
    gguf: Any = importlib.import_module("gguf")
    component = described(start)
    decoder = meta_decoder(component)
    from torchtune.models.convert_weights import tune_to_meta

    weights = tune_to_meta(load_checkpoint(start, decoder))
    writer = gguf.GGUFWriter(path, "llama")
    header(writer, model_params(build_model(component, load_checkpoint(start, decoder), None).decoder))
    kinds = gguf.GGMLQuantizationType
    for name, t in weights.items():
        if name == "output.weight":
            continue
        parts = name.removesuffix(".weight").split(".", 2)
        own = {"tok_embeddings": "token_embd", "norm": "output_norm"}.get(parts[0])
        target = f"{own or f'blk.{parts[1]}.{NAMES[parts[2]]}'}.weight"
        if t.ndim == 1:
            writer.add_tensor(target, t.float().numpy())
            continue
        kind = kinds.Q8_0 if own else kinds.Q4_0
        writer.add_tensor(target, gguf.quants.quantize(t.float().numpy(), kind), raw_dtype=kind)
    return finished(writer, path)


def header(writer: Any, p: dict[str, Any]) -> None:
    """Write the model's sizes, given Meta's params.json."""
    writer.add_context_length(2048)
    writer.add_embedding_length(p["dim"])
    writer.add_block_count(p["n_layers"])
    writer.add_feed_forward_length(feed_forward_width(p))
    writer.add_head_count(p["n_heads"])
    writer.add_head_count_kv(p["n_kv_heads"])
    writer.add_rope_dimension_count(p["dim"] // p["n_heads"])
    writer.add_layer_norm_rms_eps(p["norm_eps"])
    writer.add_rope_freq_base(p["rope_theta"])
    writer.add_vocab_size(p["vocab_size"])
    writer.add_tokenizer_model("none")


def add_float(writer: Any, name: str, t: Tensor, kind: str) -> None:
    """Add a matrix in F32, F16 or BF16."""
    gguf: Any = importlib.import_module("gguf")
    if kind == "BF16":
        data = t.bfloat16().contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, (t.half() if kind == "F16" else t.float()).numpy())


def finished(writer: Any, path: Path) -> Path:
    """Write what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- logits ----------------------------------------------------------------------------------------------------------


def logits_table(start: Path, codes: Path, folder: Path, tokens: list[int]) -> str:
    """Compute every form's logits of one text, and compare them with llamaq's."""
    own = eager_logits(codes, tokens)
    forms = {"the same codes, activations not quantized": eager_logits(float_copy(codes, folder / "float"), tokens)}
    sizes = {}
    files = {
        f"llama.cpp: the same codes, head {head}": write_gguf(folder / f"{head}.gguf", codes, head) for head in HEADS
    }
    files["llama.cpp: Q4_0 and Q8_0 by its own rule"] = write_own(folder / "own.gguf", start)
    for name, path in files.items():
        forms[name], sizes[name] = llama_cpp_logits(path, tokens), path.stat().st_size
    component = described(start)
    weights = load_checkpoint(start, meta_decoder(component))
    model = build_model(component, weights, None)
    save_float(folder / "start", dict(model.decoder.state_dict()), model_params(model.decoder))
    bf16 = eager_logits(folder / "start", tokens)
    floats = forms["the same codes, activations not quantized"]
    heading = "| form | MiB | KL from llamaq's | top-1 | relative error | KL from float activations | KL from BF16 |"
    lines = [heading, f"| --- |{' ---: |' * 6}"]
    for name, logits in {"llamaq: codes, int8 activations by token": own, **forms}.items():
        same, near, far = (agreement(reference, logits) for reference in (own, floats, bf16))
        mib = f"{sizes[name] / 2**20:.1f}" if name in sizes else ""
        measured = f"{same['kl']:.2g} | {same['top1']:.3f} | {same['relative_error']:.2g} | {near['kl']:.2g}"
        lines.append(f"| {name} | {mib} | {measured} | {far['kl']:.3g} |")
    return "\n".join(lines)


@torch.no_grad()
def eager_logits(folder: Path, tokens: list[int]) -> Tensor:
    """Compute with ExecuTorch's eager model, which equals llamaq's."""
    return load_eager(folder, len(tokens))(torch.tensor([tokens]))[0].float()


def llama_cpp_logits(path: Path, tokens: list[int]) -> Tensor:
    """Compute the logits [n, vocab] of all tokens with llama.cpp on the CPU."""
    llama: Any = importlib.import_module("llama_cpp")
    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), settings)
    assert model, f"{path}: llama.cpp cannot load it"
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = max(256, len(tokens)), len(tokens), len(tokens)
    options.type_k = options.type_v = 0  # F32: the cache is not what is compared
    context = llama.llama_init_from_model(model, options)
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert llama.llama_decode(context, batch) == 0, path
    rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), shape=(vocab,)) for i in range(len(tokens))]
    logits = torch.from_numpy(np.stack(rows).copy())
    llama.llama_free(context)
    llama.llama_model_free(model)
    return logits


if __name__ == "__main__":
    main()
