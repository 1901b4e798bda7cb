import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the device that operators run on")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
