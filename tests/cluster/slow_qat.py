"""A recipe of a user's own, sent along with --working-dir: stage 1, each step taking a little longer."""

import os
import time

from llamaq.recipes import qat
from llamaq.runs.run import Run
from llamaq.train import engine

SECONDS = float(os.environ.get("STEP_SECONDS", "0.15"))


def recipe(run: Run) -> None:
    update = engine.DeepSpeedEngine.update

    def slow(self) -> float:
        time.sleep(SECONDS)
        return update(self)

    engine.DeepSpeedEngine.update = slow
    qat.recipe(run)
