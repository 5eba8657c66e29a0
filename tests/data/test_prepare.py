# ruff: noqa: F811 (fixtures of the other file)
"""A dataset is tokenized once: the same on any number of processes, whole or not there, and in bounded memory."""

import json
import multiprocessing
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from test_row_forms import ANSWER, USER, component, corpus, tokenizer, tokenizer_for  # noqa: F401

from llamaq.data import files
from llamaq.data.batches import IGNORE, collate_sft
from llamaq.data.datasets import build_dataset, check_files
from llamaq.data.encode import Encoder
from llamaq.data.forms import form_of
from llamaq.data.prepare import keep_only, prepare
from llamaq.data.prepared import META, pack
from llamaq.data.workers import in_order
from llamaq.errors import UserError

FORK = multiprocessing.get_context("fork")
ROWS = [
    {"messages": [USER, ANSWER | {"content": "day " * (i % 23) + str(i)}]} if i % 7 else {"messages": [USER]}
    for i in range(700)
]


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "data.jsonl"


def prepared(data, tokenizer, cache=None, **how):
    arguments = {k: how.pop(k) for k in ("packed", "streaming") if k in how}
    section = component("chat_dataset", data, **arguments)
    form = form_of(section, "x")
    assert form is not None
    return prepare(section, form, tokenizer, "x", cache, **how)


def content(found):
    names = ("values", "offsets", "rows", "skipped", "packs")
    return {name: np.array(getattr(found, name)).tolist() for name in names} | {"meta": found.meta}


@pytest.mark.parametrize("workers, block", [(1, 50), (1, 3000), (2, 3000), (3, 1000)])
def test_the_result_does_not_depend_on_blocks_and_processes(workers, block, data, tokenizer, monkeypatch):
    expected = content(prepared(data, tokenizer, workers=1))
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    assert content(prepared(data, tokenizer, workers=workers)) == expected
    assert expected["rows"] == [i for i in range(700) if i % 7] and expected["skipped"] == list(range(0, 700, 7))


def test_bad_rows_of_all_blocks_are_counted(data, tokenizer, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    lines = data.read_text().splitlines()
    for i in (5, 300, 301, 650):
        lines[i] = "{"
    data.write_text("\n".join(lines))
    for workers in (1, 2):
        with pytest.raises(
            UserError, match=r"line 6 is not .*\(3 more bad rows: line 301, the same; line 302, the sam"
        ):
            prepared(data, tokenizer, workers=workers)


def test_samples_are_slices_that_collate(data, tokenizer):
    single = prepared(data, tokenizer).samples()
    packs = prepared(data, tokenizer, packed=True).samples()
    assert len(single) == 600 and len(packs) < 400
    assert single[-1]["tokens"].tolist() == single[599]["tokens"].tolist()
    with pytest.raises(IndexError):
        packs[len(packs)]
    lengths = [n for p in packs for n in p["seq_lens"][: -1 if p["seq_lens"].sum() == 96 else None].tolist()]
    assert sum(int(p["seq_lens"].sum()) for p in packs) == 96 * len(packs) and len(lengths) >= 600 - len(packs)
    batch = collate_sft([packs[0], packs[1]], tokenizer.pad_id)
    assert batch["tokens"].shape == (2, 96) and batch["mask"].shape == (2, 96, 96)
    assert all((p["labels"] != IGNORE).any() for p in packs)


@pytest.mark.parametrize("split", [True, False])
def test_packs_hold_every_sequence_in_order(split):
    lengths = np.random.default_rng(0).integers(1, 11, 200)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    begins = pack(offsets, 10, split)
    assert (
        begins[0] == 0 and begins[-1] == offsets[-1] and (np.diff(begins) <= 10).all() and (np.diff(begins) > 0).all()
    )
    if split:
        assert (np.diff(begins)[:-1] == 10).all()
    else:  # each is as full as it can be
        assert set(begins) <= set(offsets)
        following = dict(zip(offsets, lengths, strict=False))
        assert all(b - a + following[b] > 10 for a, b in pairwise(begins[:-1]))


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_second_start_reads_no_row(data, tokenizer, tmp_path, monkeypatch):
    first = content(prepared(data, tokenizer, tmp_path / "cache"))
    monkeypatch.setattr(Encoder, "block", lambda *_: pytest.fail("a row was read again"))
    assert content(prepared(data, tokenizer, tmp_path / "cache")) == first
    elsewhere = data.rename(tmp_path / "moved.jsonl")
    assert content(prepared(elsewhere, tokenizer, tmp_path / "cache")) == first


def test_other_rows_arguments_or_tokenizers_are_prepared_anew(data, corpus, tmp_path):
    cache = tmp_path / "cache"
    found = {prepared(data, tokenizer_for(corpus, n), cache).folder for n in (96, 95)}
    found.add(prepared(data, tokenizer_for(corpus, 96), cache, packed=True).folder)
    data.write_text(data.read_text().replace("How many", "How few", 1))
    found.add(prepared(data, tokenizer_for(corpus, 96), cache).folder)
    assert len(found) == 4 == len(list(cache.iterdir()))


def test_two_fields_of_one_file_are_two_datasets(tokenizer, tmp_path):
    (tmp_path / "both.json").write_text(json.dumps({"train": ROWS[1:5], "heldout": ROWS[8:11]}))
    sizes = []
    for field in ("train", "heldout"):
        section = component("chat_dataset", tmp_path / "both.json", field=field)
        sizes.append(len(build_dataset(section, tokenizer, "x", tmp_path / "cache")))
    assert sizes == [4, 3]


def test_a_folder_that_cannot_be_renamed_is_an_error_unless_another_process_was_first(
    data, tokenizer, tmp_path, monkeypatch
):
    def refuse(self, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="cache"):
        prepared(data, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_windows_of_a_text_read_the_source_whatever_else_is_said(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("one two three")
    section = {"_component_": "llamaq.data.text.text_windows_dataset", "source": str(tmp_path / "text.txt")}
    assert len(build_dataset(section | {"data_files": "none"}, tokenizer, "x")) == 1


def test_a_kill_leaves_nothing_that_looks_whole(data, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 4000)
    cache, encode = tmp_path / "cache", Encoder.block

    def killed(self, block):
        if block.first > 300:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, block)

    def attempt():
        Encoder.block = killed
        prepared(data, tokenizer, cache, workers=1)

    process = FORK.Process(target=attempt)
    process.start()
    process.join()
    (left,) = cache.iterdir()
    assert process.exitcode == -signal.SIGKILL and left.suffix == ".partial" and not (left / META).exists()
    whole = prepared(data, tokenizer, cache)
    assert content(whole) == content(prepared(data, tokenizer))
    keep_only(cache, {whole.folder.name})
    assert [p.name for p in cache.iterdir()] == [whole.folder.name]


def test_bad_rows_leave_nothing_behind(data, tokenizer, tmp_path):
    data.write_text(data.read_text() + "{")
    with pytest.raises(UserError, match="line 701 is not valid JSON"):
        prepared(data, tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_processes_that_prepare_the_same_at_once_do_no_harm(data, tokenizer, tmp_path):
    cache, start = tmp_path / "cache", FORK.Event()

    def attempt():
        start.wait()
        os._exit(0 if len(prepared(data, tokenizer, cache).samples()) == 600 else 1)

    processes = [FORK.Process(target=attempt) for _ in range(4)]
    for p in processes:
        p.start()
    start.set()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * 4 and len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named_in_one_line(data, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache cannot be used \(Not a directory"):
        prepared(data, tokenizer, tmp_path / "file" / "cache")


# --- worker processes ------------------------------------------------------------------------------------------------


def test_workers_give_results_in_order_and_errors_as_they_are():
    def square(i):
        if i == 50:
            raise UserError("fifty")
        return i * i

    results = in_order(square, range(60), 3)
    assert [next(results) for _ in range(50)] == [i * i for i in range(50)]
    with pytest.raises(UserError, match="fifty"):
        next(results)


def test_a_worker_that_is_killed_ends_the_run_with_a_line():
    def work(i):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    with pytest.raises(UserError, match=r"was killed, most likely because memory ran out"):
        list(in_order(work, range(20), 2))


def test_workers_end_with_their_parent():
    read, write = os.pipe()

    def parent():
        os.close(read)
        results = in_order(lambda i: os.getpid(), range(100), 2)
        os.write(write, f"{next(results)}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=parent)
    process.start()
    os.close(write)
    process.join()
    with os.fdopen(read) as f:
        pid = int(f.read())  # ends when the last process that holds the pipe is gone
    deadline = time.monotonic() + 10  # a process closes its files a moment before it is gone
    while not _is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _is_gone(pid)


def _is_gone(pid: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return True


# --- other sources ---------------------------------------------------------------------------------------------------


def test_several_files_and_forms_make_one_dataset(data, tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(data.read_bytes())
    (tmp_path / "in" / "b.json").write_text(json.dumps(ROWS[:10]))
    both = prepared(tmp_path / "in", tokenizer)
    listed = prepared(tmp_path / "in", tokenizer).samples()
    assert both.meta["rows"] == 710 and len(listed) == 600 + 8
    (tmp_path / "in" / "b.json").write_text('[{"messages": 1}]')
    with pytest.raises(UserError, match=r"in/b.json item 1: 'messages' is a number \(1\)"):
        prepared(tmp_path / "in", tokenizer)


def saved_table(tmp_path, rows):
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "table")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "folder" / "train.parquet")
    return tmp_path / "table", tmp_path / "folder"


def test_what_the_datasets_library_reads_is_checked_by_the_same_code(data, tokenizer, tmp_path):
    ours = prepared(data, tokenizer).samples()
    for source in saved_table(tmp_path, ROWS):
        section = {"_component_": "torchtune.datasets.chat_dataset", "source": str(source)}
        theirs = build_dataset(section, tokenizer, "x")
        assert len(theirs) == 600 and all(
            np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(ours, theirs, strict=True)
        )
        part = build_dataset(section | {"split": "train[:50]"}, tokenizer, "x") if source.name == "folder" else theirs
        assert len(part) in (42, 600)
    saved_table(tmp_path / "bad", [*ROWS[:3], {"messages": [USER, USER]}])
    section = {"_component_": "torchtune.datasets.chat_dataset", "source": str(tmp_path / "bad" / "folder")}
    with pytest.raises(UserError, match=r"x: .*bad/folder row 4: message 2 is a second message of the user"):
        build_dataset(section, tokenizer, "x")


def test_a_stream_is_read_as_far_as_the_stage_needs_it(tokenizer, tmp_path, monkeypatch):
    _, folder = saved_table(tmp_path, ROWS * 3)
    section = {"_component_": "torchtune.datasets.chat_dataset", "source": str(folder), "streaming": True}
    with pytest.raises(UserError, match=r"x.streaming=true: only a stage with max_steps"):
        build_dataset(section, tokenizer, "x")
    samples = build_dataset(section, tokenizer, "x", limit=40)
    assert 40 <= len(samples) < 600
    packs = build_dataset(section | {"packed": True}, tokenizer, "x", limit=40)
    assert 40 <= len(packs) < 300


def test_arguments_that_no_dataset_takes_are_named(data, tokenizer):
    for arguments, message in (
        ({"conversation_colum": "a"}, r"x.conversation_colum: no argument .* did you mean conversation_column\?"),
        ({"conversation_style": "alpaca"}, "x.conversation_style=alpaca: choose openai or sharegpt"),
        ({"packed": True}, "x.packed=true needs tokenizer.max_seq_len"),
    ):
        with pytest.raises(UserError, match=message):
            build_dataset(component("chat_dataset", data, **arguments), unlimited(tokenizer), "x")
    with pytest.raises(UserError, match=r"x.packed=true: pairs are not packed"):
        build_dataset(component("preference_dataset", data, packed=True), tokenizer, "x")
    with pytest.raises(UserError, match=r"x.data_files has no 'train' \(it has test\)"):
        check_files(component("chat_dataset", data) | {"data_files": {"test": str(data)}}, "x")
    with pytest.raises(UserError, match="the datasets library cannot load 'no/such'"):
        build_dataset({"_component_": "torchtune.datasets.chat_dataset", "source": "no/such"}, tokenizer, "x")


def unlimited(tokenizer):
    import copy

    found = copy.copy(tokenizer)
    found.max_seq_len = None
    return found


def own_dataset(tokenizer, labels):
    """A dataset of a user's own."""
    return [{"tokens": [1, 2, 3], "labels": of} for of in labels]


def test_a_dataset_of_the_users_own_is_looked_at_sample_by_sample(tokenizer, capsys):
    section = {"_component_": f"{__name__}.own_dataset"}
    dataset = build_dataset(section | {"labels": [[1, 2, 3], [5, IGNORE, IGNORE], [IGNORE, 2, 3]]}, tokenizer, "x")
    assert [s["labels"][2] for s in dataset] == [3, 3] and "skipping 1 of 3 samples" in capsys.readouterr().out
    with pytest.raises(UserError, match="has 1 samples, and none has a token to learn"):
        build_dataset(section | {"labels": [[5, IGNORE, IGNORE]]}, tokenizer, "x")
    with pytest.raises(UserError, match=r"test_prepare.own_dataset failed: "):
        build_dataset(section | {"labels": [5]}, tokenizer, "x")
