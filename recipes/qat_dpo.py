"""Stage 3, DPO: preferences over the quantized model, backbone and adapters trained together.

    tune run qat_dpo --config llama3_2/1B_qat_lora_dpo [key=value …]         (after `tune run qat_lora`)

The reference is the stage-2 model with its adapters. Its log-probabilities of every pair are computed once, as a stage
of their own (`reference/`), so no second model is in memory and another learning rate does not compute them again. At
step 0 policy and reference are the same numbers, so the loss is ln 2.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from llamaq.checkpoints.tensors import save_tensors
from llamaq.checkpoints.torchtune import save_weights, weights_of
from llamaq.config import Config
from llamaq.config.components import instantiate
from llamaq.config.view import only
from llamaq.data.datasets import build_dataset, usable_pairs
from llamaq.data.tokenizer import tokenizer_of
from llamaq.model.build import build_model, pick_device, scheme_of
from llamaq.plan.preflight import check_stage
from llamaq.recipes.qat import TRAINING
from llamaq.runs.main import main
from llamaq.runs.ranks import rank, say
from llamaq.runs.run import Run
from llamaq.train.loop import train
from llamaq.train.objectives import DPO
from llamaq.train.reference import reference_logprobs

NEEDS = ("qat_dpo",)


def reference(run: Run) -> Path:
    """Compute log-probabilities of chosen and rejected answers under the stage-2 model: `logprobs` [pairs, 2]."""
    batches = ("qat_dpo.batch_size", "qat_dpo.global_batch_size")  # as in training, bit for bit
    c = only(run.config, "model", "tokenizer", "scheme", "adapters", "seed", "dtype", "qat_dpo.dataset", *batches)
    backbone, adapters = stage_two(run)

    def build(folder: Path) -> dict[str, Any]:
        weights = weights_of(backbone, adapters)
        model = build_model(c.model, weights, scheme_of(c), (c.adapters.rank, c.adapters.alpha), frozen=True)
        model.eval().to(pick_device(c.device))
        pairs, skipped, pad_id = preference_pairs(c)
        logprobs = reference_logprobs(model, pairs, pad_id, c.section("qat_dpo"), c.seed, c.dtype)
        if rank() == 0:
            save_tensors(folder / "reference.safetensors", {"logprobs": logprobs})
        return {"pairs": len(pairs), "skipped_pairs": skipped}

    return run.stage("reference", build, c, [backbone, adapters], version=2)


def qat_dpo(run: Run) -> Path:
    """Train stage 3: the latent backbone of stage 1 and the adapters of stage 2, both."""
    c = only(run.config, *TRAINING, "qat_dpo", "scheme", "adapters")
    inputs = [*stage_two(run), reference(run)]

    def build(folder: Path) -> dict[str, Any]:
        training = c.section("qat_dpo")
        pairs, skipped, pad_id = preference_pairs(c)
        logprobs = load_file(inputs[2] / "reference.safetensors")["logprobs"].tolist()
        samples = [pair | {"reference": r} for pair, r in zip(pairs, logprobs, strict=True)]
        model = build_model(c.model, weights_of(*inputs), scheme_of(c), (c.adapters.rank, c.adapters.alpha))
        objective = DPO(pad_id, instantiate(training.loss, setting="qat_dpo.loss"))
        metrics, weights = train(run.session("qat_dpo", folder), c, training, model, objective, samples)
        save_weights(folder, weights)
        return metrics | {"skipped_pairs": skipped}

    return run.stage("qat_dpo", build, c, inputs, version=2)


def stage_two(run: Run) -> list[Path]:
    """Return the folders of the stage-2 model: the backbone's and the adapters'."""
    return [run.need("qat", made_by="tune run qat"), run.need("qat_lora", made_by="tune run qat_lora")]


def preference_pairs(c: Config) -> tuple[list[dict[str, Any]], list[int], int]:
    """Return the tokenized pairs, the indices of those without room for an answer, and the padding id."""
    tokenizer, dataset = tokenizer_of(c), c.section("qat_dpo").dataset
    pairs, skipped = usable_pairs(build_dataset(dataset, tokenizer, "qat_dpo.dataset"), "qat_dpo.dataset")
    return pairs, skipped, tokenizer.pad_id


def recipe(run: Run) -> None:
    """Run stage 3."""
    check_stage(run.config, "qat_dpo")
    say(f"backbone and adapters: {qat_dpo(run)}")


if __name__ == "__main__":
    main(recipe, __doc__, NEEDS)
