"""`tune inspect` says what a folder or a file is, from headers and rows alone, and starts nothing."""

import json
import re
from pathlib import Path

import pytest
from conftest import MODEL
from folders import write_folder

from llamaq.data.corpus import tiny_chat
from llamaq.data.tokenizer import build_tokenizer
from llamaq.export.bundle_tokenizer import write_tokenizer
from llamaq.plan.inspect import main

LLAMA3 = "torchtune.models.llama3.llama3_tokenizer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder with random weights and the tiny corpus's tokenizer, and the corpus in `data`."""
    root = tmp_path_factory.mktemp("inspected")
    (root / "data").mkdir()
    tiny_chat(root / "data", num_train=20, num_pairs=4, num_heldout=4, num_people=60, vocab_size=640)
    write_folder(root / "model")
    files = {"path": root / "data/tokenizer.model", "special_tokens_path": root / "data/special_tokens.json"}
    tokenizer = build_tokenizer({"_component_": LLAMA3, **{k: str(v) for k, v in files.items()}}, MODEL["vocab_size"])
    write_tokenizer(tokenizer, MODEL["vocab_size"], 256, True, root / "model")
    return root


def inspect(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_folder_is_described_with_what_a_run_of_it_takes(folder, capsys):
    code, said, _ = inspect(capsys, folder / "model")
    assert code == 0 and "Hugging Face, model.safetensors" in said
    assert f"vocab_size {MODEL['vocab_size']}, num_layers 2" in said
    assert "answers end with <|eot_id|>" in said and "What is the capital of France?" in said
    for line in ("qat", "qat_lora", "qat_dpo", "spinquant", "export", "model.pte", "disk"):
        assert re.search(rf"^ *{re.escape(line)}: about +\d+\.\d\d GiB", said, re.M), line


def test_weights_are_not_read(folder, capsys, tmp_path):
    """A file whose header is whole and whose weights are a hole is described like any other."""
    for path in (folder / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    size, end = weights.stat().st_size, 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    with weights.open("r+b") as f:
        f.truncate(end)
        f.truncate(size)
    assert inspect(capsys, tmp_path)[1].splitlines()[1:] == inspect(capsys, folder / "model")[1].splitlines()[1:]


def test_a_folder_that_cannot_be_used_is_one_line(folder, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "hidden_size": 64}))
    code, _, error = inspect(capsys, tmp_path)
    assert code == 1 and "model_type is gemma3, which is not supported" in error and len(error.splitlines()) == 1


def learned(said: str) -> str:
    pieces = re.findall(r"^ *\d+ +\d+ learned (.*)$", said, re.M)
    return "".join(p[1:-1] if p[0] in "'\"" else p for p in pieces)


def test_a_file_is_counted_and_one_row_shown_token_by_token(folder, capsys):
    train = folder / "data/train.jsonl"
    code, said, _ = inspect(capsys, train, f"checkpoint_dir={folder}/model", f"data_dir={folder}/data", "--row", 2)
    assert code == 0 and "read as qat.dataset (torchtune.datasets.chat_dataset)" in said
    assert "20 samples of 20 rows" in said and "lengths in tokens: 50 %" in said
    answers = [m["content"] for m in json.loads(train.read_text().splitlines()[1])["messages"] if m["role"] != "user"]
    assert learned(said) == "".join(f"{answer}<|eot_id|>" for answer in answers)


def test_a_file_that_no_section_names_is_read_by_its_columns(folder, capsys, tmp_path):
    rows = [{"prompt": "How many days has June?", "chosen": "June has 30 days.", "rejected": "June has 31 days."}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said, _ = inspect(capsys, tmp_path / "mine.jsonl", f"checkpoint_dir={folder}/model")
    assert code == 0 and "torchtune.datasets.preference_dataset" in said
    assert learned(said) == "June has 30 days.<|eot_id|>June has 31 days.<|eot_id|>"
    assert "pair 1, chosen" in said and "pair 1, rejected" in said


def test_what_is_wrong_is_one_line(folder, capsys, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "gpt", "content": "hi"}]}\n')
    (tmp_path / "odd.jsonl").write_text('{"a": 1}\n')
    here = f"checkpoint_dir={folder}/model"
    for arguments, message in (
        ((tmp_path / "bad.jsonl", here), "bad.jsonl line 1: message 1 has the role 'gpt'"),
        ((tmp_path / "odd.jsonl", here), "its first row has the columns a; known are"),
        ((folder / "data/train.jsonl",), "whose tokenizer? give checkpoint_dir=FOLDER"),
        ((tmp_path / "none.jsonl", here), "no such file or folder"),
        ((folder / "data/train.jsonl", here, "--row", 21), "--row 21: the file has 20 samples"),
    ):
        code, _, error = inspect(capsys, *arguments)
        assert code == 1 and message in error and len(error.splitlines()) == 1, error
