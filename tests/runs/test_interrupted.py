"""Every stage copes with what an interrupted attempt left in its folder, whichever file it was writing."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, small

from llamaq.checkpoints import tensors
from llamaq.config import load
from llamaq.evaluate.stages import score_stage
from llamaq.recipes.export_executorch import convert, export
from llamaq.recipes.qat import base, corpus, qat
from llamaq.recipes.qat_lora import qat_lora
from llamaq.recipes.spinquant import calibrate, models_of, select, try_candidate
from llamaq.runs.run import Run
from llamaq.runs.tracking import METRICS
from llamaq.spinquant.candidates import candidates_of

pytestmark = pytest.mark.slow
WRITES = os.O_WRONLY | os.O_RDWR
TIMED = ("manifest.json", METRICS, "learning.json")  # they say when, or how long it took
CHANGES = ("os.mkdir", "os.rename", "os.rmdir", "os.remove")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in llamaq catches it."""


class Killer:
    """Ends an attempt at its n-th change of a file or folder below a `.partial` folder."""

    def __init__(self):
        self.left: int | None = None  # changes until then; None: never
        self.only = ""  # counts changes that this is a part of, e.g. "open .../model.pte"
        sys.addaudithook(self._hook)

    def __call__(self, event: str, path: str | Path) -> None:
        """Count a change; raise if it is the one."""
        if self.left is None or ".partial" not in str(path) or self.only not in f"{event} {path}":
            return
        self.left -= 1
        if self.left < 0:
            self.left = None
            raise Killed(path)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
            self(event, str(arguments[0]))


KILLER = Killer()  # an audit hook stays for good; it does nothing unless `left` is set


@pytest.fixture
def killer(monkeypatch):
    """Return the killer, which also cuts off the files that C++ and Rust write: half of each is there."""

    def cut(save: Callable[..., None]) -> Callable[..., None]:
        def saving(state: Any, path: Path, *args: Any) -> None:
            try:
                KILLER("open", path)
            except Killed:
                save(state, path, *args)
                os.truncate(path, path.stat().st_size // 2)
                raise
            save(state, path, *args)

        return saving

    monkeypatch.setattr(torch, "save", cut(torch.save))
    monkeypatch.setattr(tensors, "save_file", cut(tensors.save_file))
    yield KILLER
    KILLER.left, KILLER.only = None, ""


def killed_everywhere(killer: Killer, stage: Callable[[], Path]) -> tuple[Path, int]:
    """Run a stage to its end in one folder, after attempts that ended at their first, second … change."""
    for n in range(100):
        killer.left = n
        try:
            folder = stage()
        except Killed:
            continue
        killer.left = None
        return folder, n
    raise AssertionError("it never ended")


def files_of(folder: Path) -> dict[str, bytes]:
    """Return what a stage left, without what says when."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in TIMED
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run = Run(small(folder, "export.stage=qat_lora"))
    corpus(run)
    base(run)
    qat(run)
    qat_lora(run)
    convert(run)
    run.close()
    return folder


def test_convert_resumes_wherever_it_was_killed(trained, killer):
    run = Run(small(trained, "export.stage=qat_lora"))
    whole = files_of(trained / "convert")
    shutil.rmtree(trained / "convert")
    folder, attempts = killed_everywhere(killer, lambda: convert(run))
    assert attempts > 8 and files_of(folder) == whole
    run.close()


def test_an_export_with_adapters_resumes_wherever_it_was_killed(trained, killer, tmp_path):
    shutil.copytree(trained / "convert/adapter", tmp_path / "adapter")
    run = Run(small(trained, "export.stage=qat_lora", f"export.adapters.other={tmp_path}/adapter"))
    # its weights, the folder's params, and the exported file, whose method folders then are all there
    for killer.only in ("other/consolidated.00.pth", "other/params.json", "model.pte"):
        killer.left = 0
        with pytest.raises(Killed):
            export(run)
    folder = export(run)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "model.pte"]
    assert "pte/other" in run.metrics("export")["hand_overs"]
    run.close()


QUICK = [
    "spinquant.candidates=[none,r2_r4]",
    "spinquant.calibration.0.num_samples=8",
    "spinquant.num_selection=4",
    "spinquant.batch_size=4",
    "spinquant.polish_steps=2",
    "spinquant.steps=10",
    "evaluate.models=[bf16,ptq,spinquant]",
]


def spinquant_run(folder: Path) -> Run:
    return Run(
        load("tiny_spinquant", [s for s in [*SMALL, *QUICK] if not s.startswith("qat")] + [f"output_dir={folder}"])
    )


def test_every_stage_of_spinquant_and_its_evaluation_resumes_wherever_it_was_killed(killer, tmp_path):
    whole, killed = spinquant_run(tmp_path / "whole"), spinquant_run(tmp_path / "killed")

    def stages(run: Run) -> dict[str, Callable[[], Path]]:
        candidates = candidates_of(run.config.section("spinquant"), run.config.seed)
        return {
            "calibrate": lambda: calibrate(run),
            **{k.stage: lambda k=k: try_candidate(run, k) for k in candidates},
            "spinquant": lambda: select(run),
            "evaluate": lambda: score_stage(run, models_of(run), lambda scores: {}),
        }

    for run in (whole, killed):
        corpus(run)
        base(run)
    for name, stage in stages(whole).items():
        stage()
        folder, attempts = killed_everywhere(killer, stages(killed)[name])
        assert attempts > 1 and files_of(folder) == files_of(whole.path(name)), name
    assert killed.metrics("evaluate") == whole.metrics("evaluate")
    assert killed.metrics("spinquant")["chosen"] == whole.metrics("spinquant")["chosen"]
    whole.close()
    killed.close()
