"""The same logits as transformers', from the same folder, in float32."""

import pytest
import torch
from folders import CONFIG, QWEN2, QWEN3, write_folder

from llamaq.checkpoints.load import load_checkpoint
from llamaq.families import describe
from llamaq.model.build import build_decoder, meta_decoder

transformers = pytest.importorskip("transformers")

NEW = {"rope_scaling": ..., "rope_theta": ..., "rope_parameters": CONFIG["rope_scaling"] | {"rope_theta": 5e5}}
SHORT = {"original_max_position_embeddings": 64}  # so that 64 tokens see all three bands of frequencies
FOLDERS = {
    "llama3 RoPE, tied": ({}, False),
    "llama3 RoPE as transformers 5 writes it": (NEW, False),
    "llama3 RoPE with other numbers": ({"rope_scaling": CONFIG["rope_scaling"] | SHORT | {"factor": 8.0}}, False),
    "default RoPE, untied": ({"rope_scaling": None, "tie_word_embeddings": False}, True),
    "linear RoPE": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, False),
    "wide heads": ({"head_dim": 32, "rms_norm_eps": 1e-6}, False),
    "Qwen2.5, tied": (QWEN2, False),
    "Qwen2.5, untied": (QWEN2 | {"tie_word_embeddings": False}, True),
    "Qwen3, tied": (QWEN3, False),
    "Qwen3, untied": (QWEN3 | {"tie_word_embeddings": False}, True),
}


@pytest.mark.parametrize("config, head", FOLDERS.values(), ids=FOLDERS.keys())
@torch.no_grad()
def test_logits_equal_those_of_transformers(config, head, tmp_path):
    write_folder(tmp_path, head, **config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = describe(tmp_path).model
    assert model is not None
    ours = build_decoder(model, load_checkpoint(tmp_path, meta_decoder(model))).eval()
    tokens = torch.randint(768, (2, 64))
    expected = theirs(tokens).logits
    assert float((ours(tokens) - expected).norm() / expected.norm()) <= 1e-5
