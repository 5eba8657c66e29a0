"""The `chat` section: which model to talk to, and how it answers."""

from dataclasses import dataclass

from llamaq.config.checks import at_least, at_most, not_negative


@dataclass
class ChatConfig:
    """Talking to a model of a finished run in the terminal (`tune run chat`). No stage reads it."""

    model: str | None = None
    """The model to talk to. Unset: the exported file, `export/model.pte`. Else a name as in `evaluate.models` (`bf16`,
    `qat`, `final`), the name of a method of the file (see `export.adapters`), or a path to a `.pte`. Where the run has
    a name's `.pte`, that is used."""

    compare: str | None = None
    """A second model that gets the same questions, named as in `model`. The answers are labelled."""

    system: str | None = None
    """A system prompt. It stays in front of the conversation when old turns are dropped. Unset: none."""

    once: str | None = None
    """A question. Its answer is printed to standard output, and nothing else is; then the command ends. `-` reads the
    question from standard input. Unset: talk in the terminal."""

    max_new_tokens: int = 256
    """Tokens of an answer, at most; 1 or more."""

    temperature: float = 0.0
    """0 or more. 0 takes the most likely token each time. Higher values sample: 1 from the model's own distribution,
    less from a sharper one."""

    seed: int = 0
    """Seed of sampling, 0 or more. The same questions after `/reset` get the same answers."""

    def check(self, name: str) -> None:
        """Check the bounds."""
        at_least(1, self, name, "max_new_tokens")
        not_negative(f"{name}.temperature", self.temperature)
        at_least(0, self, name, "seed")
        at_most(2**63 - 1, self, name, "seed")
