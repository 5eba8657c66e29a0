"""The engines: gradients in, updated weights out. The loop knows nothing of how that is done.

`TorchEngine` is plain PyTorch, the whole model and optimizer on every rank. `DeepSpeedEngine` is DeepSpeed with ZeRO
0–3 and CPU offload by config. Both keep weights, gradients and optimizer state in float32 and run matmuls under
autocast with dtype bf16: quantization parameters always come from float32 weights, and a run can change engine, ZeRO
stage and number of ranks between two steps.
"""

import gc
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llamaq.config import Config, TrainingConfig, deepspeed_settings
from llamaq.data.datasets import micro_batch_size, num_micro_batches
from llamaq.errors import UserError
from llamaq.model.causal_lm import CausalLM, instantiate, ready_to_train
from llamaq.runs.run import rank, world_size
from llamaq.train.resume import Checkpoint, Pieces

_WRAPPER = "_checkpoint_wrapped_module."
ELEMENTWISE = ("AdamW", "Adam", "SGD", "NAdam", "RAdam", "Adamax", "RMSprop", "ASGD", "Rprop")
NOT_IN_CHECKPOINTS = (
    "mics_shard_size", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)  # fmt: skip
_NO_CLIPPING = 1e30  # DeepSpeed computes the norm only when it clips


@dataclass
class Piece:
    """A range of a parameter, and where the optimizer keeps it: in `owner`, the tensor it is called with."""

    name: str
    start: int  # first element within the flattened parameter
    size: int
    owner: Tensor
    offset: int  # first element within the flattened owner


class Engine:
    """What the loop sees. Engines differ in who holds which piece, and in who adds gradients up."""

    def __init__(self, model: CausalLM, training: TrainingConfig, stage: str, total_steps: int, c: Config):
        self.model = model
        self.trainable = {name: p for name, p in _named(model) if p.requires_grad}
        self.optimizer: torch.optim.Optimizer = instantiate(
            training.optimizer, list(self.trainable.values()), setting=f"{stage}.optimizer"
        )
        self.scheduler = None
        if training.lr_scheduler is not None:
            self.scheduler = instantiate(
                training.lr_scheduler, self.optimizer, num_training_steps=total_steps, setting=f"{stage}.lr_scheduler"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, under autocast if the run's dtype says so."""
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's part of the loss; the parts of all ranks add up to the loss."""
        raise NotImplementedError

    def update(self) -> float:
        """Apply the accumulated gradients; returns their norm before clipping."""
        raise NotImplementedError

    def step(self) -> dict[str, float]:
        """Update the weights and move the schedule on; returns the learning rate used and the gradient norm."""
        lr, norm = self.optimizer.param_groups[0]["lr"], self.update()
        if not norm < float("inf"):
            raise UserError(
                f"the gradient norm is {norm}: training diverged; lower the learning rate, or check the data"
            )
        if self.scheduler is not None:
            self.scheduler.step()
        return {"lr": lr, "grad_norm": norm}

    def held(self) -> Iterator[Piece]:
        """The pieces whose optimizer state is on this rank."""
        raise NotImplementedError

    def written(self) -> Iterator[Piece]:
        """The pieces this rank writes into a checkpoint; all ranks together write each once."""
        return self.held()

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters, whole, float32 on the CPU of rank 0; nothing on other ranks."""
        return {n: p.detach().cpu() for n, p in self.trainable.items()} if rank() == 0 else {}

    def close(self) -> None:
        """Let go of what outlives the model."""

    def state(self) -> tuple[Pieces, dict[str, Any]]:
        """Everything that changes while training: this rank's pieces, and the rest as JSON."""
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
        return _whole(self.trainable)

    def written(self) -> Iterator[Piece]:
        return _shared_out(self.held())


class DeepSpeedEngine(Engine):
    """DeepSpeed (https://www.deepspeed.ai): ZeRO shards optimizer state (1), gradients (2) and parameters (3)."""

    def __init__(
        self, model: CausalLM, training: TrainingConfig, stage: str, total_steps: int, c: Config, device: torch.device
    ):
        settings = check_deepspeed(c, device.type)
        self.zero = settings.get("zero_optimization", {}).get("stage", 0)
        self.clip = training.clip_grad_norm if training.clip_grad_norm is not None else _NO_CLIPPING
        settings |= {
            "train_micro_batch_size_per_gpu": micro_batch_size(training, world_size()),
            "gradient_accumulation_steps": num_micro_batches(training, world_size()),
            "gradient_clipping": self.clip if self.zero else 0.0,
            # float32 weights and sums, bf16 matmuls; no module's gradients are added up in less than float32
            "torch_autocast": {"enabled": c.dtype == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "zero_allow_untested_optimizer": True,  # the optimizer is the config's
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own for offload needs a compiler at run time
        }
        deepspeed = _import_deepspeed(device.type)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes over the group there is
        if self.zero:  # DeepSpeed would put its own linear in place of torch's, for all that this process does later
            settings["zero_optimization"]["memory_efficient_linear"] = False
        if self.zero == 3:  # shard before anything is on a GPU: the whole model never is
            deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=torch.float32)
            for p in model.decoder.tok_embeddings.parameters():  # read by the head too, outside their module
                deepspeed.zero.register_external_parameter(model, p)
        super().__init__(ready_to_train(model, c, device), training, stage, total_steps, c)
        check_optimizer(self.optimizer, c)
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        self._accumulating = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        if self._accumulating:
            self.deepspeed.step()  # counts a micro-batch; the last one's updates
        # DeepSpeed takes the mean over ranks
        self.deepspeed.backward(loss * world_size(), scale_wrt_gas=False)
        self._accumulating = True

    def update(self) -> float:
        self._accumulating = False
        if self.zero == 0:  # DeepSpeed clips here too, but does not say what the norm was
            norm = float(torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.clip))
            self.deepspeed.step()
            return norm
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm())

    def held(self) -> Iterator[Piece]:
        sharded = self.deepspeed.optimizer
        if self.zero == 0:
            yield from _whole(self.trainable)
        elif self.zero == 3:
            for name, p in self.trainable.items():
                group, offset, length = sharded.grad_position[sharded.get_param_id(p)]
                start = rank() * length  # the last rank's piece is padded
                size = min(length, max(0, vars(p)["ds_numel"] - start))
                yield Piece(name, start, size, sharded.fp32_partitioned_groups_flat[group], offset)
        else:
            names = {id(p): name for name, p in self.trainable.items()}
            for params, owner in zip(sharded.bit16_groups, sharded.single_partition_of_fp32_groups, strict=True):
                for p in params:
                    if (here := p._hp_mapping) is not None:
                        at, of = here.lp_fragment_address, here.hp_fragment_address
                        yield Piece(names[id(p)], at.start, at.numel, owner, of.start)

    def written(self) -> Iterator[Piece]:
        return _shared_out(self.held()) if self.zero == 0 else self.held()

    def weights(self) -> dict[str, Tensor]:
        if self.zero != 3:
            return super().weights()
        deepspeed, whole = _import_deepspeed(self.deepspeed.device.type), {}
        for name, p in self.trainable.items():  # one at a time: the GPU never holds them all
            with deepspeed.zero.GatheredParameters([p]):
                if rank() == 0:
                    whole[name] = p.detach().cpu().clone()
        return whole

    def close(self) -> None:
        """Free the weights and what DeepSpeed keeps of them.

        References to a destroyed engine stay in DeepSpeed's caches and in torchtune's `nn.SiLU`, one object that all
        models share, so the memory is taken from under them.
        """
        sharded, model = self.deepspeed.optimizer, self.model
        self.deepspeed.destroy()
        self.optimizer.state.clear()
        for module in model.modules():
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                vars(module).pop(name, None)
        for p in [*model.parameters(), *(p for g in self.optimizer.param_groups for p in g["params"])]:
            p.grad, p.data = None, p.data.new_empty(0)
            if (shard := vars(p).get("ds_tensor")) is not None:
                shard.data = shard.data.new_empty(0)
        if self.zero:
            vars(sharded).clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def make_engine(
    model: CausalLM, training: TrainingConfig, stage: str, total_steps: int, c: Config, device: torch.device
) -> Engine:
    """The engine the config asks for; `auto` is DeepSpeed as soon as there is a process group."""
    kind = DeepSpeedEngine if uses_deepspeed(c) else TorchEngine
    return kind(model, training, stage, total_steps, c, device)


def load_weights(model: CausalLM, found: Checkpoint) -> None:
    """Put a checkpoint's trained weights into a model that is still whole."""
    with torch.no_grad():
        for name, p in _named(model):
            if p.requires_grad:
                p.copy_(found.read(f"weight:{name}", 0, p.numel()).view(p.shape))


def uses_deepspeed(c: Config) -> bool:
    return c.engine == "deepspeed" or (c.engine == "auto" and dist.is_initialized())


def check_deepspeed(c: Config, device: str) -> dict[str, Any]:
    """DeepSpeed's settings, those of `zero_optimization` checked by DeepSpeed itself.

    Raises:
        UserError: DeepSpeed is not installed, or does not know a setting.
    """
    settings = deepspeed_settings(c)
    _import_deepspeed(device)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**settings.get("zero_optimization", {}))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"deepspeed.settings.zero_optimization.{where}: {first['msg']}") from e
    zero = settings.get("zero_optimization", {})
    strange = [k for k in NOT_IN_CHECKPOINTS if zero.get(k) not in (None, False, -1, 1)]
    strange += [k for k in ("offload_optimizer", "offload_param") if zero.get(k, {}).get("device") == "nvme"]
    if strange:
        raise UserError(
            f"deepspeed.settings.zero_optimization.{strange[0]}: llamaq's checkpoints do not know how it lays "
            "weights out; leave it out (offload to cpu is supported)"
        )
    return json.loads(json.dumps(settings))


def check_optimizer(optimizer: torch.optim.Optimizer, c: Config) -> None:
    """ZeRO hands the optimizer flat pieces of many weights, which only elementwise ones do not mind.

    Raises:
        UserError: this one would compute something else.
    """
    name = type(optimizer).__name__
    if deepspeed_settings(c).get("zero_optimization", {}).get("stage", 0) and name not in ELEMENTWISE:
        raise UserError(
            f"optimizer {name} does not go with DeepSpeed's ZeRO, which cuts weights into flat pieces; use one of "
            f"{', '.join(ELEMENTWISE)}, or deepspeed.config=zero0"
        )


def _import_deepspeed(device: str) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as e:
        raise UserError(
            "more than one rank trains with DeepSpeed, which is not installed: pip install 'llamaq[cluster]', or set "
            "engine=torch for plain data parallelism"
        ) from e
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On CPU, DeepSpeed would compile a shared-memory collective before it starts, minutes long and without a compiler
    # not at all; only its inference uses it (deepspeed 0.19.8, TorchBackend.__init__).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by name; recomputed blocks are wrapped, and without the wrapper's prefix a run can switch them."""
    for name, p in model.named_parameters():
        yield name.replace(_WRAPPER, ""), p


def _whole(params: dict[str, nn.Parameter]) -> Iterator[Piece]:
    for name, p in params.items():
        yield Piece(name, 0, p.numel(), p, 0)


def _shared_out(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """What every rank holds is written by one: the ranks take turns."""
    return (piece for i, piece in enumerate(pieces) if i % world_size() == rank())
