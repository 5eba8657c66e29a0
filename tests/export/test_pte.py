"""Exported files, run: every variant and option against what was trained, and ExecuTorch's own runner on them."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ADAPTERS, MODEL, saved_variant, trained_like

from llamaq.checkpoints.peft import save_peft, with_adapters
from llamaq.checkpoints.peft_config import BACKBONE
from llamaq.checkpoints.quantized import backbone_hash
from llamaq.config import ExportConfig
from llamaq.data.corpus import tiny_chat
from llamaq.errors import UserError
from llamaq.export import exporter
from llamaq.export.exporter import eager_cached_logits, export_pte
from llamaq.export.gates import windows_of
from llamaq.export.pte import Pte, check_constants, size_parts
from llamaq.model.compare import agreement
from llamaq.quant.scheme import Scheme

pytestmark = pytest.mark.slow
TOKENS = torch.randint(0, MODEL["vocab_size"], (48,), generator=torch.Generator().manual_seed(5)).tolist()
CALL, CONTEXT = 16, 64
LENGTHS = ExportConfig(max_seq_length=CALL, max_context_length=CONTEXT)
METADATA = {"get_bos_id": 1, "get_eos_ids": [2]}


def export(folder: Path, options: ExportConfig) -> Path:
    export_pte(folder / "model", folder / "model.pte", options, METADATA)
    return folder / "model.pte"


@pytest.fixture(scope="module")
def qat_lora(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qat_lora")
    model = saved_variant(folder / "model", "qat_lora")
    return folder, model, export(folder, LENGTHS)


def logits_of(model, contexts: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([t]))[0] for t in contexts]


def held(pte: Pte, expected: list[torch.Tensor], contexts: list[list[int]]) -> dict[str, float]:
    return agreement(torch.cat(expected), torch.cat([pte.logits(t) for t in contexts]))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qat", LENGTHS),
        ("spinquant", LENGTHS),
        ("qat_lora", replace(LENGTHS, dynamic_shape=False)),
        ("qat_lora", replace(LENGTHS, full_logits=True)),
        ("qat", replace(LENGTHS, quantize_kv_cache=True)),
    ],
    ids=["qat", "spinquant", "static", "full_logits", "int8_cache"],
)
def test_variants_and_options_compute_what_was_trained(tmp_path, kind, options, capfd):
    model = saved_variant(tmp_path / "model", kind)
    pte = Pte(export(tmp_path, options))
    assert check_constants(tmp_path / "model", pte.path) == len(
        torch.load(tmp_path / "model" / "consolidated.00.pth", weights_only=True)
    )
    contexts = windows_of(TOKENS, 1 if kind == "spinquant" else 8)
    expected = logits_of(model, contexts)
    if options.quantize_kv_cache:
        with_float_cache, expected = expected, eager_cached_logits(tmp_path / "model", contexts, options)
        cost = agreement(torch.cat(with_float_cache), torch.cat(expected))
        assert 1e-4 < cost["relative_error"] < 0.1  # the cache is quantized, and only it
        assert "No temp allocator" not in capfd.readouterr().err
    result = held(pte, expected, contexts)
    assert result["token_error"] <= 1e-4 and result["top1"] == 1
    assert pte.metadata("get_bos_id") == 1 and pte.metadata("get_eos_ids") == [2]
    assert pte.max_tokens_per_call == (1 if not options.dynamic_shape else CALL)
    assert pte.full_logits == options.full_logits
    if options.full_logits:
        pte.reset()
        assert agreement(pte.logits(TOKENS[:8]), pte.rows(TOKENS[:8], 0))["token_error"] <= 1e-4


def test_adapters_and_one_long_context(qat_lora):
    folder, model, file = qat_lora
    pte = Pte(file)
    contexts = windows_of(TOKENS, 8)
    result = held(pte, logits_of(model, contexts), contexts)
    assert result["token_error"] <= 1e-4 and result["top1"] == 1
    assert held(pte, logits_of(model, [TOKENS]), [TOKENS])["kl"] <= 1e-3
    parts = size_parts(folder / "model", file)
    linears = MODEL["num_layers"] * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256)
    assert parts["int4 codes"] == linears // 2 and parts["group scales"] == linears // 32 * 2
    assert sum(parts.values()) == file.stat().st_size and parts["program"] > 0


def test_what_makes_the_export_quick_leaves_the_file_as_it_is(qat_lora, tmp_path, monkeypatch):
    folder, _, file = qat_lora
    monkeypatch.setattr(exporter, "quick_tracing", contextlib.nullcontext)
    export_pte(folder / "model", tmp_path / "model.pte", LENGTHS, METADATA)
    assert (tmp_path / "model.pte").read_bytes() == file.read_bytes()


def test_the_runner_answers_prompts_longer_than_a_call(qat_lora, tmp_path):
    """ExecuTorch's runner cuts a prompt into calls of `get_max_seq_len` tokens, which must be what a call takes."""
    tiny_chat(tmp_path, num_train=80, num_pairs=10, num_heldout=10, num_people=40, vocab_size=MODEL["vocab_size"])
    from llamaq.data.tokenizer import build_tokenizer

    component = {
        "_component_": "torchtune.models.llama3.llama3_tokenizer",
        "path": str(tmp_path / "tokenizer.model"),
        "special_tokens_path": str(tmp_path / "special_tokens.json"),
    }
    tokenizer = build_tokenizer(component, MODEL["vocab_size"])
    prompt = "How many days has June? June has 30 days. Anna lives in Rome."
    tokens = tokenizer.encode(prompt, add_bos=True, add_eos=False)
    assert CALL < len(tokens) < CONTEXT - 8
    script = Path(__file__).with_name("run_with_runner.py")
    done = subprocess.run(
        [sys.executable, script, qat_lora[2], tmp_path / "tokenizer.model", prompt, "8"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.split("PyTorchObserver ")[-1].splitlines()[0])
    assert report["prompt_tokens"] == len(tokens)
    answer = Pte(qat_lora[2]).generate(tokens, report["generated_tokens"], stop=[])
    assert tokenizer.decode(answer[:1]) in done.stdout


def test_several_adapters_share_one_backbone(qat_lora, tmp_path):
    """Two sets of adapters as methods of one file: each computes its own, and the backbone is stored once."""
    folder, first, single = qat_lora
    weights = {k: v for k, v in first.decoder.state_dict().items() if ".adapter." in k}
    other = trained_like(Scheme(), frozen=True)
    state = other.decoder.state_dict()
    state |= first.decoder.state_dict()
    state |= {k: torch.randn_like(v) * 0.05 for k, v in weights.items()}
    other.decoder.load_state_dict(state)
    save_peft(tmp_path / "adapter", other.decoder, *ADAPTERS)
    (tmp_path / "adapter" / BACKBONE).write_text(json.dumps({"sha256": backbone_hash(folder / "model")}))
    checkpoint = with_adapters(folder / "model", tmp_path / "adapter", tmp_path / "other")
    file = tmp_path / "both.pte"
    export_pte(folder / "model", file, LENGTHS, METADATA, adapters={"other": checkpoint})
    contexts = windows_of(TOKENS, 8)
    for model, method in ((first, "forward"), (other, "other")):
        result = held(Pte(file, method), logits_of(model, contexts), contexts)
        assert result["token_error"] <= 1e-4 and result["top1"] == 1, method
    apart = agreement(*(torch.cat(logits_of(m, contexts)) for m in (first, other)))
    assert apart["relative_error"] > 0.05  # the two do differ
    backbone = sum(v for k, v in size_parts(folder / "model", single).items() if k not in ("adapters", "program"))
    grown = file.stat().st_size - single.stat().st_size
    adapters = sum(v.numel() * 4 for v in weights.values())
    assert grown < adapters + 0.5 * backbone
    with pytest.raises(UserError, match="has no method 'third'; it has forward, other"):
        Pte(file, "third")
    (tmp_path / "adapter" / BACKBONE).write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(UserError, match="another quantized backbone"):
        with_adapters(folder / "model", tmp_path / "adapter", tmp_path / "refused")
