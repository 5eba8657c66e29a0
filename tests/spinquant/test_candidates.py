"""Which candidates there are, which one ships, and what of the config each of them reads."""

import pytest
from toy import configured

from llamaq.errors import UserError
from llamaq.spinquant.candidates import candidates_of, choose, settings_read


def test_the_best_candidate_ships_unless_one_is_forced():
    judged = {"none": 0.2, "r4": 0.3, "r1_r2_r4_seed0": 0.25}
    assert choose(None, judged) == "none"  # no rotation that loses to none
    assert choose("r4", judged) == "r4"
    with pytest.raises(UserError, match=r"spinquant\.force=r1 is none of the candidates: none, r4"):
        choose("r1", judged)


def test_a_forced_candidate_that_there_is_not_is_noticed_before_anything_runs(tmp_path):
    c = configured(tmp_path / "x", "spinquant.force=r1")
    with pytest.raises(UserError, match=r"spinquant\.force=r1 is none of the candidates: none, r4"):
        candidates_of(c.section("spinquant"), c.seed)


def test_seeds_only_where_something_is_random(tmp_path):
    c = configured(tmp_path / "x")
    names = [candidate.name for candidate in candidates_of(c.section("spinquant"), c.seed)]
    assert names == ["none", "r4", "r2_r4_seed0", "r2_r4_seed1", "r1_r2_r4_seed0", "r1_r2_r4_seed1"]


def test_settings_count_only_where_they_are_read(tmp_path):
    c = configured(tmp_path / "x", "spinquant.polish_steps=0", "spinquant.refine_steps=0")
    none, *_, learned = candidates_of(c.section("spinquant"), c.seed)
    of_none, of_learned = (set(settings_read(k, c.section("spinquant"))) for k in (none, learned))
    assert "spinquant.damping" in of_none and "spinquant.polish_lr" not in of_none
    learning = {f"spinquant.{name}" for name in ("objective", "steps", "lr", "rows", "refine_steps")}
    assert of_learned - of_none == learning
