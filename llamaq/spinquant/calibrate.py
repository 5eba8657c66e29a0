"""Calibration: what each linear reads, and how much errors in what it writes cost, from one pass over the text.

Two kinds of numbers, averaged over the tokens of the calibration text:

- Second moments of inputs, E[x xᵀ]: how large the inputs are in each direction, and so how much an error in a weight
  shows in the output.
- Fisher information of outputs, E[(∂L/∂y)²]: how much an error in an output costs. L is the negative log-likelihood of
  a label drawn from the model's own prediction, one for each token. With such labels the average squared gradient is
  the curvature of the KL from this very model, which quantization should keep small. (With the next token of the text
  as label it would not be.)

For example, over a vocabulary of two with p = (0.9, 0.1): the label is 0 with probability 0.9, and ∂L/∂logits is
p − onehot(label), (−0.1, 0.1) or (0.9, −0.9). The mean square is 0.9 · 0.01 + 0.1 · 0.81 = 0.09 in each logit, which is
p (1 − p), the second derivative of the KL.

Forward and backward go layer by layer: beside the model and the layers' inputs of one batch, only one layer's
activations exist at a time.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from llamaq.checkpoints.tensors import save_tensors
from llamaq.config import Component
from llamaq.model.build import StateDict, build_decoder
from llamaq.model.compare import chunks
from llamaq.model.names import LINEARS, SAME_INPUT
from llamaq.model.online import online_block, online_transform
from llamaq.model.shape import Shape, shape_of
from llamaq.spinquant.loops import Progress, no_bar
from llamaq.spinquant.rotations import fuse_norms

SAMPLES = 512  # tokens kept as they are, for the range of rotated activations
_FIRST_READERS = tuple(names[0] for names in SAME_INPUT)  # the others see the same input: once is enough
_FILE = "statistics.safetensors"


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
    """Statistics of all layers, and of the two ends of the model."""

    layers: list[LayerStatistics]
    tokens: Tensor  # [SAMPLES] ids as they occur: which embedding rows matter
    embedding_fisher: float  # E[(∂L/∂e)²], a channel's mean
    head_fisher: Tensor  # E[(∂L/∂logit)²] [vocab]
    head_x: Tensor  # samples of what the head reads, [SAMPLES, dim]


def save_statistics(folder: Path, s: Statistics) -> None:
    """Write statistics into a folder, as one file."""
    save_tensors(folder / _FILE, to_tensors(s))


def load_statistics(folder: Path, device: Any = "cpu") -> Statistics:
    """Read what `save_statistics` wrote."""
    return from_tensors(load_file(folder / _FILE), device)


def to_tensors(s: Statistics) -> dict[str, Tensor]:
    """Return statistics as named tensors on the CPU; `from_tensors` takes them back."""
    flat = {"tokens": s.tokens, "head_fisher": s.head_fisher, "head_x": s.head_x}
    flat["embedding_fisher"] = torch.tensor(s.embedding_fisher, dtype=torch.float64)
    for i, layer in enumerate(s.layers):
        for name, value in vars(layer).items():
            parts = {f".{k}": v for k, v in value.items()} if isinstance(value, dict) else {"": value}
            flat |= {f"{i}.{name}{k}": v for k, v in parts.items()}
    return {k: v.cpu().contiguous() for k, v in flat.items()}


def from_tensors(flat: dict[str, Tensor], device: Any) -> Statistics:
    """Return the statistics that `to_tensors` made tensors of, e.g. `0.attn_in` and `0.fisher.mlp.w1`."""
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
    """Running sums of one layer over tokens, and the samples kept."""

    shape: Shape
    sums: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, list[Tensor]] = field(default_factory=lambda: {"attn": [], "mlp": [], "values": []})

    def add(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def read(self, linear: str, x: Tensor, keep: Tensor) -> None:
        """Take note of what a linear reads, [b, s, in]; `keep` [b · s] tells which tokens to keep as samples."""
        x = x.detach().flatten(0, -2).float()  # [t, in]
        if linear == "attn.output_proj":  # R2 rotates within a head, so only moments within a head are needed
            by_head = x.view(len(x), self.shape.heads, self.shape.head_dim)
            self.add("values", torch.einsum("thi,thj->hij", by_head, by_head))
            self.samples["values"].append(x[keep])
        elif linear == "mlp.w2":  # R4 is given, so only the squares behind it are needed, not [hidden, hidden]
            self.add("down", online_transform(x, online_block(self.shape.hidden)).square().sum(0))
        else:
            site = linear.partition(".")[0]
            self.add(site, x.T @ x)
            self.samples[site].append(x[keep])

    def write(self, linear: str, grad: Tensor) -> None:
        """Take note of the gradient of what a linear writes, [b, s, out]."""
        g = grad.flatten(0, -2).float()  # [t, out]
        if linear == "attn.v_proj":  # R2 mixes a head's outputs, so all products within a head are needed
            by_head = g.view(len(g), self.shape.kv_heads, self.shape.head_dim)
            self.add(f"fisher.{linear}", torch.einsum("thi,thj->hij", by_head, by_head))
        else:
            self.add(f"fisher.{linear}", g.square().sum(0))

    def means(self, count: int) -> LayerStatistics:
        m = {k: v / count for k, v in self.sums.items()}
        x = {k: torch.cat(v)[:SAMPLES] for k, v in self.samples.items()}
        fisher = {linear: m[f"fisher.{linear}"] for linear in LINEARS}
        return LayerStatistics(m["attn"], m["mlp"], m["values"], m["down"], fisher, x["attn"], x["mlp"], x["values"])


def calibrate_model(
    model: Component, weights: StateDict, batches: list[Tensor], seed: int, device: Any, progress: Progress = no_bar
) -> Statistics:
    """Build the float model with its norms fused into the linears, and collect its statistics.

    Args:
        model: the `model` section of the config.
        weights: of the BF16 model, float32, torchtune names.
        batches: tokens [b, s], no padding.
        seed: of the sampled labels and tokens.
        device: where to compute.
        progress: wraps the loop over batches.
    """
    shape = shape_of(model)
    decoder = build_decoder(model, fuse_norms(weights, shape)).eval().requires_grad_(False).to(device)
    return collect(decoder, shape, batches, seed, progress)


def collect(
    decoder: Any, shape: Shape, batches: list[Tensor], seed: int = 0, progress: Progress = no_bar
) -> Statistics:
    """Collect the statistics of a float decoder with fused norms and an untied head (`rotations.fuse_norms`).

    Args:
        decoder: torchtune's names, in eval mode; on any device, batches follow it.
        shape: its sizes.
        batches: tokens [b, s], no padding.
        seed: of the sampled labels and tokens.
        progress: wraps the loop over batches.
    """
    device = decoder.tok_embeddings.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    sums = [_Sums(shape) for _ in range(shape.layers)]
    count = sum(b.numel() for b in batches)
    share = min(1.0, 1.5 * SAMPLES / count)  # keep a few more tokens than wanted: how many are drawn is random
    ids, head_x = [], []
    head_fisher = torch.zeros(decoder.output.weight.shape[0], device=device)
    embedding_fisher = 0.0
    for batch in progress(batches):
        batch = batch.to(device)
        keep = torch.rand(batch.numel(), generator=generator, device=device) < share  # [b · s]
        x = _layer_inputs(decoder, batch)  # [b, s, dim] each
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


@torch.no_grad()
def _layer_inputs(decoder: Any, tokens: Tensor) -> list[Tensor]:
    """Return what each layer reads, and last what the final norm reads; no graph is kept."""
    x = [decoder.tok_embeddings(tokens)]
    for layer in decoder.layers:
        x.append(layer(x[-1]))
    return x


def _head_backward(decoder: Any, x: Tensor, fisher: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw labels and return ∂L/∂x [b, s, dim] of the last layer's output, and what the head read [b · s, dim].

    The head's Fisher information is added to `fisher` [vocab]. Logits exist for one chunk of positions at a time.
    """
    x = x.detach().requires_grad_()
    h = decoder.norm(x).flatten(0, -2)  # [t, dim]
    leaf = h.detach()
    grad = torch.zeros_like(leaf)
    w = decoder.output.weight.detach()
    for rows in chunks(len(leaf)):
        p = F.linear(leaf[rows], w).float().softmax(-1)  # [n, vocab]
        labels = torch.multinomial(p, 1, generator=generator)
        p.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=p.dtype))  # now ∂(−log p_label)/∂logits
        fisher += p.square().sum(0)
        grad[rows] = p.to(w.dtype) @ w
    h.backward(grad)
    assert x.grad is not None
    return x.grad, leaf.float()


def _layer_backward(layer: Any, x: Tensor, grad: Tensor, sums: _Sums, keep: Tensor) -> Tensor:
    """Recompute one layer with hooks on its linears; return ∂L/∂x."""
    handles = []
    for name in LINEARS:

        def forward(module: Any, inputs: tuple[Tensor], y: Tensor, name: str = name) -> None:
            if name in _FIRST_READERS:
                sums.read(name, inputs[0], keep)
            y.register_hook(lambda g: sums.write(name, g))

        handles.append(layer.get_submodule(name).register_forward_hook(forward))
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        layer(x).backward(grad)
    for handle in handles:
        handle.remove()
    assert x.grad is not None
    return x.grad
