"""lm-evaluation-harness on our models and on .pte files, so that `evaluate.tasks=[mmlu,gsm8k]` runs the tasks it knows.

Both kinds answer the same questions in the same tokens: a context begins with <|begin_of_text|>, once; an empty
context is that token alone; what is too long is cut on the left. Perplexity follows the harness: a document is read in
windows of `max_length` tokens, the first after <|begin_of_text|>, each other after the last token of the one before;
the last one reaches back to be as long, but every token is scored once. Token-level perplexity is exp(nll / tokens),
word-level exp(nll / words between white space), and bits per byte nll / ln 2 / UTF-8 bytes.
"""

import contextlib
import difflib
import logging
import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llamaq.errors import UserError
from llamaq.export.pte import Pte
from llamaq.model.causal_lm import HEAD_CHUNK_TOKENS, CausalLM
from llamaq.runs.tracking import progress

Pair = tuple[list[int], list[int]]  # context, continuation; neither is empty
MAX_NEW_TOKENS = 256  # where a task does not say


class Reader(Protocol):
    """What the harness needs of a model."""

    max_length: int  # tokens a context and its continuation may have

    def loglikelihoods(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """Of each pair: log P(continuation | context) in nats, and whether it is the greedy continuation."""
        ...

    def continuation(self, context: list[int]) -> Iterator[int]:
        """Greedy tokens after a context, until whoever asks has enough."""
        ...


class EagerReader:
    """A model as llamaq computes it: batches of similar length, padded on the right, which causal attention ignores."""

    def __init__(self, model: CausalLM, max_length: int, batch_size: int):
        self.model, self.max_length, self.batch_size = model.eval(), max_length, batch_size
        self.device = next(t.device for t in [*model.parameters(), *model.buffers()])

    @cached_property
    def _head(self) -> Tensor:
        return self.model.head.quantized_weight()

    @torch.no_grad()
    def loglikelihoods(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))  # longest first: memory shows early
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with progress(range(0, len(order), self.batch_size), "reading", unit="batch") as bar:
            for start in bar:
                batch = order[start : start + self.batch_size]
                for i, result in zip(batch, self._batch([pairs[i] for i in batch]), strict=True):
                    results[i] = result
        return results

    def _batch(self, pairs: list[Pair]) -> Iterator[tuple[float, bool]]:
        inputs = [torch.tensor((context + continuation)[:-1]) for context, continuation in pairs]
        tokens = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(self.device)  # [b, s]
        hidden = self.model.hidden(tokens)
        for row, (context, continuation) in zip(hidden, pairs, strict=True):
            h = row[len(context) - 1 : len(context) + len(continuation) - 1]  # [n, dim]
            chunks = [self.model.head(part, self._head).float() for part in h.split(HEAD_CHUNK_TOKENS)]
            yield score(torch.cat(chunks), continuation)

    @torch.no_grad()
    def continuation(self, context: list[int]) -> Iterator[int]:
        """Without a KV cache: each token reads the whole text again."""
        tokens = list(context)
        while True:
            h = self.model.hidden(torch.tensor([tokens], device=self.device))[0, -1:]
            tokens.append(int(self.model.head(h, self._head).argmax()))
            yield tokens[-1]


class PteReader:
    """A .pte, one text at a time through its KV cache; what a text shares with the one before is not read again."""

    def __init__(self, pte: Pte):
        self.pte, self.max_length = pte, pte.max_context_length
        self._read: list[int] = []  # what the cache holds

    def logits(self, tokens: list[int], last: int) -> Tensor:
        """Logits [last, vocab] after each of the last tokens."""
        wanted = len(tokens) - last  # the first token whose logits are wanted
        start = 0
        while start < min(len(self._read), wanted) and self._read[start] == tokens[start]:
            start += 1
        self._read = self._read[:start]  # should the call fail, the cache is known to hold this much
        if self.pte.full_logits:
            limit = self.pte.max_tokens_per_call
            calls = [self.pte.rows(tokens[at : at + limit], at) for at in range(start, len(tokens), limit)]
            rows = torch.cat(calls)[-last:]
        else:
            first = self.pte.step(tokens[start : wanted + 1], start)
            rest = [self.pte.step([tokens[i]], i) for i in range(wanted + 1, len(tokens))]
            rows = torch.stack([first, *rest])
        self._read = list(tokens)
        return rows

    def loglikelihoods(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with progress(sorted(range(len(pairs)), key=lambda i: pairs[i]), "reading", unit="request") as bar:
            for i in bar:
                context, continuation = pairs[i]
                results[i] = score(self.logits((context + continuation)[:-1], len(continuation)), continuation)
        return results

    def continuation(self, context: list[int]) -> Iterator[int]:
        tokens = list(context)
        while True:
            tokens.append(int(self.logits(tokens, 1).argmax()))
            yield tokens[-1]


def score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Sum of log-probabilities of the tokens, and whether each is the likeliest, from logits [n, vocab]."""
    wanted = torch.tensor(continuation, device=logits.device)
    logprobs = logits.log_softmax(-1).gather(-1, wanted[:, None]).double().sum()
    return float(logprobs), bool((logits.argmax(-1) == wanted).all())


def harness_model(reader: Reader, tokenizer: Any) -> Any:
    """The reader as an `lm_eval.api.model.LM`, with torchtune's Llama 3 tokenizer."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    special = re.compile("|".join(re.escape(s) for s in tokenizer.special_tokens))

    class HarnessModel(TemplateLM):
        @property
        def tokenizer_name(self) -> str:
            return "llama3"

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.bos_id

        @property
        def max_length(self) -> int:
            return reader.max_length

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            tokens: list[int] = []
            at = 0
            for match in special.finditer(string):  # a chat template's text names special tokens
                tokens += tokenizer.encode(string[at : match.start()], add_bos=False, add_eos=False)
                tokens.append(tokenizer.special_tokens[match[0]])
                at = match.end()
            tokens += tokenizer.encode(string[at:], add_bos=False, add_eos=False)
            bos = add_special_tokens is not False and tokens[:1] != [tokenizer.bos_id]
            return [tokenizer.bos_id, *tokens] if bos else tokens

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return reader.loglikelihoods([self._fit(context, continuation) for _, context, continuation in requests])

        def _fit(self, context: list[int], continuation: list[int]) -> Pair:
            """Cut on the left; the last token is not read, so one more than max_length may be scored."""
            continuation = continuation[-reader.max_length :]
            room = reader.max_length + 1 - len(continuation)
            return context[-room:], continuation

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            pairs, owner = [], []
            for i, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0], add_special_tokens=False)
                for window in get_rolling_token_windows(tokens, tokenizer.bos_id, reader.max_length, 1):
                    pairs.append(make_disjoint_window(window))
                    owner.append(i)
            totals = [0.0] * len(requests)
            for i, (logprob, _) in zip(owner, reader.loglikelihoods(pairs), strict=True):
                totals[i] += logprob
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            texts = []
            with progress(requests, "answering", unit="request") as bar:
                for request in bar:
                    prompt, settings = request.args
                    if settings.get("do_sample") or settings.get("temperature", 0) > 0:
                        raise UserError("evaluate.tasks: a task samples its answers; only greedy ones are supported")
                    until = settings.get("until") or []
                    limit = min(int(settings.get("max_gen_toks", MAX_NEW_TOKENS)), reader.max_length - 1)
                    context = self.tok_encode(prompt)[-(reader.max_length - limit) :]
                    until = [until] if isinstance(until, str) else until
                    texts.append(answer(reader, tokenizer, context, until, limit))
            return texts

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return chat_text(chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return "Llama 3" if chat_template else None

    return HarnessModel()


def answer(reader: Reader, tokenizer: Any, context: list[int], until: list[str], limit: int) -> str:
    """Greedy text after a context: up to a stop token, to one of the strings `until`, or to `limit` tokens."""
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


def chat_text(history: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """Turns in Llama 3's chat template; at the end the assistant's next one begun, or else the last one left open."""
    turns = [f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>" for m in history]
    if not add_generation_prompt:
        turns[-1] = turns[-1].removesuffix("<|eot_id|>")
    opening = "<|start_header_id|>assistant<|end_header_id|>\n\n" if add_generation_prompt else ""
    return "<|begin_of_text|>" + "".join(turns) + opening


def perplexity(reader: Reader, tokenizer: Any, documents: Sequence[str]) -> dict[str, float]:
    """Perplexity by token and by word, and bits per byte; the convention stands at the top of this file."""
    model = harness_model(reader, tokenizer)
    requests = [type("Request", (), {"args": (document,)})() for document in documents]
    nll = -sum(model.loglikelihood_rolling(requests))
    tokens = sum(len(model.tok_encode(d, add_special_tokens=False)) for d in documents)
    words, size = sum(len(d.split()) for d in documents), sum(len(d.encode()) for d in documents)
    return {
        "token_perplexity": math.exp(nll / tokens),
        "word_perplexity": math.exp(nll / words),
        "bits_per_byte": nll / math.log(2) / size,
        "tokens": tokens,
        "words": words,
    }


# --- tasks -----------------------------------------------------------------------------------------------------------


def check_tasks(names: list[str], folder: Path | None) -> Any:
    """The harness's task manager, which knows all of `names`.

    Raises:
        UserError: the harness is not installed, there is no such folder, or no such task.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"evaluate.tasks_dir={folder} is not a folder of task files")
    with quietly():
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as e:
            raise UserError("evaluate.tasks needs lm-evaluation-harness: pip install 'llamaq[eval]'") from e
        manager = TaskManager(include_path=str(folder) if folder else None)
    known = manager.all_tasks
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"lm-evaluation-harness knows {len(known)}"
            raise UserError(f"evaluate.tasks: no task '{name}'; {hint} Your own go into evaluate.tasks_dir")
    return manager


def run_tasks(
    model: Any, names: list[str], folder: Path | None, limit: int | None = None, num_fewshot: int | None = None,
    seed: int = 0, chat: bool = False,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run tasks, or groups of them, on a `harness_model`.

    Args:
        model: of `harness_model`.
        names: of tasks or groups.
        folder: with further task files (YAML), or None.
        limit: questions of a task at the most.
        num_fewshot: None for the task's own.
        seed: draws the few-shot examples.
        chat: ask in Llama 3's chat template.

    Returns:
        Task or group → metrics {name: {value, stderr}}, num_fewshot, samples, version, lm_eval (its version).

    Raises:
        UserError: unknown tasks, or data that is neither here nor to be had.
    """
    manager = check_tasks(names, folder)
    import lm_eval

    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its signature
    try:
        with quietly():
            result = evaluate(
                model, tasks=manager.match_tasks(names), task_manager=manager, limit=limit, num_fewshot=num_fewshot,
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
                apply_chat_template=chat, log_samples=False,
            )  # fmt: skip
    except OSError as e:
        raise UserError(
            f"evaluate.tasks={','.join(names)}: the data of a task is not here and could not be fetched "
            f"({' '.join(str(e).split())[:200]}); fetch it where there is a network, or name task files with local "
            "data_files in evaluate.tasks_dir"
        ) from e
    return {task: _task_result(result, task, values, lm_eval.__version__) for task, values in result["results"].items()}


def _task_result(result: Any, task: str, values: dict[str, Any], version: str) -> dict[str, Any]:
    metrics = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{name}_stderr,{filtered}")
        metrics[name if filtered == "none" else f"{name} ({filtered})"] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        }
    counts = result.get("n-samples", {}).get(task, {})
    parts = result.get("group_subtasks", {}).get(task) or []
    samples = counts.get("effective") or sum(result["n-samples"].get(p, {}).get("effective", 0) for p in parts)
    return {
        "metrics": metrics, "num_fewshot": result.get("n-shot", {}).get(task), "samples": samples,
        "version": result.get("versions", {}).get(task), "lm_eval": version,
    }  # fmt: skip


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The harness logs every task it sets up."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
