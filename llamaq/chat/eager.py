"""A model as llamaq computes it, with a KV cache: it runs tokens at a position, as a .pte does."""

from typing import Any

import torch
from torch import Tensor

from llamaq.model.causal_lm import CausalLM
from llamaq.quant.modules import LatentLinear
from llamaq.quant.prepare import quantized_linears


class CachedModel:
    """A `CausalLM` that keeps keys and values, and its quantized weights, between calls.

    Writing at a position makes everything after it void, so going back is exact: attention looks at positions up to
    the present one only.
    """

    max_tokens_per_call = 512

    @torch.no_grad()
    def __init__(self, model: CausalLM, max_context_length: int, device: torch.device | str = "cpu"):
        """Prepare a model for chatting.

        Args:
            model: it is changed: latent weights become the quantized ones.
            max_context_length: tokens of the cache, at most as many as the model has positions.
            device: where to compute.
        """
        self._model, self._device = model.to(device).eval(), torch.device(device)
        self.max_context_length = min(max_context_length, model.decoder.max_seq_len)
        for linear in quantized_linears(model.decoder).values():
            w = linear.quantized_weight().detach()
            if isinstance(linear, LatentLinear):
                linear.weight.data = w  # a second copy of a 1B model would take 4 GB
            linear.quantized_weight = lambda w=w: w
        self._head = model.head.quantized_weight()
        with torch.device(device):
            model.decoder.setup_caches(1, torch.float32, decoder_max_seq_len=self.max_context_length)
        self._positions = torch.arange(self.max_context_length, device=device)

    @torch.no_grad()
    def step(self, tokens: list[int], position: int) -> Tensor:
        """Return the logits [vocab] after the last of `tokens`, which start at `position`."""
        places = self._positions[position : position + len(tokens)]
        layers: Any = self._model.decoder.layers
        for layer in layers:
            layer.attn.kv_cache.cache_pos = self._positions + position
        mask = self._positions[None, None, :] <= places[None, :, None]  # [1, s, context]
        inputs = torch.tensor([tokens], device=self._device)
        h = self._model.hidden(inputs, mask, places[None])[0, -1:]
        return self._model.head(h, self._head)[0].float().cpu()
