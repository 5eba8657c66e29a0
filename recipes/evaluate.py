"""Measure every model of a finished run: quality, agreement, tasks, size and speed, and where the loss comes from.

    tune run evaluate --config llama3_2/1B_qat_lora_dpo [key=value …]        (after the chain, or `tune run spinquant`)
    tune run evaluate --config … evaluate.tasks=[mmlu,arc_challenge,gsm8k] evaluate.models=[bf16,ptq,final,final.pte]
    tune run evaluate output_dir=runs/1B [key=value …]              the same; the run says how it was made
    tune run evaluate /any/model.pte [key=value …]                  one file, a bundle, or convert/model, wherever it is

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
so asking for more costs only what is new. Without --config, what the run measured last is measured again. One file
alone is measured without a run: its numbers are printed, and with output_dir=FOLDER they go to evaluation.json there.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from llamaq.checkpoints.load import start_inputs, start_weights
from llamaq.checkpoints.torchtune import weights_of
from llamaq.config import Config, load, parse_arguments, without
from llamaq.config.view import only
from llamaq.errors import UserError
from llamaq.evaluate.loose import measure_loose, table_of
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
from llamaq.runs import signals
from llamaq.runs.files import write_json
from llamaq.runs.main import errors_on_one_line, main
from llamaq.runs.manifest import MANIFEST, read_manifest
from llamaq.runs.ranks import say
from llamaq.runs.reader import recorded_config
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
    model = build_model(c.model, weights_of(*folders), None, adapters)
    merge_adapters(model)
    return build_model(c.model, model.weights(), scheme)  # an untied head included


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


# --- without a config ------------------------------------------------------------------------------------------------


def settings_of(name: str, overrides: list[str]) -> Config:
    """Return the settings: of a config, or those that a run has recorded, which then is asked for what it measured.

    Raises:
        UserError: as `load`, or the folder holds no run.
    """
    folder = Path(name).expanduser()
    if (folder / "run.json").is_file():
        return recorded_config(folder, None, [*measured_last(folder), *overrides])
    if f"output_dir={name}" in overrides:
        raise UserError(f"output_dir={name} holds no run; name the folder of one, or give --config to begin one")
    return load(name, overrides)


def measured_last(folder: Path) -> list[str]:
    """Return the settings that ask for what a run has measured already, so that nothing new is trained or exported."""

    def asked(stage: str) -> list[str]:
        path = folder / stage
        return read_manifest(path)["identity"]["arguments"]["models"] if (path / MANIFEST).is_file() else []

    names = [*asked("evaluate"), *(f"{name}.pte" for name in asked("files"))]
    settings = [f"evaluate.models=[{','.join(names)}]"] if names else []
    if not (folder / "report" / MANIFEST).is_file():  # which would have recorded it
        settings.append(f"evaluate.control={str((folder / 'control_lora' / MANIFEST).is_file()).lower()}")
    speed = not names or (folder / "speed" / MANIFEST).is_file()
    return [*settings, f"evaluate.speed={str(speed).lower()}"]


def names_a_file(name: str) -> bool:
    """Tell whether what stands in the config's place is a .pte or a folder, and no run."""
    path = Path(name).expanduser()
    return name.endswith(".pte") or (path.is_dir() and not (path / "run.json").is_file())


def evaluate_file(name: str, overrides: list[str]) -> None:
    """Measure one file or checkpoint and print what was found."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("one file is measured in one process; leave --nproc_per_node out")
    if f"output_dir={name}" in overrides:
        raise UserError(f"output_dir={name} holds no run; name the folder of one, or the file alone: {name}")
    folder = next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("output_dir=")), None)
    result = measure_loose(Path(name).expanduser(), [o for o in overrides if not o.startswith("output_dir=")])
    print(table_of(result))
    if folder is not None:
        Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
        write_json(Path(folder).expanduser() / "evaluation.json", result)


if __name__ == "__main__":
    with signals.handled(), errors_on_one_line():
        given, asked_for = parse_arguments(sys.argv[1:], __doc__ or "")
        if names_a_file(given):
            evaluate_file(given, asked_for)
            sys.exit(0)
    main(recipe, __doc__, read=settings_of)
