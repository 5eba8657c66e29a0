"""Compare runs on one page: `tune compare runs/a runs/b … [--output compare.html]`.

One table of quality, shares, sizes, speeds and the settings that differ, a column per run, then the plots side by side.
It reads what the runs left, report.json and the stages' manifests. Chain and SpinQuant runs mix; what a run does not
have is blank. The best value of a row is bold.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llamaq.errors import UserError
from llamaq.export.benchmark import MEASURES
from llamaq.report.html import html_page
from llamaq.report.measured import speed_summary, task_values
from llamaq.report.tables import MIB, MODELS, model_title, table
from llamaq.runs.manifest import MANIFEST, read_manifest

PLOTS = ("quality", "agreement", "losses", "selection", "outliers", "layer_errors", "blocks", "speed", "tasks")
HIGHER, LOWER = 1, -1  # which values are better

Cell = float | str | None


@dataclass(frozen=True)
class Finished:
    """A run as the page shows it."""

    name: str
    folder: Path
    facts: dict[str, Any]  # its report.json
    settings: dict[str, tuple[Any, Any]]  # dotted name → what it means (paths by content), as it was given


@dataclass(frozen=True)
class Row:
    """A line of the table: a value per run."""

    title: str
    cells: Sequence[Cell]
    form: str = ""
    better: int = 0


def main(argv: list[str]) -> int:
    """Run `tune compare` and return its exit code."""
    parser = argparse.ArgumentParser("tune compare", description="Compare runs on one page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output_dir")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page to write (%(default)s)")
    a = parser.parse_args(argv)
    try:
        write_comparison(a.runs, a.output)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(f"comparison: {a.output}")
    return 0


def write_comparison(folders: list[Path], output: Path) -> None:
    """Write the page that compares the runs in these folders.

    Raises:
        UserError: fewer than two runs, a folder that is no run or has no report, or the page cannot be written.
    """
    if len(folders) < 2:
        raise UserError("tune compare needs at least two runs: tune compare runs/a runs/b")
    runs = read_runs(folders)
    try:
        output.write_text(html_page(render_comparison(runs), Path("/")), encoding="utf-8")
    except OSError as e:
        raise UserError(f"--output={output} cannot be written: {e.strerror}") from e


# --- reading ----------------------------------------------------------------------------------------------------------


def read_runs(folders: list[Path]) -> list[Finished]:
    """Read what the runs left; runs whose folders have one name are called by their paths."""
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    return [read_run(f, name if unique else str(f)) for f, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> Finished:
    """Read a run's report and settings."""
    report = folder / "report" / "report.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the output_dir of a run")
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} is not a run (it has no run.json); give the output_dir of a run")
    if not report.is_file():
        raise UserError(f"{folder} has no report yet; `tune run evaluate` with its settings writes one")
    try:
        facts = json.loads(report.read_text())
    except json.JSONDecodeError as e:
        raise UserError(f"{report} is torn ({e}); delete {report.parent} and run `tune run evaluate` again") from e
    return Finished(name, folder.resolve(), facts, settings_of(folder))


def settings_of(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Return the settings that the stages of a run read: dotted name → what it means, as it was given."""
    found: dict[str, tuple[Any, Any]] = {}
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        manifest = read_manifest(path.parent)
        if "version" in manifest["identity"]:  # llamaq 0.1.0 named settings in its own way, stage by stage
            meanings = dict(_flat(manifest["identity"]["settings"]))
            found |= {name: (meanings.get(name, value), value) for name, value in _flat(manifest["settings"])}
    return found


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if _is_list_of_sections(node) else None
    if items is None:
        yield prefix, node
        return
    for key, value in items:
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def _is_list_of_sections(node: Any) -> bool:
    return isinstance(node, list) and any(isinstance(item, dict) for item in node)


# --- the page ---------------------------------------------------------------------------------------------------------


def render_comparison(runs: list[Finished]) -> str:
    """Return the page in markdown; its pictures have absolute paths."""
    names = [r.name for r in runs]
    sections = {
        "What ships": _model_rows(runs),
        "Quality of what ships": _quality_rows(runs),
        "Quality of each model": _each_model_rows(runs),
        "Share won back": _share_rows(runs),
        "Size and speed of what ships": _speed_rows(runs),
        "Tasks": _task_rows(runs),
        "Settings that differ": _setting_rows(runs, shared=True),
        "Settings that only some of the runs read": _setting_rows(runs, shared=False),
    }
    lines = []
    for title, rows in sections.items():
        kept = [row for row in rows if any(cell not in (None, "") for cell in row.cells)]
        if kept:
            lines += [[f"**{title}**", *[""] * len(runs)], *map(_line, kept)]
    parts = [
        f"# {' · '.join(map(_escaped, names))}",
        f"{len(runs)} runs of llamaq. Blank: the run does not have it. Bold: the best of its row.",
        table(["", *map(_escaped, names)], lines),
        "## Plots",
        table(["", *map(_escaped, names)], _plot_lines(runs), numbers=False),
    ]
    return "\n\n".join(parts) + "\n"


def _line(row: Row) -> list[str]:
    numbers = [cell for cell in row.cells if isinstance(cell, int | float)]
    best = max(numbers, key=lambda value: value * row.better, default=None)
    show_best = row.better and len(set(numbers)) > 1
    cells = []
    for cell in row.cells:
        text = "" if cell is None else _escaped(cell) if isinstance(cell, str) else f"{cell:{row.form}}"
        cells.append(f"**{text}**" if show_best and cell == best else text)
    return [_escaped(row.title), *cells]


def _escaped(text: str) -> str:
    r"""Return text as markdown that shows it in a cell: `a_b|c` → `a\_b\|c`."""
    return "".join(f"\\{c}" if c in r"\`*_[]<>|#!&" else c for c in " ".join(text.split()))


def _plot_lines(runs: list[Finished]) -> list[list[str]]:
    lines = []
    for name in PLOTS:
        pictures = [r.folder / "report" / f"{name}.png" for r in runs]
        if any(p.is_file() for p in pictures):
            cells = [f"![{name}]({quote(str(p).lstrip('/'))})" if p.is_file() else "" for p in pictures]
            lines.append([name.replace("_", " "), *cells])
    return lines


# --- rows -------------------------------------------------------------------------------------------------------------


def _model_rows(runs: list[Finished]) -> Iterator[Row]:
    facts = [r.facts for r in runs]
    yield Row("model", [MODELS.get(f.get("shipped", ""), f.get("shipped")) for f in facts])
    yield Row("rotation", [f.get("chosen") for f in facts])
    yield Row("parameters (M)", [_scaled(f.get("parameters"), 1e6) for f in facts], ",.1f")
    yield Row("finished", [f.get("finished") for f in facts])
    yield Row("llamaq", [f.get("version") for f in facts])
    yield Row("its answer", [f.get("answer") for f in facts])


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _quality_rows(runs: list[Finished]) -> Iterator[Row]:
    shipped = [r.facts.get("scores", {}).get(r.facts.get("shipped"), {}) for r in runs]
    measures = {
        "nll": ("NLL (nats/token)", ".4f", LOWER),
        "perplexity": ("perplexity", ".3f", LOWER),
        "kl/bf16": ("KL from its BF16 start (nats/token)", ".2e", LOWER),
        "top1/bf16": ("top-1", ".4f", HIGHER),
        "top5/bf16": ("top-5", ".4f", HIGHER),
    }
    for key, (title, form, better) in measures.items():
        yield Row(title, [s.get(key) for s in shipped], form, better)
    yield Row("held-out tokens scored", [r.facts.get("tokens") for r in runs], ",")


def _each_model_rows(runs: list[Finished]) -> Iterator[Row]:
    for name, title in MODELS.items():
        scores = [r.facts.get("scores", {}).get(name, {}) for r in runs]
        yield Row(f"NLL, {title}", [s.get("nll") for s in scores], ".4f", LOWER)
        if name != "bf16":
            yield Row(f"KL from BF16, {title}", [s.get("kl/bf16") for s in scores], ".2e", LOWER)


def _share_rows(runs: list[Finished]) -> Iterator[Row]:
    def cells(share: dict[str, float] | None) -> tuple[Cell, Cell]:
        return (share["share"], f"{share['low']:.2f} to {share['high']:.2f}") if share else (None, None)

    shares = [{"spinquant": r.facts.get("share"), **(r.facts.get("shares") or {})} for r in runs]
    for name, title in MODELS.items():
        values, intervals = zip(*(cells(s.get(name)) for s in shares), strict=True)
        of = "of PTQ's KL" if name == "spinquant" else "of the loss of the control's PTQ"
        yield Row(f"{title}: share {of}", list(values), ".2f", HIGHER)
        yield Row(f"{title}: its 95 % interval", list(intervals))


def _speed_rows(runs: list[Finished]) -> Iterator[Row]:
    yield Row("model.pte (MiB)", [_scaled(r.facts.get("pte_bytes"), MIB) for r in runs], ",.1f", LOWER)
    measured = [r.facts.get("measured", {}).get("speed") for r in runs]
    models = [(m or {}).get("models", {}).get(r.facts.get("shipped")) for m, r in zip(measured, runs, strict=True)]
    medians = [{t: middle for t, (middle, _, _) in speed_summary(m).items()} if m else {} for m in models]
    for key, (title, unit, form, more_is_better) in MEASURES.items():
        if key != "file_bytes":
            values = [m.get(f"{title} ({unit})") for m in medians]
            yield Row(f"{title} ({unit})", values, form, HIGHER if more_is_better else LOWER)
    yield Row("measured on", [m and f"{m['device']}, {m['settings']['threads']} threads" for m in measured])
    yield Row("prompt + new tokens", [m and "{prompt_tokens} + {new_tokens}".format(**m["settings"]) for m in measured])


def _task_rows(runs: list[Finished]) -> Iterator[Row]:
    found: dict[str, list[Cell]] = {}
    for i, run in enumerate(runs):
        for model, task, metric, value, _ in task_values(run.facts.get("measured", {})):
            ships = model.removesuffix(".pte") == run.facts.get("shipped")
            who = "what ships" + (", .pte" if model.endswith(".pte") else "") if ships else model_title(model)
            found.setdefault(f"{task}, {metric}: {who}", [None] * len(runs))[i] = value
    for title, cells in found.items():
        yield Row(title, cells, ".4f")


def _setting_rows(runs: list[Finished], shared: bool) -> Iterator[Row]:
    """Yield the settings with different values: those that all runs read, or those that only some do."""
    known = [r.settings for r in runs if r.settings]  # manifests of llamaq 0.1.0 tell none
    for name in sorted({name for settings in known for name in settings}):
        values = [settings[name][0] for settings in known if name in settings]
        differ = len({json.dumps(v, sort_keys=True, default=str) for v in values}) > 1
        in_all = len(values) == len(known)
        if in_all is shared and (differ or not in_all):
            yield Row(name, [_setting(r.settings, name) for r in runs])


def _setting(settings: dict[str, tuple[Any, Any]], name: str) -> Cell:
    if name not in settings:
        return None
    given = settings[name][1]
    return given if isinstance(given, str) else json.dumps(given, default=str)  # as in YAML: null, true
