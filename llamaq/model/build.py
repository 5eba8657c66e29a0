"""From a config's `model` section to torchtune's decoder, and to the model of a stage."""

import os

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer

from llamaq.config import Component, Config
from llamaq.config.components import instantiate
from llamaq.errors import UserError
from llamaq.model.causal_lm import CausalLM
from llamaq.quant.prepare import add_adapters, freeze, prepare
from llamaq.quant.scheme import Scheme

StateDict = dict[str, Tensor]


def scheme_of(c: Config) -> Scheme:
    """Return the numerics of a run."""
    return Scheme(group_size=c.scheme.group_size)


def meta_decoder(model: Component) -> TransformerDecoder:
    """Build torchtune's decoder on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return instantiate(model, setting="model")


def build_decoder(model: Component, weights: StateDict | None = None, seed: int = 0) -> TransformerDecoder:
    """Build torchtune's decoder, float32 on the CPU, with the given weights or random ones.

    With weights it is built on the meta device first: no memory for weights that are thrown away.
    """
    if weights is None:
        torch.manual_seed(seed)
        decoder = instantiate(model, setting="model")
        for name, p in decoder.named_parameters():  # GPT-2's scheme; torchtune leaves PyTorch's defaults
            if p.ndim == 2:
                residual = name.endswith(("output_proj.weight", "w2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * len(decoder.layers)) ** 0.5 if residual else 0.02)
        return decoder
    decoder = meta_decoder(model)
    if "output.weight" in weights and not isinstance(decoder.output, nn.Module):  # rotated: no longer tied
        vocab, dim = weights["output.weight"].shape
        decoder.output = nn.Linear(dim, vocab, bias=False, device="meta")
    decoder.load_state_dict(weights, assign=True)
    for p in decoder.parameters():
        p.requires_grad_()
    for module in decoder.modules():
        if callable(rope_init := getattr(module, "rope_init", None)):
            rope_init()
    return decoder


def build_model(
    model: Component,
    weights: StateDict | None,
    scheme: Scheme | None,
    adapters: tuple[int, float] | None = None,
    frozen: bool = False,
    seed: int = 0,
) -> CausalLM:
    """Build the model of a stage: decoder → scheme → adapters → freeze.

    Args:
        model: the `model` section of the config.
        weights: torchtune-named float32 weights, adapters' included if they are trained already; None for random ones.
        scheme: the numerics; None for full precision.
        adapters: rank and alpha, or None for none.
        frozen: backbone as integer codes (or, in full precision, not trained); only adapters are.
        seed: of fresh adapters (and weights).
    """
    backbone = {k: v for k, v in weights.items() if ".adapter." not in k} if weights is not None else None
    decoder = prepare(build_decoder(model, backbone, seed), scheme)
    if adapters is not None:
        add_adapters(decoder, *adapters, seed=seed)
        trained = {k: v for k, v in (weights or {}).items() if ".adapter." in k}
        if trained:
            _, unexpected = decoder.load_state_dict(trained, strict=False)
            assert not unexpected, unexpected
    if frozen:
        freeze(decoder)
    assert isinstance(decoder, TransformerDecoder)
    return CausalLM(decoder)


def ready_to_train(model: CausalLM, c: Config, device: torch.device) -> CausalLM:
    """Move to the device, recompute blocks in the backward pass and compile them, as the config says."""
    model.to(device).train()
    if c.compile:
        import torch._inductor.config as inductor

        # Inside a fused kernel, bfloat16 → float32 would else be left out, and with it the rounding of scales
        inductor.emulate_precision_casts = True
        for layer in model.decoder.layers:
            layer.compile()
    if c.activation_checkpointing:
        from torchtune.training import set_activation_checkpointing

        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    return model


def pick_device(name: str) -> torch.device:
    """Return the device that a config names; `auto` is this rank's GPU if there is one.

    Raises:
        UserError: a GPU was asked for by name and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name.startswith("cuda") and not has_gpu:
        raise UserError(f"device={name}, but PyTorch sees no GPU; use device=cpu or auto")
    if name == "cpu" or not has_gpu:
        return torch.device("cpu")
    return torch.device(name if ":" in name else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
