"""What makes ExecuTorch's exporter quick is undone after it, and says the same as what it stands for."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llamaq.export.tracing import quick_tracing


def test_torch_is_left_as_it_was():
    """After an export, operators, graphs and fake tensors are PyTorch's own again."""
    from torch.fx import GraphModule

    with quick_tracing():
        op = torch.ops.torchao.quantize_affine.default
    before = GraphModule.recompile, dict(op.py_kernels), gc.get_threshold()
    with quick_tracing():
        assert op.py_kernels != before[1]
    assert (GraphModule.recompile, dict(op.py_kernels), gc.get_threshold()) == before


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("blocks", [[1, 1, 64], [1, 1, 16], [1, 8, 64]])
@pytest.mark.parametrize("mapping", ["ASYMMETRIC", "SYMMETRIC"])
def test_fake_quantizers_have_the_shapes_and_dtypes_of_real_ones(mapping, blocks, keepdim):
    ops = torch.ops.torchao
    x = torch.randn(1, 8, 64)
    scale, zero = ops.choose_qparams_affine(
        x, mapping, blocks, torch.int8, -128, 127, 1e-5, torch.float32, None, keepdim
    )
    codes = ops.quantize_affine(x, blocks, scale, zero, torch.int8, -128, 127)
    back = ops.dequantize_affine(codes, blocks, scale, zero, torch.int8, -128, 127)
    with quick_tracing(), FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        fakes = ops.choose_qparams_affine(
            fake, mapping, blocks, torch.int8, -128, 127, 1e-5, torch.float32, None, keepdim
        )
        fakes = *fakes, ops.quantize_affine(fake, blocks, *fakes, torch.int8, -128, 127)
        fakes = *fakes, ops.dequantize_affine(fakes[2], blocks, *fakes[:2], torch.int8, -128, 127)
    for real, made in zip((scale, zero, codes, back), fakes, strict=True):
        assert (made.shape, made.dtype, made.stride()) == (real.shape, real.dtype, real.stride())
