"""Reading a rendered report: its sections, headings and tables."""

from __future__ import annotations

import re


def section(text: str, title: str) -> str:
    """Text of one numbered section."""
    heading = re.search(rf"^## \d+\. {title}", text, re.M)
    assert heading is not None, title
    return re.split(r"^## ", text[heading.start() + 3 :], flags=re.M)[0]


def tables(text: str) -> list[list[list[str]]]:
    """All tables: rows of cells, read as GitHub does (an escaped `|` does not end a cell)."""
    found: list[list[list[str]]] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        before = line
    return found


def block(text: str, heading: str) -> str:
    """Text under a heading of the third level."""
    return re.split(r"^##", text[text.index(f"### {heading}\n") + 4 :], flags=re.M)[0]


def table_under(text: str, heading: str, number: int) -> list[list[str]]:
    """The table of that number under a heading of the third level."""
    return tables(block(text, heading))[number]
