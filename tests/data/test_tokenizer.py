"""The tokenizer of a run: which files it takes, what fits a model, and what is said where something does not."""

import json
from pathlib import Path
from typing import Any

import pytest
from hf_folder import write_folder
from tokenizers import AddedToken, Tokenizer

from llamaq.data.corpus import tiny_chat
from llamaq.data.tokenizer import build_tokenizer, copy_tokenizer, prompt_tokens, text_of, text_opening
from llamaq.errors import UserError

LLAMA3 = "torchtune.models.llama3.llama3_tokenizer"
HUGGING_FACE = "llamaq.data.hf_tokenizer.hf_tokenizer"
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Anna."}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tiny_chat(folder, num_train=60, num_pairs=2, num_heldout=2, num_people=40, vocab_size=600)
    return folder


def llama3(corpus: Path, **more: Any) -> dict[str, Any]:
    files = {"path": f"{corpus}/tokenizer.model", "special_tokens_path": f"{corpus}/special_tokens.json"}
    return {"_component_": LLAMA3, **files, **more}


def changed(section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The section after its tokenizer_config.json was changed; None takes a key out."""
    file = Path(section["config"])
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return section


def refusal(section: dict[str, Any], rows: int = 600) -> str:
    with pytest.raises(UserError) as e:
        build_tokenizer(section, rows)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    return str(e.value)


# --- Llama 3's own file -----------------------------------------------------------------------------------------------


def test_llama_3s_template_has_two_forms(corpus):
    torchtune, meta = (build_tokenizer(llama3(corpus, template=f), 600) for f in ("torchtune", "meta"))
    assert build_tokenizer(llama3(corpus), 600).chat(CHAT) == torchtune.chat(CHAT)
    ids, learn = torchtune.chat(CHAT)
    assert ids[0] == torchtune.bos_id and ids[-2:] == [torchtune.eot_id, torchtune.eos_id]
    assert learn == [False] * (len(ids) - sum(learn) - 1) + [True] * sum(learn) + [False]
    dated, dated_learn = meta.chat(CHAT)
    assert dated[-1] == meta.eot_id and sum(dated_learn) == sum(learn)
    assert "Today Date: 26 Jul 2024" in meta.render(CHAT) and "Today" not in torchtune.render(CHAT)
    assert "meta" not in torchtune.template_name.lower() and "2024-07-26" in meta.template_name
    other = build_tokenizer(llama3(corpus, template="meta", date="2026-01-31"), 600)
    assert "Today Date: 31 Jan 2026" in other.render(CHAT)
    assert len({torchtune.fingerprint, meta.fingerprint, other.fingerprint}) == 3
    assert "tokenizer.template=hf: choose torchtune or meta" in refusal(llama3(corpus, template="hf"))


def test_tools_are_written_as_llama_does(corpus):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    tokenizer = build_tokenizer(llama3(corpus), 600)
    text = tokenizer.render(messages, tools)
    assert '"name": "weather"\n    }\n}\n\nWho?<|eot_id|>' in text
    assert "<|start_header_id|>ipython<|end_header_id|>\n\nrain<|eot_id|>" in text
    ids, learn = tokenizer.chat(messages, tools)
    said = tokenizer.tt_model.tt_model.decode([i for i, taught in zip(ids, learn, strict=True) if taught])
    assert said == '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>Rain.<|eot_id|>'
    messages[1]["tool_calls"] = [call, call]
    with pytest.raises(UserError, match=r"message 2: .*one tool call at a time"):
        tokenizer.chat(messages, tools)


def test_torchtunes_prompt_template_still_stands_around_messages(corpus):
    template = {"user": ["Question: ", " ?"], "assistant": ["", ""]}
    tokenizer, again = (build_tokenizer(llama3(corpus, prompt_template=template), 600) for _ in range(2))
    assert tokenizer.fingerprint == again.fingerprint != build_tokenizer(llama3(corpus), 600).fingerprint
    plain = build_tokenizer(llama3(corpus), 600)
    wrapped = [CHAT[0] | {"content": "Question:Who??"}, CHAT[1]]
    assert tokenizer.chat(CHAT) == plain.chat(wrapped) and tokenizer.prompt(CHAT[:1]) == plain.prompt(wrapped[:1])
    assert tokenizer.render(CHAT) == plain.render(wrapped) and "Question:Who??" in tokenizer.render(CHAT)


# --- the right file for the right reader -----------------------------------------------------------------------------


def test_a_tokenizer_of_the_other_kind_is_named(corpus, tmp_path):
    section = write_folder(tmp_path, "chatml")
    said = refusal({"_component_": LLAMA3, "path": section["path"]})
    assert f"a tokenizer.json of Hugging Face, and {LLAMA3} reads Meta's" in said and HUGGING_FACE in said
    said = refusal(section | {"path": f"{corpus}/tokenizer.model"})
    assert (
        "not a tokenizer.json of Hugging Face" in said
        and f"for Meta's tokenizer.model use _component_: {LLAMA3}" in said
    )
    said = refusal({"_component_": LLAMA3, "path": f"{tmp_path}/original/tokenizer.model"})
    assert f"no such file; {tmp_path}/tokenizer.json is there: use _component_: {HUGGING_FACE}" in said
    (tmp_path / "torn.model").write_text("not base64\n")
    assert f"tokenizer.path={tmp_path}/torn.model: not a tokenizer of this kind" in refusal(
        {"_component_": LLAMA3, "path": f"{tmp_path}/torn.model"}
    )
    (tmp_path / "torn.json").write_text('{"version": "1.0", "model"')
    assert "not a tokenizer.json of Hugging Face" in refusal(section | {"path": f"{tmp_path}/torn.json"})
    assert "tokenizer.config=" in refusal(section | {"config": f"{tmp_path}/torn.json"})
    assert refusal({"_component_": "builtins.dict"}).startswith("tokenizer._component_=builtins.dict: use ")


def test_what_no_file_says_is_asked_for(tmp_path):
    section = write_folder(tmp_path, "chatml")
    assert "eos_token is '<|gone|>', which is no token" in refusal(changed(section, eos_token="<|gone|>"))
    changed(section, eos_token="<|im_end|>", pad_token="<|gone|>", unk_token="<|gone|>")
    assert build_tokenizer(section, 600).pad_id == build_tokenizer(section, 600).eos_id
    bare = {k: section[k] for k in ("_component_", "path")}
    assert "nothing says which token ends a text; give its tokenizer_config.json" in refusal(bare)
    changed(section, eos_token=None, pad_token=None)  # generation_config.json has it
    tokenizer = build_tokenizer(section, 600)
    assert tokenizer.eos_id == tokenizer.special_tokens["<|im_end|>"] == tokenizer.pad_id


def test_all_tokens_that_end_an_answer_are_found(tmp_path):
    for kind, ends in (("dated", ["<|end|>", "<|eot|>", "<|eom|>"]), ("chatml", ["<|im_end|>", "<|endoftext|>"])):
        section = write_folder(tmp_path / kind, kind)
        tokenizer = build_tokenizer(section, 600)
        assert set(tokenizer.stop_tokens) == {tokenizer.special_tokens[t] for t in ends}
        assert tokenizer.stop_tokens[0] == tokenizer.eos_id
        # without generation_config.json the template still tells which token ends a turn
        few = build_tokenizer({k: v for k, v in section.items() if k != "generation_config"}, 600)
        assert few.stop_tokens == [tokenizer.special_tokens[t] for t in ends[: 2 if kind == "dated" else 1]]


# --- ids and the model's rows -----------------------------------------------------------------------------------------


def test_added_tokens_need_rows_in_the_model(tmp_path):
    section = write_folder(tmp_path, "chatml")
    size = build_tokenizer(section, 600).base_vocab_size
    made = Tokenizer.from_file(section["path"])
    made.add_special_tokens([AddedToken("<|mine|>", special=True, normalized=False)])
    made.save(section["path"])
    tokenizer = build_tokenizer(section, size + 1)  # a fine-tune with a resized vocabulary
    assert tokenizer.special_tokens["<|mine|>"] == size
    said = refusal(section, size)
    assert f"ids up to {size} (<|mine|> is {size}), the model only {size} rows" in said and "not resized" in said


def test_tokens_that_only_the_config_knows_are_added_as_transformers_does(tmp_path):
    section = write_folder(tmp_path, "chatml")
    size = build_tokenizer(section, 600).base_vocab_size
    entry = {"content": "<|mine|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    changed(section, added_tokens_decoder={str(size): entry})
    assert build_tokenizer(section, 600).special_tokens["<|mine|>"] == size
    transformers = pytest.importorskip("transformers")
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path).convert_tokens_to_ids("<|mine|>") == size
    changed(section, added_tokens_decoder={str(size + 3): entry})
    assert f"token '<|mine|>' has id {size + 3} there, and {size} in tokenizer.json" in refusal(section)


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_begins_as_the_tokenizer_begins_it(tmp_path, corpus):
    dated = build_tokenizer(write_folder(tmp_path / "a", "dated"), 600)
    chatml = build_tokenizer(write_folder(tmp_path / "b", "chatml"), 600)
    assert (
        text_opening(dated) == [dated.special_tokens["<|begin|>"]] == [dated.prefix_id] and text_opening(chatml) == []
    )
    for tokenizer in (dated, chatml, build_tokenizer(llama3(corpus), 600)):
        ids = tokenizer.encode("Anna é 😀", add_bos=True, add_eos=True)
        assert prompt_tokens(tokenizer, "Anna é 😀", chat=False) == ids[:-1] and ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids) == "Anna é 😀" == text_of(tokenizer, [*ids[:-1], 599])
        assert tokenizer.encode("", add_bos=False, add_eos=False) == []


def test_the_files_are_copied_under_their_usual_names(tmp_path, corpus):
    section = write_folder(tmp_path / "a", "chatml")
    (tmp_path / "out").mkdir()
    assert copy_tokenizer(llama3(corpus), tmp_path / "out") == ["tokenizer.model", "special_tokens.json"]
    names = copy_tokenizer(section, tmp_path / "out")
    assert names == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    again = {"_component_": HUGGING_FACE} | {
        key: str(tmp_path / "out" / name)
        for key, name in zip(("path", "config", "chat_template", "generation_config"), names, strict=True)
    }
    assert build_tokenizer(again, 600).fingerprint == build_tokenizer(section, 600).fingerprint
