"""The benchmark's arithmetic, its checks, and a run of every part at tiny shapes."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import c3a

BENCH = Path(__file__).parent.parent / "bench"
MODULES = ("report", "timing", "operators", "layers")


@pytest.fixture
def bench(monkeypatch):
    """Its modules by name, which are scripts' neighbours and no package's."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def test_ratios_are_of_the_same_round(bench):
    # The machine slows down to a third: each round's ratio is 2.
    times = bench["timing"].Times({"a": [2.0, 4.0, 6.0], "b": [1.0, 2.0, 3.0]})
    assert times.ratio("a", "b") == (2, 2, 2)
    assert times.medians() == {"a": 4, "b": 2}


def test_time_over_base_is_taken_off_round_by_round(bench):
    rounds = {"base": [10.0, 20.0, 30.0], "a": [11.0, 21.0, 31.0], "b": [14.0, 24.0, 34.0]}
    assert bench["timing"].Times(rounds).ratio_over("base", "a", "b") == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("name", ["a", "b"])
def test_what_takes_no_longer_than_its_base_is_noise_and_meets_no_mark(name, bench):
    rounds = {"base": [2.0, 2.0], "a": [3.0, 3.0], "b": [3.0, 3.0], name: [1.0, 1.0]}
    ratio = bench["timing"].Times(rounds).ratio_over("base", "a", "b")
    assert math.isnan(ratio.value)
    assert str(ratio) == "noise"
    mean = bench["timing"].geometric_mean([1.0, ratio.value])
    mark = bench["report"].Mark("a mark", mean, 10)
    assert not mark.met
    assert mark.row() == ["a mark", "at most 10", "noise", "NOT MET"]


def test_the_spread_of_a_ratio_holds_most_rounds(bench):
    rounds = {"a": [1.0, 1.0, 2.0, 3.0, 3.0], "b": [1.0] * 5}
    value, low, high = bench["timing"].Times(rounds).ratio("a", "b")
    assert (value, low, high) == (2, 1, 3)


@pytest.mark.parametrize(("measured", "at_least"), [(1.5, True), (1.7, False)])
def test_a_mark_is_a_bound_of_its_own_direction(measured, at_least, bench):
    mark = bench["report"].Mark("a mark", measured, 1.6, at_least=at_least)
    assert not mark.met
    assert bench["report"].Mark("a mark", 1.6, 1.6, at_least=at_least).met


def test_every_round_times_every_contender(bench):
    calls = dict.fromkeys("ab", 0)

    def count(name):
        calls[name] += 1
        torch.ones(300, 300) @ torch.ones(300, 300)

    contenders = {name: lambda name=name: count(name) for name in calls}
    times = bench["timing"].measure(contenders, 4)
    assert all(len(times.rounds[name]) == 4 for name in calls)
    assert min(calls.values()) >= bench["timing"].WARM_UPS + 4


@pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_a_layer_that_computes_something_else_is_not_timed(mode, bench):
    layers = bench["layers"]
    case = layers.Case(*layers.QUICK, mode)
    case.validate()
    assert isinstance(case.layers["C3A"], c3a.C3ALinear)
    case.layers["C3A"].forward = lambda x: 1.1 * case.layers["base"](x)
    with pytest.raises(AssertionError, match="C3A: relative error"):
        case.validate()


def test_every_part_runs_and_says_its_marks(tmp_path):
    json_file, markdown = tmp_path / "bench.json", tmp_path / "bench.md"
    command = [sys.executable, BENCH / "bench.py", "--quick", "--plot", tmp_path]
    package = str(Path(c3a.__file__).parents[1])
    run = subprocess.run(
        [*command, "--json", json_file, "--markdown", markdown],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(json_file.read_text())
    machine = figures.pop("machine")
    assert machine in markdown.read_text()
    assert set(figures) == {
        *("layers", "small", "models", "compiled", "memory", "threads", "levels"),
        *("many", "operator", "sizes", "sweep"),
    }
    marks = {part: len(result["marks"]) for part, result in figures.items()}
    # A geometric mean and a shape, two dtypes, one thread and two.
    assert marks["layers"] == 8
    assert (marks["models"], marks["compiled"]) == (3, 2)
    assert marks["many"] == 5  # the loop at one token, then two ratios at 16 and at 64
    assert marks["small"] == marks["memory"] == marks["threads"] == 1
    count = sum(marks.values())
    assert f"of {count} marks met (they say nothing at these sizes)" in run.stdout
    assert markdown.read_text().count(" | at most ") + markdown.read_text().count(
        " | at least "
    ) == (count)
    for picture in ("layers.png", "operator.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
