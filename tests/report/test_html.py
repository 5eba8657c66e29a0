"""The report as one HTML file: its text and plots are report.md's, nothing is loaded, and tables sort by a click."""

import base64
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_report import chain_run, spinquant_run

from llamaq.report.html import html_page
from llamaq.report.publish import report_chain, report_spinquant

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[-+]\d+)?")


class Page(HTMLParser):
    """What a page loads, and what it says outside its styles, scripts and links to its own sections."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.said: list[str] = []
        self._silent: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]
        if tag in ("style", "script", "nav", "title"):
            self._silent.append(tag)

    def handle_endtag(self, tag):
        if self._silent and tag == self._silent[-1]:
            self._silent.pop()

    def handle_data(self, data):
        if not self._silent:
            self.said.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.said).split())


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    run, models, measured = chain_run(folder / "chain")
    rotated, of_rotated, _ = spinquant_run(folder / "rotated")
    return {
        "chain": report_chain(run, models, measured),
        "spinquant": report_spinquant(rotated, of_rotated, ["none", "r4"], ["files", "speed"]),
    }


@pytest.mark.parametrize("kind", ["chain", "spinquant"])
def test_the_page_has_every_number_of_the_report_and_every_plot(reports, kind):
    folder = reports[kind]
    text, markdown = (folder / "index.html").read_text(), (folder / "report.md").read_text()
    page = Page(text)
    plain = re.sub(r"!\[[^]]*\]\([^)]*\)", "", markdown)
    assert NUMBER.findall(page.words) == NUMBER.findall(plain)
    for line in plain.splitlines():
        for cell in re.split(r"\s*\|\s*|\*+|`", line.lstrip("#>- ")):
            assert " ".join(cell.split()) in page.words or set(cell) <= set("-: "), cell
    pictures = [src for src in page.loads if not src.startswith("#")]
    expected = [(folder / name).read_bytes() for name in re.findall(r"\]\((\w+\.png)\)", markdown)]
    assert len(expected) >= 5
    assert [base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in pictures] == expected


def test_the_page_loads_nothing(reports):
    text = (reports["chain"] / "index.html").read_text()
    page = Page(text)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert all(src.startswith(("data:image/png;base64,", "#section-")) for src in page.loads)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "@media print" in text
    ids = set(re.findall(r'<h2 id="([\w-]+)"', text))
    assert {src[1:] for src in page.loads if src.startswith("#")} == ids and len(ids) > 5


def test_what_a_model_answers_is_text(tmp_path):
    answer = (
        "> <script>alert(1)</script> ![x](http://elsewhere/x.png) <img src=http://elsewhere/y.png> ![a](/etc/passwd)"
    )
    text = html_page(f"# Run\n\n{answer}\n", tmp_path)
    page = Page(text)
    assert page.tags.count("script") == 1 and "img" not in page.tags and page.loads == []
    assert html.escape("<script>alert(1)</script>") in text


TABLE = """# Sorts

| model | speed |
| --- | ---: |
| a | 25.8 [25.7, 26.3] **4.85×** |
| b | 1,025.3 |
| c |  |
| d | 1.2e-03 |
| e | ∞ |
| f | **9.5 ± 0.1** |

|  | a run |
| --- | ---: |
| kept | 2 |
| as it is | 1 |
"""
CLICKS = """<script>
const head = document.querySelectorAll("th")[1], order = () =>
  [...document.querySelectorAll("table")[0].tBodies[0].rows].map(row => row.cells[0].textContent).join("");
const found = [];
for (let i = 0; i < 3; i++) { head.click(); found.push(order() + ":" + head.getAttribute("aria-sort")); }
document.querySelectorAll("th")[3].click();
found.push([...document.querySelectorAll("table")[1].tBodies[0].rows].map(row => row.cells[1].textContent).join(""));
document.title = found.join(" ");
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_click_sorts_numbers_as_numbers(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(html_page(TABLE, tmp_path).replace("</body>", f"{CLICKS}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    (title,) = re.findall("<title>(.*)</title>", done.stdout)
    assert title == "dfabec:ascending ebafdc:descending abcdef:null 21"
