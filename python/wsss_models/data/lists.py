"""Text files that list things: class names, the ids of a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wsss_models.data.artefacts import FileError
from wsss_models.data.files import MAX_CLASS_ID
from wsss_models.data.folder import check_id

CLASSES_FILE = "classes.txt"  # one name a line: line n is class id n


def check_classes(where: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Class names, each once, 1..254 of them.

    Raises:
        FileError: otherwise; `where` is where they were read.
    """
    if not 1 <= len(classes) <= MAX_CLASS_ID:
        raise FileError(where, f"there must be 1..{MAX_CLASS_ID} classes, got {len(classes)}")
    twice = [name for name in classes if list(classes).count(name) > 1]
    if twice:
        raise FileError(where, f"each class must be named once, got {twice[0]!r} {classes.count(twice[0])} times")
    return tuple(classes)


def read_classes(root: Path) -> tuple[str, ...] | None:
    """The names in `classes.txt`; None where there is no such file.

    Raises:
        FileError: it cannot be read, has a blank line between names, or a name twice.
    """
    path = root / CLASSES_FILE
    if not path.exists():
        return None
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if "" in names:
        raise FileError(path, f"line {names.index('') + 1}: must hold a class name, got a blank line")
    return check_classes(path, names)


def read_text(path: Path) -> str:
    """A text file, UTF-8.

    Raises:
        FileError: missing, or no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileError(path, "no such file") from None
    except UnicodeDecodeError as error:
        raise FileError(path, f"must be text in UTF-8 ({error})") from error
    except OSError as error:
        raise FileError(path, (error.strerror or str(error)).rstrip(".")) from error


def read_split(path: Path) -> list[str]:
    """Ids of a list: the first word of each line, of published lists with paths ("/JPEGImages/ID.jpg ...") the id.

    Raises:
        FileError: it cannot be read, is empty, or names a picture twice or outside the set.
    """
    first_line: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        name = words[0]
        if name.startswith("/"):  # the lists of AffinityNet's code
            name = Path(name).stem
        try:
            check_id(name)
        except ValueError as error:
            raise FileError(path, f"line {number}: {error}") from None
        if name in first_line:
            raise FileError(
                path, f"line {number}: each id must appear once, got {name!r} again (line {first_line[name]})"
            )
        first_line[name] = number
    if not first_line:
        raise FileError(path, "must name at least one picture, got an empty list")
    return list(first_line)


def class_ids_of(names: Sequence[str], classes: Sequence[str], where: Path, line: int | None = None) -> list[int]:
    """Class ids, ascending, of names read in `where`: classes[c] has the id c + 1.

    Raises:
        FileError: a name is none of `classes`.
    """
    unknown = [name for name in names if name not in classes]
    if unknown:
        at = f"line {line}: " if line is not None else ""
        known = ", ".join(classes[:24]) + (", ..." if len(classes) > 24 else "")
        raise FileError(where, f"{at}class must be one of {known}, got {unknown[0]!r}")
    return sorted({classes.index(name) + 1 for name in names})
