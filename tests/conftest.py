"""Tiny models and runs shared by the tests. Everything is real: torchtune, torchao, ExecuTorch, offline W&B."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from llamaq import torchao_compat  # noqa: F401
from llamaq.checkpoints.quantized import save_quantized
from llamaq.config import Config, load
from llamaq.model.build import build_decoder, build_model, meta_decoder
from llamaq.model.causal_lm import CausalLM
from llamaq.model.online import attach_online
from llamaq.model.shape import Shape
from llamaq.quant.prepare import freeze, prepare
from llamaq.quant.scheme import Scheme
from llamaq.spinquant.rotations import Rotations, rotate

MODEL = {
    "_component_": "torchtune.models.llama3_2.llama3_2",
    "vocab_size": 768,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 256,
    "max_seq_len": 256,
    "rope_base": 500000,
    "scale_factor": 32,
}
ADAPTERS = (16, 32.0)


def form(builder: str, **more) -> dict:
    """A tiny model of llamaq's own builders."""
    sizes = {k: v for k, v in MODEL.items() if k not in ("_component_", "scale_factor", "rope_base")}
    return sizes | {"_component_": f"llamaq.model.builders.{builder}", "vocab_size": 512, **more}


# The forms of the Llama family beside Llama 3.2's own, between them tied and untied, R4 of a whole width and in blocks
FORMS = {
    "untied": form(
        "llama",
        tie_word_embeddings=False,
        intermediate_dim=192,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "linear": form("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}, head_dim=32),
    "qwen2": form("qwen2", tie_word_embeddings=False),
    "qwen3": form("qwen3", head_dim=32, intermediate_dim=192),
}

# small enough for seconds a stage; the corpus and the tokenizer are the tiny config's own
SMALL = [
    "wandb.mode=disabled",
    "corpus.num_train=120",
    "corpus.num_pairs=40",
    "corpus.num_heldout=12",
    "corpus.num_people=60",
    "corpus.vocab_size=640",
    "model.vocab_size=640",
    "model.num_layers=1",
    "model.embed_dim=64",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.intermediate_dim=128",
    "tokenizer.max_seq_len=96",
    *[f"{s}.max_steps=6" for s in ("base", "qat", "qat_lora", "qat_dpo")],
    *[f"{s}.batch_size=4" for s in ("base", "qat", "qat_lora", "qat_dpo")],
    *[f"{s}.global_batch_size=8" for s in ("base", "qat", "qat_lora", "qat_dpo")],
    *[f"{s}.checkpoint_every_n_steps=2" for s in ("base", "qat", "qat_lora", "qat_dpo")],
    # a warm-up that fits into 6 steps, and the learning rates of the config: 5e-3 · step / 20 is 1.25e-3 · step / 5
    *[f"{s}.lr_scheduler.num_warmup_steps=5" for s in ("base", "qat", "qat_lora")],
    *[f"{s}.optimizer.lr={lr}" for s, lr in (("base", 1.25e-3), ("qat", 5e-4), ("qat_lora", 1e-3))],
    "qat.epochs=4",
    "qat_lora.epochs=4",
    "qat_dpo.epochs=4",
    "qat_dpo.optimizer.lr=1e-3",
    "export.gate_tokens=32",
]


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture
def small_config(tmp_path: Path) -> Config:
    return small(tmp_path / "run")


def small(folder: Path, *overrides: str) -> Config:
    return load("tiny", [*SMALL, f"output_dir={folder}", *overrides])


def random_weights(model: dict = MODEL) -> dict[str, torch.Tensor]:
    """Weights of a decoder with norms that are not all ones."""
    weights = {k: v.detach().clone() for k, v in build_decoder(model).state_dict().items()}
    return {k: torch.rand_like(v) + 0.5 if "norm" in k else v for k, v in weights.items()}


def trained_like(
    scheme: Scheme | None = None, frozen: bool = False, weights: dict | None = None, model: dict = MODEL
) -> CausalLM:
    """A model with adapters that do something; the same weights give the same model, latent or frozen."""
    if weights is None:
        weights = random_weights(model)
        weights = build_model(model, weights, scheme, ADAPTERS).weights()
        for key in weights:
            if key.endswith("adapter.b"):
                weights[key] = torch.randn_like(weights[key]) * 0.02
    return build_model(model, weights, scheme, ADAPTERS, frozen=frozen).eval()


def saved_rotated(folder: Path, which: set[str], hidden: int = 256, model: dict = MODEL) -> CausalLM:
    """A random model rotated at random, as a checkpoint in `folder`; returns what llamaq computes of it."""
    model = model | {"intermediate_dim": hidden} if model is MODEL else model
    weights, shape = random_weights(model), Shape.of(meta_decoder(model))
    r = Rotations.random(shape, which, 0)
    decoder = prepare(build_decoder(model, rotate(weights, shape, r)), Scheme()).eval()
    attach_online(decoder, r.r4)
    freeze(decoder)
    for linear in (layer.mlp.w2 for layer in decoder.layers):  # pyright: ignore[reportGeneralTypeIssues]
        assert bool(linear._forward_pre_hooks) == bool(r.r4)
    quantized: CausalLM = CausalLM(decoder).eval()  # pyright: ignore[reportArgumentType]
    save_quantized(folder, quantized.decoder, Scheme(), r.contract() if which else None)
    return quantized


def saved_variant(folder: Path, kind: str, model: dict = MODEL) -> CausalLM:
    """A random model of a kind that ships (qat, qat_lora or spinquant), likewise."""
    if kind == "spinquant":
        return saved_rotated(folder, {"r1", "r2", "r4"}, model=model)
    if kind == "qat":
        frozen = build_model(model, random_weights(model), Scheme(), frozen=True)
    else:
        frozen = trained_like(Scheme(), frozen=True, model=model)
    save_quantized(folder, frozen.decoder, Scheme())
    return frozen.eval()
