"""Datasets by torchtune, whose files are checked line by line before anything trains."""

import json
from pathlib import Path
from typing import Any

from llamaq.config import Component
from llamaq.config.components import instantiate
from llamaq.data.batches import IGNORE
from llamaq.errors import UserError
from llamaq.runs.ranks import say
from llamaq.runs.tracking import progress


def check_files(component: Component, setting: str) -> None:
    """Check a dataset's local files, JSON line by line.

    Raises:
        UserError: file missing, a malformed line (with its number), or a missing column.
    """
    files = component.get("data_files")
    for name in [files] if isinstance(files, str) else files or []:
        if not Path(name).is_file():
            raise UserError(f"{setting}.data_files={name}: no such file")
        if component.get("source") == "json":
            _check_json(Path(name), _columns(component), setting)


def build_dataset(component: Component, tokenizer: Any, setting: str) -> Any:
    """Build a dataset from a config.

    Raises:
        UserError: as `check_files`, or arguments the dataset does not take, or no samples.
    """
    import datasets

    datasets.disable_progress_bars()  # theirs say nothing a user waits for
    check_files(component, setting)
    files = component.get("data_files")
    try:
        dataset = instantiate(component, tokenizer, setting=setting)
    except (ValueError, OSError, KeyError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{setting}: {component['_component_']} failed: {str(e).splitlines()[0]}") from e
    if len(dataset) == 0:
        raise UserError(f"{setting}: the dataset is empty ({files or component.get('source')})")
    return dataset


def _columns(component: Component) -> list[str]:
    kind = component["_component_"].rsplit(".", 1)[-1]
    mapped = component.get("column_map") or {}
    if kind == "chat_dataset":
        return [component.get("conversation_column", "messages")]
    if kind in ("preference_dataset", "text_preference_dataset"):
        return [mapped.get(k, k) for k in ("chosen", "rejected")]
    if kind == "instruct_dataset":
        return [mapped.get(k, k) for k in ("input", "output")]
    return [component.get("column", "text")] if kind == "text_completion_dataset" else []


def _check_json(path: Path, columns: list[str], setting: str) -> None:
    with path.open(encoding="utf-8") as f:
        first = f.read(1)
        if not first:
            raise UserError(f"{setting}: {path} is empty")
        if first == "[":  # one JSON array
            rows = _parsed(first + f.read(), f"{setting}: {path}")
            if not rows:
                raise UserError(f"{setting}: the dataset is empty ({path})")
            return
        f.seek(0)
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            row = _parsed(line, f"{setting}: {path} line {number}")
            if not isinstance(row, dict):
                raise UserError(f"{setting}: {path} line {number} is not a JSON object")
            missing = [c for c in columns if c not in row]
            if missing:
                raise UserError(f"{setting}: {path} line {number} has no '{missing[0]}' (it has {', '.join(row)})")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{where} is not valid JSON ({e})") from e


def usable_pairs(dataset: Any, setting: str) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Tokenize preference pairs; return those with room for both answers, numbered by `index`, and the others' indices.

    A prompt as long as `tokenizer.max_seq_len` leaves no answer to score: torchtune would train on it silently, with
    a loss of ln 2 and no gradient.

    Raises:
        UserError: no pair is left.
    """
    pairs, skipped = [], []
    for i in progress(range(len(dataset)), "tokenizing pairs", unit="pair"):
        pair = dataset[i]
        if all(any(label != IGNORE for label in pair[f"{side}_labels"][1:]) for side in ("chosen", "rejected")):
            pairs.append(pair | {"index": len(pairs)})
        else:
            skipped.append(i)
    if skipped:
        say(
            f"{setting}: skipping {len(skipped)} of {len(dataset)} pairs whose prompt leaves no room for an answer "
            f"within tokenizer.max_seq_len (samples {', '.join(map(str, skipped[:10]))}{' …' * (len(skipped) > 10)})"
        )
    if not pairs:
        raise UserError(f"{setting}: every pair's prompt fills tokenizer.max_seq_len; raise it or shorten the prompts")
    return pairs, skipped
