"""A real chat model, from its Hugging Face folder alone: read as transformers reads it, through the chain, answered."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from smollm2 import make_smollm2

from llamaq.checkpoints.load import start_weights
from llamaq.config import load
from llamaq.data.tokenizer import tokenizer_of
from llamaq.families import complete
from llamaq.model.build import build_model

pytestmark = pytest.mark.real
QUESTION = "What is the capital of France?"
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima"}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The model's folder, made once and kept in LLAMAQ_REAL."""
    folder = Path(os.environ.get("LLAMAQ_REAL", f"{tempfile.gettempdir()}/llamaq-real"))
    folder.mkdir(parents=True, exist_ok=True)
    return make_smollm2(folder / "SmolLM2-135M-Instruct")


def chat(country: str, city: str) -> list[dict[str, str]]:
    ask = {"role": "user", "content": f"What is the capital of {country}?"}
    return [ask, {"role": "assistant", "content": f"The capital of {country} is {city}."}]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Chats and pairs about capitals."""
    folder = tmp_path_factory.mktemp("data")
    chats = [chat(country, city) for country, city in CAPITALS.items()]
    wrong = [chat(country, city) for country, city in zip(CAPITALS, [*CAPITALS.values()][::-1], strict=True)]
    rows = [{"messages": c} for c in chats] * 8
    pairs = [{"chosen": c, "rejected": w} for c, w in zip(chats, wrong, strict=True)] * 4
    for name, lines in (("train", rows), ("heldout", rows[:6]), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def tune(*arguments: object) -> str:
    command = [sys.executable, "-m", "llamaq", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_logits_and_ids_are_those_of_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(smollm2)
    c = complete(load("llama", [f"checkpoint_dir={smollm2}", "data_dir=none", f"output_dir={tmp_path}"]))
    ours, tokenizer = build_model(c.model, start_weights(c), None).eval(), tokenizer_of(c)
    conversation = [*chat("France", "Paris"), *chat("Peru", "Lima — ¡claro! 🇵🇪")]
    ids = words.apply_chat_template(conversation, tokenize=True, return_dict=False)
    tokens, learned = tokenizer.chat(conversation)
    assert tokens == ids
    said = words.decode([t for t, learn in zip(tokens, learned, strict=True) if learn])
    assert said == "".join(f"{conversation[i]['content']}<|im_end|>" for i in (1, 3))
    with torch.no_grad():
        expected, found = theirs(torch.tensor([ids])).logits, ours(torch.tensor([ids]))
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-5


def test_the_chain_runs_from_the_folder_and_its_file_answers(smollm2, data, tmp_path):
    settings = [f"checkpoint_dir={smollm2}", f"data_dir={data}", f"output_dir={tmp_path / 'run'}"]
    steps = [
        f"{stage}.{key}"
        for stage in ("qat", "qat_lora", "qat_dpo")
        for key in ("max_steps=2", "global_batch_size=4", "batch_size=4", "lr_scheduler.num_warmup_steps=1")
    ]
    lengths = ["tokenizer.max_seq_len=128", "export.max_seq_length=64", "export.max_context_length=256"]
    few = [
        "evaluate.models=[final,final.pte]",
        "evaluate.control=false",
        "evaluate.file_tokens=32",
        "evaluate.max_samples=6",
    ]
    fast = ["evaluate.speed=false", "wandb.mode=disabled", "export.gate_tokens=32", *few]
    rows = [f"{stage}.dataset.packed=false" for stage in ("qat", "qat_lora")]
    prompt = [f"export.prompt={QUESTION}", "export.max_new_tokens=24"]
    configured = ["--config", "smollm2/135M_qat_lora_dpo", *settings, *steps, *lengths, *fast, *rows, *prompt]
    tune("run", "qat_lora_dpo", *configured)
    answered = json.loads((tmp_path / "run/answer/manifest.json").read_text())["metrics"]
    assert "Paris" in json.dumps(answered)
    assert "Paris" in tune("run", "chat", *configured, f"chat.once={QUESTION}")


def test_inspect_says_what_the_folder_is(smollm2):
    said = tune("inspect", smollm2)
    assert re.search(r"134\.5 M parameters", said) and "<|im_end|>" in said and "qat_dpo: about" in said
