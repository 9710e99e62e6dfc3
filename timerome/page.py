"""Pieces of the HTML pages this library writes: self-contained, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files


def page(title: str, subtitle: str, sections: Iterable[tuple[str, str]]) -> str:
    """Return a whole page.

    Args:
        title: of the page; plain text.
        subtitle: HTML.
        sections: heading, which may be empty, and HTML of each.
    """
    style = files("timerome").joinpath("assets/page.css").read_text(encoding="utf-8").strip()
    body = "".join((f"<h2>{text(heading)}</h2>\n" if heading else "") + html + "\n" for heading, html in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>timerome: {text(title)}</title>\n<style>\n{style}\n</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{text(title)}</h1>\n<p class="soft">{subtitle}</p>\n</header>\n{body}</body>\n</html>\n'
    )


def text(value: str) -> str:
    """Return plain text as HTML."""
    return escape(value, quote=True)


def join(*parts: str) -> str:
    """Return plain texts as one line of HTML."""
    return " · ".join(text(part) for part in parts)


def listed(items: Iterable[str]) -> str:
    """Return plain texts as an HTML list."""
    return "<ul>" + "".join(f"<li>{text(item)}</li>" for item in items) + "</ul>"


def scrolled(html: str) -> str:
    """Return HTML that scrolls sideways where it is too wide."""
    return f'<div class="scroll">{html}</div>'


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers_from: int = 1,
    strong: int | None = None,
    caption: str = "",
    raw: bool = False,
) -> str:
    """Return an HTML table; the first cell of each row is its heading.

    Args:
        columns: their names.
        rows: cells, as many as columns.
        numbers_from: columns from this one on are numbers.
        strong: a column that stands out.
        caption: above the table.
        raw: cells other than headings are HTML already.
    """

    def kind(i: int) -> str:
        names = ["n"] * (i >= numbers_from) + ["first"] * (i == strong)
        return f' class="{" ".join(names)}"' if names else ""

    head = "".join(f"<th{kind(i) if i != strong else ' class=n'}>{text(name)}</th>" for i, name in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(
            f'<th scope="row">{text(cell)}</th>' if i == 0 else f"<td{kind(i)}>{cell if raw else text(cell)}</td>"
            for i, cell in enumerate(row)
        ) + "</tr>"
        for row in rows
    )  # fmt: skip
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
