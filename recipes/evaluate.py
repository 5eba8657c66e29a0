"""Measure every model of a finished run: quality, agreement, tasks, size and speed, and where the loss comes from.

    tune run evaluate --config llama3_2/1B_qat_lora_dpo [key=value …]        (after the chain, or `tune run spinquant`)
    tune run evaluate --config … evaluate.tasks=[mmlu,arc_challenge,gsm8k] evaluate.models=[bf16,ptq,final,final.pte]

    evaluate           held-out loss, KL and agreement of the models as llamaq computes them
    export_NAME        .pte files of models that do not ship, where evaluate.models asks for NAME.pte
    files              the same numbers read through each .pte, and agreement of the forms of what ships
    sensitivity        what quantizing each linear costs
    tasks_NAME         lm-evaluation-harness, on models and on .pte files
    speed              size, speed and memory of the .pte files on this machine
    report             report.md, index.html, plots, report.json, and README.md, the model card
    bundle             model.pte with all that an app needs beside it

NAME is bf16 (what the run starts from), ptq (the same, rounded to nearest), control and ptq_control (trained alike
without quantization, and rounded afterwards), qat, qat_lora, final or spinquant. Stages that are up to date are kept,
so asking for more costs only what is new.
"""

from functools import partial
from pathlib import Path
from typing import Any

from llamaq.checkpoints.load import start_inputs, start_weights
from llamaq.checkpoints.torchtune import weights_of
from llamaq.config import Config, without
from llamaq.config.view import only
from llamaq.evaluate.models import MODEL_SETTINGS, Models, ModelSource, check_evaluation, stages_up_to
from llamaq.evaluate.scores import Scores, share_won_back
from llamaq.evaluate.stages import measure, score_stage
from llamaq.export.bundle import bundle
from llamaq.model.build import build_model, scheme_of
from llamaq.model.causal_lm import CausalLM
from llamaq.quant.prepare import merge_adapters
from llamaq.quant.scheme import Scheme
from llamaq.recipes.export_executorch import answer, parts_of, trained_model
from llamaq.recipes.qat import qat
from llamaq.recipes.qat_lora import qat_lora
from llamaq.report.publish import report_chain
from llamaq.runs.main import main
from llamaq.runs.manifest import MANIFEST
from llamaq.runs.ranks import say
from llamaq.runs.run import Run

MODEL_AFTER = {"qat": "qat", "qat_lora": "qat_lora", "qat_dpo": "final"}  # training stage → its model's name


def chain_names(c: Config) -> tuple[list[str], str]:
    """Return the names of the chain's models, and of the one that ships."""
    controls = ["control", "ptq_control"] if c.evaluate.control else []
    trained = [MODEL_AFTER[stage] for stage in stages_up_to(c.export.stage)]
    return ["bf16", "ptq", *controls, *trained], trained[-1]


def chain_models(run: Run) -> Models:
    """Return the models of the training chain."""
    c = only(run.config, *MODEL_SETTINGS)
    scheme, start = scheme_of(c), start_inputs(c)
    controls = [run.path("control_qat"), run.path("control_lora")]
    every = {
        "bf16": ModelSource(lambda: build_model(c.model, start_weights(c), None), start, full_precision=True),
        "ptq": ModelSource(lambda: build_model(c.model, start_weights(c), scheme), start),
        "control": ModelSource(lambda: control_model(c, controls, None), controls, full_precision=True),
        "ptq_control": ModelSource(lambda: control_model(c, controls, scheme), controls),
    }
    for stage, name in MODEL_AFTER.items():
        make = partial(trained_model, run, stage, frozen=stage == "qat_lora")  # stage 2 trained on the codes
        every[name] = ModelSource(make, [run.path(part) for part in parts_of(stage)])
    names, shipped = chain_names(run.config)
    return Models({name: every[name] for name in names}, shipped, codes="convert")


def control_model(c: Config, folders: list[Path], scheme: Scheme | None) -> CausalLM:
    """Build the control with its adapters merged, in full precision or rounded to nearest."""
    adapters = (c.adapters.rank, c.adapters.alpha)
    merged = merge_adapters(build_model(c.model, weights_of(*folders), None, adapters))
    return build_model(c.model, merged.get_submodule("decoder").state_dict(), scheme)


def evaluate(run: Run) -> Path:
    """Score every model of the chain, against the BF16 start and against the control, which is trained first."""
    if run.config.evaluate.control:
        qat(run, control=True)
        qat_lora(run, control=True)

    def summarize(scores: dict[str, Scores]) -> dict[str, Any]:
        if not {"control", "ptq_control", "qat_lora"} <= set(scores):
            return {"shares": {}}
        # only stage 2 has seen what the control has seen: stage 1 fewer steps, stage 3 other data
        return {"shares": {"qat_lora": share_won_back(scores["ptq_control"], scores["qat_lora"], scores["control"])}}

    return score_stage(run, chain_models(run), summarize)


def need_exported(run: Run) -> Path:
    """Check that the exported file was made from the stages as they are now; return its folder."""
    command = "tune run export_executorch"
    trained = [run.path(part) for part in parts_of(run.config.export.stage)]
    converted = run.need("convert", made_from=trained, made_by=command)
    return run.need("export", made_from=[converted], made_by=command)


def recipe(run: Run) -> None:
    """Measure a finished run and write its report."""
    c = run.config
    if c.spinquant is not None and (c.qat is None or (run.path("spinquant") / MANIFEST).is_file()):
        from llamaq.recipes.spinquant import TRAINED, evaluate_and_report

        run.config = without(c, *TRAINED)
        say(f"report: {evaluate_and_report(run)}/report.md")
        return
    run.config = c = without(c, "spinquant")
    for section in ("qat", "qat_lora") if c.evaluate.control else ("qat",):
        c.section(section)
    check_evaluation(c, *chain_names(c))
    need_exported(run)
    answer(run)
    evaluate(run)
    models = chain_models(run)
    report = report_chain(run, models, measure(run, models))
    bundle(run)
    say(f"report: {report}/report.md")


if __name__ == "__main__":
    main(recipe, __doc__)
