"""Data by global index, labels that mean what they say, and files checked by line."""

import json

import pytest
import torch
from conftest import small

from llamaq.data.batches import (
    IGNORE,
    SampleOrder,
    collate_pairs,
    collate_sft,
    micro_batch_size,
    micro_batches,
    num_micro_batches,
)
from llamaq.data.corpus import tiny_chat, write_jsonl
from llamaq.data.datasets import build_dataset, skipped_rows
from llamaq.data.text import read_documents, text_windows_dataset
from llamaq.data.tokenizer import build_tokenizer
from llamaq.errors import UserError

CHAT = {
    "_component_": "torchtune.datasets.chat_dataset",
    "source": "json",
    "conversation_column": "messages",
    "conversation_style": "openai",
}
PAIRS = {"_component_": "torchtune.datasets.preference_dataset", "source": "json"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    tiny_chat(folder, num_train=60, num_pairs=30, num_heldout=10, num_people=40, vocab_size=600)
    return folder


def tokenizer_for(corpus, max_seq_len=96, vocab=600):
    component = {
        "_component_": "torchtune.models.llama3.llama3_tokenizer",
        "path": str(corpus / "tokenizer.model"),
        "special_tokens_path": str(corpus / "special_tokens.json"),
        "max_seq_len": max_seq_len,
    }
    return build_tokenizer(component, vocab)


def test_the_corpus_and_its_tokenizer_are_deterministic(corpus, tmp_path):
    tiny_chat(tmp_path, num_train=60, num_pairs=30, num_heldout=10, num_people=40, vocab_size=600)
    for name in ("train.jsonl", "pairs.jsonl", "heldout.jsonl", "tokenizer.model", "special_tokens.json"):
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()


def test_the_tokenizer_has_llama_3s_form(corpus):
    from pytorch_tokenizers.tiktoken import TiktokenTokenizer  # ExecuTorch's reader of the same file

    tokenizer = tokenizer_for(corpus)
    assert tokenizer.base_vocab_size == 344 and tokenizer.vocab_size == 600
    text = "Which day comes after Monday? 12 + 7, naïve – ok\n"
    assert tokenizer.decode(tokenizer.encode(text, add_bos=True, add_eos=True)) == text
    theirs = TiktokenTokenizer(str(corpus / "tokenizer.model"))
    assert theirs.encode(text, bos=False, eos=False) == tokenizer.encode(text, add_bos=False, add_eos=False)
    assert tokenizer.bos_id == 344 and tokenizer.special_tokens["<|eot_id|>"] == 353


def test_a_tokenizer_that_changed_at_the_same_path_is_read_anew(corpus, tmp_path):
    """Tiktoken's cache goes by the path: the second run of one folder would train on the first one's tokenizer."""
    for name in ("tokenizer.model", "special_tokens.json"):
        (tmp_path / name).write_bytes((corpus / name).read_bytes())
    before = tokenizer_for(tmp_path).decode([300])
    lines = (corpus / "tokenizer.model").read_text().splitlines()
    lines[300], lines[301] = (
        f"{a.split()[0]} {b.split()[1]}" for a, b in ((lines[301], lines[300]), (lines[300], lines[301]))
    )
    (tmp_path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    assert tokenizer_for(tmp_path).decode([301]) == before != tokenizer_for(tmp_path).decode([300])


def test_order_is_a_fresh_permutation_every_epoch_and_known_from_the_index():
    order = SampleOrder(10, seed=3)
    first, second = [order[i] for i in range(10)], [order[i] for i in range(10, 20)]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [SampleOrder(10, seed=3)[i] for i in (7, 13, 2)] == [first[7], second[3], first[2]]
    assert [SampleOrder(10, seed=4)[i] for i in range(10)] != first


@pytest.mark.parametrize("world, batch_size", [(1, 8), (1, 2), (2, 4), (4, 1), (3, 2), (3, 3)])
def test_the_global_batch_does_not_depend_on_how_it_is_split(world, batch_size):
    order, samples = SampleOrder(30, seed=0), list(range(30))
    taken = [s for r in range(world) for b in micro_batches(samples, order, 16, 8, batch_size, r, world) for s in b]
    assert sorted(taken) == sorted(order[i] for i in range(16, 24))


def test_a_micro_batch_is_the_same_on_any_number_of_ranks():
    order, samples = SampleOrder(30, seed=0), list(range(30))

    def of(world: int) -> list[list[int]]:
        return sorted(b for r in range(world) for b in micro_batches(samples, order, 16, 12, 2, r, world))

    assert of(1) == of(2) == of(3) == of(5) and len(of(1)) == 6


def test_every_rank_makes_as_many_passes_and_none_is_without_work(tmp_path):
    training = small(tmp_path / "a", "qat.batch_size=4", "qat.global_batch_size=8").section("qat")
    assert [micro_batch_size(training, w) for w in (1, 2, 3, 4, 5, 8)] == [4, 4, 2, 2, 1, 1]
    order = SampleOrder(100, seed=0)
    for training.global_batch_size in (8, 16, 32, 30):
        for training.batch_size in (1, 2, 4, 8, 16, 32):
            for world in range(1, training.global_batch_size + 1):
                size, passes = micro_batch_size(training, world), num_micro_batches(training, world)
                of = [
                    list(micro_batches(range(100), order, 0, training.global_batch_size, size, r, world))
                    for r in range(world)
                ]
                assert all(1 <= len(batches) <= passes for batches in of), (training, world)
                taken = sorted(s for batches in of for b in batches for s in b)
                assert taken == sorted(order[i] for i in range(training.global_batch_size))


def test_labels_are_shifted_and_only_answers_are_scored(corpus):
    tokenizer = tokenizer_for(corpus)
    dataset = build_dataset(CHAT | {"data_files": str(corpus / "train.jsonl")}, tokenizer, "x")
    batch = collate_sft([dataset[0], dataset[1]], tokenizer.pad_id)
    row = json.loads((corpus / "train.jsonl").read_text().splitlines()[0])
    scored = batch["labels"][0] != IGNORE
    assert torch.equal(batch["labels"][0][scored], batch["tokens"][0][1:][scored[:-1]])
    text = tokenizer.decode(batch["labels"][0][scored].tolist(), truncate_at_eos=False, skip_special_tokens=True)
    answers = "".join(m["content"] for m in row["messages"] if m["role"] == "assistant")
    assert text == answers


def test_packed_samples_do_not_see_or_predict_each_other(corpus):
    tokenizer = tokenizer_for(corpus, max_seq_len=192)
    single = CHAT | {"data_files": str(corpus / "train.jsonl")}
    packed = build_dataset(single | {"packed": True}, tokenizer, "x")
    batch = collate_sft([packed[0]], tokenizer.pad_id)
    lens = packed[0]["seq_lens"].tolist()
    assert len(lens) > 2 and batch["mask"].shape == (1, 192, 192)
    end = lens[0]
    assert batch["labels"][0, end - 1] == IGNORE  # the last token of one sample predicts nothing of the next
    assert not batch["mask"][0, end, :end].any() and batch["mask"][0, end, end]
    assert batch["input_pos"][0, end] == 0


def test_packing_gives_the_same_logprobs_as_samples_alone(corpus):
    from conftest import MODEL

    from llamaq.model.build import build_model
    from llamaq.quant.scheme import Scheme

    model = build_model(MODEL, None, Scheme()).eval()
    tokenizer = tokenizer_for(corpus, max_seq_len=192)
    single = build_dataset(CHAT | {"data_files": str(corpus / "train.jsonl")}, tokenizer, "x")
    packed = build_dataset(CHAT | {"data_files": str(corpus / "train.jsonl"), "packed": True}, tokenizer, "x")
    b = collate_sft([packed[0]], tokenizer.pad_id)
    n = len(packed[0]["seq_lens"])
    n -= int(packed[0]["seq_lens"].tolist()[-1] != len(single[n - 1]["tokens"]))  # the last entry may be padding
    batches = [collate_sft([single[i]], tokenizer.pad_id) for i in range(n)]
    alone = torch.stack([model(x["tokens"], labels=x["labels"])[0].sum() for x in batches]).sum()
    together = model(b["tokens"], labels=b["labels"], mask=b["mask"], input_pos=b["input_pos"])[0].sum()
    assert torch.allclose(alone, together, rtol=1e-3)


def test_pairs_without_room_for_an_answer_are_counted_named_and_skipped(corpus, tmp_path, capsys):
    rows = [json.loads(line) for line in (corpus / "pairs.jsonl").read_text().splitlines()]
    for i in (2, 5):
        long = {"role": "user", "content": "Which day comes after Monday? " * 40}
        rows[i] = {"chosen": [long, rows[i]["chosen"][1]], "rejected": [long, rows[i]["rejected"][1]]}
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    pairs = build_dataset(PAIRS | {"data_files": str(tmp_path / "pairs.jsonl")}, tokenizer_for(corpus), "qat_dpo.x")
    assert len(pairs) == 28 and [pairs[i]["index"] for i in (0, 27)] == [0, 27]
    assert skipped_rows(pairs)["skipped_rows"] == [2, 5] and list(skipped_rows(pairs)["skipped"].values()) == [2]
    said = capsys.readouterr().out
    assert "skipping 2 of 30 rows" in said and "(rows 3, 6)" in said and "max_seq_len" in said
    write_jsonl(tmp_path / "none.jsonl", [rows[2]])
    with pytest.raises(UserError, match=r"none of 1 rows in .* teaches anything: 1 have a prompt that leaves no room"):
        build_dataset(PAIRS | {"data_files": str(tmp_path / "none.jsonl")}, tokenizer_for(corpus), "qat_dpo.dataset")


def test_pairs_are_collated_chosen_first(corpus):
    dataset = build_dataset(PAIRS | {"data_files": str(corpus / "pairs.jsonl")}, tokenizer_for(corpus), "x")
    samples = [dict(dataset[i]) | {"reference": [float(i), -float(i)]} for i in range(3)]
    batch = collate_pairs(samples, pad_id=0)
    assert batch["tokens"].shape[0] == 6
    assert batch["reference"].tolist() == [0, 1, 2, -0.0, -1, -2]
    rejected = list(samples[0]["rejected_input_ids"])
    assert batch["tokens"][3, : len(rejected)].tolist() == rejected


def test_text_windows_cover_every_token_once(corpus, tmp_path):
    (tmp_path / "text.txt").write_text("one two three " * 60 + "\f" + "four five " * 50)
    tokenizer = tokenizer_for(corpus, max_seq_len=32)
    windows = text_windows_dataset(tokenizer, str(tmp_path / "text.txt"))
    documents = read_documents(tmp_path / "text.txt", "x")
    expected = [t for d in documents for t in tokenizer.encode(d, add_bos=True, add_eos=True)]
    assert [t for i in range(len(windows)) for t in windows[i]["tokens"]] == expected


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"messages": [', r"line 3 is not valid JSON"),
        ('{"text": "hello"}', r"line 3 has no 'messages' \(it has text\)"),
        ("[1, 2]", "line 3 is not a JSON object"),
    ],
)
def test_a_bad_line_is_named_by_its_number(corpus, tmp_path, line, message):
    good = (corpus / "train.jsonl").read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([*good[:2], line, *good[3:]]))
    with pytest.raises(UserError, match=message):
        build_dataset(CHAT | {"data_files": str(tmp_path / "bad.jsonl")}, tokenizer_for(corpus), "qat.dataset")


def test_the_tokenizer_must_fit_the_model(corpus):
    with pytest.raises(
        UserError, match=r"ids up to 599 .<.reserved_special_token_157.> is 512., the model only 512 rows"
    ):
        tokenizer_for(corpus, vocab=512)


def test_llama_3s_own_image_token_beyond_the_vocabulary_is_accepted(corpus, tmp_path):
    special = json.loads((corpus / "special_tokens.json").read_text())
    for token in special["added_tokens"]:
        if token["content"] == "<|image|>":
            token["id"] = 600
    (tmp_path / "special_tokens.json").write_text(json.dumps(special))
    component = {
        "_component_": "torchtune.models.llama3.llama3_tokenizer",
        "path": str(corpus / "tokenizer.model"),
        "special_tokens_path": str(tmp_path / "special_tokens.json"),
    }
    build_tokenizer(component, 600)


def test_the_small_config_of_the_tests_is_well_formed(tmp_path):
    assert small(tmp_path / "x").section("qat").max_steps == 6
