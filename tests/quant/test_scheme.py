"""Test the numerics against small literal numbers and against torchao's own fake quantizers."""

import pytest
import torch
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer
from torchao.quantization.utils import per_token_dynamic_quant

from llamaq.quant.scheme import (
    SMALLEST_SCALE,
    Scheme,
    WeightFormat,
    choose_scales,
    dequantize,
    fake_quantize,
    fake_quantize_activation,
    quantize,
    round_to_bf16,
)

INT4 = Scheme().linear
INT8 = Scheme().rows


def test_literal_int4_group():
    w = torch.zeros(1, 32)
    w[0, :5] = torch.tensor([7.5, -7.5, 1.0, 0.5, -3.4])
    scales = choose_scales(w, INT4)
    assert scales.tolist() == [[1.0]]  # absmax / 7.5
    # 7.5 rounds to 8 and is clamped to 7; -7.5 rounds to even, -8; 0.5 rounds to even, 0
    assert quantize(w, scales, INT4)[0, :5].tolist() == [7, -8, 1, 0, -3]
    assert fake_quantize(w, INT4)[0, :5].tolist() == [7.0, -8.0, 1.0, 0.0, -3.0]


def test_worked_example_of_the_docstring():
    """Compute the group of 4 weights and the token of 4 values that `llamaq.quant.scheme` works out."""
    fmt = WeightFormat(bits=4, group_size=4, bf16_scales=True)
    w = torch.tensor([[0.75, -0.60, 0.32, -0.04]])
    scales = choose_scales(w, fmt)
    assert scales.tolist() == [[0.10009765625]]
    codes = quantize(w, scales, fmt)
    assert codes.tolist() == [[7, -6, 3, 0]]
    assert dequantize(codes, scales, fmt)[0].tolist() == pytest.approx([0.7007, -0.6006, 0.3003, 0.0], abs=5e-5)
    x = torch.tensor([[-0.5, 0.123, 1.0, 2.05]])
    assert fake_quantize_activation(x)[0].tolist() == pytest.approx([-0.5, 0.12, 1.0, 2.05])


def test_literal_int8_row():
    w = torch.tensor([[127.5, -127.5, 64.2, 0.0]])
    scales = choose_scales(w, INT8)
    assert scales.tolist() == [[1.0]]  # absmax / 127.5
    assert quantize(w, scales, INT8).tolist() == [[127, -128, 64, 0]]


def test_int4_scales_are_bf16_values_and_int8_ones_are_not_rounded():
    w = torch.randn(64, 256)
    int4, int8 = choose_scales(w, INT4), choose_scales(w, INT8)
    assert int4.dtype == int8.dtype == torch.float32
    assert int4.shape == (64, 8) and int8.shape == (64, 1)
    assert torch.equal(int4, int4.bfloat16().float())
    assert torch.equal(int8, (w.abs().amax(1, keepdim=True) / 127.5))


def test_scales_do_not_depend_on_the_training_dtype():
    w = torch.randn(16, 64).bfloat16()
    assert torch.equal(choose_scales(w, INT4), choose_scales(w.float(), INT4))
    assert torch.equal(choose_scales(w, INT8), choose_scales(w.float(), INT8))


@pytest.mark.parametrize("fmt", [INT4, INT8, Scheme(group_size=64).linear])
def test_error_is_at_most_half_a_step_except_where_clamped(fmt: WeightFormat):
    w = torch.randn(32, 256)
    scales = choose_scales(w, fmt)
    codes = quantize(w, scales, fmt)
    assert codes.dtype == torch.int8 and codes.min() >= fmt.qmin and codes.max() <= fmt.qmax
    steps = scales.repeat_interleave(w.shape[1] // scales.shape[1], dim=1)
    error = (dequantize(codes, scales, fmt) - w).abs()
    assert (error <= 0.5001 * steps)[codes < fmt.qmax].all()
    assert (error <= 0.54 * steps).all()  # a clamped weight is at most 7.5 · (1 + 2^-8) steps


def test_a_group_of_zeros_has_a_scale_xnnpack_takes():
    w = torch.zeros(2, 64)
    scales = choose_scales(w, INT4)
    assert (scales >= SMALLEST_SCALE).all()
    assert fake_quantize(w, INT4).abs().max() == 0


def test_equal_to_torchaos_fake_quantizer_where_scales_are_not_rounded():
    w = torch.randn(48, 128)
    config = IntxFakeQuantizeConfig(
        torch.int8, granularity="per_channel", is_symmetric=True, scale_precision=torch.float32
    )
    assert torch.equal(fake_quantize(w, INT8), IntxFakeQuantizer(config)(w))
    unrounded = WeightFormat(bits=4, group_size=32, bf16_scales=False)
    config = IntxFakeQuantizeConfig(
        vars(torch)["int4"], group_size=32, is_symmetric=True, scale_precision=torch.float32
    )
    assert torch.equal(fake_quantize(w, unrounded), IntxFakeQuantizer(config)(w))


def test_fake_quantization_is_not_idempotent():
    """Show why a dequantized weight is never a checkpoint."""
    w = torch.randn(64, 128)
    once = fake_quantize(w, INT4)
    assert not torch.equal(fake_quantize(once, INT4), once)


def test_gradient_passes_straight_through():
    w = torch.randn(4, 64, requires_grad=True)
    g = torch.randn(4, 64)
    fake_quantize(w, INT4).backward(g)
    assert torch.equal(torch.as_tensor(w.grad), g)
    x = torch.randn(3, 64, requires_grad=True)
    fake_quantize_activation(x).backward(g[:3])
    assert torch.equal(torch.as_tensor(x.grad), g[:3])


def test_activations_are_what_executorchs_loader_computes():
    x = torch.randn(2, 5, 96) * torch.logspace(-3, 3, 5)[None, :, None]
    eps = torch.finfo(torch.float32).eps
    assert torch.equal(fake_quantize_activation(x), per_token_dynamic_quant(x, torch.float32, torch.float32, eps))


def test_activations_are_per_token_and_their_range_includes_zero():
    x = torch.tensor([[5.0, 6.0, 7.0, 255.0], [0.0, 1e-3, 2e-3, 2.55e-1]])
    # both rows are positive, so 0..max is cut into 255 steps: of 1 and of 0.001
    assert torch.allclose(fake_quantize_activation(x), x, atol=0, rtol=1e-6)
    y = fake_quantize_activation(torch.tensor([[100.4, 101.0, 255.0]]))
    assert torch.allclose(y, torch.tensor([[100.0, 101.0, 255.0]]))


def test_bf16_rounding_keeps_dtype_and_gradient():
    w = torch.tensor([1.0, 1.001, 3.14159], requires_grad=True)
    y = round_to_bf16(w)
    assert y.dtype == torch.float32 and torch.equal(y, w.bfloat16().float())
    y.sum().backward()
    assert torch.as_tensor(w.grad).tolist() == [1, 1, 1]
