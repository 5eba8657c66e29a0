"""Present a model or a .pte to lm-evaluation-harness, and measure perplexity by its convention.

Models and files answer the same questions in the same tokens. A context begins as the tokenizer begins a text, once:
Llama's with <|begin_of_text|>, SmolLM2's and Qwen's with nothing. An empty context is one token, the tokenizer's bos
or, where it has none, its eos. What is too long is cut on the left.

Perplexity follows the harness. A document is read in windows of `max_length` tokens. The first window is read after the
token of an empty context, every other one after the last token of the window before. The last window reaches back so
that it is as long as the others, but every token is scored once. Token-level perplexity is exp(nll / tokens),
word-level perplexity exp(nll / words between white space), and bits per byte are nll / ln 2 / UTF-8 bytes.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llamaq.data.tokenizer import text_opening
from llamaq.errors import UserError
from llamaq.evaluate.readers import Pair, Reader
from llamaq.runs.tracking import progress

MAX_NEW_TOKENS = 256  # of an answer, where a task does not say


def harness_model(reader: Reader, tokenizer: Any) -> Any:
    """Return the reader as an `lm_eval.api.model.LM`, with the run's tokenizer."""
    from lm_eval.api.model import TemplateLM

    class HarnessModel(_HarnessMethods, TemplateLM):  # our methods first: they take the place of the abstract ones
        pass

    return HarnessModel(reader, tokenizer)


class _HarnessMethods:
    """The methods that the harness calls, apart from its own class, which is imported only when it is needed."""

    def __init__(self, reader: Reader, tokenizer: Any):
        super().__init__()
        self.reader, self.text_tokenizer = reader, tokenizer
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @property
    def tokenizer_name(self) -> str:
        return f"llamaq-{self.text_tokenizer.fingerprint[:16]}"

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.text_tokenizer.prefix_id

    @property
    def max_length(self) -> int:
        return self.reader.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenize a text in which special tokens are spelled out, as in a chat template's text."""
        tokenizer, tokens, at = self.text_tokenizer, [], 0
        for match in self._special.finditer(string):
            tokens += tokenizer.encode(string[at : match.start()], add_bos=False, add_eos=False)
            tokens.append(tokenizer.special_tokens[match[0]])
            at = match.end()
        tokens += tokenizer.encode(string[at:], add_bos=False, add_eos=False)
        opening = text_opening(tokenizer)
        return tokens if add_special_tokens is False or tokens[:1] == opening else opening + tokens

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return self.reader.loglikelihoods([self._fit(context, continuation) for _, context, continuation in requests])

    def _fit(self, context: list[int], continuation: list[int]) -> Pair:
        """Cut on the left; the last token is scored but not read, so one more than max_length tokens fit."""
        continuation = continuation[-self.max_length :]
        room = self.max_length + 1 - len(continuation)
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole document, read in windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, owner = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                pairs.append(make_disjoint_window(window))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owner, self.reader.loglikelihoods(pairs), strict=True):
            totals[i] += logprob
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return the greedy answer to each prompt.

        Raises:
            UserError: a task that samples.
        """
        with progress(requests, "answering", unit="request") as bar:
            return [self._answer(*request.args) for request in bar]

    def _answer(self, prompt: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") or settings.get("temperature", 0) > 0:
            raise UserError("evaluate.tasks: a task samples its answers; only greedy ones are supported")
        until = settings.get("until") or []
        limit = min(int(settings.get("max_gen_toks", MAX_NEW_TOKENS)), self.max_length - 1)
        context = self.tok_encode(prompt)[-(self.max_length - limit) :]
        return generate_text(
            self.reader, self.text_tokenizer, context, [until] if isinstance(until, str) else until, limit
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_text(self.text_tokenizer, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = self.text_tokenizer.template
        return next(iter(template.source.values())) if chat_template and template else None


def generate_text(reader: Reader, tokenizer: Any, context: list[int], until: list[str], limit: int) -> str:
    """Return the greedy text after a context, up to a stop token, one of the strings `until`, or `limit` tokens."""
    tokens: list[int] = []
    text = ""
    for token in reader.continuation(context):
        if token in tokenizer.stop_tokens:
            break
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if len(tokens) >= limit or any(stop in text for stop in until):
            break
    return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]


def chat_text(tokenizer: Any, history: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """Write turns in the chat template. The text ends with the start of an answer, or inside the last turn."""
    text = tokenizer.render(history, opened=add_generation_prompt)
    if add_generation_prompt:
        return text
    said = history[-1]["content"].strip()
    return text[: text.rindex(said) + len(said)]


# --- perplexity ------------------------------------------------------------------------------------------------------


def perplexity(reader: Reader, tokenizer: Any, documents: Sequence[str]) -> dict[str, float]:
    """Return perplexity by token and by word, and bits per byte; the top of this file states the convention."""
    model = harness_model(reader, tokenizer)
    nll = -sum(model.loglikelihood_rolling([SimpleNamespace(args=(document,)) for document in documents]))
    tokens = sum(len(model.tok_encode(d, add_special_tokens=False)) for d in documents)
    words, size = sum(len(d.split()) for d in documents), sum(len(d.encode()) for d in documents)
    return {
        "token_perplexity": math.exp(nll / tokens),
        "word_perplexity": math.exp(nll / words),
        "bits_per_byte": nll / math.log(2) / size,
        "tokens": tokens,
        "words": words,
    }


def text_perplexity(file: Path, reader: Reader, tokenizer: Any) -> dict[str, Any]:
    """Return the perplexity of a text file, in the form of a task's result; form feeds separate its documents."""
    documents = [d for d in file.read_text(encoding="utf-8").split("\f") if d.strip()]
    result = perplexity(reader, tokenizer, documents)
    names = ("token_perplexity", "word_perplexity", "bits_per_byte")
    return {"metrics": {n: {"value": result[n], "stderr": None} for n in names}, "samples": len(documents)}
