"""A conversation as the tokens that a model reads: answers stay as the model said them."""

import itertools
from dataclasses import dataclass, field
from typing import Any

from llamaq.data.tokenizer import prompt_tokens, text_of

Message = dict[str, Any]


@dataclass
class Turn:
    """A question, and the tokens of its answer without the one that ended it."""

    question: str
    answer: list[int] = field(default_factory=list)


class Transcript:
    """Turns a conversation into tokens, as the chat template does; without one, lines of text.

    The template renders text, and the tokens of an answer's text need not be those that the model chose. They are put
    in place of it where the template leaves answers alone, so that a KV cache that has read them stays of use. Some
    templates change earlier answers (Qwen3 removes what was thought); there the template's tokens hold.
    """

    def __init__(self, tokenizer: Any, chat: bool, system: str | None = None):
        """Take note of the form.

        Args:
            tokenizer: of the run.
            chat: whether to use the tokenizer's chat template.
            system: a system prompt, which stands before everything.
        """
        self._tokenizer, self._chat = tokenizer, chat
        self._before: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def prompt(self, turns: list[Turn]) -> list[int]:
        """Return the tokens of all turns up to where the answer to the last question begins."""
        if not self._chat:
            return self._lines(turns)
        tokens = self._tokenizer.prompt(self._messages(turns[:1]))
        for i in range(1, len(turns)):
            between = self._between(turns[: i + 1])
            if between is None:
                tokens = self._tokenizer.prompt(self._messages(turns[: i + 1]))
            else:
                tokens = [*tokens, *turns[i - 1].answer, *between]
        return tokens

    def _messages(self, turns: list[Turn], said: str | None = None) -> list[Message]:
        """Return the turns as messages, the last without its answer; with `said`, all answers are that."""
        messages = list(self._before)
        for i, turn in enumerate(turns):
            messages.append({"role": "user", "content": turn.question})
            if i < len(turns) - 1:
                text = text_of(self._tokenizer, turn.answer) if said is None else said
                messages.append({"role": "assistant", "content": text})
        return messages

    def _between(self, turns: list[Turn]) -> list[int] | None:
        """Return the tokens between the last answer and the next one; None if the template changes what was before."""
        before, now = (self._tokenizer.render(self._messages(t), opened=True) for t in (turns[:-1], turns))
        answer = text_of(self._tokenizer, turns[-2].answer).strip()
        if not now.startswith(before) or not now[len(before) :].lstrip().startswith(answer):
            return None
        # with an answer that is one plain letter, it is plain where the tokens behind it begin
        earlier = self._tokenizer.prompt(self._messages(turns[:-1], "x"))
        earlier += self._tokenizer.encode("x", add_bos=False, add_eos=False)
        whole = self._tokenizer.prompt(self._messages(turns, "x"))
        return whole[len(earlier) :] if whole[: len(earlier)] == earlier else None

    def _lines(self, turns: list[Turn]) -> list[int]:
        """Return plain text, with a line break between an answer and the next line."""
        tokens = prompt_tokens(self._tokenizer, turns[0].question, chat=False)
        for before, turn in itertools.pairwise(turns):
            line = [self._tokenizer.encode(text, add_bos=False, add_eos=False) for text in ("\n", turn.question)]
            tokens = [*tokens, *before.answer, *line[0], *line[1]]
        return tokens
