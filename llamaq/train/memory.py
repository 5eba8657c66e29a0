"""What a run needs, said before it starts: memory of each stage and disk for the folder."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llamaq.config import Component, Config, TrainingConfig, deepspeed_settings
from llamaq.errors import UserError
from llamaq.pipeline import world_size
from llamaq.train.engine import uses_deepspeed
from llamaq.train.model import HEAD_CHUNK_TOKENS, meta_decoder, pick_device

GIB = 2**30


@dataclass
class Shape:
    """Counts of a decoder: all weights, those of block linears, the embedding's, and the sizes that set activations."""

    weights: int
    linears: int
    embedding: int
    layers: int
    dim: int
    hidden: int
    vocab: int
    adapters_per_rank: int


def shape_of(model: Component) -> Shape:
    """Sizes of a model, from a build on the meta device: no memory."""
    decoder: Any = meta_decoder(model)
    linears = [m for n, m in decoder.named_modules() if isinstance(m, nn.Linear) and n.startswith("layers.")]
    layer = decoder.layers[0]
    return Shape(
        weights=sum(p.numel() for p in decoder.parameters()),
        linears=sum(m.weight.numel() for m in linears),
        embedding=decoder.tok_embeddings.weight.numel(),
        layers=len(decoder.layers),
        dim=layer.attn.embed_dim,
        hidden=layer.mlp.w1.out_features,
        vocab=decoder.tok_embeddings.num_embeddings,
        adapters_per_rank=sum(m.in_features + m.out_features for m in linears),
    )


def stage_bytes(shape: Shape, training: TrainingConfig, c: Config, seq_len: int, kind: str) -> dict[str, float]:
    """Bytes one rank holds at a stage's peak, by what for. An estimate: allocator and bucket overhead is not in it.

    Args:
        shape: the model's counts.
        training: the stage's settings.
        c: the run's.
        seq_len: tokens of the longest sample.
        kind: qat, qat_lora or qat_dpo.
    """
    adapters = shape.adapters_per_rank * c.adapters.rank
    trained = {"qat": shape.weights, "qat_lora": adapters, "qat_dpo": shape.weights + adapters}[kind]
    tokens = training.batch_size * seq_len * (2 if kind == "qat_dpo" else 1)
    x = 2 if c.dtype == "bf16" else 4  # bytes of an activation that a matmul reads
    # per token and layer: 4-byte residual stream and norms, each linear's fake-quantized input, attention, SwiGLU
    per_layer = tokens * (4 * 4 * shape.dim + x * (8 * shape.dim + 4 * shape.hidden))
    requantized = shape.linears * x + shape.embedding * 4  # what each matmul keeps of its weight for the backward pass
    if c.activation_checkpointing:
        activations = shape.layers * tokens * 4 * shape.dim + per_layer
        requantized = requantized / shape.layers + shape.embedding * 4
    else:
        activations = shape.layers * per_layer
    frozen = kind == "qat_lora"
    codes = (shape.linears + shape.embedding) * 1.0 if frozen else 0.0
    weights, gradients, optimizer = sharded(trained * 4.0, c)
    return {
        "weights": codes + weights,
        "gradients and optimizer": gradients + optimizer,
        "quantized copies": requantized,
        "communication buffers": buffers(c),
        "activations": activations + 3 * 4.0 * min(tokens, HEAD_CHUNK_TOKENS) * shape.vocab,
    }


def buffers(c: Config) -> float:
    """Bytes of the buckets that DeepSpeed gathers gradients in before it adds them up."""
    if not uses_deepspeed(c):
        return 0.0
    zero = deepspeed_settings(c).get("zero_optimization", {})
    return (
        4.0 * zero.get("reduce_bucket_size", 5e8) * (2 if zero.get("overlap_comm") else 1) if zero.get("stage") else 0.0
    )


def sharded(weights: float, c: Config) -> tuple[float, float, float]:
    """Bytes of float32 weights, of their gradients, and of Adam's two moments, as one rank holds them on its device.

    ZeRO works on a second, sharded copy of the weights, which is counted with the moments.
    """
    if not uses_deepspeed(c):
        return weights, weights, 2 * weights
    zero, ranks = deepspeed_settings(c).get("zero_optimization", {}), world_size()
    stage = zero.get("stage", 0)
    offloaded = [name for name in ("offload_optimizer", "offload_param") if zero.get(name, {}).get("device") == "cpu"]
    optimizer = 3 * weights / ranks if stage else 2 * weights
    return (
        0.0 if "offload_param" in offloaded else weights / ranks if stage == 3 else weights,
        weights / ranks if stage >= 2 else weights,
        0.0 if "offload_optimizer" in offloaded else optimizer,
    )


def disk_bytes(shape: Shape, c: Config) -> float:
    """Bytes of a whole run's folder: latent weights twice, codes, the .pte, and the checkpoints of one stage."""
    keep = max((t.keep_checkpoints for t in (c.qat, c.qat_lora, c.qat_dpo) if t), default=-1) + 1
    latent = shape.weights * 4.0
    return latent * (4 if c.evaluate.control else 2) + shape.weights * 2.5 + keep * shape.weights * 12.0


def spinquant_bytes(shape: Shape, c: Config, seq_len: int) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes SpinQuant holds on the device and in host memory at its peaks, by what for; an estimate, as above."""
    s = c.rotations
    tokens = s.batch_size * seq_len
    moments = 4.0 * shape.layers * (2 * shape.dim**2 + shape.dim**2)  # two sites; values' blocks are at most one more
    batch = 4.0 * (tokens * (shape.layers * shape.dim + 8 * shape.dim + 4 * shape.hidden))
    logits = 3 * 4.0 * min(tokens, HEAD_CHUNK_TOKENS) * shape.vocab
    model = 4.0 * (shape.weights + shape.embedding)  # the head is its own matrix once rotated
    windows = 4.0 * shape.dim * seq_len * sum(p.num_samples for p in s.calibration)
    step = 4.0 * 10 * shape.dim**2  # R1, its gradient, Adam's moments and what Cayley's solve keeps
    device = {"model": model, "second moments": moments, "one batch": batch + logits, "one Cayley step": step}
    host = {"model, original and rotated": 2 * model, "layers' inputs": 2 * windows}
    return device, host


def state_plan(c: Config, seq_len: int) -> str:
    """The plan as a table, after a check that the disk will do.

    Raises:
        UserError: less free disk than the run's folder will take.
    """
    shape, device = shape_of(c.model), pick_device(c.device)
    available = _memory(device)
    remedy = "lower batch_size, set activation_checkpointing=true" + " or deepspeed.config=zero3" * uses_deepspeed(c)
    each = f" on each of {world_size()} ranks" if world_size() > 1 else ""
    rows = [f"model: {shape.weights / 1e6:,.1f} M parameters, {shape.layers} layers, vocabulary {shape.vocab:,}"]

    def row(kind: str, parts: dict[str, float], there: float, where: str, remedy: str) -> None:
        total = sum(parts.values())
        detail = ", ".join(f"{k} {v / GIB:.2f}" for k, v in parts.items())
        warning = f"   MORE THAN THERE IS: {remedy}" if total > there else ""
        rows.append(f"{kind:>9}: about {total / GIB:6.2f} GiB of {there / GIB:.1f} on {where} ({detail}){warning}")

    for kind in ("qat", "qat_lora", "qat_dpo"):
        if (training := getattr(c, kind)) is not None:
            row(kind, stage_bytes(shape, training, c, seq_len, kind), available, f"{device}{each}", remedy)
    if c.spinquant is not None:
        on_device, on_host = spinquant_bytes(shape, c, seq_len)
        remedy = "lower spinquant.batch_size, or the windows' tokenizer.max_seq_len"
        if device.type == "cpu":
            row("spinquant", on_device | on_host, available, "cpu", remedy)
        else:
            row("spinquant", on_device, available, str(device), remedy)
            row("its host", on_host, _memory(torch.device("cpu")), "the host", "lower num_samples")
    need, free = disk_bytes(shape, c), shutil.disk_usage(_existing(Path(c.output_dir))).free
    rows.append(f"     disk: about {need / GIB:6.2f} GiB of {free / GIB:.1f} free for {c.output_dir}")
    if need > free:
        raise UserError(
            f"output_dir={c.output_dir} needs about {need / GIB:.1f} GiB, {free / GIB:.1f} are free; use another disk"
        )
    return "\n".join(rows)


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
