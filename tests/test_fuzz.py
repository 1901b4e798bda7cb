"""A short run of tests/fuzz.py, and whether it notices mistakes."""

import re

import pytest
import torch

import fuzz
import fuzzing


def test_random_operands_give_the_results_of_the_definition_for_every_operator(device):
    missing = {"refusals", *(operator.name for operator in fuzz.OPERATORS)}
    for number in range(1000):
        kind, said, draw = fuzz.run_case(20250728, number, str(device))
        assert said is None, (number, draw.facts)
        missing.discard(kind.removesuffix(", gradients"))
        if not missing:
            break
    assert not missing


def wrong(op):
    """Return the operator with one number of its result a little off."""

    def perturbed(*operands, **arguments):
        y = op(*operands, **arguments)
        if y.numel():
            y.view(-1)[0] += 2e-2 * (1 + y.view(-1)[0].abs())
        return y

    return perturbed


def writing(op):
    """Return the operator with an operand changed after the call."""

    def perturbed(*operands, **arguments):
        y = op(*operands, **arguments)
        (operands[0] if operands else arguments["x"]).detach().neg_()
        return y

    return perturbed


def without_rules(op):
    """Return the operator as if it took everything."""

    def perturbed(*operands, **arguments):
        try:
            return op(*operands, **arguments)
        except RuntimeError:
            return torch.zeros(1)

    return perturbed


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("block_circ_conv", wrong),
        ("block_circ_conv", writing),
        ("block_circ_conv", without_rules),
        ("block_circ_conv_many", wrong),
        ("block_circ_conv_linear", wrong),
    ],
)
def test_a_mistake_is_reported_with_the_command_that_repeats_it(name, mistake, monkeypatch, capsys):
    monkeypatch.setattr(fuzzing, "MOST_FAILURES", 1)
    monkeypatch.setattr(fuzz.OPS, name, mistake(getattr(fuzz.OPS, name)))
    assert fuzz.main(["--seconds", "60", "--seed", "5"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("seed 5, ")
    commands = re.findall(r"python tests/fuzz.py (--seed 5 --case \d+)  # block_circ_conv", said)
    assert commands, said
    assert fuzz.main(commands[0].split()) == 1
    monkeypatch.undo()
    assert fuzz.main(commands[0].split()) == 0


def test_a_case_is_drawn_from_the_seed_and_its_number_alone(device):
    for number in range(20):
        torch.manual_seed(number)
        once, again = (fuzz.run_case(3, number, str(device)) for _ in range(2))
        assert once[:2] == again[:2]
        assert once[2].facts == again[2].facts
