"""The .pte, made by ExecuTorch's own exporter from the quantized Meta-layout checkpoint, codes untouched.

ExecuTorch's loader does not say when a key is missing or left over, and by default it derives scales anew (HQQ); here
its pre-quantized path is used, every key is accounted for, and the file is compared with what was trained.
"""

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.checkpoints.meta import PARAMS, WEIGHTS, feed_forward_width
from llamaq.checkpoints.quantized import rotation_block
from llamaq.config import ExportConfig
from llamaq.errors import UserError
from llamaq.export.patches import (
    adapters_as_methods,
    as_trained,
    errors_of_writing,
    hadamard_operator,
    true_lengths,
)
from llamaq.export.tracing import quick_tracing
from llamaq.quiet import quiet
from llamaq.runs.files import naming_full_disk
from llamaq.runs.ticker import ticker
from llamaq.runs.tracking import progress

_PHASES = {  # functions of ExecuTorch's exporter → what takes the time in them
    "_prepare_for_llama_export": "loading the checkpoint",
    "export": "tracing the model",
    "to_edge_transform_and_lower": "lowering it to XNNPACK",
    "_to_edge_and_lower_llama_xnnpack": "lowering it to XNNPACK",
    "_export_llama_multimethod": "lowering all methods to XNNPACK",
    "to_executorch": "planning memory",
    "save_to_pte": "writing the file",
}
_EXPORTER_FILES = ("llm/export/builder.py", "llama/export_llama_lib.py")
# buffers of ExecuTorch's model that no checkpoint holds: zero points are 0, caches and tables are made at load
_NOT_IN_CHECKPOINT = (".zeros", "kv_cache.k_cache", "kv_cache.v_cache", "mask", "freqs_cos", "freqs_sin")


def executorch_arguments(
    checkpoint: Path,
    output: Path,
    options: ExportConfig,
    metadata: dict[str, Any] | None = None,
    dtype: str = "fp32",
) -> list[str]:
    """Return the exporter's command line for a checkpoint folder: what a user would type after `export_llama`.

    Args:
        checkpoint: a folder in Meta's layout.
        output: the .pte to write.
        options: lengths, KV cache and shapes of the `export` section.
        metadata: constants to store in the file.
        dtype: fp32 or bf16, of a checkpoint in full precision; quantized ones compute in float32.
    """
    params = json.loads((checkpoint / PARAMS).read_text())
    lengths = {
        "--max_seq_length": _length_to_tell(options),
        "--max_context_length": options.max_context_length,
    }
    model = "llama3_1" if "rope_scale_factor" in params else "llama3_2"  # the latter's factor is 32, whatever is said
    arguments = ["--model", model, "--checkpoint", str(checkpoint / WEIGHTS), "--params", str(checkpoint / PARAMS)]
    arguments += ["--use_sdpa_with_kv_cache", "-kv", "-X", "-d", dtype]
    arguments += [word for flag, tokens in lengths.items() for word in (flag, str(tokens))]
    arguments += ["--output-dir", str(output.parent), "--output_name", output.stem]
    arguments += ["--metadata", json.dumps(metadata or {})]
    arguments += ["--quantize_kv_cache"] if options.quantize_kv_cache else []
    arguments += [] if options.dynamic_shape else ["--disable_dynamic_shape"]
    arguments += ["--xnnpack-extended-ops"] if dtype == "fp32" else []  # XNNPACK computes in float32
    return arguments + (_quantized_arguments(params, checkpoint) if "quantization_args" in params else [])


def _quantized_arguments(params: dict[str, Any], checkpoint: Path) -> list[str]:
    group_size = str(params["quantization_args"]["group_size"])
    arguments = ["--preq_mode", "8da4w_output_8da8w", "--preq_group_size", group_size]
    arguments += ["--preq_embedding_quantize", "8,0"]
    if rotation_block(params, feed_forward_width(params), str(checkpoint)):
        return [*arguments, "--use_spin_quant", "native"]
    return [*arguments, "-qat", *(["-lora", str(params["lora_args"]["rank"])] if "lora_args" in params else [])]


def _length_to_tell(options: ExportConfig) -> int:
    """Return the length to tell ExecuTorch, which exports for up to one token less: one more if the cache has room."""
    if not options.dynamic_shape:
        return options.max_seq_length
    return min(options.max_seq_length + 1, options.max_context_length)


def _config(arguments: list[str], full_logits: bool = False) -> Any:
    from executorch.examples.models.llama.export_llama_lib import build_args_parser
    from executorch.extension.llm.export.config.llm_config import LlmConfig

    config = LlmConfig.from_args(build_args_parser().parse_args(arguments))
    config.debug.generate_full_logits = full_logits
    return config


def _of_length(tokens: int, options: ExportConfig | None = None) -> ExportConfig:
    """Return options for contexts of so many tokens."""
    return replace(options or ExportConfig(), max_seq_length=tokens, max_context_length=tokens)


def load_eager(checkpoint: Path, max_length: int) -> nn.Module:
    """Load the checkpoint into ExecuTorch's own eager model, without a KV cache: tokens [1, s] → logits [1, s, vocab].

    Raises:
        UserError: a key of the checkpoint that its model lacks, or the other way round.
    """
    arguments = executorch_arguments(checkpoint, checkpoint / "eager", _of_length(max_length))
    arguments = [a for a in arguments if a not in ("--use_sdpa_with_kv_cache", "-kv")]
    with quiet(), as_trained(checkpoint):
        from executorch.examples.models.llama.export_llama_lib import get_llama_model

        model, _, _ = get_llama_model(_config(arguments, full_logits=True))
    check_keys(checkpoint, model)
    return model


@torch.no_grad()
def eager_cached_logits(checkpoint: Path, contexts: list[list[int]], options: ExportConfig) -> list[Tensor]:
    """Compute with ExecuTorch's own eager model and the KV cache of `options`, token by token: [tokens, vocab] each.

    A quantized cache changes the numbers; this is what a .pte that has one is held against.
    """
    length = max(map(len, contexts)) + 1
    cache = ExportConfig(quantize_kv_cache=options.quantize_kv_cache, dynamic_shape=options.dynamic_shape)
    arguments = executorch_arguments(checkpoint, checkpoint / "eager", _of_length(length, cache))
    hadamard_operator()  # registers the cache's operators
    with quiet(), as_trained(checkpoint):
        from executorch.examples.models.llama.export_llama_lib import get_llama_model

        model, _, _ = get_llama_model(_config(arguments))

    def row(token: int, position: int) -> Tensor:  # what the cache holds beyond a position is not looked at
        return model(torch.tensor([[token]]), {"input_pos": torch.tensor([position])}).reshape(1, -1)

    steps = [(token, position) for tokens in contexts for position, token in enumerate(tokens)]
    with quiet():  # the model warns, and the cache's operators write a line a layer, at every token
        rows = [row(*step) for step in progress(steps, "gate: ExecuTorch's eager model", unit="token")]
    return list(torch.cat(rows).split([len(tokens) for tokens in contexts]))


def check_keys(checkpoint: Path, model: nn.Module) -> None:
    """Check that every tensor of the checkpoint is in ExecuTorch's model, and the other way round.

    Raises:
        UserError: naming the first keys that are not.
    """
    stored = set(torch.load(checkpoint / WEIGHTS, mmap=True, weights_only=True))
    loaded = {k for k in model.state_dict() if not k.endswith(_NOT_IN_CHECKPOINT)}
    for what, keys in (("misses", loaded - stored), ("does not know", stored - loaded)):
        if keys:
            raise UserError(f"{checkpoint}: ExecuTorch's model {what} {len(keys)} keys, e.g. {sorted(keys)[:3]}")


def export_pte(
    checkpoint: str | Path,
    output: str | Path,
    options: ExportConfig | None = None,
    metadata: dict[str, Any] | None = None,
    dtype: str = "fp32",
    adapters: dict[str, Path] | None = None,
) -> None:
    """Export a checkpoint in Meta's layout, quantized or not, to the file `output`.

    Args:
        checkpoint: the folder of what the method `forward` computes.
        output: the .pte to write.
        options: lengths, KV cache and shapes of the `export` section; defaults if None. `max_seq_length` is the most
            tokens in one call, one less than `max_context_length` at the most; longer prompts take several calls,
            which ExecuTorch's runner makes by itself.
        metadata: constants for the runner: get_bos_id, the token a prompt begins with, if there is one; get_eos_ids,
            those that end an answer.
        dtype: fp32 or bf16, of a checkpoint in full precision.
        adapters: further methods by name, each a checkpoint with the same codes and adapters of its own. What they
            have in common is stored once, and they share the KV cache's memory.

    Raises:
        UserError: the exporter refused the checkpoint, or the disk is full.
    """
    checkpoint, output, options = Path(checkpoint), Path(output), options or ExportConfig()
    arguments = executorch_arguments(checkpoint, output, options, metadata, dtype)
    thread = threading.get_ident()
    with (
        naming_full_disk(str(output)),
        quiet() as printed,
        as_trained(checkpoint),
        quick_tracing(),
        true_lengths(),
        adapters_as_methods(),
        errors_of_writing(),
    ):
        from executorch.examples.models.llama.export_llama_lib import export_llama

        config = _config(arguments, options.full_logits)
        _add_methods(config, adapters or {})
        try:
            with ticker(f"exporting {output.name}", lambda: _phase_of(thread)):
                written = Path(export_llama(config))
        except (AssertionError, TypeError, ValueError) as e:
            raise UserError(f"ExecuTorch's exporter refused {checkpoint}: {e!r}\n{printed.getvalue()[-2000:]}") from e
    if written.resolve() != output.resolve():
        written.replace(output)


def _phase_of(thread: int) -> str:
    """Name what ExecuTorch's exporter does at this moment in a thread, by the innermost of its functions."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name in _PHASES and frame.f_code.co_filename.endswith(_EXPORTER_FILES):
            return _PHASES[frame.f_code.co_name]
        frame = frame.f_back
    return ""


def _add_methods(config: Any, adapters: dict[str, Path]) -> None:
    """Add a method for each further set of adapters; see `patches.adapters_as_methods`."""
    if not adapters:
        return
    from executorch.extension.llm.export.config.llm_config import LoraConfig, MethodConfig

    further = [MethodConfig(name, LoraConfig(str(folder / WEIGHTS))) for name, folder in adapters.items()]
    config.multimethod.methods = [MethodConfig("forward"), *further]
    config.multimethod.share_mutable_buffers = True
