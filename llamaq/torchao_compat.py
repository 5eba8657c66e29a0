"""Lets torchtune 0.6.1 (the last release, April 2025) import and run on torchao 0.18.

torchao moved or deleted what torchtune imports: the NF4 tensor's module, two quantization functions, a layout class,
and the names under which fake quantizers are configured. This module puts the names back, pointing at today's
implementations, before the first `import torchtune`. Importing it is enough; doing so twice does nothing.

What each name is needed for (torchtune 0.6.1 file):
    torchao.dtypes.nf4tensor               modules/common_utils.py, modules/peft/{lora,dora}.py, and others
    torchao.dtypes.TensorCoreTiledLayout   training/quantization.py
    torchao.quantization.int4_weight_only, .int8_dynamic_activation_int4_weight    training/quantization.py
    qat.api.FakeQuantizeConfig, qat.fake_quantizer.FakeQuantizer                   modules/peft/lora.py (QATLoRALinear)
"""

import importlib
import sys
from typing import Any


def _int8_dynamic_activation_int4_weight(group_size: int = 32, **_: Any) -> Any:
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup

    int4: Any = vars(torch)["int4"]  # torch's stubs do not list it
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_granularity=PerGroup(group_size))


def _int4_weight_only(group_size: int = 128, **_: Any) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=group_size)


class _TensorCoreTiledLayout:
    """Stands for the deleted layout class; torchtune only passes it to `int4_weight_only`, which ignores it."""

    def __init__(self, inner_k_tiles: int = 8):
        self.inner_k_tiles = inner_k_tiles


def install() -> None:
    """Put the names back. Safe to call more than once."""
    if "torchao.dtypes.nf4tensor" in sys.modules:
        return
    import torchao.dtypes
    import torchao.quantization
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer
    from torchao.quantization.qat import api as qat_api
    from torchao.quantization.qat import fake_quantizer as qat_fake_quantizer

    # by importlib: `torchao.quantization.quantize_` the attribute is a function that hides the package of that name
    nf4 = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    _set(torchao.dtypes, NF4Tensor=nf4.NF4Tensor, to_nf4=nf4.to_nf4, TensorCoreTiledLayout=_TensorCoreTiledLayout)
    _set(
        torchao.quantization,
        int4_weight_only=_int4_weight_only,
        int8_dynamic_activation_int4_weight=_int8_dynamic_activation_int4_weight,
    )
    # torchtune checks isinstance(config, FakeQuantizeConfig); torchao 0.18 makes IntxFakeQuantizeConfig objects
    qat_api.FakeQuantizeConfig = IntxFakeQuantizeConfig
    qat_fake_quantizer.FakeQuantizer = IntxFakeQuantizer
    sys.modules["torchao.dtypes.nf4tensor"] = nf4


def _set(module: Any, **names: Any) -> None:
    for name, value in names.items():
        if not hasattr(module, name):
            setattr(module, name, value)


install()
