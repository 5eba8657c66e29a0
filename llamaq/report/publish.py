"""The stage `page` of any run: page, plots, JSON and model card, and the same in W&B."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llamaq
from llamaq.evaluate.sensitivity import LINEARS
from llamaq.export.benchmark import MEASURES, summary
from llamaq.plan.memory import memory_plan, plan_length, shape_of
from llamaq.report import card, page, plots
from llamaq.runs.run import Run, from_rank_zero, on_rank_zero, package_versions
from llamaq.runs.tracking import Tracker


def report_stage(
    run: Run, stages: list[str], facts_of: Callable[[], dict[str, Any]],
    render: Callable[[Path, dict[str, Any]], str], for_card: dict[str, Any],
) -> Path:  # fmt: skip
    """The stage `page` of any run: page.md, its plots, page.json, README.md, and the same in W&B.

    Args:
        run: the run.
        stages: what the page reads.
        facts_of: everything it states.
        render: draws the plots of this kind of run into a folder and returns the page.
        for_card: what the card says besides.
    """
    c = run.config
    inputs = [run.need(s) for s in stages]
    metrics = from_rank_zero(lambda: {s: run.metrics(s) for s in stages})  # what the page shows of them

    def build(folder: Path) -> dict[str, Any]:
        facts = facts_of()
        draw_measured(folder, facts["measured"])
        page.write(folder, render(folder, facts))
        (folder / "report.json").write_text(json.dumps(facts | {"stages": metrics}, indent=1, default=str))
        text = card.render(facts | for_card | {"folder": run.folder})
        (folder / "README.md").write_text(text, encoding="utf-8")
        with Tracker(c, run.id, "report", folder) as tracker:
            scores = {page.MODELS[k]: s for k, s in facts["scores"].items()}
            tracker.table("quality", ["model", *facts["scores"]["bf16"]], [[n, *s.values()] for n, s in scores.items()])
            log_measured(tracker, facts["measured"])
            for picture in sorted(folder.glob("*.png")):
                tracker.image(picture.stem, picture)
            tracker.summary({"hand_overs": facts["hand_overs"], "shares": facts.get("shares", facts.get("share"))})
        return {"finished": facts["finished"]}

    folder = run.stage("report", on_rank_zero(build), {"version": llamaq.__version__, "metrics": metrics}, inputs)
    from_rank_zero(lambda: card.publish(run.folder, (folder / "README.md").read_text(encoding="utf-8")))
    return folder


def data_line(dataset: dict[str, Any]) -> str:
    """A dataset in a few words: the file's name, not its path, and who reads it."""
    source = dataset.get("data_files") or dataset.get("source")
    return f"`{Path(str(source)).name}` by `{dataset['_component_']}`"


def draw_measured(folder: Path, measured: dict[str, Any]) -> None:
    """Plots of what was measured beyond the scores."""
    if files := measured.get("files"):
        plots.blocks(folder / "blocks.png", files["blocks"])
    if result := measured.get("speed"):
        panels = {}
        for key, (title, unit, _, _) in MEASURES.items():
            scale = 2**20 if unit == "MiB" else 1
            panels[f"{title}, {unit}"] = {
                page.model_title(f"{name}.pte"): tuple(v / scale for v in summary(m[key]))
                for name, m in result["models"].items()
            }
        plots.speed(folder / "speed.png", panels)
    if s := measured.get("sensitivity"):
        saved = {unit: s["whole"] - kl for unit, kl in s["left_out"].items()}
        plots.sensitivity(folder / "sensitivity.png", s["alone"], saved, LINEARS)
    values: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for stage, result in measured.items():
        if stage.startswith("tasks_"):
            for task, r in result["results"].items():
                for metric, m in r["metrics"].items():
                    row = values.setdefault((task, metric), {})
                    row[page.model_title(stage.removeprefix("tasks_"))] = (m["value"], m.get("stderr") or 0.0)
    if values:
        plots.tasks(folder / "tasks.png", values)


def log_measured(tracker: Tracker, measured: dict[str, Any]) -> None:
    """Tables of it for W&B."""
    if files := measured.get("files"):
        columns = list(next(iter(files["scores"].values())))
        tracker.table("files", ["file", *columns], [[n, *s.values()] for n, s in files["scores"].items()])
    if result := measured.get("speed"):
        columns = [f"{title} ({unit})" for title, unit, _, _ in MEASURES.values()]
        rows = [
            [name, *(summary(m[key])[0] / (2**20 if unit == "MiB" else 1) for key, (_, unit, _, _) in MEASURES.items())]
            for name, m in result["models"].items()
        ]
        tracker.table("speed", ["file", *columns], rows)
    if s := measured.get("sensitivity"):
        rows = [[unit, kl, s["whole"] - s["left_out"][unit]] for unit, kl in s["alone"].items()]
        tracker.table("sensitivity", ["layer", "kl_alone (nats/token)", "kl_saved (nats/token)"], rows)
    rows = [
        [stage.removeprefix("tasks_"), task, metric, m["value"], m.get("stderr")]
        for stage, result in measured.items()
        if stage.startswith("tasks_")
        for task, r in result["results"].items()
        for metric, m in r["metrics"].items()
    ]
    if rows:
        tracker.table("tasks", ["model", "task", "metric", "value", "stderr"], rows)


def measured_facts(run: Run, measured: list[str]) -> dict[str, Any]:
    """What every page states of the export and of what was measured."""
    c, exported = run.config, run.metrics("export")
    return {
        "name": run.folder.name,
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
        "pte_bytes": exported["bytes"],
        "pte_sha256": exported["sha256"],
        "pte_metadata": exported["metadata"],
        "prompt": exported["prompt"],
        "answer": exported["answer"] or "(nothing)",
        "measured": {"export": exported} | {s: run.metrics(s) for s in measured},
        "plan": [asdict(need) | {"bytes": need.bytes} for need in memory_plan(c, plan_length(c))],
    }
