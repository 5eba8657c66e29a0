"""What a run needs, said before it starts: memory of each stage, of the export and of a phone, and disk."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from llamaq.config import Config, TrainingConfig, deepspeed_settings
from llamaq.data.batches import num_micro_batches
from llamaq.errors import UserError
from llamaq.model.build import pick_device
from llamaq.model.compare import HEAD_CHUNK_TOKENS
from llamaq.model.shape import Shape, shape_of
from llamaq.plan.disk import GIB, disk_of
from llamaq.runs.files import size_of
from llamaq.runs.ranks import from_rank_zero, world_size
from llamaq.train.deepspeed import uses_deepspeed


def stage_bytes(shape: Shape, training: TrainingConfig, c: Config, seq_len: int, kind: str) -> dict[str, float]:
    """Return the bytes one rank holds at a stage's peak, by what for; allocator overhead is not in it.

    The peak is in the backward pass, either of the head (logits, and all activations still there) or of the first
    block after it. tests/plan/test_memory.py holds the sum against the memory of a real process.

    Args:
        shape: the model's sizes.
        training: the stage's settings.
        c: the run's.
        seq_len: tokens of the longest sample.
        kind: qat, qat_lora or qat_dpo.
    """
    latent, adapted, bf16 = kind != "qat_lora", kind != "qat", c.dtype == "bf16"
    trained = shape.weights * latent + shape.adapters_per_rank * c.adapters.rank * adapted
    weights, gradients, optimizer = sharded(trained * 4.0, c)
    codes = 0.0 if latent else (shape.linears + shape.ends) * 1.0
    teacher = shape.weights * 4.0 if training.distill_weight else 0.0
    tokens = training.batch_size * seq_len * (2 if kind == "qat_dpo" else 1)

    block, passing = block_bytes(shape, tokens, latent, adapted, bf16)
    quantized = shape.linears * (2.0 if bf16 else 4.0)  # what each matmul keeps of its weight
    if c.activation_checkpointing:  # only the blocks' inputs are kept, and one block is computed again at a time
        inputs = shape.layers * tokens * 4.0 * shape.dim
        at_head, at_block = (inputs, 0.0), (inputs + block + passing, quantized / shape.layers)
    else:
        kept = shape.layers * block
        at_head, at_block = (kept, quantized), (kept + passing, quantized)

    rows = min(tokens, HEAD_CHUNK_TOKENS)
    logits = rows * shape.vocab * (14.0 if bf16 else 12.0)  # themselves, log-probabilities, gradients
    head = shape.embedding * ((6.0 if bf16 else 4.0) + 4.0 * (latent and tokens > rows))  # the last: chunks add up
    accumulates = num_micro_batches(training, world_size()) > 1
    grown = (
        1.0 if c.activation_checkpointing else shape.embedding / trained * latent
    )  # share of gradients that is there

    def peak(gradient_share: float, copies: float, activations: float, logits: float) -> dict[str, float]:
        return {
            "weights": codes + weights + teacher,
            "communication buffers": buffers(c),
            "gradients and optimizer": optimizer + gradients * gradient_share,
            "quantized copies": copies,
            "activations": activations,
            "logits": logits,
        }

    in_head = peak(float(accumulates), at_head[1] + head, at_head[0], logits)
    in_block = peak(1.0 if accumulates else grown, at_block[1], at_block[0], 0.0)
    return max(in_head, in_block, key=lambda parts: sum(parts.values()))


def block_bytes(shape: Shape, tokens: int, latent: bool, adapted: bool, bf16: bool) -> tuple[float, float]:
    """Return the bytes a block keeps for its backward pass, and those of gradients on their way through it.

    Counted with torch's `saved_tensors_hooks`. Of each token a block keeps

        of width dim, float32             what its two norms keep: 4 values if the weights are latent, else 2
        of width dim, as matmuls read     q, k, v and attention's output: 4; inputs fake-quantized for latent weights,
                                          whose gradient needs them: 5; adapters' inputs: 2, or 5 in bf16 (copies)
        of width hidden, as matmuls read  3 of the MLP, one more if latent, one more with adapters

    1B (dim 2048, hidden 8192) in qat, bf16: 4 · 4 · 2048 + 2 · (9 · 2048 + 4 · 8192) = 135 kB a token and block.
    """
    x = 2 if bf16 else 4  # bytes of what a matmul reads
    norms = 4 if latent else 2
    reads = 4 + 5 * latent + (5 if bf16 else 2) * adapted
    wide = 3 + latent + adapted
    kept = tokens * (4.0 * norms * shape.dim + x * (reads * shape.dim + wide * shape.hidden))
    return kept, tokens * 4.0 * (2 * shape.dim + 2 * shape.hidden)


def buffers(c: Config) -> float:
    """Return the bytes of the buckets in which DeepSpeed gathers gradients before it adds them up."""
    if not uses_deepspeed(c):
        return 0.0
    zero = deepspeed_settings(c).get("zero_optimization", {})
    return (
        4.0 * zero.get("reduce_bucket_size", 5e8) * (2 if zero.get("overlap_comm") else 1) if zero.get("stage") else 0.0
    )


def sharded(weights: float, c: Config) -> tuple[float, float, float]:
    """Return the bytes of float32 weights, their gradients and Adam's two moments that one rank holds on its device.

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


def spinquant_bytes(shape: Shape, c: Config, seq_len: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the bytes SpinQuant holds at its peaks on the device and in host memory, by what for; an estimate."""
    s = c.section("spinquant")
    tokens = s.batch_size * seq_len
    moments = 4.0 * shape.layers * (2 * shape.dim**2 + shape.dim**2)  # two sites; values' blocks are at most one more
    batch = 4.0 * (tokens * (shape.layers * shape.dim + 8 * shape.dim + 4 * shape.hidden))
    logits = 3 * 4.0 * min(tokens, HEAD_CHUNK_TOKENS) * shape.vocab
    model = 4.0 * (shape.weights + shape.embedding * shape.tied)  # the head is its own matrix once rotated
    windows = 4.0 * shape.dim * seq_len * sum(p.num_samples for p in s.calibration)
    step = 4.0 * 10 * shape.dim**2  # R1, its gradient, Adam's moments and what Cayley's solve keeps
    device = {"model": model, "second moments": moments, "one batch": batch + logits, "one Cayley step": step}
    host = {"model, original and rotated": 2 * model, "layers' inputs": 2 * windows}
    return device, host


def evaluate_bytes(shape: Shape, c: Config) -> dict[str, float]:
    """Return the bytes held while one model and those it is compared with read held-out text, float32."""
    models = 2 + (c.evaluate.control and c.spinquant is None)
    return {
        "models": 4.0 * models * shape.weights,
        "quantized heads": 4.0 * models * shape.embedding,
        "logits": 4 * 4.0 * HEAD_CHUNK_TOKENS * shape.vocab,
    }


def export_bytes(shape: Shape, c: Config) -> dict[str, float]:
    """Return the bytes the host holds while ExecuTorch exports a model; fitted to exports of 30 M to 1 B weights.

    A weight of a block lies there almost six times at the peak: its codes as a byte each in checkpoint, model and two
    traced programs, and packed in delegates, program and file. A layer's graphs take as much however wide they are.
    """
    return {
        "libraries": 0.45 * GIB,
        "linears": 5.7 * shape.linears,
        "graphs": 37e6 * shape.layers,
        "embedding and head": 4.3 * shape.embedding,
    }


def phone_bytes(shape: Shape, c: Config, adapters: bool) -> dict[str, float]:
    """Return the resident bytes of a process that runs the exported file, at its peak and by what for.

    Activations are float32. XNNPACK copies what it multiplies with, so that only the embedding stays a part of the
    mapped file. KV cache and activations (ExecuTorch's planned memory, XNNPACK's workspace) have the export's lengths,
    not the prompt's.
    Counts of buffers were read off files of both kinds and are measured in tests/plan/test_memory.py.

    Args:
        shape: the model's counts.
        c: the run's settings; export's lengths and options count.
        adapters: whether the file has any.
    """
    e = c.export
    tokens = min(e.max_seq_length, e.max_context_length - 1) if e.dynamic_shape else 1
    scales = 2.0 * shape.linears / c.scheme.group_size
    head = float(shape.embedding)
    cached = shape.kv_dim + 5.0 * shape.kv_heads if e.quantize_kv_cache else 4.0 * shape.kv_dim
    planned = 4.0 * tokens * (shape.dim + (5 if adapters else 3) * shape.hidden + shape.vocab * e.full_logits)
    workspace = 4.0 * tokens * (4 if adapters else 1) * shape.hidden
    return {
        "packed weights": shape.linears / 2 + scales + head,
        "adapters": 4.0 * shape.adapters_per_rank * c.adapters.rank * adapters,
        "embedding": float(shape.embedding),
        "KV cache": 2.0 * shape.layers * e.max_context_length * cached,
        "planned activations": planned,
        # at the end of loading the head is there twice, packed and mapped; the workspace comes after that
        "XNNPACK": max(workspace, head),
        "code": 8.0 * 2**20,
    }


def plan_length(c: Config) -> int:
    """Return the tokens of the longest sample."""
    return c.tokenizer.get("max_seq_len") or c.export.max_context_length


@dataclass
class Requirement:
    """A line of the plan: how many bytes something needs at a place, by what for."""

    what: str
    where: str
    parts: dict[str, float]
    available: float | None = None  # None where it cannot be known from here
    remedy: str = ""

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        detail = ", ".join(f"{k} {v / GIB:.2f}" for k, v in self.parts.items() if v)
        there = f" of {self.available / GIB:.1f}" if self.available else ""
        short = self.available is not None and self.bytes > self.available
        warning = f"   MORE THAN THERE IS: {self.remedy}" if short else ""
        return f"{self.what:>10}: about {self.bytes / GIB:6.2f} GiB{there} on {self.where} ({detail}){warning}"


def memory_plan(c: Config, seq_len: int) -> list[Requirement]:
    """Return what each stage needs of a rank, evaluation and export of their machine, and the file of a phone."""
    shape, device = shape_of(c.model), pick_device(c.device)
    available, host = _memory(device), _memory(torch.device("cpu"))
    remedy = "lower batch_size, set activation_checkpointing=true" + " or deepspeed.config=zero3" * uses_deepspeed(c)
    each = f" on each of {world_size()} ranks" if world_size() > 1 else ""
    plan = [
        Requirement(kind, f"{device}{each}", stage_bytes(shape, training, c, seq_len, kind), available, remedy)
        for kind in ("qat", "qat_lora", "qat_dpo")
        if (training := getattr(c, kind)) is not None
    ]
    if c.spinquant is not None:
        on_device, on_host = spinquant_bytes(shape, c, seq_len)
        remedy = "lower spinquant.batch_size, or the windows' tokenizer.max_seq_len"
        if device.type == "cpu":
            plan.append(Requirement("spinquant", "cpu", on_device | on_host, available, remedy))
        else:
            plan.append(Requirement("spinquant", str(device), on_device, available, remedy))
            plan.append(Requirement("its host", "the host", on_host, host, "lower num_samples"))
    adapters = c.spinquant is None and c.export.stage != "qat"
    plan.append(Requirement("evaluate", str(device), evaluate_bytes(shape, c), available, "evaluate with device=cpu"))
    plan.append(Requirement("export", "the host", export_bytes(shape, c), host, "export on a larger machine"))
    plan.append(Requirement("model.pte", "the phone", phone_bytes(shape, c, adapters)))
    return plan


def state_plan(c: Config, seq_len: int) -> str:
    """Return the plan as a table, after a check that the disk has room.

    Raises:
        UserError: less free disk than the run's folder will take.
    """
    shape = shape_of(c.model)
    rows = [f"model: {shape.weights / 1e6:,.1f} M parameters, {shape.layers} layers, vocabulary {shape.vocab:,}"]
    rows += map(str, memory_plan(c, seq_len))
    return "\n".join([*rows, from_rank_zero(lambda: state_disk(shape, c))])


def state_disk(shape: Shape, c: Config) -> str:
    """Return the plan's line on the disk.

    Raises:
        UserError: less free disk than what is still to be written.
    """
    disk, free = disk_of(shape, c), shutil.disk_usage(_existing(Path(c.output_dir))).free
    if disk.needed > free:
        more, old = " more" * (disk.held > 0), size_of(disk.superseded)
        raise UserError(
            f"output_dir={c.output_dir} needs about {disk.needed / GIB:.1f} GiB{more}, {free / GIB:.1f} are free; "
            + f"delete {c.output_dir}/superseded ({old}), or " * (disk.superseded > 0)
            + "use another disk"
        )
    detail = f" ({disk})" if str(disk) else ""
    return f"{'disk':>10}: about {disk.needed / GIB:6.2f} GiB of {free / GIB:.1f} free for {c.output_dir}{detail}"


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
