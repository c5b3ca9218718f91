"""Readers of problems: JSONL, JSON, CSV, Parquet, and Hugging Face data sets, all as rows of columns.

The libraries that Parquet and data sets need are imported when such data are read, and only then.
"""

import csv
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardes.config.task import is_hub_reference, is_range
from shardes.errors import UserError
from shardes.tasks.base import PlacedRow, Row
from shardes.tasks.canonical import canonical, is_plain
from shardes.tasks.rows import shown
from shardes.utils.paths import path_problem
from shardes.utils.reading import open_regular, parse_json, read_regular

# What is read of one file: rows are kept in memory, where they take several times as much.
_MOST_BYTES = 1 << 35
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}
_INSTALL = "install it with: pip install 'shardes[data]'"


def read_rows(
    source: Path, *, key: str, columns: Mapping[str, str] | None = None, check: Callable[[Row, str], None]
) -> list[PlacedRow]:
    """Read the rows of a file or data set, and check each.

    Args:
        source: A file, whose name ends with what it holds (``.jsonl``, ``.json``, ``.csv``, ``.tsv``,
            ``.parquet``, in small or capital letters; any other is read as JSONL); ``DIR[@SPLIT]``, a data
            set saved to disk; ``hf:NAME[:SUBSET][@SPLIT]``, one of the Hugging Face hub; or
            ``range:START:STOP``, rows with an ``index`` alone.
        key: The configuration key that names it, for messages.
        columns: Names that rows get besides their own: from the new name to the column that it means.
        check: Raises ``UserError`` for a row that the task cannot use.

    Raises:
        UserError: It cannot be read, is empty, a row cannot be used, or two rows have the same ``id``.
    """
    rows: list[PlacedRow] = []
    places: dict[Any, str] = {}
    known: set[tuple[str, type]] = set()
    for place, raw in _read(source, key):
        where = f"{key}: {source} {place}"
        if not isinstance(raw, dict):
            raise UserError(f"{where}: got {shown(raw)}; every {place.split()[0]} must be one JSON object")
        row = _with_columns(raw, columns or {}, where, f"{key.rpartition('.')[0]}.columns")
        check(row, where)
        _check_contents(row, where, known)
        if row.get("id") is not None:
            first = places.setdefault(_text_of({"id": row["id"]}, where), place)
            if first != place:
                raise UserError(
                    f"{where}: column 'id' is {shown(row['id'])}, as in {first}; give each problem an id of "
                    "its own, or leave the column out"
                )
        rows.append(PlacedRow(row, where))
    if not rows:
        raise UserError(f"{key}: {source} has no rows; give at least one problem")
    return rows


def rows_sha256(rows: Sequence[Row]) -> str:
    """Compute a hash of the rows in their order, whatever file or format they came from.

    Raises:
        UserError: A row holds an object whose contents cannot be known.
    """
    digest = hashlib.sha256()
    for number, row in enumerate(rows, start=1):
        digest.update(_text_of(row, f"task.data: row {number}").encode() + b"\n")
    return digest.hexdigest()


def split_rows(
    rows: Sequence[Row], *, fraction: float, seed: int, row_key: Callable[[Row], str] | None = None
) -> tuple[list[Row], list[Row]]:
    """Split rows into training and held-out rows.

    Problems are ordered by a hash of seed and problem, and the first of them are held out, at least one. So
    the split depends on neither the order of the rows nor a random generator, and equal problems stay
    together.

    Args:
        rows: The rows to split.
        fraction: Fraction of the distinct problems that is held out, between 0 and 1.
        seed: Another seed gives another split.
        row_key: Names a row's problem; None: all columns but ``id`` do.

    Returns:
        Training and held-out rows, each in the order in which they were.
    """
    keys = [
        row_key(row) if row_key else _text_of({k: row[k] for k in row if k != "id"}, "task.data")
        for row in rows
    ]
    ordered = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    heldout = set(ordered[: max(1, round(fraction * len(ordered)))])
    pairs = list(zip(rows, keys, strict=True))
    return [row for row, key in pairs if key not in heldout], [row for row, key in pairs if key in heldout]


def _text_of(row: Row, where: str) -> str:
    try:
        return canonical(row)
    except Exception as error:  # an object's own methods may raise anything
        raise UserError(
            f"{where}: {_one_line(error)}; leave such objects out, or make them of texts, numbers, bytes, "
            "lists, dictionaries, arrays and images"
        ) from None


def _check_contents(row: Row, where: str, known: set[tuple[str, type]]) -> None:
    """Refuse objects that cannot be told apart; columns are taken to hold objects of few types."""
    for name, value in row.items():
        if is_plain(value) or (name, type(value)) in known:
            continue
        _text_of({name: value}, f"{where}: column {name!r}")
        if not isinstance(value, list | tuple | dict):
            known.add((name, type(value)))


def _with_columns(
    row: dict[str, Any], columns: Mapping[str, str], where: str, columns_key: str
) -> dict[str, Any]:
    for name, origin in columns.items():
        if origin not in row:
            raise UserError(
                f"{where}: column {origin!r} is missing, which {columns_key} gives for {name!r}; the row has "
                f"{', '.join(map(repr, row)) or 'no columns'}"
            )
    return row | {name: row[origin] for name, origin in columns.items()}


def _read(source: Path, key: str) -> Iterator[tuple[str, Any]]:
    """Read the rows as they are, each with its place in the source."""
    if is_range(source):
        return _of_range(source, key)
    if is_hub_reference(source):
        return _of_data_set(_from_hub(source, key), f"{key}: {source}")
    try:
        directory, split = source, ""
        if not source.exists() and "@" in source.name:
            name, _, split = source.name.rpartition("@")
            directory = source.with_name(name) if name else source
        is_directory, is_file = directory.is_dir(), source.is_file()
    except OSError as error:  # a directory on the way may not be entered
        raise UserError(f"{key}: {source} cannot be read ({error.strerror})") from None
    if is_directory:
        return _of_data_set(_from_disk(directory, split, key), f"{key}: {source}")
    if not is_file:
        raise UserError(
            f"{key}: {source} cannot be read (it {path_problem(source)}); give the path of a file of "
            "problems (.jsonl, .json, .csv, .tsv or .parquet), the directory of a data set saved to disk, "
            "or hf:NAME for one of the Hugging Face hub"
        )
    suffix = source.suffix.lower()
    if suffix == ".parquet":
        return _of_parquet(source, key)
    text = _text(source, key)
    if suffix == ".json":
        return _of_json(text, source, key)
    if suffix in (".csv", ".tsv"):
        return _of_csv(text, source, key, delimiter="\t" if suffix == ".tsv" else ",")
    return _of_lines(text, source, key)


def _of_range(source: Path, key: str) -> Iterator[tuple[str, Any]]:
    """Yield rows that have nothing but an index."""
    found = re.fullmatch(r"range:(\d{1,9}):(\d{1,9})", str(source))
    start, stop = map(int, found.groups()) if found else (0, 0)
    if start >= stop:
        raise UserError(
            f"{key}: got {source}; wanted: range:START:STOP with STOP > START, such as range:0:200"
        )
    return ((f"index {index}", {"index": index}) for index in range(start, stop))


def _text(source: Path, key: str) -> str:
    try:
        content = read_regular(source, max_bytes=_MOST_BYTES)
        packed = next((name for start, name in _PACKED.items() if content.startswith(start)), None)
        if packed is not None:
            raise UserError(f"{key}: {source} is packed by {packed}; unpack it, and give what was in it")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{key}: {source} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: {source} is not UTF-8 text ({error.reason} at byte {error.start}); convert it, or give "
            "its name the ending of what it is, such as .parquet"
        ) from None


def _of_lines(text: str, source: Path, key: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", parse_json(line, refuse_repeats=True)
        except ValueError as error:
            raise UserError(
                f"{key}: {source} line {number}: not JSON ({error}): {line[:80]!r}; every line must be one "
                "JSON object"
            ) from None


def _of_json(text: str, source: Path, key: str) -> Iterator[tuple[str, Any]]:
    try:
        content = parse_json(text, refuse_repeats=True)
    except ValueError as error:
        if str(error).startswith("Extra data"):
            # JSONL under the name of JSON, as data sets often have it.
            yield from _of_lines(text, source, key)
            return
        raise UserError(f"{key}: {source}: not JSON ({error}); wanted: a list of objects") from None
    if not isinstance(content, list):
        raise UserError(f"{key}: {source}: got {shown(content)}; wanted: a list of objects")
    for number, row in enumerate(content, start=1):
        yield f"item {number}", row


def _of_csv(text: str, source: Path, key: str, *, delimiter: str) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines: list[tuple[int, list[str]]] = []
    first = 1
    # A text to be summarised may be longer than the 128 KiB that a cell has by default.
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        for cells in reader:
            if cells:
                lines.append((first, cells))
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{key}: {source} line {reader.line_num}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    if not lines:
        return
    names = lines.pop(0)[1]
    if len(set(names)) < len(names):
        raise UserError(f"{key}: {source} line 1: two columns have the same name; got {', '.join(names)}")
    for number, cells in lines:
        if len(cells) != len(names):
            raise UserError(
                f"{key}: {source} line {number}: {len(cells)} cells, but line 1 names {len(names)} columns; "
                "put quotes around a text that contains the separator"
            )
    typed = [_typed([cells[column] for _, cells in lines]) for column in range(len(names))]
    for row, (number, _) in enumerate(lines):
        yield f"line {number}", {name: values[row] for name, values in zip(names, typed, strict=True)}


def _typed(cells: Sequence[str]) -> list[Any]:
    """Convert a column's cells to numbers or lists if each is one as JSON writes it; else keep texts."""
    try:
        values = [parse_json(cell) for cell in cells]
    except ValueError:
        return list(cells)
    kinds: tuple[Any, ...] = (int, float, (int, float), list)
    is_one_kind = any(all(isinstance(v, kind) and not isinstance(v, bool) for v in values) for kind in kinds)
    return values if is_one_kind else list(cells)


def _of_parquet(source: Path, key: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{key}: {source}: Parquet needs the package pyarrow; {_INSTALL}") from None
    try:
        with open_regular(source):  # pyarrow would wait for a pipe's writer
            pass
        rows = pyarrow.parquet.read_table(source).to_pylist()
    except OSError as error:
        reason = error.strerror or _one_line(error)
        raise UserError(f"{key}: {source} cannot be read ({reason})") from None
    except pyarrow.ArrowException as error:
        raise UserError(f"{key}: {source}: not a Parquet file ({_one_line(error)})") from None
    return ((f"row {number}", _without_nan(row)) for number, row in enumerate(rows, start=1))


def _of_data_set(data_set: Any, where: str) -> Iterator[tuple[str, Any]]:
    rows, number = iter(data_set), 0
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # such as an image that is damaged, or a decoder that is not installed
            raise UserError(
                f"{where} row {number} cannot be read ({type(error).__name__}: {_one_line(error)})"
            ) from None
        yield f"row {number}", _without_nan(row)


def _from_disk(directory: Path, split: str, key: str) -> Any:
    datasets = _datasets(f"{key}: {directory}")
    try:
        for path in directory.rglob("*"):
            if not path.is_dir():
                with open_regular(path):
                    pass
        found = datasets.load_from_disk(str(directory))
    except Exception as error:
        raise UserError(
            f"{key}: {directory} is no data set saved to disk ({_one_line(error)}); give a directory that "
            "Dataset.save_to_disk wrote, or one of the files in it that is .jsonl, .json, .csv or .parquet"
        ) from None
    return _one_split(found, split, f"{key}: {directory}")


def _from_hub(source: Path, key: str) -> Any:
    reference, _, split = str(source).removeprefix("hf:").partition("@")
    name, _, subset = reference.partition(":")
    datasets = _datasets(f"{key}: {source}")
    try:
        found = datasets.load_dataset(name, subset or None)
    except Exception as error:
        raise UserError(
            f"{key}: {source} cannot be loaded ({type(error).__name__}: {_one_line(error)}); wanted: "
            "hf:NAME[:SUBSET][@SPLIT], such as hf:openai/gsm8k:main@train"
        ) from None
    return _one_split(found, split, f"{key}: {source}")


def _one_split(found: Any, split: str, where: str) -> Any:
    """Return the split that was asked for, or the only one."""
    if not isinstance(found, dict):
        if split:
            raise UserError(f"{where} has no splits; leave @{split} away")
        return found
    if not split and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        asked = f"there is no split {split!r}" if split else "it has several splits"
        raise UserError(f"{where}: {asked}; choose one of them with @ behind the name: {', '.join(found)}")
    return found[split]


def _datasets(where: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{where}: a data set needs the package datasets; {_INSTALL}") from None
    datasets.disable_progress_bars()
    return datasets


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN, a table's missing number, by None: NaN is equal to nothing, itself included."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
