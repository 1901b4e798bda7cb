"""A short run of tests/fuzz_files.py, and whether it notices mistakes."""

import re
from pathlib import Path

import pytest
import torch

import c3a
import fuzz_files
import fuzzing
from c3a import adapter, adapter_files


def test_damaged_folders_load_or_are_refused_in_one_line(capsys):
    status = fuzz_files.main(["--seconds", "10", "--seed", "20251125"])
    said = capsys.readouterr().out
    print(said)
    assert status == 0
    kinds = {kind for _, kind in re.findall(r"^ +(\d+) (.*)$", said, re.MULTILINE)}
    assert {f"refused after {damage.__name__}" for damage in fuzz_files.DAMAGES} <= kinds
    assert {"loaded after edit_config", "loaded after edit_tensors"} <= kinds


def silent(monkeypatch):
    monkeypatch.setattr(adapter.warnings, "warn", lambda *_, **__: None)


def unchecked_dtypes(monkeypatch):
    monkeypatch.setattr(adapter_files, "SUPPORTED_DTYPES", fuzz_files.DTYPES)


def unchecked_types(monkeypatch):
    monkeypatch.setattr(adapter_files, "_KEYS", {})


def changed_first(monkeypatch):
    check = adapter._check_tensors

    def perturbed(model, *arguments):
        model.classifier.bias.data.add_(1)
        check(model, *arguments)

    monkeypatch.setattr(adapter, "_check_tensors", perturbed)


def nameless(monkeypatch):
    monkeypatch.setattr(adapter, "read", lambda _: adapter_files.read(Path("elsewhere")))


@pytest.mark.parametrize(
    "mistake", [silent, unchecked_dtypes, unchecked_types, changed_first, nameless]
)
def test_a_mistake_is_reported_with_the_command_that_repeats_it(mistake, monkeypatch, capsys):
    monkeypatch.setattr(fuzzing, "MOST_FAILURES", 1)
    with monkeypatch.context() as patched:
        mistake(patched)
        assert fuzz_files.main(["--seconds", "60", "--seed", "5"]) == 1
        said = capsys.readouterr().out
        commands = re.findall(r"python tests/fuzz_files.py (--seed 5 --case \d+)  # adapter", said)
        assert commands, said
        assert fuzz_files.main(commands[0].split()) == 1
    assert fuzz_files.main(commands[0].split()) == 0


def test_a_case_is_drawn_from_the_seed_and_its_number_alone(tmp_path):
    fuzz_files.save_all(tmp_path)
    for number in range(30):
        torch.manual_seed(number)
        once, again = (fuzz_files.run_case(3, number, tmp_path) for _ in range(2))
        assert once[:2] == again[:2]
        assert once[2].facts == again[2].facts
    assert c3a.load_adapter(fuzz_files.Model(), tmp_path / "0")
