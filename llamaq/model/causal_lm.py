"""The model: torchtune's Llama, with the scheme's modules in it, and the loss computed inside the forward pass."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchtune import config as torchtune_config
from torchtune.config._errors import InstantiationError
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer

from llamaq.checkpoints.base import StateDict
from llamaq.config import Component, Config
from llamaq.errors import UserError
from llamaq.quant.modules import TiedHead
from llamaq.quant.prepare import add_adapters, freeze, prepare
from llamaq.quant.scheme import Scheme

HEAD_CHUNK_TOKENS = 1024  # logits exist for this many positions at a time: 0.5 GB in float32 at Llama 3's vocabulary


def instantiate(component: Component, *args: Any, setting: str, **kwargs: Any) -> Any:
    """Torchtune's `config.instantiate`, with errors that name the setting.

    Raises:
        UserError: no such component, or arguments it does not take.
    """
    name = component.get("_component_")
    try:
        return torchtune_config.instantiate(OmegaConf.create(component), *args, **kwargs)
    except UserError:
        raise
    except FileNotFoundError as e:
        raise UserError(f"{setting}: {name}: no such file: {e.filename or e}") from e
    except (ImportError, AttributeError, InstantiationError) as e:
        raise UserError(f"{setting}._component_={name}: {e}") from e
    except TypeError as e:
        raise UserError(f"{setting}: {name} was called with wrong arguments: {e}") from e


class CausalLM(nn.Module):
    """A decoder and its head, as one module that gives logits or the log-probabilities of labels.

    The head's quantized matrix is made once a forward pass, and logits exist only for `HEAD_CHUNK_TOKENS` positions
    at a time; in training they are recomputed in the backward pass.
    """

    def __init__(self, decoder: TransformerDecoder):
        super().__init__()
        assert isinstance(decoder.output, TiedHead), "prepare the decoder first"
        self.head = decoder.output
        decoder.output = nn.Identity()  # torchtune's decoder now ends with the final norm
        self.decoder = decoder

    def hidden(self, tokens: Tensor, mask: Tensor | None = None, input_pos: Tensor | None = None) -> Tensor:
        """Final normalized states: [b, s] → [b, s, dim]."""
        return self.decoder(tokens, mask=mask, input_pos=input_pos)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        teacher: "CausalLM | None" = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits [b, s, vocab] without labels; else (logprobs [b, s], KL from the teacher [b, s] or None).

        Args:
            tokens: [b, s].
            labels: [b, s], already shifted: labels[:, i] is to be predicted at position i; −100 where nothing is.
            mask: [b, s, s], True where attention is allowed; causal if None.
            input_pos: [b, s] positions of packed samples.
            teacher: a model whose distribution to compare with, KL(teacher ‖ this), in nats.
        """
        h = self.hidden(tokens, mask, input_pos)
        if labels is None:
            return self.head(h)
        scored = labels != -100
        h, targets, w = h[scored], labels[scored], self.head.quantized_weight()  # [n, dim], [n]
        h_t = w_t = None
        if teacher is not None:
            with torch.no_grad():
                h_t, w_t = teacher.hidden(tokens, mask, input_pos)[scored], teacher.head.quantized_weight()
        per_chunk = [
            checkpoint(self._score, h[rows], w, targets[rows], teacher,
                       None if h_t is None else h_t[rows], w_t, use_reentrant=False)
            for rows in _chunks(len(targets))
        ]  # fmt: skip
        logprobs = torch.zeros(labels.shape, device=h.device)
        logprobs = logprobs.masked_scatter(scored, torch.cat([lp for lp, _ in per_chunk]))
        if teacher is None:
            return logprobs, None
        kl = torch.zeros(labels.shape, device=h.device)
        return logprobs, kl.masked_scatter(scored, torch.cat([kl for _, kl in per_chunk]))

    def _score(
        self, h: Tensor, w: Tensor, labels: Tensor, teacher: "CausalLM | None", h_t: Tensor | None, w_t: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits = self.head(h, w).float()  # [n, vocab]
        logprobs = -F.cross_entropy(logits, labels, reduction="none")
        if teacher is None:
            return logprobs, logprobs.new_zeros(0)
        with torch.no_grad():
            target = teacher.head(h_t, w_t).float().log_softmax(-1)
        kl = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)
        return logprobs, kl


def _chunks(n: int) -> list[slice]:
    return [slice(i, i + HEAD_CHUNK_TOKENS) for i in range(0, max(n, 1), HEAD_CHUNK_TOKENS)]


def meta_decoder(model: Component) -> TransformerDecoder:
    """Torchtune's decoder on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return instantiate(model, setting="model")


def build_decoder(model: Component, weights: StateDict | None = None, seed: int = 0) -> TransformerDecoder:
    """Torchtune's decoder, float32 on the CPU, with the given weights or random ones.

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
    """The model of a stage: decoder → scheme → adapters → freeze.

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
        for layer in model.decoder.layers:
            layer.compile()
    if c.activation_checkpointing:
        from torchtune.training import set_activation_checkpointing

        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    return model


def pick_device(name: str) -> torch.device:
    """`auto` is this rank's GPU if there is one.

    Raises:
        UserError: a GPU was asked for by name and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name.startswith("cuda") and not has_gpu:
        raise UserError(f"device={name}, but PyTorch sees no GPU; use device=cpu or auto")
    if name == "cpu" or not has_gpu:
        return torch.device("cpu")
    return torch.device(name if ":" in name else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
