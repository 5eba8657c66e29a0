"""The engine of the training loop: gradients in, updated weights out.

`Engine` is what the loop sees. `TorchEngine` is plain PyTorch, with the whole model and optimizer on every rank;
`llamaq.train.deepspeed` has the other one. Both keep weights, gradients and optimizer state in float32 and run matmuls
under autocast with dtype bf16: quantization parameters always come from float32 weights, and a run can change engine,
ZeRO stage and number of ranks between two steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llamaq.config import Config, TrainingConfig
from llamaq.config.components import instantiate
from llamaq.errors import UserError
from llamaq.model.build import ready_to_train
from llamaq.model.causal_lm import CausalLM
from llamaq.runs.ranks import rank, world_size
from llamaq.train.resume import Checkpoint, Pieces

_WRAPPER = "_checkpoint_wrapped_module."


@dataclass
class Piece:
    """A range of a parameter, and the tensor in which the optimizer keeps it.

    Under ZeRO an optimizer is called with flat tensors that hold ranges of many parameters. A parameter of 10 elements
    that starts at element 4 of such a tensor is Piece(name, start=0, size=10, owner, offset=4); if it is cut between
    two ranks after 6 elements, the second one has Piece(name, start=6, size=4, owner, offset=0).
    """

    name: str
    start: int  # first element within the flattened parameter
    size: int
    owner: Tensor
    offset: int  # first element within the flattened owner


class Engine:
    """What the loop sees. Engines differ in who holds which piece, and in who adds gradients up."""

    def __init__(self, model: CausalLM, training: TrainingConfig, stage: str, total_steps: int, c: Config):
        self.model = model
        self.trainable = {name: p for name, p in named_parameters(model) if p.requires_grad}
        self.optimizer: torch.optim.Optimizer = instantiate(
            training.optimizer, list(self.trainable.values()), setting=f"{stage}.optimizer"
        )
        self.scheduler = None
        if training.lr_scheduler is not None:
            self.scheduler = instantiate(
                training.lr_scheduler, self.optimizer, num_training_steps=total_steps, setting=f"{stage}.lr_scheduler"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass, under autocast if the run's dtype says so."""
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's part of the loss; the parts of all ranks add up to the loss."""
        raise NotImplementedError

    def update(self) -> float:
        """Apply the accumulated gradients; return their norm before clipping."""
        raise NotImplementedError

    def step(self) -> dict[str, float]:
        """Update the weights and advance the schedule; return the learning rate used and the gradient norm."""
        lr, norm = self.optimizer.param_groups[0]["lr"], self.update()
        if not norm < float("inf"):
            raise UserError(
                f"the gradient norm is {norm}: training diverged; lower the learning rate, or check the data"
            )
        if self.scheduler is not None:
            self.scheduler.step()
        return {"lr": lr, "grad_norm": norm}

    def held(self) -> Iterator[Piece]:
        """Yield the pieces whose optimizer state is on this rank."""
        raise NotImplementedError

    def written(self) -> Iterator[Piece]:
        """Yield the pieces that this rank writes into a checkpoint; all ranks together write each once."""
        return self.held()

    def weights(self) -> dict[str, Tensor]:
        """Return the trained parameters, whole, float32 on the CPU of rank 0; nothing on other ranks."""
        return {n: p.detach().cpu() for n, p in self.trainable.items()} if rank() == 0 else {}

    def close(self) -> None:
        """Let go of what outlives the model."""

    def state(self) -> tuple[Pieces, dict[str, Any]]:
        """Return everything that changes while training: this rank's pieces, and the rest as JSON."""
        pieces: Pieces = {}
        numbers: dict[str, float] = {}
        for piece in self.written():
            for kind, value in {"weight": piece.owner, **self.optimizer.state[piece.owner]}.items():
                if isinstance(value, Tensor) and value.shape == piece.owner.shape:
                    flat = value.detach().view(-1)[piece.offset : piece.offset + piece.size]
                    pieces[f"{kind}:{piece.name}", piece.start] = flat
                elif isinstance(value, Tensor) and value.ndim:
                    name = type(self.optimizer).__name__
                    raise UserError(f"{name} keeps '{kind}' not weight by weight: such an optimizer cannot be resumed")
                elif value is not None:
                    numbers[kind] = float(value)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        kinds = sorted({key.split(":")[0] for key, _ in pieces} - {"weight"})
        scalars: dict[str, Any] = {"groups": groups, "kinds": kinds, "numbers": numbers}
        if self.scheduler is not None:
            scalars["scheduler"] = {
                k: v for k, v in self.scheduler.state_dict().items() if isinstance(v, (int, float, list, bool, str))
            }
        return pieces, scalars

    def load_state(self, found: Checkpoint) -> None:
        """Put optimizer and schedule back; the weights were loaded before the engine was made (`load_weights`)."""
        for group, saved in zip(self.optimizer.param_groups, found.scalars["groups"], strict=True):
            group.update(saved)
        # where torch.optim keeps its step counter
        defaults = self.optimizer.defaults
        on_device = defaults.get("fused") or defaults.get("capturable")
        for piece in self.held():
            state = self.optimizer.state[piece.owner]
            for kind in found.scalars["kinds"]:
                if kind not in state:
                    state[kind] = torch.zeros_like(piece.owner, requires_grad=False)
                value = found.read(f"{kind}:{piece.name}", piece.start, piece.size)
                state[kind].view(-1)[piece.offset : piece.offset + piece.size] = value.to(piece.owner.device)
            for kind, number in found.scalars["numbers"].items():
                state[kind] = torch.tensor(number, device=piece.owner.device if on_device else "cpu")
        if self.scheduler is not None:
            self.scheduler.load_state_dict(found.scalars["scheduler"])


class TorchEngine(Engine):
    """Plain PyTorch. More than one rank add their gradients up: data parallelism, nothing sharded."""

    def __init__(
        self, model: CausalLM, training: TrainingConfig, stage: str, total_steps: int, c: Config, device: torch.device
    ):
        super().__init__(ready_to_train(model, c, device), training, stage, total_steps, c)
        self.clip = training.clip_grad_norm
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bf16")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._autocast:
            return self.model(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> float:
        params = list(self.trainable.values())
        if world_size() > 1:
            for p in params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        norm = float(torch.nn.utils.clip_grad_norm_(params, self.clip if self.clip is not None else float("inf")))
        if norm < float("inf"):  # else the weights stay as they are
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def held(self) -> Iterator[Piece]:
        return whole_pieces(self.trainable)

    def written(self) -> Iterator[Piece]:
        return shared_out(self.held())


def load_weights(model: CausalLM, found: Checkpoint) -> None:
    """Put a checkpoint's trained weights into a model that is still whole."""
    with torch.no_grad():
        for name, p in named_parameters(model):
            if p.requires_grad:
                p.copy_(found.read(f"weight:{name}", 0, p.numel()).view(p.shape))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters by name, without the prefix of recomputed blocks: a resumed run may switch recomputation."""
    for name, p in model.named_parameters():
        yield name.replace(_WRAPPER, ""), p


def whole_pieces(params: dict[str, nn.Parameter]) -> Iterator[Piece]:
    for name, p in params.items():
        yield Piece(name, 0, p.numel(), p, 0)


def shared_out(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Yield this rank's share of the pieces that every rank holds: ranks take turns, so each is written once."""
    return (piece for i, piece in enumerate(pieces) if i % world_size() == rank())
