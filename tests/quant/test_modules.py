"""Test that latent and frozen modules compute the same bits, that a tied head stays tied, and where adapters are."""

from typing import Any

import pytest
import torch
from conftest import ADAPTERS, MODEL, random_weights, trained_like
from torch import nn

from llamaq.errors import UserError
from llamaq.model.build import build_decoder, build_model
from llamaq.quant.modules import Adapter, FrozenLinear, LatentLinear, TiedHead, codes_and_scales
from llamaq.quant.prepare import LLAMA_LINEARS, add_adapters, freeze, merge_adapters, prepare, quantized_linears
from llamaq.quant.scheme import Scheme, WeightFormat, fake_quantize

TOKENS = torch.randint(0, 768, (2, 24), generator=torch.Generator().manual_seed(1))


def test_frozen_equals_latent_bit_for_bit():
    latent = trained_like(Scheme())
    frozen = trained_like(Scheme(), frozen=True, weights=dict(latent.decoder.state_dict()))
    assert torch.equal(latent(TOKENS), frozen(TOKENS))
    assert all(isinstance(m, FrozenLinear) for m in quantized_linears(frozen).values())


def test_a_frozen_backbone_holds_integers_and_trains_adapters_only():
    model = trained_like(Scheme(), frozen=True)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * MODEL["num_layers"] and all(".adapter." in n for n in trainable)
    floats = [n for n, t in model.state_dict().items() if t.is_floating_point() and t.numel() > 64 * 64]
    assert not [n for n in floats if not n.endswith((".scales", ".adapter.a", ".adapter.b"))]


def test_all_seven_linears_of_every_block_and_nothing_else():
    model = build_model(MODEL, random_weights(), Scheme())
    names = {n.removeprefix("decoder.") for n in quantized_linears(model)}
    kinds = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3")
    assert names == {f"layers.{i}.{k}" for i in range(MODEL["num_layers"]) for k in kinds}


def test_head_and_embedding_are_one_matrix():
    model = build_model(MODEL, random_weights(), Scheme())
    embedding: Any = model.decoder.tok_embeddings
    assert [n for n, _ in model.named_parameters() if "tok_embeddings" in n or "output.w" in n or "head" in n] == [
        "decoder.tok_embeddings.weight"
    ]
    assert torch.equal(model.head.quantized_weight(), embedding.quantized_weight())
    rows = embedding(torch.tensor([[3, 3, 700]]))[0]
    assert torch.equal(rows, fake_quantize(embedding.weight, Scheme().rows)[[3, 3, 700]])
    model(TOKENS).sum().backward()
    assert embedding.weight.grad is not None and embedding.weight.grad.abs().sum() > 0


def test_a_fresh_adapter_changes_nothing_and_is_the_same_for_the_same_seed():
    weights = random_weights()
    plain = build_model(MODEL, weights, Scheme())
    fresh, again = (build_model(MODEL, weights, Scheme(), ADAPTERS, seed=7) for _ in range(2))
    other = build_model(MODEL, weights, Scheme(), ADAPTERS, seed=8)
    assert torch.equal(plain(TOKENS), fresh(TOKENS))
    key = "layers.1.mlp.w2.adapter.a"
    assert torch.equal(fresh.decoder.state_dict()[key], again.decoder.state_dict()[key])
    assert not torch.equal(fresh.decoder.state_dict()[key], other.decoder.state_dict()[key])


def test_adapter_reads_the_unquantized_input():
    linear = LatentLinear(nn.Parameter(torch.randn(8, 32)), Scheme().linear)
    x = torch.randn(3, 32)
    base = linear(x)
    linear.adapter = Adapter(32, 8, rank=4, alpha=8.0)
    linear.adapter.reset_parameters()
    nn.init.normal_(linear.adapter.b)
    a, b = linear.adapter.a.bfloat16().float(), linear.adapter.b.bfloat16().float()
    assert torch.allclose(linear(x), base + 2.0 * (x @ a.T @ b.T), atol=1e-5)


def test_worked_example_of_the_docstring():
    """Compute the linear with an adapter that `llamaq.quant.modules` works out."""
    linear = LatentLinear(torch.tensor([[0.75, -0.60, 0.32, -0.04]]), WeightFormat(4, 4, bf16_scales=True))
    x = torch.tensor([[-0.5, 0.123, 1.0, 2.05]])
    assert linear(x).item() == pytest.approx(-0.1221, abs=5e-5)
    linear.adapter = Adapter(4, 1, rank=1, alpha=2.0)
    with torch.no_grad():
        linear.adapter.a.copy_(torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
        linear.adapter.b.fill_(1.0)
    assert linear(x).item() == pytest.approx(0.1239, abs=5e-5)


def test_full_precision_is_the_float_model():
    weights = random_weights()
    decoder, model = build_decoder(MODEL, weights), build_model(MODEL, weights, None)
    assert torch.equal(decoder(TOKENS), model(TOKENS))


def test_merging_full_precision_adapters_keeps_the_function():
    model = trained_like(None)
    before = model(TOKENS)
    merge_adapters(model)
    assert torch.allclose(model(TOKENS), before, atol=1e-4)
    with pytest.raises(AssertionError, match="full-precision"):
        merge_adapters(trained_like(Scheme()))


def test_a_group_that_does_not_divide_names_the_layer_and_the_setting():
    with pytest.raises(UserError, match=r"layers\.0\.attn\.q_proj has 64 inputs.*scheme\.group_size=128"):
        prepare(build_decoder(MODEL), Scheme(group_size=128))


def test_a_group_of_a_whole_row_is_refused():
    """ExecuTorch's loader squeezes scales [n, 1] to [n], and then does not find them."""
    with pytest.raises(UserError, match=r"layers\.0\.attn\.q_proj has 64 inputs, one group of scheme\.group_size=64"):
        prepare(build_decoder(MODEL), Scheme(group_size=64))


def test_a_bias_is_added_in_both_states_and_not_quantized():
    bias, x = nn.Parameter(torch.randn(8)), torch.randn(3, 64)
    latent = LatentLinear(nn.Parameter(torch.randn(8, 64)), Scheme().linear, bias)
    frozen = FrozenLinear(*codes_and_scales(latent), Scheme().linear, bias)
    without = LatentLinear(latent.weight, latent.fmt)
    assert torch.equal(latent(x), frozen(x)) and torch.allclose(latent(x), without(x) + bias, atol=1e-6)
    latent(x).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((8,), 3.0))


def test_models_without_linears_are_refused():
    with pytest.raises(UserError, match="nothing to quantize"):
        prepare(nn.Sequential(nn.Linear(32, 32)), Scheme())
    assert LLAMA_LINEARS.fullmatch("layers.10.mlp.w3") and not LLAMA_LINEARS.fullmatch("layers.1.mlp.w3.adapter")


@pytest.mark.parametrize("size", ["1b", "3b"])
def test_real_shapes_prepare_and_freeze(size: str):
    """Check names, shapes and dtypes at the released sizes, on the meta device, which needs no memory."""
    from llamaq.checkpoints.meta import model_params
    from llamaq.checkpoints.quantized import quantized_state_dict

    with torch.device("meta"):
        import torchtune.models.llama3_2 as models

        decoder = getattr(models, f"llama3_2_{size}")()
    prepare(decoder, Scheme())
    assert isinstance(decoder.output, TiedHead)
    with torch.device("meta"):
        add_adapters(decoder, 16, 32.0)
        freeze(decoder)
    tensors = quantized_state_dict(decoder)
    layers, dim, kv = {"1b": (16, 2048, 512), "3b": (28, 3072, 1024)}[size]
    assert len(tensors) == layers * (7 * 4 + 2) + 1 + 4
    expected = {
        "layers.0.attention.wk.weight": ((kv, dim), torch.int8),
        "layers.0.attention.wk.scales": ((kv, dim // 32), torch.float32),
        "layers.0.attention.wk.adaptor.A.weight": ((16, dim), torch.bfloat16),
        "layers.0.feed_forward.w2.weight": ((dim, 8192), torch.int8),
        "layers.0.feed_forward.w2.adaptor.B.weight": ((dim, 16), torch.bfloat16),
        f"layers.{layers - 1}.ffn_norm.weight": ((dim,), torch.bfloat16),
        "tok_embeddings.weight": ((128256, dim), torch.int8),
        "output.scales": ((128256, 1), torch.float32),
    }
    assert {k: (tuple(tensors[k].shape), tensors[k].dtype) for k in expected} == expected
    params = model_params(decoder)
    assert params["ffn_dim_multiplier"] == {"1b": 1.5, "3b": 1.0}[size]
    assert params["use_scaled_rope"] is True and params["vocab_size"] == 128256
