"""Stage 2, LoRA: adapters on the frozen quantized backbone, supervised on the same kind of data.

    tune run qat_lora --config llama3_2/1B_qat_lora_dpo [key=value …]        (after `tune run qat`)

The backbone is frozen as int4 and int8 codes with their scales, computed once from stage 1's weights. The adapters sit
on all seven linears of every block and are used at bf16 values. The stage saves the adapters alone
(`qat_lora/adapters.safetensors`).
"""

from pathlib import Path
from typing import Any

from llamaq.checkpoints.torchtune import save_weights, weights_of
from llamaq.config.view import only
from llamaq.model.build import build_model, scheme_of
from llamaq.plan.preflight import check_stage
from llamaq.recipes.qat import TRAINING
from llamaq.runs.main import main
from llamaq.runs.ranks import say
from llamaq.runs.run import Run
from llamaq.train.sft import train_sft

NEEDS = ("qat_lora",)


def qat_lora(run: Run, control: bool = False) -> Path:
    """Train stage 2; with `control`, the same on the control's full-precision backbone."""
    name = "control_lora" if control else "qat_lora"
    c = only(run.config, *TRAINING, "qat_lora", "adapters", *([] if control else ["scheme"]))
    backbone = run.need("control_qat" if control else "qat", made_by="tune run qat")

    def build(folder: Path) -> dict[str, Any]:
        scheme, adapters = None if control else scheme_of(c), (c.adapters.rank, c.adapters.alpha)
        model = build_model(c.model, weights_of(backbone), scheme, adapters, frozen=True, seed=c.seed)
        metrics, weights = train_sft(run.session(name, folder), c, c.section("qat_lora"), model, "qat_lora")
        save_weights(folder, weights)
        return metrics

    return run.stage(name, build, c, [backbone], version=2)


def recipe(run: Run) -> None:
    """Run stage 2."""
    check_stage(run.config, "qat_lora")
    say(f"adapters: {qat_lora(run)}/adapters.safetensors")


if __name__ == "__main__":
    main(recipe, __doc__, NEEDS)
