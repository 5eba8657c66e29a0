"""The bundle of a run: a tokenizer that gives the same ids everywhere, and files that ExecuTorch's runner runs."""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
import unicodedata
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
import torch
from conftest import MODEL, SMALL, saved_variant
from hf_folder import write_folder
from pytorch_tokenizers import CppHFTokenizer
from tokenizers import Tokenizer

from llamaq.config import ExportConfig, load
from llamaq.data.corpus import tiny_chat
from llamaq.data.tokenizer import build_tokenizer, prompt_tokens
from llamaq.export.bundle import bundle, howto, metas_tokenizer, write_tokenizer_files
from llamaq.export.bundle_tokenizer import hugging_face_tokenizer, special_tokens_of, write_tokenizer
from llamaq.export.exporter import export_pte
from llamaq.export.gates import runner_constants
from llamaq.export.pte import Pte
from llamaq.runs.run import Run

ROWS = MODEL["vocab_size"]
QUESTION = [{"role": "user", "content": "…"}]
SCRIPTS = [(0x20, 0x7E), (0x80, 0x2FF), (0x370, 0x1FFF), (0x2000, 0x33FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
ODD = [
    "\t",
    "\r\n",
    "\n\n",
    "\u00a0",
    "\u3000",
    "\u0085",
    "\u001c",
    "\u200d",
    "\ufeff",
    "\u017f",
    "\u0130",
    "e\u0301",
    "\0",
]
CONTRACTIONS = "'sStTrReEvVmMlLdD\u017f\u212a \n\r\t.,;:!?0123456789"


def build(folder: Path, **more: str) -> Any:
    component = {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": str(folder / "tokenizer.model")}
    if (special := folder / "special_tokens.json").exists():
        component["special_tokens_path"] = str(special)
    return build_tokenizer(component | more, 128256)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tiny_chat(folder, num_train=80, num_pairs=10, num_heldout=10, num_people=40, vocab_size=ROWS)
    return folder


@pytest.fixture(scope="module")
def tokenizers(corpus, tmp_path_factory) -> tuple[Any, Path]:
    """Torchtune's tokenizer of the corpus, and the folder with its other forms."""
    folder, tokenizer = tmp_path_factory.mktemp("forms"), build(corpus)
    write_tokenizer(tokenizer, ROWS, max_length=256, chat=True, folder=folder)
    return tokenizer, folder


def texts(corpus: Path | None, n: int) -> list[str]:
    """Text of the corpus, of every script, of contractions and digits, of words, and of pieces of these."""
    r = random.Random(13)
    lines = (corpus / "train.jsonl").read_text().splitlines() if corpus else ["How many days has June? 30 days."]

    def one() -> str:
        kind, length = r.randrange(4), r.randint(0, 60)
        if kind == 0:
            return "".join(
                r.choice(ODD) if r.random() < 0.2 else chr(r.randint(*r.choice(SCRIPTS))) for _ in range(length)
            )
        if kind == 1:
            return "".join(r.choice(CONTRACTIONS) for _ in range(length))
        if kind == 2:
            return " ".join(
                "".join(r.choice("aeioutnsrhldm") for _ in range(r.randint(1, 12))) for _ in range(length // 4)
            )
        line = r.choice(lines)
        at = r.randrange(len(line))
        return line[at : at + 4 * length]

    return [one() for _ in range(n)]


def check_same_ids(tokenizer: Any, folder: Path, samples: list[str], special: list[str]) -> None:
    """Compare torchtune's ids with those of tokenizer.json, in Rust and in ExecuTorch's C++."""
    rust, cpp = Tokenizer.from_file(str(folder / "tokenizer.json")), CppHFTokenizer()
    cpp.load(str(folder))
    r = random.Random(5)
    for text in samples:
        ids = tokenizer.encode(text, add_bos=False, add_eos=False)
        assert rust.encode(text, add_special_tokens=False).ids == ids, text
        assert list(cpp.encode(text, 0, 0)) == ids, text
        if ids:  # torchtune opens an empty text with nothing
            assert rust.encode(text).ids == tokenizer.encode(text, add_bos=True, add_eos=False), text
        assert rust.decode(ids) == text
        marked = "".join(part + r.choice(special) for part in (text[:7], text[7:], ""))
        ids = tokenizer.tt_model.tt_model.encode(marked, allowed_special=set(special))
        assert rust.encode(marked, add_special_tokens=False).ids == ids, marked
        assert list(cpp.encode(marked, 0, 0)) == ids, marked
        assert rust.decode(ids, skip_special_tokens=False) == marked


def test_2000_texts_have_the_same_ids_in_every_form(tokenizers, corpus):
    tokenizer, folder = tokenizers
    special = list(special_tokens_of(tokenizer, ROWS))
    assert len(special) > 200
    check_same_ids(tokenizer, folder, texts(corpus, 2000), special)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llama_models") is None, reason="needs Meta's tokenizer: pip install llama-models"
)
def test_metas_own_tokenizer_has_the_same_ids(tmp_path):
    spec = importlib.util.find_spec("llama_models.llama3")
    assert spec is not None and spec.origin is not None
    (tmp_path / "tokenizer.model").symlink_to(Path(spec.origin).with_name("tokenizer.model"))
    tokenizer = build(tmp_path)
    write_tokenizer(tokenizer, 128256, max_length=2048, chat=True, folder=tmp_path)
    special = [t for t in special_tokens_of(tokenizer, 128256) if "unused" not in t]
    check_same_ids(tokenizer, tmp_path, texts(None, 2000), special)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 128256


@pytest.mark.parametrize("form", ["torchtune", "meta"])
def test_chats_are_rendered_to_the_tokens_of_training(corpus, tmp_path, form):
    tokenizer = build(corpus, template=form)
    write_tokenizer(tokenizer, ROWS, max_length=256, chat=True, folder=tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    environment = jinja2.Environment()  # as plain as another program's may be
    environment.globals["strftime_now"] = date(2024, 7, 26).strftime
    template = environment.from_string(config["chat_template"])
    rust = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    def ids(messages: list[dict[str, str]], **more) -> list[int]:
        text = template.render(messages=messages, bos_token=config["bos_token"], **more)
        return rust.encode(text, add_special_tokens=False).ids

    question = [{"role": "user", "content": "  How many days has June?\n"}]
    assert ids(question, add_generation_prompt=True) == prompt_tokens(tokenizer, question[0]["content"], chat=True)
    chat = [{"role": "system", "content": "Be brief."}, *question, {"role": "assistant", "content": "30 days."}]
    chat.append({"role": "user", "content": "…and July? \u00e9\U0001f44d"})
    trained = tokenizer.chat(chat)[0]
    assert ids(chat) == (trained[:-1] if form == "torchtune" else trained)  # without the end of the text
    assert ("Cutting Knowledge Date" in template.render(messages=chat)) == (form == "meta")
    assert config["eos_token"] == "<|eot_id|>" and rust.token_to_id(config["pad_token"]) == tokenizer.pad_id
    cpp = CppHFTokenizer()
    cpp.load(str(tmp_path))
    assert (cpp.bos_tok(), cpp.eos_tok()) == (tokenizer.bos_id, tokenizer.eot_id)
    text = template.render(messages=chat, bos_token=config["bos_token"])
    assert list(cpp.encode(text, 0, 0)) == ids(chat)


@pytest.mark.parametrize("kind", ["smol", "chatml", "thinking", "dated"])
def test_a_hugging_face_tokenizer_is_copied_with_the_template_that_was_trained(tmp_path, kind):
    """ExecuTorch's C++ tokenizer gives its ids, and finds the token that ends a text."""
    section = write_folder(tmp_path / "model", kind)
    tokenizer, folder = build_tokenizer(section, 400), tmp_path / "bundle"
    folder.mkdir()
    names = write_tokenizer_files(SimpleNamespace(tokenizer=section), tokenizer, folder)  # pyright: ignore
    assert names == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    for name in names:
        same = (folder / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
        assert same == (name != "tokenizer_config.json" and (name != "tokenizer.json" or kind in ("smol", "dated")))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config.pop("chat_template") == (folder / "chat_template.jinja").read_text()
    assert config == json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    cpp = CppHFTokenizer()
    cpp.load(str(folder))
    assert cpp.eos_tok() == tokenizer.eos_id and (tokenizer.bos_id is None or cpp.bos_tok() == tokenizer.bos_id)
    for sample in [unicodedata.normalize("NFC", t) for t in texts(None, 200)]:
        assert list(cpp.encode(sample, 0, 0)) == tokenizer.encode(sample, add_bos=False, add_eos=False), sample
        chat = [{"role": "user", "content": sample}, {"role": "assistant", "content": "Yes."}]
        assert list(cpp.encode(tokenizer.render(chat), 0, 0)) == tokenizer.chat(chat)[0]
    constants = runner_constants(tokenizer)
    assert constants["get_eos_ids"][0] == tokenizer.eos_id and ("get_bos_id" in constants) == (kind == "dated")
    named = {"max_length": 64, "max_tokens_per_call": 32, "eos_token_id": constants["get_eos_ids"]}
    text = howto(tokenizer, names, named, chat=True)
    assert (
        "tokenizer.json" in text and "chat_template.jinja" in text and tokenizer.render(QUESTION, opened=True) in text
    )
    assert "begin_of_text" not in text and "Llama 3" not in text


def test_metas_file_beside_a_tokenizer_json_is_taken_if_it_has_the_same_ids(corpus, tokenizers, tmp_path):
    shutil.copyfile(tokenizers[1] / "tokenizer.json", tmp_path / "tokenizer.json")
    section = {"path": str(tmp_path / "tokenizer.json")}
    assert metas_tokenizer(section) == [] == metas_tokenizer({"path": str(corpus / "tokenizer.model")})
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e sentencepiece")
    assert metas_tokenizer(section) == []
    (tmp_path / "original").mkdir()
    shutil.copyfile(corpus / "tokenizer.model", tmp_path / "original" / "tokenizer.model")
    assert metas_tokenizer(section) == [tmp_path / "original" / "tokenizer.model"]


def test_ids_without_a_name_and_names_without_a_row(corpus, tmp_path):
    special = json.loads((corpus / "special_tokens.json").read_text())["added_tokens"]
    gone = next(t for t in special if t["content"] == "<|reserved_special_token_1|>")
    kept = [t for t in special if t is not gone and t["content"] != "<|video|>"] + [
        {"id": ROWS, "content": "<|video|>"}
    ]
    (tmp_path / "special_tokens.json").write_text(json.dumps({"added_tokens": kept}))
    (tmp_path / "tokenizer.model").write_bytes((corpus / "tokenizer.model").read_bytes())
    made = hugging_face_tokenizer(build(tmp_path), ROWS)
    assert made.id_to_token(gone["id"]) == f"<|unused_{gone['id']}|>" and made.token_to_id("<|video|>") is None
    assert all(made.token_to_id(t["content"]) == t["id"] for t in kept[:-1])


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(corpus, tmp_path) -> Run:
    """A run from a checkpoint with a licence, up to its report."""
    start = tmp_path / "start"
    start.mkdir()
    (start / "LICENSE.txt").write_text("the licence")
    (start / "notes.txt").write_text("not for others")
    settings = [
        "corpus=null",
        "base=null",
        f"checkpoint_dir={start}",
        f"tokenizer.path={corpus}/tokenizer.model",
        f"tokenizer.special_tokens_path={corpus}/special_tokens.json",
    ]
    changed = {s.partition("=")[0] for s in settings}
    kept = [s for s in SMALL if not s.startswith(("base.", "corpus.")) and s.partition("=")[0] not in changed]
    run = Run(load("tiny", [*kept, *settings, "model.vocab_size=768", f"output_dir={tmp_path}/run"]))

    def export(folder: Path) -> dict[str, Any]:
        (folder / "model.pte").write_bytes(b"\0program" * 999)
        return {"sha256": sha256(folder / "model.pte"), "metadata": {"get_bos_id": 512, "get_eos_ids": [513, 521, 520]}}

    run.stage("export", export)
    (run.folder / "README.md").write_text("# card\n\n`export/model.pte` has 1 MiB.\n")
    return run


def sha256(path: Path) -> str:
    return subprocess.check_output(["sha256sum", path], text=True).split()[0]


def test_the_bundle_has_all_that_an_app_needs(finished, capsys):
    folder = bundle(finished)
    names = {p.name for p in folder.iterdir()} - {"manifest.json"}
    forms = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens.json"}
    texts = {"README.md", "HOWTO.md", "LICENSE.txt", "SHA256SUMS", "generation_config.json"}
    assert names == {"model.pte"} | forms | texts
    assert (folder / "model.pte").samefile(finished.folder / "export" / "model.pte")  # it takes no space
    checked = subprocess.check_output(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, text=True)
    assert checked.count(": OK") == len(names) - 1
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["bos_token_id"] == 512 and settings["eos_token_id"] == [513, 521, 520]
    e = finished.config.export
    assert settings["max_length"] == e.max_context_length and settings["max_tokens_per_call"] == e.max_seq_length
    assert "`model.pte` has 1 MiB" in (folder / "README.md").read_text()
    howto = (folder / "HOWTO.md").read_text()
    assert "| react-native-executorch (`useLLM`) | `model.pte`, `tokenizer.json`, `tokenizer_config.json` |" in howto
    assert "513, 521, 520" in howto and "{" not in howto.replace("useLLM({\n  model: {\n", "")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == e.max_context_length


def test_the_bundle_follows_the_card_the_licence_and_the_export(finished, capsys):
    def again() -> str:
        bundle(finished)
        return capsys.readouterr().out

    again()
    assert "bundle: up to date" in again()
    (finished.folder / "README.md").write_text("# a card of my own\n")
    assert "bundle: inputs.README.md changed" in again()
    assert (finished.path("bundle") / "README.md").read_text() == "# a card of my own\n"
    Path(finished.config.checkpoint_dir, "USE_POLICY.md").write_text("the policy")
    assert "bundle: inputs.USE_POLICY.md changed" in again()
    kept = (finished.path("bundle") / "model.pte").read_bytes()

    def export(folder: Path) -> dict[str, Any]:
        (folder / "model.pte").write_bytes(b"another")
        return {"sha256": sha256(folder / "model.pte"), "metadata": {"get_bos_id": 1, "get_eos_ids": [2]}}

    finished.stage("export", export, {"again": True})
    assert "bundle: inputs.export changed" in again()
    assert (finished.path("bundle") / "model.pte").read_bytes() == b"another"
    (old,) = [p for p in (finished.folder / "superseded").glob("bundle-*") if (p / "USE_POLICY.md").is_file()]
    assert (old / "model.pte").read_bytes() == kept


@pytest.mark.slow
def test_executorchs_runner_writes_the_tokens_that_llamaq_generates(corpus, tokenizers, tmp_path):
    """Its C++ tokenizers read a chat prompt with special tokens, and 32 tokens are those of `Pte.generate`."""
    torch.manual_seed(0)
    tokenizer, folder = tokenizers
    saved_variant(tmp_path / "model", "qat_lora")
    file = tmp_path / "model.pte"
    lengths = ExportConfig(max_seq_length=32, max_context_length=128)
    export_pte(tmp_path / "model", file, lengths, {"get_bos_id": tokenizer.bos_id, "get_eos_ids": [ROWS - 1]})
    turns = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    prompt = "<|begin_of_text|>" + turns.format("How many days has June?")
    tokens = prompt_tokens(tokenizer, "How many days has June?", chat=True)
    answer = Pte(file).generate(tokens, 32, stop=[ROWS - 1])
    assert len(answer) == 32
    script = Path(__file__).with_name("run_with_runner.py")
    for path in (folder / "tokenizer.json", corpus / "tokenizer.model"):
        command = [sys.executable, script, file, path, prompt, "32", "--pieces"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        report = json.loads(done.stdout.split("PyTorchObserver ")[-1].splitlines()[0])
        assert report["prompt_tokens"] == len(tokens)
        pieces = json.loads(done.stdout.split("PIECES ")[-1].splitlines()[0])
        assert pieces == [tokenizer.tt_model.tt_model.decode([t]) for t in answer], path
