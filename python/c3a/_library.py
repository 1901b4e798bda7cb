"""Loads the operator libraries: the CPU's, which defines the schemas, then CUDA's if it fits."""

import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

# One folder, or two where an editable install keeps what is built apart from the sources.
_FOLDERS = [Path(folder) for folder in sys.modules[__package__].__path__]

# The majors of CUDA that the sources build a library for.
_CUDA_MAJORS = ("13",)


def _libraries(pattern: str) -> list[Path]:
    return sorted(library for folder in _FOLDERS for library in folder.glob(pattern))


class CudaLibrary(NamedTuple):
    """What serves CUDA tensors; without a library ATen's FFTs do, as on other devices."""

    path: Path | None
    reason: str  # why it is this one, or none
    remedy: str = ""  # what a user can do to have one

    def __str__(self) -> str:
        if self.path is not None:
            return f"loaded, {self.reason}"
        return f"not loaded: {self.reason}" + (f"; {self.remedy}" if self.remedy else "")


def cuda_library() -> CudaLibrary:
    """Return the CUDA library that this torch can load."""
    if torch.version.cuda is None:
        return CudaLibrary(None, "this torch is built without CUDA")
    major = torch.version.cuda.split(".")[0]
    if fitting := _libraries(f"libc3a_cuda{major}.so"):
        return CudaLibrary(fitting[0], f"built for CUDA {major}, as this torch")
    built = [path.stem.removeprefix("libc3a_cuda") for path in _libraries("libc3a_cuda*.so")]
    has = f"has CUDA {', '.join(built)} only" if built else "is built without CUDA"
    if major in _CUDA_MAJORS:
        remedy = (
            f"pip install 'cuda-toolkit[nvcc,cufft,cccl]=={major}.*' and, in the folder of c3a's "
            "sources, C3A_CUDA=ON pip install --force-reinstall --no-deps ."
        )
    else:
        remedy = f"install a torch built for CUDA {' or '.join(_CUDA_MAJORS)}"
    return CudaLibrary(None, f"this torch has CUDA {major}, this build of c3a {has}", remedy)


def _load() -> CudaLibrary:
    found = _libraries("libc3a_cpu.so")
    if not found:
        folders = ", ".join(map(str, _FOLDERS))
        raise ImportError(f"c3a: libc3a_cpu.so is not in {folders}; install c3a with pip")
    torch.ops.load_library(found[0])
    cuda = cuda_library()
    if cuda.path is not None:
        try:
            torch.ops.load_library(cuda.path)
        except OSError as error:  # what it takes from torch's CUDA libraries is not there
            cuda = CudaLibrary(None, str(error))
    # Nothing is lost on a machine without a GPU, where CUDA builds of torch are common. Devices are
    # counted without starting CUDA, which processes forked later would not survive.
    if cuda.path is None and torch.version.cuda is not None and torch.cuda.device_count() > 0:
        warnings.warn(
            f"c3a: on this machine's GPU it goes through torch's own FFTs, several times slower; "
            f"CUDA library {cuda}",
            stacklevel=2,
        )
    return cuda


loaded_cuda_library = _load()
