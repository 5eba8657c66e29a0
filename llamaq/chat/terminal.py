"""The terminal: questions in, answers out as they come, and the commands in between."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping

from llamaq.chat.conversation import Answer, Conversation
from llamaq.errors import UserError

HELP = """\
/reset    forget the conversation and start over
/help     show this
/quit     leave; so does Ctrl-D
Ctrl-C    stop an answer; what it said so far stays in the conversation"""
ENDED = {
    "length": "cut at chat.max_new_tokens",
    "interrupted": "stopped",
    "full": "the context is full (export.max_context_length)",
}


def talk(sides: Mapping[str, Conversation]) -> None:
    """Answer questions until the user leaves.

    Args:
        sides: label → conversation. With several, each question goes to all of them and the answers are labelled.
    """
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
    _say(f"{' and '.join(sides)}; /help lists the commands")
    while (line := _next_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/quit":
                return
            case "/help":
                print(HELP)
            case "/reset":
                for conversation in sides.values():
                    conversation.reset()
                _say("a new conversation")
            case word if word.startswith("/") and word[1:].isalpha():
                print(f"no command {word}; /help lists them")
            case _:
                _answer(sides, line)


def answer_once(sides: Mapping[str, Conversation], question: str) -> None:
    """Print the answer to one question and nothing else; several answers are labelled."""
    for label, conversation in sides.items():
        if len(sides) > 1:
            print(f"{label}: ", end="")
        for piece in conversation.ask(question):
            print(piece, end="", flush=True)
        print(flush=True)


def _next_line() -> str | None:
    """Read a line; None where the input ends."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:  # nothing is being answered
            print("\n/quit or Ctrl-D leaves")


def _answer(sides: Mapping[str, Conversation], question: str) -> None:
    for label, conversation in sides.items():
        if len(sides) > 1:
            print(f"{label}: ", end="")
        try:
            with until_interrupted() as interrupted:
                for piece in conversation.ask(question, interrupted):
                    print(piece, end="", flush=True)
        except UserError as e:
            print(f"error: {e}")
            continue
        print()
        _say(summary(conversation.answer, len(conversation.tokens), conversation.model.max_context_length))


@contextlib.contextmanager
def until_interrupted() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed in the block. A second Ctrl-C ends the program.

    An exception would do harm: it could come while the KV cache or standard error is half-way through a change.
    """
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def press(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def summary(answer: Answer, used: int, room: int) -> str:
    """Return a line on an answer: tokens, speed, how full the context is, and what the user should know."""
    parts = [f"{len(answer.tokens)} tokens"]
    if answer.computed:
        parts.append(f"first after {answer.first_token:.2f} s")
    if (speed := answer.tokens_per_second) is not None:
        parts.append(f"{speed:.1f} tokens/s")
    parts.append(f"context {min(used, room)}/{room}")
    if answer.dropped:
        parts.append(f"context was full: dropped the oldest {answer.dropped} turn{'s' if answer.dropped > 1 else ''}")
    return ", ".join([*parts, *([ENDED[answer.ended]] if answer.ended in ENDED else [])])


def _say(text: str) -> None:
    """Print a line about the conversation, dim in a terminal, in brackets so that it is told from an answer."""
    print(f"\033[2m[{text}]\033[0m" if sys.stdout.isatty() else f"[{text}]", flush=True)
