"""Render conversations with a model's chat template, and know which of the text its assistants say.

A chat template is Jinja code that turns messages into text. It runs in jinja2's sandbox, set up as in transformers.
transformers itself is not used: importing it takes 3 to 8 seconds, neither torchtune nor ExecuTorch needs it (torch
needs jinja2), and it does not tell who said what in a template that does not say it. A test compares the ids with those
of its `apply_chat_template`.

Marks: characters that Unicode keeps for a program's own use (U+FDD0 and on) travel through the template. HIDDEN breaks
the text of special tokens in messages, so that what is whole afterwards was written by the template. OPEN and CLOSE
enclose what an assistant says. `{"role": "assistant", "content": "No <|im_end|>"}` becomes, with ␀ for HIDDEN and [ ]
for OPEN and CLOSE,

    <|im_start|>assistant⏎[No <␀|im_end|><|im_end|>]⏎
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

from llamaq.data.messages import Message
from llamaq.data.sandbox import CLOSE, OPEN, compile_template
from llamaq.errors import UserError

HIDDEN = "\ufdd0"
NO_TEXT = "[\ufdd0-\ufdef\ud800-\udfff]"  # noncharacters, and halves of a character
# Templates that name the day get this one unless a setting says another: what Llama's own template falls back to. It
# must not be today's, or a run would train on other tokens when it is resumed tomorrow.
DEFAULT_DATE = "2024-07-26"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which data has it; templates read the first


class Piece(NamedTuple):
    """A part of a rendered conversation."""

    start: int  # in the text
    text: str
    token: str | None  # the special token that the template wrote here; None for text


@dataclass
class Rendered:
    """A conversation as text."""

    pieces: list[Piece]
    spans: list[tuple[int, int]]  # what is to be learned: where it begins, and where it ends

    @property
    def text(self) -> str:
        """Return the whole text."""
        return "".join(piece.text for piece in self.pieces)

    def tokens(
        self, ids: dict[str, int], encode: Callable[[str, list[int]], tuple[list[int], list[int]]]
    ) -> tuple[list[int], list[bool]]:
        """Return token ids, and for each whether it is to be learned.

        A token that begins before a span is not learned: it holds a part of the header.

        Args:
            ids: of the special tokens.
            encode: text, and places in it where spans begin or end → ids of its tokens, and where each begins.
        """
        tokens: list[int] = []
        learn: list[bool] = []
        for start, text, token in self.pieces:
            if token is not None:
                tokens.append(ids[token])
                learn.append(self._learned(start))
                continue
            cuts = [at - start for span in self.spans for at in span if start < at < start + len(text)]
            found, places = encode(text, cuts)
            tokens += found
            learn += [self._learned(start + p) for p in places] if cuts else [self._learned(start)] * len(found)
        return tokens, learn

    def _learned(self, at: int) -> bool:
        return any(start <= at < end for start, end in self.spans)


class ChatTemplate:
    """A chat template, compiled."""

    def __init__(
        self,
        source: str | dict[str, str],
        variables: dict[str, str],
        special: dict[str, str],
        added: Iterable[str] = (),
        ends: Iterable[str] = (),
        day: str = DEFAULT_DATE,
    ):
        """Compile a template.

        Args:
            source: Jinja code, or such by name: `tool_use` is taken when there are tools, else `default`.
            variables: what the template may name, e.g. `bos_token`.
            special: text of the special tokens → pattern that finds it.
            added: text of all added tokens.
            ends: special tokens that end a turn, as far as they are known; the template's own is found.
            day: what the template is told the day is, YYYY-MM-DD.

        Raises:
            UserError: it is no Jinja code, or `day` is no day.
        """
        self.source = source if isinstance(source, dict) else {"default": source}
        try:
            self.day = date.fromisoformat(day)
        except (TypeError, ValueError) as e:
            raise UserError(f"tokenizer.date={day}: give a day as YYYY-MM-DD, e.g. {DEFAULT_DATE}") from e
        self._compiled = {name: compile_template(code, self.day) for name, code in self.source.items()}
        self._variables = variables
        longest_first = sorted(special, key=len, reverse=True)
        self._added = sorted({*special, *added}, key=len, reverse=True)
        self._in_messages = re.compile("|".join([*map(re.escape, longest_first), NO_TEXT]))
        self._marked = re.compile("|".join([*(special[t] for t in longest_first), f"[{HIDDEN}{OPEN}{CLOSE}]"]))
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.ends = {*ends, *filter(None, [self._end_of_turn()])}
        self._end = re.compile("|".join(map(re.escape, self.ends)) or r"(?!)")

    @property
    def uses_date(self) -> bool:
        """Tell whether the template asks for the day."""
        return any("strftime_now" in code for code in self.source.values())

    def render(self, messages: list[Message], tools: list[Any] | None = None, opened: bool = False) -> Rendered:
        """Render a conversation.

        Args:
            messages: in OpenAI's form.
            tools: what the model may call, as JSON schemas.
            opened: end with the header of an assistant's turn, for the model to go on.

        Raises:
            UserError: the template cannot render it; the message is named by its number, from 1.
        """
        # the template sees copies in which nothing but the template's own special tokens is whole
        plain = [self._hide(_plain(message, n), f"message {n}") for n, message in enumerate(messages, 1)]
        hidden = self._hide(tools, "tools")
        text = self._text(plain, hidden, opened)
        if opened:
            return self._parse(text.replace(OPEN, "").replace(CLOSE, ""), [])
        wanted = [m.get("weight", 1) != 0 for m in messages if m.get("role") == "assistant"]
        marked = self._mark(text, plain, hidden, len(wanted))
        if not all(wanted) and marked.count(OPEN) != len(wanted):
            raise UserError(
                "weight: the chat template has not one {% generation %} block for each answer, so none can be left out"
            )
        return self._parse(marked, wanted)

    # --- text --------------------------------------------------------------------------------------------------------

    def _text(self, messages: list[Message], tools: Any, opened: bool) -> str:
        """Run the template.

        Raises:
            UserError: it refuses the messages.
        """
        error = self._error(messages, tools, opened)
        if isinstance(error, str):
            return error
        for number in range(1, len(messages)):  # the message at fault is the first that makes the same error
            earlier = self._error(messages[:number], tools, opened)
            if isinstance(earlier, Exception) and str(earlier) == str(error):
                break
        else:
            number = len(messages)
        said = " ".join(str(error).split()).translate({ord(HIDDEN): None}) or type(error).__name__
        raise UserError(f"message {number}: the chat template cannot render it: {said[:300]}") from error

    def _error(self, messages: list[Message], tools: Any, opened: bool) -> str | Exception:
        """Return the text, or the error that the template ended with."""
        name = "tool_use" if tools and "tool_use" in self._compiled else "default"
        template = self._compiled.get(name) or next(iter(self._compiled.values()))
        try:
            return template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=opened, **self._variables
            )
        except Exception as e:  # whatever Python raises in the template's expressions, and its own raise_exception
            if (texts := _with_text_arguments(messages)) is not None:
                return self._error(texts, tools, opened)
            return e

    def _hide(self, value: Any, where: str) -> Any:
        """Break special tokens in all texts of a value: none is whole afterwards.

        Raises:
            UserError: half of a UTF-16 pair, which no text can have; `where` says in what.
        """
        if isinstance(value, str):
            try:
                return self._in_messages.sub(_broken, value)
            except UnicodeError as e:
                raise UserError(f"{where}: half a character ({e}): the file was not written as UTF-8") from e
        if isinstance(value, dict):
            return {self._hide(k, where): self._hide(v, where) for k, v in value.items()}
        return [self._hide(v, where) for v in value] if isinstance(value, (list, tuple)) else value

    # --- what assistants say -----------------------------------------------------------------------------------------

    def _mark(self, text: str, messages: list[Message], tools: Any, turns: int) -> str:
        """Put OPEN and CLOSE around what each assistant says and the token that ends its turn.

        A template with `{% generation %}` blocks says it itself. Else a turn is what follows the header that the
        template opens for an answer. A template without such a header is run again with marks in the messages.
        """
        if not turns:
            return text
        if OPEN in text:
            return self._with_ends(text)
        marked = self._mark_by_header(text, turns)
        return self._mark_by_content(text, messages, tools, turns) if marked is None else marked

    def _mark_by_header(self, text: str, turns: int) -> str | None:
        """Mark what follows the header; None if not every turn has it."""
        places: list[int] = []
        for header in self.headers:
            places = [match.start() for match in re.finditer(re.escape(header), text)]
            if len(places) == turns:
                break
        else:
            return None
        parts, last = [], 0
        for place, following in zip(places, [*places[1:], len(text)], strict=True):
            start = place + len(next(h for h in self.headers if text.startswith(h, place)))
            end = self._end.search(text, start, following)
            other = self._special.search(text, start, following)  # a template whose turns have no end of their own
            stop = end.end() if end else other.start() if other else following
            parts += [text[last:start], OPEN, text[start:stop], CLOSE]
            last = stop
        return "".join([*parts, text[last:]])

    def _mark_by_content(self, text: str, messages: list[Message], tools: Any, turns: int) -> str:
        """Mark what assistants say by marks in their messages: around all of it, or, if the template trims, inside.

        Raises:
            UserError: the template changes what it is given, so that nothing can be said of its text.
        """
        for inside in (False, True):
            marked = [_enclosed(m, inside) if m.get("role") == "assistant" else m for m in messages]
            found = self._error(marked, tools, False)
            same = isinstance(found, str) and found.replace(OPEN, "").replace(CLOSE, "") == text
            if isinstance(found, str) and same and found.count(OPEN) == found.count(CLOSE) == turns:
                return self._with_ends(found)
        raise UserError(
            "the chat template does not show which text its assistants say; put {% generation %} and "
            "{% endgeneration %} around it in the template (tokenizer.chat_template)"
        )

    def _with_ends(self, text: str) -> str:
        """Let each marked part include the token that ends the turn, if that follows."""
        return re.sub(f"{CLOSE}(\\s*(?:{self._end.pattern}))", rf"\1{CLOSE}", text)

    @cached_property
    def headers(self) -> list[str]:
        """Return what the template opens for an answer, and shorter beginnings of it, longest first.

        Some templates open more than a turn in a conversation has: `<think>` for a model that always thinks.
        """
        question = [{"role": "user", "content": "x"}]
        closed, opened = self._error(question, None, False), self._error(question, None, True)
        if isinstance(closed, Exception) or isinstance(opened, Exception) or not opened.startswith(closed):
            return []
        header = opened[len(closed) :].replace(OPEN, "").replace(CLOSE, "")
        ends = {len(header)}
        for token in self._added:
            ends |= {at for match in re.finditer(re.escape(token), header) for at in match.span()}
        # without a special token, a user's message could hold the header
        return [header[:end] for end in sorted(ends, reverse=True) if self._special.search(header[:end])]

    def _end_of_turn(self) -> str | None:
        """Return the special token that stands behind what an assistant says."""
        text = self._error([{"role": "user", "content": "x"}, {"role": "assistant", "content": HIDDEN}], None, False)
        if isinstance(text, Exception) or HIDDEN not in text:
            return None
        found = self._special.search(text, text.rindex(HIDDEN))
        return found[0] if found else None

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _parse(self, text: str, wanted: list[bool]) -> Rendered:
        """Split marked text into pieces, without the marks.

        Args:
            text: of the template.
            wanted: for each assistant's turn, whether to learn it.
        """
        rendered, begun, buffer = Rendered([], []), [], []
        at = last = turn = 0

        def flush() -> None:
            if joined := "".join(buffer):
                rendered.pieces.append(Piece(at - len(joined), joined, None))
            buffer.clear()

        for match in self._marked.finditer(text):
            buffer.append(text[last : match.start()])
            at, last = at + match.start() - last, match.end()
            if match[0] == OPEN:
                begun.append(at)
            elif match[0] == CLOSE:
                if turn >= len(wanted) or wanted[turn]:
                    rendered.spans.append((begun[-1], at))
                turn += 1
            elif match[0] != HIDDEN:
                flush()
                found = self._special.search(match[0])  # the pattern may take white space along
                rendered.pieces.append(Piece(at, match[0], found[0] if found else match[0]))
                at += len(match[0])
        buffer.append(text[last:])
        at += len(text) - last
        flush()
        return rendered


# --- messages ---------------------------------------------------------------------------------------------------------


def _plain(message: Any, number: int) -> Message:
    """Return a message as templates expect it: nothing that is null, and the arguments of tool calls as objects.

    OpenAI's form has arguments as text, which templates would write in quotes; servers such as vLLM parse them too.

    Raises:
        UserError: it is no message.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"message {number}: not an object with a 'role'")
    kept = {k: v for k, v in message.items() if v is not None and k != "weight"}
    reasoning = next((kept[k] for k in _REASONING if k in kept), None)
    if reasoning is not None:
        kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_with_arguments(call, _parsed) for call in kept["tool_calls"]]
    return kept


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    """Return a tool call with its arguments changed."""
    if not isinstance(call, dict):
        return call
    function = call.get("function", call)
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    changed = function | {"arguments": change(function["arguments"])}
    return call | {"function": changed} if "function" in call else changed


def _parsed(arguments: Any) -> Any:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _with_text_arguments(messages: list[Message]) -> list[Message] | None:
    """Return messages with tool calls' arguments as text, which some templates want; None if that changes nothing."""

    def as_text(arguments: Any) -> Any:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    changed = [
        m | {"tool_calls": [_with_arguments(call, as_text) for call in m["tool_calls"]]}
        if isinstance(m.get("tool_calls"), list)
        else m
        for m in messages
    ]
    return changed if changed != messages else None


def _broken(match: re.Match[str]) -> str:
    """Break a special token; a noncharacter, which Unicode keeps for programs' own use, becomes U+FFFD.

    Raises:
        UnicodeError: half a character.
    """
    if "\ud800" <= match[0] <= "\udfff":
        raise UnicodeError(ascii(match[0]))
    return "\ufffd" if "\ufdd0" <= match[0] <= "\ufdef" else match[0][0] + HIDDEN + match[0][1:]


def _enclosed(message: Message, inside: bool) -> Message:
    """Return a message with marks around its text, or around it without the white space at its ends."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    body = content.strip() if inside else content
    before = content[: len(content) - len(content.lstrip())] if inside else ""
    after = content[len(before) + len(body) :]
    return message | {"content": f"{before}{OPEN}{body}{CLOSE}{after}"}
