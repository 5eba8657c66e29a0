"""The .pte, made by ExecuTorch's own exporter from the quantized Meta-layout checkpoint, codes untouched.

ExecuTorch's loader does not say when a key is missing or left over, and by default it derives scales anew (HQQ); here
its pre-quantized path is used, every key is accounted for, and the file is compared with what was trained.
"""

import contextlib
import copy
import gc
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.checkpoints.quantized import feed_forward_width, rotation_block
from llamaq.errors import UserError
from llamaq.quiet import without_native_noise

# buffers of ExecuTorch's model that no checkpoint holds: zero points are 0, caches and tables are made at load
_NOT_IN_CHECKPOINT = (".zeros", "kv_cache.k_cache", "kv_cache.v_cache", "mask", "freqs_cos", "freqs_sin")


@dataclass(frozen=True)
class PteOptions:
    """What may be chosen of a .pte; the rest follows from the checkpoint. All of them run in ExecuTorch 1.4.1."""

    quantize_kv_cache: bool = False  # int8 per token and head: a quarter of the cache's memory, some loss of quality
    dynamic_shape: bool = True  # prompts in one call; without it one token a call: slower to read, quicker to export
    full_logits: bool = False  # logits of every token of a call, not of its last one only: for evaluation
    dtype: str = "fp32"  # of a checkpoint that is not quantized: fp32 or bf16


def executorch_arguments(
    checkpoint: Path, max_seq_length: int, max_context_length: int, output: Path, metadata: dict[str, Any],
    options: PteOptions = PteOptions(),
) -> list[str]:  # fmt: skip
    """The exporter's command line for a checkpoint folder: what a user would type after `export_llama`."""
    params = json.loads((checkpoint / "params.json").read_text())
    arguments = [
        "--model", "llama3_2",
        "--checkpoint", str(checkpoint / "consolidated.00.pth"),
        "--params", str(checkpoint / "params.json"),
        "--use_sdpa_with_kv_cache", "-kv", "-X", "-d", options.dtype,
        "--max_seq_length", str(_told_length(max_seq_length, max_context_length, options)),
        "--max_context_length", str(max_context_length),
        "--output-dir", str(output.parent),
        "--output_name", output.stem,
        "--metadata", json.dumps(metadata),
        *(["--quantize_kv_cache"] if options.quantize_kv_cache else []),
        *([] if options.dynamic_shape else ["--disable_dynamic_shape"]),
    ]  # fmt: skip
    if options.dtype == "fp32":
        arguments += ["--xnnpack-extended-ops"]  # XNNPACK computes in float32
    if "quantization_args" not in params:
        return arguments
    quantization = params["quantization_args"]
    arguments += [
        "--preq_mode", "8da4w_output_8da8w",
        "--preq_group_size", str(quantization["group_size"]),
        "--preq_embedding_quantize", "8,0",
    ]  # fmt: skip
    if rotation_block(params, feed_forward_width(params), str(checkpoint)):
        return [*arguments, "--use_spin_quant", "native"]
    return [*arguments, "-qat", *(["-lora", str(params["lora_args"]["rank"])] if "lora_args" in params else [])]


def _told_length(max_seq_length: int, max_context_length: int, options: PteOptions) -> int:
    """ExecuTorch exports for up to one token less than it is told, so it is told one more if the cache has room."""
    return min(max_seq_length + 1, max_context_length) if options.dynamic_shape else max_seq_length


def _config(arguments: list[str], full_logits: bool = False) -> Any:
    from executorch.examples.models.llama.export_llama_lib import build_args_parser
    from executorch.extension.llm.export.config.llm_config import LlmConfig

    config = LlmConfig.from_args(build_args_parser().parse_args(arguments))
    config.debug.generate_full_logits = full_logits
    return config


@contextlib.contextmanager
def online_blocks(checkpoint: Path) -> Iterator[None]:
    """Where R4 mixes blocks of a width that its operator does not take whole, let ExecuTorch's model do so too."""
    from executorch.examples.models.llama.source_transformation import spin_quant

    params = json.loads((checkpoint / "params.json").read_text())
    hidden = feed_forward_width(params)
    block = rotation_block(params, hidden, str(checkpoint)) if "quantization_args" in params else 0
    name = "inject_fast_hadamard_transform_native_for_spin_quant"
    theirs = getattr(spin_quant, name)

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
    if block and block != hidden:
        setattr(spin_quant, name, inject)
    try:
        yield
    finally:
        setattr(spin_quant, name, theirs)


def load_eager(checkpoint: Path, max_length: int) -> nn.Module:
    """The checkpoint as ExecuTorch's own eager model, without a KV cache: tokens [1, s] → logits [1, s, vocab].

    Raises:
        UserError: a key of the checkpoint that its model lacks, or the other way round.
    """
    arguments = executorch_arguments(checkpoint, max_length, max_length, checkpoint / "eager", {})
    arguments = [a for a in arguments if a not in ("--use_sdpa_with_kv_cache", "-kv")]
    with quiet(), online_blocks(checkpoint):
        from executorch.examples.models.llama.export_llama_lib import get_llama_model

        model, _, _ = get_llama_model(_config(arguments, full_logits=True))
    check_keys(checkpoint, model)
    return model


@torch.no_grad()
def eager_cached_logits(checkpoint: Path, contexts: list[list[int]], options: PteOptions) -> list[Tensor]:
    """What ExecuTorch's own eager model computes with the KV cache of `options`, token by token: [tokens, vocab] each.

    A quantized cache changes the numbers; this is what a .pte that has one is held against.
    """
    length = max(map(len, contexts)) + 1
    arguments = executorch_arguments(checkpoint, length, length, checkpoint / "eager", {}, options)
    hadamard_operator()  # registers the cache's operators
    with quiet(), online_blocks(checkpoint):
        from executorch.examples.models.llama.export_llama_lib import get_llama_model

        model, _, _ = get_llama_model(_config(arguments))

    def logits(tokens: list[int]) -> Tensor:  # what the cache holds beyond a position is not looked at
        rows = [model(torch.tensor([[t]]), {"input_pos": torch.tensor([i])}) for i, t in enumerate(tokens)]
        return torch.cat([r.reshape(1, -1) for r in rows])

    with quiet():  # the model warns, and the cache's operators write a line a layer, at every token
        return [logits(tokens) for tokens in contexts]


def check_keys(checkpoint: Path, model: nn.Module) -> None:
    """Every tensor of the checkpoint is in ExecuTorch's model and the other way round.

    Raises:
        UserError: naming the first keys that are not.
    """
    stored = set(torch.load(checkpoint / "consolidated.00.pth", mmap=True, weights_only=True))
    loaded = {k for k in model.state_dict() if not k.endswith(_NOT_IN_CHECKPOINT)}
    for what, keys in (("misses", loaded - stored), ("does not know", stored - loaded)):
        if keys:
            raise UserError(f"{checkpoint}: ExecuTorch's model {what} {len(keys)} keys, e.g. {sorted(keys)[:3]}")


def export_pte(
    checkpoint: Path, output: Path, max_seq_length: int, max_context_length: int, metadata: dict[str, Any],
    options: PteOptions = PteOptions(),
    adapters: dict[str, Path] | None = None,
) -> None:  # fmt: skip
    """Export `checkpoint` (a folder of `llamaq.checkpoints.quantized`, quantized or not) to the file `output`.

    Args:
        checkpoint: what the method `forward` computes.
        output: the file to write.
        max_seq_length: most tokens in one call, one less than max_context_length at the most; longer prompts take
            several calls, which ExecuTorch's runner makes by itself.
        max_context_length: of the KV cache.
        metadata: constants for the runner: get_bos_id, the token a prompt begins with; get_eos_ids, those that end an
            answer.
        options: of the export.
        adapters: further methods by name, each a checkpoint with the same codes and adapters of its own. What they
            have in common is stored once, and they share the KV cache's memory.

    Raises:
        UserError: the exporter refused the checkpoint.
    """
    arguments = executorch_arguments(checkpoint, max_seq_length, max_context_length, output, metadata, options)
    with quiet() as printed, online_blocks(checkpoint), light_tracing(), true_lengths(), adapters_as_methods():
        from executorch.examples.models.llama.export_llama_lib import export_llama
        from executorch.extension.llm.export.config.llm_config import LoraConfig, MethodConfig

        config = _config(arguments, options.full_logits)
        if adapters:
            further = [
                MethodConfig(name, LoraConfig(str(folder / "consolidated.00.pth"))) for name, folder in adapters.items()
            ]
            config.multimethod.methods = [MethodConfig("forward"), *further]
            config.multimethod.share_mutable_buffers = True
        try:
            written = Path(export_llama(config))
        except (AssertionError, TypeError, ValueError) as e:
            raise UserError(f"ExecuTorch's exporter refused {checkpoint}: {e!r}\n{printed.getvalue()[-2000:]}") from e
    if written.resolve() != output.resolve():
        written.replace(output)


@contextlib.contextmanager
def light_tracing() -> Iterator[None]:
    """Spare the exporter a fifth of its time, spent on copies and on looking for garbage; the file stays the same.

    Each of some 25,000 times that a node is traced again, torch.fx deep-copies the history of the node it came from.
    Nobody changes that history, so it may be shared.
    """
    from torch.fx.traceback import NodeSource

    threshold = gc.get_threshold()
    NodeSource.__deepcopy__ = lambda self, memo: self  # pyright: ignore[reportAttributeAccessIssue]
    gc.set_threshold(100_000, *threshold[1:])
    try:
        yield
    finally:
        del NodeSource.__deepcopy__  # pyright: ignore[reportAttributeAccessIssue]
        gc.set_threshold(*threshold)


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

    LLMEdgeManager.__init__ = with_true_length
    try:
        yield
    finally:
        LLMEdgeManager.__init__ = init


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

    export_llama_lib._prepare_for_llama_export = prepare_method
    try:
        yield
    finally:
        export_llama_lib._prepare_for_llama_export = prepare


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Keep the exporter's hundreds of lines of graph and progress off the screen; yields what it printed."""
    printed = io.StringIO()
    level = logging.root.manager.disable
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(), without_native_noise():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield printed
        finally:
            logging.disable(level)


def hadamard_operator() -> Any:
    """ExecuTorch's online transform, `llama::fast_hadamard_transform`: x [..., n] → the same shape, float32."""
    with quiet():
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401
    return torch.ops.llama.fast_hadamard_transform
