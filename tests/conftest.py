import os

import pytest
import torch

import c3a  # noqa: F401 - it defines the operators


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the device that operators run on")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def default_device(device):
    """Tensors and modules that a test makes are on the device."""
    with device:
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def temporaries_start_as_nan():
    """On the emulated machine, so that numbers that were never written are seen."""
    if "C3A_EMULATED" in os.environ:
        torch.use_deterministic_algorithms(True)
        assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
