"""Learning rotations by the noise that quantization will make, the default objective.

Why not the published way: with straight-through gradients and detached scales its gradient holds only the rounding
residuals of one batch. What a rotation is for, smaller ranges and so less noise, is a second-order effect that such a
gradient cannot see; its matrices hardly leave where they start. Here the effect is the objective,

    Σ over linears, rows o, groups g:   F_o · s²_og / 12 · tr((Rᵀ H R)_gg)          weights
  + Σ over what linears read:           E_t[s_t²] / 12 · Σ_o F_o ‖W_o‖²              activations

s the step (a smooth maximum over a group's weights or a token's channels, over the levels), H the second moments of
the input and F the Fisher information of the output, both from one pass over calibration text (`calibrate`). No forward
pass of the model is in the loop; embedding and head count with their int8 rows.

Where it comes from. Rounding moves a weight by an error that is uniform within a step s: mean 0, variance s² / 12. The
errors δ of row o add Σ_n δ_n x_n to the output y_o, with variance Σ_n s²_n / 12 · E[x_n²]: per group the step's square
times the sum of the inputs' squares, tr(H_gg). An error in the input, of variance s_t² / 12 in every channel, adds
s_t² / 12 · ‖W_o‖² to the same output. An error of variance v in y_o raises the loss by ½ F_o v, since the Fisher
information is the loss's curvature; the ½ is the same everywhere and left out.

For example, the group (1, 0, 0, 0) times a Hadamard matrix of order 4 over 2 is (½, ½, ½, ½). The largest weight
halves, so the step halves, and the noise falls to a quarter.

R = R₀ (I + A)⁻¹(I − A) with A skew-symmetric (`cayley`) is exactly orthogonal; Adam moves A.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from llamaq.model.names import EMBEDDING, HEAD, READS
from llamaq.model.online import merged_with_online
from llamaq.model.shape import Shape
from llamaq.quant.scheme import Scheme
from llamaq.spinquant.calibrate import LayerStatistics, Statistics
from llamaq.spinquant.cayley import CayleyRotations, Learned
from llamaq.spinquant.loops import Progress, cosine_schedule, no_bar
from llamaq.spinquant.rotations import Rotations, rotate_value_readers, rotate_values

SMOOTH = 8  # ‖·‖₈ stands for the maximum: it has a gradient in every entry, and is at most n^⅛ too large


def step_squares(w: Tensor, group: int, levels: float) -> Tensor:
    """Return the squared quantization steps of w [rows, n], smooth: [rows, n / group]."""
    unit = w.detach().abs().mean().clamp_min(1e-12)  # eighth powers stay in range
    ranges = torch.linalg.vector_norm((w / unit).unflatten(-1, (-1, group)), ord=SMOOTH, dim=-1)  # [rows, n / group]
    return (ranges * unit / levels).square()


def activation_step_squares(x: Tensor) -> Tensor:
    """Return the mean squared step of tokens x [t, n]: 255 steps over twice the largest magnitude.

    The true range is from the smallest to the largest value, which twice the largest magnitude bounds.
    """
    return step_squares(2 * x, x.shape[-1], 255.0).mean()


class ExpectedNoise:
    """The objective, layer by layer. Weights may stay where they are; one layer's at a time go to the device."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        shape: Shape,
        statistics: Statistics,
        scheme: Scheme,
        rows: int | None,
        seed: int,
        device: Any,
    ):
        """Take what the noise depends on, apart from the rotations.

        Args:
            weights: float, torchtune names; with fused norms if R1 is to be learned, else the model's own.
            shape: the model's sizes.
            statistics: of the calibration text.
            scheme: the numerics.
            rows: how many rows of each matrix to look at in a step, drawn anew each time; None for all.
            seed: of these draws.
            device: where to compute.
        """
        self.weights, self.shape, self.statistics, self.device = weights, shape, statistics, device
        self.group, self.rows = scheme.group_size, rows
        # the largest magnitude over the step: 7.5 for int4, 127.5 for int8
        self.levels = {"int4": 2 ** (scheme.linear.bits - 1) - 0.5, "int8": 2 ** (scheme.rows.bits - 1) - 0.5}
        self.generator = torch.Generator(device).manual_seed(seed)

    def backward(self, r: Rotations) -> float:
        """Add the gradient to the matrices of `r`, which are leaves, and return the expected noise.

        One layer's graph exists at a time.
        """
        value = 0.0
        for i in range(self.shape.layers + 1):
            loss = self.layer(i, r) if i < self.shape.layers else self.ends(r)
            if loss.requires_grad:
                loss.backward()
            value += loss.item()
        return value

    def layer(self, i: int, r: Rotations) -> Tensor:
        """Return the expected noise of layer i, a scalar to be differentiated in `r`."""
        r2 = None if r.r2 is None else r.r2[i]  # [kv_heads, d, d]
        return self._sum(self._readers(i, r.r1, r2)) + self._sum(self._writers(i, r, r2))

    def ends(self, r: Rotations) -> Tensor:
        """Return the expected noise of embedding and head: int8 rows, and the head's int8 input. 0 without R1."""
        if r.r1 is None:
            return torch.zeros((), device=self.device)
        st, levels, dim = self.statistics, self.levels["int8"], self.shape.dim
        # a token's embedding is one int8 row, and each of its dim errors goes into the residual stream as it is
        rows = self._rows_of(EMBEDDING, st.tokens) @ r.r1  # [SAMPLES, dim]: rows as often as their token occurs
        embedding = st.embedding_fisher * dim * step_squares(rows, dim, levels).mean() / 12
        # Σ_o F_o f(W_o) over the vocabulary is estimated from rows drawn in proportion to F_o: ΣF · mean of f
        drawn = torch.multinomial(st.head_fisher, len(st.tokens), replacement=True, generator=self.generator)
        rows = self._rows_of(HEAD, drawn) @ r.r1
        read = st.head_x.square().sum(1).mean()  # E ‖x‖²: a row is one group, whose tr(Rᵀ H R) no rotation changes
        head = st.head_fisher.sum() * step_squares(rows, dim, levels).mean() * read / 12
        cost = st.head_fisher.sum() * rows.detach().square().sum(1).mean()
        return embedding + head + activation_step_squares(st.head_x @ r.r1) * cost / 12

    def _sum(self, terms: Iterable[Tensor]) -> Tensor:
        total = torch.zeros((), device=self.device)
        for term in terms:
            total = total + term
        return total

    def _readers(self, i: int, r1: Tensor | None, r2: Tensor | None) -> Iterator[Tensor]:
        """Yield the noise of the linears that read the residual stream, W R1, and of their inputs, x R1."""
        stats = self.statistics.layers[i]
        for norm, moments, samples in (
            ("sa_norm", stats.attn_in, stats.attn_x),  # q, k and v
            ("mlp_norm", stats.mlp_in, stats.mlp_x),  # w1 and w3
        ):
            squares = self._input_squares(moments, f"layers.{i}.{norm}.scale", r1)  # [dim]
            cost = 0.0  # Σ_o F_o ‖W_o‖² of all linears that read this input; no rotation changes it
            for name in (linear for linear, before in READS.items() if before == norm):
                if name == "attn.v_proj":
                    w, fisher, value_cost = self._values(i, stats, r2)
                    cost, more = cost + value_cost, 1.0
                elif r1 is None:
                    continue  # neither its weights nor its input change
                else:
                    w, fisher = self._weight(f"layers.{i}.{name}.weight"), stats.fisher[name]  # [out, dim], [out]
                    cost += (fisher * w.square().sum(1)).sum().item()
                    drawn, more = self._draw(len(w))
                    w, fisher = w[drawn], fisher[drawn]
                yield more * self._noise(w if r1 is None else w @ r1, fisher, squares)
            if r1 is not None:
                yield activation_step_squares(samples @ r1) * cost / 12

    def _values(self, i: int, stats: LayerStatistics, r2: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """Return v_proj's R2ᵀ W [kv_heads · d, dim], the Fisher information of its outputs, and Σ_o F_o ‖W_o‖².

        R2 mixes a head's outputs, so their Fisher information is a matrix: Σ_o F_o ‖W_o‖² is tr(Wᵀ F W), and of the
        rotated outputs the diagonal of R2ᵀ F R2 counts.
        """
        w = self._weight(f"layers.{i}.attn.v_proj.weight")
        fisher = stats.fisher["attn.v_proj"]  # [kv_heads, d, d]
        by_head = w.view(self.shape.kv_heads, self.shape.head_dim, -1)  # [kv_heads, d, dim]
        cost = torch.einsum("hij,hin,hjn->", fisher, by_head, by_head).item()
        if r2 is not None:
            w, fisher = rotate_values(w, r2), r2.mT @ fisher @ r2
        return w, fisher.diagonal(dim1=1, dim2=2).flatten(), cost

    def _writers(self, i: int, r: Rotations, r2: Tensor | None) -> Iterator[Tensor]:
        """Yield the noise of the linears that write into the residual stream, R1ᵀ W.

        R1 mixes their outputs, all of the stream, so the mean of their Fisher information stands for every row.
        """
        yield from self._output_proj(i, r.r1, r2)
        if r.r1 is None:
            return  # R4 is given: nothing in down_proj changes
        stats = self.statistics.layers[i]
        w, fisher = self._weight(f"layers.{i}.mlp.w2.weight"), stats.fisher["mlp.w2"].mean()
        w, more = self._written(w, r.r1)
        w = merged_with_online(w, r.r4) if r.r4 else w
        yield more * self._noise(w, fisher.expand(len(w)), stats.down_in)

    def _output_proj(self, i: int, r1: Tensor | None, r2: Tensor | None) -> Iterator[Tensor]:
        """Yield the noise of output_proj, R1ᵀ W R2, and of its input, the values x R2."""
        stats, heads, head_dim = self.statistics.layers[i], self.shape.heads, self.shape.head_dim
        w, fisher = self._weight(f"layers.{i}.attn.output_proj.weight"), stats.fisher["attn.output_proj"].mean()
        cost = fisher * w.square().sum()
        w, more = self._written(w, r1)
        if r2 is None:
            squares = stats.values_in.diagonal(dim1=1, dim2=2).flatten()  # [heads · d]
            yield more * self._noise(w, fisher.expand(len(w)), squares)
            return
        w = rotate_value_readers(w, r2, heads)
        each = r2.repeat_interleave(heads // self.shape.kv_heads, 0)  # [heads, d, d]: of each query head
        squares = ((stats.values_in @ each) * each).sum(1).flatten()  # diagonal of R2ᵀ H R2, [heads · d]
        values = torch.einsum("thd,hde->the", stats.values_x.view(-1, heads, head_dim), each).flatten(1)
        yield more * self._noise(w, fisher.expand(len(w)), squares)
        yield activation_step_squares(values) * cost / 12

    def _written(self, w: Tensor, r1: Tensor | None) -> tuple[Tensor, float]:
        """Return drawn rows [r, in] of R1ᵀ W, and how many times more rows there are."""
        drawn, more = self._draw(len(w))
        return (w[drawn] if r1 is None else r1.T[drawn] @ w), more

    def _input_squares(self, moments: Tensor, gain: str, r1: Tensor | None) -> Tensor:
        """Return E[x'²] [dim] of what linears read behind a norm, from the moments [dim, dim] of x / rms(x)."""
        if r1 is not None:
            return ((moments @ r1) * r1).sum(0)  # diagonal of R1ᵀ H R1
        return moments.diagonal() * self._weight(gain).square()  # not fused: the norm's gain multiplies the input

    def _noise(self, w: Tensor, fisher: Tensor, squares: Tensor) -> Tensor:
        """Return Σ F_o s²_og / 12 · Σ_g x² of rows w [r, n], their outputs' Fisher [r] and the inputs' squares [n]."""
        steps = step_squares(w, self.group, self.levels["int4"])  # [r, n / group]
        return (fisher[:, None] * steps * squares.unflatten(0, (-1, self.group)).sum(-1)).sum() / 12

    def _draw(self, n: int) -> tuple[Tensor | slice, float]:
        """Return which of n rows to look at, and how many times more there are."""
        if self.rows is None or n <= self.rows:
            return slice(None), 1.0
        return torch.randint(n, (self.rows,), generator=self.generator, device=self.device), n / self.rows

    def _weight(self, name: str) -> Tensor:
        return self.weights[name].to(self.device, torch.float32)

    def _rows_of(self, name: str, rows: Tensor) -> Tensor:
        w = self.weights[name]
        return w[rows.to(w.device)].to(self.device, torch.float32)


def learn_by_noise(
    objective: ExpectedNoise, start: Rotations, steps: int, lr: float, progress: Progress = no_bar
) -> Learned:
    """Minimize the expected noise by Adam on the Cayley parameters, cosine schedule; losses relative to the first."""
    learner = CayleyRotations(start, objective.device)
    optimizer = torch.optim.Adam(learner.groups(lr), betas=(0.9, 0.95))
    schedule = cosine_schedule(optimizer, steps)
    losses, first = [], None
    for _ in progress(range(steps)):
        r = learner()
        # gradients of the matrices are added up layer by layer, then sent through Cayley once
        leaves = r.map(lambda m: m.detach().requires_grad_())
        value = objective.backward(leaves)
        first = value if first is None else first
        losses.append(value / first)
        optimizer.zero_grad()
        grads = [m.grad / first for m in leaves.matrices.values() if m.grad is not None]
        torch.autograd.backward(list(r.matrices.values()), grads)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return Learned(learner().projected(), losses)
