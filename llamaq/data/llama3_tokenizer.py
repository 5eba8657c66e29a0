"""Llama 3's own tokenizer (Meta's tokenizer.model, read by torchtune), with Llama 3's chat template in two forms.

`torchtune` is what torchtune's `tokenize_messages` makes: the turns, and `<|end_of_text|>` behind the last. `meta` is
what Meta and Hugging Face's files make: a system turn with the model's cutoff and a date stands before everything, also
without a system message. Both write tools and tool calls as Meta does.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from llamaq.data.chat_template import DEFAULT_DATE, ChatTemplate, Message
from llamaq.data.chat_tokenizer import ChatTokenizer
from llamaq.errors import UserError

FORMS = {
    "torchtune": "Llama 3's chat template in torchtune's form, without a date",
    "meta": "Llama 3's chat template in Meta's form, with the date {}",
}
ENDS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")

_SYSTEM_IF_GIVEN = """\
{%- if messages[0].role == 'system' %}
    {{- turn('system') + messages[0].content | trim + '<|eot_id|>' }}
{%- endif %}
"""
_SYSTEM_WITH_DATE = """\
{%- set today = date_string if date_string is defined else strftime_now('%d %b %Y') %}
{{- turn('system') + ('Environment: ipython\\n' if tools else '') }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + today + '\\n\\n' }}
{{- (messages[0].content | trim if messages[0].role == 'system' else '') + '<|eot_id|>' }}
"""
_TEMPLATE = """\
{{- bos_token }}
SYSTEM
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- for message in rest %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- if message.tool_calls | length > 1 %}
            {{- raise_exception('Llama 3 makes one tool call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- turn('assistant') + '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
    {%- elif message.role in ('tool', 'ipython') %}
        {{- turn('ipython') + TOOL_RESULT }}
    {%- else %}
        {{- turn(message.role) }}
        {%- if loop.first and tools %}
            {{- 'Given the following functions, please respond with a JSON for a function call with its proper ' }}
            {{- 'arguments that best answers the given prompt.\\n\\nRespond in the format {"name": function name, ' }}
            {{- '"parameters": dictionary of argument name and its value}.Do not use variables.\\n\\n' }}
            {%- for tool in tools %}
                {{- tool | tojson(indent=4) + '\\n\\n' }}
            {%- endfor %}
        {%- endif %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- turn('assistant') }}
{%- endif %}
"""


def template_code(form: str) -> str:
    """Return the Jinja code of a form of Llama 3's chat template."""
    meta = form == "meta"
    code = _TEMPLATE.replace("SYSTEM\n", _SYSTEM_WITH_DATE if meta else _SYSTEM_IF_GIVEN)
    # Meta's form writes even plain text as JSON; torchtune writes every message as it is
    code = code.replace("TOOL_RESULT", "message.content | tojson" if meta else "message.content | trim")
    # written out, since not every program that reads templates knows macros
    return re.sub(r"turn\((.*?)\)", r"('<|start_header_id|>' + \1 + '<|end_header_id|>\\n\\n')", code)


class Llama3Tokenizer(ChatTokenizer):
    """torchtune's `Llama3Tokenizer` with conversations in OpenAI's form. What is not here is torchtune's."""

    def __init__(
        self, tokenizer: Any, path: str, form: str = "torchtune", date: str = DEFAULT_DATE, prompts: Any = None
    ):
        """Wrap a tokenizer.

        Args:
            tokenizer: torchtune's.
            path: its file.
            form: of the template, `torchtune` or `meta`.
            date: the day that Meta's form names, YYYY-MM-DD.
            prompts: the config's `prompt_template`, which torchtune made an object of.

        Raises:
            UserError: an unknown form, or no date.
        """
        if form not in FORMS:
            raise UserError(f"tokenizer.template={form}: choose {' or '.join(FORMS)}")
        self._theirs, self.max_seq_len = tokenizer, tokenizer.max_seq_len
        self.special_tokens, self.base_vocab_size = tokenizer.special_tokens, tokenizer.base_vocab_size
        self.bos_id, self.prefix_id = tokenizer.bos_id, tokenizer.bos_id
        self.eos_id, self.pad_id = tokenizer.eos_id, tokenizer.pad_id
        self.stop_tokens = list(tokenizer.stop_tokens)
        self._closing = (self.eos_id,) if form == "torchtune" else ()
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        special = {text: re.escape(text) for text in self.special_tokens}
        self.template = ChatTemplate(template_code(form), names, special, ends=ENDS, day=date)
        self.template_name = FORMS[form].format(date)
        parts = (Path(path).read_bytes(), repr(sorted(self.special_tokens.items())), form, date, repr(prompts))
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_theirs":  # pickle and copy ask for these before there is one
            raise AttributeError(name)
        return getattr(self._theirs, name)

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Return the ids of a text. Special tokens in it are text."""
        return self._theirs.encode(text, add_bos=add_bos, add_eos=add_eos)

    def decode(self, token_ids: list[int], truncate_at_eos: bool = True, skip_special_tokens: bool = True) -> str:
        """Return the text of ids, up to `<|end_of_text|>`."""
        return self._theirs.decode(token_ids, truncate_at_eos, skip_special_tokens)

    def _encode_text(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
        """Encode each part by itself: torchtune encodes a header's line breaks and the message after them so."""
        tokens, places = [], []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            try:
                found = self._theirs.encode(text[start:end], add_bos=False, add_eos=False)
            except UnicodeEncodeError as e:
                raise UserError(f"text with half a character, which cannot be written: {text[:60]!a}") from e
            tokens += found
            places += [start] * len(found)
        return tokens, places

    def _wrapped(self, messages: list[Message]) -> list[Message]:
        """Return the messages with the text that torchtune's `prompt_template` puts around them, if there is one."""
        if self._theirs.prompt_template is None:
            return messages
        from torchtune.data import Message as TorchtuneMessage

        given = [TorchtuneMessage(role=m["role"], content=m.get("content") or "") for m in messages]
        texts = ["".join(part["content"].strip() for part in m.content) for m in self._theirs.prompt_template(given)]
        return [m | {"content": text} for m, text in zip(messages, texts, strict=True)]
