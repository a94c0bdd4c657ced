"""Result tables on disk: appended atomically, resumable, readable by either side's tools.

A file is only ever extended; where a cell was measured again, the last row counts. `rows.py` has the schemas,
`result_tree.py` the places.
"""

from __future__ import annotations

import csv
import heapq
import io
import math
import re
from collections.abc import Iterable
from itertools import accumulate
from operator import itemgetter
from pathlib import Path

import pandas as pd

from slidesparse.errors import RecordError
from slidesparse.files import write_text
from slidesparse.rows import FLAG_COLUMNS, TEXT_COLUMNS, Row

_TRIPS = re.compile(r'[,"\n\r#]')


def append(path: Path, rows: Iterable[Row], header: Iterable[str] = ()) -> None:
    """Add rows of one type to a table. The file is replaced whole, so a killed run leaves the old or the new one.

    `header`: `#` lines (without the mark) that a new file starts with. Rows already there are kept as
    they are; columns that an older version of the file lacks are added empty.

    Raises:
        RecordError: the file there is not a table, or has columns that this version does not know.
        DiskError: disk full, or the folder cannot be written.
    """
    rows = list(rows)
    if not rows:
        return
    columns = type(rows[0]).columns()
    dumps = [row.model_dump(mode="json") for row in rows]
    added = [[_text(dump[name]) for name in columns] for dump in dumps]
    if not path.exists():
        comments = [f"# {line}" for line in header]
        write_text(path, "".join(f"{line}\n" for line in comments) + _lines([columns, *added]))
        return
    comments, cells = _parse_as(columns, path)
    write_text(path, "".join(f"{line}\n" for line in comments) + _lines([columns, *cells, *added]))


def merged(path: Path, other: Path, row_type: type[Row]) -> str | None:
    """Text of a table with the rows of another one that it lacks; None where it lacks none. Nothing is written.

    The last row of a cell counts, so the rows of both stand in the order of their `time_utc`: of a cell that both have,
    the later measurement is the last. Appending would let the older one count where the other table is older. Rows
    of one table never change places: those of a tuned cell are in an order of their own, its winner last, and
    their times may differ by the second in which they were written. At equal times ours come first.

    A row that is there already, equal in every column, is not added. Header lines are those of the table that is there.

    Raises:
        RecordError: one of them is not a table, or has columns that this version does not know.
    """
    columns = row_type.columns()
    comments, theirs = _parse_as(columns, other)
    ours: list[list[str]] = []
    if path.exists():
        comments, ours = _parse_as(columns, path)
    known = {tuple(row) for row in ours}
    added = [list(row) for row in dict.fromkeys(map(tuple, theirs)) if row not in known]
    if not added:
        return None
    time = columns.index("time_utc")
    timed = (zip(accumulate((row[time] for row in rows), max), rows, strict=True) for rows in (ours, added))
    cells = [row for _, row in heapq.merge(*timed, key=itemgetter(0))]
    return "".join(f"{line}\n" for line in comments) + _lines([columns, *cells])


def read(path: Path) -> pd.DataFrame:
    """All rows of a table, ours or published, numbers as numbers; empty when there is no file.

    A number that is not there (a column that an older file lacks, a published blank) is NaN; a text is
    empty and a flag False.

    Raises RecordError naming the file (and the line) when it is not a table.
    """
    if not path.exists():
        return pd.DataFrame()
    _, columns, cells = _parse(path)
    frame = pd.DataFrame(cells, columns=columns, dtype=object)
    for name in columns:
        if name in TEXT_COLUMNS:
            frame[name] = frame[name].astype("str")
        elif name in FLAG_COLUMNS:
            frame[name] = frame[name] == "True"
        else:
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame


def latest(frame: pd.DataFrame, key: tuple[str, ...]) -> pd.DataFrame:
    """The last row of each cell, in the order in which the cells first appear."""
    if frame.empty:
        return frame
    last = frame.drop_duplicates(list(key), keep="last")
    first = frame.drop_duplicates(list(key), keep="first")
    return first[list(key)].merge(last, on=list(key), how="left")[list(frame.columns)]


def is_done(path: Path, row_type: type[Row], key: dict[str, object], fingerprint: str) -> bool:
    """Is the cell's last row there, successful (or skipped), and made under the same conditions?

    Raises ValueError when `key` names a column that `row_type` does not have.
    """
    unknown = set(key) - set(row_type.columns())
    if unknown:
        raise ValueError(f"{row_type.__name__} has no column {', '.join(sorted(unknown))}")
    return done_in(read(path), key, fingerprint)


def done_in(frame: pd.DataFrame, key: dict[str, object], fingerprint: str) -> bool:
    """As `is_done`, for a table that was read before."""
    return finished(frame, tuple(key)).get(tuple(key.values())) == fingerprint


def finished(frame: pd.DataFrame, names: tuple[str, ...]) -> dict[tuple[object, ...], str]:
    """Fingerprint of each cell whose last row is successful or skipped, by its values in the columns `names`."""
    if frame.empty or not {*names, "fingerprint", "status"} <= set(frame.columns):
        return {}
    cells = zip(*(frame[name] for name in names), strict=True)
    last = dict(zip(cells, zip(frame["fingerprint"], frame["status"], strict=True), strict=True))
    return {cell: conditions for cell, (conditions, status) in last.items() if status in ("ok", "skipped")}


def outcomes(frame: pd.DataFrame, names: tuple[str, ...]) -> dict[tuple[object, ...], str]:
    """`ok`, `failed` or `skipped` of each cell's last row, by its values in the columns `names`.

    A row that stands although its check failed (`verified`) is failed.
    """
    if frame.empty or not {*names, "status"} <= set(frame.columns):
        return {}
    status = frame["status"]
    if "verified" in frame.columns:
        status = status.mask(frame["verified"] == "failed", "failed")
    cells = zip(*(frame[name] for name in names), strict=True)
    return dict(zip(cells, status, strict=True))


def _parse_as(columns: list[str], path: Path) -> tuple[list[str], list[list[str]]]:
    """Leading `#` lines, and rows with these columns; what an older version of the file lacks is empty."""
    comments, old, cells = _parse(path)
    unknown = [name for name in old if name not in columns]
    if unknown:
        raise RecordError(
            f"{path}: unknown columns {', '.join(unknown)}; it was written by another version: move it aside"
        )
    if old != columns:
        place = {name: index for index, name in enumerate(old)}
        cells = [[row[place[name]] if name in place else "" for name in columns] for row in cells]
    return comments, cells


def _parse(path: Path) -> tuple[list[str], list[str], list[list[str]]]:
    """Leading `#` lines, column names, rows. Only lines before the column names are comments: a reason may hold `#`."""
    try:
        text = path.read_bytes().decode("utf-8")
        stream = io.StringIO(text, newline="")
        comments, start = [], 0
        for line in stream:
            if not line.startswith("#"):
                break
            comments.append(line.rstrip("\r\n"))
            start += len(line)
        reader = csv.reader(io.StringIO(text[start:], newline=""), strict=True)
        columns = next(reader, [])
        if not columns:
            raise RecordError(f"{path}: not a result table: no column names; move it aside")
        cells = []
        for row in reader:
            if row and len(row) != len(columns):
                line_number = len(comments) + reader.line_num
                raise RecordError(
                    f"{path}: line {line_number}: {len(row)} fields under {len(columns)} columns; move the file aside"
                )
            if row:
                cells.append(row)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecordError(f"{path}: not a result table: {str(error).splitlines()[0]}; move it aside") from None
    return comments, columns, cells


def _lines(rows: Iterable[list[str]]) -> str:
    return "".join(",".join(map(_quoted, row)) + "\n" for row in rows)


def _quoted(text: str) -> str:
    """Quoted where a reader could trip. `csv` leaves \\r bare, and readers with comment='#' cut at a bare `#`."""
    return '"' + text.replace('"', '""') + '"' if _TRIPS.search(text) else text


def _text(value: object) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else str(value)
