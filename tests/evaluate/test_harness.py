"""lm-evaluation-harness on eager models and .pte files: by-hand numbers, cuts, and equal scores on offline tasks."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import MODEL, trained_like
from hf_folder import write_folder

from llamaq.checkpoints.quantized import save_quantized
from llamaq.config import ExportConfig
from llamaq.data.corpus import tiny_chat
from llamaq.data.tokenizer import build_tokenizer
from llamaq.errors import UserError
from llamaq.evaluate.harness import harness_model, perplexity
from llamaq.evaluate.readers import EagerReader, PteReader
from llamaq.evaluate.tasks import check_tasks, run_tasks
from llamaq.export.exporter import export_pte
from llamaq.export.pte import Pte
from llamaq.quant.scheme import Scheme

VOCAB = MODEL["vocab_size"]
TEXT = "Anna lives in Rome. How many days has June? June has 30 days, and so has April. " * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    tiny_chat(folder, num_train=80, num_pairs=10, num_heldout=10, num_people=40, vocab_size=VOCAB)
    component = {
        "_component_": "torchtune.models.llama3.llama3_tokenizer",
        "path": str(folder / "tokenizer.model"),
        "special_tokens_path": str(folder / "special_tokens.json"),
    }
    return build_tokenizer(component, VOCAB)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return trained_like(Scheme())


def ask(method, *arguments):
    """Call an LM's method with one request for each of `arguments`, as the harness does."""
    return method([SimpleNamespace(args=a) for a in arguments])


def by_hand(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation]))[0, len(context) - 1 : -1]
    logprobs = logits.log_softmax(-1)[torch.arange(len(continuation)), continuation]
    return float(logprobs.sum()), bool((logits.argmax(-1) == torch.tensor(continuation)).all())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihoods_are_the_formulas_whatever_the_batch(model, tokenizer, batch_size):
    lm = harness_model(EagerReader(model, 128, batch_size), tokenizer)
    requests = [("How many days has June?", " June has 30 days."), ("", "Anna"), ("Rome ", "is"), (TEXT[:90], " in")]
    results = ask(lm.loglikelihood, *requests)
    for (context, continuation), (logprob, greedy) in zip(requests, results, strict=True):
        whole = [tokenizer.bos_id, *tokenizer.encode(context + continuation, add_bos=False, add_eos=False)]
        n = len([tokenizer.bos_id, *tokenizer.encode(context.rstrip(), add_bos=False, add_eos=False)])
        expected, best = by_hand(model, whole[:n], whole[n:])
        assert logprob == pytest.approx(expected, abs=1e-4) and greedy == best


def test_greedy_is_said_of_the_greedy_continuation_only(model, tokenizer):
    reader, context = EagerReader(model, 64, 2), [tokenizer.bos_id, 5, 9]
    steps = reader.continuation(context)
    best = [next(steps) for _ in range(4)]
    other = [*best[:3], (best[3] + 1) % VOCAB]
    assert [greedy for _, greedy in reader.loglikelihoods([(context, best), (context, other)])] == [True, False]


def test_perplexity_scores_every_token_once(model, tokenizer):
    """A document of several windows, summed by hand: each window after the last token of the one before."""
    length, tokens = 32, tokenizer.encode(TEXT, add_bos=False, add_eos=False)
    assert len(tokens) > 3 * length and len(tokens) % length
    nll, before = 0.0, tokenizer.bos_id
    for at in range(0, len(tokens), length):
        window = tokens[at : at + length]
        # the last window is short: what it is read after reaches back, so that it has the full length as well
        context = [before] if at == 0 or len(window) == length else tokens[at - 1 - (length - len(window)) : at]
        nll -= by_hand(model, context, window)[0]
        before = window[-1]
    result = perplexity(EagerReader(model, length, 4), tokenizer, [TEXT])
    assert result["tokens"] == len(tokens) and result["words"] == len(TEXT.split())
    total = torch.tensor(result["token_perplexity"]).log() * len(tokens)
    assert float(total) == pytest.approx(nll, rel=1e-5)
    assert result["word_perplexity"] == pytest.approx(float((total / len(TEXT.split())).exp()), rel=1e-4)


def test_too_long_is_cut_on_the_left(model, tokenizer):
    lm = harness_model(EagerReader(model, 24, 2), tokenizer)
    (logprob, _), (whole, _) = ask(lm.loglikelihood, (TEXT, " June"), ("", TEXT))
    tokens = [tokenizer.bos_id, *tokenizer.encode(TEXT + " June", add_bos=False, add_eos=False)]
    n = len(tokens) - len(tokenizer.encode(TEXT.rstrip(), add_bos=False, add_eos=False)) - 1
    assert logprob == pytest.approx(by_hand(model, tokens[-25:-n], tokens[-n:])[0], abs=1e-4)
    assert whole < 0


def test_answers_are_greedy_and_end_where_the_task_says(model, tokenizer):
    lm = harness_model(EagerReader(model, 96, 2), tokenizer)
    (text,) = ask(lm.generate_until, ("How many days", {"until": [], "max_gen_toks": 12}))
    tokens = [tokenizer.bos_id, *tokenizer.encode("How many days", add_bos=False, add_eos=False)]
    start = len(tokens)
    with torch.no_grad():
        while len(tokens) < start + 12:
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
            if tokens[-1] in tokenizer.stop_tokens:
                tokens.pop()
                break
    assert text == tokenizer.decode(tokens[start:]) and len(text) > 2
    stop = text[len(text) // 2]
    (cut,) = ask(lm.generate_until, ("How many days", {"until": [stop], "max_gen_toks": 12}))
    assert cut == text[: text.index(stop)]
    with pytest.raises(UserError, match="samples"):
        ask(lm.generate_until, ("x", {"do_sample": True}))


def test_the_chat_template_is_that_of_training(model, tokenizer, tmp_path):
    question, answer = {"role": "user", "content": "How many days has June?"}, {"role": "assistant", "content": " 30 "}
    hugging_face = build_tokenizer(write_folder(tmp_path, "chatml"), 400)
    for t in (tokenizer, hugging_face):
        lm = harness_model(EagerReader(model, 96, 2), t)
        assert lm.tok_encode(lm.apply_chat_template([question])) == t.prompt([question])
        whole = t.chat([question, answer])[0]
        begun = lm.tok_encode(lm.apply_chat_template([question, answer], add_generation_prompt=False))
        assert begun == whole[: len(begun)] and t.decode(whole[len(t.prompt([question])) : len(begun)]).strip() == "30"
        assert lm.chat_template(True) and lm.chat_template(False) is None and t.fingerprint[:9] in lm.tokenizer_name


def test_a_tokenizer_that_adds_nothing_in_front_of_text(model, tmp_path):
    tokenizer = build_tokenizer(write_folder(tmp_path, "smol"), 400)
    lm = harness_model(EagerReader(model, 64, 2), tokenizer)
    assert lm.tok_encode("Rome<|im_end|> and") == [
        *tokenizer.encode("Rome", add_bos=False, add_eos=False),
        tokenizer.special_tokens["<|im_end|>"],
        *tokenizer.encode(" and", add_bos=False, add_eos=False),
    ]
    assert lm.prefix_token_id == tokenizer.eos_id and tokenizer.bos_id is None
    tokens = tokenizer.encode("June has", add_bos=False, add_eos=False)
    assert ask(lm.loglikelihood, ("", "June has"))[0][0] == pytest.approx(
        by_hand(model, [tokenizer.eos_id], tokens)[0], abs=1e-4
    )


def write_tasks(folder: Path) -> Path:
    """One task of each kind, with data of its own: choices, perplexity, an answer."""
    folder.mkdir()
    rows = {
        "choice": [
            {"q": f"{m} has", "choices": [" 30 days", " 31 days", " 28 days"], "gold": i % 3}
            for i, m in enumerate(["June", "May", "February", "April", "March", "July"])
        ],
        "text": [{"text": TEXT[i : i + 200]} for i in (0, 7)],
        "answer": [{"q": "How many days has June?", "a": "June has 30 days."}, {"q": "Where is Anna?", "a": "Rome"}],
    }
    for name, data in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data))
    common = (
        "task: {0}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {1}/{2}.jsonl}}}}\ntest_split: test\n"
    )
    (folder / "choice.yaml").write_text(
        common.format("days", folder, "choice")
        + "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "text.yaml").write_text(
        common.format("facts", folder, "text")
        + "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    )
    (folder / "answer.yaml").write_text(
        common.format("answers", folder, "answer")
        + "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: a\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n"
    )
    return folder


TASKS = ["days", "facts", "answers"]


def test_tasks_run_offline_and_unknown_ones_are_named(model, tokenizer, tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    lm = harness_model(EagerReader(model, 128, 4), tokenizer)
    results = run_tasks(lm, TASKS, folder, limit=4)
    assert results["days"]["samples"] == 4 and 0 <= results["days"]["metrics"]["acc"]["value"] <= 1
    expected = perplexity(EagerReader(model, 128, 4), tokenizer, [TEXT[:200], TEXT[7:207]])
    assert results["facts"]["metrics"]["word_perplexity"]["value"] == pytest.approx(
        expected["word_perplexity"], rel=1e-4
    )
    assert results["answers"]["metrics"]["exact_match"]["value"] == 0
    with pytest.raises(UserError, match=r"no task 'day'; did you mean .*days"):
        check_tasks(["day"], folder)
    with pytest.raises(UserError, match="not a folder"):
        check_tasks(TASKS, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"arc_easy: the data of a task is not here"):
        run_tasks(lm, ["arc_easy"], folder, limit=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory, model):
    """The model as two .pte files: as it ships, and with the logits of all tokens."""
    folder = tmp_path_factory.mktemp("pte")
    frozen = trained_like(Scheme(), frozen=True, weights=dict(model.decoder.state_dict()))
    save_quantized(folder / "model", frozen.decoder, Scheme())
    for name, full in (("last", False), ("full", True)):
        options = ExportConfig(max_seq_length=16, max_context_length=128, full_logits=full)
        export_pte(folder / "model", folder / f"{name}.pte", options, {"get_bos_id": 1, "get_eos_ids": [2]})
    return {name: Pte(folder / f"{name}.pte") for name in ("last", "full")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["last", "full"])
def test_a_pte_scores_as_the_model_does(files, model, tokenizer, tmp_path, kind):
    assert files[kind].full_logits == (kind == "full") and files[kind].max_tokens_per_call == 16
    folder = write_tasks(tmp_path / "tasks")
    ours = run_tasks(harness_model(EagerReader(model, 128, 4), tokenizer), TASKS, folder)
    theirs = run_tasks(harness_model(PteReader(files[kind]), tokenizer), TASKS, folder)
    for task in TASKS:
        for metric, m in ours[task]["metrics"].items():
            assert theirs[task]["metrics"][metric]["value"] == pytest.approx(m["value"], rel=1e-3), (task, metric)
    prompts = [("How many days has June?", {"max_gen_toks": 12}), (TEXT[:120], {"max_gen_toks": 12})]
    answers = [
        ask(harness_model(r, tokenizer).generate_until, *prompts)
        for r in (PteReader(files[kind]), EagerReader(model, 128, 4))
    ]
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["last", "full"])
def test_what_is_in_the_cache_already_is_not_read_again_and_changes_nothing(files, kind, monkeypatch):
    tokens = torch.randint(0, VOCAB, (60,), generator=torch.Generator().manual_seed(4)).tolist()
    pairs = [
        (tokens[:40], tokens[40:44]),
        (tokens[:40], tokens[50:53]),
        (tokens[:30], tokens[41:60]),
        (tokens[5:9], [7]),
    ]
    fresh = []
    for pair in pairs:
        files[kind].reset()
        fresh += PteReader(files[kind]).loglikelihoods([pair])
    read: list[int] = []
    rows = files[kind].rows
    monkeypatch.setattr(files[kind], "rows", lambda t, at: (read.append(len(t)), rows(t, at))[1])
    shared = PteReader(files[kind]).loglikelihoods(pairs)
    assert sum(read) < sum(len(a) + len(b) - 1 for a, b in pairs) - 60  # the first 30 and 39 tokens came from the cache
    for (a, greedy_a), (b, greedy_b) in zip(fresh, shared, strict=True):
        assert a == pytest.approx(b, abs=2e-3) and greedy_a == greedy_b
