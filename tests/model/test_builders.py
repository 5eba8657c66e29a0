"""llamaq's own builders: the logits of transformers and torchtune, and the sizes of real models on the meta device."""

from typing import Any

import pytest
import torch
from conftest import FORMS, MODEL, form, random_weights
from torch import Tensor

from llamaq.checkpoints.hugging_face import meta_rows
from llamaq.checkpoints.meta import feed_forward_width, model_params
from llamaq.errors import UserError
from llamaq.model.build import build_decoder, build_model, meta_decoder
from llamaq.model.builders import in_halves
from llamaq.model.names import HUGGING_FACE
from llamaq.model.shape import Shape
from llamaq.quant.modules import UntiedHead
from llamaq.quant.prepare import prepare
from llamaq.quant.scheme import Scheme

TOKENS = torch.randint(0, 512, (2, 100), generator=torch.Generator().manual_seed(3))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
SHORT = LLAMA3 | {"original_max_position_embeddings": 32}  # so that all three ranges of wavelengths are there
LINEAR = {"rope_type": "linear", "factor": 4.0}
NAMES = {"embed_tokens": "tok_embeddings", "lm_head": "output", "post_attention_layernorm.weight": "mlp_norm.scale"}
NAMES |= {"input_layernorm.weight": "sa_norm.scale", **{hf: ours for ours, hf in HUGGING_FACE.items()}}
NAMES |= {"self_attn": "attn", "norm.weight": "norm.scale", "model.": ""}


def from_hugging_face(tensors: dict[str, Tensor], halves: bool) -> dict[str, Tensor]:
    weights = {}
    for key, t in tensors.items():
        for theirs, ours in NAMES.items():
            key = key.replace(theirs, ours)
        heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
        weights[key] = t if halves or heads is None else meta_rows(t, heads)
    return weights


@pytest.mark.parametrize(
    ("family", "head_dim", "scaling"),
    [
        ("llama", 16, None),
        ("llama", 32, SHORT),
        ("llama", 16, LINEAR),
        ("qwen2", 16, None),
        ("qwen3", 32, None),
    ],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_logits_are_those_of_transformers(family, head_dim, scaling, tied):
    transformers = pytest.importorskip("transformers")
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default", **(scaling or {})},
        **({} if family == "qwen2" else {"head_dim": head_dim}),
    )
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, p in theirs.named_parameters():
        p.uniform_(0.5, 1.5) if "norm" in key else p.normal_(std=0.15)
    model = form(
        family,
        head_dim=head_dim,
        intermediate_dim=192,
        norm_eps=1e-6,
        rope_base=1e4,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
    )
    tensors = {k: v for k, v in theirs.state_dict().items() if not (tied and "lm_head" in k)}
    ours = build_model(model, from_hugging_face(tensors, in_halves(meta_decoder(model))), None).eval()
    expected = theirs(TOKENS).logits
    assert (ours(TOKENS) - expected).norm() / expected.norm() < 2e-6


@torch.no_grad()
def test_llama_3_2_is_torchtunes():
    scaling = LLAMA3 | {"factor": 32}
    ours = form("llama", vocab_size=768, rope_scaling=scaling, rope_base=500000)
    weights = random_weights(MODEL)
    assert torch.equal(build_decoder(ours, weights)(TOKENS), build_decoder(MODEL, weights)(TOKENS))


@pytest.mark.parametrize(
    ("builder", "scaling", "words"),
    [
        ("llama", {"rope_type": "yarn", "factor": 4.0}, "rope_type=yarn is not supported; known are default, linear"),
        ("llama", {"rope_type": "llama3", "factor": 8.0}, "llama3 lacks low_freq_factor, high_freq_factor"),
        ("llama", {"rope_type": "linear", "factor": 2.0, "beta": 1}, "linear does not take beta"),
        ("qwen2", LLAMA3, "known for Llama only"),
    ],
)
def test_other_scalings_are_refused_by_name(builder, scaling, words):
    with pytest.raises(UserError, match=words):
        meta_decoder(form(builder, rope_scaling=scaling))


def test_under_autocast_half_split_rope_still_computes_in_float32():
    decoder: Any = build_decoder(FORMS["qwen2"])
    rope = decoder.layers[0].attn.pos_embeddings
    x = torch.randn(1, 64, 2, 16).bfloat16()
    assert torch.equal(rope(x), rope(x.float()).bfloat16())


def sized(builder: str, vocab: int, layers: int, heads: int, kv: int, dim: int, hidden: int, **more) -> dict:
    return form(
        builder,
        vocab_size=vocab,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        embed_dim=dim,
        intermediate_dim=hidden,
        **more,
    )


# sizes of the released models, and how many parameters they are published with, in millions
REAL = {
    "Llama-3.1-8B": (
        sized("llama", 128256, 32, 32, 8, 4096, 14336, rope_scaling=LLAMA3, tie_word_embeddings=False),
        8030.3,
    ),
    "SmolLM2-135M": (sized("llama", 49152, 30, 9, 3, 576, 1536), 134.5),
    "Qwen2.5-0.5B": (sized("qwen2", 151936, 24, 14, 2, 896, 4864), 494.0),
    "Qwen2.5-1.5B": (sized("qwen2", 151936, 28, 12, 2, 1536, 8960), 1543.7),
    "Qwen2.5-7B": (sized("qwen2", 152064, 28, 28, 4, 3584, 18944, tie_word_embeddings=False), 7615.6),
    "Qwen3-0.6B": (sized("qwen3", 151936, 28, 16, 8, 1024, 3072), 596.0),
    "Qwen3-1.7B": (sized("qwen3", 151936, 28, 16, 8, 2048, 6144), 1720.6),
}


@pytest.mark.parametrize("name", REAL)
def test_released_sizes_build_prepare_and_have_params(name):
    model, millions = REAL[name]
    decoder = meta_decoder(model)
    shape, params = Shape.of(decoder), model_params(decoder)
    assert shape.weights == sum(p.numel() for p in decoder.parameters())
    assert shape.weights / 1e6 == pytest.approx(millions, abs=0.06)
    assert feed_forward_width(params) == shape.hidden
    assert params.get("head_dim", shape.dim // shape.heads) == shape.head_dim
    assert params.get("use_hf_rope", False) == params.get("attention_qkv_bias", False) | params.get(
        "use_qk_norm", False
    )
    prepare(decoder, Scheme())
    assert isinstance(decoder.output, UntiedHead) != shape.tied and Shape.of(decoder) == shape
