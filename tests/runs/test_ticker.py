"""Long work says what it does: lines while a library works, bars while we hash, read and hold against gates."""

import hashlib
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MODEL, saved_variant, trained_like
from safetensors.torch import save_file

from llamaq.checkpoints import tensors
from llamaq.config import ExportConfig
from llamaq.export.exporter import eager_cached_logits, export_pte
from llamaq.export.gates import eager_logits, windows_of
from llamaq.quant.scheme import Scheme
from llamaq.quiet import quiet
from llamaq.runs import files, ticker


def test_a_library_that_is_held_back_still_shows_that_it_works(monkeypatch, capfd):
    monkeypatch.setattr(ticker, "TICK_SECONDS", 0.2)
    with quiet(), ticker.ticker("exporting x.pte", lambda: "tracing"):
        print("a library's noise")
        time.sleep(0.7)
        seen = capfd.readouterr().err  # while it works, not after it
    lines = seen.splitlines()
    assert 2 <= len(lines) <= 3 and all(re.fullmatch(r"exporting x\.pte, \d s: tracing …", line) for line in lines)
    print("shown", file=sys.stderr)
    assert capfd.readouterr().err == "shown\n"  # the stream is back in its place


def test_short_work_says_nothing(capfd):
    with ticker.ticker("exporting x.pte"):
        time.sleep(0.1)
    assert capfd.readouterr() == ("", "")


def test_what_work_raises_comes_through(monkeypatch):
    monkeypatch.setattr(ticker, "TICK_SECONDS", 0.01)
    with pytest.raises(ZeroDivisionError), ticker.ticker("dividing"):
        time.sleep(0.05)
        _ = 1 / 0


def test_hashing_a_large_file_shows_a_bar_in_mib(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(files, "LARGE", 32 * 2**20)
    (tmp_path / "qat").mkdir()
    for name, size in (("large", 40 * 2**20 + 7), ("small", 2**20)):
        (tmp_path / "qat" / name).write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
        data = (tmp_path / "qat" / name).read_bytes()
        assert files.sha256_file(tmp_path / "qat" / name) == hashlib.sha256(data).hexdigest()
    shown = capfd.readouterr().err
    assert re.search(r"hashing qat/large: 100%.* 48/48 .*MiB/s", shown) and "small" not in shown


def test_reading_a_large_checkpoint_shows_a_bar(tmp_path, monkeypatch, capfd):
    saved = {f"layers.{i}": torch.randn(8, 8) for i in range(5)}
    save_file(saved, tmp_path / "model.safetensors")
    plain = tensors.load_safetensors(tmp_path / "model.safetensors")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(tensors, "LARGE", 100)
    shown = tensors.load_safetensors(tmp_path / "model.safetensors")
    assert "reading model.safetensors: 100%" in capfd.readouterr().err
    assert all(torch.equal(plain[k], saved[k]) and torch.equal(shown[k], saved[k]) for k in saved)


@torch.no_grad()
def test_gates_show_a_bar(capfd):
    tokens = torch.randint(0, MODEL["vocab_size"], (24,)).tolist()
    eager_logits(trained_like(Scheme()), [*windows_of(tokens, 8), tokens])
    assert "gate: the trained model: 100%" in capfd.readouterr().err


@pytest.mark.slow
def test_executorchs_export_says_which_phase_it_is_in(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setattr(ticker, "TICK_SECONDS", 0.3)
    saved_variant(tmp_path / "model", "qat")
    options = ExportConfig(max_seq_length=16, max_context_length=64)
    export_pte(tmp_path / "model", tmp_path / "model.pte", options)
    shown = capfd.readouterr().err
    for phase in ("tracing the model", "lowering it to XNNPACK"):
        assert re.search(rf"exporting model\.pte, \d+ s: {phase} …", shown), shown
    contexts = [[1, 2, 3], [4, 5]]
    assert [list(x.shape) for x in eager_cached_logits(tmp_path / "model", contexts, options)] == [[3, 768], [2, 768]]
    assert "gate: ExecuTorch's eager model: 100%" in capfd.readouterr().err
