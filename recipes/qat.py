"""Stage 1, QAT: supervised fine-tuning of the whole model with every weight of the scheme fake-quantized.

    tune run qat --config llama3_2/1B_qat_lora_dpo [key=value …]
    tune run --nproc_per_node 2 qat --config …

Blocks train as int4 groups with int8 activations, the embedding and the tied head as int8 rows; what is saved are the
latent float weights (`qat/model.safetensors`). Run alone it first makes what the config starts from, if the config
says how (`corpus`, `base`).
"""

from pathlib import Path
from typing import Any

from llamaq.checkpoints.quantized import model_params, save_float
from llamaq.data.corpus import write_corpus
from llamaq.model.causal_lm import build_model, meta_decoder
from llamaq.plan.preflight import preflight
from llamaq.runs.main import main
from llamaq.runs.run import Run, rank, say
from llamaq.train.sft import identity, save_weights, sft, start_inputs, start_weights


def start(run: Run) -> None:
    """Make the corpus and the BF16 model a config starts from, if it says how; else they must be there already."""
    c = run.config
    if c.corpus is not None:
        corpus = c.corpus
        run.stage("corpus", lambda folder: write_corpus(folder, corpus), {"corpus": corpus})
    say(preflight(c))
    if c.base is not None:
        base(run)


def base(run: Run) -> Path:
    """Train a BF16 model from random weights and leave it as Meta releases its models."""
    c = run.config
    assert c.base is not None
    training = c.base

    def build(folder: Path) -> dict[str, Any]:
        model = build_model(c.model, None, scheme=None, seed=c.seed)
        metrics, weights = sft(run, "base", folder, model, training, "base")
        if rank() == 0:
            save_float(folder / "model", weights, model_params(meta_decoder(c.model)))
        return metrics

    return run.stage("base", build, identity(c, training))


def qat(run: Run, control: bool = False) -> Path:
    """The stage; with `control`, the same training in full precision, which the report compares with."""
    c, name = run.config, "control_qat" if control else "qat"

    def build(folder: Path) -> dict[str, Any]:
        model = build_model(c.model, start_weights(c), None if control else run.scheme, seed=c.seed)
        metrics, weights = sft(run, name, folder, model, c.training("qat"), "qat")
        save_weights(folder, weights)
        return metrics

    return run.stage(name, build, identity(c, c.training("qat")), start_inputs(c))


def recipe(run: Run) -> None:
    start(run)
    say(f"latent weights: {qat(run)}/model.safetensors")


if __name__ == "__main__":
    main(recipe, __doc__)
