"""A conversation with one model through its KV cache: what the cache holds is not read again."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llamaq.chat.transcript import Transcript, Turn
from llamaq.config import ChatConfig
from llamaq.data.tokenizer import text_of
from llamaq.errors import UserError

KEPT = 3 / 4  # of a full context that stays when old turns are dropped, so that it is not read again every turn
BROKEN = "\ufffd"  # what decodes from a part of a character


class Model(Protocol):
    """What a conversation needs of a model: `Pte` and `CachedModel` have it."""

    max_context_length: int
    max_tokens_per_call: int

    def step(self, tokens: list[int], position: int) -> Tensor:
        """Return the logits [vocab] after the last of `tokens`, which start at `position` of the KV cache."""
        ...


@dataclass
class Answer:
    """An answer, and how it came about."""

    began: float = field(default_factory=time.perf_counter)
    tokens: list[int] = field(default_factory=list)  # without the stop token
    first_token: float = 0.0  # seconds from the question to the first token
    seconds: float = 0.0  # to the last token, or to the stop token
    computed: int = 0  # tokens with the stop token
    dropped: int = 0  # old turns that had to make room
    ended: str = "length"  # stop, length, interrupted or full

    @property
    def tokens_per_second(self) -> float | None:
        """Return the speed after the first token; None if there is no further token."""
        return (self.computed - 1) / (self.seconds - self.first_token) if self.computed > 1 else None

    def count(self) -> None:
        """Take note of the time at which a token was computed."""
        self.computed += 1
        self.seconds = time.perf_counter() - self.began
        self.first_token = self.first_token or self.seconds


class Conversation:
    """Questions and answers of any number of turns.

    When the context is full, the oldest turns are dropped and the rest is read again, since every position changes.
    The system prompt stays.
    """

    def __init__(self, model: Model, tokenizer: Any, c: ChatConfig, chat: bool = True):
        """Begin a conversation.

        Args:
            model: answers.
            tokenizer: of the run.
            c: system prompt, lengths and sampling.
            chat: whether to use the chat template; without it the model continues a text.
        """
        self.model, self._tokenizer, self._c = model, tokenizer, c
        self._transcript = Transcript(tokenizer, chat, c.system)
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self._turns: list[Turn] = []
        self._prompt: list[int] = []  # everything up to the present answer
        self._read = 0  # how many of `tokens` the cache holds
        self._generator = torch.Generator().manual_seed(self._c.seed)
        self.answer = Answer()

    @property
    def tokens(self) -> list[int]:
        """Return the conversation so far: as it stands in the cache, and what is to be read next."""
        return [*self._prompt, *self._turns[-1].answer] if self._turns else []

    def ask(self, question: str, interrupted: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yield the answer in pieces of text as they come; `self.answer` tells the rest.

        Args:
            question: the user's turn, or text to continue.
            interrupted: asked before every token; the answer ends when it says so.

        Raises:
            UserError: the question alone does not fit the context. The conversation stays as it was.
        """
        self._begin(question)
        shown = ""
        for _ in self._generate(interrupted):
            text = text_of(self._tokenizer, self.answer.tokens)
            if not text.endswith(BROKEN):  # else the rest of the character comes with the next token
                yield text[len(shown) :]
                shown = text
        yield text_of(self._tokenizer, self.answer.tokens)[len(shown) :]

    def _begin(self, question: str) -> None:
        turn, room = Turn(question), self.model.max_context_length
        alone = len(self._transcript.prompt([turn]))
        if alone > room:
            raise UserError(
                f"this takes {alone} tokens with what the template and the system prompt add, and the context has "
                f"{room} (export.max_context_length): ask something shorter"
            )
        before = self.tokens
        self._turns.append(turn)
        self._write(before)
        self.answer = Answer()

    def _write(self, before: list[int]) -> None:
        """Work out the prompt of the turns; the cache stays good as far as it is what it was `before`."""
        self._prompt = self._transcript.prompt(self._turns)
        now = self.tokens
        same = next(
            (i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now))
        )
        self._read = min(self._read, same)

    def _generate(self, interrupted: Callable[[], bool]) -> Iterator[int]:
        answer = self.answer
        while len(answer.tokens) < self._c.max_new_tokens:
            logits = self._read_on(interrupted)
            if logits is None:
                return
            token = self._choose(logits)
            answer.count()
            if token in self._tokenizer.stop_tokens:
                answer.ended = "stop"
                return
            answer.tokens.append(token)
            self._turns[-1].answer.append(token)
            yield token

    def _read_on(self, interrupted: Callable[[], bool]) -> Tensor | None:
        """Read what the cache does not hold; return the logits after it, or None where the answer has to end."""
        if not self._make_room():
            self.answer.ended = "full"
            return None
        tokens, logits = self.tokens, None
        while self._read < len(tokens):
            if interrupted():
                self.answer.ended = "interrupted"
                return None
            part = tokens[self._read : self._read + self.model.max_tokens_per_call]
            logits = self.model.step(part, self._read)
            self._read += len(part)
        return logits

    def _make_room(self) -> bool:
        """Drop old turns if the context is full; tell whether the conversation fits then."""
        room = self.model.max_context_length
        if len(self.tokens) > room:
            while len(self._turns) > 1 and len(self.tokens) > room * KEPT:
                before = self.tokens
                del self._turns[0]
                self.answer.dropped += 1
                self._write(before)
        return len(self.tokens) <= room

    def _choose(self, logits: Tensor) -> int:
        if self._c.temperature == 0:
            return int(logits.argmax())
        p = (logits / self._c.temperature).softmax(-1)
        return int(torch.multinomial(p, 1, generator=self._generator))
