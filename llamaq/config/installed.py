"""Where the files that come with llamaq lie: recipes, packaged configs, DeepSpeed settings and cluster files."""

from pathlib import Path


def recipes_dir() -> Path:
    """Return the folder of the recipes: `llamaq/recipes` when installed, `recipes/` in a checkout."""
    return _part("recipes")


def cluster_dir() -> Path:
    """Return the folder of the Ray and DeepSpeed files: `llamaq/cluster` when installed, `cluster/` in a checkout."""
    return _part("cluster")


def packaged_configs() -> dict[str, Path]:
    """Return the configs that come with llamaq by name, e.g. `llama3_2/1B_qat_lora_dpo`."""
    root = recipes_dir() / "configs"
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.yaml"))}


def _part(name: str) -> Path:
    package = Path(__file__).resolve().parent.parent
    return package / name if (package / name).is_dir() else package.parent / name
