"""Where a model came from and its licence, as far as the checkpoint's folder says."""

import json

import pytest

from llamaq.report.card import _base_model, _licences, _license
from llamaq.report.origin import origin_of

LLAMA = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date: September 25, 2024\n"


def card(**facts) -> str:
    return _base_model(facts) + _license(facts) + _licences(facts)


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, (None, None, None)),
        ({"README.md": "---\nlicense: apache-2.0\ntags: [x]\n---\n# Smol\n"}, (None, "apache-2.0", None)),
        ({"README.md": "# no front matter\nlicense: mit\n"}, (None, None, None)),
        ({"README.md": "---\nlicense: [torn\n---\n"}, (None, None, None)),
        ({"LICENSE.txt": LLAMA}, (None, "llama3.2", None)),
        ({"LICENSE": "\n    Apache License\n   Version 2.0, January 2004\n"}, (None, "apache-2.0", None)),
        (
            {"README.md": "---\nlicense: other\nlicense_name: qwen-research\n---\n", "LICENSE": LLAMA},
            (None, "other", "qwen-research"),
        ),
        (
            {"config.json": json.dumps({"_name_or_path": "HuggingFaceTB/SmolLM2-135M"})},
            ("HuggingFaceTB/SmolLM2-135M", None, None),
        ),
        ({"config.json": json.dumps({"_name_or_path": "/home/me/model"})}, (None, None, None)),
        ({"config.json": "{torn"}, (None, None, None)),
    ],
)
def test_the_folder_says_what_a_model_is(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = origin_of(tmp_path)
    assert (found["base_id"], found["license"], found["license_name"]) == expected and found["base"] == tmp_path.name
    text = card(**found)
    assert f"license: {expected[1] or 'other'}\n" in text and ("base_model: " in text) == (expected[0] is not None)
    assert ("Built with Llama" in text) == (expected[1] == "llama3.2")
    named = expected[2] or expected[1]
    assert (f"stay under its licence ({named})" if named else "its folder does not name it") in text


def test_metas_own_folders_have_their_id_in_the_name(tmp_path):
    (tmp_path / "Llama-3.2-1B-Instruct").mkdir()
    assert origin_of(tmp_path / "Llama-3.2-1B-Instruct")["base_id"] == "meta-llama/Llama-3.2-1B-Instruct"
    assert "base_model" not in card(**origin_of(None)) and "license: other\n" in card(**origin_of(None))
    assert "trained from random ones" in card(**origin_of(None)) and "its folder" not in card(**origin_of(None))
