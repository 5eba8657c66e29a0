"""Calibration and selection text: mixed from several datasets, apart from each other, the same every time."""

import pytest
import torch
from toy import configured

from llamaq.errors import UserError
from llamaq.spinquant.windows import windows


def test_calibration_mixes_parts_and_keeps_selection_apart(tmp_path, monkeypatch):
    from llamaq.data.corpus import tiny_chat

    (tmp_path / "corpus").mkdir()
    tiny_chat(tmp_path / "corpus", 120, 4, 4, 60, 640)
    (tmp_path / "text.txt").write_text("\f".join(f"June has {i} days and {i} nights." * 60 for i in range(8)))
    text = "{_component_: llamaq.data.text.text_windows_dataset, source: " + f"{tmp_path}/text.txt}}"
    parts = "[{dataset: '${base.dataset}', num_samples: 5}, {dataset: " + text + ", num_samples: 3}]"
    c = configured(tmp_path, f"spinquant.calibration={parts}")
    calibration, selection = windows(c)
    assert calibration.shape == (8, 96) and selection.shape == (4, 96)
    assert torch.equal(calibration, windows(c)[0])
    seen = {tuple(w.tolist()) for w in calibration}
    assert not any(tuple(w.tolist()) in seen for w in selection)
    with pytest.raises(UserError, match=r"calibration\[1\].dataset has text for \d+ windows of 96 tokens"):
        windows(configured(tmp_path, f"spinquant.calibration={parts.replace('samples: 3', 'samples: 3000')}"))
