"""What llamaq changes in ExecuTorch's exporter while it runs, each change with its reason; all are undone after it.

Written against executorch 1.4.1. A newer version may make a patch unnecessary: tests/export/ shows which.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.checkpoints.meta import PARAMS, feed_forward_width
from llamaq.checkpoints.quantized import rotation_block
from llamaq.quiet import quiet


def hadamard_operator() -> Any:
    """Register and return ExecuTorch's online transform, `llama::fast_hadamard_transform`: [..., n] → the same."""
    with quiet():
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401
    return torch.ops.llama.fast_hadamard_transform


@contextlib.contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Let a class or module have another attribute while the context is open."""
    old = vars(owner)[name]
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextlib.contextmanager
def as_trained(checkpoint: Path) -> Iterator[None]:
    """Let ExecuTorch's model compute what was trained where its own code does not; see `beyond_stock`."""
    with online_blocks(checkpoint), adapters_beside_biases():
        yield


def beyond_stock(params: dict[str, Any]) -> str:
    """Say what of a checkpoint ExecuTorch's exporter does not compute unless llamaq patches it; empty if nothing.

    Args:
        params: the checkpoint's params.json.
    """
    hidden, block = _online(params, PARAMS)
    if block not in (0, hidden):
        return f"its online rotation takes no width of {hidden}, and this model has it in blocks of {block}"
    if params.get("attention_qkv_bias") and "lora_args" in params:
        return "it leaves out the biases of q, k and v where there are adapters"
    return ""


def _online(params: dict[str, Any], where: str) -> tuple[int, int]:
    """Return the feed-forward width and the width of R4's blocks, 0 for none."""
    hidden = feed_forward_width(params)
    return hidden, rotation_block(params, hidden, where) if "quantization_args" in params else 0


@contextlib.contextmanager
def adapters_beside_biases() -> Iterator[None]:
    """Let linears with an adapter keep their bias, which ExecuTorch's loader leaves out (`bias=False`)."""
    from executorch.examples.models.llama.source_transformation import lora

    theirs = lora._replace_linear_8da4w_for_lora

    def replace(module: nn.Module, checkpoint: Any, lora_rank: int) -> None:
        named = {name: getattr(m, "bias", None) for name, m in module.named_modules()}
        biases = {name: bias for name, bias in named.items() if isinstance(bias, Tensor)}
        theirs(module, checkpoint, lora_rank)
        for name, bias in biases.items():
            linear = module.get_submodule(name)
            if linear.bias is None:  # an attribute in the place of the buffer
                del linear.bias
                linear.register_buffer("bias", bias)

    with replaced(lora, "_replace_linear_8da4w_for_lora", replace):
        yield


@contextlib.contextmanager
def online_blocks(checkpoint: Path) -> Iterator[None]:
    """Let ExecuTorch's model mix R4 in blocks, where its operator does not take the whole width (3072 = 3 · 1024)."""
    from executorch.examples.models.llama.source_transformation import spin_quant

    params = json.loads((checkpoint / PARAMS).read_text())
    hidden, block = _online(params, str(checkpoint))
    name = "inject_fast_hadamard_transform_native_for_spin_quant"

    class InBlocks(nn.Module):
        def __init__(self, feed_forward: Any):
            super().__init__()
            self.w1, self.w2, self.w3 = feed_forward.w1, feed_forward.w2, feed_forward.w3

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.silu(self.w1(x)) * self.w3(x)
            return self.w2(torch.ops.llama.fast_hadamard_transform(h.unflatten(-1, (-1, block))).flatten(-2))

    def inject(model: nn.Module) -> nn.Module:
        for layer in model.get_submodule("layers").children():
            layer.feed_forward = InBlocks(layer.feed_forward)
        return model

    if block:
        hadamard_operator()  # registers it: a KV cache's operators, which would too, are not in every model
    in_blocks = block and block != hidden
    with replaced(spin_quant, name, inject) if in_blocks else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def true_lengths() -> Iterator[None]:
    """Let `get_max_seq_len` in a .pte be how many tokens a call may have.

    The exporter writes one more, and ExecuTorch's runner, which cuts longer prompts into calls of that many, then fails
    on every one ("Attempted to resize a bounded tensor").
    """
    from executorch.extension.llm.export.builder import LLMEdgeManager

    init = LLMEdgeManager.__init__

    def with_true_length(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.enable_dynamic_shape:
            self.metadata["get_max_seq_len"] = self.max_seq_len - 1

    with replaced(LLMEdgeManager, "__init__", with_true_length):
        yield


@contextlib.contextmanager
def adapters_as_methods() -> Iterator[None]:
    """Let the exporter's methods of one .pte be pre-quantized checkpoints that differ in their adapters.

    It can put several methods in a file, but loads each one's adapters its own way, which a pre-quantized backbone does
    not know (`export_llama_lib._export_llama_multimethod`). Here the method's "adapter" is a whole checkpoint.
    """
    from executorch.examples.models.llama import export_llama_lib

    prepare = export_llama_lib._prepare_for_llama_export

    def prepare_method(config: Any) -> Any:
        if config.base.lora_config is not None:
            config = copy.deepcopy(config)
            config.base.checkpoint, config.base.lora_config = config.base.lora_config.adapter_checkpoint, None
        return prepare(config)

    with replaced(export_llama_lib, "_prepare_for_llama_export", prepare_method):
        yield


@contextlib.contextmanager
def errors_of_writing() -> Iterator[None]:
    """Let an error while the .pte is written end the export, and leave no half of the file.

    The exporter only logs it, so a full disk would show as a file that cannot be loaded.
    """
    from executorch.extension.llm.export import builder

    def save(program: Any, name: str, folder: str = "") -> str:
        path = Path(name if name.endswith(".pte") else Path(folder) / f"{name}.pte")
        try:
            with path.open("wb") as file:
                program.write_to_file(file)
            program.write_tensor_data_to_file(outdir=folder)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return str(path)

    with replaced(builder, "save_pte_program", save):
        yield
