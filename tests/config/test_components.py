"""Components: names of the layout before, and errors that name the setting."""

import pytest

from llamaq.config import instantiate
from llamaq.config.components import MOVED, current_name
from llamaq.errors import UserError


def test_names_of_the_layout_before_still_work():
    from llamaq.data import text

    assert current_name("llamaq.train.corpus.tiny_chat") == "llamaq.data.corpus.tiny_chat"
    assert current_name("llamaq.train.corpus.from_text") == "llamaq.data.corpus.from_text"
    for kind in ("text_windows_dataset", "text_preference_dataset"):
        assert current_name(f"llamaq.train.data.{kind}") == f"llamaq.data.text.{kind}"
        assert callable(getattr(text, kind))


@pytest.mark.parametrize(
    "name", ["torch.optim.AdamW", "mine.llamaq.train.corpus", "llamaq.train.corpus_of_mine.x", *MOVED.values()]
)
def test_other_names_stay(name):
    assert current_name(name) == name


def test_a_corpus_named_as_before_is_written(tmp_path):
    counts = {"num_train": 120, "num_pairs": 4, "num_heldout": 4, "num_people": 60, "vocab_size": 640}
    component = {"_component_": "llamaq.train.corpus.tiny_chat", **counts}
    assert instantiate(component, folder=tmp_path, setting="corpus")["pairs"] == 4
    assert (tmp_path / "pairs.jsonl").is_file() and component["_component_"] == "llamaq.train.corpus.tiny_chat"


@pytest.mark.parametrize(
    "component, message",
    [
        ({"_component_": "torch.optim.Adamw"}, "qat.optimizer._component_=torch.optim.Adamw: "),
        ({"_component_": "nowhere.at.all"}, "qat.optimizer._component_=nowhere.at.all: "),
        ({"_component_": "torch.optim.AdamW", "rate": 1}, "qat.optimizer: torch.optim.AdamW was called with wrong"),
        ({"_component_": "pathlib.Path.read_text"}, "/nowhere"),
    ],
)
def test_errors_name_the_setting(component, message):
    from pathlib import Path

    with pytest.raises(UserError) as e:
        instantiate(component, Path("/nowhere"), setting="qat.optimizer")
    assert message in str(e.value)
