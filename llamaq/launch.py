"""What torchrun starts on every rank: `python -m llamaq.launch RECIPE …` runs RECIPE (a file or a module).

It exists because a fresh interpreter must import `torchao_compat` before any recipe imports torchtune.
"""

import os
import runpy
import sys

from llamaq import torchao_compat  # noqa: F401
from llamaq.runs import signals

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.getcwd())
    target = sys.argv[0]
    with signals.handled():
        if target.endswith(".py"):
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
