"""Reading text, tables and images: built in, from files, from the Hub.

An address is one of
    builtin:docs        the text beside the zoo's language model (Python's documentation), already split
    a path              .txt .md; .jsonl .json .csv .parquet; .npz; or a directory that `datasets.load_dataset` understands
    a Hub id            through `datasets.load_dataset`, as "name" or "name:configuration"
and a split other than the default is said by a second address. Where a source has no held-out part, the last twentieth is held out: of a text the
last twentieth of its characters, of a table rows drawn once with a fixed seed.

The fingerprint is the sha256 of the content, not of the path: the same data under another name resumes the same run. Nothing is ever unpickled.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.error import DataError, unknown

HELD = 20                                                         # one part in so many is held out where nothing else is said
ROOT = "builtin:"


@dataclass(frozen=True)
class Text:
    """A text in two parts.

    >>> Text("abc", "d").fingerprint[:8]
    '70ed4037'
    """

    train: str
    held_out: str

    @property
    def fingerprint(self) -> str:
        """sha256 of both parts, in hex."""
        return digest([self.train.encode(), self.held_out.encode()])


@dataclass(frozen=True)
class Table:
    """Rows in two parts: column name -> values, each a list or an array of the same length."""

    train: dict[str, Any]
    held_out: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """sha256 of both parts, in hex."""
        parts = []
        for rows in (self.train, self.held_out):
            for name in sorted(rows):
                values = rows[name]
                array = isinstance(values, np.ndarray)
                parts += [name.encode(), *([values.tobytes()] if array else (v if isinstance(v, bytes) else json.dumps(v).encode() for v in values))]
        return digest(parts)


def digest(parts: Iterable[bytes]) -> str:
    """sha256 over parts, each preceded by its length."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def text(address: str, held_out: str | None = None) -> Text:
    """Read a text. held_out: the address of its held-out part.

    Tables are read for their column `text`, whose rows are joined by blank lines.

    Raises:
        DataError: nothing there, an empty text, a table without the column `text`.
    """
    if address.startswith(ROOT):
        if address != ROOT + "docs":
            raise DataError(unknown("text", address, [ROOT + "docs"]))
        from ..model.zoo import text as zoo_text

        return Text(zoo_text("train"), zoo_text("heldout"))
    whole = _whole_text(address)
    if held_out is not None:
        return Text(whole, _whole_text(held_out))
    at, slack = len(whole) - len(whole) // HELD, len(whole) // HELD
    cut = whole.rfind("\n", at - slack, at) + 1 or at             # at the end of a line, where one is near
    return Text(whole[:cut], whole[cut:])


def table(address: str, held_out: str | None = None, columns: Iterable[str] = ()) -> Table:
    """Read a table. columns: those that must be there.

    Raises:
        DataError: nothing there, no rows, columns that are missing (naming those found) or of unequal length.
    """
    if address.startswith(ROOT):
        raise DataError(f"{address} is a text, not a table; give a .jsonl, .csv, .parquet or (images) .npz file, or a Hub id")
    train, held = _splits(address)
    held = _splits(held_out)[0] if held_out is not None else held
    if held is None:
        rows = _length(address, train)
        order = np.random.default_rng(0).permutation(rows)        # fixed: the held-out rows are the same for every seed
        cut = rows - max(1, rows // HELD)
        train, held = _take(train, np.sort(order[:cut])), _take(train, np.sort(order[cut:]))
    for place, part in ((address, train), (held_out or address, held)):
        missing = [name for name in columns if name not in part]
        if missing:
            raise DataError(f"{place} has no column {', '.join(map(repr, missing))}; found: {', '.join(part) or 'none'}. "
                            "Rename the columns, or name those to read")
        if _length(place, part) == 0:
            raise DataError(f"{place} holds no rows" + ("; one row is too few to hold one out" if rows_of(held) else ""))
    return Table(train, held)


def present(address: str) -> None:
    """Refuse a file that is not there or empty, before anything that takes time; what else may be wrong, reading says.

    Raises:
        DataError: naming what lies beside it.
    """
    path = Path(address)
    if path.suffix in (".txt", ".md", *READERS) and not path.is_dir() and not address.startswith(ROOT):
        _existing(path)


def _whole_text(address: str) -> str:
    path = Path(address)
    if path.suffix in (".txt", ".md"):
        try:
            whole = _existing(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{address} is not UTF-8 text: {error}") from None
    else:
        rows = _splits(address)[0]
        if "text" not in rows:
            raise DataError(f"{address} has no column 'text'; found: {', '.join(rows) or 'none'}. Rename the column, or give a .txt file")
        whole = "\n\n".join(map(str, rows["text"]))
    if not whole.strip():
        raise DataError(f"{address} holds no text")
    return whole


def _splits(address: str) -> tuple[dict[str, Any], Any]:
    """The train rows, and the held-out rows or None."""
    path = Path(address)
    reader = READERS.get(path.suffix)
    if reader is None or path.is_dir():
        return _hub(address)
    try:
        rows = reader(_existing(path))
    except DataError:
        raise
    except Exception as error:                                    # each reader has its own family of errors; all mean: not what its name says
        raise DataError(f"{address} cannot be read as {path.suffix}: {error}") from None
    if path.suffix == ".npz" and {"x_train", "y_train"} <= set(rows):
        held = {"x": rows["x_test"], "y": rows["y_test"]} if {"x_test", "y_test"} <= set(rows) else None
        return {"x": rows["x_train"], "y": rows["y_train"]}, held
    return rows, None


def _existing(path: Path) -> Path:
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}" + (f"; its directory holds {', '.join(beside)}" if beside else "; nor its directory"))
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    return path


def _json(path: Path) -> dict[str, Any]:
    raw = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in raw.splitlines() if line.strip()]
    else:
        rows = json.loads(raw)
    if isinstance(rows, dict):                                    # already columns
        return {name: list(values) for name, values in rows.items()}
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must hold objects, one a row")
    return _columns(rows)


def _csv(path: Path) -> dict[str, Any]:
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    return {name: _numbers(values) for name, values in _columns(rows).items()}


def _parquet(path: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    return {name: list(values) for name, values in pq.read_table(path).to_pydict().items()}


def _npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {".json": _json, ".jsonl": _json, ".csv": _csv, ".parquet": _parquet, ".npz": _npz}


def _hub(address: str) -> tuple[dict[str, Any], Any]:
    import datasets

    name, _, configuration = address.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None)
    except Exception as error:                                    # datasets, huggingface_hub, requests and fsspec each raise their own
        raise DataError(f"{address!r} is no file here, and datasets.load_dataset could not load it: {error}") from None
    held = next((found[split] for split in ("validation", "test") if split in found), None)
    if "train" not in found:
        raise DataError(f"{address} has no split 'train'; found: {', '.join(found)}")
    return _rows(found["train"]), None if held is None else _rows(held)


def _rows(split: Any) -> dict[str, Any]:
    return {name: list(split[name]) for name in split.column_names}


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _numbers(values: list[Any]) -> list[Any]:
    for kind in (int, float):
        try:
            return [kind(value) for value in values]
        except (TypeError, ValueError):
            continue
    return values


def _length(place: str, rows: dict[str, Any]) -> int:
    lengths = {name: len(values) for name, values in rows.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{place} has columns of unequal length: {lengths}")
    return next(iter(lengths.values()), 0)


def rows_of(table: dict[str, Any]) -> int:
    """The number of rows."""
    return len(next(iter(table.values()), ()))


def _take(rows: dict[str, Any], index: np.ndarray) -> dict[str, Any]:
    return {name: values[index] if isinstance(values, np.ndarray) else [values[i] for i in index] for name, values in rows.items()}
