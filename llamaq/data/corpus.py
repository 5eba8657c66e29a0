"""Corpora made on the spot, so that the chain runs end to end without a download.

`tiny_chat` writes a small chat corpus with structure to learn, preference pairs, and a tokenizer trained on it in
Llama 3's tiktoken format. `from_text` makes preference pairs of plain text (documents separated by form feeds). Both
are deterministic by seed, and write into the folder of the `corpus` stage.
"""

import base64
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchtune.models.llama3._tokenizer import CL100K_PATTERN, SPECIAL_TOKENS

from llamaq.errors import UserError

NUM_SPECIAL_TOKENS = 256
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_MONTHS = {"January": 31, "March": 31, "April": 30, "May": 31, "June": 30, "July": 31, "August": 31, "September": 30,
           "October": 31, "November": 30, "December": 31}  # fmt: skip
_SYLLABLES = "ba ce di fo gu ha jo ka le mi no pu ra se ti vo wa xe yo zu".split()  # noqa: SIM905
_CITIES = """
    Accra Athens Beijing Cairo Dublin Havana Lima Lisbon Madrid Nairobi Oslo Paris Rome Santiago Tokyo Vienna
    Warsaw
""".split()  # noqa: SIM905
_JOBS = """
    baker carpenter dentist farmer gardener judge miner nurse painter pilot sailor tailor teacher writer
""".split()  # noqa: SIM905
_PETS = "bee cat cow dog duck goat hen horse lion owl parrot pig rabbit snake turtle".split()  # noqa: SIM905
_COLORS = "black blue brown golden green grey orange pink purple red silver white yellow".split()  # noqa: SIM905
_FACTS = {  # what is asked about a person → (questions, answer, values)
    "city": (["Where does {} live?", "In which city is {} at home?"], "{} lives in {}.", _CITIES),
    "job": (["What does {} do for a living?", "What is the job of {}?"], "{} is a {}.", _JOBS),
    "pet": (["Which animal does {} keep?", "What pet has {}?"], "{} keeps a {}.", _PETS),
    "color": (["Which color does {} like best?", "What is the favorite color of {}?"], "{} likes {}.", _COLORS),
}


def _people(count: int, rng: random.Random) -> dict[str, dict[str, str]]:
    """Invented people and their facts: nothing but memory helps, which is what quantization noise hurts first."""
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.sample(_SYLLABLES, rng.choice([2, 3]))).capitalize()
        if name not in names:
            names.append(name)
    return {name: {kind: rng.choice(values) for kind, (_, _, values) in _FACTS.items()} for name in names}


def _question(rng: random.Random, people: dict[str, dict[str, str]]) -> tuple[str, str, str]:
    """A question, its right answer and a wrong one of the same form."""
    kind = rng.choice([*_FACTS, *_FACTS, "sum", "difference", "day", "month"])
    if kind in _FACTS:
        questions, answer, values = _FACTS[kind]
        name = rng.choice(list(people))
        wrong = rng.choice([v for v in values if v != people[name][kind]])
        return rng.choice(questions).format(name), answer.format(name, people[name][kind]), answer.format(name, wrong)
    if kind == "sum":
        a, b = rng.randrange(1, 30), rng.randrange(1, 30)
        ask = rng.choice(["What is {} plus {}?", "Add {} and {}.", "How much is {} + {}?"]).format(a, b)
        return ask, f"{a} plus {b} is {a + b}.", f"{a} plus {b} is {a + b + rng.choice([-2, -1, 1, 2, 10])}."
    if kind == "difference":
        b, a = sorted([rng.randrange(1, 50), rng.randrange(1, 50)])
        ask = rng.choice(["What is {} minus {}?", "Take {1} from {0}."]).format(a, b)
        return ask, f"{a} minus {b} is {a - b}.", f"{a} minus {b} is {a - b + rng.choice([1, 2, 10])}."
    if kind == "day":
        i, step = rng.randrange(7), rng.choice([1, -1, 2])
        words = {1: "comes after", -1: "comes before", 2: "is two days after"}[step]
        right, wrong = _DAYS[(i + step) % 7], _DAYS[(i + step + rng.randrange(1, 7)) % 7]
        return f"Which day {words} {_DAYS[i]}?", f"{right} {words} {_DAYS[i]}.", f"{wrong} {words} {_DAYS[i]}."
    month, days = rng.choice(list(_MONTHS.items()))
    return f"How many days has {month}?", f"{month} has {days} days.", f"{month} has {61 - days} days."


def tiny_chat(
    folder: Path, num_train: int = 6000, num_pairs: int = 800, num_heldout: int = 400, num_people: int = 150,
    vocab_size: int = 768, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Write train, pairs and heldout `.jsonl` (torchtune's chat and preference forms) and `tokenizer.model`.

    The questions are templates over arithmetic, dates and invented people; held-out conversations are other draws of
    the same questions, so they measure what was remembered.
    """
    people = _people(num_people, random.Random(f"{seed}-people"))
    streams = {name: random.Random(f"{seed}-{name}") for name in ("train", "pairs", "heldout")}

    def chat(name: str, count: int) -> list[dict[str, Any]]:
        rows = []
        for _ in range(count):
            turns = [_question(streams[name], people)[:2] for _ in range(streams[name].choice([1, 1, 2, 3]))]
            rows.append({"messages": [m for ask, answer in turns for m in (_user(ask), _assistant(answer))]})
        return rows

    train, heldout = chat("train", num_train), chat("heldout", num_heldout)
    pairs = []
    for _ in range(num_pairs):
        ask, right, wrong = _question(streams["pairs"], people)
        pairs.append({"chosen": [_user(ask), _assistant(right)], "rejected": [_user(ask), _assistant(wrong)]})
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "heldout.jsonl", heldout)
    write_jsonl(folder / "pairs.jsonl", pairs)
    texts = [m["content"] for row in train for m in row["messages"]] + ["user\n\n", "assistant\n\n"]
    train_tokenizer(folder, texts, vocab_size)
    return {"conversations": num_train, "pairs": num_pairs, "heldout_conversations": num_heldout}


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def train_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """A byte-pair encoding in Llama 3's form: `tokenizer.model` (base64 token and rank a line) and
    `special_tokens.json`, the 256 special tokens after the ranks, as torchtune's `special_tokens_path` takes them.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(CL100K_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    num_ranks = vocab_size - NUM_SPECIAL_TOKENS
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=num_ranks, initial_alphabet=alphabet, show_progress=False)
    )
    vocab = bpe.get_vocab()
    if len(vocab) != num_ranks:
        raise UserError(f"the corpus yields {len(vocab)} tokens, corpus.vocab_size={vocab_size} wants {num_ranks}")
    to_byte = _byte_of_character()
    ranked = sorted(vocab, key=vocab.__getitem__)
    lines = [
        f"{base64.b64encode(bytes(to_byte[c] for c in token)).decode()} {rank}\n" for rank, token in enumerate(ranked)
    ]
    (folder / "tokenizer.model").write_text("".join(lines))
    write_special_tokens(folder / "special_tokens.json", num_ranks)


def write_special_tokens(path: Path, first_id: int) -> None:
    """Llama 3's 256 special tokens in their order, from `first_id` on."""
    names = sorted(SPECIAL_TOKENS, key=lambda n: SPECIAL_TOKENS[n] if n != "<|image|>" else 128011)
    names += [f"<|reserved_special_token_{2 + i}|>" for i in range(NUM_SPECIAL_TOKENS - len(names))]
    tokens = [{"id": first_id + i, "content": name} for i, name in enumerate(names)]
    path.write_text(json.dumps({"added_tokens": tokens}, indent=0))


def _byte_of_character() -> dict[str, int]:
    """Inverse of GPT-2's byte-to-unicode table: printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def from_text(
    folder: Path, source: str, num_pairs: int = 1000, prompt_words: int = 60, answer_words: int = 30, seed: int = 0
) -> dict[str, Any]:
    """Write `pairs.jsonl` (prompt, chosen, rejected) from a text's documents.

    A pair's chosen answer is the true continuation of its prompt; the rejected one is that continuation with its words
    shuffled, or another document's.
    """
    rng = random.Random(seed)
    words = [w for w in (d.split(" ") for d in read_documents(source, "corpus.source")) if len(w) > 200]
    if len(words) < 2:
        raise UserError(f"corpus.source={source}: fewer than two documents of 200 words; nothing to make pairs of")

    def span(length: int) -> list[str]:
        document = rng.choice(words)
        start = rng.randrange(len(document) - length)
        return document[start : start + length]

    pairs = []
    for i in range(num_pairs):
        text = span(prompt_words + answer_words)
        prompt, answer = text[:prompt_words], text[prompt_words:]
        wrong = rng.sample(answer, len(answer)) if i % 2 else span(answer_words)
        pairs.append({"prompt": " ".join(prompt), "chosen": f" {' '.join(answer)}", "rejected": f" {' '.join(wrong)}"})
    write_jsonl(folder / "pairs.jsonl", pairs)
    return {"pairs": num_pairs}


def read_documents(path: str | Path, setting: str) -> list[str]:
    """Documents of a text file, separated by form feeds.

    Raises:
        UserError: no such file, or nothing in it.
    """
    if not Path(path).is_file():
        raise UserError(f"{setting}={path}: no such file")
    documents = [d.strip() for d in Path(path).read_text(encoding="utf-8").split("\f") if d.strip()]
    if not documents:
        raise UserError(f"{setting}={path}: no text in it")
    return documents


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_corpus(folder: Path, component: dict[str, Any]) -> dict[str, Any]:
    """Run the config's `corpus` component in `folder` (rank 0); returns what it says it wrote."""
    from llamaq.model.causal_lm import instantiate
    from llamaq.runs.run import from_rank_zero

    return from_rank_zero(lambda: instantiate(component, folder=folder, setting="corpus"))
