"""The Python API: `import llamaq` is quick, and its names are there when asked for."""

import os
import subprocess
import sys

import pytest

import llamaq


def test_every_public_name_is_there():
    for name in llamaq.__all__:
        assert getattr(llamaq, name).__module__.startswith("llamaq."), name
    assert set(llamaq.__all__) <= set(dir(llamaq))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'llamaq' has no attribute 'quantise'"):
        _ = llamaq.quantise  # pyright: ignore[reportAttributeAccessIssue]


def test_a_name_brings_torchtune_along():
    """The compatibility names are in place before torchtune is imported, whichever name is asked for first."""
    for name in ("load_checkpoint", "Pte", "Scheme", "CausalLM"):
        code = f"import llamaq; print(llamaq.{name}.__name__)"
        assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == [name]


def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path):
    """Torch makes the folder of its compiler's cache when torchao is imported; /proc takes no folders."""
    code = "import llamaq; llamaq.Scheme; import os; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": "/proc/none/cache", "TMPDIR": str(tmp_path)}
    said = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip()
    assert said.startswith(f"{tmp_path}/torchinductor_") and not list(tmp_path.iterdir())
