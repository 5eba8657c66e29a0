"""What a row means, by the dataset it is in: a conversation, a preference pair, or a text.

A `Form` is made of a dataset's section in the config. `read_chat`, `read_pair` and `read_text` turn a row into what is
tokenized. They raise `Problem` for a row that is wrong, which ends the run before it starts, and `Skip` for one that
is in order and teaches nothing. What a user should know about a row, but need not act on, goes into its notes.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from llamaq.config.components import Component, current_name
from llamaq.data.files import Problem, kind_of
from llamaq.data.messages import Message, check_order, read_messages, read_tools, unknown_keys, with_system
from llamaq.errors import UserError

Row = dict[str, Any]

# builder → what it reads, and its arguments (the others are those of `datasets.load_dataset`)
_SFT = ("train_on_input", "new_system_prompt", "packed")
BUILDERS = {
    "torchtune.datasets.chat_dataset": ("chat", (*_SFT, "conversation_column", "conversation_style")),
    "torchtune.datasets.instruct_dataset": ("instruct", (*_SFT, "column_map")),
    "torchtune.datasets.alpaca_dataset": ("alpaca", ("train_on_input", "packed", "column_map")),
    "torchtune.datasets.alpaca_cleaned_dataset": ("alpaca", ("train_on_input", "packed", "column_map")),
    "torchtune.datasets.preference_dataset": ("pairs", ("train_on_input", "new_system_prompt", "column_map")),
    "torchtune.datasets.text_completion_dataset": ("text", ("column", "add_eos", "packed", "split_across_pack")),
    "llamaq.data.text.text_preference_dataset": ("text_pairs", ("column_map",)),
    "llamaq.data.text.text_windows_dataset": ("windows", ()),
}
DEFAULT_SOURCES = {
    "torchtune.datasets.alpaca_dataset": "tatsu-lab/alpaca",
    "torchtune.datasets.alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
}
CONVERSATIONS = ("messages", "conversations")  # columns of conversations, if the one that the config names is not there
QUESTIONS = (("prompt", "completion"), ("prompt", "response"), ("input", "output"))  # columns of a question and answer
SCORES = (  # columns of the two answers' scores
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
)
# columns that would change what a row says if they were read; other columns (id, source, score) are passed over
MEANINGFUL = (
    *("instruction", "input", "context", "prompt", "question", "query", "history", "system_prompt", "functions"),
    *("documents", "image", "images", "audio", "videos", "reasoning", "thinking", "chosen", "rejected"),
)


class Skip(Exception):  # noqa: N818 (it is counted, not raised to anyone)
    """Says why a row teaches nothing."""


NO_MESSAGE = "have no message"
NO_ANSWER = "have no answer of an assistant"
EMPTY_ANSWER = "have an empty answer"
EQUAL = "have a chosen answer equal to the rejected one"
NO_TEXT = "have no text"


@dataclass(frozen=True)
class Form:
    """A dataset's arguments that say what its rows mean."""

    kind: str  # chat, instruct, alpaca, pairs, text, text_pairs or windows
    columns: dict[str, str] = field(default_factory=dict)
    train_on_input: bool = False
    new_system_prompt: str | None = None
    add_eos: bool = True
    packed: bool = False
    split_across_pack: bool = False

    @property
    def is_pairs(self) -> bool:
        return self.kind in ("pairs", "text_pairs")

    def column(self, name: str) -> str:
        return self.columns.get(name, name)


def form_of(component: Component, setting: str) -> Form | None:
    """Return the form of a dataset; None for a builder of the user's own, or one that llamaq does not read itself.

    Raises:
        UserError: an argument that cannot be.
    """
    name = current_name(component["_component_"])
    if name not in BUILDERS:
        return None
    kind, _ = BUILDERS[name]
    style = component.get("conversation_style", "openai")
    if style not in ("openai", "sharegpt"):
        raise UserError(f"{setting}.conversation_style={style}: choose openai or sharegpt")
    if kind == "pairs" and component.get("packed"):
        raise UserError(f"{setting}.packed=true: pairs are not packed; leave it out")
    columns = dict(component.get("column_map") or {})
    if kind == "chat":
        default = "messages" if style == "openai" else "conversations"
        columns["messages"] = component.get("conversation_column") or default
    if kind == "text":
        columns["text"] = component.get("column", "text")
    return Form(
        kind,
        columns,
        bool(component.get("train_on_input", kind == "alpaca")),  # as torchtune's
        component.get("new_system_prompt"),
        bool(component.get("add_eos", True)),
        bool(component.get("packed", False)),
        kind == "text" and bool(component.get("split_across_pack", True)),
    )


# --- conversations ---------------------------------------------------------------------------------------------------


def read_chat(row: Row, form: Form, notes: list[str]) -> tuple[list[Message], list[Any] | None]:
    """Return a row's messages in OpenAI's form, and the tools that the assistant may call.

    Raises:
        Problem: something in it is wrong.
        Skip: there is nothing to learn from it.
    """
    read = {"chat": _chat, "instruct": _instruct, "alpaca": _alpaca}[form.kind]
    messages, used = read(row, form, notes)
    tools = read_tools(row.get("tools"))
    messages = _with_system_of({k: v for k, v in row.items() if k not in used}, form, messages)
    _note_unused(row, used, notes)
    check_order(messages)
    check_answers(messages)
    if messages[-1]["role"] != "assistant":
        notes.append("end with a turn of the user or a tool, which teaches nothing")
    return messages, tools


def _with_system_of(row: Row, form: Form, messages: list[Message]) -> list[Message]:
    """Put the config's system prompt in front, or else that of the row's column."""
    if form.new_system_prompt is not None:
        return with_system(messages, form.new_system_prompt, replace=True)
    return with_system(messages, row["system"]) if isinstance(row.get("system"), str) else messages


def check_answers(messages: list[Message]) -> None:
    """Check that there is an answer, and that none to be learned is empty.

    Raises:
        Skip: there is none, or an empty one.
    """
    if not messages:
        raise Skip(NO_MESSAGE)
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise Skip(NO_ANSWER)
    if any("tool_calls" not in m and not m["content"].strip() and m.get("weight", 1) for m in answers):
        raise Skip(EMPTY_ANSWER)


def _chat(row: Row, form: Form, notes: list[str]) -> tuple[list[Message], tuple[str, ...]]:
    named = form.column("messages")
    column = next((c for c in (named, *CONVERSATIONS) if c in row), None)
    if column is not None:
        notes += [f"have messages with '{key}', which is not read" for key in sorted(unknown_keys(row[column]))]
        return read_messages(row[column], column), (column,)
    for question, answer in QUESTIONS[:2]:
        if question in row and answer in row:
            return _turns(row, question, answer), (question, answer)
    if "instruction" in row and "output" in row:
        ask = _string(row, "instruction")
        more = _string(row, "input") if row.get("input") is not None else ""
        asked = f"{ask}\n\n{more}" if more else ask
        return _question(asked, _string(row, "output")), ("instruction", "input", "output")
    raise Problem(_missing(row, named))


def _instruct(row: Row, form: Form, notes: list[str]) -> tuple[list[Message], tuple[str, ...]]:
    columns = [(form.column("input"), form.column("output")), *([] if form.columns else QUESTIONS)]
    found = next((pair for pair in columns if pair[0] in row and pair[1] in row), None)
    if found is None:
        raise Problem(_missing(row, next(c for c in columns[0] if c not in row)))
    if not form.columns and row.get("instruction"):
        raise Problem(
            " has an 'instruction' beside 'input', which would be left out; use torchtune.datasets.alpaca_dataset, or "
            "column_map to say which column is the input"
        )
    return _turns(row, *found), found


def _alpaca(row: Row, form: Form, notes: list[str]) -> tuple[list[Message], tuple[str, ...]]:
    from torchtune.data._messages import AlpacaToMessages

    names = tuple(form.column(c) for c in ("instruction", "input", "output"))
    for column in (names[0], names[2]):
        if column not in row:
            raise Problem(_missing(row, column))
    more = _string(row, names[1]) if row.get(names[1]) is not None else ""
    template = AlpacaToMessages().template["prompt_input" if more else "prompt_no_input"]
    asked = template.format(instruction=_string(row, names[0]), input=more)
    return _question(asked, _string(row, names[2])), names


def _turns(row: Row, question: str, answer: str) -> list[Message]:
    """Return the messages of a question and an answer, each a text or messages. Only the answer is learned."""
    if isinstance(row[question], str) and isinstance(row[answer], str):
        return _question(row[question], row[answer])
    asked = read_prompt(row[question], question)
    asked = [m | {"weight": 0} if m["role"] == "assistant" else m for m in asked]
    return asked + read_answer(row[answer], answer)


def _question(asked: str, answered: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def read_prompt(value: Any, column: str) -> list[Message]:
    """Return the messages of a prompt: a text is the user's."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else _list_or_text(value, column)


def read_answer(value: Any, column: str) -> list[Message]:
    """Return the messages of an answer: a text is the assistant's."""
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else _list_or_text(value, column)


def _list_or_text(value: Any, column: str) -> list[Message]:
    if isinstance(value, list):
        return read_messages(value, column)
    raise Problem(f": '{column}' is {kind_of(value)}, neither text nor a list of messages; write text in quotes")


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if column not in row:
        raise Problem(_missing(row, column))
    if not isinstance(value, str):
        raise Problem(f": '{column}' is {kind_of(value)}, not text; write it in quotes")
    return value


def _missing(row: Row, column: str) -> str:
    inside = [k for k, v in row.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    hint = f"; for the rows inside '{inside[0]}' set field={inside[0]}" if len(row) == 1 and inside else ""
    return f" has no '{column}' (it has {', '.join(row) or 'nothing'}){hint}"


def _note_unused(row: Row, used: tuple[str, ...], notes: list[str]) -> None:
    unread = [c for c, v in row.items() if c in MEANINGFUL and c not in used and v]
    notes += [f"have a column '{column}' that is not read" for column in unread]


# --- preference pairs ------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Two conversations that differ in what the assistant says last."""

    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] | None = None


def read_pair(row: Row, form: Form, notes: list[str]) -> Pair:
    """Return the two conversations of a row, with its prompt in front.

    Raises:
        Problem: something in it is wrong.
        Skip: there is nothing to learn from it.
    """
    names = [form.column(side) for side in ("chosen", "rejected")]
    prompt = form.column("prompt")
    for name in names:
        if name not in row:
            raise Problem(_missing(row, name))
    check_scores(row)
    sides = [_with_prompt(row, prompt, name, notes) for name in names]
    sides = [_with_system_of(row, form, side) for side in sides]
    for name, side in zip(names, sides, strict=True):
        try:
            check_order(side)
        except Problem as e:
            raise Problem(f": '{name}'{str(e).replace(':', ',', 1)}") from None
        if side and side[-1]["role"] != "assistant":
            raise Problem(f": '{name}' does not end with an answer of the assistant")
    _note_unused(row, (*names, prompt), notes)
    for side in sides:
        check_answers(side)
    _check_same_prompt(*sides)
    return Pair(sides[0], sides[1], read_tools(row.get("tools")))


def _with_prompt(row: Row, prompt: str, name: str, notes: list[str]) -> list[Message]:
    """Return one side's conversation. A prompt that the conversation does not hold already is put in front of it."""
    said = read_answer(row[name], name)
    asked = read_prompt(row[prompt], prompt) if row.get(prompt) is not None else []
    if not asked and isinstance(row[name], str):
        raise Problem(f" has no '{prompt}', and '{name}' is only text; give the prompt in a column of its own")
    if said and said[0]["role"] != "assistant" and asked:
        systems_only = all(m["role"] == "system" for m in asked) and said[0]["role"] != "system"
        if systems_only:
            return asked + said
        if asked[-1] not in said:
            notes.append(f"have a '{prompt}' that is not read: '{name}' is a whole conversation and begins otherwise")
        return said
    if not asked and said and said[0]["role"] == "assistant":
        raise Problem(f" has no prompt: neither a '{prompt}' column nor a message of the user in '{name}'")
    return asked + said


def _check_same_prompt(chosen: list[Message], rejected: list[Message]) -> None:
    for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)):
        if a != b:
            if a["role"] == b["role"] == "assistant":
                return
            raise Problem(
                f": message {i + 1} of the {a['role']} differs between chosen and rejected; both have to answer the "
                "same prompt"
            )
    if len(chosen) != len(rejected):
        raise Problem(": one conversation goes on where the other ends; both have to answer the same prompt")
    raise Skip(EQUAL)


def check_scores(row: Row) -> None:
    """Check that the chosen answer does not have the lower score, where a row says what the scores are.

    It is refused and not only named, because such a row teaches the opposite of what it says.

    Raises:
        Problem: it has.
    """
    for chosen, rejected in SCORES:
        a, b = _score(row.get(chosen)), _score(row.get(rejected))
        if a is not None and b is not None and a < b:
            raise Problem(f": {chosen}={a} is below {rejected}={b}; are the answers swapped?")
    margin = _score(row.get("margin"))
    if margin is not None and margin < 0:
        raise Problem(f": margin={margin} says that the rejected answer is better; are the answers swapped?")


def _score(value: Any) -> float | None:
    """Return a score as it stands in the row; None for what is none, such as NaN."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and not math.isnan(value) else None


# --- plain text ------------------------------------------------------------------------------------------------------


def read_text(row: Row, form: Form) -> str:
    """Return the text of a row.

    Raises:
        Problem: there is no such column, or no text in it.
        Skip: the text is empty.
    """
    text = _string(row, form.column("text"))
    if not text.strip():
        raise Skip(NO_TEXT)
    return text


def read_text_pair(row: Row, form: Form) -> tuple[str, str, str]:
    """Return prompt, chosen and rejected answer, plain texts.

    Raises:
        Problem: one of them is missing or no text.
        Skip: there is nothing to learn from it.
    """
    check_scores(row)
    prompt, chosen, rejected = (_string(row, form.column(name)) for name in ("prompt", "chosen", "rejected"))
    if not chosen or not rejected:
        raise Skip(EMPTY_ANSWER)
    if chosen == rejected:
        raise Skip(EQUAL)
    return prompt, chosen, rejected
