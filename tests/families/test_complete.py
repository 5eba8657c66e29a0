"""The sections model and tokenizer come from the checkpoint's folder, unless a config says otherwise."""

import base64

import pytest
import torch
from conftest import MODEL, SMALL
from folders import write_folder

from llamaq.config import Config, load
from llamaq.errors import UserError
from llamaq.families import complete


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "model" / name).write_text("{}")
    return tmp_path / "model"


def config(folder, *overrides: str) -> Config:
    settings = [o for o in SMALL if not o.startswith(("model.", "tokenizer."))]
    left_out = ["~base", "~corpus", "~model", "~tokenizer"]
    settings = [o for o in settings if not o.startswith(("base.", "corpus."))]
    return load("tiny", [*settings, *left_out, f"checkpoint_dir={folder}", "output_dir=runs/x", *overrides])


def refusal(c: Config) -> str:
    with pytest.raises(UserError) as e:
        complete(c)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_no_section_is_needed(folder):
    c = complete(config(folder))
    assert c.model == MODEL
    assert c.tokenizer == {
        "_component_": "llamaq.data.hf_tokenizer.hf_tokenizer",
        "path": f"{folder}/tokenizer.json",
        "config": f"{folder}/tokenizer_config.json",
        "generation_config": f"{folder}/generation_config.json",
        "max_seq_len": 256,  # the model has no more
    }
    assert complete(c) == c


def test_a_section_without_a_component_changes_the_folders(folder):
    c = complete(config(folder, "model.max_seq_len=128", "tokenizer.max_seq_len=64"))
    assert c.model == MODEL | {"max_seq_len": 128}
    assert c.tokenizer["max_seq_len"] == 64 and c.tokenizer["path"] == f"{folder}/tokenizer.json"


def test_a_section_with_a_component_stays_as_it_is(folder):
    given = ["model._component_=torchtune.models.llama3_2.llama3_2_1b"]
    c = complete(config(folder, *given))
    assert c.model == {"_component_": "torchtune.models.llama3_2.llama3_2_1b"}
    assert c.tokenizer["max_seq_len"] == 2048


def test_metas_tokenizer_is_found_and_an_older_one_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json (Hugging Face) and no tokenizer.model (Meta)" in refusal(config(folder))
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15")
    assert "is SentencePiece's, not Llama 3's; write one with transformers" in refusal(config(folder))
    (folder / "original").mkdir()
    (folder / "original/tokenizer.model").write_bytes(base64.b64encode(b"a") + b" 0\n")
    c = complete(config(folder))
    assert c.tokenizer["_component_"] == "torchtune.models.llama3.llama3_tokenizer"
    assert c.tokenizer["path"] == f"{folder}/original/tokenizer.model"


def test_a_folder_that_does_not_say_what_it_is_and_one_that_is_not_there(tmp_path):
    assert f"checkpoint_dir={tmp_path}/no is not a folder" in refusal(config(tmp_path / "no"))
    torch.save({"norm.scale": torch.ones(4)}, tmp_path / "model.pt")
    assert "has neither config.json nor params.json, so nothing says what model" in refusal(config(tmp_path))


def test_a_model_that_the_run_trains_itself_needs_both_sections():
    assert "the section tokenizer has no _component_: with a section base" in refusal(load("tiny", ["~tokenizer"]))
    c = load("tiny", [])
    assert complete(c) == c  # and its folder is not there yet


def test_a_home_folder_in_a_section_without_a_component(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert config(folder, "tokenizer.path=~/tokenizer.json").tokenizer["path"] == "/home/me/tokenizer.json"


def test_llama_yaml_needs_three_folders_and_nothing_else(folder):
    folders = [f"checkpoint_dir={folder}", "data_dir=/data", "output_dir=runs/x"]
    c = complete(load("llama", folders))
    assert c.model == MODEL
    assert c.section("qat").dataset["data_files"] == "/data/train.jsonl" and c.section("spinquant").calibration
