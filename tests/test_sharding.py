"""Sharded over processes: DTensor's rules, tensor parallelism, FSDP2. Gloo on the CPU stands in."""

import subprocess
import sys

import pytest

import sharded_operators
from processes import errors_in


@pytest.fixture(scope="module")
def of_operators(tmp_path_factory):
    return errors_in(2, sharded_operators.CHECKS, tmp_path_factory.mktemp("operators"))


@pytest.mark.parametrize("check", [check.__name__ for check in sharded_operators.CHECKS])
def test_on_dtensors(check, of_operators):
    assert not of_operators[check], of_operators[check]


def test_importing_c3a_does_not_import_dtensor():
    code = "import sys, c3a; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
