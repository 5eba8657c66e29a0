"""Turn a float model into a quantized one: prepare it, add adapters, freeze it.

The functions work on any `nn.Module`; they find linears by their names. Call them in the order `prepare`,
`add_adapters`, `freeze`; the last two are optional. Each changes the model in place and returns it.
"""

import re

import torch
from torch import nn

from llamaq.errors import UserError
from llamaq.quant.modules import (
    Adapter,
    FrozenEmbedding,
    FrozenLinear,
    LatentEmbedding,
    LatentLinear,
    QuantizedLinear,
    TiedHead,
    UntiedHead,
    codes_and_scales,
    head_of,
)
from llamaq.quant.scheme import Scheme

# torchtune's names for the seven linears of a Llama block
LLAMA_LINEARS = re.compile(r"layers\.\d+\.(attn\.(q|k|v|output)_proj|mlp\.w[123])")


def prepare(
    model: nn.Module,
    scheme: Scheme | None,
    linears: re.Pattern[str] = LLAMA_LINEARS,
    embedding: str = "tok_embeddings",
    head: str = "output",
) -> nn.Module:
    """Replace linears, embedding and head by their latent versions.

    Parameters keep their storage and their names, so a float state dict still loads. (The matrix of an untied head gets
    a new name; `CausalLM.weights` has the old one.)

    Args:
        model: a float model.
        scheme: the numerics; with None the same modules compute in full precision, for the BF16 control.
        linears: which linears to replace, by their full names.
        embedding: name of the embedding.
        head: name of the head: an `nn.Linear`, or whatever the model calls where the head is tied.

    Raises:
        UserError: the group size does not divide a row or is a whole one, or no linear matches.
    """
    _prepare_linears(model, scheme, linears)
    old = model.get_submodule(embedding)
    assert isinstance(old, nn.Embedding)
    new = LatentEmbedding(old.weight, scheme.rows if scheme else None)
    replace(model, embedding, new)
    own = getattr(model, head)
    untied = isinstance(own, nn.Linear)
    setattr(model, head, UntiedHead(LatentEmbedding(own.weight, new.fmt)) if untied else TiedHead(new))
    return model


def _prepare_linears(model: nn.Module, scheme: Scheme | None, linears: re.Pattern[str]) -> None:
    found = [(name, m) for name, m in model.named_modules() if linears.fullmatch(name) and isinstance(m, nn.Linear)]
    if not found:
        raise UserError(f"the model has no linear named like {linears.pattern}: nothing to quantize")
    for name, linear in found:
        if scheme and linear.in_features % scheme.group_size:
            raise UserError(
                f"{name} has {linear.in_features} inputs, which scheme.group_size={scheme.group_size} does not divide; "
                "choose another group size or model"
            )
        if scheme and linear.in_features == scheme.group_size:
            raise UserError(
                f"{name} has {linear.in_features} inputs, one group of scheme.group_size={scheme.group_size}, and "
                "ExecuTorch cannot load a single scale a row; choose a smaller group size"
            )
        replace(model, name, LatentLinear(linear.weight, scheme.linear if scheme else None, linear.bias))


def add_adapters(model: nn.Module, rank: int, alpha: float, seed: int = 0) -> nn.Module:
    """Give every quantized linear a fresh adapter. The same seed gives the same values on any device and rank."""
    generator = torch.Generator().manual_seed(seed)
    for linear in quantized_linears(model).values():
        device = next(t.device for t in [*linear.parameters(), *linear.buffers()])
        adapter = Adapter(linear.in_features, linear.out_features, rank, alpha)
        adapter.reset_parameters(generator)
        linear.adapter = adapter.to(device)
    return model


def freeze(model: nn.Module, head: str = "output") -> nn.Module:
    """Replace latent weights by codes and scales, and let only adapters be trained.

    Modules without a format (full precision) keep their weights.
    """
    own = head_of(model, head)
    matrix = own.matrix if isinstance(own, UntiedHead) else None
    for name, module in list(model.named_modules()):
        if isinstance(module, LatentLinear) and module.fmt:
            new = FrozenLinear(*codes_and_scales(module), module.fmt, module.bias)
            new.adapter = module.adapter
            replace(model, name, new)
        elif isinstance(module, LatentEmbedding) and module.fmt and module is not matrix:
            new = FrozenEmbedding(*codes_and_scales(module), module.fmt)
            replace(model, name, new)
            if matrix is None:
                setattr(model, head, TiedHead(new))
    if isinstance(matrix, LatentEmbedding) and matrix.fmt:
        setattr(model, head, UntiedHead(FrozenEmbedding(*codes_and_scales(matrix), matrix.fmt)))
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name))
    return model


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Add each adapter to its full-precision weight: W + scale · B A. For the BF16 control only.

    A quantized model keeps its adapters apart: merging would change W, and with it the codes.
    """
    for linear in quantized_linears(model).values():
        assert isinstance(linear, LatentLinear) and linear.fmt is None, "merging needs full-precision weights"
        if linear.adapter is not None:
            a, b = (t.bfloat16().float() for t in (linear.adapter.a, linear.adapter.b))
            linear.weight.add_(linear.adapter.scale * (b @ a))
            linear.adapter = None
    return model


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the model's quantized linears by full name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def is_adapter(name: str) -> bool:
    """Tell whether the parameter with this full name belongs to an adapter."""
    return ".adapter." in name


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another and keep the old one's forward pre-hooks (SpinQuant's R4)."""
    parent, _, leaf = name.rpartition(".")
    new._forward_pre_hooks = model.get_submodule(name)._forward_pre_hooks
    setattr(model.get_submodule(parent), leaf, new)
