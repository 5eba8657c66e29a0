"""Load and run a .pte, and check what it holds: every tensor of the checkpoint, bit for bit."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamaq.checkpoints.meta import WEIGHTS
from llamaq.errors import UserError
from llamaq.quiet import filtered_stderr, quiet


class Pte:
    """A loaded .pte: `step` runs tokens at a position of the KV cache; `reset` starts anew.

    Writing at a position makes everything after it void, so going back is exact: attention looks at positions up to
    the present one only.
    """

    def __init__(self, path: str | Path, method: str = "forward"):
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such .pte; run export first")
        os.environ.setdefault("ET_LOG_LEVEL", "Error")
        self.path, self.method = path, method
        with quiet():
            import executorch.extension.llm.custom_ops.custom_ops
            import executorch.kernels.quantized  # noqa: F401  (registers embedding_byte …)
            from executorch.runtime import Runtime

            self._program = Runtime.get().load_program(path)
            if method not in self._program.method_names:
                known = sorted(n for n in self._program.method_names if not n.startswith(("get_", "use_", "enable_")))
                raise UserError(f"{path} has no method '{method}'; it has {', '.join(known)}")
            self.reset()
        self.max_seq_length = self.metadata("get_max_seq_len")
        self.max_context_length = self.metadata("get_max_context_len")
        self.max_tokens_per_call = self.max_seq_length if self.metadata("enable_dynamic_shape") else 1

    def metadata(self, name: str) -> Any:
        """Return a constant that the exporter stored, e.g. get_max_seq_len, get_bos_id, get_eos_ids."""
        values: Any = self._program.load_method(name).execute([])  # pyright: ignore[reportOptionalMemberAccess]
        return list(values) if name.endswith("s") or len(values) > 1 else values[0]

    def reset(self) -> None:
        """Forget the KV cache; its state lives in the loaded method."""
        self._forward: Any = self._program.load_method(self.method)

    @cached_property
    def full_logits(self) -> bool:
        """Tell whether a call gives the logits of all its tokens (`export.full_logits`). Asking resets the cache."""
        if self.max_tokens_per_call == 1:
            return False
        n = len(self.rows([0, 0], 0))
        self.reset()
        return n == 2

    def rows(self, tokens: list[int], position: int) -> Tensor:
        """Return the logits [n, vocab] of one call at `position`: of all tokens with full logits, else of the last."""
        with filtered_stderr():
            (logits,) = self._forward.execute((torch.tensor([tokens]), torch.tensor([position])))
        return logits.reshape(-1, logits.shape[-1]).clone()

    def step(self, tokens: list[int], position: int) -> Tensor:
        """Return the logits [vocab] after the last of `tokens`, which start at `position`, in the fewest calls."""
        limit = self.max_tokens_per_call
        for at in range(0, len(tokens), limit):
            logits = self.rows(tokens[at : at + limit], position + at)
        return logits[-1]

    def logits(self, tokens: list[int]) -> Tensor:
        """Return logits [len(tokens), vocab] from an empty cache, one token a call."""
        self.reset()
        return torch.stack([self.step([t], i) for i, t in enumerate(tokens)])

    def generate(self, prompt: list[int], max_new_tokens: int, stop: list[int]) -> list[int]:
        """Return the greedy continuation of a prompt, without the stop token; it ends where the context is full.

        Of a prompt that leaves no room for a token, the end is read.
        """
        self.reset()
        prompt = prompt[-(self.max_context_length - 1) :]
        logits = self.step(prompt, 0)
        answer: list[int] = []
        while len(answer) < min(max_new_tokens, self.max_context_length - len(prompt)):
            token = int(logits.argmax())
            if token in stop:
                break
            answer.append(token)
            if len(prompt) + len(answer) < self.max_context_length:
                logits = self.step([token], len(prompt) + len(answer) - 1)
        return answer


def check_constants(checkpoint: Path, pte: Path) -> int:
    """Find every tensor of the checkpoint in the .pte bit for bit, in the form XNNPACK stores it; return how many.

    int4 codes two to a byte with 8 added, group scales as bf16, adapters and norms as float32, rows as they are
    (executorch/backends/xnnpack/operators/node_visitor.py). This is exact where comparing logits cannot be.

    Raises:
        UserError: naming the first tensors that are not there.
    """
    tensors = torch.load(checkpoint / WEIGHTS, mmap=True, weights_only=True)
    wanted = {name: _stored_bytes(name, t) for name, t in tensors.items()}
    file = np.memmap(pte, dtype=np.uint8, mode="r")
    # constants start at multiples of 16 bytes: look their first 8 bytes up there, then compare whole
    starts = file[: len(file) // 16 * 16].view(np.uint64)[::2]
    first = {name: int(data[:8].view(np.uint64)[0]) for name, data in wanted.items()}
    candidates = np.flatnonzero(np.isin(starts, np.array(list(first.values()), dtype=np.uint64)))
    by_value: dict[int, list[int]] = {}
    for i in candidates.tolist():
        by_value.setdefault(int(starts[i]), []).append(i * 16)

    def found(name: str) -> bool:
        data = wanted[name]
        return any(np.array_equal(file[at : at + len(data)], data) for at in by_value.get(first[name], []))

    absent = [name for name in wanted if not found(name)]
    if absent:
        raise UserError(
            f"{pte} does not hold {len(absent)} of the checkpoint's {len(wanted)} tensors bit for bit (first: "
            f"{', '.join(absent[:3])}): the exporter changed them"
        )
    return len(wanted)


def _stored_bytes(name: str, t: Tensor) -> np.ndarray:
    in_block = name.startswith("layers.")
    if t.dtype == torch.int8 and in_block:
        nibbles = (t + 8).to(torch.uint8).flatten()
        t = nibbles[1::2] << 4 | nibbles[::2]
    elif in_block and name.endswith(".scales"):
        t = t.bfloat16()
    elif t.dtype != torch.int8:
        t = t.float()
    return t.contiguous().view(-1).view(torch.uint8).numpy()


def size_parts(checkpoint: Path, pte: Path) -> dict[str, int]:
    """Count the bytes of a quantized .pte by what they hold; what is not a tensor is the program."""
    tensors = torch.load(checkpoint / WEIGHTS, mmap=True, weights_only=True)
    parts = dict.fromkeys(("int4 codes", "group scales", "embedding", "head", "adapters", "norms"), 0)  # and biases
    for name, t in tensors.items():
        if name.startswith("tok_embeddings."):
            part = "embedding"
        elif name.startswith("output."):
            part = "head"
        elif ".adaptor." in name:
            part = "adapters"
        elif name.endswith(("norm.weight", "norm_fn.weight", ".bias")):
            part = "norms"
        else:
            part = "group scales" if name.endswith(".scales") else "int4 codes"
        parts[part] += t.numel() * t.element_size() if part in ("embedding", "head") else _stored_size(t, part)
    return parts | {"program": pte.stat().st_size - sum(parts.values())}


def _stored_size(t: Tensor, part: str) -> int:
    return {"int4 codes": t.numel() // 2, "group scales": t.numel() * 2}.get(part, t.numel() * 4)
