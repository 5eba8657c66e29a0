"""Stages run once, resume, notice damage, and never overwrite."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from conftest import small

from llamaq.config.view import only
from llamaq.errors import UserError
from llamaq.runs.files import naming_full_disk
from llamaq.runs.manifest import identity_of, read_manifest, verify
from llamaq.runs.run import Run


@pytest.fixture
def run(tmp_path):
    run = Run(small(tmp_path / "run"))
    yield run
    run.close()


def write(text: str):
    def build(folder: Path) -> dict[str, float]:
        (folder / "out.txt").write_text(text)
        return {"length": len(text)}

    return build


def reopened(run: Run, *overrides: str) -> Run:
    run.close()
    return Run(small(run.folder, *overrides))


def test_a_finished_stage_is_not_run_again(run):
    folder = run.stage("a", write("one"), {"lr": 1})
    assert run.metrics("a") == {"length": 3}
    again = reopened(run)
    assert again.stage("a", write("two"), {"lr": 1}) == folder
    assert (folder / "out.txt").read_text() == "one" and again.executed == []
    again.close()


def test_a_changed_setting_runs_its_stage_and_what_depends_on_it_only(run, capsys):
    def chain(r: Run, lr: float):
        a = r.stage("a", write("a"), {"x": 1})
        b = r.stage("b", write(f"b{lr}"), {"training": {"lr": lr}}, [a])
        r.stage("c", write("c"), {}, [b])
        r.stage("d", write("d"), {}, [a])

    chain(run, 0.1)
    assert run.executed == ["a", "b", "c", "d"]
    again = reopened(run)
    chain(again, 0.2)
    assert again.executed == ["b", "c"]
    assert "b: training.lr changed; running it again" in capsys.readouterr().out
    old = list((run.folder / "superseded").iterdir())
    assert sorted(p.name.split("-")[0] for p in old) == ["b", "c"]  # kept, not overwritten
    again.close()


def test_an_input_that_comes_out_the_same_does_not_run_what_depends_on_it(run):
    def chain(r: Run, note: str):
        a = r.stage("a", write("same"), {"note": note})
        r.stage("b", write("b"), {}, [a])

    chain(run, "first")
    again = reopened(run)
    chain(again, "second")
    assert again.executed == ["a"]
    again.close()


def test_a_stage_made_from_something_else_is_not_taken_for_the_present_one(run, tmp_path):
    def chain(text: str):
        a, other = run.stage("a", write(text), {"text": text}), run.stage("other", write("other"))
        (tmp_path / "file").write_text("not a stage of this run")
        return a, other, run.stage("b", write("b"), {}, [a, tmp_path / "file"])

    a, other, b = chain("one")
    assert run.need("b", made_from=[a]) == b
    with pytest.raises(
        UserError, match=r"b was not made from other as now in .*, but from a; run its recipe with these"
    ):
        run.need("b", made_from=[other])
    with pytest.raises(UserError, match="not made from a, other as now"):
        run.need("b", made_from=[a, other])
    run.stage("a", write("two"), {"text": "two"})
    with pytest.raises(UserError, match=r"not made from a as now in .*, but from a of before"):
        run.need("b", made_from=[a])
    assert run.need("b") == b


def test_of_many_changes_the_first_are_named(run, capsys):
    run.stage("a", write("a"), {k: 1 for k in "abcdefg"})
    run.stage("a", write("a"), {k: 2 for k in "abcdefg"})
    assert "a: a, b, c, d, e and 2 more changed; running it again" in capsys.readouterr().out


def test_settings_that_change_speed_only_are_no_reason_to_run_again(run):
    def chain(r: Run):
        r.stage("a", write("a"), only(r.config, "qat"))

    chain(run)
    faster = reopened(run, "qat.batch_size=8", "qat.checkpoint_every_n_steps=7", "device=auto")
    chain(faster)
    assert faster.executed == []
    other = reopened(faster, "qat.global_batch_size=16")
    chain(other)
    assert other.executed == ["a"]
    other.close()


def test_a_new_version_of_a_stages_code_runs_it_again(run, capsys):
    run.stage("a", write("a"), {"x": 1})
    run.stage("a", write("b"), {"x": 1}, version=2)
    assert run.executed == ["a", "a"] and "a: version changed; running it again" in capsys.readouterr().out


def test_a_stage_that_an_older_llamaq_made_runs_again_and_is_kept(run, capsys):
    folder = run.stage("a", write("a"), {"x": 1})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"] = {"stage": "a", "settings": {"x": 1}, "scheme": {"group_size": 32}, "inputs": {}}
    manifest["key"] = "of 0.1.0"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    again = reopened(run)
    assert again.need("a") == folder  # what others read of it is still there
    again.stage("a", write("a"), {"x": 1})
    said = capsys.readouterr().out
    assert "a: made by an older llamaq" in said and "stays in superseded/" in said
    assert len(list((again.folder / "superseded").iterdir())) == 1
    again.close()


def test_a_path_counts_by_its_content(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("x")
    two.write_text("x")
    assert identity_of({"data_files": str(one)}) == identity_of({"data_files": str(two)})
    two.write_text("y")
    assert identity_of({"data_files": str(one)}) != identity_of({"data_files": str(two)})


def test_a_data_file_given_by_its_bare_name_counts_by_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"source": "json", "data_files": "train.jsonl"}
    assert identity_of(settings) == settings  # no such file: a word
    (tmp_path / "train.jsonl").write_text("x")
    before = identity_of(settings)
    (tmp_path / "train.jsonl").write_text("y")
    assert before["source"] == "json" and identity_of(settings) != before != settings


def test_a_data_folder_counts_by_the_rows_in_it(tmp_path):
    (tmp_path / "train.jsonl").write_text("x")
    settings = {"data_files": str(tmp_path)}
    before = identity_of(settings)
    (tmp_path / "README.md").write_text("about it")  # no rows
    (tmp_path / "more.jsonl").mkdir()
    assert identity_of(settings) == before
    (tmp_path / "heldout.parquet").write_text("y")
    assert identity_of(settings) != before


def test_a_stage_that_fails_leaves_no_folder_and_finds_its_files_next_time(run):
    def dies(folder: Path):
        (folder / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run.stage("a", dies, {"x": 1})
    assert not (run.folder / "a").exists()
    seen = []
    run.stage("a", lambda folder: seen.append((folder / "half").exists()), {"x": 1})
    assert seen == [True]


def test_a_stage_killed_between_its_last_file_and_its_place_is_not_run_again(run, monkeypatch):
    monkeypatch.setattr(Run, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.stage("a", write("done"), {"x": 1})
    monkeypatch.undo()
    again = reopened(run)
    folder = again.stage("a", write("again"), {"x": 1})
    assert (folder / "out.txt").read_text() == "done" and again.executed == []
    assert not (run.folder / "a.partial").exists() and not (folder / "started.json").exists()
    again.close()


def test_what_a_failed_attempt_with_other_settings_left_is_not_used(run):
    with pytest.raises(RuntimeError):
        run.stage(
            "a", lambda folder: (_ for _ in ()).throw(RuntimeError((folder / "half").write_text("half"))), {"x": 1}
        )
    seen = []
    run.stage("a", lambda folder: seen.append((folder / "half").exists()), {"x": 2})
    assert seen == [False]


def interrupted(run: Run, settings: dict) -> Path:
    """Begin a training stage that writes two checkpoints and a row of numbers, and dies."""

    def build(folder: Path):
        for step in (2, 4):
            (folder / f"checkpoints/step_{step}").mkdir(parents=True)
            (folder / f"checkpoints/step_{step}/rank_00000.safetensors").write_bytes(bytes(3 * 2**20))
        (folder / "metrics.jsonl").write_text("a row")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run.stage("a", build, settings)
    return run.folder / "a.partial"


def test_checkpoints_that_fit_no_settings_are_deleted_and_the_rest_is_kept(run, capsys):
    interrupted(run, {"lr": 1})
    run.stage("a", write("two"), {"lr": 2})
    said = capsys.readouterr().out
    assert "a.partial: begun with other settings; deleting its checkpoints (6.0 MiB)" in said
    assert "nothing reads superseded/ (" in said and "you can delete it" in said
    [old] = (run.folder / "superseded").iterdir()
    assert old.name.startswith("a.partial-") and (old / "metrics.jsonl").read_text() == "a row"
    assert not (old / "checkpoints").exists()


def test_checkpoints_that_can_be_resumed_are_not_deleted(run):
    partial = interrupted(run, {"lr": 1})
    run.stage("b", write("b"), {})  # another stage
    seen = []
    run.stage("a", lambda folder: seen.extend(p.name for p in folder.glob("checkpoints/*")), {"lr": 1})
    assert sorted(seen) == ["step_2", "step_4"] and not (run.folder / "superseded").exists()
    partial = interrupted(run, {"lr": 2})
    run.stage("a", write("one"), {"lr": 1})  # up to date: the attempt at lr=2 can still go on
    assert len(list(partial.glob("checkpoints/*"))) == 2


def test_what_replaced_folders_hold_is_said(run, capsys):
    run.stage("a", lambda folder: (folder / "large").write_bytes(bytes(5 * 2**20)) and None, {"lr": 1})
    run.stage("a", write("two"), {"lr": 2})
    assert "nothing reads superseded/ (5.0 MiB), and you can delete it" in capsys.readouterr().out


@pytest.mark.parametrize("left", ["manifest.json.tmp", "started.json.tmp"])
def test_a_stage_killed_while_it_wrote_about_itself_is_whole_afterwards(run, left):
    def dies(folder: Path):
        (folder / "out.txt").write_text("half")
        (folder / left).write_text("{")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run.stage("a", dies, {"x": 1})
    folder = run.stage("a", write("whole"), {"x": 1})
    assert list(read_manifest(folder)["files"]) == ["out.txt"]
    again = reopened(run)
    assert again.need("a") == folder
    again.close()


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_damage_is_noticed_and_named(run, damage):
    run.stage("a", write("some content"), {})
    path = run.folder / "a" / ("manifest.json" if damage == "manifest" else "out.txt")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[3] ^= 1
        path.write_bytes(data)
    elif damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2])
    again = reopened(run)
    for use in (lambda: again.stage("a", write("x"), {}), lambda: again.need("a")):
        with pytest.raises(UserError, match=f"{path.name}.*delete .*{run.folder / 'a'}"):
            use()
    again.close()


def test_a_stage_not_run_yet_is_named(run):
    with pytest.raises(UserError, match=r"stage 'qat' has not been run.*run it first"):
        run.need("qat")


def test_two_processes_cannot_write_one_run(run):
    with pytest.raises(UserError, match="another process is running"):
        Run(small(run.folder))


def test_the_folder_of_another_run_is_refused(run):
    run.stage("a", write("a"), {})
    run.close()
    with pytest.raises(UserError, match=r"holds another run.*choose another output_dir"):
        Run(small(run.folder, "model.num_layers=2"))


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty and is not a llamaq run"):
        Run(small(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; choose a folder"):
        Run(small(tmp_path / "file"))


def test_a_foreign_folder_in_a_stages_place_is_left_alone(run):
    (run.folder / "a").mkdir()
    (run.folder / "a" / "mine").write_text("precious")
    with pytest.raises(UserError, match="not a finished stage; move it away"):
        run.stage("a", write("x"), {})
    assert (run.folder / "a" / "mine").read_text() == "precious"


def test_a_full_disk_is_named_with_what_to_do():
    with (
        pytest.raises(UserError, match=r"no space left while writing the report.*run the same command again"),
        naming_full_disk("the report"),
        open("/dev/full", "w") as f,
    ):
        f.write("x")
        f.flush()
    with pytest.raises(PermissionError), naming_full_disk("x"):
        raise PermissionError(errno.EACCES, "no")


def test_the_manifest_says_what_made_the_stage(run):
    run.stage("a", write("x"), only(run.config, "qat.optimizer", "scheme"))
    manifest = read_manifest(run.folder / "a")
    assert manifest["settings"]["qat"]["optimizer"]["lr"] == 5e-4
    assert manifest["identity"]["settings"]["scheme"]["group_size"] == 32
    assert manifest["packages"]["torchtune"] == "0.6.1"
    assert verify(run.folder / "a") == manifest
    moved = run.folder.parent / "moved"
    shutil.copytree(run.folder / "a", moved)
    assert json.loads((moved / "manifest.json").read_text())["content"] == manifest["content"]
