"""What a part of the benchmark returns, and how it is shown: tables, marks, figures, Markdown."""

import json
import math
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from c3a._library import cpu_level


@dataclass
class Grid:
    """A table of text; the first column's words, the others' numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self, of: str = "") -> Table:
        title = f"{of}: {self.title}" if of else self.title
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{self.title}:\n\n{table}\n"


@dataclass
class Mark:
    """A bound that a figure has to keep. What was lost in the noise keeps none."""

    what: str
    measured: float
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def row(self) -> list[str]:
        bound = f"at {'least' if self.at_least else 'most'} {self.limit:g}{self.unit}"
        measured = "noise" if math.isnan(self.measured) else f"{self.measured:.2f}{self.unit}"
        return [self.what, bound, measured, "met" if self.met else "NOT MET"]


@dataclass
class Figure:
    """A single figure, without a bound."""

    what: str
    value: float
    kind: str

    def row(self) -> list[str]:
        written = {
            "percent": "{:.1%}",
            "ratio": "{:.2f}",
            "us": "{:.1f} us",
            "bytes": "{:.0f} bytes",
            "MB": "{:.1f} MB",
        }
        return [self.what, written[self.kind].format(self.value)]


@dataclass
class Result:
    """A part's tables, marks and figures; ``raw`` goes into the JSON file and to the pictures."""

    grids: list[Grid] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    raw: list[dict] = field(default_factory=list)

    def tables(self) -> list[Grid]:
        tables = [*self.grids]
        if self.figures:
            tables.append(
                Grid("single figures", ["what", "value"], [figure.row() for figure in self.figures])
            )
        if self.marks:
            tables.append(marks_grid(self.marks))
        return tables

    def json(self) -> dict:
        return {
            "marks": [{**asdict(mark), "met": mark.met} for mark in self.marks],
            "figures": [asdict(figure) for figure in self.figures],
            "raw": self.raw,
        }


def marks_grid(marks: list[Mark]) -> Grid:
    return Grid("marks", ["mark", "bound", "measured", ""], [mark.row() for mark in marks])


def processor() -> str:
    """The processor's name, as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> str:
    return f"{processor()}, {cpu_level()}, torch {torch.__version__}"


def show(console: Console, name: str, result: Result) -> None:
    for table in result.tables():
        console.print(table.rich(name))


def write_markdown(path: Path, title: str, results: dict[str, Result]) -> None:
    parts = [f"{title}\n"]
    for name, result in results.items():
        parts.append(f"## {name}\n")
        parts += [table.markdown() for table in result.tables()]
    path.write_text("\n".join(parts))


def write_json(path: Path, title: str, results: dict[str, Result]) -> None:
    figures = {"machine": title, **{name: result.json() for name, result in results.items()}}
    path.write_text(json.dumps(figures, indent=2) + "\n")
