"""``c3a info``: the facts that a bug report needs."""

import argparse
import platform
import sys
from importlib import metadata

import torch

import c3a

from .. import _library


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "info", help="print the facts of this build, torch and devices that a bug report needs"
    )
    parser.set_defaults(run=lambda options: print(report()))


def report() -> str:
    """Return the facts, one a line."""
    cuda = _library.fact("cuda_version")
    facts = {
        "c3a": c3a.__version__,
        "compiler": str(_library.fact("compiler")),
        "torch target": f"{_library.fact('torch_target')} or newer",
        "built for CUDA": (
            f"{cuda}, architectures {_library.fact('cuda_architectures')}" if cuda else "no"
        ),
        "CPU capability": _library.cpu_level(),
    }
    facts["CUDA library"] = str(_library.loaded_cuda_library)
    facts["torch"] = torch.__version__
    facts["torch CUDA"] = str(torch.version.cuda)
    facts["torch CPU capability"] = torch.backends.cpu.get_cpu_capability()
    facts["torch threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            facts[f"device cuda:{index}"] = (
                f"{device.name}, capability {device.major}.{device.minor}, "
                f"{device.total_memory / 2**30:.0f} GiB"
            )
    else:
        facts["devices"] = "cpu only"
    for package in ("safetensors", "transformers", "peft"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["Python"] = f"{platform.python_version()} ({sys.executable})"
    facts["platform"] = platform.platform()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
