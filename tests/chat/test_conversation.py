"""Conversations: tokens piece by piece, the KV cache, a full context, and answers as they stream."""

import pytest
import torch
from conftest import MODEL, random_weights, saved_variant, trained_like
from hf_folder import write_folder

from llamaq.chat.conversation import Conversation
from llamaq.chat.eager import CachedModel
from llamaq.chat.transcript import Transcript, Turn
from llamaq.config import ChatConfig
from llamaq.data.corpus import tiny_chat
from llamaq.data.tokenizer import build_tokenizer, prompt_tokens
from llamaq.errors import UserError
from llamaq.model.build import build_model
from llamaq.quant.scheme import Scheme

TALK = [
    ("How many days has June?", "June has 30 days."),
    ("  And naïve 日本語 😀?\n\nTwo lines.  ", "Yes."),
    ("", "You said nothing."),
    ("a" * 400, "That is long."),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    tiny_chat(folder, num_train=40, num_pairs=2, num_heldout=2, num_people=60, vocab_size=640)
    files = {"path": f"{folder}/tokenizer.model", "special_tokens_path": f"{folder}/special_tokens.json"}
    component = {"_component_": "torchtune.models.llama3.llama3_tokenizer", **files, "max_seq_len": 96}
    return build_tokenizer(component, MODEL["vocab_size"])


CONTEXT = 96  # tokens


@pytest.fixture
def model():
    return CachedModel(trained_like(Scheme()), CONTEXT)


class Counting:
    """A model that notes which positions it has read."""

    def __init__(self, model):
        self.model, self.read = model, []
        self.max_context_length, self.max_tokens_per_call = model.max_context_length, 16

    def step(self, tokens, position):
        self.read += range(position, position + len(tokens))
        return self.model.step(tokens, position)


class Scripted:
    """Stands for a model that says certain tokens, one after each call, from the first again when it has said all."""

    max_context_length, max_tokens_per_call = 256, 256

    def __init__(self, tokens):
        self.tokens, self.said = tokens, 0

    def step(self, tokens, position):
        logits = torch.zeros(MODEL["vocab_size"])
        logits[self.tokens[self.said % len(self.tokens)]] = 1
        self.said += 1
        return logits


def ask(conversation: Conversation, question: str) -> str:
    return "".join(conversation.ask(question))


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_a_transcript_is_the_tokens_of_the_whole_conversation(tokenizer, system):
    transcript, turns, messages = Transcript(tokenizer, True, system), [], []
    if system:
        messages.append({"role": "system", "content": system})
    for question, answer in TALK:
        turns.append(Turn(question))
        messages.append({"role": "user", "content": question})
        tokens = transcript.prompt(turns)
        assert tokens == tokenizer.prompt(messages)
        turns[-1].answer = tokenizer.encode(answer, add_bos=False, add_eos=False)
        messages.append({"role": "assistant", "content": answer})
        whole, learn = tokenizer.chat(messages)
        assert whole == [*tokens, *turns[-1].answer, tokenizer.eot_id, tokenizer.eos_id]
        assert not any(learn[-len(whole) : len(tokens)][-5:]) and learn[len(tokens)]


def test_an_answer_stays_in_the_tokens_that_the_model_chose(tokenizer):
    odd = [tokenizer.encode(c, add_bos=False, add_eos=False)[0] for c in "June has"]  # not how the text is tokenized
    assert odd != tokenizer.encode("June has", add_bos=False, add_eos=False)
    turns = [Turn("Who?", odd), Turn("And?", [tokenizer.special_tokens["<|python_tag|>"], *odd]), Turn("So?")]
    tokens = Transcript(tokenizer, True).prompt(turns)
    first = tokenizer.prompt([{"role": "user", "content": "Who?"}])
    assert tokens[: len(first) + len(odd) + 1] == [*first, *odd, tokenizer.eot_id]
    assert [tokenizer.special_tokens["<|python_tag|>"], *odd, tokenizer.eot_id] == tokens[-len(first) - len(odd) - 1 :][
        : len(odd) + 2
    ]


@pytest.mark.parametrize("kind", ["smol", "dated", "thinking"])
def test_a_transcript_follows_any_template(tmp_path, kind):
    t = build_tokenizer(write_folder(tmp_path, kind), 400)
    said = ["Rome.", " It is. ", "<think>\nhm\n</think>\n\nJune." if kind == "thinking" else "June."]
    turns, messages = [], [{"role": "system", "content": "Be brief."}]
    for question, answer in zip(["Where?", "Sure?", "When?"], said, strict=True):
        turns.append(Turn(question))
        messages.append({"role": "user", "content": question})
        if answer != said[2]:
            turns[-1].answer = t.encode(answer, add_bos=False, add_eos=False)
            messages.append({"role": "assistant", "content": answer})
    text = t.decode(Transcript(t, True, "Be brief.").prompt(turns), False, False)
    # a template that trims takes the white space off an answer, which stays as the model said it
    assert "".join(text.split()) == "".join(t.render(messages, opened=True).split())
    turns[2].answer = t.encode(said[2], add_bos=False, add_eos=False)
    messages += [{"role": "assistant", "content": said[2]}, {"role": "user", "content": "And?"}]
    tokens = Transcript(t, True, "Be brief.").prompt([*turns, Turn("And?")])
    if kind == "thinking":  # what was thought is gone, and everything is read as the template writes it
        assert tokens == t.prompt(messages) and "hm" not in t.decode(tokens, False, False)
    else:
        assert turns[1].answer in [tokens[i : i + len(turns[1].answer)] for i in range(len(tokens))]


def test_a_prompt_is_that_of_training_and_a_long_one_is_not_cut(tokenizer):
    from torchtune.data import Message

    messages = [Message(role="user", content="Who?"), Message(role="assistant", content="30.")]
    trained = tokenizer.tokenize_messages(messages)[0]
    prompt = prompt_tokens(tokenizer, "Who?", chat=True)
    assert trained == [
        *prompt,
        *tokenizer.encode("30.", add_bos=False, add_eos=False),
        tokenizer.eot_id,
        tokenizer.eos_id,
    ]
    assert prompt_tokens(tokenizer, "Who?", chat=False) == tokenizer.encode("Who?", add_bos=True, add_eos=False)
    long = prompt_tokens(tokenizer, "Who? " * 60, chat=True)
    assert len(long) > tokenizer.max_seq_len and long[-5:] == prompt[-5:]  # ends where the answer begins


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bf16", "latent", "frozen", "rotated"])
def test_the_cached_model_computes_what_the_model_computes(tmp_path, kind):
    make = {
        "bf16": lambda: build_model(MODEL, random_weights(), None).eval(),
        "latent": lambda: trained_like(Scheme()),
        "frozen": lambda: trained_like(Scheme(), frozen=True),
        "rotated": lambda: saved_variant(tmp_path, "spinquant"),
    }[kind]
    model, tokens = make(), torch.randint(0, 768, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0]
    cached, tolerance = CachedModel(model, max_context_length=40), 1e-5 if kind == "bf16" else 2e-2  # int8 borders
    for start, end in ((0, 7), (7, 8), (8, 40), (5, 20), (20, 33)):  # forward in uneven steps, then back and on
        torch.testing.assert_close(cached.step(tokens[start:end], start), expected[end - 1], rtol=0, atol=tolerance)
        assert cached.step(tokens[start:end], start).argmax() == expected[end - 1].argmax()


def test_two_turns_through_the_cache_equal_a_fresh_read_and_nothing_is_read_twice(tokenizer, model):
    counting = Counting(model)
    conversation = Conversation(counting, tokenizer, ChatConfig(max_new_tokens=9, system="Be brief."))
    ask(conversation, "How many days has June?")
    between = len(counting.read)
    ask(conversation, "And May?")
    assert counting.read == list(range(len(counting.read))), "every position once, in order"
    assert len(conversation.tokens) - 1 <= len(counting.read) <= len(conversation.tokens)
    assert len(counting.read) > between > 20
    tokens = conversation.tokens
    answer = conversation.answer.tokens
    assert len(answer) == 9
    for i in range(9):  # each token of the second answer, from the whole conversation read anew
        at = len(tokens) - 9 + i
        assert int(model.step(tokens[:at], 0).argmax()) == answer[i]


def test_greedy_is_what_the_model_prefers_and_seeds_repeat_samples(tokenizer, model):
    greedy = Conversation(model, tokenizer, ChatConfig(max_new_tokens=12))
    assert ask(greedy, "Who?") == ask(Conversation(model, tokenizer, ChatConfig(max_new_tokens=12)), "Who?")
    settings = ChatConfig(max_new_tokens=12, temperature=1.5)
    sampled = Conversation(model, tokenizer, settings)
    first = ask(sampled, "Who?")
    again = ask(sampled, "Who?")
    sampled.reset()
    assert ask(sampled, "Who?") == first != again
    other = Conversation(model, tokenizer, ChatConfig(max_new_tokens=12, temperature=1.5, seed=7))
    assert ask(other, "Who?") != first


# --- a full context --------------------------------------------------------------------------------------------------


def test_a_full_context_drops_the_oldest_turns_and_keeps_the_system_prompt(tokenizer, model):
    counting = Counting(model)
    c = ChatConfig(max_new_tokens=12, system="Be brief.")
    conversation = Conversation(counting, tokenizer, c)
    dropped = []
    for question in ("One?", "Two?", "Three?", "Four?", "Five?", "Six?"):
        ask(conversation, question)
        dropped.append(conversation.answer.dropped)
        assert len(conversation.tokens) <= CONTEXT + 1
    assert dropped[0] == 0 and sum(dropped) >= 2
    tokens, system = conversation.tokens, {"role": "system", "content": "Be brief."}
    opening = tokenizer.prompt([system, {"role": "user", "content": ""}])
    opening = opening[: opening.index(tokenizer.eot_id) + 2]  # up to the first turn's header
    assert tokens[: len(opening)] == opening, "a whole turn follows"
    answer = conversation.answer.tokens  # the last question was answered from what is left, read at its new positions
    for i in (1, len(answer) - 1):
        assert int(model.step(tokens[: len(tokens) - len(answer) + i], 0).argmax()) == answer[i]


def test_an_answer_that_alone_fills_the_context_ends(tokenizer, model):
    conversation = Conversation(model, tokenizer, ChatConfig(max_new_tokens=2000))
    never = tokenizer.stop_tokens
    tokenizer.stop_tokens = []
    ask(conversation, "Who?")
    tokenizer.stop_tokens = never
    assert (
        conversation.answer.ended == "full" and len(conversation.tokens) == CONTEXT + 1
    )  # the last one is not in the cache
    ask(conversation, "And now?")
    assert conversation.answer.dropped == 1 and conversation.answer.tokens


def test_a_question_that_does_not_fit_is_refused_and_changes_nothing(tokenizer, model):
    conversation = Conversation(model, tokenizer, ChatConfig(max_new_tokens=5))
    ask(conversation, "Who?")
    before = conversation.tokens
    with pytest.raises(UserError, match=r"this takes \d+ tokens .* and the context has 96 .export.max_context_length"):
        ask(conversation, "tell me more " * 100)
    assert conversation.tokens == before
    assert ask(conversation, "And?") is not None


# --- streaming -------------------------------------------------------------------------------------------------------


def test_characters_of_several_tokens_come_whole(tokenizer):
    text = "naïve 日本語 😀 end"
    tokens = tokenizer.encode(text, add_bos=False, add_eos=False)
    assert len(tokens) > len(text)
    conversation = Conversation(Scripted([*tokens, tokenizer.eot_id]), tokenizer, ChatConfig())
    pieces = list(conversation.ask("Say it."))
    assert "".join(pieces) == text and len(pieces) > 5 and not any("\ufffd" in piece for piece in pieces)
    assert conversation.answer.ended == "stop" and conversation.answer.computed == len(tokens) + 1
    assert 0 < conversation.answer.first_token < conversation.answer.seconds


def test_an_interrupted_answer_stays_as_far_as_it_got(tokenizer):
    said = tokenizer.encode("1 2 3 4 5", add_bos=False, add_eos=False)
    conversation = Conversation(Scripted(said), tokenizer, ChatConfig(max_new_tokens=50))
    pieces: list[str] = []
    for piece in conversation.ask("Count.", interrupted=lambda: len(pieces) >= 3):
        pieces.append(piece)
    assert conversation.answer.ended == "interrupted" and conversation.answer.tokens == said[:3]
    assert conversation.tokens[-3:] == said[:3]
    ask(conversation, "Go on.")
    assert len(conversation.answer.tokens) == 50


def test_plain_text_is_continued_without_a_template(tokenizer):
    said = tokenizer.encode(" blue", add_bos=False, add_eos=False)
    conversation = Conversation(Scripted([*said, tokenizer.eos_id]), tokenizer, ChatConfig(), chat=False)
    assert ask(conversation, "The sky is") == " blue" and ask(conversation, "The sea is") == " blue"
    assert tokenizer.decode(conversation.tokens) == "The sky is blue\nThe sea is blue"
    assert conversation.tokens.count(tokenizer.bos_id) == 1 and tokenizer.eot_id not in conversation.tokens
