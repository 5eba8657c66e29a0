"""Fill in the sections `model` and `tokenizer` from the checkpoint folder, which describes itself."""

from dataclasses import replace
from typing import Any

from llamaq.config import Component, Config
from llamaq.errors import UserError
from llamaq.families.folder import Described, describe
from llamaq.families.tokenizer_files import HUGGING_FACE, META, no_tokenizer
from llamaq.families.weight_files import quantized

LONGEST_SAMPLE = 2048  # tokens of a sample, unless `tokenizer.max_seq_len` says otherwise


def complete(config: Config) -> Config:
    """Return a config whose `model` and `tokenizer` are components.

    A section with a `_component_` stays as it is. One without is the folder's, changed by what the section says.

    Raises:
        UserError: a section is missing and the folder cannot replace it.
    """
    missing = [name for name in ("model", "tokenizer") if "_component_" not in getattr(config, name)]
    if missing and config.base is not None:
        raise UserError(
            f"the section {missing[0]} has no _component_: with a section base, the run makes the model itself, so "
            "model and tokenizer have to be given"
        )
    model, tokenizer = config.model, config.tokenizer
    if missing:
        found = describe(config.checkpoint_dir)
        if found.codes:
            raise UserError(quantized(found.folder, f"llamaq: {found.codes}"))
        model = model if "model" not in missing else _model(found) | model
        tokenizer = tokenizer if "tokenizer" not in missing else _tokenizer(found) | tokenizer
    return replace(config, model=model, tokenizer=_with_length(tokenizer, model))


def _model(found: Described) -> Component:
    if found.model is None:
        raise UserError(
            f"checkpoint_dir={found.folder} has neither config.json nor params.json, so nothing says what model its "
            "weights are; give the sections model and tokenizer, e.g. as in `tune cat llama3_2/1B_qat_lora_dpo`"
        )
    return found.model


def _tokenizer(found: Described) -> Component:
    if found.tokenizer is None:
        raise no_tokenizer(found.folder)
    return found.tokenizer


def _with_length(tokenizer: Component, model: Component) -> Component:
    """Return the tokenizer's section with a length of samples: the model's, at most `LONGEST_SAMPLE`."""
    if tokenizer.get("max_seq_len") is not None or tokenizer["_component_"] not in (HUGGING_FACE, META):
        return tokenizer
    positions: Any = model.get("max_seq_len") or LONGEST_SAMPLE
    return tokenizer | {"max_seq_len": min(int(positions), LONGEST_SAMPLE)}
