"""A page of tables and pictures in one HTML file that loads nothing else."""

import base64
import dataclasses
import html
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG and what it shows."""

    png: bytes
    caption: str


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Pictures side by side, as many as fit: one a row on a phone. Small ones are enlarged."""

    pictures: Sequence[Picture]


Cell = str | float | int | None
Part = str | Picture | Gallery  # HTML, or pictures
FOLDED = 20  # more rows or pictures than these are shown on a click

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 1rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
th { cursor: pointer; position: sticky; top: 0; background: #f4f4f4; }
tr.int8 td { background: #e6f4ea; } tr.fp16 td { background: #fff6dd; } tr.fp32 td { background: #fde8e8; }
figure { margin: 1rem 0; } figcaption { font-size: 13px; }
img { max-width: 100%; height: auto; }
summary { cursor: pointer; margin: .5rem 0; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: 1rem; }
.gallery figure { margin: 0; } .gallery img { width: 100%; }
nav a { margin-right: 1rem; }
:root { color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  body { background: #16181b; color: #e4e4e4; } a { color: #8ab4f8; } img { background: #fff; }
  th { background: #26292d; } th, td { border-color: #3b3e42; }
  tr.int8 td { background: #1c3525; } tr.fp16 td { background: #3b3317; } tr.fp32 td { background: #3d2121; }
}
"""
SORT = """
for (const head of document.querySelectorAll("th")) {
  head.tabIndex = 0;
  head.onkeydown = event => { if (event.key === "Enter") head.onclick(); };
  head.onclick = () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex, down = head.dataset.down !== "1";
    const value = row => { const text = row.cells[column].dataset.value; return isNaN(text) ? text : Number(text); };
    const order = (x, y) => typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "string" ? -1 : 1;
    const rows = [...body.rows].sort((a, b) => order(value(a), value(b)));
    head.dataset.down = down ? "1" : "0";
    for (const row of down ? rows.reverse() : rows) body.append(row);
  };
}
"""


def cell(value: Cell) -> str:
    """One <td>; numbers are shown with four digits and sorted by their value."""
    if isinstance(value, int | float):
        shown = f"{value:d}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
        return f'<td class="number" data-value="{value}">{shown}</td>'
    text = html.escape("-" if value is None else value)
    return f'<td data-value="{text}">{text}</td>'


def table(headings: Sequence[str], rows: Iterable[Sequence[Cell]], classes: Iterable[str] = ()) -> str:
    """A table that sorts by a column when its heading is clicked.

    Args:
        classes: of the rows: int8, fp16 or fp32 colour them.
    """
    found = list(rows)
    kinds = list(classes) or [""] * len(found)
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(
        f'<tr class="{html.escape(kind)}">{"".join(map(cell, row))}</tr>'
        for kind, row in zip(kinds, found, strict=True)
    )
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return folded(f'<div class="scroll" tabindex="0">{whole}</div>', len(found), "rows")


def folded(content: str, count: int, what: str) -> str:
    """HTML, or where it holds more than `FOLDED` of something, their number, which opens it on a click."""
    return content if count <= FOLDED else f"<details><summary>{count} {what}</summary>{content}</details>"


def rendered(part: Part) -> str:
    """HTML of a part. A picture's holds the picture."""
    if isinstance(part, str):
        return part
    if isinstance(part, Gallery):
        shown = "".join(map(rendered, part.pictures))
        return folded(f'<div class="gallery">{shown}</div>', len(part.pictures), "pictures")
    data, text = base64.b64encode(part.png).decode(), html.escape(part.caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def page(title: str, sections: dict[str, list[Part]]) -> str:
    """A whole page: {heading: its parts}, with links to them on top."""
    name = html.escape(title)
    links = "".join(f'<a href="#{number}">{html.escape(heading)}</a> ' for number, heading in enumerate(sections))
    body = "".join(
        f'<section id="{number}"><h2>{html.escape(heading)}</h2>{"".join(map(rendered, parts))}</section>'
        for number, (heading, parts) in enumerate(sections.items())
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head>"
        f"<body><header><h1>{name}</h1></header><nav>{links}</nav><main>{body}</main><script>{SORT}</script></body></html>\n"
    )
