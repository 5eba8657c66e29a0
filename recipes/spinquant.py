"""SpinQuant: quantize a BF16 checkpoint without training it. In: the checkpoint and text to calibrate on. Out: a .pte.

    tune run spinquant --config tiny_spinquant                                 minutes, nothing to download
    tune run spinquant --config llama3_2/1B_spinquant checkpoint_dir=/path/to/Llama-3.2-1B-Instruct

    corpus, base      what the run starts from, if the config says how to make it
    calibrate         what each linear reads on the calibration text, and how much errors in its output cost
    candidate_NAME    one set of rotations (none, R4, R2 + R4, R1 + R2 + R4): learned, merged, rounded to integer codes,
                      and judged by KL from the BF16 model on text it was not calibrated on
    spinquant         the best candidate, Meta layout; loads in ExecuTorch with `--use_spin_quant native`
    export, answer    the .pte, through the gates of every hand-over; what it answers to `export.prompt`
    evaluate, report  loss and agreement on held-out text, and all else that `evaluate` asks for; report/report.md
    bundle            what an app needs: model.pte, its tokenizer, settings, card and checksums

Run it again to resume. It runs in one process, on one GPU or a CPU; the samples are the same on either.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from llamaq.checkpoints.load import start_inputs, start_weights
from llamaq.config import without
from llamaq.config.view import only
from llamaq.data.tokenizer import copy_tokenizer
from llamaq.evaluate.models import MODEL_SETTINGS, Models, ModelSource, check_evaluation
from llamaq.evaluate.scores import Scores, share_of_kl
from llamaq.evaluate.stages import measure, score_stage
from llamaq.export.bundle import bundle
from llamaq.export.exporter import load_eager
from llamaq.export.gates import GATES, check_gate, gate_tokens
from llamaq.model.build import build_model, pick_device, scheme_of
from llamaq.model.causal_lm import CausalLM
from llamaq.model.compare import agreement, perturbed
from llamaq.recipes.export_executorch import answer, export
from llamaq.recipes.qat import prepare_start
from llamaq.report.publish import report_spinquant
from llamaq.runs.main import main
from llamaq.runs.ranks import from_rank_zero, on_rank_zero, say
from llamaq.runs.run import Run
from llamaq.spinquant.calibrate import calibrate_model, load_statistics, save_statistics
from llamaq.spinquant.candidates import (
    Candidate,
    Setup,
    candidates_of,
    choose,
    load_model,
    make_candidate,
    settings_read,
)
from llamaq.spinquant.loops import bar
from llamaq.spinquant.windows import TEXT, windows

NEEDS = ("spinquant",)
TRAINED = ("qat", "qat_lora", "qat_dpo")  # sections of the other chain, which a config may hold too
SHIPPED = "spinquant"  # the stage with the best candidate, and the name of its model in the evaluation


def calibrate(run: Run) -> Path:
    """Collect statistics in one forward and backward pass over the calibration text."""
    c = only(run.config, *TEXT, "spinquant.batch_size")

    def build(folder: Path) -> dict[str, Any]:
        text, _ = windows(c)
        weights, batches = start_weights(c), list(text.split(c.section("spinquant").batch_size))
        began, progress = time.monotonic(), bar("calibrate", "batch")
        save_statistics(folder, calibrate_model(c.model, weights, batches, c.seed, pick_device(c.device), progress))
        return {"tokens": text.numel(), "seconds": time.monotonic() - began}

    return run.stage("calibrate", on_rank_zero(build), c, start_inputs(c))


def try_candidate(run: Run, candidate: Candidate) -> Path:
    """Learn the rotations of a candidate, merge them, round the weights and judge the result."""
    c = only(run.config, *settings_read(candidate, run.config.section("spinquant")))
    calibrated = run.need("calibrate")

    def build(folder: Path) -> dict[str, Any]:
        setup = Setup.of(c, load_statistics(calibrated))
        return make_candidate(candidate, setup, folder, lambda: run.tracker(candidate.stage, folder))

    return run.stage(candidate.stage, on_rank_zero(build), c, [calibrated, *start_inputs(c)])


def select(run: Run) -> Path:
    """Choose the candidate that ships, and check its codes through ExecuTorch's own loader."""
    c = only(run.config, *GATES, "scheme", "spinquant.force")
    candidates = candidates_of(run.config.section("spinquant"), run.config.seed)
    folders, force = {k.name: run.need(k.stage) for k in candidates}, c.section("spinquant").force
    chosen = from_rank_zero(lambda: choose(force, {k.name: run.metrics(k.stage)["kl"] for k in candidates}))

    @torch.no_grad()
    def build(folder: Path) -> dict[str, Any]:
        shutil.copytree(folders[chosen] / "model", folder / "model", dirs_exist_ok=True)
        copy_tokenizer(c.tokenizer, folder / "model")
        tokens = torch.tensor([gate_tokens(c)])
        ours, eager = load_model(c, folder), load_eager(folder / "model", tokens.shape[1])
        logits = ours(tokens)[0]
        with perturbed(ours.decoder):
            noise = agreement(logits, ours(tokens)[0])
        compared = agreement(logits, eager(tokens)[0])
        result = check_gate(c.export, "llamaq → ExecuTorch eager", compared, "relative_error", "top1", noise=noise)
        say(f"ships {chosen}")
        return {"chosen": chosen, "forced": force is not None, "executorch_eager": result}

    return run.stage(SHIPPED, on_rank_zero(build), c, list(folders.values()), {"chosen": chosen})


def shipped_model(run: Run) -> CausalLM:
    """Build the model that ships, as llamaq computes it."""
    return load_model(only(run.config, *MODEL_SETTINGS), run.path(SHIPPED))


def models_of(run: Run) -> Models:
    """Describe the models of the run: BF16, that rounded to nearest without calibration (PTQ), and what ships."""
    c = only(run.config, *MODEL_SETTINGS)
    start = start_inputs(c)
    known = {
        "bf16": ModelSource(lambda: build_model(c.model, start_weights(c), None), start, full_precision=True),
        "ptq": ModelSource(lambda: build_model(c.model, start_weights(c), scheme_of(c)), start),
        SHIPPED: ModelSource(lambda: shipped_model(run), [run.path(SHIPPED)]),
    }
    return Models(known, SHIPPED, SHIPPED, context=1)  # see `pte_gates` for why contexts of one token


def evaluate_and_report(run: Run) -> Path:
    """Score and measure what shipped, and write the report; return the report's folder."""
    run.need("export", made_from=[run.need(SHIPPED, made_by="tune run spinquant")], made_by="tune run spinquant")
    answer(run)
    models = models_of(run)

    def share(scores: dict[str, Scores]) -> dict[str, Any]:
        scored = {"ptq", SHIPPED} <= scores.keys()
        return {"share": share_of_kl(scores["ptq"], scores[SHIPPED], "bf16") if scored else None}

    score_stage(run, models, share)
    names = [k.name for k in candidates_of(run.config.section("spinquant"), run.config.seed)]
    report = report_spinquant(run, models, names, measure(run, models))
    bundle(run)
    return report


def recipe(run: Run) -> None:
    """Calibrate, try every candidate, ship the best one, and report."""
    run.config = without(run.config, *TRAINED)
    candidates = candidates_of(run.config.section("spinquant"), run.config.seed)
    check_evaluation(run.config, ["bf16", "ptq", SHIPPED], SHIPPED)
    prepare_start(run)
    calibrate(run)
    for candidate in candidates:
        try_candidate(run, candidate)
    select(run)
    export(run, SHIPPED, shipped_model, context=1)
    say(f"\nreport: {evaluate_and_report(run)}/report.md")


if __name__ == "__main__":
    main(recipe, __doc__, NEEDS)
