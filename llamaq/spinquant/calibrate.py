"""One pass over the calibration text: second moments of what each linear reads, and how much errors in what it writes
would cost (Fisher information of the model's own predictions, one sampled label a token).

Forward and backward go layer by layer: beside the model and the layers' inputs of one batch, only one layer's
activations exist at a time.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamaq.spinquant.hadamard import online_block, online_transform
from llamaq.spinquant.rotations import READS, WRITES, Shape

LINEARS = (*READS, *WRITES)
SAMPLES = 512  # tokens kept as they are, for the range of rotated activations
HEAD_CHUNK = 1024  # positions whose logits exist at a time


@dataclass
class LayerStatistics:
    """Means over tokens, float32. Inputs are those of a model whose norms are fused: x / rms(x)."""

    attn_in: Tensor  # E[x xᵀ] [dim, dim], read by q, k and v
    mlp_in: Tensor  # E[x xᵀ] [dim, dim], read by w1 and w3
    values_in: Tensor  # E[x xᵀ] [heads, d, d], read by output_proj, head by head
    down_in: Tensor  # E[x²] [hidden], read by w2 behind R4
    fisher: dict[str, Tensor]  # E[(∂L/∂y)²] [out] of each linear's output; of v_proj E[g gᵀ] [kv_heads, d, d]
    attn_x: Tensor  # samples of the same inputs, [SAMPLES, dim]
    mlp_x: Tensor
    values_x: Tensor  # [SAMPLES, heads · d]


@dataclass
class Statistics:
    """Of all layers, and of the two ends of the model."""

    layers: list[LayerStatistics]
    tokens: Tensor  # [SAMPLES] ids as they occur: which embedding rows matter
    embedding_fisher: float  # E[(∂L/∂e)²], a channel's mean
    head_fisher: Tensor  # E[(∂L/∂logit)²] [vocab]
    head_x: Tensor  # samples of what the head reads, [SAMPLES, dim]


def to_tensors(s: Statistics) -> dict[str, Tensor]:
    """As named tensors, to be written; `from_tensors` takes them back."""
    flat = {"tokens": s.tokens, "head_fisher": s.head_fisher, "head_x": s.head_x}
    flat["embedding_fisher"] = torch.tensor(s.embedding_fisher, dtype=torch.float64)
    for i, layer in enumerate(s.layers):
        for name, value in vars(layer).items():
            parts = {f".{k}": v for k, v in value.items()} if isinstance(value, dict) else {"": value}
            flat |= {f"{i}.{name}{k}": v for k, v in parts.items()}
    return {k: v.cpu().contiguous() for k, v in flat.items()}


def from_tensors(flat: dict[str, Tensor], device: Any) -> Statistics:
    """Statistics as `to_tensors` wrote them."""
    layers: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        i, _, name = key.partition(".")
        if not i.isdigit():
            continue
        name, _, linear = name.partition(".")
        into = layers.setdefault(int(i), {"fisher": {}})
        if linear:
            into[name][linear] = value.to(device)
        else:
            into[name] = value.to(device)
    return Statistics(
        [LayerStatistics(**layers[i]) for i in sorted(layers)],
        flat["tokens"].to(device),
        flat["embedding_fisher"].item(),
        flat["head_fisher"].to(device),
        flat["head_x"].to(device),
    )


@dataclass
class _Sums:
    """Running sums of one layer."""

    shape: Shape
    moments: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, list[Tensor]] = field(default_factory=lambda: {"attn": [], "mlp": [], "values": []})

    def add(self, key: str, value: Tensor) -> None:
        self.moments[key] = self.moments[key] + value if key in self.moments else value

    def read(self, linear: str, x: Tensor, keep: Tensor) -> None:
        s = self.shape
        x = x.detach().flatten(0, -2).float()
        if linear == "attn.output_proj":
            by_head = x.view(len(x), s.heads, s.head_dim)
            self.add("values", torch.einsum("thi,thj->hij", by_head, by_head))
            self.samples["values"].append(x[keep])
        elif linear == "mlp.w2":
            self.add("down", online_transform(x, online_block(s.hidden)).square().sum(0))
        else:
            site = linear.partition(".")[0]
            self.add(site, x.T @ x)
            self.samples[site].append(x[keep])

    def write(self, linear: str, grad: Tensor) -> None:
        g = grad.flatten(0, -2).float()
        if linear == "attn.v_proj":
            by_head = g.view(len(g), self.shape.kv_heads, self.shape.head_dim)
            self.add(f"fisher.{linear}", torch.einsum("thi,thj->hij", by_head, by_head))
        else:
            self.add(f"fisher.{linear}", g.square().sum(0))

    def means(self, count: int) -> LayerStatistics:
        m = {k: v / count for k, v in self.moments.items()}
        x = {k: torch.cat(v)[:SAMPLES] for k, v in self.samples.items()}
        fisher = {linear: m[f"fisher.{linear}"] for linear in LINEARS}
        return LayerStatistics(m["attn"], m["mlp"], m["values"], m["down"], fisher, x["attn"], x["mlp"], x["values"])


def collect(
    decoder: Any, shape: Shape, batches: list[Tensor], seed: int = 0,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = lambda x: x,
) -> Statistics:  # fmt: skip
    """Statistics of a float decoder with fused norms and an untied head (`rotations.fuse_norms`), eval mode.

    Args:
        decoder: torchtune's names; on any device, batches follow it.
        shape: its sizes.
        batches: tokens [b, s], no padding.
        seed: of the sampled labels and tokens.
        progress: wraps the loop over batches.
    """
    device = decoder.tok_embeddings.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    sums = [_Sums(shape) for _ in range(shape.layers)]
    count = sum(b.numel() for b in batches)
    share = min(1.0, 1.5 * SAMPLES / count)
    ids, head_x = [], []
    head_fisher = torch.zeros(decoder.output.weight.shape[0], device=device)
    embedding_fisher = 0.0
    for batch in progress(batches):
        batch = batch.to(device)
        keep = torch.rand(batch.numel(), generator=generator, device=device) < share
        with torch.no_grad():
            x = [decoder.tok_embeddings(batch)]
            for layer in decoder.layers:
                x.append(layer(x[-1]))
        grad, read = _head_backward(decoder, x[-1], head_fisher, generator)
        ids.append(batch.flatten()[keep])
        head_x.append(read[keep])
        for i in reversed(range(shape.layers)):
            grad = _layer_backward(decoder.layers[i], x[i], grad, sums[i], keep)
            x.pop()
        embedding_fisher += grad.square().mean(-1).sum().item()
    return Statistics(
        [s.means(count) for s in sums],
        torch.cat(ids)[:SAMPLES],
        embedding_fisher / count,
        head_fisher / count,
        torch.cat(head_x)[:SAMPLES],
    )


def _head_backward(decoder: Any, x: Tensor, fisher: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """∂L/∂x [b, s, dim] of the last layer's output for sampled labels, and what the head read [b · s, dim]."""
    x = x.detach().requires_grad_()
    h = decoder.norm(x).flatten(0, -2)  # [t, dim]
    leaf = h.detach()
    grad = torch.zeros_like(leaf)
    w = decoder.output.weight.detach()
    for start in range(0, len(leaf), HEAD_CHUNK):
        rows = slice(start, start + HEAD_CHUNK)
        p = F.linear(leaf[rows], w).float().softmax(-1)
        labels = torch.multinomial(p, 1, generator=generator)
        p.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=p.dtype))  # ∂(−log p_label)/∂logits
        fisher += p.square().sum(0)
        grad[rows] = p.to(w.dtype) @ w
    h.backward(grad)
    assert x.grad is not None
    return x.grad, leaf.float()


def _layer_backward(layer: Any, x: Tensor, grad: Tensor, sums: _Sums, keep: Tensor) -> Tensor:
    """Recompute one layer with hooks on its linears; returns ∂L/∂x."""
    handles = []
    for name in LINEARS:
        module = layer.get_submodule(name)
        read_already = name in ("attn.k_proj", "attn.v_proj", "mlp.w3")

        def forward(m: Any, inputs: tuple[Tensor], y: Tensor, name: str = name, skip: bool = read_already) -> None:
            if not skip:
                sums.read(name, inputs[0], keep)
            y.register_hook(lambda g: sums.write(name, g))

        handles.append(module.register_forward_hook(forward))
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        layer(x).backward(grad)
    for handle in handles:
        handle.remove()
    assert x.grad is not None
    return x.grad
