"""`tune run evaluate` without a config: a run's folder, or one file or checkpoint, wherever it lies."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import MODEL, SMALL, small, trained_like

from llamaq.checkpoints.quantized import save_quantized
from llamaq.cli import _with_config
from llamaq.data.batches import collate_sft
from llamaq.data.corpus import tiny_chat
from llamaq.data.datasets import build_dataset
from llamaq.data.tokenizer import build_tokenizer
from llamaq.errors import UserError
from llamaq.evaluate.loose import CHAT_ROWS, Loose, measure_loose, table_of
from llamaq.evaluate.scores import score_model
from llamaq.families.tokenizer_files import tokenizer_in
from llamaq.quant.scheme import Scheme
from llamaq.recipes.evaluate import evaluate_file, measured_last, names_a_file, settings_of
from llamaq.recipes.export_executorch import convert
from llamaq.recipes.qat import prepare_start, qat
from llamaq.runs.files import sha256_file, write_json
from llamaq.runs.manifest import MANIFEST, read_manifest
from llamaq.runs.run import Run

VOCAB = MODEL["vocab_size"]


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    """A checkpoint of integer codes with adapters, its tokenizer beside it, and held-out rows in another folder."""
    folder, corpus = tmp_path_factory.mktemp("codes") / "model", tmp_path_factory.mktemp("corpus")
    tiny_chat(corpus, num_train=80, num_pairs=10, num_heldout=6, num_people=40, vocab_size=VOCAB)
    torch.manual_seed(0)
    save_quantized(folder, trained_like(Scheme(), frozen=True).decoder, Scheme())
    for name in ("tokenizer.model", "special_tokens.json", "heldout.jsonl"):
        shutil.copyfile(corpus / name, folder / name)
    (folder / "text.txt").write_text("June has 30 days.\fMay has 31 days.")
    return folder


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as e:
        measure_loose(path, list(overrides))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_codes_alone_give_the_losses_of_the_model_they_are(codes):
    torch.manual_seed(0)
    model = trained_like(Scheme(), frozen=True)
    tokenizer = build_tokenizer(tokenizer_in(codes) or {}, VOCAB)
    samples = build_dataset(CHAT_ROWS | {"data_files": f"{codes}/heldout.jsonl"}, tokenizer, "evaluate.dataset")
    expected = score_model(model, {}, list(samples), partial(collate_sft, pad_id=tokenizer.pad_id), 2, "model").means()
    given = [f"evaluate.dataset.data_files={codes}/heldout.jsonl", f"evaluate.perplexity_text={codes}/text.txt"]
    result = measure_loose(codes, [*given, "export.max_context_length=256", "export.max_seq_length=128"])
    assert result["held_out"]["nll"] == pytest.approx(expected["nll"], rel=1e-4)
    assert result["held_out"]["samples"] == 6 and "speed" not in result
    assert result["sha256"] == sha256_file(codes / "consolidated.00.pth")
    page = table_of(result)
    assert f"| perplexity | {result['held_out']['perplexity']:.4g} |" in page and "text.txt: word_perplexity" in page
    assert measure_loose(codes.parent, given[:1])["held_out"] == pytest.approx(result["held_out"])  # finds model/


def test_what_is_missing_is_named(codes, tmp_path, monkeypatch):
    assert "lies in no run that could name held-out data; give evaluate.dataset.data_files" in refusal(codes)
    assert "is neither a run, a .pte, a folder with model.pte" in refusal(tmp_path)
    assert refusal(tmp_path / "none.pte") == f"{tmp_path}/none.pte: no such file or folder"
    assert refusal(codes, "evaluate.perplexity_text=x").endswith("perplexity_text=x: no such file")
    assert "evaluate.models is for models of a run" in refusal(codes, "evaluate.models=[bf16]")
    assert "unknown setting 'evaluate.task'; did you mean evaluate.tasks?" in refusal(codes, "evaluate.task=[x]")
    bare = Path(shutil.copytree(codes, tmp_path / "bare", ignore=shutil.ignore_patterns("*tok*")))
    assert "no tokenizer lies beside" in refusal(bare, f"evaluate.perplexity_text={codes}/text.txt")
    with pytest.raises(UserError, match=r"holds no run; name the folder of one, or the file alone"):
        evaluate_file(str(codes), [f"output_dir={codes}"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one file is measured in one process"):
        evaluate_file(str(codes), [])


def test_the_tokenizer_beside_a_file_is_the_one_that_holds_its_template(codes, tmp_path):
    assert tokenizer_in(tmp_path) is None
    shutil.copy(codes / "tokenizer.model", tmp_path)
    meta = tokenizer_in(tmp_path)
    assert meta == {
        "_component_": "torchtune.models.llama3.llama3_tokenizer",
        "path": f"{tmp_path}/tokenizer.model",
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    hugging_face = tokenizer_in(tmp_path)  # a bundle has both; Meta's file does not say which template was trained
    assert hugging_face is not None and hugging_face["path"] == f"{tmp_path}/tokenizer.json"
    assert hugging_face["generation_config"] and "chat_template" not in hugging_face


# --- a run says how it was made --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    run = Run(small(folder, "export.stage=qat"))
    prepare_start(run)
    qat(run)
    convert(run)
    run.close()
    return folder


def test_a_run_is_opened_with_the_settings_it_was_made_with(made):
    theirs, ours = small(made, "export.stage=qat"), settings_of(str(made), ["evaluate.file_tokens=9"])
    for section in ("model", "tokenizer", "scheme", "qat", "base", "corpus", "seed", "dtype", "checkpoint_dir"):
        before, now = getattr(theirs, section), getattr(ours, section)
        if section in ("qat", "base"):  # how a stage was cut into batches is not recorded, since it changes nothing
            now.batch_size, now.checkpoint_every_n_steps = before.batch_size, before.checkpoint_every_n_steps
        assert now == before, section
    assert ours.export.stage == "qat" and ours.evaluate.file_tokens == 9
    assert not ours.evaluate.control, "what the run did not train is not trained now"
    run = Run(ours)  # the same run, of the same identities
    prepare_start(run)
    qat(run)
    convert(run)
    assert run.executed == []
    run.close()


def test_a_run_that_was_moved_finds_its_own_data(made, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(made, moved)
    for stage in ("qat", "convert", "base"):
        text = (moved / stage / MANIFEST).read_text().replace(str(made), "/gone/run")
        (moved / stage / MANIFEST).write_text(text)
    ours = settings_of(str(moved), [])
    assert ours.evaluate.dataset["data_files"] == f"{moved}/corpus/heldout.jsonl"
    assert ours.tokenizer["path"] == f"{moved}/corpus/tokenizer.model"


def test_of_what_stages_have_recorded_the_newest_counts_as_a_whole(made, tmp_path):
    """A dataset is not mixed of an old one's arguments and a new one's."""
    copy = Path(shutil.copytree(made, tmp_path / "run"))
    older = {"dataset": {"_component_": "x", "column": "y"}, "num_fewshot": 3}
    manifest = read_manifest(copy / "convert")
    settings = manifest["settings"] | {"evaluate": older}
    stale = manifest | {"finished": "2020-01-01 00:00:00", "settings": settings}
    (copy / "tasks_bf16").mkdir()
    write_json(copy / "tasks_bf16" / MANIFEST, stale)
    ours = settings_of(str(copy), [])
    assert ours.evaluate.dataset == settings_of(str(made), []).evaluate.dataset and ours.evaluate.num_fewshot == 3


def test_what_was_measured_last_is_asked_for(made, tmp_path):
    copy = Path(shutil.copytree(made, tmp_path / "run"))
    assert measured_last(copy) == ["evaluate.control=false", "evaluate.speed=true"]  # no report has said more
    for stage, models in (("evaluate", ["bf16", "qat"]), ("files", ["qat"])):
        manifest = read_manifest(copy / "convert") | {"stage": stage, "identity": {"arguments": {"models": models}}}
        (copy / stage).mkdir()
        write_json(copy / stage / MANIFEST, manifest)
    config = settings_of(str(copy), [])
    assert config.evaluate.models == ["bf16", "qat", "qat.pte"] and not config.evaluate.speed
    assert settings_of(str(copy), ["evaluate.models=[bf16]"]).evaluate.models == ["bf16"]


def test_a_folder_in_a_run_is_measured_by_its_settings(made):
    loose = Loose.at(made / "convert")
    assert loose.path == made / "convert" / "model" and loose.run == made
    assert loose.config([]).evaluate.dataset["data_files"] == f"{made}/corpus/heldout.jsonl"
    read = measure_loose(made / "convert", ["evaluate.file_tokens=60"])["held_out"]
    assert 0 < read["samples"] < 12


def test_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match=r"output_dir=none holds no run; name the folder of one, or give --config"):
        settings_of("none", ["output_dir=none"])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="holds no finished stage of a run"):
        settings_of(str(tmp_path), [])
    assert names_a_file("x.pte") and not names_a_file(str(tmp_path)) and not names_a_file("tiny")


def test_the_command_line_without_config():
    def asked(*words: str) -> list[str]:
        return _with_config(["tune", "run", *words])[2:]

    assert asked("evaluate", "runs/x", "seed=1") == ["evaluate", "--config", "runs/x", "seed=1"]
    assert asked("evaluate", "output_dir=r", "seed=1") == ["evaluate", "output_dir=r", "seed=1", "--config", "r"]
    assert asked("--nproc_per_node", "2", "evaluate", "r") == ["--nproc_per_node", "2", "evaluate", "--config", "r"]
    assert asked("chat", "x.pte") == ["chat", "--config", "x.pte"]
    for words in (["chat", "x"], ["evaluate", "--config", "tiny", "output_dir=r"], ["qat", "output_dir=r"]):
        assert asked(*words) == words


# --- the command, on exported files ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_exported_files_are_measured_in_their_run_and_away_from_it(tmp_path):
    tune, folder = Path(sys.executable).parent / "tune", tmp_path / "run"
    quick = ["evaluate.control=false", "evaluate.models=[bf16,qat,qat.pte]", "evaluate.speed_new_tokens=4"]
    own = [*SMALL, *quick, "evaluate.file_tokens=100", "export.stage=qat", f"output_dir={folder}"]

    def run(*words: str) -> str:
        command = [str(tune), "run", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("qat_lora_dpo", "--config", "tiny", *own)
    said = run("evaluate", f"output_dir={folder}")
    assert said.count("up to date") >= 6 and "running it again" not in said
    assert "tasks" not in said
    files = read_manifest(folder / "files")["metrics"]["scores"]["qat"]
    run("evaluate", f"{folder}/export/model.pte", "evaluate.speed=false", f"output_dir={tmp_path}/numbers")
    inside = json.loads((tmp_path / "numbers/evaluation.json").read_text())
    assert inside["held_out"]["nll"] == pytest.approx(files["nll"], rel=1e-5)
    shutil.copytree(folder / "bundle", tmp_path / "bundle")
    data = [f"evaluate.dataset.data_files={folder}/corpus/heldout.jsonl", "tokenizer.max_seq_len=96"]
    lengths = ["evaluate.file_tokens=100", "evaluate.speed_new_tokens=4", "evaluate.speed_prompt_tokens=8"]
    said = run("evaluate", "bundle", *data, *lengths, "output_dir=away")
    away = json.loads((tmp_path / "away/evaluation.json").read_text())
    assert away["held_out"] == inside["held_out"] and away["sha256"] == inside["sha256"]
    assert "| decode, tokens/s |" in said and len(away["speed"]["decode"]) == 10
