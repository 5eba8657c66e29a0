"""Write the sections on what was measured beyond the scores: exported files, speed, sensitivity, tasks.

The page and the model card share them. `measured` maps stages to their metrics; without its stage a section is left
out.
"""

from collections.abc import Iterator
from typing import Any

from llamaq.evaluate.sensitivity import first_divergence
from llamaq.export.benchmark import MEASURES, median_and_quartiles
from llamaq.export.benchmark import markdown as benchmark_table
from llamaq.report.tables import MIB, files_table, hand_over_table, model_title, pairs_table, parts_table, tasks_table

SAME_STREAM = 1e-5  # relative error of a residual stream that float32 sums in another order explain

Measured = dict[str, Any]


def measured_parts(measured: Measured) -> list[str]:
    """Return all sections, as paragraphs."""
    return [
        *_files_parts(measured.get("files")),
        *_speed_parts(measured.get("speed")),
        *_contents_parts(measured.get("export")),
        *_sensitivity_parts(measured.get("sensitivity")),
        *_tasks_parts(tasks_of(measured)),
    ]


def tasks_of(measured: Measured) -> dict[str, dict[str, Any]]:
    """Return model or file → metrics of its stage `tasks_NAME`."""
    return {k.removeprefix("tasks_"): v for k, v in measured.items() if k.startswith("tasks_")}


def task_values(measured: Measured) -> Iterator[tuple[str, str, str, float, float | None]]:
    """Yield model, task, metric, value and standard error of everything that tasks measured."""
    for model, result in tasks_of(measured).items():
        for task, r in result["results"].items():
            for metric, m in r["metrics"].items():
                yield model, task, metric, m["value"], m.get("stderr")


def speed_summary(model: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return median and quartiles of each measure of a .pte, in the unit of its heading, e.g. `decode (tokens/s)`."""
    values = {}
    for key, (title, unit, _, _) in MEASURES.items():
        middle, low, high = median_and_quartiles(model[key])
        scale = MIB if unit == "MiB" else 1
        values[f"{title} ({unit})"] = (middle / scale, low / scale, high / scale)
    return values


def _files_parts(files: dict[str, Any] | None) -> list[str]:
    if files is None:
        return []
    read = next(iter(files["scores"].values()))
    return [
        "## Measured on the exported files",
        f"The first {read['samples']:,} held-out samples ({read['tokens']:,} scored tokens), read one token per call "
        "through the KV cache of each file. *The model* is what the file was made from; it reads the same text as "
        "llamaq computes it, in float32.",
        files_table(files["scores"]),
        "Every form of the model that ships, compared with every other form on the tokens of the gates: "
        "KL(row ‖ column) in nats per token, top-1, top-5, SQNR.",
        pairs_table(files["pairs"]),
        "The fake-quantized model, compared with itself when only the arithmetic changes. First, the output of every "
        "linear is perturbed by one float32 ulp; no export can be expected to be closer. Second, the model runs under "
        "bf16 autocast, as it does in training with `dtype=bf16`.",
        hand_over_table(files["numerics"]),
        "Relative error of the residual stream after each block:",
        "![by block](blocks.png)",
        "\n".join(f"- {hand_over}: {first_block(errors)}" for hand_over, errors in files["blocks"].items()),
    ]


def first_block(errors: list[float]) -> str:
    """Say where two models begin to differ, from the relative error of the residual stream after each block."""
    at = first_divergence(errors, SAME_STREAM)
    if at is None:
        return f"no block is off by more than {SAME_STREAM:.0e} (largest: {max(errors):.1e})"
    return f"off from block {at} on ({errors[at]:.1e} there, {errors[-1]:.1e} after the last)"


def _speed_parts(speed: dict[str, Any] | None) -> list[str]:
    if speed is None:
        return []
    s, names = speed["settings"], {k: model_title(f"{k}.pte") for k in speed["models"]}
    return [
        "## Size and speed",
        f"On {speed['device']} with {s['threads']} threads: a prompt of {s['prompt_tokens']} tokens, then "
        f"{s['new_tokens']} new ones. Medians of {s['runs'] * s['rounds']} runs, in {s['rounds']} processes per model; "
        "quartiles in brackets; the ratio to the first model in bold. Memory is the peak resident set of the process "
        "minus what Python and its libraries held before. docs/export.md says how to measure on a phone.",
        benchmark_table(speed, names),
        "![speed](speed.png)",
        *(f"{names[k]}: sha256 `{m['sha256']}`" for k, m in speed["models"].items()),
    ]


def _contents_parts(exported: dict[str, Any] | None) -> list[str]:
    return ["Contents of the file that ships:", parts_table(exported["parts"])] if exported else []


def _sensitivity_parts(s: dict[str, Any] | None) -> list[str]:
    if s is None:
        return []
    return [
        "## Where quantization costs",
        f"PTQ of the BF16 model on {s['tokens']:,} held-out tokens; KL from BF16 in nats per token. With everything "
        f"quantized it is {s['whole']:.2e}. Left: only one linear is quantized. Right: the KL that is saved when all "
        "but one are.",
        "![sensitivity](sensitivity.png)",
        "\n".join(f"- {line}" for line in s["advice"]),
    ]


def _tasks_parts(tasks: dict[str, dict[str, Any]]) -> list[str]:
    if not tasks:
        return []
    files = [f"{model_title(k)} `{v['sha256'][:12]}`" for k, v in tasks.items() if v["sha256"]]
    return [
        "## Tasks",
        "lm-evaluation-harness; ± is one standard error." + (f" Files: {', '.join(files)}." if files else ""),
        tasks_table(tasks),
        "![tasks](tasks.png)",
    ]
