"""The sweep over learning rates runs, goes on where it stopped, and says what it found."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from tiny_model import write_model

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def rates(monkeypatch, tmp_path):
    """Run it in this process with few sentences, and return what it printed."""
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("rates")
    monkeypatch.setattr(module, "TRAINED", 24)
    monkeypatch.setattr(module, "VALIDATED", 12)
    monkeypatch.setattr(module, "LORA_RATES", (1e-2,))
    monkeypatch.setattr(module.torch, "set_num_threads", lambda count: None)
    model = write_model(tmp_path / "model")
    fixed = ["--model", model, "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png"]

    def call(*arguments):
        line = ["rates.py", *fixed, *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in line])
        module.main()
        return json.loads((tmp_path / "r.json").read_text())["runs"]

    yield call
    sys.modules.pop("rates", None)


SMALL = ("--steps", 2, "--batch-size", 4, "--seeds", 2, "--blocks", 12, 24)


def test_every_run_is_kept_once_and_the_table_has_all_of_them(rates, tmp_path, capsys):
    runs = rates(*SMALL, "--rates", 0.1, 1)
    kinds = [("c3a", block, rate) for block in (12, 24) for rate in (0.1, 1)]
    kinds.append(("lora", 8, 1e-2))
    keys = [(run["seed"], run["method"], run["block_size"], run["rate"]) for run in runs]
    assert keys == [(seed, *kind) for seed in (0, 1) for kind in kinds]
    assert len({run["validation_loss"] for run in runs}) == len(runs)
    # Six layers of a block, of 24, 24, 24, 24, 48 and 48 features in or out.
    assert {run["parameters"] for run in runs if run["block_size"] == 24} == {4 * 24 + 2 * 48}
    assert (tmp_path / "r.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "| width | adapter | seeds | rate 0.1 | rate 1 |" in printed
    assert printed.count("| 24 | C3A, block 12 | 2 | ") == 1
    assert printed.count("**") == 2 * 3  # the best rate of each

    more = rates(*SMALL, "--rates", 0.1, 1, 3)
    assert more[: len(runs)] == runs
    assert [run["rate"] for run in more[len(runs) :]] == [3] * 4
    assert rates("--draw") == more


def test_a_run_is_the_same_each_time(rates, tmp_path):
    (first, *_) = rates(*SMALL, "--rates", 1)
    (tmp_path / "r.json").unlink()
    (again, *_) = rates(*SMALL, "--rates", 1)
    assert first["validation_loss"] == again["validation_loss"]


def test_runs_of_other_settings_are_not_mixed(rates, capsys):
    rates(*SMALL, "--rates", 1)
    with pytest.raises(SystemExit):
        rates(*SMALL, "--rates", 1, "--layers", 2)
    assert "holds runs of {'layers': 1, 'steps': 2" in capsys.readouterr().err
