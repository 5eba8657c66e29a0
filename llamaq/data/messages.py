"""Conversations as rows hold them → messages in OpenAI's form, checked one by one.

A message is `{"role": …, "content": …}`, or ShareGPT's `{"from": …, "value": …}`. The names of roles differ between the
two and are understood only where they belong: `gpt` is an assistant as `from`, and a mistake as `role`.
"""

import json
from typing import Any

from llamaq.data.files import Problem, kind_of

Message = dict[str, Any]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
HINTS = {
    "human": "; 'human' is ShareGPT's and goes with 'from' and 'value'",
    "gpt": "; 'gpt' is ShareGPT's and goes with 'from' and 'value'",
    "ipython": "; write tool results as 'tool'",
    "function": "; write tool results as 'tool'",
    "model": "; write 'assistant'",
    "bot": "; write 'assistant'",
}
# what is kept of a message; `weight` 0 says that nothing is to be learned from it
PASSED_ON = ("tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
KNOWN = ("role", "content", "from", "value", "tool_calls", "weight", "train", "masked", "loss", *PASSED_ON)
HARMLESS = ("id", "ipython", "eot", "timestamp", "refusal", "annotations")


def read_messages(value: Any, column: str) -> list[Message]:
    """Return the messages of a conversation.

    Args:
        value: what the row holds: a list, or the JSON of one.
        column: its name, for errors.

    Raises:
        Problem: it is no list of messages.
    """
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise Problem(f": '{column}' is text that begins like a list of messages and is no valid JSON") from None
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        value = _transposed(value, column)
    if not isinstance(value, list):
        raise Problem(f": '{column}' is {kind_of(value)}, not a list of messages")
    return [_message(m, f": message {i + 1}") for i, m in enumerate(value)]


def _transposed(columns: dict[str, list[Any]], column: str) -> list[Any]:
    """Return messages of `{"role": [...], "content": [...]}`, as older versions of datasets store them."""
    if len({len(v) for v in columns.values()}) > 1:
        raise Problem(f": '{column}' holds lists of different lengths")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _message(m: Any, where: str) -> Message:
    if not isinstance(m, dict):
        raise Problem(f"{where} is {kind_of(m)}, not an object with role and content")
    m = {k: v for k, v in m.items() if v is not None or k == "content"}
    sharegpt = "from" in m and "role" not in m
    role = _role(m, "from" if sharegpt else "role", SHAREGPT_ROLES if sharegpt else ROLES, where)
    content = m.get("value" if sharegpt else "content")
    if sharegpt and m["from"] == "function_call":
        return {"role": role, "content": None, "tool_calls": [_call_in_text(content, where)]} | _weight(m, where)
    if m.get("function_call"):
        raise Problem(f"{where} has 'function_call', which tool_calls replaced; write it as tool_calls")
    made: Message = {"role": role, "content": None}
    if m.get("tool_calls"):
        if role != "assistant":
            raise Problem(f"{where} has tool_calls and is of the {role}; only assistants call tools")
        made["tool_calls"] = _tool_calls(m["tool_calls"], where)
    if content is not None or "tool_calls" not in made:
        made["content"] = _text(content, where, "value" if sharegpt else "content")
    return made | {k: m[k] for k in PASSED_ON if k in m} | _weight(m, where)


def _role(m: Message, key: str, known: dict[str, str], where: str) -> str:
    if key not in m:
        raise Problem(f"{where} has no role (it has {', '.join(m) or 'nothing'})")
    if m[key] not in known if isinstance(m[key], str) else True:
        names = ", ".join(known)
        raise Problem(f"{where} has the {key} {m[key]!r}; known: {names}{HINTS.get(str(m[key]), '')}")
    return known[m[key]]


def _text(content: Any, where: str, key: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise Problem(f"{where}: {key} is null; only an assistant that calls tools may say nothing")
    if not isinstance(content, list):
        raise Problem(f"{where}: {key} is {kind_of(content)}, not text; write it in quotes")
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else kind_of(part)
    text = part.get("text", part.get("content")) if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise Problem(f"{where} has a part of type {kind!r}; only text is trained on, so leave the row out")
    return text


def _weight(m: Message, where: str) -> Message:
    """Return `{"weight": 0}` for a message that is not to be learned, said in one of the ways in use."""
    weight = m.get("weight", 1)
    if weight not in (0, 1):
        raise Problem(f"{where} has the weight {weight!r}; 0 (do not learn it) and 1 are known")
    left_out = weight == 0 or m.get("train") is False or m.get("loss") is False or m.get("masked") is True
    return {"weight": 0} if left_out else {}


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise Problem(f"{where}: tool_calls is {kind_of(calls)}, not a list")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Check a call and return it in OpenAI's form, its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Problem(f"{where}: a tool call has no function with a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise Problem(f"{where}: the arguments of the tool call {function['name']} are no valid JSON") from None
    if not isinstance(arguments, dict):
        raise Problem(f"{where}: the arguments of the tool call {function['name']} are {kind_of(arguments)}")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _call_in_text(value: Any, where: str) -> dict[str, Any]:
    try:
        return _tool_call(json.loads(value), where)
    except (ValueError, TypeError):
        raise Problem(f"{where}: a function_call has to be the JSON of an object with name and arguments") from None


def read_tools(value: Any) -> list[Any] | None:
    """Return the tools that a row describes, a list or the JSON of one; None without any.

    Raises:
        Problem: it is something else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise Problem(": 'tools' is text and no valid JSON") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Problem(f": 'tools' is {kind_of(value)}, not a list of objects")
    return value


def check_order(messages: list[Message]) -> None:
    """Check whose turn it is: system first if at all, then user and assistant in turn, and tools after their call.

    Raises:
        Problem: naming the first message out of turn.
    """
    before = None
    for i, m in enumerate(messages):
        role, where = m["role"], f": message {i + 1}"
        if role == "system" and i > 0:
            raise Problem(f"{where} is of the system, which speaks once and first")
        if role == "user" and before is not None and before["role"] == "user":
            raise Problem(f"{where} is a second message of the user in a row; join the two")
        if role == "assistant" and (before is None or before["role"] not in ("user", "tool")):
            after = "comes first" if before is None else f"follows one of the {before['role']}"
            raise Problem(f"{where} is of the assistant and {after}; a message of the user has to come before it")
        calls_before = before is not None and ("tool_calls" in before or before["role"] == "tool")
        if role == "tool" and not calls_before:
            raise Problem(f"{where} is a tool's result, and the one before calls no tool")
        before = m


def with_system(messages: list[Message], system: str | None, replace: bool = False) -> list[Message]:
    """Return the messages with a system prompt in front.

    Raises:
        Problem: they have another one already, and it is not to be replaced.
    """
    if not system:
        return messages
    rest = [m for m in messages if m["role"] != "system"]
    if not replace and len(rest) < len(messages):
        if messages[0]["content"] == system:
            return messages
        raise Problem(": 'system' and the conversation's own system message differ; keep one")
    return [{"role": "system", "content": system}, *rest]


def unknown_keys(value: Any) -> set[str]:
    """Return the keys of messages that nothing reads and that may mean something."""
    messages = value if isinstance(value, list) else []
    return {k for m in messages if isinstance(m, dict) for k, v in m.items() if v and k not in (*KNOWN, *HARMLESS)}
