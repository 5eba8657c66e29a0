"""Run a .pte with the Arm build and save its logits. test_arm.py starts this file with the emulated Python.

    DIR/python run_logits.py MODEL.pte TOKENS.npy OUT.npz

TOKENS.npy holds int64 [t]. OUT.npz gets

    stepped      float32 [t, vocab], logits with one token per call, through the KV cache
    prefilled    float32 [vocab], logits of the last token, with all tokens in one call
    machine      the CPU's architecture
    kleidiai     number of `kai_` names (KleidiAI's kernels) in the runtime's library
"""

# ruff: noqa: E402  (dlopen's flags have to be set before anything of torch is loaded)
import os
import platform
import sys
from pathlib import Path

sys.setdlopenflags(os.RTLD_LAZY)  # the stand-ins for CUDA's libraries do not define every symbol
import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401
import numpy as np
import torch
from executorch.extension.pybindings import _portable_lib
from executorch.runtime import Runtime

pte, tokens_file, out = sys.argv[1:]
tokens = torch.from_numpy(np.load(tokens_file))
program = Runtime.get().load_program(pte)


def last_logits(method, chunk, position):
    (logits,) = method.execute((chunk[None], torch.tensor([position])))
    return logits.reshape(-1, logits.shape[-1])[-1].clone()


method = program.load_method("forward")
stepped = torch.stack([last_logits(method, tokens[i : i + 1], i) for i in range(len(tokens))])
prefilled = last_logits(program.load_method("forward"), tokens, 0)
kernels = Path(str(_portable_lib.__file__)).read_bytes().count(b"kai_")
np.savez(out, stepped=stepped.numpy(), prefilled=prefilled.numpy(), machine=platform.machine(), kleidiai=kernels)
