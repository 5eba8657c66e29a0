"""What the training recipes share: where a stage's weights come from and how it leaves them.

Stage folders hold `model.safetensors` (latent float32 backbone, torchtune names) and `adapters.safetensors`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from llamaq.checkpoints.base import StateDict, checkpoint_files, load_checkpoint
from llamaq.config import Config, TrainingConfig
from llamaq.data.datasets import build_dataset, build_tokenizer
from llamaq.model.causal_lm import CausalLM, build_model, meta_decoder, pick_device
from llamaq.plan.memory import shape_of
from llamaq.quant.prepare import is_adapter
from llamaq.runs.run import MANIFEST, METRICS, Run, rank
from llamaq.runs.tracking import read_metrics
from llamaq.train.loop import train
from llamaq.train.objectives import SFT
from llamaq.train.resume import save_tensors


def identity(c: Config, training: TrainingConfig) -> dict[str, Any]:
    """The settings a training stage depends on."""
    settings = {k: v for k, v in asdict(training).items() if k != "distill_weight" or v}
    return {"training": settings, "model": c.model, "tokenizer": c.tokenizer, "seed": c.seed, "dtype": c.dtype}


def start_inputs(c: Config) -> list[Path]:
    """What the run starts from, as inputs of a stage: the base stage's folder, or the checkpoint's files."""
    folder = Path(c.checkpoint_dir)
    stage = folder.parent
    return [stage] if (stage / MANIFEST).is_file() else checkpoint_files(folder)


def start_weights(c: Config) -> StateDict:
    """The BF16 model the run starts from, as float32 weights with torchtune names."""
    return load_checkpoint(c.checkpoint_dir, meta_decoder(c.model))


def weights_of(*folders: Path) -> StateDict:
    """Backbone and adapters a chain of stage folders left, later ones winning."""
    weights: StateDict = {}
    for folder in folders:
        for name in ("model.safetensors", "adapters.safetensors"):
            if (folder / name).is_file():
                weights |= load_file(folder / name)
    return weights


def save_weights(folder: Path, weights: StateDict) -> None:
    """Write what a stage trained (rank 0): backbone and adapters, each if it was."""
    if rank() != 0:
        return
    for name, adapters in (("model.safetensors", False), ("adapters.safetensors", True)):
        part = {k: v for k, v in weights.items() if is_adapter(k) is adapters}
        if part:
            save_tensors(folder / name, part)


def tokenizer_of(c: Config) -> Any:
    return build_tokenizer(c.tokenizer, shape_of(c.model).vocab)


def sft(
    run: Run, stage: str, folder: Path, model: CausalLM, training: TrainingConfig, setting: str
) -> tuple[dict[str, Any], StateDict]:
    """Train on the next token of `training.dataset`, with the run's BF16 model as teacher if it distills.

    Returns:
        What `train` does: metrics and trained weights.
    """
    c = run.config
    tokenizer = tokenizer_of(c)
    samples = build_dataset(training.dataset, tokenizer, f"{setting}.dataset")
    teacher = None
    if training.distill_weight:
        teacher = build_model(c.model, start_weights(c), scheme=None).eval().requires_grad_(False)
        teacher.to(pick_device(c.device))
    objective = SFT(tokenizer.pad_id, teacher, training.distill_weight)
    return train(run, stage, folder, model, objective, training, samples)


def loss_curve(folder: Path, key: str = "loss") -> tuple[list[int], list[float]]:
    """Steps and values of one metric of a finished training stage."""
    rows = [r for r in read_metrics(folder / METRICS) if r.get(key) is not None]
    return [r["step"] for r in rows], [r[key] for r in rows]
