"""Tables of image-level labels: what is in each picture, written by hand or by a tool."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from wsss_models.data.artefacts import FileError
from wsss_models.data.files import PICTURE_SUFFIXES
from wsss_models.data.folder import check_id
from wsss_models.data.lists import class_ids_of, read_text

TABLE = "labels.csv"
_FILE_HEADINGS = ("file", "filename", "image", "id")
_LIST_HEADINGS = ("class", "classes", "label", "labels")
_YES, _NO = ("1", "1.0", "true"), ("", "0", "0.0", "false")


@dataclass(frozen=True)
class Row:
    """One picture of a table."""

    line: int  # in the file, from 1
    file: str  # as written, with its suffix if it has one
    names: tuple[str, ...]  # of classes, or their ids
    split: str | None


@dataclass(frozen=True)
class Table:
    path: Path
    rows: dict[str, Row]  # by id
    columns: tuple[str, ...] | None  # class names of the headings, where each class has a column of its own

    def names(self) -> list[str]:
        """Every class name of the table, sorted; with a column each, in the order of the columns."""
        return list(self.columns) if self.columns else sorted({n for row in self.rows.values() for n in row.names})

    def class_ids(self, name: str, classes: Sequence[str]) -> list[int]:
        """Ids (1..C, ascending) of a picture's classes, which the table gives by name or by id.

        Raises:
            FileError: no row for the picture, an unknown name or id; names the line.
        """
        row = self.rows.get(name)
        if row is None:
            raise FileError(self.path, f"no line for the picture {name!r}")
        if not row.names or not all(word.isdecimal() for word in row.names) or set(row.names) <= set(classes):
            return class_ids_of(row.names, classes, self.path, row.line)
        wrong = [word for word in row.names if not 1 <= int(word) <= len(classes)]
        if wrong:
            hint = " (0 is the background: add 1 to ids that start at 0)" if "0" in wrong else ""
            raise FileError(self.path, f"line {row.line}: class id must be in 1..{len(classes)}, got {wrong[0]}{hint}")
        return sorted({int(word) for word in row.names})


def read_labels(path: Path | str) -> Table:
    """Read image-level labels.

    A `.csv` file has one picture a row: its file (relative to the pictures' folder, suffix optional), then its classes,
    each in a cell of its own or several in one, separated by ";". A first row with `file` in its first cell is the
    heading; it may name a column `split` (train, val, ...). Where all other cells are 0 or 1 (or empty, true, false),
    each column is a class of the heading's name, unless that is `class` or `label`. A file of any other suffix has one
    picture a line: the file and its classes, separated by blanks, without heading. Classes are names or ids 1..C. A
    picture without any is one of background alone.

        file,split,classes               file,cat,dog
        street/01.jpg,train,car;person   01.jpg,1,0
        02.jpg,val,                      02.jpg,1,1

    Returns:
        Table: rows in the order of the file.

    Raises:
        FileError: missing, empty, no text, a picture twice, an id that leads out of the folder; names the line.
    """
    path = Path(path)
    lines = read_text(path).splitlines()
    if path.suffix.lower() == ".csv":
        cells = _csv(path, lines)
    else:
        cells = [(n, line.split()) for n, line in enumerate(lines, start=1) if line.strip()]
    heading: Sequence[str] = ()
    if cells and path.suffix.lower() == ".csv" and cells[0][1][0].lower() in _FILE_HEADINGS:
        heading, cells = cells[0][1], cells[1:]
    if not cells:
        raise FileError(path, "must name at least one picture, got an empty table")
    split_at = heading.index("split") if "split" in heading else None
    columns = _columns(path, heading, cells, split_at)
    rows: dict[str, Row] = {}
    for line, words in cells:
        row = _row(path, line, words, split_at, columns)
        name = _id(path, line, row.file)
        if name in rows:
            raise FileError(
                path, f"line {line}: each picture must appear once, got {name!r} again (line {rows[name].line})"
            )
        rows[name] = row
    return Table(path, rows, tuple(columns.values()) if columns else None)


def _csv(path: Path, lines: list[str]) -> list[tuple[int, list[str]]]:
    reader = csv.reader(lines, skipinitialspace=True, strict=True)
    cells = []
    try:
        for words in reader:
            words = [word.strip() for word in words]
            if any(words):
                cells.append((reader.line_num, words))
    except csv.Error as error:
        raise FileError(path, f"line {reader.line_num}: no valid CSV ({error})") from None
    return cells


def _columns(
    path: Path, heading: Sequence[str], cells: list[tuple[int, list[str]]], split_at: int | None
) -> dict[int, str]:
    """Column -> class, where each class has one; {} where cells hold names."""
    places = [i for i in range(1, len(heading)) if i != split_at]
    marks = (words[i].lower() for _, words in cells for i in range(1, len(words)) if i != split_at)
    listed = all(heading[i].lower() in _LIST_HEADINGS for i in places)
    if listed or not all(mark in _YES + _NO for mark in marks):
        return {}
    for line, words in cells:
        if len(words) != len(heading):
            raise FileError(path, f"line {line}: must have {len(heading)} cells as the heading, got {len(words)}")
    return {i: heading[i] for i in places}


def _row(path: Path, line: int, words: list[str], split_at: int | None, columns: dict[int, str]) -> Row:
    split = words[split_at] if split_at is not None and split_at < len(words) else None
    if columns:
        names = tuple(name for i, name in columns.items() if words[i].lower() in _YES)
    else:
        cells = [word for i, word in enumerate(words) if i not in (0, split_at)]
        names = tuple(part.strip() for cell in cells for part in cell.split(";") if part.strip())
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FileError(path, f"line {line}: each class must be named once, got {twice!r} twice")
    return Row(line, words[0], names, split)


def _id(path: Path, line: int, file: str) -> str:
    suffix = PurePosixPath(file).suffix
    name = file[: -len(suffix)] if suffix.lower() in PICTURE_SUFFIXES else file
    try:
        return check_id(name)
    except ValueError as error:
        raise FileError(path, f"line {line}: {error}") from None
