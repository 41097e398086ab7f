"""Sections as one HTML page or as Markdown. The page needs nothing but itself: no script, no font, no image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from itertools import count

from hhh_router.bundle import Manifest
from hhh_router.errors import DataError
from hhh_router.evaluation import charts
from hhh_router.evaluation.blocks import HASH_HEADS, SIGNS, Cell, Charts, Line, Panel, Section, Table
from hhh_router.evaluation.svg import ID_MARK, plain

# a second lock behind the escaping: were markup ever to slip through, a browser would neither run nor fetch anything
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_TAGS = {"same": "{}", "gone": "<del>{}</del>", "new": "<ins>{}</ins>"}
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  color: #1f2328; background: #fff; margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 74rem; }
h1, h2, h3 { line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; } h2 { font-size: 1.35rem; } h3 { font-size: 1.1rem; }
p { margin: .5rem 0; } a { color: #0b5c92; }
header p { color: #59616b; margin: .1rem 0 1rem; }
section { margin-top: 2.75rem; } section section { margin-top: 1.75rem; }
h2 { border-bottom: 2px solid #d5dae0; padding-bottom: .3rem; }
.lead, .note { max-width: 46rem; } .note, .made { color: #59616b; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1rem; margin: .75rem 0;
  font-size: .92rem; }
dt { color: #59616b; } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
nav { border: 1px solid #d5dae0; border-radius: 6px; padding: .75rem 1rem; margin-top: 1.25rem; font-size: .92rem; }
nav p { margin: 0 0 .3rem; font-weight: 600; } nav > ul { columns: 15rem; column-gap: 2rem; margin: 0; }
nav ul { list-style: none; padding: 0; margin: 0; } nav ul ul { padding-left: 1rem; }
nav li { break-inside: avoid; padding: .1rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .75rem 0 .25rem; }
table { border-collapse: collapse; font-size: .84rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid #e4e7eb;
  font-weight: 400; white-space: nowrap; background: #fff; }
thead th { vertical-align: bottom; font-weight: 600; white-space: normal; border-bottom: 2px solid #9aa0a8; }
.word { text-align: left; white-space: normal; min-width: 7rem; max-width: 24rem; overflow-wrap: break-word; }
.hash { font: .78rem ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; color: #59616b;
  text-align: left; }
.hash.word { min-width: 13rem; overflow-wrap: anywhere; }
thead .hash { font: inherit; font-weight: 600; color: inherit; } .word .span { white-space: normal; }
tbody th:first-child { position: sticky; left: 0; }
tr.group th { text-align: left; background: #f3f5f7; font-weight: 600; white-space: normal; padding-top: .5rem; }
tr.group span.about { display: block; font-weight: 400; color: #59616b; font-size: .92em; }
tr.strong th, tr.strong td { background: #eef5fa; font-weight: 600; }
.span { display: block; color: #59616b; font-size: .88em; font-weight: 400; }
.missed, .met, .chosen { font-weight: 600; white-space: nowrap; }
.missed { color: #9a3412; } .met, .chosen { color: #00664a; }
td .missed, td .met { display: block; font-size: .92em; }
del, ins { text-decoration: none; border-radius: 2px; } del { background: #fbe3d6; } ins { background: #d3ecdf; }
.fold { content-visibility: auto; contain-intrinsic-size: auto 2rem; margin: .25rem 0; }
.fold summary { cursor: pointer; color: #0b5c92; }
ul.points { padding-left: 1.2rem; margin: .5rem 0; }
.panels { display: grid; gap: 1.25rem 1.5rem; margin: .75rem 0 1rem; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; min-width: 0; break-inside: avoid; display: flex; flex-direction: column; }
figcaption { font-size: .85rem; font-weight: 600; margin-bottom: .25rem; overflow-wrap: anywhere; }
.drawings { margin-top: auto; display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 11rem), 1fr));
  gap: .5rem; }
.drawings svg { width: 100%; height: auto; display: block; }
.pairs svg, .small svg { max-width: 17rem; } .wide svg { max-width: 31rem; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: .6rem 0;
  font-size: .85rem; }
.legend svg { vertical-align: middle; margin-right: .35rem; }
footer { margin-top: 3rem; border-top: 1px solid #d5dae0; padding-top: .5rem; color: #59616b; font-size: .85rem; }
@media (max-width: 34rem) {
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: .4rem; }
  th, td { padding: .3rem .45rem; } .word { min-width: 6rem; }
}
@media print {
  @page { margin: 14mm; }
  html { font-size: 10pt; } body { font-size: 1rem; padding: 0; max-width: none; }
  a { color: inherit; text-decoration: none; } .scroll { overflow: visible; }
  table { font-size: 6.5pt; } th, td { padding: .12rem .2rem; } .word { min-width: 0; }
  .hash, thead .hash { font-size: 5.5pt; }
  tbody th:first-child { position: static; } tr { break-inside: avoid; } h2, h3, .group { break-after: avoid; }
  .panels { gap: .6rem .8rem; } .pairs { grid-template-columns: 1fr 1fr; }
  .small { grid-template-columns: 1fr 1fr 1fr; }
}
"""


def html_page(manifest: Manifest, sections: Sequence[Section]) -> str:
    """The whole report of a bundle as one page.

    Raises:
        DataError: A chart's numbers are none.
        MissingExtra: matplotlib is not installed.
    """
    return html_document(f"{manifest.name} {manifest.version}", _facts(manifest), sections)


def markdown_page(manifest: Manifest, sections: Sequence[Section]) -> str:
    """The tables of a bundle's report; charts are left to the page."""
    return markdown_document(f"{manifest.name} {manifest.version}", _facts(manifest), sections)


def html_document(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """Any report as one page: title, facts (term and what is said of it), sections.

    Raises:
        DataError: A chart's numbers are none.
        MissingExtra: matplotlib is not installed.
    """
    title = _text(title)
    told = "".join(f"<dt>{_text(term)}</dt><dd>{_text(said)}</dd>" for term, said in facts)
    body = _numbered("\n".join(_section(s, 2, anchor) for s, anchor in _anchored(sections)))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: evaluation</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{title}</h1>\n<p>Evaluation report</p>\n<dl>{told}</dl>\n</header>\n"
        f'<nav aria-label="Contents"><p>Contents</p>{_contents(sections)}</nav>\n<main>\n{body}\n</main>\n'
        "<footer>Brackets hold 95 % intervals. Every table names the command that made it, its seed and its rows."
        "</footer>\n</body>\n</html>\n"
    )


def markdown_document(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The tables of any report."""
    parts = [f"# {_inline(title)}: evaluation"]
    parts.append("\n".join(f"- {_inline(term)}: {_inline(said)}" for term, said in facts))
    for section in sections:
        parts += _markdown(section, 2)
    return "\n\n".join(parts) + "\n"


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    use = "commercial use allowed" if manifest.commercial_use else "research only: some data forbids commercial use"
    backbone = manifest.backbone
    ranks = sorted({spec.rank for spec in manifest.experts.values()})
    return [
        ("backbone", f"{backbone.source} ({backbone.licence}), {backbone.layers} layers, {backbone.dtype}"),
        (
            "experts",
            f"{', '.join(manifest.experts)}; rank {', '.join(map(str, ranks))}, "
            f"from layer {manifest.first_adapted_layer} on",
        ),
        ("licence of the weights", f"{manifest.licence}; {use}"),
        ("recipe", f"{manifest.recipe} (sha256 {manifest.recipe_sha256[:16]}), seed {manifest.seed}"),
    ]


# --- HTML


def _text(text: object) -> str:
    return escape(plain(text))


def _anchored(sections: Sequence[Section], prefix: str = "part") -> Iterator[tuple[Section, str]]:
    # by number: titles come from the figures, and two may be alike or hold nothing an id may hold
    for place, section in enumerate(sections, start=1):
        yield section, f"{prefix}-{place}"


def _contents(sections: Sequence[Section], prefix: str = "part") -> str:
    items = (
        f'<li><a href="#{anchor}">{_text(s.title)}</a>{_contents(s.sections, anchor) if s.sections else ""}</li>'
        for s, anchor in _anchored(sections, prefix)
    )
    return f"<ul>{''.join(items)}</ul>"


def _section(section: Section, level: int, anchor: str) -> str:
    parts = [f'<section id="{anchor}">', f"<h{level}>{_text(section.title)}</h{level}>"]
    if section.lead:
        parts.append(f'<p class="lead">{_text(section.lead)}</p>')
    if section.points:
        listed = "".join(f"<li><b>{_text(term)}</b>: {_text(said)}</li>" for term, said in section.points)
        parts.append(f'<ul class="points">{listed}</ul>')
    parts += [_charts(b) if isinstance(b, Charts) else _table(b, section.title) for b in section.blocks]
    parts += [_section(s, level + 1, inner) for s, inner in _anchored(section.sections, anchor)]
    return "\n".join([*parts, "</section>"])


def _table(table: Table, title: str) -> str:
    made = "; ".join(f"<code>{_text(command)}</code>, seed {_text(seed)}" for command, seed in table.made_by)
    sizes = f"; {_text(table.sizes)}" if table.sizes else ""
    return f'{_folds(table, title)}\n<p class="made">Made by {made}{sizes}.</p>'


def _folds(table: Table, title: str) -> str:
    """The rows, or so many at a time under a line to open them by."""
    total = len(table.lines)
    if not table.fold or total <= table.fold:
        return _rows(table, table.lines, title)
    folds = []
    for begin in range(0, total, table.fold):
        lines = table.lines[begin : begin + table.fold]
        which = f"{begin + 1:,} to {begin + len(lines):,} of {total:,}"
        opened = "" if begin else " open"
        rows = _rows(table, lines, f"{title}, {which}")
        folds.append(f'<details class="fold"{opened}><summary>{which}</summary>{rows}</details>')
    return "\n".join(folds)


def _rows(table: Table, lines: Sequence[Line], title: str) -> str:
    head = "".join(f'<th scope="col"{_kind(i, table)}>{_text(h)}</th>' for i, h in enumerate(table.head))
    rows = []
    group = None
    for line in lines:
        if line.group and line.group != group:
            group = line.group
            badge = f" {_badge(line.badge)}" if line.badge else ""
            note = f'<span class="about">{_text(line.note)}</span>' if line.note else ""
            width = len(table.head)
            rows.append(
                f'<tr class="group"><th scope="colgroup" colspan="{width}">{_text(group)}{badge}{note}</th></tr>'
            )
        rows.append(_line(line, table))
    body = "\n".join(rows)
    # a wide table scrolls by itself, with keys too, and leaves the page in place
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {_text(title)}"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _line(line: Line, table: Table) -> str:
    cells = [
        f'<th scope="row"{_kind(i, table)}>{_cell(c)}</th>' if i == 0 else f"<td{_kind(i, table)}>{_cell(c)}</td>"
        for i, c in enumerate(line.cells)
    ]
    strong = ' class="strong"' if line.strong else ""
    return f"<tr{strong}>{''.join(cells)}</tr>"


def _kind(column: int, table: Table) -> str:
    kinds = ["word"] * (column < table.labels) + ["hash"] * (table.head[column] in HASH_HEADS)
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _cell(cell: Cell) -> str:
    span = f'<span class="span">{_text(cell.span)}</span>' if cell.span else ""
    text = "".join(_TAGS[kind].format(_text(text)) for kind, text in cell.parts) or _text(cell.text)
    return f"{text}{span}{_badge(cell.badge) if cell.badge else ''}"


def _badge(name: str) -> str:
    return f'<span class="{_text(name)}">{_text(SIGNS.get(name, name))}</span>'


def _charts(block: Charts) -> str:
    keys = "".join(f"<li>{charts.swatch(i, line=block.lines)}{_text(name)}</li>" for i, name in block.keys)
    legend = f'<ul class="legend">{keys}</ul>' if keys else ""
    note = f'<p class="note">{_text(block.note)}</p>' if block.note else ""
    panels = "\n".join(
        f"<figure><figcaption>{_text(panel.caption)}</figcaption>"
        f'<div class="drawings">{_drawings(panel)}</div></figure>'
        for panel in block.panels
    )
    return f'{note}{legend}<div class="panels {_text(block.layout)}">\n{panels}\n</div>'


def _numbered(body: str) -> str:
    number = count(1)
    return re.sub("<svg .*?</svg>", lambda svg: svg[0].replace(ID_MARK, f"c{next(number)}"), body, flags=re.DOTALL)


def _drawings(panel: Panel) -> str:
    try:
        return "".join(draw() for draw in panel.drawings)
    except (IndexError, TypeError, ValueError) as error:
        raise DataError(f"figures.json: {plain(panel.caption)}: cannot be drawn ({plain(error)})") from error


# --- Markdown


def _markdown(section: Section, level: int) -> Iterator[str]:
    yield f"{'#' * level} {_inline(section.title)}"
    if section.lead:
        yield _inline(section.lead)
    if section.points:
        yield "\n".join(f"- **{_inline(term)}**: {_inline(said)}" for term, said in section.points)
    for block in section.blocks:
        if isinstance(block, Table):
            yield _markdown_table(block)
    for inner in section.sections:
        yield from _markdown(inner, level + 1)


def _markdown_table(table: Table) -> str:
    grouped = any(line.group for line in table.lines)
    head = ([table.group_title] if grouped else []) + list(table.head)
    sides = [":--"] * (grouped + table.labels) + ["--:"] * (len(table.head) - table.labels)
    rows = [f"| {' | '.join(map(_inline, head))} |", f"| {' | '.join(sides)} |"]
    for line in table.lines:
        rows.append(f"| {' | '.join([*([_group(line)] if grouped else []), *map(_plain_cell, line.cells)])} |")
    made = "; ".join(f"{_code(command)}, seed {seed}" for command, seed in table.made_by)
    return "\n".join(rows) + f"\n\nMade by {made}{'; ' + _inline(table.sizes) if table.sizes else ''}."


def _group(line: Line) -> str:
    return _inline(f"{line.group} {SIGNS.get(line.badge, '')}".strip())


def _plain_cell(cell: Cell) -> str:
    return _inline(" ".join(t for t in (cell.text, cell.span, SIGNS.get(cell.badge, "")) if t))


def _inline(text: object) -> str:
    """Text that stays text in Markdown, in a table too.

    >>> _inline("a|b <i> [x](y) *z*")
    'a\\\\|b \\\\<i\\\\> \\\\[x\\\\](y) \\\\*z\\\\*'
    """
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", plain(text))


def _code(text: str) -> str:
    """A code span; its fence is longer than any row of backticks inside.

    >>> _code("a `b`"), _code("plain")
    ('`` a `b` ``', '`plain`')
    """
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{plain(text)}{pad}{fence}"
