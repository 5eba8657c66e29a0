"""Measure size, speed and memory at the real shapes: exported models with the shape of Llama 3.2 1B or 3B.

    python tests/benchmarks/device_table.py --shape 1B --folder /big/disk            (15 minutes of export a file, once)
    python tests/benchmarks/device_table.py --shape 3B --models qat_lora spinquant --folder /big/disk

Weights are random: size and speed do not depend on them. ExecuTorch's exporter makes every .pte from a checkpoint in
Meta's layout as llamaq writes it, and the BF16 one by the command of ExecuTorch's README for Llama 3.2. `q4_0` is what
a llama.cpp user would run: int4 in groups of 32 with fp16 scales, and the tied embedding as Q6_K (`pip install
'.[bench]'`). Prints a table with ratios to the first model; --json keeps every single measurement.
"""

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaq import torchao_compat  # noqa: F401
from llamaq.checkpoints.meta import feed_forward_width, model_params
from llamaq.checkpoints.quantized import quantized_state_dict
from llamaq.checkpoints.tensors import save_pth
from llamaq.config import ExportConfig, load
from llamaq.export.benchmark import benchmark, markdown
from llamaq.export.exporter import export_pte
from llamaq.model.build import meta_decoder
from llamaq.quant.prepare import add_adapters, freeze, prepare
from llamaq.quant.scheme import Scheme
from llamaq.runs.files import write_json

OPTIONS = ExportConfig(max_seq_length=512, max_context_length=2048)  # as in recipes/configs/llama3_2
METADATA = {"get_bos_id": 128000, "get_eos_ids": [128001]}
MODELS = ("bf16", "fp32", "ptq", "qat_lora", "spinquant", "q4_0")


def random_like(name: str, t: Tensor, generator: torch.Generator) -> Tensor:
    """Return random values as the checkpoint's tensor of this name has them.

    No two tensors are equal, since the exporter would store them once.
    """
    if t.dtype == torch.int8:
        low = -8 if name.startswith("layers.") else -128
        return torch.randint(low, -low, t.shape, dtype=torch.int8, generator=generator)
    if name.endswith(".scales"):
        step = 0.004 if name.startswith("layers.") else 0.0002
        return (step * (0.75 + 0.5 * torch.rand(t.shape, generator=generator))).bfloat16().float()
    if "norm" in name:
        return torch.ones(t.shape, dtype=t.dtype)
    return (torch.randn(t.shape, generator=generator) * 0.02).to(t.dtype)


def write_checkpoint(folder: Path, shape: str, kind: str) -> None:
    """Write a random checkpoint in Meta's layout: ptq, qat_lora (adapters), spinquant (R4), bf16 or fp32."""
    model = load(f"llama3_2/{shape}_qat_lora_dpo").model
    if kind in ("bf16", "fp32"):
        params, tensors = float_checkpoint(model)
    else:
        params, tensors = quantized_checkpoint(model, kind)
    generator = torch.Generator().manual_seed(0)
    filled = {name: random_like(name, t, generator) for name, t in tensors.items()}
    if "output.weight" not in filled:
        filled["output.weight"] = filled["tok_embeddings.weight"]
    for key in ("weight", "scales"):  # one matrix, written twice
        if f"tok_embeddings.{key}" in filled:
            filled[f"output.{key}"] = filled[f"tok_embeddings.{key}"]
    folder.mkdir(parents=True, exist_ok=True)
    save_pth(folder / "consolidated.00.pth", filled)
    write_json(folder / "params.json", params)


def float_checkpoint(model: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return params.json and tensors of a BF16 checkpoint, on the meta device."""
    from torchtune.models.convert_weights import tune_to_meta

    params = model_params(prepare(meta_decoder(model), Scheme()))
    return params, tune_to_meta({k: v.bfloat16() for k, v in meta_decoder(model).state_dict().items()})


def quantized_checkpoint(model: dict[str, Any], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return params.json and tensors of a quantized checkpoint, on the meta device."""
    decoder = prepare(meta_decoder(model), Scheme())
    params = model_params(decoder)
    quantization = {"scheme": Scheme().name, "group_size": 32, "spinquant": kind == "spinquant"}
    params["quantization_args"] = quantization
    if kind == "spinquant":
        quantization["rotation"] = {"r1": False, "r2": False, "r4": feed_forward_width(params)}
    if kind == "qat_lora":
        params["lora_args"] = {"rank": 16, "scale": 2.0}
        add_adapters(decoder, 16, 32.0)
    return params, quantized_state_dict(freeze(decoder))


def export(folder: Path, shape: str, kind: str) -> None:
    """Export one .pte, or write one .gguf.

    Another process writes the checkpoint, so that its memory does not count as the exporter's.
    """
    start = time.process_time()
    if kind == "q4_0":
        write_gguf(folder / f"{shape}_{kind}.gguf", shape)
        return
    checkpoint, partial = folder / f"{shape}_{kind}", folder / f"{shape}_{kind}.partial.pte"
    writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(checkpoint, shape, kind))
    writer.start()
    writer.join()
    if writer.exitcode:
        sys.exit(f"{checkpoint} could not be written")
    export_pte(checkpoint, partial, OPTIONS, METADATA, dtype="bf16" if kind == "bf16" else "fp32")
    partial.rename(folder / f"{shape}_{kind}.pte")
    (checkpoint / "consolidated.00.pth").unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{shape} {kind}: exported in {time.process_time() - start:.0f} CPU seconds, peak {peak:.2f} GiB", flush=True)


def write_gguf(path: Path, shape: str) -> None:
    """Write random weights in llama.cpp's Q4_0, without a vocabulary."""
    import gguf
    import numpy as np

    model = load(f"llama3_2/{shape}_qat_lora_dpo").model
    p = model_params(prepare(meta_decoder(model), Scheme()))
    dim, hidden, kv = p["dim"], feed_forward_width(p), p["dim"] // p["n_heads"] * p["n_kv_heads"]
    writer = gguf.GGUFWriter(path.with_suffix(".partial"), "llama")
    write_gguf_header(writer, p)
    generator = np.random.default_rng(0)

    def add_matrix(name: str, rows: int, columns: int, kind: Any, scale_at: int) -> None:
        block, size = gguf.GGML_QUANT_SIZES[kind]  # weights and bytes in a block
        data = generator.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        scale = np.array([0.004 if size < 100 else 1e-5], dtype=np.float16).view(np.uint8)
        data[..., scale_at : scale_at + 2] = scale
        writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=kind)

    add_matrix("token_embd.weight", p["vocab_size"], dim, gguf.GGMLQuantizationType.Q6_K, 208)
    writer.add_tensor("output_norm.weight", np.ones(dim, np.float32))
    linears = {
        "attn_q": (dim, dim),
        "attn_k": (kv, dim),
        "attn_v": (kv, dim),
        "attn_output": (dim, dim),
        "ffn_gate": (hidden, dim),
        "ffn_up": (hidden, dim),
        "ffn_down": (dim, hidden),
    }
    for i in range(p["n_layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(dim, np.float32))
        for name, (rows, columns) in linears.items():
            add_matrix(f"blk.{i}.{name}.weight", rows, columns, gguf.GGMLQuantizationType.Q4_0, 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".partial").rename(path)


def write_gguf_header(writer: Any, p: dict[str, Any]) -> None:
    """Write the model's sizes, given Meta's params.json."""
    import gguf

    writer.add_context_length(OPTIONS.max_context_length)
    writer.add_embedding_length(p["dim"])
    writer.add_block_count(p["n_layers"])
    writer.add_feed_forward_length(feed_forward_width(p))
    writer.add_head_count(p["n_heads"])
    writer.add_head_count_kv(p["n_kv_heads"])
    writer.add_layer_norm_rms_eps(p["norm_eps"])
    writer.add_rope_freq_base(p["rope_theta"])
    writer.add_vocab_size(p["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)


def main() -> None:
    """Export the models that are not in the folder yet, measure all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1B", choices=["1B", "3B"])
    parser.add_argument("--models", nargs="+", default=["bf16", "ptq", "qat_lora", "spinquant", "q4_0"], choices=MODELS)
    parser.add_argument("--folder", type=Path, required=True, help="where exported files are kept and looked for")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--export-only", metavar="MODEL", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.export_only:
        export(a.folder, a.shape, a.export_only)
        return
    a.folder.mkdir(parents=True, exist_ok=True)
    files = [a.folder / f"{a.shape}_{m}.{'gguf' if m == 'q4_0' else 'pte'}" for m in a.models]
    for name, file in zip(a.models, files, strict=True):
        if not file.exists():  # in a process of its own, so that its memory is given back
            command = [sys.executable, __file__, "--export-only", name, "--shape", a.shape, "--folder", str(a.folder)]
            subprocess.run(command, check=True)
    result = benchmark(files, a.prompt_tokens, a.new_tokens, a.runs, a.rounds, a.threads)
    s = result["settings"]
    lengths = f"context {OPTIONS.max_context_length}, up to {OPTIONS.max_seq_length} tokens a call"
    work = f"{s['threads']} threads, prompt {s['prompt_tokens']}, {s['new_tokens']} new tokens"
    print(f"\nLlama 3.2 {a.shape}, random weights, {lengths}; {result['device']}, {work}\n")
    print(markdown(result))
    if a.json:
        a.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
