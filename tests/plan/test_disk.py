"""The plan of the disk: what a run takes, less what its folder holds."""

import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from llamaq.config import load
from llamaq.errors import UserError
from llamaq.model.shape import shape_of
from llamaq.plan.disk import GIB, disk_of
from llamaq.plan.memory import state_disk

Usage = namedtuple("Usage", "total used free")


def file_of(path: Path, gib: float) -> Path:
    """Make a file of a size; it takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, int(gib * GIB))
    return path


def finished(folder: Path, **files: float) -> None:
    for name, gib in files.items():
        file_of(folder / name, gib)
    (folder / "manifest.json").write_text("{}")


def free(monkeypatch, gib: float) -> None:
    """Let the disk have this much room: the one thing here that is not real."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(gib * GIB)))


@pytest.fixture
def one_b(tmp_path):
    config = load("llama3_2/1B_qat_lora_dpo", [f"output_dir={tmp_path}/run"])
    return config, shape_of(config.model), tmp_path / "run"


def test_a_run_in_its_second_stage_needs_what_is_left(one_b, monkeypatch):
    config, shape, run = one_b
    free(monkeypatch, 40)
    with pytest.raises(UserError, match=r"run needs about 54\.0 GiB, 40\.0 are free; use another disk"):
        state_disk(shape, config)
    finished(run / "qat", model=4.6)
    for rank in range(2):
        file_of(run / f"qat_dpo.partial/checkpoints/step_{rank:06d}/rank_00000.safetensors", 13.9)
    line = state_disk(shape, config)
    # qat_dpo's own file 4.65, a third checkpoint 13.9, adapters, codes and the .pte 2.9
    assert 20 < float(re.findall(r"about +([\d.]+) GiB", line)[0]) < 23
    assert "(the whole run takes 53.98, it holds 32.40)" in line


def test_a_finished_run_needs_nothing_and_one_that_is_elsewhere_all(one_b, tmp_path):
    config, shape, run = one_b
    whole = disk_of(shape, config)
    assert whole.needed == whole.whole and whole.held == 0 and str(whole) == ""
    for stage in ("qat", "qat_lora", "qat_dpo", "convert", "export"):
        finished(run / stage, model=0.5)  # smaller than estimated: nothing more is written all the same
    assert disk_of(shape, config).needed == 0 and disk_of(shape, config).held / GIB == pytest.approx(2.5)


def test_what_was_replaced_does_not_count_and_is_offered(one_b, monkeypatch):
    config, shape, run = one_b
    file_of(run / "superseded/qat-20260101-000000/model.safetensors", 30)
    file_of(run / "wandb/offline-run/files", 9)
    disk = disk_of(shape, config)
    assert disk.needed == disk.whole and disk.superseded == 30 * GIB
    free(monkeypatch, 60)
    assert "superseded/ holds 30.00 and can be deleted" in state_disk(shape, config)
    free(monkeypatch, 50)
    with pytest.raises(UserError, match=r"delete .*run/superseded \(30\.0 GiB\), or use another disk"):
        state_disk(shape, config)


def test_a_file_with_two_names_counts_once_and_links_not_at_all(one_b, tmp_path):
    config, shape, run = one_b
    finished(run / "qat", model=4)
    os.link(run / "qat/model", run / "qat/again")
    (run / "qat_lora").mkdir()
    os.link(run / "qat/model", run / "qat_lora/same")
    (run / "qat_lora/elsewhere").symlink_to(file_of(tmp_path / "large", 100))
    assert disk_of(shape, config).held / GIB == pytest.approx(4)


def test_stale_checkpoints_of_a_finished_stage_are_no_room_for_the_next(one_b):
    config, shape, run = one_b
    finished(run / "qat", model=4.6)
    before = disk_of(shape, config).needed
    file_of(run / "qat.partial/checkpoints/step_000001/rank_00000.safetensors", 28)
    assert disk_of(shape, config).needed == before
