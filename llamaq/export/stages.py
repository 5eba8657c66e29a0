"""The stage `export_NAME`: a model of the run that does not ship, as a .pte, through the gates of the one that does."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llamaq.checkpoints.meta import model_params, save_float
from llamaq.checkpoints.quantized import save_quantized
from llamaq.config.view import only
from llamaq.export.gates import FILE, GATES, export_checked
from llamaq.model.build import scheme_of
from llamaq.model.causal_lm import CausalLM
from llamaq.quant.prepare import freeze
from llamaq.runs.ranks import on_rank_zero
from llamaq.runs.run import Run


@torch.no_grad()
def export_model(
    run: Run,
    name: str,
    make: Callable[[], CausalLM],
    inputs: list[Path],
    context: int,
    full_precision: bool = False,
) -> Path:
    """Export a model of the run as `export_NAME/model.pte`; return the stage's folder.

    Args:
        run: the run.
        name: of the model.
        make: builds it, float32 on the CPU.
        inputs: what it is made of.
        context: tokens in a short context of the gates.
        full_precision: whether it is not quantized; then the file has `export.baseline_dtype`.
    """
    dtype = ["export.baseline_dtype"] if full_precision else []
    c = only(run.config, *GATES, *FILE, "scheme", "adapters", *dtype)

    def build(folder: Path) -> dict[str, Any]:
        model, checkpoint = make(), folder / "model"
        if full_precision:
            save_float(checkpoint, model.weights(), model_params(model.decoder))
        else:
            save_quantized(checkpoint, freeze(copy.deepcopy(model.decoder)), scheme_of(c))
        del model
        result = export_checked(c, checkpoint, folder / "model.pte", make, context)
        shutil.rmtree(checkpoint)  # all of it is in the .pte
        return result

    return run.stage(f"export_{name}", on_rank_zero(build), c, inputs)
