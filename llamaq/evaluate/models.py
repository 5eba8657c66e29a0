"""Describe the models of a run that can be measured: names, how each is built, and which ones the config asks for.

A training chain and a SpinQuant run have different models. Each recipe describes its own in a `Models`; the stages in
`llamaq.evaluate.stages` work on either.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llamaq.config import Config, EvaluateConfig
from llamaq.errors import UserError
from llamaq.evaluate.tasks import check_tasks
from llamaq.export.gates import GATE_CONTEXT
from llamaq.model.causal_lm import CausalLM

TRAINING_STAGES = ("qat", "qat_lora", "qat_dpo")  # in the order they run
REFERENCES = ("bf16", "control")  # what the other models are compared with, as far as a run has them

# what building a model may read of the config; every stage that builds one declares it
MODEL_SETTINGS = ("model", "scheme", "adapters")


def stages_up_to(stage: str) -> list[str]:
    """Return the training stages that run up to `stage`, with it, in their order."""
    return list(TRAINING_STAGES[: TRAINING_STAGES.index(stage) + 1])


@dataclass
class ModelSource:
    """How to build a model, and what it is made of."""

    make: Callable[[], CausalLM]
    """Builds the model, float32 on the CPU. Of the config it may read `MODEL_SETTINGS` only."""

    inputs: list[Path]
    """The stages or files that `make` reads; they decide, with those settings, when it has to be measured again."""

    full_precision: bool = False
    """Whether it is not quantized."""


@dataclass
class Models:
    """The models of a run: which there are, which one ships, and in which contexts its .pte is compared."""

    known: dict[str, ModelSource]
    shipped: str
    codes: str
    """The stage whose `model/` holds the integer codes of what ships."""

    context: int = GATE_CONTEXT
    """Tokens in a short context of the gates (see `llamaq.export.gates.pte_gates`)."""

    def wanted(self, c: Config) -> list[str]:
        """Return the names of what is to be measured, those of files with `.pte`."""
        return wanted_models(c, list(self.known), self.shipped)

    def to_export(self, c: Config) -> list[str]:
        """Return the names of the models that are to be measured as .pte files."""
        return [n.removesuffix(".pte") for n in self.wanted(c) if n.endswith(".pte")]

    def to_score(self, c: Config) -> list[str]:
        """Return the names of the models to score; the references are always among them."""
        wanted = self.wanted(c)
        return [n for n in self.known if n in wanted or n in REFERENCES]

    def inputs_of(self, names: list[str]) -> list[Path]:
        """Return what these models are made of, each path once."""
        return list(dict.fromkeys(path for name in names for path in self.known[name].inputs))


def wanted_models(c: Config, known: list[str], shipped: str) -> list[str]:
    """Return `evaluate.models`; by default all models and, as files, what ships and the BF16 model.

    Raises:
        UserError: a name that the run does not have.
    """
    names = c.evaluate.models or [*known, "bf16.pte", f"{shipped}.pte"]
    for name in names:
        if name.removesuffix(".pte") not in known:
            raise UserError(
                f"evaluate.models: no '{name}' in this run; it has {', '.join(known)}, each also as NAME.pte"
            )
    return names


def check_evaluation(c: Config, known: list[str], shipped: str) -> None:
    """Check the settings of the evaluation before anything is trained.

    Args:
        c: the run's settings.
        known: names of the models that the run will have.
        shipped: the one that will ship.

    Raises:
        UserError: a model or task that is unknown, or a file that is not there.
    """
    wanted_models(c, known, shipped)
    check_texts(c.evaluate)


def check_texts(e: EvaluateConfig) -> None:
    """Check that the tasks are known and the text is there.

    Raises:
        UserError: naming what is not.
    """
    if e.tasks:
        check_tasks(e.tasks, Path(e.tasks_dir) if e.tasks_dir else None)
    if e.perplexity_text and not Path(e.perplexity_text).is_file():
        raise UserError(f"evaluate.perplexity_text={e.perplexity_text}: no such file")
