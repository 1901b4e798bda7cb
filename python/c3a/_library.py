"""Loads the operator libraries: the CPU's, which defines the schemas, then CUDA's if it fits."""

import sys
import warnings
from pathlib import Path

import torch

# One folder, or two where an editable install keeps what is built apart from the sources.
_FOLDERS = [Path(folder) for folder in sys.modules[__package__].__path__]


def _libraries(pattern: str) -> list[Path]:
    return sorted(library for folder in _FOLDERS for library in folder.glob(pattern))


def cuda_library() -> tuple[Path | None, str]:
    """Return the CUDA library that this torch can load, or None, and the reason in words.

    Without it, CUDA tensors go through ATen's FFTs, as every device's do that has no library.
    """
    if torch.version.cuda is None:
        return None, "this torch is built without CUDA"
    major = torch.version.cuda.split(".")[0]
    if fitting := _libraries(f"libc3a_cuda{major}.so"):
        return fitting[0], f"built for CUDA {major}, as this torch"
    built = [path.stem.removeprefix("libc3a_cuda") for path in _libraries("libc3a_cuda*.so")]
    has = f"has CUDA {', '.join(built)} only" if built else "is built without CUDA"
    return None, f"this torch has CUDA {major}, this build of c3a {has}"


def _load() -> None:
    found = _libraries("libc3a_cpu.so")
    if not found:
        folders = ", ".join(map(str, _FOLDERS))
        raise ImportError(f"c3a: libc3a_cpu.so is not in {folders}; install c3a with pip")
    torch.ops.load_library(found[0])
    cuda, reason = cuda_library()
    if cuda is not None:
        try:
            torch.ops.load_library(cuda)
        except OSError as error:  # what it takes from torch's CUDA libraries is not there
            cuda, reason = None, str(error)
    if cuda is None and torch.version.cuda is not None and _libraries("libc3a_cuda*.so"):
        warnings.warn(
            f"c3a: {reason}; CUDA tensors go through torch's own FFTs, several times slower",
            stacklevel=2,
        )


_load()
