"""PEP 517 hooks: scikit-build-core's, plus torch only where the host environment has none.

torch is no build requirement of its own: pip would put a CUDA build of several GB into the isolated
environment, although only the headers of the torch that is installed already are needed.
"""

import os
import subprocess
import sys

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

_FIND_TORCH = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"


def _torch_if_missing() -> list[str]:
    hidden = ("PYTHONPATH", "PYTHONHOME")  # pip's isolation hides the host's packages by these
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    host_has_torch = subprocess.run([sys.executable, "-c", _FIND_TORCH], env=env).returncode == 0
    return [] if host_has_torch or os.environ.get("C3A_TORCH_ROOT") else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return [*_build.get_requires_for_build_wheel(config_settings), *_torch_if_missing()]


def get_requires_for_build_editable(config_settings=None):
    return [*_build.get_requires_for_build_editable(config_settings), *_torch_if_missing()]
