"""What every model of a run is worth: quality, agreement, tasks, size and speed, and where the loss comes from.

    tune run evaluate --config llama3_2/1B_qat_lora_dpo [key=value …]        (after the chain, or `tune run spinquant`)
    tune run evaluate --config … evaluate.tasks=[mmlu,arc_challenge,gsm8k] evaluate.models=[bf16,ptq,final,final.pte]

    evaluate           held-out loss, KL and agreement of the models as llamaq computes them
    export_NAME        .pte files of models that do not ship, where evaluate.models asks for NAME.pte
    files              the same numbers read through each .pte, and agreement of the forms that what ships takes
    sensitivity        what quantizing each linear costs
    tasks_NAME         lm-evaluation-harness, on models and on .pte files
    speed              size, speed and memory of the .pte files on this machine
    page             page.md, plots, page.json, and README.md, the model card

NAME is bf16 (what the run starts from), ptq (that, rounded to nearest), control and ptq_control (trained alike without
quantization), qat, qat_lora, final, spinquant. Stages that are up to date are kept, so asking for more costs only that.
"""

from pathlib import Path
from typing import Any

from llamaq.config import Config
from llamaq.evaluate.scores import share_won_back
from llamaq.evaluate.stages import Candidate, Models, check, measure, score_all, score_metrics, score_stage
from llamaq.model.causal_lm import CausalLM, build_model
from llamaq.quant.prepare import merge_adapters
from llamaq.recipes.export_executorch import final_model, parts_of, trained_model
from llamaq.recipes.qat import qat
from llamaq.recipes.qat_lora import qat_lora
from llamaq.report import page, plots
from llamaq.report.publish import data_line, measured_facts, report_stage
from llamaq.runs.main import main
from llamaq.runs.run import Run, say
from llamaq.train.sft import loss_curve, start_inputs, start_weights, weights_of


def chain_names(c: Config) -> tuple[list[str], str]:
    """Names of the chain's models, and of the one that ships."""
    stages = ["qat", "qat_lora", "final"][: ["qat", "qat_lora", "qat_dpo"].index(c.export.stage) + 1]
    names = ["bf16", "ptq", *(["control", "ptq_control"] if c.evaluate.control else []), *stages]
    return names, stages[-1]


def chain_models(run: Run) -> Models:
    """The models of the training chain."""
    c, scheme = run.config, run.scheme

    def control(scheme: Any) -> CausalLM:
        weights = weights_of(run.path("control_qat"), run.path("control_lora"))
        merged = merge_adapters(build_model(c.model, weights, None, (c.adapters.rank, c.adapters.alpha)))
        return build_model(c.model, merged.get_submodule("decoder").state_dict(), scheme)

    controls = [run.path("control_qat"), run.path("control_lora")]
    every = {
        "bf16": Candidate(lambda: build_model(c.model, start_weights(c), None), start_inputs(c)),
        "ptq": Candidate(lambda: build_model(c.model, start_weights(c), scheme), start_inputs(c)),
        "control": Candidate(lambda: control(None), controls),
        "ptq_control": Candidate(lambda: control(scheme), controls),
        "qat": Candidate(lambda: trained_model(run, "qat"), [run.path("qat")]),
        "qat_lora": Candidate(
            lambda: trained_model(run, "qat_lora", frozen=True), [run.path("qat"), run.path("qat_lora")]
        ),
        "final": Candidate(lambda: final_model(run), [run.path("qat_dpo")]),
    }
    names, shipped = chain_names(c)
    return Models({n: every[n] for n in names}, shipped, "convert")


def evaluate(run: Run) -> Path:
    """Scores of every model of the chain, against the BF16 start and the control."""
    c = run.config
    if c.evaluate.control:
        qat(run, control=True)
        qat_lora(run, control=True)
    models = chain_models(run)

    def build(folder: Path) -> dict[str, Any]:
        scores = score_all(run, models)
        shares = {}
        if {"control", "ptq_control", "qat_lora"} <= set(scores):
            # only stage 2 has seen what the control has: stage 1 fewer steps, stage 3 other data
            shares = {"qat_lora": share_won_back(scores["ptq_control"], scores["qat_lora"], scores["control"])}
        return score_metrics(scores) | {"shares": shares}

    return score_stage(run, models, build)


def write_report(run: Run, measured: list[str]) -> Path:
    """The report's page, plots, JSON and model card of the chain, also logged to W&B.

    Args:
        run: the run.
        measured: stages of `measure`.
    """
    c = run.config
    shipped = ("qat", "qat_lora", "qat_dpo")[: ("qat", "qat_lora", "qat_dpo").index(c.export.stage) + 1]
    stages = [*shipped, "convert", "export", "evaluate", *(m for m in measured if m != "export")]

    def render(folder: Path, facts: dict[str, Any]) -> str:
        names = {page.MODELS[k]: s for k, s in facts["scores"].items()}
        baseline = "control" if "control" in facts["scores"] else "bf16"
        plots.losses(folder / "losses.png", curves(run))
        plots.quality(folder / "quality.png", {n: s["nll"] for n, s in names.items()}, page.MODELS[baseline])
        plots.agreement(
            folder / "agreement.png", {n: s[f"kl/{baseline}"] for n, s in names.items()},
            {n: s[f"top1/{baseline}"] for n, s in names.items()}, page.MODELS[baseline],
        )  # fmt: skip
        return page.render(facts)

    return report_stage(run, stages, lambda: gather(run, list(shipped), measured), render, chain_card(c))


def chain_card(c: Config) -> dict[str, Any]:
    """What the model card says of a chain's data and settings."""
    stages = ["qat", "qat_lora", "qat_dpo"][: ["qat", "qat_lora", "qat_dpo"].index(c.export.stage) + 1]
    trainings = {s: c.training(s) for s in stages}
    return {
        "base": Path(c.checkpoint_dir).name if c.base is None else "a model trained here",
        "license": "llama3.2" if c.base is None else "other",
        "checkpoint": Path(c.output_dir) / "convert" / "model",
        "rotation": None,
        "max_seq_length": c.export.max_seq_length,
        "max_context_length": c.export.max_context_length,
        "data": {s: data_line(t.dataset) for s, t in trainings.items()} | {"held out": data_line(c.evaluate.dataset)},
        "hyperparameters": {
            s: f"{t.optimizer['_component_'].rpartition('.')[2]}, lr {t.optimizer.get('lr')}, global batch "
            f"{t.global_batch_size}, {'' if t.max_steps is None else f'at most {t.max_steps} steps, '}{t.epochs} epochs"
            for s, t in trainings.items()
        },
    }


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


def gather(run: Run, trained: list[str], measured: list[str]) -> dict[str, Any]:
    """Everything the chain's page states, from the stages' manifests."""
    c = run.config
    return {
        **run.metrics("evaluate"),
        **measured_facts(run, measured),
        "rank": c.adapters.rank,
        "shipped": chain_names(c)[1],
        "hand_overs": {**run.metrics("convert"), **run.metrics("export")["hand_overs"]},
        "dpo": run.metrics("qat_dpo") if "qat_dpo" in trained else None,
        "training": [
            {"stage": s, "steps": m["steps"], "first": m["first"]["loss"], "last": m["last"]["loss"]}
            for s in trained
            for m in [run.metrics(s)]
        ],
        "files": {
            "quantized checkpoint, Meta layout": run.path("convert") / "model",
            "adapters for PEFT": run.path("convert") / "adapter",
            "exported model": run.path("export") / "model.pte",
            "model card": run.folder / "README.md",
            "all numbers": run.path("report") / "report.json",
            "metrics of each step": run.folder / "<stage>" / "metrics.jsonl",
            "W&B, if offline": f"wandb sync {run.folder}/wandb/offline-run-*",
        },
    }


def recipe(run: Run) -> None:
    if run.config.spinquant is not None and run.config.qat is None:
        from llamaq.recipes.spinquant import evaluate_and_report

        say(f"report: {evaluate_and_report(run)}/report.md")
        return
    check(run.config, *chain_names(run.config))
    say(f"report: {evaluate_and_report_chain(run)}/report.md")


def evaluate_and_report_chain(run: Run) -> Path:
    """Scores, measurements and page of the training chain; returns the report's folder."""
    trained = [run.path(p) for p in parts_of(run.config.export.stage)]
    run.need("export", made_from=[run.need("convert", made_from=trained)])
    evaluate(run)
    return write_report(run, measure(run, chain_models(run)))


if __name__ == "__main__":
    main(recipe, __doc__)
