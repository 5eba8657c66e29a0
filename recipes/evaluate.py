"""Evaluate every step of the chain on held-out text, and write the report.

    tune run evaluate --config llama3_2/1B_qat_lora_dpo [key=value …]        (after `tune run export_executorch`)

Perplexity, KL and top-1 agreement for: the BF16 start and vanilla PTQ of it; the BF16 control (trained alike without
quantization) and PTQ of that; QAT; QAT + LoRA; the final model. The report is `report/report.md`, its plots beside it.
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llamaq
from llamaq.evaluate import plots, report
from llamaq.evaluate.scores import Scores, score, share_won_back
from llamaq.pipeline import Run, from_rank_zero, package_versions, say
from llamaq.quant.prepare import merge_adapters
from llamaq.recipes.export_executorch import final_model, on_rank_zero
from llamaq.recipes.qat import qat
from llamaq.recipes.qat_lora import qat_lora
from llamaq.runner import main
from llamaq.tracking import Tracker
from llamaq.train.data import build_dataset, collate_sft
from llamaq.train.memory import shape_of
from llamaq.train.model import CausalLM, build_model, pick_device
from llamaq.train.stages import loss_curve, start_inputs, start_weights, tokenizer_of, weights_of


def candidates(run: Run) -> dict[str, Callable[[], CausalLM]]:
    """How to build each model of the report, one at a time, float32 on the CPU."""
    c, scheme = run.config, run.scheme
    adapters = (c.adapters.rank, c.adapters.alpha)

    def control(scheme: Any) -> CausalLM:
        weights = weights_of(run.path("control_qat"), run.path("control_lora"))
        merged = merge_adapters(build_model(c.model, weights, None, adapters))
        return build_model(c.model, merged.get_submodule("decoder").state_dict(), scheme)

    def two() -> CausalLM:
        return build_model(c.model, weights_of(run.path("qat"), run.path("qat_lora")), scheme, adapters, frozen=True)

    models: dict[str, Callable[[], CausalLM]] = {
        "bf16": lambda: build_model(c.model, start_weights(c), None),
        "ptq": lambda: build_model(c.model, start_weights(c), scheme),
        "control": lambda: control(None),
        "ptq_control": lambda: control(scheme),
        "qat": lambda: build_model(c.model, weights_of(run.path("qat")), scheme),
        "qat_lora": two,
        "final": lambda: final_model(run),
    }
    return models if c.evaluate.control else {k: v for k, v in models.items() if "control" not in k}


def evaluate(run: Run) -> Path:
    """Scores of every model, against the BF16 start and the control."""
    c = run.config
    if c.evaluate.control:
        qat(run, control=True)
        qat_lora(run, control=True)
    stages = ["qat", "qat_lora", "qat_dpo", *(["control_qat", "control_lora"] if c.evaluate.control else [])]
    inputs = [*start_inputs(c), *(run.need(s) for s in stages)]

    def build(folder: Path) -> dict[str, Any]:
        scores = score_all(run, candidates(run))
        shares = {}
        if c.evaluate.control:
            # only stage 2 has seen what the control has: stage 1 fewer steps, stage 3 other data
            shares = {"qat_lora": share_won_back(scores["ptq_control"], scores["qat_lora"], scores["control"])}
        return {
            "samples": len(scores["bf16"].tokens),
            "tokens": int(scores["bf16"].tokens.sum()),
            "scores": {k: s.means() for k, s in scores.items()},
            "shares": shares,
        }

    settings = {"evaluate": c.evaluate, "model": c.model, "tokenizer": c.tokenizer, "adapters": c.adapters}
    return run.stage("evaluate", on_rank_zero(build), settings, inputs)


def score_all(run: Run, models: dict[str, Callable[[], CausalLM]]) -> dict[str, Scores]:
    """Per-sample scores of every model; the references stay in memory, the others come and go."""
    c, device = run.config, pick_device(run.config.device)
    tokenizer = tokenizer_of(c)
    dataset = build_dataset(c.evaluate.dataset, tokenizer, "evaluate.dataset")
    samples = [dataset[i] for i in range(min(len(dataset), c.evaluate.max_samples or len(dataset)))]
    references = {k: models[k]().eval().to(device) for k in ("bf16", "control") if k in models}
    scores = {}
    for name, make in models.items():
        model = references[name] if name in references else make().eval().to(device)
        scores[name] = score(
            model, references, samples, lambda s: collate_sft(s, tokenizer.pad_id), c.evaluate.batch_size, name
        )
        del model
        gc.collect()
    return scores


def write_report(run: Run) -> Path:
    """The report's page and plots, also logged to W&B."""
    c = run.config
    stages = ("qat", "qat_lora", "qat_dpo", "convert", "export", "evaluate")
    inputs = [run.need(s) for s in stages]
    metrics = from_rank_zero(lambda: {s: run.metrics(s) for s in stages})  # what the page shows of them

    def build(folder: Path) -> dict[str, Any]:
        facts = gather(run)
        names = {report.MODELS[k]: s for k, s in facts["scores"].items()}
        baseline = "control" if c.evaluate.control else "bf16"
        plots.losses(folder / "losses.png", curves(run))
        plots.quality(folder / "quality.png", {n: s["nll"] for n, s in names.items()}, report.MODELS[baseline])
        plots.agreement(
            folder / "agreement.png", {n: s[f"kl/{baseline}"] for n, s in names.items()},
            {n: s[f"top1/{baseline}"] for n, s in names.items()}, report.MODELS[baseline],
        )  # fmt: skip
        report.write(folder, report.render(facts))
        with Tracker(c, run.id, "report", folder) as tracker:
            columns = ["model", *next(iter(facts["scores"].values()))]
            tracker.table("quality", columns, [[n, *s.values()] for n, s in names.items()])
            for name in ("losses", "quality", "agreement"):
                tracker.image(name, folder / f"{name}.png")
            tracker.summary({"shares": facts["shares"], "hand_overs": facts["hand_overs"]})
        return {"finished": facts["finished"]}

    return run.stage("report", on_rank_zero(build), {"version": llamaq.__version__, "metrics": metrics}, inputs)


def curves(run: Run) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    panels = {"QAT": ("qat", "control_qat"), "LoRA": ("qat_lora", "control_lora"), "DPO": ("qat_dpo",)}
    return {
        title: {
            "BF16 control" if s.startswith("control") else "quantized": loss_curve(run.path(s))
            for s in stages
            if run.path(s).is_dir()
        }
        for title, stages in panels.items()
    }


def gather(run: Run) -> dict[str, Any]:
    """Everything the page states, from the stages' manifests."""
    c, evaluation, exported = run.config, run.metrics("evaluate"), run.metrics("export")
    return {
        **evaluation,
        "name": run.folder.name,
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "version": llamaq.__version__,
        "packages": package_versions(),
        "parameters": shape_of(c.model).weights,
        "group_size": c.scheme.group_size,
        "rank": c.adapters.rank,
        "hand_overs": {**run.metrics("convert"), **exported["hand_overs"]},
        "constants": exported["constants"],
        "gate_tokens": c.export.gate_tokens,
        "max_relative_error": c.export.max_relative_error,
        "min_top1": c.export.min_top1_agreement,
        "max_kl": c.export.max_kl,
        "pte_bytes": exported["bytes"],
        "prompt": exported["prompt"],
        "answer": exported["answer"] or "(nothing)",
        "dpo": run.metrics("qat_dpo"),
        "training": [
            {"stage": s, "steps": m["steps"], "first": m["first"]["loss"], "last": m["last"]["loss"]}
            for s in ("qat", "qat_lora", "qat_dpo")
            for m in [run.metrics(s)]
        ],
        "files": {
            "quantized checkpoint, Meta layout": run.path("convert") / "model",
            "adapters for PEFT": run.path("convert") / "adapter",
            "exported model": run.path("export") / "model.pte",
            "metrics of each step": run.folder / "<stage>" / "metrics.jsonl",
            "W&B, if offline": f"wandb sync {run.folder}/wandb/offline-run-*",
        },
    }


def recipe(run: Run) -> None:
    evaluate(run)
    page = write_report(run) / "report.md"
    say(f"report: {page}")


if __name__ == "__main__":
    main(recipe, __doc__)
