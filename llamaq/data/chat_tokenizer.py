"""The part that all tokenizers share: conversations as token ids, and which of them are learned."""

from collections.abc import Mapping
from typing import Any

from llamaq.data.chat_template import ChatTemplate, Message
from llamaq.errors import UserError

NO_TEMPLATE = (
    "the tokenizer has no chat template; name one (tokenizer.chat_template=FILE.jinja), start from a chat model, or "
    "use data without turns and set export.chat=false"
)


class ChatTokenizer:
    """Turns conversations into token ids by a chat template.

    A subclass has these attributes, `encode(text, add_bos, add_eos)`, `decode(tokens)` and `_encode_text(text, cuts)`,
    the ids of a text in which no special token is recognised, and where each begins.
    """

    bos_id: int | None  # what `encode` puts in front of a text
    prefix_id: int  # what a text is read after when nothing else is in front of it
    eos_id: int
    pad_id: int
    stop_tokens: list[int]  # each ends an answer
    special_tokens: dict[str, int]
    base_vocab_size: int  # ids from here on are special tokens or nothing
    max_seq_len: int | None
    template: ChatTemplate | None
    template_name: str  # for a reader of the report
    fingerprint: str  # of all that decides ids
    _closing: tuple[int, ...] = ()  # ids behind a whole conversation

    def _encode_text(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
        raise NotImplementedError

    def _wrapped(self, messages: list[Message]) -> list[Message]:
        """Return the messages as the template shall see them."""
        return messages

    def chat(self, messages: list[Message], tools: list[Any] | None = None) -> tuple[list[int], list[bool]]:
        """Return the ids of a whole conversation, and for each whether it is learned. Nothing is cut off.

        What assistants say is learned, with the token that ends their turn; not the header before it, and not a message
        with `weight: 0`.

        Args:
            messages: in OpenAI's form: role, content, tool_calls, …
            tools: what the model may call, as JSON schemas.

        Raises:
            UserError: there is no template, or it cannot render the messages.
        """
        rendered = self._need_template().render(self._wrapped(messages), tools)
        tokens, learn = rendered.tokens(self.special_tokens, self._encode_text)
        return [*tokens, *self._closing], [*learn, *(False for _ in self._closing)]

    def prompt(self, messages: list[Message], tools: list[Any] | None = None) -> list[int]:
        """Return the ids of a conversation with the header of an assistant's turn at its end; see `chat`."""
        rendered = self._need_template().render(self._wrapped(messages), tools, opened=True)
        return rendered.tokens(self.special_tokens, self._encode_text)[0]

    def render(self, messages: list[Message], tools: list[Any] | None = None, opened: bool = False) -> str:
        """Return a conversation as text, in which special tokens are written out."""
        return self._need_template().render(self._wrapped(messages), tools, opened).text

    def _need_template(self) -> ChatTemplate:
        if self.template is None:
            raise UserError(NO_TEMPLATE)
        return self.template

    # --- as torchtune's datasets call a tokenizer --------------------------------------------------------------------

    def tokenize_messages(self, messages: list[Any]) -> tuple[list[int], list[bool]]:
        """Return ids and mask (True: not learned) of torchtune's messages, cut to `max_seq_len` as torchtune cuts."""
        given = [
            {"role": m.role, "content": m.text_content, "weight": int(m.role != "assistant" or not m.masked)}
            for m in messages
        ]
        tokens, learn = self.chat(given)
        if any(not m.masked for m in messages if m.role != "assistant"):  # train_on_input
            learn = [True] * len(tokens)
        if self.max_seq_len and len(tokens) > self.max_seq_len:
            kept = self.max_seq_len - len(self._closing)
            tokens, learn = [*tokens[:kept], *self._closing], [*learn[:kept], *(False for _ in self._closing)]
        return tokens, [not taught for taught in learn]

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Return the sample with `tokens` and `mask` in place of `messages`."""
        tokens, mask = self.tokenize_messages(sample["messages"])
        return {k: v for k, v in sample.items() if k != "messages"} | {"tokens": tokens, "mask": mask}
