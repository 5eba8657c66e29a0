"""Stage 2, LoRA: adapters on the frozen quantized backbone, supervised on the same kind of data.

    tune run qat_lora --config llama3_2/1B_qat_lora_dpo [key=value …]        (after `tune run qat`)

The backbone is really frozen: int4 and int8 codes with their scales, a quarter of its float size, computed once from
stage 1's weights. The adapters sit on all seven linears of every block, are used at bf16 values, and are saved alone
(`qat_lora/adapters.safetensors`).
"""

from pathlib import Path
from typing import Any

from llamaq.model.causal_lm import build_model
from llamaq.runs.main import main
from llamaq.runs.run import Run, say
from llamaq.train.sft import identity, save_weights, sft, weights_of


def qat_lora(run: Run, control: bool = False) -> Path:
    """The stage; with `control`, the same on the control's full-precision backbone."""
    c, name = run.config, "control_lora" if control else "qat_lora"
    backbone = run.need("control_qat" if control else "qat")
    adapters = (c.adapters.rank, c.adapters.alpha)

    def build(folder: Path) -> dict[str, Any]:
        scheme = None if control else run.scheme
        model = build_model(c.model, weights_of(backbone), scheme, adapters, frozen=True, seed=c.seed)
        metrics, weights = sft(run, name, folder, model, c.training("qat_lora"), "qat_lora")
        save_weights(folder, weights)
        return metrics

    return run.stage(name, build, identity(c, c.training("qat_lora")) | {"adapters": adapters}, [backbone])


def recipe(run: Run) -> None:
    say(f"adapters: {qat_lora(run)}/adapters.safetensors")


if __name__ == "__main__":
    main(recipe, __doc__)
