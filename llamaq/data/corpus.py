"""Make small corpora on the spot, so that the whole chain runs without a download.

`tiny_chat` writes conversations, preference pairs and a tokenizer trained on them. `from_text` makes preference pairs
from plain text. A config names one of them in its `corpus` section; it writes into the folder of the stage `corpus`.
The same seed gives the same bytes.
"""

import base64
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchtune.models.llama3._tokenizer import CL100K_PATTERN, SPECIAL_TOKENS

from llamaq.config.components import instantiate
from llamaq.data.text import read_documents
from llamaq.errors import UserError
from llamaq.runs.ranks import from_rank_zero

NUM_SPECIAL_TOKENS = 256

People = dict[str, dict[str, str]]  # name → kind of fact → value
Question = tuple[str, str, str]  # the question, its right answer, and a wrong answer of the same form


def _words(text: str) -> list[str]:
    return text.split()


# Each draw depends on the order of these words: a change here changes the corpus of every seed.
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
# without February, which has two right answers
_MONTHS = dict.fromkeys(_words("January March April May June July August September October November December"), 31)
_MONTHS |= dict.fromkeys(_words("April June September November"), 30)
_SYLLABLES = _words("ba ce di fo gu ha jo ka le mi no pu ra se ti vo wa xe yo zu")
_CITIES = _words(
    "Accra Athens Beijing Cairo Dublin Havana Lima Lisbon Madrid Nairobi Oslo Paris Rome Santiago Tokyo Vienna Warsaw"
)
_JOBS = _words("baker carpenter dentist farmer gardener judge miner nurse painter pilot sailor tailor teacher writer")
_PETS = _words("bee cat cow dog duck goat hen horse lion owl parrot pig rabbit snake turtle")
_COLORS = _words("black blue brown golden green grey orange pink purple red silver white yellow")
_FACTS = {  # kind of fact about a person → (questions, answer, possible values)
    "city": (["Where does {} live?", "In which city is {} at home?"], "{} lives in {}.", _CITIES),
    "job": (["What does {} do for a living?", "What is the job of {}?"], "{} is a {}.", _JOBS),
    "pet": (["Which animal does {} keep?", "What pet has {}?"], "{} keeps a {}.", _PETS),
    "color": (["Which color does {} like best?", "What is the favorite color of {}?"], "{} likes {}.", _COLORS),
}


# --- chats ------------------------------------------------------------------------------------------------------------


def tiny_chat(
    folder: Path,
    num_train: int = 6000,
    num_pairs: int = 800,
    num_heldout: int = 400,
    num_people: int = 150,
    vocab_size: int = 768,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a small chat corpus, preference pairs, and a tokenizer trained on the corpus.

    Questions are about arithmetic, dates and invented people. Held-out conversations are other draws of the same
    questions, so they measure what the model remembers.

    Args:
        folder: gets `train.jsonl` and `heldout.jsonl` (torchtune's chat form), `pairs.jsonl` (its preference form),
            `tokenizer.model` and `special_tokens.json`.
        num_train: conversations to train on.
        num_pairs: preference pairs.
        num_heldout: conversations to evaluate on.
        num_people: people whose facts the model has to remember. More are harder.
        vocab_size: tokens of the tokenizer, 256 special ones among them.
        seed: of all draws.

    Returns:
        the number of conversations and pairs.
    """
    people = _people(num_people, random.Random(f"{seed}-people"))
    streams = {name: random.Random(f"{seed}-{name}") for name in ("train", "pairs", "heldout")}
    train = _conversations(num_train, streams["train"], people)
    heldout = _conversations(num_heldout, streams["heldout"], people)
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


def _people(count: int, rng: random.Random) -> People:
    """Invent people and facts about them.

    Only memory helps to answer questions about them, and quantization noise hurts memory first.
    """
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.sample(_SYLLABLES, rng.choice([2, 3]))).capitalize()
        if name not in names:
            names.append(name)
    return {name: {kind: rng.choice(values) for kind, (_, _, values) in _FACTS.items()} for name in names}


def _conversations(count: int, rng: random.Random, people: People) -> list[dict[str, Any]]:
    rows = []
    for _ in range(count):
        turns = [_question(rng, people)[:2] for _ in range(rng.choice([1, 1, 2, 3]))]
        rows.append({"messages": [m for ask, answer in turns for m in (_user(ask), _assistant(answer))]})
    return rows


def _question(rng: random.Random, people: People) -> Question:
    kind = rng.choice([*_FACTS, *_FACTS, "sum", "difference", "day", "month"])  # two thirds are about people
    if kind in _FACTS:
        return _about_person(kind, rng, people)
    return {"sum": _sum, "difference": _difference, "day": _day, "month": _month}[kind](rng)


def _about_person(kind: str, rng: random.Random, people: People) -> Question:
    questions, answer, values = _FACTS[kind]
    name = rng.choice(list(people))
    wrong = rng.choice([v for v in values if v != people[name][kind]])
    return rng.choice(questions).format(name), answer.format(name, people[name][kind]), answer.format(name, wrong)


def _sum(rng: random.Random) -> Question:
    a, b = rng.randrange(1, 30), rng.randrange(1, 30)
    ask = rng.choice(["What is {} plus {}?", "Add {} and {}.", "How much is {} + {}?"]).format(a, b)
    return ask, f"{a} plus {b} is {a + b}.", f"{a} plus {b} is {a + b + rng.choice([-2, -1, 1, 2, 10])}."


def _difference(rng: random.Random) -> Question:
    b, a = sorted([rng.randrange(1, 50), rng.randrange(1, 50)])
    ask = rng.choice(["What is {} minus {}?", "Take {1} from {0}."]).format(a, b)
    return ask, f"{a} minus {b} is {a - b}.", f"{a} minus {b} is {a - b + rng.choice([1, 2, 10])}."


def _day(rng: random.Random) -> Question:
    i, step = rng.randrange(7), rng.choice([1, -1, 2])
    words = {1: "comes after", -1: "comes before", 2: "is two days after"}[step]
    right, wrong = _DAYS[(i + step) % 7], _DAYS[(i + step + rng.randrange(1, 7)) % 7]
    return f"Which day {words} {_DAYS[i]}?", f"{right} {words} {_DAYS[i]}.", f"{wrong} {words} {_DAYS[i]}."


def _month(rng: random.Random) -> Question:
    month, days = rng.choice(list(_MONTHS.items()))
    return f"How many days has {month}?", f"{month} has {days} days.", f"{month} has {61 - days} days."


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def train_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Train a byte-pair encoding and write it as Llama 3's tokenizers are stored.

    Writes `tokenizer.model`, with a line per token: base64 of its bytes, and its rank. Writes `special_tokens.json` for
    torchtune's `special_tokens_path`: the 256 special tokens, whose ids follow the ranks.

    Raises:
        UserError: the texts do not have enough different parts for a vocabulary of this size.
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
    """Write Llama 3's 256 special tokens in their order, with ids from `first_id` on."""
    # torchtune gives <|image|> the id 128256, after all others; in Llama 3's own order it is 128011
    names = sorted(SPECIAL_TOKENS, key=lambda n: SPECIAL_TOKENS[n] if n != "<|image|>" else 128011)
    names += [f"<|reserved_special_token_{2 + i}|>" for i in range(NUM_SPECIAL_TOKENS - len(names))]
    tokens = [{"id": first_id + i, "content": name} for i, name in enumerate(names)]
    path.write_text(json.dumps({"added_tokens": tokens}, indent=0))


def _byte_of_character() -> dict[str, int]:
    """Return the inverse of GPT-2's byte-to-unicode table.

    Printable bytes stand for themselves: "A" → 65. The others stand from U+0100 on: "Ā" → 0, and "Ġ" (U+0120) → 32, the
    space.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


# --- pairs from plain text --------------------------------------------------------------------------------------------


def from_text(
    folder: Path, source: str, num_pairs: int = 1000, prompt_words: int = 60, answer_words: int = 30, seed: int = 0
) -> dict[str, Any]:
    """Write preference pairs made from a text file, whose documents are separated by form feeds.

    The chosen answer is the true continuation of its prompt. The rejected answer is, in turns, words from elsewhere in
    the text, or the true continuation with its words shuffled.

    Args:
        folder: gets `pairs.jsonl` with the columns `prompt`, `chosen` and `rejected`.
        source: the text file.
        num_pairs: pairs to make.
        prompt_words: words of a prompt.
        answer_words: words of an answer.
        seed: of all draws.

    Raises:
        UserError: the file has fewer than two documents of more than 200 words.
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


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_corpus(folder: Path, component: dict[str, Any]) -> dict[str, Any]:
    """Run the config's `corpus` component on rank 0, with `folder` to write into; return what it returns."""
    return from_rank_zero(lambda: instantiate(component, folder=folder, setting="corpus"))
