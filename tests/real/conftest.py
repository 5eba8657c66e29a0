"""The real model that tests marked `real` use: SmolLM2-135M-Instruct, made once and kept in `LLAMAQ_REAL`."""

import os
import tempfile
from pathlib import Path

import pytest
from smollm2 import make_smollm2


@pytest.fixture(scope="session")
def smollm2() -> Path:
    folder = Path(os.environ.get("LLAMAQ_REAL", f"{tempfile.gettempdir()}/llamaq-real"))
    folder.mkdir(parents=True, exist_ok=True)
    return make_smollm2(folder / "SmolLM2-135M-Instruct")
