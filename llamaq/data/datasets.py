"""Datasets as a config names them: every row checked and tokenized once, and samples taken from what that left.

The names are torchtune's (`torchtune.datasets.chat_dataset`); the rows are read by `llamaq.data.files`, understood by
`llamaq.data.forms` and tokenized by `llamaq.data.encode`. Datasets that llamaq does not know are built as torchtune
builds them.
"""

from collections.abc import Iterator, Sequence
from functools import cache as once
from pathlib import Path
from typing import Any

from llamaq.config import Component, Config, TrainingConfig
from llamaq.config.components import instantiate
from llamaq.data.batches import IGNORE
from llamaq.data.forms import form_of
from llamaq.data.prepare import PLACES_SHOWN, prepare
from llamaq.data.prepared import Prepared, open_prepared
from llamaq.data.sources import local_files
from llamaq.errors import UserError
from llamaq.runs.manifest import PREPARED
from llamaq.runs.ranks import from_rank_zero, say
from llamaq.runs.tracking import progress

MOST_NAMED = 1000  # skipped rows in a stage's metrics


def cache_of(c: Config) -> Path:
    """Return the folder of a run's tokenized datasets."""
    return Path(c.output_dir) / PREPARED


def build_dataset(
    component: Component, tokenizer: Any, setting: str, cache: Path | None = None, limit: int | None = None
) -> Any:
    """Build a dataset from a config: a sequence of samples, of which every one teaches something.

    Args:
        component: the dataset's section.
        tokenizer: of the run.
        setting: the section's name, for errors.
        cache: where tokenized datasets are kept, see `cache_of`; None: nowhere.
        limit: samples to stop after, for a streamed dataset, which may have no end.

    Raises:
        UserError: a file is missing, rows are wrong, or none teaches anything.
    """
    form = form_of(component, setting)
    if form is None:
        return _foreign(component, tokenizer, setting)
    if component.get("streaming") and limit is None:
        raise UserError(f"{setting}.streaming=true: only a stage with max_steps can take a stream")
    prepared = prepare(component, form, tokenizer, setting, cache, limit)
    for line in report(prepared, setting):
        _say_once(line)
    return prepared.samples()


def check_files(component: Component, setting: str) -> None:
    """Check quickly that a dataset's files are there; their rows are checked as the dataset is built.

    Raises:
        UserError: one is not, or an argument is wrong.
    """
    form = form_of(component, setting)
    if form is not None:
        local_files(component, form, setting)


def training_samples(training: TrainingConfig, tokenizer: Any, stage: str, cache: Path) -> Any:
    """Build a training stage's dataset. Every rank calls it."""
    setting, component = f"{stage}.dataset", training.dataset
    limit = None
    if component.get("streaming"):
        if training.max_steps is None:
            raise UserError(f"{setting}.streaming=true: a stream may have no end; set {stage}.max_steps")
        limit = training.max_steps * training.global_batch_size
    return build_on_all_ranks(component, tokenizer, setting, cache, limit)


def build_on_all_ranks(
    component: Component, tokenizer: Any, setting: str, cache: Path, limit: int | None = None
) -> Any:
    """Build a dataset as `build_dataset` does, called by every rank: rank 0 prepares it, and then all map it."""
    if form_of(component, setting) is None:
        return build_dataset(component, tokenizer, setting)
    folder = from_rank_zero(lambda: build_dataset(component, tokenizer, setting, cache, limit).prepared.folder)
    return open_prepared(folder).samples()


# --- what the user is told -------------------------------------------------------------------------------------------


def report(prepared: Prepared, setting: str) -> Iterator[str]:
    """Yield what a user should know of a dataset, a line each."""
    m, what = prepared.meta, "pairs" if prepared.meta["pairs"] else "samples"
    packed = "" if prepared.packs is None else f" in {len(prepared.packs) - 1:,} packs"
    learned = f"{m['learned'] / max(1, m['tokens']):.0%}"
    yield f"{setting}: {m['samples']:,} {what} of {m['rows']:,} rows{packed}, {m['tokens']:,} tokens, {learned} learned"
    for reason, count in m["skipped"].items():
        places = ", ".join(map(str, m["places"][reason])) + " …" * (count > PLACES_SHOWN)
        yield f"{setting}: skipping {count:,} of {m['rows']:,} rows that {reason} (rows {places})"
    if m["cut"]:
        yield f"{setting}: {m['cut']:,} of {m['samples']:,} {what} are cut at tokenizer.max_seq_len={m['max_seq_len']}"
    for note, count in m["notes"].items():
        yield f"{setting}: warning: {count:,} of {m['rows']:,} rows {note}"


@once
def _say_once(line: str) -> None:
    say(line)


def skipped_rows(samples: Any) -> dict[str, Any]:
    """Return what a stage's metrics say of skipped rows: how many for each reason, and which, counted from 0."""
    prepared = getattr(samples, "prepared", None)
    if prepared is None:
        return {"skipped": {}, "skipped_rows": []}
    return {"skipped": prepared.meta["skipped"], "skipped_rows": prepared.skipped[:MOST_NAMED].tolist()}


# --- datasets of others ----------------------------------------------------------------------------------------------


def _foreign(component: Component, tokenizer: Any, setting: str) -> Any:
    """Build a dataset that llamaq does not read itself, and look at each of its samples."""
    import datasets

    datasets.disable_progress_bars()
    name = component["_component_"]
    try:
        dataset = instantiate(component, tokenizer, setting=setting)
        num = len(dataset)
        usable = [i for i in progress(range(num), f"checking {setting}", unit="sample") if _teaches(dataset[i])]
    except UserError:
        raise
    except Exception as e:  # whatever a builder of the user's own, or of torchtune's, raises for a row
        said = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{setting}: {name} failed: {said}") from e
    if not usable:
        raise UserError(f"{setting}: {name} has {num} samples, and none has a token to learn")
    if len(usable) < num:
        _say_once(f"{setting}: skipping {num - len(usable):,} of {num:,} samples that have no token to learn")
    pairs = "chosen_input_ids" in dataset[usable[0]]
    return _Chosen(dataset, usable, pairs)


def _teaches(sample: Any) -> bool:
    labels = [sample[k] for k in ("labels", "chosen_labels", "rejected_labels") if k in sample]
    if not labels:
        raise UserError(f"a sample has {', '.join(sample)}; labels, or chosen_labels and rejected_labels, are needed")
    return all(any(int(label) != IGNORE for label in of[1:]) for of in labels)


class _Chosen(Sequence):
    """Some of a dataset's samples; pairs carry their index."""

    def __init__(self, dataset: Any, indices: list[int], pairs: bool):
        self.dataset, self.indices, self.pairs = dataset, indices, pairs

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[self.indices[index]]
        return {**sample, "index": index} if self.pairs else sample
