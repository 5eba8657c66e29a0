"""Turn a float model into one of the scheme, add adapters, freeze it.

Works on any `nn.Module` whose linears have names; knows nothing of torchtune. The order is prepare → (add adapters)
→ (freeze), each in place and returning the model.
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
    frozen,
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
    """Swap every linear whose full name matches, the embedding and the head for their latent versions.

    Parameters keep their storage and their names (but for a head that is not tied), so a float state dict still loads.
    With scheme None the same modules compute in full precision: the BF16 control.

    Raises:
        UserError: a row that the group size does not divide, a bias, or nothing to quantize.
    """
    found = [(name, m) for name, m in model.named_modules() if linears.fullmatch(name) and isinstance(m, nn.Linear)]
    if not found:
        raise UserError(f"the model has no linear named like {linears.pattern}: nothing to quantize")
    for name, linear in found:
        if scheme and linear.in_features % scheme.group_size:
            raise UserError(
                f"{name} has {linear.in_features} inputs, which scheme.group_size={scheme.group_size} does not divide; "
                "choose another group size or model"
            )
        if linear.bias is not None:
            raise UserError(f"{name} has a bias; the scheme has none")
        replace(model, name, LatentLinear(linear.weight, scheme.linear if scheme else None))
    old = model.get_submodule(embedding)
    assert isinstance(old, nn.Embedding)
    new = LatentEmbedding(old.weight, scheme.rows if scheme else None)
    replace(model, embedding, new)
    own = getattr(model, head)
    untied = isinstance(own, nn.Linear)
    setattr(model, head, UntiedHead(LatentEmbedding(own.weight, new.fmt)) if untied else TiedHead(new))
    return model


def add_adapters(model: nn.Module, rank: int, alpha: float, seed: int = 0) -> nn.Module:
    """Give every quantized linear a fresh adapter, the same one for the same seed on any device and rank."""
    generator = torch.Generator().manual_seed(seed)
    for linear in quantized_linears(model).values():
        device = next(t.device for t in [*linear.parameters(), *linear.buffers()])
        adapter = Adapter(linear.in_features, linear.out_features, rank, alpha)
        adapter.reset_parameters(generator)
        linear.adapter = adapter.to(device)
    return model


def freeze(model: nn.Module, head: str = "output") -> nn.Module:
    """Replace latent weights by codes and scales (full-precision ones stay); only adapters remain trainable."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LatentLinear) and module.fmt:
            new = FrozenLinear(*frozen(module), module.fmt)
            new.adapter = module.adapter
            replace(model, name, new)
        elif isinstance(module, LatentEmbedding) and module.fmt:
            new = FrozenEmbedding(*frozen(module), module.fmt)
            replace(model, name, new)
            own = name.startswith(f"{head}.")
            if own or not isinstance(getattr(model, head), UntiedHead):
                setattr(model, head, UntiedHead(new) if own else TiedHead(new))
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name))
    return model


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Fold full-precision adapters into their weights, W + scale · B A. Never done to a quantized model."""
    for linear in quantized_linears(model).values():
        assert isinstance(linear, LatentLinear) and linear.fmt is None, "merging needs full-precision weights"
        if linear.adapter is not None:
            a, b = (t.bfloat16().float() for t in (linear.adapter.a, linear.adapter.b))
            linear.weight.add_(linear.adapter.scale * (b @ a))
            linear.adapter = None
    return model


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Full name → linear of the scheme, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this full name belongs to an adapter."""
    return ".adapter." in name


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in another's place; what was hooked in front of the old one (SpinQuant's R4) stays there."""
    parent, _, leaf = name.rpartition(".")
    new._forward_pre_hooks = model.get_submodule(name)._forward_pre_hooks
    setattr(model.get_submodule(parent), leaf, new)
