"""A short run of tests/fuzz.py, and whether it notices mistakes."""

import re

import pytest
import torch

import fuzz


@pytest.mark.parametrize("seed", [20250728])
def test_random_operands_give_the_results_of_the_definition(seed, device, capsys):
    status = fuzz.main(["--seconds", "10", "--seed", str(seed), "--device", str(device)])
    said = capsys.readouterr().out
    print(said)
    assert status == 0
    counts = {kind: int(count) for count, kind in re.findall(r"^ +(\d+) (.*)$", said, re.MULTILINE)}
    assert counts["refusals"] > 0
    assert all(counts[operator.name] > 0 for operator in fuzz.OPERATORS)


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


@pytest.mark.parametrize("mistake", [wrong, writing, without_rules])
def test_a_mistake_is_reported_with_the_command_that_repeats_it(mistake, monkeypatch, capsys):
    monkeypatch.setattr(fuzz.OPS, "block_circ_conv", mistake(fuzz.OPS.block_circ_conv))
    assert fuzz.main(["--seconds", "60", "--seed", "5"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("seed 5, ")
    commands = re.findall(r"python tests/fuzz.py (--seed 5 --case \d+)  # block_circ_conv, ", said)
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
