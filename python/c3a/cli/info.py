"""``c3a info``: the facts that a bug report needs."""

import argparse
import platform
import sys
from importlib import metadata

import torch

from .. import _library


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "info", help="print the facts of this build, torch and devices that a bug report needs"
    )
    parser.set_defaults(run=lambda options: print(report()))


def report() -> str:
    """Return the facts, one a line."""
    facts = {"c3a": metadata.version("c3a")}
    try:
        from .. import _C
    except ImportError:
        facts["build"] = "without c3a._C (C3A_PYBIND=OFF)"
    else:
        build = _C.build_info()
        facts["compiler"] = build["compiler"]
        facts["torch target"] = f"{build['torch_target']} or newer"
        cuda = build["cuda"]
        facts["built for CUDA"] = (
            f"{cuda['version']}, architectures {cuda['architectures']}" if cuda else "no"
        )
        facts["CPU capability"] = _C.cpu_capability()
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
