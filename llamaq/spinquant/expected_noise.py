"""Learning rotations: by the noise that quantization will make (the default), or as published, by the loss of the
model with quantized activations.

Why not the published way: with straight-through gradients and detached scales its gradient holds only the rounding
residuals of one batch. What a rotation is for, smaller ranges and so less noise, is a second-order effect that such a
gradient cannot see; its matrices hardly leave where they start. Here the effect is the objective,

    Σ over linears, rows o, groups g:   F_o · s²_og / 12 · tr((Rᵀ H R)_gg)          weights
  + Σ over what linears read:           E_t[s_t²] / 12 · Σ_o F_o ‖W_o‖²              activations

s the step (a smooth maximum over a group's weights or a token's channels, over the levels), H the second moments of
the input and F the Fisher information of the output, both from one pass over calibration text (`statistics`). No
forward pass of the model is in the loop; embedding and head count with their int8 rows.

R = R₀ (I + A)⁻¹(I − A) with A skew-symmetric (Cayley) is exactly orthogonal; Adam moves A.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from llamaq.quant.scheme import Scheme, fake_quantize, fake_quantize_activation
from llamaq.spinquant.calibrate import Statistics
from llamaq.spinquant.hadamard import merged_with_online
from llamaq.spinquant.rotations import (
    EMBEDDING,
    HEAD,
    READS,
    WRITES,
    Rotations,
    Shape,
    attach_online,
    rotate,
    rotate_value_readers,
    rotate_values,
)

SMOOTH = 8  # ‖·‖₈ stands for the maximum
Progress = Callable[[Iterable[Any]], Iterable[Any]]


# --- Cayley ----------------------------------------------------------------------------------------------------------


def skew(a: Tensor) -> Tensor:
    """The skew-symmetric matrix of a free one's upper triangle. [..., n, n] → the same."""
    upper = a.triu(1)
    return upper - upper.mT


def cayley(a: Tensor) -> Tensor:
    """(I + A)⁻¹(I − A) of A = skew(a): a rotation, I at a = 0. [..., n, n] → the same."""
    s, eye = skew(a), torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(eye + s, eye - s)


class CayleyRotations:
    """Rotations as functions of what an optimizer moves."""

    def __init__(self, start: Rotations, device: Any):
        self.r4 = start.r4
        self.start = [None if r is None else r.double().to(device) for r in (start.r1, start.r2)]
        self.free = [
            None if r is None else torch.zeros_like(r, dtype=torch.float32, requires_grad=True) for r in self.start
        ]

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Adam moves every entry by about lr, so a matrix by lr · √n: larger ones take smaller steps."""
        return [{"params": [a], "lr": lr * min(1.0, math.sqrt(256 / a.shape[-1]))} for a in self.free if a is not None]

    def __call__(self) -> Rotations:
        """Float32, orthogonal to its rounding: the solve is in float64, which costs little beside what uses it."""
        r1, r2 = (
            None if a is None or r is None else (r @ cayley(a.double())).float()
            for r, a in zip(self.start, self.free, strict=True)
        )
        return Rotations(r1, r2, self.r4)


# --- expected noise --------------------------------------------------------------------------------------------------


def step_squares(w: Tensor, group: int, levels: float) -> Tensor:
    """Squared quantization steps of w [rows, n], smooth: [rows, n / group]."""
    unit = w.detach().abs().mean().clamp_min(1e-12)  # eighth powers stay in range
    ranges = torch.linalg.vector_norm((w / unit).unflatten(-1, (-1, group)), ord=SMOOTH, dim=-1)
    return (ranges * unit / levels).square()


def activation_step_squares(x: Tensor) -> Tensor:
    """Mean squared step of tokens x [t, n]: 255 steps over twice the largest magnitude."""
    return step_squares(2 * x, x.shape[-1], 255.0).mean()


class ExpectedNoise:
    """The objective, layer by layer. Weights may stay where they are; one layer's at a time go to the device."""

    def __init__(
        self, weights: Mapping[str, Tensor], shape: Shape, statistics: Statistics, scheme: Scheme, r1: bool,
        rows: int | None, seed: int, device: Any,
    ):  # fmt: skip
        """`weights` have fused norms if R1 is among the rotations, else they are the model's own.

        Args:
            weights: float, torchtune names.
            shape: the model's sizes.
            statistics: of the calibration text.
            scheme: the numerics.
            r1: whether R1 is among the rotations.
            rows: how many rows of each matrix to look at in a step, drawn anew each time; None for all.
            seed: of these draws.
            device: where to compute.
        """
        self.weights, self.shape, self.statistics, self.device = weights, shape, statistics, device
        self.group, self.rows, self.fused = scheme.group_size, rows, r1
        self.levels = {"int4": 2 ** (scheme.linear.bits - 1) - 0.5, "int8": 2 ** (scheme.rows.bits - 1) - 0.5}
        self.generator = torch.Generator(device).manual_seed(seed)

    def _weight(self, name: str) -> Tensor:
        return self.weights[name].to(self.device, torch.float32)

    def _draw(self, n: int) -> tuple[Tensor | slice, float]:
        """Rows to look at, and how many times more there are."""
        if self.rows is None or n <= self.rows:
            return slice(None), 1.0
        return torch.randint(n, (self.rows,), generator=self.generator, device=self.device), n / self.rows

    def _noise(self, w: Tensor, fisher: Tensor, moments: Tensor) -> Tensor:
        """Rows w [r, n], their outputs' Fisher [r], the inputs' squares [n]."""
        steps = step_squares(w, self.group, self.levels["int4"])
        return (fisher[:, None] * steps * moments.unflatten(0, (-1, self.group)).sum(-1)).sum() / 12

    def layer(self, i: int, r: Rotations) -> Tensor:
        """Expected noise of layer i, a scalar to be differentiated in `r`."""
        s, stats, prefix = self.shape, self.statistics.layers[i], f"layers.{i}."
        r2 = None if r.r2 is None else r.r2[i]
        total = torch.zeros((), device=self.device)
        for site, moments, samples in (("attn", stats.attn_in, stats.attn_x), ("mlp", stats.mlp_in, stats.mlp_x)):
            if r.r1 is not None:
                rotated = ((moments @ r.r1) * r.r1).sum(0)  # diagonal of R1ᵀ H R1
            else:
                gain = self._weight(f"{prefix}{'sa' if site == 'attn' else 'mlp'}_norm.scale")
                rotated = moments.diagonal() * gain.square()
            cost = 0.0
            for name in (n for n in READS if n.startswith(site)):
                w, fisher = self._weight(f"{prefix}{name}.weight"), stats.fisher[name]
                if name == "attn.v_proj":
                    by_head = w.view(s.kv_heads, s.head_dim, -1)
                    cost += torch.einsum("hij,hin,hjn->", fisher, by_head, by_head).item()
                    if r2 is not None:
                        w, fisher = rotate_values(w, r2), r2.mT @ fisher @ r2
                    fisher, drawn, more = fisher.diagonal(dim1=1, dim2=2).flatten(), slice(None), 1.0
                else:
                    if r.r1 is None:
                        continue  # nothing here moves
                    cost += (fisher * w.square().sum(1)).sum().item()
                    drawn, more = self._draw(len(w))
                w = w[drawn] if r.r1 is None else w[drawn] @ r.r1
                total = total + more * self._noise(w, fisher[drawn], rotated)
            if r.r1 is not None:
                total = total + activation_step_squares(samples @ r.r1) * cost / 12
        return total + self._writers(i, r, r2)

    def _writers(self, i: int, r: Rotations, r2: Tensor | None) -> Tensor:
        s, stats, prefix = self.shape, self.statistics.layers[i], f"layers.{i}."
        total = torch.zeros((), device=self.device)
        for name in WRITES:
            values = name == "attn.output_proj"
            if r.r1 is None and not values:
                continue
            w, fisher = self._weight(f"{prefix}{name}.weight"), stats.fisher[name].mean()  # rows are mixed: one for all
            cost, samples = fisher * w.square().sum(), stats.values_x
            drawn, more = self._draw(len(w))
            w = w[drawn] if r.r1 is None else r.r1.T[drawn] @ w
            if not values:
                w, moments = merged_with_online(w, r.r4) if r.r4 else w, stats.down_in
            elif r2 is None:
                moments = stats.values_in.diagonal(dim1=1, dim2=2).flatten()
            else:
                w, each = rotate_value_readers(w, r2, s.heads), r2.repeat_interleave(s.heads // s.kv_heads, 0)
                moments = ((stats.values_in @ each) * each).sum(1).flatten()
                samples = torch.einsum("thd,hde->the", samples.view(-1, s.heads, s.head_dim), each).flatten(1)
            total = total + more * self._noise(w, fisher.expand(len(w)), moments)
            if values and r2 is not None:
                total = total + activation_step_squares(samples) * cost / 12
        return total

    def ends(self, r: Rotations) -> Tensor:
        """Expected noise of embedding and head: int8 rows, and the head's int8 activations. Nothing without R1."""
        if r.r1 is None:
            return torch.zeros((), device=self.device)
        st, levels, dim = self.statistics, self.levels["int8"], self.shape.dim
        rows = self._weight_rows(EMBEDDING, st.tokens) @ r.r1
        embedding = st.embedding_fisher * dim * step_squares(rows, dim, levels).mean() / 12
        drawn = torch.multinomial(st.head_fisher, len(st.tokens), replacement=True, generator=self.generator)
        rows = self._weight_rows(HEAD, drawn) @ r.r1
        read = st.head_x.square().sum(1).mean()
        head = st.head_fisher.sum() * step_squares(rows, dim, levels).mean() * read / 12
        cost = st.head_fisher.sum() * rows.detach().square().sum(1).mean()
        return embedding + head + activation_step_squares(st.head_x @ r.r1) * cost / 12

    def _weight_rows(self, name: str, rows: Tensor) -> Tensor:
        w = self.weights[name]
        return w[rows.to(w.device)].to(self.device, torch.float32)


@dataclass
class Learned:
    """Rotations in float64, orthogonal to 1e-12, and the objective step by step."""

    rotations: Rotations
    losses: list[float]


def learn_by_noise(
    objective: ExpectedNoise, start: Rotations, steps: int, lr: float, progress: Progress = lambda x: x
) -> Learned:
    """Minimise the expected noise by Adam on the Cayley parameters, cosine schedule; losses relative to the first."""
    learner = CayleyRotations(start, objective.device)
    optimizer = torch.optim.Adam(learner.groups(lr), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 + 0.5 * math.cos(math.pi * t / steps))
    losses, first = [], None
    for _ in progress(range(steps)):
        r = learner()
        matrices = [m for m in (r.r1, r.r2) if m is not None]
        # one layer's graph at a time: gradients of the matrices are added up, then sent through Cayley once
        leaves = [m.detach().requires_grad_() for m in matrices]
        found = iter(leaves)
        leaf = replace(r, r1=None if r.r1 is None else next(found), r2=None if r.r2 is None else next(found))
        value = 0.0
        for i in range(objective.shape.layers + 1):
            loss = objective.layer(i, leaf) if i < objective.shape.layers else objective.ends(leaf)
            if loss.requires_grad:
                loss.backward()
            value += loss.item()
        first = value if first is None else first
        losses.append(value / first)
        optimizer.zero_grad()
        torch.autograd.backward(matrices, [m.grad / first for m in leaves if m.grad is not None])
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return Learned(learner().projected(), losses)


# --- by the model's loss ---------------------------------------------------------------------------------------------


def sgdg_step(r: Tensor, grad: Tensor, lr: float) -> Tensor:
    """One step of Cayley SGD on the orthogonal matrices (https://arxiv.org/abs/2002.01113, no momentum), as published:
    the step is at most 1 / ‖W‖₁, the Cayley transform five fixed-point iterations. [..., n, n] → the same.
    """
    x = r / r.norm(dim=-1, keepdim=True)
    v = -grad.mT  # [n, n]; the step is taken on the transpose
    w = v @ x - 0.5 * x.mT @ (x @ (v @ x))
    w = w - w.mT
    alpha = (1 / w.abs().sum(-2).amax(-1).clamp_min(1e-12)).clamp_max(lr)[..., None, None]
    y = x.mT + alpha * v
    for _ in range(5):
        y = x.mT + alpha * w @ (x.mT + y) / 2
    return y.mT


class EndToEnd:
    """The rotated model's loss as a function of the rotations, straight-through rounding in the loop."""

    def __init__(self, decoder: Any, weights: Mapping[str, Tensor], shape: Shape, r4: int, scheme: Scheme | None):
        """With scheme None weights stay as they are and only block linears' inputs are int8: the published recipe
        (output_proj's by head, the head's not at all). With a scheme, everything is as it will run.
        """
        self.decoder, self.weights, self.shape, self.scheme = decoder, dict(weights), shape, scheme
        decoder.requires_grad_(False)
        self.handles = attach_online(decoder, r4)
        for layer in decoder.layers:
            for name in (*READS, *WRITES):
                width = shape.head_dim if scheme is None and name == "attn.output_proj" else None
                self.handles.append(layer.get_submodule(name).register_forward_pre_hook(_int8_input(width)))
        if scheme is not None:
            self.handles.append(decoder.output.register_forward_pre_hook(_int8_input(None)))

    def logits(self, r: Rotations, tokens: Tensor) -> Tensor:
        """[b, s] → [b, s, vocab]."""
        return self.run(self.rotated(r), tokens)

    def rotated(self, r: Rotations) -> dict[str, Tensor]:
        """The weights as the forward pass sees them."""
        weights = rotate(self.weights, self.shape, r)
        if self.scheme is not None:
            for name in weights:
                if name in (EMBEDDING, HEAD):
                    weights[name] = fake_quantize(weights[name], self.scheme.rows)
                elif name.endswith(tuple(f"{n}.weight" for n in (*READS, *WRITES))):
                    weights[name] = fake_quantize(weights[name], self.scheme.linear)
        return weights

    def run(self, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return functional_call(self.decoder, weights, (tokens,))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _int8_input(width: int | None) -> Any:
    def hook(module: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
        x = arguments[0]
        return (fake_quantize_activation(x.unflatten(-1, (-1, width))).flatten(-2) if width else
                fake_quantize_activation(x),)  # fmt: skip

    return hook


def learn_as_published(
    model: EndToEnd, start: Rotations, batches: list[Tensor], steps: int, lr: float, progress: Progress = lambda x: x
) -> Learned:
    """Next-token cross-entropy by Cayley SGD: lr 1.5 falling to 0 by a cosine, the joint gradient clipped to norm 1.

    Args:
        model: with scheme None.
        start: signed Hadamard matrices.
        batches: tokens [b, s]; step i takes batches[i % len]. Published: 100 steps of 8 sequences of 2048.
        steps: how many.
        lr: of the first.
        progress: wraps the loop.
    """
    device = model.decoder.tok_embeddings.weight.device
    r = replace(start, r1=_leaf(start.r1, device), r2=_leaf(start.r2, device))
    losses = []
    for step in progress(range(steps)):
        matrices = [m for m in (r.r1, r.r2) if m is not None]
        tokens = batches[step % len(batches)].to(device)
        logits = model.logits(r, tokens)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        grads = torch.autograd.grad(loss, matrices)
        losses.append(loss.item())
        norm = torch.stack([g.norm() for g in grads]).norm()
        now = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        scale = min(1.0, 1.0 / (norm.item() + 1e-6))
        moved = iter(
            [sgdg_step(m.detach(), g * scale, now).requires_grad_() for m, g in zip(matrices, grads, strict=True)]
        )
        r = replace(r, r1=None if r.r1 is None else next(moved), r2=None if r.r2 is None else next(moved))
    return Learned(replace(r, r1=_plain(r.r1), r2=_plain(r.r2)).projected(), losses)


def refine(
    model: EndToEnd, teacher: Callable[[Tensor], Tensor], start: Rotations, batches: list[Tensor], steps: int,
    lr: float, progress: Progress = lambda x: x,
) -> Learned:  # fmt: skip
    """KL from the float model with weights and activations quantized in the loop, by Adam on the Cayley parameters.

    Args:
        model: with the scheme.
        teacher: tokens [b, s] → the float model's logits.
        start: rotations learned before.
        batches: tokens [b, s].
        steps: how many.
        lr: of Adam, cosine to 0.
        progress: wraps the loop.
    """
    device = model.decoder.tok_embeddings.weight.device
    learner = CayleyRotations(start, device)
    optimizer = torch.optim.Adam(learner.groups(lr))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 + 0.5 * math.cos(math.pi * t / steps))
    losses = []
    for step in progress(range(steps)):
        tokens = batches[step % len(batches)].to(device)
        loss = kl(teacher(tokens), model.logits(learner(), tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        return Learned(learner().projected(), losses)


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(target ‖ logits) in nats a token; both [..., vocab]."""
    p = target.float().log_softmax(-1)
    return (p.exp() * (p - logits.float().log_softmax(-1))).sum(-1).mean()


def _leaf(r: Tensor | None, device: Any) -> Tensor | None:
    return None if r is None else r.float().to(device).requires_grad_()


def _plain(r: Tensor | None) -> Tensor | None:
    return None if r is None else r.detach()
