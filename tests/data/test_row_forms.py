"""Rows as people have them: understood, or skipped and counted, or refused with place and reason."""

import json

import numpy as np
import pytest

from llamaq.config.components import instantiate
from llamaq.data.batches import IGNORE
from llamaq.data.corpus import tiny_chat
from llamaq.data.datasets import build_dataset
from llamaq.data.tokenizer import build_tokenizer
from llamaq.errors import UserError

USER, ANSWER = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "30 days."}
HUMAN, GPT = {"from": "human", "value": "How many?"}, {"from": "gpt", "value": "30 days."}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    tiny_chat(folder, num_train=80, num_pairs=40, num_heldout=4, num_people=40, vocab_size=600)
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return tokenizer_for(corpus, 96)


def tokenizer_for(corpus, max_seq_len):
    component = {
        "_component_": "torchtune.models.llama3.llama3_tokenizer",
        "path": str(corpus / "tokenizer.model"),
        "special_tokens_path": str(corpus / "special_tokens.json"),
        "max_seq_len": max_seq_len,
    }
    return build_tokenizer(component, 600)


def component(kind, path, **arguments):
    return {"_component_": f"torchtune.datasets.{kind}", "source": "json", "data_files": str(path), **arguments}


def built(tmp_path, tokenizer, kind, *rows, **arguments):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_dataset(component(kind, tmp_path / "rows.jsonl", **arguments), tokenizer, "x.dataset")


def text(tokenizer, ids):
    return tokenizer.decode([int(t) for t in ids], truncate_at_eos=False, skip_special_tokens=False)


def learned(tokenizer, sample, side=""):
    """The text that is learned."""
    labels = sample[f"{side}labels"]
    return text(tokenizer, labels[labels != IGNORE])


# --- as torchtune ----------------------------------------------------------------------------------------------------


def of_corpus(corpus, tmp_path):
    chats = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    asked = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in chats]
    names = {"user": "human", "assistant": "gpt"}
    rows = {
        "chat": chats,
        "sharegpt": [
            {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]}
            for row in chats
        ],
        "instruct": [{"q": q * (1 + i % 3), "a": a} for i, (q, a) in enumerate(asked)],
        "alpaca": [{"instruction": q, "input": "x y" * (i % 2), "output": a} for i, (q, a) in enumerate(asked)],
        "text": [{"body": f"{q} {a} " * (1 + i % 4)} for i, (q, a) in enumerate(asked)],
        "pairs": [json.loads(line) for line in (corpus / "pairs.jsonl").read_text().splitlines()],
    }
    for name, found in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))


SAME = [
    ("chat", "chat_dataset", {"conversation_column": "messages", "conversation_style": "openai"}),
    ("chat", "chat_dataset", {"conversation_column": "messages", "conversation_style": "openai", "packed": True}),
    ("sharegpt", "chat_dataset", {"conversation_column": "conversations", "conversation_style": "sharegpt"}),
    ("instruct", "instruct_dataset", {"column_map": {"input": "q", "output": "a"}, "new_system_prompt": "Be brief."}),
    ("alpaca", "alpaca_dataset", {"train_on_input": False}),
    ("pairs", "preference_dataset", {}),
    ("pairs", "preference_dataset", {"new_system_prompt": "Be brief."}),
    ("text", "text_completion_dataset", {"column": "body"}),
    ("text", "text_completion_dataset", {"column": "body", "packed": True}),
    ("text", "text_completion_dataset", {"column": "body", "packed": True, "split_across_pack": False}),
]


@pytest.mark.parametrize("rows, kind, arguments", SAME)
def test_ids_labels_and_packs_are_torchtunes(rows, kind, arguments, corpus, tmp_path):
    """Up to the assistant's header, which torchtune learns."""
    of_corpus(corpus, tmp_path)
    section = component(kind, tmp_path / f"{rows}.jsonl", **arguments)
    length = 400 if rows == "alpaca" else 160
    ours = build_dataset(section, tokenizer_for(corpus, length), "x")
    theirs = instantiate(section, tune_tokenizer(corpus, length), setting="x")
    assert len(ours) == len(theirs) > 20
    for i in range(len(theirs)):
        for key, expected in ((k, np.array(v)) for k, v in theirs[i].items() if k != "mask"):
            found = np.array(ours[i][key])
            if key.endswith("labels"):
                found = np.where(header_places(np.array(theirs[i][key])), IGNORE, found)
                expected = np.where(header_places(expected), IGNORE, expected)
            assert np.array_equal(found, expected), (i, key)


def tune_tokenizer(corpus, max_seq_len):
    from torchtune.models.llama3 import llama3_tokenizer

    files = {"path": str(corpus / "tokenizer.model"), "special_tokens_path": str(corpus / "special_tokens.json")}
    return llama3_tokenizer(**files, max_seq_len=max_seq_len)


def header_places(labels):
    """Tell where labels are a learned header: <|start_header_id|>, assistant, <|end_header_id|> and two line feeds."""
    start, end = 350, 351  # ids of the header's special tokens in a vocabulary of 600
    found, inside = np.zeros(len(labels), dtype=bool), 0
    for i, label in enumerate(labels):
        inside = np.inf if label == start else 3 if label == end else inside
        found[i], inside = inside > 0, inside - 1
    return found


def test_a_sample_that_is_cut_ends_as_torchtunes(corpus, tmp_path, capsys):
    row = {"messages": [USER, {"role": "assistant", "content": "Which day comes after Monday? " * 30}]}
    tokenizer = tokenizer_for(corpus, 50)
    sample = built(tmp_path, tokenizer, "chat_dataset", row, row)[0]
    section = component("chat_dataset", tmp_path / "rows.jsonl", conversation_style="openai")
    section["conversation_column"] = "messages"
    theirs = instantiate(section, tune_tokenizer(corpus, 50), setting="x")[0]
    assert sample["tokens"].tolist() == theirs["tokens"] and len(theirs["tokens"]) == 50
    assert sample["tokens"][-1] == tokenizer.eos_id and sample["labels"][-1] == IGNORE
    assert "x.dataset: 2 of 2 samples are cut at tokenizer.max_seq_len=50" in capsys.readouterr().out


# --- conversations ---------------------------------------------------------------------------------------------------

MORE = {"role": "assistant", "content": "Yes."}
UNDERSTOOD = {
    "OpenAI": ({"messages": [USER, ANSWER]}, "30 days.<|eot_id|>"),
    "parts of text": (
        {"messages": [USER, ANSWER | {"content": [{"type": "text", "text": "30"}, " days."]}]},
        "30 days.",
    ),
    "developer": ({"messages": [{"role": "developer", "content": "Count."}, USER, ANSWER]}, "30 days."),
    "two turns": ({"messages": [USER, ANSWER, USER, MORE]}, "30 days.<|eot_id|>Yes.<|eot_id|>"),
    "weight 0": ({"messages": [USER, ANSWER | {"weight": 0}, USER, MORE]}, "Yes.<|eot_id|>"),
    "train false": ({"messages": [USER, ANSWER | {"train": False}, USER, MORE | {"weight": 1}]}, "Yes."),
    "ShareGPT in the column": ({"messages": [HUMAN, GPT]}, "30 days."),
    "ShareGPT": ({"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}, "30 days."),
    "JSON in text": ({"messages": json.dumps([USER, ANSWER])}, "30 days."),
    "columns of older datasets": (
        {"messages": {"role": ["user", "assistant"], "content": ["a", "30 days."]}},
        "30 day",
    ),
    "nulls of a table": ({"messages": [USER | {"tool_calls": None, "name": None}, ANSWER], "tools": None}, "30 days."),
    "prompt and completion": ({"prompt": "How many?", "completion": "30 days."}, "30 days."),
    "prompt and response": ({"prompt": "How many?", "response": "30 days."}, "30 days."),
    "prompt of messages": ({"prompt": [USER, MORE, USER], "completion": [ANSWER]}, "30 days."),
    "Alpaca": ({"instruction": "Count", "input": "June", "output": "30 days."}, "30 days."),
    "a user who ends": ({"messages": [USER, ANSWER, USER]}, "30 days."),
    "dates": ({"messages": [USER, ANSWER | {"content": "2026-01-01"}]}, "2026-01-01"),
    "other columns": ({"id": 7, "source": "x", "score": None, "messages": [USER, ANSWER]}, "30 days."),
}


@pytest.mark.parametrize("row, said", UNDERSTOOD.values(), ids=UNDERSTOOD.keys())
def test_a_conversation_in_any_form_teaches_what_the_assistant_says(row, said, tokenizer, tmp_path):
    dataset = built(tmp_path, tokenizer, "chat_dataset", row, conversation_column="messages")
    assert learned(tokenizer, dataset[0]).startswith(said)
    assert "How many?" not in learned(tokenizer, dataset[0])


def test_the_question_and_the_system_prompt_are_in_front(tokenizer, tmp_path):
    rows = [
        {"messages": [{"role": "system", "content": "Old"}, USER, ANSWER]},
        {"system": "Old", "conversations": [HUMAN, GPT]},
        {"instruction": "Count", "input": "June", "output": "30 days."},
    ]
    texts = [text(tokenizer, s["tokens"]) for s in built(tmp_path, tokenizer, "chat_dataset", *rows)]
    assert all("Old<|eot_id|>" in t and "How many?" in t for t in texts[:2]) and "Count\n\nJune" in texts[2]
    new = built(tmp_path, tokenizer, "chat_dataset", *rows, new_system_prompt="New")
    assert all("New<|eot_id|>" in t and "Old" not in t for t in (text(tokenizer, s["tokens"]) for s in new))


def without(message, key):
    return {k: v for k, v in message.items() if k != key}


REFUSED = {
    "a role of another form": (
        [{"role": "human", "content": "a"}, ANSWER],
        "message 1 has the role 'human'; known: sys",
    ),
    "a role of torchtune": ([USER, {"role": "ipython", "content": "a"}, ANSWER], "write tool results as 'tool'"),
    "an unknown speaker": ([HUMAN, {"from": "narrator", "value": "x"}], "message 2 has the from 'narrator'"),
    "no role": ([without(USER, "role"), ANSWER], "message 1 has no role (it has content)"),
    "null": ([USER, ANSWER | {"content": None}], "message 2: content is null"),
    "a number": ([USER, ANSWER | {"content": 30}], "message 2: content is a number (30), not text"),
    "no content": ([USER, without(ANSWER, "content")], "message 2: content is null"),
    "a picture": ([USER | {"content": [{"type": "image_url"}]}, ANSWER], "message 1 has a part of type 'image_url'"),
    "two users": ([USER, USER, ANSWER], "message 2 is a second message of the user in a row"),
    "two assistants": ([USER, ANSWER, MORE], "message 3 is of the assistant and follows one of the assistant"),
    "an assistant first": ([ANSWER, USER, ANSWER], "message 1 is of the assistant and comes first"),
    "an assistant behind the system": ([{"role": "system", "content": "s"}, ANSWER], "follows one of the system"),
    "a late system": ([USER, ANSWER, {"role": "system", "content": "s"}], "message 3 is of the system, which speaks"),
    "a result without a call": ([USER, {"role": "tool", "content": "4"}, ANSWER], "the one before calls no tool"),
    "half a weight": ([USER, ANSWER | {"weight": 0.5}], "message 2 has the weight 0.5"),
    "the old call": ([USER, ANSWER | {"function_call": {"name": "f"}}], "which tool_calls replaced"),
    "a call without a name": ([USER, ANSWER | {"tool_calls": [{"id": "1"}]}], "no function with a name"),
    "torn arguments": (
        [USER, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "the arguments of the tool call f are no valid JSON",
    ),
    "a message that is text": (["How many?", ANSWER], "message 1 is text, not an object"),
    "text": ("hello", "'messages' is text, not a list of messages"),
    "nothing": (None, "'messages' is null"),
}


@pytest.mark.parametrize("messages, problem", REFUSED.values(), ids=REFUSED.keys())
def test_a_conversation_that_is_wrong_is_refused_with_line_and_message(messages, problem, tokenizer, tmp_path):
    good = {"messages": [USER, ANSWER]}
    with pytest.raises(UserError) as e:
        built(tmp_path, tokenizer, "chat_dataset", good, good, {"messages": messages}, good)
    said = str(e.value)
    assert said.startswith(f"x.dataset: {tmp_path}/rows.jsonl line 3: ") and problem in said and "\n" not in said


def test_all_bad_rows_are_counted_and_three_are_shown(tokenizer, tmp_path):
    good, bad, other = {"messages": [USER, ANSWER]}, {"messages": [USER, USER]}, {"text": "x"}
    with pytest.raises(UserError, match=r"line 2: message 2 is .* \(4 more bad rows: line 4, the same; line 5 has no"):
        built(tmp_path, tokenizer, "chat_dataset", good, bad, good, bad, other, other, bad)


SKIPPED = {
    "no message": ({"messages": []}, "have no message"),
    "only a question": ({"messages": [USER]}, "have no answer of an assistant"),
    "an empty answer": ({"messages": [USER, ANSWER | {"content": " "}]}, "have an empty answer"),
    "weight 0": ({"messages": [USER, ANSWER | {"weight": 0}]}, "have no answer to be learned"),
    "a prompt without end": (
        {"messages": [USER | {"content": "day " * 300}, ANSWER]},
        "have a prompt that leaves no room for an answer",
    ),
}


@pytest.mark.parametrize("row, reason", SKIPPED.values(), ids=SKIPPED.keys())
def test_a_row_that_teaches_nothing_is_skipped_and_counted(row, reason, tokenizer, tmp_path, capsys):
    good = {"messages": [USER, ANSWER]}
    dataset = built(tmp_path, tokenizer, "chat_dataset", good, row, good)
    assert len(dataset) == 2 and dataset.prepared.skipped.tolist() == [1]
    said = capsys.readouterr().out
    assert f"skipping 1 of 3 rows that {reason}" in said and "(rows 2)" in said
    with pytest.raises(UserError, match=f"none of 2 rows in .* teaches anything: 2 {reason[:8]}"):
        built(tmp_path, tokenizer, "chat_dataset", row, row)


NOTED = {
    "a template in text": (
        {"messages": [USER, ANSWER | {"content": "<|im_end|> 30"}]},
        "hold a chat template's special",
    ),
    "a column": ({"messages": [USER, ANSWER], "documents": ["d"]}, "have a column 'documents' that is not read"),
    "a key": ({"messages": [USER, ANSWER | {"citations": ["d"]}]}, "have messages with 'citations', which is not read"),
    "a last question": ({"messages": [USER, ANSWER, USER]}, "end with a turn of the user or a tool"),
}


@pytest.mark.parametrize("row, note", NOTED.values(), ids=NOTED.keys())
def test_what_a_user_should_know_of_rows_is_said_once(row, note, tokenizer, tmp_path, capsys):
    built(tmp_path, tokenizer, "chat_dataset", row, {"messages": [USER, ANSWER]}, row)
    assert capsys.readouterr().out.count(f"warning: 2 of 3 rows {note}") == 1


def test_special_tokens_in_text_stay_text(tokenizer, tmp_path):
    row = {"messages": [USER, ANSWER | {"content": "a <|eot_id|> b"}]}
    labels = built(tmp_path, tokenizer, "chat_dataset", row)[0]["labels"]
    assert (labels == tokenizer.special_tokens["<|eot_id|>"]).sum() == 1


# --- instructions and text -------------------------------------------------------------------------------------------


def test_instructions(tokenizer, tmp_path):
    for row in ({"input": "Q", "output": "A"}, {"prompt": "Q", "completion": "A"}):
        assert learned(tokenizer, built(tmp_path, tokenizer, "instruct_dataset", row)[0]) == "A<|eot_id|>"
    for value, kind in ((12, r"a number \(12\)"), (True, "true"), (None, "null")):
        with pytest.raises(UserError, match=f"line 1: 'output' is {kind}"):
            built(tmp_path, tokenizer, "instruct_dataset", {"input": "Q", "output": value})
    with pytest.raises(UserError, match=r"line 1 has an 'instruction' beside 'input', .*alpaca_dataset"):
        built(tmp_path, tokenizer, "instruct_dataset", {"instruction": "Add", "input": "1 2", "output": "3"})
    with pytest.raises(UserError, match=r"line 1 has no 'q' \(it has input, output\)"):
        columns = {"input": "q", "output": "output"}
        built(tmp_path, tokenizer, "instruct_dataset", {"input": "Q", "output": "A"}, column_map=columns)


def test_text(tokenizer, tmp_path, capsys):
    dataset = built(tmp_path, tokenizer, "text_completion_dataset", {"text": "a <|eot_id|>"}, {"text": " "})
    assert len(dataset) == 1 and learned(tokenizer, dataset[0]).startswith("<|begin_of_text|>a <|eot_id|>")
    assert "1 of 2 rows hold a chat template's" in capsys.readouterr().out
    for value, kind in (([], "a list"), (5, r"a number \(5\)"), (None, "null")):
        with pytest.raises(UserError, match=f"line 1: 'text' is {kind}, not text"):
            built(tmp_path, tokenizer, "text_completion_dataset", {"text": value})


# --- pairs -----------------------------------------------------------------------------------------------------------

WRONG = {"role": "assistant", "content": "31 days."}
SYSTEM = {"role": "system", "content": "s"}
PAIRS = {
    "conversations": {"chosen": [USER, ANSWER], "rejected": [USER, WRONG]},
    "a prompt of text": {"prompt": "How many?", "chosen": "30 days.", "rejected": "31 days."},
    "a prompt of messages": {"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [WRONG]},
    "a prompt in both": {"prompt": "How many?", "chosen": [USER, ANSWER], "rejected": [USER, WRONG]},
    "a system prompt apart": {"prompt": [SYSTEM], "chosen": [USER, ANSWER], "rejected": [USER, WRONG]},
    "ShareGPT": {"chosen": [HUMAN, GPT], "rejected": [HUMAN, GPT | {"value": "31 days."}]},
    "scores": {"chosen": [USER, ANSWER], "rejected": [USER, WRONG], "score_chosen": 2, "score_rejected": 2.0},
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS.keys())
def test_a_pair_in_any_form_has_its_question_in_front(row, tokenizer, tmp_path):
    (pair,) = built(tmp_path, tokenizer, "preference_dataset", row)
    for side, said in (("chosen", "30 days.<|eot_id|>"), ("rejected", "31 days.<|eot_id|>")):
        assert text(tokenizer, pair[f"{side}_input_ids"]).count("How many?") == 1
        assert learned(tokenizer, pair, f"{side}_") == said


BAD_PAIRS = {
    "no prompt": ({"chosen": [ANSWER], "rejected": [WRONG]}, "has no prompt: neither a 'prompt' column nor"),
    "only text": ({"chosen": "30 days.", "rejected": "31 days."}, "has no 'prompt', and 'chosen' is only text"),
    "no rejected": ({"chosen": [USER, ANSWER]}, "has no 'rejected' (it has chosen)"),
    "null": ({"chosen": [USER, ANSWER | {"content": None}], "rejected": [USER, WRONG]}, "message 2: content is null"),
    "two questions": (
        {"chosen": [USER, ANSWER], "rejected": [HUMAN | {"value": "?"}, GPT]},
        "message 1 of the user differs",
    ),
    "a question last": ({"chosen": [USER], "rejected": [USER, WRONG]}, "'chosen' does not end with an answer"),
    "order": ({"chosen": [USER, USER, ANSWER], "rejected": [USER, WRONG]}, "'chosen', message 2 is a second"),
    "scores": (PAIRS["conversations"] | {"score_chosen": 1, "score_rejected": 9}, "score_chosen=1 is below"),
    "margin": (PAIRS["conversations"] | {"margin": -0.5}, "margin=-0.5 says that the rejected answer is better"),
}


@pytest.mark.parametrize("row, problem", BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_a_pair_that_is_wrong_is_refused_with_its_line(row, problem, tokenizer, tmp_path):
    with pytest.raises(UserError) as e:
        built(tmp_path, tokenizer, "preference_dataset", PAIRS["conversations"], row)
    assert "rows.jsonl line 2" in str(e.value) and problem in str(e.value)


def test_pairs_that_teach_nothing_are_skipped_and_counted(corpus, tmp_path, capsys):
    long = "day " * 40
    same_start = {"prompt": "a", "chosen": f"{long} yes", "rejected": f"{long} no"}
    equal = {"prompt": "a", "chosen": "b", "rejected": "b"}
    empty = {"prompt": "a", "chosen": "b", "rejected": ""}
    rows = [PAIRS["conversations"], equal, same_start, empty]
    assert len(built(tmp_path, tokenizer_for(corpus, 40), "preference_dataset", *rows)) == 1
    said = capsys.readouterr().out
    assert "rows that have a chosen answer equal to the rejected one (rows 2)" in said
    assert "rows that have answers that are equal as far as tokenizer.max_seq_len reaches (rows 3)" in said
    assert "rows that have an empty answer (rows 4)" in said


def test_pairs_of_plain_text(corpus, tmp_path):
    rows = [
        {"prompt": "How many?", "chosen": " 30", "rejected": " 31"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = component("x", tmp_path / "rows.jsonl") | {"_component_": "llamaq.data.text.text_preference_dataset"}
    tokenizer = tokenizer_for(corpus, 40)
    (pair,) = build_dataset(section, tokenizer, "x")
    assert text(tokenizer, pair["rejected_input_ids"]) == "<|begin_of_text|>How many? 31"
    assert learned(tokenizer, pair, "chosen_") == " 30"
