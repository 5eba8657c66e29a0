"""Provide a user's own recipe, to be sent with --working-dir: stage 1 with slower steps."""

import os
import time

from llamaq.recipes import qat
from llamaq.runs.run import Run
from llamaq.train.deepspeed import DeepSpeedEngine

SECONDS = float(os.environ.get("STEP_SECONDS", "0.15"))


def recipe(run: Run) -> None:
    update = DeepSpeedEngine.update

    def slow(self) -> float:
        time.sleep(SECONDS)
        return update(self)

    DeepSpeedEngine.update = slow
    qat.recipe(run)
