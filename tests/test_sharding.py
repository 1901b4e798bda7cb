"""Sharded over processes: DTensor's rules, tensor parallelism, FSDP2. Gloo on the CPU stands in."""

import json
import subprocess
import sys

import pytest

import sharded_models
import sharded_operators
import sharded_trainers
from processes import errors_in


@pytest.fixture(scope="module")
def of_operators(tmp_path_factory):
    return errors_in(2, sharded_operators.CHECKS, tmp_path_factory.mktemp("operators"))


@pytest.mark.parametrize("check", [check.__name__ for check in sharded_operators.CHECKS])
def test_on_dtensors(check, of_operators):
    assert not of_operators[check], of_operators[check]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tmp_path_factory.mktemp("models") / "checkpoint"


@pytest.fixture(scope="module")
def of_models(checkpoint):
    return errors_in(2, sharded_models.TWO, checkpoint.parent)


@pytest.mark.parametrize("check", [check.__name__ for check in sharded_models.TWO])
def test_in_two_processes(check, of_models):
    assert not of_models[check], of_models[check]


@pytest.fixture(scope="module")
def of_trainers(tmp_path_factory):
    return errors_in(2, sharded_trainers.TWO, tmp_path_factory.mktemp("trainers"))


@pytest.mark.parametrize("check", [check.__name__ for check in sharded_trainers.TWO])
def test_with_trainers(check, of_trainers):
    assert not of_trainers[check], of_trainers[check]


@pytest.fixture(scope="module")
def on_a_grid(checkpoint, of_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    (folder / "checkpoint.json").write_text(json.dumps(str(checkpoint)))
    return errors_in(4, sharded_models.FOUR, folder)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.__name__ for check in sharded_models.FOUR])
def test_in_four_processes(check, on_a_grid):
    assert not on_a_grid[check], on_a_grid[check]


def test_a_checkpoint_of_two_processes_resumes_in_one(checkpoint, of_models):
    sharded_models.resumed_is_as_never_stopped(sharded_models.patched(), checkpoint)


def test_an_error_in_one_process_is_said_and_the_checks_end(tmp_path):
    checks = [sharded_operators.fails_in_the_first_process, sharded_operators.reduces_more]
    errors = errors_in(2, checks, tmp_path)
    assert "the first one's own error" in errors["fails_in_the_first_process"]
    assert "not run" in errors["reduces_more"]


def test_importing_c3a_does_not_import_dtensor():
    code = "import sys, c3a; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
