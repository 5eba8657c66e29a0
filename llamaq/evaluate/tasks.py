"""Run tasks of lm-evaluation-harness: find them by name, run them, and keep the numbers that a report needs."""

import difflib
from pathlib import Path
from typing import Any

from llamaq.config import EvaluateConfig
from llamaq.errors import UserError
from llamaq.evaluate.harness import harness_model, text_perplexity
from llamaq.evaluate.readers import Reader
from llamaq.quiet import quiet_logging


def check_tasks(names: list[str], folder: Path | None) -> Any:
    """Return the harness's task manager, after a check that it knows every task.

    Raises:
        UserError: the harness is not installed, there is no such folder, or no such task.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"evaluate.tasks_dir={folder} is not a folder of task files")
    with quiet_logging():  # the harness logs every task it sets up
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as e:
            raise UserError("evaluate.tasks needs lm-evaluation-harness: pip install 'llamaq[eval]'") from e
        manager = TaskManager(include_path=str(folder) if folder else None)
    known = manager.all_tasks
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"lm-evaluation-harness knows {len(known)}."
            raise UserError(
                f"evaluate.tasks: no task '{name}'; {hint} Put task files of your own in evaluate.tasks_dir"
            )
    return manager


def run_tasks(
    model: Any,
    names: list[str],
    folder: Path | None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    chat: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run tasks, or groups of them, on a `harness_model`.

    Args:
        model: of `harness_model`.
        names: of tasks or groups.
        folder: with further task files (YAML), or None.
        limit: the largest number of questions to ask in a task; None for all.
        num_fewshot: None for the task's own.
        seed: draws the few-shot examples.
        chat: ask in the tokenizer's chat template.

    Returns:
        Task or group → metrics {name: {value, stderr}}, num_fewshot, samples, version, lm_eval (its version).

    Raises:
        UserError: unknown tasks, or data that is not here and cannot be fetched.
    """
    manager = check_tasks(names, folder)
    import lm_eval

    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its signature
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        with quiet_logging():
            result = evaluate(
                model,
                tasks=manager.match_tasks(names),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat,
                log_samples=False,
                **seeds,
            )
    except OSError as e:
        raise UserError(
            f"evaluate.tasks={','.join(names)}: the data of a task is not here and could not be fetched "
            f"({' '.join(str(e).split())[:200]}); fetch it where there is a network, or name task files with local "
            "data_files in evaluate.tasks_dir"
        ) from e
    return {task: _task_result(result, task, values, lm_eval.__version__) for task, values in result["results"].items()}


def measure_tasks(e: EvaluateConfig, reader: Reader, tokenizer: Any, seed: int) -> dict[str, dict[str, Any]]:
    """Run what the `evaluate` section asks for, `tasks` and `perplexity_text`; return the results by name."""
    results = {}
    if e.tasks:
        model, folder = harness_model(reader, tokenizer), Path(e.tasks_dir) if e.tasks_dir else None
        results = run_tasks(model, e.tasks, folder, e.task_limit, e.num_fewshot, seed, e.tasks_chat)
    if e.perplexity_text:
        text = Path(e.perplexity_text)
        results[text.name] = text_perplexity(text, reader, tokenizer)
    return results


def _task_result(result: Any, task: str, values: dict[str, Any], version: str) -> dict[str, Any]:
    counts = result.get("n-samples", {}).get(task, {})
    parts = result.get("group_subtasks", {}).get(task) or []
    samples = counts.get("effective") or sum(result["n-samples"].get(p, {}).get("effective", 0) for p in parts)
    return {
        "metrics": _metrics(values),
        "num_fewshot": result.get("n-shot", {}).get(task),
        "samples": samples,
        "version": result.get("versions", {}).get(task),
        "lm_eval": version,
    }


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Read metrics, whose keys are `name,filter` with `name_stderr,filter` beside; other keys are not metrics."""
    metrics = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{name}_stderr,{filtered}")
        metrics[name if filtered == "none" else f"{name} ({filtered})"] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        }
    return metrics
