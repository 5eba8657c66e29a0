"""Define the stage `report`: report.md, its plots, index.html, report.json and README.md, and the same in W&B."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llamaq
from llamaq.config import Config
from llamaq.config.view import only
from llamaq.evaluate.models import Models, stages_up_to
from llamaq.model.names import LINEARS
from llamaq.report import plots
from llamaq.report.card import render_card, write_card
from llamaq.report.facts import (
    REPORTED,
    Facts,
    collect_chain_card,
    collect_chain_facts,
    collect_spinquant_card,
    collect_spinquant_facts,
    layer_error_curves,
    loss_curves,
)
from llamaq.report.html import html_page
from llamaq.report.measured import speed_summary, task_values
from llamaq.report.page import render_chain_page, render_spinquant_page
from llamaq.report.tables import MODELS, model_title
from llamaq.runs.ranks import from_rank_zero, on_rank_zero
from llamaq.runs.run import Run
from llamaq.runs.tracking import Tracker

Metrics = dict[str, Any]  # stage → its metrics
Compose = Callable[[Path, Metrics], tuple[Facts, str, Facts]]


def report_chain(run: Run, models: Models, measured: list[str]) -> Path:
    """Write the report of a training chain; return the stage's folder.

    Args:
        run: the run.
        models: its models.
        measured: the stages of `llamaq.evaluate.stages.measure`.
    """
    c, trained = only(run.config, *REPORTED), stages_up_to(run.config.export.stage)

    def compose(folder: Path, metrics: Metrics) -> tuple[Facts, str, Facts]:
        facts = collect_chain_facts(c, run.folder, metrics, models.shipped, trained, measured)
        plots.plot_losses(folder / "losses.png", loss_curves(run.folder))
        _plot_scores(folder, facts["scores"], "control" if "control" in facts["scores"] else "bf16")
        return facts, render_chain_page(facts), collect_chain_card(c, run.folder, trained)

    stages = [*trained, models.codes]
    return _report_stage(run, c, stages, measured, compose, made_by="tune run qat_lora_dpo")


def report_spinquant(run: Run, models: Models, candidate_names: list[str], measured: list[str]) -> Path:
    """Write the report of a SpinQuant run; return the stage's folder.

    Args:
        run: the run.
        models: its models.
        candidate_names: of all candidates; their stages are `candidate_NAME`.
        measured: the stages of `llamaq.evaluate.stages.measure`.
    """
    c = only(run.config, *REPORTED)

    def compose(folder: Path, metrics: Metrics) -> tuple[Facts, str, Facts]:
        facts = collect_spinquant_facts(c, run.folder, metrics, models.shipped, candidate_names, measured)
        candidates, chosen = facts["candidates"], facts["chosen"]
        outliers = candidates[chosen]["outliers"]
        _plot_scores(folder, facts["scores"], "bf16")
        kl = {name: (m["kl"], m["kl_interval"]) for name, m in candidates.items()}
        plots.plot_selection(folder / "selection.png", kl, chosen)
        plots.plot_outliers(folder / "outliers.png", outliers["before"], outliers["after"])
        plots.plot_layer_errors(folder / "layer_errors.png", layer_error_curves(candidates, chosen))
        return facts, render_spinquant_page(facts), collect_spinquant_card(c, run.folder, models.shipped, chosen)

    stages = ["calibrate", *(f"candidate_{name}" for name in candidate_names), models.codes]
    return _report_stage(run, c, stages, measured, compose, made_by="tune run spinquant")


def _report_stage(run: Run, c: Config, made: list[str], measured: list[str], compose: Compose, made_by: str) -> Path:
    """Define the stage `report` of either kind of run.

    Args:
        run: the run.
        c: the settings that the report reads.
        made: the stages up to the one with the codes.
        measured: the stages of `llamaq.evaluate.stages.measure`.
        compose: draws the plots of this kind of run into a folder; returns the facts, the page, and the card's facts.
        made_by: the command that makes the stages, for errors.
    """
    stages = list(dict.fromkeys([*made, "export", "answer", "evaluate", *measured]))
    inputs = [run.need(stage, made_by=made_by) for stage in stages]
    metrics = from_rank_zero(lambda: {stage: run.metrics(stage) for stage in stages})

    def build(folder: Path) -> dict[str, Any]:
        facts, page, for_card = compose(folder, metrics)
        plot_measured(folder, facts["measured"])
        (folder / "report.md").write_text(page, encoding="utf-8")
        (folder / "index.html").write_text(html_page(page, folder), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(facts | {"stages": metrics}, indent=1, default=str))
        (folder / "README.md").write_text(render_card(facts | for_card), encoding="utf-8")
        with run.tracker("report", folder) as tracker:
            track_report(tracker, facts, folder)
        return {"finished": facts["finished"]}

    # a stage's content does not cover its metrics, and the report shows them
    arguments = {"version": llamaq.__version__, "metrics": metrics}
    folder = run.stage("report", on_rank_zero(build), c, inputs, arguments, version=2)
    from_rank_zero(lambda: write_card(run.folder, (folder / "README.md").read_text(encoding="utf-8")))
    return folder


def _plot_scores(folder: Path, scores: dict[str, dict[str, float]], baseline: str) -> None:
    """Draw NLL and agreement of each model, against the baseline."""
    named, title = {MODELS[name]: s for name, s in scores.items()}, MODELS[baseline]
    plots.plot_quality(folder / "quality.png", {n: s["nll"] for n, s in named.items()}, title)
    kl = {n: s[f"kl/{baseline}"] for n, s in named.items()}
    top1 = {n: s[f"top1/{baseline}"] for n, s in named.items()}
    plots.plot_agreement(folder / "agreement.png", kl, top1, title)


def plot_measured(folder: Path, measured: Metrics) -> None:
    """Draw what was measured beyond the scores."""
    if files := measured.get("files"):
        plots.plot_blocks(folder / "blocks.png", files["blocks"])
    if speed := measured.get("speed"):
        panels: dict[str, dict[str, tuple[float, float, float]]] = {}
        for name, model in speed["models"].items():
            for title, values in speed_summary(model).items():
                panels.setdefault(title, {})[model_title(f"{name}.pte")] = values
        plots.plot_speed(folder / "speed.png", panels)
    if s := measured.get("sensitivity"):
        saved = {unit: s["whole"] - kl for unit, kl in s["left_out"].items()}
        plots.plot_sensitivity(folder / "sensitivity.png", s["alone"], saved, LINEARS)
    tasks: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for model, task, metric, value, stderr in task_values(measured):
        tasks.setdefault((task, metric), {})[model_title(model)] = (value, stderr or 0.0)
    if tasks:
        plots.plot_tasks(folder / "tasks.png", tasks)


def track_report(tracker: Tracker, facts: Facts, folder: Path) -> None:
    """Log the report's numbers and plots to W&B."""
    _track_table(tracker, "quality", "model", {MODELS[name]: s for name, s in facts["scores"].items()})
    measured = facts["measured"]
    if files := measured.get("files"):
        _track_table(tracker, "files", "file", files["scores"])
    if speed := measured.get("speed"):
        medians = {
            name: {title: middle for title, (middle, _, _) in speed_summary(model).items()}
            for name, model in speed["models"].items()
        }
        _track_table(tracker, "speed", "file", medians)
    if s := measured.get("sensitivity"):
        rows = [[unit, kl, s["whole"] - s["left_out"][unit]] for unit, kl in s["alone"].items()]
        tracker.table("sensitivity", ["layer", "kl_alone (nats/token)", "kl_saved (nats/token)"], rows)
    if tasks := [list(row) for row in task_values(measured)]:
        tracker.table("tasks", ["model", "task", "metric", "value", "stderr"], tasks)
    for picture in sorted(folder.glob("*.png")):
        tracker.image(picture.stem, picture)
    tracker.summary({"hand_overs": facts["hand_overs"], "shares": facts.get("shares", facts.get("share"))})


def _track_table(tracker: Tracker, name: str, key: str, rows: dict[str, dict[str, Any]]) -> None:
    """Log a table whose rows all have the columns of the first."""
    columns = list(next(iter(rows.values())))
    tracker.table(name, [key, *columns], [[title, *values.values()] for title, values in rows.items()])
