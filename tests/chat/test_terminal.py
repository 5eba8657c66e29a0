"""`tune run chat` on tiny runs: in a real terminal, in a pipe, and what it says when there is no such model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, small
from terminal import Terminal

from llamaq.chat.conversation import Conversation
from llamaq.config import Config, load
from llamaq.data.tokenizer import prompt_tokens, text_of, tokenizer_of
from llamaq.errors import UserError
from llamaq.export.pte import Pte
from llamaq.recipes.chat import chat, configured, open_model, sides
from llamaq.recipes.export_executorch import convert, export
from llamaq.recipes.qat import prepare_start, qat
from llamaq.recipes.spinquant import calibrate, select, shipped_model, try_candidate
from llamaq.runs.files import write_json
from llamaq.runs.manifest import read_manifest
from llamaq.runs.reader import RunReader
from llamaq.runs.run import Run
from llamaq.spinquant.candidates import candidates_of

pytestmark = pytest.mark.slow
TUNE = str(Path(sys.executable).parent / "tune")
QUESTIONS = ("Is Monday after Sunday?", "How many days has June?", "What is the color of grass?")
# enough steps that answers are short and end by themselves
STEPS = ["base.max_steps=400", "base.epochs=40", "base.checkpoint_every_n_steps=1000", "qat.max_steps=20"]
CHAIN = ["export.stage=qat", "base.optimizer.lr=5e-3", *STEPS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "run"
    run = Run(small(folder, *CHAIN))
    prepare_start(run)
    qat(run)
    convert(run)
    export(run)
    run.close()
    return folder


def settings(folder: Path, *more: str) -> list[str]:
    return [*SMALL, *CHAIN, f"output_dir={folder}", *more]


def opened(folder: Path, *more: str) -> RunReader:
    return RunReader(small(folder, *CHAIN, *more))


def copied(folder: Path, to: Path, *without: str) -> Path:
    """A copy of a run without some of its stages."""
    return Path(shutil.copytree(folder, to / "copy", ignore=shutil.ignore_patterns(*without)))


def expected_answers(folder: Path, max_new_tokens: int = 100) -> list[str]:
    """What the .pte answers, each time from the whole conversation read anew."""
    config = small(folder, *CHAIN)
    tokenizer, pte = tokenizer_of(config), Pte(folder / "export" / "model.pte")
    conversation = Conversation(pte, tokenizer, config.chat)
    answers: list[str] = []
    for question in QUESTIONS:
        "".join(conversation.ask(question))
        tokens, said = conversation.tokens, conversation.answer.tokens
        fresh = pte.generate(tokens[: len(tokens) - len(said)], max_new_tokens, list(tokenizer.stop_tokens))
        assert fresh == said, "the cache of all turns gives what a fresh read gives"
        answers.append(text_of(tokenizer, fresh))
    first = pte.generate(prompt_tokens(tokenizer, QUESTIONS[0], chat=True), max_new_tokens, tokenizer.stop_tokens)
    assert answers[0] == text_of(tokenizer, first) and len(set(answers)) > 1
    return answers


@pytest.fixture
def terminal():
    opened: list[Terminal] = []

    def start(*command: str) -> Terminal:
        opened.append(Terminal(*command))
        return opened[-1]

    yield start
    for t in opened:
        t.close()


def piped(*words: str, given: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([TUNE, "run", "chat", *words], input=given, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


# --- a person at a terminal ------------------------------------------------------------------------------------------


def test_a_conversation_in_a_terminal(folder, terminal):
    """While the run is locked, as it is when another process trains: reading takes no lock."""
    answers = expected_answers(folder)
    lock = Run(small(folder, *CHAIN))
    t = terminal(TUNE, "run", "chat", "--config", "tiny", *settings(folder))
    t.expect(r"qat\.pte; /help lists the commands.*> $")
    first, about = t.ask(QUESTIONS[0])
    assert first == answers[0].strip("\n")
    assert re.fullmatch(r"\d+ tokens, first after \d+\.\d\d s, [\d.]+ tokens/s, context \d+/256", about), about
    for question, answer in zip(QUESTIONS[1:], answers[1:], strict=True):
        said, after = t.ask(question)
        assert said == answer.strip("\n")
    assert int(after.split("context ")[1].split("/")[0]) > int(about.split("context ")[1].split("/")[0])
    t.send("/helo\n")
    t.expect(r"no command /helo; /help lists them\n> $")
    t.send("/help\n")
    t.expect(r"/reset .*/quit .*Ctrl-C.*> $")
    t.send("\n")
    t.expect(r"> $")
    t.send("/reset\n")
    t.expect(r"a new conversation.*> $")
    again, same = t.ask(QUESTIONS[0])
    assert again == first and same.split("context")[1] == about.split("context")[1]
    t.send("/quit\n")
    assert t.ended() == 0
    lock.close()


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(folder, terminal):
    """Nearly uniform sampling hardly ever takes a stop token, so only Ctrl-C and the context end an answer."""
    endless = ["chat.model=qat", "chat.temperature=50", "chat.max_new_tokens=2000", "export.max_context_length=512"]
    t = terminal(TUNE, "run", "chat", "--config", "tiny", *settings(folder, *endless))
    t.expect(r"> $")
    t.send("How many days has June?\n")
    t.expect(r"June\?\n\S")
    t.send("\x03")
    about = t.expect(r"\[(\d+) tokens, [^]]*, stopped\].*> $")
    assert 0 < int(about[1]) < 450
    t.interrupt_typing("half a line")
    t.expect(r"/quit or Ctrl-D leaves\n> $")
    t.send("Are you still there?\n")
    t.expect(r"there\?\n\S")
    t.send("\x03")
    t.expect(r"stopped\].*> $")
    t.send("\x04")
    assert t.ended() == 0 and "Traceback" not in t.text


def test_a_full_context_is_said(folder, terminal):
    small_context = [
        "chat.model=bf16",
        "export.max_context_length=128",
        "chat.temperature=50",
        "chat.max_new_tokens=45",
    ]
    t = terminal(TUNE, "run", "chat", "--config", "tiny", *settings(folder, *small_context))
    t.expect(r"> $")
    said = [t.ask(f"Question {i}?")[1] for i in range(4)]
    assert any(re.search(r"context was full: dropped the oldest \d turns?", about) for about in said), said
    assert "cut at chat.max_new_tokens" in said[0]
    t.send("too long " * 60 + "\n")
    t.expect(r"error: this takes \d+ tokens .* and the context has 128.*> $")
    t.send("\x04")
    assert t.ended() == 0


# --- a script --------------------------------------------------------------------------------------------------------


def test_once_prints_the_answer_and_nothing_else(folder):
    answer = expected_answers(folder)[0]
    done = piped("--config", "tiny", *settings(folder, f"chat.once={QUESTIONS[0]}"))
    assert (done.stdout, done.stderr) == (f"{answer}\n", "")
    done = piped(str(folder / "export" / "model.pte"), "chat.once=-", given=f"{QUESTIONS[0]}\n")
    assert (done.stdout, done.stderr) == (f"{answer}\n", ""), "the run's own record of its settings"


def test_two_models_answer_side_by_side(folder, capsys):
    question = QUESTIONS[2]  # one that the two answer differently
    chat(opened(folder, "chat.compare=bf16", f"chat.once={question}"))
    match = re.fullmatch(r"qat\.pte: (.*)\nbf16: (.*)\n", capsys.readouterr().out, re.S)
    assert match is not None and match[1] != match[2]
    run = opened(folder)
    for name, label, said in (("qat", "qat.pte", match[1]), ("bf16", "bf16", match[2])):
        shown, model = open_model(run, "chat.model", name)
        alone = Conversation(model, tokenizer_of(run.config), run.config.chat)
        assert shown == label and "".join(alone.ask(question)) == said
    with pytest.raises(UserError, match=r"chat\.compare=qat is the same model as chat\.model \(qat\.pte\)"):
        chat(opened(folder, "chat.compare=qat", "chat.once=Hi"))


def test_lines_in_a_pipe_are_one_conversation(folder):
    answers = expected_answers(folder)
    done = piped("--config", "tiny", *settings(folder), given="\n".join(QUESTIONS))
    said = re.sub(r"^\[.*\]\n", "", done.stdout, flags=re.M)
    assert said == "".join(f"{answer}\n" for answer in answers) and done.stderr == ""


# --- which model -----------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_named_with_the_nearest(folder):
    with pytest.raises(UserError, match=r"chat\.model=bf15: this run has no model of this name; did you mean bf16\?"):
        list(sides(opened(folder, "chat.model=bf15")))
    with pytest.raises(UserError, match=r"chat\.compare=llama: .*; it has bf16, ptq, .*qat"):
        list(sides(opened(folder, "chat.compare=llama")))
    done = piped("--config", "tiny", *settings(folder, "chat.model=qta"), check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: chat.model=qta: this run has no model of this name; did you mean qat?\n"


def test_a_model_that_is_not_there_yet_is_said(folder, tmp_path):
    unfinished = copied(folder, tmp_path, "export", "qat")
    with pytest.raises(UserError, match=r"has no exported file yet; export it .*, or choose chat.model=bf16 or ptq"):
        list(sides(opened(unfinished)))
    with pytest.raises(UserError, match=r"has no qat yet; run qat first, or choose chat.model=bf16 or ptq"):
        list(sides(opened(unfinished, "chat.model=qat")))
    with pytest.raises(UserError, match=r"has no bf16\.pte yet; export it"):
        list(sides(opened(folder, "chat.model=bf16.pte")))
    with pytest.raises(UserError, match="holds no run yet"):
        opened(tmp_path / "nothing")
    with pytest.raises(UserError, match="a run of another model"):
        RunReader(load("tiny", [f"output_dir={folder}"]))
    with pytest.raises(UserError, match=r"chat\.system needs a chat template"):
        list(sides(opened(folder, "chat.system=Hi", "export.chat=false")))


def test_files_are_preferred_and_stale_ones_are_told(folder, tmp_path, capsys):
    copy = copied(folder, tmp_path)
    shutil.copytree(copy / "export", copy / "export_ptq")
    assert open_model(opened(copy), "chat.model", "ptq")[0] == "ptq.pte"
    elsewhere = shutil.copy(folder / "export" / "model.pte", tmp_path / "other.pte")
    label, model = open_model(opened(copy), "chat.model", str(elsewhere))
    assert label == str(elsewhere) and isinstance(model, Pte)
    assert capsys.readouterr().err == ""
    write_json(copy / "qat" / "manifest.json", read_manifest(copy / "qat") | {"content": "of another training"})
    open_model(opened(copy), "chat.model", None)
    assert "note: stage qat has been run again since" in capsys.readouterr().err


def test_a_file_leads_to_the_settings_of_its_run(folder, tmp_path):
    config = configured(["--config", str(folder / "export" / "model.pte"), "chat.max_new_tokens=7"])
    theirs: Config = small(folder, *CHAIN)
    for section in ("model", "tokenizer", "scheme", "output_dir", "checkpoint_dir"):
        assert getattr(config, section) == getattr(theirs, section)
    assert config.export.chat and config.export.stage == "qat" and config.chat.max_new_tokens == 7
    assert open_model(RunReader(config), "chat.model", "qat")[0] == "qat.pte"
    moved = copied(folder, tmp_path, "corpus")
    (moved / "corpus").mkdir()  # of the files it names none is left
    recorded = json.loads((moved / "export" / "manifest.json").read_text())
    recorded["settings"]["tokenizer"] |= {"path": "gone/t.model", "special_tokens_path": "gone/special_tokens.json"}
    write_json(moved / "export" / "manifest.json", recorded)
    config = configured(["--config", str(moved / "export" / "model.pte")])
    assert config.tokenizer["path"] == str(moved / "convert" / "model" / "tokenizer.model")
    assert prompt_tokens(tokenizer_of(config), "Hi", True) == prompt_tokens(tokenizer_of(theirs), "Hi", True)
    stray = shutil.copy(folder / "export" / "model.pte", tmp_path / "model.pte")
    with pytest.raises(UserError, match=r"nothing says which tokenizer .* --config NAME chat\.model=PATH\.pte"):
        configured(["--config", str(stray)])
    with pytest.raises(UserError, match=r"none\.pte: no such file"):
        configured(["--config", "none.pte"])


def test_a_spinquant_run_is_talked_to_as_well(tmp_path, capsys):
    own = ["spinquant.candidates=[none,r4]", "spinquant.force=r4", "spinquant.calibration.0.num_samples=8"]
    quick = ["spinquant.num_selection=4", "spinquant.batch_size=4", "spinquant.polish_steps=2", *STEPS[:3]]
    config = load(
        "tiny_spinquant",
        [s for s in [*SMALL, *own, *quick] if not s.startswith("qat")] + [f"output_dir={tmp_path}/run"],
    )
    run = Run(config)
    prepare_start(run)
    calibrate(run)
    for candidate in candidates_of(config.section("spinquant"), config.seed):
        try_candidate(run, candidate)
    select(run)
    with pytest.raises(UserError, match=r"choose chat.model=bf16 or ptq or spinquant"):
        list(sides(RunReader(config)))
    config.chat.model, config.chat.once, config.chat.max_new_tokens = "spinquant", QUESTIONS[0], 12
    chat(RunReader(config))
    tokenizer, model = tokenizer_of(config), shipped_model(run)
    tokens, said = prompt_tokens(tokenizer, QUESTIONS[0], chat=True), []
    while len(said) < 12:
        with torch.no_grad():
            token = int(model(torch.tensor([[*tokens, *said]]))[0, -1].argmax())
        if token in tokenizer.stop_tokens:
            break
        said.append(token)
    assert capsys.readouterr().out.endswith(f"{text_of(tokenizer, said)}\n") and said
