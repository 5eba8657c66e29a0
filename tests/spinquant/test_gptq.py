"""GPTQ: never worse than rounding to nearest, equal to it where inputs are white, codes that torchao reads alike."""

import pytest
import torch
from conftest import MODEL, random_weights
from torchao.quantization.quant_primitives import dequantize_affine

from llamaq.model.build import build_decoder, build_model, meta_decoder
from llamaq.model.causal_lm import CausalLM
from llamaq.model.online import attach_online
from llamaq.model.shape import Shape
from llamaq.quant.modules import FrozenLinear
from llamaq.quant.prepare import freeze, prepare, quantized_linears
from llamaq.quant.scheme import Scheme, choose_scales
from llamaq.spinquant.gptq import (
    Rounding,
    gptq,
    matching_weight,
    proxy_loss,
    round_layers,
    round_to_nearest,
    search_scales,
)
from llamaq.spinquant.polish import polish
from llamaq.spinquant.rotations import Rotations, rotate

FMT = Scheme().linear


def correlated(n: int = 128, tokens: int = 400) -> torch.Tensor:
    x = torch.randn(tokens, n) @ (torch.randn(n, n) / n**0.5 + 0.3 * torch.eye(n))
    return x.T @ x / tokens


@pytest.mark.parametrize("how", [Rounding(), Rounding.published(), Rounding(clip_search=False)])
def test_gptq_is_not_worse_than_rounding_to_nearest(how):
    for seed in range(5):
        torch.manual_seed(seed)
        w, h = torch.randn(48, 128) * 0.05, correlated()
        nearest = proxy_loss(w, *round_to_nearest(w, h, FMT, how.clip_search), h, FMT)
        assert proxy_loss(w, *gptq(w, h, FMT, how), h, FMT) < 0.9 * nearest


def test_gptq_is_rounding_to_nearest_for_white_inputs():
    w, h = torch.randn(16, 128), torch.eye(128)
    for ours, theirs in zip(gptq(w, h, FMT, Rounding()), round_to_nearest(w, h, FMT, True), strict=True):
        assert torch.equal(ours, theirs)


def test_codes_and_scales_are_what_torchao_and_xnnpack_read():
    w, h = torch.randn(16, 128), correlated()
    codes, scales = gptq(w, h, FMT, Rounding())
    assert codes.dtype == torch.int8 and codes.min() >= -8 and codes.max() <= 7
    assert torch.equal(scales.bfloat16().float(), scales) and scales.shape == (16, 4)
    theirs = dequantize_affine(codes, (1, 32), scales, torch.zeros_like(scales), torch.int8, -8, 7)  # pyright: ignore
    assert torch.equal(FrozenLinear(codes, scales, FMT).quantized_weight(), theirs)


def test_a_dead_input_and_a_singular_hessian_are_no_trouble():
    w, x = torch.randn(8, 64), torch.randn(10, 64)  # rank 10
    x[:, 3] = 0
    codes, scales = gptq(w, x.T @ x / 10, FMT, Rounding())
    assert torch.isfinite(scales).all() and (scales > 0).all() and codes.dtype == torch.int8


def test_the_clip_search_weighs_by_importance():
    w = torch.full((1, 32), 0.1)
    w[0, 0] = 1.0
    least = torch.ones(32)
    least[0] = 0.0  # nobody reads the outlier
    assert search_scales(w, least, FMT) < 0.8 * choose_scales(w, FMT)
    most = torch.zeros(32)
    most[0] = 1.0
    found = search_scales(w, most, FMT)
    assert float((w[0, 0] / found).round().clamp(-8, 7) * found) == pytest.approx(1.0, abs=0.02)


def test_the_matching_weight_is_least_squares():
    w, x = torch.randn(8, 32), torch.randn(500, 32)
    seen = x + 0.3 * torch.randn(500, 32)
    h, cross = seen.T @ seen / 500, x.T @ seen / 500
    found = matching_weight(w, h, cross, 1e-9)
    torch.testing.assert_close(found.T, torch.linalg.lstsq(seen, x @ w.T).solution, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(matching_weight(w, h, h, 0.01), w)


@torch.no_grad()
def rounded(which: set[str], how: Rounding, group_size: int = 32) -> tuple[CausalLM, CausalLM, list, torch.Tensor]:
    weights, shape, scheme = random_weights(), Shape.of(meta_decoder(MODEL)), Scheme(group_size)
    r = Rotations.random(shape, which, 0)
    new = rotate(weights, shape, r)
    student, exact = prepare(build_decoder(MODEL, new), scheme), build_decoder(MODEL, new)
    for decoder in (student, exact):
        attach_online(decoder.eval().requires_grad_(False), r.r4)
    text = torch.randint(768, (8, 32), generator=torch.Generator().manual_seed(0))
    reports = round_layers(student, list(text.split(4)), scheme.linear, how, exact)
    model: CausalLM = CausalLM(freeze(student))  # pyright: ignore[reportArgumentType]
    return model, build_model(MODEL, weights, None).eval(), reports, text


@pytest.mark.parametrize("which", [set(), {"r4"}, {"r1", "r2", "r4"}], ids=["none", "r4", "all"])
@torch.no_grad()
def test_every_linear_is_rounded_not_worse_than_to_nearest(which):
    model, bf16, reports, text = rounded(which, Rounding(correct_mismatch=False))
    assert len(reports) == len(quantized_linears(model)) == 14
    assert all(r.rounded <= r.nearest for r in reports)
    assert all(isinstance(m, FrozenLinear) for m in quantized_linears(model).values())
    error = (model(text) - bf16(text)).norm() / bf16(text).norm()
    assert error < 0.2  # R4 in front of every down_proj survived the freezing


def test_polish_lowers_the_kl_and_keeps_codes_and_bf16_scales():
    model, bf16, _, text = rounded({"r1", "r2", "r4"}, Rounding(method="rtn"))
    before = {n: m.codes.clone() for n, m in quantized_linears(model).items() if isinstance(m, FrozenLinear)}

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        scored = model(tokens, labels=torch.zeros_like(tokens), teacher=bf16)
        return scored[1].mean()

    losses = polish(model.decoder, loss, [text], 30, 2e-3)
    after = quantized_linears(model)
    assert float(loss(text)) < 0.95 * losses[0]
    for name, codes in before.items():
        linear = after[name]
        assert isinstance(linear, FrozenLinear) and torch.equal(linear.codes, codes)
        assert torch.equal(linear.scales.bfloat16().float(), linear.scales)
