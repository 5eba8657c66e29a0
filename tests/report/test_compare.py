"""`tune compare`: runs of both kinds on one page, blanks for what a run lacks, and errors of one line."""

import json
import re
from pathlib import Path

import pytest
from test_report import chain_run, spinquant_run

from llamaq.report import compare
from llamaq.report.publish import report_chain, report_spinquant


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two chains that differ by a setting, and a SpinQuant run that was not asked for speed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, settings in (("first", []), ("second_|x", ["qat.optimizer.lr=3e-4", "scheme.group_size=64"])):
        run, models, measured = chain_run(folder / name, *settings)
        report_chain(run, models, measured)
    run, models, _ = spinquant_run(folder / "rotated")
    report_spinquant(run, models, ["none", "r4"], ["files"])
    return [folder / "first", folder / "second_|x", folder / "rotated"]


def changed(run: Path, **facts) -> None:
    report = run / "report" / "report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | facts))


def rows(folders: list[Path]) -> dict[str, list[str]]:
    page = compare.render_comparison(compare.read_runs(folders))
    lines = [re.split(r"(?<!\\) \|(?: |$)", line.removeprefix("| ")) for line in page.splitlines() if "|" in line]
    return {cells[0]: [c.strip() for c in cells[1:-1]] for cells in lines}


def test_quality_shares_and_speed_have_a_column_per_run(runs):
    first = json.loads((runs[0] / "report" / "report.json").read_text())
    worse = json.loads(json.dumps(first["scores"]))
    worse["final"] |= {"nll": 1.25, "top1/bf16": 0.875}
    changed(runs[1], scores=worse, pte_bytes=3 * 2**20)
    found = rows(runs)
    assert found["model"] == ["QAT + LoRA + DPO", "QAT + LoRA + DPO", "SpinQuant"]
    assert found["rotation"] == ["", "", "r4"]
    assert found["NLL (nats/token)"] == ["**1.0000**", "1.2500", "**1.0000**"]
    assert found["top-1"] == ["**0.9000**", "0.8750", "**0.9000**"]
    assert found["perplexity"] == ["2.718"] * 3  # all the same: none is the best
    assert found["NLL, QAT + LoRA + DPO"] == ["**1.0000**", "1.2500", ""]
    assert found["QAT + LoRA: share of the loss of the control's PTQ"] == ["0.75", "0.75", ""]
    assert found["SpinQuant: share of PTQ's KL"] == ["", "", "0.80"]
    assert found["SpinQuant: its 95 % interval"] == ["", "", "0.70 to 0.90"]
    assert found["model.pte (MiB)"] == ["**1.0**", "3.0", "**1.0**"]
    assert found["decode (tokens/s)"] == ["2.0", "2.0", ""]
    assert found["days, acc: what ships, .pte"] == ["0.5000", "0.5000", ""]


def test_only_settings_that_differ_are_shown(runs):
    chains = rows(runs[:2])
    assert chains["qat.optimizer.lr"] == ["0.0005", "0.0003"] and chains[r"scheme.group\_size"] == ["32", "64"]
    assert "qat.epochs" not in chains and "seed" not in chains
    assert "**Settings that only some of the runs read**" not in chains
    mixed = rows(runs)
    assert mixed["qat.optimizer.lr"] == ["0.0005", "0.0003", ""] and mixed["spinquant.rounding"] == ["", "", "gptq"]
    titles = list(mixed)
    assert titles.index("**Settings that differ**") < titles.index(r"scheme.group\_size")
    assert titles.index("**Settings that only some of the runs read**") < titles.index("spinquant.rounding")


def test_files_with_the_same_content_are_the_same_setting(tmp_path, runs):
    given = [("/a/x.jsonl", "sha256:1"), ("/b/x.jsonl", "sha256:1"), ("/b/x.jsonl", "sha256:2")]
    finished = [
        compare.Finished(str(i), tmp_path, {}, {"data": (meant, value)}) for i, (value, meant) in enumerate(given)
    ]
    assert not list(compare._setting_rows(finished[:2], shared=True))
    assert [row.cells for row in compare._setting_rows(finished[1:], shared=True)] == [["/b/x.jsonl", "/b/x.jsonl"]]


def test_the_command_writes_a_page_with_the_plots_side_by_side(runs, tmp_path, capsys):
    output = tmp_path / "all.html"
    assert compare.main([*map(str, runs), "--output", str(output)]) == 0
    assert f"comparison: {output}" in capsys.readouterr().out
    page = output.read_text()
    assert "<title>first · second_|x · rotated</title>" in page
    pictures = sum(len(list((r / "report").glob("*.png"))) for r in runs)
    assert page.count('src="data:image/png;base64,') == pictures - 2  # the heat maps of sensitivity are not compared
    assert "http:" not in page and "https:" not in page


def test_runs_of_one_name_are_called_by_their_paths(runs, tmp_path):
    (tmp_path / "first").symlink_to(runs[0])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "first").symlink_to(runs[0])
    names = [r.name for r in compare.read_runs([tmp_path / "first", tmp_path / "b" / "first"])]
    assert names == [f"{tmp_path}/first", f"{tmp_path}/b/first"]


def test_wrong_folders_are_one_line(runs, tmp_path, capsys):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text("{}")
    torn = tmp_path / "torn"
    (torn / "report").mkdir(parents=True)
    (torn / "run.json").write_text("{}")
    (torn / "report" / "report.json").write_text('{"a": ')
    cases = {
        (tmp_path / "nowhere",): "no such folder",
        (tmp_path,): "is not a run (it has no run.json)",
        (tmp_path / "unfinished",): "has no report yet",
        (torn,): "report.json is torn",
        (): "at least two runs",
        (runs[1], "--output", tmp_path / "no" / "x.html"): "cannot be written: No such file or directory",
    }
    for arguments, words in cases.items():
        assert compare.main([str(runs[0]), *map(str, arguments)]) == 1
        said = capsys.readouterr().err
        assert words in said and said.startswith("error: ") and said.count("\n") == 1, said
