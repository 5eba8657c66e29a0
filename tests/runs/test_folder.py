"""Output folders that cannot be used, that a failed start left behind, and stages that do not go together."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import small

from llamaq.config.view import only
from llamaq.errors import UserError
from llamaq.runs.run import Run


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A folder that this process may read and not write, also if root runs the tests."""
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), os.geteuid() == 0
        (folder / "run").mkdir()
        folder.chmod(0o555)
        (folder / "run").chmod(0o555)
        if root:
            os.seteuid(65534)
        yield folder
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        (folder / "run").chmod(0o755)


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as e:
        Run(small(folder, *overrides))
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", ["run", "new", "new/below"])
def test_a_folder_that_cannot_be_written_is_named(foreign, name):
    said = refusal(foreign / name)
    assert said.startswith(f"output_dir={foreign / name} cannot be used (Permission denied: ")
    assert "choose a folder that you may write to" in said


def test_a_file_in_the_way_and_a_name_too_long(tmp_path):
    (tmp_path / "file").write_text("")
    said = refusal(tmp_path / "file" / "below")
    assert said.startswith(f"output_dir={tmp_path}/file/below cannot be used (Not a directory: ")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be used" in refusal(tmp_path / "loop" / "x")


@pytest.mark.parametrize("run_json", [None, "", '{"model": {', "[]", '{"model": 1}'])
def test_what_a_failed_start_left_is_no_hindrance(tmp_path, run_json):
    folder = tmp_path / "run"
    (folder / "wandb").mkdir(parents=True)
    (folder / "base.partial" / "checkpoints").mkdir(parents=True)
    (folder / ".lock").write_text("")
    if run_json is not None:
        (folder / "run.json").write_text(run_json)
    run = Run(small(folder))
    assert len(run.id) == 8 and json.loads((folder / "run.json").read_text())["model"] == run.config.model
    run.close()


def test_a_wrong_model_can_be_corrected_while_nothing_is_made(tmp_path):
    Run(small(tmp_path / "run", "model.num_layers=7")).close()
    first = Run(small(tmp_path / "run"))
    first.close()
    again = Run(small(tmp_path / "run"))
    assert again.id == first.id
    again.stage("a", lambda folder: None)
    again.close()
    assert "holds another run (model was" in refusal(tmp_path / "run", "model.num_layers=7")


def test_a_torn_run_json_beside_finished_stages_is_an_error(tmp_path):
    run = Run(small(tmp_path / "run"))
    run.stage("a", lambda folder: None)
    run.close()
    (tmp_path / "run" / "run.json").write_text('{"model"')
    assert "run.json is torn, so this run cannot go on; choose another output_dir" in refusal(tmp_path / "run")


# --- stages that do not go together ----------------------------------------------------------------------------------

SECTIONS = ("model", "tokenizer", "scheme", "adapters")


@pytest.fixture
def tokenizers(tmp_path) -> list[str]:
    for name in ("one", "two"):
        (tmp_path / f"{name}.model").write_text(name)
    return [f"tokenizer.path={tmp_path}/{name}.model" for name in ("one", "two")]


def chain(run: Run, *stages: str) -> Run:
    """Make these stages, each from the one before it in (a, b), with what they declare."""
    if "a" in stages:
        run.stage("a", lambda folder: None, only(run.config, *SECTIONS))
    if "b" in stages:
        run.stage("b", lambda folder: None, only(run.config, *SECTIONS, "seed"), [run.path("a")])
    return run


def reopened(run: Run, *overrides: str) -> Run:
    run.close()
    return Run(small(run.folder, *overrides))


def test_a_stage_is_not_made_from_one_of_another_scheme(tmp_path, tokenizers):
    run = chain(Run(small(tmp_path / "run", tokenizers[0])), "a", "b")
    changed = reopened(run, tokenizers[0], "scheme.group_size=64")
    with pytest.raises(UserError) as e:
        chain(changed, "b")
    assert str(e.value).startswith(f"b: scheme.group_size=64, but stage 'a' in {run.folder} was made with scheme.group")
    assert "scheme.group_size=32; run 'a' again with this one, or give the one of before" in str(e.value)
    assert not (run.folder / "b.partial").exists()
    assert chain(changed, "a", "b").executed == ["a", "b"]  # the whole chain goes on
    changed.close()


@pytest.mark.parametrize(
    "override, message",
    [
        ("adapters.rank=8", "b: adapters.alpha=16.0, but stage 'a'"),
        ("tokenizer.special_tokens_path=x.json", "tokenizer.special_tokens_path=x.json, but stage 'a'"),
    ],
)
def test_adapters_and_tokenizer_have_to_agree_too(tmp_path, tokenizers, override, message):
    run = chain(Run(small(tmp_path / "run", tokenizers[0])), "a", "b")
    more = ["adapters.alpha=16"] if "rank" in override else []
    changed = reopened(run, tokenizers[0], override, *more)
    with pytest.raises(UserError) as e:
        chain(changed, "b")
    assert message in str(e.value)
    changed.close()


def test_another_tokenizer_file_is_noticed_by_its_content(tmp_path, tokenizers):
    run = chain(Run(small(tmp_path / "run", tokenizers[0])), "a", "b")
    changed = reopened(run, tokenizers[1])
    with pytest.raises(UserError, match=r"b: tokenizer.path=\(another file\), but stage 'a' in .* the file of before"):
        chain(changed, "b")
    (tmp_path / "two.model").write_text("one")
    assert chain(changed, "a", "b").executed == []
    changed.close()


def test_what_may_differ_is_no_hindrance(tmp_path, tokenizers):
    run = chain(Run(small(tmp_path / "run", tokenizers[0])), "a", "b")
    changed = reopened(run, tokenizers[0], "tokenizer.max_seq_len=64", "seed=1")
    assert chain(changed, "b").executed == ["b"]
    other = reopened(changed, tokenizers[0], "scheme.group_size=64")
    other.stage("c", lambda folder: None, only(other.config, "seed", "tokenizer.max_seq_len"), [other.path("a")])
    other.stage("d", lambda folder: None, {"scheme": {"rounding": "x"}}, [other.path("a")])
    assert other.executed == ["c", "d"]
    other.close()
