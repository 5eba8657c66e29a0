"""The DeepSpeed engine, for more than one rank: ZeRO 0 to 3 and CPU offload, by config."""

import gc
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llamaq.config import Config, TrainingConfig, deepspeed_settings
from llamaq.data.batches import micro_batch_size, num_micro_batches
from llamaq.errors import UserError
from llamaq.model.build import ready_to_train
from llamaq.model.causal_lm import CausalLM
from llamaq.runs.ranks import rank, world_size
from llamaq.train.engine import Engine, Piece, shared_out, whole_pieces

ELEMENTWISE = ("AdamW", "Adam", "SGD", "NAdam", "RAdam", "Adamax", "RMSprop", "ASGD", "Rprop")
NOT_IN_CHECKPOINTS = (
    "mics_shard_size",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)
_NO_CLIPPING = 1e30  # DeepSpeed computes the norm only when it clips


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
            for matrix in (model.decoder.tok_embeddings, model.head):  # the head's is read outside its module
                for p in matrix.parameters():
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
            yield from whole_pieces(self.trainable)
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
        return shared_out(self.held()) if self.zero == 0 else self.held()

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


def uses_deepspeed(c: Config) -> bool:
    return c.engine == "deepspeed" or (c.engine == "auto" and dist.is_initialized())


def check_deepspeed(c: Config, device: str) -> dict[str, Any]:
    """Return DeepSpeed's settings, after DeepSpeed itself has checked those of `zero_optimization`.

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
    """Check that the optimizer works on flat pieces of many weights, which is what ZeRO hands it.

    Only optimizers that update each weight on its own do.

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
