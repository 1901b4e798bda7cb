"""A short run of tests/fuzz_cli.py, and whether it notices mistakes."""

import re
import sys

import pytest

import fuzz_cli
from c3a.cli import inspect

pytestmark = pytest.mark.filterwarnings("ignore")


def test_careless_calls_end_with_a_line_and_no_traceback(capsys):
    status = fuzz_cli.main(["--seconds", "8", "--seed", "20250728"])
    said = capsys.readouterr().out
    print(said)
    assert status == 0
    assert " inspects, 0" in said
    assert " merges, 2" in said
    assert " exports, 2" in said
    assert " converts, 2" in said


def raises(options):
    raise KeyError("layer")


def leaves_a_file(options):
    with open("left", "w"):
        raise ValueError("no")


def speaks_python(options):
    raise ValueError("not enough values to unpack (expected 3, got 2)")


def exits(options):
    sys.exit(1)


@pytest.mark.parametrize("mistake", [raises, leaves_a_file, speaks_python, exits])
def test_a_mistake_is_reported_with_the_command_that_repeats_it(mistake, monkeypatch, capsys):
    monkeypatch.setattr(inspect, "run", mistake)
    monkeypatch.setattr(fuzz_cli, "KINDS", {fuzz_cli.inspects: 1})
    assert fuzz_cli.main(["--seconds", "60", "--seed", "5"]) == 1
    said = capsys.readouterr().out
    (first, *_) = re.findall(r"python tests/fuzz_cli.py (--seed 5 --case \d+)  # inspects: ", said)
    assert fuzz_cli.main(first.split()) == 1
    monkeypatch.undo()


def test_a_case_is_drawn_from_the_seed_and_its_number_alone(tmp_path):
    fuzz_cli.originals(tmp_path)
    once, again = ([fuzz_cli.run_case(3, n, tmp_path)[1].facts[:2] for n in range(4)] for _ in "ab")
    assert [fact[0] for fact in once] == [fact[0] for fact in again]
