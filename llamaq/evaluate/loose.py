"""Measure one exported file, or one checkpoint of integer codes, wherever it lies and without the config it came from.

A .pte holds its lengths and its model; params.json holds the shape of a checkpoint in Meta's layout. What neither holds
is the tokenizer, which lies beside them, or the held-out data: a run around them has recorded both, and settings on the
command line name them for a file that was copied away.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from llamaq.checkpoints.meta import PARAMS, WEIGHTS
from llamaq.config import Config
from llamaq.config.load import with_overrides
from llamaq.data.batches import collate_sft
from llamaq.data.datasets import build_dataset
from llamaq.data.tokenizer import build_tokenizer
from llamaq.errors import UserError
from llamaq.evaluate.models import check_texts
from llamaq.evaluate.readers import Pair, PteReader, Reader, score_continuation
from llamaq.evaluate.scores import score_file
from llamaq.evaluate.tasks import measure_tasks
from llamaq.export.benchmark import MEASURES, benchmark, median_and_quartiles
from llamaq.export.exporter import load_eager
from llamaq.export.pte import Pte
from llamaq.families.tokenizer_files import tokenizer_in
from llamaq.runs.files import sha256_file, size_of
from llamaq.runs.reader import recorded_config
from llamaq.runs.tracking import progress

NONE = "none"  # the _component_ of a section about which neither file nor run says anything
CHAT_ROWS = {  # what `evaluate.dataset.data_files=FILE` alone means
    "_component_": "torchtune.datasets.chat_dataset",
    "source": "json",
    "conversation_column": "messages",
    "conversation_style": "openai",
}


class CodesReader:
    """A checkpoint in Meta's layout, computed by ExecuTorch's own eager model; every request reads its whole text."""

    def __init__(self, folder: Path, max_length: int):
        self.max_length = max_length
        self._model = load_eager(folder, max_length).eval()

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        """Return the logits [len(tokens), vocab]."""
        return self._model(torch.tensor([tokens]))[0]

    def loglikelihoods(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """Score each continuation; see `Reader`."""
        with progress(pairs, "reading", unit="request") as bar:
            return [score_continuation(self.logits((a + b)[:-1])[-len(b) :], b) for a, b in bar]

    def continuation(self, context: list[int]) -> Iterator[int]:
        """Yield greedy tokens after a context."""
        tokens = list(context)
        while True:
            tokens.append(int(self.logits(tokens)[-1].argmax()))
            yield tokens[-1]


@dataclass
class Loose:
    """A file or folder to measure."""

    path: Path
    """The .pte, or the folder with params.json."""

    run: Path | None
    """The folder of the run that it lies in."""

    @classmethod
    def at(cls, path: Path) -> "Loose":
        """Look at a path.

        Raises:
            UserError: there is nothing that can be measured.
        """
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        found = next((p for p in (path, path / "model.pte", path / "model") if _is_model(p)), None)
        if found is None:
            raise UserError(
                f"{path} is neither a run, a .pte, a folder with model.pte (export, bundle) nor one with {PARAMS} and "
                f"{WEIGHTS} (convert/model); a model that is still trained is measured by its run: "
                "tune run evaluate output_dir=RUN evaluate.models=[qat]"
            )
        around = list(found.absolute().parents)[:3]
        return cls(found, next((p for p in around if (p / "run.json").is_file()), None))

    @cached_property
    def pte(self) -> Pte | None:
        """Return the file, loaded; None for a checkpoint."""
        return Pte(self.path) if self.path.suffix == ".pte" else None

    def config(self, overrides: list[str]) -> Config:
        """Return the settings that the run around it has recorded, or else what lies beside it, with overrides."""
        lengths = ("max_seq_length", "max_context_length") if self.pte else ()
        known = [f"export.{key}={getattr(self.pte, key)}" for key in lengths]
        if self.run is not None:
            anew = ["evaluate.tasks=[]", "evaluate.perplexity_text=null", "evaluate.sensitivity_samples=0"]
            return recorded_config(self.run, None, [*known, *anew, *overrides])
        about = self.path.parent if self.pte else self.path
        names_data = any(o.startswith("evaluate.dataset.") for o in overrides)
        raw = {
            "output_dir": str(about),
            "checkpoint_dir": str(about),
            "model": {"_component_": NONE},  # nothing here builds one
            "tokenizer": tokenizer_in(about) or {"_component_": NONE},
            "evaluate": {"dataset": dict(CHAT_ROWS) if names_data else {"_component_": NONE}},
        }
        return with_overrides(OmegaConf.create(raw), [*known, *overrides], str(self.path))

    def reader(self, c: Config) -> tuple[Reader, Callable[[list[int]], Tensor]]:
        """Return what answers the harness's requests, and what computes logits [n, vocab] of tokens."""
        if self.pte:
            return PteReader(self.pte), self.pte.logits
        codes = CodesReader(self.path, c.export.max_context_length)
        return codes, codes.logits


def _is_model(path: Path) -> bool:
    return (path.suffix == ".pte" and path.is_file()) or all((path / name).is_file() for name in (PARAMS, WEIGHTS))


def measure_loose(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Measure a .pte or a checkpoint; return path, sha256, bytes, held_out, tasks and speed, as far as there are any.

    Args:
        path: the file, or a folder that holds it.
        overrides: `key=value` settings.

    Raises:
        UserError: nothing to measure there, or nothing to measure it with.
    """
    loose = Loose.at(path)
    c = loose.config(overrides)
    _check(loose, c)
    file = loose.path if loose.pte else loose.path / WEIGHTS
    result = {"path": str(loose.path), "sha256": sha256_file(file), "bytes": file.stat().st_size}
    known = c.evaluate.dataset["_component_"] != NONE
    if known or c.evaluate.tasks or c.evaluate.perplexity_text:
        reader, logits_of = loose.reader(c)
        tokenizer = build_tokenizer(c.tokenizer, logits_of([0]).shape[-1])
        _check_tokenizer(loose, tokenizer)
        if known:
            result["held_out"] = _held_out(c, tokenizer, logits_of, reader.max_length)
        result["tasks"] = measure_tasks(c.evaluate, reader, tokenizer, c.seed)
    if loose.pte and c.evaluate.speed:
        e = c.evaluate
        measured = benchmark([file], e.speed_prompt_tokens, e.speed_new_tokens, threads=e.threads)
        if measured["failed"]:
            raise UserError("\n".join(measured["failed"].values()))
        result["speed"] = measured["models"][str(file)]
    return result


def _check(loose: Loose, c: Config) -> None:
    """Check that there is something to measure, and what to measure it with, before anything is read."""
    e = c.evaluate
    for setting, value in (("models", e.models), ("sensitivity_samples", e.sensitivity_samples)):
        if value:
            raise UserError(f"evaluate.{setting} is for models of a run, and {loose.path} is one file; leave it out")
    reads_text = bool(e.tasks or e.perplexity_text) or e.dataset["_component_"] != NONE
    if not reads_text and not (loose.pte and e.speed):
        raise UserError(
            f"{loose.path} lies in no run that could name held-out data; give evaluate.dataset.data_files=FILE.jsonl, "
            "evaluate.perplexity_text=FILE or evaluate.tasks=[…]"
        )
    if reads_text and c.tokenizer["_component_"] == NONE:
        raise UserError(
            f"no tokenizer lies beside {loose.path}; copy tokenizer.model or tokenizer.json there, or name it: "
            "tokenizer._component_=torchtune.models.llama3.llama3_tokenizer tokenizer.path=FILE"
        )
    check_texts(e)


def _check_tokenizer(loose: Loose, tokenizer: Any) -> None:
    """Check that an exported file ends its answers with this tokenizer's ids."""
    if loose.pte is None:
        return
    theirs, ours = loose.pte.metadata("get_eos_ids"), list(tokenizer.stop_tokens)
    if set(theirs).isdisjoint(ours):
        raise UserError(
            f"{loose.path} ends answers with the ids {theirs}, and this tokenizer with {ours}: it is not the one that "
            "the file was exported with; name that one in tokenizer.path"
        )


def _held_out(c: Config, tokenizer: Any, logits_of: Callable[[list[int]], Tensor], max_length: int) -> dict[str, Any]:
    samples = build_dataset(c.evaluate.dataset, tokenizer, "evaluate.dataset")
    collate = partial(collate_sft, pad_id=tokenizer.pad_id)
    read = score_file(logits_of, {}, samples, collate, c.evaluate.file_tokens, max_length, "held-out text")
    return read.means() | {"tokens": int(read.tokens.sum()), "samples": len(read.tokens)}


def table_of(result: dict[str, Any]) -> str:
    """Return what `measure_loose` found as a Markdown table."""
    rows = [("SHA-256", f"`{result['sha256']}`"), ("size", size_of(result["bytes"]))]
    if read := result.get("held_out"):
        rows.append((f"NLL of {read['tokens']:,} held-out tokens", f"{read['nll']:.4f}"))
        rows.append(("perplexity", f"{read['perplexity']:.4g}"))
    for task, values in result.get("tasks", {}).items():
        for name, m in values["metrics"].items():
            spread = f" ± {m['stderr']:.4f}" if m["stderr"] is not None else ""
            rows.append((f"{task}: {name}", f"{m['value']:.4f}{spread}"))
    for key, (title, unit, fmt, _) in MEASURES.items():
        if key in result.get("speed", {}) and key != "file_bytes":
            scale = 2**20 if unit == "MiB" else 1
            rows.append((f"{title}, {unit}", f"{median_and_quartiles(result['speed'][key])[0] / scale:{fmt}}"))
    head = [f"`{result['path']}`", "", "| measure | value |", "| --- | ---: |"]
    return "\n".join([*head, *(f"| {name} | {value} |" for name, value in rows)])
