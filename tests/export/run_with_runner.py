"""Answer a prompt with ExecuTorch's own runner: run_with_runner.py MODEL.pte TOKENIZER PROMPT NEW_TOKENS [OPTION]

--warmup runs once before; --pieces adds no token to the prompt, and prints `PIECES […]`, the text of each new token.

Its Python package asks for `transformers`, which nothing here needs, so its extension module is loaded directly. It
prints as the runner for phones does: what it read and wrote, and a `PyTorchObserver {…}` line.
"""

import importlib.util
import json
import sys
from pathlib import Path

import executorch.extension.llm
import executorch.extension.llm.custom_ops.custom_ops
import executorch.extension.pybindings.portable_lib
import executorch.kernels.quantized

model, tokenizer, prompt, new_tokens = sys.argv[1:5]
module = next(Path(p) / "runner" for p in executorch.extension.llm.__path__)
spec = importlib.util.spec_from_file_location("_llm_runner", next(module.glob("_llm_runner*.so")))
assert spec is not None and spec.loader is not None
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
config = runner.GenerationConfig()
config.max_new_tokens, config.temperature, config.echo = int(new_tokens), 0.0, False
config.num_bos = 0 if "--pieces" in sys.argv else 1
text = runner.TextLLMRunner(model, tokenizer)
if "--warmup" in sys.argv:
    config.warming = True
    text.generate(prompt, config, None, None)
    text.reset()
    config.warming = False
pieces: list[str] = []
text.generate(prompt, config, pieces.append if "--pieces" in sys.argv else None, None)
if "--pieces" in sys.argv:
    print(f"\nPIECES {json.dumps(pieces)}")
