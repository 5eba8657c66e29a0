"""Test what a Ray worker does around the recipe, without Ray's processes."""

import pytest
from conftest import small

from llamaq.cluster.options import LAUNCHER
from llamaq.cluster.worker import RayHooks, find_recipe
from llamaq.errors import UserError
from llamaq.runs.run import Run


def test_a_run_opens_beside_rays_own_folder(tmp_path):
    config = small(tmp_path / "run")
    (tmp_path / "run" / LAUNCHER).mkdir(parents=True)  # Ray Train makes it before its workers start
    Run(config, RayHooks(config)).close()
    (tmp_path / "other" / "files").mkdir(parents=True)
    with pytest.raises(UserError, match="is not empty and is not a llamaq run"):
        Run(small(tmp_path / "other"), RayHooks(config))


def test_recipes_are_llamaqs_or_a_module_of_ones_own(tmp_path, monkeypatch):
    from llamaq.recipes import qat

    assert find_recipe("qat") is qat.recipe
    (tmp_path / "mine.py").write_text("def recipe(run): ...\n")
    (tmp_path / "imports_nothing_there.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_recipe("mine").__module__ == "mine"
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        find_recipe("imports_nothing_there")
    with pytest.raises(UserError, match="'nowhere' is neither a recipe of llamaq nor a module"):
        find_recipe("nowhere")
