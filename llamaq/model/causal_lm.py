"""A decoder and its head as one module that gives logits, or the log-probabilities of labels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TransformerDecoder

from llamaq.model.compare import chunks, kl_divergence
from llamaq.quant.modules import HeadElsewhere, TiedHead


def torchtune_name(name: str) -> str:
    """Return torchtune's name of a parameter of `CausalLM`, which is its name in checkpoints."""
    return name.replace("head.matrix.", "output.") if name.startswith("head.") else name.removeprefix("decoder.")


class CausalLM(nn.Module):
    """A decoder and its head, as one module that gives logits or the log-probabilities of labels.

    The head's quantized matrix is made once a forward pass, and logits exist only for `HEAD_CHUNK_TOKENS` positions
    at a time; in training they are recomputed in the backward pass.
    """

    def __init__(self, decoder: TransformerDecoder):
        super().__init__()
        assert isinstance(decoder.output, TiedHead), "prepare the decoder first"
        self.head = decoder.output
        decoder.output = HeadElsewhere(self.head)  # torchtune's decoder now ends with the final norm
        self.decoder = decoder

    def weights(self) -> dict[str, Tensor]:
        """Return all parameters and buffers under torchtune's names, as checkpoints have them."""
        return {torchtune_name(name): t for name, t in self.state_dict().items()}

    def hidden(self, tokens: Tensor, mask: Tensor | None = None, input_pos: Tensor | None = None) -> Tensor:
        """Return the final normalized states: [b, s] → [b, s, dim]."""
        return self.decoder(tokens, mask=mask, input_pos=input_pos)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        teacher: "CausalLM | None" = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Return logits [b, s, vocab] without labels; else (logprobs [b, s], KL from the teacher [b, s] or None).

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
        per_chunk = []
        for rows in chunks(len(targets)):
            theirs = None if h_t is None else h_t[rows]
            per_chunk.append(
                checkpoint(self._score, h[rows], w, targets[rows], teacher, theirs, w_t, use_reentrant=False)
            )
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
        return logprobs, kl_divergence(target, logits.log_softmax(-1))
