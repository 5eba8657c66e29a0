"""The import law of the house, torchtune on today's torchao, and an import of llamaq that is quick."""

import ast
import importlib
import pkgutil
import subprocess
import sys
import tomllib
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


# A file may import its own folder and every folder on a floor below its own, none beside or above it.
FLOORS = [
    {"errors", "quiet", "caches"},
    {"torchao_compat"},
    {"config"},
    {"families"},
    {"runs"},
    {"quant"},
    {"model"},
    {"data", "checkpoints"},
    {"train", "spinquant"},
    {"plan", "export"},
    {"evaluate", "chat"},
    {"report"},
    {"recipes"},
    {"cluster"},
    {"cli", "launch"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# outside package, or part of the house that only some may use → where it may be imported
ONLY_IN = {
    "deepspeed": ("llamaq/train/deepspeed.py",),
    "ray": ("cluster/", "llamaq/cli.py"),
    "executorch": ("llamaq/export/",),
    "wandb": ("llamaq/runs/wandb_run.py",),
    "torchtune": (
        "llamaq/cli.py",
        "llamaq/config/components.py",
        "llamaq/model/",
        "llamaq/checkpoints/",
        "llamaq/data/",
        "llamaq/train/",
        "recipes/",
    ),
    "llamaq.recipes": ("recipes/",),
    "llamaq.cluster": ("cluster/", "llamaq/cli.py"),
}


def room_of(module: str) -> str | None:
    """The folder or top-level module of the house that a dotted name lies in."""
    parts = module.split(".")
    if parts[0] != "llamaq" or len(parts) < 2:
        return None
    return parts[1]


def may_import(name: str, file: str) -> bool:
    """Whether the law lets `file` import the dotted `name`."""
    for package, places in ONLY_IN.items():
        if f"{name}.".startswith(f"{package}.") and not file.startswith(places):
            return False
    room = room_of(name)
    if room not in FLOOR:
        return True
    own = file.removesuffix(".py").split("/")
    mine = own[1] if own[0] == "llamaq" else own[0]
    if mine == "__init__":  # `import llamaq` gives its names lazily
        return True
    return mine == room or FLOOR[room] < FLOOR[mine]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_import_law(path: Path):
    file = path.relative_to(ROOT).as_posix()
    breaking = sorted(name for name in imports(path) if not may_import(name, file))
    assert not breaking, f"{file} may not import {breaking}"


def test_import_law_notices_a_breach():
    assert not may_import("ray.train", "llamaq/train/loop.py")
    assert not may_import("llamaq.recipes.qat", "llamaq/runs/run.py")
    assert may_import("torchtune.config", "llamaq/model/causal_lm.py")


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
    code = "import sys; sys.modules['executorch'] = None; import llamaq.plan.preflight, llamaq.train.sft"
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
        64,
        32,
        rank=4,
        alpha=8,
        activation_qat_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_qat_config=IntxFakeQuantizeConfig(vars(torch)["int4"], group_size=32),
    )
    assert linear(torch.randn(2, 64)).shape == (2, 32)


def test_every_folder_is_installed():
    """An editable install works without the list, a wheel does not."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in (ROOT / "llamaq").rglob("__init__.py")}
    own = {f for f in folders if not f.startswith(("llamaq.recipes", "llamaq.cluster"))}
    assert set(listed) == own | {"llamaq.recipes", "llamaq.cluster"}
