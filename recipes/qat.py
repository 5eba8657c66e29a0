"""Stage 1, QAT: supervised fine-tuning of the whole model with every weight of the scheme fake-quantized.

    tune run qat --config llama3_2/1B_qat_lora_dpo [key=value …]
    tune run --nproc_per_node 2 qat --config …

Blocks train as int4 groups with int8 activations, the embedding and the head as int8 rows. The stage saves the
latent float weights (`qat/model.safetensors`). If the config says how to make what the run starts from (`corpus`,
`base`), the recipe makes that first.
"""

from pathlib import Path
from typing import Any

from llamaq.checkpoints.load import start_inputs, start_weights
from llamaq.checkpoints.meta import model_params, save_float
from llamaq.checkpoints.torchtune import save_weights
from llamaq.config import without
from llamaq.config.view import only
from llamaq.data.corpus import write_corpus
from llamaq.model.build import build_model, meta_decoder, scheme_of
from llamaq.plan.preflight import preflight
from llamaq.runs.main import main
from llamaq.runs.ranks import rank, say
from llamaq.runs.run import Run
from llamaq.train.sft import train_sft

NEEDS = ("qat",)

# what every training stage reads of the config, besides its own section
TRAINING = ("model", "tokenizer", "seed", "dtype")


def prepare_start(run: Run) -> None:
    """Make the corpus and the BF16 model that the config starts from, if it says how, and check the whole run."""
    if run.config.corpus is not None:
        corpus(run)
    say(preflight(run.config))
    if run.config.base is not None:
        base(run)


def corpus(run: Run) -> Path:
    """Write the data files, and perhaps a tokenizer, that the other sections name."""
    c = only(run.config, "corpus")
    return run.stage("corpus", lambda folder: write_corpus(folder, c.section("corpus")), c)


def base(run: Run) -> Path:
    """Train a BF16 model from random weights and leave it as Meta releases its models."""
    c = only(run.config, *TRAINING, "base")

    def build(folder: Path) -> dict[str, Any]:
        model = build_model(c.model, None, scheme=None, seed=c.seed)
        metrics, weights = train_sft(run.session("base", folder), c, c.section("base"), model, "base")
        if rank() == 0:
            save_float(folder / "model", weights, model_params(meta_decoder(c.model)))
        return metrics

    return run.stage("base", build, c, version=2)


def qat(run: Run, control: bool = False) -> Path:
    """Train stage 1; with `control`, the same training in full precision, which the report compares with."""
    name = "control_qat" if control else "qat"
    c = only(run.config, *TRAINING, "qat", *([] if control else ["scheme"]))

    def build(folder: Path) -> dict[str, Any]:
        model = build_model(c.model, start_weights(c), None if control else scheme_of(c), seed=c.seed)
        metrics, weights = train_sft(run.session(name, folder), c, c.section("qat"), model, "qat")
        save_weights(folder, weights)
        return metrics

    return run.stage(name, build, c, start_inputs(c), version=2)


def recipe(run: Run) -> None:
    """Run stage 1."""
    run.config = without(run.config, "spinquant")
    prepare_start(run)
    say(f"latent weights: {qat(run)}/model.safetensors")


if __name__ == "__main__":
    main(recipe, __doc__, NEEDS)
