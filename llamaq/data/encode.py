"""Rows → token ids, each with a mark that says whether it is learned; and counts of what was found on the way.

A token and its mark are one int32: the id itself if the token is learned, its complement (below 0) if it only leads to
what is. Samples are cut to `tokenizer.max_seq_len` as torchtune cuts them: the last token that is left becomes the end
of text, and is not learned.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from llamaq.data.files import Block, Problem, rows_of
from llamaq.data.forms import NO_TEXT, Form, Skip, read_chat, read_pair, read_text, read_text_pair
from llamaq.data.messages import Message
from llamaq.errors import UserError

Marked = np.ndarray  # int32 [tokens]: id, or ~id where nothing is learned

NO_ROOM = "have a prompt that leaves no room for an answer within tokenizer.max_seq_len"
NOT_LEARNED = "have no answer to be learned (weight 0)"
EQUAL_AFTER_CUT = "have answers that are equal as far as tokenizer.max_seq_len reaches"
TEMPLATE_TEXT = "hold a chat template's special tokens as text, which is trained on as ordinary text"
_OF_TEMPLATES = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>", "[INST]")
PROBLEMS_SHOWN = 3


@dataclass
class Encoded:
    """What came of a block of rows."""

    file: str
    read: int  # bytes of the file
    rows: int = 0
    samples: list[tuple[Marked, ...]] = field(default_factory=list)  # one sequence each, or two for a pair
    row_of: list[int] = field(default_factory=list)  # sample → row, counted from 0 in the block
    problems: int = 0
    shown: list[tuple[str, str]] = field(default_factory=list)  # place and problem of the first few
    skipped: dict[str, list[int]] = field(default_factory=dict)  # reason → rows
    notes: Counter = field(default_factory=Counter)
    cut: int = 0  # samples of which something to learn was cut off


class Encoder:
    """Turns the rows of one dataset into samples."""

    def __init__(self, form: Form, tokenizer: Any):
        self.form, self.tokenizer = form, tokenizer
        self.length = tokenizer.max_seq_len or None
        self._encode: Callable[[Any, list[str]], tuple[list[tuple[Marked, ...]], bool]] = {
            "pairs": self._pair,
            "text": self._text,
            "text_pairs": self._text_pair,
            "windows": self._windows,
        }.get(form.kind, self._chat)

    def block(self, block: Block) -> Encoded:
        """Encode the rows of a block."""
        done = Encoded(block.file, block.read)
        for place, row in rows_of(block):
            notes: list[str] = []
            try:
                if isinstance(row, Problem):
                    raise row
                samples, cut = self._encode(row, notes)
                done.samples += samples
                done.row_of += [done.rows] * len(samples)
                done.cut += cut
                done.notes.update(set(notes))
            except Skip as e:
                done.skipped.setdefault(str(e), []).append(done.rows)
            except (Problem, UserError) as e:
                done.problems += 1
                said = str(e) if isinstance(e, Problem) else f": {e}"
                done.shown += [(place, said)] * (len(done.shown) < PROBLEMS_SHOWN)
            done.rows += 1
        return done

    # --- by form -----------------------------------------------------------------------------------------------------

    def _chat(self, row: Any, notes: list[str]) -> tuple[list[tuple[Marked, ...]], bool]:
        messages, tools = read_chat(row, self.form, notes)
        self._note_template(messages, notes)
        marked, cut = self._conversation(messages, tools)
        return [(marked,)], cut

    def _pair(self, row: Any, notes: list[str]) -> tuple[list[tuple[Marked, ...]], bool]:
        pair = read_pair(row, self.form, notes)
        self._note_template(pair.chosen + pair.rejected, notes)
        (chosen, cut), (rejected, cut_too) = (self._conversation(m, pair.tools) for m in (pair.chosen, pair.rejected))
        return [_differing(chosen, rejected)], cut or cut_too

    def _text(self, row: Any, notes: list[str]) -> tuple[list[tuple[Marked, ...]], bool]:
        text = read_text(row, self.form)
        if self._template_text(text):
            notes.append(TEMPLATE_TEXT)
        tokens = self.tokenizer.encode(text, add_bos=True, add_eos=self.form.add_eos)
        kept = tokens if self.length is None else tokens[: self.length - 1]  # torchtune leaves one place free
        if len(kept) < 2:
            raise Skip(NO_TEXT)
        return [(_marked(kept),)], len(kept) < len(tokens)

    def _windows(self, row: Any, notes: list[str]) -> tuple[list[tuple[Marked, ...]], bool]:
        tokens = self.tokenizer.encode(row["text"], add_bos=True, add_eos=True)
        length = self.length or len(tokens)
        return [(_marked(tokens[i : i + length]),) for i in range(0, len(tokens) - 1, length)], False

    def _text_pair(self, row: Any, notes: list[str]) -> tuple[list[tuple[Marked, ...]], bool]:
        prompt, *answers = read_text_pair(row, self.form)
        before = self.tokenizer.encode(prompt, add_bos=True, add_eos=False)
        both = [self.tokenizer.encode(a, add_bos=False, add_eos=False) for a in answers]
        cut = self.length is not None and len(before) + max(map(len, both)) > self.length
        sides = []
        for answer in both:
            learn = [False] * len(before) + [True] * len(answer)
            sides.append(_marked((before + answer)[: self.length], learn[: self.length]))
            _check_room(sides[-1])
        return [_differing(*sides)], cut

    def _conversation(self, messages: list[Message], tools: list[Any] | None) -> tuple[Marked, bool]:
        """Return a conversation's tokens, cut, and whether something to learn was cut off.

        Raises:
            Skip: nothing is left to learn.
        """
        tokens, learn = self.tokenizer.chat(messages, tools)
        if self.form.train_on_input:
            learn = _whole_input(tokens, learn, self.tokenizer.bos_id)
        if not any(learn[1:]):
            raise Skip(NOT_LEARNED)
        if self.length is None or len(tokens) <= self.length:
            return _marked(tokens, learn), False
        cut = any(learn[self.length - 1 :])
        marked = _marked(tokens[: self.length], learn[: self.length])
        marked[-1] = ~self.tokenizer.eos_id
        _check_room(marked)
        return marked, cut

    # --- text that looks like a template -----------------------------------------------------------------------------

    def _note_template(self, messages: list[Message], notes: list[str]) -> None:
        if any(m["content"] and self._template_text(m["content"]) for m in messages):
            notes.append(TEMPLATE_TEXT)

    def _template_text(self, text: str) -> bool:
        return ("<" in text or "[" in text) and self._markers.search(text) is not None

    @cached_property
    def _markers(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(t) for t in {*self.tokenizer.special_tokens, *_OF_TEMPLATES}))


def _marked(tokens: list[int], learn: list[bool] | None = None) -> Marked:
    ids = np.array(tokens, dtype=np.int32)
    return ids if learn is None else np.where(learn, ids, ~ids)


def _check_room(marked: Marked) -> None:
    """Check that something is learned; the first token is no answer to anything."""
    if not (marked[1:] >= 0).any():
        raise Skip(NO_ROOM)


def _differing(chosen: Marked, rejected: Marked) -> tuple[Marked, Marked]:
    if np.array_equal(chosen, rejected):
        raise Skip(EQUAL_AFTER_CUT)
    return chosen, rejected


def _whole_input(tokens: list[int], learn: list[bool], bos_id: int | None) -> list[bool]:
    """Return marks that also learn the input: all up to the last token that is learned, but for what begins a text."""
    last = max((i for i, learned in enumerate(learn) if learned), default=-1)
    return [i <= last and not (i == 0 and token == bos_id) for i, token in enumerate(tokens)]
