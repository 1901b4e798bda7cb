"""PEP 517 hooks: scikit-build-core's, plus torch only where no installed one is found.

torch is no build requirement of its own: pip would put a CUDA build of several GB into the isolated
environment, although only the headers of the torch that is installed already are needed.
"""

import os
import sys

import find_torch
from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

# Said to the wheel's builder alone: pip would install build tools of that platform.
if platform := os.environ.get("C3A_WHEEL_PLATFORM"):
    os.environ["_PYTHON_HOST_PLATFORM"] = platform


def _torch_if_missing() -> list[str]:
    if os.environ.get("C3A_TORCH_ROOT") or find_torch.torch_root():
        return []
    print(
        "c3a: no torch was found to build against, so one of several GB is fetched for the build: "
        "set C3A_TORCH_ROOT to an installed torch's folder, or build with --no-build-isolation in "
        "an environment that has torch",
        file=sys.stderr,
    )
    return ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return [*_build.get_requires_for_build_wheel(config_settings), *_torch_if_missing()]


def get_requires_for_build_editable(config_settings=None):
    return [*_build.get_requires_for_build_editable(config_settings), *_torch_if_missing()]
