"""Write a report's markdown as one HTML file that needs nothing else: plots inside, tables that sort by a click.

The page asks nobody for anything: its Content-Security-Policy allows inline styles, the inline script and `data:`
images only. Raw HTML in the markdown, such as in a model's answer, is shown and not interpreted.
"""

import base64
import html
import itertools
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

LONG_CELL = 48  # characters

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --back: #fff; --line: #d1d9e0; --soft: #f3f5f7; --link: #0757a8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ec; --back: #14171b; --line: #3a424b; --soft: #1f242a; --link: #7ab7f5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.5rem 4rem; color: var(--text); background: var(--back);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1rem 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 1.75rem 0 .5rem; }
p, li, blockquote { max-width: 80ch; overflow-wrap: break-word; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .9rem; margin: 1rem 0; }
code { font: .87em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; background: var(--soft);
  padding: .1em .3em; border-radius: 4px; overflow-wrap: anywhere; }
blockquote { margin: 1rem 0; padding: .25rem 1rem; border-left: 4px solid var(--line); background: var(--soft); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; border: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--soft); vertical-align: bottom; }
td[style*="right"]:not(.long) { white-space: nowrap; }
td.long { min-width: 14rem; overflow-wrap: anywhere; }
th:first-child, td:first-child { position: sticky; left: 0; }
td:first-child { background: var(--back); }
th.sorts { cursor: pointer; user-select: none; }
th.sorts:focus-visible { outline: 2px solid var(--link); outline-offset: -2px; }
th[aria-sort="ascending"]::after { content: " \\25B2"; font-size: .7em; }
th[aria-sort="descending"]::after { content: " \\25BC"; font-size: .7em; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
p:has(> img) { max-width: 62rem; }
p > img { margin: .5rem 0; }
td img { min-width: 22rem; }
@media print {
  :root { --text: #000; --back: #fff; --line: #999; --soft: #f3f3f3; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .wide { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; }
  td[style*="right"]:not(.long) { white-space: normal; }
  td.long { min-width: 0; }
  img { max-height: 8cm; width: auto; }
  td img { min-width: 0; }
  h2, h3 { break-after: avoid; }
  tr, img, blockquote { break-inside: avoid; }
}
"""

# Click a heading: ascending, descending, as it was. A cell that begins with a number sorts by it, and blanks come last.
SCRIPT = """
const number = text => text.startsWith("∞") ? Infinity
  : parseFloat((text.match(/^[-+−]?[\\d,]*\\.?\\d+(e[-+]?\\d+)?/i) || ["none"])[0].replace(/,/g, "").replace("−", "-"));
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = body ? [...body.rows] : [], heads = [...table.tHead.rows[0].cells];
  if (rows.length < 2 || !heads[0].textContent.trim()) continue;  // its rows have an order of their own
  heads.forEach((head, i) => {
    const text = row => row.cells[i].textContent.trim(), filled = rows.filter(text);
    const numeric = filled.length && filled.every(row => !Number.isNaN(number(text(row))));
    const compare = (a, b) => numeric ? number(text(a)) - number(text(b)) || 0 : text(a).localeCompare(text(b));
    const sort = () => {
      const way = { ascending: "descending", descending: null }[head.getAttribute("aria-sort")] ?? null;
      const order = head.hasAttribute("aria-sort") ? way : "ascending", sign = order === "descending" ? -1 : 1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      if (order) head.setAttribute("aria-sort", order);
      const blank = rows.filter(row => !text(row));
      body.append(...(order ? [...filled].sort((a, b) => sign * compare(a, b)).concat(blank) : rows));
    };
    head.classList.add("sorts");
    head.tabIndex = 0;
    head.title = "sort by this column";
    head.onclick = sort;
    head.onkeydown = event => { if (event.key === "Enter") sort(); };
  });
}
"""


def html_page(text: str, folder: Path) -> str:
    """Return markdown as a page; its pictures, files in `folder`, are inside. The first heading is the title."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    headings = _number_headings(tokens)
    _mark_long_cells(tokens)
    for token in tokens:
        for child in token.children or []:
            if child.type == "image":
                _embed(child, folder)
    body = markdown.renderer.render(tokens, markdown.options, {})
    body = body.replace("<table>", '<div class="wide">\n<table>').replace("</table>", "</table>\n</div>")
    title = next((_plain(t) for t in tokens if t.type == "inline"), "llamaq")
    return _document(title, _with_links(body, headings))


def _number_headings(tokens: list[Any]) -> dict[str, str]:
    """Give every heading of the second level an id; return id → its text."""
    found: dict[str, str] = {}
    for token, inline in itertools.pairwise(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            name = f"section-{len(found) + 1}"
            token.attrSet("id", name)
            found[name] = _plain(inline)
    return found


def _plain(inline: Any) -> str:
    return "".join(child.content for child in inline.children)


def _mark_long_cells(tokens: list[Any]) -> None:
    """Let long cells wrap; those of numbers with their quartiles stay on one line."""
    for token, inline in itertools.pairwise(tokens):
        if token.type == "td_open" and len(inline.content) > LONG_CELL:
            token.attrSet("class", "long")


def _embed(image: Any, folder: Path) -> None:
    """Put a picture into its own address; what is no PNG of ours becomes its text."""
    path = folder / unquote(str(image.attrs["src"]))
    if path.suffix == ".png" and path.is_file():
        image.attrSet("src", f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}")
    else:
        image.type, image.tag, image.children = "text", "", None


def _with_links(body: str, headings: dict[str, str]) -> str:
    """Put links to the sections under the title and its first paragraph."""
    if len(headings) < 3:
        return body
    links = "\n".join(f'<a href="#{name}">{html.escape(text)}</a>' for name, text in headings.items())
    return re.sub(r"(?=<h2)", lambda _: f"<nav>\n{links}\n</nav>\n", body, count=1)


def _document(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
<script>{SCRIPT}</script>
</body>
</html>
"""
