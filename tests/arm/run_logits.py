"""Run a .pte with the Arm build and keep its logits; started by test_arm.py with the emulated Python.

    DIR/python run_logits.py MODEL.pte TOKENS.npy OUT.npz

TOKENS.npy holds int64 [t]. OUT.npz gets `stepped`, float32 [t, vocab], one token a call through the KV cache;
`prefilled` [vocab], after all of them in one call; and what ran: `machine`, and how many `kai_` names (KleidiAI's
kernels) the runtime's library has.
"""

# ruff: noqa: E402  (dlopen's flags have to be set before anything of torch is loaded)
import os
import platform
import sys
from pathlib import Path

sys.setdlopenflags(os.RTLD_LAZY)  # what stands in for CUDA's libraries resolves nothing that CPU code does not call
import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401
import numpy as np
import torch
from executorch.extension.pybindings import _portable_lib
from executorch.runtime import Runtime

pte, tokens_file, out = sys.argv[1:]
tokens = torch.from_numpy(np.load(tokens_file))
program = Runtime.get().load_program(pte)


def call(method, chunk, position):
    (logits,) = method.execute((chunk[None], torch.tensor([position])))
    return logits.reshape(-1, logits.shape[-1])[-1].clone()


method = program.load_method("forward")
stepped = torch.stack([call(method, tokens[i : i + 1], i) for i in range(len(tokens))])
prefilled = call(program.load_method("forward"), tokens, 0)
kernels = Path(str(_portable_lib.__file__)).read_bytes().count(b"kai_")
np.savez(out, stepped=stepped.numpy(), prefilled=prefilled.numpy(), machine=platform.machine(), kleidiai=kernels)
