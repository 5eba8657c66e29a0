"""The table of quality: what training wins back of what quantization costs, as models and as exported files.

    python tests/benchmarks/quality_table.py --model smollm2   --folder DIR [--shared ../shared] [key=value …]
    python tests/benchmarks/quality_table.py --model reference --folder DIR [--shared ../shared] [key=value …]

It runs the chain and SpinQuant with the shipped configs, each in a folder of DIR, and prints one table of both: NLL and
KL on held-out text, exact match of answers, multiple-choice tasks, and the time of each stage. Settings on the command
line go to the chain. The same command again resumes; with everything done it only prints. SmolLM2-135M on two CPU cores
takes hours.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamaq.report.measured import task_values
from llamaq.report.tables import MODELS, model_title, table
from llamaq.runs.files import write_json
from llamaq.runs.manifest import MANIFEST, read_manifest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
TUNE = Path(sys.executable).with_name("tune")
CHOICES = ["general_knowledge", "intent_recognition", "phrase_relatedness", "social_iqa", "timedial"]
STAGES = ("control_qat", "qat", "control_lora", "qat_lora", "reference", "qat_dpo", "spinquant", "export")


def exact_match_task(name: str, rows: Path, folder: Path) -> None:
    """Write a task of lm-evaluation-harness: the first turn of each conversation is asked, the second is the answer."""
    rows_of_task = folder / f"{name}.jsonl"
    with rows.open(encoding="utf-8") as given, rows_of_task.open("w", encoding="utf-8") as out:
        for line in given:
            question, answer = (m["content"] for m in json.loads(line)["messages"])
            out.write(json.dumps({"question": question, "answer": answer}) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows_of_task)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
    }
    write_json(folder / f"{name}.yaml", task)  # JSON is YAML


def smollm2_runs(folder: Path, shared: Path) -> dict[str, list[str]]:
    """Return the command of each run of SmolLM2 on questions and answers."""
    from real.smollm2 import make_smollm2

    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    exact_match_task("qa", shared / "real/qa/heldout.jsonl", tasks)
    for name in CHOICES:
        text = (shared / f"real/tasks/bb_{name}.yaml").read_text(encoding="utf-8")
        data = (shared / f"real/tasks/bb_{name}.jsonl").resolve()
        (tasks / f"bb_{name}.yaml").write_text(text.replace(f"bb_{name}.jsonl", str(data)), encoding="utf-8")
    settings = [
        f"checkpoint_dir={make_smollm2(folder / 'SmolLM2-135M-Instruct')}",
        f"data_dir={shared / 'real/qa'}",
        f"evaluate.tasks=[qa,{','.join(f'bb_{name}' for name in CHOICES)}]",
        f"evaluate.tasks_dir={tasks}",
        "evaluate.tasks_chat=true",
        "evaluate.speed=false",
    ]
    return {
        "qat_lora_dpo": ["--config", "smollm2/135M_qat_lora_dpo", *settings],
        "spinquant": ["--config", "smollm2/135M_spinquant", *settings],
    }


def reference_runs(folder: Path, shared: Path) -> dict[str, list[str]]:
    """Return the command of each run of the reference model on plain text."""
    settings = [f"data_dir={shared / 'reference'}", "evaluate.speed=false"]
    return {
        "qat_lora_dpo": ["--config", "reference", *settings],
        "spinquant": ["--config", "reference_spinquant", *settings],
    }


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "reference"], required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--only", choices=["qat_lora_dpo", "spinquant"], help="run and show only this one")
    a, settings = parser.parse_known_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    runs = (smollm2_runs if a.model == "smollm2" else reference_runs)(a.folder, a.shared)
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    for recipe, command in runs.items():
        if a.only in (None, recipe):
            further = settings if recipe == "qat_lora_dpo" else []
            output = a.folder / recipe
            subprocess.run([TUNE, "run", recipe, *command, f"output_dir={output}", *further], check=True)
            for model, cells in cells_of(json.loads((output / "report/report.json").read_text())):
                found.setdefault(model, cells)  # BF16 and PTQ are in both runs, alike
            seconds |= seconds_of(output)
    columns = list(dict.fromkeys(name for cells in found.values() for name in cells))
    rows = [[title, *(cells.get(c, "") for c in columns)] for title, cells in found.items()]
    print(table(["model", *columns], rows))
    print("\n" + "\n".join(f"- {stage}: {s / 60:.1f} min" for stage, s in seconds.items()))


def cells_of(facts: dict[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each model and file with its column → value."""
    tasks: dict[str, dict[str, str]] = {}
    for model, task, metric, value, error in task_values(facts["measured"]):
        if metric in ("acc", "exact_match"):
            tasks.setdefault(model, {})[f"{task} {metric}"] = f"{value:.3f}" + (f" ± {error:.3f}" if error else "")
    shares = {"spinquant": facts.get("share"), **(facts.get("shares") or {})}
    files = facts["measured"].get("files", {}).get("scores", {})
    for name in MODELS:
        if score := facts["scores"].get(name):
            share = shares.get(name)
            won = f"{share['share']:.2f} [{share['low']:.2f}, {share['high']:.2f}]" if share else ""
            yield MODELS[name], _scores(score) | {"share won back": won} | tasks.get(name, {})
        if score := files.get(name):
            yield model_title(f"{name}.pte"), _scores(score) | tasks.get(f"{name}.pte", {})


def _scores(score: dict[str, float]) -> dict[str, str]:
    return {
        "NLL": f"{score['nll']:.4f}",
        "KL from BF16": f"{score.get('kl/bf16', 0.0):.2e}",
        "top-1": f"{score.get('top1/bf16', 1.0):.3f}",
    }


def seconds_of(run: Path) -> dict[str, float]:
    """Return how long each stage took, by its manifest."""
    there = [name for name in STAGES if (run / name / MANIFEST).is_file()]
    return {name: read_manifest(run / name)["seconds"] for name in there}


if __name__ == "__main__":
    main()
