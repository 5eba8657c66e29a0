"""Exported files run by ExecuTorch's own aarch64 build under qemu, KleidiAI's kernels included, against x86.

`make arm` installs the emulator and runs these. They show that the numbers are the same on Arm; times under emulation
mean nothing.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, random_weights, trained_like

from llamaq.evaluate.scores import agreement
from llamaq.export.exporter import export_pte
from llamaq.export.meta import save_quantized
from llamaq.export.pte import Pte
from llamaq.quant.prepare import freeze, prepare
from llamaq.quant.scheme import Scheme
from llamaq.spinquant.rotations import Rotations, Shape, rotate
from llamaq.train.model import build_decoder, meta_decoder

pytestmark = pytest.mark.arm
TOKENS = torch.randint(0, MODEL["vocab_size"], (12,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def arm() -> Path:
    """The emulated Python that tests/arm/setup.sh made."""
    folder = Path(os.environ.get("LLAMAQ_ARM", "/opt/llamaq-arm"))
    if not (folder / "ready").is_file():
        pytest.skip(f"no Arm emulator in {folder}: make arm")
    return folder / "python"


def checkpoint(folder: Path, kind: str) -> Path:
    if kind == "qat_lora":
        save_quantized(folder, trained_like(Scheme(), frozen=True).decoder, Scheme())
        return folder
    weights, shape = random_weights(), Shape.of(meta_decoder(MODEL))
    rotations = Rotations.random(shape, {"r1", "r2", "r4"}, 0)
    decoder = freeze(prepare(build_decoder(MODEL, rotate(weights, shape, rotations)), Scheme()))
    save_quantized(folder, decoder, Scheme(), rotations.contract(), decoder.get_submodule("output"))
    return folder


@pytest.mark.parametrize("kind", ["qat_lora", "spinquant"])
def test_arm_computes_what_x86_does(arm, tmp_path, kind):
    pte = tmp_path / "model.pte"
    export_pte(checkpoint(tmp_path / "model", kind), pte, 32, 32, [2], 1)
    np.save(tmp_path / "tokens.npy", TOKENS.numpy())
    script = Path(__file__).with_name("run_logits.py")
    command = [arm, script, pte, tmp_path / "tokens.npy", tmp_path / "logits.npz"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    ran = np.load(tmp_path / "logits.npz")
    assert str(ran["machine"]) == "aarch64" and int(ran["kleidiai"]) > 100
    x86 = Pte(pte)
    stepped, tokens = x86.logits(TOKENS.tolist()), TOKENS.tolist()
    x86.reset()
    results = agreement(stepped, torch.from_numpy(ran["stepped"]))
    print(f"{kind} on Arm: {results}")
    # tokens agree to float32 noise but for one whose activation lies on the border of two int8 levels (see pte_gates)
    assert results["token_error"] <= 1e-4 and results["top1"] == 1 and results["kl"] <= 1e-3
    prefilled = agreement(x86.step(tokens, 0)[None], torch.from_numpy(ran["prefilled"])[None])
    assert prefilled["relative_error"] <= 2e-2 and prefilled["top1"] == 1
