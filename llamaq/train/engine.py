"""The engine: gradients in, updated weights out. The loop knows nothing of how that is done.

Weights, gradients and optimizer state are float32; with dtype bf16, matmuls run under autocast. More than one rank
add their gradients up (plain data parallelism); DeepSpeed will be the second engine behind these methods.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llamaq.config import Config, TrainingConfig
from llamaq.errors import UserError
from llamaq.pipeline import world_size
from llamaq.train.model import CausalLM, instantiate

_WRAPPER = "_checkpoint_wrapped_module."


class TorchEngine:
    """Plain PyTorch: optimizer, schedule, clipping and autocast over a whole model on every rank."""

    def __init__(
        self, model: CausalLM, training: TrainingConfig, stage: str, total_steps: int, c: Config, device: torch.device
    ):
        self.model, self.device, self.clip = model, device, training.clip_grad_norm
        # activation checkpointing wraps blocks; without its prefix a run can switch it and still resume
        named = ((n.replace(_WRAPPER, ""), p) for n, p in model.named_parameters())
        self.trainable = {n: p for n, p in named if p.requires_grad}
        self.optimizer: torch.optim.Optimizer = instantiate(
            training.optimizer, list(self.trainable.values()), setting=f"{stage}.optimizer"
        )
        self.scheduler = None
        if training.lr_scheduler is not None:
            self.scheduler = instantiate(
                training.lr_scheduler, self.optimizer, num_training_steps=total_steps, setting=f"{stage}.lr_scheduler"
            )
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bf16")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._autocast:
            return self.model(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> dict[str, float]:
        """Apply the accumulated gradients; returns the learning rate used and the gradient norm before clipping."""
        params = list(self.trainable.values())
        if world_size() > 1:
            for p in params:
                dist.all_reduce(p.grad if p.grad is not None else torch.zeros_like(p))
        norm = torch.nn.utils.clip_grad_norm_(params, self.clip if self.clip is not None else float("inf"))
        if not torch.isfinite(norm):
            raise UserError(
                f"the gradient norm is {float(norm)}: training diverged; lower the learning rate, or check the data"
            )
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"lr": lr, "grad_norm": float(norm)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that changes while training: tensors by name, and the rest as JSON."""
        tensors = {f"model.{n}": p.detach() for n, p in self.trainable.items()}
        scalars: dict[str, Any] = {"groups": self.optimizer.state_dict()["param_groups"]}
        for index, name, value in self._optimizer_state():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars.setdefault("values", {}).setdefault(str(index), {})[name] = value
        if self.scheduler is not None:
            scalars["scheduler"] = {
                k: v for k, v in self.scheduler.state_dict().items() if isinstance(v, (int, float, list, bool, str))
            }
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors, scalars

    def _optimizer_state(self) -> Iterator[tuple[int, str, Any]]:
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                yield index, name, value

    def load_state(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, p in self.trainable.items():
                p.copy_(tensors[f"model.{name}"])
        state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in scalars.get("values", {}).items()}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": scalars["groups"]})
        if self.scheduler is not None:
            self.scheduler.load_state_dict(scalars["scheduler"])
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
