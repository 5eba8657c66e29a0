"""Learning rotations by running the rotated model: as published, and refining them by KL from the float model.

    learn_as_published    next-token cross-entropy with int8 inputs of the linears, by Cayley SGD (the paper's way)
    refine                KL from the float model with everything quantized as it will run, by Adam on Cayley parameters

Both take gradients straight through the rounding. `expected_noise` says why that is not the default.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from llamaq.model.compare import kl_divergence
from llamaq.model.names import EMBEDDING, HEAD, LINEARS
from llamaq.model.online import attach_online
from llamaq.model.shape import Shape
from llamaq.quant.scheme import Scheme, fake_quantize, fake_quantize_activation
from llamaq.spinquant.cayley import CayleyRotations, Learned, sgdg_step
from llamaq.spinquant.loops import Progress, cosine, cosine_schedule, no_bar
from llamaq.spinquant.rotations import Rotations, rotate

_LINEAR_WEIGHTS = tuple(f"{name}.weight" for name in LINEARS)


class EndToEnd:
    """The logits of the rotated model as a function of the rotations, straight-through rounding in the loop."""

    def __init__(self, decoder: Any, weights: Mapping[str, Tensor], shape: Shape, r4: int, scheme: Scheme | None):
        """Attach R4 and the rounding of inputs to a decoder.

        Args:
            decoder: float, torchtune names, with a head of its own; hooks are added to it.
            weights: the decoder's, not rotated, on its device.
            shape: its sizes.
            r4: the width of the online transform, 0 for none.
            scheme: everything is quantized as it will run. None is the published recipe: weights stay as they are, and
                only the inputs of the blocks' linears are int8, output_proj's by head; the head's input is not.
        """
        self.decoder, self.weights, self.shape, self.scheme = decoder, dict(weights), shape, scheme
        decoder.requires_grad_(False)
        self.handles = attach_online(decoder, r4)
        for layer in decoder.layers:
            for name in LINEARS:
                by_head = scheme is None and name == "attn.output_proj"
                hook = _int8_input(shape.head_dim if by_head else None)
                self.handles.append(layer.get_submodule(name).register_forward_pre_hook(hook))
        if scheme is not None:
            self.handles.append(decoder.output.register_forward_pre_hook(_int8_input(None)))

    def logits(self, r: Rotations, tokens: Tensor) -> Tensor:
        """Return the logits of the rotated model: [b, s] → [b, s, vocab]."""
        return functional_call(self.decoder, self.rotated(r), (tokens,))

    def rotated(self, r: Rotations) -> dict[str, Tensor]:
        """Return the weights as the forward pass sees them: rotated and, with a scheme, fake-quantized."""
        weights = rotate(self.weights, self.shape, r)
        if self.scheme is None:
            return weights
        for name, w in weights.items():
            if name in (EMBEDDING, HEAD):
                weights[name] = fake_quantize(w, self.scheme.rows)
            elif name.endswith(_LINEAR_WEIGHTS):
                weights[name] = fake_quantize(w, self.scheme.linear)
        return weights

    def close(self) -> None:
        """Take all hooks off the decoder."""
        for handle in self.handles:
            handle.remove()


def _int8_input(width: int | None) -> Any:
    """Return a hook that rounds a linear's input to int8, by token, or by runs of `width` channels of a token."""

    def hook(module: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
        x = arguments[0]
        if width is None:
            return (fake_quantize_activation(x),)
        return (fake_quantize_activation(x.unflatten(-1, (-1, width))).flatten(-2),)

    return hook


def learn_as_published(
    model: EndToEnd, start: Rotations, batches: list[Tensor], steps: int, lr: float, progress: Progress = no_bar
) -> Learned:
    """Minimize next-token cross-entropy by Cayley SGD; the learning rate falls to 0 along a cosine.

    Published: 100 steps of 8 sequences of 2048 tokens, lr 1.5, the joint gradient clipped to norm 1.

    Args:
        model: with scheme None.
        start: signed Hadamard matrices.
        batches: tokens [b, s]; step i takes batches[i % len].
        steps: how many.
        lr: of the first.
        progress: wraps the loop.
    """
    device = model.decoder.tok_embeddings.weight.device
    r = start.map(lambda m: m.float().to(device).requires_grad_())
    losses = []
    for step in progress(range(steps)):
        tokens = batches[step % len(batches)].to(device)
        logits = model.logits(r, tokens)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        grads = torch.autograd.grad(loss, list(r.matrices.values()))
        losses.append(loss.item())
        norm = torch.stack([g.norm() for g in grads]).norm()
        clip = min(1.0, 1.0 / (norm.item() + 1e-6))
        now = lr * cosine(step, steps)
        moved = {
            name: sgdg_step(m.detach(), g * clip, now).requires_grad_()
            for (name, m), g in zip(r.matrices.items(), grads, strict=True)
        }
        r = replace(r, **moved)
    return Learned(r.map(Tensor.detach).projected(), losses)


def refine(
    model: EndToEnd,
    teacher: Callable[[Tensor], Tensor],
    start: Rotations,
    batches: list[Tensor],
    steps: int,
    lr: float,
    progress: Progress = no_bar,
) -> Learned:
    """Minimize KL from the float model, weights and activations quantized in the loop, by Adam on Cayley parameters.

    Args:
        model: with the scheme.
        teacher: tokens [b, s] → the float model's logits.
        start: rotations learned before.
        batches: tokens [b, s]; step i takes batches[i % len].
        steps: how many.
        lr: of Adam, cosine to 0.
        progress: wraps the loop.
    """
    device = model.decoder.tok_embeddings.weight.device
    learner = CayleyRotations(start, device)
    optimizer = torch.optim.Adam(learner.groups(lr))
    schedule = cosine_schedule(optimizer, steps)
    losses = []
    for step in progress(range(steps)):
        tokens = batches[step % len(batches)].to(device)
        target = teacher(tokens).float().log_softmax(-1)  # [b, s, vocab]
        logprobs = model.logits(learner(), tokens).float().log_softmax(-1)
        loss = kl_divergence(target, logprobs).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        return Learned(learner().projected(), losses)
