"""The import law of the house, torchtune on today's torchao, and an import of llamaq that is quick."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [p for top in ("llamaq", "recipes", "cluster") for p in sorted((ROOT / top).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def may_import(package: str, file: str) -> bool:
    """Where each outside package, and each part of the house, may be imported."""
    allowed = {
        "deepspeed": ("llamaq/train/engine.py",),
        "ray": ("cluster/", "llamaq/cli.py"),
        "executorch": ("llamaq/export/",),
        "wandb": ("llamaq/tracking.py",),
        "torchtune": ("llamaq/cli.py", "llamaq/train/", "llamaq/export/meta.py", "recipes/"),
        "llamaq.recipes": ("recipes/",),
        "llamaq.cluster": ("recipes/", "cluster/", "llamaq/cli.py"),
        "llamaq.torchao_compat": ("llamaq/cli.py", "llamaq/launch.py", "llamaq/train/__init__.py", "cluster/job.py"),
    }
    return all(file.startswith(places) for name, places in allowed.items() if f"{package}.".startswith(f"{name}."))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_import_law(path: Path):
    file = path.relative_to(ROOT).as_posix()
    breaking = sorted(name for name in imports(path) if not may_import(name, file))
    assert not breaking, f"{file} may not import {breaking}"


def test_import_law_notices_a_breach():
    assert not may_import("ray.train", "llamaq/train/loop.py")
    assert not may_import("llamaq.recipes.qat", "llamaq/pipeline.py")
    assert may_import("torchtune.config", "llamaq/train/model.py")


def test_quant_knows_no_torchtune():
    code = (
        "import sys, llamaq.quant.prepare; print([m for m in sys.modules if m.startswith(('torchtune', 'executorch'))])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip().endswith("[]")


def test_import_of_llamaq_is_quick():
    """Quick means: none of the heavy packages is loaded by it."""
    heavy = ("torch", "torchtune", "torchao", "executorch", "ray", "deepspeed", "wandb", "matplotlib", "datasets")
    code = f"import sys, llamaq, llamaq.config; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_train_imports_without_executorch():
    code = "import sys; sys.modules['executorch'] = None; import llamaq.train.preflight, llamaq.train.stages"
    subprocess.check_call([sys.executable, "-c", code])


def test_every_torchtune_module_imports():
    import torchtune

    failed = {}
    for module in pkgutil.walk_packages(torchtune.__path__, "torchtune.", onerror=lambda name: None):
        try:
            importlib.import_module(module.name)
        except ImportError as e:
            failed[module.name] = str(e)
    without_torchvision = {name: e for name, e in failed.items() if "torchvision" not in e}
    assert not without_torchvision, without_torchvision
    assert "torchtune.training.quantization" in sys.modules
    assert "torchtune.modules.peft.lora" in sys.modules


def test_torchtunes_own_qat_lora_linear_works():
    """What `isinstance(config, FakeQuantizeConfig)` broke with torchao 0.13."""
    import torch
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchtune.modules.peft.lora import QATLoRALinear

    linear = QATLoRALinear(
        64, 32, rank=4, alpha=8,
        activation_qat_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_qat_config=IntxFakeQuantizeConfig(vars(torch)["int4"], group_size=32),
    )  # fmt: skip
    assert linear(torch.randn(2, 64)).shape == (2, 32)
