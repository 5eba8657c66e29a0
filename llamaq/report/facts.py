"""Collect what the report states, from the settings and from the metrics that the stages left.

`metrics` maps the stages that the report reads to their metrics; `folder` is the run's. The page, report.json and the
model card are made from these facts alone.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llamaq
from llamaq.config import Component, Config, TrainingConfig
from llamaq.model.shape import shape_of
from llamaq.plan.memory import memory_plan, plan_length
from llamaq.report.origin import origin_of
from llamaq.runs.manifest import package_versions
from llamaq.runs.tracking import loss_curve

Facts = dict[str, Any]

# what the report reads of the config; the plan of memory is why it is so much
REPORTED = (
    "model",
    "tokenizer",
    "scheme",
    "adapters",
    "base",
    "qat",
    "qat_lora",
    "qat_dpo",
    "spinquant",
    "export",
    "evaluate.dataset",
    "evaluate.control",
    "dtype",
)


def collect_chain_facts(
    c: Config, folder: Path, metrics: dict[str, Any], shipped: str, trained: list[str], measured: list[str]
) -> Facts:
    """Return what the page of a training chain states.

    Args:
        c: the run's settings.
        folder: the run's.
        metrics: stage → metrics.
        shipped: name of the model that ships.
        trained: the training stages, in order.
        measured: the stages of `llamaq.evaluate.stages.measure`.
    """
    return {
        **metrics["evaluate"],
        **_collect_common_facts(c, folder, metrics, measured),
        "rank": c.adapters.rank,
        "shipped": shipped,
        "hand_overs": {**metrics["convert"], **metrics["export"]["hand_overs"]},
        "dpo": metrics["qat_dpo"] if "qat_dpo" in trained else None,
        "training": [_first_and_last_loss(stage, metrics[stage]) for stage in trained],
        "files": {
            "quantized checkpoint, Meta layout": folder / "convert" / "model",
            "adapters for PEFT": folder / "convert" / "adapter",
            **_common_files(folder),
            "metrics of each step": folder / "<stage>" / "metrics.jsonl",
            **_offline_tracking(folder),
        },
    }


def collect_spinquant_facts(
    c: Config, folder: Path, metrics: dict[str, Any], shipped: str, candidates: list[str], measured: list[str]
) -> Facts:
    """Return what the page of a SpinQuant run states; see `collect_chain_facts`.

    Args:
        c: the run's settings.
        folder: the run's.
        metrics: stage → metrics.
        shipped: name of the model that ships, which is also that of its stage.
        candidates: names of all candidates.
        measured: the stages of `llamaq.evaluate.stages.measure`.
    """
    selection, chosen = metrics[shipped], metrics[shipped]["chosen"]
    return {
        **metrics["evaluate"],
        **_collect_common_facts(c, folder, metrics, measured),
        "shipped": shipped,
        "chosen": chosen,
        "forced": selection["forced"],
        "candidates": {name: metrics[f"candidate_{name}"] for name in candidates},
        "calibration_tokens": metrics["calibrate"]["tokens"],
        "selection_tokens": c.section("spinquant").num_selection * c.tokenizer["max_seq_len"],
        "hand_overs": {"executorch_eager": selection["executorch_eager"], **metrics["export"]["hand_overs"]},
        "files": {
            "quantized checkpoint, Meta layout": folder / shipped / "model",
            "rotations": folder / f"candidate_{chosen}" / "rotations.safetensors",
            **_common_files(folder),
            **_offline_tracking(folder),
        },
    }


def _collect_common_facts(c: Config, folder: Path, metrics: dict[str, Any], measured: list[str]) -> Facts:
    exported, answer = metrics["export"], metrics["answer"]
    return {
        "name": folder.name,
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "version": llamaq.__version__,
        "packages": package_versions(),
        "parameters": shape_of(c.model).weights,
        "group_size": c.scheme.group_size,
        "constants": exported["constants"],
        "gate_tokens": c.export.gate_tokens,
        "max_relative_error": c.export.max_relative_error,
        "min_top1": c.export.min_top1_agreement,
        "max_kl": c.export.max_kl,
        "noise_factor": c.export.noise_factor,
        "pte_bytes": exported["bytes"],
        "pte_sha256": exported["sha256"],
        "pte_metadata": exported["metadata"],
        "prompt": answer["prompt"],
        "answer": answer["answer"] or "(nothing)",
        "template": answer["template"],
        "conversation": answer["conversation"],
        "measured": {"export": exported} | {s: metrics[s] for s in measured},
        "plan": [asdict(need) | {"bytes": need.bytes} for need in memory_plan(c, plan_length(c))],
    }


def _first_and_last_loss(stage: str, metrics: dict[str, Any]) -> Facts:
    first, last = metrics["first"]["loss"], metrics["last"]["loss"]
    return {"stage": stage, "steps": metrics["steps"], "first": first, "last": last}


def _common_files(folder: Path) -> dict[str, Path]:
    return {
        "exported model": folder / "export" / "model.pte",
        "all that an app needs": folder / "bundle",
        "model card": folder / "README.md",
        "this report as one file": folder / "report" / "index.html",
        "all numbers": folder / "report" / "report.json",
    }


def _offline_tracking(folder: Path) -> dict[str, str]:
    return {"W&B, if offline": f"wandb sync {folder}/wandb/offline-run-*"}


# --- curves ----------------------------------------------------------------------------------------------------------


def loss_curves(folder: Path) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Return panel → label → (steps, losses) of the training stages of a run, and of their controls."""
    panels = {"QAT": ("qat", "control_qat"), "LoRA": ("qat_lora", "control_lora"), "DPO": ("qat_dpo",)}
    return {
        title: {
            "BF16 control" if s.startswith("control") else "quantized": loss_curve(folder / s)
            for s in stages
            if (folder / s).is_dir()
        }
        for title, stages in panels.items()
    }


def layer_error_curves(candidates: dict[str, Any], chosen: str) -> dict[str, list[float]]:
    """Return label → mean relative squared error of each layer's linears.

    The chosen candidate has two curves, rounded to nearest and as it was rounded; so has the unrotated one, if there.
    """

    def by_layer(name: str, key: str) -> list[float]:
        layers: dict[str, list[float]] = {}
        for linear in candidates[name]["layers"]:
            layers.setdefault(linear["name"].split(".")[1], []).append(linear[key])
        return [sum(v) / len(v) for v in layers.values()]

    ways = {"to nearest": "nearest", "as rounded": "rounded"}
    names = ["none", chosen] if "none" in candidates and chosen != "none" else [chosen]
    return {f"{name}, {how}": by_layer(name, key) for name in names for how, key in ways.items()}


# --- for the card ----------------------------------------------------------------------------------------------------


def collect_chain_card(c: Config, folder: Path, trained: list[str]) -> Facts:
    """Return what the model card states of a chain's data and training, beyond the page's facts."""
    trainings: dict[str, TrainingConfig] = {s: c.section(s) for s in trained}
    return {
        **_collect_common_card(c, folder),
        "checkpoint": folder / "convert" / "model",
        "rotation": None,
        "data": {s: describe_data(t.dataset) for s, t in trainings.items()} | _held_out(c),
        "hyperparameters": {s: _describe_training(t) for s, t in trainings.items()},
    }


def collect_spinquant_card(c: Config, folder: Path, shipped: str, rotation: str) -> Facts:
    """Return what the model card states of SpinQuant's data and settings, beyond the page's facts."""
    s = c.section("spinquant")
    learning = "published objective" if s.objective == "published" else "expected quantization noise"
    parts = enumerate(s.calibration, 1)
    return {
        **_collect_common_card(c, folder),
        "checkpoint": folder / shipped / "model",
        "rotation": rotation,
        "data": {f"calibration {i}": f"{p.num_samples} windows of {describe_data(p.dataset)}" for i, p in parts}
        | _held_out(c),
        "hyperparameters": {
            "rotations": f"{learning}, {s.steps} steps, lr {s.lr}, then {s.refine_steps} steps by KL",
            "rounding": f"{s.rounding}, damping {s.damping}",
            "polish": f"{s.polish_steps} steps, lr {s.polish_lr}",
        },
    }


def describe_data(dataset: Component) -> str:
    """Name a dataset's file, without its path, and the builder that reads it."""
    source = dataset.get("data_files") or dataset.get("source")
    return f"`{Path(str(source)).name}` by `{dataset['_component_']}`"


def _describe_training(t: TrainingConfig) -> str:
    optimizer = t.optimizer["_component_"].rpartition(".")[2]
    steps = "" if t.max_steps is None else f"at most {t.max_steps} steps, "
    return f"{optimizer}, lr {t.optimizer.get('lr')}, global batch {t.global_batch_size}, {steps}{t.epochs} epochs"


def _held_out(c: Config) -> dict[str, str]:
    return {"held out": describe_data(c.evaluate.dataset)}


def _collect_common_card(c: Config, folder: Path) -> Facts:
    return {
        "folder": folder,
        **origin_of(None if c.base else Path(c.checkpoint_dir)),
        "tokenizer_file": "tokenizer.json" if str(c.tokenizer.get("path")).endswith(".json") else "tokenizer.model",
        "export_options": c.export,
    }
